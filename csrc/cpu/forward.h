// Forward of dense attention: out = softmax(scores) v, one pass over the keys with a running softmax. For plain scores:
//
// K is packed once per kv head into transposed panels of 64 keys and V into a row panel, for all query heads of its
// group. A tile of query rows then walks the blocks of keys that its rows see:
//   s = q k^T                                  6 x 64 register tiles
//   m' = max(m, rowmax(s)),  p = 2^(c (s - m'))        c = |scale| log2(e), the sign is in q
//   l' = l 2^(c (m - m')) + rowsum(p),  o' = o 2^(c (m - m')) + p v
// six rows at a time, so that s and p of one group stay in the first-level cache. At the end out = o / l and
// lse = (c m + log2 l) ln 2; a sink is one more term of l. Dropout takes its keys out of p after l has counted them. Panels that a group of six rows does not see are skipped; a row's own limits are written
// over its scores as -inf. A row that saw nothing has l = 0: its output is 0, its lse -inf.
// Blocks of keys start at multiples of their size for every row, so a row's result does not depend on its tile.
#pragma once

#include "gemm.h"
#include "pack.h"
#include "scores.h"
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
  static constexpr int kPanelVectors = kPanelKeys / kLanes;

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
        panels_(div_up(p.seqlen_k, kPanelKeys)), group_(group_size(p)), threads_(useful_threads(p)),
        tile_(tile_size(p, threads_)), tiles_(div_up(p.seqlen_q, tile_)), negative_(p.scale < 0),
        scores_(p), dropout_(p) {}

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
        const int64_t member = (item - packs) / tiles_ % group_;
        // The last rows see most under a causal limit: longest first.
        const int64_t i = (tiles_ - 1 - (item - packs) % tiles_) * tile_;
        const Head head = head_of(unit);
        wait_until(head.packed, int32_t(panels_));
        attend(tile, index / p_.heads_kv, index % p_.heads_kv * group_ + member, {i, min64(i + tile_, p_.seqlen_q)},
               head.keys, head.values);
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
    if (intersect(live, block).empty()) return;
    pack_transposed<A>(head.keys + panel * kPanelKeys * steps_qk_, Rows(p_.key, p_.dtype, b, h, p_.head_dim), block.begin,
                       live, tile.query);
    pack_rows<A>(head.values + panel * (kPanelKeys / A::kPack) * columns_v_, columns_v_,
                 Rows(p_.value, p_.dtype, b, h, p_.head_dim_v), block.begin, kPanelKeys, live);
  }

  void attend(const Tile& t, int64_t b, int64_t h, Range rows, const Elem* keys, const Elem* values) const {
    const Interval interval(p_, b);
    const int64_t count = rows.end - rows.begin, padded = round_up(count, kTileRows);
    stage_rows<A>(t.query, steps_qk_, Rows(p_.query, p_.dtype, b, h, p_.head_dim), rows.begin, padded, rows, negative_);
    for (int64_t i = 0; i < padded * columns_v_; ++i) t.out[i] = 0;
    for (int64_t i = 0; i < padded; ++i) t.row_max[i] = -infinity<Real>();
    for (int64_t i = 0; i < padded * kLanes; ++i) t.row_sum[i] = 0;
    const Range seen = interval.keys(rows);
    for (int64_t j = seen.begin / kBlock * kBlock; j < seen.end; j += kBlock)
      for (int64_t r = 0; r < count; r += kTileRows) {
        const Range group{rows.begin + r, min64(rows.begin + r + kTileRows, rows.end)};
        const Range visible = intersect(interval.keys(group), {j, j + kBlock});
        if (!visible.empty()) attend_block(t, interval, b, h, group, r, visible, keys, values);
      }
    finish(t, b, h, rows);
  }

  // Six rows against the panels that hold `visible`, at most kBlock keys.
  void attend_block(const Tile& t, const Interval& interval, int64_t b, int64_t h, Range group, int64_t r,
                    Range visible, const Elem* keys, const Elem* values) const {
    const int64_t first = visible.begin / kPanelKeys * kPanelKeys;
    const int64_t width = round_up(visible.end, kPanelKeys) - first;
    for (int64_t j = 0; j < width; j += kPanelKeys)
      row_product<A, kTileRows, false, false>(kPanelKeys, steps_qk_, t.query + r * steps_qk_, steps_qk_,
                                              keys + (first + j) * steps_qk_, kPanelKeys, t.scores + j, kBlock);
    for (int64_t i = group.begin; i < group.end; ++i) {
      Real* scores = t.scores + (i - group.begin) * kBlock;
      scores_.shape(scores, t.bias, nullptr, b, h, i, interval.position(i), first, width);
      hide_outside(scores, first, width, interval.keys(i));
    }
    if (dropout_.active())
      soften<true>(t, b, h, group.begin, r, first, width);
    else
      soften<false>(t, b, h, group.begin, r, first, width);
    row_product<A, kTileRows, false, true>(columns_v_, width / A::kPack, t.probs, kBlock / A::kPack,
                                           values + first / A::kPack * columns_v_, columns_v_, t.out + r * columns_v_,
                                           columns_v_);
  }

  // Scores of six rows to probabilities relative to their new running maxima; rescales what the rows have so far.
  template <bool kDropout>
  void soften(const Tile& t, int64_t b, int64_t h, int64_t i, int64_t r, int64_t first, int64_t width) const {
    const Real factor = scores_.factor();
    constexpr int chains = kPanelVectors < 4 ? kPanelVectors : 4;  // independent maxima and sums hide the latency
    Real block_max[kTileRows];
    for (int m = 0; m < kTileRows; ++m) {
      const Real* scores = t.scores + m * kBlock;
      RealVec best[chains];
#pragma GCC unroll 4
      for (int c = 0; c < chains; ++c) best[c] = Reals::load(scores + c * kLanes);
      for (int64_t j = chains * kLanes; j < width; j += chains * kLanes)
#pragma GCC unroll 4
        for (int c = 0; c < chains; ++c) best[c] = vmax(best[c], Reals::load(scores + j + c * kLanes));
#pragma GCC unroll 4
      for (int c = 1; c < chains; ++c) best[0] = vmax(best[0], best[c]);
      block_max[m] = horizontal_max<Real>(best[0]);
    }
    for (int m = 0; m < kTileRows; ++m) {
      const Real* scores = t.scores + m * kBlock;
      Elem* probs = t.probs + m * (kBlock / A::kPack);
      Real& row_max = t.row_max[r + m];
      const Real new_max = block_max[m] > row_max ? block_max[m] : row_max;
      // Subtracted before the factor is applied: the largest score has p = 1 exactly.
      const Real shift = new_max == -infinity<Real>() ? Real(0) : new_max;  // nothing seen yet: 2^(-inf - 0) = 0
      RealVec sum[chains] = {};
      if constexpr (kDropout) dropout_.draw(t.words, b, h, i + m, first, width);
      for (int64_t j = 0; j < width; j += chains * kLanes) {
        RealVec p[chains];
#pragma GCC unroll 4
        for (int c = 0; c < chains; ++c) {
          p[c] = vexp2((Reals::load(scores + j + c * kLanes) - shift) * factor);
          sum[c] += p[c];
          if constexpr (kDropout) p[c] = dropout_.template keep<Real>(p[c], t.words + j + c * kLanes);
        }
        store_probabilities(probs + j / A::kPack, p);
      }
#pragma GCC unroll 4
      for (int c = 1; c < chains; ++c) sum[0] += sum[c];
      Real* row_sum = t.row_sum + (r + m) * kLanes;
      if (new_max != row_max) {
        const RealVec correction = vexp2(Reals::broadcast((row_max - shift) * factor));
        Real* out = t.out + (r + m) * columns_v_;
        for (int64_t c = 0; c < columns_v_; c += kLanes) Reals::store(out + c, Reals::load(out + c) * correction);
        sum[0] += Reals::load(row_sum) * correction;
        row_max = new_max;
      } else {
        sum[0] += Reals::load(row_sum);
      }
      Reals::store(row_sum, sum[0]);
    }
  }

  template <int kCount>
  static void store_probabilities(Elem* to, const RealVec (&p)[kCount]) {
#pragma GCC unroll 4
    for (int c = 0; c < kCount; c += A::kPack) {
      if constexpr (A::kPack == 1)
        Reals::store(to + c * kLanes, p[c]);
      else
        Simd<Elem>::store(to + c / 2 * kLanes, A::narrow(p[c], p[c + 1]));
    }
  }

  void finish(const Tile& t, int64_t b, int64_t h, Range rows) const {
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t r = i - rows.begin;
      const Real sum = horizontal_sum<Real>(Reals::load(t.row_sum + r * kLanes));
      const double highest = double(t.row_max[r]) * scores_.factor();
      double total = double(sum), shrink = 1, peak = highest;
      if (p_.sinks.data) {
        const double sink = double(at<Real>(p_.sinks, 0, h)) * kLog2E;
        peak = sink > highest ? sink : highest;
        shrink = peak > -infinity<double>() ? __builtin_exp2(highest - peak) : 0;
        total = total * shrink + (peak > -infinity<double>() ? __builtin_exp2(sink - peak) : 0);
      }
      const bool empty = peak == -infinity<double>() && total == 0;
      write_row(mutable_element(p_.out, p_.dtype, b, h, i), p_.dtype, t.out + r * columns_v_,
                empty ? Real(0) : Real(shrink * dropout_.scale() / total), p_.head_dim_v);
      if (p_.lse.data)
        at<Real>(p_.lse, b, h, i) = empty ? -infinity<Real>() : Real((peak + __builtin_log2(total)) * kLn2);
    }
  }

  const DenseParams& p_;
  const int64_t steps_qk_, columns_v_, panels_, group_;
  const int threads_;
  const int64_t tile_, tiles_;
  const bool negative_;
  const Scores<Real> scores_;
  const Dropout dropout_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
