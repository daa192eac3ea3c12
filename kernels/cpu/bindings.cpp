// gptfast._cpu: each kernel as a function of its arguments by name. Tensors come as data pointers (integers), so that
// one build works with every version of PyTorch; kernels/cpu/<op>.py owns shapes, strides and lifetimes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>

#include "dispatch.h"

namespace py = pybind11;

namespace gptfast {
namespace {

template <class Field>
using Value = std::conditional_t<std::is_pointer_v<Field>, std::uintptr_t, Field>;

template <class Args, class Field>
void set(Args& args, Field Args::* field, Value<Field> value) {
  if constexpr (std::is_pointer_v<Field>)
    args.*field = reinterpret_cast<Field>(value);
  else
    args.*field = value;
}

template <auto kernel, class Args, class... Fields, class... Names>
void def(py::module_& m, const char* name, std::tuple<Fields Args::*...> fields, Names... names) {
  m.def(
      name,
      [fields](int threads, Value<Fields>... values) {
        Args args{};
        std::apply([&](auto... field) { (set(args, field, values), ...); }, fields);
        py::gil_scoped_release unlocked;
        run([](const void* p, Worker& worker) { (kernels().*kernel)(*static_cast<const Args*>(p), worker); }, &args,
            threads);
      },
      py::arg("threads"), py::kw_only(), py::arg(names)...);
}

// BIND(op, Args, field, field, ...): one line per kernel.
#define PARENS ()
#define EXPAND(...) EXPAND1(EXPAND1(EXPAND1(EXPAND1(__VA_ARGS__))))
#define EXPAND1(...) EXPAND2(EXPAND2(EXPAND2(EXPAND2(__VA_ARGS__))))
#define EXPAND2(...) EXPAND3(EXPAND3(EXPAND3(EXPAND3(__VA_ARGS__))))
#define EXPAND3(...) __VA_ARGS__
#define EACH_FIELD(A, f, ...) &A::f __VA_OPT__(, EACH_FIELD_AGAIN PARENS(A, __VA_ARGS__))
#define EACH_FIELD_AGAIN() EACH_FIELD
#define EACH_NAME(f, ...) #f __VA_OPT__(, EACH_NAME_AGAIN PARENS(__VA_ARGS__))
#define EACH_NAME_AGAIN() EACH_NAME
#define BIND(op, A, ...) \
  def<&Kernels::op>(m, #op, std::make_tuple(EXPAND(EACH_FIELD(A, __VA_ARGS__))), EXPAND(EACH_NAME(__VA_ARGS__)))

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "gptfast's kernels in C++ for the CPU. Use gptfast.ops; this module takes raw pointers.";
  m.def("isa", &isa, "The instruction set in use.");
  m.def("isas", &isas, "The instruction sets this machine can run, the narrowest first.");
  m.def("use_isa", &use_isa, py::arg("name"), "Use another instruction set's kernels from now on.");
  BIND(layer_norm, LayerNorm, y, sum, mean, rstd, x, residual, weight, bias, rows, cols, x_stride, residual_stride, eps,
       dtype, weight_dtype);
  BIND(sample, Sample, ids, logprobs, logits, logit_bias, mask, history, prompt_lengths, reals, integers, per_row, rows,
       cols, logits_stride, bias_stride, mask_stride, history_cols, dtype, processed);
}

}  // namespace gptfast
