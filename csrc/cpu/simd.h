// Vectors of whatever length the instruction set of this translation unit has, written with GNU vector extensions.
//
// Everything an ISA unit defines lives in a namespace of its own (FASTATTN_ISA_NAMESPACE): the same templates are
// compiled several times with different flags, and the linker must never merge them. For the same reason these files
// include no standard C++ header: a weak std:: symbol compiled for AVX-512 would crash an older CPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

template <class T>
struct Simd {
  typedef T Vec __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / sizeof(T);

  static Vec load(const T* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(T* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
  static Vec broadcast(T x) { return x - Vec{}; }
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast changes the type, not the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Lane i takes index[i] of a followed by b.
template <class V, class I>
inline V shuffle(V a, V b, I index) {
#if defined(__clang__)
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  V r;
#pragma clang loop unroll(full)
  for (int i = 0; i < lanes; ++i) r[i] = index[i] < lanes ? a[index[i]] : b[index[i] - lanes];
  return r;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// b where either is NaN, so vmax(limit, x) keeps x's NaN. GCC makes a compare and a blend of `a > b ? a : b`.
template <class V>
inline V vmax(V a, V b) {
  [[maybe_unused]] constexpr bool single = sizeof(a[0]) == 4;
#if defined(__AVX512F__)
  if constexpr (single) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  else return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX__)
  if constexpr (single) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  else return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  if constexpr (single) return (V)_mm_max_ps((__m128)a, (__m128)b);
  else return (V)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}

template <class T>
struct SignedOf;
template <>
struct SignedOf<float> { typedef int32_t Type; };
template <>
struct SignedOf<uint32_t> { typedef int32_t Type; };
template <>
struct SignedOf<double> { typedef int64_t Type; };

// Lane numbers for a shuffle, as a constant in memory: built in code they would cost more than the shuffle.
template <class T>
struct LaneTable {
  typedef typename SignedOf<T>::Type Int;
  typedef typename Simd<Int>::Vec Vec;
  static constexpr int kLanes = Simd<T>::kLanes;
  Int lane[kLanes] = {};

  Vec vec() const { return Simd<Int>::load(lane); }
};

template <class T>
constexpr LaneTable<T> rotation(int step) {
  LaneTable<T> table;
  for (int i = 0; i < table.kLanes; ++i) table.lane[i] = (i + step) % table.kLanes;
  return table;
}

// Folds the lanes pairwise, always in the same order, so that sums repeat bit for bit.
template <class T, int kStep = Simd<T>::kLanes / 2, class Fold>
inline T fold_lanes(typename Simd<T>::Vec v, Fold fold) {
  if constexpr (kStep == 0) {
    return v[0];
  } else {
    static constexpr LaneTable<T> table = rotation<T>(kStep);
    return fold_lanes<T, kStep / 2>(fold(v, shuffle(v, v, table.vec())), fold);
  }
}

template <class T>
inline T horizontal_max(typename Simd<T>::Vec v) {
  typedef typename Simd<T>::Vec Vec;
  return fold_lanes<T>(v, [](Vec a, Vec b) { return vmax(a, b); });
}

template <class T>
inline T horizontal_sum(typename Simd<T>::Vec v) {
  typedef typename Simd<T>::Vec Vec;
  return fold_lanes<T>(v, [](Vec a, Vec b) { return a + b; });
}

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
