// Forward for few rows (decoding): bound by reading K and V, so each is read once and nothing is packed.
//
// The query rows that share a kv head, of all heads of its group, walk the keys together. The keys are split into chunks
// of a fixed size, so that threads have work however few heads there are and results do not depend on their number
// (Flash-Decoding, Dao et al., 2023). A few rows of K at a time meet a few query rows: each pair keeps a sum in
// registers, and a transposition that adds turns the sums' lanes into scores. Rows to come are fetched meanwhile, a few
// lines at a time: all at once they would wait for each other, and the processor's own prefetching ends at every page.
// A head's chunks are merged once all of them are done.
#pragma once

#include "gemm.h"
#include "pack.h"
#include "softmax.h"
#include "work.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class A>
class Decode {
  typedef typename A::Real Real;
  typedef Plain<Real> Arith;  // whatever the dtype: conversions are cheaper than memory
  typedef Simd<Real> Reals;
  typedef typename Reals::Vec RealVec;
  static constexpr int kLanes = Reals::kLanes;
  static constexpr int kChunk = 512;  // keys of one work item: some hundred KiB, microseconds to read
  static constexpr int kBlock = 128;  // keys between two updates of the running softmax
  static constexpr int kAhead = 16;   // rows fetched before they are needed; 8 and 32 measured slower
  static constexpr int kValues = 16;  // rows of V between two loads of the sums
  static constexpr int kMost = kLanes > kValues ? kLanes : kValues;  // rows of a group
  static constexpr int kRowsAtOnce = kVectorRegisters == 32 ? 4 : 2;
  static constexpr int kKeysAtOnce = kVectorRegisters == 32 && kLanes >= 4 ? 4 : 2;

  // What is kept of one (kv head, chunk): the running softmax of every row.
  struct Part {
    Real *out, *row_max, *row_sum;  // [rows_][columns_v_], [rows_], [rows_][kLanes]

    Part(Carver& c, const Decode& f)
        : out(c.take<Real>(f.rows_ * f.columns_v_)), row_max(c.take<Real>(f.rows_)),
          row_sum(c.take<Real>(f.rows_ * kLanes)) {}
  };

  struct Head {
    int32_t* chunks_done;
    Head(Carver& c, const Decode&) : chunks_done(c.take<int32_t>(1)) {}
  };

  // One thread's.
  struct Own {
    Real *query, *keys, *values, *scores, *bias;
    uint32_t* words;

    Own(Carver& c, const Decode& f)
        : query(c.take<Real>(f.rows_ * f.columns_)), keys(c.take<Real>(kLanes * f.columns_)),
          values(c.take<Real>(kValues * f.columns_v_)), scores(c.take<Real>(f.rows_ * kBlock)),
          bias(c.take<Real>(kBlock)), words(c.take<uint32_t>(kBlock)) {}
  };

 public:
  // Whether there are few queries. Heads of a group add up: Forward would give each a tile of six rows to itself.
  // A block mask leaves keys out that Forward then does not read.
  static bool suits(const DenseParams& p) {
    return !p.mask_rows.data && p.seqlen_q <= 16 && group_size(p) * p.seqlen_q <= 128;
  }

  explicit Decode(const DenseParams& p)
      : p_(p), columns_(round_up(p.head_dim, kLanes)), columns_v_(round_up(p.head_dim_v, kLanes)),
        rows_(group_size(p) * p.seqlen_q), heads_(p.batch * p.heads_kv), chunks_(max64(1, div_up(p.seqlen_k, kChunk))),
        threads_(useful_threads(p)), scores_(p), dropout_(p) {}

  int64_t scratch_bytes() const {
    return heads_ * head_bytes() + heads_ * chunks_ * bytes<Part>() + threads_ * bytes<Own>();
  }

  void run() const {
    if (rows_ == 0) return;
    for (int64_t index = 0; index < heads_; ++index) *head(index).chunks_done = 0;
    const int64_t units = heads_ * chunks_;
    for_each(threads_, units + heads_, [&](int64_t item, int rank) {
      if (item < units) {
        Carver carver = at_offset(heads_ * head_bytes() + units * bytes<Part>() + rank * bytes<Own>());
        attend(Own(carver, *this), part(item), item / chunks_, item % chunks_ * kChunk);
        add_one(head(item / chunks_).chunks_done);
      } else {
        wait_until(head(item - units).chunks_done, int32_t(chunks_));
        merge(item - units);
      }
    });
  }

 private:
  template <class T>
  int64_t bytes() const {
    Carver carver;
    T(carver, *this);
    return int64_t(carver.address());
  }
  int64_t head_bytes() const { return bytes<Head>(); }
  Carver at_offset(int64_t offset) const { return Carver(static_cast<char*>(p_.scratch) + offset); }
  Head head(int64_t index) const {
    Carver carver = at_offset(index * head_bytes());
    return Head(carver, *this);
  }
  Part part(int64_t unit) const {
    Carver carver = at_offset(heads_ * head_bytes() + unit * bytes<Part>());
    return Part(carver, *this);
  }

  // Row r is query r % seqlen_q of member r / seqlen_q of the group.
  int64_t head_of(int64_t index, int64_t r) const {
    return index % p_.heads_kv * group_size(p_) + r / p_.seqlen_q;
  }

  void attend(const Own& t, const Part& part, int64_t index, int64_t chunk) const {
    if constexpr (sizeof(Real) == 8) return attend<Dtype::kFloat64>(t, part, index, chunk);
    else if (p_.dtype == Dtype::kFloat32) return attend<Dtype::kFloat32>(t, part, index, chunk);
    else if (p_.dtype == Dtype::kBFloat16) return attend<Dtype::kBFloat16>(t, part, index, chunk);
    else return attend<Dtype::kFloat16>(t, part, index, chunk);
  }

  template <Dtype kDtype>
  void attend(const Own& t, const Part& part, int64_t index, int64_t chunk) const {
    const int64_t b = index / p_.heads_kv, kv_head = index % p_.heads_kv;
    const Interval interval(p_, b);
    const Range live = interval.all_keys(), seen = intersect(live, {chunk, chunk + kChunk});
    for (int64_t r = 0; r < rows_; ++r) part.row_max[r] = -infinity<Real>();
    if (seen.empty()) return;
    for (int64_t i = 0; i < rows_ * columns_v_; ++i) part.out[i] = 0;
    for (int64_t i = 0; i < rows_ * kLanes; ++i) part.row_sum[i] = 0;
    for (int64_t r = 0; r < rows_; r += p_.seqlen_q)
      stage_rows<Arith>(t.query + r * columns_, columns_, Rows(p_.query, p_.dtype, b, head_of(index, r), p_.head_dim), 0,
                        p_.seqlen_q, interval.rows(), p_.scale < 0);
    const Rows keys = key_rows(p_, p_.key, b, kv_head, p_.head_dim);
    const Rows values = key_rows(p_, p_.value, b, kv_head, p_.head_dim_v);
    for (int64_t j = seen.begin / kBlock * kBlock; j < seen.end; j += kBlock) {
      for (int64_t n = 0; n < kBlock && j + n < live.end; n += kLanes)
        with_rows<kDtype>(t.keys, columns_, keys, j + n, kLanes, live,
                          [&](const auto& rows) { multiply_keys(t, rows, n); });
      for (int64_t r = 0; r < rows_; ++r) weigh(t, part, interval, b, head_of(index, r), r, j);
      for (int64_t n = 0; n < kBlock && j + n < live.end; n += kValues)
        with_rows<kDtype>(t.values, columns_v_, values, j + n, kValues, live,
                          [&](const auto& rows) { add_values(t, part, rows, n); });
    }
  }

  // A few rows of K or V in whole vectors, and those to fetch meanwhile.
  template <Dtype kDtype_>
  struct Group {
    static constexpr Dtype kDtype = kDtype_;
    static constexpr int kBytes = kLanes * (kDtype == Dtype::kFloat64 ? 8 : kDtype == Dtype::kFloat32 ? 4 : 2);
    const char *at[kMost], *ahead[kMost];

    // `column` is a multiple of the lanes.
    RealVec load(int64_t i, int64_t column) const {
      return load_vector<Real, kDtype>(at[i] + column / kLanes * kBytes);
    }
    void fetch(int64_t i, int64_t columns) const {
      for (int64_t byte = 0; byte < columns / kLanes * kBytes; byte += 64) __builtin_prefetch(ahead[i] + byte);
    }
  };

  // Calls use(group) with rows [first, first + count), 0 outside `live`. They are read where they lie, unless their ends
  // must be filled up, or so many query rows will use them that converting them once is cheaper.
  template <Dtype kDtype, class Use>
  void with_rows(Real* staged, int64_t ld, const Rows& from, int64_t first, int64_t count, Range live, Use use) const {
    constexpr Dtype own = sizeof(Real) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
    const bool whole = from.columns == ld && live.begin <= first && first + count <= live.end;
    Group<kDtype> group;
    const int64_t after = max64(0, min64(count, live.end - first - kAhead));
    from.locate(group.ahead, first + kAhead, after);
    for (int64_t i = after; i < count; ++i) group.ahead[i] = reinterpret_cast<const char*>(staged);
    if (whole && (kDtype == own || rows_ <= kRowsAtOnce)) {
      from.locate(group.at, first, count);
      return use(group);
    }
    for (int64_t i = 0; i < count; ++i) group.fetch(i, ld);
    Group<own> copy;
    for (int64_t i = 0; i < count; ++i)
      copy.ahead[i] = copy.at[i] = reinterpret_cast<const char*>(staged + i * ld);
    stage<kDtype>(staged, ld, from, first, count, live);
    use(copy);
  }

  // Rows [first, first + count) as numbers of the accumulation dtype, ld apart; 0 outside `live`.
  template <Dtype kDtype>
  static void stage(Real* to, int64_t ld, const Rows& from, int64_t first, int64_t count, Range live) {
    constexpr int bytes = Group<kDtype>::kBytes;
    const int64_t whole = from.columns / kLanes, rest = from.columns % kLanes;
    for (int64_t i = first; i < first + count; ++i, to += ld) {
      if (i < live.begin || i >= live.end) {
        for (int64_t c = 0; c < ld; c += kLanes) Reals::store(to + c, RealVec{});
        continue;
      }
      const char* row = from[i];
      for (int64_t c = 0; c < whole; ++c) Reals::store(to + c * kLanes, load_vector<Real, kDtype>(row + c * bytes));
      if (rest) {
        char last[bytes] = {};
        __builtin_memcpy(last, row + whole * bytes, size_t(rest) * size_t(bytes / kLanes));
        Reals::store(to + whole * kLanes, load_vector<Real, kDtype>(last));
      }
    }
  }

  // Scores of every query row with kLanes keys.
  template <class G>
  void multiply_keys(const Own& t, const G& keys, int64_t n) const {
    int64_t r = 0;
    for (; r + kRowsAtOnce <= rows_; r += kRowsAtOnce) multiply_keys<kRowsAtOnce>(t, keys, n, r);
    for (; r < rows_; ++r) multiply_keys<1>(t, keys, n, r);
  }
  template <int kRows, class G>
  void multiply_keys(const Own& t, const G& keys, int64_t n, int64_t r) const {
    RealVec sums[kRows][kLanes / kKeysAtOnce];
    for (int m = 0; m < kLanes; m += kKeysAtOnce) {
      RealVec sum[kRows][kKeysAtOnce] = {};
      if (r == 0)
#pragma GCC unroll 4
        for (int k = 0; k < kKeysAtOnce; ++k) keys.fetch(m + k, columns_);
      for (int64_t c = 0; c < columns_; c += kLanes) {
        RealVec key[kKeysAtOnce];
#pragma GCC unroll 4
        for (int k = 0; k < kKeysAtOnce; ++k) key[k] = keys.load(m + k, c);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const RealVec query = Reals::load(t.query + (r + i) * columns_ + c);
#pragma GCC unroll 4
          for (int k = 0; k < kKeysAtOnce; ++k) sum[i][k] += query * key[k];
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        add_lanes<1>(sum[i]);
        sums[i][m / kKeysAtOnce] = sum[i][0];
      }
    }
    for (int i = 0; i < kRows; ++i) {
      add_lanes<kKeysAtOnce>(sums[i]);
      Reals::store(t.scores + (r + i) * kBlock + n, sums[i][0]);
    }
  }

  // The first of kCount vectors gets their lanes' sums, in pairs of lanes kDistance apart: a transposition whose stages
  // add. From kDistance 1 up to the vector's length, lane i becomes the sum of vector i.
  template <int kDistance, int kCount>
  [[gnu::always_inline]] static void add_lanes(RealVec (&v)[kCount]) {
    if constexpr (kCount > 1) {
      static constexpr LaneTable<Real> lower = exchange<Real>(kDistance, false), upper = exchange<Real>(kDistance, true);
      RealVec half[kCount / 2];
#pragma GCC unroll 16
      for (int m = 0; m < kCount / 2; ++m)
        half[m] = shuffle(v[2 * m], v[2 * m + 1], lower.vec()) + shuffle(v[2 * m], v[2 * m + 1], upper.vec());
      add_lanes<2 * kDistance>(half);
      v[0] = half[0];
    }
  }

  void weigh(const Own& t, const Part& part, const Interval& interval, int64_t b, int64_t h, int64_t r,
             int64_t first) const {
    const int64_t i = r % p_.seqlen_q;
    Real* scores = t.scores + r * kBlock;
    scores_.shape(scores, t.bias, nullptr, b, h, i, interval.position(i), first, kBlock);
    hide_outside(scores, first, kBlock, interval.keys(i));
    const auto add = dropout_.active() ? add_weights<Arith, true> : add_weights<Arith, false>;
    if (dropout_.active()) dropout_.draw(t.words, b, h, i, first, kBlock);
    add(scores, scores, kBlock, row_maximum(scores, kBlock), scores_.factor(), part.row_max[r],
        part.row_sum + r * kLanes, part.out + r * columns_v_, columns_v_, dropout_, t.words);
  }

  // out += weights v, for every query row.
  template <class G>
  void add_values(const Own& t, const Part& part, const G& values, int64_t n) const {
    int64_t r = 0;
    for (; r + kRowsAtOnce <= rows_; r += kRowsAtOnce) add_values<kRowsAtOnce>(t, part, values, n, r);
    for (; r < rows_; ++r) add_values<1>(t, part, values, n, r);
  }
  template <int kRows, class G>
  void add_values(const Own& t, const Part& part, const G& values, int64_t n, int64_t r) const {
    int64_t c = 0;
    for (; c + kTileVectors * kLanes <= columns_v_; c += kTileVectors * kLanes)
      add_values<kRows, kTileVectors>(t, part, values, n, r, c);
    for (; c < columns_v_; c += kLanes) add_values<kRows, 1>(t, part, values, n, r, c);
  }
  template <int kRows, int kVectors, class G>
  void add_values(const Own& t, const Part& part, const G& values, int64_t n, int64_t r, int64_t column) const {
    RealVec sum[kRows][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sum[i][c] = Reals::load(part.out + (r + i) * columns_v_ + column + c * kLanes);
    for (int k = 0; k < kValues; ++k) {
      if (r == 0 && column == 0) values.fetch(k, columns_v_);
      RealVec value[kVectors];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) value[c] = values.load(k, column + c * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) sum[i][c] += t.scores[(r + i) * kBlock + n + k] * value[c];
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) Reals::store(part.out + (r + i) * columns_v_ + column + c * kLanes, sum[i][c]);
  }

  // The chunks' running softmaxes become one, in the place of the first.
  void merge(int64_t index) const {
    const Part all = part(index * chunks_);
    const int64_t present = rows_of(p_.query, index / p_.heads_kv, p_.seqlen_q);
    for (int64_t r = 0; r < rows_; ++r) {
      if (r % p_.seqlen_q >= present) continue;
      Real highest = -infinity<Real>();
      for (int64_t c = 0; c < chunks_; ++c) highest = max_of(highest, part(index * chunks_ + c).row_max[r]);
      double sum = 0;
      for (int64_t c = 0; c < chunks_; ++c) {
        const Part from = part(index * chunks_ + c);
        Real* out = all.out + r * columns_v_;
        const bool nothing = from.row_max[r] == -infinity<Real>();  // and then its out may never have been written
        const Real weight =
            nothing ? Real(0) : Real(__builtin_exp2(double(from.row_max[r] - highest) * double(scores_.factor())));
        if (!nothing) sum += double(weight) * double(horizontal_sum<Real>(Reals::load(from.row_sum + r * kLanes)));
        for (int64_t k = 0; k < columns_v_; k += kLanes) {
          const RealVec so_far = c ? Reals::load(out + k) : RealVec{};
          Reals::store(out + k, nothing ? so_far : so_far + weight * Reals::load(from.out + r * columns_v_ + k));
        }
      }
      finish_row(p_, scores_, dropout_, index / p_.heads_kv, head_of(index, r), r % p_.seqlen_q, highest, sum,
                 all.out + r * columns_v_);
    }
  }
  static Real max_of(Real a, Real b) { return b > a ? b : a; }

  const DenseParams& p_;
  const int64_t columns_, columns_v_, rows_, heads_, chunks_;
  const int threads_;
  const Scores<Real> scores_;
  const Dropout dropout_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
