// The thread team. A kernel is a function that every thread of the team runs on the same arguments (single program,
// multiple data); a Worker tells it which part is its own. No result may depend on how many workers there are.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gptfast {

struct Launch;

struct Worker {
  int id, count;   // 0 <= id < count
  Launch* launch;  // what the workers of this launch share

  // This worker's contiguous share of n equal tasks.
  int64_t begin(int64_t n) const { return n * id / count; }
  int64_t end(int64_t n) const { return n * (id + 1) / count; }
  // The next task nobody has taken yet, from one of eight counters that start at 0: for tasks of unequal size.
  int64_t next(int counter = 0);
  // Waits until every worker of this launch has come here.
  void sync();
  // At least `bytes` of this thread's own memory, 64-byte aligned, contents undefined; valid until the kernel returns
  // or asks again. Null never comes back: std::bad_alloc is thrown on the calling thread before the kernel starts
  // working.
  void* scratch(size_t bytes);
};

// Runs body(args, worker) on `threads` threads, the caller among them, and returns when all are done. If the team is
// busy with another caller's kernel, the caller runs alone: the result is the same and no core is used twice.
void run(void (*body)(const void* args, Worker&), const void* args, int threads);

}  // namespace gptfast
