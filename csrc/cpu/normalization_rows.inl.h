// The inner loops of the normalisations; included once per instruction set with TRELLIS_ISA as the namespace. They are
// plain loops that the compiler vectorises; sums run in lanes, in an order that depends on the instruction set alone.
#include "normalization_rows.h"

namespace trellis {
namespace TRELLIS_ISA {

static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }

template <class T>
static inline void norm_row(const NormJob<T>& job, int64_t row) {
  const int64_t width = job.width;
  const T* x = job.x + row * width;
  T total = 0;
  if (job.update) {
    const T* const update = job.update + row * width;
    T* const sum = job.sum + row * width;
    if (job.gate) {
#pragma omp simd reduction(+ : total)
      for (int64_t c = 0; c < width; ++c) total += sum[c] = x[c] + job.gate[c] * update[c];
    } else {
#pragma omp simd reduction(+ : total)
      for (int64_t c = 0; c < width; ++c) total += sum[c] = x[c] + update[c];
    }
    x = sum;
  } else {
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < width; ++c) total += x[c];
  }
  const T mean = total / T(width);
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < width; ++c) squares += (x[c] - mean) * (x[c] - mean);
  const T rstd = T(1) / root(squares / T(width) + job.eps);
  T* const out = job.out + row * width;
  if (job.gain) {
    const T *const gain = job.gain, *const shift = job.shift, unit = job.unit;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) out[c] = (x[c] - mean) * rstd * (unit + gain[c]) + shift[c];
  } else {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) out[c] = (x[c] - mean) * rstd;
  }
  job.mean[row] = mean;
  job.rstd[row] = rstd;
}

template <class T>
static inline void norm_gradient_row(const NormGradientJob<T>& job, int64_t row) {
  const int64_t width = job.width;
  const T *const upstream = job.out_gradient + row * width, *const x = job.x + row * width;
  const T mean = job.mean[row], rstd = job.rstd[row], unit = job.unit;
  const T* const gain = job.gain;
  T* const out = job.x_gradient + row * width;
  // With n = (x - mean) rstd and g = upstream (unit + gain): x' = rstd (g - mean(g) - n mean(g n)).
  T plain = 0, along = 0;
  if (gain) {
    T *const gain_gradient = job.gain_gradient, *const shift_gradient = job.shift_gradient;
#pragma omp simd reduction(+ : plain, along)
    for (int64_t c = 0; c < width; ++c) {
      const T normalised = (x[c] - mean) * rstd, g = upstream[c] * (unit + gain[c]);
      gain_gradient[c] += upstream[c] * normalised;
      shift_gradient[c] += upstream[c];
      plain += g;
      along += g * normalised;
    }
    plain /= T(width);
    along /= T(width);
#pragma omp simd
    for (int64_t c = 0; c < width; ++c)
      out[c] = rstd * (upstream[c] * (unit + gain[c]) - plain - (x[c] - mean) * rstd * along);
  } else {
#pragma omp simd reduction(+ : plain, along)
    for (int64_t c = 0; c < width; ++c) {
      plain += upstream[c];
      along += upstream[c] * (x[c] - mean) * rstd;
    }
    plain /= T(width);
    along /= T(width);
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) out[c] = rstd * (upstream[c] - plain - (x[c] - mean) * rstd * along);
  }
}

template <class T>
static inline void gate_row(const GateJob<T>& job, int64_t row) {
  const T *const x = job.x + row * job.width, *const update = job.update + row * job.width, *const gate = job.gate;
  T* const out = job.out + row * job.width;
#pragma omp simd
  for (int64_t c = 0; c < job.width; ++c) out[c] = x[c] + gate[c] * update[c];
}

template <class T>
static inline void gate_gradient_row(const GateGradientJob<T>& job, int64_t row) {
  const T *const upstream = job.out_gradient + row * job.width, *const update = job.update + row * job.width;
  const T* const gate = job.gate;
  T *const out = job.update_gradient + row * job.width, *const gate_gradient = job.gate_gradient;
#pragma omp simd
  for (int64_t c = 0; c < job.width; ++c) {
    out[c] = gate[c] * upstream[c];
    gate_gradient[c] += upstream[c] * update[c];
  }
}

constexpr double kLeastNorm = 1e-12;  // a head shorter than this is divided by this instead

template <class T>
static inline void norm_row_of_heads(const HeadsJob<T>& job, int64_t row) {
  const int64_t part_size = job.heads * job.width;
  const T factor = root(T(job.width));
  for (int64_t part = 0; part < job.out_parts; ++part) {
    const T* x = job.x + (row * job.parts + part) * part_size;
    T* out = job.out + (row * job.out_parts + part) * part_size;
    if (part >= job.normalised) {
#pragma omp simd
      for (int64_t c = 0; c < part_size; ++c) out[c] = x[c];
      continue;
    }
    const T* gamma = job.gamma + part * part_size;
    for (int64_t head = 0; head < job.heads; ++head, x += job.width, gamma += job.width, out += job.width) {
      T squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t c = 0; c < job.width; ++c) squares += x[c] * x[c];
      const T norm = root(squares), scale = factor / (norm > T(kLeastNorm) ? norm : T(kLeastNorm));
#pragma omp simd
      for (int64_t c = 0; c < job.width; ++c) out[c] = x[c] * scale * gamma[c];
    }
  }
}

template <class T>
static inline void norm_gradient_row_of_heads(const HeadsGradientJob<T>& job, int64_t row) {
  const int64_t part_size = job.heads * job.width;
  const T factor = root(T(job.width));
  for (int64_t part = 0; part < job.parts; ++part) {
    const T* x = job.x + (row * job.parts + part) * part_size;
    const T* upstream = job.out_gradient + (row * job.out_parts + part) * part_size;
    T* out = job.x_gradient + (row * job.parts + part) * part_size;
    if (part >= job.normalised) {
      const bool copied = part < job.out_parts;
      for (int64_t c = 0; c < part_size; ++c) out[c] = copied ? upstream[c] : T(0);
      continue;
    }
    const T* gamma = job.gamma + part * part_size;
    T* gamma_gradient = job.gamma_gradient + part * part_size;
    for (int64_t head = 0; head < job.heads; ++head) {
      T squares = 0, along = 0;
#pragma omp simd reduction(+ : squares, along)
      for (int64_t c = 0; c < job.width; ++c) {
        squares += x[c] * x[c];
        along += upstream[c] * gamma[c] * x[c];
      }
      const T norm = root(squares);
      const bool ordinary = norm > T(kLeastNorm);
      const T scale = factor / (ordinary ? norm : T(kLeastNorm)), projection = ordinary ? along / squares : T(0);
#pragma omp simd
      for (int64_t c = 0; c < job.width; ++c) {
        out[c] = scale * (upstream[c] * gamma[c] - x[c] * projection);
        gamma_gradient[c] += upstream[c] * x[c] * scale;
      }
      x += job.width, upstream += job.width, out += job.width, gamma += job.width, gamma_gradient += job.width;
    }
  }
}

#define TRELLIS_EVERY_ROW(name, Job, row_function)                       \
  void name(const Job& job) {                                            \
    for (int64_t row = 0; row < job.rows; ++row) row_function(job, row); \
  }
TRELLIS_EVERY_ROW(norm_rows, NormJob<float>, norm_row)
TRELLIS_EVERY_ROW(norm_rows, NormJob<double>, norm_row)
TRELLIS_EVERY_ROW(norm_rows, NormGradientJob<float>, norm_gradient_row)
TRELLIS_EVERY_ROW(norm_rows, NormGradientJob<double>, norm_gradient_row)
TRELLIS_EVERY_ROW(gate_rows, GateJob<float>, gate_row)
TRELLIS_EVERY_ROW(gate_rows, GateJob<double>, gate_row)
TRELLIS_EVERY_ROW(gate_rows, GateGradientJob<float>, gate_gradient_row)
TRELLIS_EVERY_ROW(gate_rows, GateGradientJob<double>, gate_gradient_row)
TRELLIS_EVERY_ROW(norm_heads, HeadsJob<float>, norm_row_of_heads)
TRELLIS_EVERY_ROW(norm_heads, HeadsJob<double>, norm_row_of_heads)
TRELLIS_EVERY_ROW(norm_heads, HeadsGradientJob<float>, norm_gradient_row_of_heads)
TRELLIS_EVERY_ROW(norm_heads, HeadsGradientJob<double>, norm_gradient_row_of_heads)
#undef TRELLIS_EVERY_ROW

}  // namespace TRELLIS_ISA
}  // namespace trellis
