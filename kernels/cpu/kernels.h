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
  KERNEL(ceilings, Ceilings)    \
  KERNEL(layer_norm, LayerNorm)

struct Ceilings {
  enum { FP32 = 0, INT8 = 1, READ = 2, COPY = 3 };
  double* work;      // written: the operations or bytes that all workers did
  void* sink;        // 2 vectors for each worker: operands, then results, so that no work can be left out
  const void* data;  // READ and COPY: bytes in all, shared out among the workers
  void* copy;        // COPY: as many, the destination
  int64_t bytes, turns;
  int32_t what;
};

struct LayerNorm {
  void *y, *sum;               // (rows, cols); sum = x + residual, null without a residual
  float *mean, *rstd;          // (rows), or null
  const void *x, *residual;    // (rows, cols) with row strides; residual may be null
  const void *weight, *bias;   // (cols), bias may be null
  int64_t rows, cols, x_stride, residual_stride;
  float eps;
  int32_t dtype, weight_dtype;  // weight_dtype is dtype or FLOAT32
};

struct Kernels {
#define GPTFAST_FIELD(name, Args) void (*name)(const Args&, Worker&);
  GPTFAST_KERNELS(GPTFAST_FIELD)
#undef GPTFAST_FIELD
};

}  // namespace gptfast
