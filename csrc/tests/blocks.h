// A block mask's lists, made the slow way, and read the slow way.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../dense_params.h"

namespace fastattn {
namespace tests {

class BlockLists {
 public:
  BlockLists() = default;

  // keep(b, h, i, j) for all of (batch, heads, queries, keys); batch and heads may be 1 for all.
  template <class Keep>
  BlockLists(int64_t batch, int64_t heads, int64_t queries, int64_t keys, Keep keep)
      : batch_(batch), heads_(heads), rows_((queries + 63) / 64), columns_((keys + 63) / 64) {
    // The tile of every block, -1 for a full one and -2 for one left out.
    std::vector<int32_t> tile_of(size_t(batch * heads * rows_ * columns_));
    for (size_t block = 0; block < tile_of.size(); ++block) {
      const int64_t column = int64_t(block) % columns_, row = int64_t(block) / columns_ % rows_;
      const int64_t head = int64_t(block) / columns_ / rows_;
      std::vector<uint64_t> bits(64, 0);
      bool some = false, all = (column + 1) * 64 <= keys;
      for (int64_t i = row * 64; i < std::min(row * 64 + 64, queries); ++i)
        for (int64_t j = column * 64; j < std::min(column * 64 + 64, keys); ++j) {
          const bool kept = keep(head / heads, head % heads, i, j);
          some |= kept;
          all &= kept;
          bits[size_t(i % 64)] |= uint64_t(kept) << (j % 64);
        }
      tile_of[block] = !some ? -2 : all ? -1 : int32_t(tiles_.size() / 64);
      if (some && !all) tiles_.insert(tiles_.end(), bits.begin(), bits.end());
    }
    // Where each line's entries are, full ones first, and the lines by length; columns first, for the turns.
    std::vector<int32_t> turns(tile_of.size());
    for (int64_t head = 0; head < batch * heads; ++head) {
      const auto tile = [&](int64_t row, int64_t column) {
        return tile_of[size_t((head * rows_ + row) * columns_ + column)];
      };
      const auto lines = [&](std::vector<int32_t>& table, std::vector<int32_t>& entries, int64_t stride, int64_t count,
                             int64_t others, auto tile_at) {
        std::vector<std::pair<int64_t, int32_t>> order;
        const size_t start = table.size();
        for (int64_t n = 0; n < count; ++n) {
          const int32_t first = int32_t(int64_t(entries.size()) / stride);
          int32_t partial = first;
          for (const bool full : {true, false}) {
            for (int64_t other = 0; other < others; ++other) {
              const int32_t kind = tile_at(n, other);
              if (kind == -2 || (kind == -1) != full) continue;
              entries.push_back(int32_t(other));
              entries.push_back(kind);
              if (stride == 3) entries.push_back(0);
            }
            if (full) partial = int32_t(int64_t(entries.size()) / stride);
          }
          const int32_t end = int32_t(int64_t(entries.size()) / stride);
          table.insert(table.end(), {first, partial, end, 0});
          order.push_back({first - end, int32_t(n)});
        }
        std::stable_sort(order.begin(), order.end(), [](auto a, auto b) { return a.first < b.first; });
        for (int64_t n = 0; n < count; ++n) table[start + size_t(4 * n + 3)] = order[size_t(n)].second;
        return start;
      };
      lines(row_lines_, row_entries_, 2, rows_, columns_, tile);
      const size_t start = lines(column_lines_, column_entries_, 3, columns_, rows_,
                                 [&](int64_t column, int64_t row) { return tile(row, column); });
      std::vector<int32_t> taken(size_t(rows_), 0);
      for (int64_t n = 0; n < columns_; ++n) {
        const int32_t* line = &column_lines_[start + size_t(4 * column_lines_[start + size_t(4 * n + 3)])];
        for (int32_t entry = line[0]; entry < line[2]; ++entry) {
          int32_t* at = &column_entries_[size_t(3 * entry)];
          at[2] = taken[size_t(at[0])]++;
        }
      }
    }
    // Addresses even of what is empty.
    for (auto* list : {&row_entries_, &column_entries_}) list->push_back(0);
    tiles_.push_back(0);
  }

  void set(DenseParams& p) {
    const auto view = [&](std::vector<int32_t>& lines, int64_t count) {
      View v;
      v.data = lines.data();
      v.stride[0] = batch_ > 1 ? heads_ * count * 4 : 0;
      v.stride[1] = heads_ > 1 ? count * 4 : 0;
      v.stride[2] = 4;
      v.stride[3] = 1;
      return v;
    };
    p.mask_rows = view(row_lines_, rows_);
    p.mask_columns = view(column_lines_, columns_);
    p.mask_row_blocks = row_entries_.data();
    p.mask_column_blocks = column_entries_.data();
    p.mask_tiles = tiles_.data();
  }

 private:
  int64_t batch_ = 0, heads_ = 0, rows_ = 0, columns_ = 0;
  std::vector<int32_t> row_lines_, row_entries_, column_lines_, column_entries_;
  std::vector<uint64_t> tiles_;
};

// Whether the block mask of a problem, if there is one, keeps a pair.
inline bool mask_keeps(const DenseParams& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (!p.mask_rows.data) return true;
  const int32_t* line = static_cast<const int32_t*>(p.mask_rows.data) + row_offset(p.mask_rows, b, h, i / 64);
  for (int32_t entry = line[0]; entry < line[2]; ++entry) {
    const int32_t block = p.mask_row_blocks[2 * entry], tile = p.mask_row_blocks[2 * entry + 1];
    if (block == j / 64) return tile < 0 || (p.mask_tiles[tile * 64 + i % 64] >> (j % 64) & 1);
  }
  return false;
}

}  // namespace tests
}  // namespace fastattn
