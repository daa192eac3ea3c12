// Memory of large outputs, kept for the next ones when nobody needs it any more. The system clears every page that it
// hands out: for an output that is written once and read once, as much work again.
#pragma once
#include <cstddef>

namespace gptfast {

struct Block {
  void* memory;
  std::size_t bytes;
};

// At least `bytes`, on 2 MiB pages where the system allows it, contents undefined. Throws std::bad_alloc.
Block take(std::size_t bytes);
void give_back(Block block);

}  // namespace gptfast
