// Rows of the launch before a linear: a source of its own, for three linears make them.
#include "prologue.h"

#include "mlp.h"
#include "norm.h"

namespace gptfast::ISA {

namespace {

template <class T>
void norm_row_to(const Linear& a, int64_t r, bool others, T* y, float* memory) {
  const Norm& norm = *(const Norm*)a.source;
  NormRow<T> out = others ? norm_row<T>(norm, r) : NormRow<T>{};
  out.y = y;
  auto make = [&](auto w) {
    if (a.before == Linear::LAYER_NORM)
      layer_norm_row<T, decltype(w)>(norm, r, false, memory, out);
    else
      rms_norm_row<T, decltype(w)>(norm, r, false, memory, out);
  };
  if (norm.weight_dtype == norm.dtype)
    make(T{});
  else
    make(float{});
}

template <class T>
void mlp_row_to(const Linear& a, int64_t r, T* y) {
  const Mlp& mlp = *(const Mlp*)a.source;
  auto make = [&](auto f) { mlp_row(mlp, r, false, y, f); };
  if (a.before == Linear::BIAS_GELU)
    with_bias_gelu(mlp, make);
  else if (a.before == Linear::SWIGLU)
    with_swiglu(mlp, make);
  else
    with_geglu(mlp, make);
}

}  // namespace

void make_row(const Linear& a, int64_t r, bool others, void* y, float* memory) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (a.before == Linear::LAYER_NORM || a.before == Linear::RMS_NORM)
      norm_row_to(a, r, others, (T*)y, memory);
    else
      mlp_row_to(a, r, (T*)y);
  });
}

}  // namespace gptfast::ISA
