// Neighbor maps. Voxels are gathered into blocks of 4^3, found through a hash table. A block and the border around it
// are then laid out as a small dense grid, the halo, from which the neighbors of all its voxels are read as short runs:
// one table look-up per block and neighboring block instead of K per voxel.
#include "voxel_hash.h"

#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <vector>

namespace trellis::cpu {
namespace {

constexpr int kEdge = 4, kLeaf = kEdge * kEdge * kEdge;

// Key of a block: batch and x, y, z of the block, 16 bits each (14 used of the last three).
uint64_t block_key(const int32_t* voxel) {
  const auto field = [&](int column, int shift) { return uint64_t{static_cast<uint32_t>(voxel[column])} << shift; };
  const uint64_t space = (field(1, 32) | field(2, 16) | field(3, 0)) >> 2;
  return field(0, 48) | (space & 0x00003fff3fff3fffu);
}
int place_in_block(const int32_t* voxel) {
  return (voxel[1] & 3) * (kEdge * kEdge) + (voxel[2] & 3) * kEdge + (voxel[3] & 3);
}

// Open addressing, linear probing, a power of two slots of which at most half are taken.
class BlockTable {
 public:
  BlockTable() { rebuild(1024); }

  static uint64_t mixed(uint64_t key) {  // every bit of the key reaches every bit of the slot (murmur3's finalizer)
    key = (key ^ key >> 33) * 0xff51afd7ed558ccdu;
    key = (key ^ key >> 33) * 0xc4ceb9fe1a85ec53u;
    return key ^ key >> 33;
  }
  void prefetch(uint64_t hash) const { __builtin_prefetch(&slots_[hash & mask_]); }

  int32_t find(uint64_t key, uint64_t hash) const {
    for (uint64_t at = hash & mask_;; at = (at + 1) & mask_)
      if (slots_[at].block < 0 || slots_[at].key == key) return slots_[at].block;
  }
  int32_t find_or_insert(uint64_t key, uint64_t hash) {  // blocks are numbered in the order of their insertion
    uint64_t at = hash & mask_;
    for (; slots_[at].block >= 0; at = (at + 1) & mask_)
      if (slots_[at].key == key) return slots_[at].block;
    const int32_t block = static_cast<int32_t>(keys_.size());
    slots_[at] = {key, block};
    keys_.push_back(key);
    if (2 * keys_.size() > slots_.size()) rebuild(2 * slots_.size());
    return block;
  }
  const std::vector<uint64_t>& keys() const { return keys_; }

 private:
  struct Slot {
    uint64_t key;
    int32_t block;
  };
  void rebuild(size_t size) {
    slots_.assign(size, Slot{0, -1});
    mask_ = size - 1;
    for (size_t block = 0; block < keys_.size(); ++block) {
      uint64_t at = mixed(keys_[block]) & mask_;
      while (slots_[at].block >= 0) at = (at + 1) & mask_;
      slots_[at] = {keys_[block], static_cast<int32_t>(block)};
    }
  }
  std::vector<Slot> slots_;
  std::vector<uint64_t> keys_;
  uint64_t mask_ = 0;
};

// Voxels of consecutive rows in one block: a single table access serves them all.
struct Run {
  uint64_t key;
  int32_t first;  // row; the run ends where the next of its chunk begins
  int32_t block;
};

struct Blocks {
  BlockTable table;
  std::unique_ptr<Run[]> runs;        // those of chunk c begin at c * kVoxelChunk
  std::vector<int64_t> run_counts;    // per chunk
  std::unique_ptr<int32_t[]> leaves;  // [blocks, 4, 4, 4] rows, -1 where empty

  template <class Body>  // body(row, &leaf[place]) for the voxels of a chunk
  void for_voxels(Coords coords, int64_t chunk, const Body& body) const {
    const Run* const run = runs.get() + chunk * kVoxelChunk;
    const int64_t count = run_counts[chunk], end = std::min(coords.size(0), (chunk + 1) * kVoxelChunk);
    for (int64_t r = 0; r < count; ++r) {
      int32_t* const leaf = leaves.get() + int64_t{run[r].block} * kLeaf;
      const int64_t last = r + 1 < count ? run[r + 1].first : end;
      for (int64_t row = run[r].first; row < last; ++row)
        body(static_cast<int32_t>(row), leaf + place_in_block(coords.row(row)));
    }
  }
};

Blocks gather_blocks(Coords coords, int threads) {
  const int64_t count = coords.size(0), chunks = (count + kVoxelChunk - 1) / kVoxelChunk;
  Blocks blocks{{}, std::make_unique_for_overwrite<Run[]>(count), std::vector<int64_t>(chunks), nullptr};

  std::vector<ColumnBits> partial(chunks);
  parallel_chunks(chunks, threads, [&](int64_t chunk) {
    const int64_t begin = chunk * kVoxelChunk, end = std::min(count, begin + kVoxelChunk);
    partial[chunk] = column_bits(coords.data, begin, end);
    Run* run = blocks.runs.get() + begin;
    for (int64_t row = begin; row < end; ++row) {
      const uint64_t key = block_key(coords.row(row));
      if (row == begin || key != run[-1].key) *run++ = {key, static_cast<int32_t>(row), -1};
    }
    blocks.run_counts[chunk] = run - (blocks.runs.get() + begin);
  });
  ColumnBits bits{};
  for (const ColumnBits& part : partial)
    for (int column = 0; column < 4; ++column) bits[column] |= part[column];
  check_range(coords, bits, {65535, 65535, 65535, 65535}, "[0, 65535]");

  // In order, by one thread: blocks that are close in memory get close numbers, the same ones at every thread count.
  constexpr int64_t kAhead = 8;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Run* const run = blocks.runs.get() + chunk * kVoxelChunk;
    for (int64_t r = 0; r < blocks.run_counts[chunk]; ++r) {
      if (r + kAhead < blocks.run_counts[chunk]) blocks.table.prefetch(BlockTable::mixed(run[r + kAhead].key));
      run[r].block = blocks.table.find_or_insert(run[r].key, BlockTable::mixed(run[r].key));
    }
  }

  const int64_t places = static_cast<int64_t>(blocks.table.keys().size()) * kLeaf;
  blocks.leaves = std::make_unique_for_overwrite<int32_t[]>(places);
  prefer_large_pages(blocks.leaves.get(), places * sizeof(int32_t));
  parallel_for(places, int64_t{1} << 18, threads, [&](int64_t begin, int64_t end) {
    std::fill(blocks.leaves.get() + begin, blocks.leaves.get() + end, -1);
  });
  parallel_chunks(chunks, threads, [&](int64_t chunk) {
    // Rows of a repeated voxel race for its place (atomically: that is no error yet); the missing one is noticed later.
    blocks.for_voxels(coords, chunk, [](int32_t row, int32_t* place) {
      std::atomic_ref<int32_t>(*place).store(row, std::memory_order_relaxed);
    });
  });
  return blocks;
}

[[noreturn]] void throw_repeated(Coords coords, Blocks& blocks) {
  std::fill_n(blocks.leaves.get(), blocks.table.keys().size() * kLeaf, -1);
  for (int64_t chunk = 0; chunk < static_cast<int64_t>(blocks.run_counts.size()); ++chunk)
    blocks.for_voxels(coords, chunk, [&](int32_t row, int32_t* place) {
      if (*place >= 0)
        throw std::invalid_argument("coords must hold each voxel once; got " + row_text(coords, row) + " in rows " +
                                    std::to_string(*place) + " and " + std::to_string(row));
      *place = row;
    });
  throw std::logic_error("no voxel is repeated");
}

// The neighbors of one block's voxels. Fixed is the radius if it is known to the compiler, else 0.
template <int Fixed>
class Halo {
 public:
  explicit Halo(int radius)
      : radius_(radius),
        margin_((radius + kEdge - 1) / kEdge),
        edge_(kEdge + 2 * r()),
        depth_(kEdge * (2 * m() + 1)),
        grid_(static_cast<size_t>(edge_) * edge_ * depth_ + kEdge),
        around_(static_cast<size_t>(2 * m() + 1) * (2 * m() + 1) * (2 * m() + 1)) {}

  // Writes the rows of the block's voxels; returns how many there are.
  int64_t write(const Blocks& blocks, int64_t block, int32_t* neighbors) {
    const int32_t* const leaf = blocks.leaves.get() + block * kLeaf;
    uint64_t occupied = 0;
    for (int place = 0; place < kLeaf; ++place) occupied |= uint64_t{leaf[place] >= 0} << place;
    load(blocks, blocks.table.keys()[block], occupied);
    for (uint64_t rest = occupied; rest; rest &= rest - 1) {
      const int place = std::countr_zero(rest);
      write_row(place >> 4, place >> 2 & 3, place & 3, neighbors + int64_t{leaf[place]} * width() * width() * width());
    }
    return std::popcount(occupied);
  }

 private:
  int r() const { return Fixed ? Fixed : radius_; }
  int m() const { return Fixed ? (Fixed + kEdge - 1) / kEdge : margin_; }  // r in blocks
  int width() const { return 2 * r() + 1; }
  int edge() const { return Fixed ? kEdge + 2 * Fixed : edge_; }        // of x and y
  int depth() const { return Fixed ? kEdge * (2 * m() + 1) : depth_; }  // of z, whole blocks: runs of 4 are copied

  struct Around {
    int x, y, z;  // in blocks from the one in the middle
    uint64_t key, hash;
    bool inside;  // the range of coordinates
    const int32_t* leaf;
  };

  // Fills the part of the grid that the occupied places look at.
  void load(const Blocks& blocks, uint64_t key, uint64_t occupied) {
    int low[3], high[3];  // range of the neighbors of the occupied places, in voxels from the corner of the block
    const uint64_t planes[3] = {0xffff, 0x000f000f000f000f, 0x1111111111111111};
    for (int axis = 0; axis < 3; ++axis) {
      const int step = kLeaf >> (2 * axis + 2);
      int first = 0, last = kEdge - 1;
      while (!(occupied & planes[axis] << step * first)) ++first;
      while (!(occupied & planes[axis] << step * last)) --last;
      low[axis] = first - r(), high[axis] = last + r();
    }
    Around* around = around_.data();
    for (int x = low[0] >> 2; x <= high[0] >> 2; ++x)
      for (int y = low[1] >> 2; y <= high[1] >> 2; ++y)
        for (int z = low[2] >> 2; z <= high[2] >> 2; ++z, ++around) {
          const int64_t bx = int64_t(key >> 32 & 0xffff) + x, by = int64_t(key >> 16 & 0xffff) + y,
                        bz = int64_t(key & 0xffff) + z;
          const uint64_t wanted = (key & 0xffffull << 48) | uint64_t(bx) << 32 | uint64_t(by) << 16 | uint64_t(bz);
          *around = {x, y, z, wanted, BlockTable::mixed(wanted), ((bx | by | bz) & ~int64_t{0x3fff}) == 0, nullptr};
          if (around->inside) blocks.table.prefetch(around->hash);
        }
    for (Around* each = around_.data(); each != around; ++each) {
      const int32_t found = each->inside ? blocks.table.find(each->key, each->hash) : -1;
      each->leaf = found < 0 ? kNone.data() : blocks.leaves.get() + int64_t{found} * kLeaf;
      for (int line = 0; line < kLeaf; line += 16) __builtin_prefetch(each->leaf + line);
    }
    for (const Around* each = around_.data(); each != around; ++each) {
      const int x0 = std::max(low[0], each->x * kEdge), x1 = std::min(high[0], each->x * kEdge + kEdge - 1);
      const int y0 = std::max(low[1], each->y * kEdge), y1 = std::min(high[1], each->y * kEdge + kEdge - 1);
      for (int x = x0; x <= x1; ++x)
        for (int y = y0; y <= y1; ++y)
          std::memcpy(at(x, y, each->z * kEdge), each->leaf + ((x & 3) * kEdge + (y & 3)) * kEdge,
                      kEdge * sizeof(int32_t));
    }
  }

  int32_t* at(int x, int y, int z) {
    return grid_.data() + ((x + r()) * edge() + y + r()) * static_cast<int64_t>(depth()) + z + m() * kEdge;
  }

  void write_row(int x, int y, int z, int32_t* out) {
    const int32_t* from = at(x - r(), y - r(), z - r());
    const int row = depth(), plane = edge() * row;
    for (int kx = 0; kx < width(); ++kx, from += plane)
      for (int ky = 0; ky < width(); ++ky, out += width()) {
        if (Fixed == 1 && !(kx == 2 && ky == 2))
          std::memcpy(out, from + ky * row, 4 * sizeof(int32_t));  // three, and one that the next run overwrites
        else
          std::memcpy(out, from + ky * row, width() * sizeof(int32_t));
      }
  }

  static constexpr auto kNone = [] {
    std::array<int32_t, kLeaf> none{};
    none.fill(-1);
    return none;
  }();

  int radius_, margin_, edge_, depth_;
  std::vector<int32_t> grid_;
  std::vector<Around> around_;
};

template <int Fixed>
int64_t write_neighbors(const Blocks& blocks, int radius, int32_t* neighbors, int threads) {
  std::vector<Halo<Fixed>> halos(std::max(threads, 1), Halo<Fixed>(radius));
  std::atomic<int64_t> written = 0;
  parallel_for(static_cast<int64_t>(blocks.table.keys().size()), 64, threads, [&](int64_t begin, int64_t end) {
    Halo<Fixed>& halo = halos[omp_get_thread_num()];
    int64_t count = 0;
    for (int64_t block = begin; block < end; ++block) count += halo.write(blocks, block, neighbors);
    written.fetch_add(count, std::memory_order_relaxed);
  });
  return written;
}

}  // namespace

void neighbor_map(Coords coords, int64_t kernel_size, TensorView<int32_t, 2> neighbors, int threads) {
  const int64_t count = coords.size(0);
  if (count >= int64_t{1} << 31) throw std::invalid_argument("coords must have fewer than 2**31 rows");
  if (kernel_size < 1 || kernel_size % 2 == 0 || kernel_size > 255)
    throw std::invalid_argument("kernel_size must be odd and in [1, 255]; got " + std::to_string(kernel_size));
  if (coords.size(1) != 4 || neighbors.size(0) != count || neighbors.size(1) != kernel_size * kernel_size * kernel_size)
    throw std::invalid_argument("neighbors must be [N, kernel_size**3] for coords [N, 4]");
  threads = useful_threads(count, threads);
  Blocks blocks = gather_blocks(coords, threads);
  prefer_large_pages(neighbors.data, neighbors.numel() * static_cast<int64_t>(sizeof(int32_t)));
  const int radius = static_cast<int>(kernel_size / 2);
  const int64_t written = radius == 1 ? write_neighbors<1>(blocks, radius, neighbors.data, threads)
                                      : write_neighbors<0>(blocks, radius, neighbors.data, threads);
  if (written != count) throw_repeated(coords, blocks);
}

}  // namespace trellis::cpu
