// The mask or bias of one row, whatever its dtype and strides, as numbers: -inf hides the key.
#pragma once

#include "interval.h"
#include "numeric.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class Real>
inline Real infinity() {
  return Real(__builtin_inf());
}

template <class Real>
inline void read_bias(Real* to, const DenseParams& p, int64_t b, int64_t h, int64_t i, int64_t first, int64_t count) {
  const char* row = element(p.attn_mask, p.mask_dtype, b, h, i);
  const int64_t stride = p.attn_mask.stride[3];
  if (p.mask_dtype == Dtype::kBool) {
    for (int64_t j = 0; j < count; ++j) to[j] = row[(first + j) * stride] ? Real(0) : -infinity<Real>();
    return;
  }
  const int64_t size = element_size(p.mask_dtype);
  if (stride == 1)
    read_row(to, row + first * size, p.mask_dtype, count);
  else
    for (int64_t j = 0; j < count; ++j) read_row(to + j, row + (first + j) * stride * size, p.mask_dtype, 1);
}

// Hides the keys outside `keep`; scores[0] is key `first`.
template <class Real>
inline void hide_outside(Real* scores, int64_t first, int64_t count, Range keep) {
  const int64_t begin = min64(max64(keep.begin - first, 0), count), end = max64(min64(keep.end - first, count), begin);
  for (int64_t j = 0; j < begin; ++j) scores[j] = -infinity<Real>();
  for (int64_t j = end; j < count; ++j) scores[j] = -infinity<Real>();
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
