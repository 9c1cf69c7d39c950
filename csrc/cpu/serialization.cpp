// Space-filling curves: codes by bit tricks on many voxels at once, orders by a radix sort of as many bits as are used.
#include "serialization.h"

#include <bit>
#include <memory>

#include "cpu_features.h"
#include "radix_sort.h"

#define TRELLIS_ISA baseline
#include "serialization_kernel.inl.h"

namespace trellis::cpu {
namespace avx2 {
void encode_voxels(const int32_t*, int64_t, bool, bool, int, int, uint64_t*);
}
namespace avx512 {
void encode_voxels(const int32_t*, int64_t, bool, bool, int, int, uint64_t*);
}
namespace {

constexpr uint32_t kMaxBatch = (1u << 15) - 1;

auto encoder() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512) return avx512::encode_voxels;
  if (instruction_set() == InstructionSet::avx2) return avx2::encode_voxels;
#endif
  return baseline::encode_voxels;
}

struct Extent {
  int used;        // bits of the largest coordinate: the codes of a sample have at most 3 * used
  int levels;      // of the curve that are walked
  int batch_bits;  // of the largest batch index
};

// Checks the arguments, too.
Extent measure(Coords coords, bool hilbert, int64_t bits, int64_t outputs, int threads) {
  if (bits < 1 || bits > 16) throw std::invalid_argument("bits must be in [1, 16]; got " + std::to_string(bits));
  if (coords.size(1) != 4 || outputs != coords.size(0))
    throw std::invalid_argument("codes must be [N] for coords [N, 4]");
  const ColumnBits used = column_bits(coords, threads);
  const uint32_t limit = (1u << bits) - 1;
  check_range(coords, used, {kMaxBatch, limit, limit, limit},
              "[0, " + std::to_string(limit) + "] (batch: [0, " + std::to_string(kMaxBatch) + "])");
  const int coordinate_bits = std::max(1, static_cast<int>(std::bit_width(used[1] | used[2] | used[3])));
  // A Hilbert curve starts with a small copy of itself, axes rotated by one per level: three levels may be left out.
  const int extra = hilbert ? static_cast<int>((bits - coordinate_bits) % 3) : 0;
  return {coordinate_bits, coordinate_bits + extra, static_cast<int>(std::bit_width(used[0]))};
}

}  // namespace

void curve_codes(Coords coords, bool hilbert, bool transposed, int64_t bits, TensorView<int64_t, 1> codes,
                 int threads) {
  threads = useful_threads(coords.size(0), threads);
  const Extent extent = measure(coords, hilbert, bits, codes.size(0), threads);
  const auto encode = encoder();
  prefer_large_pages(codes.data, codes.numel() * static_cast<int64_t>(sizeof(int64_t)));
  parallel_for(coords.size(0), kVoxelChunk, threads, [&](int64_t begin, int64_t end) {
    encode(coords.row(begin), end - begin, hilbert, transposed, extent.levels, static_cast<int>(3 * bits),
           reinterpret_cast<uint64_t*>(codes.data + begin));
  });
}

void curve_order(Coords coords, bool hilbert, bool transposed, int64_t bits, TensorView<int64_t, 1> order,
                 int threads) {
  const int64_t count = coords.size(0);
  threads = useful_threads(coords.size(0), threads);
  const Extent extent = measure(coords, hilbert, bits, order.size(0), threads);
  const auto encode = encoder();
  const auto codes = std::make_unique_for_overwrite<uint64_t[]>(count);
  prefer_large_pages(codes.get(), count * static_cast<int64_t>(sizeof(uint64_t)));
  prefer_large_pages(order.data, count * static_cast<int64_t>(sizeof(int64_t)));
  parallel_for(count, kVoxelChunk, threads, [&](int64_t begin, int64_t end) {  // the batch right above the used bits
    encode(coords.row(begin), end - begin, hilbert, transposed, extent.levels, 3 * extent.used, codes.get() + begin);
  });
  sorted_rows(
      count, 3 * extent.used + extent.batch_bits, threads, [&](int64_t row) { return codes[row]; },
      [&](const auto& row_at, const auto&) {
        parallel_for(count, kVoxelChunk, threads, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) order.data[i] = row_at(i);
        });
      });
}

}  // namespace trellis::cpu
