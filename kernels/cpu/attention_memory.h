// What a worker holds while it goes through attention's strips.
#pragma once
#include "attention.h"
#include "kernels.h"

namespace gptfast::ISA::attn {

constexpr int KEPT_BYTES = 4 << 20;  // of a head's packed keys and values, which stay in a worker's share of the L3

// Keys from .. to of a chunk, packed.
struct Packed {
  int64_t head;
  int chunk, from, to;
  bool has(int64_t h, int c, int begin, int end) const { return head == h && chunk == c && from <= begin && end <= to; }
};

// A worker's memory, reused from strip to strip. Where a head has several strips, its packed chunks are kept for the
// next one: where they lie, positions are a row of all heads apart, each on another page.
struct Scratch {
  float *packs, *s, *bias, *tiles;
  Packed* kept;
  int slots;
  int64_t block;  // of K or V

  // Whether all of a head's chunks are kept.
  static bool keeps(const Attention& a, int chunks) {
    return chunks * 2 * round_up((int)a.D, LANES) * CHUNK * (int64_t)sizeof(float) <= KEPT_BYTES;
  }
  static int64_t tile_floats(int64_t D) { return ROWS * (2 * round_up((int)D, LANES) + 9) + FEW * DIM; }
  Scratch(const Attention& a, Worker& worker, int tiles_of_strip, int chunks) {
    const int64_t D = round_up((int)a.D, LANES), copied = D + 16;
    block = D * CHUNK;
    slots = keeps(a, chunks) ? max(chunks, 1) : 1;
    const int64_t keys = max(slots * 2 * block, copies(a.D) + copied * CHUNK);
    const int64_t scores = max<int64_t>(ROWS * CHUNK, LANES * copied);
    const int64_t floats = keys + scores + ROWS * CHUNK + tiles_of_strip * tile_floats(a.D);
    packs = (float*)worker.scratch(floats * sizeof(float) + slots * sizeof(Packed));
    s = packs + keys;
    bias = s + scores;
    tiles = bias + ROWS * CHUNK;
    kept = (Packed*)(packs + floats);
    forget();
  }
  void forget() {
    for (int i = 0; i < slots; i++) kept[i].head = -1;
  }
  static int64_t copies(int64_t D) { return (round_up((int)D, LANES) + 16) * CHUNK; }  // of keys in the `few` shape
};

}  // namespace gptfast::ISA::attn
