#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "blocks.h"

#define FASTATTN_ISA_NAMESPACE core_tests
#include "../cpu/numeric.h"

namespace fastattn {
namespace tests {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

int64_t queries_of(const DenseParams& p, int64_t b) { return rows_of(p.query, b, p.seqlen_q); }
int64_t keys_of(const DenseParams& p, int64_t b) { return rows_of(p.key, b, p.seqlen_k); }

int64_t position(const DenseParams& p, int64_t b, int64_t i) {
  return i + p.query_offset + (p.query_start ? p.query_start[b] : 0) +
         (p.align_ends ? keys_of(p, b) - queries_of(p, b) : 0);
}

// Word j % 4 of Philox4x32-10 at (j / 4, i, head, offset).
uint32_t philox(uint64_t seed, uint32_t offset, uint32_t head, uint32_t i, uint32_t j) {
  uint32_t c[4] = {j / 4, i, head, offset}, k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k[1],
                              uint32_t(a)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return c[j % 4];
}

double kept(const DenseParams& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (!p.rng) return 1;
  if (p.dropout_p == 1) return 0;
  const uint32_t head = uint32_t(b * p.heads_q + h);
  const uint32_t word = philox(uint64_t(p.rng[0]), uint32_t(p.rng[1]), head, uint32_t(i), uint32_t(j));
  return word >= std::floor(p.dropout_p * 4294967296.0) ? 1 / (1 - p.dropout_p) : 0;
}

// Row `row` of key or value, wherever it is.
std::vector<double> key_row(const DenseParams& p, const View& view, int64_t b, int64_t h, int64_t j, int64_t columns) {
  std::vector<double> row(size_t(columns), 0.0);
  const int64_t from = p.block_table ? p.block_table[b * p.block_table_stride + j / p.page_size] : b;
  for (int64_t c = 0; c < columns; ++c)
    row[size_t(c)] = read(view, p.dtype, from, h, p.block_table ? j % p.page_size : j, c);
  return row;
}

std::vector<double> row_of(const View& view, Dtype dtype, int64_t b, int64_t h, int64_t i, int64_t columns) {
  std::vector<double> row(size_t(columns), 0.0);
  for (int64_t c = 0; c < columns; ++c) row[size_t(c)] = read(view, dtype, b, h, i, c);
  return row;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}

void add(double* to, double factor, const std::vector<double>& row) {
  for (size_t c = 0; c < row.size(); ++c) to[c] += factor * row[c];
}

}  // namespace

double read(const View& view, Dtype dtype, int64_t b, int64_t h, int64_t i, int64_t j) {
  const int64_t at = row_offset(view, b, h, i) + j * view.stride[3];
  switch (dtype) {
    case Dtype::kFloat32: return static_cast<const float*>(view.data)[at];
    case Dtype::kFloat64: return static_cast<const double*>(view.data)[at];
    case Dtype::kBFloat16: return core_tests::bfloat16_to_float(static_cast<const uint16_t*>(view.data)[at]);
    case Dtype::kFloat16: return core_tests::float16_to_float(static_cast<const uint16_t*>(view.data)[at]);
    case Dtype::kBool: return static_cast<const char*>(view.data)[at];
  }
  return 0;
}

void write(const View& view, Dtype dtype, int64_t b, int64_t h, int64_t i, int64_t j, double x) {
  const int64_t at = row_offset(view, b, h, i) + j * view.stride[3];
  switch (dtype) {
    case Dtype::kFloat32: static_cast<float*>(view.data)[at] = float(x); break;
    case Dtype::kFloat64: static_cast<double*>(view.data)[at] = x; break;
    case Dtype::kBFloat16: static_cast<uint16_t*>(view.data)[at] = core_tests::float_to_bfloat16(float(x)); break;
    case Dtype::kFloat16: static_cast<uint16_t*>(view.data)[at] = core_tests::float_to_float16(float(x)); break;
    case Dtype::kBool: static_cast<char*>(view.data)[at] = x != 0; break;
  }
}

bool in_reach(const DenseParams& p, int64_t b, int64_t i, int64_t j) {
  const int64_t at = position(p, b, i);
  return (!p.key_start || j >= p.key_start[b]) && (!p.key_lengths || j < p.key_lengths[b]) &&
         (p.window_left == DenseParams::kUnlimited || j >= at - p.window_left) &&
         (p.window_right == DenseParams::kUnlimited || j <= at + p.window_right);
}

Answer oracle(const DenseParams& p, int64_t mask_size) {
  const Dtype real = p.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const auto query_at = [&](int64_t b, int64_t h, int64_t i) { return (b * p.heads_q + h) * p.seqlen_q + i; };
  const auto key_at = [&](int64_t b, int64_t h, int64_t j) { return (b * p.heads_kv + h) * p.seqlen_k + j; };
  const int64_t queries = query_at(p.batch, 0, 0), keys = key_at(p.batch, 0, 0);
  const auto zeros = [](int64_t count) { return std::vector<double>(size_t(count), 0.0); };
  Answer answer;
  answer.out = zeros(queries * p.head_dim_v);
  answer.lse = zeros(queries);
  answer.grad_query = zeros(queries * p.head_dim);
  answer.grad_key = zeros(keys * p.head_dim);
  answer.grad_value = zeros(keys * p.head_dim_v);
  answer.grad_sinks = zeros(p.heads_q);
  answer.grad_mask = zeros(mask_size);

  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads_q; ++h) {
      const int64_t kv = h / (p.heads_q / p.heads_kv), count = keys_of(p, b);
      std::vector<std::vector<double>> key(static_cast<size_t>(count)), value(static_cast<size_t>(count));
      for (int64_t i = 0; i < queries_of(p, b); ++i) {
        const std::vector<double> query = row_of(p.query, p.dtype, b, h, i, p.head_dim);
        std::vector<double> score(size_t(count), -kInfinity), derivative(size_t(count), 1.0);
        const double sink = p.sinks.data ? read(p.sinks, real, 0, h, 0, 0) : -kInfinity;
        double highest = sink;
        for (int64_t j = 0; j < count; ++j) {
          const size_t at = size_t(j);
          if (!in_reach(p, b, i, j) || !mask_keeps(p, b, h, i, j)) continue;
          const double mask = p.attn_mask.data ? read(p.attn_mask, p.mask_dtype, b, h, i, j) : 1;
          if (p.attn_mask.data && (p.mask_dtype == Dtype::kBool ? mask == 0 : mask == -kInfinity)) continue;
          if (key[at].empty()) {
            key[at] = key_row(p, p.key, b, kv, j, p.head_dim);
            value[at] = key_row(p, p.value, b, kv, j, p.head_dim_v);
          }
          double s = p.scale * dot(query, key[at]);
          if (p.softcap > 0) {
            const double t = std::tanh(s / p.softcap);
            s = p.softcap * t;
            derivative[at] = 1 - t * t;
          }
          if (p.alibi_slopes.data)
            s -= read(p.alibi_slopes, real, b, h, 0, 0) * double(std::abs(position(p, b, i) - j));
          if (p.attn_mask.data && p.mask_dtype != Dtype::kBool) s += mask;
          score[at] = s;
          highest = std::max(highest, s);
        }
        double total = highest == -kInfinity ? 0 : std::exp(sink - highest);
        for (const double s : score)
          if (s > -kInfinity) total += std::exp(s - highest);
        const double lse = total > 0 ? highest + std::log(total) : -kInfinity;
        answer.lse[size_t(query_at(b, h, i))] = lse;
        for (int64_t j = 0; j < count; ++j)
          if (score[size_t(j)] > -kInfinity)
            add(&answer.out[size_t(query_at(b, h, i) * p.head_dim_v)],
                kept(p, b, h, i, j) * std::exp(score[size_t(j)] - lse), value[size_t(j)]);
        if (!p.grad_out.data || lse == -kInfinity) continue;

        const std::vector<double> grad_out = row_of(p.grad_out, p.dtype, b, h, i, p.head_dim_v);
        double delta = p.grad_lse.data ? -read(p.grad_lse, real, b, h, i, 0) : 0;
        std::vector<double> grad_prob(size_t(count), 0.0);
        for (int64_t j = 0; j < count; ++j) {
          if (score[size_t(j)] == -kInfinity) continue;
          grad_prob[size_t(j)] = kept(p, b, h, i, j) * dot(grad_out, value[size_t(j)]);
          delta += std::exp(score[size_t(j)] - lse) * grad_prob[size_t(j)];
        }
        for (int64_t j = 0; j < count; ++j) {
          const size_t at = size_t(j);
          if (score[at] == -kInfinity) continue;
          const double prob = std::exp(score[at] - lse), ds = prob * (grad_prob[at] - delta);
          add(&answer.grad_value[size_t(key_at(b, kv, j) * p.head_dim_v)], kept(p, b, h, i, j) * prob, grad_out);
          add(&answer.grad_query[size_t(query_at(b, h, i) * p.head_dim)], p.scale * ds * derivative[at], key[at]);
          add(&answer.grad_key[size_t(key_at(b, kv, j) * p.head_dim)], p.scale * ds * derivative[at], query);
          if (p.grad_mask.data) {
            const int64_t* stride = p.grad_mask.stride;
            answer.grad_mask[size_t(b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3])] += ds;
          }
        }
        if (p.sinks.data) answer.grad_sinks[size_t(h)] -= std::exp(sink - lse) * delta;
      }
    }
  return answer;
}

}  // namespace tests
}  // namespace fastattn
