#include "mlp.h"

#include "row_sums.h"

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

template <class T>
INLINE bool past_caches(const MlpBackward& a, int64_t outputs) {
  const int64_t row_bytes = a.cols * (int64_t)sizeof(T);
  return outputs * a.rows * row_bytes > STREAM_BYTES && row_bytes % VEC_BYTES == 0 && aligned(a.dx) &&
         (outputs == 1 || aligned(a.dother));
}

// dx = dy f'(x + bias), N rows at a time; their sum is added to `kept` where that isn't null.
template <int N, class T, class F>
INLINE void bias_gelu_backward_rows(const MlpBackward& a, int64_t r, bool past, float* kept, F derivative) {
  const T* bias = (const T*)a.other;
  each_pair(a.cols, [&](int64_t c, auto n, int) {  // as add_chunks reads what is kept
    const auto b = bias ? load(bias + c, n) : decltype(load(bias, n)){};
    auto rows = decltype(b){};
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
      const auto x = load((const T*)a.x + (r + i) * a.x_stride + c, n) + b;
      const auto dy = load((const T*)a.dy + (r + i) * a.dy_stride + c, n);
      const auto dx = apply<T>([&](T t, f32v x, f32v dy) { return dy * derivative(t, x); }, x, dy);
      put<T>(past, (T*)a.dx + (r + i) * a.cols + c, dx, n);
      rows = i ? rows + dx : dx;
    }
    if (kept) keep_row(kept + c, rows + load(kept + c, n), n);
  });
}

template <class F>
void bias_gelu_backward(const MlpBackward& a, Worker& worker, F derivative) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t C = a.cols, chunks = ceil_div(a.rows, a.chunk);
    const bool past = past_caches<T>(a, 1);
    worker.phase(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++) {
        float* kept = a.dother ? a.workspace + chunk * C : nullptr;
        if (kept) memset(kept, 0, C * sizeof(float));
        const int64_t last = min(a.rows, (chunk + 1) * a.chunk);
        int64_t r = chunk * a.chunk;
        for (; r + 4 <= last; r += 4) bias_gelu_backward_rows<4, T>(a, r, past, kept, derivative);
        for (; r < last; r++) bias_gelu_backward_rows<1, T>(a, r, past, kept, derivative);
      }
      if (past) stream_end();
    });
    if (a.dother) add_chunks<T>(worker, a.workspace, chunks, C, C, (T*)a.dother);
  });
}

// f(T{}, gate, up) -> the derivatives of y by each. The next row is fetched meanwhile.
template <class F>
void gated_backward(const MlpBackward& a, Worker& worker, F f) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    const bool past = past_caches<T>(a, 2);
    worker.phase(a.rows, ceil_div(a.rows, 8 * worker.count), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const T *x = (const T*)a.x + r * a.x_stride, *other = (const T*)a.other + r * a.other_stride;
        const T* dys = (const T*)a.dy + r * a.dy_stride;
        const int64_t ahead = r + 1 < a.rows;
        each_pair(a.cols, [&](int64_t c, auto n, int) {
          prefetch_pair(x + ahead * a.x_stride + c), prefetch_pair(other + ahead * a.other_stride + c);
          prefetch_pair(dys + ahead * a.dy_stride + c);
          const auto gate = load(x + c, n), up = load(other + c, n), dy = load(dys + c, n);
          auto dgate = gate, dup = up;
          if constexpr (__is_same(decltype(n), Two)) {
            const Pair one = f(T{}, gate.a, up.a), two = f(T{}, gate.b, up.b);
            dgate = Pair{one.a, two.a} * dy, dup = Pair{one.b, two.b} * dy;
          } else {
            const Pair one = f(T{}, gate, up);
            dgate = one.a * dy, dup = one.b * dy;
          }
          put<T>(past, (T*)a.dx + r * a.cols + c, dgate, n);
          put<T>(past, (T*)a.dother + r * a.cols + c, dup, n);
        });
      }
      if (past) stream_end();
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

void bias_gelu_backward(const MlpBackward& a, Worker& worker) {
  if (a.tanh)
    bias_gelu_backward(a, worker, [](auto t, f32v x) { return gelu_tanh_derivative<decltype(t)>(x).a; });
  else
    bias_gelu_backward(a, worker, [](auto t, f32v x) { return gelu_erf_derivative<decltype(t)>(x).a; });
}

void geglu_backward(const MlpBackward& a, Worker& worker) {
  if (a.tanh)
    gated_backward(a, worker, [](auto t, f32v gate, f32v up) {
      const Pair g = gelu_tanh_derivative<decltype(t)>(gate);
      return Pair{g.a * up, g.b};
    });
  else
    gated_backward(a, worker, [](auto t, f32v gate, f32v up) {
      const Pair g = gelu_erf_derivative<decltype(t)>(gate);
      return Pair{g.a * up, g.b};
    });
}

void swiglu_backward(const MlpBackward& a, Worker& worker) {
  gated_backward(a, worker, [](auto t, f32v gate, f32v up) {
    const f32v s = 1.0f / (1.0f + exp_for<decltype(t)>(-gate));
    return Pair{silu_derivative(gate, s) * up, gate * s};
  });
}

}  // namespace gptfast::ISA
