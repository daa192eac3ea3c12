// Linear with float weights (fp32, bf16, fp16), row-major as PyTorch keeps them. Lanes hold partial sums over k: output
// (i, j) is the sum by halves of LANES fma chains over k = lane, lane + LANES, ..., in chunks of CHUNK that are added
// in order. Neither the number of rows nor a tile's size touches that order.
#include "linear.h"

namespace gptfast::ISA {

namespace {

constexpr int64_t CHUNK = 768;  // the op page's constant: a tile of x and one of W fit 32 KiB of L1
#if defined(__AVX512F__)
constexpr int FEW = 8, TILE = 6, WIDTH = 4;  // 24 sums and the tile of W fit 32 registers
constexpr int few_width(int rows) { return rows <= 3 ? 8 : 24 / rows; }
#else
constexpr int FEW = 4, TILE = 4, WIDTH = 3;  // 12 sums of 16 registers
constexpr int few_width(int rows) { return rows == 1 ? 8 : 12 / rows; }
#endif
constexpr int LEAST = FEW + 1 < 2 * TILE ? (FEW + 1) / 2 : TILE;  // the lowest tile of more than FEW rows
constexpr int64_t STREAMED = 48;                                  // up to so many rows W is used from where it lies
constexpr int64_t BLOCK_COLS = 48, BLOCK_TILES = 40;              // beyond: blocks of W and of sums that stay in L2

// Lanes 0..3 of each 128 bits hold the sums over the rest of v[0], v[4], v[8], v[12] (as many as there are lanes for).
template <int n>
INLINE f32v fold_to_four(const f32v* v) {
#if defined(__AVX512F__)
  auto fold = [](f32v a, f32v b) -> f32v {
    return _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x44) + _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xee);
  };
  const f32v a = fold(v[0], v[n > 4 ? 4 : 0]), b = n > 8 ? fold(v[8 % n], v[n > 12 ? 12 : 8 % n]) : a;
  return _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x88) + _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xdd);
#elif defined(__AVX2__)
  const f32v b = v[n > 4 ? 4 : 0];
  return _mm256_permute2f128_ps(v[0], b, 0x20) + _mm256_permute2f128_ps(v[0], b, 0x31);
#else
  return v[0];
#endif
}

#if defined(__AVX512F__)
#define SHUFFLE(a, b, imm) _mm512_shuffle_ps(a, b, imm)
#elif defined(__AVX2__)
#define SHUFFLE(a, b, imm) _mm256_shuffle_ps(a, b, imm)
#elif defined(__SSE2__)
#define SHUFFLE(a, b, imm) _mm_shuffle_ps(a, b, imm)
#else
#define SHUFFLE(a, b, imm) \
  __builtin_shufflevector(a, b, (imm) & 3, (imm) >> 2 & 3, ((imm) >> 4 & 3) + 4, ((imm) >> 6 & 3) + 4)
#endif

// The sums by halves of n <= LANES vectors, as vec.h's sum() gives each: n sums with a third of the shuffles.
template <int n>
INLINE f32v sums_of(const f32v* v) {
  const f32v p0 = fold_to_four<n>(v), p1 = n > 1 ? fold_to_four<n - 1>(v + 1) : p0;
  const f32v p2 = n > 2 ? fold_to_four<n - 2>(v + 2) : p0, p3 = n > 3 ? fold_to_four<n - 3>(v + 3) : p1;
  const f32v a = SHUFFLE(p0, p1, 0x44) + SHUFFLE(p0, p1, 0xee), b = SHUFFLE(p2, p3, 0x44) + SHUFFLE(p2, p3, 0xee);
  return SHUFFLE(a, b, 0x88) + SHUFFLE(a, b, 0xdd);
}

// out[i] = (add ? out[i] : 0) + the sum of v[i], for n vectors. out has room for n rounded up to LANES.
template <int n>
INLINE void reduce(const f32v* v, float* out, bool add) {
  const f32v s = sums_of<(n < LANES ? n : LANES)>(v);
  store(out, add ? load(out) + s : s);
  if constexpr (n > LANES) reduce<n - LANES>(v + LANES, out + LANES, add);
}

// One chunk of MR x NR outputs. x: [step][MR][LANES], zero beyond K; W where it lies: NR rows and, for the last step,
// how many of its lanes there are. Meanwhile the next tile of W (`ahead` elements on) is on its way to L2.
template <int MR, int NR, class W>
INLINE void dot_rows(const float* x, const W* const* w, int64_t length, int64_t ahead, f32v (&acc)[MR][NR]) {
  auto step = [&](auto load_w, int64_t k) {
    f32v b[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) b[j] = load_w(w[j] + k);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const f32v a = load(x + k * MR + i * LANES);
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) acc[i][j] = fma(a, b[j], acc[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + LANES <= length; k += LANES) {
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) __builtin_prefetch(w[j] + k + ahead, 0, 2);
    step([](const W* p) { return load(p); }, k);
  }
  if (const int tail = (int)(length - k)) step([tail](const W* p) { return load(p, tail); }, k);
}

// The same with W packed like x: [step][NR][LANES].
template <int MR, int NR>
INLINE void dot_packed(const float* x, const float* w, int64_t steps, f32v (&acc)[MR][NR]) {
  for (; steps > 0; steps--, x += MR * LANES, w += NR * LANES) {
    f32v b[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) b[j] = load(w + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const f32v a = load(x + i * LANES);
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) acc[i][j] = fma(a, b[j], acc[i][j]);
    }
  }
}

// rows x K in fp32 as [step][rows][LANES], K padded with zeros to whole steps; rows beyond `present` repeat the last
// one.
template <class T>
void pack_rows(const T* x, int64_t stride, int64_t K, int rows, int64_t present, float* out) {
  for (int i = 0; i < rows; i++) {
    const T* row = x + min<int64_t>(i, present - 1) * stride;
    float* o = out + i * LANES;
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) store(o + k * rows, load(row + k));
    if (k < K) store(o + k * rows, load(row + k, (int)(K - k)));
  }
}

// Outputs of MR rows and NR columns from column `col` on, all of K.
template <int MR, int NR, class W>
__attribute__((noinline)) void streamed_tile(const Linear& a, const float* x, int64_t row, int64_t col, bool fetch) {
  const W* w[NR];
  for (int j = 0; j < NR; j++) w[j] = (const W*)a.weight + min(col + j, a.cols - 1) * a.weight_stride;
  float sums[(MR * NR / LANES + 1) * LANES];
  for (int64_t k = 0; k < a.depth; k += CHUNK) {
    f32v acc[MR][NR] = {};
    dot_rows<MR, NR>(x + k * MR, w, min(CHUNK, a.depth - k), fetch ? NR * a.weight_stride : 0, acc);
    reduce<MR * NR>(&acc[0][0], sums, k > 0);
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) w[j] += CHUNK;
  }
  const int n = (int)min<int64_t>(NR, a.cols - col);
  for (int i = 0; i < MR; i++) store_outputs(a, row + i, col, sums + i * NR, n);
}

// Few rows: W streams past once, each tile of it meets all the rows.
template <class W>
void streamed(const Linear& a, const float* x, int64_t padded, Worker& worker) {
  if (a.rows <= FEW) {
    with_int<1, FEW>((int)a.rows, [&](auto rows) {
      constexpr int MR = decltype(rows)::value, NR = few_width(MR);
      in_runs(ceil_div(a.cols, NR), worker, [&](int64_t t) { streamed_tile<MR, NR, W>(a, x, 0, t * NR, true); });
    });
    return;
  }
  const Tiles tiles(a.rows, TILE);
  in_runs(ceil_div(a.cols, WIDTH), worker, [&](int64_t task) {
    for (int64_t t = 0; t < tiles.count; t++)
      with_int<LEAST, TILE>(tiles.height(t), [&](auto rows) {
        const int64_t row = tiles.begin(t);
        streamed_tile<decltype(rows)::value, WIDTH, W>(a, x + row * padded, row, task * WIDTH, t == 0);
      });
  });
}

template <int MR>
__attribute__((noinline)) void block_tile(const float* x, const float* w, int64_t steps, float* sums, bool add) {
  f32v acc[MR][WIDTH] = {};
  dot_packed<MR, WIDTH>(x, w, steps, acc);
  reduce<MR * WIDTH>(&acc[0][0], sums, add);
}

// Many rows: blocks of W are widened and packed once and stay in L2 while the rows pass, a tile of them in L1.
template <class W>
void blocked(const Linear& a, const float* x, int64_t padded, Worker& worker) {
  constexpr int WIDE = (TILE * WIDTH + LANES - 1) / LANES * LANES, ACROSS = BLOCK_COLS / WIDTH;  // sums of one tile
  float* weight = (float*)worker.scratch((BLOCK_COLS * CHUNK + BLOCK_TILES * ACROSS * WIDE) * sizeof(float));
  float* sums = weight + BLOCK_COLS * CHUNK;  // [tile of rows][tile of columns][WIDE]
  const Tiles tiles(a.rows, TILE), blocks(tiles.count, BLOCK_TILES);
  for (int64_t task; (task = worker.next()) < blocks.count * ceil_div(a.cols, BLOCK_COLS);) {
    const int64_t begin = blocks.begin(task % blocks.count), end = blocks.begin(task % blocks.count + 1);
    const int64_t col = task / blocks.count * BLOCK_COLS, cols = min(BLOCK_COLS, a.cols - col);
    for (int64_t k = 0; k < a.depth; k += CHUNK) {
      const int64_t length = min(CHUNK, a.depth - k), steps = ceil_div(length, LANES);
      for (int64_t c = 0; c < cols; c += WIDTH)
        pack_rows((const W*)a.weight + (col + c) * a.weight_stride + k, a.weight_stride, length, WIDTH, cols - c,
                  weight + c * steps * LANES);
      for (int64_t t = begin; t < end; t++)
        with_int<TILE - 1, TILE>(tiles.height(t), [&](auto rows) {
          constexpr int MR = decltype(rows)::value;
          const float* tile = x + tiles.begin(t) * padded + k * MR;
          for (int64_t c = 0; c * WIDTH < cols; c++)
            block_tile<MR>(tile, weight + c * WIDTH * steps * LANES, steps, sums + ((t - begin) * ACROSS + c) * WIDE,
                           k > 0);
        });
    }
    for (int64_t t = begin; t < end; t++)
      for (int i = 0; i < tiles.height(t); i++) {
        float row[BLOCK_COLS];
        for (int64_t c = 0; c * WIDTH < cols; c++)
          memcpy(row + c * WIDTH, sums + ((t - begin) * ACROSS + c) * WIDE + i * WIDTH, WIDTH * sizeof(float));
        store_outputs(a, tiles.begin(t) + i, col, row, (int)cols);
      }
  }
}

}  // namespace

// y = x W^T + bias. x is first laid out in fp32 tiles: together in the workspace, rows * (K rounded up to 16) floats,
// or, without one, by every worker for itself; more than STREAMED rows need a workspace.
void linear(const Linear& a, Worker& worker) {
  const int64_t padded = ceil_div(a.depth, LANES) * LANES;
  const Tiles tiles(a.rows, a.rows <= FEW ? FEW : TILE);
  float* x = a.workspace ? (float*)a.workspace : (float*)worker.scratch(a.rows * padded * sizeof(float));
  const int64_t begin = a.workspace ? worker.begin(tiles.count) : 0;
  const int64_t end = a.workspace ? worker.end(tiles.count) : tiles.count;
  with_storage(a.dtype, [&](auto t) {
    for (int64_t i = begin; i < end; i++) {
      const int rows = tiles.height(i);
      pack_rows((const decltype(t)*)a.x + tiles.begin(i) * a.x_stride, a.x_stride, a.depth, rows, rows,
                x + tiles.begin(i) * padded);
    }
  });
  if (a.workspace) worker.sync();
  with_storage(a.format, [&](auto w) {
    if (a.rows <= STREAMED)
      streamed<decltype(w)>(a, x, padded, worker);
    else
      blocked<decltype(w)>(a, x, padded, worker);
  });
}

}  // namespace gptfast::ISA
