// The kernels for one instruction set. CMake compiles this file once per set, with FASTATTN_ISA_NAMESPACE naming it.
#include "kernel.h"

#include "append.h"
#include "backward.h"
#include "decode.h"
#include "delta.h"
#include "forward.h"
#include "linear_backward.h"
#include "linear_forward.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// Calls use(pass) with the Forward or Backward of the problem's arithmetic.
template <template <class> class Pass, class Use>
auto with_pass(const DenseParams& p, Use use) {
  if (p.dtype == Dtype::kFloat64) return use(Pass<F64>(p));
#if defined(FASTATTN_BF16_DOT)
  if (p.dtype == Dtype::kBFloat16) return use(Pass<BF16Dot>(p));
#endif
  return use(Pass<F32>(p));
}

// The same with the forward that suits the number of rows.
template <class Use>
auto with_forward(const DenseParams& p, Use use) {
  return Decode<F32>::suits(p) ? with_pass<Decode>(p, use) : with_pass<Forward>(p, use);
}

void forward(const DenseParams& p) {
  with_forward(p, [](const auto& pass) { pass.run(); });
}
int64_t forward_scratch(const DenseParams& p) {
  return with_forward(p, [](const auto& pass) { return pass.scratch_bytes(); });
}
void backward(const DenseParams& p) {
  with_pass<Backward>(p, [](const auto& pass) { pass.run(); });
}
int64_t backward_scratch(const DenseParams& p) {
  return with_pass<Backward>(p, [](const auto& pass) { return pass.scratch_bytes(); });
}

void append(const AppendParams& p) {
  if (p.dtype == Dtype::kFloat64) return Append<double>(p).run();
  Append<float>(p).run();
}

// The same for the linear family: Pass, or with the delta rule Delta.
template <template <class> class Pass, template <class> class Delta, class Use>
auto with_linear_pass(const LinearParams& p, Use use) {
  if (p.dtype == Dtype::kFloat64) return p.beta.data ? use(Delta<double>(p)) : use(Pass<double>(p));
  return p.beta.data ? use(Delta<float>(p)) : use(Pass<float>(p));
}

void linear_forward(const LinearParams& p) {
  with_linear_pass<LinearForward, DeltaForward>(p, [](const auto& pass) { pass.run(); });
}
int64_t linear_forward_scratch(const LinearParams& p) {
  return with_linear_pass<LinearForward, DeltaForward>(p, [](const auto& pass) { return pass.scratch_bytes(); });
}
void linear_backward(const LinearParams& p) {
  with_linear_pass<LinearBackward, DeltaBackward>(p, [](const auto& pass) { pass.run(); });
}
int64_t linear_backward_scratch(const LinearParams& p) {
  return with_linear_pass<LinearBackward, DeltaBackward>(p, [](const auto& pass) { return pass.scratch_bytes(); });
}

template <class A>
double multiply_add_steps(int64_t steps) {
  constexpr int columns = kTileVectors * Simd<typename A::Real>::kLanes;
  typename A::Elem a[kTileRows] = {}, b[columns] = {};
  typename A::Real c[kTileRows * columns] = {};
  int64_t stride = 0;
  // The compiler must not know that all of it is zero, nor that every step is the same.
  asm volatile("" : "+r"(stride) : "r"(a), "r"(b), "r"(c) : "memory");
  tile_product<A, kTileRows, kTileVectors, true, true>(steps, a, stride, b, stride, c, columns);
  asm volatile("" : : "r"(c) : "memory");
  return 2.0 * kTileRows * columns * A::kPack * double(steps);
}

double multiply_add_steps_of(Dtype dtype, int64_t steps) {
  if (dtype == Dtype::kFloat32) return multiply_add_steps<F32>(steps);
  if (dtype == Dtype::kFloat64) return multiply_add_steps<F64>(steps);
#if defined(FASTATTN_BF16_DOT)
  if (dtype == Dtype::kBFloat16) return multiply_add_steps<BF16Dot>(steps);
#endif
  return 0;
}

uint64_t read_memory(const void* memory, int64_t bytes) {
  typedef Simd<uint64_t> Words;
  constexpr int chains = 8;
  Words::Vec sum[chains] = {};
  const uint64_t* words = static_cast<const uint64_t*>(memory);
  const int64_t count = bytes / 8;
  for (int64_t i = 0; i + chains * Words::kLanes <= count; i += chains * Words::kLanes)
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) sum[c] ^= Words::load(words + i + c * Words::kLanes);
  uint64_t all = 0;
  for (int c = 0; c < chains; ++c)
    for (int lane = 0; lane < Words::kLanes; ++lane) all ^= sum[c][lane];
  return all;
}

extern const Kernels kernels;
const Kernels kernels = {FASTATTN_ISA_NAME,
                         forward,
                         backward,
                         forward_scratch,
                         backward_scratch,
                         append,
                         linear_forward,
                         linear_backward,
                         linear_forward_scratch,
                         linear_backward_scratch,
                         multiply_add_steps_of,
                         read_memory};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
