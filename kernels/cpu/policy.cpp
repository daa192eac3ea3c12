#include "kernels.h"
#include "wide.h"

namespace gptfast::ISA {

namespace {

constexpr float FARTHEST = 20;  // of a log-ratio

typedef uint8_t u8v __attribute__((vector_size(LANES)));

// -1 in the lanes from c on that the mask keeps.
INLINE i32v kept(const uint8_t* mask, int64_t c, All) {
  if (!mask) return i32v{} - 1;
  u8v bytes;
  memcpy(&bytes, mask + c, sizeof bytes);
  return __builtin_convertvector(bytes, i32v) != 0;
}
INLINE i32v kept(const uint8_t* mask, int64_t c, int n) {
  if (!mask) return iota() < n;
  uint8_t bytes[LANES] = {};
  memcpy(bytes, mask + c, n);
  return kept(bytes, 0, All{});
}

// Counts the mask's tokens in each row; returns those of all rows, whichever worker asks.
INLINE int64_t count_tokens(const uint8_t* mask, int64_t rows, int64_t cols, int64_t stride, int64_t* counts,
                            Worker& worker) {
  worker.each(rows, [&](int64_t r) {
    int64_t n = mask ? 0 : cols;
    if (mask)
      for (int64_t c = 0; c < cols; c++) n += mask[r * stride + c] != 0;
    counts[r] = n;
  });
  int64_t total = 0;
  for (int64_t r = 0; r < rows; r++) total += counts[r];
  return total;
}

INLINE f32v clamp(f32v v, f32v low, f32v high) { return min(high, max(low, v)); }  // NaN stays NaN

// e^x - 1 - x, given e = e^x: near 0 by its series to x^11, 1e-9 of it, for there the difference cancels.
INLINE f32v exp_beyond_linear(f32v x, f32v e) {
  constexpr float C[] = {1 / 39916800.f, 1 / 3628800.f, 1 / 362880.f, 1 / 40320.f, 1 / 5040.f,
                         1 / 720.f,      1 / 120.f,     1 / 24.f,     1 / 6.f,     1 / 2.f};
  f32v p = splat(C[0]);
  for (int i = 1; i < 10; i++) p = fma(p, x, splat(C[i]));
  return select(abs(x) < 1.0f, x * x * p, e - 1.0f - x);
}

struct PolicySums {
  Wide loss, clipped, approx_kl, apart, apart2, kl;  // apart: rho - 1
};

// Adds the tokens from c on to the sums; returns each one's derivative by its log-probability.
template <class T, class N>
INLINE f32v policy_tokens(const PolicyLoss& a, int64_t r, int64_t c, N n, PolicySums& sums) {
  const i32v keep = kept(a.mask ? a.mask + r * a.mask_stride : nullptr, c, n);
  const T* advantages = (const T*)a.advantages + r * a.advantages_stride;
  const f32v given = a.advantages_step ? load(advantages + c, n) : splat(load1(advantages));
  const f32v A = select(keep, given, f32v{}), p = load((const T*)a.logprobs + r * a.logprobs_stride + c, n);
  const f32v far = select(keep, p - load((const T*)a.old_logprobs + r * a.old_stride + c, n), f32v{});
  const f32v log_ratio = clamp(far, splat(-FARTHEST), splat(FARTHEST)), ratio = exp(log_ratio);
  const f32v plain = -A * ratio, clamped = -A * clamp(ratio, splat(a.low), splat(a.high));
  const i32v clipped = clamped > plain;
  f32v loss = max(clamped, plain), slope = clipped | (abs(far) > FARTHEST) ? f32v{} : plain;
  if (a.reference_logprobs) {
    const T* reference = (const T*)a.reference_logprobs + r * a.reference_stride;
    const f32v apart = select(keep, p - load(reference + c, n), f32v{});
    const f32v k = clamp(apart, splat(-FARTHEST), splat(FARTHEST));
    f32v value = k, by = select(keep, splat(1.0f), f32v{});
    if (a.kind == 2) value = k * k * 0.5f, by = k;
    if (a.kind == 3) {
      const f32v e = exp(-k);
      value = exp_beyond_linear(-k, e), by = 1.0f - e;
    }
    add(sums.kl, value);
    loss = fma(splat(a.beta), value, loss);
    slope = fma(splat(a.beta), abs(apart) > FARTHEST ? f32v{} : by, slope);
  }
  add(sums.loss, loss);
  add(sums.clipped, select(clipped, splat(1.0f), f32v{}));
  add(sums.approx_kl, exp_beyond_linear(log_ratio, ratio));
  const f32v apart = ratio - 1.0f;
  add(sums.apart, apart);
  add_square(sums.apart2, apart);
  return slope;
}

// The loss and statistics from the rows' sums; to be done by one worker.
INLINE void policy_results(const PolicyLoss& a, int64_t tokens, double denominator) {
  double total[6] = {};
  for (int64_t r = 0; r < a.rows; r++) {
    const double each = a.sequences ? (double)max<int64_t>(a.counts[r], 1) : 1;
    for (int s = 0; s < 6; s++) total[s] += a.sums[8 * r + s] / (s == 0 ? each : 1);
  }
  const double n = (double)max<int64_t>(tokens, 1), apart = total[3] / n, variance = total[4] / n - apart * apart;
  a.results[0] = (float)(total[0] / denominator);
  a.results[1] = (float)(total[1] / n);
  a.results[2] = (float)(total[2] / n);
  a.results[3] = (float)(tokens ? 1 + apart : 0);
  a.results[4] = (float)(variance < 0 ? 0 : variance);
  a.results[5] = (float)(total[5] / n);
}

}  // namespace

// gptfast/ops/policy.py. A row's sums and gradients are its own; what is shared is the denominator.
void policy_loss(const PolicyLoss& a, Worker& worker) {
  const int64_t tokens = count_tokens(a.mask, a.rows, a.cols, a.mask_stride, a.counts, worker);
  const double count = (double)max<int64_t>(a.sequences ? a.rows : tokens, 1);
  const double denominator = a.denominator > 0 ? a.denominator : count;
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    worker.each(a.rows, [&](int64_t r) {
      PolicySums sums = {};
      const float scale = (float)(1 / (denominator * (a.sequences ? (double)max<int64_t>(a.counts[r], 1) : 1)));
      each_vector(a.cols, [&](int64_t c, auto n, int) {
        const f32v slope = policy_tokens<T>(a, r, c, n, sums);
        if (a.gradient) store(a.gradient + r * a.cols + c, slope * scale, n);
      });
      double* to = a.sums + 8 * r;
      to[0] = sum(sums.loss), to[1] = sum(sums.clipped), to[2] = sum(sums.approx_kl);
      to[3] = sum(sums.apart), to[4] = sum(sums.apart2), to[5] = sum(sums.kl);
    });
  });
  worker.phase(1, 1, [&](int64_t, int64_t) { policy_results(a, tokens, denominator); });
}

void value_loss(const ValueLoss& a, Worker& worker) {
  const int64_t tokens = count_tokens(a.mask, a.rows, a.cols, a.mask_stride, a.counts, worker);
  const double count = (double)max<int64_t>(tokens, 1), denominator = a.denominator > 0 ? a.denominator : count;
  const float scale = (float)(1 / denominator);
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    worker.each(a.rows, [&](int64_t r) {
      Wide loss = {}, clipped = {};
      each_vector(a.cols, [&](int64_t c, auto n, int) {
        const i32v keep = kept(a.mask ? a.mask + r * a.mask_stride : nullptr, c, n);
        const auto row = [&](const void* x, int64_t stride) {
          return select(keep, load((const T*)x + r * stride + c, n), f32v{});
        };
        const f32v V = row(a.values, a.values_stride), old = row(a.old_values, a.old_stride);
        const f32v R = row(a.returns, a.returns_stride), low = old - a.clip, high = old + a.clip;
        const f32v plain = V - R, near = clamp(V, low, high) - R, plain2 = plain * plain, near2 = near * near;
        add(loss, max(near2, plain2));
        add(clipped, select(near2 > plain2, splat(1.0f), f32v{}));
        if (a.gradient) {  // where both terms are equal but only one moves, half of it, as of torch.maximum
          const i32v half = (near2 == plain2) & ((V < low) | (V > high));
          const f32v slope = select(near2 > plain2, f32v{}, select(half, plain * 0.5f, plain));
          store(a.gradient + r * a.cols + c, slope * scale, n);
        }
      });
      a.sums[2 * r] = sum(loss), a.sums[2 * r + 1] = sum(clipped);
    });
  });
  worker.phase(1, 1, [&](int64_t, int64_t) {
    double loss = 0, clipped = 0;
    for (int64_t r = 0; r < a.rows; r++) loss += a.sums[2 * r], clipped += a.sums[2 * r + 1];
    a.results[0] = (float)(0.5 * loss / denominator);
    a.results[1] = (float)(clipped / count);
  });
}

}  // namespace gptfast::ISA
