// One vector type, as wide as the instruction set this file is being compiled for, and the few operations on it that
// the compiler's vector extensions don't spell. Kernels are written once in terms of it.
//
// Everything here lives in the ISA's own namespace, and kernel sources use no std:: templates: an inline function
// shared by two instruction sets would be merged by the linker, and the wider copy may win on a machine that can't run
// it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VEC_BYTES 64
#elif defined(__AVX2__)
#define VEC_BYTES 32
#else
#define VEC_BYTES 16
#endif
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace gptfast::ISA {

constexpr int LANES = VEC_BYTES / 4;
typedef float f32v __attribute__((vector_size(VEC_BYTES)));
typedef int32_t i32v __attribute__((vector_size(VEC_BYTES)));
typedef uint32_t u32v __attribute__((vector_size(VEC_BYTES)));
typedef uint16_t u16v __attribute__((vector_size(VEC_BYTES / 2)));  // LANES stored 16-bit values

// Storage types: bits only. Arithmetic is fp32.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
INLINE T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
INLINE T max(T a, T b) {
  return a < b ? b : a;
}
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class To, class From>
INLINE To bitcast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

INLINE f32v splat(float x) {  // f32v{} + x would turn -0 into +0, and stay an addition
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#elif defined(__SSE2__)
  return _mm_set1_ps(x);
#else
  return x - f32v{};
#endif
}
INLINE i32v splat(int32_t x) { return i32v{} + x; }
INLINE i32v iota() {  // 0, 1, 2, ...
  i32v v;
  for (int i = 0; i < LANES; i++) v[i] = i;
  return v;
}
INLINE f32v select(i32v mask, f32v a, f32v b) { return mask ? a : b; }
INLINE f32v to_float(i32v v) { return __builtin_convertvector(v, f32v); }

// a * b + c. Rounded once where the machine has the instruction (every ISA but baseline x86), twice where it hasn't.
INLINE f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger (smaller) of each lane; where a lane of a is NaN, b's.
INLINE f32v max(f32v a, f32v b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
INLINE f32v min(f32v a, f32v b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
INLINE f32v abs(f32v v) { return bitcast<f32v>(bitcast<i32v>(v) & 0x7fffffff); }
INLINE f32v sqrt(f32v v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(v);
#else
  return vsqrtq_f32(v);
#endif
}

// Horizontal sum and maximum, always by halves: lane i + lane i + n/2, and again.
INLINE float sum(f32v v) {
#if defined(__AVX512F__)
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#elif defined(__AVX2__)
  __m256 h = v;
#endif
#if defined(__AVX2__)
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
INLINE float max(f32v v) {
#if defined(__AVX512F__)
  __m256 h = _mm256_max_ps(_mm512_extractf32x8_ps(v, 1), _mm512_castps512_ps256(v));
#elif defined(__AVX2__)
  __m256 h = v;
#endif
#if defined(__AVX2__)
  __m128 q = _mm_max_ps(_mm256_extractf128_ps(h, 1), _mm256_castps256_ps128(h));
  q = _mm_max_ps(_mm_movehl_ps(q, q), q);
  return _mm_cvtss_f32(_mm_max_ss(_mm_shuffle_ps(q, q, 1), q));
#else
  return max(max(v[0], v[2]), max(v[1], v[3]));
#endif
}

// Widening and rounding of the storage types; stores round to nearest even and keep NaN.
INLINE f32v widen(u16v h, bf16) {
#if defined(__AVX512F__)  // the compiler's own conversion goes through two halves
  return bitcast<f32v>(bitcast<u32v>(_mm512_cvtepu16_epi32(bitcast<__m256i>(h))) << 16);
#elif defined(__AVX2__)
  return bitcast<f32v>(bitcast<u32v>(_mm256_cvtepu16_epi32(bitcast<__m128i>(h))) << 16);
#else
  return bitcast<f32v>(__builtin_convertvector(h, u32v) << 16);
#endif
}
INLINE f32v widen(u16v h, f16) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(bitcast<__m256i>(h));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(bitcast<__m128i>(h));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(bitcast<uint16x4_t>(h)));
#else
  u32v u = __builtin_convertvector(h, u32v), mag = u & 0x7fff, sign = (u & 0x8000) << 16;
  u32v normal = (mag << 13) + (112u << 23);
  normal = mag >= 0x7c00 ? (mag << 13) | 0x7f800000u : normal;
  f32v small = bitcast<f32v>((mag << 13) + (113u << 23)) - 0x1p-14f;  // subnormal halves are exact in fp32
  return bitcast<f32v>((mag < 0x400 ? bitcast<u32v>(small) : normal) | sign);
#endif
}
// v with its upper half rounded to bf16; the lower half is what is left over.
INLINE u32v round_to_bf16(f32v v) {
#if defined(__AVX512F__)
  const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return bitcast<u32v>(_mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000)));
#elif defined(__AVX2__)  // NaN is known by one comparison of floats where one of whole numbers takes three instructions
  const u32v u = bitcast<u32v>(v), r = u + 0x7fff + ((u >> 16) & 1), quiet = u | 0x400000;
  return bitcast<u32v>(_mm256_blendv_ps(bitcast<__m256>(r), bitcast<__m256>(quiet), _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
#else
  const u32v u = bitcast<u32v>(v);
  return (u & 0x7fffffff) > 0x7f800000 ? u | 0x400000 : u + 0x7fff + ((u >> 16) & 1);
#endif
}
INLINE u16v narrow(f32v v, bf16) {
#if defined(__AVX512F__)
  return bitcast<u16v>(_mm512_cvtepi32_epi16(bitcast<__m512i>(round_to_bf16(v) >> 16)));
#elif defined(__AVX2__)
  const __m256i u = bitcast<__m256i>(round_to_bf16(v) >> 16);
  return bitcast<u16v>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(u, u), 8)));
#else
  return __builtin_convertvector(round_to_bf16(v) >> 16, u16v);
#endif
}
INLINE u16v narrow(f32v v, f16) {
#if defined(__AVX512F__)
  return bitcast<u16v>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  return bitcast<u16v>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  return bitcast<u16v>(vreinterpret_u16_f16(vcvt_f16_f32(v)));
#else
  u32v u = bitcast<u32v>(v), sign = (u >> 16) & 0x8000, mag = u & 0x7fffffff;
  u32v normal = (mag - (112u << 23) + 0xfff + ((mag >> 13) & 1)) >> 13;
  u32v small = bitcast<u32v>(bitcast<f32v>(mag) + 0.5f) - 0x3f000000u;  // the addition rounds at 2^-24
  u32v half = mag < (113u << 23) ? small : normal;
  half = mag >= 0x477ff000u ? u32v{} + 0x7c00u : half;
  half = mag > 0x7f800000u ? u32v{} + 0x7e00u : half;
  return __builtin_convertvector(half | sign, u16v);
#endif
}

// Loads and stores of LANES values of a storage type at any address.
INLINE f32v load(const float* p) {
  f32v v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, f32v v) { memcpy(p, &v, sizeof v); }
template <class T>
INLINE f32v load(const T* p) {
  u16v h;
  memcpy(&h, p, sizeof h);
  return widen(h, T{});
}
template <class T>
INLINE void store(T* p, f32v v) {
  u16v h = narrow(v, T{});
  memcpy(p, &h, sizeof h);
}

// The first n of LANES values, 0 <= n <= LANES: lanes beyond n load as zero and are not stored; no byte beyond is
// touched.
template <class T>
INLINE f32v load(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  else
    return widen(bitcast<u16v>(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p)), T{});
#else
  if (n == LANES) return load(p);
  T tail[LANES] = {};
  for (int i = 0; i < n; i++) tail[i] = p[i];
  return load(tail);
#endif
}
template <class T>
INLINE void store(T* p, f32v v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v);
  else
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), bitcast<__m256i>(narrow(v, T{})));
#else
  if (n == LANES) return store(p, v);
  T tail[LANES];
  store(tail, v);
  for (int i = 0; i < n; i++) p[i] = tail[i];
#endif
}
// The cache that what comes from memory is fetched to, as __builtin_prefetch counts: L2 with AVX-512, for a core has
// few places for lines on their way to L1 (Zen 4: linears of one row 1.05-1.6x, norms 1.1-1.2x, SwiGLU 1.3x).
constexpr int FETCHED_TO = VEC_BYTES == 64 ? 2 : 3;

// v, loaded once: GCC would otherwise make the load part of each instruction that uses v, and a machine that loads one
// vector a cycle then does nothing but load.
INLINE f32v in_register(f32v v) {
#if defined(__SSE2__)
  asm("" : "+v"(v));
#endif
  return v;
}
// All lanes: what a count of lanes is where the vector is whole.
struct All {};
template <class T>
INLINE f32v load(const T* p, All) {
  return load(p);
}
template <class T>
INLINE void store(T* p, f32v v, All) {
  store(p, v);
}
INLINE f32v first(f32v v, int n) { return iota() < n ? v : f32v{}; }  // the first n lanes; the others zero
INLINE f32v first(f32v v, All) { return v; }

INLINE i32v load_mask(const int32_t* p) {  // LANES lanes of all ones or zeros
  i32v v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Stores past the caches, for outputs larger than they are: p is aligned to the vector that is stored, and stream_end()
// follows before another thread may read.
constexpr int64_t STREAM_BYTES = 16 << 20;
INLINE bool aligned(const void* p) { return (uintptr_t)p % VEC_BYTES == 0; }
INLINE void stream(float* p, f32v v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, v);
#else
  store(p, v);
#endif
}
template <class T>
INLINE void stream(T* p, f32v v) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, bitcast<__m256i>(narrow(v, T{})));
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, bitcast<__m128i>(narrow(v, T{})));
#else
  store(p, v);
#endif
}
template <class T>
INLINE void stream(T* p, f32v v, All) {
  stream(p, v);
}
template <class T>
INLINE void stream(T* p, f32v v, int n) {  // the last elements of a row
  store(p, v, n);
}
// 2 * LANES neighbours as two vectors, in an order that costs least to make: as they lie, but for bf16 even and odd
// elements, one instruction each where widening takes two and narrowing three. Two{} is their count.
struct Pair {
  f32v a, b;
};
struct Two {};
INLINE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
INLINE Pair operator-(Pair x, float y) { return {x.a - y, x.b - y}; }
INLINE Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
INLINE Pair operator*(Pair x, float y) { return {x.a * y, x.b * y}; }
INLINE Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
INLINE Pair first(Pair v, Two) { return v; }
template <class T>
INLINE Pair load(const T* p, Two) {
  return {load(p), load(p + LANES)};
}
INLINE Pair load(const bf16* p, Two) {
  u32v u;
  memcpy(&u, p, sizeof u);
  return {bitcast<f32v>(u << 16), bitcast<f32v>(u & 0xffff0000u)};
}
// The upper half of a vector of pairs, rounded. Where From is bf16, v is made of bf16 values alone: the lower half of
// each NaN is zero then, and rounding by an addition doesn't carry out of it.
template <class From>
INLINE u32v upper_half(f32v v) {
  if constexpr (sizeof(From) > sizeof(bf16)) return round_to_bf16(v);
  const u32v u = bitcast<u32v>(v);
  return u + 0x7fff + ((u >> 16) & 1);
}
template <class From>
INLINE u32v narrow(Pair v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(From) == sizeof(bf16)) {  // all halves that stay at once, and the carries out of the others
    const __m512i a = _mm512_castps_si512(v.a), b = _mm512_castps_si512(v.b), odd = _mm512_set1_epi32(-0x10000);
    const __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, odd, 0xf8);  // x | y & z
    const __m512i low = _mm512_ternarylogic_epi32(_mm512_slli_epi32(b, 16), a, _mm512_set1_epi32(0xffff), 0xf8);
    const __m512i half = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x7ffe), high, _mm512_set1_epi16(1), 0xf8);
    const __m512i sum = _mm512_avg_epu16(low, half);  // (low + half + 1) / 2
    return bitcast<u32v>(_mm512_add_epi16(high, _mm512_srli_epi16(sum, 15)));
  }
#endif
  const u32v even = upper_half<From>(v.a) >> 16, odd = upper_half<From>(v.b);
#if defined(__AVX2__) && !defined(__AVX512F__)
  return bitcast<u32v>(_mm256_blend_epi16(bitcast<__m256i>(even), bitcast<__m256i>(odd), 0xaa));
#else
  return even | (odd & 0xffff0000u);
#endif
}
// From: the storage type of what a value was made of, the widest of them.
template <class From, class T>
INLINE void store_pair(T* p, Pair v) {
  store(p, v.a);
  store(p + LANES, v.b);
}
template <class From>
INLINE void store_pair(bf16* p, Pair v) {
  const u32v u = narrow<From>(v);
  memcpy(p, &u, sizeof u);
}
template <class From, class T>
INLINE void stream_pair(T* p, Pair v) {
  stream(p, v.a);
  stream(p + LANES, v.b);
}
template <class From>
INLINE void stream_pair(bf16* p, Pair v) {
  stream((float*)p, bitcast<f32v>(narrow<From>(v)));
}
template <class From, class T>
INLINE void put(bool past_caches, T* p, Pair v, Two) {
  past_caches ? stream_pair<From>(p, v) : store_pair<From>(p, v);
}
template <class From, class T, class N>
INLINE void put(bool past_caches, T* p, f32v v, N n) {
  past_caches ? stream(p, v, n) : store(p, v, n);
}
INLINE void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Calls f(c, n, u) for each vector of a row of C elements: it starts at c and has n lanes, All{} or the count of those
// that are left; u is the accumulator that a reduction adds it to, 0 .. 3. The order depends on C alone.
template <class F>
INLINE void each_vector(int64_t C, F f) {
  int64_t c = 0;
  for (; c + 4 * LANES <= C; c += 4 * LANES) {
    f(c, All{}, 0);
    f(c + LANES, All{}, 1);
    f(c + 2 * LANES, All{}, 2);
    f(c + 3 * LANES, All{}, 3);
  }
  for (; c + LANES <= C; c += LANES) f(c, All{}, 0);
  if (c < C) f(c, (int)(C - c), 0);
}
// The same with pairs, Two{} lanes each, where the row has them; u is the accumulator of a pair's first vector.
template <class F>
INLINE void each_pair(int64_t C, F f) {
  int64_t c = 0;
  for (; c + 4 * LANES <= C; c += 4 * LANES) {
    f(c, Two{}, 0);
    f(c + 2 * LANES, Two{}, 2);
  }
  for (; c + LANES <= C; c += LANES) f(c, All{}, 0);
  if (c < C) f(c, (int)(C - c), 0);
}
INLINE i32v load(const int32_t* p) {
  i32v v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE float load1(const float* p) { return *p; }
template <class T>
INLINE float load1(const T* p) {
  u16v h = {};
  h[0] = p->bits;
  return widen(h, T{})[0];
}

// One bit per lane of a comparison's result.
INLINE uint32_t bits(i32v mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(bitcast<__m512i>(mask));
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps(bitcast<__m256>(mask));
#elif defined(__SSE2__)
  return (uint32_t)_mm_movemask_ps(bitcast<__m128>(mask));
#else
  uint32_t b = 0;
  for (int i = 0; i < LANES; i++) b |= (uint32_t)(mask[i] & 1) << i;
  return b;
#endif
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// For each set of eight lanes, their numbers side by side, a byte each.
struct LaneLists {
  uint64_t of[256];
  constexpr LaneLists() : of{} {
    for (int set = 0; set < 256; set++)
      for (int lane = 0, n = 0; lane < 8; lane++)
        if (set >> lane & 1) of[set] |= (uint64_t)lane << 8 * n++;
  }
};
constexpr LaneLists LANE_LISTS;
#endif
// Stores the lanes whose bit is set side by side and returns how many; the rest of LANES values at p may be
// overwritten.
template <class V>
INLINE int compress(void* p, V v, uint32_t bits) {
#if defined(__AVX512F__)
  // Through a register: a compressing store to memory is slow on Zen 4.
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32((__mmask16)bits, bitcast<__m512i>(v)));
  return __builtin_popcount(bits);
#elif defined(__AVX2__)
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)LANE_LISTS.of[bits]));
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bitcast<__m256i>(v), order));
  return __builtin_popcount(bits);
#else
  uint32_t lanes[LANES], *out = (uint32_t*)p;
  memcpy(lanes, &v, sizeof v);
  int n = 0;
  for (; bits; bits &= bits - 1) out[n++] = lanes[__builtin_ctz(bits)];
  return n;
#endif
}

// Round to the nearest integer, ties to even, |v| < 2^22.
INLINE f32v round(f32v v) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(v, 8);
#elif defined(__AVX2__)
  return _mm256_round_ps(v, 8);
#else
  return (v + 0x1.8p23f) - 0x1.8p23f;
#endif
}

// 2^f for |f| <= 1/2, to 1 unit in the last place.
INLINE f32v exp2_fraction(f32v f) {
  f32v p = splat(1.535336188319500e-4f);
  p = fma(p, f, splat(1.339887440266574e-3f));
  p = fma(p, f, splat(9.618437357674640e-3f));
  p = fma(p, f, splat(5.550332471162809e-2f));
  p = fma(p, f, splat(2.402264791363012e-1f));
  p = fma(p, f, splat(6.931472028550421e-1f));
  return fma(p, f, splat(1.0f));
}
// 2^x to 1 unit in the last place for x <= 127.5; below -126 the result is 0 (no denormals), NaN stays NaN.
// A degree-6 polynomial on [-1/2, 1/2], then the exponent is added in the integer domain.
INLINE f32v exp2(f32v x) {
  f32v n = round(x), p = exp2_fraction(x - n);
  i32v e = __builtin_convertvector(n, i32v) << 23;
  return x < -126.0f ? f32v{} : bitcast<f32v>(bitcast<i32v>(p) + e);
}
// p * 2^n, n a whole number of -252 .. 254.
INLINE f32v scale_by_exp2(f32v p, f32v n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  const i32v i = __builtin_convertvector(n, i32v), half = i >> 1;
  return p * bitcast<f32v>((half + 127) << 23) * bitcast<f32v>((i - half + 127) << 23);
#endif
}
// e^x to 2 units in the last place; NaN stays NaN. x - n ln(2) in two parts, so that large x keeps its fraction.
INLINE f32v exp(f32v x) {
  x = min(splat(89.0f), max(splat(-104.0f), x));  // infinity, zero
  const f32v n = round(x * 1.44269504f);
  const f32v f = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  f32v p = splat(1.3843654e-3f);
  p = fma(p, f, splat(8.3741553e-3f));
  p = fma(p, f, splat(4.1668002e-2f));
  p = fma(p, f, splat(1.6666431e-1f));
  p = fma(p, f, splat(4.9999994e-1f));
  p = fma(p, f, splat(1.0f));
  return scale_by_exp2(fma(p, f, splat(1.0f)), n);
}

// 2^x to 2^-18, for what is rounded to 16 bits: half the instructions of exp. Infinity from 128 on, 0 below -151, NaN
// stays NaN.
INLINE f32v exp2_for_16_bits(f32v x) {
#if defined(__AVX512F__)
  const f32v f = _mm512_reduce_ps(x, 9), n = x;  // x - floor(x), 0 for infinities; scaling takes the floor itself
#else
  x = min(splat(130.0f), max(splat(-151.0f), x));
  const f32v n = round(x - 0.5f), f = x - n;
#endif
  f32v p = splat(1.353416778e-2f);  // the minimax of the relative error for 0 <= f <= 1
  p = fma(p, f, splat(5.201146007e-2f));
  p = fma(p, f, splat(2.414427549e-1f));
  p = fma(p, f, splat(6.930038333e-1f));
  return scale_by_exp2(fma(p, f, splat(1.000002623f)), n);
}

// A number known when compiling, as a value.
template <int n>
struct Int {
  static constexpr int value = n;
};

// Calls f with a value of the storage type that `dtype` names (kernels.h).
template <class F>
INLINE void with_storage(int dtype, F f) {
  if (dtype == 0)
    f(float{});
  else if (dtype == 1)
    f(bf16{});
  else
    f(f16{});
}

}  // namespace gptfast::ISA
