// The surface and the network output on it, shared by mesh_values.cu and mesh_gradient.cu.
#pragma once
#include "flexicubes.cuh"
#include "launch.h"
#include "mesh_extraction.h"

namespace trellis::cuda {

constexpr int kPointThreads = 256, kTilePoints = 64;            // a block of points (or cubes) with all their channels
constexpr int kTileCells = 16, kCellThreads = 12 * kTileCells;  // a block of cells: one thread per edge
constexpr int kDeform = 8, kWeights = 32, kColors = 53;         // first channels of feats; the sdf is at 0
constexpr int kAlpha = 12, kGamma = 20;                         // among the weights; beta is at 0

// Its topology, checked by mark_points and number_vertices, which run first.
template <class T>
struct Surface {
  const T* feats;
  int64_t cubes, stride;
  const int32_t *points, *point_cubes;
  int64_t point_count;
  const int32_t *cells, *cell_cubes, *cell_points, *cases;
  int64_t cell_count;
  const int32_t* vertex_cells;
  int64_t vertex_count;
  int32_t* first_vertex;           // by cell
  uint8_t* active;                 // by point: an end of a crossed edge; null in training, where all points matter
  T* field;                        // by point: sdf, position, color
  unsigned long long* edge_count;  // of all dual vertices
  int channels, width, resolution;
  bool training;

  __device__ T bias() const { return static_cast<T>(-1.0 / resolution); }
  __device__ T reach() const { return static_cast<T>((1 - 1e-8) / (2.0 * resolution)); }
  __device__ T grid_position(int index) const { return static_cast<T>(index) / static_cast<T>(resolution) - T(0.5); }
  __device__ bool is_active(int64_t point) const { return training || active[point]; }
  __device__ const CellCase& kind(int64_t cell) const { return kCellCases.of[cases[cell]]; }
  // What the cube around a point with this corner says of its value j: sdf, deformation, color.
  __device__ T said(int64_t cube, int k, int j) const {
    const T value = feats[cube * stride + channel(k, j)];
    return j == 0 ? value + bias() : value;
  }
  __device__ int channel(int k, int j) const {
    return j == 0 ? k : j < 4 ? kDeform + 3 * k + j - 1 : kColors + channels * k + j - 4;
  }
  // Value j of a corner of a cell: sdf, position, color. What no cube touches is outside.
  __device__ T corner(int64_t cell, int k, int j) const {
    const int64_t point = cell_points[8 * cell + k];
    if (point >= 0) return field[point * width + j];
    return j == 0 ? T(1) : j < 4 ? grid_position(cells[3 * cell + j - 1] + (k >> (j - 1) & 1)) : T(0.5);
  }
  // Where the dual vertices of a cell start; it must have some.
  __device__ int64_t vertices_from(int64_t cell) const {
    const int64_t first = first_vertex[cell], last = first + kind(cell).vertices - 1;
    DEVICE_CHECK(first >= 0 && last < vertex_count && vertex_cells[first] == cell && vertex_cells[last] == cell,
                 "vertex_cells must have an entry for each dual vertex of the cases");
    return first;
  }
};

template <class T>
struct Logistic;
template <>
struct Logistic<float> {
  static __device__ float tanh_of(float x) { return tanhf(x); }
  static __device__ float sigmoid_of(float x) { return 1.0f / (1.0f + expf(-x)); }
  static __device__ float root_of(float x) { return sqrtf(x); }
};
template <>
struct Logistic<double> {
  static __device__ double tanh_of(double x) { return tanh(x); }
  static __device__ double sigmoid_of(double x) { return 1.0 / (1.0 + exp(-x)); }
  static __device__ double root_of(double x) { return sqrt(x); }
};

struct EdgeEnds {
  int8_t of[12][2];
};
constexpr EdgeEnds edge_ends() {
  EdgeEnds ends{};
  for (int e = 0; e < 12; ++e)
    for (int end = 0; end < 2; ++end) ends.of[e][end] = static_cast<int8_t>(flexicubes::kEnds[e][end]);
  return ends;
}
__device__ constexpr EdgeEnds kEdgeEnds = edge_ends();

// One crossed edge of a cell, from corner a to corner b: crossing = (wa a + wb b) / (wa + wb).
template <class T>
struct CrossedEdge {
  int vertex = -1;  // which dual vertex of the cell, -1 where the edge is not crossed
  int a = 0, b = 0;
  T sdf_a = 0, sdf_b = 0, alpha_a = 0, alpha_b = 0, beta = 0, wa = 0, wb = 0;

  __device__ CrossedEdge(const Surface<T>& s, int64_t cell, int edge) {
    if (cell >= s.cell_count) return;
    vertex = vertex_of_edge(s.kind(cell), edge);
    if (vertex < 0) return;
    a = kEdgeEnds.of[edge][0];
    b = kEdgeEnds.of[edge][1];
    sdf_a = s.corner(cell, a, 0);
    sdf_b = s.corner(cell, b, 0);
    alpha_a = weight(s, cell, kAlpha + a);
    alpha_b = weight(s, cell, kAlpha + b);
    beta = weight(s, cell, edge);
    wa = sdf_b * alpha_b;
    wb = -sdf_a * alpha_a;
  }
  static __device__ T weight(const Surface<T>& s, int64_t cell, int which) {
    const int64_t cube = s.cell_cubes[cell];
    return cube < 0 ? T(1) : 1 + T(0.99) * Logistic<T>::tanh_of(s.feats[cube * s.stride + kWeights + which]);
  }
  __device__ T plain(const Surface<T>& s, int64_t cell, int axis) const {  // the crossing without alpha
    return (sdf_b * s.corner(cell, a, 1 + axis) - sdf_a * s.corner(cell, b, 1 + axis)) / (sdf_b - sdf_a);
  }
};

template <class T>
__device__ T gamma_of(const Surface<T>& s, int64_t cell) {  // after the sigmoid
  const int64_t cube = s.cell_cubes[cell];
  return Logistic<T>::sigmoid_of(cube < 0 ? T(0) : s.feats[cube * s.stride + kWeights + kGamma]);
}

// Lane 0 of warp 0 gets the sum of what the threads of a block give, always added in the same order.
template <int Threads>
__device__ double block_sum(double value) {
  SHARED_ARRAY(double, partial, Threads / 32);
  const int thread = static_cast<int>(threadIdx.x);
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  if (thread % 32 == 0) partial[thread / 32] = value;
  __syncthreads();
  double sum = 0;
  if (thread == 0)
    for (int warp = 0; warp < Threads / 32; ++warp) sum += partial[warp];
  __syncthreads();  // before the next use of `partial`
  return sum;
}

// Checks the tensors and launches what both directions need first: the numbers of vertices and edges, the points that
// matter, and the field on them. `means` [G, width] (null: not wanted) gets the means before tanh and sigmoid, `grid`
// the positions and sdf of training, `partial` the sum of squares of each block.
template <class T>
struct GridOutputs {
  T *means, *positions, *sdf;
  double* partial;
};
template <class T>
Surface<T> surface_of(TensorView<const T, 2> feats, const SurfaceMaps& maps, int64_t resolution, bool training,
                      const SurfaceRoom<T>& room);
template <class T>
void prepare_surface(const Surface<T>& s, const GridOutputs<T>& grid, int64_t stream);

}  // namespace trellis::cuda
