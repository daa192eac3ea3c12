// gptfast._cpu: each kernel as a function of its arguments by name. Tensors come as data pointers (integers), so that
// one build works with every version of PyTorch; kernels/cpu/<op>.py owns shapes, strides and lifetimes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "memory.h"
#include "openmp.h"

namespace py = pybind11;

namespace gptfast {
namespace {

// DLPack's structures (github.com/dmlc/dlpack, version 0.8): a tensor as any framework takes it over.
struct DLTensor {
  void* data;
  std::int32_t device_type, device_id, ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

// A contiguous tensor in memory that comes from, and goes back to, memory.h: a DLPack capsule. code: 2 for fp32 and
// fp16, 4 for bf16, 1 for bytes.
py::capsule output(const std::vector<std::int64_t>& shape, int code, int bits) {
  struct Output {
    DLManagedTensor managed{};
    std::vector<std::int64_t> shape, strides;
    Block block{};
  };
  auto out = std::make_unique<Output>();
  out->shape = out->strides = shape;
  std::int64_t elements = 1;
  for (std::size_t i = shape.size(); i-- > 0; elements *= shape[i]) out->strides[i] = elements;
  out->block = take(static_cast<std::size_t>(elements) * static_cast<std::size_t>(bits / 8));
  out->managed.tensor = {out->block.memory,
                         1,
                         0,
                         static_cast<std::int32_t>(shape.size()),
                         static_cast<std::uint8_t>(code),
                         static_cast<std::uint8_t>(bits),
                         1,
                         out->shape.data(),
                         out->strides.data(),
                         0};
  out->managed.context = out.get();
  out->managed.deleter = [](DLManagedTensor* managed) {
    const std::unique_ptr<Output> mine(static_cast<Output*>(managed->context));
    give_back(mine->block);
  };
  const py::capsule made(&out->managed, "dltensor", [](PyObject* capsule) {  // unless somebody has taken it over
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
  out.release();
  return made;
}

// How a field's numbers are read: as addresses, whole numbers or fractions.
enum class Kind { ADDRESS, INT32, INT64, UINT32, UINT64, FLOAT, DOUBLE };
template <class T>
constexpr Kind kind_of() {
  if (std::is_pointer_v<T>) return Kind::ADDRESS;
  if (std::is_floating_point_v<T>) return sizeof(T) == sizeof(float) ? Kind::FLOAT : Kind::DOUBLE;
  if (std::is_unsigned_v<T>) return sizeof(T) == 4 ? Kind::UINT32 : Kind::UINT64;
  return sizeof(T) == 4 ? Kind::INT32 : Kind::INT64;
}

// One field of a launch's arguments. An address or an array that doesn't apply may be left out: null.
struct Field {
  const char* name;
  std::size_t offset, size;  // size: bytes of a number
  std::size_t items;         // 0: a number, else an array of so many
  Kind kind;
  PyObject* key;  // its name as Python looks it up
};
template <class T>
constexpr Field field(const char* name, std::size_t offset) {
  using Number = std::remove_all_extents_t<T>;
  return {name, offset, sizeof(Number), std::extent_v<T>, kind_of<Number>(), nullptr};
}

template <class T>
void write(char* to, T value) {
  std::memcpy(to, &value, sizeof value);
}
void set(Kind kind, char* to, PyObject* value) {
  switch (kind) {
    case Kind::ADDRESS:
    case Kind::UINT64:
      return write(to, PyLong_AsUnsignedLongLong(value));
    case Kind::UINT32:
      return write(to, static_cast<std::uint32_t>(PyLong_AsUnsignedLongLong(value)));
    case Kind::INT64:
      return write(to, PyLong_AsLongLong(value));
    case Kind::INT32:
      return write(to, static_cast<std::int32_t>(PyLong_AsLongLong(value)));
    case Kind::FLOAT:
      return write(to, static_cast<float>(PyFloat_AsDouble(value)));
    case Kind::DOUBLE:
      return write(to, PyFloat_AsDouble(value));
  }
}
void set(const Field& field, char* to, PyObject* value) {
  if (!field.items) return set(field.kind, to, value);
  const py::tuple items = py::reinterpret_borrow<py::object>(value);
  if (items.size() != field.items)
    throw py::type_error("expected " + std::to_string(field.items) + " numbers, got " + std::to_string(items.size()));
  for (std::size_t i = 0; i < field.items; i++) set(field.kind, to + i * field.size, items[i].ptr());
}

// Arguments and the table of the instruction set that was in use when they were filled.
template <class Args>
struct Bound {
  Args args;
  const Kernels* table;
};
template <auto kernel, class Args>
void call(const void* p, Worker& worker) {
  const auto& bound = *static_cast<const Bound<Args>*>(p);
  (bound.table->*kernel)(bound.args, worker);
}

constexpr std::size_t ROOM = 1024;  // bytes: no Bound is larger

// A kernel by name: what it takes to call it, now or from a recording.
struct Kernel {
  std::string op;
  std::size_t size, table;  // of its Bound, and where in it the table is; the arguments come first
  Body body;
  std::vector<Field> fields;

  void fill(char* bound, const py::dict& given) const {
    std::memset(bound, 0, size);
    write(bound + table, &kernels());
    std::size_t known = 0;
    for (const Field& field : fields) {
      if (PyObject* value = PyDict_GetItem(given.ptr(), field.key)) {
        set(field, bound + field.offset, value);
        known++;
      } else if (field.kind != Kind::ADDRESS && !field.items) {
        throw py::type_error("field " + std::string(field.name) + " is missing");
      }
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    if (known != given.size()) throw py::type_error("a keyword is no field of " + op);
  }
  // Where an address or an int64 is.
  std::size_t word(const std::string& name) const {
    for (const Field& field : fields)
      if (name == field.name && !field.items && (field.kind == Kind::ADDRESS || field.kind == Kind::INT64))
        return field.offset;
    throw py::key_error(op + " has no word " + name);
  }
};
const Kernel& kernel_of(const std::string& op, Kernel* added = nullptr) {
  static auto* all = new std::map<std::string, Kernel>;
  if (added) (*all)[op] = std::move(*added);
  const auto found = all->find(op);
  if (found == all->end()) throw py::value_error("no kernel is called " + op);
  return found->second;
}

// The list that takes this thread's launches as (op, threads, fields), or null.
thread_local PyObject* recording = nullptr;

// A launch reads its fields from the keywords itself: pybind11's own matching takes 150 ns for each of 50.
void def(py::module_& m, Kernel added) {
  for (Field& field : added.fields) field.key = PyUnicode_InternFromString(field.name);
  const std::string op = added.op;
  const Kernel& kernel = kernel_of(op, &added);
  m.def(
      kernel.op.c_str(),
      [&kernel](int threads, const py::kwargs& given) {
        alignas(64) char bound[ROOM];
        kernel.fill(bound, given);
        if (recording) py::handle(recording).attr("append")(py::make_tuple(kernel.op, threads, given));
        py::gil_scoped_release unlocked;
        run(kernel.body, bound, threads);
      },
      py::arg("threads"));
}

// Launches laid out to be run one after another without Python. A field may be another launch, (op, fields): the
// pointer to its arguments.
class Plan {
 public:
  explicit Plan(const py::list& launches) {
    for (const py::handle launch : launches) {
      const py::tuple parts = py::reinterpret_borrow<py::tuple>(launch);
      const auto op = parts[0].cast<std::string>();
      void* args = lay_out(op, parts[2].cast<py::dict>());
      steps_.push_back({kernel_of(op).body, args, parts[1].cast<int>()});
    }
    recording_ = {steps_.data(), steps_.size()};
  }
  Plan(const Plan&) = delete;
  ~Plan() { release(); }

  void run(int threads) {
    py::gil_scoped_release unlocked;
    replay(recording_, threads);
  }

  std::unique_ptr<Trace> trace(int threads) {
    auto times = std::make_unique<Trace>();
    py::gil_scoped_release unlocked;
    replay(recording_, threads, times.get());
    return times;
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  void* lay_out(const std::string& op, py::dict fields) {
    const Kernel& kernel = kernel_of(op);
    py::dict flat;
    for (const auto& [name, value] : fields)
      flat[name] =
          py::isinstance<py::tuple>(value) && py::len(value) == 2 && py::isinstance<py::str>(value[py::int_(0)])
              ? py::int_(reinterpret_cast<std::uintptr_t>(
                    lay_out(value[py::int_(0)].cast<std::string>(), value[py::int_(1)].cast<py::dict>())))
              : py::reinterpret_borrow<py::object>(value);
    storage_.push_back(std::make_unique<Line[]>((kernel.size + 63) / 64));
    kernel.fill(storage_.back()[0].bytes, flat);
    return storage_.back().get();
  }
  std::vector<std::unique_ptr<Line[]>> storage_;
  std::vector<Step> steps_;
  Recording recording_{};
};

// A launch whose arguments are set but for some pointers and int64 numbers, which each call gives: a call by name takes
// longer than a short kernel.
class Prepared {
 public:
  Prepared(const std::string& op, const py::tuple& given, py::dict fields)
      : names_(given), fields_(std::move(fields)), kernel_(kernel_of(op)), bound_(kernel_.size) {
    kernel_.fill(bound_.data(), fields_);
    for (const py::handle name : given) at_.push_back(kernel_.word(name.cast<std::string>()));
  }

  void operator()(int threads, const py::args& given) const {
    if (given.size() != at_.size()) throw py::type_error(kernel_.op + ": expected as many values as were named");
    if (recording) {
      const py::dict all = fields_.attr("copy")();
      for (std::size_t i = 0; i < at_.size(); i++) all[names_[i]] = given[i];
      py::handle(recording).attr("append")(py::make_tuple(kernel_.op, threads, all));
    }
    std::vector<char> bound = bound_;  // its own, for other threads may call too
    const Kernels* table = &kernels();
    std::memcpy(bound.data() + kernel_.table, &table, sizeof table);
    for (std::size_t i = 0; i < at_.size(); i++) {
      const long long word = PyLong_AsLongLong(PyTuple_GET_ITEM(given.ptr(), i));
      std::memcpy(bound.data() + at_[i], &word, sizeof word);
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    py::gil_scoped_release unlocked;
    gptfast::run(kernel_.body, bound.data(), threads);
  }

 private:
  py::tuple names_;
  py::dict fields_;
  const Kernel& kernel_;
  std::vector<char> bound_;
  std::vector<std::size_t> at_;
};

// BIND(op, Args, field, field, ...): one line per kernel.
#define PARENS ()
#define EXPAND(...) EXPAND1(EXPAND1(EXPAND1(EXPAND1(__VA_ARGS__))))
#define EXPAND1(...) EXPAND2(EXPAND2(EXPAND2(EXPAND2(__VA_ARGS__))))
#define EXPAND2(...) EXPAND3(EXPAND3(EXPAND3(EXPAND3(__VA_ARGS__))))
#define EXPAND3(...) __VA_ARGS__
#define EACH_FIELD(A, f, ...) \
  field<decltype(A::f)>(#f, offsetof(A, f)) __VA_OPT__(, EACH_FIELD_AGAIN PARENS(A, __VA_ARGS__))
#define EACH_FIELD_AGAIN() EACH_FIELD
#define BIND(op, A, ...)                   \
  static_assert(sizeof(Bound<A>) <= ROOM); \
  def(m,                                   \
      {#op, sizeof(Bound<A>), offsetof(Bound<A>, table), call<&Kernels::op, A>, {EXPAND(EACH_FIELD(A, __VA_ARGS__))}})

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "gptfast's kernels in C++ for the CPU. Use gptfast.ops; this module takes raw pointers.";
  m.def("isa", &isa, "The instruction set in use.");
  m.def("isas", &isas, "The instruction sets this machine can run, the narrowest first.");
  m.def("own_kernels", &own_kernels, py::arg("isa"), "Its kernels that the next narrower instruction set hasn't.");
  m.def("use_isa", &use_isa, py::arg("name"), "Use another instruction set's kernels from now on.");
  m.def("shares_cores", &shares_cores, "Whether PyTorch's idle threads sleep for ours: see openmp.h.");
  m.def("let_share", &let_share, py::arg("want"), "Whether launches may make them sleep, from now on.");
  m.def("join_pytorch", &join_pytorch, py::arg("join"), "Whether single kernels run on PyTorch's own threads.");
  m.def("output", &output, py::arg("shape"), py::arg("code"), py::arg("bits"),
        "A DLPack capsule of an uninitialised tensor, whose memory is kept for the next one.");
  m.def(
      "record", [](const py::object& list) { recording = list.is_none() ? nullptr : list.ptr(); }, py::arg("list"),
      "Appends this thread's launches as (op, threads, fields) to a list that the caller keeps, until record(None).");
  py::class_<Plan>(m, "Plan", "Launches laid out to be run one after another without Python.")
      .def(py::init<py::list>(), py::arg("launches"))
      .def("run", &Plan::run, py::arg("threads"))
      .def("trace", &Plan::trace, py::arg("threads"), "Runs it and returns its times.");
  py::class_<Trace>(m, "Trace", "Where the time of a replay went: see parallel.h.")
      .def_readonly("begin", &Trace::begin)
      .def_readonly("end", &Trace::end)
      .def_readonly("came", &Trace::came)
      .def_readonly("wait", &Trace::wait);
  py::class_<Prepared>(m, "Prepared",
                       "A launch with all its fields set but some pointers and int64, which each call gives.")
      .def(py::init<std::string, py::tuple, py::dict>(), py::arg("op"), py::arg("given"), py::arg("fields"))
      .def("__call__", &Prepared::operator());
  BIND(attention, Attention, out, lse, workspace, q, k, v, k_cache, v_cache, k_new, v_new, k_scale, v_scale, cos, sin,
       mask, bias, slopes, sinks, cu_q, cu_k, lengths, leftpad, batch_index, block_table, B, Sq, Sk, H, Hk, D,
       q_longest, q_strides, k_strides, v_strides, k_new_strides, v_new_strides, k_scale_strides, v_scale_strides,
       mask_strides, bias_strides, slopes_batch, page, table_stride, rotary, chunks, partial, seed, scale, softcap,
       keep_scale, stream, drop_below, dtype, cache_dtype, bias_dtype, causal, left, right, interleaved, rounded);
  BIND(attention_backward, AttentionBackward, dq, dk, dv, dbias, dsinks, delta, norm, workspace, dout, out, lse, dlse,
       q, k, v, mask, bias, slopes, sinks, cu_q, cu_k, B, Sq, Sk, H, Hk, D, q_longest, k_longest, q_strides, k_strides,
       v_strides, dout_strides, out_strides, mask_strides, bias_strides, bias_shape, slopes_batch, room, seed, scale,
       softcap, keep_scale, stream, drop_below, dtype, bias_dtype, causal, left, right, split);
  BIND(layer_norm, Norm, y, sum, mean, rstd, x, residual, weight, bias, rows, cols, block, block_stride, x_stride,
       residual_stride, seed, eps, keep_scale, stream, drop_below, dtype, weight_dtype);
  BIND(rms_norm, Norm, y, sum, rstd, x, residual, weight, rows, cols, block, block_stride, x_stride, residual_stride,
       seed, eps, keep_scale, stream, drop_below, dtype, weight_dtype);
  BIND(layer_norm_backward, NormBackward, dx, dresidual, dweight, dbias, workspace, dy, dsum, s, weight, mean, rstd,
       rows, cols, chunk, dy_stride, dsum_stride, block, block_stride, s_stride, seed, keep_scale, stream, drop_below,
       dtype, weight_dtype);
  BIND(rms_norm_backward, NormBackward, dx, dresidual, dweight, dbias, workspace, dy, dsum, s, weight, rstd, rows, cols,
       chunk, dy_stride, dsum_stride, block, block_stride, s_stride, seed, keep_scale, stream, drop_below, dtype,
       weight_dtype);
  BIND(rope, Rope, q_out, k_out, q, k, cos, sin, B, S, Hq, Hk, D, R, q_b, q_s, q_h, k_b, k_s, k_h, table_b, table_s,
       interleaved, dtype);
  BIND(linear, Linear, y, x, weight, bias, workspace, rows, cols, depth, x_stride, weight_stride, dtype, format,
       bias_dtype, source, before);
  BIND(linear_exact, Linear, y, x, weight, bias, workspace, rows, cols, depth, x_stride, weight_stride, dtype, format,
       bias_dtype, source, before);
  BIND(linear_int8, Linear, y, x, weight, bias, workspace, rows, cols, depth, x_stride, weight_stride, dtype, format,
       bias_dtype, source, before);
  BIND(linear_packed, Linear, y, x, weight, bias, workspace, rows, cols, depth, x_stride, weight_stride, dtype, format,
       bias_dtype, source, before);
  BIND(product, Product, c, rounded, sums, workspace, a, b, bias, rows, cols, depth, c_stride, a_row, a_depth, b_depth,
       b_col, a_dtype, b_dtype, rounded_dtype, of_b, add);
  BIND(sample, Sample, ids, logprobs, logits, logit_bias, mask, history, prompt_lengths, reals, top_k, seed, step,
       stream, per_row, rows, cols, logits_stride, bias_stride, mask_stride, history_cols, dtype, processed);
  BIND(advance, Advance, ids, positions, steps, lengths, drawn, running, history, prompt_lengths, rows, history_cols);
  BIND(ceilings, Ceilings, work, sink, data, copy, bytes, turns, what);
  BIND(pack, Pack, packed, raw, rows, depth, head, format);
  BIND(dequantize, Dequantize, y, packed, ids, positions, table, rows, depth, table_stride, format);
  BIND(bias_gelu, Mlp, y, x, other, rows, cols, x_stride, other_stride, tanh, dtype);
  BIND(swiglu, Mlp, y, x, other, rows, cols, x_stride, other_stride, dtype);
  BIND(geglu, Mlp, y, x, other, rows, cols, x_stride, other_stride, tanh, dtype);
  BIND(vocabulary_logits, Vocabulary, logits, tiles, stats, at_target, lse, rest, nll, smooth, entropy, x, weight, bias,
       index, target, class_weight, block_weight, rows, padded, depth, cols, x_stride, weight_stride, softcap,
       inverse_temperature, dtype);
  BIND(vocabulary_gradients, Vocabulary, logits, lse, rest, scale, slope, even, hit, dx, dweight, dbias, panels,
       dx_parts, x, weight, index, target, class_weight, rows, padded, depth, cols, x_stride, weight_stride, parts,
       softcap, inverse_temperature, made, add, dtype);
  BIND(token_kl, TokenKl, kl, p, q, partial, p_lse, p_rest, q_lse, q_rest, upstream, rows, padded, cols, p_softcap,
       q_softcap, inverse_temperature);
  BIND(cross_entropy, CrossEntropy, lse, rest, nll, smooth, logits, target, class_weight, block_weight, rows, cols,
       logits_stride, softcap, dtype);
  BIND(cross_entropy_backward, CrossEntropy, lse, rest, dlogits, scale, even, hit, logits, target, class_weight, rows,
       cols, logits_stride, softcap, dtype);
  BIND(bias_gelu_backward, MlpBackward, dx, dother, workspace, dy, x, other, rows, cols, chunk, dy_stride, x_stride,
       other_stride, tanh, dtype);
  BIND(swiglu_backward, MlpBackward, dx, dother, dy, x, other, rows, cols, dy_stride, x_stride, other_stride, dtype);
  BIND(geglu_backward, MlpBackward, dx, dother, dy, x, other, rows, cols, dy_stride, x_stride, other_stride, tanh,
       dtype);
  BIND(embedding_backward, EmbeddingBackward, dweight, dout, ids, first, order, segments, cols, dout_stride, dtype);
  BIND(embedding, Embedding, out, ids, positions, weight, position_weight, rows, cols, weight_stride, position_stride,
       dtype);
  BIND(gradient_norm, GradientNorm, norm, sums, grads, starts, sizes, grad_dtypes, tensors);
  BIND(adamw, AdamW, params, exp_avgs, exp_avg_sqs, masters, grads, steps, starts, sizes, dtypes, grad_dtypes, tensors,
       lr, beta1, beta2, eps, weight_decay, grad_scale);
  BIND(policy_loss, PolicyLoss, gradient, results, sums, counts, logprobs, old_logprobs, reference_logprobs, advantages,
       mask, rows, cols, logprobs_stride, old_stride, reference_stride, advantages_stride, mask_stride, advantages_step,
       denominator, low, high, beta, kind, sequences, dtype);
  BIND(value_loss, ValueLoss, gradient, results, sums, counts, values, old_values, returns, mask, rows, cols,
       values_stride, old_stride, returns_stride, mask_stride, denominator, clip, dtype);
  BIND(gae, Gae, advantages, returns, rewards, values, mask, rows, cols, rewards_stride, values_stride, mask_stride,
       gamma, lam, dtype);
}

}  // namespace gptfast
