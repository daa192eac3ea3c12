#include "memory.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gptfast {

namespace {

constexpr std::size_t PAGE = 2 << 20;
constexpr std::size_t KEPT = 256 << 20;  // bytes that wait for their next use, at most

struct Pool {
  std::mutex lock;
  std::vector<Block> idle;  // a few dozen, from the oldest to the latest
  std::size_t bytes = 0;
};
Pool& pool() {
  static auto* made = new Pool;  // never destroyed: tensors may outlive everything else
  return *made;
}

Block fresh(std::size_t bytes) {
  void* memory = std::aligned_alloc(PAGE, bytes);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return {memory, bytes};
}

}  // namespace

// A lock that can't be had at once, as in a child forked while another thread had it, isn't waited for.
Block take(std::size_t bytes) {
  bytes = (bytes + PAGE - 1) / PAGE * PAGE;
  Pool& p = pool();
  const std::unique_lock held(p.lock, std::try_to_lock);
  std::size_t best = 0, found = 0;  // one more than its index
  for (std::size_t i = 0; held.owns_lock() && i < p.idle.size(); i++) {
    const std::size_t size = p.idle[i].bytes;
    if (size >= bytes && size <= bytes + bytes / 8 && (!found || size <= best)) best = size, found = i + 1;
  }
  if (!found) return fresh(bytes);
  const Block block = p.idle[found - 1];
  p.idle.erase(p.idle.begin() + (std::ptrdiff_t)(found - 1));
  p.bytes -= block.bytes;
  return block;
}

void give_back(Block block) {
  Pool& p = pool();
  const std::unique_lock held(p.lock, std::try_to_lock);
  if (!held.owns_lock() || block.bytes > KEPT) return std::free(block.memory);
  p.idle.push_back(block);
  p.bytes += block.bytes;
  while (p.bytes > KEPT) {
    p.bytes -= p.idle.front().bytes;
    std::free(p.idle.front().memory);
    p.idle.erase(p.idle.begin());
  }
}

}  // namespace gptfast
