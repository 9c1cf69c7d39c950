// What both voxel_hash and serialization do with a coordinate list [N, 4] (batch, x, y, z).
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "tensor_view.h"

namespace trellis::cpu {

using Coords = TensorView<const int32_t, 2>;

inline constexpr int64_t kVoxelChunk = 16384;  // voxels handed to a thread at a time

// How many threads are worth waking for this many voxels (a parallel loop costs some microseconds, and far more where
// other processes compete for the cores).
inline int useful_threads(int64_t voxels, int threads) {
  return static_cast<int>(std::clamp<int64_t>(voxels / 32768, 1, std::max(threads, 1)));
}

// Columns joined by OR. As all limits are 2^k - 1, a column stays within its limit if and only if its OR does; and the
// OR has as many bits as the maximum.
using ColumnBits = std::array<uint32_t, 4>;

inline ColumnBits column_bits(const int32_t* coords, int64_t begin, int64_t end) {
  ColumnBits bits{};
  for (int64_t n = begin; n < end; ++n)
    for (int column = 0; column < 4; ++column) bits[column] |= static_cast<uint32_t>(coords[4 * n + column]);
  return bits;
}

ColumnBits column_bits(Coords coords, int threads);

// Throws, naming the first row of which a coordinate is not in [0, its limit]; `range` is the text of what is allowed.
void check_range(Coords coords, const ColumnBits& bits, const ColumnBits& limits, const std::string& range);

std::string row_text(Coords coords, int64_t row);  // "[0, 1, 2, 3]"

// Asks for large pages, where the system has them on request: filling a fresh 100 MB output is otherwise mostly page
// faults. Only a hint, and only for whole large pages.
void prefer_large_pages(void* data, int64_t bytes);

}  // namespace trellis::cpu
