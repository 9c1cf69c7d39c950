// Of one camera: the projected Gaussians, their order by depth (sorted once), and lists of them per tile of 16 x 16
// pixels, made by counting (the lists inherit the order). Memory for the lists is bounded: the sorted Gaussians are
// taken in batches that fill a fixed number of entries, and finished tiles take no more.
#pragma once
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "cpu_features.h"
#include "gaussians_simd.h"
#include "gaussians_sort.h"
#include "tensor_view.h"

namespace trellis {

constexpr int64_t kChunk = 4096;        // Gaussians projected at once
constexpr int64_t kCounters = 4 << 20;  // of all threads

template <class T>
int64_t (*projection())(const ProjectJob<T>&) {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::avx512:
      return gaussians_avx512::project;
    case InstructionSet::avx2:
      return gaussians_avx2::project;
#endif
    default:
      return gaussians_baseline::project;
  }
}

// Memory that is not cleared: every element is written before it is read.
template <class T>
std::unique_ptr<T[]> uncleared(int64_t count) {
  return std::unique_ptr<T[]>(new T[std::max<int64_t>(count, 1)]);
}

// Of a Gaussian in depth order: its place in the projected ones, and the tiles it reaches, the last ones excluded.
struct Placed {
  int32_t source;
  uint16_t x0, y0, x1, y1;
};

template <class T>
class GaussianLists {
 public:
  using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

  GaussianLists(const T* means, const T* quats, const T* scales, const T* opacities, int64_t count, int width,
                int height, int64_t list_entries, int threads)
      : finished((width + kTile - 1) / kTile * int64_t{(height + kTile - 1) / kTile}),
        job_{means, quats, scales, opacities, 0, count, nullptr, nullptr},
        list_entries_(list_entries),
        threads_(std::max(threads, 1)),
        across_((width + kTile - 1) / kTile),
        tiles_(static_cast<int64_t>(finished.size())),
        project_(projection<T>()),
        projected_(uncleared<Splat<T>>(count)),
        sorted_(uncleared<Placed>(count)),
        pairs_(uncleared<Keyed<Key>>(2 * count)),
        starts_(tiles_ + 1) {}

  // Fills sorted_; returns how many Gaussians are drawn.
  int64_t project_and_sort(const Camera<T>& camera) {
    const int64_t chunks = (job_.end + kChunk - 1) / kChunk;
    std::vector<int64_t> offsets(chunks + 1);
    parallel_chunks(chunks, threads_, [&](int64_t chunk) {
      ProjectJob<T> job = job_;
      job.begin = chunk * kChunk;
      job.end = std::min(job_.end, job.begin + kChunk);
      job.camera = &camera;
      job.splats = projected_.get() + job.begin;
      offsets[chunk + 1] = project_(job);
    });
    for (int64_t chunk = 0; chunk < chunks; ++chunk) offsets[chunk + 1] += offsets[chunk];
    const int64_t count = offsets[chunks];
    Keyed<Key>* pairs = pairs_.get();
    parallel_chunks(chunks, threads_, [&](int64_t chunk) {
      for (int64_t i = 0; i < offsets[chunk + 1] - offsets[chunk]; ++i) {
        const int64_t source = chunk * kChunk + i;
        // Depths are positive, so their bits order as they do.
        pairs[offsets[chunk] + i] = {std::bit_cast<Key>(projected_[source].depth), static_cast<uint32_t>(source)};
      }
    });
    pairs = radix_sort(pairs, pairs + count, count, threads_);
    parallel_for(count, kChunk, threads_, [&](int64_t first, int64_t past) {
      for (int64_t i = first; i < past; ++i) {
        if (i + 16 < past) __builtin_prefetch(&projected_[pairs[i + 16].value].x0);
        const Splat<T>& splat = projected_[pairs[i].value];
        const auto last_tile = [](int pixel) { return static_cast<uint16_t>((pixel + kTile - 1) / kTile); };
        sorted_[i] = {static_cast<int32_t>(pairs[i].value), static_cast<uint16_t>(splat.x0 / kTile),
                      static_cast<uint16_t>(splat.y0 / kTile), last_tile(splat.x1), last_tile(splat.y1)};
      }
    });
    return count;
  }

  // How many of the sorted Gaussians from `begin` on fit into the lists of one batch.
  int64_t batch_end(int64_t begin, int64_t count) const {
    int64_t entries = 0;
    for (int64_t i = begin; i < count; ++i) {
      const Placed& placed = sorted_[i];
      entries += int64_t{placed.x1 - placed.x0} * (placed.y1 - placed.y0);
      if (entries > list_entries_ && i > begin) return i;
    }
    return count;
  }

  // entries_[starts_[tile], starts_[tile + 1]): the Gaussians of [begin, end) that reach the tile, nearest first.
  void list(int64_t begin, int64_t end) {
    const int64_t chunks = list_chunks();
    const auto bound = [&](int64_t chunk) { return begin + (end - begin) * chunk / chunks; };
    positions_.assign(chunks * tiles_, 0);
    parallel_chunks(chunks, threads_, [&](int64_t chunk) {
      int64_t* counts = positions_.data() + chunk * tiles_;
      for (int64_t i = bound(chunk); i < bound(chunk + 1); ++i) {
        for_tiles_of(sorted_[i], [&](int64_t tile) { ++counts[tile]; });
      }
    });
    int64_t next = 0;
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      starts_[tile] = next;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        int64_t& position = positions_[chunk * tiles_ + tile];
        const int64_t here = finished[tile] ? 0 : position;
        position = next;
        next += here;
      }
    }
    starts_[tiles_] = next;
    if (next > capacity_) {
      entries_ = uncleared<int32_t>(next);
      capacity_ = next;
    }
    parallel_chunks(chunks, threads_, [&](int64_t chunk) {
      int64_t* targets = positions_.data() + chunk * tiles_;
      for (int64_t i = bound(chunk); i < bound(chunk + 1); ++i) {
        for_tiles_of(sorted_[i], [&](int64_t tile) {
          if (!finished[tile]) entries_[targets[tile]++] = sorted_[i].source;
        });
      }
    });
  }

  // body(Gaussian, position in the lists) for each entry of the last lists: a Gaussian is seen by one thread, its tiles
  // in their order.
  template <class Body>
  void for_entries(int64_t begin, int64_t end, const Body& body) const {
    const int64_t chunks = list_chunks();
    const auto bound = [&](int64_t chunk) { return begin + (end - begin) * chunk / chunks; };
    parallel_chunks(chunks, threads_, [&](int64_t chunk) {
      // Where a chunk begins in the list of a tile is where the one before has stopped.
      const int64_t* const first = chunk ? positions_.data() + (chunk - 1) * tiles_ : starts_.data();
      std::vector<int64_t> next(first, first + tiles_);
      for (int64_t i = bound(chunk); i < bound(chunk + 1); ++i) {
        for_tiles_of(sorted_[i], [&](int64_t tile) {
          if (!finished[tile]) body(projected_[sorted_[i].source], next[tile]++);
        });
      }
    });
  }

  // body(tile, thread) for all tiles, `thread` below the number of threads.
  template <class Body>
  void for_tiles(const Body& body) const {
    parallel_for(tiles_, 2, threads_, [&](int64_t first, int64_t past) {
      const int thread = omp_in_parallel() ? omp_get_thread_num() : 0;
      for (int64_t tile = first; tile < past; ++tile) body(tile, thread);
    });
  }

  int64_t tiles() const { return tiles_; }
  int64_t entries() const { return starts_[tiles_]; }
  int threads() const { return threads_; }
  int left(int64_t tile) const { return static_cast<int>(tile % across_) * kTile; }
  int top(int64_t tile) const { return static_cast<int>(tile / across_) * kTile; }
  const Splat<T>* splats() const { return projected_.get(); }
  int64_t start(int64_t tile) const { return starts_[tile]; }
  int64_t length(int64_t tile) const { return starts_[tile + 1] - starts_[tile]; }
  const int32_t* list_of(int64_t tile) const { return entries_.get() + starts_[tile]; }

  std::vector<uint8_t> finished;  // tiles that take no more; read by list() and for_entries()

 private:
  int64_t list_chunks() const { return std::clamp<int64_t>(kCounters / tiles_, 1, threads_); }

  template <class Body>
  void for_tiles_of(const Placed& placed, const Body& body) const {
    for (int64_t y = placed.y0; y < placed.y1; ++y) {
      for (int64_t x = placed.x0; x < placed.x1; ++x) body(y * across_ + x);
    }
  }

  const ProjectJob<T> job_;
  const int64_t list_entries_;
  const int threads_;
  const int64_t across_, tiles_;
  int64_t (*const project_)(const ProjectJob<T>&);
  const std::unique_ptr<Splat<T>[]> projected_;
  const std::unique_ptr<Placed[]> sorted_;
  const std::unique_ptr<Keyed<Key>[]> pairs_;
  std::vector<int64_t> starts_, positions_;
  std::unique_ptr<int32_t[]> entries_ = uncleared<int32_t>(0);
  int64_t capacity_ = 0;
};

// Of the tensors [V, 4, 4] and [V, 3, 3].
template <class T>
Camera<T> camera_of(TensorView<const T, 3> extrinsics, TensorView<const T, 3> intrinsics, int64_t view, int64_t width,
                    int64_t height, double kernel_size) {
  const T *e = extrinsics.row(view), *k = intrinsics.row(view);
  return {{e[0], e[1], e[2], e[4], e[5], e[6], e[8], e[9], e[10]},
          {e[3], e[7], e[11]},
          k[0],
          k[4],
          k[2],
          k[5],
          static_cast<int>(width),
          static_cast<int>(height),
          static_cast<T>(kernel_size)};
}

// What forward and backward ask of their inputs.
template <class T>
void check_gaussians(const TensorView<const T, 2>& means, const TensorView<const T, 2>& quats,
                     const TensorView<const T, 2>& scales, const TensorView<const T, 1>& opacities,
                     const TensorView<const T, 3>& colors, const TensorView<const T, 3>& extrinsics,
                     const TensorView<const T, 3>& intrinsics, const TensorView<const T, 2>& background, int64_t width,
                     int64_t height) {
  const auto require = [](bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
  };
  const int64_t count = means.size(0), channels = colors.size(2), views = extrinsics.size(0);
  require(means.size(1) == 3 && quats.size(1) == 4 && scales.size(1) == 3, "means, quats, scales must be [G, 3|4|3]");
  require(quats.size(0) == count && scales.size(0) == count && opacities.size(0) == count && colors.size(1) == count,
          "quats, scales, opacities and colors must have as many rows as means");
  require(colors.size(0) == 1 || colors.size(0) == views, "colors must be [1, G, C] or [V, G, C]");
  require(count <= INT32_MAX, "means must have fewer than 2^31 rows");
  require(extrinsics.numel() == views * 16 && intrinsics.numel() == views * 9 && intrinsics.size(0) == views &&
              background.numel() == views * channels,
          "extrinsics, intrinsics and background must be [V, 4, 4], [V, 3, 3] and [V, C]");
  require(width >= 1 && height >= 1 && width <= 32768 && height <= 32768, "width and height must be in 1..32768");
}

}  // namespace trellis
