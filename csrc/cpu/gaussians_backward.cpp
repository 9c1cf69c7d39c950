// The derivative, per camera: projection, order and lists are made again, then each tile is blended front to back as
// before, this time knowing what its pixels come to. What a tile finds out about a Gaussian goes to the place of the
// Gaussian in the list of the tile; the places of a Gaussian are summed in the order of its tiles, so that no result
// depends on the number of threads. At last the projection is differentiated.
#include <stdexcept>

#include "gaussians.h"
#include "gaussians_lists.h"

namespace trellis {
namespace {

template <class T>
struct InnerLoops {
  bool (*blend)(const BlendBackwardJob<T>&);
  void (*project)(const ProjectBackwardJob<T>&);
};

template <class T>
InnerLoops<T> inner_loops() {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::avx512:
      return {gaussians_backward_avx512::blend_backward, gaussians_backward_avx512::project_backward};
    case InstructionSet::avx2:
      return {gaussians_backward_avx2::blend_backward, gaussians_backward_avx2::project_backward};
#endif
    default:
      return {gaussians_backward_baseline::blend_backward, gaussians_backward_baseline::project_backward};
  }
}

// Of one camera.
template <class T>
struct Pictures {
  const T *colors, *depths, *transmittances;                             // what was drawn
  const T *colors_gradient, *depths_gradient, *transmittances_gradient;  // and what is asked of it
};

template <class T>
class Differentiator {
 public:
  Differentiator(const T* means, const T* quats, const T* scales, const T* opacities, int64_t count, int64_t channels,
                 int width, int height, int64_t list_entries, int threads)
      : job_{means, quats, scales, opacities, 0, count, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
        lists_(means, quats, scales, opacities, count, width, height, list_entries, threads),
        channels_(channels),
        width_(width),
        height_(height),
        loops_(inner_loops<T>()),
        planes_((kFirstGradient + channels) * kTilePixels),
        state_(uncleared<T>(lists_.threads() * planes_)),
        scratch_(uncleared<T>(lists_.threads() * channels * kTile)),
        moments_(uncleared<T>(count * kRow)) {}

  // Adds to the gradients of Gaussians and colors; writes those of the background [C] and of the camera [16].
  void run(const Camera<T>& camera, const T* colors, const Pictures<T>& pictures, const ProjectBackwardJob<T>& targets,
           T* d_colors, T* d_background, double* d_camera) {
    colors_ = colors;
    pictures_ = pictures;
    sum_background(d_background);
    const int64_t count = lists_.project_and_sort(camera);
    std::fill(lists_.finished.begin(), lists_.finished.end(), 0);
    clear_moments();
    bool resume = false;
    for (int64_t begin = 0, end; begin < count; begin = end) {
      end = lists_.batch_end(begin, count);
      lists_.list(begin, end);
      blend(resume, end < count);
      gather(begin, end, d_colors);
      resume = true;
      lists_.finished = finished_;
      if (std::find(finished_.begin(), finished_.end(), 0) == finished_.end()) break;
    }
    project(camera, targets, d_camera);
  }

 private:
  static constexpr int64_t kRow = 8;  // numbers of a Gaussian in moments_: the moments, and whether there are any

  void clear_moments() {
    parallel_for(job_.end, kChunk, lists_.threads(), [&](int64_t first, int64_t past) {
      std::fill(moments_.get() + first * kRow, moments_.get() + past * kRow, T(0));
    });
  }

  // Rows of pixels in fixed chunks, combined in order.
  void sum_background(T* d_background) const {
    constexpr int64_t kRows = 16;
    const int64_t chunks = (height_ + kRows - 1) / kRows;
    std::vector<double> sums(chunks * channels_);
    parallel_chunks(chunks, lists_.threads(), [&](int64_t chunk) {
      const int64_t past = std::min<int64_t>(height_, (chunk + 1) * kRows) * width_;
      double* const sum = sums.data() + chunk * channels_;
      for (int64_t pixel = chunk * kRows * width_; pixel < past; ++pixel) {
        const T* const gradient = pictures_.colors_gradient + pixel * channels_;
        for (int64_t i = 0; i < channels_; ++i) sum[i] += double{pictures_.transmittances[pixel]} * gradient[i];
      }
    });
    for (int64_t i = 0; i < channels_; ++i) {
      double total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[chunk * channels_ + i];
      d_background[i] = static_cast<T>(total);
    }
  }

  // `resume`: an earlier batch has left its state; `keep`: a later one needs it.
  void blend(bool resume, bool keep) {
    const int64_t entries = lists_.entries();
    if (entries > capacity_) {
      sums_ = uncleared<T>(entries * (kMoments + channels_));
      capacity_ = entries;
    }
    reached_.assign(entries, 0);
    finished_ = lists_.finished;
    if (keep && kept_.empty()) kept_.resize(lists_.tiles() * 2 * kTilePixels);
    lists_.for_tiles([&](int64_t tile, int thread) {
      if (finished_[tile]) return;
      T* const state = state_.get() + thread * planes_;
      load_tile(tile, state);
      T* const kept = kept_.data() + tile * 2 * kTilePixels;
      if (resume) std::copy_n(kept, 2 * kTilePixels, state);
      const int64_t start = lists_.start(tile);
      finished_[tile] =
          loops_.blend({lists_.splats(), lists_.list_of(tile), lists_.length(tile), colors_, channels_,
                        lists_.left(tile), lists_.top(tile), state, sums_.get() + start * (kMoments + channels_),
                        reached_.data() + start, scratch_.get() + thread * channels_ * kTile});
      if (keep) std::copy_n(state, 2 * kTilePixels, kept);
    });
  }

  void load_tile(int64_t tile, T* state) const {
    const int left = lists_.left(tile), top = lists_.top(tile);
    const int columns = std::min(kTile, width_ - left), rows = std::min(kTile, height_ - top);
    if (columns < kTile || rows < kTile) {  // pixels outside the image are finished from the start
      std::fill(state, state + kTilePixels, T(-1));
      std::fill(state + kTilePixels, state + planes_, T(0));
    }
    for (int row = 0; row < rows; ++row) {
      const int64_t source = int64_t{top + row} * width_ + left;
      for (int column = 0; column < columns; ++column) {
        const int64_t pixel = source + column;
        T* const at = state + row * kTile + column;
        const T depth = pictures_.depths_gradient[pixel];
        T behind = depth * pictures_.depths[pixel] +
                   pictures_.transmittances_gradient[pixel] * pictures_.transmittances[pixel];
        for (int64_t i = 0; i < channels_; ++i) {
          const T gradient = pictures_.colors_gradient[pixel * channels_ + i];
          behind += gradient * pictures_.colors[pixel * channels_ + i];
          at[(kFirstGradient + i) * kTilePixels] = gradient;
        }
        at[0] = 1;
        at[kTilePixels] = behind;
        at[2 * kTilePixels] = depth;
      }
    }
  }

  void gather(int64_t begin, int64_t end, T* d_colors) {
    lists_.for_entries(begin, end, [&](const Splat<T>& splat, int64_t position) {
      if (!reached_[position]) return;
      const T* const sums = sums_.get() + position * (kMoments + channels_);
      T *const moments = moments_.get() + splat.index * kRow, *const color = d_colors + splat.index * channels_;
      for (int i = 0; i < kMoments; ++i) moments[i] += sums[i];
      moments[kMoments] = 1;
      for (int64_t i = 0; i < channels_; ++i) color[i] += sums[kMoments + i];
    });
  }

  void project(const Camera<T>& camera, const ProjectBackwardJob<T>& targets, double* d_camera) const {
    const int64_t chunks = (job_.end + kChunk - 1) / kChunk;
    std::vector<T> sums(chunks * kCameraNumbers);
    parallel_chunks(chunks, lists_.threads(), [&](int64_t chunk) {
      ProjectBackwardJob<T> job = targets;
      job.means = job_.means;
      job.quats = job_.quats;
      job.scales = job_.scales;
      job.opacities = job_.opacities;
      job.begin = chunk * kChunk;
      job.end = std::min(job_.end, job.begin + kChunk);
      job.camera = &camera;
      job.moments = moments_.get();
      job.d_camera = sums.data() + chunk * kCameraNumbers;
      loops_.project(job);
    });
    for (int i = 0; i < kCameraNumbers; ++i) {
      d_camera[i] = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) d_camera[i] += double{sums[chunk * kCameraNumbers + i]};
    }
  }

  const ProjectBackwardJob<T> job_;  // the Gaussians
  GaussianLists<T> lists_;
  const int64_t channels_;
  const int width_, height_;
  const InnerLoops<T> loops_;
  const int64_t planes_;
  const std::unique_ptr<T[]> state_, scratch_, moments_;
  std::unique_ptr<T[]> sums_;
  int64_t capacity_ = 0;
  std::vector<uint8_t> reached_, finished_;
  std::vector<T> kept_;
  const T* colors_ = nullptr;
  Pictures<T> pictures_{};
};

}  // namespace

template <class T>
void rasterize_gaussians_backward(
    TensorView<const T, 4> colors_gradient, TensorView<const T, 3> depths_gradient,
    TensorView<const T, 3> transmittances_gradient, TensorView<const T, 2> means, TensorView<const T, 2> quats,
    TensorView<const T, 2> scales, TensorView<const T, 1> opacities, TensorView<const T, 3> colors,
    TensorView<const T, 3> extrinsics, TensorView<const T, 3> intrinsics, TensorView<const T, 2> background,
    TensorView<const T, 4> out_colors, TensorView<const T, 3> out_depths, TensorView<const T, 3> out_transmittances,
    TensorView<T, 2> d_means, TensorView<T, 2> d_quats, TensorView<T, 2> d_scales, TensorView<T, 1> d_opacities,
    TensorView<T, 3> d_colors, TensorView<T, 3> d_extrinsics, TensorView<T, 3> d_intrinsics,
    TensorView<T, 2> d_background, double kernel_size, int64_t list_entries, int threads) {
  const int64_t count = means.size(0), channels = colors.size(2), views = extrinsics.size(0);
  const int64_t height = out_depths.size(1), width = out_depths.size(2), pixels = height * width;
  check_gaussians(means, quats, scales, opacities, colors, extrinsics, intrinsics, background, width, height);
  if (!(out_colors.numel() == views * pixels * channels && out_colors.shape == colors_gradient.shape &&
        out_depths.size(0) == views && out_transmittances.shape == out_depths.shape &&
        depths_gradient.shape == out_depths.shape && transmittances_gradient.shape == out_depths.shape)) {
    throw std::invalid_argument("images and their gradients must be [V, H, W, C] and twice [V, H, W]");
  }
  if (!(d_means.shape == means.shape && d_quats.shape == quats.shape && d_scales.shape == scales.shape &&
        d_opacities.shape == opacities.shape && d_colors.shape == colors.shape &&
        d_extrinsics.shape == extrinsics.shape && d_intrinsics.shape == intrinsics.shape &&
        d_background.shape == background.shape)) {
    throw std::invalid_argument("gradients must have the shapes of the inputs");
  }

  Differentiator<T> differentiator(means.data, quats.data, scales.data, opacities.data, count, channels,
                                   static_cast<int>(width), static_cast<int>(height), list_entries, threads);
  ProjectBackwardJob<T> targets{};
  targets.d_means = d_means.data;
  targets.d_quats = d_quats.data;
  targets.d_scales = d_scales.data;
  targets.d_opacities = d_opacities.data;
  for (int64_t view = 0; view < views; ++view) {
    const Camera<T> camera = camera_of(extrinsics, intrinsics, view, width, height, kernel_size);
    const int64_t shades = colors.size(0) == 1 ? 0 : view, image = view * pixels;
    const Pictures<T> pictures{
        out_colors.row(view),      out_depths.data + image,      out_transmittances.data + image,
        colors_gradient.row(view), depths_gradient.data + image, transmittances_gradient.data + image};
    double numbers[kCameraNumbers];
    differentiator.run(camera, colors.row(shades), pictures, targets, d_colors.row(shades), d_background.row(view),
                       numbers);
    T *const e = d_extrinsics.row(view), *const k = d_intrinsics.row(view);
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) e[4 * i + j] = static_cast<T>(numbers[3 * i + j]);
      e[4 * i + 3] = static_cast<T>(numbers[9 + i]);
    }
    k[0] = static_cast<T>(numbers[12]);
    k[4] = static_cast<T>(numbers[13]);
    k[2] = static_cast<T>(numbers[14]);
    k[5] = static_cast<T>(numbers[15]);
  }
}

#define TRELLIS_INSTANTIATE(T)                                                                              \
  template void rasterize_gaussians_backward<T>(                                                            \
      TensorView<const T, 4>, TensorView<const T, 3>, TensorView<const T, 3>, TensorView<const T, 2>,       \
      TensorView<const T, 2>, TensorView<const T, 2>, TensorView<const T, 1>, TensorView<const T, 3>,       \
      TensorView<const T, 3>, TensorView<const T, 3>, TensorView<const T, 2>, TensorView<const T, 4>,       \
      TensorView<const T, 3>, TensorView<const T, 3>, TensorView<T, 2>, TensorView<T, 2>, TensorView<T, 2>, \
      TensorView<T, 1>, TensorView<T, 3>, TensorView<T, 3>, TensorView<T, 3>, TensorView<T, 2>, double, int64_t, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis
