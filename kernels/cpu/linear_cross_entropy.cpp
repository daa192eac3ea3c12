// The three products of a loss over a vocabulary, for one chunk of rows: logits = x W^T, and from their gradient G,
// which takes their place, dx = G W and dW = G^T x. Every product broadcasts one operand and has the other in the
// lanes, so that nothing is summed across lanes; all in fp32.
//   logits   depth in chunks of DEPTH, in order
//   dx       columns in blocks of BLOCK, in order within each of the vocabulary's parts; then the parts, in order
//   dW, db   rows in order, in chunks of ROWS
// Of bfloat16, on a machine that multiplies pairs of them, G is rounded to bfloat16 for its products.
#include "pairs.h"
#include "transpose.h"
#include "vocabulary.h"

namespace gptfast::ISA {

using namespace vocab;

namespace {

constexpr int64_t DEPTH = 256;  // of a chunk of W: a group of panels takes half of L1
constexpr int64_t ROWS = 192;   // of a chunk of x under G^T x: with a panel of G it fits L1
#if defined(__AVX512F__)
constexpr int HIGH = 8, ABREAST = 3, TALL = 8;  // 24 sums of 32 registers
#elif defined(__AVX2__)
constexpr int HIGH = 6, ABREAST = 1, TALL = 4;  // 12 of 16
#else
constexpr int HIGH = 3, ABREAST = 1, TALL = 4;
#endif
constexpr int COLS = ABREAST * PANEL, NV = COLS / LANES;  // columns under a tile of rows
constexpr int WIDE = 3 * LANES;                           // elements of x beside TALL columns of G
constexpr int64_t ROW_BLOCK = 96;                         // rows whose x stays in L2 beside a chunk of W

int64_t groups(int64_t n) { return ceil_div(n, COLS); }

// acc[i] += a[i * ROW + k * STEP] * b[k][N * LANES], k in order. k: lanes, here and in the tiles.
template <int ROW, int STEP, int M, int N>
INLINE void multiply_add(f32v (&acc)[M][N], const float* a, const float* b, int64_t length) {
#pragma GCC unroll 1
  for (; length > 0; length--, a += STEP, b += N * LANES) {
    f32v row[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) row[v] = in_register(load(b + v * LANES));
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) {
        if constexpr (PAIRS)
          acc[i][v] = add_pairs(acc[i][v], splat_pair(a + i * ROW), bitcast<i32v>(row[v]));
        else
          acc[i][v] = fma(splat(a[i * ROW]), row[v], acc[i][v]);
      }
  }
}

// HIGH rows of x, [k][HIGH], times a group of W, [k][COLS], to or onto their logits.
__attribute__((noinline)) void logits_tile(const float* x, const float* w, int64_t length, float* logits,
                                           int64_t stride, bool add) {
  f32v acc[HIGH][NV] = {};
  multiply_add<1, HIGH>(acc, x, w, length);
#pragma GCC unroll 8
  for (int i = 0; i < HIGH; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      float* y = logits + v * LANES / PANEL * stride + i * PANEL + v * LANES % PANEL;
      store(y, add ? load(y) + acc[i][v] : acc[i][v]);
    }
}

// G of HIGH rows, panels `stride` apart, times a block of W, [column][COLS], to or onto a tile of dx.
__attribute__((noinline)) void dx_tile(const float* g, int64_t stride, int64_t panels, const float* w, float* dx,
                                       bool add) {
  f32v acc[HIGH][NV] = {};
  constexpr int DEEP = PANEL / PER_LANE;
  for (int64_t p = 0; p < panels; p++, g += stride, w += DEEP * COLS) multiply_add<DEEP, 1>(acc, g, w, DEEP);
#pragma GCC unroll 8
  for (int i = 0; i < HIGH; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++, dx += LANES) store(dx, add ? load(dx) + acc[i][v] : acc[i][v]);
}

// TALL columns of G, [row][PANEL], times x, [row][WIDE], to or onto sums.
__attribute__((noinline)) void dw_tile(const float* g, const float* x, int64_t rows, float* sums, bool add) {
  f32v acc[TALL][3] = {};
  multiply_add<1, PANEL>(acc, g, x, rows);
#pragma GCC unroll 8
  for (int i = 0; i < TALL; i++)
#pragma GCC unroll 8
    for (int v = 0; v < 3; v++, sums += LANES) store(sums, add ? load(sums) + acc[i][v] : acc[i][v]);
}

// n rows of W as [group][k][COLS], the columns beyond n zero.
template <class T>
void pack_columns(const T* w, int64_t stride, int n, int64_t length, float* out) {
  const int64_t depth = lanes_of(length);
  for (int64_t c = 0; c < groups(n) * COLS; c += LANES) {
    float* to = out + c / COLS * depth * COLS + c % COLS;
    for (int64_t k = 0; k < depth; k += LANES) {
      const int deep = (int)min<int64_t>(LANES, depth - k);
      f32v t[LANES];
      for (int i = 0; i < LANES; i++) {
        const T* p = w + (c + i) * stride + k * PER_LANE;
        if (c + i < n) __builtin_prefetch(p + LANES * stride);
        t[i] = c + i < n ? load_lanes(p, length - k * PER_LANE) : f32v{};
      }
      transpose(t);
      for (int i = 0; i < deep; i++) store(to + (k + i) * COLS, t[i]);
    }
  }
}

// n rows of W or x, row r at at(r), as [group][lane of rows][W], the elements beyond depth zero; then zeros, as far as
// `padded` rows.
template <int W, class At>
void pack_depth(At at, int64_t n, int64_t padded, int64_t depth, float* out, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++)
    for (int64_t k = 0; k < ceil_div(depth, W) * W; k += LANES) {
      const int lanes = (int)max<int64_t>(0, min<int64_t>(LANES, depth - k));
      f32v v = f32v{};
      if (const int64_t row = r * PER_LANE; row < n && lanes) {
        if constexpr (PAIRS)
          v = bitcast<f32v>(load_two(at(row) + k, row + 1 < n ? at(row + 1) + k : nullptr, lanes));
        else
          v = load(at(row) + k, lanes);
      }
      store(out + (k / W * lanes_of(padded) + r) * W + k % W, v);
    }
}

// A block of G rounded to bfloat16: as pairs of rows, and as rows.
void round_block(const Vocabulary& a, int64_t n, const float* g, float* pairs, float* rows) {
  if constexpr (PAIRS)
    for (int64_t p = 0; p < groups(n) * ABREAST; p++, g += a.padded * PANEL)
      for (int64_t r = 0; r < a.rows; r += 2) {
        const f32v even = load(g + r * PANEL), odd = r + 1 < a.rows ? load(g + (r + 1) * PANEL) : f32v{};
        store(pairs + (p * lanes_of(a.padded) + r / 2) * PANEL, bitcast<f32v>(beside(even, odd)));
        float* row = rows + (p * a.padded + r) * (PANEL / 2);
        store_half(row, even);
        if (r + 1 < a.rows) store_half(row + PANEL / 2, odd);
      }
}

template <class F>
void with_flags(bool a, bool b, F f) {
  if (a && b)
    f(Int<1>{}, Int<1>{});
  else if (a)
    f(Int<1>{}, Int<0>{});
  else if (b)
    f(Int<0>{}, Int<1>{});
  else
    f(Int<0>{}, Int<0>{});
}

// Bias, soft cap and temperature of rows [begin, end) of a block, in place, and its statistics.
template <class T>
void finish_rows(const Vocabulary& a, const Terms& terms, int64_t block, int64_t begin, int64_t end, float* logits) {
  const int64_t count = blocks(a.cols), stride = a.padded * PANEL, field = a.rows * count, v = block * BLOCK;
  const int n = width(a.cols, block);
  const T* bias = a.bias ? (const T*)a.bias + v : nullptr;
  with_flags(a.smooth, a.entropy, [&](auto spreads, auto entropies) {
    for (int64_t r = begin; r < end; r++) {
      float *l = logits + r * PANEL, *s = a.stats + r * count + block;
      if (bias || terms.cap > 0 || terms.inverse_temperature != 1)
        each_column(stride, n, [&](int64_t at, auto lanes, int c, int) {
          const f32v sum = load(l + at);
          store(l + at, terms(bias ? sum + load(bias + c, lanes) : sum));
        });
      const Statistics made =
          statistics<spreads.value, entropies.value>(l, stride, n, a.class_weight ? a.class_weight + v : nullptr);
      s[MAX * field] = made.max;
      s[SUM * field] = made.sum;
      s[SPREAD * field] = made.spread;
      s[ENTROPY * field] = made.entropy;
      const int64_t t = a.target ? a.target[r] - v : -1;
      if (0 <= t && t < n) a.at_target[r] = l[t / PANEL * stride + t % PANEL];
    }
  });
}

// A block's logits for all rows.
template <class T>
void logits_block(const Vocabulary& a, const Terms& terms, int64_t block, float* logits, float* packed) {
  const int64_t stride = a.padded * PANEL;
  const int n = width(a.cols, block);
  const T* w = (const T*)a.weight + block * BLOCK * a.weight_stride;
  for (int64_t k = 0; k < a.depth; k += DEPTH) {
    const int64_t length = min(DEPTH, a.depth - k), lanes = lanes_of(length);
    pack_columns(w + k, a.weight_stride, n, length, packed);
    for (int64_t begin = 0; begin < a.rows; begin += ROW_BLOCK) {
      const int64_t end = min(begin + ROW_BLOCK, a.rows);
      for (int64_t g = 0; g < groups(n); g++)
        for (int64_t r = begin; r < end; r += HIGH)
          logits_tile(a.tiles + r * a.depth + lanes_of(k) * HIGH, packed + g * lanes * COLS, lanes,
                      logits + g * ABREAST * stride + r * PANEL, stride, k > 0);
      if (k + length == a.depth) finish_rows<T>(a, terms, block, begin, end, logits);
    }
  }
}

// Logits become their gradient, in place; db.
void gradient_block(const Vocabulary& a, const Terms& terms, int64_t block, float* logits) {
  const int n = width(a.cols, block);
  for (int c = 0; c < n; c += LANES) {
    const int64_t v = block * BLOCK + c;
    const int lanes = min(LANES, n - c);
    const f32v weight = a.class_weight ? load(a.class_weight + v, lanes) : splat(1.0f);
    float* l = logits + c / PANEL * a.padded * PANEL + c % PANEL;
    f32v total = {};
    for (int64_t r = 0; r < a.rows; r++, l += PANEL) {
      if (!a.made) {
        const Gradient g = {a.lse[r],  a.rest[r], a.scale[r],  a.slope ? a.slope[r] : 0,
                            a.even[r], a.hit[r],  a.target[r], terms};
        store(l, first(g(load(l), weight, iota() + (int32_t)v), lanes));
      }
      total += load(l);
    }
    if (a.dbias) store(a.dbias + v, a.add ? load(a.dbias + v, lanes) + total : total, lanes);
  }
  for (int c = (int)ceil_div(n, LANES) * LANES; c < groups(n) * COLS; c += LANES)
    for (int64_t r = 0; r < a.rows; r++) store(logits + c / PANEL * a.padded * PANEL + c % PANEL + r * PANEL, f32v{});
}

// dW of a block, to or onto the sums of the chunks before. g: [panel][lane of rows][PANEL].
void dw_block(const Vocabulary& a, int64_t block, const float* g, float* sums) {
  const int n = width(a.cols, block);
  for (int64_t c = 0; c < a.depth; c += WIDE) {
    const float* x = a.panels + c * lanes_of(a.rows);
    float* out = a.dweight + block * BLOCK * a.depth + c;
    for (int64_t k = 0; k < a.rows; k += ROWS)
      for (int v = 0; v < n; v += TALL) {
        float* tile = sums + v * WIDE;
        const bool last = k + ROWS >= a.rows;
        if (last)
          for (int i = 0; i < TALL; i++) __builtin_prefetch(out + min(v + i, n - 1) * a.depth, 1);
        const int64_t done = lanes_of(k);
        dw_tile(g + (v / PANEL * lanes_of(a.padded) + done) * PANEL + v % PANEL, x + done * WIDE,
                lanes_of(min(ROWS, a.rows - k)), tile, k > 0);
        if (last)
          for (int i = 0; i < TALL && v + i < n; i++)
            for (int j = 0; j < WIDE && c + j < a.depth; j += LANES) {
              float* y = out + (v + i) * a.depth + j;
              const int lanes = (int)min<int64_t>(LANES, a.depth - c - j);
              const f32v s = load(tile + i * WIDE + j);
              store(y, a.add ? load(y, lanes) + s : s, lanes);
            }
      }
  }
}

// A block's part of dx, [group][row][COLS]. g: [panel][row][lanes of PANEL].
void dx_block(const Vocabulary& a, int64_t block, const float* g, const float* w, float* dx, bool add) {
  const int64_t panels = groups(width(a.cols, block)) * ABREAST, deep = lanes_of(PANEL);
  for (int64_t c = 0; c < groups(a.depth); c++)
    for (int64_t r = 0; r < a.rows; r += HIGH)
      dx_tile(g + r * deep, a.padded * deep, panels, w + c * lanes_of(BLOCK) * COLS, dx + (c * a.padded + r) * COLS,
              add);
}

}  // namespace

namespace {

void make_logits(const Vocabulary& a, Worker& worker) {
  const Terms terms(a.softcap, a.inverse_temperature);
  float* packed = (float*)worker.scratch((DEPTH * BLOCK + (a.logits ? 0 : a.padded * BLOCK)) * sizeof(float));
  with_numbers(a.dtype, [&](auto t) {
    using T = decltype(t);
    worker.each(ceil_div(a.rows, HIGH), [&](int64_t tile) {
      float* out = a.tiles + tile * HIGH * a.depth;
      for (int i = 0; i < HIGH; i++) {
        const int64_t r = tile * HIGH + i;
        const T* x = (const T*)a.x + a.index[min(r, a.rows - 1)] * a.x_stride;
        for (int64_t k = 0; k < lanes_of(a.depth); k += LANES) {
          const int n = (int)min<int64_t>(LANES, lanes_of(a.depth) - k);
          float lanes[LANES];
          store(lanes, r < a.rows ? load_lanes(x + k * PER_LANE, a.depth - k * PER_LANE) : f32v{});
          for (int l = 0; l < n; l++) out[(k + l) * HIGH + i] = lanes[l];
        }
      }
    });
    worker.phase(blocks(a.cols), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++)
        logits_block<T>(a, terms, b, a.logits ? a.logits + b * BLOCK * a.padded : packed + DEPTH * BLOCK, packed);
    });
  });
  worker.each(a.rows, [&](int64_t r) {
    const int64_t count = blocks(a.cols);
    const Row row = merge(a.stats + r * count, a.rows * count, a.cols, a.block_weight, a.target ? a.at_target[r] : 0);
    a.lse[r] = row.lse;
    if (a.rest) a.rest[r] = row.rest;
    if (a.nll) a.nll[r] = row.nll;
    if (a.smooth) a.smooth[r] = row.smooth;
    if (a.entropy) a.entropy[r] = row.entropy;
  });
}

void make_gradients(const Vocabulary& a, Worker& worker) {
  const Terms terms(a.softcap, a.inverse_temperature);
  const int64_t part = groups(a.depth) * a.padded * COLS, packed = a.dx ? groups(a.depth) * COLS * BLOCK : 0;
  const int64_t halves = PAIRS ? BLOCK * lanes_of(a.padded) : 0;  // of G: pairs of rows, and rows
  float* w = (float*)worker.scratch((packed + BLOCK * WIDE + 2 * halves) * sizeof(float));
  float *pairs = w + packed + BLOCK * WIDE, *rows = pairs + halves;
  with_numbers(a.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t depth = a.depth;
    if (a.dweight)
      worker.each(lanes_of(a.rows), [&](int64_t r) {
        auto row = [&](int64_t i) { return (const T*)a.x + a.index[i] * a.x_stride; };
        pack_depth<WIDE>(row, a.rows, a.rows, depth, a.panels, r, r + 1);
      });
    worker.phase(a.parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) {
        const int64_t first = blocks(a.cols) * p / a.parts, last = blocks(a.cols) * (p + 1) / a.parts;
        for (int64_t b = first; b < last; b++) {
          float* g = a.logits + b * BLOCK * a.padded;
          gradient_block(a, terms, b, g);
          const int n = width(a.cols, b);
          round_block(a, n, g, pairs, rows);
          if (a.dweight) dw_block(a, b, PAIRS ? pairs : g, w + packed);
          if (!a.dx) continue;
          const T* weight = (const T*)a.weight + b * BLOCK * a.weight_stride;
          auto row = [&](int64_t v) { return weight + v * a.weight_stride; };
          pack_depth<COLS>(row, n, BLOCK, depth, w, 0, lanes_of(BLOCK));
          dx_block(a, b, PAIRS ? rows : g, w, a.dx_parts + p * part, b > first);
        }
      }
    });
    if (a.dx)
      worker.each(a.rows, [&](int64_t r) {
        float* dx = a.dx + a.index[r] * depth;
        for (int64_t k = 0; k < depth; k += LANES) {
          const float* s = a.dx_parts + (k / COLS * a.padded + r) * COLS + k % COLS;
          f32v total = load(s);
          for (int64_t p = 1; p < a.parts; p++) total += load(s + p * part);
          store(dx + k, total, (int)min<int64_t>(LANES, depth - k));
        }
      });
  });
}

}  // namespace

#if defined(__AVX512BF16__)
}
namespace gptfast::avx512 {
void vocabulary_logits(const Vocabulary&, Worker&);
void vocabulary_gradients(const Vocabulary&, Worker&);
}  // namespace gptfast::avx512
namespace gptfast::ISA {
#endif

// The statistics of a chunk of rows, and its logits where there is a place for them.
void vocabulary_logits(const Vocabulary& a, Worker& worker) {
#if defined(__AVX512BF16__)
  if (a.dtype != BFLOAT16) return avx512::vocabulary_logits(a, worker);
#endif
  make_logits(a, worker);
}

// The chunk's logits become their gradient; dx, and dW and db to or onto those of the chunks before.
void vocabulary_gradients(const Vocabulary& a, Worker& worker) {
#if defined(__AVX512BF16__)
  if (a.dtype != BFLOAT16) return avx512::vocabulary_gradients(a, worker);
#endif
  make_gradients(a, worker);
}

}  // namespace gptfast::ISA
