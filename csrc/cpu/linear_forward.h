// Forward of linear attention, chunk by chunk of each head. Causal:
//   a = phi psi^T, decayed, on and below the diagonal
//   den = rowsum(a) + phi decayed . z
//   out = (a v + phi decayed S) / den                                in registers
//   S <- what is left of S + psi^T (v decayed to the chunk's end),   z likewise with 1 for v
// Not causal: S and z of all keys first, then out = phi S and den = phi . z.
//
// A head is one thread's while there are heads for all threads; else the threads take its chunks in turn. A chunk then
// does all that needs no state (features, psi^T v), waits for its turn, takes a copy of S and z, leaves those of the
// next chunk, and computes its outputs. The keys of a bidirectional head are summed by ranges, which are added in turn.
// Either way every number comes of the same operations, so results repeat bit for bit on any number of threads.
#pragma once

#include "linear_vector.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class Real>
class LinearForward {
  typedef Linear<Real> L;
  typedef typename L::A A;
  typedef typename L::Shared Shared;
  typedef Simd<Real> Reals;
  typedef typename Reals::Vec Vec;
  static constexpr int64_t kLanes = Reals::kLanes;
  static constexpr int64_t kRange = 16 * kChunk;  // keys or queries of one work item, not causal

  // What a wave keeps of one head.
  struct Head {
    Real *kv, *z, *c;                // [columns_m][columns_v], [columns_m], [1]
    int32_t *maxima_turn, *kv_turn;  // whose turn it is with c, and with kv and z

    Head(Carver& k, const LinearForward& f)
        : kv(k.take<Real>(f.l_.columns_m * f.l_.columns_v)), z(k.take<Real>(f.l_.columns_m)), c(k.take<Real>(1)),
          maxima_turn(k.take<int32_t>(1)), kv_turn(k.take<int32_t>(1)) {}
  };

  // One thread's chunk.
  struct Own {
    Real* phi;       // [kChunk][columns_m]; first psi as rows
    Real* a;         // [kChunk][kChunk]
    Real* psi;       // [columns_m][kChunk]
    Real* psi_rows;  // [kChunk][columns_m], with decays of each feature
    Real* values;    // [kChunk][columns_v]
    Real* ended;     // the same decayed to the chunk's end
    Real* staging;   // [kChunk][columns_d]
    Real* out;       // [kTileRows][columns_v]
    Real* kv;        // [columns_m][columns_v]: S before the chunk, of a head that threads share
    Real* added;     // [columns_m][columns_v]: what the chunk adds to it
    Real *z, *added_z;  // [columns_m]
    Real* left;      // [columns_m]: what is left of S at the chunk's end
    Head range;      // not causal, what a range of keys adds
    VectorDecay<Real> vector;

    Own(Carver& k, const LinearForward& f)
        : phi(k.take<Real>(kChunk * f.l_.columns_m)), a(k.take<Real>(kChunk * kChunk)),
          psi(k.take<Real>(f.l_.columns_m * kChunk)),
          psi_rows(k.take<Real>(f.p_.vector_decay ? kChunk * f.l_.columns_m : 0)),
          values(k.take<Real>(kChunk * f.l_.columns_v)), ended(k.take<Real>(f.l_.decays ? kChunk * f.l_.columns_v : 0)),
          staging(k.take<Real>(kChunk * f.l_.columns_d)), out(k.take<Real>(kTileRows * f.l_.columns_v)),
          kv(k.take<Real>(f.l_.columns_m * f.l_.columns_v)), added(k.take<Real>(f.l_.columns_m * f.l_.columns_v)),
          z(k.take<Real>(f.l_.columns_m)), added_z(k.take<Real>(f.l_.columns_m)), left(k.take<Real>(f.l_.columns_m)),
          range(k, f), vector(k, f.l_, false) {}
  };

 public:
  explicit LinearForward(const LinearParams& p) : p_(p), l_(p) {}

  int64_t scratch_bytes() const {
    Carver shared;
    Shared(shared, l_, false);
    return int64_t(shared.address()) + layout().bytes();
  }

  void run() const {
    if (l_.units == 0) return;
    Carver carver(p_.scratch);
    const Shared shared(carver, l_, false);
    l_.pack(shared, false);
    void* scratch = reinterpret_cast<void*>(carver.address());
    const Layout layout = this->layout();
    const auto head_of = [&](int64_t unit) {
      Carver k = layout.head(scratch, unit);
      return Head(k, *this);
    };
    for (int64_t first = 0; first < l_.units; first += layout.wave()) {
      const int64_t count = min64(layout.wave(), l_.units - first);
      for (int64_t unit = 0; unit < count; ++unit) begin(head_of(unit), first + unit);
      const auto on_items = [&](int64_t per_unit, auto work) {
        for_each(l_.threads(), count * per_unit, [&](int64_t item, int rank) {
          Carver k = layout.own(scratch, rank);
          // Neighbours in time work on different heads, so they rarely wait for each other.
          work(Own(k, *this), head_of(item % count), first + item % count, item / count);
        });
      };
      const int64_t chunks = div_up(p_.seqlen_k, kChunk);
      if (!p_.causal) {
        const int64_t key_ranges = div_up(p_.seqlen_k, kRange), query_ranges = div_up(p_.seqlen_q, kRange);
        on_items(key_ranges + query_ranges, [&](const Own& own, const Head& head, int64_t unit, int64_t range) {
          if (range < key_ranges) return add_range(own, head, shared, unit, range);
          wait_until(head.kv_turn, int32_t(key_ranges));
          read_queries(own, head, shared, unit, range - key_ranges);
        });
      } else if (count >= l_.threads()) {
        on_items(1, [&](const Own& own, const Head& head, int64_t unit, int64_t) {
          for (int64_t chunk = 0; chunk < chunks; ++chunk) causal_chunk(own, head, shared, unit, chunk, true);
        });
      } else {
        on_items(chunks, [&](const Own& own, const Head& head, int64_t unit, int64_t chunk) {
          causal_chunk(own, head, shared, unit, chunk, false);
        });
      }
      for (int64_t unit = 0; unit < count; ++unit) end(head_of(unit), first + unit);
    }
  }

 private:
  Layout layout() const { return Layout::of<Head, Own>(*this, l_.units, l_.threads(), false); }

  // S, z and c before the first step.
  void begin(const Head& head, int64_t unit) const {
    const int64_t b = l_.batch_of(unit), h = l_.head_of(unit);
    clear(head);
    l_.load_state(head.kv, head.z, p_.initial_kv, p_.initial_normalizer, b, h);
    if (p_.initial_log_scale.data) *head.c = at<Real>(p_.initial_log_scale, b, h);
  }

  void clear(const Head& head) const {
    fill(head.kv, l_.columns_m * l_.columns_v, Real(0));
    fill(head.z, l_.columns_m, Real(0));
    *head.c = -infinity<Real>();
    *head.maxima_turn = *head.kv_turn = 0;
  }

  void end(const Head& head, int64_t unit) const {
    const int64_t b = l_.batch_of(unit), h = l_.head_of(unit);
    l_.store_state(p_.final_kv, p_.final_normalizer, head.kv, head.z, b, h);
    if (p_.final_log_scale.data) at<Real>(p_.final_log_scale, b, h) = *head.c;
  }

  // Of a chunk: psi and v, rows of columns_m and columns_v, and the decays.
  struct Keys {
    const Real *psi, *values;
    Sums<Real> sums;
  };

  // Those of the `ordinal`-th of the chunks that take turns; also psi turned.
  void load_keys(Keys& keys, const Own& t, const Head& head, const Shared& shared, int64_t b, int64_t h,
                 const Steps& steps, int64_t ordinal) const {
    Real highest[kChunk], risen[kChunk];
    Real* rows = p_.vector_decay ? t.psi_rows : t.phi;
    keys.psi = l_.key_features(t.psi, rows, t.staging, shared, b, h, steps, highest);
    if (!l_.softmax) {
      turn(t.psi, kChunk, keys.psi, l_.columns_m, kChunk, l_.columns_m);
    } else {
      wait_until(head.maxima_turn, int32_t(ordinal));
      l_.follow_maximum(highest, risen, *head.c);
      add_one(head.maxima_turn);
      l_.exponentials(t.psi, highest);
    }
    if (l_.decays) l_.sum_decays(b, h, steps, risen, keys.sums);
    keys.values = l_.rows(t.values, l_.columns_v, p_.value, b, h / l_.group, steps, p_.head_dim_v);
    fill(t.left, l_.columns_m, l_.decays ? keys.sums.left(kChunk - 1) : Real(1));
  }

  // S and z take the keys: at once, or when it is their turn, and then leave a copy of what they were before.
  void add_keys(const Keys& keys, const Own& t, const Head& head, bool alone, int64_t ordinal, int64_t count) const {
    const int64_t m = p_.features, columns = l_.columns_v, size = m * columns;
    const Real* values = keys.values;
    Real to_end[kChunk];
    for (int64_t j = 0; j < kChunk; j += kLanes)
      Reals::store(to_end + j, l_.decays ? keys.sums.between(kChunk - 1, j) : Reals::broadcast(1));
    if (l_.decays) values = scaled_rows(t.ended, values, to_end, kChunk, columns);
    if (p_.normalize)
      for (int64_t i = 0; i < l_.columns_m; ++i) t.added_z[i] = dot(t.psi + i * kChunk, to_end, kChunk);
    if (!alone) {
      product<A, false, false>(m, columns, count, t.psi, kChunk, values, columns, t.added, columns);
      wait_until(head.kv_turn, int32_t(ordinal));
      __builtin_memcpy(t.kv, head.kv, size_t(size) * sizeof(Real));
      __builtin_memcpy(t.z, head.z, size_t(l_.columns_m) * sizeof(Real));
    }
    if (l_.decays || p_.vector_decay) scaled_rows(head.kv, head.kv, t.left, m, columns);
    if (alone)
      product<A, false, true>(m, columns, count, t.psi, kChunk, values, columns, head.kv, columns);
    else
      add_rows(head.kv, t.added, size);
    if (p_.normalize) add_decayed(head.z, head.z, t.left, t.added_z, 1, l_.columns_m);
    add_one(head.kv_turn);
  }

  void causal_chunk(const Own& t, const Head& head, const Shared& shared, int64_t unit, int64_t chunk,
                    bool alone) const {
    const int64_t b = l_.batch_of(unit), h = l_.head_of(unit), first = chunk * kChunk;
    const Steps steps = l_.key_steps(b, first);
    if (steps.count == 0) return;
    Keys keys;
    load_keys(keys, t, head, shared, b, h, steps, chunk);
    const Real* phi = l_.query_features(t.phi, t.staging, shared, b, h, l_.query_steps(b, first));
    if (p_.vector_decay) phi = weigh_by_feature(t, keys.psi, phi, b, h, steps);
    if (!alone) add_keys(keys, t, head, false, chunk, steps.count);
    Real left[kChunk], factor[kChunk];
    weigh(keys, t, phi, alone ? head.z : t.z, b, h, steps, left, factor);
    for (int64_t r = 0; r < steps.count; r += kTileRows) {
      const int64_t count = min64(kTileRows, steps.count - r);
      emit(t, phi + r * l_.columns_m, alone ? head.kv : t.kv, left + r, t.a + r * kChunk, keys.values, r + count,
           factor + r, b, h, first + r, count);
    }
    if (alone) add_keys(keys, t, head, true, chunk, steps.count);
  }

  // Decays of each feature: all rows of a, and psi to the chunk's end. Returns phi since its start.
  const Real* weigh_by_feature(const Own& t, const Real* psi, const Real* phi, int64_t b, int64_t h,
                               const Steps& steps) const {
    t.vector.load(b, h, steps);
    for (int64_t block = 0; block < VectorDecay<Real>::kBlocks; ++block) {
      const int64_t count = VectorDecay<Real>::block_count(block, steps.count);
      t.vector.weights(block, count, phi, psi, t.psi, t.a, t.phi);
      t.vector.carry(block, psi, t.psi);
    }
    __builtin_memcpy(t.left, t.vector.carried, size_t(l_.columns_m) * sizeof(Real));
    return t.phi;
  }

  // The rows of a, and what its outputs are made with.
  void weigh(const Keys& keys, const Own& t, const Real* phi, const Real* z, int64_t b, int64_t h, const Steps& steps,
             Real* left, Real* factor) const {
    const int64_t m = l_.columns_m;
    for (int64_t r = 0; r < steps.count; r += kTileRows) {
      const int64_t last = min64(r + kTileRows, steps.count);
      if (!p_.vector_decay)
        product<A, false, false>(last - r, round_up(last, kLanes), p_.features, phi + r * m, m, t.psi, kChunk,
                                 t.a + r * kChunk, kChunk);
      for (int64_t i = r; i < last; ++i) {
        const Vec within = weigh(t.a + i * kChunk, keys.sums, i, last);
        left[i] = l_.decays ? keys.sums.left(i) : Real(1);
        factor[i] = output_factor(phi + i * m, z, left[i], within, b, h, steps.first + i);
        const char* row = element(p_.out, p_.dtype, b, h, steps.first + i);  // soon written: 5 % measured
        for (int64_t k = 0; k < p_.head_dim_v * element_size(p_.dtype); k += 64) __builtin_prefetch(row + k, 1, 3);
      }
    }
  }

  // Rows of the output: factor (left phi S + a v).
  void emit(const Own& t, const Real* phi, const Real* kv, const Real* left, const Real* a, const Real* values,
            int64_t steps, const Real* factor, int64_t b, int64_t h, int64_t first, int64_t count) const {
    const int64_t features = p_.features, m = l_.columns_m, columns = l_.columns_v;
    const bool direct = columns == p_.head_dim_v && element_size(p_.dtype) == int64_t(sizeof(Real));
    Real* out = direct ? &at<Real>(p_.out, b, h, first) : t.out;
    const int64_t ld = direct ? p_.out.stride[2] : columns;
    for_row_tiles(count, [=](int64_t, auto rows) {
      for_column_tiles<Real>(columns, [=](int64_t n, auto vectors) {
        constexpr int M = rows.value, NV = vectors.value;
        Accumulators<A, M, NV> acc = {};
        multiply_add<A, M, NV, false>(acc, features, phi, m, kv + n, columns);
        scale<M, NV>(acc, left);
        multiply_add<A, M, NV, false>(acc, steps, a, kChunk, values + n, columns);
        scale<M, NV>(acc, factor);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
          for (int k = 0; k < NV; ++k) Reals::store(out + i * ld + n + k * kLanes, acc[i][k]);
      });
    });
    const Real ones[kTileRows] = {1, 1, 1, 1, 1, 1};
    if (!direct) l_.store_rows(p_.out, b, h, first, count, t.out, columns, ones, p_.head_dim_v);
  }

  template <int M, int NV>
  [[gnu::always_inline]] static void scale(Accumulators<A, M, NV>& acc, const Real* factor) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int k = 0; k < NV; ++k) acc[i][k] *= factor[i];
  }

  // What an output is to be multiplied by; writes the denominator, of which `within` is the chunk's own part, in lanes.
  Real output_factor(const Real* phi, const Real* z, Real left, Vec within, int64_t b, int64_t h, int64_t i) const {
    if (!p_.normalize) return Real(p_.scale);
    const Real denominator = horizontal_sum<Real>(within + dot_lanes(phi, z, l_.columns_m) * left);
    at<Real>(p_.denominator, b, h, i) = denominator;
    return L::inverse(denominator);
  }

  // Row i of phi psi^T to weights: decayed, 0 above the diagonal, up to step `last`. Returns their sum in lanes.
  Vec weigh(Real* a, const Sums<Real>& sums, int64_t i, int64_t last) const {
    Vec sum = {};
    int64_t j = 0;
    for (; j + kLanes <= i; j += kLanes) {
      Vec x = Reals::load(a + j);
      if (l_.decays) Reals::store(a + j, x *= sums.between(i, j));
      sum += x;
    }
    for (; j < last; j += kLanes) {
      Vec x = Reals::load(a + j);
      if (l_.decays) x *= sums.between(i, j);
      x = up_to<Real>(x, i - j);
      Reals::store(a + j, x);
      sum += x;
    }
    return sum;
  }

  // Not causal: the keys of a range, summed and then added to the head's.
  void add_range(const Own& t, const Head& head, const Shared& shared, int64_t unit, int64_t range) const {
    const int64_t b = l_.batch_of(unit), h = l_.head_of(unit), last = min64((range + 1) * kRange, l_.keys(b));
    clear(t.range);
    for (int64_t first = range * kRange; first < last; first += kChunk) {
      const int32_t ordinal = *t.range.kv_turn;
      const Steps steps = l_.key_steps(b, first);
      Keys keys;
      load_keys(keys, t, t.range, shared, b, h, steps, ordinal);
      add_keys(keys, t, t.range, true, ordinal, steps.count);
    }
    wait_until(head.kv_turn, int32_t(range));
    const Real before = *head.c, c = *t.range.c;
    if (!(c <= before)) *head.c = c;
    const Real left = L::relative(before, *head.c), factor = L::relative(c, *head.c);
    add_scaled(head.kv, left, t.range.kv, factor, p_.features * l_.columns_v);
    add_scaled(head.z, left, t.range.z, factor, l_.columns_m);
    add_one(head.kv_turn);
  }

  void read_queries(const Own& t, const Head& head, const Shared& shared, int64_t unit,
                    int64_t range) const {
    const int64_t b = l_.batch_of(unit), h = l_.head_of(unit), last = min64((range + 1) * kRange, l_.queries(b));
    for (int64_t first = range * kRange; first < last; first += kChunk) {
      const Steps steps = l_.query_steps(b, first);
      const Real* phi = l_.query_features(t.phi, t.staging, shared, b, h, steps);
      for (int64_t r = 0; r < steps.count; r += kTileRows, phi += kTileRows * l_.columns_m) {
        const int64_t count = min64(kTileRows, steps.count - r);
        Real ones[kTileRows], factor[kTileRows];
        fill(ones, kTileRows, Real(1));
        for (int64_t i = 0; i < count; ++i)
          factor[i] = output_factor(phi + i * l_.columns_m, head.z, 1, Vec{}, b, h, first + r + i);
        emit(t, phi, head.kv, ones, nullptr, nullptr, 0, factor, b, h, first + r, count);
      }
    }
  }

  const LinearParams& p_;
  const L l_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
