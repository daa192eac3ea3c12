// A sequence of attention's batch, and one KV head of it: where its queries, keys, values and outputs lie, and tiles of
// its rows.
#pragma once
#include "attention.h"
#include "kernels.h"
#include "rope.h"
#include "transpose.h"

namespace gptfast::ISA::attn {

// One sequence of the batch: where its rows begin, in elements, and how long it is.
struct Sequence {
  int64_t b, q, k, v, k_scale, v_scale, out, lse;
  int q_len, k_len, position;  // position: of the first query, absolute
  int leftpad;
  const int32_t* pages;
  uint64_t elements;  // of dropout before it
};

inline Sequence sequence(const Attention& a, int64_t b) {
  Sequence s{};
  s.b = b;
  const int64_t q_first = a.cu_q ? a.cu_q[b] : 0, k_first = a.cu_k ? a.cu_k[b] : 0;
  const int64_t slot = a.batch_index ? a.batch_index[b] : b;
  s.q_len = (int)(a.cu_q ? a.cu_q[b + 1] - q_first : a.Sq);
  s.q = a.cu_q ? q_first * a.q_strides[1] : b * a.q_strides[0];
  s.out = a.cu_q ? q_first : b * a.Sq;
  s.lse = a.cu_q ? q_first : b * a.H * a.Sq;
  s.leftpad = a.leftpad ? a.leftpad[b] : 0;
  const int total = (int)(a.lengths ? a.lengths[b] + (a.k_new ? a.Sq : 0) : a.cu_k ? a.cu_k[b + 1] - k_first : a.Sk);
  s.k_len = max(total - s.leftpad, 0);
  s.position = total - s.q_len;
  s.pages = a.block_table ? a.block_table + b * a.table_stride : nullptr;
  s.k = a.cu_k ? k_first * a.k_strides[1] : s.pages ? 0 : slot * a.k_strides[0];
  s.v = a.cu_k ? k_first * a.v_strides[1] : s.pages ? 0 : slot * a.v_strides[0];
  s.elements = b * a.H * a.Sq * a.Sk;
  if (a.cu_q && a.drop_below) {
    s.elements = 0;
    for (int64_t n = 0; n < b; n++)
      s.elements += a.H * (a.cu_q[n + 1] - a.cu_q[n]) * (int64_t)(a.cu_k[n + 1] - a.cu_k[n]);
  }
  s.k_scale = s.pages ? 0 : slot * a.k_scale_strides[0];  // of caches alone, as are pages
  s.v_scale = s.pages ? 0 : slot * a.v_scale_strides[0];
  return s;
}

// Where a slot of the sequence's cache lies, in elements from the start of its head.
INLINE int64_t slot_at(const Attention& a, const Sequence& s, int64_t first, const int64_t* strides, int64_t slot) {
  return s.pages ? s.pages[slot / a.page] * strides[0] + slot % a.page * strides[1] : first + slot * strides[1];
}

// New keys (rotated) and values begin .. end of a KV head go to their slots of the cache. Who reads them first writes
// them where that is one worker, so that decoding needs no barrier for it.
template <class T, class C>
NOINLINE void append(const Attention& a, const Sequence& s, int64_t hk, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const int64_t position = s.position + i, turn = position * (a.rotary / 2);
    C* k = (C*)a.k_cache + slot_at(a, s, s.k, a.k_strides, position) + hk * a.k_strides[2];
    C* v = (C*)a.v_cache + slot_at(a, s, s.v, a.v_strides, position) + hk * a.v_strides[2];
    const int64_t *kn = a.k_new_strides, *vn = a.v_new_strides;
    const T* k_new = (const T*)a.k_new + s.b * kn[0] + i * kn[1] + hk * kn[2];
    const T* v_new = (const T*)a.v_new + s.b * vn[0] + i * vn[1] + hk * vn[2];
    T turned[DIM];
    if (a.cos) {
      rope_row(turned, k_new, a.cos + turn, a.sin + turn, a.D, a.rotary, a.interleaved);
      k_new = turned;
    }
    if constexpr (SCALED<C>) {
      const int64_t *ks = a.k_scale_strides, *vs = a.v_scale_strides;
      a.k_scale[slot_at(a, s, s.k_scale, ks, position) + hk * ks[2]] = quantize_row(k, k_new, (int)a.D);
      a.v_scale[slot_at(a, s, s.v_scale, vs, position) + hk * vs[2]] = quantize_row(v, v_new, (int)a.D);
    } else {
      write_row(k, k_new, (int)a.D);
      write_row(v, v_new, (int)a.D);
    }
  }
}

// The keys or the values of one KV head of one sequence: where slot 0 lies, but for `first` elements, and the strides;
// the same of their scales.
template <class C>
struct Side {
  const C* at;
  int64_t first;
  const int64_t* strides;
  const float* scale;
  int64_t scale_first;
  const int64_t* scale_strides;
};

// The tiles of one KV head of one sequence, on one worker: queries and outputs of dtype T, keys and values of dtype C.
template <class T, class C>
struct Head {
  const Attention& a;
  const Sequence s;
  const int64_t hk;
  const int G, D, padded;
  const Side<C> k, v;

  Head(const Attention& a, int64_t b, int64_t hk)
      : a(a),
        s(sequence(a, b)),
        hk(hk),
        G((int)(a.H / a.Hk)),
        D((int)a.D),
        padded(round_up(D, LANES)),
        k{(const C*)a.k + hk * a.k_strides[2],   s.k,       a.k_strides,
          a.k_scale + hk * a.k_scale_strides[2], s.k_scale, a.k_scale_strides},
        v{(const C*)a.v + hk * a.v_strides[2],   s.v,       a.v_strides,
          a.v_scale + hk * a.v_scale_strides[2], s.v_scale, a.v_scale_strides} {}

  int rows() const { return G * s.q_len; }
  int tiles() const { return (int)ceil_div(rows(), ROWS); }
  int64_t head(int row) const { return hk * G + row % G; }
  T* out(int row) const { return (T*)a.out + ((s.out + row / G) * a.H + head(row)) * D; }

  const T* query(int row) const { return (const T*)a.q + s.q + row / G * a.q_strides[1] + head(row) * a.q_strides[2]; }
  void load_query(int row, float* to) const {
    const T* x = query(row);
    prefetch_row(query(min(row + AHEAD, rows() - 1)), D);
    T turned[DIM];
    if (a.cos) {
      const int64_t turn = (s.position + row / G) * (a.rotary / 2);
      rope_row(turned, x, a.cos + turn, a.sin + turn, D, a.rotary, a.interleaved);
      x = turned;
    }
    auto put = [&](auto row) {
      for (int d = 0; d < D; d += STEP) {
        const f32v q = load_lanes(row + d, D - d);
        store(to + d / PER_LANE, PAIRS ? q : q * a.scale);
      }
    };
    if constexpr (!__is_same(T, C) && sizeof(C) == 2)
      if (PAIRS || a.rounded) {
        C held[DIM];
        write_row(held, x, D);
        return put((const C*)held);
      }
    if constexpr (!PAIRS || __is_same(T, C)) put(x);
  }

  // Rows first .. of a tile in its memory, with nothing attended to yet. `few`: at most FEW rows, in the `few` shape.
  NOINLINE Tile start(int first, bool few, float* memory, float* spare) const {
    Tile t{};
    t.first = first;
    t.few = few;
    t.rows = min(rows() - first, ROWS);
    t.dim = D;
    t.scale = a.scale;
    t.width = round_up(t.rows, LANES);
    const int W = t.width;
    t.q = memory;
    t.o = t.q + (few ? t.rows * DIM : padded * W);
    t.m = t.o + padded * (few ? t.rows : W);
    t.l = t.m + W;
    t.slope = t.l + W;
    t.sink = t.slope + W;
    t.low = (int32_t*)(t.sink + W);
    t.high = t.low + W;
    t.position = t.high + W;
    t.element = (uint64_t*)(t.position + W);
    clear(t);
    for (int r = 0; r < W; r++) {
      const int row = first + min(r, t.rows - 1), i = row / G;
      visible(a, s, i, t.low + r, t.high + r);
      t.position[r] = i + s.k_len - s.q_len;
      t.slope[r] = a.slopes ? a.slopes[s.b * a.slopes_batch + head(row)] : 0.0f;
      t.sink[r] = a.sinks ? a.sinks[head(row)] : NONE;
      t.element[r] = s.elements + (head(row) * s.q_len + i) * (uint64_t)s.k_len;
    }
    if (few) {
      for (int r = 0; r < t.rows; r++) load_query(first + r, t.q + r * DIM);
      return t;
    }
    for (int r = 0; r < W; r += LANES) {
      memset(spare, 0, LANES * padded * sizeof(float));
      for (int i = 0; i < LANES && r + i < t.rows; i++) load_query(first + r + i, spare + i * padded);
      for (int d = 0; d < (int)lanes_of(D); d += LANES) {
        f32v x[LANES];
        for (int i = 0; i < LANES; i++) x[i] = load(spare + i * padded + d);
        transpose(x);
        for (int i = 0; i < LANES; i++) store(t.q + (d + i) * W + r, x[i]);
      }
    }
    return t;
  }

  void clear(Tile& t) const {
    memset(t.o, 0, padded * (t.few ? t.rows : t.width) * sizeof(float));
    for (int r = 0; r < t.width; r++) t.m[r] = NONE, t.l[r] = 0;
  }

  // What comes after chunk c of first .. last: its own next chunk, and beyond what that has, the head which is probably
  // read next.
  Ahead ahead(int first, int c, int last, int high) const {
    auto key = [&](int chunk) { return k.at + slot_at(a, s, k.first, k.strides, s.leftpad + chunk * CHUNK); };
    const bool more = c + 1 < last;
    const int64_t on = hk + 1 < a.Hk ? a.k_strides[2]
                                     : (s.b + 1 < a.B ? a.k_strides[0] : CHUNK * a.k_strides[1]) - hk * a.k_strides[2];
    return {(const char*)(more ? key(c + 1) : nullptr), (const char*)(key(first) + on),
            more ? min(high - (c + 1) * CHUNK, CHUNK) : 0, a.k_strides[1] * (int64_t)sizeof(C)};
  }

  static constexpr int64_t copy_stride(int64_t D) { return D + 64 / (int64_t)sizeof(C); }  // spread over L1's sets
  // Group g of a chunk's keys or values, of which [begin, end) of the chunk are needed; the others may be anything.
  // Where they don't lie evenly, or not all of them are there, they are copied to `spare`, another one standing for
  // those not needed; as are those `far` apart.
  Rows<C> group(const Side<C>& x, int chunk, int g, int begin, int end, bool far, void* spare) const {
    const int64_t from = s.leftpad + chunk * CHUNK, slot = from + g * LANES;
    const bool whole = (begin <= g * LANES && end >= (g + 1) * LANES) || (!a.cu_k && slot + LANES <= a.Sk);
    if (whole && !far && (!s.pages || slot % a.page + LANES <= a.page))
      return {x.at + slot_at(a, s, x.first, x.strides, slot), x.strides[1],
              SCALED<C> ? x.scale + slot_at(a, s, x.scale_first, x.scale_strides, slot) : nullptr, x.scale_strides[1]};
    float* scales = (float*)((C*)spare + LANES * copy_stride(D));
    const Rows<C> copy{(C*)spare, copy_stride(D), scales, 1};
    for (int i = 0; i < LANES; i++) {
      const int j = max(begin, min(g * LANES + i, end - 1));
      memcpy((C*)spare + i * copy.stride, x.at + slot_at(a, s, x.first, x.strides, from + j), D * sizeof(C));
      if constexpr (SCALED<C>) scales[i] = x.scale[slot_at(a, s, x.scale_first, x.scale_strides, from + j)];
    }
    return copy;
  }
  // Keys are read across: at multiples of 2 KiB, 2 LANES of them would share 16 lines of L1 and each be fetched anew
  // for every 16 bytes (0.7x at 8 heads of 64).
  Rows<C> keys_of(int chunk, int g, int begin, int end, void* spare) const {
    const bool far = a.k_strides[1] * sizeof(C) % 2048 == 0;
    return group(k, chunk, g, begin, end, far, spare);
  }
  Rows<C> values_of(int chunk, int g, int begin, int end, void* spare) const {
    return group(v, chunk, g, begin, end, false, spare);
  }

  // The tile's part of a chunk; empty where begin >= end.
  NOINLINE Keys keys(const Tile& t, int chunk, float* bias) const {
    Keys c{};
    c.start = chunk * CHUNK;
    c.begin = max(t.low[0] - c.start, 0);
    c.end = min(t.high[t.rows - 1] - c.start, CHUNK);
    if (c.begin >= c.end) return c;
    const int from = c.start + c.first_group() * LANES, to = c.start + c.last_group() * LANES;
    c.terms.cap = a.softcap;
    c.terms.inverse_cap = c.terms.cap != 0 ? 1 / c.terms.cap : 0;
    c.terms.alibi = a.slopes;
    c.terms.edge = from < t.low[t.rows - 1] || to > t.high[0];
    c.terms.bias = a.bias || a.mask;
    c.bias = bias;
    c.dropout = {a.seed, a.stream, a.drop_below};
    if (c.terms.bias) {
      memset(bias, 0, t.width * CHUNK * sizeof(float));
      for (int r = 0; r < t.rows; r++) load_bias(t.first + r, c, bias + r * CHUNK);
    }
    return c;
  }

  // The bias, -inf where the mask is false, of one row and the keys begin .. end of a chunk.
  void load_bias(int row, const Keys& c, float* to) const {
    const int64_t i = row / G, h = head(row);
    if (a.bias) {
      const int64_t *st = a.bias_strides, at = s.b * st[0] + h * st[1] + i * st[2] + (c.start + c.begin) * st[3];
      if (a.bias_dtype == FLOAT32)
        widen_row((const float*)a.bias + at, st[3], to + c.begin, c.end - c.begin);
      else
        widen_row((const T*)a.bias + at, st[3], to + c.begin, c.end - c.begin);
    }
    if (a.mask) {
      const int64_t* st = a.mask_strides;
      const uint8_t* m = a.mask + s.b * st[0] + h * st[1] + i * st[2] + c.start * st[3];
      if (st[3] == 1) {
        for (int j = c.begin; j < c.end; j++) to[j] = m[j] ? to[j] : NONE;
      } else {
        for (int j = c.begin; j < c.end; j++) to[j] = m[j * st[3]] ? to[j] : NONE;
      }
    }
  }
  template <class B>
  static void widen_row(const B* x, int64_t stride, float* to, int n) {
    if (stride == 1) {
      for (int j = 0; j < n; j += LANES) {
        const int lanes = min(LANES, n - j);
        store(to + j, load(x + j, lanes), lanes);
      }
    } else {
      for (int j = 0; j < n; j++) to[j] = load1(x + j * stride);
    }
  }

  // The sink joins, the sum divides, and the rows leave.
  NOINLINE void finish(Tile& t, float* spare) const {
    for (int r = 0; r < t.width; r += LANES) {
      const f32v m = load(t.m + r), sink = load(t.sink + r), top = finite(max(m, sink)), turn = decay(m - top);
      const f32v total = fma(load(t.l + r), turn, decay(sink - top));
      store(t.m + r, top);
      store(t.l + r, total);
      store(t.slope + r, select(total > 0.0f, turn / total * a.keep_scale, f32v{}));
    }
    if (a.lse)
      for (int r = 0; r < t.rows; r++) {
        float* to = a.lse + s.lse + head(t.first + r) * (a.Sq) + (t.first + r) / G;
        *to = t.l[r] == 0 ? NONE : t.m[r] + __builtin_logf(t.l[r]);
      }
    if (t.few) {
      for (int r = 0; r < t.rows; r++) store_row(t.o + r * padded, t.slope[r], t.first + r);
      return;
    }
    for (int r = 0; r < t.width; r += LANES) {
      for (int d = 0; d < D; d += LANES) {
        f32v x[LANES];
        for (int i = 0; i < LANES; i++) x[i] = load(t.o + (d + i) * t.width + r);
        transpose(x);
        for (int i = 0; i < LANES; i++) store(spare + i * padded + d, x[i]);
      }
      for (int i = 0; i < LANES && r + i < t.rows; i++) store_row(spare + i * padded, t.slope[r + i], t.first + r + i);
    }
  }
  void store_row(const float* o, float factor, int row) const {
    T* to = out(row);
    prefetch_row(out(min(row + AHEAD, rows() - 1)), D);
    for (int d = 0; d < D; d += LANES) store(to + d, load(o + d) * factor, min(LANES, D - d));
  }
};

}  // namespace gptfast::ISA::attn
