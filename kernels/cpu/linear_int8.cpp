// Linear with quantised weights and activations rounded to int8 per group of 32 k. The dot product of a group is a
// whole number, the same on every machine; groups are added in fp32 in order: f = fma(d * scale, isum, f), and for Q4_1
// then f = fma(m, scale * sum of the group's activations, f). 16 outputs lie in the lanes of one panel.
#include "linear.h"

namespace gptfast::ISA {

namespace {

#if defined(__AVX512F__)
constexpr int FEW = 8, TILE = 4, ABREAST = 3;  // 12 whole-number and 12 float sums of 32 registers
#else
constexpr int FEW = 4, TILE = 2, ABREAST = 1;
#endif
constexpr int64_t BLOCK_GROUPS = 12;         // unpacked: 23 KiB of L1
constexpr int64_t BLOCK_TILES = 256 / TILE;  // rows whose sums stay in L2
constexpr int64_t AHEAD = 2560;              // bytes: DRAM latency at one thread's share of the bandwidth

// Sums of four products per 32-bit lane: w's unsigned bytes times a's signed ones. With VNNI bytes are taken as they
// are. Without, pairs are added in 16 bits, which holds eight steps of w < 16; wider bytes are two planes of nibbles.
typedef uint8_t u8v __attribute__((vector_size(VEC_BYTES)));
typedef uint16_t u16w __attribute__((vector_size(VEC_BYTES)));
typedef int16_t i16w __attribute__((vector_size(VEC_BYTES)));
typedef int8_t i8v __attribute__((vector_size(LANES)));
#if defined(__AVX512VNNI__)
typedef i32v Dot;
constexpr int planes(int) { return 1; }
INLINE Dot start(int32_t correction) { return splat(correction); }
INLINE Dot dot(Dot acc, u8v w, const int8_t* a) {
  __m512i sum = bitcast<__m512i>(acc);  // asm: around the intrinsic GCC 12 copies and spills the sums
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(bitcast<__m512i>(w)), "m"(*(const int32_t*)a));
  return bitcast<Dot>(sum);
}
INLINE i32v finish(Dot acc, int32_t) { return acc; }
#else
typedef i16w Dot;
constexpr int planes(int bits) { return bits / 4; }
INLINE Dot start(int32_t) { return Dot{}; }
INLINE Dot dot(Dot acc, u8v w, const int8_t* a) {
  int32_t quad;
  memcpy(&quad, a, sizeof quad);
#if defined(__AVX512F__)
  return acc + bitcast<i16w>(_mm512_maddubs_epi16(bitcast<__m512i>(w), _mm512_set1_epi32(quad)));
#elif defined(__AVX2__)
  return acc + bitcast<i16w>(_mm256_maddubs_epi16(bitcast<__m256i>(w), _mm256_set1_epi32(quad)));
#else
  const i16w pairs = bitcast<i16w>(w), both = bitcast<i16w>(splat(quad));  // every byte of w is below 16
  return acc + (pairs & 255) * ((both << 8) >> 8) + (pairs >> 8) * (both >> 8);
#endif
}
INLINE i32v finish(Dot acc, int32_t correction) {
  const i32v pairs = bitcast<i32v>(acc);
  return ((pairs << 16) >> 16) + (pairs >> 16) + correction;
}
#endif
INLINE u8v low(u8v w) { return w & 15; }
INLINE u8v high(u8v w) { return bitcast<u8v>(bitcast<u16w>(w) >> 4) & 15; }
INLINE u8v load_bytes(const uint8_t* p) {
  u8v v;
  memcpy(&v, p, sizeof v);
  return v;
}

// The quantised activations of a call: q (rows, depth), and per row and group the scale and a second number: for Q4_1
// scale * sum(q), an fp32, for the others -OFFSET * sum(q), a whole number.
struct Activations {
  int8_t* q;
  float* scale;
  int32_t* second;
  Activations(void* memory, int64_t rows, int64_t depth)
      : q((int8_t*)memory), scale((float*)(q + rows * depth)), second((int32_t*)(scale + rows * (depth / GROUP))) {}
};

// scale = amax / 127, q = x * (127 / amax) rounded to nearest even; returns the scale. A group whose amax is below
// 2^-120 counts as zero; one with a value that isn't finite has scale NaN, which makes every output of its row NaN.
template <class T>
INLINE float quantize_group(const T* x, int8_t* q, int32_t& sum) {
  f32v v[GROUP / LANES];
  i32v most = {};  // the largest magnitude by its bits, so that infinity and NaN come out on top
  for (int i = 0; i < GROUP / LANES; i++) {
    v[i] = load(x + i * LANES);
    const i32v bits = bitcast<i32v>(abs(v[i]));
    most = bits > most ? bits : most;
  }
  const float amax = max(bitcast<f32v>(most > 0x7f800000 ? i32v{} + 0x7f800000 : most));
  const bool usable = amax >= 0x1p-120f && amax < __builtin_inff();
  const float inverse = 127.0f / amax;
  i32v total = {};
  for (int i = 0; i < GROUP / LANES; i++) {
    const i32v r = usable ? __builtin_convertvector(round(v[i] * inverse), i32v) : i32v{};
    total += r;
    const i8v bytes = __builtin_convertvector(r, i8v);
    memcpy(q + i * LANES, &bytes, sizeof bytes);
  }
  sum = 0;
  for (int i = 0; i < LANES; i++) sum += total[i];
  return usable ? amax / 127.0f : amax < 1.0f ? 0.0f : __builtin_nanf("");
}

template <class Block, class T>
void quantize_rows(const Linear& a, const Activations& x, int64_t begin, int64_t end) {
  const int64_t groups = a.depth / GROUP;
  for (int64_t i = begin * groups; i < end * groups; i++) {
    int32_t sum;
    const T* source = (const T*)a.x + i / groups * a.x_stride + i % groups * GROUP;
    x.scale[i] = quantize_group(source, x.q + i * GROUP, sum);
    x.second[i] = Block::OFFSET ? -Block::OFFSET * sum : bitcast<int32_t>(x.scale[i] * (float)sum);
  }
}

// f + one group's part of an output. `sum` is the whole number of all planes.
template <class Block>
INLINE f32v add_group(f32v f, i32v sum, f32v d, f32v m, float scale, int32_t second) {
  f = fma(d * scale, to_float(sum), f);
  if constexpr (Block::OFFSET == 0) f = fma(m, splat(bitcast<float>(second)), f);
  return f;
}

// One panel for MR rows, straight from the packed blocks: each is read once and used for all the rows.
template <class Block, int MR>
__attribute__((noinline)) void few_rows(const Linear& a, const Activations& x, int64_t panel) {
  constexpr int PLANES = planes(Block::BITS);
  const int64_t groups = a.depth / GROUP;
  const Block* b = (const Block*)a.weight + panel * groups;
  f32v f[MR][PARTS] = {};
#pragma GCC unroll 1
  for (int64_t g = 0; g < groups; g++, b++) {
    for (int line = 0; line < (int)sizeof(Block); line += 64) __builtin_prefetch((const char*)b + AHEAD + line);
    const int8_t* q = x.q + g * GROUP;
    const float* scale = x.scale + g;
    const int32_t* second = x.second + g;
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) {
      Dot s[PLANES][MR];
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++)
        for (int p = 0; p < PLANES; p++) s[p][i] = start(Block::OFFSET ? second[i * groups] : 0);
#pragma GCC unroll 8
      for (int j = 0; j < (int)(sizeof b->q / 64); j++) {
        const u8v w = load_bytes(b->q[j] + part * sizeof w);
        const u8v wl = Block::BITS == 8 && PLANES == 1 ? w : low(w), wh = high(w);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
          const int8_t* quad = q + i * a.depth + 4 * j;
          s[0][i] = dot(s[0][i], wl, quad);
          if constexpr (Block::BITS == 4) s[0][i] = dot(s[0][i], wh, quad + 16);
          if constexpr (PLANES == 2) s[PLANES - 1][i] = dot(s[PLANES - 1][i], wh, quad);
        }
      }
      const f32v d = scales(*b, part), m = shifts(*b, part);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        i32v sum = finish(s[0][i], Block::OFFSET ? second[i * groups] : 0);
        if constexpr (PLANES == 2) sum += finish(s[PLANES - 1][i], 0) << 4;
        f[i][part] = add_group<Block>(f[i][part], sum, d, m, scale[i * groups], second[i * groups]);
      }
    }
  }
  const int n = (int)min<int64_t>(PANEL, a.cols - panel * PANEL);
  float outputs[MR][PANEL];
  for (int i = 0; i < MR; i++)
    for (int part = 0; part < PARTS; part++) store(outputs[i] + part * LANES, f[i][part]);
  for (int i = 0; i < MR; i++) store_outputs(a, i, panel * PANEL, outputs[i], n);
}

// One group of NP panels with the nibbles unpacked, quad by quad.
template <class Block, int NP>
struct alignas(64) Unpacked {
  static constexpr int PLANES = planes(Block::BITS), VECTORS = NP * PARTS;
  uint8_t q[PLANES][QUADS][VECTORS][VEC_BYTES];
  float d[VECTORS][LANES], m[VECTORS][LANES];
};

template <class Block, int NP>
void unpack(const Block* b, int64_t stride, int64_t groups, Unpacked<Block, NP>* out) {
  auto put = [](uint8_t* p, u8v v) { memcpy(p, &v, sizeof v); };
  for (int64_t g = 0; g < groups; g++, out++)
    for (int v = 0; v < NP * PARTS; v++) {
      const Block& from = b[v / PARTS * stride + g];
      const int part = v % PARTS;
      store(out->d[v], scales(from, part));
      store(out->m[v], shifts(from, part));
      for (int j = 0; j < (int)(sizeof from.q / 64); j++) {
        const u8v w = load_bytes(from.q[j] + part * sizeof w);
        if constexpr (Block::BITS == 4) {
          put(out->q[0][j][v], low(w));
          put(out->q[0][j + 4][v], high(w));
        } else if constexpr (out->PLANES == 2) {
          put(out->q[0][j][v], low(w));
          put(out->q[out->PLANES - 1][j][v], high(w));
        } else {
          put(out->q[0][j][v], w);
        }
      }
    }
}

// sums[MR][VECTORS * LANES] = (add ? sums : 0) + `groups` groups in order.
template <class Block, int MR, int NP>
__attribute__((noinline)) void tile(const Unpacked<Block, NP>* u, int64_t groups, const Activations& x, int64_t row,
                                    int64_t group, int64_t depth, float* sums, bool add) {
  using U = Unpacked<Block, NP>;
  const int64_t across = depth / GROUP;
  const int8_t* q = x.q + row * depth + group * GROUP;
  const float* scale = x.scale + row * across + group;
  const int32_t* second = x.second + row * across + group;
  f32v f[MR][U::VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int v = 0; v < U::VECTORS; v++) f[i][v] = add ? load(sums + (i * U::VECTORS + v) * LANES) : f32v{};
#pragma GCC unroll 1
  for (int64_t g = 0; g < groups; g++, u++, q += GROUP, scale++, second++) {
    i32v total[MR][U::VECTORS];
#pragma GCC unroll 2
    for (int p = 0; p < U::PLANES; p++) {
      Dot s[MR][U::VECTORS];
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int v = 0; v < U::VECTORS; v++) s[i][v] = start(Block::OFFSET ? second[i * across] : 0);
#pragma GCC unroll 8
      for (int j = 0; j < QUADS; j++) {
        u8v w[U::VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < U::VECTORS; v++) w[v] = load_bytes(u->q[p][j][v]);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
          for (int v = 0; v < U::VECTORS; v++) s[i][v] = dot(s[i][v], w[v], q + i * depth + 4 * j);
      }
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int v = 0; v < U::VECTORS; v++) {
          if (p == 0)
            total[i][v] = finish(s[i][v], Block::OFFSET ? second[i * across] : 0);
          else
            total[i][v] += finish(s[i][v], 0) << 4;
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < U::VECTORS; v++) {
      const f32v d = load(u->d[v]), m = load(u->m[v]);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++)
        f[i][v] = add_group<Block>(f[i][v], total[i][v], d, m, scale[i * across], second[i * across]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int v = 0; v < U::VECTORS; v++) store(sums + (i * U::VECTORS + v) * LANES, f[i][v]);
}

// Columns of NP panels from panel `first` on, for the tiles [begin, end) of rows.
template <class Block, int NP>
void block(const Linear& a, const Activations& x, const Tiles& tiles, int64_t begin, int64_t end, int64_t first,
           void* memory, float* sums) {
  auto* unpacked = (Unpacked<Block, NP>*)memory;
  const int64_t groups = a.depth / GROUP, row = tiles.begin(begin);
  const Tiles steps(groups, BLOCK_GROUPS);
  for (int64_t k = 0; k < steps.count; k++) {
    const int64_t g = steps.begin(k);
    unpack<Block, NP>((const Block*)a.weight + first * groups + g, groups, steps.height(k), unpacked);
    for (int64_t t = begin; t < end; t++)
      with_int<TILE - 1, TILE>(tiles.height(t), [&](auto rows) {
        const int64_t r = tiles.begin(t);
        tile<Block, decltype(rows)::value, NP>(unpacked, steps.height(k), x, r, g, a.depth,
                                               sums + (r - row) * NP * PANEL, k > 0);
      });
  }
  const int n = (int)min<int64_t>(NP * PANEL, a.cols - first * PANEL);
  for (int64_t r = row; r < tiles.begin(end); r++) store_outputs(a, r, first * PANEL, sums + (r - row) * NP * PANEL, n);
}

}  // namespace

// x is first quantised: together in the workspace, or, without one, by every worker for itself.
void linear_int8(const Linear& a, Worker& worker) {
  constexpr int64_t UNPACKED = BLOCK_GROUPS * sizeof(Unpacked<Q8_0, ABREAST>);
  constexpr int64_t MEMORY = UNPACKED + BLOCK_TILES * TILE * ABREAST * PANEL * sizeof(float);
  const int64_t activations = a.rows * (a.depth + a.depth / GROUP * 8);
  char* memory = (char*)worker.scratch(MEMORY + (a.workspace ? 0 : activations));
  const Activations x(a.workspace ? a.workspace : memory + MEMORY, a.rows, a.depth);
  const int64_t panels = ceil_div(a.cols, PANEL);
  with_format(a.format, [&](auto format) {
    using Block = decltype(format);
    prepare(a.workspace, a.rows, worker, [&](int64_t begin, int64_t end) {
      with_storage(a.dtype, [&](auto t) { quantize_rows<Block, decltype(t)>(a, x, begin, end); });
    });
    if (a.rows <= FEW) {
      with_int<1, FEW>((int)a.rows, [&](auto rows) {
        worker.each(panels, [&](int64_t panel) { few_rows<Block, decltype(rows)::value>(a, x, panel); });
      });
      return;
    }
    const Tiles tiles(a.rows, TILE), blocks(tiles.count, BLOCK_TILES);
    worker.each(ceil_div(panels, ABREAST) * blocks.count, [&](int64_t task) {
      const int64_t first = task / blocks.count * ABREAST, b = blocks.begin(task % blocks.count),
                    e = blocks.begin(task % blocks.count + 1);
      float* sums = (float*)(memory + UNPACKED);
      if (first + ABREAST <= panels)
        block<Block, ABREAST>(a, x, tiles, b, e, first, memory, sums);
      else
        for (int64_t p = first; p < panels; p++) block<Block, 1>(a, x, tiles, b, e, p, memory, sums);
    });
  });
}

}  // namespace gptfast::ISA
