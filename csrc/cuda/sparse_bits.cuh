// SparseBits on the device: a set of grid coordinates, one bit each in words of 64 along z, kept only where a word may
// not be empty. Columns and words say by an inclusive sum where they end, so every coordinate of the set has a rank, in
// the order of x, y, z, without anything being sorted. Sides up to 4096. The same structure as csrc/cpu/sparse_bits.h.
#pragma once
#include "launch.h"

namespace trellis::cuda {

using Word = unsigned long long;  // what atomicOr takes

struct SparseBits {
  int side;
  Word* segments;  // by column x * side + y: bit s, there is a word for z in [64 s, 64 s + 64)
  int32_t* ends;   // by column: how many words there are up to its end
  Word* words;
  int32_t* ranks;    // by word: how many bits are set up to its end
  int32_t* places;   // by word: column * 64 + segment
  int64_t capacity;  // words there is room for; those in use come first

  __host__ __device__ int64_t columns() const { return int64_t{side} * side; }
  __device__ int word_count() const { return ends[columns() - 1]; }
  __device__ int64_t column(int x, int y) const { return int64_t{x} * side + y; }
  __device__ bool holds(int x, int y, int z) const {
    return static_cast<unsigned>(x) < static_cast<unsigned>(side) &&
           static_cast<unsigned>(y) < static_cast<unsigned>(side) &&
           static_cast<unsigned>(z) < static_cast<unsigned>(side);
  }
  // Index of the word of a segment, -1 where there is none.
  __device__ int word_index(int64_t column, int segment) const {
    const Word from_here = segments[column] >> segment;
    return from_here & 1 ? ends[column] - __popcll(from_here) : -1;
  }
  __device__ Word word_of(const Word* of, int64_t column, int segment) const {
    const int index = word_index(column, segment);
    return index < 0 ? 0 : of[index];
  }
  // Rank of a coordinate, -1 where it is not in the set.
  __device__ int find(int x, int y, int z) const {
    if (!holds(x, y, z)) return -1;
    const int index = word_index(column(x, y), z >> 6);
    if (index < 0) return -1;
    const Word from_here = words[index] >> (z & 63);
    return from_here & 1 ? ranks[index] - __popcll(from_here) : -1;
  }
};

__device__ inline Word lowest_bit(Word word) { return word & (~word + 1); }

}  // namespace trellis::cuda
