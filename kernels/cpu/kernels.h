// What every kernel takes, and the table of kernels that each instruction set fills. Arguments are plain old data: the
// bindings fill them by name, and a recorded launch is a function pointer and a copy of them.
#pragma once
#include <cstdint>

#include "parallel.h"

namespace gptfast {

// Storage dtypes, as the Python side numbers them.
enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };  // INT8: of KV caches alone

// One row per op: its name in C++ and Python, and its arguments in kernels.h.
#define GPTFAST_KERNELS(KERNEL)                 \
  KERNEL(attention, Attention)                  \
  KERNEL(attention_backward, AttentionBackward) \
  KERNEL(layer_norm, Norm)                      \
  KERNEL(rms_norm, Norm)                        \
  KERNEL(layer_norm_backward, NormBackward)     \
  KERNEL(rms_norm_backward, NormBackward)       \
  KERNEL(rope, Rope)                            \
  KERNEL(linear, Linear)                        \
  KERNEL(linear_exact, Linear)                  \
  KERNEL(linear_int8, Linear)                   \
  KERNEL(linear_packed, Linear)                 \
  KERNEL(product, Product)                      \
  KERNEL(dequantize, Dequantize)                \
  KERNEL(pack, Pack)                            \
  KERNEL(bias_gelu, Mlp)                        \
  KERNEL(swiglu, Mlp)                           \
  KERNEL(geglu, Mlp)                            \
  KERNEL(bias_gelu_backward, MlpBackward)       \
  KERNEL(swiglu_backward, MlpBackward)          \
  KERNEL(geglu_backward, MlpBackward)           \
  KERNEL(embedding, Embedding)                  \
  KERNEL(embedding_backward, EmbeddingBackward) \
  KERNEL(sample, Sample)                        \
  KERNEL(advance, Advance)                      \
  KERNEL(ceilings, Ceilings)                    \
  KERNEL(adamw, AdamW)                          \
  KERNEL(gradient_norm, GradientNorm)           \
  KERNEL(policy_loss, PolicyLoss)               \
  KERNEL(value_loss, ValueLoss)                 \
  KERNEL(gae, Gae)                              \
  KERNEL(vocabulary_logits, Vocabulary)         \
  KERNEL(vocabulary_gradients, Vocabulary)      \
  KERNEL(token_kl, TokenKl)                     \
  KERNEL(cross_entropy, CrossEntropy)           \
  KERNEL(cross_entropy_backward, CrossEntropy)

// Strides are in elements; the last dimension is contiguous. Pointers that don't apply are null.
struct Attention {
  void* out;                  // (B, Sq, H, D), or (T, H, D) with cu_q, contiguous
  float* lse;                 // (B, H, Sq) or (H, T)
  float* workspace;           // partial results of (sequence, KV head, chunk of keys); null = keys aren't split
  const void *q, *k, *v;      // (B, Sq, H, D), (B, Sk, Hk, D); k and v may be a cache, or pages (pages, page, Hk, D)
  void *k_cache, *v_cache;    // the same memory as k and v where k_new and v_new are appended to it
  const void *k_new, *v_new;  // (B, Sq, Hk, D)
  float *k_scale, *v_scale;   // of an int8 cache: like k and v without D
  const float *cos, *sin;     // (positions, rotary / 2), contiguous
  const uint8_t* mask;        // broadcast to (B, H, Sq, Sk) by its strides, as is bias
  const void* bias;
  const float *slopes, *sinks;                     // (H) or (B, H) by slopes_batch; (H)
  const int32_t *cu_q, *cu_k;                      // (B + 1)
  const int32_t *lengths, *leftpad, *batch_index;  // (B)
  const int32_t* block_table;                      // (B, table_stride)
  int64_t B, Sq, Sk, H, Hk, D;                     // with cu_q, Sq is the total; of a cache, Sk is the room
  int64_t q_longest;                               // the longest sequence of queries
  int64_t q_strides[3];                            // batch, position, head
  int64_t k_strides[3], v_strides[3];              // batch or page, position, head
  int64_t k_new_strides[3], v_new_strides[3];      // batch, position, head
  int64_t k_scale_strides[3], v_scale_strides[3];  // batch or page, position, head
  int64_t mask_strides[4], bias_strides[4];        // batch, head, query, key
  int64_t slopes_batch, page, table_stride, rotary;
  int64_t chunks, partial;  // of workspace: chunks a sequence may have, floats a chunk
  uint64_t seed;
  float scale, softcap, keep_scale;  // keep_scale = 1 / (1 - p)
  uint32_t stream, drop_below;       // drop_below = floor(p * 2^32); 0 = no dropout
  int32_t dtype, cache_dtype;        // cache_dtype: of k, v and the caches; dtype, or any where that is FLOAT32
  int32_t bias_dtype, causal, left, right, interleaved;
  int32_t rounded;  // q to cache_dtype, of 16 bits; and P for its product with V where that pays
};

struct AttentionBackward {  // of an Attention without a cache, whose names it keeps
  void *dq, *dk, *dv;       // like q, k and v, contiguous
  void* dbias;              // of bias's dtype and own shape, or null, as dsinks
  float* dsinks;            // (H)
  float* delta;             // workspace like lse: rowsum(dout out) - dlse
  float* norm;              // workspace like lse, or null: delta and the sum of p from the probabilities themselves
  float* workspace;         // for each worker `room` floats; not with `split`
  const void *dout, *out;   // like q
  const float *lse, *dlse;  // (B, H, Sq) or (H, T), contiguous; dlse may be null
  const void *q, *k, *v;    // (B, Sq, H, D), (B, Sk, Hk, D), or (T, H, D) with cu_q
  const uint8_t* mask;      // broadcast to (B, H, Sq, Sk) by its strides, as is bias
  const void* bias;
  const float *slopes, *sinks;
  const int32_t *cu_q, *cu_k;  // (B + 1)
  int64_t B, Sq, Sk, H, Hk, D, q_longest, k_longest;
  int64_t q_strides[3], k_strides[3], v_strides[3], dout_strides[3], out_strides[3];  // batch, position, head
  int64_t mask_strides[4], bias_strides[4];
  int64_t bias_shape[4];  // 1 where it is broadcast
  int64_t slopes_batch, room;
  uint64_t seed;
  float scale, softcap, keep_scale;
  uint32_t stream, drop_below;
  int32_t dtype, bias_dtype, causal, left, right;
  int32_t split;  // dQ apart from dK and dV, each shared out by blocks: for few heads
};

struct Norm {                 // layer_norm and rms_norm
  void *y, *sum;              // (rows, cols); sum = dropout(x) + residual, null without a residual
  float *mean, *rstd;         // (rows), or null
  const void *x, *residual;   // (rows, cols); residual may be null; x: blocks of `block` rows, each with its strides
  const void *weight, *bias;  // (cols), bias may be null
  int64_t rows, cols, block, block_stride, x_stride, residual_stride;
  uint64_t seed;
  float eps, keep_scale;        // keep_scale = 1 / (1 - p)
  uint32_t stream, drop_below;  // drop_below = floor(p * 2^32); 0 = no dropout
  int32_t dtype, weight_dtype;  // weight_dtype is dtype or FLOAT32
};

struct NormBackward {        // layer_norm_backward and rms_norm_backward
  void *dx, *dresidual;      // (rows, cols); dresidual: null unless dropout tells it from dx
  void *dweight, *dbias;     // (cols), each may be null
  float* workspace;          // (ceil(rows / chunk), 2, cols)
  const void *dy, *dsum;     // (rows, cols); dsum may be null
  const void *s, *weight;    // what was normalised, (rows, cols) in blocks as Norm's x, and (cols)
  const float *mean, *rstd;  // (rows); mean null for rms_norm
  int64_t rows, cols, chunk, dy_stride, dsum_stride, block, block_stride, s_stride;
  uint64_t seed;
  float keep_scale;
  uint32_t stream, drop_below;
  int32_t dtype, weight_dtype;
};

struct Rope {
  void *q_out, *k_out;     // (B, S, Hq, D) and (B, S, Hk, D), contiguous
  const void *q, *k;       // the same shapes with strides in elements, D contiguous
  const float *cos, *sin;  // (B, S, R/2); table_b is 0 where the batch shares one
  int64_t B, S, Hq, Hk, D, R, q_b, q_s, q_h, k_b, k_s, k_h, table_b, table_s;
  int32_t interleaved, dtype;
};

struct Linear {
  enum Before : int32_t { NONE, LAYER_NORM, RMS_NORM, BIAS_GELU, SWIGLU, GEGLU };
  void* y;             // (rows, cols)
  const void* x;       // (rows, depth) with a row stride
  const void* weight;  // (cols, depth) with a row stride; quantised: packed panels (linear.h)
  const void* bias;    // (cols), or null
  void* workspace;     // shared by the workers: rows * (depth rounded up to 64) floats; null: each has its own
  const void* source;  // with `before`: the Norm or Mlp of that launch. Its y, never written, takes the place of x. Its
                       // other outputs overlap none of its inputs.
  int64_t rows, cols, depth, x_stride, weight_stride;
  int32_t dtype, format, bias_dtype;  // format: the weight's dtype, or 3 Q8_0, 4 Q4_0, 5 Q4_1
  int32_t before;
};

struct Product {      // c = a b + bias, of matrices stored either way round
  float* c;           // (rows, cols), or, where rounded isn't null,
  void* rounded;      // the same of rounded_dtype
  float* sums;        // (rows): sums over a's columns; with of_b (cols): over b's rows; their own side is
                      // contiguous then. Or null
  float* workspace;   // both operands: rows and cols, each rounded up to whole panels, times depth
  const void *a, *b;  // (rows, depth), (depth, cols); one stride of each is 1
  const float* bias;  // (cols), or null
  int64_t rows, cols, depth, c_stride, a_row, a_depth, b_depth, b_col;
  int32_t a_dtype, b_dtype, rounded_dtype, of_b, add;  // add: to what c and sums hold
};

struct Pack {
  void* packed;     // panels of a quantised weight, the last one filled up with zeros
  const void* raw;  // (rows, depth / 32) GGUF blocks
  int64_t rows, depth;
  int64_t head;  // rows of a head that the file has in pairs (2i, 2i + 1), which become i and i + head / 2; 0: in order
  int32_t format;
};

struct Dequantize {
  float* y;                        // (rows, depth)
  const void* packed;              // panels of a quantised weight
  const int64_t *ids, *positions;  // (rows): which of its rows; null: 0, 1, 2, ...; which of the table's
  const float* table;              // rows of depth to add, or null
  int64_t rows, depth, table_stride;
  int32_t format;
};

struct Sample {
  int64_t* ids;                   // (rows)
  float* logprobs;                // (rows), or null
  const void* logits;             // (rows, cols)
  const float* logit_bias;        // (cols) with stride 0, or (rows, cols), or null
  const uint8_t* mask;            // likewise, 0 = forbidden
  const int64_t* history;         // (rows, history_cols), or null
  const int64_t* prompt_lengths;  // (rows), or null
  float reals[7];                 // temperature, top_p, min_p, typical_p, repetition, presence, frequency penalty
  int64_t top_k, seed, step, stream;
  const void* per_row[7 + 4];  // null, or (rows) to use instead: the parameters in the same order
  int64_t rows, cols, logits_stride, bias_stride, mask_stride, history_cols;
  int32_t dtype, processed;  // processed: log-probabilities after the filters, not of the logits as given
};

struct Advance {                  // all (rows)
  int64_t *ids, *positions;       // of the next step
  int64_t* steps;                 // of the sampler
  int32_t* lengths;               // of the cache
  const int64_t* drawn;           // the tokens of this step
  const int32_t* running;         // 1, or 0 for a row that has ended
  int64_t* history;               // (rows, history_cols), or null
  const int64_t* prompt_lengths;  // with history
  int64_t rows, history_cols;
};

struct Ceilings {
  enum { FP32 = 0, INT8 = 1, READ = 2, COPY = 3, BF16 = 4 };
  double* work;      // written: the operations or bytes that all workers did
  void* sink;        // 2 vectors for each worker: operands, then results, so that no work can be left out
  const void* data;  // READ and COPY: bytes in all, shared out among the workers
  void* copy;        // COPY: as many, the destination
  int64_t bytes, turns;
  int32_t what;
};

struct Mlp {              // bias_gelu, swiglu and geglu
  void* y;                // (rows, cols)
  const void *x, *other;  // x or gate, and bias (stride 0; may be null) or up: (rows, cols) with row strides
  int64_t rows, cols, x_stride, other_stride;
  int32_t tanh, dtype;  // tanh: GELU's approximation instead of erf
};

struct MlpBackward {           // bias_gelu_backward, swiglu_backward and geglu_backward
  void *dx, *dother;           // (rows, cols), of x or gate and of up; dother for bias_gelu: (cols), or null
  float* workspace;            // bias_gelu's with dother: (ceil(rows / chunk), cols)
  const void *dy, *x, *other;  // as Mlp's
  int64_t rows, cols, chunk, dy_stride, x_stride, other_stride;
  int32_t tanh, dtype;
};

struct Embedding {
  void* out;                             // (rows, cols)
  const int64_t *ids, *positions;        // (rows), within the tables; positions may be null
  const void *weight, *position_weight;  // rows of cols elements; weight_stride -1: panels
  int64_t rows, cols, weight_stride, position_stride;
  int32_t dtype;
};

// A chunk of rows of x against a whole vocabulary: vocabulary.h has the layout of its logits.
struct Vocabulary {
  float* logits;                               // (columns in whole blocks / 16, padded, 16); null = statistics alone
  float *tiles, *stats, *at_target;            // workspace: (padded, depth), (4, rows, blocks), (rows)
  float *lse, *rest, *nll, *smooth, *entropy;  // (rows); all but lse may be null; rest: what lse was rounded by
  const float *scale, *slope, *even, *hit;     // (rows): see Gradient
  float *dx, *dweight, *dbias;                 // (all rows, depth), (cols, depth), (cols)
  float *panels, *dx_parts;       // workspace: (depth in whole groups, rows), (parts, depth in groups, padded)
  const void *x, *weight, *bias;  // (all rows, depth), (cols, depth), (cols) of one dtype
  const int64_t* index;           // (rows) which rows of x and dx
  const int32_t* target;          // (rows), or null
  const float *class_weight, *block_weight;                           // (cols), (blocks): their sums
  int64_t rows, padded, depth, cols, x_stride, weight_stride, parts;  // padded: a multiple of 24
  float softcap, inverse_temperature;
  int32_t made, add, dtype;  // made: logits hold their gradient already; add: dweight and dbias hold sums already
};

struct CrossEntropy {
  float *lse, *rest, *nll, *smooth;  // (rows); smooth may be null
  void* dlogits;                     // (rows, cols)
  const float *scale, *even, *hit;   // (rows): see Gradient
  const void* logits;                // rows of cols
  const int32_t* target;             // (rows), -1 = none
  const float *class_weight, *block_weight;
  int64_t rows, cols, logits_stride;
  float softcap;
  int32_t dtype;
};

// Of two chunks of logits as vocabulary_logits leaves them.
struct TokenKl {
  float *kl, *p, *q;                                        // kl (rows)
  float* partial;                                           // workspace: (rows, blocks)
  const float *p_lse, *p_rest, *q_lse, *q_rest, *upstream;  // (rows); upstream null = no gradients
  int64_t rows, padded, cols;
  float p_softcap, q_softcap, inverse_temperature;
};

struct EmbeddingBackward {             // of one table: a row is the sum of the gradients of its places, in order
  void* dweight;                       // (V, cols), zeros where no place has that row
  const void* dout;                    // (places, cols)
  const int64_t *ids, *first, *order;  // (segments), (segments + 1), (places): row ids[i] has places order[first[i] ..]
  int64_t segments, cols, dout_stride;
  int32_t dtype;
};

struct GradientNorm {             // of a list of tensors
  double *norm, *sums;            // sums: one for each chunk
  const void* const* grads;       // (tensors)
  const int64_t *starts, *sizes;  // (tensors + 1): each one's first chunk; (tensors): elements
  const int32_t* grad_dtypes;     // (tensors)
  int64_t tensors;
};

struct AdamW {  // lists have one entry for each tensor
  void* const* params;
  float *const *exp_avgs, *const *exp_avg_sqs, *const *masters;  // masters, or any of them, may be null
  const void* const* grads;
  const float* const* steps;            // this one included
  const int64_t *starts, *sizes;        // as in GradientNorm
  const int32_t *dtypes, *grad_dtypes;  // a gradient's is its parameter's, or FLOAT32
  int64_t tensors;
  double lr, beta1, beta2, eps, weight_decay, grad_scale;
};

// Tensors of all three are (rows, cols) with row strides; mask may be null.
struct PolicyLoss {
  float* gradient;  // (rows, cols) of the loss by logprobs, contiguous; or null
  float* results;   // loss, clip_fraction, approx_kl, ratio_mean, ratio_var, kl
  double* sums;     // (rows, 8)
  int64_t* counts;  // (rows): tokens of the mask
  const void *logprobs, *old_logprobs, *reference_logprobs, *advantages;  // reference_logprobs may be null
  const uint8_t* mask;
  int64_t rows, cols, logprobs_stride, old_stride, reference_stride, advantages_stride, mask_stride;
  int64_t advantages_step;         // 1, or 0 where each row has one
  double denominator;              // 0: the tokens, or with `sequences` the rows
  float low, high, beta;           // 1 - clip, 1 + clip_high
  int32_t kind, sequences, dtype;  // kind: 1, 2, 3 for k1, k2, k3
};

struct ValueLoss {
  float* gradient;  // as in PolicyLoss
  float* results;   // loss, clip_fraction
  double* sums;     // (rows, 2)
  int64_t* counts;
  const void *values, *old_values, *returns;
  const uint8_t* mask;
  int64_t rows, cols, values_stride, old_stride, returns_stride, mask_stride;
  double denominator;
  float clip;
  int32_t dtype;
};

struct Gae {
  float *advantages, *returns;  // contiguous
  const void *rewards, *values;
  const uint8_t* mask;
  int64_t rows, cols, rewards_stride, values_stride, mask_stride;
  float gamma, lam;
  int32_t dtype;
};

struct Kernels {
#define GPTFAST_FIELD(name, Args) void (*name)(const Args&, Worker&);
  GPTFAST_KERNELS(GPTFAST_FIELD)
#undef GPTFAST_FIELD
};

}  // namespace gptfast
