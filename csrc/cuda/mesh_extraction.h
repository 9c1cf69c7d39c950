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

// What surface_topology found: points, point_cubes, cells, cell_cubes, cell_points, cases, vertex_cells.
using SurfaceMaps = std::tuple<TensorView<const int32_t, 2>, TensorView<const int32_t, 2>, TensorView<const int32_t, 2>,
                               TensorView<const int32_t, 1>, TensorView<const int32_t, 2>, TensorView<const int32_t, 1>,
                               TensorView<const int32_t, 1>>;

// Room to work in: the first vertex of each cell [S]; whether a point matters [G], zeros, or [0] in training; sdf,
// position and color of the points [G, 4 + C]; a number of edges [1], zero.
template <class T>
using SurfaceRoom =
    std::tuple<TensorView<int32_t, 1>, TensorView<uint8_t, 1>, TensorView<T, 2>, TensorView<int64_t, 1>>;

// vertices, attributes, gammas, terms, grid_positions and grid_sdf, or their gradients.
template <class T>
using SurfaceValues = std::tuple<TensorView<T, 2>, TensorView<T, 2>, TensorView<T, 1>, TensorView<T, 1>,
                                 TensorView<T, 2>, TensorView<T, 1>>;

// `partial` [3, blocks]: sums of blocks of 16 cells, 64 points and 64 cubes. Not in training terms are left as they
// are.
template <class T>
void surface_values(TensorView<const T, 2> feats, const SurfaceMaps& maps, int64_t resolution, bool training,
                    const SurfaceRoom<T>& room, TensorView<double, 2> partial, const SurfaceValues<T>& out,
                    int64_t stream);

// More room: for each cube its points [N, 8] and its cell [N], for each point its cells [G, 8], all -1; means and
// gradients of the points [G, 4 + C]; gradients of the weights of the cells [S, 21]; of their corners with respect to
// sdf [S, 8] and, in training, position [S, 24]; the share of each vertex in each corner [V, 8]; in training the
// gradients of the vertices with what the first term adds [V, 3].
template <class T>
using GradientRoom = std::tuple<TensorView<int32_t, 2>, TensorView<int32_t, 1>, TensorView<int32_t, 2>,
                                TensorView<T, 2>, TensorView<T, 2>, TensorView<T, 2>, TensorView<T, 2>,
                                TensorView<T, 2>, TensorView<T, 2>, TensorView<T, 2>>;

template <class T>
void surface_values_gradient(TensorView<const T, 2> feats, const SurfaceMaps& maps, int64_t resolution, bool training,
                             const SurfaceRoom<T>& room, const GradientRoom<T>& more,
                             const SurfaceValues<const T>& gradients, TensorView<T, 2> feats_gradient, int64_t stream);

// Cuts each quad along the diagonal with the greater product of gammas.
template <class T>
void split_quads(TensorView<const int32_t, 2> quads, TensorView<const T, 1> gammas, TensorView<int64_t, 3> faces,
                 int64_t stream);

}  // namespace trellis::cuda
