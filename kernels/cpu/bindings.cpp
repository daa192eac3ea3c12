// gptfast._cpu: each kernel as a function of its arguments by name. Tensors come as data pointers (integers), so that
// one build works with every version of PyTorch; kernels/cpu/<op>.py owns shapes, strides and lifetimes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <type_traits>

#include "dispatch.h"

namespace py = pybind11;

namespace gptfast {
namespace {

// Asks the system for 2 MiB pages under memory that is about to be written: 4 KiB pages fault 512 times as often, which
// costs several times what an elementwise kernel does. Only a hint; pages already there stay.
void huge_pages(std::uintptr_t data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t PAGE = 2 << 20;
  const std::uintptr_t begin = (data + PAGE - 1) / PAGE * PAGE, end = (data + bytes) / PAGE * PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

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
  m.def("huge_pages", &huge_pages, py::arg("data"), py::arg("bytes"),
        "Asks for 2 MiB pages under memory not yet written.");
  BIND(layer_norm, Norm, y, sum, mean, rstd, x, residual, weight, bias, rows, cols, x_stride, residual_stride, seed,
       eps, keep_scale, stream, drop_below, dtype, weight_dtype);
  BIND(rms_norm, Norm, y, sum, rstd, x, residual, weight, rows, cols, x_stride, residual_stride, seed, eps, keep_scale,
       stream, drop_below, dtype, weight_dtype);
  BIND(rope, Rope, q_out, k_out, q, k, cos, sin, B, S, Hq, Hk, D, R, q_b, q_s, q_h, k_b, k_s, k_h, table_b, table_s,
       interleaved, dtype);
  BIND(bias_gelu, Mlp, y, x, other, rows, cols, x_stride, other_stride, tanh, dtype);
  BIND(swiglu, Mlp, y, x, other, rows, cols, x_stride, other_stride, dtype);
  BIND(geglu, Mlp, y, x, other, rows, cols, x_stride, other_stride, tanh, dtype);
  BIND(embedding, Embedding, out, ids, positions, weight, position_weight, rows, cols, weight_stride, position_stride,
       dtype);
}

}  // namespace gptfast
