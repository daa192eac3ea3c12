#include "norm.h"

namespace gptfast::ISA {

// y = (s - mean) * rstd * weight + bias with s = dropout(x) + residual, mean and rstd of each row of s in fp32, the
// variance centred.
void layer_norm(const Norm& a, Worker& worker) {
  norm_rows(a, worker, [&](int64_t r, bool past_caches, float* row, auto t, auto w) {
    const float C = (float)a.cols;
    const float mean = norm_sums<decltype(t)>(a, r, past_caches, row, [](f32v s, auto) { return s; }) / C;
    f32v square[4] = {};
    each_vector(a.cols, [&](int64_t c, auto n, int u) {
      const f32v d = first(load(row + c, n) - mean, n);
      square[u] = fma(d, d, square[u]);
    });
    const float variance = sum((square[0] + square[1]) + (square[2] + square[3])) / C;
    const float rstd = 1.0f / __builtin_sqrtf(variance + a.eps);
    if (a.mean) a.mean[r] = mean;
    if (a.rstd) a.rstd[r] = rstd;
    norm_scale<decltype(t), decltype(w), true>(a, r, past_caches, row, mean, rstd);
  });
}

}  // namespace gptfast::ISA
