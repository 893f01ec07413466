// New keys and values into a KV cache, with rotary position embeddings on the way (Su et al., arXiv:2104.09864).
#pragma once

#include "../append_params.h"
#include "numeric.h"
#include "work.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class Real>
class Append {
 public:
  explicit Append(const AppendParams& p)
      : p_(p), new_rows_(p.batch * p.heads_kv * p.seqlen_new),
        query_rows_(p.rotary_dim ? p.batch * p.heads_q * p.seqlen_q : 0) {}

  void run() const {
    const int64_t rows = new_rows_ + query_rows_, elements = rows * (p_.head_dim + p_.head_dim_v);
    constexpr int64_t worth_a_thread = 1 << 15;  // some ten microseconds
    const int threads = int(max64(1, min64(p_.threads, elements / worth_a_thread)));
    for_each(threads, rows, [&](int64_t i, int) { i < new_rows_ ? append(i) : turn_query(i - new_rows_); });
  }

 private:
  void append(int64_t i) const {
    const int64_t s = i % p_.seqlen_new, h = i / p_.seqlen_new % p_.heads_kv, b = i / p_.seqlen_new / p_.heads_kv;
    const int64_t position = p_.key_lengths[b] + s;
    const bool paged = p_.block_table != nullptr;
    const int64_t page = paged ? p_.block_table[b * p_.block_table_stride + position / p_.page_size] : b;
    const int64_t row = paged ? position % p_.page_size : position;
    Real x[kMaxHeadDim];
    read_row(x, element(p_.key, p_.dtype, b, h, s), p_.dtype, p_.head_dim);
    turn(x, position);
    write(p_.key_cache, page, h, row, x, p_.head_dim);
    read_row(x, element(p_.value, p_.dtype, b, h, s), p_.dtype, p_.head_dim_v);
    write(p_.value_cache, page, h, row, x, p_.head_dim_v);
  }

  void turn_query(int64_t i) const {
    const int64_t s = i % p_.seqlen_q, h = i / p_.seqlen_q % p_.heads_q, b = i / p_.seqlen_q / p_.heads_q;
    Real x[kMaxHeadDim];
    read_row(x, element(p_.query, p_.dtype, b, h, s), p_.dtype, p_.head_dim);
    turn(x, p_.key_lengths[b] + p_.seqlen_new - p_.seqlen_q + s);
    write(p_.rotated, b, h, s, x, p_.head_dim);
  }

  void turn(Real* x, int64_t position) const {
    const int64_t half = p_.rotary_dim / 2, step = p_.interleaved ? 2 : 1, apart = p_.interleaved ? 1 : half;
    if (half == 0) return;
    Real cos[kMaxHeadDim / 2], sin[kMaxHeadDim / 2];
    read(cos, p_.cos, position, half);
    read(sin, p_.sin, position, half);
    for (int64_t c = 0; c < half; ++c) {
      const Real first = x[c * step], second = x[c * step + apart];
      x[c * step] = first * cos[c] - second * sin[c];
      x[c * step + apart] = second * cos[c] + first * sin[c];
    }
  }

  void read(Real* to, const View& table, int64_t position, int64_t count) const {
    const char* row = element(table, p_.table_dtype, 0, 0, position);
    const int64_t size = element_size(p_.table_dtype), stride = table.stride[3];
    if (stride == 1) return read_row(to, row, p_.table_dtype, count);
    for (int64_t c = 0; c < count; ++c) read_row(to + c, row + c * stride * size, p_.table_dtype, 1);
  }

  void write(const View& to, int64_t b, int64_t h, int64_t row, const Real* x, int64_t columns) const {
    char* place = mutable_element(to, p_.dtype, b, h, row);
    const int64_t size = element_size(p_.dtype), stride = to.stride[3];
    if (stride == 1) return write_row(place, p_.dtype, x, Real(1), columns);
    for (int64_t c = 0; c < columns; ++c) write_row(place + c * stride * size, p_.dtype, x + c, Real(1), 1);
  }

  const AppendParams& p_;
  const int64_t new_rows_, query_rows_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
