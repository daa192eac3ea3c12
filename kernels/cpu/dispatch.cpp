#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace gptfast {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512vnni {
void linear_int8(const Linear&, Worker&);
}
namespace avx512bf16 {
void attention(const Attention&, Worker&);
void attention_backward(const AttentionBackward&, Worker&);
void linear(const Linear&, Worker&);
void linear_packed(const Linear&, Worker&);
void product(const Product&, Worker&);
void vocabulary_logits(const Vocabulary&, Worker&);
void vocabulary_gradients(const Vocabulary&, Worker&);
}  // namespace avx512bf16
#endif

namespace {

struct Choice {
  std::string name;
  Kernels kernels;
};

std::vector<Choice> runnable() {
  std::vector<Choice> all{{"baseline", baseline::kernels}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    all.push_back({"avx2", avx2::kernels});
  if (all.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    all.push_back({"avx512", avx512::kernels});
  if (all.size() == 3 && __builtin_cpu_supports("avx512vnni")) {
    all.push_back({"avx512vnni", avx512::kernels});
    all.back().kernels.linear_int8 = avx512vnni::linear_int8;
  }
  if (all.size() == 4 && __builtin_cpu_supports("avx512bf16")) {
    all.push_back({"avx512bf16", all.back().kernels});
    all.back().kernels.attention = avx512bf16::attention;
    all.back().kernels.attention_backward = avx512bf16::attention_backward;
    all.back().kernels.linear = avx512bf16::linear;
    all.back().kernels.linear_packed = avx512bf16::linear_packed;
    all.back().kernels.product = avx512bf16::product;
    all.back().kernels.vocabulary_logits = avx512bf16::vocabulary_logits;
    all.back().kernels.vocabulary_gradients = avx512bf16::vocabulary_gradients;
  }
#endif
  return all;
}

std::vector<Choice>& choices() {
  static std::vector<Choice> all = runnable();
  return all;
}

size_t find(const std::string& name) {
  std::string names;
  for (size_t i = 0; i < choices().size(); i++) {
    if (choices()[i].name == name) return i;
    names += (i ? ", " : "") + choices()[i].name;
  }
  throw std::invalid_argument("instruction set '" + name + "' was asked for; this machine and build run " + names);
}

size_t& current() {
  static size_t index = [] {
    const char* want = std::getenv("GPTFAST_CPU_ISA");
    return want && *want ? find(want) : choices().size() - 1;
  }();
  return index;
}

}  // namespace

const Kernels& kernels() { return choices()[current()].kernels; }
const std::string& isa() { return choices()[current()].name; }
std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Choice& choice : choices()) names.push_back(choice.name);
  return names;
}
std::vector<std::string> own_kernels(const std::string& name) {
  const size_t i = find(name);
  const Kernels &mine = choices()[i].kernels, &before = choices()[i ? i - 1 : 0].kernels;
  std::vector<std::string> names;
#define GPTFAST_OWN(kernel, Args) \
  if (!i || mine.kernel != before.kernel) names.push_back(#kernel);
  GPTFAST_KERNELS(GPTFAST_OWN)
#undef GPTFAST_OWN
  return names;
}
void use_isa(const std::string& name) { current() = find(name); }

}  // namespace gptfast
