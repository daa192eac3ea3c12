#include "activations.h"
#include "kernels.h"

namespace gptfast::ISA {

namespace {

// y = f(x, other) for each element; `other` is the row of up, the bias, or zero where there is none.
template <class F>
void each_element(const Mlp& a, Worker& worker, F f) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t C = a.cols;
    const bool past_caches =
        a.rows * C * (int64_t)sizeof(T) > STREAM_BYTES && C * sizeof(T) % VEC_BYTES == 0 && aligned(a.y);
    worker.phase(a.rows, ceil_div(a.rows, 8 * worker.count), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const T *x = (const T*)a.x + r * a.x_stride,
                *other = a.other ? (const T*)a.other + r * a.other_stride : nullptr;
        T* y = (T*)a.y + r * C;
        each_vector(C, [&](int64_t c, auto n, int) {
          const f32v v = f(load(x + c, n), other ? load(other + c, n) : f32v{});
          past_caches ? stream(y + c, v, n) : store(y + c, v, n);
        });
      }
      if (past_caches) stream_end();
    });
  });
}

}  // namespace

void bias_gelu(const Mlp& a, Worker& worker) {
  if (a.tanh)
    each_element(a, worker, [](f32v x, f32v bias) { return gelu_tanh(x + bias); });
  else
    each_element(a, worker, [](f32v x, f32v bias) { return gelu_erf(x + bias); });
}

void geglu(const Mlp& a, Worker& worker) {
  if (a.tanh)
    each_element(a, worker, [](f32v gate, f32v up) { return gelu_tanh(gate) * up; });
  else
    each_element(a, worker, [](f32v gate, f32v up) { return gelu_erf(gate) * up; });
}

void swiglu(const Mlp& a, Worker& worker) {
  each_element(a, worker, [](f32v gate, f32v up) { return silu(gate) * up; });
}

}  // namespace gptfast::ISA
