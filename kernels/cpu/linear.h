// What the linear kernels share: panels of weights, tiles of rows, and the final store.
#pragma once
#include "kernels.h"
#include "transpose.h"

namespace gptfast::ISA {

// Quantised weights in panels of 16 rows by groups of 32 k. The four k of a quad lie side by side, row after row, so
// that 64 bytes hold 16 rows x 4 k, as integer dot-product instructions want them. A 4-bit byte has quad j in its low
// nibble and quad j + 4 in its high one, as in a GGUF block. w = d * u + c: c = m for Q4_1, else -OFFSET * d, and u is
// unsigned.
constexpr int PANEL = 16, GROUP = 32, QUADS = GROUP / 4;
constexpr int PARTS = PANEL / LANES;  // vectors of one value per row of a panel

struct Q8_0 {
  static constexpr int ID = 3, BITS = 8, OFFSET = 128;
  uint16_t d[PANEL];
  uint8_t q[8][64];  // the stored signed byte + 128
};
struct Q4_0 {
  static constexpr int ID = 4, BITS = 4, OFFSET = 8;
  uint16_t d[PANEL];
  uint8_t q[4][64];
};
struct Q4_1 {
  static constexpr int ID = 5, BITS = 4, OFFSET = 0;
  uint16_t d[PANEL], m[PANEL];
  uint8_t q[4][64];
};

template <class F>
INLINE void with_format(int format, F f) {
  if (format == Q8_0::ID)
    f(Q8_0{});
  else if (format == Q4_0::ID)
    f(Q4_0{});
  else
    f(Q4_1{});
}

// d and c of LANES rows of a panel.
template <class Block>
INLINE f32v scales(const Block& b, int part) {
  return load((const f16*)b.d + part * LANES);
}
template <class Block>
INLINE f32v shifts(const Block& b, int part) {
  if constexpr (Block::OFFSET == 0)
    return load((const f16*)b.m + part * LANES);
  else
    return scales(b, part) * (float)-Block::OFFSET;
}

// f(Int<n>{}) with n = value, low <= n <= high.
template <int low, int high, class F>
INLINE void with_int(int value, F f) {
  if constexpr (low == high) {
    f(Int<low>{});
  } else {
    if (value == high)
      f(Int<high>{});
    else
      with_int<low, high - 1>(value, f);
  }
}

// Rows cut into the fewest tiles of at most `most`, their heights equal or one apart: no thin tile at the end.
struct Tiles {
  int64_t rows, count;
  Tiles(int64_t rows, int64_t most) : rows(rows), count(ceil_div(rows, most)) {}
  int64_t begin(int64_t tile) const { return rows * tile / count; }
  int height(int64_t tile) const { return (int)(begin(tile + 1) - begin(tile)); }
};

// What of float weights is fetched meanwhile: from a row's or panel's first element so many bytes on, and so many more
// a step.
struct Ahead {
  int64_t bytes, step;
};

// Calls f(begin, end) for runs of what every worker needs: shared out, or all of it for each worker by itself.
template <class F>
INLINE void prepare(bool shared, int64_t tasks, Worker& worker, F f) {
  if (shared)
    worker.phase(tasks, ceil_div(tasks, worker.count * 4), f);
  else
    f((int64_t)0, tasks);
}

// Brings y[row, col .. col + n] to L1 while its sums are made: stores that miss would be served one after another.
INLINE void prefetch_outputs(const Linear& a, int64_t row, int64_t col, int n) {
  const int64_t size = a.dtype == FLOAT32 ? 4 : 2;
  const char* y = (const char*)a.y + (row * a.cols + col) * size;
  for (int64_t offset = 0; offset < n * size; offset += 64) __builtin_prefetch(y + offset, 1);
}

// y[row, col .. col + n] = sums + bias, rounded to y's dtype.
INLINE void store_outputs(const Linear& a, int64_t row, int64_t col, const float* sums, int n) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    T* y = (T*)a.y + row * a.cols + col;
    for (int i = 0; i < n; i += LANES) {
      const int count = min(n - i, LANES);
      f32v v = load(sums + i, count);
      if (a.bias) {
        if (a.bias_dtype == FLOAT32)
          v += load((const float*)a.bias + col + i, count);
        else
          v += load((const T*)a.bias + col + i, count);
      }
      store(y + i, v, count);
    }
  });
}

}  // namespace gptfast::ISA
