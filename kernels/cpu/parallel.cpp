#include "parallel.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gptfast {

namespace {

constexpr int MAX_THREADS = 256;
constexpr int SPINS = 4000;  // about 100 us of pauses: longer than the gap between two kernels of one token

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins for a while, then sleeps in the kernel, until the value is no longer `old`: a thread that lost its core to a
// neighbour doesn't burn another one waiting.
template <class T>
void wait_while(const std::atomic<T>& value, T old) {
  for (int i = 0; i < SPINS; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

int this_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

}  // namespace

struct Launch {
  void (*body)(const void*, Worker&);
  const void* args;
  int count;
  int caller_core;
  alignas(64) std::atomic<int64_t> counters[8] = {};
  alignas(64) std::atomic<uint32_t> arrived{0};
  alignas(64) std::atomic<uint32_t> round{0};
};

namespace {

// Kept for the life of the process and never destroyed: threads may still be parked in it at exit.
struct Team {
  alignas(64) std::atomic<uint32_t> epoch{0};
  alignas(64) std::atomic<uint32_t> finished{0};  // threads done with the present launch
  alignas(64) std::atomic<bool> busy{false};
  Launch* launch = nullptr;
  int size = 1;                              // threads that exist, the caller included
  std::atomic<int> cores[MAX_THREADS] = {};  // where each worker was last, plus 1
#if defined(__linux__)
  cpu_set_t allowed;  // the cores of the thread that made the team
#endif

  // The system may wake a worker on its caller's core, or on another worker's, and leave both there, each waiting for
  // the other in turn: a kernel then takes four times as long (LOG.md). A worker that finds itself on a taken core
  // moves.
  void spread([[maybe_unused]] int id, [[maybe_unused]] const Launch& now) {
#if defined(__linux__)
    const int core = sched_getcpu();
    bool taken = core == now.caller_core;
    if (core + 1 != cores[id].load(std::memory_order_relaxed))
      for (int other = 1; other < id && !taken; other++)
        taken = cores[other].load(std::memory_order_relaxed) == core + 1;
    if (taken) {
      cpu_set_t free = allowed;
      CPU_CLR(now.caller_core, &free);
      for (int other = 1; other < id; other++)
        if (const int at = cores[other].load(std::memory_order_relaxed)) CPU_CLR(at - 1, &free);
      if (CPU_COUNT(&free)) sched_setaffinity(0, sizeof free, &free);
    }
    cores[id].store(sched_getcpu() + 1, std::memory_order_relaxed);
#endif
  }

  void serve(int id, uint32_t seen) {
    for (;;) {
      wait_while(epoch, seen);
      seen++;
      Launch& now = *launch;  // launch changes only after every worker has finished with the last one
      if (id < now.count) {
        spread(id, now);
        Worker worker{id, now.count, &now};
        now.body(now.args, worker);
      }
      // Every thread checks in, working or not, so that none can still be looking at a launch that has ended.
      finished.fetch_add(1, std::memory_order_acq_rel);
      finished.notify_one();
    }
  }

  void grow(int threads) {
    while (size < threads) {
      int id = size;
      uint32_t seen = epoch.load();
      try {
        std::thread([this, id, seen] { serve(id, seen); }).detach();
      } catch (const std::system_error&) {
        return;  // the system has no more threads: work with those there are
      }
      size++;
    }
  }

  void run(Launch& work) {
    launch = &work;
    finished.store(0, std::memory_order_relaxed);
    const uint32_t others = (uint32_t)size - 1;
    epoch.fetch_add(1, std::memory_order_acq_rel);
    epoch.notify_all();
    Worker worker{0, work.count, &work};
    work.body(work.args, worker);
    for (uint32_t n; (n = finished.load(std::memory_order_acquire)) != others;) wait_while(finished, n);
  }
};

Team* make_team() {
  Team* made = new Team;
#if defined(__linux__)
  CPU_ZERO(&made->allowed);
  sched_getaffinity(0, sizeof made->allowed, &made->allowed);
#endif
  return made;
}

Team* team = nullptr;

Team& the_team() {
  static std::atomic<bool> making{false};
  if (!team) {
    while (making.exchange(true)) pause();
    if (!team) {
      team = make_team();
      // A forked child has none of the threads: it starts over with a team of its own.
      pthread_atfork(nullptr, nullptr, [] { team = make_team(); });
    }
    making.store(false);
  }
  return *team;
}

int cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return (int)std::thread::hardware_concurrency();
}

struct Arena {
  void* data = nullptr;
  size_t size = 0;
  ~Arena() { std::free(data); }
};
thread_local Arena arena;

}  // namespace

int64_t Worker::next(int counter) { return launch->counters[counter].fetch_add(1, std::memory_order_relaxed); }

void Worker::sync() {
  if (count == 1) return;
  const uint32_t round = launch->round.load(std::memory_order_acquire);
  if (launch->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == (uint32_t)count) {
    launch->arrived.store(0, std::memory_order_relaxed);
    launch->round.store(round + 1, std::memory_order_release);
    launch->round.notify_all();
  } else {
    wait_while(launch->round, round);
  }
}

void* Worker::scratch(size_t bytes) {
  if (bytes > arena.size) {
    std::free(arena.data);
    arena.size = 0;
    const size_t rounded = (bytes + (1 << 16) - 1) >> 16 << 16;
    arena.data = std::aligned_alloc(64, rounded);
    if (!arena.data) throw std::bad_alloc();
    arena.size = rounded;
  }
  return arena.data;
}

void run(void (*body)(const void*, Worker&), const void* args, int threads) {
  static const int most = cores() < MAX_THREADS ? cores() : MAX_THREADS;
  Launch work{};
  work.body = body, work.args = args, work.count = threads < most ? threads : most;
  Team& mine = the_team();
  if (work.count <= 1 || mine.busy.exchange(true, std::memory_order_acquire)) {
    work.count = 1;
    Worker worker{0, 1, &work};
    body(args, worker);
    return;
  }
  work.caller_core = this_core();
  mine.grow(work.count);
  if (work.count > mine.size) work.count = mine.size;
  mine.run(work);
  mine.busy.store(false, std::memory_order_release);
}

}  // namespace gptfast
