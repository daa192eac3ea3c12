// The gradients of layer_norm and rms_norm. Each row's own in one pass over memory; those of weight and bias, sums over
// rows, in chunks of rows whose number depends on the shape alone, added in order.
#pragma once
#include "norm.h"

namespace gptfast::ISA {

template <class T>
INLINE const T* s_row(const NormBackward& a, int64_t r) {
  return (const T*)a.s + r / a.block * a.block_stride + r % a.block * a.s_stride;
}
template <class T>
INLINE const T* dy_row(const NormBackward& a, int64_t r) {
  return (const T*)a.dy + r * a.dy_stride;
}
// With g = dy * weight, x = s - mean and xhat = x * rstd:
//   ds = (g - mean(g) - xhat * mean(g * xhat)) * rstd + dsum,  dx = dropout(ds)
//   dweight += dy * xhat,  dbias += dy
// without mean and mean(g) where the op has none. `sums`, in the order in which T's are loaded, is dweight and after it
// dbias; null: neither is asked for. The next row is fetched meanwhile.
template <class T, class W, bool CENTRED>
INLINE void norm_backward_row(const NormBackward& a, int64_t r, bool past_caches, int32_t* kept, float* sums) {
  const int64_t C = a.cols, next = min(r + 1, a.rows - 1);
  const T *dy = dy_row<T>(a, r), *s = s_row<T>(a, r), *next_dy = dy_row<T>(a, next), *next_s = s_row<T>(a, next);
  const T* dsum = a.dsum ? (const T*)a.dsum + r * a.dsum_stride : nullptr;
  const W* weight = (const W*)a.weight;
  const float mean = CENTRED ? a.mean[r] : 0.0f, rstd = a.rstd[r];
  f32v sum_g[4] = {}, sum_gx[4] = {};
  each_pair(C, [&](int64_t c, auto n, int u) {
    const auto g = load(dy + c, n) * load_as<T>(weight + c, n);
    auto x = load(s + c, n);
    if constexpr (CENTRED) x = x - mean, add(sum_g + u, g);
    add_product(sum_gx + u, g, x);
  });
  const float mean_gx = sum_of(sum_gx) * rstd / (float)C * rstd, mean_g = CENTRED ? sum_of(sum_g) / (float)C : 0.0f;
  const float* keep = nullptr;
  if (a.drop_below) keep = (const float*)dropout_keep(kept, r * C, C, a.drop_below, a.stream, a.seed);
  T *dx = (T*)a.dx + r * C, *dresidual = a.dresidual ? (T*)a.dresidual + r * C : nullptr;
  // always_inline: as a function it would read what it captures from memory for every pair
  each_pair(C, [&](int64_t c, auto n, int u) __attribute__((always_inline)) {
    if (u == 0) prefetch_pairs(next_s + c), prefetch_pairs(next_dy + c);
    const auto d = load(dy + c, n);
    auto x = load(s + c, n), v = d * load_as<T>(weight + c, n);
    if constexpr (CENTRED) x = x - mean, v = v - mean_g;
    v = (v - x * mean_gx) * rstd;
    if (dsum) v = v + load(dsum + c, n);
    if (dresidual) put<float>(past_caches, dresidual + c, v, n);
    if (keep) v = where(load_as<T>(keep + c, n), v * a.keep_scale);
    put<float>(past_caches, dx + c, v, n);
    if (!sums) return;
    keep_row(sums + c, fma(d * rstd, x, load(sums + c, n)), n);
    keep_row(sums + C + c, d + load(sums + C + c, n), n);
  });
}

template <bool CENTRED>
INLINE void norm_backward(const NormBackward& a, Worker& worker) {
  const int64_t C = a.cols, chunks = ceil_div(a.rows, a.chunk);
  int32_t* kept = a.drop_below ? (int32_t*)worker.scratch((C + 4 * LANES) * sizeof(int32_t)) : nullptr;
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t row_bytes = C * sizeof(T), written = row_bytes * a.rows * (a.dresidual ? 2 : 1);
    const bool past_caches =
        written > STREAM_BYTES && row_bytes % VEC_BYTES == 0 && aligned(a.dx) && aligned(a.dresidual);
    const auto with_weight = [&](auto use) { a.weight_dtype == a.dtype ? use(t) : use(float{}); };
    worker.phase(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++) {
        float* sums = a.dweight || a.dbias ? a.workspace + chunk * 2 * C : nullptr;
        if (sums) memset(sums, 0, 2 * C * sizeof(float));
        with_weight([&](auto w) {
          for (int64_t r = chunk * a.chunk, last = min(a.rows, r + a.chunk); r < last; r++)
            norm_backward_row<T, decltype(w), CENTRED>(a, r, past_caches, kept, sums);
        });
        if (past_caches) stream_end();
      }
    });
    with_weight([&](auto w) {
      using W = decltype(w);
      if (a.dweight) add_chunks<T>(worker, a.workspace, chunks, 2 * C, C, (W*)a.dweight);
      if (a.dbias) add_chunks<T>(worker, a.workspace + C, chunks, 2 * C, C, (W*)a.dbias);
    });
  });
}

}  // namespace gptfast::ISA
