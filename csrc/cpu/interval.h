// Causality, windows and key limits are one interval of keys per row: row i sees the keys lo(i) <= j < hi(i).
//
// Without the limits the interval is [i + offset - left, i + offset + right + 1): it moves by one key per row. So for
// any block of keys the rows that see some of it are an interval too, and so is the union over any block of rows.
#pragma once

#include "../dense_params.h"
#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

inline bool contains(Range outer, Range inner) { return outer.begin <= inner.begin && inner.end <= outer.end; }

inline Range intersect(Range a, Range b) { return {max64(a.begin, b.begin), min64(a.end, b.end)}; }

class Interval {
 public:
  Interval(const DenseParams& p, int64_t b) : rows_{0, rows_of(p.query, b, p.seqlen_q)}, keys_{0, rows_of(p.key, b, p.seqlen_k)} {
    const int64_t ends = p.align_ends ? keys_.end - rows_.end : 0;
    if (p.key_start) keys_.begin = max64(keys_.begin, p.key_start[b]);
    if (p.key_lengths) keys_.end = min64(keys_.end, p.key_lengths[b]);
    const int64_t offset = clamp(p.query_offset) + ends + (p.query_start ? p.query_start[b] : 0);
    offset_ = offset;
    lo_ = offset - clamp(p.window_left);
    hi_ = offset + clamp(p.window_right) + 1;
    if (lo_ >= hi_) keys_.end = keys_.begin;
  }

  // The rows that there are.
  Range rows() const { return rows_; }

  // The key position that row i stands at.
  int64_t position(int64_t i) const { return i + offset_; }

  // The keys that row i sees; {0, 0} if none.
  Range keys(int64_t i) const { return keys(Range{i, i + 1}); }

  // The keys that some row in [rows.begin, rows.end) sees.
  Range keys(Range rows) const {
    const Range r = intersect(keys_, {rows.begin + lo_, rows.end - 1 + hi_});
    return r.empty() || rows.empty() ? Range{0, 0} : r;
  }

  // The keys that every row in [rows.begin, rows.end) sees.
  Range common_keys(Range rows) const { return intersect(keys(rows.begin), keys(rows.end - 1)); }

  // The keys that any row sees.
  Range all_keys() const { return keys(rows_); }

  // The rows that see some key in [block.begin, block.end).
  Range rows(Range block) const {
    const Range visible = intersect(block, keys_);
    if (visible.empty()) return {0, 0};
    const Range r = intersect(rows_, {visible.begin - hi_ + 1, visible.end - lo_});
    return r.empty() ? Range{0, 0} : r;
  }

 private:
  // Far beyond any length, and small enough that sums of a few cannot overflow.
  static int64_t clamp(int64_t x) {
    constexpr int64_t far = int64_t(1) << 48;
    return min64(max64(x, -far), far);
  }

  Range rows_, keys_;
  int64_t offset_, lo_, hi_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
