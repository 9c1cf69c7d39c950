// Colors of Gaussians by direction of view: a thread per Gaussian, all views. Coefficients (up to 192 bytes per
// Gaussian) pass through shared memory, so that they are read and written in order; rows there have odd length, so that
// the threads of a warp meet different banks.
#include "gaussians_harmonics.h"
#include "launch.h"
#include "spherical_harmonics.h"

namespace trellis::cuda {
namespace {

constexpr int kThreads = 128;

template <int Degree>
struct Terms {
  static constexpr int count = (Degree + 1) * (Degree + 1), row = 3 * count, pitch = row | 1;
};

struct Direction {
  float x, y, z, inverse;
};

__device__ Direction direction_of(const float* given) {
  const float x = given[0], y = given[1], z = given[2], inverse = inverse_length(x, y, z);
  return {scaled(x, inverse), scaled(y, inverse), scaled(z, inverse), inverse};
}

template <int Degree>
__global__ void __launch_bounds__(kThreads)
    colors(const float* __restrict__ coefficients, const float* __restrict__ directions, int64_t gaussians, int views,
           float* __restrict__ out) {
  using Sizes = Terms<Degree>;
  SHARED_ARRAY(float, rows, kThreads, Sizes::pitch);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = int64_t{blockIdx.x} * kThreads, own = first + thread;
  const int here = static_cast<int>(gaussians - first < kThreads ? gaussians - first : kThreads);
  for (int i = thread; i < here * Sizes::row; i += kThreads)
    rows[i / Sizes::row][i % Sizes::row] = coefficients[first * Sizes::row + i];
  __syncthreads();
  if (thread >= here) return;
  for (int view = 0; view < views; ++view) {
    const int64_t at = 3 * (view * gaussians + own);
    const Direction to = direction_of(directions + at);
    float basis[Sizes::count], value[3] = {0.5f, 0.5f, 0.5f};
    harmonic_basis<Degree>(to.x, to.y, to.z, basis);
#pragma unroll
    for (int k = 0; k < Sizes::count; ++k)
      for (int channel = 0; channel < 3; ++channel) value[channel] += basis[k] * rows[thread][3 * k + channel];
    for (int channel = 0; channel < 3; ++channel) out[at + channel] = value[channel] < 0 ? 0.0f : value[channel];
  }
}

template <int Degree>
__global__ void __launch_bounds__(kThreads)
    gradients(const float* __restrict__ out_gradient, const float* __restrict__ coefficients,
              const float* __restrict__ directions, int64_t gaussians, int views, float* __restrict__ out_coefficients,
              float* __restrict__ out_directions) {
  using Sizes = Terms<Degree>;
  SHARED_ARRAY(float, rows, kThreads, Sizes::pitch);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = int64_t{blockIdx.x} * kThreads, own = first + thread;
  const int here = static_cast<int>(gaussians - first < kThreads ? gaussians - first : kThreads);
  for (int i = thread; i < here * Sizes::row; i += kThreads)
    rows[i / Sizes::row][i % Sizes::row] = coefficients[first * Sizes::row + i];
  __syncthreads();
  float sums[Sizes::row] = {};
  for (int view = 0; view < (thread < here ? views : 0); ++view) {
    const int64_t at = 3 * (view * gaussians + own);
    const Direction to = direction_of(directions + at);
    float basis[Sizes::count], value[3] = {0.5f, 0.5f, 0.5f}, slope[3];
    harmonic_basis<Degree>(to.x, to.y, to.z, basis);
#pragma unroll
    for (int k = 0; k < Sizes::count; ++k)
      for (int channel = 0; channel < 3; ++channel) value[channel] += basis[k] * rows[thread][3 * k + channel];
    for (int channel = 0; channel < 3; ++channel) slope[channel] = value[channel] >= 0 ? out_gradient[at + channel] : 0;
#pragma unroll
    for (int k = 0; k < Sizes::count; ++k) {
      const float factor = basis[k];
      basis[k] = 0;  // from here on: the gradient in the term
      for (int channel = 0; channel < 3; ++channel) {
        sums[3 * k + channel] += factor * slope[channel];
        basis[k] += rows[thread][3 * k + channel] * slope[channel];
      }
    }
    float by_x, by_y, by_z;
    harmonic_slope<Degree>(to.x, to.y, to.z, basis, 1, by_x, by_y, by_z);
    const float along = by_x * to.x + by_y * to.y + by_z * to.z;  // changes the length only
    out_directions[at] = scaled(by_x - along * to.x, to.inverse);
    out_directions[at + 1] = scaled(by_y - along * to.y, to.inverse);
    out_directions[at + 2] = scaled(by_z - along * to.z, to.inverse);
  }
  if (thread < here) {  // only this thread has read the row
#pragma unroll
    for (int i = 0; i < Sizes::row; ++i) rows[thread][i] = sums[i];
  }
  __syncthreads();
  for (int i = thread; i < here * Sizes::row; i += kThreads)
    out_coefficients[first * Sizes::row + i] = rows[i / Sizes::row][i % Sizes::row];
}

void check(const TensorView<const float, 3>& coefficients, const TensorView<const float, 3>& directions) {
  if (coefficients.size(2) != 3 || directions.size(2) != 3 || directions.size(1) != coefficients.size(0))
    throw std::invalid_argument("coefficients must be [G, K, 3] and directions [V, G, 3]");
  if (directions.size(0) > INT32_MAX) throw std::invalid_argument("there may be at most 2^31 - 1 views");
}

}  // namespace

void spherical_harmonics(TensorView<const float, 3> coefficients, TensorView<const float, 3> directions,
                         TensorView<float, 3> out, int64_t stream) {
  check(coefficients, directions);
  if (out.shape != directions.shape) throw std::invalid_argument("out must have the shape of directions");
  with_harmonic_degree(coefficients.size(1), [&]<int Degree>() {
    launch({"spherical_harmonics", blocks(coefficients.size(0), kThreads), kThreads, stream}, colors<Degree>,
           coefficients.data, directions.data, coefficients.size(0), static_cast<int>(directions.size(0)), out.data);
  });
}

void spherical_harmonics_gradient(TensorView<const float, 3> out_gradient, TensorView<const float, 3> coefficients,
                                  TensorView<const float, 3> directions, TensorView<float, 3> out_coefficients,
                                  TensorView<float, 3> out_directions, int64_t stream) {
  check(coefficients, directions);
  if (out_gradient.shape != directions.shape || out_directions.shape != directions.shape ||
      out_coefficients.shape != coefficients.shape)
    throw std::invalid_argument("gradients must have the shapes of what they belong to");
  with_harmonic_degree(coefficients.size(1), [&]<int Degree>() {
    launch({"spherical_harmonics_gradient", blocks(coefficients.size(0), kThreads), kThreads, stream},
           gradients<Degree>, out_gradient.data, coefficients.data, directions.data, coefficients.size(0),
           static_cast<int>(directions.size(0)), out_coefficients.data, out_directions.data);
  });
}

}  // namespace trellis::cuda
