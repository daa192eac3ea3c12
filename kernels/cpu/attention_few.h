// One chunk of keys for few query rows, with keys, then dims, in the lanes: what decoding takes. The order of sums is
// attention.h's.
#pragma once
#include "attention.h"

namespace gptfast::ISA::attn {

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
