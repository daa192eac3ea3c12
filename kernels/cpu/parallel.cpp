#include "parallel.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>

#include "openmp.h"

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

int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int this_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

}  // namespace

// How far the present phase is. Each counter holds the ticket of the phase it belongs to above its 16-bit count, so
// that nothing has to be reset and a worker that is phases behind can take nothing.
struct Board {
  struct alignas(64) Counter {
    std::atomic<uint64_t> value{0};
  };
  static constexpr int COUNT = 16;  // bits
  static constexpr uint64_t MASK = (1 << COUNT) - 1;
  static constexpr int LANES = Worker::LANES;

  Counter lanes[LANES];                           // runs taken
  Counter done;                                   // runs done
  alignas(64) std::atomic<uint64_t> finished{0};  // the last phase that is complete
  std::atomic<uint32_t> changes{0};               // of `finished`: what sleepers wait on
};

namespace {

// What a worker has to know to take part.
struct Launch {
  Body body;
  const void* args;
  int count, caller_core;
  uint64_t ticket;
};

// Kept for the life of the process and never destroyed: threads may still be parked in it at exit.
struct Team {
  alignas(64) std::atomic<uint32_t> epoch{0};   // odd while a launch is open
  alignas(64) std::atomic<uint32_t> inside{0};  // workers that may be looking at it
  alignas(64) std::atomic<bool> busy{false};
  std::atomic<Body> body{nullptr};  // the present launch; read anew if the epoch changes meanwhile
  std::atomic<const void*> args{nullptr};
  std::atomic<int> count{0}, caller_core{0};
  std::atomic<uint64_t> ticket{1};
  std::atomic<Trace*> trace{nullptr};
  uint64_t next_ticket = 1;
  Board board;
  int size = 1;                              // threads that exist, the caller included
  std::atomic<int> cores[MAX_THREADS] = {};  // where each worker was last, plus 1
#if defined(__linux__)
  cpu_set_t allowed;  // the cores of the thread that made the team
#endif

  // The system may wake a worker on its caller's core, or on another worker's, and leave both there, each waiting for
  // the other in turn: a kernel then takes four times as long (LOG.md). A worker that finds itself on a taken core
  // moves.
  void spread([[maybe_unused]] int id, [[maybe_unused]] int caller) {
#if defined(__linux__)
    const int core = sched_getcpu();
    bool taken = core == caller;
    if (core + 1 != cores[id].load(std::memory_order_relaxed))
      for (int other = 1; other < id && !taken; other++)
        taken = cores[other].load(std::memory_order_relaxed) == core + 1;
    if (taken) {
      cpu_set_t free = allowed;
      CPU_CLR(caller, &free);
      for (int other = 1; other < id; other++)
        if (const int at = cores[other].load(std::memory_order_relaxed)) CPU_CLR(at - 1, &free);
      if (CPU_COUNT(&free) && sched_setaffinity(0, sizeof free, &free) == 0)
        sched_setaffinity(0, sizeof allowed, &allowed);  // it stays there until the system has a reason
    }
    cores[id].store(sched_getcpu() + 1, std::memory_order_relaxed);
#endif
  }

  void work(int id, uint32_t now) {
    const Body do_it = body.load(std::memory_order_relaxed);
    const void* on = args.load(std::memory_order_relaxed);
    Worker worker{id, count.load(std::memory_order_relaxed), ticket.load(std::memory_order_relaxed),
                  trace.load(std::memory_order_relaxed)};
    const int caller = caller_core.load(std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_acquire);
    if (epoch.load(std::memory_order_relaxed) != now || id >= worker.count) return;
    spread(id, caller);
    try {
      do_it(on, worker);
    } catch (const std::bad_alloc&) {  // the others do this worker's part
    }
  }

  void serve(int id) {
    for (uint32_t last = 0;;) {
      const uint32_t seen = epoch.load();
      if (seen % 2 == 0 || seen == last) {
        wait_while(epoch, seen);
        continue;
      }
      inside.fetch_add(1);
      last = epoch.load();
      if (last % 2) work(id, last);
      if (inside.fetch_sub(1) == 1) inside.notify_one();
    }
  }

  void grow(int threads) {
    while (size < threads) {
      int id = size;
      try {
        std::thread([this, id] { serve(id); }).detach();
      } catch (const std::system_error&) {
        return;  // the system has no more threads: work with those there are
      }
      size++;
    }
  }

  // Waits for those inside a closed launch.
  void settle() {
    for (uint32_t n; (n = inside.load()) != 0;) wait_while(inside, n);
  }

  struct Closing {
    Team& team;
    int lanes;
    bool wait;
    ~Closing() {
      team.epoch.fetch_add(1);
      // What a late worker counts its tasks by may change from here on: no lane gives it any.
      for (int i = 0; i < lanes; i++) team.board.lanes[i].value.store(team.next_ticket << Board::COUNT);
      if (wait) team.settle();
    }
  };

  // The same on PyTorch's threads, which all come and have left when it returns; false: there are none.
  bool run_there(Body do_it, const void* on, int threads, uint64_t phases) {
    struct Launch {
      Body body;
      const void* args;
      int count;
      uint64_t ticket;
      std::atomic<int> came{0};
      std::atomic<int> through{0};
    } launch{do_it, on, threads, next_ticket};
    const bool ran = run_on_pytorch(
        [](void* of) {
          Launch& mine = *(Launch*)of;
          const int id = mine.came.fetch_add(1, std::memory_order_relaxed);
          if (id >= mine.count) return;
          Worker worker{id, mine.count, mine.ticket};
          try {
            mine.body(mine.args, worker);
            mine.through.fetch_add(1, std::memory_order_relaxed);
          } catch (const std::bad_alloc&) {  // the others do this worker's part
          }
        },
        &launch, threads);
    if (ran) next_ticket += phases;
    if (ran && launch.through.load() == 0) throw std::bad_alloc();
    return ran;
  }

  // `phases`: how many tickets the launch may use. wait = false: args outlive it.
  void run(Body do_it, const void* on, int threads, uint64_t phases, bool wait, Trace* times) {
    Worker worker{0, threads, next_ticket, times};
    next_ticket += phases;
    if (times) times->first = worker.ticket;
    std::atomic_thread_fence(std::memory_order_release);
    body.store(do_it, std::memory_order_relaxed);
    args.store(on, std::memory_order_relaxed);
    count.store(threads, std::memory_order_relaxed);
    caller_core.store(this_core(), std::memory_order_relaxed);
    ticket.store(worker.ticket, std::memory_order_relaxed);
    trace.store(times, std::memory_order_relaxed);
    epoch.fetch_add(1);
    epoch.notify_all();
    const Closing closing{*this, threads < Board::LANES ? threads : Board::LANES, wait};
    do_it(on, worker);
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

void start(Body body, const void* args, int threads, uint64_t phases, bool wait, Trace* trace = nullptr) {
  static const int most = cores() < MAX_THREADS ? cores() : MAX_THREADS;
  if (threads > most) threads = most;
  Team& mine = the_team();
  if (threads <= 1 || mine.busy.exchange(true, std::memory_order_acquire)) {
    Worker alone{0, 1};
    body(args, alone);
    return;
  }
  struct Free {
    Team& team;
    ~Free() { team.busy.store(false, std::memory_order_release); }
  } free{mine};
  if (wait && !trace && mine.run_there(body, args, threads, phases)) return;
  share_cores();
  mine.grow(threads);
  mine.run(body, args, threads < mine.size ? threads : mine.size, phases, wait, trace);
}

// Every step begins with its own ticket, so that workers agree on the numbers whatever each of them skipped. A step for
// one thread is one task.
void play(const void* args, Worker& worker) {
  const Recording& recording = *(const Recording*)args;
  const uint64_t first = worker.ticket;
  Trace* const trace = worker.trace;
  for (size_t i = 0; i < recording.count; i++) {
    const Step& step = recording.steps[i];
    worker.ticket = first + i * PHASES;
    if (trace) trace->came[i * trace->workers + worker.id] = nanoseconds();
    if (step.threads > 1)
      step.body(step.args, worker);
    else
      worker.phase(1, 1, [&](int64_t, int64_t) {
        Worker alone{0, 1};
        step.body(step.args, alone);
      });
  }
  if (trace) trace->came[recording.count * trace->workers + worker.id] = nanoseconds();
}

}  // namespace

int64_t Worker::claim(int lane, int64_t runs) {
  std::atomic<uint64_t>& taken = team->board.lanes[lane].value;
  uint64_t value = taken.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t held = value >> Board::COUNT;
    if (held > ticket) return -1;
    const int64_t run = held == ticket ? (int64_t)(value & Board::MASK) : 0;
    if (run == runs) return -1;
    if (taken.compare_exchange_weak(value, (ticket << Board::COUNT) + run + 1, std::memory_order_acq_rel)) return run;
  }
}

void Worker::finish(int64_t mine, int64_t total) {
  if (!trace) return complete(mine, total);
  auto& wait = trace->wait[(ticket - trace->first) * trace->workers + id];
  wait[0] = nanoseconds();
  complete(mine, total);
  wait[1] = nanoseconds();
}

void Worker::complete(int64_t mine, int64_t total) {
  Board& board = team->board;
  const uint64_t now = ticket++;
  if (mine) {
    uint64_t value = board.done.value.load(std::memory_order_relaxed), sum;
    do sum = (value >> Board::COUNT == now ? value & Board::MASK : 0) + mine;
    while (!board.done.value.compare_exchange_weak(value, (now << Board::COUNT) + sum, std::memory_order_acq_rel));
    if (sum == (uint64_t)total) {
      board.finished.store(now);
      board.changes.fetch_add(1);
      board.changes.notify_all();
      return;
    }
  }
  for (int i = 0; i < SPINS; i++) {
    if (board.finished.load(std::memory_order_acquire) >= now) return;
    pause();
  }
  for (;;) {
    const uint32_t seen = board.changes.load();
    if (board.finished.load() >= now) return;
    board.changes.wait(seen);
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

void run(Body body, const void* args, int threads) { start(body, args, threads, PHASES, true); }

void replay(const Recording& recording, int threads, Trace* trace) {
  if (trace) {
    trace->workers = threads;
    trace->came.assign((recording.count + 1) * threads, 0);
    trace->wait.assign(recording.count * PHASES * threads, {});
    trace->begin = nanoseconds();
  }
  start(play, &recording, threads, recording.count * PHASES, trace != nullptr, trace);
  if (trace) trace->end = nanoseconds();
}

void release() {
  Team& mine = the_team();
  while (mine.busy.exchange(true, std::memory_order_acquire)) std::this_thread::yield();
  mine.settle();
  mine.busy.store(false, std::memory_order_release);
}

}  // namespace gptfast
