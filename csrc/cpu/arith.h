// How a tile product is computed: the element that the packed operands hold, the accumulator, and the multiply-add.
//
// F32 and F64 hold one number per element. BF16Dot holds two bfloat16 numbers, neighbours along the summed dimension,
// in each 32-bit element, and multiplies them with one dot-product instruction; everything around it (panels, tiles,
// strides) is the same code as for float, with half as many steps.
#pragma once

#include "exp.h"
#include "numeric.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class T>
struct Plain {
  typedef T Real;  // accumulators, softmax
  typedef T Elem;  // packed operands
  typedef typename Simd<T>::Vec RealVec;
  typedef typename Simd<T>::Vec ElemVec;
  static constexpr int kPack = 1;  // numbers per Elem

  static RealVec multiply_add(RealVec c, Elem a, ElemVec b) { return c + a * b; }
};

typedef Plain<float> F32;
typedef Plain<double> F64;

#if defined(FASTATTN_BF16_DOT)

struct BF16Dot {
  typedef float Real;
  typedef uint32_t Elem;
  typedef Simd<float>::Vec RealVec;
  typedef Simd<uint32_t>::Vec ElemVec;
  static constexpr int kPack = 2;

#if defined(__AVX512BF16__)

  static RealVec multiply_add(RealVec c, Elem a, ElemVec b) {
    return (RealVec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
  // 16 numbers of low, then 16 of high, in memory order.
  static ElemVec narrow(RealVec low, RealVec high) {
    return (ElemVec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }

#else  // FASTATTN_EMULATE_BF16_DOT: the same layouts on a CPU without the instructions, for tests only

  static RealVec multiply_add(RealVec c, Elem a, ElemVec b) {
    const RealVec odd = (RealVec)(b & 0xffff0000u), even = (RealVec)(b << 16);
    return c + bit_cast<float>(a & 0xffff0000u) * odd + bit_cast<float>(a << 16) * even;
  }
  static ElemVec narrow(RealVec low, RealVec high) {
    uint16_t h[2 * Simd<float>::kLanes];
    for (int i = 0; i < Simd<float>::kLanes; ++i) {
      h[i] = float_to_bfloat16(low[i]);
      h[i + Simd<float>::kLanes] = float_to_bfloat16(high[i]);
    }
    ElemVec v;
    __builtin_memcpy(&v, h, sizeof v);
    return v;
  }

#endif

  // Lane i holds low[i] and high[i].
  static ElemVec interleave(RealVec low, RealVec high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (ElemVec)_mm512_permutexvar_epi16(order, (__m512i)narrow(low, high));
  }
};

#endif

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
