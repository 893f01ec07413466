// The delta rule with optional scalar decay, chunkwise. In a chunk of C steps with b_i the sum of its log decays up to
// step i, D_ij = e^(b_i - b_j) for j <= i, and S the state at its start:
//   g_ij = D_ij k_i . k_j  (j < i),      p_ij = scale D_ij q_i . k_j  (j <= i)
//   e_i  = v_i - e^(b_i) S^T k_i - sum_(j<i) g_ij u_j,      u_i = beta_i e_i      errors and corrections, row by row
//   out_i = scale e^(b_i) S^T q_i + sum_(j<=i) p_ij u_j
//   S   <- e^(b_C) S + sum_j e^(b_C - b_j) k_j u_j^T
// All of it is tile products but the triangular solve, and most of that is too: rows are solved six at a time.
//
// Backward, from the last chunk to the first, with dS the gradient of the state at the chunk's end. A first sweep
// keeps the states between chunks and the errors; values are not needed again.
//   du_j = e^(b_C - b_j) dS^T k_j + sum_(i>=j) p_ij do_i - sum_(i>j) g_ij de_i,      de_j = beta_j du_j    last row first
//   dv = de,    dbeta_j = du_j . e_j,    dg_ij = -de_i . u_j,    dp_ij = do_i . u_j
//   dq_i = scale (e^(b_i) S do_i + sum_j D_ij dp_ij k_j)
//   dk_i = [sum_j D_ij dg_ij k_j - e^(b_i) S de_i] + [e^(b_C - b_i) dS u_i + sum_j D_ji (scale dp_ji q_j + dg_ji k_j)]
//   dS  <- e^(b_C) dS + sum_i e^(b_i) (scale q_i do_i^T - k_i de_i^T)
// b_i stands in every term of dq_i and of the first bracket with +, in the second with -, so its gradient is
// q_i . dq_i + k_i . [first] - k_i . [second]; that of b_C has <dS, S> at the chunk's end besides.
//
// Masked steps have k = v = beta = decay = 0. They leave the state alone, and all their gradients come out as 0.
#pragma once

#include "linear.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class Real_>
class Delta {
 public:
  typedef Real_ Real;
  typedef Plain<Real> A;
  typedef Simd<Real> Reals;
  typedef typename Reals::Vec Vec;
  static constexpr int64_t kLanes = Reals::kLanes;
  static constexpr int64_t kBlock = 16;  // rows of a triangle's blocks: of the chunk, whole vectors
  static constexpr int64_t kSolved = 4;  // rows solved at a time

  explicit Delta(const LinearParams& params)
      : l_(params), p_(params), columns_(l_.columns_m), columns_v_(l_.columns_v), state_size_(columns_ * columns_v_),
        chunks_(div_up(p_.seqlen_q, kChunk)), scale_(Real(p_.scale)) {}

  int64_t forward_bytes() const { return l_.threads() * own_bytes<Chunk>(); }
  int64_t backward_bytes() const { return l_.threads() * own_bytes<Reverse>(); }

  void forward() const {
    for_each(l_.threads(), l_.units, [&](int64_t unit, int rank) {
      const Chunk c = own<Chunk>(rank);
      const int64_t b = l_.batch_of(unit), h = l_.head_of(unit), steps = l_.queries(b);
      load_state(c.state, p_.initial_kv, b, h);
      for (int64_t first = 0; first < steps; first += kChunk) {
        load(c, b, h, first);
        l_.load_rows(c.error, columns_v_, p_.value, b, h / l_.group, l_.key_steps(b, first), p_.head_dim_v);
        relate(c);
        correct(c);
        emit(c, b, h, first);
        advance(c);
      }
      if (p_.final_kv.data) store_state(p_.final_kv, c.state, b, h);
    });
  }

  void backward() const {
    for_each(l_.threads(), l_.units, [&](int64_t unit, int rank) {
      const Reverse r = own<Reverse>(rank);
      const int64_t b = l_.batch_of(unit), h = l_.head_of(unit), steps = l_.queries(b), chunks = div_up(steps, kChunk);
      load_state(r.state, p_.initial_kv, b, h);
      for (int64_t n = 0; n < chunks; ++n) {
        load(r, b, h, n * kChunk);
        l_.load_rows(r.error, columns_v_, p_.value, b, h / l_.group, l_.key_steps(b, n * kChunk), p_.head_dim_v);
        relate(r);
        copy(r.states + n * state_size_, r.state, state_size_);
        correct(r);
        copy(r.errors + n * kChunk * columns_v_, r.error, kChunk * columns_v_);
        advance(r);
      }
      copy(r.states + chunks * state_size_, r.state, state_size_);
      load_state(r.grad_state, p_.grad_kv, b, h);
      for (int64_t n = chunks - 1; n >= 0; --n) {
        load(r, b, h, n * kChunk);
        relate(r);
        copy(r.error, r.errors + n * kChunk * columns_v_, kChunk * columns_v_);
        for (int64_t i = 0; i < kChunk; ++i) scaled(r.correction, r.error, i, columns_v_, r.beta[i]);
        l_.load_rows(r.grad_out, columns_v_, p_.grad_out, b, h, l_.query_steps(b, n * kChunk), p_.head_dim_v);
        reverse(r, r.states + n * state_size_, r.states + (n + 1) * state_size_);
        store(r, b, h, n * kChunk);
      }
      if (p_.grad_initial_kv.data) store_state(p_.grad_initial_kv, r.grad_state, b, h);
    });
  }

 private:
  // One thread's chunk; zero past its last step and past the last column.
  struct Chunk {
    Real *query, *key;             // [kChunk][columns_]
    Real *error, *correction;      // [kChunk][columns_v_]: v, then e; u
    Real *recalled, *out;          // [kChunk][columns_v_]: S^T k; out
    Real* turned;                  // [columns_ or columns_v_][kChunk], a right operand
    Real *overlap, *weight;        // [kChunk][kChunk]: -g, p
    Real* distance;                // [kChunk][kChunk]: D
    Real *beta, *kept, *left;      // [kChunk]: beta_i, e^(b_i), e^(b_C - b_i)
    Real* state;                   // [columns_][columns_v_]

    Chunk(Carver& c, const Delta& d)
        : query(d.tile(c, d.columns_)), key(d.tile(c, d.columns_)), error(d.tile(c, d.columns_v_)),
          correction(d.tile(c, d.columns_v_)), recalled(d.tile(c, d.columns_v_)), out(d.tile(c, d.columns_v_)),
          turned(d.tile(c, max64(d.columns_, d.columns_v_))), overlap(d.tile(c, kChunk)), weight(d.tile(c, kChunk)),
          distance(d.tile(c, kChunk)), beta(d.tile(c, 1)), kept(d.tile(c, 1)), left(d.tile(c, 1)),
          state(c.take<Real>(d.state_size_)) {}
  };

  // What the backward has besides.
  struct Reverse : Chunk {
    Real* states;                      // [chunks_ + 1][columns_][columns_v_]
    Real* errors;                      // [chunks_][kChunk][columns_v_]
    Real *grad_state, *turned_state;   // [columns_][columns_v_], [columns_v_][columns_]
    Real *grad_out, *grad_error;       // [kChunk][columns_v_]
    Real *grad_query, *row, *column;   // [kChunk][columns_]: dq, the two brackets of dk
    Real *grad_weight, *grad_overlap;  // [kChunk][kChunk]
    Real *grad_decay, *grad_beta;      // [kChunk]

    Reverse(Carver& c, const Delta& d)
        : Chunk(c, d), states(c.take<Real>((d.chunks_ + 1) * d.state_size_)),
          errors(c.take<Real>(d.chunks_ * kChunk * d.columns_v_)), grad_state(c.take<Real>(d.state_size_)),
          turned_state(c.take<Real>(d.state_size_)), grad_out(d.tile(c, d.columns_v_)),
          grad_error(d.tile(c, d.columns_v_)), grad_query(d.tile(c, d.columns_)), row(d.tile(c, d.columns_)),
          column(d.tile(c, d.columns_)), grad_weight(d.tile(c, kChunk)), grad_overlap(d.tile(c, kChunk)),
          grad_decay(d.tile(c, 1)), grad_beta(d.tile(c, 1)) {}
  };

  static Real* tile(Carver& c, int64_t columns) { return c.take<Real>(kChunk * columns); }
  template <class Own>
  int64_t own_bytes() const {
    Carver carver;
    Own(carver, *this);
    return int64_t(carver.address());
  }
  template <class Own>
  Own own(int rank) const {
    Carver carver(static_cast<char*>(p_.scratch) + rank * own_bytes<Own>());
    return Own(carver, *this);
  }

  static void copy(Real* to, const Real* from, int64_t count) {
    __builtin_memcpy(to, from, size_t(count) * sizeof(Real));
  }
  // Row i of a tile, times a factor, to or onto that of another.
  static void scaled(Real* to, const Real* from, int64_t i, int64_t columns, Real factor) {
    for (int64_t k = i * columns; k < (i + 1) * columns; ++k) to[k] = factor * from[k];
  }
  static void add_scaled(Real* to, const Real* from, int64_t i, int64_t j, int64_t columns, Real factor) {
    for (int64_t k = 0; k < columns; ++k) to[i * columns + k] += factor * from[j * columns + k];
  }

  // A state from memory; zero where there is none.
  void load_state(Real* state, const View& from, int64_t b, int64_t h) const {
    fill(state, state_size_, Real(0));
    for (int64_t m = 0; from.data && m < p_.features; ++m)
      copy(state + m * columns_v_, &at<Real>(from, b, h, m), p_.head_dim_v);
  }
  void store_state(const View& to, const Real* state, int64_t b, int64_t h) const {
    for (int64_t m = 0; m < p_.features; ++m) copy(&at<Real>(to, b, h, m), state + m * columns_v_, p_.head_dim_v);
  }

  // Queries, keys, beta and what the decays make of it.
  void load(const Chunk& c, int64_t b, int64_t h, int64_t first) const {
    const Steps steps = l_.key_steps(b, first);
    l_.load_rows(c.query, columns_, p_.query, b, h, l_.query_steps(b, first), p_.head_dim);
    l_.load_rows(c.key, columns_, p_.key, b, h / l_.group, steps, p_.head_dim);
    for (int64_t i = 0; i < kChunk; ++i) c.beta[i] = steps.live[i] ? at<Real>(p_.beta, b, h, first + i) : Real(0);
    if (!l_.decays) {
      fill(c.kept, kChunk, Real(1));
      fill(c.left, kChunk, Real(1));
      return fill(c.distance, kChunk * kChunk, Real(1));
    }
    Sums<Real> sums;
    l_.sum_decays(b, h, steps, nullptr, sums);
    for (int64_t i = 0; i < kChunk; ++i)
      for (int64_t j = 0; j <= i; j += kLanes) Reals::store(c.distance + i * kChunk + j, sums.between(i, j));
    for (int64_t i = 0; i < kChunk; ++i) c.kept[i] = sums.left(i);
    copy(c.left, c.distance + (kChunk - 1) * kChunk, kChunk);
  }

  // -g and p, zero above the diagonal.
  void relate(const Chunk& c) const {
    turn(c.turned, kChunk, c.key, columns_, kChunk, columns_);
    triangle(c.overlap, c.key, columns_, c.turned, c.distance, Real(-1), p_.features);
    triangle(c.weight, c.query, columns_, c.turned, c.distance, scale_, p_.features);
    for (int64_t i = 0; i < kChunk; ++i) c.overlap[i * kChunk + i] = 0;
  }

  // factor D_ij (rows of left, `steps` wide) . (columns of right) for j <= i.
  static void triangle(Real* to, const Real* left, int64_t ld, const Real* right, const Real* distance, Real factor,
                       int64_t steps) {
    for (int64_t r = 0; r < kChunk; r += kBlock) {
      product<A, false, false>(kBlock, r + kBlock, steps, left + r * ld, ld, right, kChunk, to + r * kChunk, kChunk);
      for (int64_t i = r; i < r + kBlock; ++i) {
        for (int64_t j = 0; j < r + kBlock; ++j)
          to[i * kChunk + j] = j <= i ? to[i * kChunk + j] * factor * distance[i * kChunk + j] : Real(0);
        fill(to + i * kChunk + r + kBlock, kChunk - r - kBlock, Real(0));
      }
    }
  }

  // Errors and corrections from the values: forward substitution.
  void correct(const Chunk& c) const {
    product<A, false, false>(kChunk, columns_v_, p_.features, c.key, columns_, c.state, columns_v_, c.recalled,
                             columns_v_);
    for (int64_t r = 0; r < kChunk; r += kSolved) {
      for (int64_t i = r; i < r + kSolved; ++i) add_scaled(c.error, c.recalled, i, i, columns_v_, -c.kept[i]);
      product<A, false, true>(kSolved, columns_v_, r, c.overlap + r * kChunk, kChunk, c.correction, columns_v_,
                              c.error + r * columns_v_, columns_v_);
      for (int64_t i = r; i < r + kSolved; ++i) {
        for (int64_t j = r; j < i; ++j)
          add_scaled(c.error, c.correction, i, j, columns_v_, c.overlap[i * kChunk + j]);
        scaled(c.correction, c.error, i, columns_v_, c.beta[i]);
      }
    }
  }

  void emit(const Chunk& c, int64_t b, int64_t h, int64_t first) const {
    product<A, false, false>(kChunk, columns_v_, p_.features, c.query, columns_, c.state, columns_v_, c.out,
                             columns_v_);
    for (int64_t i = 0; i < kChunk; ++i) scaled(c.out, c.out, i, columns_v_, scale_ * c.kept[i]);
    for (int64_t r = 0; r < kChunk; r += kBlock)
      product<A, false, true>(kBlock, columns_v_, r + kBlock, c.weight + r * kChunk, kChunk, c.correction, columns_v_,
                              c.out + r * columns_v_, columns_v_);
    for (int64_t i = 0; i < l_.query_steps(b, first).count; ++i)
      write(p_.out, b, h, first + i, c.out + i * columns_v_, p_.head_dim_v);
  }

  void write(const View& view, int64_t b, int64_t h, int64_t row, const Real* from, int64_t columns) const {
    write_row(mutable_element(view, p_.dtype, b, h, row), p_.dtype, from, Real(1), columns);
  }

  // The state after the chunk.
  void advance(const Chunk& c) const {
    for (int64_t i = 0; i < kChunk; ++i) scaled(c.recalled, c.correction, i, columns_v_, c.left[i]);
    scale_row(c.state, state_size_, c.kept[kChunk - 1]);
    product<A, true, true>(p_.features, columns_v_, kChunk, c.key, columns_, c.recalled, columns_v_, c.state,
                           columns_v_);
  }

  // A chunk's gradients, given the states at its start and end.
  void reverse(const Reverse& r, const Real* state, const Real* end) const {
    solve(r);
    turn(r.turned, kChunk, r.correction, columns_v_, kChunk, columns_v_);
    triangle(r.grad_weight, r.grad_out, columns_v_, r.turned, r.distance, scale_, p_.head_dim_v);
    triangle(r.grad_overlap, r.grad_error, columns_v_, r.turned, r.distance, Real(-1), p_.head_dim_v);
    for (int64_t i = 0; i < kChunk; ++i) r.grad_overlap[i * kChunk + i] = 0;

    turn(r.turned_state, columns_, state, columns_v_, columns_, columns_v_);
    through_state(r.grad_query, r.grad_out, r.turned_state);
    through_state(r.row, r.grad_error, r.turned_state);
    turn(r.turned_state, columns_, r.grad_state, columns_v_, columns_, columns_v_);
    through_state(r.column, r.correction, r.turned_state);
    for (int64_t i = 0; i < kChunk; ++i) {
      scaled(r.grad_query, r.grad_query, i, columns_, scale_ * r.kept[i]);
      scaled(r.row, r.row, i, columns_, -r.kept[i]);
      scaled(r.column, r.column, i, columns_, r.left[i]);
    }
    for (int64_t i = 0; i < kChunk; i += kBlock) {
      const int64_t at = i * kChunk, to = i * columns_, later = kChunk - i;
      onto<false>(r.grad_query + to, i + kBlock, r.grad_weight + at, r.key);
      onto<false>(r.row + to, i + kBlock, r.grad_overlap + at, r.key);
      onto<true>(r.column + to, later, r.grad_weight + at + i, r.query + to);
      onto<true>(r.column + to, later, r.grad_overlap + at + i, r.key + to);
    }

    Real sum = dot(r.grad_state, end, state_size_);
    for (int64_t i = kChunk - 1; i >= 0; --i) {
      const int64_t at = i * columns_;
      sum += dot(r.query + at, r.grad_query + at, columns_) + dot(r.key + at, r.row + at, columns_) -
             dot(r.key + at, r.column + at, columns_);
      r.grad_decay[i] = sum;
    }

    scale_row(r.grad_state, state_size_, r.kept[kChunk - 1]);
    for (int64_t i = 0; i < kChunk; ++i) {
      scaled(r.out, r.grad_out, i, columns_v_, scale_ * r.kept[i]);
      scaled(r.recalled, r.grad_error, i, columns_v_, -r.kept[i]);
    }
    product<A, true, true>(p_.features, columns_v_, kChunk, r.query, columns_, r.out, columns_v_, r.grad_state,
                           columns_v_);
    product<A, true, true>(p_.features, columns_v_, kChunk, r.key, columns_, r.recalled, columns_v_, r.grad_state,
                           columns_v_);
  }

  // du, then de in its place, and dbeta: backward substitution.
  void solve(const Reverse& r) const {
    product<A, false, false>(kChunk, columns_v_, p_.features, r.key, columns_, r.grad_state, columns_v_, r.grad_error,
                             columns_v_);
    for (int64_t first = kChunk - kSolved; first >= 0; first -= kSolved) {
      const int64_t next = first + kSolved;
      Real* rows = r.grad_error + first * columns_v_;
      for (int64_t i = first; i < next; ++i) scaled(r.grad_error, r.grad_error, i, columns_v_, r.left[i]);
      product<A, true, true>(kSolved, columns_v_, kChunk - first, r.weight + first * kChunk + first, kChunk,
                             r.grad_out + first * columns_v_, columns_v_, rows, columns_v_);
      product<A, true, true>(kSolved, columns_v_, kChunk - next, r.overlap + next * kChunk + first, kChunk,
                             r.grad_error + next * columns_v_, columns_v_, rows, columns_v_);
      for (int64_t i = next - 1; i >= first; --i) {
        for (int64_t later = i + 1; later < next; ++later)
          add_scaled(r.grad_error, r.grad_error, i, later, columns_v_, r.overlap[later * kChunk + i]);
        r.grad_beta[i] = dot(r.grad_error + i * columns_v_, r.error + i * columns_v_, columns_v_);
        scaled(r.grad_error, r.grad_error, i, columns_v_, r.beta[i]);
      }
    }
  }

  // [kChunk][columns_] = (rows of columns_v_) (a turned state)
  void through_state(Real* to, const Real* rows, const Real* turned) const {
    product<A, false, false>(kChunk, columns_, p_.head_dim_v, rows, columns_v_, turned, columns_, to, columns_);
  }
  // kBlock rows of [kChunk][columns_] += (part of a triangle, or its transpose) rows
  template <bool kTransposed>
  void onto(Real* to, int64_t steps, const Real* triangle, const Real* rows) const {
    product<A, kTransposed, true>(kBlock, columns_, steps, triangle, kChunk, rows, columns_, to, columns_);
  }

  void store(const Reverse& r, int64_t b, int64_t h, int64_t first) const {
    const Steps steps = l_.key_steps(b, first);
    for (int64_t i = 0; i < steps.count; ++i) {
      add_scaled(r.row, r.column, i, i, columns_, Real(1));
      write(p_.grad_query, b, h, first + i, r.grad_query + i * columns_, p_.head_dim);
      write(p_.grad_key, b, h, first + i, r.row + i * columns_, p_.head_dim);
      write(p_.grad_value, b, h, first + i, r.grad_error + i * columns_v_, p_.head_dim_v);
      if (p_.grad_beta.data) at<Real>(p_.grad_beta, b, h, first + i) = r.grad_beta[i];
      if (p_.grad_decay.data) at<Real>(p_.grad_decay, b, h, first + i) = steps.live[i] ? r.grad_decay[i] : Real(0);
    }
  }

  const Linear<Real> l_;
  const LinearParams& p_;
  const int64_t columns_, columns_v_, state_size_, chunks_;
  const Real scale_;
};

template <class Real>
struct DeltaForward : private Delta<Real> {
  using Delta<Real>::Delta;
  void run() const { this->forward(); }
  int64_t scratch_bytes() const { return this->forward_bytes(); }
};

template <class Real>
struct DeltaBackward : private Delta<Real> {
  using Delta<Real>::Delta;
  void run() const { this->backward(); }
  int64_t scratch_bytes() const { return this->backward_bytes(); }
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
