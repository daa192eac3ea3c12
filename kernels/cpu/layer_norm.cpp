#include "kernels.h"
#include "vec.h"

namespace gptfast::ISA {

namespace {

// Row statistics in fp32 over four accumulators, lane by lane, then summed by halves: the order depends on cols alone.
template <class T, class W>
void layer_norm_rows(const LayerNorm& a, int64_t begin, int64_t end, float* row) {
  const int64_t C = a.cols;
  const T *x = (const T*)a.x, *residual = (const T*)a.residual;
  const W *weight = (const W*)a.weight, *bias = (const W*)a.bias;
  for (int64_t r = begin; r < end; r++) {
    const T *xr = x + r * a.x_stride, *rr = residual ? residual + r * a.residual_stride : nullptr;
    T *yr = (T*)a.y + r * C, *sr = a.sum ? (T*)a.sum + r * C : nullptr;
    f32v total[4] = {};
    int64_t c = 0;
    auto take = [&](int64_t c, int u) {
      f32v v = load(xr + c);
      if (rr) {
        v += load(rr + c);
        store(sr + c, v);
      }
      store(row + c, v);
      total[u] += v;
    };
    for (; c + 4 * LANES <= C; c += 4 * LANES)
      for (int u = 0; u < 4; u++) take(c + u * LANES, u);
    for (; c + LANES <= C; c += LANES) take(c, 0);
    if (int n = (int)(C - c)) {
      f32v v = load(xr + c, n);
      if (rr) {
        v += load(rr + c, n);
        store(sr + c, v, n);
      }
      store(row + c, v, n);
      total[0] += v;
    }
    const float mean = sum((total[0] + total[1]) + (total[2] + total[3])) / (float)C;

    f32v square[4] = {};
    for (c = 0; c + 4 * LANES <= C; c += 4 * LANES)
      for (int u = 0; u < 4; u++) {
        f32v d = load(row + c + u * LANES) - mean;
        square[u] = fma(d, d, square[u]);
      }
    for (; c + LANES <= C; c += LANES) {
      f32v d = load(row + c) - mean;
      square[0] = fma(d, d, square[0]);
    }
    if (int n = (int)(C - c)) {
      f32v d = iota() < n ? load(row + c, n) - mean : f32v{};
      square[0] = fma(d, d, square[0]);
    }
    const float variance = sum((square[0] + square[1]) + (square[2] + square[3])) / (float)C;
    const float rstd = 1.0f / __builtin_sqrtf(variance + a.eps);
    if (a.mean) a.mean[r] = mean;
    if (a.rstd) a.rstd[r] = rstd;

    for (c = 0; c + LANES <= C; c += LANES) {
      f32v v = (load(row + c) - mean) * rstd;
      store(yr + c, bias ? fma(v, load(weight + c), load(bias + c)) : v * load(weight + c));
    }
    if (int n = (int)(C - c)) {
      f32v v = (load(row + c, n) - mean) * rstd;
      store(yr + c, bias ? fma(v, load(weight + c, n), load(bias + c, n)) : v * load(weight + c, n), n);
    }
  }
}

}  // namespace

// y = (x + residual - mean) * rstd * weight + bias, mean and rstd of each row of x + residual in fp32, the variance
// centred: two passes over a row that stays in L1, one over memory.
void layer_norm(const LayerNorm& a, Worker& worker) {
  float* row = (float*)worker.scratch(a.cols * sizeof(float));
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (a.weight_dtype == a.dtype)
      layer_norm_rows<T, T>(a, worker.begin(a.rows), worker.end(a.rows), row);
    else
      layer_norm_rows<T, float>(a, worker.begin(a.rows), worker.end(a.rows), row);
  });
}

}  // namespace gptfast::ISA
