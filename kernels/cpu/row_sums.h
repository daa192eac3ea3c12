// Sums over rows, for the gradients of what all rows share: kept in fp32 in the order in which T's are loaded as pairs,
// for each chunk of rows; then the chunks are added, eight at a time, so that no running sum is long.
#pragma once
#include "parallel.h"
#include "vec.h"

namespace gptfast::ISA {

INLINE Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }

// A row between passes, as it was loaded.
INLINE void keep_row(float* row, Pair v, Two) {
  store(row, v.a);
  store(row + LANES, v.b);
}
template <class N>
INLINE void keep_row(float* row, f32v v, N n) {
  store(row, v, n);
}

// v, in the order in which T's are loaded, to where it belongs.
template <class T, class W, class N>
INLINE void store_as(W* p, f32v v, N n) {
  store(p, v, n);
}
template <class T, class W>
INLINE void store_as(W* p, Pair v, Two) {
  if constexpr (!__is_same(T, bf16)) {
    store(p, v.a), store(p + LANES, v.b);
  } else if constexpr (__is_same(W, bf16)) {
    store_pair<float>(p, v);
  } else {
    float even[LANES], odd[LANES];
    store(even, v.a), store(odd, v.b);
    for (int i = 0; i < LANES; i++) p[2 * i] = even[i], p[2 * i + 1] = odd[i];
  }
}

// out = the sum of `chunks` rows of `cols` kept elements, `stride` apart, rounded to W. All workers take part.
template <class T, class W>
INLINE void add_chunks(Worker& worker, const float* kept, int64_t chunks, int64_t stride, int64_t cols, W* out) {
  const int64_t block = 4 * LANES;  // a whole number of pairs: a block is loaded as its row was kept
  worker.each(ceil_div(cols, block), [&](int64_t task) {
    const int64_t from = task * block;
    each_pair(min(block, cols - from), [&](int64_t c, auto n, int) {
      const float* at = kept + from + c;
      decltype(load(at, n)) total{};
      for (int64_t first = 0; first < chunks; first += 8) {
        auto group = load(at + first * stride, n);
        for (int64_t chunk = first + 1; chunk < min(first + 8, chunks); chunk++)
          group = group + load(at + chunk * stride, n);
        total = total + group;
      }
      store_as<T>(out + from + c, total, n);
    });
  });
}

}  // namespace gptfast::ISA
