// The activation functions of MLPs. Infinities and NaN behave as the formulas do in IEEE arithmetic: -inf gives
// -inf * 0 = NaN, as in PyTorch.
//
// T: the storage type that the result is rounded to.
#pragma once
#include "vec.h"

namespace gptfast::ISA {

template <class T>
INLINE f32v exp_for(f32v x) {
  if constexpr (sizeof(T) == sizeof(float))
    return exp(x);
  else
    return exp2_for_16_bits(x * 1.44269504f);
}
template <class T>
INLINE f32v exp2_for(f32v x) {  // infinity from 128 on, at the latest
  if constexpr (sizeof(T) == sizeof(float))
    return select(x >= 127.0f, splat(__builtin_inff()), exp2(x));
  else
    return exp2_for_16_bits(x);
}

// x * sigmoid(x)
template <class T>
INLINE f32v silu(f32v x) {
  return x / (1.0f + exp_for<T>(-x));
}

// x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3)
//   = x * sigmoid(2u)
//   = x / (1 + 2^(x (a + b x^2))),  a = -2 log2(e) sqrt(2/pi), b = 0.044715 a
template <class T>
INLINE f32v gelu_tanh(f32v x) {
  const f32v w = x * fma(x * x, splat(-0.10294324f), splat(-2.3022082f));
  return x / (1.0f + exp2_for<T>(w));  // beyond, x / 2^127 and x / inf are both -0
}

// x * Phi(x), Phi(x) = (1 + erf(x / sqrt(2))) / 2. The lower tail is q = Phi(-|x|) = exp(-x^2/2) t p(t), so that
// nothing cancels, with t = 1 / (1 + c |x|) (the form of Abramowitz and Stegun 26.2.17) and p of degree 8 the minimax
// of the relative error, 2.6e-8, for |x| <= 15; beyond, exp(-x^2/2) is 0 in fp32.
INLINE f32v tail_over_bell(f32v x) {  // q / exp(-x^2/2)
  const f32v t = 1.0f / fma(abs(x), splat(0.345f), splat(1.0f));
  f32v p = splat(-0.0279335119f);
  p = fma(p, t, splat(0.143238276f));
  p = fma(p, t, splat(-0.267236024f));
  p = fma(p, t, splat(0.183022693f));
  p = fma(p, t, splat(-0.0349471457f));
  p = fma(p, t, splat(0.110766165f));
  p = fma(p, t, splat(0.117478006f));
  p = fma(p, t, splat(0.137990683f));
  p = fma(p, t, splat(0.137620866f));
  return t * p;
}
template <class T>
INLINE f32v gelu_erf(f32v x) {
  const f32v q = exp_for<T>(x * x * -0.5f) * tail_over_bell(x);
  return x * select(x < 0.0f, q, 1.0f - q);
}

// Derivatives; of GELU with its value beside them, which they share most of. s (1 + x (1 - s)) with s = sigmoid(x)
INLINE f32v silu_derivative(f32v x, f32v s) { return s * fma(x, 1.0f - s, splat(1.0f)); }

// s + x s (1 - s) 2u' with s = sigmoid(2u), 1 - s = s e without a difference, 2u' = -ln(2) (a + 3 b x^2). Where e is
// 2^126 s is next to nothing.
template <class T>
INLINE Pair gelu_tanh_derivative(f32v x) {
  const f32v square = x * x, w = x * fma(square, splat(-0.10294324f), splat(-2.3022082f));
  const f32v e = exp2_for<T>(min(splat(126.0f), w)), s = 1.0f / (1.0f + e);
  return {fma(x * s * (s * e), fma(square, splat(0.21406435f), splat(1.5957691f)), s),
          x * select(w >= 127.0f, f32v{}, s)};
}

// Phi(x) + x phi(x)
template <class T>
INLINE Pair gelu_erf_derivative(f32v x) {
  const f32v bell = exp_for<T>(x * x * -0.5f), q = bell * tail_over_bell(x);
  const f32v phi = select(x < 0.0f, q, 1.0f - q);
  return {fma(x * 0.39894228f, bell, phi), x * phi};
}

}  // namespace gptfast::ISA
