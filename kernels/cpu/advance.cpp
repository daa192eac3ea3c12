#include "kernels.h"

namespace gptfast::ISA {

// Between two replayed steps: the drawn tokens become the next step's ids, and the rows that are still running move on
// by one position. Everything that the next step reads lies in memory, so that it needs nobody to prepare it.
void advance(const Advance& a, Worker& worker) {
  worker.each(a.rows, [&](int64_t i) {
    if (a.history) {
      const int64_t at = a.prompt_lengths[i] + a.steps[i], last = a.history_cols - 1;
      a.history[i * a.history_cols + (at < last ? at : last)] = a.drawn[i];
    }
    a.ids[i] = a.drawn[i];
    a.lengths[i] += a.running[i];
    a.positions[i] = a.lengths[i];
    a.steps[i]++;
  });
}

}  // namespace gptfast::ISA
