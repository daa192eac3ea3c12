// What every kernel takes, and the table of kernels that each instruction set fills. Arguments are plain old data: the
// bindings fill them by name, and a recorded launch is a function pointer and a copy of them.
#pragma once
#include <cstdint>

#include "parallel.h"

namespace gptfast {

// Storage dtypes, as the Python side numbers them.
enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// One row per op: its name in C++ and Python, and its arguments in kernels.h.
#define GPTFAST_KERNELS(KERNEL) KERNEL(layer_norm, LayerNorm) KERNEL(sample, Sample)

struct LayerNorm {
  void *y, *sum;               // (rows, cols); sum = x + residual, null without a residual
  float *mean, *rstd;          // (rows), or null
  const void *x, *residual;    // (rows, cols) with row strides; residual may be null
  const void *weight, *bias;   // (cols), bias may be null
  int64_t rows, cols, x_stride, residual_stride;
  float eps;
  int32_t dtype, weight_dtype;  // weight_dtype is dtype or FLOAT32
};

struct Sample {
  int64_t* ids;                   // (rows)
  float* logprobs;                // (rows), or null
  const void* logits;             // (rows, cols)
  const float* logit_bias;        // (cols) with stride 0, or (rows, cols), or null
  const uint8_t* mask;            // likewise, 0 = forbidden
  const int64_t* history;         // (rows, history_cols), or null
  const int64_t* prompt_lengths;  // (rows), or null
  const float* reals;             // (7) temperature, top_p, min_p, typical_p, repetition, presence, frequency penalty
  const int64_t* integers;        // (4) top_k, seed, step, stream
  const void* const* per_row;     // (7 + 4) null, or (rows) to use instead: the parameters in the same order
  int64_t rows, cols, logits_stride, bias_stride, mask_stride, history_cols;
  int32_t dtype, processed;  // processed: log-probabilities after the filters, not of the logits as given
};

struct Kernels {
#define GPTFAST_FIELD(name, Args) void (*name)(const Args&, Worker&);
  GPTFAST_KERNELS(GPTFAST_FIELD)
#undef GPTFAST_FIELD
};

}  // namespace gptfast
