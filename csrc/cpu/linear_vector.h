// Decays of each feature by a number of its own: S <- diag(2^d_t) S + psi_t v_t^T, so that with b = d's prefix sums
//   a_ij = sum_m phi_im 2^(b_im - b_jm) psi_jm.
//
// Blocks of kBlock steps. Between two blocks both factors are taken to the start of the later one, r: a product of
// phi 2^(b_i - b_r) and psi 2^(b_r - b_j), both factors at most 1. From block to block psi is carried on by 2^(what the
// block leaves). Within a block a loop over pairs multiplies by each step's factor; exponentials are one for each
// element, none for a pair. In the backward, gradients of phi and psi take the same ways.
#pragma once

#include "linear.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class Real>
class VectorDecay {
  typedef Linear<Real> L;
  typedef typename L::A A;
  typedef Simd<Real> Reals;
  typedef typename Reals::Vec Vec;
  static constexpr int64_t kLanes = Reals::kLanes;

 public:
  static constexpr int64_t kBlock = 16, kBlocks = kChunk / kBlock;

  VectorDecay(Carver& k, const Linear<Real>& l, bool backward)
      : l_(l), m_(l.p.vector_decay ? l.columns_m : 0), backward_(backward) {
    const int64_t rows = kChunk * m_, more = backward ? rows : 0;
    steps_ = k.take<Real>(rows);
    kept_ = k.take<Real>(rows);
    since_ = k.take<Real>(rows);
    ended = k.take<Real>(rows);
    left_ = k.take<Real>(kBlocks * m_);
    carried = k.take<Real>(m_);
    started = k.take<Real>(more);
    from_block_ = k.take<Real>(more);
    to_block_ = k.take<Real>(more);
    before_ = k.take<Real>(more);
    with_grad_ = k.take<Real>(more);
    later_ = k.take<Real>(backward ? kBlock * m_ : 0);
    common = k.take<Real>(backward ? m_ : 0);
  }

  Real* ended;    // [kChunk][m]: psi decayed to the start of the present block; after all, to the chunk's end
  Real* carried;  // [m]: what is left of the state at the chunk's start, likewise
  Real* started;  // [kChunk][m]: phi decayed since the chunk's start
  Real* common;   // [m]: of S after the chunk and dS

  static int64_t block_end(int64_t block, int64_t count) { return min64((block + 1) * kBlock, count); }
  static int64_t block_count(int64_t block, int64_t count) {
    return max64(block_end(block, count) - block * kBlock, 0);
  }

  // The decays of a chunk, in units of log2.
  void load(int64_t b, int64_t h, const Steps& steps) const {
    for (int64_t i = 0; i < kChunk; ++i) {
      Real* row = steps_ + i * m_;
      fill(row, m_, Real(0));
      if (steps.live[i])
        __builtin_memcpy(row, &at<Real>(l_.p.decay, b, h, steps.first + i), size_t(l_.p.features) * sizeof(Real));
      for (int64_t m = 0; m < m_; m += kLanes) {
        const Vec step = vmax(Reals::broadcast(Real(L::kMostDecay)), Reals::load(row + m)) * Real(kLog2E);
        Reals::store(row + m, step);
        Reals::store(kept_ + i * m_ + m, power(step));
      }
    }
    fill(carried, m_, Real(1));
  }

  // ended and carried of the whole chunk at once.
  void to_end(const Real* psi) const {
    for (int64_t m = 0; m < m_; m += kLanes) {
      Vec sum = {};
      for (int64_t j = kChunk - 1; j >= 0; --j) {
        Reals::store(ended + j * m_ + m, Reals::load(psi + j * m_ + m) * power(sum));
        sum += Reals::load(steps_ + j * m_ + m);
      }
      Reals::store(carried + m, power(sum));
    }
  }

  // Rows of a of a block's `count` steps, 0 above the diagonal, and phi decayed since the chunk's start.
  // psi: rows; turned: [m][kChunk] as carry() leaves it.
  void weights(int64_t block, int64_t count, const Real* phi, const Real* psi, const Real* turned, Real* a,
               Real* started_phi) const {
    const int64_t first = block * kBlock, last = first + kBlock;
    for (int64_t i = first; i < last; ++i) fill(a + i * kChunk, kChunk, Real(0));
    int64_t m = 0;
    for (; m + 4 * kLanes <= m_; m += 4 * kLanes) within<4>(first, first + count, m, phi, psi, a);
    for (; m < m_; m += kLanes) within<1>(first, first + count, m, phi, psi, a);
    for (m = 0; m < m_; m += kLanes) {
      Vec sum = {};
      for (int64_t i = first; i < last; ++i) {
        sum += Reals::load(steps_ + i * m_ + m);
        const Vec factor = power(sum), x = Reals::load(phi + i * m_ + m) * factor;
        Reals::store(since_ + i * m_ + m, x);
        Reals::store(started_phi + i * m_ + m, x * Reals::load(carried + m));
        if (backward_) Reals::store(from_block_ + i * m_ + m, factor);
      }
      Reals::store(left_ + block * m_ + m, power(sum));
    }
    if (first > 0)
      product<A, false, false>(count, first, l_.p.features, since_ + first * m_, m_, turned, kChunk, a + first * kChunk,
                               kChunk);
  }

  // On to the next block: `turned` holds psi decayed to its start, up to it, and psi from there on.
  void carry(int64_t block, const Real* psi, Real* turned) const {
    const int64_t first = block * kBlock;
    const Real* left = left_ + block * m_;
    for (int64_t m = 0; m < m_; m += kLanes) {
      const Vec kept = Reals::load(left + m);
      Reals::store(carried + m, Reals::load(carried + m) * kept);
      for (int64_t j = 0; backward_ && j < first; ++j)
        Reals::store(ended + j * m_ + m, Reals::load(ended + j * m_ + m) * kept);
      Vec sum = {};
      for (int64_t j = first + kBlock - 1; j >= first; --j) {
        const Vec factor = power(sum);
        Reals::store(ended + j * m_ + m, Reals::load(psi + j * m_ + m) * factor);
        if (backward_) Reals::store(to_block_ + j * m_ + m, factor);
        sum += Reals::load(steps_ + j * m_ + m);
      }
    }
    for (int64_t m = 0; m < m_; ++m)
      for (int64_t j = 0; j < first; j += kLanes)
        Reals::store(turned + m * kChunk + j, Reals::load(turned + m * kChunk + j) * left[m]);
    turn(turned + first, kChunk, ended + first * m_, m_, kBlock, m_);
  }

  // grad: rows of phi's gradient, which hold dO S^T, to the whole of it. g: rows of dO V^T.
  void query_gradients(int64_t block, int64_t count, const Real* g, const Real* phi, const Real* psi,
                       Real* grad) const {
    const int64_t first = block * kBlock;
    for (int64_t i = first; i < first + count; ++i)
      for (int64_t m = 0; m < m_; m += kLanes)
        Reals::store(grad + i * m_ + m, Reals::load(grad + i * m_ + m) * Reals::load(carried + m));
    product<A, false, true>(count, m_, first, g + first * kChunk, kChunk, ended, m_, grad + first * m_, m_);
    for (int64_t i = first; i < first + count; ++i)
      for (int64_t m = 0; m < m_; m += kLanes) {
        Vec sum = {};
        for (int64_t j = first; j < i; ++j)
          sum = sum * Reals::load(kept_ + j * m_ + m) + Reals::load(psi + j * m_ + m) * g[i * kChunk + j];
        const int64_t at = i * m_ + m;
        sum = sum * Reals::load(kept_ + at) + Reals::load(grad + at) * Reals::load(from_block_ + at);
        Reals::store(before_ + at, sum * Reals::load(phi + at));
        Reals::store(grad + at, sum + Reals::load(psi + at) * g[i * kChunk + i]);
      }
  }

  // grad: rows of psi's gradient, which hold V dS^T, to the whole of it.
  void key_gradients(int64_t count, const Real* g, const Real* phi, const Real* psi, Real* grad) const {
    Real* from_end = carried;  // from the end of the present block to that of the chunk
    fill(from_end, m_, Real(1));
    for (int64_t block = (count - 1) / kBlock; block >= 0; --block) {
      const int64_t first = block * kBlock, last = block_end(block, count), later = count - last;
      product<A, true, false>(last - first, m_, later, g + last * kChunk + first, kChunk, since_ + last * m_, m_,
                              later_, m_);
      for (int64_t j = first; j < last; ++j)
        for (int64_t m = 0; m < m_; m += kLanes) {
          const int64_t at = j * m_ + m;
          const Vec key = Reals::load(psi + at), to_block = Reals::load(to_block_ + at);
          Vec sum = {};
          for (int64_t i = last - 1; i > j; --i)
            sum = (sum + Reals::load(phi + i * m_ + m) * g[i * kChunk + j]) * Reals::load(kept_ + i * m_ + m);
          sum += Reals::load(later_ + (j - first) * m_ + m) * to_block;
          const Vec of_state = Reals::load(grad + at) * Reals::load(from_end + m) * to_block;
          Reals::store(before_ + at, Reals::load(before_ + at) - sum * key);
          Reals::store(with_grad_ + at, of_state * key);
          Reals::store(grad + at, sum + of_state + Reals::load(phi + at) * g[j * kChunk + j]);
        }
      for (int64_t m = 0; m < m_; m += kLanes) {
        const Vec kept = Reals::load(left_ + block * m_ + m);
        Reals::store(from_end + m, Reals::load(from_end + m) * kept);
        for (int64_t i = last; i < count; ++i)
          Reals::store(since_ + i * m_ + m, Reals::load(since_ + i * m_ + m) * kept);
      }
    }
  }

  // Step t has the pairs of steps from t on with S and with steps before t, of those before t with dS, and S with dS.
  void write_gradients(int64_t b, int64_t h, const Steps& steps) const {
    for (int64_t m = 0; m < m_; m += kLanes) {
      Vec later = {}, earlier = Reals::load(common + m);
      for (int64_t i = steps.count - 1; i >= 0; --i) {
        later += Reals::load(before_ + i * m_ + m);
        Reals::store(before_ + i * m_ + m, later);
      }
      for (int64_t i = 0; i < steps.count; ++i) {
        const Vec found = Reals::load(before_ + i * m_ + m) + earlier;
        earlier += Reals::load(with_grad_ + i * m_ + m);
        Reals::store(before_ + i * m_ + m, steps.live[i] ? found : Vec{});
      }
    }
    for (int64_t i = 0; i < steps.count; ++i)
      __builtin_memcpy(&at<Real>(l_.p.grad_decay, b, h, steps.first + i), before_ + i * m_,
                       size_t(l_.p.features) * sizeof(Real));
  }

 private:
  // a of the pairs within a block, what kVectors vectors of features add.
  template <int kVectors>
  void within(int64_t first, int64_t last, int64_t m, const Real* phi, const Real* psi, Real* a) const {
    for (int64_t i = first; i < last; ++i) {
      Vec decayed[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) decayed[v] = Reals::load(phi + i * m_ + m + v * kLanes);
      for (int64_t j = i; j >= first; --j) {
        Vec sum = {};
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sum += decayed[v] * Reals::load(psi + j * m_ + m + v * kLanes);
          decayed[v] *= Reals::load(kept_ + j * m_ + m + v * kLanes);
        }
        a[i * kChunk + j] += horizontal_sum<Real>(sum);
      }
    }
  }

  const Linear<Real>& l_;
  const int64_t m_;
  const bool backward_;
  Real* steps_;       // [kChunk][m]: log2 of what each step leaves
  Real* kept_;        // 2^ that
  Real* since_;       // [kChunk][m]: phi decayed since the start of its block; in key_gradients, since an earlier end
  Real* left_;        // [kBlocks][m]: what a block leaves
  Real* from_block_;  // [kChunk][m]: decay since the start of the step's block
  Real* to_block_;    // [kChunk][m]: to the end of the step's block
  Real* before_;      // [kChunk][m]: a step's pairs with S and those before it, less those with the ones after it
  Real* with_grad_;   // [kChunk][m]: a step's pairs with dS
  Real* later_;       // [kBlock][m]: what later blocks add to the gradient of a block's psi
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
