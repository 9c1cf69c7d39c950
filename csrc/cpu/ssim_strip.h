// Between ssim.cpp and the kernels of each instruction set. Plain data only: see cpu_features.h.
#pragma once
#include <cstdint>

namespace trellis::cpu {

constexpr int kSsimRadius = 5;  // the window has 11 x 11 pixels
constexpr int kSsimTaps = 2 * kSsimRadius + 1;
constexpr int64_t kSsimStripRows = 32;  // of the output

// Rows [begin, end) of one channel of one image.
template <class T>
struct SsimStrip {
  const T *gradient, *x, *y;  // [height, width]; gradient: null for the forward
  T* out;
  int64_t height, width, begin, end;
  const T* weights;  // kSsimTaps
  T* scratch;        // ssim_scratch(width) elements
};

// Images next to each other in the scratch, each as wide as the picture and as high as a strip and its surroundings.
inline int64_t ssim_scratch(int64_t width) {
  const int64_t rows = kSsimStripRows + 4 * kSsimRadius;
  return 5 * (rows * width) + 3 * rows * width + 8 * (width + 2 * kSsimRadius);
}

#define TRELLIS_SSIM_KERNELS(NAMESPACE)            \
  namespace NAMESPACE {                            \
  void ssim_strip(const SsimStrip<float>& strip);  \
  void ssim_strip(const SsimStrip<double>& strip); \
  }
TRELLIS_SSIM_KERNELS(ssim_baseline)
TRELLIS_SSIM_KERNELS(ssim_avx2)
TRELLIS_SSIM_KERNELS(ssim_avx512)
#undef TRELLIS_SSIM_KERNELS

}  // namespace trellis::cpu
