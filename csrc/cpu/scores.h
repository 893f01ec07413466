// From products q . k to scores, and from probabilities to what dropout leaves of them.
#pragma once

#include "exp.h"
#include "mask.h"
#include "philox.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Of a tensor in the accumulation dtype.
template <class Real>
inline Real& at(const View& view, int64_t b, int64_t h, int64_t i = 0, int64_t j = 0) {
  return static_cast<Real*>(view.data)[row_offset(view, b, h, i) + j * view.stride[3]];
}

// From q k^T to units of log2, without the sign, which goes into the packed queries. A scale of 0 must not turn a
// hidden key's -inf into NaN: the smallest normal number gives the same weights.
template <class Real>
inline Real log2_scale(double scale) {
  const Real magnitude = Real((scale < 0 ? -scale : scale) * kLog2E), smallest = Real(1.17549435e-38);
  return magnitude > smallest ? magnitude : smallest;
}

// Near 0, where 1 - 2 / (e^2x + 1) cancels, the Taylor series.
template <class Real>
inline typename Simd<Real>::Vec vtanh(typename Simd<Real>::Vec x) {
  typedef Simd<Real> Reals;
  constexpr double series[] = {1.0,
                               -1.0 / 3,
                               2.0 / 15,
                               -17.0 / 315,
                               62.0 / 2835,
                               -1382.0 / 155925,
                               21844.0 / 6081075,
                               -929569.0 / 638512875,
                               6404582.0 / 10854718875,
                               -443861162.0 / 1856156927625,
                               18888466084.0 / 194896477400625};
  constexpr int terms = sizeof(Real) == 4 ? 5 : 11;
  const typename Reals::Vec square = x * x;
  typename Reals::Vec near = Reals::broadcast(Real(series[terms - 1]));
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) near = near * square + Real(series[i]);
  const typename Reals::Vec limit = Reals::broadcast(Real(20));
  const typename Reals::Vec within = vmax(-limit, -vmax(-limit, -x));
  const typename Reals::Vec far = Real(1) - Real(2) / (vexp2(within * Real(2 * kLog2E)) + Real(1));
  return square < Real(0.0625) ? near * x : far;
}

// Scores in units of log2: scaled, capped, with ALiBi and the mask or bias.
template <class Real>
class Scores {
  typedef Simd<Real> Reals;

 public:
  explicit Scores(const DenseParams& p)
      : p_(p), capped_(p.softcap > 0), plain_(!capped_ && !p.alibi_slopes.data && !p.attn_mask.data),
        scale2_(log2_scale<Real>(p.scale)), inner_(capped_ ? Real((p.scale < 0 ? -p.scale : p.scale) / p.softcap) : 0),
        cap2_(Real(p.softcap * kLog2E)) {}

  bool capped() const { return capped_; }

  // Whether products are scores but for `factor`.
  bool plain() const { return plain_; }

  // What is left to multiply by: products are plain scores but for the scale, which the softmax takes along.
  Real factor() const { return plain_ ? scale2_ : Real(1); }

  // Row i, from key `first` on, `width` of them, which may end past the last key. `position` is the row's key position,
  // `bias` has room for the row, `derivative` (may be null) takes the cap's.
  void shape(Real* scores, Real* bias, Real* derivative, int64_t b, int64_t h, int64_t i, int64_t position, int64_t first,
             int64_t width) const {
    if (plain_) return;
    const int64_t count = min64(width, p_.seqlen_k - first);
    for (int64_t j = 0; j < width; j += Reals::kLanes) {
      typename Reals::Vec score = Reals::load(scores + j);
      if (capped_) {
        const typename Reals::Vec tanh = vtanh<Real>(score * inner_);
        if (derivative) Reals::store(derivative + j, Real(1) - tanh * tanh);
        Reals::store(scores + j, tanh * cap2_);
      } else {
        Reals::store(scores + j, score * scale2_);
      }
    }
    if (p_.alibi_slopes.data) {
      const Real slope = at<Real>(p_.alibi_slopes, b, h) * Real(kLog2E);
      typename Reals::Vec distance;
      for (int l = 0; l < Reals::kLanes; ++l) distance[l] = Real(position - first - l);
      for (int64_t j = 0; j < width; j += Reals::kLanes, distance -= Real(Reals::kLanes))
        Reals::store(scores + j, Reals::load(scores + j) - slope * vmax(distance, -distance));
    }
    if (p_.attn_mask.data) {
      read_bias(bias, p_, b, h, i, first, count);
      for (int64_t j = 0; j < count; ++j)  // a hidden key's -inf whatever its score was
        scores[j] = bias[j] == -infinity<Real>() ? -infinity<Real>() : scores[j] + bias[j] * Real(kLog2E);
    }
  }

 private:
  const DenseParams& p_;
  const bool capped_, plain_;
  const Real scale2_, inner_, cap2_;
};

class Dropout {
 public:
  explicit Dropout(const DenseParams& p)
      : p_(p), scale_(p.dropout_p < 1 ? 1 / (1 - p.dropout_p) : 0),
        threshold_(uint32_t(p.dropout_p < 1 ? p.dropout_p * 4294967296.0 : 0)) {}

  bool active() const { return p_.rng != nullptr; }

  // On what is kept; with a probability of 1, where nothing is, it is 0.
  double scale() const { return scale_; }

  // Random words of a row's keys, for `keep`.
  void draw(uint32_t* words, int64_t b, int64_t h, int64_t i, int64_t first, int64_t count) const {
    philox_words(words, first, count, uint64_t(p_.rng[0]), uint32_t(i),
                 uint32_t(b * p_.heads_q + h), uint32_t(p_.rng[1]));
  }

  // x where the words say that it is kept, else 0.
  template <class Real>
  typename Simd<Real>::Vec keep(typename Simd<Real>::Vec x, const uint32_t* words) const {
    typedef typename Simd<typename SignedOf<Real>::Type>::Vec Mask;
    typedef uint32_t Few __attribute__((vector_size(4 * Simd<Real>::kLanes)));
    Few word;
    __builtin_memcpy(&word, words, sizeof word);
    return (typename Simd<Real>::Vec)((Mask)x & __builtin_convertvector(word >= threshold_, Mask));
  }

 private:
  const DenseParams& p_;
  const double scale_;
  const uint32_t threshold_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
