// Dropout's random numbers: Philox4x32-10 (Salmon et al., SC 2011), the same bits on every backend.
//
// One call of Philox gives four words. Key = the seed, counter = (j / 4, i, b Hq + h, offset), and word j % 4 belongs to
// key j; here each lane of a vector is one call.
#pragma once

#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

typedef Simd<uint32_t> Words;
typedef Simd<uint64_t>::Vec WordPairs;

// The products of the even lanes (of 32 bits) and a number.
inline WordPairs multiply_even(WordPairs a, uint32_t b) {
#if defined(__AVX512F__)
  return (WordPairs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (WordPairs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (WordPairs)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * uint64_t(b);
#endif
}

inline void multiply_wide(Words::Vec a, uint32_t b, Words::Vec& low, Words::Vec& high) {
  constexpr uint64_t mask = 0xffffffffu;
  const WordPairs even = multiply_even((WordPairs)a, b), odd = multiply_even((WordPairs)a >> 32, b);
  low = (Words::Vec)((even & mask) | (odd << 32));
  high = (Words::Vec)((even >> 32) | (odd & ~mask));
}

constexpr LaneTable<uint32_t> interleaving(bool upper) {
  LaneTable<uint32_t> table;
  for (int i = 0; i < table.kLanes; ++i)
    table.lane[i] = i / 2 + (upper ? table.kLanes / 2 : 0) + (i % 2 ? table.kLanes : 0);
  return table;
}

// The words of the keys [first, first + count), with first a multiple of 4; writes whole vectors, at most 64 words on.
inline void philox_words(uint32_t* to, int64_t first, int64_t count, uint64_t seed, uint32_t row, uint32_t head,
                         uint32_t offset) {
  static constexpr LaneTable<uint32_t> lower = interleaving(false), upper = interleaving(true);
  Words::Vec lane;
  for (int l = 0; l < Words::kLanes; ++l) lane[l] = uint32_t(l);
  for (int64_t j = 0; j < count; j += 4 * Words::kLanes) {
    Words::Vec c0 = lane + uint32_t((first + j) / 4), c1 = Words::broadcast(row), c2 = Words::broadcast(head),
               c3 = Words::broadcast(offset);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      Words::Vec low0, high0, low1, high1;
      multiply_wide(c0, 0xD2511F53u, low0, high0);
      multiply_wide(c2, 0xCD9E8D57u, low1, high1);
      c0 = high1 ^ c1 ^ k0;
      c2 = high0 ^ c3 ^ k1;
      c1 = low1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const Words::Vec even[2] = {shuffle(c0, c2, lower.vec()), shuffle(c0, c2, upper.vec())};
    const Words::Vec odd[2] = {shuffle(c1, c3, lower.vec()), shuffle(c1, c3, upper.vec())};
    for (int half = 0; half < 2; ++half) {
      Words::store(to + j + (2 * half) * Words::kLanes, shuffle(even[half], odd[half], lower.vec()));
      Words::store(to + j + (2 * half + 1) * Words::kLanes, shuffle(even[half], odd[half], upper.vec()));
    }
  }
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
