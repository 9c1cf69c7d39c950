// The topology written down, once mesh_topology.cu has found and Python has numbered everything.
#include "mesh_topology.cuh"

namespace trellis::cuda {
namespace {

__global__ void fill_points(SparseBits voxels, const int32_t* cube_of_voxel, SparseBits points, int32_t* coords,
                            int32_t* point_cubes) {
  const int64_t index = global_thread() / 32;
  if (index >= points.capacity || index >= points.word_count()) return;
  const Place at(points, index);
  int64_t rank = points.ranks[index] - __popcll(points.words[index]);
  for (PointsOfWord four(points.words[index]); four.rest; four.next(), rank += 4) {
    const int bit = four.bit();
    if (bit < 0) continue;
    const int z = at.segment * 64 + bit;
    point_cubes[8 * (rank + four.group) + four.k] = cube_around(voxels, cube_of_voxel, at.x, at.y, z, four.k);
    if (four.k < 3) coords[3 * (rank + four.group) + four.k] = four.k == 0 ? at.x : four.k == 1 ? at.y : z;
  }
}

// Where a cell's vertices and quads start, and which of its corners are inside.
struct Start {
  int32_t vertex, quad, corners;
};

__global__ void fill_cells(SparseBits points, const Word* inside, SparseBits set, const int32_t* sums, int32_t* cells,
                           int32_t* cases, Start* starts) {
  const int64_t index = global_thread();
  if (index >= set.capacity || index >= set.word_count()) return;
  const Place at(set, index);
  int64_t rank = sums[index] - __popcll(set.words[index]);
  const int64_t before = index - 1;
  Start start{index ? sums[set.capacity + before] : 0, index ? sums[2 * set.capacity + before] : 0, 0};
  for (Word rest = set.words[index]; rest; rest &= rest - 1, ++rank) {
    const int cell[3] = {at.x, at.y, at.segment * 64 + __ffsll(static_cast<long long>(rest)) - 1};
    start.corners = corners_inside(points, inside, cell[0], cell[1], cell[2]);
    cases[rank] = case_of(points, inside, set.side, start.corners, cell[0], cell[1], cell[2]);
    for (int a = 0; a < 3; ++a) cells[3 * rank + a] = cell[a];
    starts[rank] = start;
    start.vertex += kCellCases.of[cases[rank]].vertices;
    for (int axis = 0; axis < 3; ++axis) start.quad += starts_quad(start.corners, axis, cell);
  }
}

struct SurfaceOutputs {
  const int32_t *cells, *cases;
  const Start* starts;
  int32_t *cell_cubes, *cell_points, *vertex_cells, *quads;
};

// The vertices of the four cells around an edge: seen from outside, counterclockwise.
__device__ void fill_quad(const SparseBits& cells, const SurfaceOutputs& out, int64_t rank, const int (&cell)[3],
                          int axis) {
  const Start start = out.starts[rank];
  if (!starts_quad(start.corners, axis, cell)) return;
  const Axis& edge = kAxes[axis];
  int64_t quad = start.quad;
  for (int before = 0; before < axis; ++before) quad += starts_quad(start.corners, before, cell);
  const bool first_inside = start.corners >> (edge.down ? edge.end : 0) & 1;
  for (int k = 0; k < 4; ++k) {
    int other[3] = {cell[0], cell[1], cell[2]};
    other[edge.u] -= 1 - (k >> 1);
    other[edge.v] -= 1 - (k & 1);
    const int64_t neighbor = k == 3 ? rank : cells.find(other[0], other[1], other[2]);
    const int vertex = out.starts[neighbor].vertex + vertex_of_edge(kCellCases.of[out.cases[neighbor]], edge.edges[k]);
    // 0, 1, 3, 2 of these, or from inside 2, 3, 1, 0
    const int position = first_inside ? (k < 2 ? 3 - k : k - 2) : (k < 2 ? k : 5 - k);
    out.quads[4 * quad + position] = vertex;
  }
}

__global__ void fill_surface(SparseBits voxels, const int32_t* cube_of_voxel, SparseBits points, SparseBits cells,
                             int64_t count, SurfaceOutputs out) {
  const int64_t rank = global_thread() / 8;
  const int k = threadIdx.x % 8;
  if (rank >= count) return;
  const int cell[3] = {out.cells[3 * rank], out.cells[3 * rank + 1], out.cells[3 * rank + 2]};
  out.cell_points[8 * rank + k] = points.find(cell[0] + (k & 1), cell[1] + (k >> 1 & 1), cell[2] + (k >> 2));
  if (k < 3) fill_quad(cells, out, rank, cell, k);
  if (k == 3) out.cell_cubes[rank] = cube_around(voxels, cube_of_voxel, cell[0], cell[1], cell[2], 0);
  if (k >= 4 && k - 4 < kCellCases.of[out.cases[rank]].vertices)
    out.vertex_cells[out.starts[rank].vertex + k - 4] = static_cast<int32_t>(rank);
}

}  // namespace

void mesh_fill_topology(int64_t resolution, const BitTensors& voxel_tensors, TensorView<int32_t, 1> cube_of_voxel,
                        const BitTensors& point_tensors, TensorView<int64_t, 1> inside, const BitTensors& cell_tensors,
                        TensorView<int32_t, 2> sums, TensorView<int32_t, 2> starts, const TopologyTensors& out,
                        int64_t stream) {
  const SparseBits voxels = bits(resolution, voxel_tensors), points = bits(resolution + 1, point_tensors);
  SparseBits cells = bits(resolution, cell_tensors);
  const auto& [coords, point_cubes, cell_coords, cell_cubes, cell_points, cases, vertex_cells, quads] = out;
  const int64_t count = cell_coords.size(0);
  const auto is = [](const TensorView<int32_t, 2>& tensor, int64_t rows, int64_t columns) {
    return tensor.size(0) == rows && tensor.size(1) == columns;
  };
  require(is(sums, 3, cells.capacity) && inside.numel() == points.capacity && is(coords, coords.size(0), 3) &&
              is(point_cubes, coords.size(0), 8) && is(cell_coords, count, 3) && is(cell_points, count, 8) &&
              is(starts, count, 3) && cell_cubes.numel() == count && cases.numel() == count && quads.size(1) == 4,
          "the outputs of surface_topology must have the sizes it counted");
  cells.ranks = sums.data;
  const Word* const words = reinterpret_cast<const Word*>(inside.data);
  Start* const work = reinterpret_cast<Start*>(starts.data);
  launch(per("fill_points", points.capacity, stream, 32), fill_points, voxels, cube_of_voxel.data, points, coords.data,
         point_cubes.data);
  launch(per("fill_cells", cells.capacity, stream), fill_cells, points, words, cells, sums.data, cell_coords.data,
         cases.data, work);
  const SurfaceOutputs surface{cell_coords.data, cases.data,        work,      cell_cubes.data,
                               cell_points.data, vertex_cells.data, quads.data};
  launch(per("fill_surface", count, stream, 8), fill_surface, voxels, cube_of_voxel.data, points, cells, count,
         surface);
}

}  // namespace trellis::cuda
