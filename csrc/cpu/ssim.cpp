#include "ssim.h"

#include <array>
#include <cmath>
#include <memory>
#include <stdexcept>

#include "cpu_features.h"
#include "parallel.h"
#include "ssim_strip.h"

namespace trellis::cpu {
namespace {

template <class T>
auto strip_kernel() {
  using Kernel = void (*)(const SsimStrip<T>&);
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512) return static_cast<Kernel>(ssim_avx512::ssim_strip);
  if (instruction_set() == InstructionSet::avx2) return static_cast<Kernel>(ssim_avx2::ssim_strip);
#endif
  return static_cast<Kernel>(ssim_baseline::ssim_strip);
}

template <class T>
std::array<T, kSsimTaps> window() {
  std::array<double, kSsimTaps> weights;
  double sum = 0;
  for (int i = 0; i < kSsimTaps; ++i) {
    const double offset = i - kSsimRadius;
    weights[i] = std::exp(-offset * offset / (2 * 1.5 * 1.5));
    sum += weights[i];
  }
  std::array<T, kSsimTaps> rounded;
  for (int i = 0; i < kSsimTaps; ++i) rounded[i] = static_cast<T>(weights[i] / sum);
  return rounded;
}

template <class T>
void run(const T* gradient, TensorView<const T, 4> images, TensorView<const T, 4> targets, TensorView<T, 4> out,
         int threads) {
  if (images.shape != targets.shape || images.shape != out.shape)
    throw std::invalid_argument("images, targets and out must have one shape");
  const int64_t planes = images.size(0) * images.size(1), height = images.size(2), width = images.size(3);
  if (images.numel() == 0) return;
  const auto weights = window<T>();
  const auto kernel = strip_kernel<T>();
  const int64_t strips = (height + kSsimStripRows - 1) / kSsimStripRows;
  parallel_for(planes * strips, std::max<int64_t>(1, 65536 / (width * kSsimStripRows)), threads,
               [&](int64_t begin, int64_t end) {
                 const auto scratch = std::make_unique_for_overwrite<T[]>(ssim_scratch(width));
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t offset = task / strips * height * width, row = task % strips * kSsimStripRows;
                   kernel({gradient ? gradient + offset : nullptr, images.data + offset, targets.data + offset,
                           out.data + offset, height, width, row, std::min(height, row + kSsimStripRows),
                           weights.data(), scratch.get()});
                 }
               });
}

}  // namespace

template <class T>
void ssim_map(TensorView<const T, 4> images, TensorView<const T, 4> targets, TensorView<T, 4> out, int threads) {
  run<T>(nullptr, images, targets, out, threads);
}

template <class T>
void ssim_map_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 4> images,
                       TensorView<const T, 4> targets, TensorView<T, 4> out, int threads) {
  if (out_gradient.shape != images.shape) throw std::invalid_argument("out_gradient must have the shape of images");
  run<T>(out_gradient.data, images, targets, out, threads);
}

template void ssim_map(TensorView<const float, 4>, TensorView<const float, 4>, TensorView<float, 4>, int);
template void ssim_map(TensorView<const double, 4>, TensorView<const double, 4>, TensorView<double, 4>, int);
template void ssim_map_gradient(TensorView<const float, 4>, TensorView<const float, 4>, TensorView<const float, 4>,
                                TensorView<float, 4>, int);
template void ssim_map_gradient(TensorView<const double, 4>, TensorView<const double, 4>, TensorView<const double, 4>,
                                TensorView<double, 4>, int);

}  // namespace trellis::cpu
