// What the kernels of linear attention share: features, decays and products of a chunk of steps.
//
// All work goes chunk by chunk of kChunk steps. A chunk's operands are staged in Real, whatever the tensors' dtype, or
// read where they are if they are so already:
//
//   rows      [kChunk][columns]     queries' features phi, values; columns fill whole vectors, padding is zero
//   turned    [columns][kChunk]     keys' features psi: the right operand of phi psi^T, the left one of psi^T v
//
// Keys that take no part (masked, or past the sequence's end) are zero and are not read. The state of a head, S, is
// rows [columns_m][columns_v], and z beside it is a vector of columns_m.
//
// Exponents are in units of log2 and never positive: a decay between two steps is the difference of two prefix sums of
// the chunk, which are kept twice as precisely as Real, so that strong decays leave weak ones exact. Softmax features'
// running maximum c enters there: where it rises, what came before decays by as much.
#pragma once

#include "../linear_params.h"
#include "linear_rows.h"
#include "work.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

constexpr int64_t kChunk = 64;

// Steps [first, first + count) of a sequence, a chunk or its end, and which of their keys take part.
struct Steps {
  int64_t first, count;
  bool whole;  // all of a chunk takes part
  bool live[kChunk];

  Steps(int64_t first_, int64_t count_) : first(first_), count(count_), whole(count_ == kChunk) {
    for (int64_t i = 0; i < kChunk; ++i) live[i] = i < count;
  }
  void keep(int64_t i, bool takes_part) {
    live[i] = takes_part;
    whole = whole && takes_part;
  }
};

// Prefix sums s_i over a chunk's steps of the log2 of what a step leaves of the state, step i's own included.
template <class Real>
struct Sums {
  typedef Simd<Real> Reals;
  typedef typename Reals::Vec Vec;

  Real sum[kChunk], rest[kChunk];  // together s_i

  // 2^(s_i - s_j) for as many j as a vector has.
  Vec between(int64_t i, int64_t j) const {
    const Vec d = (sum[i] - Reals::load(sum + j)) + (rest[i] - Reals::load(rest + j));
    return power(-vmax(Vec{}, -d));
  }
  // 2^s_i, and for as many i as a vector has.
  Real left(int64_t i) const { return power(Reals::broadcast(sum[i] + rest[i]))[0]; }
  Vec since_start(int64_t i) const { return power(-vmax(Vec{}, -(Reals::load(sum + i) + Reals::load(rest + i)))); }
};

// The sizes of a problem, and what its passes do to one chunk of one head.
template <class Real_>
class Linear {
 public:
  typedef Real_ Real;
  typedef Plain<Real> A;
  typedef Simd<Real> Reals;
  typedef typename Reals::Vec Vec;
  static constexpr int64_t kLanes = Reals::kLanes;
  static constexpr int64_t kPanel = kTileVectors * kLanes;  // columns of a panel of the projection

  explicit Linear(const LinearParams& p)
      : p(p), group(p.heads_kv > 0 ? p.heads_q / p.heads_kv : 0), columns_d(round_up(p.head_dim, kLanes)),
        columns_m(round_up(p.features, kLanes)), columns_v(round_up(p.head_dim_v, kLanes)),
        units(p.batch * p.heads_q), softmax(p.feature == Feature::kSoftmax),
        decays((p.decay.data && !p.vector_decay) || softmax), threads_(useful_threads()) {}

  int threads() const { return threads_; }
  int64_t batch_of(int64_t unit) const { return unit / p.heads_q; }
  int64_t head_of(int64_t unit) const { return unit % p.heads_q; }
  int64_t queries(int64_t b) const { return rows_of(p.query, b, p.seqlen_q); }
  int64_t keys(int64_t b) const { return rows_of(p.key, b, p.seqlen_k); }

  // What all threads share: the projection and its bias as the products and vector loops read them.
  struct Shared {
    Real* panels;  // W^T as panels [columns_m / kPanel][D][kPanel], the last as narrow as its columns
    Real* rows;    // W as rows [M][columns_d], for the backward
    Real* bias;    // [columns_m]; -inf in the padding: softmax features there are 0

    Shared(Carver& c, const Linear& l, bool backward)
        : panels(c.take<Real>(l.p.projection ? l.p.head_dim * l.columns_m : 0)),
          rows(c.take<Real>(l.p.projection && backward ? l.p.features * l.columns_d : 0)),
          bias(c.take<Real>(l.softmax ? l.columns_m : 0)) {}
  };

  void pack(const Shared& s, bool backward) const {
    const Real* w = static_cast<const Real*>(p.projection);
    if (w) {
      for (int64_t n = 0; n < columns_m; n += kPanel) {
        const int64_t width = min64(kPanel, columns_m - n);
        for (int64_t k = 0; k < p.head_dim; ++k)
          for (int64_t m = 0; m < width; ++m)
            s.panels[n * p.head_dim + k * width + m] = n + m < p.features ? w[(n + m) * p.head_dim + k] : Real(0);
      }
      if (backward)
        for (int64_t m = 0; m < p.features; ++m)
          for (int64_t k = 0; k < columns_d; ++k)
            s.rows[m * columns_d + k] = k < p.head_dim ? w[m * p.head_dim + k] : Real(0);
    }
    if (softmax) {
      const Real* bias = static_cast<const Real*>(p.feature_bias);
      for (int64_t m = 0; m < columns_m; ++m)
        s.bias[m] = m >= p.features ? -infinity<Real>() : bias ? bias[m] : Real(0);
    }
  }

  // Those of a chunk.
  Steps query_steps(int64_t b, int64_t first) const { return chunk_steps(first, queries(b)); }
  Steps key_steps(int64_t b, int64_t first) const {
    Steps steps = chunk_steps(first, keys(b));
    if (p.key_mask.data)
      for (int64_t i = 0; i < steps.count; ++i)
        steps.keep(i, *element(p.key_mask, Dtype::kBool, b, 0, first + i) != 0);
    return steps;
  }

  // Rows of a tensor, `ld` apart, the padding and what takes no part zeroed.
  void load_rows(Real* to, int64_t ld, const View& view, int64_t b, int64_t h, const Steps& steps,
                 int64_t columns) const {
    const Rows rows(view, p.dtype, b, h, columns);
    with_dtype<Real>(p.dtype, [&](auto tag) {
      for (int64_t i = 0; i < kChunk; ++i) {
        Real* row = to + i * ld;
        if (steps.live[i])
          load_row<Real, tag.dtype>(row, rows[steps.first + i], columns, ld);
        else
          fill(row, ld, Real(0));
      }
    });
  }

  // The same, but where they are if they are so already.
  const Real* rows(Real* to, int64_t ld, const View& view, int64_t b, int64_t h, const Steps& steps,
                   int64_t columns) const {
    if (steps.whole && columns == ld && view.stride[2] == ld && element_size(p.dtype) == int64_t(sizeof(Real)))
      return &at<Real>(view, b, h, steps.first);
    load_rows(to, ld, view, b, h, steps, columns);
    return to;
  }

  // Rows [first, first + count) of a tensor, each times its factor.
  void store_rows(const View& view, int64_t b, int64_t h, int64_t first, int64_t count, const Real* from, int64_t ld,
                  const Real* factor, int64_t columns) const {
    for (int64_t i = 0; i < count; ++i)
      store_row(mutable_element(view, p.dtype, b, h, first + i), p.dtype, from + i * ld, factor[i], columns);
  }

  // A head's S and z from views, which may be absent; padding and what is absent stay as they are.
  void load_state(Real* kv, Real* z, const View& from_kv, const View& from_z, int64_t b, int64_t h) const {
    if (from_kv.data)
      for (int64_t m = 0; m < p.features; ++m)
        __builtin_memcpy(kv + m * columns_v, &at<Real>(from_kv, b, h, m), size_t(p.head_dim_v) * sizeof(Real));
    if (from_z.data) __builtin_memcpy(z, &at<Real>(from_z, b, h), size_t(p.features) * sizeof(Real));
  }

  void store_state(const View& to_kv, const View& to_z, const Real* kv, const Real* z, int64_t b, int64_t h) const {
    if (to_kv.data)
      for (int64_t m = 0; m < p.features; ++m)
        __builtin_memcpy(&at<Real>(to_kv, b, h, m), kv + m * columns_v, size_t(p.head_dim_v) * sizeof(Real));
    if (to_z.data) __builtin_memcpy(&at<Real>(to_z, b, h), z, size_t(p.features) * sizeof(Real));
  }

  // phi of a chunk's queries, rows of columns_m, in `phi` or where they are. `staging`: [kChunk][columns_d].
  const Real* query_features(Real* phi, Real* staging, const Shared& s, int64_t b, int64_t h,
                             const Steps& steps) const {
    if (plain()) return rows(phi, columns_m, p.query, b, h, steps, p.head_dim);
    project(phi, staging, s, p.query, b, h, steps);
    if (!softmax) {
      map_rows(phi, steps);
      return phi;
    }
    for (int64_t i = 0; i < kChunk; ++i) {
      Real* row = phi + i * columns_m;
      Vec highest = Reals::broadcast(-infinity<Real>());
      for (int64_t m = 0; m < columns_m; m += kLanes) {
        const Vec x = Reals::load(row + m) + Reals::load(s.bias + m);
        Reals::store(row + m, x);
        highest = vmax(highest, x);
      }
      const Real top = horizontal_max<Real>(highest);
      for (int64_t m = 0; m < columns_m; m += kLanes)
        Reals::store(row + m, power((Reals::load(row + m) - top) * Real(kLog2E)));
    }
    return phi;
  }

  // psi of a chunk's keys, rows in `psi` or where they are; of softmax features only `turned`, the exponents, and each
  // key's maximum of them. `staging` [kChunk][columns_d] keeps the keys if there is a projection.
  const Real* key_features(Real* turned, Real* psi, Real* staging, const Shared& s, int64_t b, int64_t h,
                           const Steps& steps, Real* highest) const {
    if (plain()) return rows(psi, columns_m, p.key, b, h / group, steps, p.head_dim);
    project(psi, staging, s, p.key, b, h / group, steps);
    if (!softmax) {
      map_rows(psi, steps);
      return psi;
    }
    turn(turned, kChunk, psi, columns_m, kChunk, columns_m);
    Real square[kChunk];
    for (int64_t j = 0; j < kChunk; ++j) {
      const Real* key = staging + j * columns_d;
      square[j] = steps.live[j] ? Real(-p.scale / 2) * dot(key, key, columns_d) : -infinity<Real>();
    }
    const int64_t features = p.features;
    const Real* bias = s.bias;
    for (int64_t j = 0; j < kChunk; j += kLanes) {
      const Vec of_key = Reals::load(square + j);
      Vec top = Reals::broadcast(-infinity<Real>());
      for (int64_t m = 0; m < features; ++m) {
        const Vec x = Reals::load(turned + m * kChunk + j) + (bias[m] + of_key);
        top = vmax(top, x);
        Reals::store(turned + m * kChunk + j, x);
      }
      Reals::store(highest + j, top);
    }
    return psi;
  }

  // From the keys' maxima to c, the running maximum, which has its value before the chunk and gets that after it.
  // `highest` becomes what the exponents are relative to, `risen` what is to be added to a step's log decay.
  void follow_maximum(Real* highest, Real* risen, Real& c) const {
    if (!p.causal) {  // one for all keys of the chunk
      for (int64_t j = 1; j < kChunk; ++j)
        if (!(highest[j] <= highest[0])) highest[0] = highest[j];
      for (int64_t j = 1; j < kChunk; ++j) highest[j] = -infinity<Real>();
    }
    for (int64_t j = 0; j < kChunk; ++j) {
      const Real before = c;
      if (!(highest[j] <= c)) c = highest[j];
      risen[j] = before == -infinity<Real>() ? Real(0) : before - c;
      highest[j] = c == -infinity<Real>() ? Real(0) : c;
    }
  }

  void exponentials(Real* psi, const Real* highest) const {
    for (int64_t j = 0; j < kChunk; j += kLanes) {
      const Vec top = Reals::load(highest + j);
      for (int64_t m = 0; m < p.features; ++m)
        Reals::store(psi + m * kChunk + j, power((Reals::load(psi + m * kChunk + j) - top) * Real(kLog2E)));
    }
  }

  // Of decays by a number for each step; without softmax features `risen` is not read.
  void sum_decays(int64_t b, int64_t h, const Steps& steps, const Real* risen, Sums<Real>& sums) const {
    double sum = 0;
    for (int64_t i = 0; i < kChunk; ++i) {
      double step = softmax ? double(risen[i]) : 0.0;
      if (p.decay.data && steps.live[i]) step += double(at<Real>(p.decay, b, h, steps.first + i));
      sum += (step < kMostDecay ? kMostDecay : step) * kLog2E;
      sums.sum[i] = Real(sum);
      sums.rest[i] = Real(sum - double(sums.sum[i]));
    }
  }

  // What sums that are relative to one maximum are to be multiplied by to go with a later one.
  static Real relative(Real c, Real later) {
    return c == later ? Real(1) : power(Reals::broadcast((c - later) * Real(kLog2E)))[0];
  }

  // What a row is multiplied by that has this denominator; one too small for its inverse is no weight at all.
  static Real inverse(Real denominator) {
    constexpr Real least = sizeof(Real) == 4 ? Real(0x1p-100) : Real(0x1p-996);  // Problem.least_denominator
    return __builtin_fabs(double(denominator)) < double(least) ? Real(0) : 1 / denominator;
  }

  // Gradients of features, rows of columns_m, to those of what the map was applied to. The features tell its slope.
  void through_map(Real* grad, const Real* features, int64_t rows) const {
    if (p.feature == Feature::kIdentity) return;
    for (int64_t i = 0; i < rows * columns_m; i += kLanes) {
      const Vec f = Reals::load(features + i);
      Vec slope = f;
      if (p.feature == Feature::kElu) slope = f > Real(1) ? Reals::broadcast(1) : f;
      if (p.feature == Feature::kRelu) slope = f > Real(p.feature_eps) ? Reals::broadcast(1) : Vec{};
      Reals::store(grad + i, Reals::load(grad + i) * slope);
    }
  }

  // And from W x to x, rows of columns_d in `to`; those given where there is no W.
  Real* through_projection(Real* to, Real* grad, const Shared& s, int64_t rows) const {
    if (!p.projection) return grad;
    product<A, false, false>(rows, columns_d, p.features, grad, columns_m, s.rows, columns_d, to, columns_d);
    return to;
  }

  const LinearParams& p;
  const int64_t group;  // query heads per key head
  const int64_t columns_d, columns_m, columns_v;  // D, M and Dv in whole vectors
  const int64_t units;  // (batch, query head) pairs
  const bool softmax;
  const bool decays;  // the state, by a number for each step

  static constexpr double kMostDecay = -1000;  // of a step, natural log: e^-1000 is 0, and sums stay finite

 private:
  int useful_threads() const {
    const double steps = double(p.seqlen_q + p.seqlen_k) * double(units);
    const double work = steps * double(p.features) * double(p.head_dim_v + (p.projection ? p.head_dim : 0));
    return int(max64(1, min64(p.threads, int64_t((work < 1e18 ? work : 1e18) / kWorkPerThread))));
  }

  static Steps chunk_steps(int64_t first, int64_t length) {
    return Steps(first, max64(0, min64(length - first, kChunk)));
  }

  // Other than softmax features, of W x; 0 in the padding and for what takes no part.
  void map_rows(Real* rows, const Steps& steps) const {
    if (p.feature == Feature::kIdentity) return;
    const bool elu = p.feature == Feature::kElu;
    const Real eps = Real(p.feature_eps);
    for (int64_t i = 0; i < kChunk; ++i) {
      Real* row = rows + i * columns_m;
      if (!steps.live[i]) {
        fill(row, columns_m, Real(0));
        continue;
      }
      for (int64_t m = 0; m < columns_m; m += kLanes) {
        const Vec x = Reals::load(row + m);
        Reals::store(row + m, !elu            ? vmax(Vec{}, x) + eps
                              : x > Real(0) ? x + Real(1)
                                            : power(-vmax(Vec{}, -x) * Real(kLog2E)));
      }
      fill(row + p.features, columns_m - p.features, Real(0));
    }
  }

  // Features are what the tensor holds.
  bool plain() const { return p.feature == Feature::kIdentity && !p.projection; }

  // x or W x, rows of columns_m; x stays in `staging` if there is a W.
  void project(Real* to, Real* staging, const Shared& s, const View& view, int64_t b, int64_t h,
               const Steps& steps) const {
    if (!p.projection) return load_rows(to, columns_m, view, b, h, steps, p.head_dim);
    load_rows(staging, columns_d, view, b, h, steps, p.head_dim);
    for (int64_t n = 0; n < columns_m; n += kPanel) {
      const int64_t width = min64(kPanel, columns_m - n);
      product<A, false, false>(kChunk, width, p.head_dim, staging, columns_d, s.panels + n * p.head_dim, width,
                               to + n, columns_m);
    }
  }

  const int threads_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
