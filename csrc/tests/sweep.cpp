// Random problems, every feature with every other, forward and backward, against the oracle.
//
// What must not be read holds NaN: the gaps between rows, keys that no query may see, pages that no sequence owns,
// working memory. What must not be written is looked at afterwards.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "blocks.h"
#include "check.h"
#include "oracle.h"
#include "tensor.h"
#include "tests.h"

namespace fastattn {
namespace tests {
namespace {

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return "float32";
    case Dtype::kFloat64: return "float64";
    case Dtype::kBFloat16: return "bfloat16";
    default: return "float16";
  }
}

// Largest error allowed, of the largest number of a result. Coarse: the Python tests know each dtype's rounding.
double tolerance(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return 3e-5;
    case Dtype::kFloat64: return 1e-11;
    case Dtype::kBFloat16: return 4e-2;
    default: return 5e-3;
  }
}

// One problem: its inputs, and what a run of the kernels writes.
class Case {
 public:
  explicit Case(uint64_t seed) : random_(seed), seed_(seed) {
    draw_shape();
    draw_positions();
    draw_inputs();
    draw_features();
    draw_blocks();
    hide_the_unseen();
    draw_gradients();
  }

  void check() {
    const Answer expected = oracle(p_, int64_t(grad_mask_.size()));
    run(int(random_.integer(1, 4)));
    compare("out", out_, p_.dtype, expected.out);
    compare("lse", lse_, real_, expected.lse);
    if (p_.grad_out.data) {
      compare("grad_query", grad_query_, p_.dtype, expected.grad_query);
      compare("grad_key", grad_key_, p_.dtype, expected.grad_key);
      compare("grad_value", grad_value_, p_.dtype, expected.grad_value);
      if (p_.sinks.data) compare("grad_sinks", grad_sinks_, real_, expected.grad_sinks);
      const int64_t* stride = p_.grad_mask.stride;
      if (p_.grad_mask.data)
        compare("grad_mask", grad_mask_, real_, expected.grad_mask, {stride[0], stride[1], stride[2], stride[3]});
    }
    const std::string first = results();
    run(int(random_.integer(1, 4)));
    CHECK(results() == first, "another run, other bits: %s", text().c_str());
  }

 private:
  std::string results() const {
    std::string all;
    for (const Tensor* result : {&out_, &lse_, &grad_query_, &grad_key_, &grad_value_, &grad_sinks_, &grad_mask_})
      if (result->size() > 0) all += result->bits();
    return all;
  }

  // Mostly small; some longer than a block of keys, a tile of rows, a chunk of the decoding kernel.
  int64_t draw_length(int64_t longest) {
    return random_.chance(0.4) ? random_.integer(1, 20) : random_.chance(0.7) ? random_.integer(1, 150)
                                                                             : random_.integer(1, longest);
  }

  void draw_shape() {
    const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat64};
    p_.dtype = dtypes[random_.integer(0, 3)];
    real_ = p_.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    p_.batch = random_.integer(1, 3);
    p_.heads_kv = random_.integer(1, 2);
    p_.heads_q = p_.heads_kv * random_.integer(1, 3);
    p_.seqlen_q = draw_length(260);
    p_.seqlen_k = draw_length(1200);
    const auto head_dim = [&] { return random_.chance(0.3) ? 64 : random_.integer(1, random_.chance(0.1) ? 256 : 40); };
    p_.head_dim = head_dim();
    p_.head_dim_v = random_.chance(0.5) ? p_.head_dim : head_dim();
    while (p_.batch * p_.heads_q * p_.seqlen_q * p_.seqlen_k * (p_.head_dim + p_.head_dim_v) > 4000000) {
      int64_t& longer = p_.seqlen_q > p_.seqlen_k ? p_.seqlen_q : p_.seqlen_k;
      longer = (longer + 1) / 2;  // the oracle is slow
    }
    packed_ = random_.chance(0.25);
    paged_ = !packed_ && random_.chance(0.2);
    if (packed_) {
      p_.seqlen_q = draw_boundaries(first_query_, p_.seqlen_q);
      p_.seqlen_k = draw_boundaries(first_key_, p_.seqlen_k);
    }
  }

  // Returns the longest; some sequences are empty.
  int64_t draw_boundaries(std::vector<int32_t>& first, int64_t longest) {
    first.assign(1, 0);
    int64_t most = 1;
    for (int64_t b = 0; b < p_.batch; ++b) {
      const int64_t length = random_.chance(0.1) ? 0 : random_.integer(1, longest);
      first.push_back(first.back() + int32_t(length));
      most = length > most ? length : most;
    }
    return most;
  }

  std::vector<int32_t> draw_numbers(int64_t low, int64_t high) {
    std::vector<int32_t> numbers;
    for (int64_t b = 0; b < p_.batch; ++b) numbers.push_back(int32_t(random_.integer(low, high)));
    return numbers;
  }

  void draw_positions() {
    if (random_.chance(0.5)) p_.window_right = random_.chance(0.7) ? 0 : random_.integer(0, p_.seqlen_k);
    if (random_.chance(0.3)) p_.window_left = random_.integer(0, p_.seqlen_k);
    p_.align_ends = random_.chance(0.7);
    if (!p_.align_ends) p_.query_offset = random_.integer(-5, p_.seqlen_k);
    if (random_.chance(0.2)) p_.query_start = (query_start_ = draw_numbers(-5, 5)).data();
    if (random_.chance(0.2)) p_.key_start = (key_start_ = draw_numbers(0, p_.seqlen_k / 2)).data();
    if (random_.chance(0.3)) p_.key_lengths = (key_lengths_ = draw_numbers(0, p_.seqlen_k)).data();
  }

  void draw_inputs() {
    const auto normal = [&] { return random_.normal(); };
    const int32_t* first_query = packed_ ? first_query_.data() : nullptr;
    const int32_t* first_key = packed_ ? first_key_.data() : nullptr;
    query_ = Tensor(random_, p_.dtype, p_.batch, p_.heads_q, p_.seqlen_q, p_.head_dim, first_query);
    int64_t batch = p_.batch, rows = p_.seqlen_k;
    if (paged_) {
      rows = p_.page_size = random_.integer(1, 70);
      const int64_t a_row = (p_.seqlen_k + p_.page_size - 1) / p_.page_size;
      p_.seqlen_k = a_row * p_.page_size;
      p_.block_table_stride = a_row + random_.integer(0, 2);
      batch = p_.batch * a_row + random_.integer(0, 3);
      // Any permutation of the pages.
      std::vector<int32_t> pages;
      for (int64_t page = 0; page < batch; ++page)
        pages.insert(pages.begin() + random_.integer(0, int64_t(pages.size())), int32_t(page));
      table_.assign(size_t(p_.batch * p_.block_table_stride), INT32_MAX);
      for (int64_t b = 0; b < p_.batch; ++b)
        for (int64_t n = 0; n < a_row; ++n)
          table_[size_t(b * p_.block_table_stride + n)] = pages[size_t(b * a_row + n)];
      p_.block_table = table_.data();
    }
    key_ = Tensor(random_, p_.dtype, batch, p_.heads_kv, rows, p_.head_dim, first_key);
    value_ = Tensor(random_, p_.dtype, batch, p_.heads_kv, rows, p_.head_dim_v, first_key);
    for (Tensor* input : {&query_, &key_, &value_}) input->fill(normal);
    p_.query = query_.view;
    p_.key = key_.view;
    p_.value = value_.view;
    out_ = Tensor(random_, p_.dtype, p_.batch, p_.heads_q, p_.seqlen_q, p_.head_dim_v, first_query);
    lse_ = Tensor(random_, real_, p_.batch, p_.heads_q, p_.seqlen_q, 1, first_query);
    p_.scale = (random_.chance(0.2) ? -1 : 1) * (random_.chance(0.1) ? 0 : 1 / std::sqrt(double(p_.head_dim)));
  }

  void draw_features() {
    if (random_.chance(0.25)) p_.softcap = 0.5 + 3 * random_.uniform();
    if (random_.chance(0.25)) {
      slopes_ = Tensor(random_, real_, random_.chance(0.5) ? p_.batch : 1, p_.heads_q, 1, 1);
      slopes_.fill([&] { return random_.uniform(); });
      p_.alibi_slopes = slopes_.view;
      if (slopes_.elements() == size_t(p_.heads_q)) p_.alibi_slopes.stride[0] = 0;
    }
    if (random_.chance(0.25)) {
      sinks_ = Tensor(random_, real_, 1, p_.heads_q, 1, 1);
      sinks_.fill([&] { return random_.chance(0.1) ? -HUGE_VAL : 2 * random_.normal(); });
      p_.sinks = sinks_.view;
    }
    if (random_.chance(0.25)) {
      p_.dropout_p = random_.chance(0.1) ? 1 : random_.chance(0.1) ? 0 : random_.uniform();
      rng_[0] = int64_t(random_.bits());
      rng_[1] = int64_t(random_.bits());
      p_.rng = rng_;
    }
    if (!packed_ && random_.chance(0.4)) {
      const auto size = [&](int64_t whole) { return random_.chance(0.3) ? 1 : whole; };
      const int64_t sizes[] = {size(p_.batch), size(p_.heads_q), size(p_.seqlen_q), size(p_.seqlen_k)};
      p_.mask_dtype = random_.chance(0.4) ? Dtype::kBool : random_.chance(0.5) ? p_.dtype : real_;
      mask_ = Tensor(random_, p_.mask_dtype, sizes[0], sizes[1], sizes[2], sizes[3]);
      mask_.fill([&] {
        if (p_.mask_dtype == Dtype::kBool) return random_.chance(0.7) ? 1.0 : 0.0;
        return random_.chance(0.1) ? -HUGE_VAL : random_.normal();
      });
      p_.attn_mask = mask_.view;
      for (int axis = 0; axis < 4; ++axis)
        if (sizes[axis] == 1) p_.attn_mask.stride[axis] = 0;
      std::memcpy(mask_sizes_, sizes, sizeof sizes);
    }
  }

  // Blocks, rows and columns that see all or nothing, a band, and single pairs.
  void draw_blocks() {
    if (!random_.chance(0.35)) return;
    const int64_t batch = random_.chance(0.5) ? p_.batch : 1, heads = random_.chance(0.5) ? p_.heads_q : 1;
    const uint64_t key = random_.bits();
    const int64_t band = random_.integer(0, 200), share = random_.integer(0, 8);
    const bool pairs = random_.chance(0.5);
    const auto chosen = [key](int64_t a, int64_t b, int64_t c, int64_t d) {  // a number from 0 to 7
      uint64_t x = key ^ (uint64_t(a) * 0x9E3779B97F4A7C15u) ^ (uint64_t(b) << 40) ^ (uint64_t(c) << 20) ^ uint64_t(d);
      x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
      return int64_t((x ^ (x >> 27)) * 0x94D049BB133111EBu >> 61);
    };
    blocks_ = BlockLists(batch, heads, p_.seqlen_q, p_.seqlen_k, [&](int64_t b, int64_t h, int64_t i, int64_t j) {
      const int64_t head = b * heads + h, kind = chosen(head, i / 64, j / 64, 1);
      if (i % 64 == 7 && kind < 4) return false;
      if (std::abs(i - j) < band && chosen(head, 0, 0, 2) < 4) return true;
      return kind < share && (!pairs || kind % 2 || chosen(head, i, j, 3) < 5);
    });
    blocks_.set(p_);
  }

  // Keys outside every row's interval, or that no row keeps in its block mask, may be memory that was never written.
  void hide_the_unseen() {
    for (int64_t b = 0; b < p_.batch; ++b)
      for (int64_t j = 0; j < rows_of(p_.key, b, p_.seqlen_k); ++j) {
        bool within = false;
        for (int64_t i = 0; i < rows_of(p_.query, b, p_.seqlen_q) && !within; ++i) within = in_reach(p_, b, i, j);
        for (int64_t h = 0; h < p_.heads_kv; ++h) {
          const int64_t group = p_.heads_q / p_.heads_kv;
          bool seen = false;
          for (int64_t r = 0; within && r < group * p_.seqlen_q && !seen; ++r)
            seen = mask_keeps(p_, b, h * group + r / p_.seqlen_q, r % p_.seqlen_q, j);
          if (seen) continue;
          for (Tensor* tensor : {&key_, &value_}) {
            if (paged_)
              tensor->poison_row(table_[size_t(b * p_.block_table_stride + j / p_.page_size)], h, j % p_.page_size);
            else
              tensor->poison_row(b, h, j);
          }
        }
      }
  }

  void draw_gradients() {
    if (paged_) return;
    const int32_t* first_query = packed_ ? first_query_.data() : nullptr;
    const int32_t* first_key = packed_ ? first_key_.data() : nullptr;
    grad_out_ = Tensor(random_, p_.dtype, p_.batch, p_.heads_q, p_.seqlen_q, p_.head_dim_v, first_query);
    grad_out_.fill([&] { return random_.normal(); });
    p_.grad_out = grad_out_.view;
    if (random_.chance(0.3)) {
      grad_lse_ = Tensor(random_, real_, p_.batch, p_.heads_q, p_.seqlen_q, 1, first_query);
      grad_lse_.fill([&] { return random_.normal(); });
      p_.grad_lse = grad_lse_.view;
    }
    grad_query_ = Tensor(random_, p_.dtype, p_.batch, p_.heads_q, p_.seqlen_q, p_.head_dim, first_query);
    grad_key_ = Tensor(random_, p_.dtype, p_.batch, p_.heads_kv, p_.seqlen_k, p_.head_dim, first_key);
    grad_value_ = Tensor(random_, p_.dtype, p_.batch, p_.heads_kv, p_.seqlen_k, p_.head_dim_v, first_key);
    p_.grad_query = grad_query_.view;
    p_.grad_key = grad_key_.view;
    p_.grad_value = grad_value_.view;
    if (p_.sinks.data) {
      grad_sinks_ = Tensor(random_, real_, 1, p_.heads_q, 1, 1);
      p_.grad_sinks = grad_sinks_.view;
    }
    if (p_.attn_mask.data && p_.mask_dtype != Dtype::kBool) {
      grad_mask_ = Tensor(random_, real_, mask_sizes_[0], mask_sizes_[1], mask_sizes_[2], mask_sizes_[3]);
      p_.grad_mask = grad_mask_.view;
      for (int axis = 0; axis < 4; ++axis)
        if (mask_sizes_[axis] == 1) p_.grad_mask.stride[axis] = 0;
    }
  }

  void run(int threads) {
    p_.out = out_.view;
    p_.lse = lse_.view;
    p_.threads = threads;
    const Kernels& kernels = kernels_in_use();
    {
      const auto scratch = poisoned(size_t(kernels.dense_forward_scratch(p_)));
      p_.scratch = scratch.get();
      kernels.dense_forward(p_);
    }
    if (!p_.grad_out.data) return;
    for (Tensor* sum : {&grad_sinks_, &grad_mask_}) sum->fill([] { return 0.0; });
    const auto scratch = poisoned(size_t(kernels.dense_backward_scratch(p_)));
    p_.scratch = scratch.get();
    kernels.dense_backward(p_);
  }

  void compare(const char* name, const Tensor& got, Dtype dtype, const std::vector<double>& expected) {
    compare(name, got, dtype, expected, got.dense());
    CHECK(got.untouched() == got.size() - got.elements(), "%s: writes outside, or not all: %s", name, text().c_str());
  }

  // `stride` is expected's. The error is judged against the largest number, and against the largest output: what is
  // left of gradients that cancel is the rounding of that.
  void compare(const char* name, const Tensor& got, Dtype dtype, const std::vector<double>& expected,
               const std::array<int64_t, 4>& stride) {
    double largest = 0, error = 0;
    got.for_each_element([&](int64_t b, int64_t h, int64_t i, int64_t j) {
      const double want = expected[size_t(b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3])];
      const double have = read(got.view, dtype, b, h, i, j);
      if (have == want) return;  // infinities too
      largest = std::fmax(largest, std::isinf(want) ? 0 : std::fabs(want));
      error = std::isfinite(have - want) ? std::fmax(error, std::fabs(have - want)) : HUGE_VAL;
    });
    largest_out_ = std::fmax(largest_out_, &got == &out_ ? largest : 0);
    CHECK(error <= tolerance(p_.dtype) * (1 + largest + largest_out_), "%s: error %g, largest %g: %s", name, error,
          largest, text().c_str());
  }

  std::string text() const {
    char line[400];
    std::snprintf(line, sizeof line,
                  "seed %llu, %s, %s, batch %d, heads %d/%d, lengths %d/%d, head dims %d/%d,%s%s%s%s%s%s%s%s%s scale %g",
                  (unsigned long long)seed_, kernels_in_use().isa, name_of(p_.dtype), int(p_.batch), int(p_.heads_q),
                  int(p_.heads_kv), int(p_.seqlen_q), int(p_.seqlen_k), int(p_.head_dim), int(p_.head_dim_v),
                  packed_ ? " packed," : "", paged_ ? " paged," : "", p_.mask_rows.data ? " blocks," : "", p_.attn_mask.data ? " mask," : "",
                  p_.softcap > 0 ? " softcap," : "", p_.alibi_slopes.data ? " alibi," : "",
                  p_.sinks.data ? " sinks," : "", p_.rng ? " dropout," : "", p_.grad_lse.data ? " grad_lse," : "",
                  p_.scale);
    return line;
  }

  Random random_;
  const uint64_t seed_;
  DenseParams p_;
  Dtype real_ = Dtype::kFloat32;
  bool packed_ = false, paged_ = false;
  std::vector<int32_t> first_query_, first_key_, query_start_, key_start_, key_lengths_, table_;
  double largest_out_ = 0;
  int64_t rng_[2] = {0, 0}, mask_sizes_[4] = {0, 0, 0, 0};
  BlockLists blocks_;
  Tensor query_, key_, value_, mask_, slopes_, sinks_, out_, lse_;
  Tensor grad_out_, grad_lse_, grad_query_, grad_key_, grad_value_, grad_sinks_, grad_mask_;
};

}  // namespace

void test_sweep(uint64_t seed, int problems) {
  for (const std::string& isa : runnable_isas()) {
    set_isa(isa);
    for (int i = 0; i < problems; ++i) Case(seed + uint64_t(i)).check();
    std::printf("%s: %d problems\n", isa.c_str(), problems);
    std::fflush(stdout);
  }
}

}  // namespace tests
}  // namespace fastattn
