// gptfast/ops/sampling.py is the meaning. No sort of the vocabulary: one pass finds the maximum, at most one more the
// total mass, and a bound that provably holds all survivors leaves few candidates, which histograms over their keys cut
// exactly.
#include "kernels.h"
#include "vec.h"

namespace gptfast::ISA {

namespace {

constexpr int PARTS = 256;    // interleaved parts of a row whose maxima bound the k-th largest logit, k <= PARTS
constexpr int CHUNK = 2048;   // tokens whose masses are summed together
constexpr int BINS = 256;     // of a histogram over keys
constexpr double ALL = 33.0;  // no token more than 32 bits below the largest has a weight

typedef uint8_t u8v __attribute__((vector_size(LANES)));

// The candidates in the order of their ids, and what a row needs besides; all of one worker's scratch.
struct Buffers {
  float* row;        // (cols) the logits after bias, mask and penalties
  uint32_t* counts;  // (cols) how often each id comes in the history, 0 between rows
  uint64_t* chunk;   // (cols / CHUNK + 1) masses
  int32_t* id;
  uint32_t* key;      // larger = ranked earlier
  float *y, *weight;  // log2 of the weight; 2^32 * 2^y, whose integer part is the weight
  int64_t n;
};

INLINE f32v log2_weight(f32v logit, float top) { return max(splat(-40.0f), (logit - top) * 1.44269502f); }

// 2^(32 + y) for -40 <= y <= 0: every operation rounded by itself, as the page has it.
INLINE f32v scaled_exp2(f32v y) {
  f32v n = round(y), f = y - n, p = splat(1.5353362e-4f);
  p = p * f + 1.33988739e-3f;
  p = p * f + 9.61843692e-3f;
  p = p * f + 5.55033237e-2f;
  p = p * f + 2.40226477e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  return bitcast<f32v>(bitcast<i32v>(p) + ((__builtin_convertvector(n, i32v) + 32) << 23));
}
INLINE uint64_t integer(float weight) { return (uint64_t)(int64_t)weight; }

// Unsigned order of the key = order of the value; -0 counts as 0.
INLINE u32v ordered(f32v v) {
  i32v i = bitcast<i32v>(v + 0.0f);
  return bitcast<u32v>(i ^ ((i >> 31) | INT32_MIN));
}
INLINE float unordered(uint32_t key) { return bitcast<float>(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

INLINE uint64_t sum_lanes(u32v v) {
  uint32_t lanes[LANES];
  memcpy(lanes, &v, sizeof v);
  uint64_t s = 0;
  for (int i = 0; i < LANES; i++) s += lanes[i];
  return s;
}

// The next LANES values, those beyond n -inf.
template <class T>
INLINE f32v load_or_lowest(const T* p, int64_t n) {
  return n >= LANES ? load(p) : select(iota() < (int)n, load(p, (int)n), splat(-__builtin_inff()));
}

// The largest of V logits, NaN if any is NaN, and the largest of each part.
template <class T>
float largest(const T* l, int64_t V, float* parts) {
  constexpr int N = PARTS / LANES;
  f32v most[N];
  for (f32v& v : most) v = splat(-__builtin_inff());
  u32v magnitude = {};
  auto take = [&](f32v v, f32v& most) {
    u32v m = bitcast<u32v>(v) & 0x7fffffff;
    magnitude = m > magnitude ? m : magnitude;
    most = max(v, most);
  };
  int64_t c = 0;
  for (; c + PARTS <= V; c += PARTS) {
#pragma GCC unroll 16
    for (int u = 0; u < N; u++) take(load(l + c + u * LANES), most[u]);
  }
  for (int u = 0; c < V; c += LANES, u++) take(load_or_lowest(l + c, V - c), most[u]);
  memcpy(parts, most, sizeof most);
  for (int u = 1; u < N; u++) most[0] = max(most[0], most[u]);
  return bits((i32v)(magnitude > 0x7f800000u)) ? __builtin_nanf("") : max(most[0]);
}

// The lowest id of the largest logit; -1 if there is a NaN or +inf, or nothing but -inf.
template <class T>
int64_t argmax(const T* l, int64_t V) {
  constexpr int U = 4;
  f32v most[U];
  for (f32v& v : most) v = splat(-__builtin_inff());
  i32v at[U] = {};
  i32v nan = {};
  for (int64_t c = 0; c < V; c += U * LANES)
    for (int u = 0; u < U && c + u * LANES < V; u++) {
      f32v v = load_or_lowest(l + c + u * LANES, V - c - u * LANES);
      i32v better = v > most[u];
      nan |= v != v;
      most[u] = select(better, v, most[u]);
      at[u] = better ? splat((int32_t)c) : at[u];
    }
  if (bits(nan)) return -1;
  float best = -__builtin_inff();
  int64_t id = -1;
  for (int u = 0; u < U; u++)
    for (int i = 0; i < LANES; i++) {
      int64_t here = at[u][i] + u * LANES + i;
      if (most[u][i] > best || (most[u][i] == best && here < id)) best = most[u][i], id = here;
    }
  return best < __builtin_inff() ? id : -1;
}

// The mass of each chunk, their total, and of the tokens with weight >= 2^(32 - PIVOT[j]) at least above[j].
constexpr int PIVOTS = 5;
constexpr int PIVOT[PIVOTS] = {3, 6, 9, 12, 16};
template <class T>
uint64_t masses(const T* l, int64_t V, float temperature, float top, uint64_t* chunk, uint64_t* above) {
  uint64_t total = 0;
  for (int j = 0; above && j < PIVOTS; j++) above[j] = 0;
  for (int64_t begin = 0; begin < V; begin += CHUNK) {
    const int64_t end = min(begin + CHUNK, V);
    u32v high = {}, low = {}, high_above[PIVOTS] = {};  // weight = 65536 * high + low, high <= 65536
    for (int64_t c = begin; c < end; c += LANES) {
      f32v w = scaled_exp2(log2_weight(load_or_lowest(l + c, end - c) / temperature, top));
      i32v h = __builtin_convertvector(w * 0x1p-16f, i32v);
      high += bitcast<u32v>(h);
      low += bitcast<u32v>(__builtin_convertvector(w - to_float(h) * 0x1p16f, i32v));
      if (above)
        for (int j = 0; j < PIVOTS; j++)
          high_above[j] += bitcast<u32v>(w >= (float)(1ull << (32 - PIVOT[j])) ? h : i32v{});
    }
    total += * chunk++ = (sum_lanes(high) << 16) + sum_lanes(low);
    for (int j = 0; above && j < PIVOTS; j++) above[j] += sum_lanes(high_above[j]) << 16;
  }
  return total;
}

// A logit such that all those whose y >= -bits are no less. y's three roundings and this one's are under 2^-21 (|top| +
// bits).
float bound_of_bits(double bits, float top, float temperature) {
  double bound = (top - bits * 0.693147181 - 0x1p-20 * (__builtin_fabs(top) + bits)) * temperature;
  return (float)max(bound, -3.4028234e38);
}

// Collects the tokens with logits >= bound as candidates.
template <class T>
void collect(const T* l, int64_t V, float bound, float temperature, float top, Buffers& b) {
  int64_t n = 0;
  auto take = [&](int64_t c, f32v v, uint32_t in) {
    compress(b.id + n, iota() + (int32_t)c, in);
    n += compress(b.y + n, v, in);
  };
  int64_t c = 0;
  for (; c + 4 * LANES <= V; c += 4 * LANES) {
    f32v v[4];
    uint32_t in[4];
    for (int u = 0; u < 4; u++) v[u] = load(l + c + u * LANES), in[u] = bits(v[u] >= bound);
    if (in[0] | in[1] | in[2] | in[3])
      for (int u = 0; u < 4; u++)
        if (in[u]) take(c + u * LANES, v[u], in[u]);
  }
  for (; c < V; c += LANES) {
    f32v v = load_or_lowest(l + c, V - c);
    take(c, v, bits(v >= bound));
  }
  b.n = n;
  for (int64_t i = 0; i < n; i += LANES) {
    f32v v = load(b.y + i) / temperature, y = log2_weight(v, top);
    u32v key = ordered(v);
    memcpy(b.key + i, &key, sizeof key);
    store(b.y + i, y);
    store(b.weight + i, scaled_exp2(y));
  }
}

struct Cut {
  uint32_t key;     // the last key that is kept
  uint64_t budget;  // what is left of the budget for the candidates with that key
};

// Where the measure of the keys, taken from the largest down, reaches the budget: a histogram, then one of its bin, ...
template <class Measure>
Cut find_cut(const uint32_t* key, int64_t n, uint64_t budget, Measure measure) {
  uint32_t low = UINT32_MAX, high = 0;
  for (int64_t i = 0; i < n; i++) low = min(low, key[i]), high = max(high, key[i]);
  for (;;) {
    int shift = 0;
    while ((high - low) >> shift >= BINS) shift++;
    uint64_t bins[BINS] = {};
    for (int64_t i = 0; i < n; i++)
      if (key[i] - low <= high - low) bins[(key[i] - low) >> shift] += measure(i);
    uint32_t bin = (high - low) >> shift;
    while (bin > 0 && bins[bin] < budget) budget -= bins[bin--];
    low += bin << shift;
    if (shift == 0) return {low, budget};
    high = low + min(high - low, (1u << shift) - 1);
  }
}

// Keeps the candidates that rank before the budget is used up.
template <class Measure>
void keep_first(Buffers& b, uint64_t budget, Measure measure) {
  Cut cut = find_cut(b.key, b.n, budget, measure);
  int64_t n = 0;
  for (int64_t i = 0; i < b.n; i++) {
    const bool tie = b.key[i] == cut.key;
    if (b.key[i] < cut.key || (tie && cut.budget == 0)) continue;
    if (tie) cut.budget -= min(cut.budget, measure(i));
    b.id[n] = b.id[i], b.key[n] = b.key[i], b.y[n] = b.y[i], b.weight[n] = b.weight[i];
    n++;
  }
  b.n = n;
}

uint64_t total_mass(const Buffers& b) {
  uint64_t total = 0;
  for (int64_t i = 0; i < b.n; i++) total += integer(b.weight[i]);
  return total;
}

// The budget of a nucleus: p of the total, in units of 2^-32, and at least one token.
uint64_t nucleus(float p, uint64_t total) {
  return max((uint64_t)1, (uint64_t)(((unsigned __int128)(uint64_t)(p * 0x1p32) * total) >> 32));
}

void keep_typical(Buffers& b, float p) {
  auto surprise = [&](int64_t i) { return (int64_t)(b.y[i] * -0x1p20f); };
  uint64_t surplus = 0, total = total_mass(b);
  for (int64_t i = 0; i < b.n; i++) surplus += integer(b.weight[i]) * (uint64_t)surprise(i) >> 12;
  const int64_t mean = (int64_t)((double)(int64_t)surplus / (double)(int64_t)total * 0x1p12);
  for (int64_t i = 0; i < b.n; i++) {
    int64_t away = surprise(i) - mean;
    b.key[i] = ~(uint32_t)(away < 0 ? -away : away);
  }
  keep_first(b, nucleus(p, total), [&](int64_t i) { return integer(b.weight[i]); });
}

// One row's parameters.
struct Parameters {
  float temperature, top_p, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty;
  uint64_t top_k, seed, step;
  uint32_t stream;
};

Parameters parameters(const Sample& a, int64_t r) {
  auto real = [&](int i) { return a.per_row[i] ? ((const float*)a.per_row[i])[r] : a.reals[i]; };
  auto integer = [&](int i, int64_t all) {
    return (uint64_t)(a.per_row[7 + i] ? ((const int64_t*)a.per_row[7 + i])[r] : all);
  };
  return {real(0),
          real(1),
          real(2),
          real(3),
          real(4),
          real(5),
          real(6),
          integer(0, a.top_k),
          integer(1, a.seed),
          integer(2, a.step),
          (uint32_t)integer(3, a.stream)};
}

// floor(total * r / 2^64), r = word0 | word1 << 32 of Philox4x32-10 (gptfast/ops/philox.py).
uint64_t uniform_below(uint64_t total, const Parameters& p) {
  uint32_t c0 = (uint32_t)p.step, c1 = (uint32_t)(p.step >> 32), c2 = p.stream, c3 = 0;
  uint32_t k0 = (uint32_t)p.seed, k1 = (uint32_t)(p.seed >> 32);
  for (int i = 0; i < 10; i++) {
    const uint64_t p0 = (uint64_t)c0 * 0xD2511F53, p1 = (uint64_t)c2 * 0xCD9E8D57;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return (uint64_t)(((unsigned __int128)((uint64_t)c1 << 32 | c0) * total) >> 64);
}

struct Choice {
  int64_t id;  // -1: none
  uint64_t weight, total;
};

// The draw from all tokens: the chunk that holds it by the chunks' masses, then the token in there.
template <class T>
Choice draw_from_all(const T* l, int64_t V, const Parameters& p, float top, Buffers& b) {
  const uint64_t total = masses(l, V, p.temperature, top, b.chunk, nullptr);
  uint64_t left = uniform_below(total, p);
  int64_t begin = 0;
  for (; left >= b.chunk[begin]; begin++) left -= b.chunk[begin];
  begin *= CHUNK;
  for (int64_t c = begin;; c += LANES) {
    float w[LANES];
    store(w, scaled_exp2(log2_weight(load_or_lowest(l + c, V - c) / p.temperature, top)));
    for (int i = 0; i < LANES; i++) {
      if (left < integer(w[i])) return {c + i, integer(w[i]), total};
      left -= integer(w[i]);
    }
  }
}

Choice draw_from_candidates(const Buffers& b, const Parameters& p) {
  const uint64_t total = total_mass(b);
  uint64_t left = uniform_below(total, p);
  for (int64_t i = 0;; i++) {
    const uint64_t w = integer(b.weight[i]);
    if (left < w) return {b.id[i], w, total};
    left -= w;
  }
}

template <class T>
Choice choose(const T* l, int64_t V, const Parameters& p, Buffers& b) {
  if (p.temperature == 0) return {argmax(l, V), 1, 1};
  float parts[PARTS];
  const float most = largest(l, V, parts), top = most / p.temperature;
  if (!(top < __builtin_inff() && top > -__builtin_inff())) return {-1, 0, 0};
  const uint64_t least_weight = (uint64_t)(p.min_p * 0x1p32);
  if (p.top_k == 0 && p.top_p >= 1 && p.typical_p >= 1 && least_weight == 0) return draw_from_all(l, V, p, top, b);

  auto count = [](int64_t) { return (uint64_t)1; };
  auto mass = [&](int64_t i) { return integer(b.weight[i]); };
  uint64_t budget = 0;  // of top-p; 0 = after top-k
  float bound = bound_of_bits(ALL, top, p.temperature);
  if (p.top_k > 0 && p.top_k <= PARTS) {
    uint32_t keys[PARTS];
    for (int i = 0; i < PARTS; i += LANES) {
      u32v key = ordered(load(parts + i));
      memcpy(keys + i, &key, sizeof key);
    }
    // No fewer than top_k logits are >= their k-th part's; a logit that ties with it after the division is at most two
    // units in the last place (normal or not) below.
    const double kth = unordered(find_cut(keys, PARTS, p.top_k, count).key);
    bound = max(bound, (float)max(kth - __builtin_fabs(kth) * 0x1p-22 - p.temperature * 0x1p-148, -3.4028234e38));
  } else if (p.top_k == 0 && p.top_p < 1) {
    uint64_t above[PIVOTS];
    budget = nucleus(p.top_p, masses(l, V, p.temperature, top, b.chunk, above));
    for (int j = PIVOTS - 1; j >= 0 && above[j] >= budget; j--)
      bound = bound_of_bits(PIVOT[j] + 0.01, top, p.temperature);
  } else if (p.top_k == 0 && p.typical_p >= 1) {
    bound = bound_of_bits(min(ALL, 0.01 - __builtin_log2(p.min_p)), top, p.temperature);
  }
  collect(l, V, bound, p.temperature, top, b);

  if (p.top_k > 0 && p.top_k < (uint64_t)b.n) keep_first(b, p.top_k, count);
  if (p.top_p < 1) keep_first(b, budget ? budget : nucleus(p.top_p, total_mass(b)), mass);
  if (least_weight) {
    int64_t n = 0;
    for (int64_t i = 0; i < b.n; i++)
      if (mass(i) >= least_weight) b.id[n] = b.id[i], b.y[n] = b.y[i], b.weight[n] = b.weight[i], n++;
    b.n = n;
  }
  if (p.typical_p < 1) keep_typical(b, p.typical_p);
  return draw_from_candidates(b, p);
}

// The logits after bias, mask and penalties.
template <class T>
const float* processed(const Sample& a, int64_t r, const Parameters& p, Buffers& b) {
  const T* l = (const T*)a.logits + r * a.logits_stride;
  for (int64_t c = 0; c < a.cols; c += LANES) {
    const int n = (int)min((int64_t)LANES, a.cols - c);
    f32v v = load(l + c, n);
    if (a.logit_bias) v += load(a.logit_bias + r * a.bias_stride + c, n);
    if (a.mask) {
      u8v allowed = {};
      memcpy(&allowed, a.mask + r * a.mask_stride + c, (size_t)n);
      v = select(__builtin_convertvector(allowed, i32v) != 0, v, splat(-__builtin_inff()));
    }
    store(b.row + c, v, n);
  }
  if (!a.history) return b.row;
  constexpr uint32_t SEEN = 1u << 31;
  const int64_t* history = a.history + r * a.history_cols;
  const int64_t prompt = a.prompt_lengths ? a.prompt_lengths[r] : 0;
  auto is_token = [&](int64_t id) { return id >= 0 && id < a.cols; };
  for (int64_t i = 0; i < a.history_cols; i++)
    if (is_token(history[i])) b.counts[history[i]] = (b.counts[history[i]] + (i >= prompt)) | SEEN;
  for (int64_t i = 0; i < a.history_cols; i++) {
    if (!is_token(history[i]) || !b.counts[history[i]]) continue;
    float& x = b.row[history[i]];
    const float times = (float)(b.counts[history[i]] & ~SEEN);
    b.counts[history[i]] = 0;
    x = x > 0 ? x / p.repetition_penalty : x * p.repetition_penalty;
    if (times > 0) x -= p.presence_penalty + p.frequency_penalty * times;
  }
  return b.row;
}

// ln(sum(exp(l - most))): fp32 over 512 tokens, then fp64.
template <class T>
double log_sum_exp(const T* l, int64_t V, float most) {
  double total = 0;
  for (int64_t begin = 0; begin < V; begin += 512) {
    f32v s = {};
    for (int64_t c = begin; c < min(begin + 512, V); c += LANES) s += exp(load_or_lowest(l + c, V - c) - most);
    total += sum(s);
  }
  return __builtin_log(total);
}

template <class T>
float raw_logprob(const T* l, int64_t V, int64_t id) {
  float parts[PARTS];
  const float most = largest(l, V, parts);
  return (float)((double)load1(l + id) - most - log_sum_exp(l, V, most));
}

}  // namespace

void sample(const Sample& a, Worker& worker) {
  const int64_t stride = ceil_div(a.cols, 16) * 16 + 4 * LANES;
  const size_t floats = (size_t)stride * sizeof(float), chunks = (size_t)(a.cols / CHUNK + 1) * sizeof(uint64_t);
  char* scratch = (char*)worker.scratch(6 * floats + chunks);
  Buffers b = {(float*)scratch,
               (uint32_t*)(scratch + floats),
               (uint64_t*)(scratch + 6 * floats),
               (int32_t*)(scratch + 2 * floats),
               (uint32_t*)(scratch + 3 * floats),
               (float*)(scratch + 4 * floats),
               (float*)(scratch + 5 * floats),
               0};
  if (a.history) memset(b.counts, 0, floats);
  worker.each(a.rows, [&](int64_t r) {
    const Parameters p = parameters(a, r);
    with_storage(a.dtype, [&](auto t) {
      using T = decltype(t);
      const T* l = (const T*)a.logits + r * a.logits_stride;
      const Choice chosen = a.logit_bias || a.mask || a.history ? choose(processed<T>(a, r, p, b), a.cols, p, b)
                                                                : choose(l, a.cols, p, b);
      a.ids[r] = chosen.id;
      if (!a.logprobs) return;
      a.logprobs[r] = chosen.id < 0 ? __builtin_nanf("")
                      : a.processed ? (float)__builtin_log((double)chosen.weight / (double)chosen.total)
                                    : raw_logprob(l, a.cols, chosen.id);
    });
  });
}

}  // namespace gptfast::ISA
