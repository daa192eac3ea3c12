// What bias_gelu, swiglu and geglu share: each is y = f(x, other), element by element.
#pragma once
#include "activations.h"
#include "kernels.h"

namespace gptfast::ISA {

// f(T{}, x, y) for the vectors of T's.
template <class T, class F>
INLINE f32v apply(F f, f32v x, f32v y) {
  return f(T{}, x, y);
}
template <class T, class F>
INLINE Pair apply(F f, Pair x, Pair y) {
  return {f(T{}, x.a, y.a), f(T{}, x.b, y.b)};
}

// The pair at p. Two pairs' lines at once took 1.05 times as long in the forward, 1.15 in the backward.
template <class T>
INLINE void prefetch_pair(const T* p) {
  for (int b = 0; b < 2 * LANES * (int)sizeof(T); b += 64) __builtin_prefetch((const char*)p + b, 0, FETCHED_TO);
}

// Row r to y, while the next one is fetched; `other` is the row of up, the bias, or zero where there is none.
template <class T, class F>
INLINE void mlp_row(const Mlp& a, int64_t r, bool past_caches, T* y, F f) {
  const T *x = (const T*)a.x + r * a.x_stride, *other = a.other ? (const T*)a.other + r * a.other_stride : nullptr;
  const int64_t next = r + 1 < a.rows ? a.x_stride : 0, next_other = r + 1 < a.rows ? a.other_stride : 0;
  each_pair(a.cols, [&](int64_t c, auto n, int) {
    prefetch_pair(x + next + c);
    if (next_other) prefetch_pair(other + next_other + c);
    const auto p = load(x + c, n), q = other ? load(other + c, n) : decltype(p){};
    put<T>(past_caches, y + c, apply<T>(f, p, q), n);
  });
}

// Calls use(f) with the op's f of a storage type and two vectors.
template <class Use>
INLINE void with_bias_gelu(const Mlp& a, Use use) {
  if (a.tanh)
    use([](auto t, f32v x, f32v bias) { return gelu_tanh<decltype(t)>(x + bias); });
  else
    use([](auto t, f32v x, f32v bias) { return gelu_erf<decltype(t)>(x + bias); });
}
template <class Use>
INLINE void with_geglu(const Mlp& a, Use use) {
  if (a.tanh)
    use([](auto t, f32v gate, f32v up) { return gelu_tanh<decltype(t)>(gate) * up; });
  else
    use([](auto t, f32v gate, f32v up) { return gelu_erf<decltype(t)>(gate) * up; });
}
template <class Use>
INLINE void with_swiglu(const Mlp&, Use use) {
  use([](auto t, f32v gate, f32v up) { return silu<decltype(t)>(gate) * up; });
}

}  // namespace gptfast::ISA
