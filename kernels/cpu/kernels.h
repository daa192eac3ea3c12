// What every kernel takes, and the table of kernels that each instruction set fills. Arguments are plain old data: the
// bindings fill them by name, and a recorded launch is a function pointer and a copy of them.
#pragma once
#include <cstdint>

#include "parallel.h"

namespace gptfast {

// Storage dtypes, as the Python side numbers them.
enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// One row per op: its name in C++ and Python, and its arguments in kernels.h.
#define GPTFAST_KERNELS(KERNEL) \
  KERNEL(layer_norm, LayerNorm) \
  KERNEL(linear, Linear)        \
  KERNEL(linear_exact, Linear)  \
  KERNEL(linear_int8, Linear)   \
  KERNEL(dequantize, Dequantize)

struct LayerNorm {
  void *y, *sum;              // (rows, cols); sum = x + residual, null without a residual
  float *mean, *rstd;         // (rows), or null
  const void *x, *residual;   // (rows, cols) with row strides; residual may be null
  const void *weight, *bias;  // (cols), bias may be null
  int64_t rows, cols, x_stride, residual_stride;
  float eps;
  int32_t dtype, weight_dtype;  // weight_dtype is dtype or FLOAT32
};

struct Linear {
  void* y;             // (rows, cols)
  const void* x;       // (rows, depth) with a row stride
  const void* weight;  // (cols, depth) with a row stride; quantised: packed panels (linear.h)
  const void* bias;    // (cols), or null
  void* workspace;     // shared by the workers: rows * (depth rounded up to 64) floats; null: each has its own
  int64_t rows, cols, depth, x_stride, weight_stride;
  int32_t dtype, format, bias_dtype;  // format: the weight's dtype, or 3 Q8_0, 4 Q4_0, 5 Q4_1
};

struct Dequantize {
  float* y;            // (rows, depth)
  const void* packed;  // panels of a quantised weight
  const int64_t* ids;  // (rows): which of its rows; null: 0, 1, 2, ...
  int64_t rows, depth;
  int32_t format;
};

struct Kernels {
#define GPTFAST_FIELD(name, Args) void (*name)(const Args&, Worker&);
  GPTFAST_KERNELS(GPTFAST_FIELD)
#undef GPTFAST_FIELD
};

}  // namespace gptfast
