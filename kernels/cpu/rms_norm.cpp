#include "norm.h"

namespace gptfast::ISA {

// y = s * rstd * weight with s = dropout(x) + residual, rstd = 1 / sqrt(mean(s^2) + eps) of each row in fp32.
void rms_norm(const Norm& a, Worker& worker) {
  norm_rows(a, worker, [&](int64_t r, bool past_caches, float* row, auto t, auto w) {
    const float squares = norm_sums<decltype(t)>(a, r, past_caches, row, [](f32v s, auto) { return s * s; });
    const float rstd = 1.0f / __builtin_sqrtf(squares / (float)a.cols + a.eps);
    if (a.rstd) a.rstd[r] = rstd;
    norm_scale<decltype(t), decltype(w), false>(a, r, past_caches, row, 0.0f, rstd);
  });
}

}  // namespace gptfast::ISA
