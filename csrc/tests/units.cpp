// Tests of the kernels' parts. Like kernel.cpp compiled once per instruction set, and free of standard C++ headers.
#include <math.h>

#include "../cpu/exp.h"
#include "../cpu/interval.h"
#include "../cpu/pack.h"
#include "../cpu/philox.h"
#include "../cpu/scores.h"
#include "check.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {
namespace {

using tests::Random;

double relative(double got, double expected) { return fabs(got - expected) / fabs(expected); }

template <class Real>
void test_exp2(double tolerance) {
  typedef Simd<Real> Reals;
  for (double x = -99.99; x <= 0; x += 0.0137) {
    const double got = vexp2(Reals::broadcast(Real(x)))[0];
    CHECK(relative(got, exp2(double(Real(x)))) <= tolerance, "2^%g = %.17g", x, got);
  }
  CHECK(vexp2(Reals::broadcast(Real(0)))[0] == 1, "the largest score's weight is exactly 1");
  CHECK(vexp2(Reals::broadcast(Real(-100.5)))[0] == 0, "weights below 2^-100 are 0");
  CHECK(vexp2(Reals::broadcast(-infinity<Real>()))[0] == 0, "a hidden key weighs nothing");
  const Real nan = vexp2(Reals::broadcast(Real(NAN)))[0];
  CHECK(nan != nan, "NaN comes through");
}

template <class Real>
void test_tanh(double tolerance) {
  typedef Simd<Real> Reals;
  for (double x = 1e-6; x < 1e6; x *= 1.01)
    for (int sign = -1; sign <= 1; sign += 2) {
      const Real y = Real(sign * x);
      const double got = vtanh<Real>(Reals::broadcast(y))[0];
      CHECK(relative(got, tanh(double(y))) <= tolerance, "tanh(%g) = %.17g", double(y), got);
    }
}

// Nearest, ties to even: no neighbour is nearer, and of two as near the even one is taken.
void check_rounding(float x, uint16_t half, float (*to_float)(uint16_t)) {
  const double error = fabs(double(to_float(half)) - double(x));
  for (int step = -1; step <= 1; step += 2) {
    const uint16_t neighbour = uint16_t(half + step);
    if ((neighbour ^ half) & 0x8000) continue;
    const double other = fabs(double(to_float(neighbour)) - double(x));
    CHECK(error < other || (error == other && half % 2 == 0), "%.9g became %#x", double(x), unsigned(half));
  }
}

void test_conversions(Random& random) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = uint16_t(bits);
    const float from16 = float16_to_float(half), from_b16 = bfloat16_to_float(half);
    if (from16 == from16) CHECK(float_to_float16(from16) == half, "float16 %#x does not come back", bits);
    if (from_b16 == from_b16) CHECK(float_to_bfloat16(from_b16) == half, "bfloat16 %#x does not come back", bits);
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double value = (bits >> 15 ? -1.0 : 1.0) *
                         (exponent ? ldexp(1 + fraction / 1024.0, exponent - 15) : ldexp(fraction / 1024.0, -14));
    if (exponent < 31) CHECK(from16 == float(value), "float16 %#x is %g", bits, double(from16));

    uint16_t row[64];
    for (uint16_t& element : row) element = half;
    const char* address = reinterpret_cast<const char*>(row);
    if (from16 == from16) {
      const auto v = load_vector<float, Dtype::kFloat16>(address);
      CHECK(v[0] == from16 && v[Simd<float>::kLanes - 1] == from16, "a vector of float16 %#x", bits);
    }
    if (from_b16 == from_b16) {
      const auto v = load_vector<float, Dtype::kBFloat16>(address);
      CHECK(v[0] == from_b16 && v[Simd<float>::kLanes - 1] == from_b16, "a vector of bfloat16 %#x", bits);
    }
  }
  for (int i = 0; i < 100000; ++i) {
    const float x = bit_cast<float>(uint32_t(random.bits()));
    if (!(fabsf(x) < 1e38f)) continue;
    check_rounding(x, float_to_bfloat16(x), bfloat16_to_float);
    const float y = float(ldexp(random.uniform() - 0.5, int(random.integer(-26, 16))));
    check_rounding(y, float_to_float16(y), float16_to_float);
  }
  CHECK(float_to_float16(65520.0f) == 0x7c00 && float_to_float16(65519.0f) == 0x7bff, "float16 overflows at 65520");
  CHECK(float_to_bfloat16(NAN) == 0x7fc0 && (float_to_float16(NAN) & 0x7fff) == 0x7e00, "NaN stays NaN");
}

// The known answers of Random123's kat_vectors for philox4x32-10.
void test_philox() {
  const struct {
    uint32_t counter[4], key[2], words[4];
  } known[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& one : known) {
    uint32_t words[128];
    philox_words(words, int64_t(one.counter[0]) * 4, 4, one.key[0] | uint64_t(one.key[1]) << 32, one.counter[1],
                 one.counter[2], one.counter[3]);
    for (int i = 0; i < 4; ++i) CHECK(words[i] == one.words[i], "word %d is %#x", i, words[i]);
  }
  uint32_t all[256 + 64], some[64 + 64];
  philox_words(all, 0, 256, 99, 1, 2, 3);
  philox_words(some, 64, 64, 99, 1, 2, 3);
  for (int i = 0; i < 64; ++i) CHECK(some[i] == all[64 + i], "word %d depends on where the row was begun", i);
}

// The contract, key by key: "query i of sequence b stands at key position p ..." of dense_params.h.
void test_interval(Random& random) {
  const int64_t rows = random.integer(1, 12), keys = random.integer(1, 12);
  const auto side = [&] { return random.chance(0.3) ? DenseParams::kUnlimited : random.integer(0, 6); };
  const auto number = [&](int64_t low, int64_t high) { return int32_t(random.integer(low, high)); };
  DenseParams p;
  p.seqlen_q = rows;
  p.seqlen_k = keys;
  p.window_left = side();
  p.window_right = side();
  p.query_offset = random.integer(-8, 8);
  p.align_ends = random.chance(0.5);
  const int32_t query_start = number(-5, 5), key_start = number(0, 8), key_lengths = number(0, int64_t(keys));
  if (random.chance(0.5)) p.query_start = &query_start;
  if (random.chance(0.5)) p.key_start = &key_start;
  if (random.chance(0.5)) p.key_lengths = &key_lengths;
  const int64_t offset = p.query_offset + (p.query_start ? query_start : 0) + (p.align_ends ? keys - rows : 0);
  const auto sees = [&](int64_t i, int64_t j) {
    const int64_t at = i + offset;
    return (!p.key_start || j >= key_start) && (!p.key_lengths || j < key_lengths) &&
           (p.window_left == DenseParams::kUnlimited || j >= at - p.window_left) &&
           (p.window_right == DenseParams::kUnlimited || j <= at + p.window_right);
  };
  const Interval interval(p, 0);
  for (int64_t i = 0; i < rows; ++i) {
    CHECK(interval.position(i) == i + offset, "row %d", int(i));
    const Range range = interval.keys(i);
    for (int64_t j = 0; j < keys; ++j)
      CHECK(sees(i, j) == (j >= range.begin && j < range.end), "row %d, key %d", int(i), int(j));
  }
  for (int64_t begin = 0; begin < rows; ++begin)
    for (int64_t end = begin + 1; end <= rows; ++end) {
      const Range range = interval.keys(Range{begin, end});
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < keys; ++j)
          if (sees(i, j))
            CHECK(j >= range.begin && j < range.end, "rows %d to %d, key %d", int(begin), int(end), int(j));
      CHECK(range.begin >= 0 && range.end <= keys, "rows %d to %d reach past the keys", int(begin), int(end));
    }
  for (int64_t begin = 0; begin < keys; ++begin)
    for (int64_t end = begin + 1; end <= keys; ++end) {
      const Range range = interval.rows(Range{begin, end});
      for (int64_t i = 0; i < rows; ++i) {
        bool any = false;
        for (int64_t j = begin; j < end; ++j) any |= sees(i, j);
        CHECK(any == (i >= range.begin && i < range.end), "keys %d to %d, row %d", int(begin), int(end), int(i));
      }
    }
}

template <class A>
void test_packing(Random& random, Dtype dtype) {
  constexpr int pack = A::kPack, kMost = 70;
  typedef typename A::Elem Elem;
  const int64_t columns = random.integer(1, kMost), steps = div_up(columns, pack);
  const Range live{random.integer(0, 10), random.integer(40, 64)};
  static char memory[kPanelKeys * kMost * 8];
  for (char& byte : memory) byte = char(random.integer(1, 60));  // finite numbers in every dtype
  View view;
  view.data = memory;
  view.stride[2] = columns;
  const Rows rows(view, dtype, 0, 0, columns);
  static Elem panel[kPanelKeys * kMost], staging[kPanelKeys * (kMost + 16)], staged[kPanelKeys * (kMost + 16)];
  pack_transposed<A>(panel, rows, 0, live, staging);
  stage_rows<A>(staged, steps, rows, 0, kPanelKeys, live);
  for (int64_t i = 0; i < kPanelKeys; ++i)
    for (int64_t k = 0; k < steps; ++k) {
      CHECK(panel[k * kPanelKeys + i] == staged[i * steps + k], "row %d, step %d", int(i), int(k));
      if (i < live.begin || i >= live.end) CHECK(staged[i * steps + k] == Elem(0), "row %d is not read", int(i));
    }
}

}  // namespace

void test_units(uint64_t seed) {
  Random random(seed);
  test_exp2<float>(2e-7);
  test_exp2<double>(1e-13);
  test_tanh<float>(1e-6);
  test_tanh<double>(1e-13);
  test_conversions(random);
  test_philox();
  for (int i = 0; i < 2000; ++i) test_interval(random);
  for (int i = 0; i < 50; ++i) {
    test_packing<F32>(random, Dtype::kFloat32);
    test_packing<F32>(random, Dtype::kBFloat16);
    test_packing<F64>(random, Dtype::kFloat64);
#if defined(FASTATTN_BF16_DOT)
    test_packing<BF16Dot>(random, Dtype::kBFloat16);
#endif
  }
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
