// The rotation of one head at one position, for the rope kernel and for those that rotate as they load.
#pragma once
#include "vec.h"

namespace gptfast::ISA {

// (x1, x2) turned by the angle whose cosine and sine are given. This sequence of roundings is the op page's.
INLINE void rotate(f32v& x1, f32v& x2, f32v cos, f32v sin) {
  f32v o1 = fma(x1, cos, -(x2 * sin));
  x2 = fma(x2, cos, x1 * sin);
  x1 = o1;
}

// The same for LANES pairs that lie side by side: x1, x2, x1, x2, ...
template <class T>
INLINE void rotate_pairs(T* out, const T* x, f32v cos, f32v sin) {
  float pairs[2 * LANES], first[LANES], second[LANES];
  store(pairs, load(x));
  store(pairs + LANES, load(x + LANES));
  for (int i = 0; i < LANES; i++) first[i] = pairs[2 * i], second[i] = pairs[2 * i + 1];
  f32v x1 = load(first), x2 = load(second);
  rotate(x1, x2, cos, sin);
  store(first, x1);
  store(second, x2);
  for (int i = 0; i < LANES; i++) pairs[2 * i] = first[i], pairs[2 * i + 1] = second[i];
  store(out, load(pairs));
  store(out + LANES, load(pairs + LANES));
}

// out (D) = x (D) with the first R elements rotated by cos, sin (R/2): pairs (i, i + R/2), or (2i, 2i + 1) if
// interleaved. The rest is copied. out may be x.
template <class T>
INLINE void rope_row(T* out, const T* x, const float* cos, const float* sin, int64_t D, int64_t R, bool interleaved) {
  const int64_t H = R / 2;
  if (!interleaved) {
    each_vector(H, [&](int64_t i, auto n, int) {
      f32v x1 = load(x + i, n), x2 = load(x + H + i, n);
      rotate(x1, x2, load(cos + i, n), load(sin + i, n));
      store(out + i, x1, n);
      store(out + H + i, x2, n);
    });
  } else {
    int64_t i = 0;
    for (; i + LANES <= H; i += LANES) rotate_pairs(out + 2 * i, x + 2 * i, load(cos + i), load(sin + i));
    if (int n = (int)(H - i)) {
      T tail[2 * LANES] = {};
      memcpy(tail, x + 2 * i, 2 * n * sizeof(T));
      rotate_pairs(tail, tail, load(cos + i, n), load(sin + i, n));
      memcpy(out + 2 * i, tail, 2 * n * sizeof(T));
    }
  }
  if (out != x && R < D) memcpy(out + R, x + R, (D - R) * sizeof(T));
}

}  // namespace gptfast::ISA
