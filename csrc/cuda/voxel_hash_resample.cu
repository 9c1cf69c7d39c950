// Voxels of a coarser and of a finer grid.
#include "voxel_hash.cuh"

namespace trellis::cuda {
namespace {

__device__ int4 divided(int4 voxel, int factor) {
  return {voxel.x, voxel.y / factor, voxel.z / factor, voxel.w / factor};
}

// Runs of 32 along z: sorted keys and then places are the lexicographic order of voxels.
__device__ Group run_of(int4 voxel) {
  return {(Word(voxel.x) << 43 | Word(voxel.y) << 27 | Word(voxel.z) << 11 | Word(voxel.w >> 5)) + 1, voxel.w & 31};
}

__global__ void insert_runs(const int4* __restrict__ coords, int64_t count, int factor, Table table,
                            int* __restrict__ slot_of, int64_t* __restrict__ keys, int* __restrict__ used,
                            int* counts) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  bool added = false, first = false;
  int slot = 0;
  Group run{};
  if (n < count) {
    const int4 voxel = coords[n];
    DEVICE_CHECK(in_range(voxel, kLimit), "coords must be in [0, 65535]");
    run = run_of(divided(voxel, factor));
    slot = insert(table, run.key, added);
    first = !(atomicOr(&table.slots[slot].occupied, run.bit()) & run.bit());
    slot_of[n] = first ? ~slot : slot;
  }
  const int place = allocate(added, counts);
  allocate(first, counts + 1);
  if (added) {
    keys[place] = static_cast<int64_t>(run.key);
    used[place] = slot;
  }
}

__global__ void count_runs(Table table, const int* __restrict__ used, const int64_t* __restrict__ order, int64_t count,
                           int* __restrict__ sizes) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) sizes[i] = __popc(table.slots[used[order[i]]].occupied);
}

__global__ void place_runs(Table table, const int* __restrict__ used, const int64_t* __restrict__ order,
                           const int* __restrict__ ends, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  Slot& slot = table.slots[used[order[i]]];
  slot.base = ends[i] - __popc(slot.occupied);
}

__global__ void write_runs(const int4* __restrict__ coords, int64_t count, int factor, Table table,
                           const int* __restrict__ slot_of, int4* __restrict__ coarse, int* __restrict__ inverse) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= count) return;
  const int marked = slot_of[n];
  const Slot slot = table.slots[marked < 0 ? ~marked : marked];
  const int4 voxel = divided(coords[n], factor);
  const int row = slot.base + __popc(slot.occupied & run_of(voxel).below());
  inverse[n] = row;
  if (marked < 0) coarse[row] = voxel;  // one of those that share it
}

__global__ void write_children(const int4* __restrict__ coords, int64_t children, int4* __restrict__ out) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= children) return;
  const int4 voxel = coords[n >> 3];
  DEVICE_CHECK(in_range(voxel, kLimit / 2), "coords must be in [0, 32767]");
  const int child = static_cast<int>(n & 7);
  out[n] = {voxel.x, 2 * voxel.y + (child >> 2), 2 * voxel.z + (child >> 1 & 1), 2 * voxel.w + (child & 1)};
}

constexpr int kTaps = 27;
constexpr int kQuads = 8 * kTaps / 4;          // of the children's entries that a voxel leads to
constexpr int kSpread = 4;                     // voxels written at a time
constexpr int kTile = 32;                      // voxels whose neighbors are staged
constexpr int kMapThreads = kSpread * kQuads;  // 216: a thread writes the same quad of several voxels

// Where entry `entry` of the children's 8 x 27 comes from: the tap of their parent, and which child that voxel's is.
__device__ int2 origin(int entry) {
  const int child = entry / kTaps, tap = entry % kTaps;
  const int x = (child >> 2) + tap / 9 + 1, y = (child >> 1 & 1) + tap / 3 % 3 + 1, z = (child & 1) + tap % 3 + 1;
  // In child widths, counted from two before the first child: 1 .. 4. Half of it is the tap, the rest the child.
  return {(x >> 1) * 9 + (y >> 1) * 3 + (z >> 1), (x & 1) << 2 | (y & 1) << 1 | (z & 1)};
}

__global__ void subdivide_map(const int* __restrict__ neighbors, int64_t count, int4* __restrict__ children) {
  SHARED_ARRAY(int, parents, kTile* kTaps);
  const int64_t first = int64_t{blockIdx.x} * kTile;
  const int size = static_cast<int>(count - first < kTile ? count - first : kTile);
  for (int i = threadIdx.x; i < size * kTaps; i += kMapThreads) {
    const int row = neighbors[first * kTaps + i];
    DEVICE_CHECK(row >= -1 && row < count, "neighbors must be in [-1, N)");
    parents[i] = row;
  }
  __syncthreads();
  const int quad = threadIdx.x % kQuads;
  int2 from[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) from[i] = origin(4 * quad + i);
  for (int voxel = threadIdx.x / kQuads; voxel < size; voxel += kSpread) {
    int rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int parent = parents[voxel * kTaps + from[i].x];
      rows[i] = parent < 0 ? -1 : 8 * parent + from[i].y;
    }
    children[(first + voxel) * kQuads + quad] = {rows[0], rows[1], rows[2], rows[3]};
  }
}

int clamped(int64_t factor) {  // beyond the range every quotient is zero anyway
  if (factor < 1) throw std::invalid_argument("factor must be positive; got " + std::to_string(factor));
  return static_cast<int>(factor < kLimit + 1 ? factor : kLimit + 1);
}

}  // namespace

void gather_runs(Coords coords, int64_t factor, Slots slots, TensorView<int32_t, 1> slot_of,
                 TensorView<int64_t, 1> keys, TensorView<int32_t, 1> used, TensorView<int32_t, 1> counts,
                 int64_t stream) {
  const int64_t count = coords.size(0);
  expect(slot_of.size(0) == count && keys.size(0) == count && used.size(0) == count && counts.size(0) == 2,
         "slot_of, keys and used must be [N], counts [2]");
  launch({"insert_runs", blocks(count, kThreads), kThreads, stream}, insert_runs, rows_of(coords), count,
         clamped(factor), table_of(slots), slot_of.data, keys.data, used.data, counts.data);
}

void run_sizes(Slots slots, TensorView<const int32_t, 1> used, TensorView<const int64_t, 1> order,
               TensorView<int32_t, 1> sizes, int64_t stream) {
  const int64_t count = order.size(0);
  expect(used.size(0) >= count && sizes.size(0) == count, "used must hold what order points to, sizes be like order");
  launch({"count_runs", blocks(count, kThreads), kThreads, stream}, count_runs, table_of(slots), used.data, order.data,
         count, sizes.data);
}

void write_coarse(Coords coords, int64_t factor, Slots slots, TensorView<const int32_t, 1> slot_of,
                  TensorView<const int32_t, 1> used, TensorView<const int64_t, 1> order,
                  TensorView<const int32_t, 1> ends, TensorView<int32_t, 2> coarse, TensorView<int32_t, 1> inverse,
                  int64_t stream) {
  const int64_t count = coords.size(0), runs = order.size(0);
  expect(slot_of.size(0) == count && inverse.size(0) == count, "slot_of and inverse must be [N]");
  expect(used.size(0) >= runs && ends.size(0) == runs, "used must hold what order points to, ends be like order");
  expect(coarse.size(1) == 4, "coarse must be [M, 4]");
  launch({"place_runs", blocks(runs, kThreads), kThreads, stream}, place_runs, table_of(slots), used.data, order.data,
         ends.data, runs);
  launch({"write_runs", blocks(count, kThreads), kThreads, stream}, write_runs, rows_of(coords), count, clamped(factor),
         table_of(slots), slot_of.data, reinterpret_cast<int4*>(coarse.data), inverse.data);
}

void subdivide_coords(Coords coords, TensorView<int32_t, 2> children, int64_t stream) {
  const int64_t count = 8 * coords.size(0);
  expect(children.size(0) == count && children.size(1) == 4, "children must be [8 N, 4]");
  launch({"write_children", blocks(count, kThreads), kThreads, stream}, write_children, rows_of(coords), count,
         reinterpret_cast<int4*>(children.data));
}

void subdivided_neighbor_map(TensorView<const int32_t, 2> neighbors, TensorView<int32_t, 2> children, int64_t stream) {
  const int64_t count = neighbors.size(0);
  if (count >= int64_t{1} << 28)
    throw std::invalid_argument("neighbors must have fewer than 2**28 rows; got " + std::to_string(count));
  expect(neighbors.size(1) == kTaps && children.size(0) == 8 * count && children.size(1) == kTaps,
         "children must be [8 N, 27] for neighbors [N, 27]");
  launch({"subdivide_map", blocks(count, kTile), kMapThreads, stream}, subdivide_map, neighbors.data, count,
         reinterpret_cast<int4*>(children.data));
}

}  // namespace trellis::cuda
