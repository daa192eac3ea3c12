// gptfast._cpu: each kernel as a function of its arguments by name. Tensors come as data pointers (integers), so that
// one build works with every version of PyTorch; kernels/cpu/<op>.py owns shapes, strides and lifetimes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <type_traits>

#include "dispatch.h"

namespace py = pybind11;

namespace gptfast {
namespace {

// Asks the system for 2 MiB pages under memory that is about to be written: 4 KiB pages fault, and are cleared, 512 times
// as often, which costs several times what an elementwise kernel does. Only a hint; pages already there stay.
void huge_pages(std::uintptr_t data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t PAGE = 2 << 20;
  const std::uintptr_t begin = (data + PAGE - 1) / PAGE * PAGE, end = (data + bytes) / PAGE * PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// What Python passes for a field: an address for a pointer, a sequence for an array.
template <class Field>
struct ValueOf {
  using type = std::conditional_t<std::is_pointer_v<Field>, std::uintptr_t, Field>;
};
template <class Item, std::size_t n>
struct ValueOf<Item[n]> {
  using type = std::array<Item, n>;
};
template <class Field>
using Value = typename ValueOf<Field>::type;

template <class Args, class Field>
void set(Args& args, Field Args::* field, Value<Field> value) {
  if constexpr (std::is_pointer_v<Field>)
    args.*field = reinterpret_cast<Field>(value);
  else if constexpr (std::is_array_v<Field>)
    std::copy(value.begin(), value.end(), args.*field);
  else
    args.*field = value;
}

// A pointer or an array that doesn't apply may be left out: null, zeros.
template <class Field>
auto argument(const char* name) {
  if constexpr (std::is_pointer_v<Field> || std::is_array_v<Field>)
    return py::arg(name) = Value<Field>{};
  else
    return py::arg(name);
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
      py::arg("threads"), py::kw_only(), argument<Fields>(names)...);
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
  m.def("huge_pages", &huge_pages, py::arg("data"), py::arg("bytes"), "Asks for 2 MiB pages under memory not yet written.");
  BIND(attention, Attention, out, lse, workspace, q, k, v, k_cache, v_cache, k_new, v_new, cos, sin, mask, bias, slopes,
       sinks, cu_q, cu_k, lengths, leftpad, batch_index, block_table, B, Sq, Sk, H, Hk, D, q_longest, q_strides,
       k_strides, v_strides, k_new_strides, v_new_strides, mask_strides, bias_strides, slopes_batch, page, table_stride,
       rotary, chunks, partial, scale, softcap, dtype, bias_dtype, causal, left, right, interleaved);
  BIND(layer_norm, Norm, y, sum, mean, rstd, x, residual, weight, bias, rows, cols, x_stride, residual_stride, seed,
       eps, keep_scale, stream, drop_below, dtype, weight_dtype);
  BIND(rms_norm, Norm, y, sum, rstd, x, residual, weight, rows, cols, x_stride, residual_stride, seed, eps, keep_scale,
       stream, drop_below, dtype, weight_dtype);
  BIND(rope, Rope, q_out, k_out, q, k, cos, sin, B, S, Hq, Hk, D, R, q_b, q_s, q_h, k_b, k_s, k_h, table_b, table_s,
       interleaved, dtype);
  BIND(linear, Linear, y, x, weight, bias, workspace, rows, cols, depth, x_stride, weight_stride, dtype, format,
       bias_dtype);
  BIND(linear_exact, Linear, y, x, weight, bias, workspace, rows, cols, depth, x_stride, weight_stride, dtype, format,
       bias_dtype);
  BIND(linear_int8, Linear, y, x, weight, bias, workspace, rows, cols, depth, x_stride, weight_stride, dtype, format,
       bias_dtype);
  BIND(sample, Sample, ids, logprobs, logits, logit_bias, mask, history, prompt_lengths, reals, integers, per_row, rows,
       cols, logits_stride, bias_stride, mask_stride, history_cols, dtype, processed);
  BIND(ceilings, Ceilings, work, sink, data, copy, bytes, turns, what);
  BIND(dequantize, Dequantize, y, packed, ids, rows, depth, format);
  BIND(bias_gelu, Mlp, y, x, other, rows, cols, x_stride, other_stride, tanh, dtype);
  BIND(swiglu, Mlp, y, x, other, rows, cols, x_stride, other_stride, dtype);
  BIND(geglu, Mlp, y, x, other, rows, cols, x_stride, other_stride, tanh, dtype);
  BIND(embedding, Embedding, out, ids, positions, weight, position_weight, rows, cols, weight_stride, position_stride,
       dtype);
}

}  // namespace gptfast
