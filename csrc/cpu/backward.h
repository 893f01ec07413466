// Backward of dense attention. With the scores s2 in units of log2, per row of P and dS:
//   p = 2^(s2 - lse log2(e)),   ds = p (kept do v^T - delta),   delta = rowsum(do * out) - grad_lse
//   dv = (kept p)^T do,   dz = ds (1 - tanh^2),   dk = scale dz^T q,   dq = scale dz k,   dbias = ds
// where kept is dropout's factor on each probability, 0 or 1 / (1 - dropout_p), and 1 - tanh^2 the softcap's derivative.
// The scores are computed again from the saved lse, so nothing of size Sq x Sk is stored.
//
// For each wave of kv heads, and one query head of each group after the other: pack Q and dO of the wave's heads, then
// let the threads take blocks of keys. A block packs its K and V, keeps its dk and dv, and walks the tiles of rows that
// see it. Accumulators are float32 (float64) whatever the dtype.
//
// dq of a tile is a sum over blocks of keys that different threads work on. Each tile has a counter of the block whose
// turn it is: blocks add to it in ascending order. That makes the sum the same on any number of threads, and no thread
// waits long, since blocks are handed out in the same order. Sums over heads (broadcast bias, query heads of one group)
// have their fixed order from the waves.
//
// With a block mask, tiles are its blocks of rows and blocks its panels of keys. A panel walks its list of tiles, and the
// list says whose turn it is there: the order in which panels are handed out, so no thread waits for one not yet begun.
#pragma once

#include "blocks.h"
#include "gemm.h"
#include "pack.h"
#include "scores.h"
#include "work.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class A>
class Backward {
  typedef typename A::Real Real;
  typedef typename A::Elem Elem;
  typedef Simd<Real> Reals;
  typedef typename A::RealVec RealVec;
  static constexpr int kLanes = Reals::kLanes;
  static constexpr int kTile = 96;   // most query rows, and most places of them, a multiple of 6 and of 2
  static constexpr int kBlock = 128;  // most keys of one work item

  // What a wave keeps of one query head, its rows in their places (`place`). With one number per element, staged rows
  // serve as row panels too.
  struct Head {
    Elem *query, *grad_out;            // staged [rows_][ld]
    Elem *query_rows, *grad_out_rows;  // row panels [rows_ / kPack][columns]
    Real *grad_query;                  // [rows_][columns_]
    Real *lse2, *lse2_rest;            // [rows_], together lse log2(e): its rounding would be an error of all p of a row
    Real* delta;                       // [rows_]
    Real *grad_key, *grad_value;       // [keys_][columns], between the query heads of a group
    int32_t* turn;                     // [tiles_], the block of keys that may add to the tile's dq, or its turn
    int32_t *tiles_packed, *blocks_done;

    Head(Carver& c, const Backward& f) {
      query = c.take<Elem>(f.rows_ * f.query_ld_);
      grad_out = c.take<Elem>(f.rows_ * f.value_ld_);
      query_rows = A::kPack == 1 ? query : c.take<Elem>(f.rows_ / A::kPack * f.columns_);
      grad_out_rows = A::kPack == 1 ? grad_out : c.take<Elem>(f.rows_ / A::kPack * f.columns_v_);
      grad_query = c.take<Real>(f.rows_ * f.columns_);
      lse2 = c.take<Real>(f.rows_);
      lse2_rest = c.take<Real>(f.rows_);
      delta = c.take<Real>(f.rows_);
      const int64_t kept_keys = f.group_ > 1 ? f.blocks_ * f.block_ : 0;
      grad_key = c.take<Real>(kept_keys * f.columns_);
      grad_value = c.take<Real>(kept_keys * f.columns_v_);
      turn = c.take<int32_t>(f.tiles_);
      tiles_packed = c.take<int32_t>(1);
      blocks_done = c.take<int32_t>(1);
    }
  };

  // One thread's block of keys and tile of rows.
  struct Block {
    Elem *key_turned, *value_turned;  // transposed panels
    Elem* key_rows;                   // row panel
    Real *grad_key, *grad_value;      // [kBlock][columns]
    Real *scores, *grad_probs;        // [kTile][64]
    Elem *probs, *grad_scores_turned; // row panels' left operands: [kTile / kPack][64], read along the columns
    Elem* grad_scores;                // [kTile][64 / kPack]
    Elem* staging;                    // 64 keys, or one row as Real
    Real* bias;                       // [64]
    Real *derivative, *kept;          // [kTile][64], with a softcap and with dropout
    uint32_t* words;                  // [64], dropout's

    Block(Carver& c, const Backward& f) {
      key_turned = c.take<Elem>(kBlock * f.steps_qk_);
      value_turned = c.take<Elem>(kBlock * f.steps_v_);
      key_rows = c.take<Elem>(kBlock / A::kPack * f.columns_);
      grad_key = c.take<Real>(kBlock * f.columns_);
      grad_value = c.take<Real>(kBlock * f.columns_v_);
      scores = c.take<Real>(kTile * kPanelKeys);
      grad_probs = c.take<Real>(kTile * kPanelKeys);
      const bool one = A::kPack == 1, same = one && !f.keeps_ds_apart();
      probs = one ? reinterpret_cast<Elem*>(scores) : c.take<Elem>(kTile * kPanelKeys / A::kPack);
      grad_scores = same ? reinterpret_cast<Elem*>(grad_probs) : c.take<Elem>(kTile * kPanelKeys / A::kPack);
      grad_scores_turned = one ? grad_scores : c.take<Elem>(kTile * kPanelKeys / A::kPack);
      staging = c.take<Elem>(kPanelKeys * round_up(max64(f.steps_qk_, f.steps_v_), kLanes));
      bias = c.take<Real>(kPanelKeys);
      derivative = c.take<Real>(f.scores_.capped() ? kTile * kPanelKeys : 0);
      kept = c.take<Real>(f.dropout_.active() ? kTile * kPanelKeys : 0);
      words = c.take<uint32_t>(kPanelKeys);
    }
  };

 public:
  explicit Backward(const DenseParams& p)
      : p_(p), steps_qk_(div_up(p.head_dim, A::kPack)), steps_v_(div_up(p.head_dim_v, A::kPack)),
        columns_(round_up(p.head_dim, kLanes)), columns_v_(round_up(p.head_dim_v, kLanes)),
        query_ld_(A::kPack == 1 ? columns_ : steps_qk_), value_ld_(A::kPack == 1 ? columns_v_ : steps_v_), mask_(p),
        tile_(mask_.active() ? kMaskRows : kTile), places_(round_up(tile_, kTileRows)),
        block_(mask_.active() ? kPanelKeys : kBlock), tiles_(div_up(p.seqlen_q, tile_)),
        rows_(p.seqlen_q ? round_up(place(p.seqlen_q - 1) + 1, kTileRows) : 0), blocks_(div_up(p.seqlen_k, block_)),
        group_(group_size(p)), threads_(useful_threads(p)), negative_(p.scale < 0),
        row_bias_(p.grad_mask.data && p.grad_mask.stride[3] == 0), scale_(Real(p.scale)),
        magnitude_(Real(negative_ ? -p.scale : p.scale)), scores_(p), dropout_(p) {}

  int64_t scratch_bytes() const { return layout().bytes(); }

  void run() const {
    const int64_t heads = p_.batch * p_.heads_kv;
    if (heads == 0 || group_ == 0) return;
    const Layout layout = this->layout();
    const int64_t wave = layout.wave();
    const auto head_of = [&](int64_t unit) {
      Carver carver = layout.head(p_.scratch, unit);
      return Head(carver, *this);
    };
    const auto block_of = [&](int rank) {
      Carver carver = layout.own(p_.scratch, rank);
      return Block(carver, *this);
    };

    for (int64_t first = 0; first < heads; first += wave) {
      const int64_t count = min64(wave, heads - first);
      const auto batch_of = [&](int64_t unit) { return (first + unit) / p_.heads_kv; };
      const auto kv_head_of = [&](int64_t unit) { return (first + unit) % p_.heads_kv; };
      for (int64_t member = 0; member < group_; ++member) {
        const auto query_head_of = [&](int64_t unit) { return kv_head_of(unit) * group_ + member; };
        for (int64_t unit = 0; unit < count; ++unit) *head_of(unit).tiles_packed = *head_of(unit).blocks_done = 0;
        const int64_t packs = count * tiles_, blocks = count * blocks_;
        for_each(threads_, packs + blocks + packs, [&](int64_t item, int rank) {
          if (item < packs) {
            const int64_t unit = item / tiles_;
            const Head head = head_of(unit);
            pack_tile(head, block_of(rank), batch_of(unit), query_head_of(unit), item % tiles_);
            add_one(head.tiles_packed);
          } else if (item < packs + blocks) {
            // Neighbours in time work on different heads, so they rarely wait for each other.
            const int64_t unit = (item - packs) % count;
            const Head head = head_of(unit);
            wait_until(head.tiles_packed, int32_t(tiles_));
            const int64_t nth = (item - packs) / count;
            key_block(head, block_of(rank), batch_of(unit), kv_head_of(unit), member,
                      mask_.active() ? mask_.nth_panel(batch_of(unit), query_head_of(unit), nth) : nth);
            add_one(head.blocks_done);
          } else {
            const int64_t unit = (item - packs - blocks) / tiles_;
            const Head head = head_of(unit);
            wait_until(head.blocks_done, int32_t(blocks_));
            write_query(head, batch_of(unit), query_head_of(unit), (item - packs - blocks) % tiles_);
          }
        });
        for (int64_t unit = 0; unit < count; ++unit) add_row_gradients(batch_of(unit), query_head_of(unit), head_of(unit));
      }
    }
  }

 private:
  Layout layout() const {
    // Heads that share a slice of the bias gradient go one after the other.
    const bool shared_bias = p_.grad_mask.data && ((p_.batch > 1 && p_.grad_mask.stride[0] == 0) ||
                                                   (p_.heads_q > 1 && p_.grad_mask.stride[1] == 0));
    return Layout::of<Head, Block>(*this, p_.batch * p_.heads_kv, threads_, shared_bias);
  }

  Range tile_rows(const Interval& interval, int64_t tile) const {
    return intersect(interval.rows(), {tile * tile_, (tile + 1) * tile_});
  }

  // Where row i is kept: tiles start at whole groups of six.
  int64_t place(int64_t i) const { return i / tile_ * places_ + i % tile_; }

  // Rows that see no key, or whose lse says that a bias hid all of them, take no part in anything.
  bool is_live(const Interval& interval, int64_t b, int64_t h, int64_t i) const {
    return !interval.keys(i).empty() && at<Real>(p_.lse, b, h, i) != -infinity<Real>();
  }

  void pack_tile(const Head& head, const Block& t, int64_t b, int64_t h, int64_t tile) const {
    const Interval interval(p_, b);
    const Range rows = tile_rows(interval, tile);
    const Rows query(p_.query, p_.dtype, b, h, p_.head_dim);
    const Rows grad_out(p_.grad_out, p_.dtype, b, h, p_.head_dim_v);
    row_deltas(head, t, b, h, rows);
    int64_t i = rows.begin, to = place(i);
    for (; i < rows.end; i += kTileRows, to += kTileRows) {
      bool live[kTileRows];
      for (int m = 0; m < kTileRows; ++m) {
        const int64_t r = i + m;
        live[m] = r < rows.end && is_live(interval, b, h, r);
        const double lse2 = live[m] ? double(at<Real>(p_.lse, b, h, r)) * kLog2E : infinity<double>();
        head.lse2[to + m] = Real(lse2);
        head.lse2_rest[to + m] = live[m] ? Real(lse2 - double(head.lse2[to + m])) : Real(0);
        if (r >= rows.end || at<Real>(p_.lse, b, h, r) == -infinity<Real>()) head.delta[to + m] = 0;
      }
      for (int m = 0; m < kTileRows; m += 2) {
        const Range pair{i + m + !live[m], i + m + 1 + live[m + 1]};
        stage_rows<A>(head.query + (to + m) * query_ld_, query_ld_, query, i + m, 2, pair, negative_);
        stage_rows<A>(head.grad_out + (to + m) * value_ld_, value_ld_, grad_out, i + m, 2, pair);
        if constexpr (A::kPack > 1) {
          pack_rows<A>(head.query_rows + (to + m) / A::kPack * columns_, columns_, query, i + m, 2, pair, negative_);
          pack_rows<A>(head.grad_out_rows + (to + m) / A::kPack * columns_v_, columns_v_, grad_out, i + m, 2, pair);
        }
      }
    }
    __builtin_memset(head.grad_query + tile * places_ * columns_, 0, size_t((i - rows.begin) * columns_) * sizeof(Real));
    head.turn[tile] = mask_.active() ? 0 : int32_t(interval.keys(rows).begin / block_);
  }

  // A vector holds the sums of as many rows, so that each is summed in the order of the tile product: then
  // p (do v^T - delta) is exactly 0 where a row sees a single key.
  void row_deltas(const Head& head, const Block& t, int64_t b, int64_t h, Range rows) const {
    static_assert(kLanes * kMaxHeadDim <= kTile * kPanelKeys, "the rows fit where the scores will be");
    Real *outs = t.scores, *grads = t.grad_probs;
    for (int64_t first = rows.begin; first < rows.end; first += kLanes) {
      const int64_t count = min64(kLanes, rows.end - first);
      stage_rows<Plain<Real>>(outs, columns_v_, Rows(p_.out, p_.dtype, b, h, p_.head_dim_v), first, kLanes, rows);
      stage_rows<Plain<Real>>(grads, columns_v_, Rows(p_.grad_out, p_.dtype, b, h, p_.head_dim_v), first, kLanes, rows);
      RealVec sum = RealVec{};
      for (int64_t c = 0; c < columns_v_; c += kLanes) {
        RealVec out[kLanes], grad[kLanes];
#pragma GCC unroll 16
        for (int m = 0; m < kLanes; ++m) {
          out[m] = Reals::load(outs + m * columns_v_ + c);
          grad[m] = Reals::load(grads + m * columns_v_ + c);
        }
        transpose_square<Real>(out);
        transpose_square<Real>(grad);
#pragma GCC unroll 16
        for (int m = 0; m < kLanes; ++m) sum = sum + grad[m] * out[m];
      }
      for (int64_t m = 0; m < count; ++m)
        head.delta[place(first) + m] = sum[m] - (p_.grad_lse.data ? at<Real>(p_.grad_lse, b, h, first + m) : Real(0));
    }
  }

  void key_block(const Head& head, const Block& t, int64_t b, int64_t h, int64_t member, int64_t block) const {
    const Interval interval(p_, b);
    const Range keys{block * block_, min64((block + 1) * block_, rows_of(p_.key, b, p_.seqlen_k))};
    const Range rows = interval.rows(keys);
    const int64_t query_head = h * group_ + member;

    const auto tile_against_block = [&](int64_t tile, int32_t turn, int32_t bits) {
      bool our_turn = false;
      for (int64_t n = 0; n < block_; n += kPanelKeys) {
        const Range panel{keys.begin + n, min64(keys.begin + n + kPanelKeys, keys.end)};
        const Range seeing = intersect(interval.rows(panel), tile_rows(interval, tile));
        if (panel.empty() || seeing.empty()) continue;
        const int64_t first = tile * tile_;
        const Range groups{(seeing.begin - first) / kTileRows * kTileRows, round_up(seeing.end - first, kTileRows)};
        panel_scores(head, t, interval, b, query_head, tile, groups, panel, n, bits);
        panel_grad_keys(head, t, tile, groups, n);
        if (!our_turn) wait_until(&head.turn[tile], turn);
        our_turn = true;
        panel_grad_query(head, t, tile, groups, n);
        if (p_.grad_mask.data && !row_bias_)
          add_grad_bias(t, interval, b, query_head, seeing, first + groups.begin, panel);
      }
      if (!our_turn) wait_until(&head.turn[tile], turn);
      __atomic_store_n(&head.turn[tile], turn + 1, __ATOMIC_RELEASE);
    };

    start_sum(t.grad_key, head.grad_key + (member ? keys.begin * columns_ : 0), columns_, member);
    start_sum(t.grad_value, head.grad_value + (member ? keys.begin * columns_v_ : 0), columns_v_, member);
    if (!rows.empty()) pack_keys(t, b, h, query_head, keys.begin, interval.all_keys());
    if (mask_.active()) {
      const BlockLine line = mask_.panel_line(b, query_head, block);
      for (int64_t n = 0; n < line.count; ++n) tile_against_block(line.block(n), line.turn(n), line.tile(n));
    } else if (!rows.empty()) {
      for (int64_t tile = rows.begin / tile_; tile * tile_ < rows.end; ++tile)
        tile_against_block(tile, int32_t(block), kFullBlock);
    }
    if (member + 1 < group_) {
      keep_sum(head.grad_key + keys.begin * columns_, t.grad_key, columns_);
      keep_sum(head.grad_value + keys.begin * columns_v_, t.grad_value, columns_v_);
      return;
    }
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      write_row(mutable_element(p_.grad_key, p_.dtype, b, h, j), p_.dtype, t.grad_key + (j - keys.begin) * columns_,
                magnitude_, p_.head_dim);  // the sign of scale is in the packed queries
      write_row(mutable_element(p_.grad_value, p_.dtype, b, h, j), p_.dtype,
                t.grad_value + (j - keys.begin) * columns_v_, Real(1), p_.head_dim_v);
    }
  }

  void pack_keys(const Block& t, int64_t b, int64_t h, int64_t query_head, int64_t first, Range live) const {
    const Rows key(p_.key, p_.dtype, b, h, p_.head_dim), value(p_.value, p_.dtype, b, h, p_.head_dim_v);
    pack_rows<A>(t.key_rows, columns_, key, first, block_, live);
    for (int64_t n = 0; n < block_; n += kPanelKeys) {
      pack_transposed<A>(t.key_turned + n * steps_qk_, key, first + n, live, t.staging);
      pack_transposed<A>(t.value_turned + n * steps_v_, value, first + n, live, t.staging);
    }
    if (!mask_.active()) return;
    const uint64_t seen = mask_.live_keys(b, query_head, first / kPanelKeys);
    clear_rows<A>(t.key_rows, columns_, seen);
    clear_transposed<A>(t.key_turned, steps_qk_, seen);
    clear_transposed<A>(t.value_turned, steps_v_, seen);
  }

  void start_sum(Real* sum, const Real* kept, int64_t columns, bool resume) const {
    for (int64_t i = 0; i < block_ * columns; ++i) sum[i] = resume ? kept[i] : Real(0);
  }
  void keep_sum(Real* kept, const Real* sum, int64_t columns) const {
    for (int64_t i = 0; i < block_ * columns; ++i) kept[i] = sum[i];
  }

  // p and ds of a tile's rows in `groups`, whole groups of six counted from the tile's first, against the 64 keys of one
  // panel.
  void panel_scores(const Head& head, const Block& t, const Interval& interval, int64_t b, int64_t h, int64_t tile,
                    Range groups, Range panel, int64_t n, int32_t bits) const {
    const int64_t base = tile * places_;
    row_groups(groups, head.query + base * query_ld_, query_ld_, steps_qk_, t.key_turned + n * steps_qk_, t.scores);
    row_groups(groups, head.grad_out + base * value_ld_, value_ld_, steps_v_, t.value_turned + n * steps_v_,
               t.grad_probs);
    const int64_t last = tile_rows(interval, tile).end - 1;
    const Range all{tile * tile_ + groups.begin, min64(tile * tile_ + groups.end, last + 1)};
    const bool whole = contains(interval.common_keys(all), {panel.begin, panel.begin + kPanelKeys});
    for (int64_t i = groups.begin; i < groups.end; ++i) {
      const int64_t at = (i - groups.begin) * kPanelKeys;
      const int64_t row = min64(tile * tile_ + i, last);  // past the last one anything finite will do: there p is 0
      scores_.shape(t.scores + at, t.bias, scores_.capped() ? t.derivative + at : nullptr, b, h, row,
                    interval.position(row), panel.begin, kPanelKeys);
      if (!whole) hide_outside(t.scores + at, panel.begin, kPanelKeys, interval.keys(row));
      if (bits != kFullBlock) hide_unset(t.scores + at, mask_.bits(bits, row - tile * tile_));
      if (dropout_.active()) {
        dropout_.draw(t.words, b, h, row, panel.begin, kPanelKeys);
        const RealVec factor = Reals::broadcast(Real(dropout_.scale()));
        for (int64_t j = 0; j < kPanelKeys; j += kLanes)
          Reals::store(t.kept + at + j, dropout_.template keep<Real>(factor, t.words + j));
      }
    }
    for (int64_t i = groups.begin; i < groups.end; i += 2)
      row_pair_gradients(head, t, base + i, (i - groups.begin) * kPanelKeys);
  }

  // One product after the other: a panel of 64 keys stays in L1 while the groups of rows pass.
  static void row_groups(Range groups, const Elem* rows, int64_t ld, int64_t steps, const Elem* panel, Real* to) {
    for (int64_t i = groups.begin; i < groups.end; i += kTileRows)
      row_product<A, kTileRows, false, false>(kPanelKeys, steps, rows + i * ld, ld, panel, kPanelKeys,
                                              to + (i - groups.begin) * kPanelKeys, kPanelKeys);
  }

  // ds for the bias and dz for the products are one place where they are the same, and one number is an element.
  bool keeps_ds_apart() const { return scores_.capped() && p_.grad_mask.data; }

  void row_pair_gradients(const Head& head, const Block& t, int64_t i, int64_t at) const {
    const bool keep_ds = A::kPack > 1 ? p_.grad_mask.data != nullptr : keeps_ds_apart();
    const Real factor = scores_.factor();
    for (int64_t j = at; j < at + kPanelKeys; j += kLanes * A::kPack) {
      RealVec p[2][A::kPack], dz[2][A::kPack];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < A::kPack; ++c) {
          const int64_t where = j + r * kPanelKeys + c * kLanes;
          p[r][c] = vexp2(Reals::load(t.scores + where) * factor - head.lse2[i + r] - head.lse2_rest[i + r]);
          RealVec grad_prob = Reals::load(t.grad_probs + where);
          if (dropout_.active()) grad_prob *= Reals::load(t.kept + where);
          const RealVec ds = p[r][c] * (grad_prob - head.delta[i + r]);
          if (keep_ds) Reals::store(t.grad_probs + where, ds);
          dz[r][c] = scores_.capped() ? ds * Reals::load(t.derivative + where) : ds;
          if (dropout_.active()) p[r][c] *= Reals::load(t.kept + where);
          if constexpr (A::kPack == 1) {
            Reals::store(t.probs + where, p[r][c]);
            Reals::store(t.grad_scores + where, dz[r][c]);
          }
        }
      if constexpr (A::kPack > 1) {
        typedef Simd<Elem> Elems;
        const int64_t pair = at / 2 + (j - at), row = j / 2;
#pragma GCC unroll 2
        for (int c = 0; c < A::kPack; ++c) {
          Elems::store(t.probs + pair + c * kLanes, A::interleave(p[0][c], p[1][c]));
          Elems::store(t.grad_scores_turned + pair + c * kLanes, A::interleave(dz[0][c], dz[1][c]));
        }
        Elems::store(t.grad_scores + row, A::narrow(dz[0][0], dz[0][1]));
        Elems::store(t.grad_scores + row + kPanelKeys / 2, A::narrow(dz[1][0], dz[1][1]));
      }
    }
  }

  // dv += p^T do and dk += ds^T q for the panel's 64 keys: ten groups of six and one of four.
  void panel_grad_keys(const Head& head, const Block& t, int64_t tile, Range groups, int64_t n) const {
    const int64_t steps = (groups.end - groups.begin) / A::kPack, base = tile * places_ + groups.begin;
    const Elem* grad_out = head.grad_out_rows + base / A::kPack * columns_v_;
    const Elem* query = head.query_rows + base / A::kPack * columns_;
    accumulate_keys(t.grad_value + n * columns_v_, columns_v_, steps, t.probs, grad_out);
    accumulate_keys(t.grad_key + n * columns_, columns_, steps, t.grad_scores_turned, query);
  }

  static void accumulate_keys(Real* sum, int64_t columns, int64_t steps, const Elem* weights, const Elem* rows) {
    constexpr int rest = kPanelKeys % kTileRows;
    int64_t j = 0;
    for (; j + kTileRows <= kPanelKeys; j += kTileRows)
      row_product<A, kTileRows, true, true>(columns, steps, weights + j, kPanelKeys, rows, columns, sum + j * columns,
                                            columns);
    row_product<A, rest, true, true>(columns, steps, weights + j, kPanelKeys, rows, columns, sum + j * columns,
                                     columns);
  }

  void panel_grad_query(const Head& head, const Block& t, int64_t tile, Range groups, int64_t n) const {
    constexpr int steps = kPanelKeys / A::kPack;
    const Elem* keys = t.key_rows + n / A::kPack * columns_;
    for (int64_t i = groups.begin; i < groups.end; i += kTileRows)
      row_product<A, kTileRows, false, true>(columns_, steps, t.grad_scores + (i - groups.begin) * steps, steps, keys,
                                             columns_, head.grad_query + (tile * places_ + i) * columns_, columns_);
  }

  void add_grad_bias(const Block& t, const Interval& interval, int64_t b, int64_t h, Range seeing, int64_t first_row,
                     Range panel) const {
    for (int64_t i = seeing.begin; i < seeing.end; ++i) {
      const Real* ds = t.grad_probs + (i - first_row) * kPanelKeys;
      const Range keys = intersect(interval.keys(i), panel);
      Real* to = &at<Real>(p_.grad_mask, b, h, i);
      for (int64_t j = keys.begin; j < keys.end; ++j) to[j * p_.grad_mask.stride[3]] += ds[j - panel.begin];
    }
  }

  // What a row's softmax as a whole has: the sink, which takes the share 2^(sink - lse) and no value, so that its
  // gradient is -share delta; and a bias that is the same for all keys, which moves the lse, but for the sink's share.
  void add_row_gradients(int64_t b, int64_t h, const Head& head) const {
    if (!row_bias_ && !p_.grad_sinks.data) return;
    const Interval interval(p_, b);
    Real sum = 0;
    for (int64_t i = 0; i < interval.rows().end; ++i) {
      const Real lse = at<Real>(p_.lse, b, h, i);
      if (lse == -infinity<Real>()) continue;
      Real share = 0;
      if (p_.sinks.data) share = Real(__builtin_exp2((double(at<Real>(p_.sinks, 0, h)) - double(lse)) * kLog2E));
      sum += share * head.delta[place(i)];
      if (row_bias_ && is_live(interval, b, h, i))
        at<Real>(p_.grad_mask, b, h, i) +=
            (p_.grad_lse.data ? at<Real>(p_.grad_lse, b, h, i) : Real(0)) + share * head.delta[place(i)];
    }
    if (p_.grad_sinks.data) at<Real>(p_.grad_sinks, 0, h) -= sum;
  }

  void write_query(const Head& head, int64_t b, int64_t h, int64_t tile) const {
    const Range rows = tile_rows(Interval(p_, b), tile);
    for (int64_t i = rows.begin; i < rows.end; ++i)
      write_row(mutable_element(p_.grad_query, p_.dtype, b, h, i), p_.dtype, head.grad_query + place(i) * columns_,
                scale_, p_.head_dim);
  }

  const DenseParams& p_;
  const int64_t steps_qk_, steps_v_, columns_, columns_v_, query_ld_, value_ld_;
  const Blocks mask_;
  const int64_t tile_, places_, block_, tiles_, rows_, blocks_, group_;
  const int threads_;
  const bool negative_, row_bias_;
  const Real scale_, magnitude_;
  const Scores<Real> scores_;
  const Dropout dropout_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
