// One chunk of keys with query rows in the lanes: what prefill takes. The order of sums is attention.h's.
#pragma once
#include "attention.h"
#include "transpose.h"

namespace gptfast::ISA::attn {

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

}  // namespace gptfast::ISA::attn
