// Keys and values as they lie in memory, of any storage dtype: turned in registers, widened, packed; and the constants
// of attention's shapes.
//
// Where the machine multiplies pairs of bfloat16 those are packed as they are: two dims of a key, and two keys of a
// dim.
#pragma once
#include "pairs.h"

namespace gptfast::ISA {

// What an int8 cache holds: a key or value is this times the scale of its row, rounded to fp32.
struct i8 {
  int8_t bits;
};
typedef int8_t i8v __attribute__((vector_size(LANES)));
INLINE f32v load(const i8* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  float x[LANES];
  for (int i = 0; i < LANES; i++) x[i] = p[i].bits;
  return load(x);
#endif
}
INLINE f32v load(const i8* p, int n) {
  i8 x[LANES] = {};
  for (int i = 0; i < n; i++) x[i] = p[i];
  return load(x);
}
INLINE float load1(const i8* p) { return p->bits; }

namespace attn {

constexpr int CHUNK = 128;                  // keys; gptfast/ops/attention.py says so too
constexpr int ROWS = 3 * LANES;             // query rows of a full tile
constexpr int BLOCK = LANES == 16 ? 8 : 4;  // x 3 accumulators + 3 + 1 fill 32 or 16 vector registers
constexpr int FEW = LANES / 2;              // tiles of so many rows or fewer take the `few` shape
constexpr int GROUPS = LANES == 4 ? 1 : 2;  // vectors of keys side by side in the `few` shape
constexpr int AHEAD = 8;                    // values are prefetched so many keys ahead
// Decoding, keys are read across, 16 bytes of each of 16 at a time, which no prefetcher follows: with AVX2 a chunk's
// keys are first read in order, and its values fetched meanwhile. Costs a tenth where they are in L2 already; a model's
// weights have just passed through it. With AVX-512 the keys' products fetch the values, and those the next keys.
constexpr bool FETCH_CHUNK = VEC_BYTES == 32, FETCH_NEXT = VEC_BYTES == 64;
constexpr int DIM = 256;  // the largest head
constexpr float NONE = -__builtin_inff();
#define NOINLINE __attribute__((noinline))
#define NO_UNROLL _Pragma("GCC unroll 1")

template <class T>
constexpr bool SCALED = false;
template <>
inline constexpr bool SCALED<i8> = true;

// LANES keys or values of a head that lie evenly: row i is at + i * stride, its scale scale[i * scale_stride].
template <class T>
struct Rows {
  const T* at;
  int64_t stride;
  const float* scale;  // null where T has none
  int64_t scale_stride;

  // Row j's values as they count.
  INLINE f32v scaled(int j, f32v x) const {
    if constexpr (SCALED<T>) x *= scale[j * scale_stride];
    return x;
  }
  // One value of each row as it counts; scales: of the rows.
  INLINE f32v scales() const {
    float x[LANES] = {};
    if constexpr (SCALED<T>)
      for (int i = 0; i < LANES; i++) x[i] = scale[i * scale_stride];
    return load(x);
  }
  static INLINE f32v scaled(f32v scales, f32v x) {
    if constexpr (SCALED<T>) x *= scales;
    return x;
  }
};

// A word is one value of fp32, two of a 16-bit type, or four bytes. Keys are turned four words at a time.
template <class T>
constexpr int PER_WORD = (int)(sizeof(float) / sizeof(T));
template <class T>
constexpr int DIMS = 4 * PER_WORD<T>;

// Four words of LANES rows: at[n] is row 4 n, the rows stand `stride` bytes apart.
struct Quads {
  const char* at[LANES / 4];
  int64_t stride;

  template <class T>
  explicit Quads(const Rows<T>& rows) : stride(rows.stride * (int64_t)sizeof(T)) {
    for (int n = 0; n < LANES / 4; n++) at[n] = (const char*)(rows.at + 4 * n * rows.stride);
  }
  // Lanes 4 n ..: the words of row 4 n + i. Halves are loaded, for a load of 64 bytes takes as long as two of 16.
  INLINE f32v part(int i) const {
    auto quad = [&](int n) { return (const float*)(at[n] + i * stride); };
#if defined(__AVX2__)
    auto half = [&](int n) {
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(quad(n))), _mm_loadu_ps(quad(n + 1)), 1);
    };
#endif
#if defined(__AVX512F__)
    return _mm512_insertf32x8(_mm512_castps256_ps512(half(0)), half(2), 1);
#elif defined(__AVX2__)
    return half(0);
#else
    return load(quad(0));
#endif
  }
  // words[w] = word w of all rows; then on to the next four. A transpose of four lanes by four.
  template <class T>
  INLINE void turn(f32v* words, T) {
    const i32v lane = iota(), quad = lane & ~3, odd = lane & 1, upper = (lane & 2) / 2;
    const i32v by_one = quad + upper + odd * LANES, by_two = quad + odd + upper * LANES;
    const f32v x0 = part(0), x1 = part(1), x2 = part(2), x3 = part(3);
    const f32v a = __builtin_shuffle(x0, x1, by_one), b = __builtin_shuffle(x0, x1, by_one + 2);
    const f32v c = __builtin_shuffle(x2, x3, by_one), d = __builtin_shuffle(x2, x3, by_one + 2);
    words[0] = __builtin_shuffle(a, c, by_two);
    words[1] = __builtin_shuffle(a, c, by_two + 2);
    words[2] = __builtin_shuffle(b, d, by_two);
    words[3] = __builtin_shuffle(b, d, by_two + 2);
    next();
  }
#if defined(__AVX2__) && !defined(__AVX512F__)
  // fp16 is widened from half a vector: words[w] = value 2 w of all rows, then their value 2 w + 1.
  INLINE void turn(f32v* words, f16) {
    const __m256i x0 = _mm256_castps_si256(part(0)), x1 = _mm256_castps_si256(part(1));
    const __m256i x2 = _mm256_castps_si256(part(2)), x3 = _mm256_castps_si256(part(3));
    const __m256i a = _mm256_unpacklo_epi16(x0, x1), b = _mm256_unpackhi_epi16(x0, x1);
    const __m256i c = _mm256_unpacklo_epi16(x2, x3), d = _mm256_unpackhi_epi16(x2, x3);
    const __m256i fours[4] = {_mm256_unpacklo_epi32(a, c), _mm256_unpackhi_epi32(a, c), _mm256_unpacklo_epi32(b, d),
                              _mm256_unpackhi_epi32(b, d)};
    UNROLL for (int w = 0; w < 4; w++) words[w] = _mm256_castsi256_ps(_mm256_permute4x64_epi64(fours[w], 0xd8));
    next();
  }
#elif defined(__AVX512BW__)
  INLINE void turn(f32v* words, f16) {
    __m512i x[4];
    UNROLL for (int i = 0; i < 4; i++) x[i] = bitcast<__m512i>(part(i));
    const __m512i a = _mm512_unpacklo_epi16(x[0], x[1]), b = _mm512_unpackhi_epi16(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi16(x[2], x[3]), d = _mm512_unpackhi_epi16(x[2], x[3]);
    const __m512i fours[4] = {_mm512_unpacklo_epi32(a, c), _mm512_unpackhi_epi32(a, c), _mm512_unpacklo_epi32(b, d),
                              _mm512_unpackhi_epi32(b, d)};
    const __m512i even_first = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    UNROLL for (int w = 0; w < 4; w++) words[w] = bitcast<f32v>(_mm512_permutexvar_epi64(even_first, fours[w]));
    next();
  }
#endif
  // Opaque, lest the compiler keep a pointer to each row and run out of registers.
  INLINE void next() { UNROLL for (int n = 0; n < LANES / 4; n++) asm("" : "+r"(at[n] += 16)); }
};
// Value i of a word.
INLINE f32v value(f32v word, int, float) { return word; }
INLINE f32v value(f32v pair, int i, bf16) {
  return bitcast<f32v>(i ? bitcast<i32v>(pair) & (int32_t)0xffff0000 : bitcast<i32v>(pair) << 16);
}
INLINE f32v value(f32v four, int i, i8) { return to_float(bitcast<i32v>(four) << (24 - 8 * i) >> 24); }
INLINE f32v value(f32v pair, int i, f16) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i x = _mm256_castps_si256(pair);
  return _mm256_cvtph_ps(i ? _mm256_extracti128_si256(x, 1) : _mm256_castsi256_si128(x));
#elif defined(__AVX512BW__)
  const __m512i x = bitcast<__m512i>(pair);
  return bitcast<f32v>(_mm512_cvtph_ps(i ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x)));
#else
  return widen(__builtin_convertvector(bitcast<u32v>(pair) >> 16 * i, u16v), f16{});
#endif
}
// One dim of all rows.
template <class T>
INLINE f32v column(const Rows<T>& rows, int d) {
  float x[LANES];
  for (int i = 0; i < LANES; i++) x[i] = load1(rows.at + i * rows.stride + d);
  return rows.scaled(rows.scales(), load(x));
}
// The same of PER_LANE dims, of which `dim` are there.
template <class T>
INLINE f32v column_of_lanes(const Rows<T>& rows, int d, int dim) {
  if constexpr (!PAIRS) return column(rows, d);
  uint32_t x[LANES] = {};
  for (int i = 0; i < LANES; i++) memcpy(x + i, rows.at + i * rows.stride + d, min(dim - d, 2) * sizeof(T));
  return load((const float*)x);
}

// Rows that lie apart are no stream that a machine would see.
template <class T>
INLINE void prefetch_row(const T* row, int dim) {
  for (int at = 0; at < dim * (int)sizeof(T); at += 64) __builtin_prefetch((const char*)row + at);
}
// A group, or one so many groups ahead.
template <class T>
INLINE void prefetch_rows(const Rows<T>& rows, int dim, int ahead) {
  for (int i = 0; i < LANES; i++) prefetch_row(rows.at + (ahead * LANES + i) * rows.stride, dim);
}
// Two groups by and by, as keys are turned: so many lines each time. Where rows follow one another in memory they are
// fetched in order, which a machine's own prefetcher joins; else a quarter of a line of each row.
template <class T>
struct Lines {
  const char *at, *other;
  int64_t stride;
  bool whole;
  int turns = 0;

  Lines(const Rows<T>& rows, const Rows<T>& others, int dim)
      : at((const char*)rows.at),
        other((const char*)others.at),
        stride(rows.stride * (int64_t)sizeof(T)),
        whole(stride == dim * (int64_t)sizeof(T) && other == at + LANES * stride) {}
  INLINE void fetch() {
    if (whole) {
      UNROLL for (int i = 0; i < LANES / 2; i++) __builtin_prefetch(at + i * 64, 0, 2);
      at += LANES / 2 * 64;
      return;
    }
    UNROLL for (int i = 0; i < LANES / 4; i++) __builtin_prefetch(at + i * stride, 0, 2);
    UNROLL for (int i = 0; i < LANES / 4; i++) __builtin_prefetch(other + i * stride, 0, 2);
    const int64_t on = ++turns % 4 ? LANES / 4 * stride : 64 - LANES / 4 * 3 * stride;
    at += on;
    other += on;
  }
};
// Loads every line of a group.
template <class T>
INLINE void touch_rows(const Rows<T>& rows, int dim) {
  for (int i = 0; i < LANES; i++)
    for (int at = 0; at < dim * (int)sizeof(T); at += 64) {
      const char byte = ((const char*)(rows.at + i * rows.stride))[at];
      asm volatile("" : : "r"(byte));
    }
}

// kt[d][LANES] = LANES keys, a lane of PER_LANE dims after another.
template <class T>
NOINLINE void pack_k(const Rows<T>& k, int dim, float* kt) {
  prefetch_rows(k, dim, 2);
  Quads quads(k);
  const f32v scales = k.scales();
  int d = 0;
  for (; d + DIMS<T> <= dim; d += DIMS<T>) {
    f32v words[4];
    quads.turn(words, T{});
    if constexpr (PAIRS) {
      UNROLL for (int i = 0; i < 4; i++) store(kt + (d / 2 + i) * LANES, words[i]);
    } else {
      UNROLL for (int i = 0; i < DIMS<T>; i++)
          store(kt + (d + i) * LANES, k.scaled(scales, value(words[i / PER_WORD<T>], i % PER_WORD<T>, T{})));
    }
  }
  for (; d < dim; d += PER_LANE) store(kt + d / PER_LANE * LANES, column_of_lanes(k, d, dim));
}

// Value j of a group and, with pairs, the one after it, from dim d on, n of them; those outside of begin .. end are
// zero.
template <class T>
INLINE f32v value_lanes(const Rows<T>& v, int j, int begin, int end, int d, int n) {
  const T* row = v.at + j * v.stride + d;
  if constexpr (PAIRS) {
    static constexpr T none[LANES] = {};
    return bitcast<f32v>(load_two(j < begin ? none : row, j + 1 < end ? row + v.stride : nullptr, n));
  } else {
    return v.scaled(j, n == LANES ? load(row) : load(row, n));
  }
}

// vt[d / LANES][key][LANES] = values begin .. end, a lane of PER_LANE keys after another. By columns: vectors of one
// key lie CHUNK LANES floats apart, in few sets of L1.
template <class T>
NOINLINE void pack_v(const Rows<T>& v, int begin, int end, int dim, float* vt) {
  prefetch_rows(v, dim, 2);
  auto column = [&](int d, int n) __attribute__((always_inline)) {
    float* to = vt + d * CHUNK / PER_LANE;
    for (int j = begin / PER_LANE * PER_LANE; j < end; j += PER_LANE)
      store(to + j / PER_LANE * LANES, value_lanes(v, j, begin, end, d, n));
  };
  int d = 0;
  for (; d + LANES <= dim; d += LANES) column(d, LANES);
  if (d < dim) column(d, dim - d);
}

// A row of dtype T in the cache's dtype C.
template <class T, class C>
void write_row(C* to, const T* from, int D) {
  for (int d = 0; d < D; d += LANES) store(to + d, load(from + d, min(LANES, D - d)), min(LANES, D - d));
}
template <class T>
void write_row(T* to, const T* from, int D) {
  memcpy(to, from, D * sizeof(T));
}

// A row as whole numbers and their scale: scale = amax / 127, x * (127 / amax) rounded to nearest even. An amax below
// 2^-120 counts as zero; a value that isn't finite makes the scale NaN.
template <class T>
float quantize_row(i8* to, const T* from, int D) {
  i32v most = {};  // the largest magnitude by its bits, so that infinity and NaN come out on top
  for (int d = 0; d < D; d += LANES) {
    const i32v bits = bitcast<i32v>(abs(load(from + d, min(LANES, D - d))));
    most = bits > most ? bits : most;
  }
  const float amax = max(bitcast<f32v>(most > 0x7f800000 ? i32v{} + 0x7f800000 : most));
  const bool usable = amax >= 0x1p-120f && amax < __builtin_inff();
  const float inverse = usable ? 127.0f / amax : 0.0f;
  for (int d = 0; d < D; d += LANES) {
    const f32v x = load(from + d, min(LANES, D - d)) * inverse;
    const i32v whole = usable ? __builtin_convertvector(round(x), i32v) : i32v{};
    const i8v bytes = __builtin_convertvector(whole, i8v);
    memcpy(to + d, &bytes, min(LANES, D - d));
  }
  return usable ? amax / 127.0f : amax < 1.0f ? 0.0f : __builtin_nanf("");
}

}  // namespace attn
}  // namespace gptfast::ISA
