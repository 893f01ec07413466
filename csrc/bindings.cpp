// The Python module fastattn._native: the parameter struct, the kernels, and what they were built from.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "build_info.h"
#include "cpu/dispatch.h"
#include "cpu/peak.h"
#include "cpu/threads.h"
#include "dense_params.h"
#include "linear_params.h"

namespace py = pybind11;
using namespace fastattn;

namespace {

// A View is set from (data_ptr, four strides, address of first_row or 0) or None, and reads back the same.
template <auto field, class Params>
void def_view(py::class_<Params>& cls, const char* name) {
  cls.def_property(
      name,
      [](const Params& p) -> py::object {
        const View& v = p.*field;
        if (!v.data) return py::none();
        return py::make_tuple(reinterpret_cast<uintptr_t>(v.data), v.stride[0], v.stride[1], v.stride[2], v.stride[3],
                              reinterpret_cast<uintptr_t>(v.first_row));
      },
      [name](Params& p, const py::object& value) {
        View v;
        if (!value.is_none()) {
          const py::tuple parts = py::reinterpret_borrow<py::tuple>(value);
          if (!PyTuple_Check(value.ptr()) || parts.size() != 6)
            throw py::value_error(std::string(name) + ": expected None or a tuple (data_ptr, four strides, first_row)");
          v.data = reinterpret_cast<void*>(parts[0].cast<uintptr_t>());
          for (size_t i = 0; i < 4; ++i) v.stride[i] = parts[i + 1].cast<int64_t>();
          v.first_row = reinterpret_cast<const int32_t*>(parts[5].cast<uintptr_t>());
        }
        p.*field = v;
      });
}

// An array is set from its address or None.
template <auto field, class Params>
void def_array(py::class_<Params>& cls, const char* name) {
  typedef std::remove_reference_t<decltype(Params().*field)> Pointer;
  cls.def_property(
      name,
      [](const Params& p) -> py::object {
        if (!(p.*field)) return py::none();
        return py::int_(reinterpret_cast<uintptr_t>(p.*field));
      },
      [](Params& p, const py::object& value) {
        p.*field = value.is_none() ? nullptr : reinterpret_cast<Pointer>(value.cast<uintptr_t>());
      });
}

void require(bool condition, const char* message) {
  if (!condition) throw py::value_error(message);
}

bool has(const View& view, int64_t elements) { return view.data != nullptr || elements == 0; }

void check(const DenseParams& p) {
  const auto in_range = [](int64_t n) { return n >= 0 && n <= INT32_MAX; };
  require(in_range(p.batch) && in_range(p.heads_q) && in_range(p.heads_kv) && in_range(p.seqlen_q) &&
              in_range(p.seqlen_k),
          "batch, heads_q, heads_kv, seqlen_q and seqlen_k must be between 0 and 2^31 - 1");
  require(p.head_dim >= 1 && p.head_dim <= kMaxHeadDim, "head_dim must be between 1 and 256");
  require(p.head_dim_v >= 1 && p.head_dim_v <= kMaxHeadDim, "head_dim_v must be between 1 and 256");
  require(p.heads_kv == 0 ? p.heads_q == 0 : p.heads_q % p.heads_kv == 0, "heads_q must be a multiple of heads_kv");
  require(p.dtype == Dtype::kFloat32 || p.dtype == Dtype::kBFloat16 || p.dtype == Dtype::kFloat16 ||
              p.dtype == Dtype::kFloat64,
          "dtype must be float32, bfloat16, float16 or float64");
  require(p.scale - p.scale == 0, "scale must be finite");
  require(p.threads >= 1, "threads must be at least 1");
  require(p.softcap >= 0 && p.softcap - p.softcap == 0, "softcap must be finite and not negative");
  require(p.dropout_p >= 0 && p.dropout_p <= 1, "dropout_p must be between 0 and 1");
  require(p.dropout_p == 0 || p.rng, "dropout needs rng");
  require(!p.block_table || p.page_size >= 1, "pages need a page_size of at least 1");
  const int64_t queries = p.batch * p.heads_q * p.seqlen_q, keys = p.batch * p.heads_kv * p.seqlen_k;
  require(has(p.query, queries) && has(p.out, queries), "query and out must not be None");
  require(has(p.key, keys) && has(p.value, keys), "key and value must not be None");
  for (const View* view : {&p.query, &p.key, &p.value, &p.out, &p.grad_out, &p.grad_query, &p.grad_key, &p.grad_value})
    require(!view->data || view->stride[3] == 1, "tensors other than attn_mask need a last stride of 1");
}

void check_backward(const DenseParams& p) {
  const int64_t queries = p.batch * p.heads_q * p.seqlen_q, keys = p.batch * p.heads_kv * p.seqlen_k;
  require(has(p.lse, queries) && has(p.grad_out, queries) && has(p.grad_query, queries) && has(p.grad_key, keys) &&
              has(p.grad_value, keys),
          "the backward needs lse, grad_out, grad_query, grad_key and grad_value");
  require(!p.grad_sinks.data || p.sinks.data, "grad_sinks needs sinks");
  require(!p.block_table, "pages have no backward");
  require(!p.grad_mask.data || (p.attn_mask.data && p.mask_dtype != Dtype::kBool),
          "grad_mask needs a floating-point attn_mask");
}

// Whether a signal's handler raised an exception (Ctrl-C: KeyboardInterrupt), which is then pending.
bool signal_raised() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool raised = PyErr_CheckSignals() != 0;
  PyGILState_Release(state);
  return raised;
}

void check(const AppendParams& p) {
  require(p.head_dim >= 1 && p.head_dim <= kMaxHeadDim && p.head_dim_v >= 1 && p.head_dim_v <= kMaxHeadDim,
          "head_dim and head_dim_v must be between 1 and 256");
  require(p.rotary_dim >= 0 && p.rotary_dim <= p.head_dim && p.rotary_dim % 2 == 0,
          "rotary_dim must be even and at most head_dim");
  require(p.key_lengths || p.batch == 0, "key_lengths must not be None");
  require(!p.block_table || p.page_size >= 1, "pages need a page_size of at least 1");
  require(p.threads >= 1, "threads must be at least 1");
  const int64_t rows = p.batch * p.heads_kv * p.seqlen_new, queries = p.batch * p.heads_q * p.seqlen_q;
  require(has(p.key, rows) && has(p.value, rows) && has(p.key_cache, rows) && has(p.value_cache, rows),
          "key, value and the caches must not be None");
  require(p.rotary_dim == 0 || (has(p.query, queries) && has(p.rotated, queries) && p.cos.data && p.sin.data),
          "rotary needs query, rotated, cos and sin");
}

void check(const LinearParams& p) {
  const auto in_range = [](int64_t n) { return n >= 0 && n <= INT32_MAX; };
  require(in_range(p.batch) && in_range(p.heads_q) && in_range(p.heads_kv) && in_range(p.seqlen_q) &&
              in_range(p.seqlen_k),
          "batch, heads_q, heads_kv, seqlen_q and seqlen_k must be between 0 and 2^31 - 1");
  const auto is_width = [](int64_t n) { return n >= 1 && n <= 1 << 20; };
  require(is_width(p.head_dim) && is_width(p.head_dim_v) && is_width(p.features),
          "head_dim, head_dim_v and features must be between 1 and 2^20");
  require(p.heads_kv == 0 ? p.heads_q == 0 : p.heads_q % p.heads_kv == 0, "heads_q must be a multiple of heads_kv");
  require(p.dtype == Dtype::kFloat32 || p.dtype == Dtype::kBFloat16 || p.dtype == Dtype::kFloat16 ||
              p.dtype == Dtype::kFloat64,
          "dtype must be float32, bfloat16, float16 or float64");
  require(p.scale - p.scale == 0 && p.feature_eps - p.feature_eps == 0, "scale and feature_eps must be finite");
  require(p.threads >= 1, "threads must be at least 1");
  require(p.projection || p.features == p.head_dim, "without projection there are head_dim features");
  require(p.feature != Feature::kSoftmax || (p.projection && p.normalize),
          "softmax features need projection and normalize");
  require(p.causal ? p.seqlen_q == p.seqlen_k : !p.decay.data && !p.beta.data,
          "causal needs a key for each query; decay and beta need causal");
  const int64_t queries = p.batch * p.heads_q * p.seqlen_q, keys = p.batch * p.heads_kv * p.seqlen_k;
  require(!p.vector_decay || (has(p.decay, queries) && !p.projection && !p.beta.data),
          "vector_decay needs decay, and neither projection nor beta");
  require(has(p.query, queries) && has(p.out, queries), "query and out must not be None");
  require(has(p.key, keys) && has(p.value, keys), "key and value must not be None");
  require(!p.normalize || has(p.denominator, queries), "normalize needs denominator");
  for (const View* view : {&p.query, &p.key, &p.value, &p.out, &p.initial_kv, &p.initial_normalizer, &p.final_kv,
                           &p.final_normalizer, &p.grad_out, &p.grad_query, &p.grad_key, &p.grad_value, &p.grad_kv,
                           &p.grad_normalizer, &p.grad_initial_kv, &p.grad_initial_normalizer})
    require(!view->data || view->stride[3] == 1, "tensors need a last stride of 1");
}

void check_backward(const LinearParams& p) {
  const int64_t queries = p.batch * p.heads_q * p.seqlen_q, keys = p.batch * p.heads_q * p.seqlen_k;
  require(has(p.grad_out, queries) && has(p.grad_query, queries) && has(p.grad_key, keys) && has(p.grad_value, keys),
          "the backward needs grad_out, grad_query, grad_key and grad_value");
  require((!p.grad_decay.data || p.decay.data) && (!p.grad_beta.data || p.beta.data),
          "grad_decay needs decay, grad_beta needs beta");
}

template <class Params>
void run(void (*kernel)(const Params&), const Params& p) {
  require(p.scratch != nullptr, "scratch must not be None");
  Interruption interruption(signal_raised);
  {
    py::gil_scoped_release release;
    kernel(p);
  }
  if (interruption.happened()) throw py::error_already_set();
}

py::dict build_info() {
  py::dict digests;
  for (const auto& [isa, digest] : kDigests) digests[isa] = digest;
  py::dict info;
  info["compiler"] = kCompiler;
  info["flags"] = kFlags;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["isas"] = compiled_isas();
#if defined(FASTATTN_EMULATE_BF16_DOT)
  info["emulated_bf16_dot"] = true;
#else
  info["emulated_bf16_dot"] = false;
#endif
  info["cuda"] = false;
  info["digests"] = digests;
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of fastattn. They take pointers, strides and numbers; tensors stay in Python.";

  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::kFloat32)
      .value("bfloat16", Dtype::kBFloat16)
      .value("float16", Dtype::kFloat16)
      .value("float64", Dtype::kFloat64)
      .value("bool", Dtype::kBool);

  py::class_<DenseParams> params(m, "DenseParams", "One dense attention problem; see csrc/dense_params.h.");
  params.def(py::init<>())
      .def_readonly_static("UNLIMITED", &DenseParams::kUnlimited)
      .def_readwrite("batch", &DenseParams::batch)
      .def_readwrite("heads_q", &DenseParams::heads_q)
      .def_readwrite("heads_kv", &DenseParams::heads_kv)
      .def_readwrite("seqlen_q", &DenseParams::seqlen_q)
      .def_readwrite("seqlen_k", &DenseParams::seqlen_k)
      .def_readwrite("head_dim", &DenseParams::head_dim)
      .def_readwrite("head_dim_v", &DenseParams::head_dim_v)
      .def_readwrite("dtype", &DenseParams::dtype)
      .def_readwrite("mask_dtype", &DenseParams::mask_dtype)
      .def_readwrite("query_offset", &DenseParams::query_offset)
      .def_readwrite("window_left", &DenseParams::window_left)
      .def_readwrite("window_right", &DenseParams::window_right)
      .def_readwrite("scale", &DenseParams::scale)
      .def_readwrite("block_table_stride", &DenseParams::block_table_stride)
      .def_readwrite("page_size", &DenseParams::page_size)
      .def_readwrite("softcap", &DenseParams::softcap)
      .def_readwrite("dropout_p", &DenseParams::dropout_p)
      .def_readwrite("align_ends", &DenseParams::align_ends)
      .def_readwrite("threads", &DenseParams::threads);
  def_view<&DenseParams::mask_rows>(params, "mask_rows");
  def_view<&DenseParams::mask_columns>(params, "mask_columns");
  def_array<&DenseParams::mask_row_blocks>(params, "mask_row_blocks");
  def_array<&DenseParams::mask_column_blocks>(params, "mask_column_blocks");
  def_array<&DenseParams::mask_tiles>(params, "mask_tiles");
  def_array<&DenseParams::scratch>(params, "scratch");
  def_view<&DenseParams::query>(params, "query");
  def_view<&DenseParams::key>(params, "key");
  def_view<&DenseParams::value>(params, "value");
  def_view<&DenseParams::attn_mask>(params, "attn_mask");
  def_view<&DenseParams::out>(params, "out");
  def_view<&DenseParams::lse>(params, "lse");
  def_view<&DenseParams::grad_out>(params, "grad_out");
  def_view<&DenseParams::grad_lse>(params, "grad_lse");
  def_view<&DenseParams::grad_query>(params, "grad_query");
  def_view<&DenseParams::grad_key>(params, "grad_key");
  def_view<&DenseParams::grad_value>(params, "grad_value");
  def_view<&DenseParams::grad_mask>(params, "grad_mask");
  def_view<&DenseParams::alibi_slopes>(params, "alibi_slopes");
  def_view<&DenseParams::sinks>(params, "sinks");
  def_view<&DenseParams::grad_sinks>(params, "grad_sinks");
  def_array<&DenseParams::query_start>(params, "query_start");
  def_array<&DenseParams::key_start>(params, "key_start");
  def_array<&DenseParams::key_lengths>(params, "key_lengths");
  def_array<&DenseParams::block_table>(params, "block_table");
  def_array<&DenseParams::rng>(params, "rng");

  py::class_<AppendParams> append(m, "AppendParams", "New rows of a KV cache; see csrc/append_params.h.");
  append.def(py::init<>())
      .def_readwrite("batch", &AppendParams::batch)
      .def_readwrite("heads_q", &AppendParams::heads_q)
      .def_readwrite("heads_kv", &AppendParams::heads_kv)
      .def_readwrite("seqlen_q", &AppendParams::seqlen_q)
      .def_readwrite("seqlen_new", &AppendParams::seqlen_new)
      .def_readwrite("head_dim", &AppendParams::head_dim)
      .def_readwrite("head_dim_v", &AppendParams::head_dim_v)
      .def_readwrite("dtype", &AppendParams::dtype)
      .def_readwrite("table_dtype", &AppendParams::table_dtype)
      .def_readwrite("rotary_dim", &AppendParams::rotary_dim)
      .def_readwrite("interleaved", &AppendParams::interleaved)
      .def_readwrite("block_table_stride", &AppendParams::block_table_stride)
      .def_readwrite("page_size", &AppendParams::page_size)
      .def_readwrite("threads", &AppendParams::threads);
  def_view<&AppendParams::query>(append, "query");
  def_view<&AppendParams::rotated>(append, "rotated");
  def_view<&AppendParams::key>(append, "key");
  def_view<&AppendParams::value>(append, "value");
  def_view<&AppendParams::key_cache>(append, "key_cache");
  def_view<&AppendParams::value_cache>(append, "value_cache");
  def_view<&AppendParams::cos>(append, "cos");
  def_view<&AppendParams::sin>(append, "sin");
  def_array<&AppendParams::key_lengths>(append, "key_lengths");
  def_array<&AppendParams::block_table>(append, "block_table");

  py::enum_<Feature>(m, "Feature")
      .value("identity", Feature::kIdentity)
      .value("elu", Feature::kElu)
      .value("relu", Feature::kRelu)
      .value("softmax", Feature::kSoftmax);

  py::class_<LinearParams> linear(m, "LinearParams", "One linear attention problem; see csrc/linear_params.h.");
  linear.def(py::init<>())
      .def_readwrite("batch", &LinearParams::batch)
      .def_readwrite("heads_q", &LinearParams::heads_q)
      .def_readwrite("heads_kv", &LinearParams::heads_kv)
      .def_readwrite("seqlen_q", &LinearParams::seqlen_q)
      .def_readwrite("seqlen_k", &LinearParams::seqlen_k)
      .def_readwrite("head_dim", &LinearParams::head_dim)
      .def_readwrite("head_dim_v", &LinearParams::head_dim_v)
      .def_readwrite("features", &LinearParams::features)
      .def_readwrite("dtype", &LinearParams::dtype)
      .def_readwrite("feature", &LinearParams::feature)
      .def_readwrite("feature_eps", &LinearParams::feature_eps)
      .def_readwrite("scale", &LinearParams::scale)
      .def_readwrite("causal", &LinearParams::causal)
      .def_readwrite("normalize", &LinearParams::normalize)
      .def_readwrite("vector_decay", &LinearParams::vector_decay)
      .def_readwrite("threads", &LinearParams::threads);
  def_array<&LinearParams::scratch>(linear, "scratch");
  def_array<&LinearParams::projection>(linear, "projection");
  def_array<&LinearParams::feature_bias>(linear, "feature_bias");
  def_view<&LinearParams::query>(linear, "query");
  def_view<&LinearParams::key>(linear, "key");
  def_view<&LinearParams::value>(linear, "value");
  def_view<&LinearParams::decay>(linear, "decay");
  def_view<&LinearParams::beta>(linear, "beta");
  def_view<&LinearParams::key_mask>(linear, "key_mask");
  def_view<&LinearParams::initial_kv>(linear, "initial_kv");
  def_view<&LinearParams::initial_normalizer>(linear, "initial_normalizer");
  def_view<&LinearParams::initial_log_scale>(linear, "initial_log_scale");
  def_view<&LinearParams::out>(linear, "out");
  def_view<&LinearParams::denominator>(linear, "denominator");
  def_view<&LinearParams::final_kv>(linear, "final_kv");
  def_view<&LinearParams::final_normalizer>(linear, "final_normalizer");
  def_view<&LinearParams::final_log_scale>(linear, "final_log_scale");
  def_view<&LinearParams::grad_out>(linear, "grad_out");
  def_view<&LinearParams::grad_kv>(linear, "grad_kv");
  def_view<&LinearParams::grad_normalizer>(linear, "grad_normalizer");
  def_view<&LinearParams::grad_query>(linear, "grad_query");
  def_view<&LinearParams::grad_key>(linear, "grad_key");
  def_view<&LinearParams::grad_value>(linear, "grad_value");
  def_view<&LinearParams::grad_decay>(linear, "grad_decay");
  def_view<&LinearParams::grad_beta>(linear, "grad_beta");
  def_view<&LinearParams::grad_initial_kv>(linear, "grad_initial_kv");
  def_view<&LinearParams::grad_initial_normalizer>(linear, "grad_initial_normalizer");

  m.def(
      "cpu_append",
      [](const AppendParams& p) {
        check(p);
        py::gil_scoped_release release;
        kernels_in_use().append(p);
      },
      py::arg("params"), "Writes key and value into the caches, and rotated if there is rotary.");

  m.def(
      "cpu_dense_forward",
      [](const DenseParams& p) {
        check(p);
        run(kernels_in_use().dense_forward, p);
      },
      py::arg("params"), "Writes out and, if given, lse. Needs cpu_dense_forward_scratch(params) bytes of scratch.");
  m.def(
      "cpu_dense_backward",
      [](const DenseParams& p) {
        check(p);
        check_backward(p);
        run(kernels_in_use().dense_backward, p);
      },
      py::arg("params"),
      "Writes grad_query, grad_key and grad_value, and adds to grad_mask if given. Needs "
      "cpu_dense_backward_scratch(params) bytes of scratch.");
  m.def(
      "cpu_dense_forward_scratch",
      [](const DenseParams& p) {
        check(p);
        return kernels_in_use().dense_forward_scratch(p);
      },
      py::arg("params"), "Bytes that the forward needs at params.scratch.");
  m.def(
      "cpu_dense_backward_scratch",
      [](const DenseParams& p) {
        check(p);
        return kernels_in_use().dense_backward_scratch(p);
      },
      py::arg("params"), "Bytes that the backward needs at params.scratch.");

  m.def(
      "cpu_linear_forward",
      [](const LinearParams& p) {
        check(p);
        run(kernels_in_use().linear_forward, p);
      },
      py::arg("params"),
      "Writes out, denominator with normalize and, if given, the final state. Needs cpu_linear_forward_scratch(params) "
      "bytes of scratch.");
  m.def(
      "cpu_linear_backward",
      [](const LinearParams& p) {
        check(p);
        check_backward(p);
        run(kernels_in_use().linear_backward, p);
      },
      py::arg("params"),
      "Writes the gradients that are given. Needs cpu_linear_backward_scratch(params) bytes of scratch.");
  m.def(
      "cpu_linear_forward_scratch",
      [](const LinearParams& p) {
        check(p);
        return kernels_in_use().linear_forward_scratch(p);
      },
      py::arg("params"), "Bytes that the forward needs at params.scratch.");
  m.def(
      "cpu_linear_backward_scratch",
      [](const LinearParams& p) {
        check(p);
        return kernels_in_use().linear_backward_scratch(p);
      },
      py::arg("params"), "Bytes that the backward needs at params.scratch.");

  m.def("cpu_isas", &runnable_isas, "Instruction sets that were compiled and that this CPU runs, best first.");
  m.def("cpu_isa", [] { return std::string(kernels_in_use().isa); }, "The instruction set in use.");
  m.def("set_cpu_isa", &set_isa, py::arg("name"), "Uses another instruction set from now on.");
  m.def(
      "cpu_fma_peak",
      [](int threads, Dtype dtype) {
        require(threads >= 1, "threads must be at least 1");
        py::gil_scoped_release release;
        return fma_peak(threads, dtype);
      },
      py::arg("threads"), py::arg("dtype") = Dtype::kFloat32,
      "GFLOP/s of multiply-adds in one register tile; 0 where the set in use computes the dtype in another.");
  m.def(
      "cpu_read_bandwidth",
      [](uintptr_t pointer, int64_t bytes, int threads) {
        require(threads >= 1 && pointer && bytes >= 64 * int64_t(threads), "need memory of at least 64 bytes a thread");
        py::gil_scoped_release release;
        return read_bandwidth(reinterpret_cast<const void*>(pointer), bytes, threads);
      },
      py::arg("pointer"), py::arg("bytes"), py::arg("threads"), "GB/s of reading memory once.");
  m.def("build_info", &build_info, "Compiler, flags, instruction sets and the digest of each kernel's source.");
}
