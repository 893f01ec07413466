// 2^x for vectors. x = floor(x) + r with r in [0, 1]; 2^r is a polynomial with p(0) = 1 exactly, fitted for the least
// relative error (float: degree 5, 8e-8; double: degree 11, 4e-16), and the integer part goes into the exponent.
// 2^-inf is exactly 0 (that is how masked keys vanish), NaN stays NaN, and below kExp2Low it is 0 too: beside a weight of
// about 1 so little adds nothing, and products with it would soon be subnormal numbers, which are slow (ALiBi: 6 x).
// x must be below 127 (1023 for double): here it is a score minus the row's maximum or lse.
#pragma once

#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

constexpr int kExp2Low = -100;

template <class T>
struct Exp2Constants;

template <>
struct Exp2Constants<float> {
  typedef int32_t Int;
  static constexpr int kDegree = 5, kMantissaBits = 23;
  // 1.5 * 2^23 plus the exponent's bias: adding it rounds to an integer, whose low bits then are the exponent field.
  static constexpr float kRound = 12582912.0f + 127.0f;
  static constexpr float kHalf = 0.49999997f;  // just below 1/2: then 0 is rounded to 0, not to -1
  static constexpr float kCoefficients[kDegree + 1] = {1.0f,           0.693151312f,    0.240164450f,
                                                       0.0557999139f, 0.00901702925f, 0.00186713057f};
};

template <>
struct Exp2Constants<double> {
  typedef int64_t Int;
  static constexpr int kDegree = 11, kMantissaBits = 52;
  static constexpr double kRound = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52 plus the bias
  static constexpr double kHalf = 0.49999999999999994;
  static constexpr double kCoefficients[kDegree + 1] = {
      1.0,
      0.69314718055994473,
      0.24022650695922043,
      0.055504108662870741,
      0.0096181291195144118,
      0.001333355788541187,
      0.00015403526962829559,
      1.5253046148694822e-05,
      1.3208113711750563e-06,
      1.0268486991527963e-07,
      6.4402424067041148e-09,
      6.5764787540564869e-10};
};

template <class T>
inline typename Simd<T>::Vec exp2_fraction(typename Simd<T>::Vec r) {
  typedef Exp2Constants<T> C;
  typename Simd<T>::Vec p = Simd<T>::broadcast(C::kCoefficients[C::kDegree]);
#pragma GCC unroll 16
  for (int i = C::kDegree - 1; i >= 0; --i) p = p * r + C::kCoefficients[i];
  return p;
}

#if defined(__AVX512DQ__)

inline Simd<float>::Vec vexp2(Simd<float>::Vec x) {
  const __m512 r = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __mmask16 large = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(kExp2Low), _CMP_NLT_UQ);
  return (Simd<float>::Vec)_mm512_maskz_scalef_ps(large, (__m512)exp2_fraction<float>((Simd<float>::Vec)r), (__m512)x);
}

inline Simd<double>::Vec vexp2(Simd<double>::Vec x) {
  const __m512d r = _mm512_reduce_pd((__m512d)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __mmask8 large = _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(kExp2Low), _CMP_NLT_UQ);
  return (Simd<double>::Vec)_mm512_maskz_scalef_pd(large, (__m512d)exp2_fraction<double>((Simd<double>::Vec)r),
                                                   (__m512d)x);
}

#else

template <class V>
inline V vexp2(V x) {
  typedef __typeof__(x[0] + x[0]) T;
  typedef Exp2Constants<T> C;
  typedef typename Simd<typename C::Int>::Vec IntVec;
  const V shifted = x - C::kHalf + C::kRound;
  const V r = x - (shifted - C::kRound);
  const V power = (V)((IntVec)shifted << C::kMantissaBits);
  const V y = exp2_fraction<T>(r) * power;
  return x < T(kExp2Low) ? V{} : y;
}

#endif

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
