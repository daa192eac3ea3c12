// Linear for up to a few rows with float weights that are stored the other way round, (depth, cols): as transformers'
// Conv1D keeps them. Output (i, j) is a chain of fmas over k in chunks of CHUNK, and the chunks are added in order.
//
// Of x and W in bfloat16, on a machine that multiplies pairs of them, two neighbours of k are one step.
#include "linear.h"
#include "pairs.h"

namespace gptfast::ISA {

namespace {

constexpr int64_t CHUNK = 96;   // the op page's constant, k or pairs of them: eight of them are enough to share out
constexpr int64_t BAND = 1024;  // columns of a task, or four times as many where x has one or two rows and few share
                                // them: the sums stay in L1, and W is read in longer runs (1.1x)
constexpr int FEW = 4;          // rows of x that share a load of W

// A step of n <= LANES columns, from w on: a row of W, or two beside each other, of which the second may not be there.
template <class W>
INLINE f32v load_step(const W* w, int64_t stride, bool whole, int n = LANES) {
  if constexpr (PAIRS) {
    if (!whole || n < LANES) return bitcast<f32v>(load_two(w, whole ? w + stride : nullptr, n));
#if defined(__AVX512BF16__)
    const __m256i first = _mm256_loadu_si256((const __m256i*)w),
                  next = _mm256_loadu_si256((const __m256i*)(w + stride));
    return bitcast<f32v>(interleaved((i32v)_mm512_inserti64x4(_mm512_castsi256_si512(first), next, 1)));
#endif
  }
  return n < LANES ? load(w, n) : load(w);
}

// sums[i] (i * apart) += x[i] W over KS steps of k, for `cols` columns; the next rows of W are fetched meanwhile.
// whole: whether a pair's second is there.
template <int MR, int KS, class W>
INLINE void add_rows(const float* x, const W* w, int64_t stride, int64_t cols, float* sums, int64_t apart, bool whole) {
  f32v a[MR][KS];
  for (int i = 0; i < MR; i++)
    for (int s = 0; s < KS; s++) a[i][s] = splat(x[i * CHUNK + s]);
  auto step = [&](auto load_at, auto store_at, int64_t n) {
    f32v b[KS];
#pragma GCC unroll 4
    for (int s = 0; s < KS; s++) b[s] = load_at(w + s * PER_LANE * stride + n);
#pragma GCC unroll 4
    for (int i = 0; i < MR; i++) {
      f32v sum = load(sums + i * apart + n);
#pragma GCC unroll 4
      for (int s = 0; s < KS; s++) sum = add_products(sum, a[i][s], b[s]);
      store_at(sums + i * apart + n, sum);
    }
  };
  int64_t n = 0;
  for (; n + LANES <= cols; n += LANES) {
    if (n * sizeof(W) % 64 < LANES * sizeof(W))
      for (int s = 0; s < KS * PER_LANE; s++) __builtin_prefetch(w + (KS * PER_LANE + s) * stride + n, 0, 2);
    step([=](const W* p) { return load_step(p, stride, whole); }, [](float* p, f32v v) { store(p, v); }, n);
  }
  if (const int tail = (int)(cols - n))
    step([=](const W* p) { return load_step(p, stride, whole, tail); }, [](float* p, f32v v) { store(p, v); }, n);
}

// One chunk of MR rows and a band of columns.
template <int MR, class W>
__attribute__((noinline)) void band(const float* x, const W* w, int64_t stride, int64_t length, int64_t cols,
                                    float* sums, int64_t apart) {
  constexpr int KS = MR <= 2 || VEC_BYTES == 64 ? 4 : 2;  // the values of x stay in registers
  const int64_t steps = length / PER_LANE;
  int64_t k = 0;
  for (; k + KS <= steps; k += KS) add_rows<MR, KS>(x + k, w + k * PER_LANE * stride, stride, cols, sums, apart, true);
  for (; k < lanes_of(length); k++)
    add_rows<MR, 1>(x + k, w + k * PER_LANE * stride, stride, cols, sums, apart, k < steps);
}

template <class T, class W>
void columns(const Linear& a, Worker& worker) {
  const int64_t width = a.rows <= 2 && worker.count <= 4 ? 4 / PER_LANE * BAND : BAND;  // pairs: half as many chunks
  const int64_t stride = -a.weight_stride;
  const int64_t chunks = ceil_div(a.depth, CHUNK * PER_LANE), bands = ceil_div(a.cols, width);
  auto part = [&](int64_t chunk, int64_t b) { return (float*)a.workspace + (chunk * bands + b) * a.rows * width; };
  worker.each(chunks * bands, [&](int64_t task) {
    const int64_t k = task / bands * CHUNK * PER_LANE, length = min(CHUNK * PER_LANE, a.depth - k), b = task % bands;
    const W* w = (const W*)a.weight + k * stride + b * width;
    for (int64_t row = 0; row < a.rows; row += FEW)
      with_int<1, FEW>((int)min<int64_t>(FEW, a.rows - row), [&](auto rows) {
        constexpr int MR = decltype(rows)::value;
        float x[MR * CHUNK];
        for (int i = 0; i < MR; i++) {
          const T* p = (const T*)a.x + (row + i) * a.x_stride + k;
          for (int64_t at = 0; at < length; at += STEP)
            store(x + i * CHUNK + at / PER_LANE, load_lanes(p + at, length - at));
        }
        float* sums = part(task / bands, b) + row * width;
        memset(sums, 0, MR * width * sizeof(float));
        band<MR>(x, w, stride, length, min(width, a.cols - b * width), sums, width);
      });
  });
  constexpr int64_t PIECE = 256;
  worker.each(ceil_div(a.cols, PIECE), [&](int64_t task) {
    const int64_t col = task * PIECE, n = min(PIECE, a.cols - col), b = col / width;
    for (int64_t row = 0; row < a.rows; row++) {
      const int64_t at = row * width + col % width;
      float sums[PIECE];
      for (int64_t i = 0; i < PIECE; i += LANES) {
        f32v s = load(part(0, b) + at + i);
        for (int64_t c = 1; c < chunks; c++) s += load(part(c, b) + at + i);
        store(sums + i, s);
      }
      store_outputs(a, row, col, sums, (int)n);
    }
  });
}

}  // namespace

// y = x W^T + bias for W^T as it lies; the workspace has rows * (K / CHUNK and cols / (4 BAND), both rounded up) sums.
void linear_columns(const Linear& a, Worker& worker) {
  with_numbers(a.dtype,
               [&](auto t) { with_numbers(a.format, [&](auto w) { columns<decltype(t), decltype(w)>(a, worker); }); });
}

}  // namespace gptfast::ISA
