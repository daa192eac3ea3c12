// Linear with quantised weights and exact activations: w = fma(d, u, c) in fp32, then y = x w^T with one output per
// lane, each group of 32 k in order, the groups added in order: two short chains, so that errors don't grow with K.
// Up to FEW rows use each weight in the register that it is dequantised in; for more, blocks of BLOCK k are
// dequantised into L1.
#include "prologue.h"

namespace gptfast::ISA {

namespace {

constexpr int64_t BLOCK = 128;  // 128 x 48 weights in fp32 are 24 KiB of L1
#if defined(__AVX512F__)
constexpr int FEW = 8, TILE = 8, ABREAST = 3;  // rows, panels of 16 columns: 24 sums of 32 registers
#elif defined(__AVX2__)
constexpr int FEW = 2, TILE = 6, ABREAST = 1;  // 12 of 16
#else
constexpr int FEW = 1, TILE = 3, ABREAST = 1;
#endif
constexpr int64_t BLOCK_TILES = 256 / TILE;  // rows whose sums stay in L2 while a block of columns is made
constexpr int64_t AHEAD = 2560;              // bytes: DRAM latency at one thread's share of the bandwidth

// The low BITS bits of each 32-bit lane as a float.
template <int BITS>
INLINE f32v low_bits(u32v v) {
#if defined(__AVX512F__)
  if constexpr (BITS == 4) {  // a table in a register: the index takes just these bits
    const f32v table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return _mm512_permutexvar_ps(bitcast<__m512i>(v), table);
  }
#endif
  return to_float(bitcast<i32v>(v & ((1u << BITS) - 1)));
}

// Groups [begin, end) of one panel to out[k][stride], 16 columns of it.
template <class Block>
void dequantize_panel(const Block* b, int64_t groups, int64_t stride, float* out) {
  for (int64_t g = 0; g < groups; g++, b++, out += GROUP * stride)
    for (int part = 0; part < PARTS; part++) {
      const f32v d = scales(*b, part), c = shifts(*b, part);
#pragma GCC unroll 2
      for (int j = 0; j < (int)(sizeof b->q / 64); j++) {
        const u32v v = bitcast<u32v>(load((const float*)(b->q[j] + part * sizeof(u32v))));
        float* o = out + 4 * j * stride + part * LANES;
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++) {
          store(o + e * stride, fma(d, low_bits<Block::BITS>(v >> (8 * e)), c));
          if constexpr (Block::BITS == 4) store(o + (16 + e) * stride, fma(d, low_bits<4>(v >> (8 * e + 4)), c));
        }
      }
    }
}

// total[i] += x[k][i] * w[k] over each of G groups, whose chains run side by side, for LANES columns of a panel.
template <class Block, int MR, int G>
INLINE void add_groups(const Block* b, const float* x, int part, f32v (&total)[MR]) {
  constexpr int ROUNDS = 8 / Block::BITS;  // low nibbles, then high ones
  f32v acc[G][MR] = {}, d[G], c[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) d[g] = scales(b[g], part), c[g] = shifts(b[g], part);
#pragma GCC unroll 8
  for (int quad = 0; quad < QUADS; quad++) {
    u32v v[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const uint8_t* q = b[g].q[quad % (QUADS / ROUNDS)] + part * sizeof(u32v);
      v[g] = bitcast<u32v>(load((const float*)q)) >> (quad / (QUADS / ROUNDS) * Block::BITS);
    }
#pragma GCC unroll 4
    for (int e = 0; e < 4; e++)
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const f32v w = fma(d[g], low_bits<Block::BITS>(v[g] >> (8 * e)), c[g]);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) acc[g][i] = fma(splat(x[(g * GROUP + 4 * quad + e) * MR + i]), w, acc[g][i]);
      }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) total[i] += acc[g][i];
}

// The columns of one panel for MR rows of x, [k][MR].
template <class Block, int MR>
__attribute__((noinline)) void few_rows(const Linear& a, const float* x, int64_t panel) {
  constexpr int G = MR == 1 ? 4 : MR <= 3 ? 2 : 1;  // chains enough to hide the latency of fma
  const int64_t groups = a.depth / GROUP;
  const Block* b = (const Block*)a.weight + panel * groups;
  f32v total[PARTS][MR];
  for (int part = 0; part < PARTS; part++)
    for (int i = 0; i < MR; i++) total[part][i] = splat(-0.0f);
  int64_t g = 0;
  auto add = [&](auto n) {
    constexpr int N = decltype(n)::value;
    for (; g + N <= groups; g += N) {
      for (int line = 0; line < N * (int)sizeof(Block); line += 64)
        __builtin_prefetch((const char*)(b + g) + AHEAD + line, 0, FETCHED_TO);
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; part++) add_groups<Block, MR, N>(b + g, x + g * GROUP * MR, part, total[part]);
    }
  };
  add(Int<G>{});
  add(Int<1>{});
  const int n = (int)min<int64_t>(PANEL, a.cols - panel * PANEL);
  float outputs[PANEL];
  for (int i = 0; i < MR; i++) {
    for (int part = 0; part < PARTS; part++) store(outputs + part * LANES, total[part][i]);
    store_outputs(a, i, panel * PANEL, outputs, n);
  }
}

// sums[MR][stride] = (add ? sums : 0) + x[k][MR] * w[k][NV * LANES]: each group of 32 k in order, then added.
template <int MR, int NV>
__attribute__((noinline)) void outer_products(const float* x, const float* w, int64_t groups, float* sums,
                                              int64_t stride, bool add) {
  for (; groups > 0; groups--, add = true) {
    f32v acc[MR][NV] = {};
#pragma GCC unroll 1
    for (int k = 0; k < GROUP; k++, x += MR, w += NV * LANES) {
      f32v b[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) b[v] = in_register(load(w + v * LANES));
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) acc[i][v] = fma(splat(x[i]), b[v], acc[i][v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) {
        float* s = sums + i * stride + v * LANES;
        store(s, add ? load(s) + acc[i][v] : acc[i][v]);
      }
  }
}

// Columns of `panels` panels (ABREAST or 1) from panel `first` on, for the tiles [begin, end) of rows.
template <class Block, int NP>
void block(const Linear& a, const float* x, const Tiles& tiles, int64_t begin, int64_t end, int64_t first,
           float* memory) {
  constexpr int COLS = NP * PANEL;
  float *weight = memory, *sums = memory + BLOCK * COLS;
  const int64_t groups = a.depth / GROUP, row = tiles.begin(begin);
  for (int64_t k = 0; k < a.depth; k += BLOCK) {
    const int64_t length = min(BLOCK, a.depth - k);
    for (int p = 0; p < NP; p++) {
      const Block* b = (const Block*)a.weight + (first + p) * groups + k / GROUP;
      dequantize_panel(b, length / GROUP, COLS, weight + p * PANEL);
    }
    for (int64_t t = begin; t < end; t++)
      with_int<1, TILE>(tiles.height(t), [&](auto rows) {
        constexpr int MR = decltype(rows)::value;
        const int64_t r = tiles.begin(t);
        outer_products<MR, NP * PARTS>(x + r * a.depth + k * MR, weight, length / GROUP, sums + (r - row) * COLS, COLS,
                                       k > 0);
      });
  }
  const int n = (int)min<int64_t>(COLS, a.cols - first * PANEL);
  for (int64_t r = row; r < tiles.begin(end); r++) store_outputs(a, r, first * PANEL, sums + (r - row) * COLS, n);
}

}  // namespace

// y = x dequantize(W)^T + bias. x is first laid out in fp32 tiles: together in the workspace, or, without one, by every
// worker for itself.
void linear_exact(const Linear& a, Worker& worker) {
  constexpr int64_t COLS = ABREAST * PANEL, MEMORY = (BLOCK + BLOCK_TILES * TILE) * COLS;
  const Tiles tiles(a.rows, TILE), blocks(tiles.count, BLOCK_TILES);
  const bool shared = a.workspace;
  const int64_t floats = x_floats(a, shared ? TILE : a.rows);
  float* memory = (float*)worker.scratch((MEMORY + floats + (shared ? 0 : a.rows * a.depth)) * sizeof(float));
  float *made = memory + MEMORY, *x = shared ? (float*)a.workspace : made + floats;
  prepare(shared, tiles.count, worker, [&](int64_t begin, int64_t end) {
    with_storage(a.dtype, [&](auto t) {
      for (int64_t i = begin; i < end; i++) {
        const int rows = tiles.height(i);
        const auto from = x_rows<decltype(t)>(a, tiles.begin(i), rows, shared, made);
        interleave_rows(from.x, from.stride, a.depth, rows, rows, x + tiles.begin(i) * a.depth);
      }
    });
  });
  const int64_t panels = ceil_div(a.cols, PANEL);
  with_format(a.format, [&](auto format) {
    using Block = decltype(format);
    if (a.rows <= FEW) {
      with_int<1, FEW>((int)a.rows, [&](auto rows) {
        worker.each(panels, [&](int64_t panel) {
          if (panel == 0 && !shared) write_others(a, made);
          few_rows<Block, decltype(rows)::value>(a, x, panel);
        });
      });
      return;
    }
    worker.each(ceil_div(panels, ABREAST) * blocks.count, [&](int64_t task) {
      if (task == 0 && !shared) write_others(a, made);
      const int64_t first = task / blocks.count * ABREAST, b = blocks.begin(task % blocks.count),
                    e = blocks.begin(task % blocks.count + 1);
      if (first + ABREAST <= panels)
        block<Block, ABREAST>(a, x, tiles, b, e, first, memory);
      else
        for (int64_t p = first; p < panels; p++) block<Block, 1>(a, x, tiles, b, e, p, memory);
    });
  });
}

}  // namespace gptfast::ISA
