#include "linear.h"

namespace gptfast::ISA {

// Row after row of GGUF blocks to panels (linear.h): the scales of 16 rows, then their quads side by side.
void pack(const Pack& a, Worker& worker) {
  const int64_t groups = a.depth / GROUP;
  with_format(a.format, [&](auto format) {
    using Block = decltype(format);
    constexpr int HEAD = 2 * (Block::OFFSET == 0 ? 2 : 1), NUMBERS = (int)sizeof(Block::q) / 64;
    worker.each(ceil_div(a.rows, PANEL), [&](int64_t panel) {
      Block* b = (Block*)a.packed + panel * groups;
      for (int row = 0; row < PANEL; row++) {
        const int64_t n = panel * PANEL + row, at = a.head ? n % a.head : 0, half = a.head / 2;
        const int64_t stored = a.head ? n - at + (at < half ? 2 * at : 2 * (at - half) + 1) : n;
        const uint8_t* from = (const uint8_t*)a.raw + stored * groups * (HEAD + 4 * NUMBERS);
        for (int64_t g = 0; g < groups; g++, from += HEAD + 4 * NUMBERS) {
          static const uint8_t none[HEAD + 4 * NUMBERS] = {};
          const uint8_t* block = n < a.rows ? from : none;
          memcpy(&b[g].d[row], block, 2);
          if constexpr (Block::OFFSET == 0) memcpy(&b[g].m[row], block + 2, 2);
          for (int j = 0; j < NUMBERS; j++) {
            uint32_t quad;
            memcpy(&quad, block + HEAD + 4 * j, 4);
            if (Block::BITS == 8) quad ^= 0x80808080;
            memcpy(b[g].q[j] + row * 4, &quad, 4);
          }
        }
      }
    });
  });
}

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
