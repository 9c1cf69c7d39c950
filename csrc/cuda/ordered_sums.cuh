// Sums of runs of equal keys, always in the same order. A warp takes a chunk of 128 items, 32 at a time, and adds up
// runs by a scan. A run inside one chunk is finished there; of one that crosses chunks each leaves a partial sum, which
// combine_chunks adds up. So a run of a million items is as well spread as a million runs of one.
//
//   struct Source {
//     static constexpr int kColumns = 12;
//     static constexpr bool kEachCounts = false;                              // or a key below zero is an error
//     __device__ void load(int64_t item, double (&values)[kColumns]) const;   // values starts as zeros
//     __device__ void store(int key, const double (&sums)[kColumns]) const;   // once for every key there is
//   };
#pragma once
#include "launch.h"

namespace trellis::cuda {

constexpr int kSumThreads = 128;
constexpr int64_t kSumChunk = 128;

struct Runs {
  const int32_t* keys;    // in rising order; those below zero belong to no sum
  const int64_t* order;   // the item of each
  const int32_t* starts;  // where each key begins, and where the last ends
  int64_t count, key_count;
  double* partials;  // [chunks, 2, kColumns]: of the run that began before the chunk, of the one that ends behind it
};

inline int64_t chunks_of(int64_t count) { return (count + kSumChunk - 1) / kSumChunk; }

template <class Source>
__device__ void finish_run(const Runs& runs, const Source& source, int64_t chunk, int key,
                           const double (&sums)[Source::kColumns]) {
  const int64_t begin = runs.starts[key], end = runs.starts[key + 1];
  if (begin >= chunk * kSumChunk && end <= (chunk + 1) * kSumChunk) return source.store(key, sums);
  double* const partial = runs.partials + (2 * chunk + (begin >= chunk * kSumChunk)) * Source::kColumns;
  for (int c = 0; c < Source::kColumns; ++c) partial[c] = sums[c];
}

template <class Source>
__device__ void sum_chunk(const Runs& runs, const Source& source, int64_t chunk, int lane) {
  constexpr int kColumns = Source::kColumns;
  constexpr unsigned kAll = 0xffffffffu;
  const int64_t begin = chunk * kSumChunk;
  double open[kColumns] = {};  // of the run that may go on in the next 32 items
  int open_key = -1;
  for (int64_t first = begin; first < min(runs.count, begin + kSumChunk); first += 32) {
    const int key = first + lane < runs.count ? runs.keys[first + lane] : -1;
    const bool there = first + lane < runs.count && (key >= 0 || Source::kEachCounts);
    DEVICE_CHECK(!there || (key >= 0 && key < runs.key_count), "an index is out of range");
    double values[kColumns] = {};
    if (key >= 0) source.load(runs.order[first + lane], values);
    if (lane == 0 && open_key >= 0) {
      if (key == open_key)
        for (int c = 0; c < kColumns; ++c) values[c] += open[c];
      else
        finish_run(runs, source, chunk, open_key, open);
    }
    for (int delta = 1; delta < 32; delta *= 2) {
      const bool same = __shfl_up_sync(kAll, key, delta) == key && lane >= delta;
      for (int c = 0; c < kColumns; ++c) {
        const double before = __shfl_up_sync(kAll, values[c], delta);
        if (same) values[c] += before;
      }
    }
    const int next = __shfl_down_sync(kAll, key, 1);
    if (lane < 31 && key >= 0 && next != key) finish_run(runs, source, chunk, key, values);
    open_key = __shfl_sync(kAll, key, 31);
    for (int c = 0; c < kColumns; ++c) open[c] = __shfl_sync(kAll, values[c], 31);
  }
  if (lane == 0 && open_key >= 0) finish_run(runs, source, chunk, open_key, open);
}

// At most one run begins in a chunk and goes on behind it.
template <class Source>
__device__ void combine_chunk(const Runs& runs, const Source& source, int64_t chunk, int lane) {
  constexpr int kColumns = Source::kColumns;
  const int64_t begin = chunk * kSumChunk, end = begin + kSumChunk;
  if (end >= runs.count) return;
  const int key = runs.keys[end - 1];
  if (key < 0 || runs.starts[key] < begin || runs.starts[key + 1] <= end) return;
  const int64_t last = (runs.starts[key + 1] - 1) / kSumChunk;
  double sums[kColumns] = {};
  for (int64_t i = chunk + lane; i <= last; i += 32)
    for (int c = 0; c < kColumns; ++c) sums[c] += runs.partials[(2 * i + (i == chunk)) * kColumns + c];
  for (int bits = 16; bits > 0; bits /= 2)
    for (int c = 0; c < kColumns; ++c) sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], bits);
  if (lane == 0) source.store(key, sums);
}

// grid.y: a source for each, with its own partials.
template <class SourceOf>
__global__ void __launch_bounds__(kSumThreads) sum_chunks(Runs runs, const SourceOf source_of) {
  const int64_t chunk = (int64_t{blockIdx.x} * kSumThreads + threadIdx.x) / 32;
  if (chunk * kSumChunk >= runs.count) return;
  runs.partials += int64_t{blockIdx.y} * gridDim.x * (kSumThreads / 32) * 2 * SourceOf::kColumns;
  sum_chunk(runs, source_of.at(blockIdx.y), chunk, static_cast<int>(threadIdx.x) % 32);
}
template <class SourceOf>
__global__ void __launch_bounds__(kSumThreads) combine_chunks(Runs runs, const SourceOf source_of) {
  const int64_t chunk = (int64_t{blockIdx.x} * kSumThreads + threadIdx.x) / 32;
  if (chunk * kSumChunk >= runs.count) return;
  runs.partials += int64_t{blockIdx.y} * gridDim.x * (kSumThreads / 32) * 2 * SourceOf::kColumns;
  combine_chunk(runs, source_of.at(blockIdx.y), chunk, static_cast<int>(threadIdx.x) % 32);
}

}  // namespace trellis::cuda
