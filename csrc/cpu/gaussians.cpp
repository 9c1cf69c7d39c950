// Per camera: project all Gaussians, sort them by depth once, list them per tile of 16 x 16 pixels by counting (the
// lists inherit the order), blend each tile front to back until it is opaque. Memory for the lists is bounded: the
// sorted Gaussians are taken in batches that fill a fixed number of entries, and opaque tiles take no more.
#include "gaussians.h"

#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "cpu_features.h"
#include "gaussians_simd.h"
#include "gaussians_sort.h"

namespace trellis {
namespace {

constexpr int64_t kChunk = 4096;        // Gaussians projected at once
constexpr int64_t kCounters = 4 << 20;  // of all threads

template <class T>
struct InnerLoops {
  int64_t (*project)(const ProjectJob<T>&);
  bool (*blend)(const BlendJob<T>&);
};

template <class T>
InnerLoops<T> inner_loops() {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::avx512:
      return {gaussians_avx512::project, gaussians_avx512::blend};
    case InstructionSet::avx2:
      return {gaussians_avx2::project, gaussians_avx2::blend};
#endif
    default:
      return {gaussians_baseline::project, gaussians_baseline::blend};
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
class Rasterizer {
 public:
  using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

  Rasterizer(const T* means, const T* quats, const T* scales, const T* opacities, int64_t count, int64_t channels,
             int width, int height, int64_t list_entries, int threads)
      : job_{means, quats, scales, opacities, 0, count, nullptr, nullptr},
        channels_(channels),
        width_(width),
        height_(height),
        list_entries_(list_entries),
        threads_(std::max(threads, 1)),
        across_((width + kTile - 1) / kTile),
        tiles_(across_ * ((height + kTile - 1) / kTile)),
        loops_(inner_loops<T>()),
        projected_(uncleared<Splat<T>>(count)),
        sorted_(uncleared<Placed>(count)),
        pairs_(uncleared<Keyed<Key>>(2 * count)),
        finished_(tiles_),
        starts_(tiles_ + 1),
        planes_((kFirstChannel + channels) * kTilePixels),
        state_(uncleared<T>(threads_ * planes_)),
        last_(uncleared<int32_t>(threads_ * kTilePixels)) {}

  void draw(const Camera<T>& camera, const T* colors, const T* background, T* out_colors, T* depths, T* transmittances,
            int32_t* last, T* medians) {
    colors_ = colors;
    background_ = background;
    out_colors_ = out_colors;
    out_depths_ = depths;
    out_transmittances_ = transmittances;
    out_last_ = last;
    out_medians_ = medians;
    const int64_t count = project_and_sort(camera);
    std::fill(finished_.begin(), finished_.end(), 0);

    int64_t begin = 0, end = batch_end(0, count);
    if (end == count) {  // the usual case: a tile is begun, blended and written while it is in the cache
      list(begin, end);
      for_tiles([&](int64_t tile, T* state, int32_t* state_last) {
        begin_tile(tile, state, state_last);
        blend(tile, state, state_last);
        write_tile(tile, state, state_last);
      });
      return;
    }
    const auto states = uncleared<T>(tiles_ * planes_);
    const auto lasts = uncleared<int32_t>(tiles_ * kTilePixels);
    for_tiles([&](int64_t tile, T*, int32_t*) {
      begin_tile(tile, states.get() + tile * planes_, lasts.get() + tile * kTilePixels);
    });
    for (; begin < count; begin = end, end = batch_end(begin, count)) {
      list(begin, end);
      for_tiles([&](int64_t tile, T*, int32_t*) {
        finished_[tile] |= blend(tile, states.get() + tile * planes_, lasts.get() + tile * kTilePixels);
      });
      if (std::find(finished_.begin(), finished_.end(), 0) == finished_.end()) break;
    }
    for_tiles([&](int64_t tile, T*, int32_t*) {
      write_tile(tile, states.get() + tile * planes_, lasts.get() + tile * kTilePixels);
    });
  }

 private:
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
      offsets[chunk + 1] = loops_.project(job);
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

  template <class Body>
  void for_tiles_of(const Placed& placed, const Body& body) const {
    for (int64_t y = placed.y0; y < placed.y1; ++y) {
      for (int64_t x = placed.x0; x < placed.x1; ++x) body(y * across_ + x);
    }
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
    const int64_t chunks = std::clamp<int64_t>(kCounters / tiles_, 1, threads_);
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
        const int64_t here = finished_[tile] ? 0 : position;
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
          if (!finished_[tile]) entries_[targets[tile]++] = sorted_[i].source;
        });
      }
    });
  }

  template <class Body>
  void for_tiles(const Body& body) {
    parallel_for(tiles_, 2, threads_, [&](int64_t first, int64_t past) {
      const int thread = omp_in_parallel() ? omp_get_thread_num() : 0;
      for (int64_t tile = first; tile < past; ++tile) {
        body(tile, state_.get() + thread * planes_, last_.get() + thread * kTilePixels);
      }
    });
  }

  int left(int64_t tile) const { return static_cast<int>(tile % across_) * kTile; }
  int top(int64_t tile) const { return static_cast<int>(tile / across_) * kTile; }

  void begin_tile(int64_t tile, T* state, int32_t* last) const {
    std::fill(state + kTilePixels, state + planes_, T(0));
    std::fill(last, last + kTilePixels, -1);
    const int columns = std::min(kTile, width_ - left(tile)), rows = std::min(kTile, height_ - top(tile));
    for (int i = 0; i < kTilePixels; ++i) {  // pixels outside the image are finished from the start
      state[i] = i % kTile < columns && i / kTile < rows ? T(1) : T(-1);
    }
  }

  bool blend(int64_t tile, T* state, int32_t* last) const {
    return loops_.blend({projected_.get(), entries_.get() + starts_[tile], starts_[tile + 1] - starts_[tile], colors_,
                         channels_, left(tile), top(tile), state, last});
  }

  void write_tile(int64_t tile, const T* state, const int32_t* last) const {
    const int columns = std::min(kTile, width_ - left(tile)), rows = std::min(kTile, height_ - top(tile));
    for (int row = 0; row < rows; ++row) {
      const int64_t target = int64_t{top(tile) + row} * width_ + left(tile);
      for (int column = 0; column < columns; ++column) {
        const int pixel = row * kTile + column;
        const T transmittance = std::abs(state[pixel]);
        out_transmittances_[target + column] = transmittance;
        out_depths_[target + column] = state[kTilePixels + pixel];
        out_last_[target + column] = last[pixel];
        out_medians_[target + column] = state[2 * kTilePixels + pixel];
        T* color = out_colors_ + (target + column) * channels_;
        for (int64_t channel = 0; channel < channels_; ++channel) {
          color[channel] =
              state[(kFirstChannel + channel) * kTilePixels + pixel] + transmittance * background_[channel];
        }
      }
    }
  }

  const ProjectJob<T> job_;
  const int64_t channels_;
  const int width_, height_;
  const int64_t list_entries_;
  const int threads_;
  const int64_t across_, tiles_;
  const InnerLoops<T> loops_;
  const std::unique_ptr<Splat<T>[]> projected_;
  const std::unique_ptr<Placed[]> sorted_;
  const std::unique_ptr<Keyed<Key>[]> pairs_;
  std::vector<uint8_t> finished_;
  std::vector<int64_t> starts_, positions_;
  const int64_t planes_;
  const std::unique_ptr<T[]> state_;
  const std::unique_ptr<int32_t[]> last_;
  std::unique_ptr<int32_t[]> entries_ = uncleared<int32_t>(0);
  int64_t capacity_ = 0;
  const T *colors_ = nullptr, *background_ = nullptr;
  T *out_colors_ = nullptr, *out_depths_ = nullptr, *out_transmittances_ = nullptr, *out_medians_ = nullptr;
  int32_t* out_last_ = nullptr;
};

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

template <class T>
void rasterize_gaussians(TensorView<const T, 2> means, TensorView<const T, 2> quats, TensorView<const T, 2> scales,
                         TensorView<const T, 1> opacities, TensorView<const T, 3> colors,
                         TensorView<const T, 3> extrinsics, TensorView<const T, 3> intrinsics,
                         TensorView<const T, 2> background, TensorView<T, 4> out_colors, TensorView<T, 3> out_depths,
                         TensorView<T, 3> out_transmittances, TensorView<int32_t, 3> out_last,
                         TensorView<T, 3> out_medians, double kernel_size, int64_t list_entries, int threads) {
  const int64_t count = means.size(0), channels = colors.size(2), views = extrinsics.size(0);
  const int64_t height = out_depths.size(1), width = out_depths.size(2), pixels = height * width;
  require(means.size(1) == 3 && quats.size(1) == 4 && scales.size(1) == 3, "means, quats, scales must be [G, 3|4|3]");
  require(quats.size(0) == count && scales.size(0) == count && opacities.size(0) == count && colors.size(1) == count,
          "quats, scales, opacities and colors must have as many rows as means");
  require(colors.size(0) == 1 || colors.size(0) == views, "colors must be [1, G, C] or [V, G, C]");
  require(count <= INT32_MAX, "means must have fewer than 2^31 rows");
  require(extrinsics.numel() == views * 16 && intrinsics.numel() == views * 9 && intrinsics.size(0) == views &&
              background.numel() == views * channels,
          "extrinsics, intrinsics and background must be [V, 4, 4], [V, 3, 3] and [V, C]");
  require(out_colors.numel() == views * pixels * channels && out_depths.size(0) == views &&
              out_transmittances.shape == out_depths.shape && out_last.shape == out_depths.shape &&
              out_medians.shape == out_depths.shape,
          "outputs must be [V, H, W, C] and four times [V, H, W]");
  require(width >= 1 && height >= 1 && width <= 32768 && height <= 32768, "width and height must be in 1..32768");

  Rasterizer<T> rasterizer(means.data, quats.data, scales.data, opacities.data, count, channels,
                           static_cast<int>(width), static_cast<int>(height), list_entries, threads);
  for (int64_t view = 0; view < views; ++view) {
    const T *e = extrinsics.data + view * 16, *k = intrinsics.data + view * 9;
    const Camera<T> camera{{e[0], e[1], e[2], e[4], e[5], e[6], e[8], e[9], e[10]},
                           {e[3], e[7], e[11]},
                           k[0],
                           k[4],
                           k[2],
                           k[5],
                           static_cast<int>(width),
                           static_cast<int>(height),
                           static_cast<T>(kernel_size)};
    rasterizer.draw(camera, colors.row(colors.size(0) == 1 ? 0 : view), background.data + view * channels,
                    out_colors.data + view * pixels * channels, out_depths.data + view * pixels,
                    out_transmittances.data + view * pixels, out_last.data + view * pixels,
                    out_medians.data + view * pixels);
  }
}

#define TRELLIS_INSTANTIATE(T)                                                                                       \
  template void rasterize_gaussians<T>(TensorView<const T, 2>, TensorView<const T, 2>, TensorView<const T, 2>,       \
                                       TensorView<const T, 1>, TensorView<const T, 3>, TensorView<const T, 3>,       \
                                       TensorView<const T, 3>, TensorView<const T, 2>, TensorView<T, 4>,             \
                                       TensorView<T, 3>, TensorView<T, 3>, TensorView<int32_t, 3>, TensorView<T, 3>, \
                                       double, int64_t, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis
