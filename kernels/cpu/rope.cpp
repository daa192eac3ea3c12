#include "rope.h"

#include "kernels.h"

namespace gptfast::ISA {

// Every head of q and of k at each (batch, position), rotated into new contiguous tensors.
void rope(const Rope& a, Worker& worker) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    worker.each(a.B * a.S, [&](int64_t i) {
      const int64_t b = i / a.S, s = i % a.S;
      const float *cos = a.cos + b * a.table_b + s * a.table_s, *sin = a.sin + b * a.table_b + s * a.table_s;
      const T *q = (const T*)a.q + b * a.q_b + s * a.q_s, *k = (const T*)a.k + b * a.k_b + s * a.k_s;
      T *q_out = (T*)a.q_out + i * a.Hq * a.D, *k_out = (T*)a.k_out + i * a.Hk * a.D;
      for (int64_t h = 0; h < a.Hq; h++) rope_row(q_out + h * a.D, q + h * a.q_h, cos, sin, a.D, a.R, a.interleaved);
      for (int64_t h = 0; h < a.Hk; h++) rope_row(k_out + h * a.D, k + h * a.k_h, cos, sin, a.D, a.R, a.interleaved);
    });
  });
}

}  // namespace gptfast::ISA
