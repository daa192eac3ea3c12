#include "vocabulary.h"

namespace gptfast::ISA {

using namespace vocab;

// KL(p || q) of each row of two chunks of logits, in blocks of columns, the blocks in order; and, where the gradients
// of these are given, those of the logits, in place:
//   KL = sum of p (log p - log q), dKL/dp's logits = p (log p - log q - KL), dKL/dq's = q - p
// A column with p = 0 adds nothing.
void token_kl(const TokenKl& a, Worker& worker) {
  const Terms p_terms(a.p_softcap, a.inverse_temperature), q_terms(a.q_softcap, a.inverse_temperature);
  const int64_t count = blocks(a.cols), stride = a.padded * PANEL;
  worker.phase(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      for (int64_t r = 0; r < a.rows; r++) {
        const float *p = a.p + b * BLOCK * a.padded + r * PANEL, *q = a.q + b * BLOCK * a.padded + r * PANEL;
        f32v sums[4] = {};
        each_column(stride, width(a.cols, b), [&](int64_t at, auto lanes, int, int u) {
          const f32v log_p = load(p + at) - a.p_lse[r], e = exp(log_p), gap = log_p - (load(q + at) - a.q_lse[r]);
          sums[u] += first(select(e == 0.0f, f32v{}, e * gap), lanes);
        });
        a.partial[r * count + b] = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
      }
  });
  worker.each(a.rows, [&](int64_t r) {
    double total = (double)a.q_rest[r] - a.p_rest[r];
    for (int64_t b = 0; b < count; b++) total += a.partial[r * count + b];
    a.kl[r] = (float)total;
  });
  if (!a.upstream) return;
  worker.phase(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      for (int64_t r = 0; r < a.rows; r++) {
        float *p = a.p + b * BLOCK * a.padded + r * PANEL, *q = a.q + b * BLOCK * a.padded + r * PANEL;
        const float g = a.upstream[r], kl = a.kl[r];
        auto flush = [](f32v v) { return select(abs(v) < 0x1p-126f, f32v{}, v); };
        each_column(stride, width(a.cols, b), [&](int64_t at, auto lanes, int, int) {
          const f32v lp = load(p + at), lq = load(q + at), log_p = lp - a.p_lse[r], log_q = lq - a.q_lse[r];
          const f32v e = exp(log_p), gap = log_p - log_q - kl;
          const f32v dp = p_terms.back(select(e == 0.0f, f32v{}, e * gap) * g, lp);
          const f32v dq = q_terms.back((exp(log_q) - e) * g, lq);
          store(p + at, first(flush(dp), lanes));
          store(q + at, first(flush(dq), lanes));
        });
      }
  });
}

}  // namespace gptfast::ISA
