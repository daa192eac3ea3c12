#include "kernels.h"
#include "vec.h"

namespace gptfast::ISA {

// A_t = delta_t + gamma lam A_next, delta_t = r_t + gamma V_next - V_t, where `next` is the next token that the mask
// keeps; from the last to the first, a row to a task.
void gae(const Gae& a, Worker& worker) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    worker.each(a.rows, [&](int64_t r) {
      const T *rewards = (const T*)a.rewards + r * a.rewards_stride, *values = (const T*)a.values + r * a.values_stride;
      const uint8_t* mask = a.mask ? a.mask + r * a.mask_stride : nullptr;
      float *advantages = a.advantages + r * a.cols, *returns = a.returns + r * a.cols;
      float advantage = 0, next_value = 0;
      const float decay = a.gamma * a.lam;
      for (int64_t c = a.cols - 1; c >= 0; c--) {
        if (mask && !mask[c]) {
          advantages[c] = returns[c] = 0;
          continue;
        }
        const float value = load1(values + c), delta = fma(a.gamma, next_value, load1(rewards + c)) - value;
        advantage = fma(decay, advantage, delta);
        advantages[c] = advantage;
        returns[c] = advantage + value;
        next_value = value;
      }
    });
  });
}

}  // namespace gptfast::ISA
