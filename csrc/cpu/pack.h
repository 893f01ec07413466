// Packing: tensors of any dtype and strides become the contiguous operands that the tile products read.
//
//   staged rows       [rows][columns / kPack]   left operand, summed along the columns (Q, dO)
//   transposed panel  [columns / kPack][64]     right operand, summed along the columns (K in QK^T, V in dOV^T)
//   row panel         [rows / kPack][columns]   right operand, summed along the rows (V in PV; K, Q, dO in the backward)
//
// All padding is zero, and so are rows outside `live`: keys that nobody may see are never read.
#pragma once

#include "arith.h"
#include "interval.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

constexpr int kPanelKeys = 64;

// Where the rows of one (batch, head) of a tensor are.
struct Rows {
  const char* data;
  int64_t stride;  // bytes
  Dtype dtype;
  int64_t columns;
  const int32_t* pages = nullptr;  // with pages: theirs in order, rows a page, and bytes from one to the next
  int64_t page_size = 1, page_stride = 0;

  Rows(const View& view, Dtype dtype_, int64_t b, int64_t h, int64_t columns_)
      : data(element(view, dtype_, b, h, 0)), stride(view.stride[2] * element_size(dtype_)), dtype(dtype_),
        columns(columns_) {}
  const char* operator[](int64_t i) const {
    return pages ? data + pages[i / page_size] * page_stride + i % page_size * stride : data + i * stride;
  }

  // Where rows [first, first + count) are; a division for all of them, not for each.
  void locate(const char** to, int64_t first, int64_t count) const {
    int64_t page = pages ? first / page_size : 0, row = pages ? first % page_size : first;
    for (int64_t i = 0; i < count; ++i, ++row) {
      if (pages && row == page_size) {
        row = 0;
        ++page;
      }
      to[i] = data + (pages ? pages[page] * page_stride : 0) + row * stride;
    }
  }
};

// The rows of key or value, which may lie in pages.
inline Rows key_rows(const DenseParams& p, const View& view, int64_t b, int64_t h, int64_t columns) {
  Rows rows(view, p.dtype, p.block_table ? 0 : b, h, columns);
  if (p.block_table) {
    rows.pages = p.block_table + b * p.block_table_stride;
    rows.page_size = p.page_size;
    rows.page_stride = view.stride[0] * element_size(p.dtype);
  }
  return rows;
}

// Rows [first, first + count) to `to`, ld elements apart, the padding zeroed; negative flips the sign.
template <class A>
inline void stage_rows(typename A::Elem* to, int64_t ld, const Rows& from, int64_t first, int64_t count, Range live,
                       bool negative = false) {
  typedef typename A::Elem Elem;
  for (int64_t i = 0; i < count; ++i) {
    Elem* row = to + i * ld;
    int64_t filled = 0;
    if (first + i >= live.begin && first + i < live.end) {
      filled = div_up(from.columns, A::kPack);
      if constexpr (A::kPack == 1) {
        read_row(row, from[first + i], from.dtype, from.columns);
        if (negative)
          for (int64_t k = 0; k < filled; ++k) row[k] = -row[k];
      } else {
        row[filled - 1] = 0;
        __builtin_memcpy(row, from[first + i], size_t(from.columns) * 2);
        if (negative)
          for (int64_t k = 0; k < filled; ++k) row[k] ^= 0x80008000u;
      }
    }
    for (int64_t k = filled; k < ld; ++k) row[k] = 0;
  }
}

// Lanes for one stage of a transposition: swaps the blocks of kDistance lanes off the diagonal between two vectors.
template <class T>
constexpr LaneTable<T> exchange(int distance, bool upper) {
  LaneTable<T> table;
  for (int i = 0; i < table.kLanes; ++i) {
    const bool second = (i & distance) != 0;
    table.lane[i] = upper ? (second ? table.kLanes + i : i + distance) : (second ? table.kLanes + i - distance : i);
  }
  return table;
}

// Turns a square block of vectors within registers, in log2(lanes) stages.
template <class T, int kDistance = 1>
[[gnu::always_inline]] inline void transpose_square(typename Simd<T>::Vec (&v)[Simd<T>::kLanes]) {
  constexpr int lanes = Simd<T>::kLanes;
  if constexpr (kDistance < lanes) {
    static constexpr LaneTable<T> lower = exchange<T>(kDistance, false), upper = exchange<T>(kDistance, true);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if ((i & kDistance) == 0) {
        const typename Simd<T>::Vec a = v[i], b = v[i + kDistance];
        v[i] = shuffle(a, b, lower.vec());
        v[i + kDistance] = shuffle(a, b, upper.vec());
      }
    transpose_square<T, 2 * kDistance>(v);
  }
}

// 64 rows from `first` to a transposed panel; `staging` has room for as many elements in whole vectors.
template <class A>
inline void pack_transposed(typename A::Elem* to, const Rows& from, int64_t first, Range live,
                            typename A::Elem* staging) {
  typedef Simd<typename A::Elem> Elems;
  constexpr int lanes = Elems::kLanes;
  const int64_t steps = div_up(from.columns, A::kPack), ld = round_up(steps, lanes);
  stage_rows<A>(staging, ld, from, first, kPanelKeys, live);
  for (int64_t k = 0; k < steps; k += lanes)
    for (int i = 0; i < kPanelKeys; i += lanes) {
      typename Elems::Vec v[lanes];
#pragma GCC unroll 16
      for (int m = 0; m < lanes; ++m) v[m] = Elems::load(staging + (i + m) * ld + k);
      transpose_square<typename A::Elem>(v);
      if (k + lanes <= steps) {
#pragma GCC unroll 16
        for (int m = 0; m < lanes; ++m) Elems::store(to + (k + m) * kPanelKeys + i, v[m]);
      } else {
        for (int m = 0; m < steps - k; ++m) Elems::store(to + (k + m) * kPanelKeys + i, v[m]);
      }
    }
}

// Rows [first, first + count) to a row panel of `columns` columns. count is a multiple of kPack.
template <class A>
inline void pack_rows(typename A::Elem* to, int64_t columns, const Rows& from, int64_t first, int64_t count, Range live,
                      bool negative = false) {
  if constexpr (A::kPack == 1) {
    stage_rows<A>(to, columns, from, first, count, live, negative);
  } else {
    const uint32_t sign = negative ? 0x80008000u : 0;
    const auto row_or_null = [&](int64_t i) {
      return reinterpret_cast<const uint16_t*>(i >= live.begin && i < live.end ? from[i] : nullptr);
    };
    for (int64_t i = 0; i < count; i += 2) {
      const uint16_t *low = row_or_null(first + i), *high = row_or_null(first + i + 1);
      typename A::Elem* row = to + i / 2 * columns;
      for (int64_t k = 0; k < columns; ++k) row[k] = 0;
      if (low)
        for (int64_t k = 0; k < from.columns; ++k) row[k] = low[k];
      if (high)
        for (int64_t k = 0; k < from.columns; ++k) row[k] |= uint32_t(high[k]) << 16;
      if (sign)
        for (int64_t k = 0; k < from.columns; ++k) row[k] ^= sign;
    }
  }
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
