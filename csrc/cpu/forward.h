// Forward of dense attention: out = softmax(scores) v, one pass over the keys with a running softmax.
//
// K is packed once per kv head into transposed panels of 64 keys and V into a row panel, for all query heads of its
// group. A tile of query rows then walks the blocks of keys that its rows see:
//   s = q k^T                                  6 x 64 register tiles
//   m' = max(m, rowmax(s)),  p = 2^(c (s - m'))        c = |scale| log2(e), the sign is in q
//   l' = l 2^(c (m - m')) + rowsum(p),  o' = o 2^(c (m - m')) + p v
// six rows at a time, so that s and p of one group stay in the first-level cache. With more to a score than its scale,
// s is brought to units of log2 first and c is 1 (scores.h). At the end out = o / l and lse = (c m + log2 l) ln 2; a sink
// is one more term of l. Dropout takes its keys out of p after l has counted them. Panels that a group of six rows does
// not see are skipped; a row's own limits are written over its scores as -inf. A row that saw nothing has l = 0: its
// output is 0, its lse -inf.
// Blocks of keys start at multiples of their size for every row, so a row's result does not depend on its tile.
// With a block mask a tile is one of its blocks of rows, and takes the panels of its list, eight at a time, in their order.
#pragma once

#include "blocks.h"
#include "gemm.h"
#include "pack.h"
#include "softmax.h"
#include "work.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class A>
class Forward {
  typedef typename A::Real Real;
  typedef typename A::Elem Elem;
  typedef Simd<Real> Reals;
  typedef typename A::RealVec RealVec;
  static constexpr int kLanes = Reals::kLanes;
  static constexpr int kTile = 192;   // most query rows that share one pass over the keys, while these are in L2
  static constexpr int kBlock = 512;  // keys between two updates of the running softmax: six rows of scores fit L1
  static constexpr int kBlockPanels = kBlock / kPanelKeys;

  // What a wave keeps of one kv head.
  struct Head {
    Elem *keys, *values;  // transposed panels, and as many row panels
    int32_t* packed;      // how many of the panels are ready

    Head(Carver& carver, const Forward& f)
        : keys(carver.take<Elem>(f.panels_ * kPanelKeys * f.steps_qk_)),
          values(carver.take<Elem>(f.panels_ * (kPanelKeys / A::kPack) * f.columns_v_)),
          packed(carver.take<int32_t>(1)) {}
  };

  // One thread's tile of query rows.
  struct Tile {
    Elem* query;  // [kTile][steps_qk_]
    Real* out;    // [kTile][columns_v_]
    Real* scores; // [kTileRows][kBlock]
    Elem* probs;  // the same place when an element is one number
    Real* bias;   // [kBlock]
    uint32_t* words;  // [kBlock], dropout's
    Real* row_max;  // [kTile]
    Real* row_sum;  // [kTile][kLanes], to be summed at the end

    Tile(Carver& carver, const Forward& f)
        : query(carver.take<Elem>(kTile * round_up(f.steps_qk_, kLanes))), out(carver.take<Real>(kTile * f.columns_v_)),
          scores(carver.take<Real>(kTileRows * kBlock)),
          probs(A::kPack == 1 ? reinterpret_cast<Elem*>(scores) : carver.take<Elem>(kTileRows * kBlock / A::kPack)),
          bias(carver.take<Real>(kBlock)), words(carver.take<uint32_t>(kBlock)), row_max(carver.take<Real>(kTile)),
          row_sum(carver.take<Real>(kTile * kLanes)) {}
  };

 public:
  explicit Forward(const DenseParams& p)
      : p_(p), steps_qk_(div_up(p.head_dim, A::kPack)), columns_v_(round_up(p.head_dim_v, kLanes)),
        panels_(div_up(p.seqlen_k, kPanelKeys)), group_(group_size(p)), threads_(useful_threads(p)), blocks_(p),
        tile_(blocks_.active() ? kMaskRows : tile_size(p, threads_)), tiles_(div_up(p.seqlen_q, tile_)),
        negative_(p.scale < 0), scores_(p), dropout_(p) {}

  int64_t scratch_bytes() const { return layout().bytes(); }

  void run() const {
    const int64_t heads = p_.batch * p_.heads_kv;
    if (heads == 0 || tiles_ == 0 || group_ == 0) return;
    const Layout layout = this->layout();
    const int64_t wave = layout.wave();
    const auto head_of = [&](int64_t unit) {
      Carver carver = layout.head(p_.scratch, unit);
      return Head(carver, *this);
    };

    for (int64_t first = 0; first < heads; first += wave) {
      const int64_t count = min64(wave, heads - first);
      for (int64_t unit = 0; unit < count; ++unit) *head_of(unit).packed = 0;
      const int64_t packs = count * panels_;
      for_each(threads_, packs + count * group_ * tiles_, [&](int64_t item, int rank) {
        Carver own = layout.own(p_.scratch, rank);
        const Tile tile(own, *this);
        if (item < packs) {
          const int64_t unit = item / panels_;
          const Head head = head_of(unit);
          pack_panel(tile, first + unit, item % panels_, head);
          add_one(head.packed);
          return;
        }
        const int64_t unit = (item - packs) / (group_ * tiles_), index = first + unit;
        const int64_t b = index / p_.heads_kv, nth = (item - packs) % tiles_;
        const int64_t h = index % p_.heads_kv * group_ + (item - packs) / tiles_ % group_;
        const Head head = head_of(unit);
        wait_until(head.packed, int32_t(panels_));
        // Longest first: the last rows see most under a causal limit.
        const int64_t i = (blocks_.active() ? blocks_.nth_row(b, h, nth) : tiles_ - 1 - nth) * tile_;
        const Range rows = intersect(Interval(p_, b).rows(), {i, i + tile_});
        if (!rows.empty()) attend(tile, b, h, rows, head.keys, head.values);
      });
    }
  }

 private:
  Layout layout() const { return Layout::of<Head, Tile>(*this, p_.batch * p_.heads_kv, threads_, false); }

  // Small problems get smaller tiles, so that every thread has several.
  static int64_t tile_size(const DenseParams& p, int threads) {
    int64_t tile = kTile;
    while (tile > kTile / 4 && p.batch * p.heads_q * div_up(p.seqlen_q, tile) < 4 * threads) tile /= 2;
    return tile;
  }

  void pack_panel(const Tile& tile, int64_t index, int64_t panel, const Head& head) const {
    const int64_t b = index / p_.heads_kv, h = index % p_.heads_kv;
    const Range live = Interval(p_, b).all_keys();
    const Range block{panel * kPanelKeys, (panel + 1) * kPanelKeys};
    uint64_t seen = blocks_.active() ? 0 : ~uint64_t(0);
    for (int64_t member = 0; member < group_ && ~seen; ++member) seen |= blocks_.live_keys(b, h * group_ + member, panel);
    if (intersect(live, block).empty() || !seen) return;
    Elem* keys = head.keys + panel * kPanelKeys * steps_qk_;
    Elem* values = head.values + panel * (kPanelKeys / A::kPack) * columns_v_;
    pack_transposed<A>(keys, key_rows(p_, p_.key, b, h, p_.head_dim), block.begin, live, tile.query);
    pack_rows<A>(values, columns_v_, key_rows(p_, p_.value, b, h, p_.head_dim_v), block.begin, kPanelKeys, live);
    clear_transposed<A>(keys, steps_qk_, seen);
    clear_rows<A>(values, columns_v_, seen);
  }

  void attend(const Tile& t, int64_t b, int64_t h, Range rows, const Elem* keys, const Elem* values) const {
    const Interval interval(p_, b);
    const int64_t count = rows.end - rows.begin, padded = round_up(count, kTileRows);
    stage_rows<A>(t.query, steps_qk_, Rows(p_.query, p_.dtype, b, h, p_.head_dim), rows.begin, padded, rows, negative_);
    for (int64_t i = 0; i < padded * columns_v_; ++i) t.out[i] = 0;
    for (int64_t i = 0; i < padded; ++i) t.row_max[i] = -infinity<Real>();
    for (int64_t i = 0; i < padded * kLanes; ++i) t.row_sum[i] = 0;
    const Range seen = interval.keys(rows);
    const BlockLine line = blocks_.active() ? blocks_.row_line(b, h, rows.begin / kMaskRows) : BlockLine{};
    const int64_t begin = blocks_.active() ? 0 : seen.begin / kBlock * kBlock;
    const int64_t end = blocks_.active() ? line.count * kPanelKeys : seen.end;
    for (int64_t j = begin; j < end; j += kBlock)
      for (int64_t r = 0; r < count; r += kTileRows) {
        const Range group{rows.begin + r, min64(rows.begin + r + kTileRows, rows.end)};
        Runs runs;
        if (blocks_.active())
          runs.add_listed(line, j / kPanelKeys, interval.keys(group));
        else
          runs.add(intersect(interval.keys(group), {j, j + kBlock}));
        if (runs.width) attend_runs(t, interval, b, h, group, r, runs, keys, values);
      }
    finish(t, b, h, rows);
  }

  // Up to kBlock keys, side by side in a row of scores: runs of panels, whose tiles say which pairs a block mask keeps.
  struct Runs {
    struct Run {
      int64_t first, width, at;  // keys [first, first + width) have the scores from `at` on
    };
    Run run[kBlockPanels];
    int count = 0;
    int64_t width = 0;
    int32_t tile[kBlockPanels];  // of each panel, with a block mask
    bool partial = false;

    void add(Range visible) {
      if (visible.empty()) return;
      const int64_t first = visible.begin / kPanelKeys * kPanelKeys;
      const int64_t more = round_up(visible.end, kPanelKeys) - first;
      if (count && run[count - 1].first + run[count - 1].width == first)
        run[count - 1].width += more;
      else
        run[count++] = {first, more, width};
      width += more;
    }
    void add_listed(const BlockLine& line, int64_t from, Range keys) {
      for (int64_t n = from; n < min64(from + kBlockPanels, line.count); ++n) {
        const int64_t first = line.block(n) * kPanelKeys, before = width;
        add(intersect(keys, {first, first + kPanelKeys}));
        if (width == before) continue;
        tile[before / kPanelKeys] = line.tile(n);
        partial = partial || line.tile(n) != kFullBlock;
      }
    }
  };

  // Six rows against some panels.
  void attend_runs(const Tile& t, const Interval& interval, int64_t b, int64_t h, Range group, int64_t r,
                   const Runs& runs, const Elem* keys, const Elem* values) const {
    const Range common = interval.common_keys(group);
    for (const auto* run = runs.run; run < runs.run + runs.count; ++run) {
      for (int64_t j = 0; j < run->width; j += kPanelKeys)
        row_product<A, kTileRows, false, false>(kPanelKeys, steps_qk_, t.query + r * steps_qk_, steps_qk_,
                                                keys + (run->first + j) * steps_qk_, kPanelKeys, t.scores + run->at + j,
                                                kBlock);
      if (scores_.plain() && contains(common, {run->first, run->first + run->width})) continue;
      for (int64_t i = group.begin; i < group.end; ++i) {
        Real* scores = t.scores + (i - group.begin) * kBlock + run->at;
        scores_.shape(scores, t.bias, nullptr, b, h, i, interval.position(i), run->first, run->width);
        hide_outside(scores, run->first, run->width, interval.keys(i));
      }
    }
    if (runs.partial)
      for (int64_t i = group.begin; i < group.end; ++i)
        for (int64_t j = 0; j < runs.width; j += kPanelKeys)
          if (const int32_t tile = runs.tile[j / kPanelKeys]; tile != kFullBlock)
            hide_unset(t.scores + (i - group.begin) * kBlock + j, blocks_.bits(tile, i % kMaskRows));
    if (dropout_.active())
      soften<true>(t, b, h, group.begin, r, runs);
    else
      soften<false>(t, b, h, group.begin, r, runs);
    for (const auto* run = runs.run; run < runs.run + runs.count; ++run)
      row_product<A, kTileRows, false, true>(columns_v_, run->width / A::kPack, t.probs + run->at / A::kPack,
                                             kBlock / A::kPack, values + run->first / A::kPack * columns_v_, columns_v_,
                                             t.out + r * columns_v_, columns_v_);
  }

  // Scores of six rows to probabilities.
  template <bool kDropout>
  void soften(const Tile& t, int64_t b, int64_t h, int64_t i, int64_t r, const Runs& runs) const {
    const int64_t width = runs.width;
    Real block_max[kTileRows];
    for (int m = 0; m < kTileRows; ++m) block_max[m] = row_maximum(t.scores + m * kBlock, width);
    for (int m = 0; m < kTileRows; ++m) {
      if constexpr (kDropout)
        for (const auto* run = runs.run; run < runs.run + runs.count; ++run)
          dropout_.draw(t.words + run->at, b, h, i + m, run->first, run->width);
      add_weights<A, kDropout>(t.scores + m * kBlock, t.probs + m * (kBlock / A::kPack), width, block_max[m],
                               scores_.factor(), t.row_max[r + m], t.row_sum + (r + m) * kLanes,
                               t.out + (r + m) * columns_v_, columns_v_, dropout_, t.words);
    }
  }

  void finish(const Tile& t, int64_t b, int64_t h, Range rows) const {
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t r = i - rows.begin;
      finish_row(p_, scores_, dropout_, b, h, i, t.row_max[r],
                 double(horizontal_sum<Real>(Reals::load(t.row_sum + r * kLanes))), t.out + r * columns_v_);
    }
  }

  const DenseParams& p_;
  const int64_t steps_qk_, columns_v_, panels_, group_;
  const int threads_;
  const Blocks blocks_;
  const int64_t tile_, tiles_;
  const bool negative_;
  const Scores<Real> scores_;
  const Dropout dropout_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
