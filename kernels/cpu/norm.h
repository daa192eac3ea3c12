// What layer_norm and rms_norm share: one pass over memory, the row of sums staying in L1 for the statistics.
#pragma once
#include "kernels.h"
#include "philox.h"
#include "row_sums.h"
#include "vec.h"

namespace gptfast::ISA {

// Where a row's outputs go; all but y may be null.
template <class T>
struct NormRow {
  T *y, *sum;
  float *mean, *rstd;
};
template <class T>
INLINE NormRow<T> norm_row(const Norm& a, int64_t r) {
  return {(T*)a.y + r * a.cols, a.sum ? (T*)a.sum + r * a.cols : nullptr, a.mean ? a.mean + r : nullptr,
          a.rstd ? a.rstd + r : nullptr};
}

template <class T>
INLINE const T* x_row(const Norm& a, int64_t r) {
  return (const T*)a.x + r / a.block * a.block_stride + r % a.block * a.x_stride;
}
template <class T>
INLINE const T* residual_row(const Norm& a, int64_t r) {
  return a.residual ? (const T*)a.residual + r * a.residual_stride : nullptr;
}

// Values of one storage type in the order in which T's are loaded.
template <class T, class W, class N>
INLINE auto load_as(const W* p, N n) {
  return load(p, n);
}
template <class T>
INLINE Pair load_as(const float* p, Two) {
  const f32v a = load(p), b = load(p + LANES);
  if constexpr (sizeof(T) != sizeof(bf16) || __is_same(T, f16)) return {a, b};
  return {__builtin_shuffle(a, b, 2 * iota()), __builtin_shuffle(a, b, 2 * iota() + 1)};
}

INLINE f32v where(f32v mask, f32v v) { return bitcast<f32v>(bitcast<i32v>(mask) & bitcast<i32v>(v)); }
INLINE Pair where(Pair mask, Pair v) { return {where(mask.a, v.a), where(mask.b, v.b)}; }
INLINE void add(f32v* total, f32v v) { *total += v; }
INLINE void add(f32v* total, Pair v) { total[0] += v.a, total[1] += v.b; }
INLINE void add_square(f32v* total, f32v v) { *total = fma(v, v, *total); }
INLINE void add_square(f32v* total, Pair v) { add_square(total, v.a), add_square(total + 1, v.b); }
INLINE void add_product(f32v* total, f32v v, f32v w) { *total = fma(v, w, *total); }
INLINE void add_product(f32v* total, Pair v, Pair w) { add_product(total, v.a, w.a), add_product(total + 1, v.b, w.b); }
INLINE float sum_of(const f32v* total) { return sum((total[0] + total[1]) + (total[2] + total[3])); }

// Writes a row of s = dropout(x) + residual to `row` in fp32, and rounded to `sum_out` if it isn't null. Returns
// the sum of f(s) over the row: four accumulators lane by lane, then halves, so the order depends on the length alone.
template <class T, class F>
INLINE float norm_sums(const Norm& a, int64_t r, bool past_caches, float* row, T* sum_out, F f) {
  const int64_t C = a.cols;
  const T *x = x_row<T>(a, r), *residual = residual_row<T>(a, r);
  const float* keep = nullptr;
  if (a.drop_below) keep = (float*)dropout_keep((int32_t*)(row + C), r * C, C, a.drop_below, a.stream, a.seed);
  f32v total[4] = {};
  each_pair(C, [&](int64_t c, auto n, int u) {
    auto s = load(x + c, n);
    if (keep) s = where(load_as<T>(keep + c, n), s * a.keep_scale);
    if (residual) s = s + load(residual + c, n);
    if (sum_out) put<T>(past_caches, sum_out + c, s, n);
    keep_row(row + c, s, n);
    add(total + u, f(s));
  });
  return sum_of(total);
}

// The 4 * LANES elements from p on.
template <class T>
INLINE void prefetch_pairs(const T* p) {
  for (int b = 0; b < 4 * LANES * (int)sizeof(T); b += 64) __builtin_prefetch((const char*)p + b, 0, FETCHED_TO);
}

// y = (row - mean) * rstd * weight + bias, rounded; mean is left out where the op has none. The next row of x and
// residual is fetched meanwhile, for this pass reads nothing from memory.
template <class T, class W, bool CENTRED>
INLINE void norm_scale(const Norm& a, int64_t r, bool past_caches, const float* row, float mean, float rstd, T* y) {
  const W *weight = (const W*)a.weight, *bias = (const W*)a.bias;
  const int64_t next = min(r + 1, a.rows - 1);
  const T *x = x_row<T>(a, next), *residual = residual_row<T>(a, next);
  each_pair(a.cols, [&](int64_t c, auto n, int u) {
    if (u == 0) {
      prefetch_pairs(x + c);
      if (residual) prefetch_pairs(residual + c);
    }
    auto v = load(row + c, n);
    if constexpr (CENTRED) v = v - mean;
    v = v * rstd;
    v = bias ? fma(v, load_as<T>(weight + c, n), load_as<T>(bias + c, n)) : v * load_as<T>(weight + c, n);
    put<W>(past_caches, y + c, v, n);
  });
}

// y = (s - mean) * rstd * weight + bias with s = dropout(x) + residual, mean and rstd of each row of s in fp32, the
// variance centred.
template <class T, class W>
INLINE void layer_norm_row(const Norm& a, int64_t r, bool past_caches, float* row, NormRow<T> out) {
  const float C = (float)a.cols;
  const float mean = norm_sums(a, r, past_caches, row, out.sum, [](auto s) { return s; }) / C;
  f32v square[4] = {};
  each_pair(a.cols, [&](int64_t c, auto n, int u) { add_square(square + u, first(load(row + c, n) - mean, n)); });
  const float rstd = 1.0f / __builtin_sqrtf(sum_of(square) / C + a.eps);
  if (out.mean) *out.mean = mean;
  if (out.rstd) *out.rstd = rstd;
  norm_scale<T, W, true>(a, r, past_caches, row, mean, rstd, out.y);
}

// y = s * rstd * weight with s = dropout(x) + residual, rstd = 1 / sqrt(mean(s^2) + eps) of each row in fp32.
template <class T, class W>
INLINE void rms_norm_row(const Norm& a, int64_t r, bool past_caches, float* row, NormRow<T> out) {
  const float squares = norm_sums(a, r, past_caches, row, out.sum, [](auto s) { return s * s; });
  const float rstd = 1.0f / __builtin_sqrtf(squares / (float)a.cols + a.eps);
  if (out.rstd) *out.rstd = rstd;
  norm_scale<T, W, false>(a, r, past_caches, row, 0.0f, rstd, out.y);
}

// Calls body(r, past_caches, row, T{}, W{}) for each row of this worker's share.
template <class F>
INLINE void norm_rows(const Norm& a, Worker& worker, F body) {
  // room for a row and for its dropout mask
  float* row = (float*)worker.scratch((a.cols * (a.drop_below ? 2 : 1) + 4 * LANES) * sizeof(float));
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    // Outputs that no cache would keep until they are read again skip the read that an ordinary store begins with.
    const int64_t row_bytes = a.cols * sizeof(T), written = row_bytes * a.rows * (a.sum ? 2 : 1);
    const bool past_caches = written > STREAM_BYTES && row_bytes % VEC_BYTES == 0 && aligned(a.y) && aligned(a.sum);
    worker.phase(a.rows, ceil_div(a.rows, 8 * worker.count), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        if (a.weight_dtype == a.dtype)
          body(r, past_caches, row, t, t);
        else
          body(r, past_caches, row, t, float{});
      }
      if (past_caches) stream_end();
    });
  });
}

}  // namespace gptfast::ISA
