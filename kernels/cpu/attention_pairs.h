// The five products of attention's gradients on bfloat16, two at a time: VDPBF16PS adds the products of two neighbours
// in fp32, which are exact for q, k, v and dout; probabilities and their gradients are rounded to bfloat16 for it, as
// on GPUs. A pair is a 32-bit lane: two dims of a row where the sum runs over dims, two queries or two keys of a dim
// where it runs over them. The orders are those of attention_backward.h, pair by pair.
#pragma once
#include "attention_backward.h"
#include "pairs.h"
#include "transpose.h"

#if defined(__AVX512BF16__)
namespace gptfast::ISA::attn {

constexpr int PAIR_DIMS = DIMS_AT_ONCE / 2;
constexpr int PAIR_TILE = TILE / 2;  // lanes of a row of bfloat16 for each key of a tile

// Rows as pairs of neighbours, `all` of them filled up with zeros, to[i / 2][stride].
template <class F>
INLINE void two_by_two(F row, int present, int all, int D, int stride, float* to) {
  for (int i = 0; i < all; i += 2)
    for (int d = 0; d < D; d += LANES) {
      const int n = min(LANES, D - d);
      i32v pair = i32v{};
      if (i < present) pair = load_two(row(i) + d, i + 1 < present ? row(i + 1) + d : nullptr, n);
      store(to + i / 2 * stride + d, bitcast<f32v>(pair));
    }
}

// s[i][TILE] = scale x[i] . y[key] of rows of pairs, y packed by tiles of them.
template <int NV>
NOINLINE void pair_rows_by_keys(const float* x, int stride, const float* yt, float* s, int pairs, float scale,
                                int begin, int end) {
  for (int i = begin; i < end; i += BLOCK) {
    const float *row = x + i * stride, *y = yt;
    for (int d = 0; d < pairs; row += PAIR_DIMS) {
      f32v acc[BLOCK][NV] = {};
      const float* a = row;
      NO_UNROLL for (const int to = min(d + PAIR_DIMS, pairs); d < to; d++, a++, y += NV * LANES) {
        i32v key[NV];
        UNROLL for (int v = 0; v < NV; v++) key[v] = bitcast<i32v>(in_register(load(y + v * LANES)));
        UNROLL for (int r = 0; r < BLOCK; r++) {
          const i32v b = splat_pair(a + r * stride);
          UNROLL for (int v = 0; v < NV; v++) acc[r][v] = add_pairs(acc[r][v], b, key[v]);
        }
      }
      UNROLL for (int r = 0; r < BLOCK; r++) {
        UNROLL for (int v = 0; v < NV; v++) {
          float* at = s + (i + r) * TILE + v * LANES;
          const f32v sum = acc[r][v] * scale;
          store(at, d > PAIR_DIMS ? load(at) + sum : sum);
        }
      }
    }
  }
}

// to[d][width] += sum over queries of x[i][d] p[i][key]; both as pairs of queries.
template <int NV>
NOINLINE void pair_keys_by_rows(const float* p, const float* x, int stride, float* to, int dim, int begin, int end) {
  for (int d = 0; d < dim; d += BLOCK, to += BLOCK * NV * LANES) {
    const float *weight = p + begin / 2 * TILE, *row = x + begin / 2 * stride + d;
    f32v acc[BLOCK][NV] = {};
    NO_UNROLL for (int i = begin; i < end; i += 2, weight += TILE, row += stride) {
      i32v w[NV];
      UNROLL for (int v = 0; v < NV; v++) w[v] = bitcast<i32v>(in_register(load(weight + v * LANES)));
      UNROLL for (int u = 0; u < BLOCK; u++) {
        const i32v a = splat_pair(row + u);
        UNROLL for (int v = 0; v < NV; v++) acc[u][v] = add_pairs(acc[u][v], w[v], a);
      }
    }
    UNROLL for (int u = 0; u < BLOCK; u++) {
      UNROLL for (int v = 0; v < NV; v++) {
        float* at = to + (u * NV + v) * LANES;
        store(at, load(at) + acc[u][v]);
      }
    }
  }
}

// dq[i][d ..] += sum over keys of ds[i][key] k[key][d ..] for GROUP queries; rows of ds and k in pairs of keys.
template <int ND>
NOINLINE void pair_queries_by_keys(const float* ds, const float* k, int stride, float* dq, int tiles, int keys) {
  f32v acc[GROUP][ND] = {};
  for (int t = 0; t < tiles; t++, ds += QUERIES * TILE, keys -= TILE) {
    const float* weight = ds;
    NO_UNROLL for (int j = min(keys, TILE); j > 0; j -= 2, weight++, k += stride) {
      i32v x[ND];
      UNROLL for (int u = 0; u < ND; u++) x[u] = bitcast<i32v>(in_register(load(k + u * LANES)));
      UNROLL for (int r = 0; r < GROUP; r++) {
        const i32v w = splat_pair(weight + r * PAIR_TILE);
        UNROLL for (int u = 0; u < ND; u++) acc[r][u] = add_pairs(acc[r][u], w, x[u]);
      }
    }
  }
  UNROLL for (int r = 0; r < GROUP; r++) {
    UNROLL for (int u = 0; u < ND; u++) {
      float* at = dq + r * stride + u * LANES;
      store(at, load(at) + acc[r][u]);
    }
  }
}

// Rounds a tile: p to pairs of queries, in place; ds to pairs of queries, and to rows (PAIR_TILE lanes each).
template <int NV>
NOINLINE void pair_up(float* p, const float* ds, float* ds_pairs, float* ds_rows, int begin, int end) {
  for (int i = begin; i < end; i += 2) UNROLL for (int v = 0; v < NV; v++) {
      const int from = i * TILE + v * LANES, to = i / 2 * TILE + v * LANES;
      store(p + to, bitcast<f32v>(beside(load(p + from), load(p + from + TILE))));
      const f32v a = load(ds + from), b = load(ds + from + TILE);
      store(ds_pairs + to, bitcast<f32v>(beside(a, b)));
      float* row = ds_rows + i * PAIR_TILE + v * LANES / 2;
      store_half(row, a);
      store_half(row + PAIR_TILE, b);
    }
}

// plain_gradient() and pair_up() in one; p needs no more digits than bfloat16 has.
template <int NV>
NOINLINE void plain_pairs(const Block& x, float* s, const float* dp, float* ds_pairs, float* ds_rows, int begin,
                          int end) {
  for (int i = begin; i < end; i += 2) {
    f32v p[2][NV], ds[2][NV];
    UNROLL for (int r = 0; r < 2; r++) {
      const f32v lse = splat(x.lse[i + r]), delta = splat(x.delta[i + r]), norm = splat(x.norm[i + r]);
      const int at = (i + r) * TILE;
      UNROLL for (int v = 0; v < NV; v++) p[r][v] = load(s + at + v * LANES) - lse;
      decay(p[r]);
      UNROLL for (int v = 0; v < NV; v++) {
        p[r][v] *= norm;
        ds[r][v] = p[r][v] * (load(dp + at + v * LANES) - delta);
      }
    }
    UNROLL for (int v = 0; v < NV; v++) {
      store(s + i / 2 * TILE + v * LANES, bitcast<f32v>(beside(p[0][v], p[1][v])));
      store(ds_pairs + i / 2 * TILE + v * LANES, bitcast<f32v>(beside(ds[0][v], ds[1][v])));
      UNROLL for (int r = 0; r < 2; r++) store_half(ds_rows + (i + r) * PAIR_TILE + v * LANES / 2, ds[r][v]);
    }
  }
}

// Keys of one head, row(key) -> const bf16*, `keys` of them, as pairs of dims by tiles, the rest of a vector zero; and
// where `rows` isn't null there as pairs of keys. The next ones, where there are any up to `last`, are fetched.
template <class F>
INLINE void pack_pairs(F row, int keys, int last, int D, int padded, int stride, float* tiles, float* rows) {
  for (int t = 0; t * TILE < keys; t++) {
    const int W = round_up(min(keys - t * TILE, TILE), LANES);
    for (int l = 0; l < W; l += LANES) {
      for (int i = 0; i < LANES; i++) prefetch_row(row(min(t * TILE + l + LANES + i, last)), D);
      for (int d = 0; d < D; d += 2 * LANES) {
        f32v y[LANES];
        UNROLL for (int i = 0; i < LANES; i++) {
          const int key = t * TILE + l + i;
          y[i] = key < keys ? bitcast<f32v>(load_pairs(row(key) + d, D - d)) : f32v{};
        }
        transpose(y);
        UNROLL for (int i = 0; i < LANES; i++) store(tiles + t * TILE * padded + (d / 2 + i) * W + l, y[i]);
      }
    }
  }
  if (rows) two_by_two(row, keys, keys, D, stride, rows);
}

// Queries likewise: rows of pairs of dims (stride / 2 apart), and behind those of `all` rows pairs of queries.
template <class F>
INLINE void pack_pair_rows(F row, int present, int all, int last, int D, int stride, float* to) {
  for (int i = 0; i < all; i++) {
    prefetch_row(row(min(i + AHEAD, last)), D);
    for (int d = 0; d < D; d += 2 * LANES)
      store(to + i * stride / 2 + d / 2, i < present ? bitcast<f32v>(load_pairs(row(i) + d, D - d)) : f32v{});
  }
  two_by_two(row, present, all, D, stride, to + all * stride / 2);
}

}  // namespace gptfast::ISA::attn
#else  // named in code that is left out
namespace gptfast::ISA::attn {
constexpr int PAIR_TILE = 0;
template <int NV>
void pair_rows_by_keys(const float*, int, const float*, float*, int, float, int, int);
template <int NV>
void pair_keys_by_rows(const float*, const float*, int, float*, int, int, int);
template <int ND>
void pair_queries_by_keys(const float*, const float*, int, float*, int, int);
template <int NV>
void pair_up(float*, const float*, float*, float*, int, int);
template <int NV>
void plain_pairs(const Block&, float*, const float*, float*, float*, int, int);
template <class F>
void pack_pairs(F, int, int, int, int, int, float*, float*);
template <class F>
void pack_pair_rows(F, int, int, int, int, int, float*);
}  // namespace gptfast::ISA::attn
#endif
