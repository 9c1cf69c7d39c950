// Texture lookup. texture.cpp smooths and looks up, texture_gradient.cpp sums what pixels say of texels.
#pragma once
#include <stdexcept>
#include <string>
#include <string_view>

#include "tensor_view.h"
#include "texture_lookup.h"

namespace trellis::cpu {

template <class T>
struct Pixels {
  TensorView<const T, 4> uv, derivatives;  // [B, h, w, 2], and [B, h, w, 4] or of size 0 in every dimension
  Wrap wrap;
  bool nearest;

  bool has_levels() const { return derivatives.size(3) == 4; }
  int64_t count() const { return uv.numel() / 2; }
};

template <class T>
Pixels<T> pixels_of(TensorView<const T, 4> uv, TensorView<const T, 4> derivatives, std::string_view wrap,
                    std::string_view filter) {
  if (uv.size(3) != 2 || (derivatives.size(3) == 4 && derivatives.numel() != 2 * uv.numel()))
    throw std::invalid_argument("uv must be [B, h, w, 2] and derivatives [B, h, w, 4]");
  const Wrap how = wrap == "repeat" ? Wrap::repeat : wrap == "clamp" ? Wrap::clamp : Wrap::zero;
  return {uv, derivatives, how, filter == "nearest"};
}

template <class T>
void sample_texture(TensorView<const T, 4> texture, Pixels<T> pixels, TensorView<T, 4> out, TensorView<T, 3> mips,
                    int threads);

template <class T>
void sample_texture_gradient(TensorView<const T, 4> out_gradient, Pixels<T> pixels, TensorView<T, 4> out, int threads);

template <class T>
void sample_texture_uv_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 4> texture,
                                TensorView<const T, 3> mips, Pixels<T> pixels, TensorView<T, 4> out, int threads);

template <class T>
void interpolate_derivatives(TensorView<const T, 3> attributes, TensorView<const int32_t, 2> faces,
                             TensorView<const int32_t, 3> ids, TensorView<const T, 4> derivatives, TensorView<T, 4> out,
                             int threads);

}  // namespace trellis::cpu
