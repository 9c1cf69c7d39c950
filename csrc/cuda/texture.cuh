// What the kernels of textures share: how a pixel finds its levels and texels.
#pragma once
#include <string>

#include "launch.h"
#include "tensor_view.h"
#include "texture_lookup.h"

namespace trellis::cuda {

constexpr int kThreads = 256;

template <class T>
struct Lookup {
  const T *uv, *derivatives;  // [pixels, 2], [pixels, 4]
  int64_t pixels, pixels_per_image;
  int channels;
  Wrap wrap;
  bool nearest;
  Pyramid pyramid;
};

inline Wrap wrap_of(const std::string& wrap) {
  return wrap == "repeat" ? Wrap::repeat : wrap == "clamp" ? Wrap::clamp : Wrap::zero;
}

template <class T>
Lookup<T> lookup_of(const TensorView<const T, 4>& uv, const T* derivatives, bool has_levels, int64_t images,
                    int64_t height, int64_t width, int64_t channels, const std::string& wrap,
                    const std::string& filter) {
  const int64_t pixels = uv.numel() / 2;
  if (uv.size(3) != 2) throw std::invalid_argument("uv must be [B, h, w, 2]");
  if (images != 1 && images != uv.size(0)) throw std::invalid_argument("texture must be [1 or B, H, W, C]");
  if (height > 16384 || width > 16384 || channels > INT32_MAX)
    throw std::invalid_argument("texture must be at most 16384 texels high and wide");
  const int64_t each = images == 1 ? pixels : pixels / images;
  return {uv.data,
          derivatives,
          pixels,
          each,
          static_cast<int>(channels),
          wrap_of(wrap),
          filter == "nearest",
          {height, width, has_levels}};
}

template <class T>
__device__ inline bool is_somewhere(const T* uv) {
  return is_finite(uv[0]) && is_finite(uv[1]);
}

template <class T>
__device__ inline T level_of_pixel(const Lookup<T>& lookup, int64_t pixel) {
  if (lookup.pyramid.count == 1) return T(0);
  T derivatives[4];
  for (int k = 0; k < 4; ++k) derivatives[k] = lookup.derivatives[4 * pixel + k];
  return level_of(derivatives, lookup.pyramid.height[0], lookup.pyramid.width[0], lookup.pyramid.count - 1,
                  lookup.nearest);
}

}  // namespace trellis::cuda
