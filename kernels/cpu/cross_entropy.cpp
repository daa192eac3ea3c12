#include "vocabulary.h"

namespace gptfast::ISA {

using namespace vocab;

namespace {

// Columns of a block of one row in fp32, after soft cap and temperature.
template <class T>
INLINE void load_block(const T* logits, int n, const Terms& terms, float* out) {
  each_column(PANEL, n, [&](int64_t at, auto lanes, int c, int) { store(out + at, terms(load(logits + c, lanes))); });
}

}  // namespace

// The statistics of each row of logits that has a target; zero for the others.
void cross_entropy(const CrossEntropy& a, Worker& worker) {
  const Terms terms(a.softcap, 1);
  const int64_t count = blocks(a.cols);
  float* stats = (float*)worker.scratch(4 * count * sizeof(float));
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    worker.each(a.rows, [&](int64_t r) {
      Row row = {};
      const int64_t target = a.target[r];
      if (target >= 0) {
        const T* logits = (const T*)a.logits + r * a.logits_stride;
        float l[BLOCK], at_target = 0;
        for (int64_t b = 0; b < count; b++) {
          const int n = width(a.cols, b);
          load_block(logits + b * BLOCK, n, terms, l);
          const float* weight = a.class_weight ? a.class_weight + b * BLOCK : nullptr;
          const Statistics made =
              a.smooth ? statistics<true, false>(l, PANEL, n, weight) : statistics<false, false>(l, PANEL, n, weight);
          stats[MAX * count + b] = made.max;
          stats[SUM * count + b] = made.sum;
          stats[SPREAD * count + b] = made.spread;
          stats[ENTROPY * count + b] = 0;
          if (target / BLOCK == b) at_target = l[target % BLOCK];
        }
        row = merge(stats, count, a.cols, a.block_weight, at_target);
      }
      a.lse[r] = row.lse;
      a.rest[r] = row.rest;
      a.nll[r] = row.nll;
      if (a.smooth) a.smooth[r] = row.smooth;
    });
  });
}

// The gradient of each row of logits; zero where a row has no target.
void cross_entropy_backward(const CrossEntropy& a, Worker& worker) {
  const Terms terms(a.softcap, 1);
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    worker.each(a.rows, [&](int64_t r) {
      T* out = (T*)a.dlogits + r * a.cols;
      if (a.target[r] < 0) {
        memset(out, 0, a.cols * sizeof(T));
        return;
      }
      const T* logits = (const T*)a.logits + r * a.logits_stride;
      const Gradient g = {a.lse[r], a.rest[r], a.scale[r], 0, a.even[r], a.hit[r], a.target[r], terms};
      each_vector(a.cols, [&](int64_t c, auto lanes, int) {
        const f32v weight = a.class_weight ? load(a.class_weight + c, lanes) : splat(1.0f);
        store(out + c, g(terms(load(logits + c, lanes)), weight, iota() + (int32_t)c), lanes);
      });
    });
  });
}

}  // namespace gptfast::ISA
