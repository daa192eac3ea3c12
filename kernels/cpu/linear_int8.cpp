// Linear with quantised weights and activations rounded to int8 per group of 32 k. The dot product of a group is a
// whole number, the same on every machine; groups are added in fp32 in order: f = fma(d * scale, isum, f), and for Q4_1
// then f = fma(m, scale * sum of the group's activations, f). 16 outputs lie in the lanes of one panel.
#include "prologue.h"

namespace gptfast::ISA {

namespace {

// Rows of a tile, panels abreast.
#if defined(__AVX512VNNI__)
constexpr int ABREAST = 3;  // 12 whole-number and 12 float sums of 32 registers
constexpr int tile_rows(int) { return 4; }
// So many tiles of rows at most go through one panel two by two: its weights come once, in one stream, and lie in L1
// for the next two.
constexpr int64_t tall(int bits) { return bits == 8 ? 8 : 3; }
#else
constexpr int ABREAST = 1;
constexpr int tile_rows(int bits) {  // AVX2: 8 or 12 whole-number sums of 16 registers; float ones wait in L1
  return VEC_BYTES == 32 && bits == 8 ? 3 : 4;
}
constexpr int64_t tall(int) { return 0; }
#endif
// Panels that one row reads in turn, far apart and without prefetches: with AVX2 a core doesn't see far enough ahead in
// one stream, and fetching by instruction is slower there than the hardware's own. (AVX-512: one stream, fetched.)
constexpr int STREAMS = VEC_BYTES == 32 ? 3 : 1;
constexpr int64_t BLOCK = 1 << 19;  // bytes of x that stay in L2 while the weights pass
constexpr int64_t AHEAD = 2560;     // bytes: DRAM latency at one thread's share of the bandwidth
// With VNNI a fifth of a tile's vector instructions takes nibbles apart and widens d and m: for so many tiles of rows
// it is done before, if what it gives stays in L2.
constexpr int64_t MANY = ABREAST > 1 ? 4 : INT64_MAX, ROOM = 1 << 19;

// Sums of four products per 32-bit lane: w's unsigned bytes times a's signed ones. With VNNI bytes are taken as they
// are. Without, pairs are added in 16 bits, which holds eight steps of 15 * 127 or of 255 * 8: where w has 8 bits, a is
// two planes of digits, low and high: a = low + 16 * high, both in -8 .. 8.
typedef uint8_t u8v __attribute__((vector_size(VEC_BYTES)));
typedef uint16_t u16w __attribute__((vector_size(VEC_BYTES)));
typedef int16_t i16w __attribute__((vector_size(VEC_BYTES)));
typedef int8_t i8v __attribute__((vector_size(LANES)));
INLINE i32v splat_quad(const int8_t* a) {
  int32_t quad;
  memcpy(&quad, a, sizeof quad);
  return splat(quad);
}
#if defined(__AVX512VNNI__)
typedef i32v Dot;
constexpr int planes(int) { return 1; }
INLINE Dot start(int32_t correction) { return splat(correction); }
INLINE Dot dot(Dot acc, u8v w, i32v quad) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(quad));  // around the intrinsic GCC 12 copies and spills sums
  return acc;
}
INLINE Dot dot(Dot acc, u8v w, const int8_t* quad) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*(const int32_t*)quad));
  return acc;
}
INLINE i32v finish(Dot acc, int32_t, int) { return acc; }
#else
typedef i16w Dot;
constexpr int planes(int bits) { return bits / 4; }
INLINE Dot start(int32_t) { return Dot{}; }
INLINE Dot dot(Dot acc, u8v w, i32v quad) {
#if defined(__AVX512F__)
  acc += bitcast<i16w>(_mm512_maddubs_epi16(bitcast<__m512i>(w), bitcast<__m512i>(quad)));
  asm("" : "+v"(acc));
  return acc;
#elif defined(__AVX2__)
  acc += bitcast<i16w>(_mm256_maddubs_epi16(bitcast<__m256i>(w), bitcast<__m256i>(quad)));
  asm("" : "+v"(acc));  // or GCC makes all products of a group first, spills them, then adds
  return acc;
#else
  const i16w even = bitcast<i16w>(w) & 255, odd = bitcast<i16w>(bitcast<u16w>(w) >> 8), both = bitcast<i16w>(quad);
  return acc + even * ((both << 8) >> 8) + odd * (both >> 8);
#endif
}
INLINE Dot dot(Dot acc, u8v w, const int8_t* quad) { return dot(acc, w, splat_quad(quad)); }
INLINE i32v finish(Dot acc, int32_t correction, int plane) {
#if defined(__AVX512F__)
  return bitcast<i32v>(_mm512_madd_epi16(bitcast<__m512i>(acc), _mm512_set1_epi16(plane ? 16 : 1))) + correction;
#elif defined(__AVX2__)
  return bitcast<i32v>(_mm256_madd_epi16(bitcast<__m256i>(acc), _mm256_set1_epi16(plane ? 16 : 1))) + correction;
#else
  const i32v pairs = bitcast<i32v>(acc);
  return ((((pairs << 16) >> 16) + (pairs >> 16)) << 4 * plane) + correction;
#endif
}
#endif
INLINE u8v low(u8v w) { return w & 15; }
INLINE u8v high(u8v w) { return bitcast<u8v>(bitcast<u16w>(w) >> 4) & 15; }
INLINE u8v load_bytes(const uint8_t* p) {
  u8v v;
  memcpy(&v, p, sizeof v);
  return v;
}

// One group of a tile of MR rows, quantised: q (in planes, lowest first) and scale, and a second number: for Q4_1
// scale * sum(q), an fp32, for the others -OFFSET * sum(q), a whole number.
template <int MR, int PLANES>
struct Activations {
  int8_t q[MR][PLANES][GROUP];
  float scale[MR];
  int32_t second[MR];
};

// A group's whole numbers, -127 .. 127, as bytes.
INLINE void store_bytes(const i32v* r, int8_t* q) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // one by one GCC takes 80 cycles
  auto packed = [&](int i) { return _mm256_packs_epi32(bitcast<__m256i>(r[i]), bitcast<__m256i>(r[i + 1])); };
  const __m256i halves = _mm256_packs_epi16(packed(0), packed(2)), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)q, _mm256_permutevar8x32_epi32(halves, order));
#else
  for (int i = 0; i < GROUP / LANES; i++) {
    const i8v bytes = __builtin_convertvector(r[i], i8v);
    memcpy(q + i * LANES, &bytes, sizeof bytes);
  }
#endif
}

// scale = amax / 127, q = x * (127 / amax) rounded to nearest even; returns the scale and, in `total`, the sum of q. A
// group whose amax is below 2^-120 counts as zero; one with a value that isn't finite has scale NaN, which makes every
// output of its row NaN.
template <class T, int PLANES>
INLINE float quantize_group(const T* x, int8_t (&q)[PLANES][GROUP], int32_t& total) {
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
  i32v r[GROUP / LANES], sums = {};
  for (int i = 0; i < GROUP / LANES; i++) {
    r[i] = usable ? __builtin_convertvector(round(v[i] * inverse), i32v) : i32v{};
    sums += r[i];
  }
  if constexpr (PLANES == 2) {
    i32v high[GROUP / LANES];
    for (int i = 0; i < GROUP / LANES; i++) high[i] = (r[i] + 8) >> 4, r[i] -= high[i] << 4;
    store_bytes(high, q[1]);
  }
  store_bytes(r, q[0]);
  total = (int32_t)sum(to_float(sums));  // exact: below 2^24
  return usable ? amax / 127.0f : amax < 1.0f ? 0.0f : __builtin_nanf("");
}

template <class Block, class T, int MR, int PLANES>
void quantize_tile(Rows<T> rows, int64_t groups, Activations<MR, PLANES>* out) {
  for (int i = 0; i < MR; i++)
    for (int64_t g = 0; g < groups; g++) {
      int32_t sum;
      const float scale = quantize_group(rows.x + i * rows.stride + g * GROUP, out[g].q[i], sum);
      out[g].scale[i] = scale;
      out[g].second[i] = Block::OFFSET ? -Block::OFFSET * sum : bitcast<int32_t>(scale * (float)sum);
    }
}

// f + one group's part of an output. `sum` is the whole number of all planes.
template <class Block>
INLINE f32v add_group(f32v f, i32v sum, f32v d, f32v m, float scale, int32_t second) {
  f = fma(d * scale, to_float(sum), f);
  if constexpr (Block::OFFSET == 0) f = fma(m, splat(bitcast<float>(second)), f);
  return f;
}

// A group of a 4-bit panel opened: a byte for each weight, scales in fp32.
template <class Block>
struct Opened {
  static constexpr int BITS = 8, OFFSET = Block::OFFSET;
  float d[PANEL], m[PANEL];
  uint8_t q[QUADS][64];
};
template <class Block>
INLINE f32v scales(const Opened<Block>& b, int part) {
  return load(b.d + part * LANES);
}
template <class Block>
INLINE f32v shifts(const Opened<Block>& b, int part) {
  return load(b.m + part * LANES);
}
template <class Block>
void open(const Block* b, int64_t groups, Opened<Block>* out) {
  for (int64_t g = 0; g < groups; g++, b++, out++) {
    for (int part = 0; part < PARTS; part++) {
      store(out->d + part * LANES, scales(*b, part));
      store(out->m + part * LANES, shifts(*b, part));
      for (int j = 0; j < QUADS / 2; j++) {
        const u8v both = load_bytes(b->q[j] + part * sizeof(u8v)), quads[] = {low(both), high(both)};
        memcpy(out->q[j] + part * sizeof(u8v), &quads[0], sizeof(u8v));
        memcpy(out->q[j + QUADS / 2] + part * sizeof(u8v), &quads[1], sizeof(u8v));
      }
    }
  }
}

template <class Block>
constexpr int stored = sizeof(Block);  // bytes of a group in memory
template <class Block>
constexpr int stored<Opened<Block>> = sizeof(Block);

// Outputs of A + B rows from `row` on, NP panels from `panel` on, whose groups lie one after another from b on. The
// first A rows are x's, the others y's. Weights to come, from `next` on if not null, are on their way meanwhile: to L1
// where a line of them is much work, to L2 of several panels, which are as many streams, and of 8 bits for one row.
template <class Block, int A, int B, int NP, int PLANES>
__attribute__((noinline)) void tile(const Linear& a, const Activations<A, PLANES>* x,
                                    const Activations<(B ? B : 1), PLANES>* y, const Block* b, int64_t row,
                                    int64_t panel, const char* next) {
  constexpr int MR = A + B;
  auto second = [&](int i) { return i < A ? x->second[i] : y->second[i - A]; };
  constexpr int VECTORS = NP * PARTS, STORED = sizeof(Block::q) / 64;
  const int64_t groups = a.depth / GROUP;
  for (int i = 0; i < MR; i++) prefetch_outputs(a, row + i, panel * PANEL, NP * PANEL);
  f32v f[MR][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) f[i][v] = f32v{};  // = {} is a loop over memory
#pragma GCC unroll 1
  for (int64_t g = 0; g < groups; g++, b++, x++) {
    if (next) {
      constexpr int LEVEL = NP > 1 || (MR == 1 && Block::BITS == 8) ? FETCHED_TO : 3;
      for (int line = 0; line < NP * stored<Block>; line += 64) __builtin_prefetch(next + line, 0, LEVEL);
      next += NP * stored<Block>;
    }
    Dot s[PLANES][MR][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++)
#pragma GCC unroll 2
        for (int p = 0; p < PLANES; p++) s[p][i][v] = start(Block::OFFSET && p == 0 ? second(i) : 0);
#pragma GCC unroll 8
    for (int j = 0; j < QUADS; j++) {
      u8v w[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) {
        w[v] = load_bytes(b[v / PARTS * groups].q[j % STORED] + v % PARTS * sizeof(u8v));
        if constexpr (Block::BITS == 4) w[v] = j < STORED ? low(w[v]) : high(w[v]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
        for (int p = 0; p < PLANES; p++) {
          const int8_t* quad = (i < A ? x->q[i][p] : y->q[i - A][p]) + 4 * j;
          const i32v quads = splat_quad(quad);  // for one panel from memory: fewer instructions see more weights ahead
#pragma GCC unroll 8
          for (int v = 0; v < VECTORS; v++)
            s[p][i][v] = NP == 1 ? dot(s[p][i][v], w[v], quad) : dot(s[p][i][v], w[v], quads);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      const f32v d = scales(b[v / PARTS * groups], v % PARTS), m = shifts(b[v / PARTS * groups], v % PARTS);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        i32v sum = finish(s[0][i][v], Block::OFFSET ? second(i) : 0, 0);
        if constexpr (PLANES == 2) sum += finish(s[1][i][v], 0, 1);
        f[i][v] = add_group<Block>(f[i][v], sum, d, m, i < A ? x->scale[i] : y->scale[i - A], second(i));
      }
    }
    if constexpr (B > 0) y++;
  }
  float outputs[MR][NP * PANEL];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) store(outputs[i] + v * LANES, f[i][v]);
  const int n = (int)min<int64_t>(NP * PANEL, a.cols - panel * PANEL);
  for (int i = 0; i < MR; i++) store_outputs(a, row + i, panel * PANEL, outputs[i], n);
}

template <class Block, int NP, int MR, int PLANES>
INLINE void tile(const Linear& a, const Activations<MR, PLANES>* x, const Block* b, int64_t row, int64_t panel,
                 const char* next) {
  tile<Block, MR, 0, NP, PLANES>(a, x, nullptr, b, row, panel, next);
}

// Outputs of one row in STREAMS panels, `apart` from each other. The same sums as a tile's.
template <class Block>
__attribute__((noinline)) void streams(const Linear& a, const Activations<1, planes(Block::BITS)>* x, int64_t panel,
                                       int64_t apart) {
  constexpr int PLANES = planes(Block::BITS), STORED = sizeof(Block::q) / 64;
  const int64_t groups = a.depth / GROUP;
  const Block* b = (const Block*)a.weight + panel * groups;
  f32v f[STREAMS][PARTS] = {};
#pragma GCC unroll 1
  for (int64_t g = 0; g < groups; g++, b++, x++) {
#pragma GCC unroll 8
    for (int n = 0; n < STREAMS; n++) {
      const Block* from = b + n * apart * groups;
      Dot s[PLANES][PARTS];
#pragma GCC unroll 8
      for (int v = 0; v < PARTS; v++)
#pragma GCC unroll 2
        for (int p = 0; p < PLANES; p++) s[p][v] = start(Block::OFFSET && p == 0 ? x->second[0] : 0);
#pragma GCC unroll 8
      for (int j = 0; j < QUADS; j++)
#pragma GCC unroll 8
        for (int v = 0; v < PARTS; v++) {
          u8v w = load_bytes(from->q[j % STORED] + v * sizeof(u8v));
          if constexpr (Block::BITS == 4) w = j < STORED ? low(w) : high(w);
#pragma GCC unroll 2
          for (int p = 0; p < PLANES; p++) s[p][v] = dot(s[p][v], w, x->q[0][p] + 4 * j);
        }
#pragma GCC unroll 8
      for (int v = 0; v < PARTS; v++) {
        i32v sum = finish(s[0][v], Block::OFFSET ? x->second[0] : 0, 0);
        if constexpr (PLANES == 2) sum += finish(s[1][v], 0, 1);
        f[n][v] = add_group<Block>(f[n][v], sum, scales(*from, v), shifts(*from, v), x->scale[0], x->second[0]);
      }
    }
  }
  for (int n = 0; n < STREAMS; n++) {
    const int64_t first = (panel + n * apart) * PANEL;
    float outputs[PANEL];
    for (int v = 0; v < PARTS; v++) store(outputs + v * LANES, f[n][v]);
    store_outputs(a, 0, first, outputs, (int)min<int64_t>(PANEL, a.cols - first));
  }
}

}  // namespace

// x is first quantised: together in the workspace, or, without one, by every worker for itself.
void linear_int8(const Linear& a, Worker& worker) {
  with_format(a.format, [&](auto format) {
    using Block = decltype(format);
    constexpr int PLANES = planes(Block::BITS), TILE = tile_rows(Block::BITS);
    constexpr int64_t BYTES = sizeof(Activations<1, PLANES>);
    const int64_t panels = ceil_div(a.cols, PANEL), across = ceil_div(panels, ABREAST), groups = a.depth / GROUP;
    const Tiles tiles(a.rows, TILE);
    const int64_t enough = ceil_div(2 * worker.count, across);  // blocks of rows, for every worker to have some
    const int64_t height = max<int64_t>(ceil_div(tiles.count, enough), 8);
    const Tiles blocks(tiles.count, min(height, ceil_div(BLOCK, TILE * PLANES * a.depth)));
    const bool shared = a.workspace;
    const int64_t floats = x_floats(a, shared ? TILE : a.rows);
    const Block* weight = (const Block*)a.weight;
    const int64_t opening = ABREAST * groups * sizeof(Opened<Block>);
    const bool many = Block::BITS == 4 && tiles.count >= MANY && opening <= ROOM;
    auto* opened = (Opened<Block>*)worker.scratch(many * opening + floats * sizeof(float) +
                                                  (shared ? 0 : a.rows * groups * BYTES));
    float* made = (float*)((char*)opened + many * opening);
    char* memory = shared ? (char*)a.workspace : (char*)(made + floats);
    auto each_tile = [&](int64_t begin, int64_t end, auto f) {
      for (int64_t t = begin; t < end; t++)
        with_int<1, TILE>(tiles.height(t), [&](auto rows) {
          using X = Activations<decltype(rows)::value, PLANES>;
          f(tiles.begin(t), (X*)(memory + tiles.begin(t) * groups * BYTES));
        });
    };
    prepare(shared, tiles.count, worker, [&](int64_t begin, int64_t end) {
      with_storage(a.dtype, [&](auto t) {
        each_tile(begin, end, [&]<int MR>(int64_t row, Activations<MR, PLANES>* x) {
          quantize_tile<Block>(x_rows<decltype(t)>(a, row, MR, shared, made), groups, x);
        });
      });
    });
    if (STREAMS > 1 && a.rows == 1 && panels >= STREAMS) {
      const int64_t apart = panels / STREAMS;
      worker.each(panels - (STREAMS - 1) * apart, [&](int64_t task) {  // the last ones: panels that are left over
        if (task == 0 && !shared) write_others(a, made);
        const auto* x = (const Activations<1, PLANES>*)memory;
        task < apart ? streams<Block>(a, x, task, apart)
                     : tile<Block, 1>(a, x, weight + (task + (STREAMS - 1) * apart) * groups, 0,
                                      task + (STREAMS - 1) * apart, nullptr);
      });
      return;
    }
    worker.each(across * blocks.count, [&](int64_t task) {
      if (task == 0 && !shared) write_others(a, made);
      const int64_t first = task % across * ABREAST, last = min(first + ABREAST, panels);
      const int64_t top = blocks.begin(task / across), bottom = blocks.begin(task / across + 1);
      const Block* from = weight + first * groups;
      const char* after = (const char*)(from + ABREAST * groups);
      const bool opens = many && last - first == ABREAST && bottom - top >= MANY;
      if constexpr (MANY < INT64_MAX && Block::BITS == 4)
        if (opens) open(from, ABREAST * groups, opened);
      if constexpr (tall(Block::BITS) > 0) {
        if (tiles.count > 1 && tiles.count <= tall(Block::BITS)) {
          for (int64_t p = first; p < last; p++) {
            const Block* b = weight + p * groups;
            for (int64_t t = top; t < bottom; t += 2) {
              const char* next = t == top ? (const char*)b + AHEAD : nullptr;
              each_tile(t, t + 1, [&]<int A>(int64_t row, const Activations<A, PLANES>* x) {
                if (t + 1 == bottom) return tile<Block, 1>(a, x, b, row, p, next);
                each_tile(t + 1, t + 2, [&]<int B>(int64_t, const Activations<B, PLANES>* y) {
                  if constexpr (A - B <= 1 && B - A <= 1) tile<Block, A, B, 1>(a, x, y, b, row, p, next);
                });
              });
            }
          }
          return;
        }
      }
      each_tile(top, bottom, [&]<int MR>(int64_t row, const Activations<MR, PLANES>* x) {
        constexpr int NP = MR <= 2 ? 1 : ABREAST;  // bound by memory, which gives most to a single stream
        const bool fetch = row == tiles.begin(top);
        if constexpr (MANY < INT64_MAX && NP > 1 && Block::BITS == 4)
          if (opens) return tile<Opened<Block>, NP>(a, x, opened, row, first, fetch ? after : nullptr);
        if (NP > 1 && last - first == NP)
          tile<Block, NP>(a, x, from, row, first, fetch ? after : nullptr);
        else
          for (int64_t p = first; p < last; p++) {
            const Block* b = weight + p * groups;
            tile<Block, 1>(a, x, b, row, p, fetch ? (const char*)b + AHEAD : nullptr);
          }
      });
    });
  });
}

}  // namespace gptfast::ISA
