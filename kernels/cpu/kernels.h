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
  KERNEL(layer_norm, Norm)      \
  KERNEL(rms_norm, Norm)        \
  KERNEL(rope, Rope)            \
  KERNEL(bias_gelu, Mlp)        \
  KERNEL(swiglu, Mlp)           \
  KERNEL(geglu, Mlp)            \
  KERNEL(embedding, Embedding)

struct Norm {                 // layer_norm and rms_norm
  void *y, *sum;              // (rows, cols); sum = dropout(x) + residual, null without a residual
  float *mean, *rstd;         // (rows), or null
  const void *x, *residual;   // (rows, cols) with row strides; residual may be null
  const void *weight, *bias;  // (cols), bias may be null
  int64_t rows, cols, x_stride, residual_stride;
  uint64_t seed;
  float eps, keep_scale;        // keep_scale = 1 / (1 - p)
  uint32_t stream, drop_below;  // drop_below = floor(p * 2^32); 0 = no dropout
  int32_t dtype, weight_dtype;  // weight_dtype is dtype or FLOAT32
};

struct Rope {
  void *q_out, *k_out;     // (B, S, Hq, D) and (B, S, Hk, D), contiguous
  const void *q, *k;       // the same shapes with strides in elements, D contiguous
  const float *cos, *sin;  // (B, S, R/2); table_b is 0 where the batch shares one
  int64_t B, S, Hq, Hk, D, R, q_b, q_s, q_h, k_b, k_s, k_h, table_b, table_s;
  int32_t interleaved, dtype;
};

struct Mlp {              // bias_gelu, swiglu and geglu
  void* y;                // (rows, cols)
  const void *x, *other;  // x or gate, and bias (stride 0; may be null) or up: (rows, cols) with row strides
  int64_t rows, cols, x_stride, other_stride;
  int32_t tanh, dtype;  // tanh: GELU's approximation instead of erf
};

struct Embedding {
  void* out;                             // (rows, cols)
  const int64_t *ids, *positions;        // (rows), within the tables; positions may be null
  const void *weight, *position_weight;  // rows of cols elements
  int64_t rows, cols, weight_stride, position_stride;
  int32_t dtype;
};

struct Kernels {
#define GPTFAST_FIELD(name, Args) void (*name)(const Args&, Worker&);
  GPTFAST_KERNELS(GPTFAST_FIELD)
#undef GPTFAST_FIELD
};

}  // namespace gptfast
