// What normalization.cpp asks of its inner loops (normalization_rows.inl.h), which are compiled once per instruction
// set. A job is some rows of one segment; pointers to what is absent are null.
#pragma once
#include <cstdint>

namespace trellis {

template <class T>
struct NormJob {
  int64_t rows, width;
  const T *x, *update, *gate, *gain, *shift;
  T eps, unit;
  T *sum, *out, *mean, *rstd;
};

// Adds to gain_gradient and shift_gradient [width].
template <class T>
struct NormGradientJob {
  int64_t rows, width;
  const T *out_gradient, *x, *gain, *mean, *rstd;
  T unit;
  T *x_gradient, *gain_gradient, *shift_gradient;
};

template <class T>
struct GateJob {
  int64_t rows, width;
  const T *x, *update, *gate;
  T* out;
};

// Adds to gate_gradient [width].
template <class T>
struct GateGradientJob {
  int64_t rows, width;
  const T *out_gradient, *update, *gate;
  T *update_gradient, *gate_gradient;
};

// x [rows, parts, heads, width] -> out [rows, out_parts, heads, width]; the first `normalised` parts have a gamma.
template <class T>
struct HeadsJob {
  int64_t rows, parts, out_parts, normalised, heads, width;
  const T *x, *gamma;
  T* out;
};

// Adds to gamma_gradient [normalised, heads, width].
template <class T>
struct HeadsGradientJob {
  int64_t rows, parts, out_parts, normalised, heads, width;
  const T *out_gradient, *x, *gamma;
  T *x_gradient, *gamma_gradient;
};

#define TRELLIS_ROWS_OF(isa, T)                \
  namespace isa {                              \
  void norm_rows(const NormJob<T>&);           \
  void norm_rows(const NormGradientJob<T>&);   \
  void gate_rows(const GateJob<T>&);           \
  void gate_rows(const GateGradientJob<T>&);   \
  void norm_heads(const HeadsJob<T>&);         \
  void norm_heads(const HeadsGradientJob<T>&); \
  }
#define TRELLIS_ROWS(isa)     \
  TRELLIS_ROWS_OF(isa, float) \
  TRELLIS_ROWS_OF(isa, double)
TRELLIS_ROWS(rows_baseline)
TRELLIS_ROWS(rows_avx2)
TRELLIS_ROWS(rows_avx512)
#undef TRELLIS_ROWS
#undef TRELLIS_ROWS_OF

}  // namespace trellis
