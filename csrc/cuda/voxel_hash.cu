// Neighbor maps. Voxels are gathered into bricks of 2 x 4 x 4 behind a hash table; the rows of a brick's voxels stand
// together, in the order of their places, so that the row of a voxel is found by counting the bits below its own.
#include "voxel_hash.cuh"

namespace trellis::cuda {
namespace {

__device__ Group brick_of(int4 voxel) {
  return {(Word(voxel.x) << 43 | Word(voxel.y >> 1) << 28 | Word(voxel.z >> 2) << 14 | Word(voxel.w >> 2)) + 1,
          (voxel.y & 1) << 4 | (voxel.z & 3) << 2 | (voxel.w & 3)};
}

__global__ void insert_voxels(const int4* __restrict__ coords, int64_t count, Table table, int* __restrict__ slot_of) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= count) return;
  const int4 voxel = coords[n];
  DEVICE_CHECK(in_range(voxel, kLimit), "coords must be in [0, 65535]");
  const Group brick = brick_of(voxel);
  bool added;
  const int slot = insert(table, brick.key, added);
  const unsigned before = atomicOr(&table.slots[slot].occupied, brick.bit());
  DEVICE_CHECK(!(before & brick.bit()), "coords must hold each voxel once");
  slot_of[n] = slot;
}

// The first voxel of each brick takes room for all of them.
__global__ void place_bricks(const int4* __restrict__ coords, int64_t count, Table table,
                             const int* __restrict__ slot_of, int* counter) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  int slot = -1, size = 0;
  if (n < count) {
    slot = slot_of[n];
    const unsigned occupied = table.slots[slot].occupied;
    if (!(occupied & brick_of(coords[n]).below())) size = __popc(occupied);
  }
  const int base = allocate(size, counter);
  if (size) table.slots[slot].base = base;
}

__global__ void scatter_rows(const int4* __restrict__ coords, int64_t count, Table table,
                             const int* __restrict__ slot_of, int* __restrict__ rows) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= count) return;
  const Slot slot = table.slots[slot_of[n]];
  rows[slot.base + __popc(slot.occupied & brick_of(coords[n]).below())] = static_cast<int>(n);
}

// What the table has of a group: if nothing, then no voxel.
__device__ Slot find(Table table, Word key) {
  uint32_t at = home_of(key, table.capacity);
  for (uint32_t probe = 0; probe < table.capacity; ++probe) {
    const int4 words = reinterpret_cast<const int4*>(table.slots)[at];  // one load, not one for each member
    const Slot slot = {Word(unsigned(words.y)) << 32 | unsigned(words.x), unsigned(words.z), words.w};
    if (slot.key == key) return slot;
    if (slot.key == 0) break;
    at = at + 1 < table.capacity ? at + 1 : 0;
  }
  return {key, 0, 0};
}

// Four entries of the map per thread, written as one: whatever the kernel size, a warp writes 512 bytes in a row. They
// are neighbors along z, mostly in one brick, which is looked up once. Fixed: the kernel size if the compiler knows it.
template <int Fixed>
__global__ void write_neighbors(const int4* __restrict__ coords, int64_t entries, int kernel_size, Table table,
                                const int* __restrict__ rows, int* __restrict__ neighbors) {
  const int64_t first = 4 * (int64_t{blockIdx.x} * kThreads + threadIdx.x);
  if (first >= entries) return;
  const int width = Fixed ? Fixed : kernel_size, radius = width / 2, taps = width * width * width;
  int64_t n = first / taps;
  const int tap = static_cast<int>(first % taps);
  int kx = tap / (width * width), ky = tap / width % width, kz = tap % width;
  int4 voxel = coords[n];
  Slot there{};
  int found[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int4 sought = {voxel.x, voxel.y + kx - radius, voxel.z + ky - radius, voxel.w + kz - radius};
    found[i] = -1;
    if (in_range(sought, kLimit)) {
      const Group brick = brick_of(sought);
      if (brick.key != there.key) there = find(table, brick.key);
      if (there.occupied & brick.bit()) found[i] = rows[there.base + __popc(there.occupied & brick.below())];
    }
    if (++kz == width) {
      kz = 0;
      if (++ky == width) {
        ky = 0;
        if (++kx == width) {
          kx = 0;
          if (first + i + 1 < entries) voxel = coords[++n];
        }
      }
    }
  }
  if (first + 4 <= entries)
    *reinterpret_cast<int4*>(neighbors + first) = {found[0], found[1], found[2], found[3]};
  else
#pragma unroll
    for (int i = 0; i < 3; ++i)  // known indices: found stays in registers
      if (i < entries - first) neighbors[first + i] = found[i];
}

}  // namespace

void neighbor_map(Coords coords, int64_t kernel_size, Slots slots, TensorView<int32_t, 1> slot_of,
                  TensorView<int32_t, 1> rows, TensorView<int32_t, 1> counter, TensorView<int32_t, 2> neighbors,
                  int64_t stream) {
  const int64_t count = coords.size(0), taps = kernel_size * kernel_size * kernel_size;
  if (kernel_size < 1 || kernel_size % 2 == 0 || kernel_size > 255)
    throw std::invalid_argument("kernel_size must be odd and in [1, 255]; got " + std::to_string(kernel_size));
  expect(neighbors.size(0) == count && neighbors.size(1) == taps, "neighbors must be [N, kernel_size**3]");
  expect(slot_of.size(0) == count && rows.size(0) == count && counter.size(0) == 1,
         "slot_of and rows must be [N], counter [1]");
  const int4* const voxels = rows_of(coords);
  const Table table = table_of(slots);
  const unsigned all = blocks(count, kThreads);
  launch({"insert_voxels", all, kThreads, stream}, insert_voxels, voxels, count, table, slot_of.data);
  launch({"place_bricks", all, kThreads, stream}, place_bricks, voxels, count, table, slot_of.data, counter.data);
  launch({"scatter_rows", all, kThreads, stream}, scatter_rows, voxels, count, table, slot_of.data, rows.data);
  launch({"write_neighbors", blocks(count * taps, 4 * kThreads), kThreads, stream},
         kernel_size == 3 ? write_neighbors<3> : write_neighbors<0>, voxels, count * taps,
         static_cast<int>(kernel_size), table, rows.data, neighbors.data);
}

}  // namespace trellis::cuda
