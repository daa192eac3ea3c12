// Rows of vectors turned in registers.
#pragma once
#include "vec.h"

namespace gptfast::ISA {

// In-register transpose of LANES x LANES values: the steps from `from` down to 1 swap blocks of that size.
INLINE void transpose(f32v* r, int from = LANES / 2) {
  const i32v lane = iota();
#pragma GCC unroll 4
  for (int s = from; s; s /= 2) {
    const i32v low = (lane & s) ? lane - s + LANES : lane, high = (lane & s) ? lane + LANES : lane + s;
    UNROLL for (int i = 0; i < LANES; i++) {
      if (i & s) continue;
      const f32v a = r[i], b = r[i + s];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}

}  // namespace gptfast::ISA
