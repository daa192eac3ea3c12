#include "attention_few.h"
#include "attention_head.h"
#include "attention_memory.h"
#include "attention_rows.h"

// Attention without ever storing Sq x Sk. The query heads of a KV head are packed into the rows of a tile (row r is
// query r / G, head r % G, G = H / Hk), keys come in chunks of CHUNK counted from the first key, and each row merges
// its chunks in that order. Work is dealt out as strips of tiles (each packs a chunk of K and V once for all its
// tiles), or, where there are too few of those, as single chunks whose partial results are merged in order afterwards:
// the same bits.
namespace gptfast::ISA {

namespace {

using namespace attn;

constexpr int TILES = 16, KEPT_TILES = 4;  // of a strip, at most; and where its head's packed chunks are kept
constexpr int STRIP_BYTES = 512 << 10;     // of a strip's rows: they share the L2 with a chunk of K and V

// The most chunks of keys that a sequence has.
int longest(const Attention& a) {
  int chunks = 0;
  for (int64_t b = 0; b < a.B; b++) chunks = max(chunks, (int)ceil_div(sequence(a, b).k_len, CHUNK));
  return chunks;
}

// Chunks first .. last of the tiles of a strip, in order.
template <class T, class C>
void run_strip(const Head<T, C>& head, Tile* tiles, int count, int first, int last, Scratch& x) {
  const Tile& end = tiles[count - 1];
  const int low = tiles[0].low[0], high = end.high[end.rows - 1];
  first = max(first, low / CHUNK);
  last = min(last, (int)ceil_div(high, CHUNK));
  for (int c = first; c < last; c++) {
    const int from = max(low - c * CHUNK, 0), to = min(high - c * CHUNK, CHUNK);
    if (from >= to) continue;
    const int begin = from / LANES, end = (int)ceil_div(to, LANES);
    if (tiles[0].few) {
      Rows<C> k[CHUNK / LANES], v[CHUNK / LANES];
      float* values = x.packs + Scratch::copies(head.D);
      x.forget();
      for (int g = begin; g < end; g++) {
        k[g] = head.keys_of(c, g, from, to, x.packs + g * LANES * (head.D + 16));
        v[g] = head.values_of(c, g, from, to, values + g * LANES * (head.D + 16));
      }
      if constexpr (FETCH_CHUNK) {
        for (int g = begin; g < end; g++) touch_rows(k[g], head.D);
        for (int g = begin; g < end; g++) prefetch_rows(v[g], head.D, 0);
      }
      Keys keys = head.keys(tiles[0], c, x.bias);
      keys.ahead = head.ahead(first, c, last, high);
      chunk_few_rows(tiles[0], keys, k, v, x.s);
      continue;
    }
    const int slot = c % x.slots;
    const int64_t id = head.s.b * head.a.Hk + head.hk;
    float *kt = x.packs + slot * 2 * x.block, *vt = kt + x.block;
    if (!x.kept[slot].has(id, c, from, to)) {
      for (int g = begin; g < end; g++) {
        pack_k(head.keys_of(c, g, from, to, x.s), head.D, kt + g * lanes_of(head.D) * LANES);
        pack_v(head.values_of(c, g, from, to, x.s), max(from - g * LANES, 0), min(to - g * LANES, LANES), head.D,
               vt + g * LANES / PER_LANE * LANES);
      }
      x.kept[slot] = {id, c, from, to};
    }
    for (int i = 0; i < count; i++) {
      const Tile& t = tiles[i];
      const Keys keys = head.keys(t, c, x.bias);
      if (keys.begin >= keys.end) continue;
      (t.width == LANES ? chunk_rows<1> : t.width == 2 * LANES ? chunk_rows<2> : chunk_rows<3>)(t, keys, kt, vt, x.s);
    }
  }
}

// Whole strips, the later ones first: under a causal mask they are the longer.
template <class T, class C>
void by_strips(const Attention& a, Worker& worker) {
  const int64_t most = ceil_div(a.q_longest * (a.H / a.Hk), ROWS), bytes = Scratch::tile_floats(a.D) * sizeof(float);
  const int64_t fair = a.B * a.Hk * most / (8 * worker.count);
  const int chunks = longest(a);
  const int64_t most_of_strip = min<int64_t>(Scratch::keeps(a, chunks) ? KEPT_TILES : TILES, STRIP_BYTES / bytes);
  const int64_t heads = a.B * a.Hk, strips = max<int64_t>(1, ceil_div(most, max<int64_t>(1, min(most_of_strip, fair))));
  const int size = (int)ceil_div(most, strips);
  Scratch x(a, worker, size, strips > 1 ? chunks : 1);
  if (a.k_new && strips > 1) {
    worker.each(heads, [&](int64_t h) { append<T, C>(a, sequence(a, h / a.Hk), h % a.Hk, 0, a.Sq); });
  }
  worker.phase(heads * strips, 1, [&](int64_t task, int64_t end) {
    for (; task < end; task++) {
      const Head<T, C> head(a, task / strips / a.Hk, task / strips % a.Hk);
      if (a.k_new && strips == 1) append<T, C>(a, head.s, head.hk, 0, a.Sq);
      const int first = (int)(strips - 1 - task % strips) * size, count = min(size, head.tiles() - first);
      if (count <= 0) continue;
      const bool few = count == 1 && head.rows() - first * ROWS <= FEW;
      Tile tiles[TILES];
      for (int i = 0; i < count; i++)
        tiles[i] = head.start((first + i) * ROWS, few, x.tiles + i * Scratch::tile_floats(a.D), x.s);
      run_strip(head, tiles, count, 0, 1 << 30, x);
      for (int i = 0; i < count; i++) head.finish(tiles[i], x.s);
    }
  });
}

// The part of a tile that a chunk changes lies together: o, m, l.
INLINE int64_t state_floats(const Tile& t) { return t.slope - t.o; }

void fold(Tile& t, const float* partial) {
  const float *o = partial, *m = partial + (t.m - t.o), *l = m + t.width;
  float a[ROWS], b[ROWS];
  for (int r = 0; r < t.width; r += LANES) merge(t.m + r, t.l + r, load(m + r), load(l + r), a + r, b + r);
  const int rows = round_up(t.dim, LANES);
  if (t.few) {
    for (int r = 0; r < t.rows; r++)
      for (int d = 0; d < rows; d += LANES) {
        float* to = t.o + r * rows + d;
        store(to, fma(load(to), splat(a[r]), load(o + r * rows + d) * b[r]));
      }
  } else {
    for (int d = 0; d < rows; d++)
      for (int r = 0; r < t.width; r += LANES) {
        float* to = t.o + d * t.width + r;
        store(to, fma(load(to), load(a + r), load(o + d * t.width + r) * load(b + r)));
      }
  }
}

// The chunks first .. last that a sequence's queries see.
struct Span {
  int first, last;
  int size() const { return last - first; }
};
Span span(const Attention& a, int64_t b) {
  const Sequence s = sequence(a, b);
  if (!s.q_len) return {0, 0};
  int low, high, unused;
  visible(a, s, 0, &low, &unused);
  visible(a, s, s.q_len - 1, &unused, &high);
  return {low / CHUNK, max(low / CHUNK, (int)ceil_div(high, CHUNK))};
}

// Whether heads are too few, or of too different lengths, for each to be one worker's, who merges its chunks himself.
bool uneven(const Attention& a, int workers) {
  int64_t chunks = 0, longest = 0;
  for (int64_t b = 0; b < a.B; b++) {
    const int64_t size = span(a, b).size();
    chunks += size;
    longest = max(longest, size);
  }
  return longest > 1 && longest * 4 * workers > chunks * a.Hk;
}

// Single chunks, each worker beginning with the part that it had the last time (decoding, it finds the keys in its own
// cache), then the merge.
template <class T, class C>
void by_chunks(const Attention& a, Worker& worker) {
  Scratch x(a, worker, 1, 1);
  int64_t total = 0;
  for (int64_t b = 0; b < a.B; b++) total += span(a, b).size();
  auto partial = [&](int64_t b, int64_t hk, int chunk, int tile) {
    return a.workspace + ((b * a.Hk + hk) * a.chunks + chunk) * a.partial +
           tile * ROWS * (round_up((int)a.D, LANES) + 2);
  };
  auto start = [&](const Head<T, C>& head, int tile) {
    return head.start(tile * ROWS, head.rows() - tile * ROWS <= FEW, x.tiles, x.s);
  };
  worker.phase(total * a.Hk, ceil_div(total * a.Hk, 4 * worker.count), [&](int64_t begin, int64_t end) {
    for (int64_t b = 0, done = 0; b < a.B; b++) {
      const Span chunks = span(a, b);
      const int64_t from = max<int64_t>(begin - done, 0), to = min<int64_t>(end - done, chunks.size() * a.Hk);
      for (int64_t u = from; u < to; u++) {
        const Head<T, C> head(a, b, u % a.Hk);
        const int c = chunks.first + (int)(u / a.Hk), fresh = head.s.k_len - head.s.q_len;  // the first new key
        if (a.k_new)
          append<T, C>(a, head.s, head.hk, max(c * CHUNK - fresh, 0), min((c + 1) * CHUNK - fresh, head.s.q_len));
        for (int tile = 0; tile < head.tiles(); tile++) {
          Tile t = start(head, tile);
          run_strip(head, &t, 1, c, c + 1, x);
          memcpy(partial(b, head.hk, c, tile), t.o, state_floats(t) * sizeof(float));
        }
      }
      done += chunks.size() * a.Hk;
    }
  });
  worker.each(a.B * a.Hk, [&](int64_t task) {
    const Head<T, C> head(a, task / a.Hk, task % a.Hk);
    const Span chunks = span(a, head.s.b);
    for (int tile = 0; tile < head.tiles(); tile++) {
      Tile t = start(head, tile);
      for (int c = chunks.first; c < chunks.last; c++) fold(t, partial(head.s.b, head.hk, c, tile));
      head.finish(t, x.s);
    }
  });
}

template <class T, class C>
void run(const Attention& a, Worker& worker) {
  if (a.workspace && worker.count > 1 && uneven(a, worker.count))
    by_chunks<T, C>(a, worker);
  else
    by_strips<T, C>(a, worker);
}

}  // namespace

#if defined(__AVX512BF16__)
}
namespace gptfast::avx512 {
void attention(const Attention&, Worker&);
}
namespace gptfast::ISA {
void attention(const Attention& a, Worker& worker) {
  if (a.cache_dtype == BFLOAT16) {
    if (a.dtype == BFLOAT16) return run<bf16, bf16>(a, worker);
    if (a.rounded) return run<float, bf16>(a, worker);
  }
  avx512::attention(a, worker);
}
#else
// fp32 queries take keys and values of any storage dtype, others those of their own.
void attention(const Attention& a, Worker& worker) {
  if (a.dtype == a.cache_dtype)
    with_storage(a.dtype, [&](auto t) { run<decltype(t), decltype(t)>(a, worker); });
  else if (a.cache_dtype == BFLOAT16)
    run<float, bf16>(a, worker);
  else if (a.cache_dtype == INT8)
    run<float, i8>(a, worker);
  else
    run<float, f16>(a, worker);
}
#endif

}  // namespace gptfast::ISA
