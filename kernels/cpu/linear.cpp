// Linear with float weights (fp32, bf16, fp16), row-major as PyTorch keeps them. Lanes hold partial sums over k: output
// (i, j) is the sum by halves of LANES fma chains over k = lane, lane + LANES, ..., in chunks of CHUNK that are added
// in order. Neither the number of rows nor a tile's size touches that order.
//
// Of x and W in bfloat16, on a machine that multiplies pairs of them, a lane adds two neighbours of k at a time.
#include "linear.h"

#include "pairs.h"

namespace gptfast::ISA {

namespace {

// The op page's constant, k or pairs of them: eight rows of x take 24 of L1's 32 KiB.
constexpr int64_t CHUNK = 768 * PER_LANE;
#if defined(__AVX512F__)
constexpr int FEW = 8, TILE = 6, WIDTH = 4;  // 24 sums and the tile of W fit 32 registers
constexpr int few_width(int rows) { return rows <= 3 ? 8 : 24 / rows; }
#else
constexpr int FEW = 4, TILE = 4, WIDTH = 3;  // 12 sums of 16 registers
constexpr int few_width(int rows) { return rows == 1 ? 8 : 12 / rows; }
#endif
// Tiles of so many rows have their sums by columns: what is stored is then turned eight columns at a time.
constexpr int TURNED = LANES == 16 ? 8 : 0;
constexpr int LEAST = (FEW + 1) / 2;                  // the lowest tile of more than FEW rows
constexpr int SLOT = 32;                              // floats for the sums of one tile
constexpr int64_t STREAMED = 48;                      // up to so many rows W is used from where it lies
constexpr int64_t STREAM_COLS = 24;                   // columns of a task then
constexpr int64_t BLOCK_COLS = 48, BLOCK_TILES = 96;  // beyond: blocks of W and of sums that stay in L2

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

#if defined(__AVX512F__)
// The same for TURNED rows, [col][row], of which halves of vectors are added as they come back from memory: a third of
// the shuffles less.
template <int NR>
INLINE void reduce_turned(const f32v (&acc)[TURNED][NR], float* out, bool add) {
  alignas(64) float room[NR][TURNED][LANES];
#pragma GCC unroll 24
  for (int n = 0; n < NR * TURNED; n++) _mm512_store_ps(room[n / TURNED][n % TURNED], acc[n % TURNED][n / TURNED]);
#pragma GCC unroll 3
  for (int j = 0; j < NR; j++, out += TURNED) {
    auto half = [&](int i) -> __m256 { return _mm256_load_ps(room[j][i]) + _mm256_load_ps(room[j][i] + 8); };
    auto quarter = [&](int i) -> __m256 {
      const __m256 a = half(i), b = half(i + 4);
      return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
    };
    auto fold = [](__m256 a, __m256 b, auto even, auto odd) -> __m256 {
      return _mm256_shuffle_ps(a, b, decltype(even)::value) + _mm256_shuffle_ps(a, b, decltype(odd)::value);
    };
    const __m256 a = fold(quarter(0), quarter(1), Int<0x44>{}, Int<0xee>{});
    const __m256 b = fold(quarter(2), quarter(3), Int<0x44>{}, Int<0xee>{});
    const __m256 s = fold(a, b, Int<0x88>{}, Int<0xdd>{});
    _mm256_storeu_ps(out, add ? _mm256_loadu_ps(out) + s : s);
  }
}
#endif

// One chunk of MR x NR outputs. x: [step][MR][LANES], zero beyond K; W where it lies: NR rows and, for the last step,
// how many of its numbers there are. What is fetched goes to L2.
template <int MR, int NR, class W>
INLINE void dot_rows(const float* x, const W* const* w, int64_t length, Ahead ahead, f32v (&acc)[MR][NR]) {
  constexpr int STEPS =
      MR == 1 && VEC_BYTES == 32 ? 2 : 1;  // a line is two steps: half of the prefetches, 1.2x from L3
  auto step = [&](auto load_w, int64_t k) {
    f32v b[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) b[j] = load_w(w[j] + k);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const f32v a = in_register(load(x + k / PER_LANE * MR + i * LANES));
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) acc[i][j] = add_products(acc[i][j], a, b[j]);
    }
  };
  int64_t k = 0;
  auto whole_steps = [&](auto n) {
    constexpr int N = decltype(n)::value;
    for (; k + N * STEP <= length; ahead.bytes += N * ahead.step) {
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) __builtin_prefetch((const char*)w[j] + ahead.bytes, 0, 2);
#pragma GCC unroll 2
      for (int s = 0; s < N; s++, k += STEP) step([](const W* p) { return load_lanes(p); }, k);
    }
  };
  whole_steps(Int<STEPS>{});
  if constexpr (STEPS > 1) whole_steps(Int<1>{});
  if (const int tail = (int)(length - k)) step([tail](const W* p) { return load_lanes(p, tail); }, k);
}

// The same with W packed like x: [step][NR][LANES]. As many lines as there are steps, from `next` on, are fetched.
template <int MR, int NR>
INLINE void dot_packed(const float* x, const float* w, int64_t steps, const float* next, f32v (&acc)[MR][NR]) {
  for (; steps > 0; steps--, x += MR * LANES, w += NR * LANES, next += LANES) {
    f32v b[NR];
    __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) b[j] = load(w + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const f32v a = in_register(load(x + i * LANES));
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) acc[i][j] = add_products(acc[i][j], a, b[j]);
    }
  }
}

// rows x K in lanes as [step][rows][LANES], K padded with zeros to whole steps; rows beyond `present` repeat the last
// one. The rows are walked side by side, the next ones on their way, so that memory is asked for many lines at a time.
template <class T>
void pack_rows(const T* x, int64_t stride, int64_t K, int rows, int64_t present, float* out) {
  for (int64_t k = 0; k < K; k += STEP)
    for (int i = 0; i < rows; i++, out += LANES) {
      const T* p = x + min<int64_t>(i, present - 1) * stride + k;
      __builtin_prefetch(p + rows * stride);
      store(out, K - k >= STEP ? load_lanes(p) : load_lanes(p, K - k));
    }
}

// One chunk of MR x NR outputs, W where it lies; of its NR rows the first `present` exist.
template <int MR, int NR, class W>
__attribute__((noinline)) void streamed_tile(const float* x, const W* weight, int64_t stride, int64_t present,
                                             int64_t length, Ahead ahead, float* sums, bool add) {
  const W* w[NR] = {weight};
#pragma GCC unroll 8
  for (int j = 1; j < NR; j++) w[j] = w[j - 1] + (j < present ? stride : 0);  // products would be taken as vectors
  f32v acc[MR][NR] = {};
  dot_rows<MR, NR>(x, w, length, ahead, acc);
#if defined(__AVX512F__)
  if constexpr (MR == TURNED) return reduce_turned<NR>(acc, sums, add);
#endif
  reduce<MR * NR>(&acc[0][0], sums, add);
}

// The same with W packed.
template <int MR>
__attribute__((noinline)) void packed_tile(const float* x, const float* w, int64_t steps, const float* next,
                                           float* sums, bool add) {
  f32v acc[MR][WIDTH] = {};
  dot_packed<MR, WIDTH>(x, w, steps, next, acc);
  reduce<MR * WIDTH>(&acc[0][0], sums, add);
}

// The sums of a block, [tile of rows][tile of columns][SLOT], each tile [rows][width], become outputs.
void store_block(const Linear& a, const Tiles& tiles, int64_t begin, int64_t end, int64_t col, int64_t cols, int width,
                 const float* sums) {
  const int64_t across = ceil_div(cols, width);
  for (int64_t t = begin; t < end; t++, sums += across * SLOT)
    for (int i = 0; i < tiles.height(t); i++) {
      float row[BLOCK_COLS];
      for (int64_t c = 0; c < across; c++)
        for (int j = 0; j < width; j++) row[c * width + j] = sums[c * SLOT + i * width + j];
      store_outputs(a, tiles.begin(t) + i, col, row, (int)cols);
    }
}

#if defined(__AVX512F__)
// The same for one tile of TURNED rows, whose sums are [tile of columns][width][TURNED].
void store_turned(const Linear& a, int64_t row, int64_t col, int64_t cols, int width, const float* sums) {
  float out[TURNED][STREAM_COLS];
  for (int n = 0; n < STREAM_COLS; n += 8) {
    __m256 c[8], half[8];
    for (int j = 0; j < 8; j++) c[j] = _mm256_loadu_ps(sums + (n + j) / width * SLOT + (n + j) % width * TURNED);
#pragma GCC unroll 4
    for (int j = 0; j < 8; j += 2) {
      const __m256 low = _mm256_unpacklo_ps(c[j], c[j + 1]), high = _mm256_unpackhi_ps(c[j], c[j + 1]);
      half[j] = low, half[j + 1] = high;
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++)
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const __m256 first = half[h], second = half[h + 2], third = half[h + 4], fourth = half[h + 6];
        const __m256 left = j ? _mm256_shuffle_ps(first, second, 0xee) : _mm256_shuffle_ps(first, second, 0x44);
        const __m256 right = j ? _mm256_shuffle_ps(third, fourth, 0xee) : _mm256_shuffle_ps(third, fourth, 0x44);
        const int i = h * 2 + j;
        _mm256_storeu_ps(out[i] + n, _mm256_permute2f128_ps(left, right, 0x20));
        _mm256_storeu_ps(out[i + 4] + n, _mm256_permute2f128_ps(left, right, 0x31));
      }
  }
  for (int i = 0; i < TURNED; i++) store_outputs(a, row + i, col, out[i], (int)cols);
}
#endif

// Up to STREAMED rows: W streams past once, each tile of it meets all the rows, and each tile of rows fetches its share
// of the next (all of it by the first: 0.8x from memory). Tiles of rows are LOW to HIGH high.
template <int LOW, int HIGH, int NR, class W>
void streamed(const Linear& a, const float* x, int64_t padded, Worker& worker, float* sums) {
  const Tiles tiles(a.rows, HIGH);
  worker.each(ceil_div(a.cols, STREAM_COLS), [&](int64_t task) {
    const int64_t col = task * STREAM_COLS, cols = min(STREAM_COLS, a.cols - col), across = ceil_div(cols, NR);
    for (int64_t k = 0; k < a.depth; k += CHUNK)
      for (int64_t c = 0; c < across; c++)
        for (int64_t t = 0; t < tiles.count; t++)
          with_int<LOW, HIGH>(tiles.height(t), [&](auto rows) {
            constexpr int MR = decltype(rows)::value;
            const int64_t length = min(CHUNK, a.depth - k), step = ceil_div(STEP * sizeof(W), tiles.count);
            const Ahead ahead = {NR * a.weight_stride * (int64_t)sizeof(W) + t * (length / STEP) * step, step};
            streamed_tile<MR, NR>(x + tiles.begin(t) * padded + k / PER_LANE * MR,
                                  (const W*)a.weight + (col + c * NR) * a.weight_stride + k, a.weight_stride,
                                  cols - c * NR, length, ahead, sums + (t * across + c) * SLOT, k > 0);
          });
#if defined(__AVX512F__)
    if constexpr (HIGH == TURNED) return store_turned(a, 0, col, cols, NR, sums);
#endif
    store_block(a, tiles, 0, tiles.count, col, cols, NR, sums);
  });
}

// More rows: blocks of W are packed once and stay in L2 while the rows pass, a tile of them in L1.
template <class W>
void blocked(const Linear& a, const float* x, int64_t padded, Worker& worker, float* sums, float* weight) {
  const Tiles tiles(a.rows, TILE);
  const int64_t columns = ceil_div(a.cols, BLOCK_COLS), enough = ceil_div(4 * worker.count, columns);
  const Tiles blocks(tiles.count, min(BLOCK_TILES, ceil_div(tiles.count, enough)));
  worker.each(blocks.count * columns, [&](int64_t task) {
    const int64_t begin = blocks.begin(task % blocks.count), end = blocks.begin(task % blocks.count + 1);
    const int64_t col = task / blocks.count * BLOCK_COLS, cols = min(BLOCK_COLS, a.cols - col);
    const int64_t across = ceil_div(cols, WIDTH);
    for (int64_t k = 0; k < a.depth; k += CHUNK) {
      const int64_t length = min(CHUNK, a.depth - k), steps = ceil_div(length, STEP);
      for (int64_t c = 0; c < across; c++)
        pack_rows((const W*)a.weight + (col + c * WIDTH) * a.weight_stride + k, a.weight_stride, length, WIDTH,
                  cols - c * WIDTH, weight + c * WIDTH * steps * LANES);
      for (int64_t t = begin; t < end; t++)
        with_int<TILE - 1, TILE>(tiles.height(t), [&](auto rows) {
          constexpr int MR = decltype(rows)::value;
          const float *here = x + tiles.begin(t) * padded + k / PER_LANE * MR, *next = here + MR * padded;
          for (int64_t c = 0; c < across; c++)
            packed_tile<MR>(here, weight + c * WIDTH * steps * LANES, steps, next + min<int64_t>(c, MR) * steps * LANES,
                            sums + ((t - begin) * across + c) * SLOT, k > 0);
        });
    }
    store_block(a, tiles, begin, end, col, cols, WIDTH, sums);
  });
}

// y = x W^T + bias. x is first laid out in tiles of lanes: together in the workspace, rows * (K rounded up to 16)
// floats, or, without one, by every worker for itself.
void by_rows(const Linear& a, Worker& worker) {
  constexpr int64_t SUMS = BLOCK_TILES * (BLOCK_COLS / WIDTH) * SLOT, MEMORY = SUMS + BLOCK_COLS * CHUNK / PER_LANE;
  const int64_t padded = ceil_div(a.depth, STEP) * LANES;
  const Tiles tiles(a.rows, a.rows <= FEW ? FEW : TILE);
  float* sums = (float*)worker.scratch((MEMORY + (a.workspace ? 0 : a.rows * padded)) * sizeof(float));
  float* x = a.workspace ? (float*)a.workspace : sums + MEMORY;
  prepare(a.workspace, tiles.count, worker, [&](int64_t begin, int64_t end) {
    with_numbers(a.dtype, [&](auto t) {
      for (int64_t i = begin; i < end; i++) {
        const int rows = tiles.height(i);
        pack_rows((const decltype(t)*)a.x + tiles.begin(i) * a.x_stride, a.x_stride, a.depth, rows, rows,
                  x + tiles.begin(i) * padded);
      }
    });
  });
  with_numbers(a.format, [&](auto w) {
    using W = decltype(w);
    if (a.rows > STREAMED)
      blocked<W>(a, x, padded, worker, sums, sums + SUMS);
    else if (a.rows > FEW)
      streamed<LEAST, TILE, WIDTH, W>(a, x, padded, worker, sums);
    else
      with_int<1, FEW>((int)a.rows, [&](auto rows) {
        constexpr int MR = decltype(rows)::value;
        streamed<MR, MR, few_width(MR), W>(a, x, padded, worker, sums);
      });
  });
}

}  // namespace

void linear_columns(const Linear& a, Worker& worker);  // linear_columns.cpp

// A negative weight_stride is that of W^T, where this is what lies in memory.
void by_layout(const Linear& a, Worker& worker) {
  a.weight_stride < 0 ? linear_columns(a, worker) : by_rows(a, worker);
}

#if defined(__AVX512BF16__)
}
namespace gptfast::avx512 {
void linear(const Linear&, Worker&);
}
namespace gptfast::ISA {
void linear(const Linear& a, Worker& worker) {
  if (a.dtype == BFLOAT16 && a.format == BFLOAT16) return by_layout(a, worker);
  avx512::linear(a, worker);
}
#else
void linear(const Linear& a, Worker& worker) { by_layout(a, worker); }
#endif

}  // namespace gptfast::ISA
