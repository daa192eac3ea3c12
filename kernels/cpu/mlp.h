// What bias_gelu, swiglu and geglu share: each is y = f(x, other), element by element.
#pragma once
#include "activations.h"
#include "kernels.h"

namespace gptfast::ISA {

// Row r to y; `other` is the row of up, the bias, or zero where there is none.
template <class T, class F>
INLINE void mlp_row(const Mlp& a, int64_t r, bool past_caches, T* y, F f) {
  const T *x = (const T*)a.x + r * a.x_stride, *other = a.other ? (const T*)a.other + r * a.other_stride : nullptr;
  int64_t c = 0;
  for (; c + 2 * LANES <= a.cols; c += 2 * LANES) {
    const Pair p = load(x + c, Two{}), q = other ? load(other + c, Two{}) : Pair{};
    const Pair v = {f(p.a, q.a), f(p.b, q.b)};
    past_caches ? stream_pair<T>(y + c, v) : store_pair<T>(y + c, v);
  }
  for (; c < a.cols; c += LANES) {
    const int n = (int)min<int64_t>(a.cols - c, LANES);
    store(y + c, f(load(x + c, n), other ? load(other + c, n) : f32v{}), n);
  }
}

// Calls use(f) with the op's f.
template <class Use>
INLINE void with_bias_gelu(const Mlp& a, Use use) {
  if (a.tanh)
    use([](f32v x, f32v bias) { return gelu_tanh(x + bias); });
  else
    use([](f32v x, f32v bias) { return gelu_erf(x + bias); });
}
template <class Use>
INLINE void with_geglu(const Mlp& a, Use use) {
  if (a.tanh)
    use([](f32v gate, f32v up) { return gelu_tanh(gate) * up; });
  else
    use([](f32v gate, f32v up) { return gelu_erf(gate) * up; });
}
template <class Use>
INLINE void with_swiglu(const Mlp&, Use use) {
  use([](f32v gate, f32v up) { return silu(gate) * up; });
}

}  // namespace gptfast::ISA
