#include "kernels.h"
#include "wide.h"

namespace gptfast::ISA {

namespace {

// Elements of a task: whole, or the rest of a tensor. A sum of squares is made chunk by chunk, so this is part of the
// meaning (gptfast/ops/adamw.py).
constexpr int64_t CHUNK = 8192;

// Calls f(tensor, first, count) for the chunks begin .. end of all tensors one after another; tensor t has those from
// starts[t] on.
template <class F>
INLINE void each_chunk(const int64_t* starts, const int64_t* sizes, int64_t tensors, int64_t begin, int64_t end, F f) {
  int64_t low = 0, high = tensors;  // the last tensor that starts at or before `begin`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (starts[middle] <= begin ? low : high) = middle;
  }
  for (int64_t chunk = begin, t = low; chunk < end; chunk++) {
    while (chunk >= starts[t + 1]) t++;
    const int64_t first = (chunk - starts[t]) * CHUNK;
    f(t, chunk, first, min(CHUNK, sizes[t] - first));
  }
}

// The sum of squares in fp64: the squares of fp32 values are exact there, and neither overflow nor vanish.
template <class T>
INLINE double squares(const T* g, int64_t n) {
  Wide total[4] = {};
  each_vector(n, [&](int64_t i, auto lanes, int u) { add_square(total[u], load(g + i, lanes)); });
  for (int u = 1; u < 4; u++) total[0].a += total[u].a, total[0].b += total[u].b;
  return sum(total[0]);
}

// What one step does to every element of a tensor.
struct Update {
  f32v decay, scale, new1, beta2, new2, step_size, root_scale, eps;
};

INLINE Update update_of(const AdamW& a, int64_t t) {
  const double step = *a.steps[t];
  const double correction1 = 1 - __builtin_pow(a.beta1, step), correction2 = 1 - __builtin_pow(a.beta2, step);
  return {splat((float)(1 - a.lr * a.weight_decay)),
          splat((float)a.grad_scale),
          splat((float)(1 - a.beta1)),
          splat((float)a.beta2),
          splat((float)(1 - a.beta2)),
          splat((float)(-a.lr / correction1)),
          splat((float)(1 / __builtin_sqrt(correction2))),
          splat((float)a.eps)};
}

// w: what is updated, the parameter itself or its master; with one, the parameter becomes its rounded copy.
template <bool MASTER, class W, class T, class G>
INLINE void update(const Update& u, W* w, T* p, const G* grad, float* m, float* v, int64_t n) {
  each_vector(n, [&](int64_t i, auto lanes, int) {
    const f32v g = load(grad + i, lanes) * u.scale;
    const f32v m0 = load(m + i, lanes), m1 = fma(g - m0, u.new1, m0);
    const f32v v1 = fma(g * u.new2, g, load(v + i, lanes) * u.beta2);
    const f32v w1 = fma(u.step_size, m1 / fma(sqrt(v1), u.root_scale, u.eps), load(w + i, lanes) * u.decay);
    store(m + i, m1, lanes);
    store(v + i, v1, lanes);
    store(w + i, w1, lanes);
    if constexpr (MASTER) store(p + i, w1, lanes);
  });
}

}  // namespace

// sqrt(sum of squares) of all gradients: chunks in fp64, then their sums in order.
void gradient_norm(const GradientNorm& a, Worker& worker) {
  const int64_t chunks = a.starts[a.tensors];
  worker.phase(chunks, chunks / (16 * worker.count) + 1, [&](int64_t begin, int64_t end) {
    each_chunk(a.starts, a.sizes, a.tensors, begin, end, [&](int64_t t, int64_t chunk, int64_t first, int64_t n) {
      with_storage(a.grad_dtypes[t],
                   [&](auto g) { a.sums[chunk] = squares((const decltype(g)*)a.grads[t] + first, n); });
    });
  });
  worker.phase(1, 1, [&](int64_t, int64_t) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) total += a.sums[chunk];
    *a.norm = __builtin_sqrt(total);
  });
}

// One step for a list of tensors (gptfast/ops/adamw.py); a gradient has its parameter's dtype or is fp32.
void adamw(const AdamW& a, Worker& worker) {
  const int64_t chunks = a.starts[a.tensors];
  worker.phase(chunks, chunks / (16 * worker.count) + 1, [&](int64_t begin, int64_t end) {
    int64_t last = -1;
    Update u;
    each_chunk(a.starts, a.sizes, a.tensors, begin, end, [&](int64_t t, int64_t, int64_t first, int64_t n) {
      if (t != last) u = update_of(a, t);
      last = t;
      float *m = a.exp_avgs[t] + first, *v = a.exp_avg_sqs[t] + first;
      with_storage(a.dtypes[t], [&](auto element) {
        using T = decltype(element);
        T* p = (T*)a.params[t] + first;
        const auto with = [&](const auto* grad) {
          if (a.masters && a.masters[t])
            update<true>(u, a.masters[t] + first, p, grad + first, m, v, n);
          else
            update<false>(u, p, p, grad + first, m, v, n);
        };
        if (a.grad_dtypes[t] == a.dtypes[t])
          with((const T*)a.grads[t]);
        else
          with((const float*)a.grads[t]);
      });
    });
  });
}

}  // namespace gptfast::ISA
