// What losses over a vocabulary share: the layout of a chunk of logits, the terms of a logit, statistics of a block of
// the vocabulary, their merging, and the gradient of a logit.
//
// A chunk's logits lie as [panel of 16 columns][row][16]: what one product writes as whole lines, the next two read in
// order, whichever of rows and columns they sum over.
#pragma once
#include "attention.h"
#include "kernels.h"
#include "linear.h"

namespace gptfast::ISA::vocab {

constexpr int BLOCK = 192;                   // the op page's constant: columns whose statistics are taken together
constexpr int BLOCK_PANELS = BLOCK / PANEL;  // 12: whole groups of one, two or three panels
constexpr float NEVER = -__builtin_inff();   // a column beyond the vocabulary
constexpr int MAX = 0, SUM = 1, SPREAD = 2, ENTROPY = 3;  // the fields of a block's statistics

INLINE int64_t blocks(int64_t cols) { return ceil_div(cols, BLOCK); }
INLINE int width(int64_t cols, int64_t block) { return (int)min<int64_t>(BLOCK, cols - block * BLOCK); }

// What becomes of x W^T: bias, soft cap, temperature. And the derivative of that by x W^T, from the result alone.
struct Terms {
  float cap, inverse_cap, inverse_temperature, temperature;

  Terms(float cap, float inverse_temperature)
      : cap(cap),
        inverse_cap(cap > 0 ? 1 / cap : 0),
        inverse_temperature(inverse_temperature),
        temperature(1 / inverse_temperature) {}
  INLINE f32v operator()(f32v s) const {
    if (cap > 0) s = attn::tanh(s * inverse_cap) * cap;
    return inverse_temperature == 1 ? s : s * inverse_temperature;
  }
  INLINE f32v back(f32v gradient, f32v logit) const {
    if (cap > 0) {
      const f32v t = logit * (temperature * inverse_cap);
      gradient = gradient * fma(-t, t, splat(1.0f));
    }
    return inverse_temperature == 1 ? gradient : gradient * inverse_temperature;
  }
};

// Calls f(offset, lanes, column, u) for each vector of a row's block: where it lies if panels are `stride` apart, All{}
// or how many of its lanes are columns, its first column in the block, its accumulator 0 .. 3.
template <class F>
INLINE void each_column(int64_t stride, int n, F f) {
  int c = 0;
  for (; c + LANES <= n; c += LANES) f(c / PANEL * stride + c % PANEL, All{}, c, c / LANES & 3);
  if (c < n) f(c / PANEL * stride + c % PANEL, n - c, c, c / LANES & 3);
}

INLINE f32v load_or_never(const float* p, All) { return load(p); }
INLINE f32v load_or_never(const float* p, int n) { return iota() < n ? load(p, n) : splat(NEVER); }

struct Statistics {
  float max, sum, spread, entropy;
};

// Of n logits l of one row, m the largest of them (0 if all are -inf):
//   sum = sum of e^(l - m), spread = sum of w (m - l), entropy = sum of e^(l - m) (l - m)
template <bool SPREADS, bool ENTROPIES>
INLINE Statistics statistics(const float* l, int64_t stride, int n, const float* class_weight) {
  f32v most[4];
  for (f32v& v : most) v = splat(NEVER);
  each_column(stride, n,
              [&](int64_t at, auto lanes, int, int u) { most[u] = max(load_or_never(l + at, lanes), most[u]); });
  const float top = max(max(max(most[0], most[1]), max(most[2], most[3]))), base = top == NEVER ? 0.0f : top;
  f32v sums[4] = {}, spreads[4] = {}, entropies[4] = {};
  each_column(stride, n, [&](int64_t at, auto lanes, int c, int u) {
    const f32v d = load(l + at, lanes) - base, e = first(exp(d), lanes);
    sums[u] += e;
    if (SPREADS) {
      const f32v w = class_weight ? load(class_weight + c, lanes) : splat(1.0f);
      spreads[u] += first(-d * w, lanes);
    }
    if (ENTROPIES) entropies[u] += select(e == 0.0f, f32v{}, e * d);
  });
  auto total = [](const f32v* v) { return sum((v[0] + v[1]) + (v[2] + v[3])); };
  return {top, total(sums), SPREADS ? total(spreads) : 0, ENTROPIES ? total(entropies) : 0};
}

struct Row {
  float lse, rest, nll, smooth, entropy;  // rest: what lse was rounded by
};

// A row's statistics from those of its blocks, at s[field * field_stride + block], in order. block_weight: the sums of
// the blocks' class weights, or null where all weights are 1.
//   nll = lse - l[target], smooth = sum of w (lse - l), entropy = - sum of p log p
INLINE Row merge(const float* s, int64_t field_stride, int64_t cols, const float* block_weight, float target) {
  const int64_t n = blocks(cols);
  f32v tops[4];
  for (f32v& v : tops) v = splat(NEVER);
  each_vector(n, [&](int64_t b, auto lanes, int u) { tops[u] = max(load_or_never(s + b, lanes), tops[u]); });
  const float top = max(max(max(tops[0], tops[1]), max(tops[2], tops[3]))), base = top == NEVER ? 0.0f : top;
  f32v sums[4] = {}, entropies[4] = {};
  double spread = 0, weight = 0;
  each_vector(n, [&](int64_t b, auto lanes, int u) {
    const f32v d = load(s + b, lanes) - base, f = exp(d), e = load(s + SUM * field_stride + b, lanes);
    sums[u] += first(f * e, lanes);
    const f32v inner = load(s + ENTROPY * field_stride + b, lanes) + d * e;
    entropies[u] += first(select(e == 0.0f, f32v{}, f * inner), lanes);
  });
  for (int64_t b = 0; b < n; b++) {
    const double w = block_weight ? block_weight[b] : width(cols, b), m = s[b] == NEVER ? 0 : s[b];
    spread += s[SPREAD * field_stride + b] + (base - m) * w;
    weight += w;
  }
  const double total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  const double inner = sum((entropies[0] + entropies[1]) + (entropies[2] + entropies[3])), log = __builtin_log(total);
  const float lse = (float)(base + log);
  return {lse, (float)(base + log - lse), (float)(base - (double)target + log), (float)(spread + log * weight),
          (float)(log - inner / total)};
}

// A logit's gradient, for each row: p (scale + slope l) - even w - (hit where it is the target's),
// p = e^(l - lse - rest).
struct Gradient {
  float lse, rest, scale, slope, even, hit;
  int32_t target;
  const Terms& terms;

  INLINE f32v operator()(f32v l, f32v class_weight, i32v column) const {
    const f32v p = exp((l - lse) - rest);
    f32v g = p * scale;
    if (slope != 0) g = select(p == 0.0f, f32v{}, p * fma(splat(slope), l, splat(scale)));
    g = fma(splat(-even), class_weight, g) - select(column == target, splat(hit), f32v{});
    g = terms.back(g, l);
    return select(abs(g) < 0x1p-126f, f32v{}, g);  // denormals would slow the products down
  }
};

}  // namespace gptfast::ISA::vocab
