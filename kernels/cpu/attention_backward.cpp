#include "attention_backward.h"

#include "attention_pairs.h"
#include "kernels.h"

// The gradients of attention, FlashAttention-2's: probabilities are made again from q, k and lse, block by block.
// Where there are enough heads, a task is a KV head of a sequence: five products for each pair of a block of queries
// and a strip of keys. Where there are few, dK and dV are dealt out by strips and dQ by blocks: seven products, in the
// same order and with the same bits.
namespace gptfast::ISA {

namespace {

using namespace attn;

constexpr int TASK_BLOCKS = 4;  // of a task of dQ alone, for which a strip is packed once

// One sequence of the batch: where its rows begin, and how long it is.
struct Sequence {
  int64_t b, q_first, k_first;  // in rows; 0 where sequences have a stride of their own
  uint64_t elements;            // of dropout before it
  int q_len, k_len;
};

Sequence sequence(const AttentionBackward& a, int64_t b) {
  if (!a.cu_q) return {b, 0, 0, (uint64_t)(b * a.H * a.Sq * a.Sk), (int)a.Sq, (int)a.Sk};
  Sequence s{b, a.cu_q[b], a.cu_k[b], 0, a.cu_q[b + 1] - a.cu_q[b], a.cu_k[b + 1] - a.cu_k[b]};
  if (a.drop_below)
    for (int64_t n = 0; n < b; n++)
      s.elements += a.H * (a.cu_q[n + 1] - a.cu_q[n]) * (int64_t)(a.cu_k[n + 1] - a.cu_k[n]);
  return s;
}

// Of each query of a block: sum of p, sum of p dp.
struct Sums {
  float p[QUERIES], dp[QUERIES];
};

// What a task makes of the pairs that it goes through; null is not made.
struct Wanted {
  int first = 0;        // the query that dq and q begin with
  float* dq = nullptr;  // [query - first][row_stride] of one head, added to
  float* q = nullptr;   // likewise q and, `room` behind it, dout, where they have been loaded
  int64_t room = 0;
  bool keys = false;       // dK and dV of the strip, added to
  float* dbias = nullptr;  // [STRIP_TILES][QUERIES][TILE], added to
  Sums* sums = nullptr;    // added to
  bool keep_all = false;   // no dropout
};

// A worker's memory and its work on one sequence.
template <class T>
struct Gradients {
  const AttentionBackward& a;
  const int D, padded, stride;
  Sequence s{};
  Block x{};
  int first_key = 0, keys = 0;  // of the strip
  float *kt, *vt, *rows, *dkt, *dvt, *p, *dp, *ds, *bias, *dbias, *block_q, *few;

  static int64_t strip_floats(int64_t D) { return STRIP * row_stride((int)D); }
  Gradients(const AttentionBackward& a, Worker& worker)
      : a(a), D((int)a.D), padded(round_up(D, LANES)), stride(row_stride(D)) {
    const int64_t strip = strip_floats(D), block = QUERIES * stride, pairs = QUERIES * TILE;
    const int64_t tasks = a.split ? 3 * TASK_BLOCKS * block : 0;
    float* at =
        (float*)worker.scratch((5 * strip + 2 * block + 3 * pairs + 2 * QUERIES * STRIP + tasks) * sizeof(float));
    for (float** part : {&kt, &vt, &rows, &dkt, &dvt}) *part = at, at += strip;
    block_q = at, at += 2 * block;
    for (float** part : {&p, &dp, &bias}) *part = at, at += pairs;
    for (float** part : {&ds, &dbias}) *part = at, at += QUERIES * STRIP;
    few = at;
  }

  int tiles() const { return (int)ceil_div(keys, TILE); }
  int width(int tile) const { return round_up(min(keys - tile * TILE, TILE), LANES); }
  int64_t lse_at(int64_t h) const { return a.cu_q ? h * a.Sq + s.q_first : (s.b * a.H + h) * a.Sq; }
  int blocks() const { return (int)ceil_div(s.q_len, QUERIES); }
  int strips() const { return (int)ceil_div(s.k_len, STRIP); }

  // Row i of one head of q, k, v, dout or out.
  const T* row(const void* t, const int64_t* strides, int64_t first, int64_t i, int64_t h) const {
    return (const T*)t + (a.cu_q ? 0 : s.b * strides[0]) + (first + i) * strides[1] + h * strides[2];
  }
  // n rows in fp32, times `scale`, rows beyond filled up with zeros to `all`.
  void copy(float* to, const void* t, const int64_t* strides, int64_t first, int i, int n, int all, int64_t h,
            float scale) const {
    for (int r = 0; r < n; r++) {
      const T* from = row(t, strides, first, i + r, h);
      prefetch_row(row(t, strides, first, i + min(r + AHEAD, n - 1), h), D);
      for (int d = 0; d < D; d += LANES) store(to + r * stride + d, load(from + d, min(LANES, D - d)) * scale);
    }
    memset(to + n * stride, 0, (int64_t)(all - n) * stride * sizeof(float));
  }

  // Packs the rows in `rows` by tiles.
  void turn(float* to) const {
    for (int t = 0; t < tiles(); t++) {
      const int W = width(t);
      for (int l = 0; l < W; l += LANES)
        for (int d = 0; d < padded; d += LANES) {
          f32v y[LANES];
          for (int i = 0; i < LANES; i++) y[i] = load(rows + (t * TILE + l + i) * stride + d);
          transpose(y);
          for (int i = 0; i < LANES; i++) store(to + t * TILE * padded + (d + i) * W + l, y[i]);
        }
    }
  }
  void load_strip(int strip, int64_t hk) {
    first_key = strip * STRIP;
    keys = min(s.k_len - first_key, STRIP);
    if constexpr (PAIRS) {
      auto key = [&](const void* t, const int64_t* strides) {
        return [=, this](int i) { return row(t, strides, s.k_first, first_key + i, hk); };
      };
      const int last = s.k_len - first_key - 1;
      pack_pairs(key(a.v, a.v_strides), keys, last, D, padded, stride, vt, nullptr);
      return pack_pairs(key(a.k, a.k_strides), keys, last, D, padded, stride, kt, rows);
    }
    const int all = round_up(keys, LANES);
    copy(rows, a.v, a.v_strides, s.k_first, first_key, keys, all, hk, 1.0f);
    turn(vt);
    copy(rows, a.k, a.k_strides, s.k_first, first_key, keys, all, hk, 1.0f);
    turn(kt);
  }

  // Rows first .. of q and dout, n of them filled up to `all`.
  void load_rows(float* q, float* dout, int first, int n, int all, int64_t h) const {
    if constexpr (PAIRS) {
      for (int i = 0; i < all; i += QUERIES, q += QUERIES * stride, dout += QUERIES * stride) {
        auto query = [&](const void* t, const int64_t* strides) {
          return [=, this](int r) { return row(t, strides, s.q_first, first + i + r, h); };
        };
        const int present = min(n - i, QUERIES), last = max(n - i - 1, 0);
        pack_pair_rows(query(a.q, a.q_strides), present, QUERIES, last, D, stride, q);
        pack_pair_rows(query(a.dout, a.dout_strides), present, QUERIES, last, D, stride, dout);
      }
      return;
    }
    copy(q, a.q, a.q_strides, s.q_first, first, n, all, h, a.scale);
    copy(dout, a.dout, a.dout_strides, s.q_first, first, n, all, h, 1.0f);
  }
  void load_block(int block, int64_t h, const Wanted& wanted) {
    x.first = block * QUERIES;
    x.rows = min(s.q_len - x.first, QUERIES);
    x.q = wanted.q ? wanted.q + (int64_t)(x.first - wanted.first) * stride : block_q;
    x.dout = x.q + (wanted.q ? wanted.room : QUERIES * stride);
    if (!wanted.q) load_rows(x.q, x.dout, x.first, x.rows, QUERIES, h);
    const int64_t at = lse_at(h) + x.first;
    for (int i = 0; i < QUERIES; i += LANES) {
      const int n = min(max(x.rows - i, 0), LANES);
      const f32v lse = load(a.lse + at + i, n);
      const auto there = (iota() + i < x.rows) & bitcast<i32v>(lse != NONE);
      store(x.lse + i, select(there, lse, splat(-NONE)));
      store(x.delta + i, select(there, load(a.delta + at + i, n), f32v{}));
      store(x.norm + i, a.norm ? select(there, load(a.norm + at + i, n), splat(1.0f)) : splat(1.0f));
    }
    see();
    x.position = x.first + s.k_len - s.q_len;
    x.slope = a.slopes ? a.slopes[s.b * a.slopes_batch + h] : 0.0f;
    x.element = s.elements + (h * s.q_len + x.first) * (uint64_t)s.k_len;
    x.elements = s.k_len;
    x.dropout = {a.seed, a.stream, wanted.keep_all ? 0 : a.drop_below};
    x.keep_scale = a.keep_scale;
  }

  // visible() of the block's queries.
  void see() {
    const int reach = s.q_len + s.k_len;
    const int left = a.left >= 0 ? (int)min<int64_t>(a.left, reach) : reach;
    const int most = a.causal ? 0 : reach, right = a.right >= 0 ? (int)min<int64_t>(a.right, most) : most;
    for (int i = 0; i < QUERIES; i += LANES) {
      const i32v query = iota() + i, last = splat(x.rows - 1);
      const i32v here = (query < last ? query : last) + (x.first + s.k_len - s.q_len);
      const i32v from = here - left, to = here + (right + 1);
      const i32v all = to < s.k_len ? to : splat(s.k_len);
      const i32v low = from > 0 ? from : i32v{}, high = all > 0 ? all : i32v{};
      memcpy(x.low + i, &low, sizeof low);
      memcpy(x.high + i, &high, sizeof high);
    }
  }

  // Whether any query of a block sees any key of a strip.
  bool meet(int block, int strip) const {
    int low, high, unused;
    visible(a, s, block * QUERIES, &low, &unused);
    visible(a, s, min((block + 1) * QUERIES, s.q_len) - 1, &unused, &high);
    return low < min((strip + 1) * STRIP, s.k_len) && high > strip * STRIP;
  }

  // The bias, -inf where the mask is false, of a tile.
  void load_bias(int64_t h, int key, int n) const {
    memset(bias, 0, QUERIES * TILE * sizeof(float));
    for (int r = 0; r < x.rows; r++) {
      const int64_t i = x.first + r;
      float* to = bias + r * TILE;
      if (a.bias) {
        const int64_t *st = a.bias_strides, at = s.b * st[0] + h * st[1] + i * st[2] + key * st[3];
        for (int j = 0; j < n; j++)
          to[j] = a.bias_dtype == FLOAT32 ? ((const float*)a.bias)[at + j * st[3]]
                                          : load1((const T*)a.bias + at + j * st[3]);
      }
      if (a.mask) {
        const int64_t* st = a.mask_strides;
        const uint8_t* m = a.mask + s.b * st[0] + h * st[1] + i * st[2] + key * st[3];
        for (int j = 0; j < n; j++) to[j] = m[j * st[3]] ? to[j] : NONE;
      }
    }
  }

  // Queries begin .. end of the block, whole BLOCKs of them, and a tile.
  template <int NV>
  void tile(int64_t h, int t, int begin, int end, const Wanted& wanted) {
    const int at = t * TILE * padded, key = first_key + t * TILE, last = min(end, x.rows) - 1;
    float *made = ds + t * QUERIES * TILE, *g = PAIRS ? dp : made, *made_rows = made + QUERIES / 2 * TILE;
    const bool products = wanted.keys || wanted.dq;
    if constexpr (PAIRS) {
      pair_rows_by_keys<NV>(x.q, stride / 2, kt + at, p, (D + 1) / 2, a.scale, begin, end);
      pair_rows_by_keys<NV>(x.dout, stride / 2, vt + at, g, (D + 1) / 2, 1.0f, begin, end);
    } else {
      rows_by_keys<NV>(x.q, stride, kt + at, p, D, begin, end);
      rows_by_keys<NV>(x.dout, stride, vt + at, g, D, begin, end);
    }
    Terms terms{};
    terms.cap = a.softcap;
    terms.inverse_cap = terms.cap != 0 ? 1 / terms.cap : 0;
    terms.alibi = a.slopes;
    terms.bias = a.bias || a.mask;
    terms.edge = x.low[last] > key || x.high[begin] < key + NV * LANES;
    if (terms.bias) load_bias(h, key, min(keys - t * TILE, TILE));
    const bool plain = terms.cap == 0 && !terms.alibi && !terms.bias && !terms.edge && !x.dropout.below;
    const bool at_once = PAIRS && plain && !wanted.sums && !wanted.dbias;  // nobody else reads p and ds
    if (!plain)
      gradient<NV>(x, terms, key, bias, products, p, g, begin, end);
    else if constexpr (PAIRS)
      at_once ? plain_pairs<NV>(x, p, g, made, made_rows, begin, end) : plain_gradient<NV>(x, p, g, begin, end);
    else
      plain_gradient<NV>(x, p, g, begin, end);
    if (wanted.sums)
      for (int i = begin; i < end; i++) {
        f32v a = {}, b = {};
        for (int v = 0; v < NV * LANES; v += LANES) a += load(p + i * TILE + v), b += load(g + i * TILE + v);
        wanted.sums->p[i] += sum(a);
        wanted.sums->dp[i] += sum(b);
      }
    if (wanted.dbias)
      for (int i = begin; i < min(end, x.rows); i++)
        for (int v = 0; v < NV * LANES; v += LANES) {
          float* to = wanted.dbias + (t * QUERIES + i) * TILE + v;
          store(to, load(to) + load(g + i * TILE + v));
        }
    if constexpr (PAIRS) {
      if (products && !at_once) pair_up<NV>(p, g, made, made_rows, begin, end);
      if (!wanted.keys) return;
      pair_keys_by_rows<NV>(p, x.dout + QUERIES * stride / 2, stride, dvt + at, padded, begin, end);
      pair_keys_by_rows<NV>(made, x.q + QUERIES * stride / 2, stride, dkt + at, padded, begin, end);
    } else if (wanted.keys) {
      keys_by_rows<NV>(p, x.dout, stride, dvt + at, padded, begin, end);
      keys_by_rows<NV>(g, x.q, stride, dkt + at, padded, begin, end);
    }
  }

  // The block and the strip that are loaded.
  void pair(int64_t h, const Wanted& wanted) {
    constexpr int wide = PAIRS ? PAIR_TILE : TILE;  // lanes of a row of ds
    const float* weights = ds + (PAIRS ? QUERIES / 2 * TILE : 0);
    int first[QUERIES / GROUP], last[QUERIES / GROUP] = {};  // the tiles that a group of queries sees
    for (int& t : first) t = STRIP_TILES;
    for (int t = 0; t < tiles(); t++) {
      const int key = first_key + t * TILE, to = min(key + TILE, s.k_len);
      int begin = 0, end = x.rows;
      while (begin < end && x.high[begin] <= key) begin++;
      while (end > begin && x.low[end - 1] >= to) end--;
      if (begin >= end) continue;
      begin = begin / BLOCK * BLOCK, end = round_up(end, BLOCK);
      const int W = width(t);
      if (W == LANES)
        tile<1>(h, t, begin, end, wanted);
      else if (W == 2 * LANES)
        tile<2>(h, t, begin, end, wanted);
      else
        tile<3>(h, t, begin, end, wanted);
      if (!wanted.dq) continue;
      const int from = begin / GROUP, until = (int)ceil_div(end, GROUP);
      for (int g = from; g < until; g++) first[g] = min(first[g], t), last[g] = t + 1;
      float* edge = ds + (weights - ds) + t * QUERIES * TILE;
      memset(edge + from * GROUP * wide, 0, (begin - from * GROUP) * wide * sizeof(float));
      memset(edge + end * wide, 0, (until * GROUP - end) * wide * sizeof(float));
    }
    if (!wanted.dq) return;
    float* dq = wanted.dq + (int64_t)(x.first - wanted.first) * stride;
    for (int d = 0; d < padded;) {
      const int vectors = (padded - d) / LANES >= DQ_VECTORS ? DQ_VECTORS : 1;
      for (int g = 0; g * GROUP < x.rows; g++) {
        const int t = first[g], n = last[g] - t, i = g * GROUP;
        if (n <= 0) continue;
        const float *from = weights + t * QUERIES * TILE + i * wide, *k = rows + t * wide * stride + d;
        constexpr auto one = PAIRS ? pair_queries_by_keys<1> : queries_by_keys<1>;
        constexpr auto some = PAIRS ? pair_queries_by_keys<DQ_VECTORS> : queries_by_keys<DQ_VECTORS>;
        (vectors == 1 ? one : some)(from, k, stride, dq + i * stride + d, n, keys - t * TILE);
      }
      d += vectors * LANES;
    }
  }

  // Blocks begin .. end of a head and the strip that is loaded.
  void blocks(int strip, int64_t h, int begin, int end, const Wanted& wanted) {
    for (int block = begin; block < min(end, blocks()); block++) {
      if (!meet(block, strip)) continue;
      load_block(block, h, wanted);
      pair(h, wanted);
    }
  }

  // dK and dV of a strip of a KV head; where there is `dq`, its parts of all heads' too: each has three rooms, for dQ,
  // q and dout.
  void strip(int n, int64_t hk, float* dq, int64_t room) {
    const int64_t G = a.H / a.Hk;
    load_strip(n, hk);
    memset(dkt, 0, strip_floats(D) * sizeof(float));
    memset(dvt, 0, strip_floats(D) * sizeof(float));
    for (int64_t g = 0; g < G; g++, dq += dq ? 3 * room : 0)
      blocks(n, hk * G + g, 0, blocks(), {.dq = dq, .q = dq ? dq + room : nullptr, .room = room, .keys = true});
    store_strip((T*)a.dk, dkt, hk, PAIRS ? a.scale : 1.0f);
    store_strip((T*)a.dv, dvt, hk, 1.0f);
  }

  // All of a KV head.
  void whole(int64_t hk, float* memory) {
    const int64_t G = a.H / a.Hk, room = (int64_t)blocks() * QUERIES * stride;
    for (int64_t g = 0; g < G; g++) {
      float* dq = memory + 3 * g * room;
      memset(dq, 0, room * sizeof(float));
      load_rows(dq + room, dq + 2 * room, 0, s.q_len, blocks() * QUERIES, hk * G + g);
    }
    for (int n = 0; n < strips(); n++) strip(n, hk, memory, room);
    for (int64_t g = 0; g < G; g++) store_queries(memory + 3 * g * room, 0, s.q_len, hk * G + g);
  }

  // dQ of TASK_BLOCKS blocks of a head.
  void queries(int begin, int64_t h) {
    const int64_t room = TASK_BLOCKS * QUERIES * stride;
    const int first = begin * QUERIES, n = min(TASK_BLOCKS * QUERIES, s.q_len - first);
    if (n <= 0) return;
    memset(few, 0, room * sizeof(float));
    load_rows(few + room, few + 2 * room, first, n, TASK_BLOCKS * QUERIES, h);
    for (int strip = 0; strip < strips(); strip++) {
      bool any = false;
      for (int block = begin; block < min(begin + TASK_BLOCKS, blocks()); block++) any = any || meet(block, strip);
      if (!any) continue;
      load_strip(strip, h / (a.H / a.Hk));
      blocks(strip, h, begin, begin + TASK_BLOCKS, {.first = first, .dq = few, .q = few + room, .room = room});
    }
    store_queries(few, first, n, h);
  }

  void store_strip(T* to, const float* packed, int64_t hk, float scale) {
    for (int t = 0; t < tiles(); t++) {
      const int W = width(t);
      for (int l = 0; l < W; l += LANES)
        for (int d = 0; d < padded; d += LANES) {
          f32v y[LANES];
          for (int i = 0; i < LANES; i++) y[i] = load(packed + t * TILE * padded + (d + i) * W + l);
          transpose(y);
          for (int i = 0; i < LANES && t * TILE + l + i < keys; i++) {
            const int64_t at = (a.cu_q ? s.k_first : s.b * a.Sk) + first_key + t * TILE + l + i;
            store(to + (at * a.Hk + hk) * D + d, y[i] * scale, min(LANES, D - d));
          }
        }
    }
  }
  void store_queries(const float* dq, int first, int n, int64_t h) const {
    for (int i = 0; i < n; i++) {
      const int64_t at = (a.cu_q ? s.q_first : s.b * a.Sq) + first + i;
      for (int d = 0; d < D; d += LANES)
        store((T*)a.dq + (at * a.H + h) * D + d, load(dq + i * stride + d) * a.scale, min(LANES, D - d));
    }
  }

  // Whether delta and norm are made of the probabilities: out and lse are rounded, which shows in the gradients of bias
  // and sinks, and where there are few queries to even it out.
  bool wants_exact() const { return a.norm && (a.dsinks || a.dbias || s.q_len <= QUERIES); }

  void delta(int block, int64_t h) const {
    for (int64_t i = block * QUERIES; i < min<int64_t>((block + 1) * QUERIES, s.q_len); i++) {
      const T *x = row(a.dout, a.dout_strides, s.q_first, i, h), *y = row(a.out, a.out_strides, s.q_first, i, h);
      f32v total = {};
      for (int d = 0; d < D; d += LANES) {
        const int n = min(LANES, D - d);
        total = fma(load(x + d, n), load(y + d, n), total);
      }
      const int64_t at = lse_at(h) + i;
      a.delta[at] = sum(total) - (a.dlse ? a.dlse[at] : 0.0f);
      if (a.norm) a.norm[at] = 1;
    }
  }

  void exact(int block, int64_t h) {
    Sums sums{};
    const int64_t at = lse_at(h) + block * QUERIES;
    const int n = min(s.q_len - block * QUERIES, QUERIES);
    for (int i = 0; i < n; i++) a.delta[at + i] = 0, a.norm[at + i] = 1;
    Sums all{};  // of p, which dropout spares
    for (int strip = 0; strip < strips(); strip++) {
      if (!meet(block, strip)) continue;
      load_strip(strip, h / (a.H / a.Hk));
      blocks(strip, h, block, block + 1, {.sums = &sums});
      if (a.drop_below) blocks(strip, h, block, block + 1, {.sums = &all, .keep_all = true});
    }
    const float* p = a.drop_below ? all.p : sums.p;
    for (int i = 0; i < n; i++) {
      const float left = a.sinks ? exp(splat(a.sinks[h] - a.lse[at + i]))[0] : 0.0f, total = p[i] + left;
      if (total > 0) a.norm[at + i] = 1 / total;
      a.delta[at + i] = sums.dp[i] * a.norm[at + i] - (a.dlse ? a.dlse[at + i] : 0.0f);
    }
  }
};

// The gradient of a block of the bias, or of what stands for one where it is broadcast over queries or keys: sums over
// sequences, heads, strips and blocks in order, place by place; then over the places.
template <class T>
void bias_block(Gradients<T>& g, int64_t b, int64_t h, int block, int strip) {
  const AttentionBackward& a = g.a;
  const int64_t* shape = a.bias_shape;
  const bool rows = shape[2] > 1, cols = shape[3] > 1;
  float* sums = g.dbias;
  memset(sums, 0, QUERIES * STRIP * sizeof(float));
  for (int64_t n = shape[0] > 1 ? b : 0; n < (shape[0] > 1 ? b + 1 : a.B); n++) {
    g.s = sequence(a, n);
    for (int64_t m = shape[1] > 1 ? h : 0; m < (shape[1] > 1 ? h + 1 : a.H); m++)
      for (int k = cols ? strip : 0; k < (cols ? strip + 1 : g.strips()); k++) {
        g.load_strip(k, m / (a.H / a.Hk));
        g.blocks(k, m, rows ? block : 0, rows ? block + 1 : g.blocks(), {.dbias = sums});
      }
  }
  auto at = [&](int r, int c) -> float& { return sums[(c / TILE * QUERIES + r) * TILE + c % TILE]; };
  if (!rows)
    for (int c = 0; c < STRIP; c++)
      for (int r = 1; r < QUERIES; r++) at(0, c) += at(r, c);
  if (!cols)
    for (int r = 0; r < QUERIES; r++)
      for (int c = 1; c < STRIP; c++) at(r, 0) += at(r, c);
  const int64_t first_row = rows ? block * QUERIES : 0, first_col = cols ? strip * STRIP : 0;
  const int64_t count = min<int64_t>(shape[3] - first_col, STRIP);
  for (int r = 0; r < min<int64_t>(shape[2] - first_row, QUERIES); r++)
    for (int c = 0; c < count; c += LANES) {
      const int64_t to = ((b * shape[1] + h) * shape[2] + first_row + r) * shape[3] + first_col + c;
      const int n = min<int64_t>(count - c, LANES);
      if (a.bias_dtype == FLOAT32)
        store((float*)a.dbias + to, load(&at(r, c)), n);
      else
        store((T*)a.dbias + to, load(&at(r, c)), n);
    }
}

// dsink = -sum of p(sink) delta, over sequences and queries in order.
void sink(const AttentionBackward& a, int64_t h) {
  const f32v s = splat(a.sinks[h]);
  const int64_t heads = a.cu_q ? 1 : a.B, step = a.cu_q ? 0 : a.H * a.Sq;
  f32v total = {};
  for (int64_t b = 0; b < heads; b++)
    for (int64_t i = 0; i < a.Sq; i += LANES) {
      const int64_t at = b * step + h * a.Sq + i;
      const int n = (int)min<int64_t>(LANES, a.Sq - i);
      f32v p = exp(s - load(a.lse + at, n));
      if (a.norm) p *= load(a.norm + at, n);
      total -= first(p * load(a.delta + at, n), n);
    }
  a.dsinks[h] = sum(total);
}

template <class T>
void run(const AttentionBackward& a, Worker& worker) {
  Gradients<T> g(a, worker);
  const int64_t blocks = ceil_div(a.q_longest, QUERIES), strips = ceil_div(a.k_longest, STRIP);
  worker.each(a.B * blocks * a.H, [&](int64_t task) {
    g.s = sequence(a, task / a.H / blocks);
    const int block = (int)(task / a.H % blocks);
    if (block < g.blocks()) g.wants_exact() ? g.exact(block, task % a.H) : g.delta(block, task % a.H);
  });
  if (!a.split) {
    worker.each(a.B * a.Hk, [&](int64_t task) {
      g.s = sequence(a, task / a.Hk);
      g.whole(task % a.Hk, a.workspace + worker.id * a.room);
    });
  } else {
    worker.each(a.B * a.Hk * strips, [&](int64_t task) {
      g.s = sequence(a, task / strips / a.Hk);
      if (task % strips < g.strips()) g.strip(task % strips, task / strips % a.Hk, nullptr, 0);
    });
    const int64_t tasks = ceil_div(blocks, TASK_BLOCKS);  // the later ones first: under a causal mask they are longer
    worker.each(a.B * a.H * tasks, [&](int64_t task) {
      g.s = sequence(a, task / tasks / a.H);
      g.queries((int)(tasks - 1 - task % tasks) * TASK_BLOCKS, task / tasks % a.H);
    });
  }
  if (a.dbias) {
    const int64_t* shape = a.bias_shape;
    const int64_t rows = shape[2] > 1 ? blocks : 1, cols = shape[3] > 1 ? strips : 1;
    worker.each(shape[0] * shape[1] * rows * cols, [&](int64_t task) {
      const int64_t head = task / cols / rows;
      bias_block(g, head / shape[1], head % shape[1], (int)(task / cols % rows), (int)(task % cols));
    });
  }
  if (a.dsinks) worker.each(a.H, [&](int64_t h) { sink(a, h); });
}

}  // namespace

#if defined(__AVX512BF16__)
}
namespace gptfast::avx512 {
void attention_backward(const AttentionBackward&, Worker&);
}
namespace gptfast::ISA {
void attention_backward(const AttentionBackward& a, Worker& worker) {
  if (a.dtype == BFLOAT16) return run<bf16>(a, worker);
  avx512::attention_backward(a, worker);
}
#else
void attention_backward(const AttentionBackward& a, Worker& worker) {
  with_storage(a.dtype, [&](auto t) { run<decltype(t)>(a, worker); });
}
#endif

}  // namespace gptfast::ISA
