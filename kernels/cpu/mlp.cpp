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

// Calls f(c, n) for the vectors of a row as mlp_row takes them.
template <class F>
INLINE void each_of_row(int64_t C, F f) {
  int64_t c = 0;
  for (; c + 2 * LANES <= C; c += 2 * LANES) f(c, Two{});
  for (; c < C; c += LANES) f(c, (int)min<int64_t>(C - c, LANES));
}
template <class F>
INLINE Pair apply(F f, Pair x, Pair y) {
  return {f(x.a, y.a), f(x.b, y.b)};
}
template <class F>
INLINE f32v apply(F f, f32v x, f32v y) {
  return f(x, y);
}
template <class T>
INLINE void put(bool past_caches, T* p, Pair v, Two) {
  past_caches ? stream_pair<T>(p, v) : store_pair<T>(p, v);
}
template <class T, class N>
INLINE void put(bool past_caches, T* p, f32v v, N n) {
  past_caches ? stream(p, v, n) : store(p, v, n);
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
      const auto dx = apply([&](f32v x, f32v dy) { return dy * derivative(x); }, x, dy);
      put(past, (T*)a.dx + (r + i) * a.cols + c, dx, n);
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

// f(gate, up) -> the derivatives of y by each.
template <class F>
void gated_backward(const MlpBackward& a, Worker& worker, F f) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    const bool past = past_caches<T>(a, 2);
    worker.phase(a.rows, ceil_div(a.rows, 8 * worker.count), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        each_of_row(a.cols, [&](int64_t c, auto n) {
          const auto gate = load((const T*)a.x + r * a.x_stride + c, n);
          const auto up = load((const T*)a.other + r * a.other_stride + c, n);
          const auto dy = load((const T*)a.dy + r * a.dy_stride + c, n);
          auto dgate = gate, dup = up;
          if constexpr (__is_same(decltype(n), Two)) {
            const Pair one = f(gate.a, up.a), two = f(gate.b, up.b);
            dgate = Pair{one.a, two.a} * dy, dup = Pair{one.b, two.b} * dy;
          } else {
            const Pair one = f(gate, up);
            dgate = one.a * dy, dup = one.b * dy;
          }
          put(past, (T*)a.dx + r * a.cols + c, dgate, n);
          put(past, (T*)a.dother + r * a.cols + c, dup, n);
        });
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
  a.tanh ? bias_gelu_backward(a, worker, [](f32v x) { return gelu_tanh_derivative(x); })
         : bias_gelu_backward(a, worker, [](f32v x) { return gelu_erf_derivative(x); });
}

void geglu_backward(const MlpBackward& a, Worker& worker) {
  a.tanh ? gated_backward(a, worker, [](f32v g, f32v up) { return Pair{gelu_tanh_derivative(g) * up, gelu_tanh(g)}; })
         : gated_backward(a, worker, [](f32v g, f32v up) { return Pair{gelu_erf_derivative(g) * up, gelu_erf(g)}; });
}

void swiglu_backward(const MlpBackward& a, Worker& worker) {
  gated_backward(a, worker, [](f32v gate, f32v up) {
    const f32v s = 1.0f / (1.0f + exp(-gate));
    return Pair{silu_derivative(gate, s) * up, gate * s};
  });
}

}  // namespace gptfast::ISA
