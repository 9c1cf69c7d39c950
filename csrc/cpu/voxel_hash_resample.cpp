// Voxels of a coarser and of a finer grid.
#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <vector>

#include "radix_sort.h"
#include "voxel_hash.h"

namespace trellis::cpu {
namespace {

constexpr uint32_t kLimit = 65535;

// (batch, x, y, z) of a coarse voxel in as few bits as this set of voxels needs, in lexicographic order.
class CoarseKey {
 public:
  CoarseKey(const ColumnBits& bits, int64_t factor) : inverse_factor_(((uint64_t{1} << 32) + factor - 1) / factor) {
    for (int column = 3; column >= 0; --column) {
      shift_[column] = width_;
      mask_[column] = (1u << std::bit_width(column ? divided(bits[column]) : bits[column])) - 1;
      width_ += std::bit_width(mask_[column]);
    }
  }
  int width() const { return width_; }
  uint64_t of(const int32_t* voxel) const {
    return shifted(static_cast<uint32_t>(voxel[0]), 0) | shifted(divided(voxel[1]), 1) | shifted(divided(voxel[2]), 2) |
           shifted(divided(voxel[3]), 3);
  }
  void unpack(uint64_t key, int32_t* voxel) const {
    for (int column = 0; column < 4; ++column)
      voxel[column] = mask_[column] ? static_cast<int32_t>(key >> shift_[column] & mask_[column]) : 0;
  }

 private:
  // Exact: the reciprocal is too large by less than factor / 2^32, which 16 bits do not notice.
  uint32_t divided(uint32_t value) const { return static_cast<uint32_t>(value * inverse_factor_ >> 32); }
  uint64_t shifted(uint32_t value, int column) const { return mask_[column] ? uint64_t{value} << shift_[column] : 0; }

  uint64_t inverse_factor_;
  int width_ = 0;
  int shift_[4];
  uint32_t mask_[4];
};

struct Runs {  // of rows with equal keys
  std::vector<uint64_t> keys;
  std::vector<int32_t> first;  // row; one more entry than runs
  bool sorted = true;          // strictly increasing keys
};

Runs find_runs(Coords coords, const CoarseKey& key, int threads) {
  const int64_t count = coords.size(0), chunks = (count + kVoxelChunk - 1) / kVoxelChunk;
  std::vector<int64_t> begin(chunks + 1, 0);
  const auto for_runs = [&](int64_t chunk, const auto& body) {  // a run ends with its chunk, whatever follows
    const int64_t first = chunk * kVoxelChunk, last = std::min(count, first + kVoxelChunk);
    uint64_t previous = 0;
    for (int64_t row = first; row < last; ++row) {
      const uint64_t current = key.of(coords.row(row));
      if (row == first || current != previous) body(current, static_cast<int32_t>(row));
      previous = current;
    }
  };
  parallel_chunks(chunks, threads, [&](int64_t chunk) {
    int64_t runs = 0;
    for_runs(chunk, [&](uint64_t, int32_t) { ++runs; });
    begin[chunk + 1] = runs;
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) begin[chunk + 1] += begin[chunk];
  Runs runs{std::vector<uint64_t>(begin[chunks]), std::vector<int32_t>(begin[chunks] + 1)};
  parallel_chunks(chunks, threads, [&](int64_t chunk) {
    int64_t at = begin[chunk];
    for_runs(chunk, [&](uint64_t current, int32_t row) {
      runs.keys[at] = current;
      runs.first[at++] = row;
    });
  });
  runs.first.back() = static_cast<int32_t>(count);
  for (size_t run = 1; run < runs.keys.size() && runs.sorted; ++run) runs.sorted = runs.keys[run - 1] < runs.keys[run];
  return runs;
}

// Neighbors of the 8 children of one voxel: coarse [3, 3, 3] -> fine [8, 27].
void write_children(const int32_t* coarse, int32_t* fine) {
  using Run = int32_t __attribute__((vector_size(16)));
  int32_t parents[27 + 1];  // one more, so that a run of 4 can be read at each (x, y)
  std::memcpy(parents, coarse, 27 * sizeof(int32_t));
  parents[27] = -1;
  // The 4^3 fine voxels from one before the first child to one after the last. Along an axis they lie in the coarse
  // voxels -1, 0, 0, 1 as children 1, 0, 1, 0.
  int32_t halo[4 * 4 * 4 + 1];
  for (int x = 0; x < 4; ++x)
    for (int y = 0; y < 4; ++y) {
      Run run;
      std::memcpy(&run, parents + ((x + 1) / 2 * 3 + (y + 1) / 2) * 3, sizeof run);
      run = __builtin_shuffle(run, Run{0, 1, 1, 2});
      const int child = (~x & 1) << 2 | (~y & 1) << 1;
      const Run row = (run * 8 + (Run{1, 0, 1, 0} + child)) | run >> 31;  // -1 stays -1
      std::memcpy(halo + (x * 4 + y) * 4, &row, sizeof row);
    }
  for (int child = 0; child < 8; ++child) {
    const int32_t* const corner = halo + ((child >> 2) * 4 + (child >> 1 & 1)) * 4 + (child & 1);
    for (int tap = 0; tap < 9; ++tap, fine += 3) {
      const int32_t* const from = corner + (tap / 3 * 4 + tap % 3) * 4;
      // Runs of three; a fourth, which the next run overwrites, makes it one instruction.
      std::memcpy(fine, from, (child == 7 && tap == 8 ? 3 : 4) * sizeof(int32_t));
    }
  }
}

}  // namespace

int64_t coarsen(Coords coords, int64_t factor, TensorView<int32_t, 2> coarse, TensorView<int32_t, 1> inverse,
                int threads) {
  const int64_t count = coords.size(0);
  if (count >= int64_t{1} << 31) throw std::invalid_argument("coords must have fewer than 2**31 rows");
  if (factor < 1) throw std::invalid_argument("factor must be positive; got " + std::to_string(factor));
  if (coords.size(1) != 4 || coarse.size(0) != count || coarse.size(1) != 4 || inverse.size(0) != count)
    throw std::invalid_argument("coarse must be [N, 4] and inverse [N] for coords [N, 4]");
  threads = useful_threads(count, threads);
  const ColumnBits bits = column_bits(coords, threads);
  check_range(coords, bits, {kLimit, kLimit, kLimit, kLimit}, "[0, 65535]");
  const CoarseKey key(bits, std::min<int64_t>(factor, kLimit + 1));
  const Runs runs = find_runs(coords, key, threads);
  const int64_t run_count = static_cast<int64_t>(runs.keys.size());

  int64_t distinct = 0;
  std::vector<int32_t> voxel_of_run(runs.sorted ? 0 : run_count);
  const auto number = [&](const auto& row_at, const auto& key_at) {
    for (int64_t i = 0; i < run_count; ++i) {
      if (i == 0 || key_at(i) != key_at(i - 1)) key.unpack(key_at(i), coarse.row(distinct++));
      if (!runs.sorted) voxel_of_run[row_at(i)] = static_cast<int32_t>(distinct - 1);
    }
  };
  if (runs.sorted)
    number([](int64_t i) { return i; }, [&](int64_t i) { return runs.keys[i]; });
  else
    sorted_rows(run_count, key.width(), threads, [&](int64_t run) { return runs.keys[run]; }, number);

  parallel_for(run_count, kVoxelChunk, threads, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run)
      std::fill(inverse.data + runs.first[run], inverse.data + runs.first[run + 1],
                runs.sorted ? static_cast<int32_t>(run) : voxel_of_run[run]);
  });
  return distinct;
}

void subdivide_coords(Coords coords, TensorView<int32_t, 2> children, int threads) {
  const int64_t count = coords.size(0);
  if (coords.size(1) != 4 || children.size(0) != 8 * count || children.size(1) != 4)
    throw std::invalid_argument("children must be [8 N, 4] for coords [N, 4]");
  threads = useful_threads(8 * count, threads);
  check_range(coords, column_bits(coords, threads), {kLimit, kLimit / 2, kLimit / 2, kLimit / 2}, "[0, 32767]");
  prefer_large_pages(children.data, children.numel() * static_cast<int64_t>(sizeof(int32_t)));
  parallel_for(count, kVoxelChunk, threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int32_t* const voxel = coords.row(n);
      for (int child = 0; child < 8; ++child) {
        const int32_t row[4] = {voxel[0], 2 * voxel[1] + (child >> 2), 2 * voxel[2] + (child >> 1 & 1),
                                2 * voxel[3] + (child & 1)};
        std::memcpy(children.row(8 * n + child), row, sizeof row);
      }
    }
  });
}

void subdivided_neighbor_map(TensorView<const int32_t, 2> neighbors, TensorView<int32_t, 2> children, int threads) {
  const int64_t count = neighbors.size(0);
  if (neighbors.size(1) != 27 || children.size(0) != 8 * count || children.size(1) != 27)
    throw std::invalid_argument("children must be [8 N, 27] for neighbors [N, 27]");
  if (8 * count >= int64_t{1} << 31)
    throw std::invalid_argument("neighbors must have fewer than 2**28 rows; got " + std::to_string(count));
  threads = useful_threads(8 * count, threads);
  std::vector<uint8_t> bad((count + kVoxelChunk - 1) / kVoxelChunk);
  parallel_chunks(static_cast<int64_t>(bad.size()), threads, [&](int64_t chunk) {
    bool found = false;
    const int64_t end = std::min(count, (chunk + 1) * kVoxelChunk) * 27;
    for (int64_t i = chunk * kVoxelChunk * 27; i < end; ++i)
      found |= neighbors.data[i] < -1 || neighbors.data[i] >= count;
    bad[chunk] = found;
  });
  if (std::find(bad.begin(), bad.end(), 1) != bad.end()) {
    const int32_t* row = neighbors.data;
    while (*row >= -1 && *row < count) ++row;
    throw std::invalid_argument("neighbors must be in [-1, " + std::to_string(count) + "); got " +
                                std::to_string(*row));
  }
  prefer_large_pages(children.data, children.numel() * static_cast<int64_t>(sizeof(int32_t)));
  parallel_for(count, 1024, threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) write_children(neighbors.row(n), children.row(8 * n));
  });
}

}  // namespace trellis::cpu
