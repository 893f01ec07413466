// One row of the running softmax (Milakov and Gimelshein, arXiv:1805.02867), and the end of it.
#pragma once

#include "arith.h"
#include "scores.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// Independent maxima and sums that hide each other's latency; rows of scores are a multiple of these vectors.
template <class Real>
constexpr int kChains = 64 / Simd<Real>::kLanes < 4 ? 64 / Simd<Real>::kLanes : 4;

template <class Real>
inline Real row_maximum(const Real* scores, int64_t width) {
  typedef Simd<Real> Reals;
  constexpr int chains = kChains<Real>, lanes = Reals::kLanes;
  typename Reals::Vec best[chains];
#pragma GCC unroll 4
  for (int c = 0; c < chains; ++c) best[c] = Reals::load(scores + c * lanes);
  for (int64_t j = chains * lanes; j < width; j += chains * lanes)
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) best[c] = vmax(best[c], Reals::load(scores + j + c * lanes));
#pragma GCC unroll 4
  for (int c = 1; c < chains; ++c) best[0] = vmax(best[0], best[c]);
  return horizontal_max<Real>(best[0]);
}

template <class A>
inline void store_probabilities(typename A::Elem* to, const typename A::RealVec (&p)[kChains<typename A::Real>]) {
  constexpr int lanes = Simd<typename A::Real>::kLanes;
#pragma GCC unroll 4
  for (int c = 0; c < kChains<typename A::Real>; c += A::kPack) {
    if constexpr (A::kPack == 1)
      Simd<typename A::Real>::store(to + c * lanes, p[c]);
    else
      Simd<typename A::Elem>::store(to + c / 2 * lanes, A::narrow(p[c], p[c + 1]));
  }
}

// Scores to probabilities relative to the new running maximum; rescales what the row has so far: out, of `columns`
// columns, and the lanes of row_sum, to be summed at the end. `words` are dropout's.
template <class A, bool kDropout>
inline void add_weights(const typename A::Real* scores, typename A::Elem* probs, int64_t width,
                        typename A::Real block_max, typename A::Real factor, typename A::Real& row_max,
                        typename A::Real* row_sum, typename A::Real* out, int64_t columns, const Dropout& dropout,
                        const uint32_t* words) {
  typedef typename A::Real Real;
  typedef typename A::RealVec RealVec;
  typedef Simd<Real> Reals;
  constexpr int chains = kChains<Real>, lanes = Reals::kLanes;
  const Real new_max = block_max > row_max ? block_max : row_max;
  // Subtracted before the factor is applied: the largest score has p = 1 exactly.
  const Real shift = new_max == -infinity<Real>() ? Real(0) : new_max;  // nothing seen yet: 2^(-inf - 0) = 0
  RealVec sum[chains] = {};
  for (int64_t j = 0; j < width; j += chains * lanes) {
    RealVec p[chains];
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) {
      p[c] = vexp2((Reals::load(scores + j + c * lanes) - shift) * factor);
      sum[c] += p[c];
      if constexpr (kDropout) p[c] = dropout.template keep<Real>(p[c], words + j + c * lanes);
    }
    store_probabilities<A>(probs + j / A::kPack, p);
  }
#pragma GCC unroll 4
  for (int c = 1; c < chains; ++c) sum[0] += sum[c];
  if (new_max != row_max) {
    const RealVec correction = vexp2(Reals::broadcast((row_max - shift) * factor));
    for (int64_t c = 0; c < columns; c += lanes) Reals::store(out + c, Reals::load(out + c) * correction);
    sum[0] += Reals::load(row_sum) * correction;
    row_max = new_max;
  } else {
    sum[0] += Reals::load(row_sum);
  }
  Reals::store(row_sum, sum[0]);
}

// Writes out and lse of a row from its running softmax; the sink comes in here.
template <class Real>
inline void finish_row(const DenseParams& p, const Scores<Real>& scores, const Dropout& dropout, int64_t b, int64_t h,
                       int64_t i, Real row_max, double sum, const Real* out) {
  const double highest = double(row_max) * scores.factor();
  double total = sum, shrink = 1, peak = highest;
  if (p.sinks.data) {
    const double sink = double(at<Real>(p.sinks, 0, h)) * kLog2E;
    peak = sink > highest ? sink : highest;
    const double finite = peak > -infinity<double>() ? peak : 0;
    shrink = __builtin_exp2(highest - finite);
    total = total * shrink + __builtin_exp2(sink - finite);
  }
  const bool empty = peak == -infinity<double>() && total == 0;
  write_row(mutable_element(p.out, p.dtype, b, h, i), p.dtype, out,
            empty ? Real(0) : Real(shrink * dropout.scale() / total), p.head_dim_v);
  if (p.lse.data) at<Real>(p.lse, b, h, i) = empty ? -infinity<Real>() : Real((peak + __builtin_log2(total)) * kLn2);
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
