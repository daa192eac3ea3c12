// What layer_norm and rms_norm share: one pass over memory, the row of sums staying in L1 for the statistics.
#pragma once
#include "kernels.h"
#include "philox.h"
#include "vec.h"

namespace gptfast::ISA {

// Writes a row of s = dropout(x) + residual to `row` in fp32, and rounded to `sum` where there is a residual. Returns
// the sum of f(s) over the row: four accumulators lane by lane, then halves, so the order depends on the length alone.
template <class T, class F>
INLINE float norm_sums(const Norm& a, int64_t r, bool past_caches, float* row, F f) {
  const int64_t C = a.cols;
  const T* x = (const T*)a.x + r * a.x_stride;
  const T* residual = a.residual ? (const T*)a.residual + r * a.residual_stride : nullptr;
  T* sum_out = a.sum ? (T*)a.sum + r * C : nullptr;
  const int32_t* keep = nullptr;
  if (a.drop_below) keep = dropout_keep((int32_t*)(row + C), r * C, C, a.drop_below, a.stream, a.seed);
  f32v total[4] = {};
  each_vector(C, [&](int64_t c, auto n, int u) {
    f32v s = load(x + c, n);
    if (keep) s = load_mask(keep + c) ? s * a.keep_scale : f32v{};
    if (residual) {
      s += load(residual + c, n);
      past_caches ? stream(sum_out + c, s, n) : store(sum_out + c, s, n);
    }
    store(row + c, s, n);
    total[u] += f(s, n);
  });
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// y = (row - mean) * rstd * weight + bias, rounded; mean is left out where the op has none.
template <class T, class W, bool CENTRED>
INLINE void norm_scale(const Norm& a, int64_t r, bool past_caches, const float* row, float mean, float rstd) {
  T* y = (T*)a.y + r * a.cols;
  const W *weight = (const W*)a.weight, *bias = (const W*)a.bias;
  each_vector(a.cols, [&](int64_t c, auto n, int) {
    f32v v = load(row + c, n);
    if constexpr (CENTRED) v -= mean;
    v *= rstd;
    v = bias ? fma(v, load(weight + c, n), load(bias + c, n)) : v * load(weight + c, n);
    past_caches ? stream(y + c, v, n) : store(y + c, v, n);
  });
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
