// The large products of training: y = x W^T, dx = dy W and dW = dy^T x alike. Both operands are copied into panels
// once, which costs as much as 10 rows or columns of the product; the tiles then read nothing but whole lines.
#include "product.h"

#include "kernels.h"
#include "transpose.h"

namespace gptfast::ISA {

namespace {

using namespace products;

constexpr int GROUP = 16;                 // panels that a task packs: long runs, also of what lies the other way round
constexpr int FEW = 8;                    // the same where they are packed for few rows: more tasks, and less of L2
constexpr int64_t ROWS = 96, COLS = 512;  // of a task's part of C, at most: a chunk of its rows of A stays in L2
constexpr int SHARES = 4;                 // tasks of a worker, at least, where they can be made smaller

INLINE int64_t panels(int64_t n, int R) { return ceil_div(n, R); }

// Lanes of the depth of a row of `length`, from lane k on.
template <class T>
INLINE f32v along(const T* row, int64_t k, int64_t length) {
  return load_lanes(row + PER_LANE * k, length - PER_LANE * k);
}

// One panel of a chunk, [depth][R], from rows that lie along the depth: `count` of them, the others zero.
template <int R, class T>
INLINE void pack_along(const T* x, int64_t row_stride, int count, int64_t length, float* out) {
  const int64_t depth = lanes_of(length);
  if constexpr (R % LANES == 0) {
    for (int i = 0; i < R; i += LANES)
      for (int64_t k = 0; k < depth; k += LANES) {
        const int deep = (int)min<int64_t>(LANES, depth - k);
        f32v t[LANES];
        for (int j = 0; j < LANES; j++) t[j] = i + j < count ? along(x + (i + j) * row_stride, k, length) : f32v{};
        transpose(t);
        for (int j = 0; j < deep; j++) store(out + (k + j) * R + i, t[j]);
      }
  } else if constexpr (R <= LANES) {
    interleave(depth, R, count, out, [&](int i, int64_t k, int) { return along(x + i * row_stride, k, length); });
  } else {
    float lines[R][CHUNK] = {};
    for (int i = 0; i < count; i++)
      for (int64_t k = 0; k < length; k += LANES)
        store(lines[i] + k, load(x + i * row_stride + k, (int)min<int64_t>(LANES, length - k)));
    for (int64_t k = 0; k < length; k++)
      for (int i = 0; i < R; i++) out[k * R + i] = lines[i][k];
  }
}

// Panels of a chunk, `apart` floats from one to the next, from n rows that lie across the depth; what is read ahead is
// no neighbour that the machine would fetch by itself. part[row] += its sum, if there is one.
template <int R, class T>
INLINE void pack_across(const T* x, int64_t depth_stride, int n, int64_t length, float* out, int64_t apart,
                        float* part) {
  constexpr int64_t AHEAD = 8;
  const int count = (int)panels(n, R);
  const int64_t depth = lanes_of(length);
  float line[GROUP * R] = {};
  for (int64_t k = 0; k < depth; k++, x += PER_LANE * depth_stride) {
    for (int c = 0; c < n; c += LANES) {
      if (c * sizeof(T) % 64 == 0)
        for (int64_t i = AHEAD; i < AHEAD + PER_LANE; i++) __builtin_prefetch(x + i * depth_stride + c);
      if constexpr (PAIRS) {
        const i32v v = load_two(x + c, 2 * k + 1 < length ? x + depth_stride + c : nullptr, min(LANES, n - c));
        store(line + c, bitcast<f32v>(v));
        if (!part) continue;
        const f32v sum = load(part + c) + bitcast<f32v>(v << 16);
        store(part + c, sum + bitcast<f32v>(v & (int32_t)0xffff0000));
      } else {
        const f32v v = load(x + c, min(LANES, n - c));
        store(line + c, v);
        if (part) store(part + c, load(part + c) + v);
      }
    }
    for (int panel = 0; panel < count; panel++)
      memcpy(out + panel * apart + k * R, line + panel * R, R * sizeof(float));
  }
}

// How many panels of R rows a task packs: fewer where there are few, but some lines of what lies across the depth.
template <int R>
INLINE int64_t group_of(int64_t panels, const Worker& worker) {
  return max<int64_t>(min<int64_t>(panels / (SHARES * worker.count), GROUP), ceil_div(48, R));
}

// The panels of R rows of x (rows, depth) from `start` to `start` + `many` rows, in fp32, rows beyond the last being
// zero: at packed[chunk][panel][depth][R]. sums[row] = the sum of that row (with `add`: is increased by it), if
// contiguous rows ask for it.
template <int R, class T>
INLINE void pack(const T* x, int64_t row_stride, int64_t depth_stride, int64_t rows, int64_t depth, int64_t start,
                 int64_t many, float* packed, float* sums, bool add) {
  const int64_t padded = panels(rows, R) * R;
  const int n = (int)min(many, rows - start);
  float total[GROUP * R] = {};
  for (int64_t from = 0; from < depth; from += CHUNK) {
    const int64_t length = min(CHUNK, depth - from);
    const int64_t lanes = lanes_of(length);
    float* out = packed + lanes_of(from) * padded + start * lanes;
    if (row_stride == 1) {
      float part[GROUP * R] = {};
      pack_across<R>(x + from * depth_stride + start, depth_stride, n, length, out, R * lanes, sums ? part : nullptr);
      for (int c = 0; c < GROUP * R; c++) total[c] += part[c];
    } else {
      for (int panel = 0; panel < (int)panels(n, R); panel++, out += R * lanes)
        pack_along<R>(x + (start + panel * R) * row_stride + from, row_stride, min(R, n - panel * R), length, out);
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
  tile(a, b, depth, whole, NR, add, bias ? rest : nullptr, (const char*)b);
  for (int i = 0; i < rows; i++) memcpy(c + i * stride, whole + i * NR, cols * sizeof(float));
}

// Of C the rows from m and the columns from n, as far as a tile and the part that ends at (bottom, right) go: a chunk's
// share, from its panels.
INLINE void multiply(const Product& p, const float* a, const float* b, int64_t from, int64_t length, int64_t m,
                     int64_t n, int64_t bottom, int64_t right, const float* later) {
  const bool add = from > 0 || p.add, last = from + length == p.depth;
  const float* bias = last && p.bias ? p.bias + n : nullptr;
  float* c = p.c + m * p.c_stride + n;
  if (m + MR <= bottom && n + NR <= right)
    tile(a, b, lanes_of(length), c, p.c_stride, add, bias, (const char*)later);
  else
    corner(a, b, lanes_of(length), c, p.c_stride, add, bias, (int)min<int64_t>(MR, bottom - m),
           (int)min<int64_t>(NR, right - n));
}

// A task's part of C, in memory of its own where C is rounded: there p's c and stride lead.
struct Part {
  Product p;
  int64_t top, bottom, left, right;

  Part(const Product& whole, float* own, int64_t top, int64_t bottom, int64_t left, int64_t right)
      : p(whole), top(top), bottom(bottom), left(left), right(right) {
    if (!p.rounded) return;
    p.c_stride = COLS;
    p.c = own - (top * COLS + left);
  }
  void round(int64_t stride) const {
    if (!p.rounded) return;
    with_storage(p.rounded_dtype, [&](auto t) {
      for (int64_t m = top; m < bottom; m++)
        for (int64_t n = left; n < right; n += LANES) {
          const int count = (int)min<int64_t>(LANES, right - n);
          store((decltype(t)*)p.rounded + m * stride + n, load(p.c + m * COLS + n, count), count);
        }
    });
  }
};

// C of so few rows that each panel of B is needed once: it is packed where it is used.
template <class T>
void few_rows(const Product& p, const float* a, Worker& worker) {
  const int64_t rows = panels(p.rows, MR) * MR;
  auto* b = (float*)worker.scratch((FEW * NR * CHUNK + ROWS * COLS) * sizeof(float));
  worker.each(panels(p.cols, FEW * NR), [&](int64_t group) {
    const int64_t left = group * FEW * NR, right = min(left + FEW * NR, p.cols);
    const Part part(p, b + FEW * NR * CHUNK, 0, p.rows, left, right);
    for (int64_t from = 0; from < p.depth; from += CHUNK) {
      const int64_t length = min(CHUNK, p.depth - from), lanes = lanes_of(length);
      const T* x = (const T*)p.b + from * p.b_depth + left * p.b_col;
      if (p.b_col == 1) pack_across<NR>(x, p.b_depth, (int)(right - left), length, b, NR * lanes, nullptr);
      for (int64_t n = left; n < right; n += NR) {
        float* panel = b + (n - left) * lanes;
        if (p.b_col != 1)
          pack_along<NR>(x + (n - left) * p.b_col, p.b_col, (int)min<int64_t>(NR, right - n), length, panel);
        for (int64_t m = 0; m < p.rows; m += MR)
          multiply(part.p, a + lanes_of(from) * rows + m * lanes, panel, from, length, m, n, p.rows, p.cols, panel);
      }
    }
    part.round(p.c_stride);
  });
}

void multiply_all(const Product& p, Worker& worker) {
  const int64_t rows = panels(p.rows, MR) * MR, cols = panels(p.cols, NR) * NR;
  float *a = p.workspace, *b = a + rows * lanes_of(p.depth);
  const bool few = p.rows <= ROWS && !(p.sums && p.of_b);
  const int64_t each_a = group_of<MR>(rows / MR, worker) * MR, each_b = group_of<NR>(cols / NR, worker) * NR;
  const int64_t of_a = ceil_div(p.rows, each_a), of_b = few ? 0 : ceil_div(p.cols, each_b);
  worker.each(of_a + of_b, [&](int64_t task) {
    if (task < of_a)
      with_numbers(p.a_dtype, [&](auto t) {
        pack<MR>((const decltype(t)*)p.a, p.a_row, p.a_depth, p.rows, p.depth, task * each_a, each_a, a,
                 p.of_b ? nullptr : p.sums, p.add);
      });
    else
      with_numbers(p.b_dtype, [&](auto t) {
        pack<NR>((const decltype(t)*)p.b, p.b_col, p.b_depth, p.cols, p.depth, (task - of_a) * each_b, each_b, b,
                 p.of_b ? p.sums : nullptr, p.add);
      });
  });
  if (few) return with_numbers(p.b_dtype, [&](auto t) { few_rows<decltype(t)>(p, a, worker); });
  int64_t tall = ROWS, wide = COLS;
  while (ceil_div(p.rows, tall) * ceil_div(p.cols, wide) < SHARES * worker.count && wide > 2 * NR)
    (wide > 8 * NR || tall < ROWS ? wide : tall) /= 2;
  const int64_t down = ceil_div(p.rows, tall);
  auto* own = (float*)worker.scratch(p.rounded ? ROWS * COLS * sizeof(float) : 0);
  worker.each(down * ceil_div(p.cols, wide), [&](int64_t task) {
    const int64_t top = task % down * tall, left = task / down * wide;
    const int64_t bottom = min(top + tall, p.rows), right = min(left + wide, p.cols);
    const Part part(p, own, top, bottom, left, right);
    for (int64_t from = 0; from < p.depth; from += CHUNK) {
      const int64_t length = min(CHUNK, p.depth - from), lanes = lanes_of(length), done = lanes_of(from);
      // From L3 to L2 meanwhile: a tile's share of the next chunk of B, or of its first one for the rows below, and of
      // the next panel of A.
      const int64_t next = from + length < p.depth ? from + length : 0, after = lanes_of(next);
      const int64_t deep = lanes_of(min(CHUNK, p.depth - next));
      const float* next_b = b + after * cols + left * deep;
      const float* next_a = a + (after ? after * rows + top * deep : bottom < p.rows ? bottom * deep : 0);
      const int64_t share = MR * lanes / ceil_div(right - left, NR);
      auto tiles = [&](int64_t m, int64_t n) {
        const float* later = next_b;
        if constexpr (AHEAD > 0) {
          next_b += lanes / EVERY * 16;
          const float* panel =
              (m + MR < bottom ? a + done * rows + (m + MR) * lanes : next_a) + (n - left) / NR * share;
          for (int64_t i = 0; i < share; i += 16) __builtin_prefetch(panel + i, 0, 2);
        }
        multiply(part.p, a + done * rows + m * lanes, b + done * cols + n * lanes, from, length, m, n, bottom, right,
                 later);
      };
      // A panel of B stays in L1 where it fits, else that of A does.
      if (LANES == 16)
        for (int64_t m = top; m < bottom; m += MR)
          for (int64_t n = left; n < right; n += NR) tiles(m, n);
      else
        for (int64_t n = left; n < right; n += NR)
          for (int64_t m = top; m < bottom; m += MR) tiles(m, n);
    }
    part.round(p.c_stride);
  });
}

}  // namespace

#if defined(__AVX512BF16__)
}
namespace gptfast::avx512 {
void product(const Product&, Worker&);
}
namespace gptfast::ISA {
void product(const Product& p, Worker& worker) {
  if (p.a_dtype == BFLOAT16 && p.b_dtype == BFLOAT16) return multiply_all(p, worker);
  avx512::product(p, worker);
}
#else
void product(const Product& p, Worker& worker) { multiply_all(p, worker); }
#endif

}  // namespace gptfast::ISA
