// Bound by memory: a Gaussian of degree 3 is 192 bytes. The basis is computed for kLanes Gaussians at a time, which the
// compiler vectorises; coefficients are read once for all views.
#include "gaussians_harmonics.h"

#include <algorithm>
#include <stdexcept>

#include "parallel.h"
#include "spherical_harmonics.h"

namespace trellis::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kGrain = 4096;  // Gaussians

template <class T, int Degree>
struct Lanes {
  static constexpr int kTerms = (Degree + 1) * (Degree + 1);
  T x[kLanes], y[kLanes], z[kLanes], inverse[kLanes];  // directions of length 1
  T basis[kTerms * kLanes], weights[kTerms * kLanes];

  void load(const T* directions, int count) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const T* from = directions + 3 * std::min(lane, count - 1);
      x[lane] = from[0];
      y[lane] = from[1];
      z[lane] = from[2];
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      inverse[lane] = inverse_length(x[lane], y[lane], z[lane]);
      x[lane] = scaled(x[lane], inverse[lane]);
      y[lane] = scaled(y[lane], inverse[lane]);
      z[lane] = scaled(z[lane], inverse[lane]);
      harmonic_basis<Degree>(x[lane], y[lane], z[lane], basis + lane, kLanes);
    }
  }

  void color(const T* coefficients, int lane, T* value) const {
    T red = 0, green = 0, blue = 0;
    for (int k = 0; k < kTerms; ++k) {
      const T factor = basis[k * kLanes + lane];
      red += factor * coefficients[3 * k];
      green += factor * coefficients[3 * k + 1];
      blue += factor * coefficients[3 * k + 2];
    }
    value[0] = red + T(0.5);
    value[1] = green + T(0.5);
    value[2] = blue + T(0.5);
  }

  // Gradients in the directions as given: a change along the direction changes nothing.
  void store_slopes(T* out, int count) const {
    T slopes[3][kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      T by_x, by_y, by_z;
      harmonic_slope<Degree>(x[lane], y[lane], z[lane], weights + lane, kLanes, by_x, by_y, by_z);
      const T along = by_x * x[lane] + by_y * y[lane] + by_z * z[lane];
      slopes[0][lane] = scaled(by_x - along * x[lane], inverse[lane]);
      slopes[1][lane] = scaled(by_y - along * y[lane], inverse[lane]);
      slopes[2][lane] = scaled(by_z - along * z[lane], inverse[lane]);
    }
    for (int lane = 0; lane < count; ++lane)
      for (int axis = 0; axis < 3; ++axis) out[3 * lane + axis] = slopes[axis][lane];
  }
};

template <class Body>
void for_blocks(int64_t count, int threads, const Body& body) {
  parallel_for(count, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kLanes)
      body(first, static_cast<int>(std::min<int64_t>(kLanes, end - first)));
  });
}

template <class T, int Degree>
void colors(TensorView<const T, 3> coefficients, TensorView<const T, 3> directions, TensorView<T, 3> out, int threads) {
  for_blocks(coefficients.size(0), threads, [&](int64_t first, int count) {
    Lanes<T, Degree> lanes;
    for (int64_t view = 0; view < directions.size(0); ++view) {
      lanes.load(directions.row(view) + 3 * first, count);
      T* to = out.row(view) + 3 * first;
      for (int lane = 0; lane < count; ++lane) {
        T value[3];
        lanes.color(coefficients.row(first + lane), lane, value);
        for (int channel = 0; channel < 3; ++channel)
          to[3 * lane + channel] = value[channel] < 0 ? T(0) : value[channel];
      }
    }
  });
}

template <class T, int Degree>
void gradients(TensorView<const T, 3> out_gradient, TensorView<const T, 3> coefficients,
               TensorView<const T, 3> directions, TensorView<T, 3> out_coefficients, TensorView<T, 3> out_directions,
               int threads) {
  constexpr int kTerms = Lanes<T, Degree>::kTerms;
  for_blocks(coefficients.size(0), threads, [&](int64_t first, int count) {
    Lanes<T, Degree> lanes{};
    std::fill_n(out_coefficients.row(first), 3 * kTerms * count, T(0));
    for (int64_t view = 0; view < directions.size(0); ++view) {
      lanes.load(directions.row(view) + 3 * first, count);
      const T* from = out_gradient.row(view) + 3 * first;
      for (int lane = 0; lane < count; ++lane) {
        const T* own = coefficients.row(first + lane);
        T* to = out_coefficients.row(first + lane);
        T value[3], slope[3];
        lanes.color(own, lane, value);
        for (int channel = 0; channel < 3; ++channel)
          slope[channel] = value[channel] >= 0 ? from[3 * lane + channel] : T(0);
        for (int k = 0; k < kTerms; ++k) {
          const T factor = lanes.basis[k * kLanes + lane];
          for (int channel = 0; channel < 3; ++channel) to[3 * k + channel] += factor * slope[channel];
          lanes.weights[k * kLanes + lane] =
              own[3 * k] * slope[0] + own[3 * k + 1] * slope[1] + own[3 * k + 2] * slope[2];
        }
      }
      lanes.store_slopes(out_directions.row(view) + 3 * first, count);
    }
  });
}

template <class T>
void check(TensorView<const T, 3> coefficients, TensorView<const T, 3> directions) {
  if (coefficients.size(2) != 3 || directions.size(2) != 3 || directions.size(1) != coefficients.size(0))
    throw std::invalid_argument("coefficients must be [G, K, 3] and directions [V, G, 3]");
}

}  // namespace

template <class T>
void spherical_harmonics(TensorView<const T, 3> coefficients, TensorView<const T, 3> directions, TensorView<T, 3> out,
                         int threads) {
  check(coefficients, directions);
  if (out.shape != directions.shape) throw std::invalid_argument("out must have the shape of directions");
  with_harmonic_degree(coefficients.size(1),
                       [&]<int Degree>() { colors<T, Degree>(coefficients, directions, out, threads); });
}

template <class T>
void spherical_harmonics_gradient(TensorView<const T, 3> out_gradient, TensorView<const T, 3> coefficients,
                                  TensorView<const T, 3> directions, TensorView<T, 3> out_coefficients,
                                  TensorView<T, 3> out_directions, int threads) {
  check(coefficients, directions);
  if (out_gradient.shape != directions.shape || out_directions.shape != directions.shape ||
      out_coefficients.shape != coefficients.shape)
    throw std::invalid_argument("gradients must have the shapes of what they belong to");
  with_harmonic_degree(coefficients.size(1), [&]<int Degree>() {
    gradients<T, Degree>(out_gradient, coefficients, directions, out_coefficients, out_directions, threads);
  });
}

template void spherical_harmonics(TensorView<const float, 3>, TensorView<const float, 3>, TensorView<float, 3>, int);
template void spherical_harmonics(TensorView<const double, 3>, TensorView<const double, 3>, TensorView<double, 3>, int);
template void spherical_harmonics_gradient(TensorView<const float, 3>, TensorView<const float, 3>,
                                           TensorView<const float, 3>, TensorView<float, 3>, TensorView<float, 3>, int);
template void spherical_harmonics_gradient(TensorView<const double, 3>, TensorView<const double, 3>,
                                           TensorView<const double, 3>, TensorView<double, 3>, TensorView<double, 3>,
                                           int);

}  // namespace trellis::cpu
