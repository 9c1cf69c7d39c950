// Which cells the surface crosses and how their dual vertices are joined. Cubes, grid points and cells are bits in
// words (sparse_bits.cuh): what a sort would do is counting bits, and everything comes out in the order of x, y, z.
#include "mesh_topology.cuh"

namespace trellis::cuda {
namespace {

struct Cubes {
  const int32_t* coords;  // [N, 3]
  int64_t count;
};

// atomicOr, where most bits are set already and reading is cheaper.
__device__ void set_bits(Word* word, Word bits) {
  if ((*word & bits) != bits) atomicOr(word, bits);
}

__global__ void mark_segments(Cubes cubes, SparseBits voxels) {
  const int64_t n = global_thread();
  if (n >= cubes.count) return;
  const int32_t* const at = cubes.coords + 3 * n;
  if (voxels.holds(at[0], at[1], at[2]))
    set_bits(&voxels.segments[voxels.column(at[0], at[1])], Word{1} << (at[2] >> 6));
}

__global__ void count_segments(SparseBits set) {
  const int64_t column = global_thread();
  if (column < set.columns()) set.ends[column] = __popcll(set.segments[column]);
}

__global__ void set_voxels(Cubes cubes, SparseBits voxels) {
  const int64_t n = global_thread();
  if (n >= cubes.count) return;
  const int32_t* const at = cubes.coords + 3 * n;
  if (!voxels.holds(at[0], at[1], at[2])) return;
  const int index = voxels.word_index(voxels.column(at[0], at[1]), at[2] >> 6);
  set_bits(&voxels.words[index], Word{1} << (at[2] & 63));
}

__global__ void count_words(SparseBits set) {
  const int64_t index = global_thread();
  if (index < set.capacity) set.ranks[index] = index < set.word_count() ? __popcll(set.words[index]) : 0;
}

__global__ void number_cubes(Cubes cubes, SparseBits voxels, int32_t* cube_of_voxel) {
  const int64_t n = global_thread();
  if (n >= cubes.count) return;
  const int rank = voxels.find(cubes.coords[3 * n], cubes.coords[3 * n + 1], cubes.coords[3 * n + 2]);
  if (rank >= 0) cube_of_voxel[rank] = static_cast<int32_t>(n);
}

__global__ void list_words(SparseBits set) {
  const int64_t column = global_thread();
  if (column >= set.columns()) return;
  int index = set.ends[column] - __popcll(set.segments[column]);
  for (Word rest = set.segments[column]; rest; rest &= rest - 1)
    set.places[index++] = static_cast<int32_t>(column * 64 + __ffsll(static_cast<long long>(rest)) - 1);
}

// A point is in the set if one of the four columns of cells around it has a cell at its z or below.
__global__ void find_point_segments(SparseBits voxels, SparseBits points) {
  const int64_t column = global_thread();
  if (column >= points.columns()) return;
  const int x = static_cast<int>(column / points.side), y = static_cast<int>(column % points.side);
  Word segments = 0;
  for (int k = 0; k < 4; ++k) {
    if (!voxels.holds(x - (k & 1), y - (k >> 1), 0)) continue;
    const int64_t around = voxels.column(x - (k & 1), y - (k >> 1));
    int index = voxels.ends[around] - __popcll(voxels.segments[around]);
    segments |= voxels.segments[around];
    for (Word rest = voxels.segments[around]; rest; rest &= rest - 1, ++index)
      if (voxels.words[index] >> 63) segments |= lowest_bit(rest) << 1;
  }
  points.segments[column] = segments;
}

// Every word that may have a crossed cell: one of the points at its corners is in the set.
__global__ void find_cell_segments(SparseBits points, SparseBits cells) {
  const int64_t column = global_thread();
  if (column >= cells.columns()) return;
  const int x = static_cast<int>(column / cells.side), y = static_cast<int>(column % cells.side);
  Word segments = 0;
  for (int k = 0; k < 4; ++k) segments |= points.segments[points.column(x + (k & 1), y + (k >> 1))];
  cells.segments[column] = segments | segments >> 1;
}

__global__ void set_points(SparseBits voxels, SparseBits points) {
  const int64_t index = global_thread();
  if (index >= points.capacity) return;
  Word word = 0;
  if (index < points.word_count()) {
    const Place at(points, index);
    for (int k = 0; k < 4; ++k) {
      if (!voxels.holds(at.x - (k & 1), at.y - (k >> 1), 0)) continue;
      const int64_t column = voxels.column(at.x - (k & 1), at.y - (k >> 1));
      const Word here = voxels.word_of(voxels.words, column, at.segment);
      word |= here | here << 1;
      if (at.segment > 0) word |= voxels.word_of(voxels.words, column, at.segment - 1) >> 63;
    }
  }
  points.words[index] = word;
  points.ranks[index] = __popcll(word);
}

// Which grid points are inside. The mean is added up in the order of the corners, as on the CPU: the same bits.
template <class T>
__global__ void find_inside(const T* feats, int64_t stride, T bias, SparseBits voxels, const int32_t* cube_of_voxel,
                            SparseBits points, Word* inside) {
  const int64_t index = global_thread() / 32;
  if (index >= points.capacity || index >= points.word_count()) return;
  const Place at(points, index);
  Word found = 0;
  for (PointsOfWord four(points.words[index]); four.rest; four.next()) {
    const int bit = four.bit();
    const int cube = bit < 0 ? -1 : cube_around(voxels, cube_of_voxel, at.x, at.y, at.segment * 64 + bit, four.k);
    const T value = cube < 0 ? T(0) : feats[cube * stride + four.k] + bias;
    const unsigned present = __ballot_sync(kAll, cube >= 0) >> (8 * four.group) & 0xff;
    T sum = 0;
    for (int k = 0; k < 8; ++k) {
      const T other = __shfl_sync(kAll, value, k, 8);
      if (present >> k & 1) sum += other;
    }
    const unsigned negative = __ballot_sync(kAll, four.k == 0 && present && sum / static_cast<T>(__popc(present)) < 0);
    Word rest = four.rest;
    for (int i = 0; i < 4; ++i, rest &= rest - 1)
      if (negative >> (8 * i) & 1) found |= lowest_bit(rest);
  }
  if (threadIdx.x % 32 == 0) inside[index] = found;
}

__global__ void find_cells(SparseBits points, const Word* inside, SparseBits cells, int32_t* counts) {
  const int64_t index = global_thread();
  if (index >= cells.capacity) return;
  Word word = 0;
  int vertices = 0, quads = 0;
  if (index < cells.word_count()) {
    const Place at(cells, index);
    Word any = 0, all = ~Word{0};
    for (int k = 0; k < 4; ++k) {
      const int64_t column = points.column(at.x + (k & 1), at.y + (k >> 1));
      const Word here = points.word_of(inside, column, at.segment);
      const Word above = here >> 1 | (at.segment < 63 ? points.word_of(inside, column, at.segment + 1) << 63 : 0);
      any |= here | above;
      all &= here & above;
    }
    const int left = cells.side - at.segment * 64;
    word = any & ~all & (left >= 64 ? ~Word{0} : left > 0 ? (Word{1} << left) - 1 : 0);
    for (Word rest = word; rest; rest &= rest - 1) {
      const int cell[3] = {at.x, at.y, at.segment * 64 + __ffsll(static_cast<long long>(rest)) - 1};
      const int corners = corners_inside(points, inside, cell[0], cell[1], cell[2]);
      vertices += kCellCases.of[case_of(points, inside, cells.side, corners, cell[0], cell[1], cell[2])].vertices;
      for (int axis = 0; axis < 3; ++axis) quads += starts_quad(corners, axis, cell);
    }
  }
  cells.words[index] = word;
  counts[index] = __popcll(word);
  counts[cells.capacity + index] = vertices;
  counts[2 * cells.capacity + index] = quads;
}

Cubes cubes_of(TensorView<const int32_t, 2> coords) {
  require(coords.size(1) == 3, "coords must be [N, 3]");
  return {coords.data, coords.size(0)};
}

}  // namespace

void mesh_voxel_columns(TensorView<const int32_t, 2> coords, int64_t resolution, TensorView<int64_t, 1> segments,
                        TensorView<int32_t, 1> counts, int64_t stream) {
  const Cubes cubes = cubes_of(coords);
  const SparseBits voxels = bits(resolution, segments, counts);
  launch(per("mark_segments", cubes.count, stream), mark_segments, cubes, voxels);
  launch(per("count_segments", segments.numel(), stream), count_segments, voxels);
}

void mesh_point_columns(TensorView<const int32_t, 2> coords, int64_t resolution, const BitTensors& voxel_tensors,
                        TensorView<int64_t, 1> point_segments, TensorView<int32_t, 1> point_counts,
                        TensorView<int64_t, 1> cell_segments, TensorView<int32_t, 1> cell_counts, int64_t stream) {
  const Cubes cubes = cubes_of(coords);
  const SparseBits voxels = bits(resolution, voxel_tensors);
  const SparseBits points = bits(resolution + 1, point_segments, point_counts);
  const SparseBits cells = bits(resolution, cell_segments, cell_counts);
  launch(per("set_voxels", cubes.count, stream), set_voxels, cubes, voxels);
  launch(per("count_words", voxels.capacity, stream), count_words, voxels);
  launch(per("find_point_segments", point_counts.numel(), stream), find_point_segments, voxels, points);
  launch(per("count_segments", point_counts.numel(), stream), count_segments, points);
  launch(per("find_cell_segments", cell_counts.numel(), stream), find_cell_segments, points, cells);
  launch(per("count_segments", cell_counts.numel(), stream), count_segments, cells);
}

template <class T>
void mesh_surface_cells(TensorView<const int32_t, 2> coords, TensorView<const T, 2> feats, int64_t resolution,
                        const BitTensors& voxel_tensors, TensorView<int32_t, 1> cube_of_voxel,
                        const BitTensors& point_tensors, TensorView<int64_t, 1> inside, const BitTensors& cell_tensors,
                        TensorView<int32_t, 2> counts, int64_t stream) {
  const Cubes cubes = cubes_of(coords);
  const SparseBits voxels = bits(resolution, voxel_tensors), points = bits(resolution + 1, point_tensors);
  const SparseBits cells = bits(resolution, cell_tensors);
  require(feats.size(0) == cubes.count && feats.size(1) >= 8, "feats must have a row for each cube");
  require(cube_of_voxel.numel() == cubes.count && inside.numel() == points.capacity && counts.size(0) == 3 &&
              counts.size(1) == cells.capacity,
          "cube_of_voxel must be [N], inside [words of points] and counts [3, words of cells]");
  const T bias = static_cast<T>(-1.0 / static_cast<double>(resolution));
  Word* const words = reinterpret_cast<Word*>(inside.data);
  launch(per("number_cubes", cubes.count, stream), number_cubes, cubes, voxels, cube_of_voxel.data);
  launch(per("list_words", points.columns(), stream), list_words, points);
  launch(per("list_words", cells.columns(), stream), list_words, cells);
  launch(per("set_points", points.capacity, stream), set_points, voxels, points);
  launch(per("find_inside", points.capacity, stream, 32), find_inside<T>, feats.data, feats.size(1), bias, voxels,
         cube_of_voxel.data, points, words);
  launch(per("find_cells", cells.capacity, stream), find_cells, points, words, cells, counts.data);
}

template void mesh_surface_cells(TensorView<const int32_t, 2>, TensorView<const float, 2>, int64_t, const BitTensors&,
                                 TensorView<int32_t, 1>, const BitTensors&, TensorView<int64_t, 1>, const BitTensors&,
                                 TensorView<int32_t, 2>, int64_t);
template void mesh_surface_cells(TensorView<const int32_t, 2>, TensorView<const double, 2>, int64_t, const BitTensors&,
                                 TensorView<int32_t, 1>, const BitTensors&, TensorView<int64_t, 1>, const BitTensors&,
                                 TensorView<int32_t, 2>, int64_t);

}  // namespace trellis::cuda
