// The gradients of layer_norm and rms_norm. Each row's own in one pass over memory; those of weight and bias, sums over
// rows, in chunks of rows whose number depends on the shape alone, added in order.
#pragma once
#include "norm.h"

namespace gptfast::ISA {

constexpr int64_t ROWS = 1;  // taken together: they stay in L1 for the sums over them

template <class T>
INLINE const T* s_row(const NormBackward& a, int64_t r) {
  return (const T*)a.s + r / a.block * a.block_stride + r % a.block * a.s_stride;
}
template <class T>
INLINE const T* dy_row(const NormBackward& a, int64_t r) {
  return (const T*)a.dy + r * a.dy_stride;
}
// xhat = (s - mean) * rstd
template <bool CENTRED, class V>
INLINE V normalised(const NormBackward& a, int64_t r, V s) {
  if constexpr (CENTRED) s = s - a.mean[r];
  return s * a.rstd[r];
}

// ds = (g - mean(g) - xhat * mean(g * xhat)) * rstd + dsum with g = dy * weight; mean(g) is left out where the op has
// no mean. dx = dropout(ds). The row after the next few is fetched meanwhile.
template <class T, class W, bool CENTRED>
INLINE void norm_backward_row(const NormBackward& a, int64_t r, bool past_caches, int32_t* kept) {
  const int64_t C = a.cols, next = min(r + ROWS, a.rows - 1);
  const T *dy = dy_row<T>(a, r), *s = s_row<T>(a, r), *next_dy = dy_row<T>(a, next), *next_s = s_row<T>(a, next);
  const T* dsum = a.dsum ? (const T*)a.dsum + r * a.dsum_stride : nullptr;
  const W* weight = (const W*)a.weight;
  f32v sum_g[4] = {}, sum_gx[4] = {};
  each_pair(C, [&](int64_t c, auto n, int u) {
    const auto g = load(dy + c, n) * load_as<T>(weight + c, n);
    if constexpr (CENTRED) add(sum_g + u, g);
    add_product(sum_gx + u, g, normalised<CENTRED>(a, r, load(s + c, n)));
  });
  const float mean_g = CENTRED ? sum_of(sum_g) / (float)C : 0.0f, mean_gx = sum_of(sum_gx) / (float)C;
  const float* keep = nullptr;
  if (a.drop_below) keep = (const float*)dropout_keep(kept, r * C, C, a.drop_below, a.stream, a.seed);
  T *dx = (T*)a.dx + r * C, *dresidual = a.dresidual ? (T*)a.dresidual + r * C : nullptr;
  each_pair(C, [&](int64_t c, auto n, int u) {
    if (u == 0) prefetch_pairs(next_s + c), prefetch_pairs(next_dy + c);
    const auto x = normalised<CENTRED>(a, r, load(s + c, n));
    auto v = load(dy + c, n) * load_as<T>(weight + c, n) - x * mean_gx;
    if constexpr (CENTRED) v = v - mean_g;
    v = v * a.rstd[r];
    if (dsum) v = v + load(dsum + c, n);
    if (dresidual) put<float>(past_caches, dresidual + c, v, n);
    if (keep) v = where(load_as<T>(keep + c, n), v * a.keep_scale);
    put<float>(past_caches, dx + c, v, n);
  });
}

// dweight += dy * xhat and dbias += dy over N rows, which are added to each other first. Both lie in the order in which
// T's are loaded.
template <int N, class T, bool CENTRED>
INLINE void norm_backward_weight(const NormBackward& a, int64_t r, float* dweight, float* dbias) {
  each_pair(a.cols, [&](int64_t c, auto n, int) {
    auto d = load(dy_row<T>(a, r) + c, n);
    auto weights = d * normalised<CENTRED>(a, r, load(s_row<T>(a, r) + c, n)), biases = d;
#pragma GCC unroll 4
    for (int i = 1; i < N; i++) {
      d = load(dy_row<T>(a, r + i) + c, n);
      weights = fma(d, normalised<CENTRED>(a, r + i, load(s_row<T>(a, r + i) + c, n)), weights);
      biases = biases + d;
    }
    keep_row(dweight + c, weights + load(dweight + c, n), n);
    keep_row(dbias + c, biases + load(dbias + c, n), n);
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
        float* sums = a.workspace + chunk * 2 * C;
        memset(sums, 0, 2 * C * sizeof(float));
        const int64_t last = min(a.rows, (chunk + 1) * a.chunk);
        with_weight([&](auto w) {
          for (int64_t r = chunk * a.chunk, n; r < last; r += n) {
            n = min(last - r, ROWS);
            for (int64_t i = r; i < r + n; i++) norm_backward_row<T, decltype(w), CENTRED>(a, i, past_caches, kept);
            if (!a.dweight && !a.dbias) continue;
            if (n == ROWS)
              norm_backward_weight<ROWS, T, CENTRED>(a, r, sums, sums + C);
            else
              for (int64_t i = r; i < r + n; i++) norm_backward_weight<1, T, CENTRED>(a, i, sums, sums + C);
          }
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
