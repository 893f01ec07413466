// Random appends to caches, contiguous and paged, with and without rotary, against the formulas in double.
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

class Case {
 public:
  explicit Case(uint64_t seed) : random_(seed), seed_(seed) {
    const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat64};
    p_.dtype = dtypes[random_.integer(0, 3)];
    p_.batch = random_.integer(1, 3);
    p_.heads_kv = random_.integer(1, 3);
    p_.heads_q = p_.heads_kv * random_.integer(1, 3);
    p_.seqlen_q = random_.integer(1, 5);
    p_.seqlen_new = random_.integer(p_.seqlen_q, 9);
    p_.head_dim = random_.chance(0.1) ? 256 : random_.integer(1, 70);
    p_.head_dim_v = random_.integer(1, 70);
    p_.threads = int32_t(random_.integer(1, 4));
    const int64_t capacity = draw_places();
    for (int64_t b = 0; b < p_.batch; ++b) lengths_.push_back(int32_t(random_.integer(0, capacity - p_.seqlen_new)));
    p_.key_lengths = lengths_.data();
    key_ = Tensor(random_, p_.dtype, p_.batch, p_.heads_kv, p_.seqlen_new, p_.head_dim);
    value_ = Tensor(random_, p_.dtype, p_.batch, p_.heads_kv, p_.seqlen_new, p_.head_dim_v);
    key_.fill([&] { return random_.normal(); });
    value_.fill([&] { return random_.normal(); });
    p_.key = key_.view;
    p_.value = value_.view;
    if (random_.chance(0.7)) draw_rotary(capacity);
  }

  void check() {
    kernels_in_use().append(p_);
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t h = 0; h < p_.heads_kv; ++h)
        for (int64_t s = 0; s < p_.seqlen_new; ++s) {
          const int64_t at = lengths_[size_t(b)] + s;
          const int64_t page = p_.block_table ? table_[size_t(b * p_.block_table_stride + at / p_.page_size)] : b;
          const int64_t row = p_.block_table ? at % p_.page_size : at;
          compare(key_cache_.view, page, h, row, turned(p_.key, b, h, s, at));
          compare(value_cache_.view, page, h, row, row_of(p_.value, b, h, s, p_.head_dim_v));
        }
      for (int64_t h = 0; p_.rotary_dim && h < p_.heads_q; ++h)
        for (int64_t i = 0; i < p_.seqlen_q; ++i)
          compare(p_.rotated, b, h, i,
                  turned(p_.query, b, h, i, lengths_[size_t(b)] + p_.seqlen_new - p_.seqlen_q + i));
    }
    const int64_t rows = p_.batch * p_.heads_kv * p_.seqlen_new;
    CHECK(key_cache_.size() - key_cache_.untouched() == size_t(rows * p_.head_dim), "keys outside: %s", text());
    CHECK(value_cache_.size() - value_cache_.untouched() == size_t(rows * p_.head_dim_v), "values outside: %s", text());
  }

 private:
  // The caches, and how many keys a sequence can have.
  int64_t draw_places() {
    int64_t count = p_.batch, rows = p_.seqlen_new + random_.integer(0, 20), capacity = rows;
    if (random_.chance(0.5)) {
      rows = p_.page_size = random_.integer(1, 8);
      p_.block_table_stride = (capacity + rows - 1) / rows;
      capacity = rows * p_.block_table_stride;
      count = p_.batch * p_.block_table_stride;
      for (int64_t page = 0; page < count; ++page)
        table_.insert(table_.begin() + random_.integer(0, page), int32_t(page));
      p_.block_table = table_.data();
    }
    key_cache_ = Tensor(random_, p_.dtype, count, p_.heads_kv, rows, p_.head_dim);
    value_cache_ = Tensor(random_, p_.dtype, count, p_.heads_kv, rows, p_.head_dim_v);
    p_.key_cache = key_cache_.view;
    p_.value_cache = value_cache_.view;
    return capacity;
  }

  void draw_rotary(int64_t positions) {
    p_.rotary_dim = random_.integer(1, 35) * 2;
    if (p_.rotary_dim > p_.head_dim) p_.rotary_dim = p_.head_dim / 2 * 2;
    p_.interleaved = random_.chance(0.5);
    p_.table_dtype = random_.chance(0.5) ? Dtype::kFloat32 : p_.dtype;
    query_ = Tensor(random_, p_.dtype, p_.batch, p_.heads_q, p_.seqlen_q, p_.head_dim);
    rotated_ = Tensor(random_, p_.dtype, p_.batch, p_.heads_q, p_.seqlen_q, p_.head_dim);
    cos_ = Tensor(random_, p_.table_dtype, 1, 1, positions, p_.rotary_dim / 2);
    sin_ = Tensor(random_, p_.table_dtype, 1, 1, positions, p_.rotary_dim / 2);
    for (Tensor* tensor : {&query_, &cos_, &sin_}) tensor->fill([&] { return random_.normal(); });
    p_.query = query_.view;
    p_.rotated = rotated_.view;
    p_.cos = cos_.view;
    p_.sin = sin_.view;
  }

  std::vector<double> row_of(const View& view, int64_t b, int64_t h, int64_t i, int64_t columns) const {
    std::vector<double> row;
    for (int64_t c = 0; c < columns; ++c) row.push_back(read(view, p_.dtype, b, h, i, c));
    return row;
  }

  std::vector<double> turned(const View& view, int64_t b, int64_t h, int64_t i, int64_t position) const {
    const std::vector<double> row = row_of(view, b, h, i, p_.head_dim);
    std::vector<double> result = row;
    for (int64_t c = 0; c < p_.rotary_dim / 2; ++c) {
      const size_t x = size_t(p_.interleaved ? 2 * c : c);
      const size_t y = size_t(p_.interleaved ? 2 * c + 1 : c + p_.rotary_dim / 2);
      const double cosine = read(p_.cos, p_.table_dtype, 0, 0, position, c);
      const double sine = read(p_.sin, p_.table_dtype, 0, 0, position, c);
      result[x] = row[x] * cosine - row[y] * sine;
      result[y] = row[y] * cosine + row[x] * sine;
    }
    return result;
  }

  void compare(const View& view, int64_t b, int64_t h, int64_t i, const std::vector<double>& expected) const {
    const double half = p_.dtype == Dtype::kBFloat16 ? 4e-3 : 1e-3, exact = p_.dtype == Dtype::kFloat64 ? 1e-14 : 1e-6;
    const double tolerance = p_.dtype == Dtype::kFloat32 || p_.dtype == Dtype::kFloat64 ? exact : half;
    for (size_t c = 0; c < expected.size(); ++c) {
      const double found = read(view, p_.dtype, b, h, i, int64_t(c));
      CHECK(std::fabs(found - expected[c]) <= tolerance * (1 + std::fabs(expected[c])), "%g, not %g: %s", found,
            expected[c], text());
    }
  }

  const char* text() const {
    static thread_local char line[160];
    std::snprintf(line, sizeof line, "append, seed %llu, %s, head dims %d/%d, rotary %d, pages of %d",
                  (unsigned long long)seed_, kernels_in_use().isa, int(p_.head_dim), int(p_.head_dim_v),
                  int(p_.rotary_dim), int(p_.page_size));
    return line;
  }

  Random random_;
  const uint64_t seed_;
  AppendParams p_;
  std::vector<int32_t> lengths_, table_;
  Tensor query_, rotated_, key_, value_, key_cache_, value_cache_, cos_, sin_;
};

}  // namespace

void test_append(uint64_t seed, int problems) {
  for (const std::string& isa : runnable_isas()) {
    set_isa(isa);
    for (int i = 0; i < problems; ++i) Case(seed + uint64_t(i)).check();
  }
}

}  // namespace tests
}  // namespace fastattn
