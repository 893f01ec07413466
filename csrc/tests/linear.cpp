// Random problems of linear attention, forward and backward, against the recurrence of fastattn/linear/problem.py step
// by step in double. What must not be read holds NaN, what must not be written is looked at afterwards (tensor.h).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "check.h"
#include "oracle.h"
#include "tensor.h"
#include "tests.h"

namespace fastattn {
namespace tests {
namespace {

typedef std::vector<double> Numbers;

// One (sequence, head) of a problem as numbers, and what the recurrence makes of it.
struct HeadOracle {
  HeadOracle(const LinearParams& params, int64_t b_, int64_t h_) : p(params), b(b_), h(h_) {
    queries = rows_of(p.query, b, p.seqlen_q);
    keys = rows_of(p.key, b, p.seqlen_k);
    load_features();
    forward();
    if (p.grad_out.data) backward();
  }

  double input(const View& view, int64_t head, int64_t i, int64_t j) const {
    return read(view, p.dtype, b, head, i, j);
  }
  double number(const View& view, int64_t i, int64_t j) const { return read(view, real(), b, h, i, j); }
  Dtype real() const { return p.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }
  int64_t kv_head() const { return h / (p.heads_q / p.heads_kv); }
  bool live(int64_t j) const { return !p.key_mask.data || read(p.key_mask, Dtype::kBool, b, 0, j, 0) != 0; }

  double element(const void* array, int64_t i) const {
    return real() == Dtype::kFloat64 ? static_cast<const double*>(array)[i] : static_cast<const float*>(array)[i];
  }
  double weight(int64_t m, int64_t k) const {
    return p.projection ? element(p.projection, m * p.head_dim + k) : m == k;
  }

  // f(W x), of softmax features W x + bias.
  Numbers features(const Numbers& x) const {
    Numbers found;
    for (int64_t m = 0; m < p.features; ++m) {
      double sum = p.feature_bias ? element(p.feature_bias, m) : 0;
      for (int64_t k = 0; k < p.head_dim; ++k) sum += weight(m, k) * x[size_t(k)];
      if (p.feature == Feature::kElu) sum = sum > 0 ? sum + 1 : std::exp(sum);
      if (p.feature == Feature::kRelu) sum = (sum > 0 ? sum : 0) + p.feature_eps;
      found.push_back(sum);
    }
    return found;
  }

  // The gradient of x from that of its features.
  Numbers through(const Numbers& grad, const Numbers& feature, const Numbers& x, bool is_key) const {
    Numbers found(size_t(p.head_dim), 0.0);
    for (size_t m = 0; m < grad.size(); ++m) {
      double slope = 1;
      if (p.feature == Feature::kElu) slope = feature[m] > 1 ? 1 : feature[m];
      if (p.feature == Feature::kRelu) slope = feature[m] > p.feature_eps;
      if (p.feature == Feature::kSoftmax) slope = feature[m];
      for (size_t k = 0; k < found.size(); ++k) {
        found[k] += grad[m] * slope * weight(int64_t(m), int64_t(k));
        if (p.feature == Feature::kSoftmax && is_key) found[k] -= grad[m] * slope * p.scale * x[k];
      }
    }
    return found;
  }

  // phi, psi, and by how much each step multiplies each row of the state.
  void load_features() {
    const bool softmax = p.feature == Feature::kSoftmax;
    for (int64_t i = 0; i < queries; ++i) {
      query.emplace_back();
      for (int64_t k = 0; k < p.head_dim; ++k) query.back().push_back(input(p.query, h, i, k));
      phi.push_back(features(query.back()));
      if (!softmax) continue;
      double top = -HUGE_VAL;
      for (double x : phi.back()) top = std::fmax(top, x);
      for (double& x : phi.back()) x = std::exp(x - top);
    }
    c = p.initial_log_scale.data ? number(p.initial_log_scale, 0, 0) : -HUGE_VAL;
    const double first_c = c;
    Numbers maxima;
    for (int64_t j = 0; j < keys; ++j) {
      key.emplace_back();
      for (int64_t k = 0; k < p.head_dim; ++k) key.back().push_back(live(j) ? input(p.key, kv_head(), j, k) : 0);
      psi.push_back(features(key.back()));
      double square = 0;
      for (double x : key.back()) square += x * x;
      if (softmax)
        for (double& x : psi.back()) {
          x -= p.scale / 2 * square;
          if (live(j)) c = std::fmax(c, x);
        }
      maxima.push_back(c);
    }
    start = first_c == -HUGE_VAL || p.causal ? 1 : std::exp(first_c - c);
    double before = first_c;
    for (int64_t j = 0; j < keys; ++j) {
      const double now = p.causal ? maxima[size_t(j)] : c;
      for (double& x : psi[size_t(j)]) x = !live(j) ? 0 : softmax ? std::exp(x - now) : x;
      factor.emplace_back();
      for (int64_t m = 0; m < p.features; ++m) {
        double log = 0;
        if (p.decay.data && live(j)) log += number(p.decay, j, p.vector_decay ? m : 0);
        if (softmax && p.causal && before > -HUGE_VAL) log += before - now;
        factor.back().push_back(std::exp(log));
      }
      before = now;
    }
  }

  // S as rows of M with Dv numbers and z after them.
  size_t at(int64_t m, int64_t v) const { return size_t(m * (p.head_dim_v + 1) + v); }
  double value(int64_t j, int64_t v) const {
    return !live(j) ? 0 : v == p.head_dim_v ? 1 : input(p.value, kv_head(), j, v);
  }

  // What the delta rule's state does not yet recall of a step's value, S after the step's decay.
  Numbers error(int64_t j, const Numbers& state) const {
    Numbers found;
    for (int64_t v = 0; v < p.head_dim_v; ++v) {
      found.push_back(value(j, v));
      for (int64_t m = 0; m < p.features; ++m) found.back() -= psi[size_t(j)][size_t(m)] * state[at(m, v)];
    }
    return found;
  }

  void forward() {
    Numbers state(at(p.features, 0), 0.0);
    for (int64_t m = 0; m < p.features; ++m) {
      for (int64_t v = 0; v < p.head_dim_v && p.initial_kv.data; ++v)
        state[at(m, v)] = start * number(p.initial_kv, m, v);
      if (p.initial_normalizer.data) state[at(m, p.head_dim_v)] = start * number(p.initial_normalizer, 0, m);
    }
    states.push_back(state);
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t m = 0; m < p.features; ++m)
        for (int64_t v = 0; v <= p.head_dim_v; ++v) state[at(m, v)] *= factor[size_t(j)][size_t(m)];
      written.emplace_back();
      for (int64_t v = 0; v <= p.head_dim_v; ++v) written.back().push_back(value(j, v));
      if (p.beta.data) {
        written.back() = errors.emplace_back(error(j, state));
        for (double& x : written.back()) x *= number(p.beta, j, 0);
        written.back().push_back(0);
      }
      for (int64_t m = 0; m < p.features; ++m)
        for (int64_t v = 0; v <= p.head_dim_v; ++v)
          state[at(m, v)] += psi[size_t(j)][size_t(m)] * written.back()[size_t(v)];
      states.push_back(state);
    }
    for (int64_t i = 0; i < queries; ++i) {
      const Numbers& seen = states[size_t(p.causal ? i + 1 : keys)];
      Numbers sum(size_t(p.head_dim_v + 1), 0.0);
      for (int64_t m = 0; m < p.features; ++m)
        for (size_t v = 0; v < sum.size(); ++v) sum[v] += phi[size_t(i)][size_t(m)] * seen[at(m, int64_t(v))];
      denominator.push_back(sum.back());
      quotient.push_back(!p.normalize ? p.scale : sum.back() == 0 ? 0 : 1 / sum.back());
      sum.pop_back();
      for (double& x : sum) x *= quotient.back();
      out.push_back(sum);
    }
  }

  void backward() {
    Numbers grad(at(p.features, 0), 0.0);
    for (int64_t m = 0; m < p.features; ++m) {
      for (int64_t v = 0; v < p.head_dim_v && p.grad_kv.data; ++v) grad[at(m, v)] = number(p.grad_kv, m, v);
      if (p.grad_normalizer.data) grad[at(m, p.head_dim_v)] = number(p.grad_normalizer, 0, m);
    }
    grad_query.resize(size_t(queries));
    grad_key.resize(size_t(keys));
    grad_value.resize(size_t(keys));
    grad_decay.resize(size_t(keys));
    for (int64_t i = 0; i < queries && !p.causal; ++i) read_query(i, states.back(), grad);
    for (int64_t j = keys - 1; j >= 0; --j) {
      if (p.causal) read_query(j, states[size_t(j + 1)], grad);
      Numbers grad_psi, grad_v(size_t(p.head_dim_v), 0.0);
      for (int64_t m = 0; m < p.features; ++m)
        for (size_t v = 0; v < grad_v.size(); ++v)
          grad_v[v] += grad[at(m, int64_t(v))] * psi[size_t(j)][size_t(m)];
      grad_beta.push_back(0);
      for (size_t v = 0; v < grad_v.size() && p.beta.data; ++v) {
        grad_beta.back() += grad_v[v] * errors[size_t(j)][v];
        grad_v[v] *= number(p.beta, j, 0);
      }
      for (int64_t m = 0; m < p.features; ++m) {
        const double kept = factor[size_t(j)][size_t(m)];
        double sum = 0, decay = 0;
        for (int64_t v = 0; v <= p.head_dim_v; ++v) {
          const double before = kept * states[size_t(j)][at(m, v)];
          sum += grad[at(m, v)] * written[size_t(j)][size_t(v)];
          if (p.beta.data && v < p.head_dim_v) {
            sum -= grad_v[size_t(v)] * before;
            grad[at(m, v)] -= grad_v[size_t(v)] * psi[size_t(j)][size_t(m)];
          }
          decay += grad[at(m, v)] * before;
          grad[at(m, v)] *= kept;
        }
        grad_psi.push_back(sum);
        grad_decay[size_t(j)].push_back(live(j) ? decay : 0);
      }
      grad_key[size_t(j)] = through(grad_psi, psi[size_t(j)], key[size_t(j)], true);
      grad_value[size_t(j)] = grad_v;
      if (!live(j)) grad_key[size_t(j)].assign(size_t(p.head_dim), 0.0);
    }
    std::reverse(grad_beta.begin(), grad_beta.end());
    for (double& x : grad) x *= start;
    grad_initial = grad;
  }

  void read_query(int64_t i, const Numbers& seen, Numbers& grad) {
    Numbers grad_out, grad_phi;
    double delta = 0;
    for (int64_t v = 0; v < p.head_dim_v; ++v) {
      grad_out.push_back(input(p.grad_out, h, i, v) * quotient[size_t(i)]);
      delta -= grad_out.back() * out[size_t(i)][size_t(v)];
    }
    grad_out.push_back(p.normalize ? delta : 0);
    for (int64_t m = 0; m < p.features; ++m) {
      double sum = 0;
      for (int64_t v = 0; v <= p.head_dim_v; ++v) {
        sum += grad_out[size_t(v)] * seen[at(m, v)];
        grad[at(m, v)] += phi[size_t(i)][size_t(m)] * grad_out[size_t(v)];
      }
      grad_phi.push_back(sum);
    }
    grad_query[size_t(i)] = through(grad_phi, phi[size_t(i)], query[size_t(i)], false);
  }

  const LinearParams& p;
  const int64_t b, h;
  int64_t queries = 0, keys = 0;
  double c = 0, start = 1;
  std::vector<Numbers> query, key, phi, psi, factor, states, written, errors, out;
  std::vector<Numbers> grad_query, grad_key, grad_value, grad_decay;
  Numbers denominator, quotient, grad_beta, grad_initial;
};

double tolerance(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return 1e-4;
    case Dtype::kFloat64: return 1e-10;
    case Dtype::kBFloat16: return 4e-2;
    default: return 5e-3;
  }
}

class Case {
 public:
  explicit Case(uint64_t seed) : random_(seed), seed_(seed) {
    draw_shape();
    draw_inputs();
    draw_results();
  }

  void check() {
    run(int(random_.integer(1, 4)));
    compare();
    const std::string first = bits();
    run(int(random_.integer(1, 4)));
    CHECK(bits() == first, "another run, other bits: %s", text().c_str());
  }

 private:
  void draw_shape() {
    const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat64};
    p_.dtype = dtypes[random_.integer(0, 3)];
    real_ = p_.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    p_.feature = Feature(random_.integer(0, 3));
    p_.causal = random_.chance(0.7);
    p_.normalize = p_.feature == Feature::kSoftmax || (p_.feature != Feature::kIdentity && random_.chance(0.6));
    p_.batch = random_.integer(1, 2);
    p_.heads_kv = random_.integer(1, 2);
    p_.heads_q = p_.heads_kv * random_.integer(1, 2);
    const auto length = [&] { return random_.chance(0.5) ? random_.integer(1, 20) : random_.integer(1, 210); };
    const auto width = [&] { return random_.chance(0.3) ? 16 : random_.integer(1, 37); };
    p_.seqlen_q = p_.seqlen_k = length();
    p_.head_dim = p_.features = width();
    p_.head_dim_v = width();
    if (p_.causal && random_.chance(0.3)) {
      first_.assign(1, 0);
      for (int64_t b = 0; b < p_.batch; ++b)
        first_.push_back(first_.back() + int32_t(random_.chance(0.1) ? 0 : random_.integer(1, p_.seqlen_k)));
    } else if (!p_.causal) {
      p_.seqlen_q = length();
    }
    delta_ = p_.feature == Feature::kIdentity && p_.causal && random_.chance(0.6);
    const bool projected = !delta_ && (p_.feature == Feature::kSoftmax || random_.chance(0.2));
    if (projected) {
      p_.features = width();
      projection_ = Tensor(random_, real_, 1, 1, 1, p_.features * p_.head_dim);
      projection_.fill([&] { return random_.normal() / 2; });
      p_.projection = projection_.view.data;
    }
    if (p_.feature == Feature::kSoftmax && random_.chance(0.5)) {
      bias_ = Tensor(random_, real_, 1, 1, 1, p_.features);
      bias_.fill([&] { return random_.normal(); });
      p_.feature_bias = bias_.view.data;
    }
    p_.feature_eps = p_.feature == Feature::kRelu ? 0.01 : 0;
    p_.scale = 0.2 + random_.uniform();
    p_.vector_decay = p_.causal && !projected && !delta_ && random_.chance(0.3);
  }

  const int32_t* first() const { return first_.empty() ? nullptr : first_.data(); }
  Tensor rows(Dtype dtype, int64_t heads, int64_t length, int64_t columns) {
    return Tensor(random_, dtype, p_.batch, heads, length, columns, first());
  }
  Tensor state(int64_t length, int64_t columns) {
    return Tensor(random_, real_, p_.batch, p_.heads_q, length, columns);
  }
  int64_t decays() const { return p_.vector_decay ? p_.features : 1; }

  void draw_inputs() {
    const auto normal = [&] { return random_.normal(); };
    query_ = rows(p_.dtype, p_.heads_q, p_.seqlen_q, p_.head_dim);
    key_ = rows(p_.dtype, p_.heads_kv, p_.seqlen_k, p_.head_dim);
    value_ = rows(p_.dtype, p_.heads_kv, p_.seqlen_k, p_.head_dim_v);
    for (Tensor* input : {&query_, &key_, &value_}) input->fill(normal);
    if (p_.vector_decay || (p_.causal && random_.chance(0.5))) {
      const double strength = random_.chance(0.2) ? 30 : 0.3;
      decay_ = rows(real_, p_.heads_q, p_.seqlen_k, decays());
      decay_.fill([&] { return -strength * random_.uniform(); });
      p_.decay = decay_.view;
    }
    if (delta_) {
      key_.fill([&] { return random_.normal() / std::sqrt(double(p_.head_dim)); });  // the state does not grow
      beta_ = rows(real_, p_.heads_q, p_.seqlen_k, 1);
      beta_.fill([&] { return random_.uniform(); });
      p_.beta = beta_.view;
    }
    if (random_.chance(0.4)) {
      mask_ = Tensor(random_, Dtype::kBool, p_.batch, 1, p_.seqlen_k, 1, first());
      mask_.fill([&] { return random_.chance(0.7) ? 1.0 : 0.0; });
      p_.key_mask = mask_.view;
      for (int64_t b = 0; b < p_.batch; ++b)
        for (int64_t j = 0; j < rows_of(mask_.view, b, p_.seqlen_k); ++j)
          for (int64_t h = 0; h < p_.heads_kv; ++h)
            if (read(mask_.view, Dtype::kBool, b, 0, j, 0) == 0) {
              key_.poison_row(b, h, j);
              value_.poison_row(b, h, j);
            }
    }
    if (random_.chance(0.4)) {
      initial_kv_ = state(p_.features, p_.head_dim_v);
      initial_kv_.fill(normal);
      p_.initial_kv = initial_kv_.view;
      if (p_.normalize) {
        initial_z_ = state(1, p_.features);
        initial_z_.fill([&] { return 0.5 + random_.uniform(); });
        p_.initial_normalizer = initial_z_.view;
      }
      if (p_.feature == Feature::kSoftmax) {
        initial_c_ = state(1, 1);
        initial_c_.fill(normal);
        p_.initial_log_scale = initial_c_.view;
      }
    }
    p_.query = query_.view;
    p_.key = key_.view;
    p_.value = value_.view;
    grad_out_ = rows(p_.dtype, p_.heads_q, p_.seqlen_q, p_.head_dim_v);
    grad_out_.fill(normal);
    p_.grad_out = grad_out_.view;
    if (random_.chance(0.4)) {
      grad_kv_ = state(p_.features, p_.head_dim_v);
      grad_kv_.fill(normal);
      p_.grad_kv = grad_kv_.view;
      if (p_.normalize) {
        grad_z_ = state(1, p_.features);
        grad_z_.fill(normal);
        p_.grad_normalizer = grad_z_.view;
      }
    }
  }

  void draw_results() {
    const auto give = [&](Tensor& tensor, View& view, Tensor made) {
      tensor = std::move(made);
      view = tensor.view;
    };
    give(out_, p_.out, rows(p_.dtype, p_.heads_q, p_.seqlen_q, p_.head_dim_v));
    if (p_.normalize) give(denominator_, p_.denominator, rows(real_, p_.heads_q, p_.seqlen_q, 1));
    give(kv_, p_.final_kv, state(p_.features, p_.head_dim_v));
    if (p_.normalize) give(z_, p_.final_normalizer, state(1, p_.features));
    if (p_.feature == Feature::kSoftmax) give(c_, p_.final_log_scale, state(1, 1));
    give(grad_query_, p_.grad_query, rows(p_.dtype, p_.heads_q, p_.seqlen_q, p_.head_dim));
    give(grad_key_, p_.grad_key, rows(p_.dtype, p_.heads_q, p_.seqlen_k, p_.head_dim));
    give(grad_value_, p_.grad_value, rows(p_.dtype, p_.heads_q, p_.seqlen_k, p_.head_dim_v));
    if (p_.decay.data) give(grad_decay_, p_.grad_decay, rows(real_, p_.heads_q, p_.seqlen_k, decays()));
    if (delta_) give(grad_beta_, p_.grad_beta, rows(real_, p_.heads_q, p_.seqlen_k, 1));
    if (p_.initial_kv.data) give(grad_initial_kv_, p_.grad_initial_kv, state(p_.features, p_.head_dim_v));
    if (p_.initial_normalizer.data) give(grad_initial_z_, p_.grad_initial_normalizer, state(1, p_.features));
  }

  void run(int threads) {
    p_.threads = threads;
    const Kernels& kernels = kernels_in_use();
    {
      const auto scratch = poisoned(size_t(kernels.linear_forward_scratch(p_)));
      p_.scratch = scratch.get();
      kernels.linear_forward(p_);
    }
    const auto scratch = poisoned(size_t(kernels.linear_backward_scratch(p_)));
    p_.scratch = scratch.get();
    kernels.linear_backward(p_);
  }

  void compare() {
    std::vector<HeadOracle> heads;
    for (int64_t b = 0; b < p_.batch; ++b)
      for (int64_t h = 0; h < p_.heads_q; ++h) heads.emplace_back(p_, b, h);
    const auto with = [&](const char* name, const Tensor& got, Dtype dtype, auto expected) {
      double largest = 0, error = 0;
      got.for_each_element([&](int64_t b, int64_t h, int64_t i, int64_t j) {
        const double want = expected(heads[size_t(b * p_.heads_q + h)], size_t(i), size_t(j));
        const double have = read(got.view, dtype, b, h, i, j);
        if (have == want) return;  // infinities too
        largest = std::fmax(largest, std::fabs(want));
        error = std::isfinite(have - want) ? std::fmax(error, std::fabs(have - want)) : HUGE_VAL;
      });
      CHECK(error <= tolerance(dtype) * (1 + largest), "%s: error %g, largest %g: %s", name, error, largest,
            text().c_str());
      CHECK(got.untouched() == got.size() - got.elements(), "%s: writes outside, or not all: %s", name, text().c_str());
    };
    typedef const HeadOracle& Head;
    with("out", out_, p_.dtype, [](Head o, size_t i, size_t j) { return o.out[i][j]; });
    with("denominator", denominator_, real_, [](Head o, size_t i, size_t) { return o.denominator[i]; });
    with("kv", kv_, real_, [](Head o, size_t i, size_t j) { return o.states.back()[o.at(int64_t(i), int64_t(j))]; });
    with("normalizer", z_, real_,
         [](Head o, size_t, size_t j) { return o.states.back()[o.at(int64_t(j), o.p.head_dim_v)]; });
    with("log_scale", c_, real_, [](Head o, size_t, size_t) { return o.c; });
    with("grad_query", grad_query_, p_.dtype, [](Head o, size_t i, size_t j) { return o.grad_query[i][j]; });
    with("grad_key", grad_key_, p_.dtype, [](Head o, size_t i, size_t j) { return o.grad_key[i][j]; });
    with("grad_value", grad_value_, p_.dtype, [](Head o, size_t i, size_t j) { return o.grad_value[i][j]; });
    with("grad_decay", grad_decay_, real_, [&](Head o, size_t i, size_t j) {
      if (p_.vector_decay) return o.grad_decay[i][j];
      double sum = 0;
      for (double x : o.grad_decay[i]) sum += x;
      return sum;
    });
    with("grad_beta", grad_beta_, real_, [](Head o, size_t i, size_t) { return o.grad_beta[i]; });
    with("grad_initial_kv", grad_initial_kv_, real_,
         [](Head o, size_t i, size_t j) { return o.grad_initial[o.at(int64_t(i), int64_t(j))]; });
    with("grad_initial_normalizer", grad_initial_z_, real_,
         [](Head o, size_t, size_t j) { return o.grad_initial[o.at(int64_t(j), o.p.head_dim_v)]; });
  }

  std::string bits() const {
    std::string all;
    for (const Tensor* result : {&out_, &denominator_, &kv_, &z_, &c_, &grad_query_, &grad_key_, &grad_value_,
                                 &grad_decay_, &grad_beta_, &grad_initial_kv_, &grad_initial_z_})
      if (result->size() > 0) all += result->bits();
    return all;
  }

  std::string text() const {
    const char* features[] = {"identity", "elu", "relu", "softmax"};
    char line[300];
    std::snprintf(line, sizeof line,
                  "linear seed %llu, %s, dtype %d, %s%s, batch %d, heads %d/%d, lengths %d/%d, D %d, Dv %d, M %d"
                  "%s%s%s%s%s",
                  (unsigned long long)seed_, kernels_in_use().isa, int(p_.dtype), features[int(p_.feature)],
                  p_.causal ? " causal" : "", int(p_.batch), int(p_.heads_q), int(p_.heads_kv), int(p_.seqlen_q),
                  int(p_.seqlen_k), int(p_.head_dim), int(p_.head_dim_v), int(p_.features),
                  p_.normalize ? ", normalized" : delta_ ? ", delta rule" : "",
                  p_.decay.data ? p_.vector_decay ? ", vector decay" : ", decay" : "",
                  p_.key_mask.data ? ", masked" : "", first() ? ", packed" : "", p_.initial_kv.data ? ", state" : "");
    return line;
  }

  Random random_;
  const uint64_t seed_;
  LinearParams p_;
  Dtype real_ = Dtype::kFloat32;
  bool delta_ = false;
  std::vector<int32_t> first_;
  Tensor query_, key_, value_, decay_, beta_, mask_, projection_, bias_, initial_kv_, initial_z_, initial_c_;
  Tensor grad_out_, grad_kv_, grad_z_;
  Tensor out_, denominator_, kv_, z_, c_;
  Tensor grad_query_, grad_key_, grad_value_, grad_decay_, grad_beta_, grad_initial_kv_, grad_initial_z_;
};

}  // namespace

void test_linear(uint64_t seed, int problems) {
  for (const std::string& isa : runnable_isas()) {
    set_isa(isa);
    for (int i = 0; i < problems; ++i) Case(seed + uint64_t(i)).check();
    std::printf("%s: %d problems of linear attention\n", isa.c_str(), problems);
    std::fflush(stdout);
  }
}

}  // namespace tests
}  // namespace fastattn
