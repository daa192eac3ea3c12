// Pairs of bfloat16 neighbours in 32-bit lanes, for VDPBF16PS: it adds the products of both to a sum in fp32, twice as
// many as an FMA of fp32 does. The products are exact; subnormal numbers count as zero. A source that has loops of them
// is compiled for such machines once more (CMakeLists.txt), there for bfloat16 alone.
#pragma once
#include "vec.h"

namespace gptfast::ISA {

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif
// Numbers that one lane multiplies, and the lanes of so many.
constexpr int64_t PER_LANE = PAIRS ? 2 : 1;
INLINE int64_t lanes_of(int64_t n) { return (n + PER_LANE - 1) / PER_LANE; }
constexpr int STEP = LANES * PER_LANE;  // numbers of a vector

#if defined(__AVX512BF16__)
INLINE f32v add_pairs(f32v sum, i32v a, i32v b) {
  return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
INLINE i32v splat_pair(const float* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return splat(pair);
}
// Up to 2 * LANES neighbours, the others zero.
INLINE i32v load_pairs(const bf16* p, int64_t n) {
  return (i32v)_mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p);
}
// Up to LANES neighbours of two rows, each beside its other; `b` may be null.
INLINE i32v load_two(const bf16* a, const bf16* b, int n) {
  const __mmask16 some = (__mmask16)((1u << n) - 1);
  const i32v low = (i32v)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, a));
  if (!b) return low;
  return low | (i32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, b)), 16);
}
// LANES neighbours and the next LANES, each beside its other.
INLINE i32v interleaved(i32v both) {
  alignas(64) static constexpr int16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (i32v)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)both);
}
// Two vectors rounded to bfloat16, lane beside lane.
INLINE i32v beside(f32v a, f32v b) { return interleaved((i32v)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a)); }
// A vector rounded to bfloat16, in half as many lanes.
INLINE void store_half(float* p, f32v v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
#else  // named in code that is left out
f32v add_pairs(f32v sum, i32v a, i32v b);
i32v splat_pair(const float* p);
i32v load_pairs(const bf16* p, int64_t n);
i32v load_two(const bf16* a, const bf16* b, int n);
i32v interleaved(i32v both);
i32v beside(f32v a, f32v b);
void store_half(float* p, f32v v);
#endif

// sum + a b in each lane, of numbers or of pairs.
INLINE f32v add_products(f32v sum, f32v a, f32v b) {
  if constexpr (PAIRS)
    return add_pairs(sum, bitcast<i32v>(a), bitcast<i32v>(b));
  else
    return fma(a, b, sum);
}
// The first n numbers of a row in their lanes, the others zero; n may pass STEP.
template <class T>
INLINE f32v load_lanes(const T* row, int64_t n) {
  if constexpr (PAIRS)
    return bitcast<f32v>(load_pairs(row, n));
  else
    return load(row, (int)min<int64_t>(LANES, n));
}
template <class T>
INLINE f32v load_lanes(const T* row) {
  if constexpr (PAIRS)
    return load((const float*)row);
  else
    return load(row);
}
// f(storage type) for a dtype; where there are pairs, for theirs alone.
template <class F>
INLINE void with_numbers(int dtype, F f) {
  if constexpr (PAIRS)
    f(bf16{});
  else
    with_storage(dtype, f);
}

}  // namespace gptfast::ISA
