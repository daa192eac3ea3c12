// Sums in fp64 of values in fp32: of so many that fp32 sums would be the largest error.
#pragma once
#include "vec.h"

namespace gptfast::ISA {

typedef double f64v __attribute__((vector_size(VEC_BYTES)));
typedef float f32half __attribute__((vector_size(VEC_BYTES / 2)));

// The lower and the upper lanes of a vector.
struct Wide {
  f64v a, b;
};
INLINE Wide widen(f32v v) {  // GCC 12 makes eight instructions of its own conversion where four do
#if defined(__AVX512F__)
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
#elif defined(__AVX2__)
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
#else
  struct Halves {
    f32half a, b;
  };
  const Halves h = bitcast<Halves>(v);
  return {__builtin_convertvector(h.a, f64v), __builtin_convertvector(h.b, f64v)};
#endif
}
INLINE void add(Wide& total, f32v v) {
  const Wide w = widen(v);
  total.a += w.a, total.b += w.b;
}
INLINE void add_square(Wide& total, f32v v) {
  const Wide w = widen(v);
  total.a += w.a * w.a, total.b += w.b * w.b;
}
INLINE double sum(Wide v) {
  v.a += v.b;
  double total = 0;
  for (int i = 0; i < LANES / 2; i++) total += v.a[i];
  return total;
}

}  // namespace gptfast::ISA
