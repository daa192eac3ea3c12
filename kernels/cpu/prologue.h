// The launch before a linear as its prologue: the linear makes the rows of x itself, where it wants them, and they are
// never stored.
#pragma once
#include "linear.h"

#if defined(__AVX512VNNI__) || defined(__AVX512BF16__)  // which add nothing to making rows
namespace gptfast::avx512 {
#else
namespace gptfast::ISA {
#endif
// Row r of what the launch before would have written, to y, in its storage dtype. With `others`, that launch's other
// outputs (sum, mean, rstd) are written too. memory: 2 * depth + 4 * LANES floats.
void make_row(const Linear& a, int64_t r, bool others, void* y, float* memory);
}  // namespace

namespace gptfast::ISA {
#if defined(__AVX512VNNI__) || defined(__AVX512BF16__)
using avx512::make_row;
#endif

// Floats of memory that x_rows wants.
INLINE int64_t x_floats(const Linear& a, int64_t rows) {
  return a.before == Linear::NONE ? 0 : ((rows + 2) * a.depth + 5 * LANES - 1) / LANES * LANES;
}

template <class T>
struct Rows {
  const T* x;
  int64_t stride;
};

// Rows of x from `begin` on: where they lie, or made in memory.
template <class T>
Rows<T> x_rows(const Linear& a, int64_t begin, int64_t rows, bool others, float* memory) {
  if (a.before == Linear::NONE) return {(const T*)a.x + begin * a.x_stride, a.x_stride};
  T* x = (T*)(memory + 2 * a.depth + 4 * LANES);
  for (int64_t r = 0; r < rows; r++) make_row(a, begin + r, others, x + r * a.depth, memory);
  return {x, a.depth};
}

// The other outputs of all rows, written by one worker where each has made x for itself.
INLINE void write_others(const Linear& a, float* memory) {
  if (a.before != Linear::LAYER_NORM && a.before != Linear::RMS_NORM) return;
  with_storage(a.dtype, [&](auto t) { x_rows<decltype(t)>(a, 0, a.rows, true, memory); });
}

}  // namespace gptfast::ISA
