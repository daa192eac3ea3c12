#include "kernels.h"
#include "vec.h"

namespace gptfast::ISA {

namespace {

constexpr int CHAINS = 12;   // independent accumulators: latency 4 x 2 pipes = 8 hide it, and 12 + 2 fit 16 registers
constexpr int STREAMS = 4;   // one stream is bound by a core's outstanding misses, four by the memory
constexpr int LINE = 64;     // bytes of a cache line
constexpr int AHEAD = 1024;  // bytes that a stream prefetches ahead

// acc = acc * x + y over registers: CHAINS * LANES multiply-adds a turn.
void multiply_add(float* sink, int64_t turns) {
  const f32v x = load(sink), y = load(sink + LANES);
  f32v acc[CHAINS];
  for (int i = 0; i < CHAINS; i++) acc[i] = x + (float)i;
  for (; turns > 0; turns--)
    for (f32v& a : acc) a = fma(a, x, y);
  f32v total = {};
  for (f32v a : acc) total += a;
  store(sink, total);
}

#if defined(__AVX512F__)
// In assembly: this file is compiled without VNNI and BF16. By value, or gcc keeps the accumulators in memory (half the
// speed).
INLINE i32v vpdpbusd(i32v acc, f32v x, f32v y) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y));
  return acc;
}
INLINE f32v vdpbf16ps(f32v acc, f32v x, f32v y) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y));
  return acc;
}
void dot_bf16(float* sink, int64_t turns) {
  const f32v x = load(sink), y = load(sink + LANES);
  f32v acc[CHAINS];
  for (int i = 0; i < CHAINS; i++) acc[i] = splat((float)i);
  for (; turns > 0; turns--)
    for (f32v& a : acc) a = vdpbf16ps(a, x, y);
  f32v total = {};
  for (f32v a : acc) total += a;
  store(sink, total);
}
void dot_vnni(float* sink, int64_t turns) {
  const f32v x = load(sink), y = load(sink + LANES);
  i32v acc[CHAINS];
  for (int i = 0; i < CHAINS; i++) acc[i] = splat(i);
  for (; turns > 0; turns--)
    for (i32v& a : acc) a = vpdpbusd(a, x, y);
  i32v total = {};
  for (i32v a : acc) total += a;
  store(sink, bitcast<f32v>(total));
}
#endif

// Without VNNI: 8-bit products added in pairs and pairs of pairs, else 16-bit ones in pairs, else 32-bit ones.
#if defined(__AVX2__)
constexpr int LANE_PRODUCTS = 4;
#elif defined(__SSE2__)
constexpr int LANE_PRODUCTS = 2;
#else
constexpr int LANE_PRODUCTS = 1;
#endif
INLINE i32v dot(i32v acc, i32v y) {
#if defined(__AVX512F__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)acc, (__m512i)y);
  return acc + (i32v)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)acc, (__m256i)y);
  return acc + (i32v)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__SSE2__)
  return acc + (i32v)_mm_madd_epi16((__m128i)acc, (__m128i)y);
#else
  return acc + acc * y;
#endif
}
void dot_generic(float* sink, int64_t turns) {
  const i32v x = bitcast<i32v>(load(sink)), y = bitcast<i32v>(load(sink + LANES));
  i32v acc[CHAINS];
  for (int i = 0; i < CHAINS; i++) acc[i] = x + i;
  for (; turns > 0; turns--)
    for (i32v& a : acc) a = dot(a, y);  // its own operand, or the product would leave the loop
  i32v total = {};
  for (i32v a : acc) total += a;
  store(sink, bitcast<f32v>(total));
}

// Reads `share` bytes (a multiple of STREAMS * LINE) and, with a destination, writes them there.
template <bool COPY>
i32v stream(const char* from, char* to, int64_t share, i32v acc) {
  const int64_t each = share / STREAMS;
  for (int64_t offset = 0; offset < each; offset += LINE)
    for (int s = 0; s < STREAMS; s++) {
      const char* line = from + s * each + offset;
      __builtin_prefetch(line + AHEAD);
      for (int b = 0; b < LINE; b += VEC_BYTES) {
        const f32v v = load((const float*)(line + b));
        if constexpr (COPY)
          store((float*)(to + s * each + offset + b), v);
        else
          acc ^= bitcast<i32v>(v);
      }
    }
  return acc;
}

// One of `parts` equal parts of the work; returns how much that was.
double part_of_ceiling(const Ceilings& a, int64_t part, int64_t parts) {
  float* sink = (float*)a.sink + part * 2 * LANES;
  const double chains = 2.0 * CHAINS * LANES * a.turns;
#if defined(__AVX512F__)
  if (a.what == Ceilings::BF16 && __builtin_cpu_supports("avx512bf16")) {
    dot_bf16(sink, a.turns);
    return chains * 2;
  }
#endif
  if (a.what == Ceilings::FP32 || a.what == Ceilings::BF16) {
    multiply_add(sink, a.turns);
    return chains;
  }
  if (a.what == Ceilings::INT8) {
#if defined(__AVX512F__)
    if (__builtin_cpu_supports("avx512vnni")) {
      dot_vnni(sink, a.turns);
      return chains * 4;
    }
#endif
    dot_generic(sink, a.turns);
    return chains * LANE_PRODUCTS;
  }
  const bool copy = a.what == Ceilings::COPY;
  const int64_t share = a.bytes / parts / (STREAMS * LINE) * (STREAMS * LINE), start = part * share;
  i32v acc = {};
  for (int64_t turn = 0; turn < a.turns; turn++)
    acc = copy ? stream<true>((const char*)a.data + start, (char*)a.copy + start, share, acc)
               : stream<false>((const char*)a.data + start, nullptr, share, acc);
  store(sink, bitcast<f32v>(acc));
  return (copy ? 2.0 : 1.0) * share * a.turns;
}

}  // namespace

// Work that meets one limit of the machine and nothing else, to be timed from outside. *work says how much of it was
// done: operations (a multiply-add counts two) or bytes.
void ceilings(const Ceilings& a, Worker& worker) {
  worker.each(worker.count, [&](int64_t part) {
    const double done = part_of_ceiling(a, part, worker.count);
    if (part == 0) *a.work = done * worker.count;
  });
}

}  // namespace gptfast::ISA
