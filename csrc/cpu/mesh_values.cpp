// The real half of FlexiCubes: dual vertices and their attributes, given the topology.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>

#include "mesh_surface.h"
#include "sigmoid.h"

namespace trellis::cpu {

static bool all_in(const int32_t* data, int64_t count, int64_t low, int64_t high, int threads) {
  std::atomic<bool> ok{true};
  fixed_chunks(count, 1 << 16, threads, [&](int64_t begin, int64_t end) {
    bool good = true;
    for (int64_t i = begin; i < end; ++i) good &= data[i] >= low && data[i] < high;
    if (!good) ok.store(false, std::memory_order_relaxed);
  });
  return ok;
}

template <class T>
Surface<T>::Surface(TensorView<const T, 2> feats, const Topology& topology)
    : feats_(feats),
      t_(topology),
      channels_((feats.size(1) - kColors) / 8),
      width_(4 + channels_),
      bias_(static_cast<T>(-1.0 / static_cast<double>(topology.resolution))),
      reach_(static_cast<T>((1 - 1e-8) / (2.0 * static_cast<double>(topology.resolution)))) {
  check_topology();
  const int64_t cells = t_.cells.size(0);
  first_vertex_.resize(cells + 1);
  for (int64_t i = 0; i < cells; ++i) {
    const flexicubes::Case& c = kCases[t_.cases.data[i]];
    first_vertex_[i + 1] = first_vertex_[i] + c.count;
    for (int v = 0; v < c.count; ++v) edges_ += c.sizes[v];
  }
  number_active_points();
  gather_points();
}

template <class T>
void Surface<T>::check_topology() const {
  const int64_t cubes = feats_.size(0), points = t_.points.size(0), cells = t_.cells.size(0);
  check(feats_.size(1) >= kColors && (feats_.size(1) - kColors) % 8 == 0, "feats must have 53 + 8 C channels");
  check(t_.resolution >= 1 && t_.resolution <= 4095, "resolution must be in [1, 4095]");
  check(t_.points.size(1) == 3 && t_.point_cubes.size(0) == points && t_.point_cubes.size(1) == 8,
        "points must be [G, 3] and point_cubes [G, 8]");
  check(t_.cells.size(1) == 3 && t_.cell_cubes.size(0) == cells && t_.cell_points.size(0) == cells &&
            t_.cell_points.size(1) == 8 && t_.cases.size(0) == cells,
        "cells must be [S, 3], cell_cubes [S], cell_points [S, 8] and cases [S]");
  const auto within = [&](const auto& tensor, int64_t low, int64_t high) {
    return all_in(tensor.data, tensor.numel(), low, high, t_.threads);
  };
  check(within(t_.point_cubes, -1, cubes), "point_cubes must be in [-1, N)");
  check(within(t_.cell_cubes, -1, cubes), "cell_cubes must be in [-1, N)");
  check(within(t_.cell_points, -1, points), "cell_points must be in [-1, G)");
  check(within(t_.cases, 0, 256), "cases must be in [0, 256)");
  check(within(t_.cells, 0, t_.resolution), "cells must be in [0, resolution)");
  for (int64_t i = 1; i < cells; ++i) check(t_.cells.row(i)[0] >= t_.cells.row(i - 1)[0], "cells must be sorted by x");
}

// Only points at an end of a crossed edge matter to the mesh; in training all do.
template <class T>
void Surface<T>::number_active_points() {
  if (t_.training) return;
  slots_.assign(t_.points.size(0), -1);
  fixed_chunks(t_.cells.size(0), kCellGrain, t_.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const flexicubes::Case& c = kCases[t_.cases.data[i]];
      for (int e = 0; e < 12; ++e) {
        if (c.vertex_of_edge[e] < 0) continue;
        for (int corner : kEnds[e]) {
          const int32_t point = t_.cell_points.row(i)[corner];
          if (point >= 0) __atomic_store_n(&slots_[point], 0, __ATOMIC_RELAXED);
        }
      }
    }
  });
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i] < 0) continue;
    slots_[i] = static_cast<int32_t>(active_.size());
    active_.push_back(static_cast<int32_t>(i));
  }
}

// Means over the cubes around a point of its raw values: sdf, deformation, colors. Returns how many cubes there are.
template <class T>
T Surface<T>::point_mean(int64_t point, T* mean) const {
  std::fill(mean, mean + width_, T(0));
  T cubes = 0;
  for_cubes(point, [&](const T* row, int k) {
    ++cubes;
    mean[0] += row[k] + bias_;
    for (int a = 0; a < 3; ++a) mean[1 + a] += row[kDeform + 3 * k + a];
    for (int64_t j = 0; j < channels_; ++j) mean[4 + j] += row[kColors + channels_ * k + j];
  });
  for (int64_t j = 0; j < width_; ++j) mean[j] /= cubes;
  return cubes;
}

// The rows of the cubes around a point are anywhere in memory.
template <class T>
void Surface<T>::prefetch(int64_t point) const {
  for_cubes(point, [&](const T* row, int k) {
    __builtin_prefetch(row + k);
    __builtin_prefetch(row + kDeform + 3 * k);
    __builtin_prefetch(row + kColors + channels_ * k);
  });
}

// Sum of squares of what the cubes say minus their mean.
template <class T>
T Surface<T>::disagreement(int64_t point, const T* mean) const {
  const auto square = [](T x) { return x * x; };
  T sum = 0;
  for_cubes(point, [&](const T* row, int k) {
    sum += square(row[k] + bias_ - mean[0]);
    for (int a = 0; a < 3; ++a) sum += square(row[kDeform + 3 * k + a] - mean[1 + a]);
    for (int64_t j = 0; j < channels_; ++j) sum += square(row[kColors + channels_ * k + j] - mean[4 + j]);
  });
  return sum;
}

template <class T>
void Surface<T>::gather_points() {
  const int64_t count = t_.training ? t_.points.size(0) : static_cast<int64_t>(active_.size());
  field_.resize(count * width_);
  ChunkSums consistency(count, kPointGrain);
  fixed_chunks(count, kPointGrain, t_.threads, [&](int64_t begin, int64_t end) {
    // [sdf, 2 deformation, colors]; all but the first go through the same function, four at a time
    std::vector<T> values(1 + (width_ + 2) / 4 * 4);
    T* const row = values.data();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t point = t_.training ? i : active_[i];
      if (i + kAhead < end) prefetch(t_.training ? i + kAhead : active_[i + kAhead]);
      point_mean(point, row);
      if (t_.training) consistency.at(begin) += disagreement(point, row);
      for (int a = 1; a < 4; ++a) row[a] *= 2;
      sigmoid_all(row + 1, static_cast<int64_t>(values.size()) - 1);
      for (int a = 0; a < 3; ++a) {
        row[1 + a] = grid_position(t_.points.row(point)[a]) + reach_ * (2 * row[1 + a] - 1);
      }
      for (int64_t j = 0; j < width_; ++j) field_[i * width_ + j] = row[j];
    }
  });
  consistency_ = consistency.total();
}

template <class T>
void Surface<T>::load(int64_t cell, Cell& c) const {
  c.kind = &kCases[t_.cases.data[cell]];
  const int32_t* const at = t_.cells.row(cell);
  for (int k = 0; k < 8; ++k) {
    const int32_t point = t_.cell_points.row(cell)[k];
    if (point >= 0) {
      c.corners[k] = slot(point) < 0 ? nullptr : &field_[slot(point) * width_];
      continue;
    }
    T* const row = &c.outside[k * width_];
    row[0] = 1;
    for (int a = 0; a < 3; ++a) row[1 + a] = grid_position(at[a] + (k >> a & 1));
    std::fill(row + 4, row + width_, T(0.5));
    c.corners[k] = row;
  }
  const int32_t cube = t_.cell_cubes.data[cell];
  if (cube < 0) {
    std::fill(c.weights, c.weights + kGamma, T(1));
    c.weights[kGamma] = 0;
    return;
  }
  std::copy_n(feats_.row(cube) + kWeights, 21, c.weights);
  tanh_all(c.weights, kGamma);
  for (int i = 0; i < kGamma; ++i) c.weights[i] = 1 + T(0.99) * c.weights[i];
}

template <class T>
T Surface<T>::dual_vertex(const Cell& c, int v, T* out) const {
  std::fill(out, out + width_ - 1, T(0));
  T total = 0;
  for (int i = 0; i < c.kind->sizes[v]; ++i) {
    const int edge = c.kind->edges[v][i];
    const auto [a, b] = kEnds[edge];
    const T wa = c.corners[b][0] * c.weights[kAlpha + b], wb = -c.corners[a][0] * c.weights[kAlpha + a];
    const T beta = c.weights[kBeta + edge], scale = beta / (wa + wb);
    for (int64_t j = 0; j < width_ - 1; ++j) out[j] += scale * (wa * c.corners[a][1 + j] + wb * c.corners[b][1 + j]);
    total += beta;
  }
  for (int64_t j = 0; j < width_ - 1; ++j) out[j] /= total;
  return total;
}

// From the vertex to the zero crossings (without alpha) of its edges. Returns the mean distance.
template <class T>
T Surface<T>::edge_distances(const Cell& c, int v, T (&offsets)[7][3], T (&distances)[7]) const {
  T sum = 0;
  for (int i = 0; i < c.kind->sizes[v]; ++i) {
    const auto [a, b] = kEnds[c.kind->edges[v][i]];
    const T wa = c.corners[b][0], wb = -c.corners[a][0];
    T square = 0;
    for (int j = 0; j < 3; ++j) {
      offsets[i][j] = (wa * c.corners[a][1 + j] + wb * c.corners[b][1 + j]) / (wa + wb) - c.vertex[j];
      square += offsets[i][j] * offsets[i][j];
    }
    sum += distances[i] = std::sqrt(square);
  }
  return sum / static_cast<T>(c.kind->sizes[v]);
}

template <class T>
void Surface<T>::values(const SurfaceValues<T>& out) const {
  const int64_t cells = t_.cells.size(0), points = t_.points.size(0), cubes = feats_.size(0);
  check(out.vertices.size(0) == first_vertex_[cells] && out.gammas.size(0) == first_vertex_[cells] &&
            out.attributes.size(0) == first_vertex_[cells] && out.attributes.size(1) == channels_,
        "vertex_cells must have an entry for each dual vertex of the cases");
  ChunkSums deviation(cells, kCellGrain), magnitude(cubes, kPointGrain);
  fixed_chunks(cells, kCellGrain, t_.threads, [&](int64_t begin, int64_t end) {
    Cell c(width_);
    for (int64_t i = begin; i < end; ++i) {
      load(i, c);
      const T gamma = T(0.005) + T(0.99) * sigmoid(c.weights[kGamma]);
      for (int v = 0; v < c.kind->count; ++v) {
        const int64_t row = first_vertex_[i] + v;
        dual_vertex(c, v, c.vertex.data());
        for (int a = 0; a < 3; ++a) out.vertices.row(row)[a] = c.vertex[a];
        for (int64_t j = 0; j < channels_; ++j) out.attributes.row(row)[j] = c.vertex[3 + j];
        out.gammas.data[row] = gamma;
        if (!t_.training) continue;
        T offsets[7][3], distances[7];
        const T mean = edge_distances(c, v, offsets, distances);
        for (int e = 0; e < c.kind->sizes[v]; ++e) deviation.at(begin) += std::abs(distances[e] - mean);
      }
    }
  });
  std::fill_n(out.terms.data, 3, T(0));
  if (!t_.training) return;
  fixed_chunks(points, kPointGrain, t_.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::copy_n(&field_[i * width_ + 1], 3, out.grid_positions.row(i));
      out.grid_sdf.data[i] = field_[i * width_];
    }
  });
  fixed_chunks(cubes, kPointGrain, t_.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T sum = 0;
      for (int w = 0; w < kGamma; ++w) sum += std::abs(feats_.row(i)[kWeights + w]);
      magnitude.at(begin) += sum;
    }
  });
  if (edges_ > 0) out.terms.data[0] = static_cast<T>(deviation.total() / static_cast<double>(edges_));
  if (cubes == 0) return;
  out.terms.data[1] = static_cast<T>(consistency_ / static_cast<double>(8 * cubes * width_));
  out.terms.data[2] = static_cast<T>(magnitude.total() / static_cast<double>(kGamma * cubes));
}

template class Surface<float>;
template class Surface<double>;

template <class T>
void surface_values(TensorView<const T, 2> feats, const Topology& topology, const SurfaceValues<T>& out) {
  Surface<T>(feats, topology).values(out);
}

template <class T>
void split_quads(TensorView<const int32_t, 2> quads, TensorView<const T, 1> gammas, TensorView<int64_t, 3> faces,
                 int threads) {
  const int64_t count = quads.size(0);
  check(quads.size(1) == 4 && faces.size(0) == count && faces.size(1) == 2 && faces.size(2) == 3,
        "quads must be [Q, 4] and faces [Q, 2, 3]");
  check(all_in(quads.data, 4 * count, 0, gammas.size(0), threads), "quads must be in [0, V)");
  fixed_chunks(count, kPointGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* const q = quads.row(i);
      const auto gamma = [&](int k) { return gammas.data[q[k]]; };
      constexpr int kCuts[2][6] = {{0, 1, 3, 3, 1, 2}, {0, 1, 2, 0, 2, 3}};
      const auto& cut = kCuts[gamma(0) * gamma(2) > gamma(1) * gamma(3)];
      for (int k = 0; k < 6; ++k) faces.row(i)[k] = q[cut[k]];
    }
  });
}

template void split_quads(TensorView<const int32_t, 2>, TensorView<const float, 1>, TensorView<int64_t, 3>, int);
template void split_quads(TensorView<const int32_t, 2>, TensorView<const double, 1>, TensorView<int64_t, 3>, int);
template void surface_values(TensorView<const float, 2>, const Topology&, const SurfaceValues<float>&);
template void surface_values(TensorView<const double, 2>, const Topology&, const SurfaceValues<double>&);

}  // namespace trellis::cpu
