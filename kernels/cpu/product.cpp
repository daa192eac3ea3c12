// The large products of training: y = x W^T, dx = dy W and dW = dy^T x alike. Both operands are copied into panels
// once, which costs as much as 10 rows or columns of the product; the tiles then read nothing but whole lines.
#include "product.h"

#include "kernels.h"

namespace gptfast::ISA {

namespace {

using namespace products;

constexpr int GROUP = 8;  // panels that a task packs: whole lines, also of what lies the other way round
constexpr int64_t ROWS = 96, COLS = 512;  // of a task's part of C: a chunk of its rows of A stays in L2

INLINE int64_t panels(int64_t n, int R) { return ceil_div(n, R); }

// One group of panels of R rows of x (rows, depth), in fp32, rows beyond the last being zero: at
// packed[chunk][panel][depth][R]. sums[row] = the sum of that row (with `add`: is increased by it), if contiguous rows
// ask for it.
template <int R, class T>
INLINE void pack(const T* x, int64_t row_stride, int64_t depth_stride, int64_t rows, int64_t depth, int64_t group,
                 float* packed, float* sums, bool add) {
  const int64_t start = group * GROUP * R, padded = panels(rows, R) * R;
  const int n = (int)min<int64_t>(GROUP * R, rows - start), count = (int)panels(n, R);
  float total[GROUP * R] = {};
  for (int64_t from = 0; from < depth; from += CHUNK) {
    const int64_t length = min(CHUNK, depth - from);
    float* out = packed + from * padded + start * length;
    if (row_stride == 1) {
      float line[GROUP * R] = {}, part[GROUP * R] = {};
      for (int64_t k = 0; k < length; k++) {
        const T* p = x + (from + k) * depth_stride + start;
        for (int c = 0; c < n; c += LANES) {
          const f32v v = load(p + c, min(LANES, n - c));
          store(line + c, v);
          if (sums) store(part + c, load(part + c) + v);
        }
        for (int panel = 0; panel < count; panel++)
          memcpy(out + (panel * length + k) * R, line + panel * R, R * sizeof(float));
      }
      for (int c = 0; c < GROUP * R; c++) total[c] += part[c];
    } else {
      for (int panel = 0; panel < count; panel++, out += R * length) {
        float lines[R][CHUNK];
        for (int i = 0; i < R; i++) {
          const int64_t row = start + panel * R + i;
          if (row >= rows) {
            memset(lines[i], 0, sizeof lines[i]);
            continue;
          }
          const T* p = x + row * row_stride + from;
          for (int64_t k = 0; k < length; k += LANES)
            store(lines[i] + k, load(p + k, (int)min<int64_t>(LANES, length - k)));
        }
        for (int64_t k = 0; k < length; k++)
          for (int i = 0; i < R; i++) out[k * R + i] = lines[i][k];
      }
    }
  }
  if (sums)
    for (int c = 0; c < n; c++) sums[start + c] = add ? sums[start + c] + total[c] : total[c];
}

// A tile that C may have less than all of.
__attribute__((noinline)) void corner(const float* a, const float* b, int64_t depth, float* c, int64_t stride, bool add,
                                      const float* bias, int rows, int cols) {
  float whole[MR * NR] = {}, rest[NR] = {};
  if (add)
    for (int i = 0; i < rows; i++) memcpy(whole + i * NR, c + i * stride, cols * sizeof(float));
  if (bias) memcpy(rest, bias, cols * sizeof(float));
  tile(a, b, depth, whole, NR, add, bias ? rest : nullptr);
  for (int i = 0; i < rows; i++) memcpy(c + i * stride, whole + i * NR, cols * sizeof(float));
}

}  // namespace

void product(const Product& p, Worker& worker) {
  const int64_t rows = panels(p.rows, MR) * MR, cols = panels(p.cols, NR) * NR;
  float *a = p.workspace, *b = a + rows * p.depth;
  with_storage(p.a_dtype, [&](auto t) {
    worker.each(panels(p.rows, GROUP * MR), [&](int64_t group) {
      pack<MR>((const decltype(t)*)p.a, p.a_row, p.a_depth, p.rows, p.depth, group, a, p.of_b ? nullptr : p.sums,
               p.add);
    });
  });
  with_storage(p.b_dtype, [&](auto t) {
    worker.each(panels(p.cols, GROUP * NR), [&](int64_t group) {
      pack<NR>((const decltype(t)*)p.b, p.b_col, p.b_depth, p.cols, p.depth, group, b, p.of_b ? p.sums : nullptr,
               p.add);
    });
  });
  const int64_t down = ceil_div(p.rows, ROWS);
  worker.each(down * ceil_div(p.cols, COLS), [&](int64_t task) {
    const int64_t top = task % down * ROWS, left = task / down * COLS;
    const int64_t bottom = min(top + ROWS, p.rows), right = min(left + COLS, p.cols);
    for (int64_t from = 0; from < p.depth; from += CHUNK) {
      const int64_t length = min(CHUNK, p.depth - from);
      const bool add = from > 0 || p.add, last = from + length == p.depth;
      for (int64_t n = left; n < right; n += NR)
        for (int64_t m = top; m < bottom; m += MR) {
          const float *am = a + from * rows + m * length, *bn = b + from * cols + n * length;
          const float* bias = last && p.bias ? p.bias + n : nullptr;
          float* c = p.c + m * p.c_stride + n;
          if (m + MR <= bottom && n + NR <= right)
            tile(am, bn, length, c, p.c_stride, add, bias);
          else
            corner(am, bn, length, c, p.c_stride, add, bias, (int)min<int64_t>(MR, bottom - m),
                   (int)min<int64_t>(NR, right - n));
        }
    }
  });
}

}  // namespace gptfast::ISA
