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

// rows x K as [k][rows], rows <= LANES; those from `present` on are zero. f(i, k, n) loads n lanes of row i from k on.
template <class F>
INLINE void interleave(int64_t K, int rows, int present, float* out, F f) {
  for (int64_t k = 0; k < K; k += LANES) {
    const int n = (int)min<int64_t>(LANES, K - k);
    f32v t[LANES];
    UNROLL for (int i = 0; i < LANES; i++) t[i] = i < present ? f(i, k, n) : f32v{};
    transpose(t);
    // What lies beyond the rows is written over by the next, which at the end isn't there.
    const int whole = (int)min<int64_t>(n, K - k - ceil_div(LANES, rows) + 1);
    UNROLL for (int i = 0; i < LANES; i++) {
      float* to = out + (k + i) * rows;
      if (i < whole)
        store(to, t[i]);
      else if (i < n)
        store(to, t[i], rows);
    }
  }
}
// The same of rows of x, in fp32.
template <class T>
INLINE void interleave_rows(const T* x, int64_t stride, int64_t K, int rows, int present, float* out) {
  interleave(K, rows, present, out, [&](int i, int64_t k, int n) { return load(x + i * stride + k, n); });
}

}  // namespace gptfast::ISA
