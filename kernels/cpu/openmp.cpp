#include "openmp.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <system_error>
#include <thread>

namespace gptfast {

namespace {

typedef void (*Parallel)(void (*body)(void*), void* args, unsigned threads, unsigned flags);

constexpr std::chrono::milliseconds LOOK{20};

std::atomic<bool> counted{false}, wanted{true}, joined{false}, forked{false};
std::atomic<uint64_t> calls{0};

// libgomp's GOMP_parallel, if idle threads spin as it does by default, or null. Looked up from PyTorch's library, whose
// dependencies are searched in turn: a process may hold other runtimes too, and theirs aren't the threads that spin.
Parallel look_up() {
  for (const char* name : {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"})
    if (std::getenv(name)) return nullptr;
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  if (!torch || dlsym(torch, "kmp_set_blocktime")) return nullptr;  // LLVM's and Intel's have GOMP_parallel too
  const auto found = reinterpret_cast<Parallel>(dlsym(torch, "GOMP_parallel"));
  if (found) pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  return found;
}

// libgomp lets its idle threads spin only as long as it has no more threads than there are cores, and it doesn't know
// of ours. A pool of two threads that do nothing stands in for them: it counts from its first region until the thread
// that opened it ends.
void stand_in(Parallel parallel) {
  parallel([](void*) {}, nullptr, 2, 0);
  for (uint64_t seen = 0, now; (now = calls.load()) != seen && wanted.load(); seen = now)
    std::this_thread::sleep_for(LOOK);
  counted.store(false);
}

// Null where it isn't to be used.
Parallel pool(const std::atomic<bool>& use) {
  static const Parallel parallel = look_up();
  return use.load(std::memory_order_relaxed) && !forked.load(std::memory_order_relaxed) ? parallel : nullptr;
}

}  // namespace

bool run_on_pytorch(void (*body)(void*), void* args, int threads) {
  const Parallel parallel = pool(joined);
  if (parallel) parallel(body, args, (unsigned)threads, 0);
  return parallel;
}

void share_cores() {
  const Parallel parallel = pool(wanted);
  if (!parallel) return;
  calls.fetch_add(1, std::memory_order_relaxed);
  if (counted.load(std::memory_order_relaxed) || counted.exchange(true)) return;
  try {
    std::thread(stand_in, parallel).detach();
  } catch (const std::system_error&) {  // no more threads: then without
    counted.store(false);
  }
}

bool shares_cores() { return counted.load() && !forked.load(); }
void let_share(bool want) { wanted.store(want); }
void join_pytorch(bool join) { joined.store(join); }

}  // namespace gptfast
