// A block mask's lists, as one panel of keys and 64 rows see them.
#pragma once

#include "mask.h"
#include "pack.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

constexpr int kMaskRows = 64;  // a block of a mask is as many rows by one panel of keys
constexpr int32_t kFullBlock = -1;

// The panels of keys that one block of rows sees, or the blocks of rows that see one panel.
struct BlockLine {
  const int32_t* at;
  int64_t count, stride;

  int64_t block(int64_t n) const { return at[n * stride]; }
  int32_t tile(int64_t n) const { return at[n * stride + 1]; }
  int32_t turn(int64_t n) const { return at[n * stride + 2]; }  // of a panel's rows
};

class Blocks {
 public:
  explicit Blocks(const DenseParams& p) : p_(p) {}

  bool active() const { return p_.mask_rows.data != nullptr; }

  BlockLine row_line(int64_t b, int64_t h, int64_t block) const {
    return line(bounds(p_.mask_rows, b, h, block), p_.mask_row_blocks, 2);
  }
  BlockLine panel_line(int64_t b, int64_t h, int64_t panel) const {
    return line(bounds(p_.mask_columns, b, h, panel), p_.mask_column_blocks, 3);
  }

  // The block that comes n-th when the longest lines come first.
  int64_t nth_row(int64_t b, int64_t h, int64_t n) const { return bounds(p_.mask_rows, b, h, n)[3]; }
  int64_t nth_panel(int64_t b, int64_t h, int64_t n) const { return bounds(p_.mask_columns, b, h, n)[3]; }

  // Bit j says whether the tile's row sees key j of the panel.
  uint64_t bits(int32_t tile, int64_t row) const {
    return tile == kFullBlock ? ~uint64_t(0) : p_.mask_tiles[int64_t(tile) * kMaskRows + row];
  }

  // Bit j says whether any row of the head sees key j of the panel.
  uint64_t live_keys(int64_t b, int64_t h, int64_t panel) const {
    const BlockLine line = panel_line(b, h, panel);
    uint64_t live = 0;
    for (int64_t n = 0; n < line.count && ~live; ++n)
      for (int64_t row = 0; row < kMaskRows && ~live; ++row) live |= bits(line.tile(n), row);
    return live;
  }

 private:
  static const int32_t* bounds(const View& lines, int64_t b, int64_t h, int64_t n) {
    return static_cast<const int32_t*>(lines.data) + row_offset(lines, b, h, n);
  }
  static BlockLine line(const int32_t* bounds, const int32_t* blocks, int64_t stride) {
    return {blocks + bounds[0] * stride, bounds[2] - bounds[0], stride};
  }

  const DenseParams& p_;
};

// Hides the keys of a panel whose bit is 0.
template <class Real>
inline void hide_unset(Real* scores, uint64_t bits) {
  typedef Simd<Real> Reals;
  typedef typename SignedOf<Real>::Type Int;
  typedef typename Simd<Int>::Vec Ints;
  static constexpr LaneTable<Real> lanes = rotation<Real>(0);
  const Ints bit = Simd<Int>::broadcast(1) << lanes.vec();
  for (int64_t j = 0; j < kPanelKeys; j += Reals::kLanes) {
    const Ints some = Simd<Int>::broadcast(Int((bits >> j) & ((uint64_t(1) << Reals::kLanes) - 1)));
    const typename Reals::Vec score = Reals::load(scores + j);
    Reals::store(scores + j, (some & bit) != 0 ? score : Reals::broadcast(-infinity<Real>()));
  }
}

// Keys that no row sees may be NaN: they become 0 in a transposed panel and in 64 rows of a row panel.
template <class A>
inline void clear_transposed(typename A::Elem* panel, int64_t steps, uint64_t live) {
  for (uint64_t dead = ~live; dead; dead &= dead - 1)
    for (int64_t k = 0; k < steps; ++k) panel[k * kPanelKeys + __builtin_ctzll(dead)] = 0;
}
template <class A>
inline void clear_rows(typename A::Elem* rows, int64_t columns, uint64_t live) {
  for (uint64_t dead = ~live; dead; dead &= dead - 1) {
    const int j = __builtin_ctzll(dead);
    typename A::Elem* row = rows + j / A::kPack * columns;
    for (int64_t k = 0; k < columns; ++k) {
      if constexpr (A::kPack == 1) row[k] = 0;
      else row[k] &= j % 2 ? 0x0000ffffu : 0xffff0000u;
    }
  }
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
