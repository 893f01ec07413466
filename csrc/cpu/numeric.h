// bfloat16 and float16 as bits: conversions a row at a time, between a tensor's dtype and the kernels' own float type.
// They touch each input element once per pack, so plain loops that the compiler vectorises are fast enough.
#pragma once

#include "../dense_params.h"
#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

inline float bfloat16_to_float(uint16_t h) { return bit_cast<float>(uint32_t(h) << 16); }

inline uint16_t float_to_bfloat16(float f) {
  const uint32_t u = bit_cast<uint32_t>(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

inline float float16_to_float(uint16_t h) {
  // The 15 low bits, placed as a float, are the value times 2^-112 (subnormals too); infinity and NaN need the rest.
  const uint32_t bits = (h & 0x7fffu) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(bits) * bit_cast<float>(uint32_t(239) << 23));
  const uint32_t magnitude = bits >= (uint32_t(0x1f) << 23) ? bits | 0x7f800000u : finite;
  return bit_cast<float>(magnitude | (uint32_t(h & 0x8000u) << 16));
}

inline uint16_t float_to_float16(float f) {
  const uint32_t u = bit_cast<uint32_t>(f);
  const uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Below 2^-14 adding 0.5 makes the FPU round at float16's subnormal step; above, round to even in integers.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (uint32_t(112) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < (uint32_t(113) << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return uint16_t(sign | half);
}

inline int64_t element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBool: return 1;
    case Dtype::kBFloat16:
    case Dtype::kFloat16: return 2;
    case Dtype::kFloat32: return 4;
    case Dtype::kFloat64: return 8;
  }
  return 0;
}

inline const char* element(const View& view, Dtype dtype, int64_t b, int64_t h, int64_t row) {
  return static_cast<const char*>(view.data) + row_offset(view, b, h, row) * element_size(dtype);
}

inline char* mutable_element(const View& view, Dtype dtype, int64_t b, int64_t h, int64_t row) {
  return const_cast<char*>(element(view, dtype, b, h, row));
}

// A vector of Real from as many contiguous elements of kDtype.
template <class Real, Dtype kDtype>
inline typename Simd<Real>::Vec load_vector(const char* from) {
  typedef Simd<Real> Reals;
  if constexpr (kDtype == Dtype::kBFloat16) {
#if defined(__AVX512F__)  // GCC makes three shuffles of __builtin_convertvector
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    uint16_t half __attribute__((vector_size(2 * Reals::kLanes)));
    __builtin_memcpy(&half, from, sizeof half);
    const Simd<uint32_t>::Vec wide = __builtin_convertvector(half, Simd<uint32_t>::Vec);
#endif
    return (typename Reals::Vec)((Simd<uint32_t>::Vec)wide << 16);
  } else if constexpr (kDtype == Dtype::kFloat16) {
#if defined(__AVX512F__)
    return (typename Reals::Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    return (typename Reals::Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    typename Reals::Vec v;
    for (int i = 0; i < Reals::kLanes; ++i) {
      uint16_t half;
      __builtin_memcpy(&half, from + 2 * i, 2);
      v[i] = float16_to_float(half);
    }
    return v;
#endif
  } else {
    return Reals::load(reinterpret_cast<const Real*>(from));
  }
}

// n contiguous elements of any floating dtype, read as Real.
template <class Real>
inline void read_row(Real* to, const void* from, Dtype dtype, int64_t n) {
  const uint16_t* half = static_cast<const uint16_t*>(from);
  if (element_size(dtype) == int64_t(sizeof(Real))) {
    __builtin_memcpy(to, from, size_t(n) * sizeof(Real));
    return;
  }
  switch (dtype) {
    case Dtype::kFloat32:
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<const float*>(from)[i];
      break;
    case Dtype::kFloat64:
      for (int64_t i = 0; i < n; ++i) to[i] = Real(static_cast<const double*>(from)[i]);
      break;
    case Dtype::kBFloat16:
      for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_to_float(half[i]);
      break;
    default:
      for (int64_t i = 0; i < n; ++i) to[i] = float16_to_float(half[i]);
  }
}

// The reverse, times a factor.
template <class Real>
inline void write_row(void* to, Dtype dtype, const Real* from, Real factor, int64_t n) {
  uint16_t* half = static_cast<uint16_t*>(to);
  switch (dtype) {
    case Dtype::kFloat32:
      for (int64_t i = 0; i < n; ++i) static_cast<float*>(to)[i] = float(from[i] * factor);
      break;
    case Dtype::kFloat64:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(to)[i] = from[i] * factor;
      break;
    case Dtype::kBFloat16:
      for (int64_t i = 0; i < n; ++i) half[i] = float_to_bfloat16(float(from[i] * factor));
      break;
    default:
      for (int64_t i = 0; i < n; ++i) half[i] = float_to_float16(float(from[i] * factor));
  }
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
