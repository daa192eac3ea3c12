#include "norm_backward.h"

namespace gptfast::ISA {

void rms_norm(const Norm& a, Worker& worker) {
  norm_rows(a, worker, [&](int64_t r, bool past_caches, float* row, auto t, auto w) {
    rms_norm_row<decltype(t), decltype(w)>(a, r, past_caches, row, norm_row<decltype(t)>(a, r));
  });
}

void rms_norm_backward(const NormBackward& a, Worker& worker) { norm_backward<false>(a, worker); }

}  // namespace gptfast::ISA
