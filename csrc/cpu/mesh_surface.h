// Surface: the topology of a surface and the network output on it, shared by mesh_values.cpp and mesh_gradient.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "flexicubes_tables.h"
#include "mesh_extraction.h"

namespace trellis::cpu {

using flexicubes::kCases;
using flexicubes::kEnds;

constexpr int64_t kDeform = 8, kWeights = 32, kColors = 53;  // first channels of feats; the sdf is at 0
constexpr int kBeta = 0, kAlpha = 12, kGamma = 20;           // among the weights
constexpr int64_t kPointGrain = 4096, kCellGrain = 1024;
constexpr int64_t kAhead = 4;  // points to prefetch

template <class T>
static T sigmoid(T x) {
  return 1 / (1 + std::exp(-x));
}

// One partial sum per chunk, added up in their order.
class ChunkSums {
 public:
  ChunkSums(int64_t count, int64_t grain) : grain_(grain), partial_((count + grain - 1) / grain, 0.0) {}
  double& at(int64_t begin) { return partial_[begin / grain_]; }
  double total() const {
    double sum = 0;
    for (double part : partial_) sum += part;
    return sum;
  }

 private:
  int64_t grain_;
  std::vector<double> partial_;
};

// parallel_for whose chunks are the same for any number of threads.
template <class Body>
void fixed_chunks(int64_t count, int64_t grain, int threads, const Body& body) {
  parallel_chunks((count + grain - 1) / grain, threads,
                  [&](int64_t chunk) { body(chunk * grain, std::min(count, (chunk + 1) * grain)); });
}

inline void check(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <class T>
class Surface {
 public:
  Surface(TensorView<const T, 2> feats, const Topology& topology);  // checks everything it will read

  void values(const SurfaceValues<T>& out) const;
  void gradient(const SurfaceValues<const T>& gradients, TensorView<T, 2> feats_gradient) const;

 private:
  // The corners and weights of one cell, and room for its dual vertices.
  struct Cell {
    explicit Cell(int64_t width)
        : outside(8 * width), vertex(width), crossing(width), gradient(width), scaled(width), outside_gradient(width) {}
    const flexicubes::Case* kind = nullptr;
    T weights[21];        // 1 + 0.99 tanh(.) of beta and alpha; raw gamma
    const T* corners[8];  // rows of field_, or of `outside`; null where no crossed edge ends
    T* corner_gradients[8];
    std::vector<T> outside, vertex, crossing, gradient, scaled, outside_gradient;
  };

  int64_t slot(int64_t point) const { return t_.training ? point : slots_[point]; }
  template <class Body>  // body(row of feats, corner) over the cubes around a point
  void for_cubes(int64_t point, const Body& body) const {
    for (int k = 0; k < 8; ++k) {
      const int32_t cube = t_.point_cubes.row(point)[k];
      if (cube >= 0) body(feats_.row(cube), k);
    }
  }
  void prefetch(int64_t point) const;
  T point_mean(int64_t point, T* mean) const;
  T disagreement(int64_t point, const T* mean) const;
  void check_topology() const;
  void number_active_points();
  void gather_points();
  T grid_position(int64_t index) const { return static_cast<T>(index) / static_cast<T>(t_.resolution) - T(0.5); }
  void load(int64_t cell, Cell& c) const;
  T dual_vertex(const Cell& c, int v, T* out) const;  // [position, color], returns the sum of beta
  T edge_distances(const Cell& c, int v, T (&offsets)[7][3], T (&distances)[7]) const;
  void cell_gradient(int64_t cell, Cell& c, const SurfaceValues<const T>& gradients, std::vector<T>& field_gradient,
                     TensorView<T, 2> out) const;
  void crossing_gradient(Cell& c, int edge, bool weighted, const T* crossing, const T* gradient, int64_t width,
                         T* weights_gradient) const;
  void spread(const std::vector<T>& field_gradient, const SurfaceValues<const T>& gradients,
              TensorView<T, 2> out) const;

  TensorView<const T, 2> feats_;
  const Topology& t_;
  int64_t channels_, width_;
  T bias_, reach_;
  std::vector<int32_t> first_vertex_;
  int64_t edges_ = 0;            // of all dual vertices
  double consistency_ = 0;       // sum of squares, in training
  std::vector<int32_t> slots_;   // row of field_ of each point, -1 where no edge needs it; not in training
  std::vector<int32_t> active_;  // point of each row; not in training
  std::vector<T> field_;         // sdf, position, color of each active point
};

}  // namespace trellis::cpu
