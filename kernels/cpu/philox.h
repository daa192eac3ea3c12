// Philox4x32-10 (gptfast/ops/philox.py), one counter per lane, and the dropout mask made of it.
#pragma once
#include "vec.h"

namespace gptfast::ISA {

typedef uint64_t u64v __attribute__((vector_size(VEC_BYTES)));

// The 64-bit products of the even lanes with m.
INLINE u64v multiply_even(u32v a, uint32_t m) {
#if defined(__AVX512F__)
  return bitcast<u64v>(_mm512_maskz_mul_epu32(0xff, bitcast<__m512i>(a), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
  return bitcast<u64v>(_mm256_mul_epu32(bitcast<__m256i>(a), _mm256_set1_epi64x(m)));
#elif defined(__SSE2__)
  return bitcast<u64v>(_mm_mul_epu32(bitcast<__m128i>(a), _mm_set1_epi64x(m)));
#else
  return (bitcast<u64v>(a) & 0xffffffff) * m;
#endif
}

// The high and low words of a * m in each lane.
INLINE void multiply_wide(u32v a, uint32_t m, u32v& high, u32v& low) {
  const u64v even = multiply_even(a, m), odd = multiply_even(bitcast<u32v>(bitcast<u64v>(a) >> 32), m);
  const u64v low_half = u64v{} + 0xffffffff;
  high = bitcast<u32v>((even >> 32) | (odd & ~low_half));
  low = bitcast<u32v>((even & low_half) | (odd << 32));
}

// The four words at each lane's counter (low, high, stream, 0).
INLINE void philox(u32v words[4], u32v low, u32v high, uint32_t stream, uint64_t seed) {
  u32v c0 = low, c1 = high, c2 = u32v{} + stream, c3 = {};
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    u32v high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53, high0, low0);
    multiply_wide(c2, 0xCD9E8D57, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Which of the elements first .. first + n are kept: keep[i] is -1 (all bits) or 0. Element e takes word e % 4 of index
// e / 4 and is dropped where word < drop_below. keep has room for n + 4 * LANES; the result is keep + first % 4.
INLINE const int32_t* dropout_keep(int32_t* keep, uint64_t first, int64_t n, uint32_t drop_below, uint32_t stream,
                                   uint64_t seed) {
  const int skip = (int)(first & 3);
  for (int64_t i = 0; i < skip + n; i += 4 * LANES) {
    const uint64_t index = (first >> 2) + i / 4;
    const u32v low = bitcast<u32v>(iota()) + (uint32_t)index;
    const u32v high = (low < (uint32_t)index ? u32v{} + 1 : u32v{}) + (uint32_t)(index >> 32);  // the carry
    u32v words[4];
    philox(words, low, high, stream, seed);
    int32_t kept[4][LANES];
    for (int w = 0; w < 4; w++) {
      const i32v mask = bitcast<i32v>(words[w] >= drop_below);
      memcpy(kept[w], &mask, sizeof mask);
    }
    for (int l = 0; l < LANES; l++)
      for (int w = 0; w < 4; w++) keep[i + 4 * l + w] = kept[w][l];
  }
  return keep + skip;
}

}  // namespace gptfast::ISA
