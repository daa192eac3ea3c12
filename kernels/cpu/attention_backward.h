// The arithmetic of attention's gradients on a block of queries of one head and a strip of keys: five products, whose
// lanes run along keys (scores, dV, dK) or dims (dQ), none of them ending in a horizontal sum. Their order of
// summation:
//   score(i, key), dp(i, key)   fma over 64 dims in order, from 0; then those sums in order
//   dk(key, d), dv(key, d)      fma over the queries of a block in order, from 0; then the blocks in order
//   dq(i, d)                    fma over the keys of a strip in order, from 0; then the strips in order
// A key that a query doesn't see has probability 0 exactly and may be computed or skipped.
// Keys and values are packed by tiles as kt[d][width]; keys as rows too, for dQ.
#pragma once
#include "attention.h"

namespace gptfast::ISA::attn {

constexpr int TILE = 3 * LANES;  // keys side by side
constexpr int STRIP = 96;        // keys; gptfast/ops/attention.py says so too, as of QUERIES
constexpr int QUERIES = 48;      // of a block
constexpr int STRIP_TILES = STRIP / TILE;
constexpr int DIMS_AT_ONCE = 64;
constexpr int GROUP = 6;                         // queries x DQ_VECTORS sums + DQ_VECTORS + 1 fill the registers
constexpr int DQ_VECTORS = LANES == 16 ? 4 : 2;  // of dims
static_assert(STRIP % TILE == 0 && QUERIES % GROUP == 0 && QUERIES % BLOCK == 0 && QUERIES % LANES == 0);
INLINE int row_stride(int dim) { return round_up(dim, LANES) + 16; }  // spread over L1's sets

// The queries of a block: rows .. QUERIES are zero and see what the last one does.
struct Block {
  int first, rows;
  float *q, *dout;                      // [QUERIES][row_stride]; q comes scaled
  float lse[QUERIES], delta[QUERIES];   // lse is +inf where nothing is attended to, so that all probabilities are 0
  float norm[QUERIES];                  // p = norm e^(s - lse): what the rounding of lse left undone, or 1
  int32_t low[QUERIES], high[QUERIES];  // keys [low, high) are seen by a query; both grow with it
  int position;                         // of the first query
  float slope;
  uint64_t element;  // dropout's number of the first query and key 0
  int64_t elements;  // from query to query
  Dropout dropout;
  float keep_scale;
};

// s[i][TILE] = x[i] . y[key], y packed by tiles.
template <int NV>
NOINLINE void rows_by_keys(const float* x, int stride, const float* yt, float* s, int dim, int begin, int end) {
  for (int i = begin; i < end; i += BLOCK) {
    const float *row = x + i * stride, *y = yt;
    for (int d = 0; d < dim; row += DIMS_AT_ONCE) {
      f32v acc[BLOCK][NV] = {};
      const float* a = row;
      NO_UNROLL for (const int to = min(d + DIMS_AT_ONCE, dim); d < to; d++, a++, y += NV * LANES) {
        f32v key[NV];
        UNROLL for (int v = 0; v < NV; v++) key[v] = in_register(load(y + v * LANES));
        UNROLL for (int r = 0; r < BLOCK; r++) {
          const f32v b = splat(a[r * stride]);
          UNROLL for (int v = 0; v < NV; v++) acc[r][v] = fma(b, key[v], acc[r][v]);
        }
      }
      UNROLL for (int r = 0; r < BLOCK; r++) {
        UNROLL for (int v = 0; v < NV; v++) {
          float* at = s + (i + r) * TILE + v * LANES;
          store(at, d > DIMS_AT_ONCE ? load(at) + acc[r][v] : acc[r][v]);
        }
      }
    }
  }
}

// to[d][width] += sum over queries of x[i][d] p[i][key].
template <int NV>
NOINLINE void keys_by_rows(const float* p, const float* x, int stride, float* to, int dim, int begin, int end) {
  for (int d = 0; d < dim; d += BLOCK, to += BLOCK * NV * LANES) {
    const float *weight = p + begin * TILE, *row = x + begin * stride + d;
    f32v acc[BLOCK][NV] = {};
    NO_UNROLL for (int i = begin; i < end; i++, weight += TILE, row += stride) {
      f32v w[NV];
      UNROLL for (int v = 0; v < NV; v++) w[v] = in_register(load(weight + v * LANES));
      UNROLL for (int u = 0; u < BLOCK; u++) {
        const f32v a = splat(row[u]);
        UNROLL for (int v = 0; v < NV; v++) acc[u][v] = fma(w[v], a, acc[u][v]);
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

// dq[i][d ..] += sum over keys of ds[i][key] k[key][d ..] for GROUP queries, ds from tile to tile QUERIES rows apart.
template <int ND>
NOINLINE void queries_by_keys(const float* ds, const float* k, int stride, float* dq, int tiles, int keys) {
  f32v acc[GROUP][ND] = {};
  for (int t = 0; t < tiles; t++, ds += QUERIES * TILE, keys -= TILE) {
    const float* weight = ds;
    NO_UNROLL for (int j = min(keys, TILE); j > 0; j--, weight++, k += stride) {
      f32v x[ND];
      UNROLL for (int u = 0; u < ND; u++) x[u] = in_register(load(k + u * LANES));
      UNROLL for (int r = 0; r < GROUP; r++) {
        const f32v w = splat(weight[r * TILE]);
        UNROLL for (int u = 0; u < ND; u++) acc[r][u] = fma(w, x[u], acc[r][u]);
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

// s to p and dp to ds, in place, for scores that have no terms and that every query sees.
template <int NV>
NOINLINE void plain_gradient(const Block& x, float* s, float* ds, int begin, int end) {
  for (int i = begin; i < end; i++) {
    const f32v lse = splat(x.lse[i]), delta = splat(x.delta[i]), norm = splat(x.norm[i]);
    UNROLL for (int v = 0; v < NV; v++) {
      float *p = s + i * TILE + v * LANES, *d = ds + i * TILE + v * LANES;
      const f32v e = exp(load(p) - lse) * norm;
      store(p, e);
      store(d, e * (load(d) - delta));
    }
  }
}

// The same with all terms; p as it meets V, dropped and scaled. bias [QUERIES][TILE]; through_cap: ds of the scores
// before the softcap, else after it.
template <int NV>
NOINLINE void gradient(const Block& x, const Terms& t, int first_key, const float* bias, bool through_cap, float* s,
                       float* ds, int begin, int end) {
  for (int i = begin; i < end; i++) {
    const f32v lse = splat(x.lse[i]), delta = splat(x.delta[i]), slope = splat(x.slope), norm = splat(x.norm[i]);
    const i32v low = splat(x.low[i]), high = splat(x.high[i]), position = splat(x.position + i);
    int32_t room[TILE + 4 * LANES];
    const int32_t* keep = room;
    const Dropout& drop = x.dropout;
    if (drop.below)
      keep = dropout_keep(room, x.element + i * x.elements + first_key, NV * LANES, drop.below, drop.stream, drop.seed);
    UNROLL for (int v = 0; v < NV; v++) {
      float *at = s + i * TILE + v * LANES, *d = ds + i * TILE + v * LANES;
      f32v y = load(at), slack = splat(1.0f);
      if (t.cap != 0) {
        const f32v h = tanh(y * t.inverse_cap);
        y = h * t.cap;
        slack = fma(-h, h, slack);
      }
      Terms rest = t;
      rest.cap = 0;
      const f32v add = t.bias ? load(bias + i * TILE + v * LANES) : f32v{};
      y = score(rest, y, iota() + (first_key + v * LANES), position, slope, add, low, high);
      const f32v e = exp(y - lse) * norm;
      f32v p = e, dp = load(d);
      if (drop.below) {
        const i32v kept = load(keep + v * LANES);
        p = select(kept, p * x.keep_scale, f32v{});
        dp = select(kept, dp * x.keep_scale, f32v{});
      }
      f32v g = e * (dp - delta);
      if (through_cap) g *= slack;
      store(at, p);
      store(d, g);
    }
  }
}

}  // namespace gptfast::ISA::attn
