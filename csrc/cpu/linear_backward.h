// Backward of linear attention. The normaliser is one more column of v that is 1: V = [v | 1], and the gradient of its
// output is delta. With dO = [grad_out / den | delta] (scale grad_out without normalize), W the decays between steps,
// and of each chunk the state S before it and the gradient dS of that after it:
//   a = phi psi^T W,   g = dO V^T W                    on and below the diagonal
//   dphi = (dO since start) S^T + g psi,               dpsi = (V to end) dS^T + g^T phi
//   dV = (psi to end) dS + a^T dO,                     dS <- what is left of dS + phi^T (dO since start)
//   delta = -(what a and S contribute to out . grad_out) / den        not from out, which may be rounded to 16 bits
// A step's decay scales what came before it for all that comes after it. Its gradient is the sum over all such pairs,
// of steps (a g), of S and steps, of steps and dS, and of S and dS; what a step has with itself never enters.
// S and dS are held as S^T, [Dv or Dv + 1][columns_m], so that z is their last row.
//
// A first sweep over the chunks keeps S before every group of chunks; groups then go backwards, S before each chunk of
// one computed again. A head's chunks are one sequence of steps that take turns, as in the forward: what reads S comes
// before a step's turn, what reads dS after it from a copy.
#pragma once

#include "linear_vector.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class Real>
class LinearBackward {
  typedef Linear<Real> L;
  typedef typename L::A A;
  typedef Simd<Real> Reals;
  typedef typename Reals::Vec Vec;
  typedef typename L::Shared Shared;
  static constexpr int64_t kLanes = Reals::kLanes;
  static constexpr int64_t kRange = 16 * kChunk;   // keys or queries of one work item, not causal
  static constexpr int64_t kMostStates = 4 << 20;  // bytes of a head's states up to which all chunks are one group

  // What a wave keeps of one head.
  struct Head {
    Real* checkpoints;  // [groups_][state_]: S^T before each group
    Real* slots;        // [most_ - 1][state_]: before the other chunks of one group
    Real* running;      // [state_], the first sweep's
    Real* grad;         // [state_]: dS^T
    Real* c;            // [chunks_ + 1], before each chunk
    int32_t *maxima_turn, *turn;

    Head(Carver& k, const LinearBackward& f)
        : checkpoints(k.take<Real>(f.groups_ * f.state_)), slots(k.take<Real>((f.most_ - 1) * f.state_)),
          running(k.take<Real>(f.state_)), grad(k.take<Real>(f.state_)), c(k.take<Real>(f.chunks_ + 1)),
          maxima_turn(k.take<int32_t>(1)), turn(k.take<int32_t>(1)) {}
  };

  // One thread's chunk. Rows of V and dO are [kChunk][columns_], features [kChunk][columns_m].
  struct Own {
    Real *query, *key;             // [kChunk][columns_d], with a projection
    Real *phi_copy, *psi_copy, *grad_phi, *grad_psi;
    const Real *phi, *psi;         // the features' copies, or where they are
    Real* psi_turned;              // [columns_m][kChunk]
    Real *values, *ended;          // V, and decayed to the chunk's end; one without decays
    Real* values_turned;           // [columns_v][kChunk]
    Real *grad_out, *started;      // dO, and decayed since the chunk's start; one without decays
    Real *a, *g;                   // [kChunk][kChunk]
    Real* grad_values;             // [kChunk][columns_v]
    Real* added;                   // [state_]
    Real* grad;                    // [columns_][columns_m]: dS^T
    Real* grad_turned;             // [columns_m][columns_]: dS
    Real* left;                    // [columns_m]: of S before the chunk at its end
    VectorDecay<Real> vector;

    Own(Carver& k, const LinearBackward& f) : vector(k, f.l_, true) {
      const int64_t raw = f.p_.projection ? kChunk * f.l_.columns_d : 0, features = kChunk * f.l_.columns_m;
      query = k.take<Real>(raw);
      key = k.take<Real>(raw);
      phi = phi_copy = k.take<Real>(features);
      psi = psi_copy = k.take<Real>(features);
      grad_phi = k.take<Real>(features);
      grad_psi = k.take<Real>(features);
      psi_turned = k.take<Real>(features);
      values = k.take<Real>(kChunk * f.columns_);
      ended = f.l_.decays ? k.take<Real>(kChunk * f.columns_) : values;
      values_turned = k.take<Real>(kChunk * f.l_.columns_v);
      grad_out = k.take<Real>(kChunk * f.columns_);
      started = f.l_.decays ? k.take<Real>(kChunk * f.columns_) : grad_out;
      a = k.take<Real>(kChunk * kChunk);
      g = k.take<Real>(kChunk * kChunk);
      grad_values = k.take<Real>(kChunk * f.l_.columns_v);
      added = k.take<Real>(f.state_);
      grad = k.take<Real>(f.columns_ * f.l_.columns_m);
      grad_turned = k.take<Real>(f.columns_ * f.l_.columns_m);
      left = k.take<Real>(f.l_.columns_m);
    }
  };

 public:
  explicit LinearBackward(const LinearParams& p)
      : p_(p), l_(p), width_(p.head_dim_v + p.normalize), columns_(round_up(width_, kLanes)),
        state_(width_ * l_.columns_m), chunks_(div_up(p.seqlen_k, kChunk)),
        most_(p.causal ? group_length(chunks_, state_) : 1),
        groups_(p.causal ? max64(1, div_up(chunks_, most_)) : 1),
        scalar_gradient_(p.grad_decay.data && !p.vector_decay) {}

  int64_t scratch_bytes() const {
    Carver shared;
    Shared(shared, l_, true);
    return int64_t(shared.address()) + layout().bytes();
  }

  void run() const {
    if (l_.units == 0) return;
    Carver carver(p_.scratch);
    const Shared shared(carver, l_, true);
    l_.pack(shared, true);
    void* scratch = reinterpret_cast<void*>(carver.address());
    const Layout layout = this->layout();
    const auto head_of = [&](int64_t unit) {
      Carver k = layout.head(scratch, unit);
      return Head(k, *this);
    };
    for (int64_t first = 0; first < l_.units; first += layout.wave()) {
      const int64_t count = min64(layout.wave(), l_.units - first);
      for (int64_t unit = 0; unit < count; ++unit) begin(head_of(unit), first + unit);
      const bool alone = p_.causal && count >= l_.threads();
      const int64_t items = p_.causal ? causal_steps() : ranges_k() + ranges_q() + ranges_k();
      for_each(l_.threads(), count * (alone ? 1 : items), [&](int64_t index, int rank) {
        Carver k = layout.own(scratch, rank);
        Own own(k, *this);
        const Head head = head_of(index % count);
        const int64_t unit = first + index % count, item = index / count;
        if (!p_.causal) return bidirectional_item(own, head, shared, unit, item);
        if (!alone) return causal_step(own, head, shared, unit, item);
        for (int64_t step = 0; step < items; ++step) causal_step(own, head, shared, unit, step);
      });
      for (int64_t unit = 0; unit < count; ++unit) end(head_of(unit), first + unit);
    }
  }

 private:
  Layout layout() const { return Layout::of<Head, Own>(*this, l_.units, l_.threads(), false); }

  // All of them while their states are small together; else as many as there are groups, the least memory.
  static int64_t group_length(int64_t chunks, int64_t state) {
    if (chunks * state * int64_t(sizeof(Real)) <= kMostStates) return max64(chunks, 1);
    int64_t length = 1;
    while (length * length < chunks) ++length;
    return length;
  }

  int64_t ranges_k() const { return div_up(p_.seqlen_k, kRange); }
  int64_t ranges_q() const { return div_up(p_.seqlen_q, kRange); }

  // The first sweep leaves out the last group, and a group's own its last chunk.
  int64_t swept() const { return max64(groups_ - 1, 0) * most_; }
  int64_t causal_steps() const { return chunks_ == 0 ? 0 : swept() + 2 * chunks_ - groups_; }

  // Before the chunk, as far as its group is the present one.
  Real* state_before(const Head& head, int64_t chunk) const {
    return chunk % most_ == 0 ? head.checkpoints + chunk / most_ * state_ : head.slots + (chunk % most_ - 1) * state_;
  }

  void begin(const Head& head, int64_t unit) const {
    const int64_t b = l_.batch_of(unit), h = l_.head_of(unit);
    *head.maxima_turn = *head.turn = 0;
    head.c[0] = p_.initial_log_scale.data ? at<Real>(p_.initial_log_scale, b, h) : -infinity<Real>();
    read_state(head.checkpoints, p_.initial_kv, p_.initial_normalizer, b, h);
    read_state(head.grad, p_.grad_kv, p_.grad_normalizer, b, h);
  }

  // Views may be absent: zeros.
  void read_state(Real* to, const View& kv, const View& z, int64_t b, int64_t h) const {
    fill(to, state_, Real(0));
    for (int64_t m = 0; m < p_.features; ++m) {
      if (kv.data)
        for (int64_t v = 0; v < p_.head_dim_v; ++v) to[v * l_.columns_m + m] = at<Real>(kv, b, h, m, v);
      if (z.data) to[p_.head_dim_v * l_.columns_m + m] = at<Real>(z, b, h, 0, m);
    }
  }

  void end(const Head& head, int64_t unit) const {
    const int64_t b = l_.batch_of(unit), h = l_.head_of(unit);
    const View &kv = p_.grad_initial_kv, &z = p_.grad_initial_normalizer;
    if (l_.softmax && !p_.causal && p_.initial_log_scale.data)
      scale_row(head.grad, state_, L::relative(at<Real>(p_.initial_log_scale, b, h), head.c[0]));
    for (int64_t m = 0; m < p_.features; ++m) {
      if (kv.data)
        for (int64_t v = 0; v < p_.head_dim_v; ++v) at<Real>(kv, b, h, m, v) = head.grad[v * l_.columns_m + m];
      if (z.data) at<Real>(z, b, h, 0, m) = head.grad[p_.head_dim_v * l_.columns_m + m];
    }
  }

  // The sweep, then for each group from the last on its states and its gradients.
  void causal_step(Own& t, const Head& head, const Shared& shared, int64_t unit, int64_t step) const {
    int64_t rest = step - swept();
    if (rest < 0) return sweep(t, head, shared, unit, step, step);
    for (int64_t group = groups_ - 1;; --group) {
      const int64_t first = group * most_, length = min64(most_, chunks_ - first);
      if (rest < length - 1) return sweep(t, head, shared, unit, step, first + rest);
      rest -= length - 1;
      if (rest < length) return gradients(t, head, shared, unit, step, step - rest, first + length - 1 - rest);
      rest -= length;
    }
  }

  // S after the chunk from that before it.
  void sweep(Own& t, const Head& head, const Shared& shared, int64_t unit, int64_t step, int64_t chunk) const {
    const int64_t b = l_.batch_of(unit);
    const Steps steps = l_.key_steps(b, chunk * kChunk);
    Decays d;
    if (steps.count > 0) {
      wait_until(head.maxima_turn, int32_t(l_.softmax ? chunk : 0));
      Real c = head.c[chunk];
      load_keys(t, shared, unit, steps, c, d);
      if (l_.softmax && __atomic_load_n(head.maxima_turn, __ATOMIC_RELAXED) == chunk) {
        head.c[chunk + 1] = c;
        add_one(head.maxima_turn);
      }
      if (p_.vector_decay) {
        t.vector.load(b, l_.head_of(unit), steps);
        t.vector.to_end(t.psi);
        __builtin_memcpy(t.left, t.vector.carried, size_t(l_.columns_m) * sizeof(Real));
      }
      product<A, true, false>(width_, l_.columns_m, steps.count, t.ended, columns_,
                              p_.vector_decay ? t.vector.ended : t.psi, l_.columns_m, t.added, l_.columns_m);
    }
    wait_until(head.turn, int32_t(step));
    if (steps.count > 0) {
      const bool first_sweep = step < swept();
      const Real* before = first_sweep && chunk % most_ != 0 ? head.running : state_before(head, chunk);
      Real* after = first_sweep && (chunk + 1) % most_ != 0 ? head.running : state_before(head, chunk + 1);
      add_decayed(after, before, t.left, t.added, width_, l_.columns_m);
    }
    add_one(head.turn);
  }

  // Of a chunk: between its steps, since its start and to its end.
  struct Decays {
    Sums<Real> sums;
    Real since_start[kChunk], to_end[kChunk];
    Real pairs[kChunk];  // of a step with S and with those before it, less those with the ones after it
  };

  // psi, V and what depends on the decays; c is the running maximum before the chunk and becomes that after it.
  void load_keys(Own& t, const Shared& shared, int64_t unit, const Steps& steps, Real& c, Decays& d) const {
    const int64_t b = l_.batch_of(unit), h = l_.head_of(unit);
    Real highest[kChunk], risen[kChunk];
    t.psi = l_.key_features(t.psi_turned, t.psi_copy, t.key, shared, b, h, steps, highest);
    if (l_.softmax) {
      l_.follow_maximum(highest, risen, c);
      l_.exponentials(t.psi_turned, highest);
      turn(t.psi_copy, l_.columns_m, t.psi_turned, kChunk, l_.columns_m, kChunk);
    }
    l_.load_rows(t.values, columns_, p_.value, b, h / l_.group, steps, p_.head_dim_v);
    if (p_.normalize)
      for (int64_t j = 0; j < kChunk; ++j) t.values[j * columns_ + p_.head_dim_v] = steps.live[j];
    if (l_.decays) l_.sum_decays(b, h, steps, risen, d.sums);
    for (int64_t j = 0; j < kChunk; j += kLanes) {
      Reals::store(d.since_start + j, l_.decays ? d.sums.since_start(j) : Reals::broadcast(1));
      Reals::store(d.to_end + j, l_.decays ? d.sums.between(kChunk - 1, j) : Reals::broadcast(1));
    }
    fill(t.left, l_.columns_m, d.since_start[kChunk - 1]);
    if (l_.decays) scaled_rows(t.ended, t.values, d.to_end, kChunk, columns_);
  }

  // phi, and dO with 1 / den where delta belongs.
  void load_queries(Own& t, const Shared& shared, int64_t unit, const Steps& steps) const {
    const int64_t b = l_.batch_of(unit), h = l_.head_of(unit);
    t.phi = l_.query_features(t.phi_copy, t.query, shared, b, h, steps);
    l_.load_rows(t.grad_out, columns_, p_.grad_out, b, h, steps, p_.head_dim_v);
    for (int64_t i = 0; i < steps.count; ++i) {
      const Real factor = p_.normalize ? L::inverse(at<Real>(p_.denominator, b, h, steps.first + i)) : Real(p_.scale);
      scale_row(t.grad_out + i * columns_, columns_, factor);
      if (p_.normalize) t.grad_out[i * columns_ + p_.head_dim_v] = factor;
    }
  }

  void gradients(Own& t, const Head& head, const Shared& shared, int64_t unit, int64_t step, int64_t ready,
                 int64_t chunk) const {
    const int64_t b = l_.batch_of(unit), m = l_.columns_m;
    const Steps steps = l_.key_steps(b, chunk * kChunk);
    wait_until(head.turn, int32_t(ready));  // for S and c before the chunk
    Decays d;
    if (steps.count > 0) {
      Real c = head.c[chunk];
      load_keys(t, shared, unit, steps, c, d);
      load_queries(t, shared, unit, l_.query_steps(b, chunk * kChunk));
      if (l_.decays) scaled_rows(t.started, t.grad_out, d.since_start, kChunk, columns_);
      if (!l_.softmax) turn(t.psi_turned, kChunk, t.psi, m, kChunk, m);
      turn(t.values_turned, kChunk, t.values, columns_, kChunk, l_.columns_v);
      fill(d.pairs, kChunk, Real(0));
      if (p_.vector_decay)
        weigh_by_feature(t, d, state_before(head, chunk), b, l_.head_of(unit), steps);
      else
        for (int64_t r = 0; r < steps.count; r += kTileRows)
          query_rows(t, d, state_before(head, chunk), r, min64(r + kTileRows, steps.count));
      const Real* phi = p_.vector_decay ? t.vector.started : t.phi;
      product<A, true, false>(width_, m, steps.count, t.started, columns_, phi, m, t.added, m);
    }
    wait_until(head.turn, int32_t(step));
    Real common = 0;  // of S after the chunk and dS
    if (steps.count > 0) {
      if (p_.grad_decay.data) common = meet(t, state_before(head, chunk), head.grad);
      __builtin_memcpy(t.grad, head.grad, size_t(state_) * sizeof(Real));
      add_decayed(head.grad, t.grad, t.left, t.added, width_, m);
    }
    add_one(head.turn);
    if (steps.count > 0) key_gradients(t, shared, unit, steps, d, common);
  }

  // The product of what is left of S and dS, summed; with decays of each feature, for each.
  Real meet(Own& t, const Real* state, const Real* grad) const {
    const int64_t m = l_.columns_m;
    Vec all = {};
    for (int64_t k = 0; k < m; k += kLanes) {
      Vec sum = {};
      for (int64_t i = k; i < state_; i += m) sum += Reals::load(state + i) * Reals::load(grad + i);
      sum *= Reals::load(t.left + k);
      if (p_.vector_decay) Reals::store(t.vector.common + k, sum);
      all += sum;
    }
    return horizontal_sum<Real>(all);
  }

  // With decays of each feature: a, g and grad_phi of all rows, phi since the chunk's start, psi to its end.
  void weigh_by_feature(Own& t, Decays& d, const Real* state, int64_t b, int64_t h, const Steps& steps) const {
    const VectorDecay<Real>& vector = t.vector;
    const int64_t m = l_.columns_m;
    vector.load(b, h, steps);
    for (int64_t block = 0; block < vector.kBlocks; ++block) {
      const int64_t r = block * vector.kBlock, count = vector.block_count(block, steps.count), last = r + count;
      vector.weights(block, count, t.phi, t.psi, t.psi_turned, t.a, vector.started);
      product<A, false, false>(count, r + vector.kBlock, p_.head_dim_v, t.grad_out + r * columns_, columns_,
                               t.values_turned, kChunk, t.g + r * kChunk, kChunk);
      product<A, false, false>(count, m, p_.head_dim_v, t.grad_out + r * columns_, columns_, state, m,
                               t.grad_phi + r * m, m);
      for (int64_t i = r; i < last; ++i) {
        const Real inverse = p_.normalize ? t.grad_out[i * columns_ + p_.head_dim_v] : Real(0);
        const Real with_state = dot(vector.started + i * m, t.grad_phi + i * m, m);
        const Real delta = weigh(t.a + i * kChunk, t.g + i * kChunk, d, i, last, with_state, inverse);
        if (!p_.normalize) continue;
        t.started[i * columns_ + p_.head_dim_v] = delta;
        add_scaled(t.grad_phi + i * m, Real(1), state + p_.head_dim_v * m, delta, m);
      }
      vector.query_gradients(block, count, t.g, t.phi, t.psi, t.grad_phi);
      vector.carry(block, t.psi, t.psi_turned);
    }
    __builtin_memcpy(t.left, vector.carried, size_t(m) * sizeof(Real));
  }

  // a, g and grad_phi of the rows [r, last) of a chunk, at most six.
  void query_rows(Own& t, Decays& d, const Real* state, int64_t r, int64_t last) const {
    const int64_t m = l_.columns_m, count = last - r, wide = round_up(last, kLanes);
    const Real* phi = t.phi + r * m;
    Real *a = t.a + r * kChunk, *g = t.g + r * kChunk, *grad = t.grad_phi + r * m;
    Real* started = t.started + r * columns_;
    product<A, false, false>(count, wide, p_.features, phi, m, t.psi_turned, kChunk, a, kChunk);
    product<A, false, false>(count, wide, p_.head_dim_v, t.grad_out + r * columns_, columns_, t.values_turned, kChunk,
                             g, kChunk);
    product<A, false, false>(count, m, p_.head_dim_v, started, columns_, state, m, grad, m);
    for (int64_t i = 0; i < count; ++i) {
      Real with_state = p_.normalize || scalar_gradient_ ? dot(phi + i * m, grad + i * m, m) : Real(0);
      const Real inverse = p_.normalize ? t.grad_out[(r + i) * columns_ + p_.head_dim_v] : Real(0);
      const Real delta = weigh(a + i * kChunk, g + i * kChunk, d, r + i, last, with_state, inverse);
      if (p_.normalize) {
        const Real* z = state + p_.head_dim_v * m;
        const Real share = delta * d.since_start[r + i];
        started[i * columns_ + p_.head_dim_v] = share;
        add_scaled(grad + i * m, Real(1), z, share, m);
        if (scalar_gradient_) with_state += share * dot(phi + i * m, z, m);
      }
      d.pairs[r + i] += with_state;
    }
    product<A, false, true>(count, m, last, g, kChunk, t.psi, m, grad, m);
  }

  // Row i of phi psi^T and of dO V^T without delta: decayed, 0 above the diagonal up to step `last`. Returns delta, and
  // adds what the row's pairs of different steps have in common to d.pairs of the later, and takes it from the earlier.
  Real weigh(Real* a, Real* g, Decays& d, int64_t i, int64_t last, Real with_state, Real inverse) const {
    const int64_t whole = (i + 1) / kLanes * kLanes;  // below the diagonal or on it
    Vec weights[kChunk / kLanes], sum = {};
    const auto weigh_vector = [&](int64_t j, int64_t seen) {
      Vec x = Reals::load(a + j), y = Reals::load(g + j);
      if (l_.decays) x *= weights[j / kLanes] = d.sums.between(i, j);
      if (seen < kLanes - 1) {
        x = up_to<Real>(x, seen);
        y = up_to<Real>(y, seen);
      }
      sum += x * y;
      Reals::store(a + j, x);
    };
    for (int64_t j = 0; j < whole; j += kLanes) weigh_vector(j, kLanes - 1);
    for (int64_t j = whole; j < last; j += kLanes) weigh_vector(j, i - j);
    const Real delta = -(horizontal_sum<Real>(sum) + with_state) * inverse;
    Vec pairs = {};
    const auto share_vector = [&](int64_t j, int64_t seen) {
      Vec x = Reals::load(g + j) + delta;
      if (seen < kLanes - 1) x = up_to<Real>(x, seen);
      Reals::store(g + j, l_.decays ? x * weights[j / kLanes] : x);
      if (!scalar_gradient_) return;
      const Vec pair = up_to<Real>(x * Reals::load(a + j), i - j - 1);
      Reals::store(d.pairs + j, Reals::load(d.pairs + j) - pair);
      pairs += pair;
    };
    for (int64_t j = 0; j < whole; j += kLanes) share_vector(j, kLanes - 1);
    for (int64_t j = whole; j < last; j += kLanes) share_vector(j, i - j);
    d.pairs[i] += horizontal_sum<Real>(pairs);
    return delta;
  }

  void key_gradients(Own& t, const Shared& shared, int64_t unit, const Steps& steps, const Decays& d,
                     Real common) const {
    const int64_t m = l_.columns_m, count = steps.count;
    state_gradients(t, p_.vector_decay ? t.vector.ended : t.psi, count, d.to_end);
    if (scalar_gradient_) {
      Real with_grad[kChunk];
      for (int64_t j = 0; j < count; ++j) with_grad[j] = dot(t.psi + j * m, t.grad_psi + j * m, m);
      write_decays(with_grad, d, common, unit, steps);
    }
    for (int64_t j = 0; j < count; j += kTileRows) {
      const int64_t rows = min64(kTileRows, count - j), later = count - j;
      if (!p_.vector_decay)
        product<A, true, true>(rows, m, later, t.g + j * kChunk + j, kChunk, t.phi + j * m, m, t.grad_psi + j * m, m);
      product<A, true, true>(rows, l_.columns_v, later, t.a + j * kChunk + j, kChunk, t.grad_out + j * columns_,
                             columns_, t.grad_values + j * l_.columns_v, l_.columns_v);
    }
    const int64_t b = l_.batch_of(unit), h = l_.head_of(unit);
    if (p_.vector_decay) t.vector.key_gradients(count, t.g, t.phi, t.psi, t.grad_psi);
    if (p_.vector_decay && p_.grad_decay.data) t.vector.write_gradients(b, h, steps);
    write_queries(t, shared, b, h, l_.query_steps(b, steps.first));
    write_keys(t, shared, b, h, steps);
  }

  // Step t has the pairs of steps from t on with S and with steps before t, of those before t with dS, and S with dS.
  void write_decays(const Real* with_grad, const Decays& d, Real common, int64_t unit, const Steps& steps) const {
    Real later[kChunk + 1];
    later[steps.count] = 0;
    for (int64_t i = steps.count - 1; i >= 0; --i) later[i] = later[i + 1] + d.pairs[i];
    Real earlier = common;
    for (int64_t i = 0; i < steps.count; earlier += with_grad[i++])
      at<Real>(p_.grad_decay, l_.batch_of(unit), l_.head_of(unit), steps.first + i) =
          steps.live[i] ? later[i] + earlier : Real(0);
  }

  // What the keys and values of a chunk have from dS.
  void state_gradients(Own& t, const Real* psi, int64_t count, const Real* to_end) const {
    const int64_t m = l_.columns_m;
    fill(t.grad + state_, (columns_ - width_) * m, Real(0));
    turn(t.grad_turned, columns_, t.grad, m, columns_, m);
    product<A, false, false>(count, m, width_, t.ended, columns_, t.grad, m, t.grad_psi, m);
    product<A, false, false>(count, l_.columns_v, p_.features, psi, m, t.grad_turned, columns_, t.grad_values,
                             l_.columns_v);
    if (l_.decays) scaled_rows(t.grad_values, t.grad_values, to_end, count, l_.columns_v);
  }

  void write_queries(Own& t, const Shared& shared, int64_t b, int64_t h, const Steps& steps) const {
    l_.through_map(t.grad_phi, t.phi, steps.count);
    Real* grad = l_.through_projection(t.query, t.grad_phi, shared, steps.count);
    write_rows(p_.grad_query, b, h, steps, grad, p_.projection ? l_.columns_d : l_.columns_m, p_.head_dim);
  }

  void write_keys(Own& t, const Shared& shared, int64_t b, int64_t h, const Steps& steps) const {
    l_.through_map(t.grad_psi, t.psi, steps.count);
    Real* grad = l_.through_projection(t.query, t.grad_psi, shared, steps.count);
    if (l_.softmax)
      for (int64_t j = 0; j < steps.count; ++j) {
        const Real factor = Real(p_.scale) * total(t.grad_psi + j * l_.columns_m, l_.columns_m);
        for (int64_t k = 0; k < l_.columns_d; k += kLanes) {
          const int64_t at = j * l_.columns_d + k;
          Reals::store(grad + at, Reals::load(grad + at) - factor * Reals::load(t.key + at));
        }
      }
    write_rows(p_.grad_key, b, h, steps, grad, p_.projection ? l_.columns_d : l_.columns_m, p_.head_dim);
    write_rows(p_.grad_value, b, h, steps, t.grad_values, l_.columns_v, p_.head_dim_v);
  }

  // 0 for what takes no part.
  void write_rows(const View& to, int64_t b, int64_t h, const Steps& steps, Real* from, int64_t ld,
                  int64_t columns) const {
    for (int64_t i = 0; i < steps.count; ++i) {
      if (!steps.live[i]) fill(from + i * ld, columns, Real(0));
      store_row(mutable_element(to, p_.dtype, b, h, steps.first + i), p_.dtype, from + i * ld, Real(1), columns);
    }
  }

  // Not causal: S of all keys by ranges, then phi's gradients and dS by ranges of queries, then the keys'.
  void bidirectional_item(Own& t, const Head& head, const Shared& shared, int64_t unit, int64_t item) const {
    const int64_t b = l_.batch_of(unit), h = l_.head_of(unit), keys = ranges_k(), queries = ranges_q();
    const bool of_queries = item >= keys && item < keys + queries;
    const int64_t range = item < keys ? item : of_queries ? item - keys : item - keys - queries;
    const int64_t length = of_queries ? l_.queries(b) : l_.keys(b);
    const int64_t first = range * kRange, last = min64(first + kRange, length);
    if (item < keys) {
      sum_keys(t, head, shared, unit, item, first, last);
    } else if (of_queries) {
      wait_until(head.turn, int32_t(keys));
      fill(t.grad, state_, Real(0));
      for (int64_t at = first; at < last; at += kChunk) {
        const Steps steps = l_.query_steps(b, at);
        load_queries(t, shared, unit, steps);
        query_gradients(t, head.checkpoints, steps.count);
        product<A, true, true>(width_, l_.columns_m, steps.count, t.grad_out, columns_, t.phi, l_.columns_m, t.grad,
                               l_.columns_m);
        write_queries(t, shared, b, h, steps);
      }
      wait_until(head.turn, int32_t(item));
      add_scaled(head.grad, Real(1), t.grad, Real(1), state_);
      add_one(head.turn);
    } else {
      wait_until(head.turn, int32_t(keys + queries));
      __builtin_memcpy(t.grad, head.grad, size_t(state_) * sizeof(Real));
      for (int64_t at = first; at < last; at += kChunk) {
        const Steps steps = l_.key_steps(b, at);
        Real c = head.c[0];  // the maximum of all keys: no chunk's is more
        Decays d;
        load_keys(t, shared, unit, steps, c, d);
        state_gradients(t, t.psi, steps.count, d.to_end);
        write_keys(t, shared, b, h, steps);
      }
    }
  }

  // grad_phi and delta from the state alone.
  void query_gradients(Own& t, const Real* state, int64_t count) const {
    const int64_t m = l_.columns_m;
    product<A, false, false>(count, m, p_.head_dim_v, t.grad_out, columns_, state, m, t.grad_phi, m);
    if (p_.normalize)
      for (int64_t i = 0; i < count; ++i) {
        Real* grad = t.grad_phi + i * m;
        Real& delta = t.grad_out[i * columns_ + p_.head_dim_v];
        delta *= -dot(t.phi + i * m, grad, m);
        add_scaled(grad, Real(1), state + p_.head_dim_v * m, delta, m);
      }
  }

  void sum_keys(Own& t, const Head& head, const Shared& shared, int64_t unit, int64_t item, int64_t first,
                int64_t last) const {
    Real c = -infinity<Real>();
    fill(t.grad, state_, Real(0));
    for (int64_t at = first; at < last; at += kChunk) {
      const Steps steps = l_.key_steps(l_.batch_of(unit), at);
      Decays d;
      load_keys(t, shared, unit, steps, c, d);
      product<A, true, false>(width_, l_.columns_m, steps.count, t.values, columns_, t.psi, l_.columns_m, t.added,
                              l_.columns_m);
      add_scaled(t.grad, t.left[0], t.added, Real(1), state_);
    }
    wait_until(head.turn, int32_t(item));
    const Real before = head.c[0];
    if (!(c <= before)) head.c[0] = c;
    add_scaled(head.checkpoints, L::relative(before, head.c[0]), t.grad, L::relative(c, head.c[0]), state_);
    add_one(head.turn);
  }

  const LinearParams& p_;
  const L l_;
  const int64_t width_, columns_, state_, chunks_, most_, groups_;
  const bool scalar_gradient_;  // of decays by a number for each step
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
