#include "linear.h"

namespace gptfast::ISA {

// Chosen rows of a packed weight in fp32: y[i] = fma(d, u, c) of row ids[i] (+ table[positions[i]]).
void dequantize(const Dequantize& a, Worker& worker) {
  const int64_t groups = a.depth / GROUP;
  with_format(a.format, [&](auto format) {
    using Block = decltype(format);
    worker.each(a.rows, [&](int64_t i) {
      const int64_t id = a.ids ? a.ids[i] : i;
      const int row = (int)(id % PANEL), part = row / LANES, lane = row % LANES;
      const Block* b = (const Block*)a.packed + id / PANEL * groups;
      float* y = a.y + i * a.depth;
      for (int64_t g = 0; g < groups; g++, b++, y += GROUP) {
        const float d = scales(*b, part)[lane], c = shifts(*b, part)[lane];
        for (int j = 0; j < (int)(sizeof b->q / 64); j++)
          for (int e = 0; e < 4; e++) {
            const uint8_t u = b->q[j][row * 4 + e];
            if constexpr (Block::BITS == 4) {
              y[4 * j + e] = fma(d, (float)(u & 15), c);
              y[16 + 4 * j + e] = fma(d, (float)(u >> 4), c);
            } else {
              y[4 * j + e] = fma(d, (float)u, c);
            }
          }
      }
      if (!a.table) return;
      const float* add = a.table + a.positions[i] * a.table_stride;
      for (int64_t k = 0; k < a.depth; k++) a.y[i * a.depth + k] += add[k];
    });
  });
}

}  // namespace gptfast::ISA
