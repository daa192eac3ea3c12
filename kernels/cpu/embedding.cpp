#include "linear.h"

namespace gptfast::ISA {

// out[i] = weight[ids[i]] (+ position_weight[positions[i]], added in fp32). A plain gather copies bits.
void embedding(const Embedding& a, Worker& worker) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t C = a.cols;
    worker.each(a.rows, [&](int64_t i) {
      T* out = (T*)a.out + i * C;
      const T *weight = (const T*)a.weight, *row = out;
      const int64_t id = a.ids[i];
      if (a.weight_stride < 0) {
        weight += id / PANEL * PANEL * C + id % PANEL;
        for (int64_t c = 0; c < C; c++) out[c] = weight[c * PANEL];
      } else {
        row = weight + id * a.weight_stride;
      }
      if (!a.positions) {
        if (row != out) memcpy(out, row, C * sizeof(T));
        return;
      }
      const T* position = (const T*)a.position_weight + a.positions[i] * a.position_stride;
      each_vector(C, [&](int64_t c, auto n, int) { store(out + c, load(row + c, n) + load(position + c, n), n); });
    });
  });
}

// dweight[ids[i]] = the sum of dout over its places in order, in fp32. Long rows are shared out in blocks of columns,
// for one id may have most of the places.
void embedding_backward(const EmbeddingBackward& a, Worker& worker) {
  constexpr int64_t BLOCK = 256;
  const int64_t C = a.cols, blocks = ceil_div(C, BLOCK);
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    worker.each(a.segments * blocks, [&](int64_t task) {
      const int64_t i = task / blocks, from = task % blocks * BLOCK;
      T* out = (T*)a.dweight + a.ids[i] * C + from;
      each_vector(min(BLOCK, C - from), [&](int64_t c, auto n, int) {
        f32v total = {};
        for (int64_t j = a.first[i]; j < a.first[i + 1]; j++)
          total += load((const T*)a.dout + a.order[j] * a.dout_stride + from + c, n);
        store(out + c, total, n);
      });
    });
  });
}

}  // namespace gptfast::ISA
