// What the two halves of the topology share: finding (mesh_topology.cu) and writing down (mesh_fill_topology.cu).
#pragma once
#include "flexicubes.cuh"
#include "launch.h"
#include "mesh_extraction.h"
#include "sparse_bits.cuh"

namespace trellis::cuda {

constexpr int kThreads = 256;
constexpr int kWarpThreads = 128;  // of kernels with one warp per word
constexpr unsigned kAll = 0xffffffffu;

__device__ inline int64_t global_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

// A word of a SparseBits by its index.
struct Place {
  int x, y, segment;
  __device__ Place(const SparseBits& set, int64_t index) {
    const int column = set.places[index] >> 6;
    x = column / set.side;
    y = column % set.side;
    segment = set.places[index] & 63;
  }
};

// The points of a word, four at a time; eight lanes look up the eight cubes around each.
struct PointsOfWord {
  int k, group;  // corner that the point is of this lane's cube; which of the four
  Word rest;
  __device__ explicit PointsOfWord(Word word) : k(threadIdx.x & 7), group(threadIdx.x >> 3 & 3), rest(word) {}
  __device__ int bit() const {  // -1 where there are fewer than four
    Word mine = rest;
    for (int i = 0; i < group; ++i) mine &= mine - 1;
    return __ffsll(static_cast<long long>(mine)) - 1;
  }
  __device__ void next() {
    for (int i = 0; i < 4; ++i) rest &= rest - 1;
  }
};

__device__ inline int cube_around(const SparseBits& voxels, const int32_t* cube_of_voxel, int x, int y, int z, int k) {
  const int rank = voxels.find(x - (k & 1), y - (k >> 1 & 1), z - (k >> 2));
  return rank < 0 ? -1 : cube_of_voxel[rank];
}

// Bit k: corner k of the cell is inside.
__device__ inline int corners_inside(const SparseBits& points, const Word* inside, int x, int y, int z) {
  int corners = 0;
  for (int k = 0; k < 8; ++k) {
    const int pz = z + (k >> 2);
    const Word word = points.word_of(inside, points.column(x + (k & 1), y + (k >> 1 & 1)), pz >> 6);
    corners |= static_cast<int>(word >> (pz & 63) & 1) << k;
  }
  return corners;
}

// A cell and the neighbor across its ambiguous face, if that is ambiguous too, both take the opposite case.
__device__ inline int case_of(const SparseBits& points, const Word* inside, int side, int corners, int x, int y,
                              int z) {
  const CellCase& own = kCellCases.of[corners];
  if (!own.ambiguous) return corners;
  x += own.direction[0];
  y += own.direction[1];
  z += own.direction[2];
  if (x < 0 || y < 0 || z < 0 || x >= side || y >= side || z >= side) return corners;
  return kCellCases.of[corners_inside(points, inside, x, y, z)].ambiguous ? 255 - corners : corners;
}

// A quad belongs to the edge that starts in corner 0 of a cell and runs along an axis. The cells around it are at
// (-1, -1), (-1, 0), (0, -1), (0, 0) in the two other axes; `edges` is what it is called in each.
struct Axis {
  int8_t u, v, edges[4];
  int8_t end;   // the corner of the cell at its other end
  int8_t down;  // whether the table has it in the other direction
};
__device__ constexpr Axis kAxes[3] = {
    {1, 2, {6, 4, 2, 0}, 1, 0}, {0, 2, {10, 9, 11, 8}, 2, 1}, {0, 1, {5, 1, 7, 3}, 4, 0}};

// `corners` is not the case, which an ambiguous face may have turned around.
__device__ inline bool starts_quad(int corners, int axis, const int (&cell)[3]) {
  const Axis& edge = kAxes[axis];
  return ((corners ^ corners >> edge.end) & 1) && cell[edge.u] > 0 && cell[edge.v] > 0;
}

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline SparseBits bits(int64_t side, TensorView<int64_t, 1> segments, TensorView<int32_t, 1> ends) {
  require(side >= 1 && side <= 4096, "resolution must be in [1, 4095]");
  require(segments.numel() == side * side && ends.numel() == side * side, "segments and ends must be [side^2]");
  return {static_cast<int>(side), reinterpret_cast<Word*>(segments.data), ends.data, nullptr, nullptr, nullptr, 0};
}

inline SparseBits bits(int64_t side, const BitTensors& tensors) {
  const auto& [segments, ends, words, ranks, places] = tensors;
  SparseBits set = bits(side, segments, ends);
  require(ranks.numel() == words.numel() && places.numel() == words.numel(), "words, ranks and places must be [W]");
  set.words = reinterpret_cast<Word*>(words.data);
  set.ranks = ranks.data;
  set.places = places.data;
  set.capacity = words.numel();
  return set;
}

inline Launch per(const char* kernel, int64_t count, int64_t stream, int lanes = 1) {
  const int threads = lanes == 32 ? kWarpThreads : kThreads;
  return {kernel, blocks(count, threads / lanes), static_cast<unsigned>(threads), stream};
}

}  // namespace trellis::cuda
