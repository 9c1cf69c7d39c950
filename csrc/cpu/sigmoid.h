// The logistic function of a row of numbers; in float four at a time, exact to 1e-7.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace trellis {

inline void sigmoid_all(double* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = 1 / (1 + std::exp(-x[i]));
}

namespace detail {
constexpr int64_t kWidth = 4;

inline void sigmoid_block(float* x) {
  // GCC's vector types, since it does not vectorize the comparisons of a plain loop (they could trap on NaN).
  typedef float Floats __attribute__((vector_size(4 * kWidth)));
  typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  // exp(-x) = 2^n e^r with n = round(-x / ln 2) and |r| <= ln 2 / 2; beyond 87 the result is 0 or 1 to all digits.
  Floats t;
  std::memcpy(&t, x, sizeof t);
  t = -t;
  t = t > 87.0f ? Floats{} + 87.0f : t;
  t = t < -87.0f ? Floats{} - 87.0f : t;
  const Floats shifted = t * 1.44269504f + kMagic, n = shifted - kMagic;
  const Floats r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = ((Ints)shifted + 127) << 23;  // the magic number's own bits leave on the left
  t = 1.0f / (1.0f + p * (Floats)power);
  std::memcpy(x, &t, sizeof t);
}
}  // namespace detail

inline void sigmoid_all(float* x, int64_t count) {
  for (; count >= detail::kWidth; x += detail::kWidth, count -= detail::kWidth) detail::sigmoid_block(x);
  if (count == 0) return;
  float rest[detail::kWidth] = {};
  std::copy_n(x, count, rest);
  detail::sigmoid_block(rest);
  std::copy_n(rest, count, x);
}

// tanh(x) = 2 sigmoid(2 x) - 1
template <class T>
void tanh_all(T* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= 2;
  sigmoid_all(x, count);
  for (int64_t i = 0; i < count; ++i) x[i] = 2 * x[i] - 1;
}

}  // namespace trellis
