// The arithmetic of attention on one chunk of keys, in two shapes that give the same bits: `rows` puts query rows in
// the lanes (prefill), `few` puts keys (QK) and dims (PV) in them (decode). Both keep one order of summation:
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
#include "transpose.h"

namespace gptfast::ISA::attn {

INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

// What happens to a score between Q K and the softmax.
struct Terms {
  float cap, inverse_cap;  // 0 = none
  bool alibi, bias, edge;  // edge: some row of the tile doesn't see some key of the chunk
};

// tanh to 2 units in the last place: an odd polynomial near 0, 1 - 2 / (e^2x + 1) beyond.
INLINE f32v tanh(f32v x) {
  f32v a = abs(x), z = x * x, p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  f32v near = fma(p * z, x, x), far = 1.0f - 2.0f / (exp2(min(a, splat(20.0f)) * 2.88539008177792681f) + 1.0f);
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

// ---- query rows in the lanes ----

// Where the keys of a chunk end that each vector of rows sees: not before those of the vector ahead of it, so that
// vectors from .. NV share the keys ends[from - 1] .. ends[from].
template <int NV>
struct Ends {
  int at[NV];
  Ends(const Tile& t, const Keys& keys) {
    for (int v = 0; v < NV; v++) at[v] = max(keys.begin, min(keys.end, t.high[v * LANES + LANES - 1] - keys.start));
  }
  int group(int v) const { return (int)ceil_div(at[v], LANES); }
};

// Scores before their terms to s, for vectors FROM .. NV, and the maximum of the plain ones to m. dim: in lanes.
template <int NV, int FROM = 0>
NOINLINE void qk_rows(const float* qt, const float* kt, float scale, float* s, int dim, int begin, int end, Plain plain,
                      float* m) {
  constexpr int W = NV * LANES;
  for (int j = begin; j < end; j += BLOCK) {
    const float* k = kt + (j / LANES * dim) * LANES + j % LANES;
    const float* q = qt;
    f32v acc[BLOCK][NV] = {};
    NO_UNROLL for (int d = 0; d < dim; d++, q += W, k += LANES) {
      f32v row[NV];
      UNROLL for (int v = FROM; v < NV; v++) row[v] = in_register(load(q + v * LANES));
      UNROLL for (int i = 0; i < BLOCK; i++) {
        const f32v key = splat(k[i]);
        UNROLL for (int v = FROM; v < NV; v++) acc[i][v] = add_products(acc[i][v], row[v], key);
      }
    }
    UNROLL for (int i = 0; i < BLOCK; i++) {
      UNROLL for (int v = FROM; v < NV; v++) {
        if constexpr (PAIRS) acc[i][v] *= scale;
        store(s + (j + i) * W + v * LANES, acc[i][v]);
      }
    }
    if (FROM > 0 || !plain.has(j / LANES)) continue;
    UNROLL for (int v = 0; v < NV; v++) {
      f32v top = load(m + v * LANES);
      UNROLL for (int i = 0; i < BLOCK; i++) top = max(top, acc[i][v]);
      store(m + v * LANES, top);
    }
  }
}

// The other scores of the chunk to their final value, in place; the maximum of all to m.
template <int NV>
NOINLINE void score_rows(const Tile& t, const Keys& keys, const Ends<NV>& ends, Plain plain, float* s, float* m) {
  constexpr int W = NV * LANES;
  f32v top[NV];
  for (int v = 0; v < NV; v++) top[v] = load(m + v * LANES);
  for (int g = keys.first_group(); g < keys.last_group(); g++) {
    if (plain.has(g)) continue;
    Terms terms = keys.terms;
    const int from = keys.start + g * LANES;
    terms.edge = from < t.low[t.rows - 1] || from + LANES > t.high[0];
    for (int v = 0; v < NV; v++) {
      const int at = v * LANES;
      if (g >= ends.group(v)) continue;
      const i32v low = load(t.low + at), high = load(t.high + at), position = load(t.position + at);
      const f32v slope = load(t.slope + at);
      f32v bias[LANES] = {};
      if (terms.bias) {
        UNROLL for (int i = 0; i < LANES; i++) bias[i] = load(keys.bias + (at + i) * CHUNK + g * LANES);
        transpose(bias);
      }
      for (int i = 0; i < LANES; i++) {
        float* to = s + (g * LANES + i) * W + at;
        const f32v x = score(terms, load(to), splat(from + i), position, slope, bias[i], low, high);
        store(to, x);
        top[v] = max(top[v], x);
      }
    }
  }
  for (int v = 0; v < NV; v++) store(m + v * LANES, top[v]);
}

// p = e^(s - m) in place; row sums to l.
template <int NV>
NOINLINE void exp_rows(const Keys& keys, const Ends<NV>& ends, float* s, const float* m, float* l) {
  constexpr int W = NV * LANES;
  const int first = keys.first_group();
  f32v base[NV], part[LANES][NV];
  UNROLL for (int v = 0; v < NV; v++) base[v] = finite(load(m + v * LANES));
  for (int i = 0; i < LANES; i++) {
    f32v total[NV] = {};
    float* p = s + (first * LANES + i) * W;
    int g = first;
    auto vectors_from = [&](auto from) {
      constexpr int FROM = decltype(from)::value;
      if constexpr (FROM < NV) {
        NO_UNROLL for (const int last = ends.group(FROM); g < last; g++, p += LANES * W) {
          f32v e[NV - FROM];
          UNROLL for (int v = FROM; v < NV; v++) e[v - FROM] = load(p + v * LANES) - base[v];
          decay(e);
          UNROLL for (int v = FROM; v < NV; v++) {
            store(p + v * LANES, e[v - FROM]);
            total[v] += e[v - FROM];
          }
        }
      }
    };
    vectors_from(Int<0>{});
    vectors_from(Int<1>{});
    vectors_from(Int<2>{});
    UNROLL for (int v = 0; v < NV; v++) part[i][v] = total[v];
  }
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++)
      for (int v = 0; v < NV; v++) part[i][v] += part[i + n][v];
  for (int v = 0; v < NV; v++) store(l + v * LANES, part[0][v]);
}

// Which keys of the chunk's groups row r keeps: room for CHUNK + 4 LANES, from the first group on.
INLINE const int32_t* kept(const Tile& t, const Keys& keys, int r, int32_t* room) {
  const int first = keys.first_group() * LANES, n = keys.last_group() * LANES - first;
  const Dropout& d = keys.dropout;
  return dropout_keep(room, t.element[r] + keys.start + first, n, d.below, d.stream, d.seed);
}

// p = 0 where it is dropped.
template <int NV>
NOINLINE void drop_rows(const Tile& t, const Keys& keys, float* p) {
  const int first = keys.first_group(), last = keys.last_group();
  for (int v = 0; v < NV * LANES; v += LANES) {
    int32_t room[LANES][CHUNK + 4 * LANES];
    const int32_t* row[LANES];
    for (int i = 0; i < LANES; i++) row[i] = kept(t, keys, v + i, room[i]);
    for (int g = first; g < last; g++) {
      f32v keep[LANES];
      UNROLL for (int i = 0; i < LANES; i++) keep[i] = bitcast<f32v>(load(row[i] + (g - first) * LANES));
      transpose(keep);
      for (int i = 0; i < LANES; i++) {
        float* at = p + (g * LANES + i) * NV * LANES + v;
        store(at, select(bitcast<i32v>(keep[i]), load(at), f32v{}));
      }
    }
  }
}

// p rounded to pairs of keys, p[key / 2][width], in place.
template <int NV>
NOINLINE void pair_rows(float* p, int first, int last) {
  constexpr int W = NV * LANES;
  for (int j = first; j < last; j += 2) UNROLL for (int v = 0; v < NV; v++) {
      const float* at = p + j * W + v * LANES;
      store(p + j / 2 * W + v * LANES, bitcast<f32v>(beside(load(at), load(at + W))));
    }
}

// o = o a + (P V) b
template <int NV>
NOINLINE void pv_rows(const float* p, const float* vt, float* o, const float* a, const float* b, int dim, int begin,
                      const Ends<NV>& ends) {
  constexpr int W = NV * LANES;
  for (int d = 0; d < dim; d += BLOCK) {
    int j = begin / PER_LANE;
    const float *x = vt + (d / LANES * CHUNK / PER_LANE + j) * LANES + d % LANES, *row = p + j * W;
    f32v acc[BLOCK][NV] = {};
    auto vectors_from = [&](auto from) {
      constexpr int FROM = decltype(from)::value;
      if constexpr (FROM < NV) {
        NO_UNROLL for (const int last = (int)lanes_of(ends.at[FROM]); j < last; j++, x += LANES, row += W) {
          f32v weight[NV];
          UNROLL for (int v = FROM; v < NV; v++) weight[v] = in_register(load(row + v * LANES));
          UNROLL for (int i = 0; i < BLOCK; i++) {
            const f32v value = splat(x[i]);
            UNROLL for (int v = FROM; v < NV; v++) acc[i][v] = add_products(acc[i][v], weight[v], value);
          }
        }
      }
    };
    vectors_from(Int<0>{});
    vectors_from(Int<1>{});
    vectors_from(Int<2>{});
    UNROLL for (int i = 0; i < BLOCK; i++) {
      UNROLL for (int v = 0; v < NV; v++) {
        float* to = o + (d + i) * W + v * LANES;
        store(to, fma(load(to), load(a + v * LANES), acc[i][v] * load(b + v * LANES)));
      }
    }
  }
}

template <int NV>
void chunk_rows(const Tile& t, const Keys& keys, const float* kt, const float* vt, float* s) {
  float mc[ROWS], lc[ROWS], a[ROWS], b[ROWS];
  const Plain plain(t, keys);
  const Ends<NV> ends(t, keys);
  for (int v = 0; v < NV; v++) store(mc + v * LANES, splat(NONE));
  int begin = keys.first_group() * LANES;
  auto vectors_from = [&](auto from) {
    constexpr int FROM = decltype(from)::value;
    if constexpr (FROM < NV) {
      const int end = ends.group(FROM) * LANES;
      qk_rows<NV, FROM>(t.q, kt, t.scale, s, (int)lanes_of(t.dim), begin, end, plain, mc);
      begin = max(begin, end);
    }
  };
  vectors_from(Int<0>{});
  vectors_from(Int<1>{});
  vectors_from(Int<2>{});
  score_rows<NV>(t, keys, ends, plain, s, mc);
  exp_rows<NV>(keys, ends, s, mc, lc);
  if (keys.dropout.below) drop_rows<NV>(t, keys, s);
  if constexpr (PAIRS) pair_rows<NV>(s, keys.first_group() * LANES, keys.last_group() * LANES);
  for (int v = 0; v < NV * LANES; v += LANES) merge(t.m + v, t.l + v, load(mc + v), load(lc + v), a + v, b + v);
  pv_rows<NV>(s, vt, t.o, a, b, t.dim, keys.begin, ends);
}

// ---- keys, then dims, in the lanes ----

// Keys are turned in registers and used there, for all rows and GROUPS x LANES keys at a time.
template <class T, int R>
NOINLINE void qk_few(const float* q, const Rows<T>* k, const Rows<T>* v, float scale, int first, int last, int dim,
                     float* s) {
  for (int g = first / GROUPS * GROUPS; g < last; g += GROUPS) {
    auto at = [&](int u) { return max(first, min(g + u, last - 1)); };
    auto rows = [&](int u) { return k[at(u)]; };
    Quads quads[2] = {Quads(rows(0)), Quads(rows(GROUPS - 1))};
    Lines<T> values(v[at(0)], v[at(GROUPS - 1)], dim);
    const f32v scales[2] = {rows(0).scales(), rows(GROUPS - 1).scales()};
    f32v acc[R][GROUPS] = {};
    int d = 0;
    NO_UNROLL for (; d + DIMS<T> <= dim; d += DIMS<T>) {
      f32v words[GROUPS][4];
      if constexpr (FETCH_NEXT) values.fetch();
      UNROLL for (int u = 0; u < GROUPS; u++) quads[u].turn(words[u], T{});
      UNROLL for (int i = 0; i < DIMS<T> / PER_LANE; i++) {
        f32v key[GROUPS];
        UNROLL for (int u = 0; u < GROUPS; u++) {
          if constexpr (PAIRS)
            key[u] = words[u][i];
          else
            key[u] = Rows<T>::scaled(scales[u], value(words[u][i / PER_WORD<T>], i % PER_WORD<T>, T{}));
        }
        UNROLL for (int r = 0; r < R; r++) {
          const f32v x = splat(q[r * DIM + d / PER_LANE + i]);
          UNROLL for (int u = 0; u < GROUPS; u++) acc[r][u] = add_products(acc[r][u], x, key[u]);
        }
      }
    }
    for (; d < dim; d += PER_LANE) {
      UNROLL for (int u = 0; u < GROUPS; u++) {
        const f32v key = column_of_lanes(rows(u), d, dim);
        UNROLL for (int r = 0; r < R; r++) acc[r][u] = add_products(acc[r][u], splat(q[r * DIM + d / PER_LANE]), key);
      }
    }
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int u = 0; u < GROUPS; u++) {
        if constexpr (PAIRS) acc[r][u] *= scale;
        store(s + r * CHUNK + (g + u) * LANES, acc[r][u]);
      }
    }
  }
}

// One row's scores to probabilities, in place: their maximum to *m, their sum to *l.
NOINLINE inline void softmax_few(const Tile& t, const Keys& keys, int r, float* s, float* m, float* l) {
  const i32v low = splat(t.low[r]), high = splat(t.high[r]), position = splat(t.position[r]);
  const f32v slope = splat(t.slope[r]);
  f32v top = splat(NONE), total = {};
  for (int g = keys.first_group(); g < keys.last_group(); g++) {
    const f32v bias = keys.terms.bias ? load(keys.bias + r * CHUNK + g * LANES) : f32v{};
    const i32v key = iota() + (keys.start + g * LANES);
    const f32v x = score(keys.terms, load(s + g * LANES), key, position, slope, bias, low, high);
    store(s + g * LANES, x);
    top = max(top, x);
  }
  *m = max(top);
  const f32v base = finite(splat(*m));
  for (int g = keys.first_group(); g < keys.last_group(); g++) {
    const f32v e = decay(load(s + g * LANES) - base);
    store(s + g * LANES, e);
    total += e;
  }
  *l = sum(total);
  if (keys.dropout.below) {
    int32_t room[CHUNK + 4 * LANES];
    const int32_t* keep = kept(t, keys, r, room);
    for (int g = keys.first_group(); g < keys.last_group(); g++, keep += LANES)
      store(s + g * LANES, select(load(keep), load(s + g * LANES), f32v{}));
  }
  if constexpr (PAIRS)
    for (int g = keys.first_group(); g < keys.last_group(); g++) store_half(s + g * LANES / 2, load(s + g * LANES));
}

// Vectors of dims side by side for R rows: AVX2 needs 8 sums or more to hide an fma's 4 cycles, and has 16 registers
// for R ND sums, R weights and a value.
constexpr int dim_vectors(int R) {
  if (LANES == 8) return R == 1 ? 8 : R <= 3 ? 4 : 2;
  const int most = LANES == 16 ? 4 : 2;
  return R <= FEW / 2 ? most : most / 2;
}

template <class T, int R, int ND>
NOINLINE void pv_few(const Rows<T>* v, const Keys& keys, int d, int n, const float* p, float* o, int stride,
                     const float* a, const float* b) {
  const int begin = keys.begin, end = keys.end;
  f32v acc[R][ND] = {};
  for (int g = begin / LANES; g * LANES < end; g++) {
    const int last = min(end - g * LANES, LANES);
    const int first = max(begin - g * LANES, 0);
    int j = first / PER_LANE * PER_LANE;
    const T* from = v[g].at + j * v[g].stride + d;
    NO_UNROLL for (; j < last; j += PER_LANE, from += PER_LANE * v[g].stride) {
      const T* ahead[PER_LANE];
      UNROLL for (int i = 0; i < PER_LANE; i++) ahead[i] =
          FETCH_NEXT ? (const T*)keys.ahead.row(g * LANES + j + i) + d : from + AHEAD * v[g].stride;
      f32v weight[R];
      UNROLL for (int r = 0; r < R; r++) weight[r] = splat(p[r * CHUNK + (g * LANES + j) / PER_LANE]);
      UNROLL for (int u = 0; u < ND; u++) {
        f32v x;
        if constexpr (PAIRS)
          x = value_lanes(v[g], j, first, last, d + u * LANES, ND == 1 ? n : LANES);
        else
          x = v[g].scaled(j, ND == 1 ? load(from, n) : load(from + u * LANES));
        x = in_register(x);
        if (u % (64 / (LANES * (int)sizeof(T))) == 0)
          for (const T* to : ahead) __builtin_prefetch(to + u * LANES, 0, FETCH_NEXT ? 2 : 3);
        UNROLL for (int r = 0; r < R; r++) acc[r][u] = add_products(acc[r][u], weight[r], x);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) {
    UNROLL for (int u = 0; u < ND; u++) {
      float* to = o + r * stride + d + u * LANES;
      store(to, fma(load(to), splat(a[r]), acc[r][u] * b[r]));
    }
  }
}

// All dims from d on.
template <class T, int R, int ND = dim_vectors(R)>
void pv_dims(const Tile& t, const Keys& keys, const Rows<T>* v, int d, const float* p, const float* a, const float* b) {
  const int stride = round_up(t.dim, LANES);
  for (; d + ND * LANES <= t.dim; d += ND * LANES) pv_few<T, R, ND>(v, keys, d, LANES, p, t.o, stride, a, b);
  if constexpr (ND > 1)
    pv_dims<T, R, ND / 2>(t, keys, v, d, p, a, b);
  else if (d < t.dim)
    pv_few<T, R, 1>(v, keys, d, t.dim - d, p, t.o, stride, a, b);
}

// One chunk: R rows, k and v by groups.
template <class T, int R>
void chunk_few(const Tile& t, const Keys& keys, const Rows<T>* k, const Rows<T>* v, float* s) {
  float mc[LANES], lc[LANES] = {}, a[LANES], b[LANES];
  store(mc, splat(NONE));
  qk_few<T, R>(t.q, k, v, t.scale, keys.first_group(), keys.last_group(), t.dim, s);
  for (int r = 0; r < R; r++) softmax_few(t, keys, r, s + r * CHUNK, mc + r, lc + r);
  merge(t.m, t.l, load(mc), load(lc), a, b);
  pv_dims<T, R>(t, keys, v, 0, s, a, b);
}
template <class T, int R = 1>
void chunk_few_rows(const Tile& t, const Keys& keys, const Rows<T>* k, const Rows<T>* v, float* s) {
  if constexpr (R < FEW) {
    if (t.rows > R) return chunk_few_rows<T, R + 1>(t, keys, k, v, s);
  }
  chunk_few<T, R>(t, keys, k, v, s);
}

}  // namespace gptfast::ISA::attn
