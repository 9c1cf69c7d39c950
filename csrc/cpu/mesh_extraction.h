// FlexiCubes on sparse cubes: trellis_kernels/mesh_extraction/__init__.py says what is computed, reference.py how.
#pragma once
#include <vector>

#include "sparse_bits.h"
#include "tensor_view.h"

namespace trellis::cpu {

// The integer half, in three steps, since each tells the sizes of what the next one writes.
class SurfaceTopology {
 public:
  SurfaceTopology(TensorView<const int32_t, 2> coords, int64_t resolution, int threads);

  // Reads the sdf in the first 8 columns of feats.
  template <class T>
  void fill_points(TensorView<const T, 2> feats, TensorView<int32_t, 2> points, TensorView<int32_t, 2> point_cubes);

  void fill_cells(TensorView<int32_t, 2> cells, TensorView<int32_t, 1> cell_cubes, TensorView<int32_t, 2> cell_points,
                  TensorView<int32_t, 1> cases, TensorView<int32_t, 1> vertex_cells,
                  TensorView<int32_t, 2> quads) const;

  int64_t point_count() const { return points_.size(); }
  int64_t cell_count() const { return surface_.size(); }
  int64_t vertex_count() const { return cell_count() ? first_vertex_.back() : 0; }
  int64_t quad_count() const { return cell_count() ? first_quad_.back() : 0; }

 private:
  void number_points();
  void find_surface();
  void find_cases();
  template <class Body>  // body(rank, x, y, z) over the cells of the surface
  void for_surface(const Body& body) const;

  int64_t resolution_, cubes_;
  int threads_;
  SparseBits voxels_, points_, surface_;
  std::vector<int32_t> cube_of_voxel_;              // row in coords, by rank in voxels_
  std::vector<uint64_t> inside_;                    // by word of points_
  std::vector<uint8_t> corners_;                    // by rank in surface_: bit k, corner k is inside
  std::vector<uint8_t> cases_;                      // that, or its complement where a face is ambiguous
  std::vector<int32_t> first_vertex_, first_quad_;  // by rank in surface_, then their total
};

// Cuts each quad along the diagonal with the greater product of gammas.
template <class T>
void split_quads(TensorView<const int32_t, 2> quads, TensorView<const T, 1> gammas, TensorView<int64_t, 3> faces,
                 int threads);

// What `surface_topology` found, as `surface_values` gets it.
struct Topology {
  TensorView<const int32_t, 2> points, point_cubes, cells;
  TensorView<const int32_t, 1> cell_cubes;
  TensorView<const int32_t, 2> cell_points;
  TensorView<const int32_t, 1> cases;
  int64_t resolution;
  bool training;
  int threads;
};

template <class T>
struct SurfaceValues {
  TensorView<T, 2> vertices, attributes;
  TensorView<T, 1> gammas, terms;
  TensorView<T, 2> grid_positions;
  TensorView<T, 1> grid_sdf;
};

template <class T>
void surface_values(TensorView<const T, 2> feats, const Topology& topology, const SurfaceValues<T>& out);

template <class T>
void surface_values_gradient(TensorView<const T, 2> feats, const Topology& topology,
                             const SurfaceValues<const T>& gradients, TensorView<T, 2> feats_gradient);

}  // namespace trellis::cpu
