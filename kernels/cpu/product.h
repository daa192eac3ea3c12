// A product of matrices from panels: C's tile of MR x NR is a chain of fmas over the depth, in chunks that are added in
// order. A panel holds R neighbouring rows of A, or columns of B, one depth after another.
//
// Of two operands in bfloat16, on a machine that multiplies pairs of them, a lane of a panel is a pair of depths.
#pragma once
#include "pairs.h"

namespace gptfast::ISA::products {

constexpr int MR = LANES == 16 ? 12 : 6, NR = 2 * LANES;  // the sums of a tile fill the registers but for three
constexpr int64_t CHUNK = 384;  // the op page's constant. A panel of B stays in L1 with 8 lanes: 24 KB
constexpr int64_t AHEAD = LANES == 16 ? 2048 : 0;  // bytes of a panel of B that comes from L2

constexpr int64_t EVERY = 4;  // lanes of a tile's depth to a line that it fetches for later

// c (MR, NR) = what it holds if `add`, else 0, + a b over `depth` lanes + bias (NR), if there is one. Meanwhile a line
// of `later` comes to L2 every EVERY of them.
INLINE void tile(const float* a, const float* b, int64_t depth, float* c, int64_t stride, bool add, const float* bias,
                 const char* later) {
  f32v sums[MR][2];
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++) sums[i][0] = sums[i][1] = f32v{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++, a += MR, b += NR) {
    if (AHEAD && k % EVERY == 0) __builtin_prefetch(later + k / EVERY * 64, 0, 2);
    if (AHEAD) __builtin_prefetch((const char*)b + AHEAD), __builtin_prefetch((const char*)b + AHEAD + 64);
    const f32v b0 = in_register(load(b)), b1 = in_register(load(b + LANES));
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) {
      if constexpr (PAIRS) {
        const i32v x = splat_pair(a + i);
        sums[i][0] = add_pairs(sums[i][0], x, bitcast<i32v>(b0));
        sums[i][1] = add_pairs(sums[i][1], x, bitcast<i32v>(b1));
      } else {
        const f32v x = splat(a[i]);
        sums[i][0] = fma(x, b0, sums[i][0]);
        sums[i][1] = fma(x, b1, sums[i][1]);
      }
    }
  }
  if (add) {
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) sums[i][0] += load(c + i * stride), sums[i][1] += load(c + i * stride + LANES);
  }
  if (bias) {
    const f32v v0 = load(bias), v1 = load(bias + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) sums[i][0] += v0, sums[i][1] += v1;
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++) store(c + i * stride, sums[i][0]), store(c + i * stride + LANES, sums[i][1]);
}

}  // namespace gptfast::ISA::products
