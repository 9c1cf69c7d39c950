// FlexiCubes on sparse cubes: trellis_kernels/mesh_extraction/__init__.py says what is computed, reference.py how.
#pragma once
#include <tuple>

#include "tensor_view.h"

namespace trellis::cuda {

// The tensors of a SparseBits (sparse_bits.cuh): segments, ends, words, ranks, places.
using BitTensors = std::tuple<TensorView<int64_t, 1>, TensorView<int32_t, 1>, TensorView<int64_t, 1>,
                              TensorView<int32_t, 1>, TensorView<int32_t, 1>>;

// The integer half. Between these steps Python turns counts into sums: `ends` and `ranks` are written as counts here.
// Cubes outside the grid are left out, and of equal ones all but one: then the voxels are fewer than the cubes.

// Segments and word counts of the columns of voxels.
void mesh_voxel_columns(TensorView<const int32_t, 2> coords, int64_t resolution, TensorView<int64_t, 1> segments,
                        TensorView<int32_t, 1> counts, int64_t stream);

// Words of the voxels; segments and word counts of the columns of grid points and of cells that may be crossed.
void mesh_point_columns(TensorView<const int32_t, 2> coords, int64_t resolution, const BitTensors& voxels,
                        TensorView<int64_t, 1> point_segments, TensorView<int32_t, 1> point_counts,
                        TensorView<int64_t, 1> cell_segments, TensorView<int32_t, 1> cell_counts, int64_t stream);

// Words of the grid points and which of them are inside, words of the crossed cells, and how many cells, dual vertices
// and quads belong to each of these (counts [3, words]). Reads the sdf in the first 8 columns of feats.
template <class T>
void mesh_surface_cells(TensorView<const int32_t, 2> coords, TensorView<const T, 2> feats, int64_t resolution,
                        const BitTensors& voxels, TensorView<int32_t, 1> cube_of_voxel, const BitTensors& points,
                        TensorView<int64_t, 1> inside, const BitTensors& cells, TensorView<int32_t, 2> counts,
                        int64_t stream);

// The outputs of surface_topology, once counts are sums: points, point_cubes, cells, cell_cubes, cell_points, cases,
// vertex_cells and quads. `starts` [S, 3] is room to work in.
using TopologyTensors =
    std::tuple<TensorView<int32_t, 2>, TensorView<int32_t, 2>, TensorView<int32_t, 2>, TensorView<int32_t, 1>,
               TensorView<int32_t, 2>, TensorView<int32_t, 1>, TensorView<int32_t, 1>, TensorView<int32_t, 2>>;
void mesh_fill_topology(int64_t resolution, const BitTensors& voxels, TensorView<int32_t, 1> cube_of_voxel,
                        const BitTensors& points, TensorView<int64_t, 1> inside, const BitTensors& cells,
                        TensorView<int32_t, 2> sums, TensorView<int32_t, 2> starts, const TopologyTensors& out,
                        int64_t stream);

// Cuts each quad along the diagonal with the greater product of gammas.
template <class T>
void split_quads(TensorView<const int32_t, 2> quads, TensorView<const T, 1> gammas, TensorView<int64_t, 3> faces,
                 int64_t stream);

}  // namespace trellis::cuda
