// A hash table of groups of 32 voxels each: a key, one bit for each voxel that is there, and where the rows of the
// group begin, in 16 bytes that one load reads. Open addressing with linear probing in zeroed memory; keys are never
// removed, so that inserting needs one compare-and-swap. Where a group stands and where its rows begin may depend on
// the order in which threads come; nothing that is returned does.
#pragma once
#include "launch.h"
#include "voxel_hash.h"

namespace trellis::cuda {
namespace {

using Word = unsigned long long;  // CUDA's atomics know no uint64_t

constexpr int kThreads = 256;
constexpr int kLimit = 65535;

struct alignas(16) Slot {
  Word key;           // zero: empty
  unsigned occupied;  // which of the group's 32 places hold a voxel
  int base;           // the first of its rows
};

struct Table {
  Slot* slots;
  uint32_t capacity;  // below 2^31
};

struct Group {
  Word key;
  int place;  // of the voxel in its group

  __device__ unsigned bit() const { return 1u << place; }
  __device__ unsigned below() const { return bit() - 1; }
};

__device__ bool in_range(int4 voxel, int limit) {  // batch, x, y, z
  return static_cast<unsigned>(voxel.x) <= kLimit && static_cast<unsigned>(voxel.y) <= static_cast<unsigned>(limit) &&
         static_cast<unsigned>(voxel.z) <= static_cast<unsigned>(limit) &&
         static_cast<unsigned>(voxel.w) <= static_cast<unsigned>(limit);
}

__device__ uint32_t home_of(Word key, uint32_t capacity) {
  key = (key ^ key >> 33) * 0xff51afd7ed558ccdull;  // murmur3's finalizer: every bit of the key reaches every bit
  key = (key ^ key >> 33) * 0xc4ceb9fe1a85ec53ull;
  return static_cast<uint32_t>((key >> 32) * capacity >> 32);  // its upper half as a fraction of the capacity
}

// Slot of the group, made if there is none yet. added: by this thread.
__device__ int insert(Table table, Word key, bool& added) {
  uint32_t at = home_of(key, table.capacity);
  added = false;
  for (uint32_t probe = 0; probe < table.capacity; ++probe) {
    Word* const slot = &table.slots[at].key;
    Word there = *static_cast<volatile Word*>(slot);  // mostly there already, and then it stays
    if (there == 0) {
      there = atomicCAS(slot, Word{0}, key);
      added = there == 0;
    }
    if (there == 0 || there == key) return static_cast<int>(at);
    at = at + 1 < table.capacity ? at + 1 : 0;
  }
  DEVICE_CHECK(false, "the hash table is full");
  return 0;
}

// Adds what all threads of the block want to *counter, by one atomic; returns where this thread's share begins.
__device__ int allocate(int wanted, int* counter) {
  SHARED_ARRAY(int, starts, kThreads / 32);  // of each warp
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int end = wanted;
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, end, step);
    if (lane >= step) end += before;
  }
  if (lane == 31) starts[warp] = end;
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (int w = 0; w < kThreads / 32; ++w) total += starts[w];
    int start = total ? atomicAdd(counter, total) : 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      const int size = starts[w];
      starts[w] = start;
      start += size;
    }
  }
  __syncthreads();
  const int start = starts[warp] + end - wanted;
  __syncthreads();  // before the next call writes
  return start;
}

inline const int4* rows_of(Coords coords) {
  if (coords.size(1) != 4) throw std::invalid_argument("coords must be [N, 4]");
  if (reinterpret_cast<uintptr_t>(coords.data) % sizeof(int4))
    throw std::invalid_argument("coords must begin at a multiple of 16 bytes");
  return reinterpret_cast<const int4*>(coords.data);
}

inline Table table_of(Slots slots) {
  if (slots.size(0) < 1 || slots.size(0) > INT32_MAX || slots.size(1) != 2)
    throw std::invalid_argument("slots must be [capacity, 2] with capacity in [1, 2**31)");
  return {reinterpret_cast<Slot*>(slots.data), static_cast<uint32_t>(slots.size(0))};
}

inline void expect(bool holds, const char* text) {
  if (!holds) throw std::invalid_argument(text);
}

}  // namespace
}  // namespace trellis::cuda
