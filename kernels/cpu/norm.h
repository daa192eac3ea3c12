// What layer_norm and rms_norm share: one pass over memory, the row of sums staying in L1 for the statistics.
#pragma once
#include "kernels.h"
#include "philox.h"
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

// Writes a row of s = dropout(x) + residual to `row` in fp32, and rounded to `sum_out` if it isn't null. Returns
// the sum of f(s) over the row: four accumulators lane by lane, then halves, so the order depends on the length alone.
template <class T, class F>
INLINE float norm_sums(const Norm& a, int64_t r, bool past_caches, float* row, T* sum_out, F f) {
  const int64_t C = a.cols;
  const T* x = (const T*)a.x + r / a.block * a.block_stride + r % a.block * a.x_stride;
  const T* residual = a.residual ? (const T*)a.residual + r * a.residual_stride : nullptr;
  const int32_t* keep = nullptr;
  if (a.drop_below) keep = dropout_keep((int32_t*)(row + C), r * C, C, a.drop_below, a.stream, a.seed);
  f32v total[4] = {};
  each_vector(C, [&](int64_t c, auto n, int u) {
    f32v s = load(x + c, n);
    if (keep) s = load_mask(keep + c) ? s * a.keep_scale : f32v{};
    if (residual) s += load(residual + c, n);
    if (sum_out) past_caches ? stream(sum_out + c, s, n) : store(sum_out + c, s, n);
    store(row + c, s, n);
    total[u] += f(s, n);
  });
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// y = (row - mean) * rstd * weight + bias, rounded; mean is left out where the op has none.
template <class T, class W, bool CENTRED>
INLINE void norm_scale(const Norm& a, bool past_caches, const float* row, float mean, float rstd, T* y) {
  const W *weight = (const W*)a.weight, *bias = (const W*)a.bias;
  each_vector(a.cols, [&](int64_t c, auto n, int) {
    f32v v = load(row + c, n);
    if constexpr (CENTRED) v -= mean;
    v *= rstd;
    v = bias ? fma(v, load(weight + c, n), load(bias + c, n)) : v * load(weight + c, n);
    past_caches ? stream(y + c, v, n) : store(y + c, v, n);
  });
}

// y = (s - mean) * rstd * weight + bias with s = dropout(x) + residual, mean and rstd of each row of s in fp32, the
// variance centred.
template <class T, class W>
INLINE void layer_norm_row(const Norm& a, int64_t r, bool past_caches, float* row, NormRow<T> out) {
  const float C = (float)a.cols;
  const float mean = norm_sums(a, r, past_caches, row, out.sum, [](f32v s, auto) { return s; }) / C;
  f32v square[4] = {};
  each_vector(a.cols, [&](int64_t c, auto n, int u) {
    const f32v d = first(load(row + c, n) - mean, n);
    square[u] = fma(d, d, square[u]);
  });
  const float variance = sum((square[0] + square[1]) + (square[2] + square[3])) / C;
  const float rstd = 1.0f / __builtin_sqrtf(variance + a.eps);
  if (out.mean) *out.mean = mean;
  if (out.rstd) *out.rstd = rstd;
  norm_scale<T, W, true>(a, past_caches, row, mean, rstd, out.y);
}

// y = s * rstd * weight with s = dropout(x) + residual, rstd = 1 / sqrt(mean(s^2) + eps) of each row in fp32.
template <class T, class W>
INLINE void rms_norm_row(const Norm& a, int64_t r, bool past_caches, float* row, NormRow<T> out) {
  const float squares = norm_sums(a, r, past_caches, row, out.sum, [](f32v s, auto) { return s * s; });
  const float rstd = 1.0f / __builtin_sqrtf(squares / (float)a.cols + a.eps);
  if (out.rstd) *out.rstd = rstd;
  norm_scale<T, W, false>(a, past_caches, row, 0.0f, rstd, out.y);
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
