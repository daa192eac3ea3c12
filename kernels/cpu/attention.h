// The arithmetic of attention on one chunk of keys, in two shapes that give the same bits: `rows` puts query rows in
// the lanes (attention_rows.h, for prefill), `few` puts keys (QK) and dims (PV) in them (attention_few.h, for decode).
// Both keep one order of summation:
//   score(row, key)   fma over d = 0, 1, ... from 0; by pairs of dims it is multiplied by the scale thereafter
//   row sum           LANES partial sums, key j to partial j % LANES, keys in order; then added by halves
//   out(row, d)       fma over the keys of the chunk in order, from 0; pairs of keys are even ones and their next
// A masked key has probability 0 exactly and adding it changes nothing, so it may be computed or skipped.
// K is packed as kt[key / LANES][d][LANES] and V as vt[d / LANES][key][LANES], in fp32, or by pairs of d and of keys
// (pairs.h): of bfloat16 the products of Q K are exact then, and probabilities are rounded to it for those with V, as
// on GPUs; their sums are of those not rounded.
#pragma once
#include "attention_keys.h"
#include "philox.h"

namespace gptfast::ISA::attn {

INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

// What happens to a score between Q K and the softmax.
struct Terms {
  float cap, inverse_cap;  // 0 = none
  bool alibi, bias, edge;  // edge: some row of the tile doesn't see some key of the chunk
};

// tanh to 2 units in the last place: an odd polynomial near 0, 1 - 2 / (e^2x + 1) beyond. NaN stays NaN.
INLINE f32v tanh(f32v x) {
  f32v a = abs(x), z = x * x, p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  f32v near = fma(p * z, x, x), far = 1.0f - 2.0f / (exp2(min(splat(20.0f), a) * 2.88539008177792681f) + 1.0f);
  return select(a < 0.625f, near, bitcast<f32v>(bitcast<i32v>(far) | (bitcast<i32v>(x) & (int32_t)0x80000000)));
}

INLINE f32v score(const Terms& t, f32v s, i32v key, i32v position, f32v slope, f32v bias, i32v low, i32v high) {
  if (t.cap != 0) s = tanh(s * t.inverse_cap) * t.cap;
  if (t.alibi) {
    i32v distance = position - key;
    s = fma(-slope, to_float(distance < 0 ? -distance : distance), s);
  }
  if (t.bias) s += bias;
  if (t.edge) s = select((key >= low) & (key < high), s, splat(NONE));
  return s;
}
// In registers at this point, all of them, lest the compiler work on one after another.
template <int N>
INLINE void together(f32v (&x)[N]) {
#if defined(__x86_64__)
  if constexpr (N == 2) asm("" : "+v"(x[0]), "+v"(x[1]));
  if constexpr (N == 3) asm("" : "+v"(x[0]), "+v"(x[1]), "+v"(x[2]));
#else
  (void)x;
#endif
}
// e^x for x <= 0: the absolute error counts, so x log2(e) may be rounded. 2^y to 2 units in the last place by a
// polynomial of degree 5; y below -127 is taken for it, whose power is exactly zero. NaN stays one. N vectors step by
// step: each alone is a chain of a dozen instructions of 3 to 4 cycles.
template <int N>
INLINE void decay(f32v (&x)[N]) {
  constexpr float terms[] = {9.671512991e-3f, 5.550733581e-2f, 2.402224243e-1f, 6.931470037e-1f, 1.0f};
  constexpr float whole = 0x1.8p23f + 127;  // added, it leaves y rounded to nearest even + 127, an exponent, at the end
  f32v n[N], p[N];
  auto step = [](f32v(&to)[N], auto f) {
    UNROLL for (int i = 0; i < N; i++) to[i] = f(i);
    together(to);
  };
  step(x, [&](int i) { return x[i] * 1.44269504088896341f; });
  step(x, [&](int i) { return max(splat(-127.0f), x[i]); });
  step(n, [&](int i) { return x[i] + whole; });
  step(x, [&](int i) { return x[i] - (n[i] - whole); });
  step(n, [&](int i) { return bitcast<f32v>(bitcast<i32v>(n[i]) << 23); });
  for (int i = 0; i < N; i++) p[i] = splat(1.326472731e-3f);
  UNROLL for (const float term : terms) step(p, [&](int i) { return fma(p[i], x[i], splat(term)); });
  for (int i = 0; i < N; i++) x[i] = p[i] * n[i];
}
INLINE f32v decay(f32v x) {
  f32v one[1] = {x};
  decay(one);
  return one[0];
}
INLINE f32v finite(f32v m) { return select(m == NONE, f32v{}, m); }

// The rows of a tile and what is known of them so far. In the `rows` shape q and o are transposed, [d][width].
struct Tile {
  int first, rows, width, dim;  // the first row; width: rows rounded up to lanes
  bool few;                     // which shape; in `few`, q is [row][DIM] and o [row][dim rounded up to lanes]
  float scale;                  // of scores by pairs; else q comes scaled
  float *q, *o, *m, *l;
  float *slope, *sink;             // per row
  int32_t *low, *high, *position;  // keys [low, high) are seen by a row; both grow with the row
  uint64_t* element;               // dropout's number of the row's first key
};

// Which probabilities are dropped: ops/philox.py.
struct Dropout {
  uint64_t seed;
  uint32_t stream, below;  // 0 = none
};

// Keys to be fetched while a chunk's values are used, each a row: the first `near` from `next` on, those after them
// from `other` on.
struct Ahead {
  const char *next, *other;
  int near;
  int64_t stride;  // bytes
  INLINE const char* row(int j) const { return (j < near ? next : other) + j * stride; }
};

// One chunk as seen by a tile: keys start + [begin, end) are needed.
struct Keys {
  int start, begin, end;
  Terms terms;
  const float* bias;  // [width][CHUNK]
  Dropout dropout;
  Ahead ahead;
  int first_group() const { return begin / LANES; }
  int last_group() const { return (int)ceil_div(end, LANES); }
};

// The groups of a chunk whose scores are final as Q K gives them.
struct Plain {
  int begin, end;
  Plain(const Tile& t, const Keys& k) : begin(k.last_group()), end(begin) {
    if (k.terms.cap != 0 || k.terms.alibi || k.terms.bias) return;
    begin = max(k.first_group(), (int)ceil_div(max(t.low[t.rows - 1] - k.start, 0), LANES));
    end = min(k.last_group(), max(t.high[0] - k.start, 0) / LANES);
  }
  bool has(int group) const { return begin <= group && group < end; }
};

// m = max(m, m_c) and the factors a = e^(m_old - m), b = e^(m_c - m) that bring both sides to it; l = l a + l_c b.
INLINE void merge(float* m, float* l, f32v mc, f32v lc, float* a, float* b) {
  const f32v old = load(m), now = max(old, mc), base = finite(now);
  const f32v fa = decay(old - base), fb = decay(mc - base);
  store(m, now);
  store(l, fma(load(l), fa, lc * fb));
  store(a, fa);
  store(b, fb);
}

// Which keys of the chunk's groups row r keeps: room for CHUNK + 4 LANES, from the first group on.
INLINE const int32_t* kept(const Tile& t, const Keys& keys, int r, int32_t* room) {
  const int first = keys.first_group() * LANES, n = keys.last_group() * LANES - first;
  const Dropout& d = keys.dropout;
  return dropout_keep(room, t.element[r] + keys.start + first, n, d.below, d.stream, d.seed);
}

// The keys [low, high) that query i of a sequence may attend to: causality and the window are aligned to the last key.
template <class A, class S>
void visible(const A& a, const S& s, int i, int* low, int* high) {
  const int64_t here = (int64_t)i + s.k_len - s.q_len;
  int64_t to = a.causal ? here + 1 : s.k_len, from = a.left >= 0 ? here - a.left : 0;
  if (a.right >= 0) to = min(to, here + a.right + 1);
  *low = (int)max<int64_t>(from, 0);
  *high = (int)max<int64_t>(min<int64_t>(to, s.k_len), 0);
}

}  // namespace gptfast::ISA::attn
