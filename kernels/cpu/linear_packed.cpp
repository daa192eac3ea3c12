// Linear with packed float weights, panels of 16 columns as [k][16]: one output per lane, so that nothing is summed
// across lanes. Chunks of CHUNK k in order, the chunks added in order.
//
// Of x and W in bfloat16, on a machine that multiplies pairs of them, two neighbours of k are one step.
#include "pairs.h"
#include "prologue.h"

namespace gptfast::ISA {

namespace {

// The op page's constant, k or pairs of them: what three panels of it take, L2 delivers while rows pass.
constexpr int64_t CHUNK = 96 * PER_LANE;
#if defined(__AVX512F__)
constexpr int TILE = 8, ABREAST = 3, ONE_ABREAST = 3;  // rows, panels, panels of one row: 24 sums of 32 registers
#elif defined(__AVX2__)
constexpr int TILE = 6, ABREAST = 1, ONE_ABREAST = 4;  // 12 of 16
#else
constexpr int TILE = 3, ABREAST = 1, ONE_ABREAST = 1;
#endif
constexpr int64_t BLOCK_TILES = 256 / TILE;  // rows whose sums stay in L2 while panels pass
constexpr int64_t SPAN = 4 * CHUNK;          // of their depth, what stays there while the columns of a task pass
constexpr int64_t DEEP = 768 * PER_LANE, GROUPS = 4;  // more depth would not stay: a task takes more columns
constexpr int64_t AHEAD = 1536;  // bytes of each panel: DRAM latency at a thread's share of the bandwidth
// AVX2, one row: four streams that the hardware's prefetcher sees by itself; asked for as well they are 0.9x as fast.
constexpr bool fetches(int abreast) { return VEC_BYTES != 32 || abreast == ABREAST; }

// LANES outputs at a step of k, from row `w` of a panel on; of a pair its second may not be there.
template <class W>
INLINE f32v load_step(const W* w, bool whole) {
  if constexpr (PAIRS)
    return bitcast<f32v>(interleaved(load_pairs(w, whole ? 2 * PANEL : PANEL)));
  else
    return load(w);
}

// sums[MR][NP * PANEL] = (add ? sums : 0) + x[step][MR] * w[panel][k][PANEL] over `length` k in order. Panels lie
// `stride` apart. The next tile of rows, whose x is on its way meanwhile, lies next_x floats further.
template <int MR, int NP, class W>
__attribute__((noinline)) void tile(const float* x, const W* w, int64_t stride, int64_t length, Ahead ahead,
                                    int64_t next_x, float* sums, bool add) {
  constexpr int NV = NP * PARTS;
  f32v acc[MR][NV] = {};
  const char* next = (const char*)w + ahead.bytes;
  auto step = [&](bool whole) __attribute__((always_inline)) {
    f32v b[NV];
    if (VEC_BYTES >= 32 && MR > 1 && NP == ABREAST) __builtin_prefetch(x + next_x);
#pragma GCC unroll 4
    for (int p = 0; p < NP; p++) {
      if (fetches(NP)) __builtin_prefetch(next + p * stride * sizeof(W), 0, FETCHED_TO);
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; part++)
        b[p * PARTS + part] = in_register(load_step(w + p * stride + part * LANES, whole));
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[i][v] = add_products(acc[i][v], splat(x[i]), b[v]);
  };
#pragma GCC unroll 1
  for (; length >= PER_LANE; length -= PER_LANE, x += MR, w += PER_LANE * PANEL, next += ahead.step) step(true);
  if (PAIRS && length) step(false);
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++, sums += LANES) store(sums, add ? load(sums) + acc[i][v] : acc[i][v]);
}

// `count` times the columns of NP panels, from panel `first` on, for the tiles [begin, end) of at most HIGH rows.
template <class W, int NP, int HIGH>
void block(const Linear& a, const float* x, const Tiles& tiles, int64_t begin, int64_t end, int64_t first,
           int64_t count, float* sums) {
  constexpr int COLS = NP * PANEL, LINE = PER_LANE * PANEL * sizeof(W);
  const int64_t deep = lanes_of(a.depth);
  const int64_t row = tiles.begin(begin), size = (tiles.begin(end) - row) * COLS;
  for (int64_t from = 0; from < a.depth; from += SPAN)
    for (int64_t c = 0; c < count; c++)
      for (int64_t k = from; k < min(from + SPAN, a.depth); k += CHUNK)
        for (int64_t t = begin; t < end; t++)
          with_int<1, HIGH>(tiles.height(t), [&](auto rows) {
            constexpr int MR = decltype(rows)::value;
            const int64_t r = tiles.begin(t), length = min(CHUNK, a.depth - k);
            const W* weight = (const W*)a.weight + (first + c * NP) * PANEL * a.depth + k * PANEL;
            Ahead ahead = {AHEAD, LINE};
            if (VEC_BYTES == 32 && end - begin > 1) {  // each tile its share of the next chunk: 1.15x from memory
              ahead.step = ceil_div(LINE, end - begin);
              ahead.bytes = length * (LINE + (t - begin) * ahead.step);
            }
            float* out = sums + c * size + (r - row) * COLS;
            const int64_t col = (first + c * NP) * PANEL;
            const int n = (int)min<int64_t>(COLS, a.cols - col);
            const bool last = k + CHUNK >= a.depth;
            if (last && tiles.count > 1)
              for (int i = 0; i < MR; i++) prefetch_outputs(a, r + i, col, n);
            tile<MR, NP>(x + r * deep + k / PER_LANE * MR, weight, PANEL * a.depth, length, ahead,
                         t + 1 < end ? MR * deep : 0, out, k > 0);
            if (last)
              for (int i = 0; i < MR; i++) store_outputs(a, r + i, col, out + i * COLS, n);
          });
}

// y = x W^T + bias. x is first laid out in tiles of lanes: together in the workspace, or, without one, by every worker
// for itself.
void by_panels(const Linear& a, Worker& worker) {
  const Tiles tiles(a.rows, TILE), blocks(tiles.count, BLOCK_TILES);
  const int64_t columns = tiles.count == 1 ? 1 : min(ceil_div(a.depth, DEEP), GROUPS);
  const int64_t sums_size = BLOCK_TILES * TILE * ABREAST * PANEL * columns;
  const bool shared = a.workspace;
  const int64_t deep = lanes_of(a.depth);
  const int64_t floats = x_floats(a, shared ? TILE : a.rows);
  float* sums = (float*)worker.scratch((sums_size + floats + (shared ? 0 : a.rows * a.depth)) * sizeof(float));
  float *made = sums + sums_size, *x = shared ? (float*)a.workspace : made + floats;
  prepare(shared, tiles.count, worker, [&](int64_t begin, int64_t end) {
    with_numbers(a.dtype, [&](auto t) {
      for (int64_t i = begin; i < end; i++) {
        const int rows = tiles.height(i);
        const auto from = x_rows<decltype(t)>(a, tiles.begin(i), rows, shared, made);
        interleave(deep, rows, rows, x + tiles.begin(i) * deep, [&](int row, int64_t k, int) {
          return load_lanes(from.x + row * from.stride + PER_LANE * k, a.depth - PER_LANE * k);
        });
      }
    });
  });
  const int64_t panels = ceil_div(a.cols, PANEL);
  with_numbers(a.format, [&](auto w) {
    using W = decltype(w);
    auto all = [&](auto np, auto high) {
      constexpr int NP = decltype(np)::value, HIGH = decltype(high)::value;
      const Tiles groups(panels / NP, columns);
      const int64_t rest = panels % NP;
      worker.each((groups.count + (rest > 0)) * blocks.count, [&](int64_t task) {
        if (task == 0 && !shared) write_others(a, made);
        const int64_t group = task / blocks.count, b = blocks.begin(task % blocks.count),
                      e = blocks.begin(task % blocks.count + 1);
        if (group < groups.count)
          block<W, NP, HIGH>(a, x, tiles, b, e, groups.begin(group) * NP, groups.height(group), sums);
        else
          block<W, 1, HIGH>(a, x, tiles, b, e, panels - rest, rest, sums);
      });
    };
    if (a.rows == 1)
      all(Int<ONE_ABREAST>{}, Int<1>{});
    else
      all(Int<ABREAST>{}, Int<TILE>{});
  });
}

}  // namespace

#if defined(__AVX512BF16__)
}
namespace gptfast::avx512 {
void linear_packed(const Linear&, Worker&);
}
namespace gptfast::ISA {
void linear_packed(const Linear& a, Worker& worker) {
  if (a.dtype == BFLOAT16 && a.format == BFLOAT16) return by_panels(a, worker);
  avx512::linear_packed(a, worker);
}
#else
void linear_packed(const Linear& a, Worker& worker) { by_panels(a, worker); }
#endif

}  // namespace gptfast::ISA
