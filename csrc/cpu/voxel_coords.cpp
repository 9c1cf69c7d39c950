#include "voxel_coords.h"

#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trellis::cpu {

ColumnBits column_bits(Coords coords, int threads) {
  const int64_t count = coords.size(0), chunks = (count + kVoxelChunk - 1) / kVoxelChunk;
  std::vector<ColumnBits> partial(chunks);
  parallel_chunks(chunks, threads, [&](int64_t chunk) {
    partial[chunk] = column_bits(coords.data, chunk * kVoxelChunk, std::min(count, (chunk + 1) * kVoxelChunk));
  });
  ColumnBits bits{};
  for (const ColumnBits& part : partial)
    for (int column = 0; column < 4; ++column) bits[column] |= part[column];
  return bits;
}

void check_range(Coords coords, const ColumnBits& bits, const ColumnBits& limits, const std::string& range) {
  const auto beyond = [&](const auto& values) {
    for (int column = 0; column < 4; ++column)
      if (static_cast<uint32_t>(values[column]) > limits[column]) return true;
    return false;
  };
  if (!beyond(bits)) return;
  int64_t row = 0;
  while (!beyond(coords.row(row))) ++row;
  throw std::invalid_argument("coords must be in " + range + "; got " + row_text(coords, row) + " in row " +
                              std::to_string(row));
}

std::string row_text(Coords coords, int64_t row) {
  std::string text = "[";
  for (int column = 0; column < 4; ++column) text += (column ? ", " : "") + std::to_string(coords.row(row)[column]);
  return text + "]";
}

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace trellis::cpu
