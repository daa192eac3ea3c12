#include "mlp.h"

namespace gptfast::ISA {

namespace {

template <class F>
void each_element(const Mlp& a, Worker& worker, F f) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t C = a.cols;
    const bool past_caches =
        a.rows * C * (int64_t)sizeof(T) > STREAM_BYTES && C * sizeof(T) % VEC_BYTES == 0 && aligned(a.y);
    worker.phase(a.rows, ceil_div(a.rows, 8 * worker.count), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) mlp_row(a, r, past_caches, (T*)a.y + r * C, f);
      if (past_caches) stream_end();
    });
  });
}

}  // namespace

void bias_gelu(const Mlp& a, Worker& worker) {
  with_bias_gelu(a, [&](auto f) { each_element(a, worker, f); });
}

void geglu(const Mlp& a, Worker& worker) {
  with_geglu(a, [&](auto f) { each_element(a, worker, f); });
}

void swiglu(const Mlp& a, Worker& worker) {
  with_swiglu(a, [&](auto f) { each_element(a, worker, f); });
}

}  // namespace gptfast::ISA
