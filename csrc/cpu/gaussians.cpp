// Per camera: project all Gaussians, sort them by depth once, list them per tile of 16 x 16 pixels by counting (the
// lists inherit the order), blend each tile front to back until it is opaque. Memory for the lists is bounded: the
// sorted Gaussians are taken in batches that fill a fixed number of entries, and opaque tiles take no more.
#include "gaussians.h"

#include <stdexcept>

#include "gaussians_lists.h"

namespace trellis {
namespace {

template <class T>
bool (*blending())(const BlendJob<T>&) {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::avx512:
      return gaussians_avx512::blend;
    case InstructionSet::avx2:
      return gaussians_avx2::blend;
#endif
    default:
      return gaussians_baseline::blend;
  }
}

template <class T>
class Rasterizer {
 public:
  Rasterizer(const T* means, const T* quats, const T* scales, const T* opacities, int64_t count, int64_t channels,
             int width, int height, int64_t list_entries, int threads)
      : lists_(means, quats, scales, opacities, count, width, height, list_entries, threads),
        channels_(channels),
        width_(width),
        height_(height),
        blend_(blending<T>()),
        planes_((kFirstChannel + channels) * kTilePixels),
        state_(uncleared<T>(lists_.threads() * planes_)),
        last_(uncleared<int32_t>(lists_.threads() * kTilePixels)) {}

  void draw(const Camera<T>& camera, const T* colors, const T* background, T* out_colors, T* depths, T* transmittances,
            int32_t* last, T* medians) {
    colors_ = colors;
    background_ = background;
    out_colors_ = out_colors;
    out_depths_ = depths;
    out_transmittances_ = transmittances;
    out_last_ = last;
    out_medians_ = medians;
    const int64_t count = lists_.project_and_sort(camera);
    std::fill(lists_.finished.begin(), lists_.finished.end(), 0);

    int64_t begin = 0, end = lists_.batch_end(0, count);
    if (end == count) {  // the usual case: a tile is begun, blended and written while it is in the cache
      lists_.list(begin, end);
      lists_.for_tiles([&](int64_t tile, int thread) {
        T* const state = state_.get() + thread * planes_;
        int32_t* const state_last = last_.get() + thread * kTilePixels;
        begin_tile(tile, state, state_last);
        blend(tile, state, state_last);
        write_tile(tile, state, state_last);
      });
      return;
    }
    const auto states = uncleared<T>(lists_.tiles() * planes_);
    const auto lasts = uncleared<int32_t>(lists_.tiles() * kTilePixels);
    lists_.for_tiles(
        [&](int64_t tile, int) { begin_tile(tile, states.get() + tile * planes_, lasts.get() + tile * kTilePixels); });
    for (; begin < count; begin = end, end = lists_.batch_end(begin, count)) {
      lists_.list(begin, end);
      lists_.for_tiles([&](int64_t tile, int) {
        lists_.finished[tile] |= blend(tile, states.get() + tile * planes_, lasts.get() + tile * kTilePixels);
      });
      if (std::find(lists_.finished.begin(), lists_.finished.end(), 0) == lists_.finished.end()) break;
    }
    lists_.for_tiles(
        [&](int64_t tile, int) { write_tile(tile, states.get() + tile * planes_, lasts.get() + tile * kTilePixels); });
  }

 private:
  void begin_tile(int64_t tile, T* state, int32_t* last) const {
    std::fill(state + kTilePixels, state + planes_, T(0));
    std::fill(last, last + kTilePixels, -1);
    const int columns = std::min(kTile, width_ - lists_.left(tile)), rows = std::min(kTile, height_ - lists_.top(tile));
    for (int i = 0; i < kTilePixels; ++i) {  // pixels outside the image are finished from the start
      state[i] = i % kTile < columns && i / kTile < rows ? T(1) : T(-1);
    }
  }

  bool blend(int64_t tile, T* state, int32_t* last) const {
    return blend_({lists_.splats(), lists_.list_of(tile), lists_.length(tile), colors_, channels_, lists_.left(tile),
                   lists_.top(tile), state, last});
  }

  void write_tile(int64_t tile, const T* state, const int32_t* last) const {
    const int columns = std::min(kTile, width_ - lists_.left(tile)), rows = std::min(kTile, height_ - lists_.top(tile));
    for (int row = 0; row < rows; ++row) {
      const int64_t target = int64_t{lists_.top(tile) + row} * width_ + lists_.left(tile);
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

  GaussianLists<T> lists_;
  const int64_t channels_;
  const int width_, height_;
  bool (*const blend_)(const BlendJob<T>&);
  const int64_t planes_;
  const std::unique_ptr<T[]> state_;
  const std::unique_ptr<int32_t[]> last_;
  const T *colors_ = nullptr, *background_ = nullptr;
  T *out_colors_ = nullptr, *out_depths_ = nullptr, *out_transmittances_ = nullptr, *out_medians_ = nullptr;
  int32_t* out_last_ = nullptr;
};

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
  check_gaussians(means, quats, scales, opacities, colors, extrinsics, intrinsics, background, width, height);
  if (!(out_colors.numel() == views * pixels * channels && out_depths.size(0) == views &&
        out_transmittances.shape == out_depths.shape && out_last.shape == out_depths.shape &&
        out_medians.shape == out_depths.shape)) {
    throw std::invalid_argument("outputs must be [V, H, W, C] and four times [V, H, W]");
  }
  Rasterizer<T> rasterizer(means.data, quats.data, scales.data, opacities.data, count, channels,
                           static_cast<int>(width), static_cast<int>(height), list_entries, threads);
  for (int64_t view = 0; view < views; ++view) {
    const Camera<T> camera = camera_of(extrinsics, intrinsics, view, width, height, kernel_size);
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
