// The thread team. A kernel is a function that every thread of the team runs on the same arguments (single program,
// multiple data): it walks through its phases, and each phase's tasks are shared out among the threads that have come.
// Nobody waits for a thread that hasn't, and no result may depend on who did what or on how many workers there are.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace gptfast {

struct Trace;

struct Worker {
  int id, count;           // 0 <= id < count
  uint64_t ticket = 0;     // the next phase's number, greater than that of any phase before it
  Trace* trace = nullptr;  // takes the times of a replay

  // Calls f(begin, end) for runs of about `grain` of the n tasks until none is left: first of this worker's own
  // contiguous share, then of the others'. Returns when all n are done, by whomever. A worker that comes too late finds
  // nothing to do, so everything that later phases or the caller read must be written within f.
  template <class F>
  __attribute__((always_inline)) void phase(int64_t n, int64_t grain, F f) {
    if (n <= 0) return;
    if (count == 1) return f((int64_t)0, n);
    const int lanes = count < LANES ? count : LANES;
    const int64_t smallest = (n / lanes >> 11) + 1;  // so that all lanes' runs are counted in 16 bits
    if (grain < smallest) grain = smallest;
    int64_t mine = 0, all = 0;
    for (int turn = 0; turn < lanes; turn++) {
      const int lane = (id + turn) % lanes;
      const int64_t first = n * lane / lanes, last = n * (lane + 1) / lanes, runs = (last - first + grain - 1) / grain;
      for (int64_t run; (run = claim(lane, runs)) >= 0; mine++) {
        const int64_t begin = first + run * grain, end = begin + grain;
        f(begin, end < last ? end : last);
      }
      all += runs;
    }
    finish(mine, all);
  }
  // The same with f(task) and runs short enough for eight per worker.
  template <class F>
  __attribute__((always_inline)) void each(int64_t n, F f) {
    phase(n, n / (count * 8) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) f(task);
    });
  }
  // At least `bytes` of this thread's own memory, 64-byte aligned, contents undefined; valid until the kernel returns
  // or asks again. Throws std::bad_alloc.
  void* scratch(size_t bytes);

 private:
  static constexpr int LANES = 16;
  friend struct Board;
  int64_t claim(int lane, int64_t runs);     // the next run of a lane, or -1
  void finish(int64_t mine, int64_t total);  // counts the runs done here and waits until all are; then the next phase
  void complete(int64_t mine, int64_t total);
};

// Phases that one launch may have.
constexpr uint64_t PHASES = 8;

typedef void (*Body)(const void* args, Worker&);

// Runs body(args, worker) on `threads` threads, the caller among them, and returns when its work is done and nobody
// looks at args any more. If the team is busy with another caller's kernel, the caller runs alone: the result is the
// same and no core is used twice.
void run(Body body, const void* args, int threads);

// A recorded launch: body(args, worker) on `threads` threads.
struct Step {
  Body body;
  const void* args;
  int threads;
};

struct Recording {
  const Step* steps;
  size_t count;
};

// Where the time of a replay went, in nanoseconds of the steady clock; 0 where a worker was not there.
struct Trace {
  int workers = 0;
  uint64_t first = 0;                        // ticket
  int64_t begin = 0, end = 0;                // of the launch, for its caller
  std::vector<int64_t> came;                 // [step][worker], and once more: when it was through
  std::vector<std::array<int64_t, 2>> wait;  // [step][phase][worker]: from its last task to the end of everybody's
};

// Runs the steps one after another in a single launch. A late thread may still look at them and at their arguments
// afterwards: they stay where they are until release() has returned. With a trace it waits for late threads; where the
// team is busy or of one thread, the trace holds `begin` and `end` alone.
void replay(const Recording& recording, int threads, Trace* trace = nullptr);
void release();

}  // namespace gptfast
