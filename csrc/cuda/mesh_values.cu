// The real half of FlexiCubes: the values of grid points, then dual vertices and their attributes.
#include "mesh_surface.cuh"

namespace trellis::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// One thread per cell and edge. Plain stores: all write the same.
template <class T>
__global__ void mark_points(Surface<T> s) {
  const int64_t item = int64_t{blockIdx.x} * kCellThreads + threadIdx.x, cell = item / 12;
  const int edge = static_cast<int>(item % 12);
  bool crossed = false;
  if (cell < s.cell_count) {
    DEVICE_CHECK(s.cases[cell] >= 0 && s.cases[cell] < 256, "cases must be in [0, 256)");
    DEVICE_CHECK(s.cell_cubes[cell] >= -1 && s.cell_cubes[cell] < s.cubes, "cell_cubes must be in [-1, N)");
    if (edge < 8) {
      const int64_t point = s.cell_points[8 * cell + edge];
      DEVICE_CHECK(point >= -1 && point < s.point_count, "cell_points must be in [-1, G)");
    } else if (edge < 11) {
      const int at = s.cells[3 * cell + edge - 8];
      DEVICE_CHECK(at >= 0 && at < s.resolution, "cells must be in [0, resolution)");
    }
    crossed = vertex_of_edge(s.kind(cell), edge) >= 0;
    if (crossed && !s.training) {
      for (int end = 0; end < 2; ++end) {
        const int64_t point = s.cell_points[8 * cell + kEdgeEnds.of[edge][end]];
        DEVICE_CHECK(point >= -1 && point < s.point_count, "cell_points must be in [-1, G)");
        if (point >= 0) s.active[point] = 1;
      }
    }
  }
  if (!s.training) return;
  const unsigned votes = __ballot_sync(kAll, crossed);
  if (threadIdx.x % 32 == 0 && votes) atomicAdd(s.edge_count, static_cast<unsigned long long>(__popc(votes)));
}

template <class T>
__global__ void number_vertices(Surface<T> s) {
  const int64_t vertex = int64_t{blockIdx.x} * kPointThreads + threadIdx.x;
  if (vertex >= s.vertex_count) return;
  const int cell = s.vertex_cells[vertex];
  DEVICE_CHECK(cell >= 0 && cell < s.cell_count, "vertex_cells must be in [0, S)");
  int rank = 0;
  while (rank < 4 && rank < vertex && s.vertex_cells[vertex - rank - 1] == cell) ++rank;
  DEVICE_CHECK(rank < s.kind(cell).vertices, "vertex_cells must have an entry for each dual vertex of the cases");
  if (rank == 0) s.first_vertex[cell] = static_cast<int32_t>(vertex);
}

// One thread per point and value.
template <class T>
__global__ void gather_points(Surface<T> s, GridOutputs<T> out) {
  double disagreement = 0;
  for (int item = static_cast<int>(threadIdx.x); item < kTilePoints * s.width; item += kPointThreads) {
    const int64_t point = int64_t{blockIdx.x} * kTilePoints + item / s.width;
    const int j = item % s.width;
    if (point >= s.point_count || !s.is_active(point)) continue;
    T said[8], sum = 0, count = 0;
    bool present[8];
    for (int k = 0; k < 8; ++k) {
      const int64_t cube = s.point_cubes[8 * point + k];
      DEVICE_CHECK(cube >= -1 && cube < s.cubes, "point_cubes must be in [-1, N)");
      present[k] = cube >= 0;
      said[k] = present[k] ? s.said(cube, k, j) : T(0);
    }
    for (int k = 0; k < 8; ++k) {
      if (!present[k]) continue;
      sum += said[k];
      count += 1;
    }
    const T mean = sum / count;
    if (out.means) out.means[point * s.width + j] = mean;
    T value = mean;
    if (j >= 4) value = Logistic<T>::sigmoid_of(mean);
    if (j >= 1 && j < 4) value = s.grid_position(s.points[3 * point + j - 1]) + s.reach() * Logistic<T>::tanh_of(mean);
    s.field[point * s.width + j] = value;
    if (!out.partial) continue;
    if (j == 0) out.sdf[point] = value;
    if (j >= 1 && j < 4) out.positions[3 * point + j - 1] = value;
    for (int k = 0; k < 8; ++k) disagreement += present[k] ? (said[k] - mean) * (said[k] - mean) : T(0);
  }
  if (!out.partial) return;
  const double sum = block_sum<kPointThreads>(disagreement);
  if (threadIdx.x == 0) out.partial[blockIdx.x] = sum;
}

// A thread per edge finds its weights, then a thread per vertex and channel adds up the edges.
template <class T>
__global__ void place_vertices(Surface<T> s, T* vertices, T* attributes, T* gammas, double* partial) {
  SHARED_ARRAY(T, left, kTileCells, 12);  // beta wa / (wa + wb)
  SHARED_ARRAY(T, right, kTileCells, 12);
  SHARED_ARRAY(T, betas, kTileCells, 12);
  SHARED_ARRAY(T, positions, 4 * kTileCells, 3);
  SHARED_ARRAY(T, distances, kTileCells, 12);
  const int thread = static_cast<int>(threadIdx.x), local = thread / 12, edge = thread % 12;
  const int64_t first_cell = int64_t{blockIdx.x} * kTileCells, cell = first_cell + local;
  const CrossedEdge<T> own(s, cell, edge);
  if (own.vertex >= 0) {
    const T share = own.beta / (own.wa + own.wb);
    left[local][edge] = share * own.wa;
    right[local][edge] = share * own.wb;
    betas[local][edge] = own.beta;
  }
  __syncthreads();
  const int values = 3 + s.channels;
  for (int item = thread; item < 4 * kTileCells * values; item += kCellThreads) {
    const int rank = item / (kTileCells * values), tile_cell = item / values % kTileCells, j = item % values;
    const int64_t at = first_cell + tile_cell;
    if (at >= s.cell_count || rank >= s.kind(at).vertices) continue;
    T sum = 0, total = 0;
    for (unsigned rest = s.kind(at).groups[rank]; rest; rest &= rest - 1) {
      const int e = __ffs(static_cast<int>(rest)) - 1;
      sum += left[tile_cell][e] * s.corner(at, kEdgeEnds.of[e][0], 1 + j) +
             right[tile_cell][e] * s.corner(at, kEdgeEnds.of[e][1], 1 + j);
      total += betas[tile_cell][e];
    }
    const int64_t vertex = s.vertices_from(at) + rank;
    const T value = sum / total;
    if (j < 3) {
      vertices[3 * vertex + j] = value;
      positions[4 * tile_cell + rank][j] = value;
    } else {
      attributes[vertex * s.channels + j - 3] = value;
    }
    if (j == 0) gammas[vertex] = T(0.005) + T(0.99) * gamma_of(s, at);
  }
  if (!s.training) return;
  __syncthreads();
  T distance = 0;
  if (own.vertex >= 0) {
    T square = 0;
    for (int axis = 0; axis < 3; ++axis) {
      const T offset = own.plain(s, cell, axis) - positions[4 * local + own.vertex][axis];
      square += offset * offset;
    }
    distances[local][edge] = distance = Logistic<T>::root_of(square);
  }
  __syncthreads();
  double deviation = 0;
  if (own.vertex >= 0) {
    const unsigned group = s.kind(cell).groups[own.vertex];
    T sum = 0;
    for (unsigned rest = group; rest; rest &= rest - 1) sum += distances[local][__ffs(static_cast<int>(rest)) - 1];
    const T apart = distance - sum / static_cast<T>(__popc(group));
    deviation = apart < 0 ? -apart : apart;
  }
  const double sum = block_sum<kCellThreads>(deviation);
  if (thread == 0) partial[blockIdx.x] = sum;
}

// Sum of the absolute raw weights of each block of cubes.
template <class T>
__global__ void add_weights(Surface<T> s, double* partial) {
  double sum = 0;
  for (int item = static_cast<int>(threadIdx.x); item < kTilePoints * kGamma; item += kPointThreads) {
    const int64_t cube = int64_t{blockIdx.x} * kTilePoints + item / kGamma;
    if (cube >= s.cubes) continue;
    const T weight = s.feats[cube * s.stride + kWeights + item % kGamma];
    sum += weight < 0 ? -weight : weight;
  }
  sum = block_sum<kPointThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <class T>
__global__ void add_terms(Surface<T> s, const double* partial, int64_t row, int64_t cell_blocks, int64_t point_blocks,
                          int64_t cube_blocks, T* terms) {
  const int64_t sizes[3] = {cell_blocks, point_blocks, cube_blocks};
  const double counts[3] = {static_cast<double>(*s.edge_count), 8.0 * static_cast<double>(s.cubes) * s.width,
                            static_cast<double>(kGamma) * static_cast<double>(s.cubes)};
  for (int term = 0; term < 3; ++term) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < sizes[term]; i += kPointThreads) sum += partial[term * row + i];
    sum = block_sum<kPointThreads>(sum);
    if (threadIdx.x == 0) terms[term] = static_cast<T>(counts[term] > 0 ? sum / counts[term] : 0.0);
  }
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

template <class T>
Surface<T> surface_of(TensorView<const T, 2> feats, const SurfaceMaps& maps, int64_t resolution, bool training,
                      const SurfaceRoom<T>& room) {
  const auto& [points, point_cubes, cells, cell_cubes, cell_points, cases, vertex_cells] = maps;
  const auto& [first_vertex, active, field, edge_count] = room;
  const int64_t grid = points.size(0), count = cells.size(0), channels = (feats.size(1) - kColors) / 8;
  require(feats.size(1) >= kColors && (feats.size(1) - kColors) % 8 == 0, "feats must have 53 + 8 C channels");
  require(resolution >= 1 && resolution <= 4095, "resolution must be in [1, 4095]");
  require(points.size(1) == 3 && point_cubes.size(0) == grid && point_cubes.size(1) == 8,
          "points must be [G, 3] and point_cubes [G, 8]");
  require(cells.size(1) == 3 && cell_cubes.size(0) == count && cell_points.size(0) == count &&
              cell_points.size(1) == 8 && cases.size(0) == count,
          "cells must be [S, 3], cell_cubes [S], cell_points [S, 8] and cases [S]");
  require(first_vertex.size(0) == count && (training || active.size(0) == grid) && field.size(0) == grid &&
              field.size(1) == 4 + channels && edge_count.size(0) == 1,
          "the room to work in must be [S], [G], [G, 4 + C] and [1]");
  return {feats.data,
          feats.size(0),
          feats.size(1),
          points.data,
          point_cubes.data,
          grid,
          cells.data,
          cell_cubes.data,
          cell_points.data,
          cases.data,
          count,
          vertex_cells.data,
          vertex_cells.size(0),
          first_vertex.data,
          active.data,
          field.data,
          reinterpret_cast<unsigned long long*>(edge_count.data),
          static_cast<int>(channels),
          static_cast<int>(4 + channels),
          static_cast<int>(resolution),
          training};
}

template <class T>
void prepare_surface(const Surface<T>& s, const GridOutputs<T>& grid, int64_t stream) {
  launch({"mark_points", blocks(s.cell_count, kTileCells), kCellThreads, stream}, mark_points<T>, s);
  launch({"number_vertices", blocks(s.vertex_count, kPointThreads), kPointThreads, stream}, number_vertices<T>, s);
  launch({"gather_points", blocks(s.point_count, kTilePoints), kPointThreads, stream}, gather_points<T>, s, grid);
}

template <class T>
void surface_values(TensorView<const T, 2> feats, const SurfaceMaps& maps, int64_t resolution, bool training,
                    const SurfaceRoom<T>& room, TensorView<double, 2> partial, const SurfaceValues<T>& out,
                    int64_t stream) {
  const Surface<T> s = surface_of(feats, maps, resolution, training, room);
  const auto& [vertices, attributes, gammas, terms, positions, sdf] = out;
  require(vertices.size(0) == s.vertex_count && vertices.size(1) == 3 && attributes.size(0) == s.vertex_count &&
              attributes.size(1) == s.channels && gammas.size(0) == s.vertex_count && terms.size(0) == 3,
          "vertices must be [V, 3], attributes [V, C], gammas [V] and terms [3]");
  const int64_t row = partial.size(1);
  const unsigned cell_blocks = blocks(s.cell_count, kTileCells), point_blocks = blocks(s.point_count, kTilePoints),
                 cube_blocks = blocks(s.cubes, kTilePoints);
  require(!training || (positions.size(0) == s.point_count && positions.size(1) == 3 && sdf.size(0) == s.point_count &&
                        partial.size(0) == 3 && row >= cell_blocks && row >= point_blocks && row >= cube_blocks),
          "grid_positions must be [G, 3], grid_sdf [G] and partial [3, blocks]");
  prepare_surface(s, {nullptr, positions.data, sdf.data, training ? partial.data + row : nullptr}, stream);
  launch({"place_vertices", cell_blocks, kCellThreads, stream}, place_vertices<T>, s, vertices.data, attributes.data,
         gammas.data, partial.data);
  if (!training) return;
  launch({"add_weights", cube_blocks, kPointThreads, stream}, add_weights<T>, s, partial.data + 2 * row);
  launch({"add_terms", 1, kPointThreads, stream}, add_terms<T>, s, partial.data, row, cell_blocks, point_blocks,
         cube_blocks, terms.data);
}

#define INSTANTIATE(T)                                                                                              \
  template Surface<T> surface_of(TensorView<const T, 2>, const SurfaceMaps&, int64_t, bool, const SurfaceRoom<T>&); \
  template void prepare_surface(const Surface<T>&, const GridOutputs<T>&, int64_t);                                 \
  template void surface_values(TensorView<const T, 2>, const SurfaceMaps&, int64_t, bool, const SurfaceRoom<T>&,    \
                               TensorView<double, 2>, const SurfaceValues<T>&, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace trellis::cuda
