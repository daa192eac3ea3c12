#include "norm_backward.h"

namespace gptfast::ISA {

void layer_norm(const Norm& a, Worker& worker) {
  norm_rows(a, worker, [&](int64_t r, bool past_caches, float* row, auto t, auto w) {
    layer_norm_row<decltype(t), decltype(w)>(a, r, past_caches, row, norm_row<decltype(t)>(a, r));
  });
}

void layer_norm_backward(const NormBackward& a, Worker& worker) { norm_backward<true>(a, worker); }

}  // namespace gptfast::ISA
