// The gradient of surface_values with respect to the network output.
#include <algorithm>
#include <cmath>

#include "mesh_surface.h"
#include "sigmoid.h"

namespace trellis::cpu {

// Adds the gradient of one crossing (the first `width` numbers of [position, color]) to its corners and weights.
template <class T>
void Surface<T>::crossing_gradient(Cell& c, int edge, bool weighted, const T* crossing, const T* gradient,
                                   int64_t width, T* weights_gradient) const {
  const auto [a, b] = kEnds[edge];
  const T *const pa = c.corners[a], *const pb = c.corners[b];
  T *const ga = c.corner_gradients[a], *const gb = c.corner_gradients[b];
  const T alpha_a = weighted ? c.weights[kAlpha + a] : T(1), alpha_b = weighted ? c.weights[kAlpha + b] : T(1);
  const T wa = pb[0] * alpha_b, wb = -pa[0] * alpha_a, inverse = 1 / (wa + wb);
  T wa_gradient = 0, wb_gradient = 0;
  for (int64_t j = 0; j < width; ++j) {
    const T g = gradient[j] * inverse;
    wa_gradient += g * (pa[1 + j] - crossing[j]);
    wb_gradient += g * (pb[1 + j] - crossing[j]);
    ga[1 + j] += g * wa;
    gb[1 + j] += g * wb;
  }
  gb[0] += wa_gradient * alpha_b;
  ga[0] -= wb_gradient * alpha_a;
  if (!weighted) return;
  weights_gradient[kAlpha + b] += wa_gradient * pb[0];
  weights_gradient[kAlpha + a] -= wb_gradient * pa[0];
}

template <class T>
void Surface<T>::cell_gradient(int64_t cell, Cell& c, const SurfaceValues<const T>& gradients,
                               std::vector<T>& field_gradient, TensorView<T, 2> out) const {
  load(cell, c);
  for (int k = 0; k < 8; ++k) {
    const int32_t point = t_.cell_points.row(cell)[k];
    c.corner_gradients[k] =
        point >= 0 && slot(point) >= 0 ? &field_gradient[slot(point) * width_] : c.outside_gradient.data();
  }
  T weights_gradient[21] = {};
  for (int v = 0; v < c.kind->count; ++v) {
    const int64_t row = first_vertex_[cell] + v;
    const int size = c.kind->sizes[v];
    const T total = dual_vertex(c, v, c.vertex.data());
    T* const gradient = c.gradient.data();
    std::copy_n(gradients.vertices.row(row), 3, gradient);
    std::copy_n(gradients.attributes.row(row), channels_, gradient + 3);
    weights_gradient[kGamma] += gradients.gammas.data[row];
    if (t_.training) {
      // Each distance moves its own term and, through the mean distance, those of the whole group.
      T offsets[7][3], distances[7], signs[7], sign_mean = 0;
      const T mean = edge_distances(c, v, offsets, distances);
      for (int e = 0; e < size; ++e) {
        signs[e] = static_cast<T>((distances[e] > mean) - (distances[e] < mean));
        sign_mean += signs[e] / static_cast<T>(size);
      }
      const T scale = gradients.terms.data[0] / static_cast<T>(edges_);
      for (int e = 0; e < size; ++e) {
        T crossing[3], offset_gradient[3];
        for (int a = 0; a < 3; ++a) {
          const T unit = distances[e] > 0 ? offsets[e][a] / distances[e] : T(0);
          offset_gradient[a] = scale * (signs[e] - sign_mean) * unit;
          gradient[a] -= offset_gradient[a];
          crossing[a] = offsets[e][a] + c.vertex[a];
        }
        crossing_gradient(c, c.kind->edges[v][e], false, crossing, offset_gradient, 3, nullptr);
      }
    }
    for (int e = 0; e < size; ++e) {
      const int edge = c.kind->edges[v][e];
      const auto [a, b] = kEnds[edge];
      const T wa = c.corners[b][0] * c.weights[kAlpha + b], wb = -c.corners[a][0] * c.weights[kAlpha + a];
      const T share = c.weights[kBeta + edge] / total;
      T beta_gradient = 0;
      for (int64_t j = 0; j < width_ - 1; ++j) {
        c.crossing[j] = (wa * c.corners[a][1 + j] + wb * c.corners[b][1 + j]) / (wa + wb);
        beta_gradient += gradient[j] * (c.crossing[j] - c.vertex[j]);
        c.scaled[j] = gradient[j] * share;
      }
      weights_gradient[kBeta + edge] += beta_gradient / total;
      crossing_gradient(c, edge, true, c.crossing.data(), c.scaled.data(), width_ - 1, weights_gradient);
    }
  }
  const int32_t cube = t_.cell_cubes.data[cell];
  if (cube < 0) return;
  T* const row = out.row(cube) + kWeights;
  for (int i = 0; i < kGamma; ++i) {
    const T tanh = (c.weights[i] - 1) / T(0.99);
    row[i] += weights_gradient[i] * T(0.99) * (1 - tanh * tanh);
  }
  const T gamma = sigmoid(c.weights[kGamma]);
  row[kGamma] += weights_gradient[kGamma] * T(0.99) * gamma * (1 - gamma);
}

// From the values of the points to the corners of the cubes. Every corner of every cube belongs to one point.
template <class T>
void Surface<T>::spread(const std::vector<T>& field_gradient, const SurfaceValues<const T>& gradients,
                        TensorView<T, 2> out) const {
  const int64_t cubes = feats_.size(0);
  const T scale = t_.training && cubes ? 2 * gradients.terms.data[1] / static_cast<T>(8 * cubes * width_) : T(0);
  fixed_chunks(t_.points.size(0), kPointGrain, t_.threads, [&](int64_t begin, int64_t end) {
    std::vector<T> mean(width_), sum(width_);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sum.begin(), sum.end(), T(0));
      if (slot(i) >= 0) {
        std::copy_n(&field_gradient[slot(i) * width_], width_, sum.data());
        const T cubes_here = point_mean(i, mean.data());
        if (t_.training) {
          sum[0] += gradients.grid_sdf.data[i];
          for (int a = 0; a < 3; ++a) sum[1 + a] += gradients.grid_positions.row(i)[a];
        }
        sum[0] /= cubes_here;
        T shift[3] = {mean[1], mean[2], mean[3]};
        tanh_all(shift, 3);
        for (int a = 0; a < 3; ++a) sum[1 + a] *= reach_ * (1 - shift[a] * shift[a]) / cubes_here;
        for (int64_t j = 4; j < width_; ++j) {
          const T color = field_[slot(i) * width_ + j];
          sum[j] *= color * (1 - color) / cubes_here;
        }
      }
      for_cubes(i, [&](const T* row, int k) {
        T* const target = out.data + (row - feats_.data);
        target[k] = sum[0] + scale * (row[k] + bias_ - mean[0]);
        for (int a = 0; a < 3; ++a) {
          const int64_t at = kDeform + 3 * k + a;
          target[at] = sum[1 + a] + scale * (row[at] - mean[1 + a]);
        }
        for (int64_t j = 0; j < channels_; ++j) {
          const int64_t at = kColors + channels_ * k + j;
          target[at] = sum[4 + j] + scale * (row[at] - mean[4 + j]);
        }
      });
    }
  });
}

template <class T>
void Surface<T>::gradient(const SurfaceValues<const T>& gradients, TensorView<T, 2> out) const {
  const int64_t cubes = feats_.size(0), cells = t_.cells.size(0);
  check(out.shape == feats_.shape, "feats_gradient must have the shape of feats");
  check(gradients.vertices.size(0) == first_vertex_[cells] && gradients.gammas.size(0) == first_vertex_[cells] &&
            gradients.attributes.size(0) == first_vertex_[cells] && gradients.attributes.size(1) == channels_,
        "the gradients must have the shapes of the values");
  const T scale = t_.training && cubes ? gradients.terms.data[2] / static_cast<T>(kGamma * cubes) : T(0);
  fixed_chunks(cubes, kPointGrain, t_.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* const weights = feats_.row(i) + kWeights;
      T* const row = out.row(i) + kWeights;
      for (int w = 0; w < kGamma; ++w) row[w] = scale * static_cast<T>((weights[w] > 0) - (weights[w] < 0));
      row[kGamma] = 0;
    }
  });
  // Cells at equal x touch points at x and x + 1 only: first all even slabs side by side, then all odd ones.
  std::vector<T> field_gradient(field_.size(), T(0));
  std::vector<int64_t> slabs(t_.resolution + 1, cells);
  for (int64_t i = cells - 1; i >= 0; --i) slabs[t_.cells.row(i)[0]] = i;
  for (int64_t x = t_.resolution - 1; x >= 0; --x) slabs[x] = std::min(slabs[x], slabs[x + 1]);
  for (int parity = 0; parity < 2; ++parity) {
    parallel_chunks((t_.resolution + 1 - parity) / 2, t_.threads, [&](int64_t chunk) {
      const int64_t x = 2 * chunk + parity;
      Cell c(width_);
      for (int64_t i = slabs[x]; i < slabs[x + 1]; ++i) cell_gradient(i, c, gradients, field_gradient, out);
    });
  }
  spread(field_gradient, gradients, out);
}

template <class T>
void surface_values_gradient(TensorView<const T, 2> feats, const Topology& topology,
                             const SurfaceValues<const T>& gradients, TensorView<T, 2> feats_gradient) {
  Surface<T>(feats, topology).gradient(gradients, feats_gradient);
}

template void surface_values_gradient(TensorView<const float, 2>, const Topology&, const SurfaceValues<const float>&,
                                      TensorView<float, 2>);
template void surface_values_gradient(TensorView<const double, 2>, const Topology&, const SurfaceValues<const double>&,
                                      TensorView<double, 2>);

}  // namespace trellis::cpu
