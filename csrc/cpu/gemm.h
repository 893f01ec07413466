// Tile products: C[M x N] (+)= A[M x K] * B[K x N], the inner loop of everything here.
//
// C stays in registers: 6 rows x 4 vectors of accumulators where there are 32 vector registers (24 accumulators hide
// the latency of two multiply-adds a cycle, and leave room for 4 vectors of B), 6 x 2 where there are 16. Each step of
// k loads one row of B and broadcasts 6 elements of A. B is packed, so its rows are contiguous; A may be read along
// its rows or along its columns (kTransposed), which costs the same since only single elements of it are loaded.
//
// Every loop over the accumulators must be unrolled completely: GCC keeps the array in registers only then.
#pragma once

#include "arith.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

constexpr int kTileRows = 6;
constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;

template <class A, int M, int NV>
using Accumulators = typename A::RealVec[M][NV];

// acc += A B
template <class A, int M, int NV, bool kTransposed>
[[gnu::always_inline]] inline void multiply_add(Accumulators<A, M, NV>& acc, int64_t steps, const typename A::Elem* a,
                                                int64_t lda, const typename A::Elem* b, int64_t ldb) {
  typedef Simd<typename A::Elem> Elems;
  constexpr int lanes = Elems::kLanes;
#pragma GCC unroll 2  // with 16 registers a step is 20 instructions: what counts it would be 4 more (5 % measured)
  for (int64_t k = 0; k < steps; ++k) {
    typename A::ElemVec row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) row[n] = Elems::load(b + k * ldb + n * lanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename A::Elem x = kTransposed ? a[k * lda + m] : a[m * lda + k];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] = A::multiply_add(acc[m][n], x, row[n]);
    }
  }
}

template <class A, int M, int NV, bool kTransposed, bool kAccumulate>
[[gnu::always_inline]] inline void tile_product(int64_t steps, const typename A::Elem* a, int64_t lda,
                                                const typename A::Elem* b, int64_t ldb, typename A::Real* c,
                                                int64_t ldc) {
  typedef Simd<typename A::Real> Reals;
  constexpr int lanes = Reals::kLanes;
  Accumulators<A, M, NV> acc;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[m][n] = typename A::RealVec{};
  multiply_add<A, M, NV, kTransposed>(acc, steps, a, lda, b, ldb);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      // Added at the end, not carried along: rounding then grows with the tiles of a long sum, not with its terms.
      if constexpr (kAccumulate) acc[m][n] += Reals::load(c + m * ldc + n * lanes);
      Reals::store(c + m * ldc + n * lanes, acc[m][n]);
    }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls tile(n, Constant<vectors>) for columns from n on, tile after tile, of any number that fills whole vectors.
template <class Real, class Tile>
[[gnu::always_inline]] inline void for_column_tiles(int64_t columns, Tile tile) {
  constexpr int lanes = Simd<Real>::kLanes;
  constexpr int wide = kTileVectors * lanes;
  int64_t n = 0;
  for (; n + wide <= columns; n += wide) tile(n, Constant<kTileVectors>());
  switch ((columns - n) / lanes) {
    case 3:
      if constexpr (kTileVectors > 3) tile(n, Constant<3>());
      break;
    case 2:
      if constexpr (kTileVectors > 2) tile(n, Constant<2>());
      break;
    case 1: tile(n, Constant<1>()); break;
    default: break;
  }
}

// M rows of C and any number of columns that fills whole vectors.
template <class A, int M, bool kTransposed, bool kAccumulate>
inline void row_product(int64_t columns, int64_t steps, const typename A::Elem* a, int64_t lda,
                        const typename A::Elem* b, int64_t ldb, typename A::Real* c, int64_t ldc) {
  for_column_tiles<typename A::Real>(columns, [=](int64_t n, auto vectors) {
    tile_product<A, M, vectors.value, kTransposed, kAccumulate>(steps, a, lda, b + n, ldb, c + n, ldc);
  });
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
