// Small matrices in Real: products of any number of rows, transposition, loops over rows, and rows of tensors.
// Columns always fill whole vectors, but for tensors' own.
#pragma once

#include "gemm.h"
#include "pack.h"
#include "scores.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <Dtype kDtype>
struct DtypeTag {
  static constexpr Dtype dtype = kDtype;
};

// Calls use(tag) with the dtype of a tensor that Real accumulates.
template <class Real, class Use>
inline void with_dtype(Dtype dtype, Use use) {
  if constexpr (sizeof(Real) == 8) {
    use(DtypeTag<Dtype::kFloat64>());
  } else {
    if (dtype == Dtype::kBFloat16) return use(DtypeTag<Dtype::kBFloat16>());
    if (dtype == Dtype::kFloat16) return use(DtypeTag<Dtype::kFloat16>());
    use(DtypeTag<Dtype::kFloat32>());
  }
}

// `columns` numbers, then zeros up to `padded`: the end of their last vector or of one more.
template <class Real, Dtype kDtype>
inline void load_row(Real* to, const char* from, int64_t columns, int64_t padded) {
  typedef Simd<Real> Reals;
  const int64_t size = element_size(kDtype);
  int64_t k = 0;
  for (; k + Reals::kLanes <= columns; k += Reals::kLanes)
    Reals::store(to + k, load_vector<Real, kDtype>(from + k * size));
  if (k == padded) return;
  Reals::store(to + k, typename Reals::Vec{});
  read_row(to + k, from + k * size, kDtype, columns - k);
}

template <class Real>
inline void store_row(void* to, Dtype dtype, const Real* from, Real factor, int64_t columns) {
  typedef Simd<Real> Reals;
  if (element_size(dtype) != int64_t(sizeof(Real))) return write_row(to, dtype, from, factor, columns);
  Real* row = static_cast<Real*>(to);
  int64_t k = 0;
  for (; k + Reals::kLanes <= columns; k += Reals::kLanes) Reals::store(row + k, Reals::load(from + k) * factor);
  for (; k < columns; ++k) row[k] = from[k] * factor;
}

// Calls use(first, Constant<rows>) for row after row of tiles.
template <class Use>
[[gnu::always_inline]] inline void for_row_tiles(int64_t rows, Use use) {
  int64_t first = 0;
  for (; first + kTileRows <= rows; first += kTileRows) use(first, Constant<kTileRows>());
  switch (rows - first) {
    case 5: return use(first, Constant<5>());
    case 4: return use(first, Constant<4>());
    case 3: return use(first, Constant<3>());
    case 2: return use(first, Constant<2>());
    case 1: return use(first, Constant<1>());
    default: return;
  }
}

// C[rows x columns] (+)= A B for any number of rows; columns fill whole vectors.
template <class A, bool kTransposed, bool kAccumulate>
inline void product(int64_t rows, int64_t columns, int64_t steps, const typename A::Elem* a, int64_t lda,
                    const typename A::Elem* b, int64_t ldb, typename A::Real* c, int64_t ldc) {
  for_row_tiles(rows, [=](int64_t m, auto count) {
    row_product<A, count.value, kTransposed, kAccumulate>(columns, steps, a + m * (kTransposed ? 1 : lda), lda, b, ldb,
                                                          c + m * ldc, ldc);
  });
}

// to[columns][rows] from [rows][columns]; both counts fill whole vectors.
template <class Real>
inline void turn(Real* to, int64_t ld_to, const Real* from, int64_t ld_from, int64_t rows, int64_t columns) {
  typedef Simd<Real> Reals;
  constexpr int lanes = Reals::kLanes;
  for (int64_t i = 0; i < rows; i += lanes)
    for (int64_t k = 0; k < columns; k += lanes) {
      typename Reals::Vec v[lanes];
#pragma GCC unroll 16
      for (int m = 0; m < lanes; ++m) v[m] = Reals::load(from + (i + m) * ld_from + k);
      transpose_square<Real>(v);
#pragma GCC unroll 16
      for (int m = 0; m < lanes; ++m) Reals::store(to + (k + m) * ld_to + i, v[m]);
    }
}

template <class Real>
inline void fill(Real* to, int64_t count, Real value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// In what follows `count`, and the columns of rows, fill whole vectors.

template <class Real>
inline void scale_row(Real* row, int64_t count, Real factor) {
  typedef Simd<Real> Reals;
  for (int64_t i = 0; i < count; i += Reals::kLanes) Reals::store(row + i, Reals::load(row + i) * factor);
}

// Row i of `from` times factor[i].
template <class Real>
inline const Real* scaled_rows(Real* to, const Real* from, const Real* factor, int64_t rows, int64_t columns) {
  typedef Simd<Real> Reals;
  for (int64_t i = 0; i < rows; ++i) {
    const Real x = factor[i];
    for (int64_t k = i * columns; k < (i + 1) * columns; k += Reals::kLanes)
      Reals::store(to + k, Reals::load(from + k) * x);
  }
  return to;
}

// x in the lanes 0..last, 0 in those after it, whatever they hold.
template <class Real>
inline typename Simd<Real>::Vec up_to(typename Simd<Real>::Vec x, int64_t last) {
  typedef typename SignedOf<Real>::Type Int;
  typedef typename Simd<Int>::Vec Ints;
  static constexpr LaneTable<Real> lane = rotation<Real>(0);
  return (typename Simd<Real>::Vec)((Ints)x & (lane.vec() <= Int(last)));
}

// a . b, in lanes to be summed.
template <class Real>
inline typename Simd<Real>::Vec dot_lanes(const Real* a, const Real* b, int64_t count) {
  typedef Simd<Real> Reals;
  typename Reals::Vec sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * Reals::kLanes <= count; i += 2 * Reals::kLanes)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c)
      sum[c] += Reals::load(a + i + c * Reals::kLanes) * Reals::load(b + i + c * Reals::kLanes);
  if (i < count) sum[0] += Reals::load(a + i) * Reals::load(b + i);
  return sum[0] + sum[1];
}

template <class Real>
inline Real dot(const Real* a, const Real* b, int64_t count) {
  return horizontal_sum<Real>(dot_lanes(a, b, count));
}

// Each row of `from` times `left`, number by number, plus that of `added`.
template <class Real>
inline void add_decayed(Real* to, const Real* from, const Real* left, const Real* added, int64_t rows,
                        int64_t columns) {
  typedef Simd<Real> Reals;
  for (int64_t i = 0; i < rows; ++i, to += columns, from += columns, added += columns)
    for (int64_t k = 0; k < columns; k += Reals::kLanes)
      Reals::store(to + k, Reals::load(from + k) * Reals::load(left + k) + Reals::load(added + k));
}

template <class Real>
inline void add_rows(Real* sum, const Real* added, int64_t count) {
  typedef Simd<Real> Reals;
  for (int64_t i = 0; i < count; i += Reals::kLanes)
    Reals::store(sum + i, Reals::load(sum + i) + Reals::load(added + i));
}

template <class Real>
inline Real total(const Real* a, int64_t count) {
  typedef Simd<Real> Reals;
  typename Reals::Vec sum = {};
  for (int64_t i = 0; i < count; i += Reals::kLanes) sum += Reals::load(a + i);
  return horizontal_sum<Real>(sum);
}

// sum <- left sum + factor added
template <class Real>
inline void add_scaled(Real* sum, Real left, const Real* added, Real factor, int64_t count) {
  typedef Simd<Real> Reals;
  for (int64_t i = 0; i < count; i += Reals::kLanes)
    Reals::store(sum + i, Reals::load(sum + i) * left + Reals::load(added + i) * factor);
}

// 2^x for x <= 0. For double also below 2^-100, where vexp2 ends: it is far from numbers that are slow.
inline Simd<float>::Vec power(Simd<float>::Vec x) { return vexp2(x); }
inline Simd<double>::Vec power(Simd<double>::Vec x) {
  Simd<double>::Vec y = vexp2(x * 0.125);
  y *= y;
  y *= y;
  return y * y;
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
