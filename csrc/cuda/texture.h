// Texture lookup. texture.cu smooths and looks up, texture_gradient.cu sums what pixels say of texels.
#pragma once
#include <string>

#include "tensor_view.h"

namespace trellis::cuda {

// derivatives [B, h, w, 4], or of size 0 in every dimension: no levels. mips [T, texels of levels from 1 on, C].
template <class T>
void sample_texture(TensorView<const T, 4> texture, TensorView<const T, 4> uv, TensorView<const T, 4> derivatives,
                    TensorView<T, 4> out, TensorView<T, 3> mips, const std::string& wrap, const std::string& filter,
                    int64_t stream);

template <class T>
void sample_texture_uv_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 4> texture,
                                TensorView<const T, 3> mips, TensorView<const T, 4> uv,
                                TensorView<const T, 4> derivatives, TensorView<T, 4> out, const std::string& wrap,
                                const std::string& filter, int64_t stream);

// Where each lookup lies: keys [pixels, 1 or 2], the place between four texels of one level of one image, or
// `places` * T where there is none; levels [pixels]. `places` is texture_places(H, W, whether there are levels).
int64_t texture_places(int64_t height, int64_t width, bool levels);
template <class T>
void texture_keys(TensorView<const T, 4> out_gradient, TensorView<const T, 4> uv, TensorView<const T, 4> derivatives,
                  TensorView<const T, 4> texture, TensorView<int32_t, 2> keys, TensorView<T, 1> levels,
                  const std::string& wrap, const std::string& filter, int64_t stream);

// keys [N] in rising order, order [N] which lookup each was. runs [places * T, 2]: begin and end of each key, zero at
// first; partials [N / kTextureChunk, 4, C]: sums of the aligned chunks that have one key only.
constexpr int64_t kTextureChunk = 256;
template <class T>
void texture_runs(TensorView<const T, 4> out_gradient, TensorView<const T, 4> uv, TensorView<const T, 1> levels,
                  TensorView<const T, 4> texture, TensorView<const int32_t, 1> keys, TensorView<const int64_t, 1> order,
                  bool has_levels, TensorView<int32_t, 2> runs, TensorView<T, 3> partials, const std::string& wrap,
                  const std::string& filter, int64_t stream);

// out [T, H, W, C] and mips [T, texels, C], the gradient of the levels.
template <class T>
void sum_texture(TensorView<const T, 4> out_gradient, TensorView<const T, 4> uv, TensorView<const T, 1> levels,
                 TensorView<const int64_t, 1> order, TensorView<const int32_t, 2> runs, TensorView<const T, 3> partials,
                 bool has_levels, TensorView<T, 4> out, TensorView<T, 3> mips, const std::string& wrap,
                 const std::string& filter, int64_t stream);

template <class T>
void interpolate_derivatives(TensorView<const T, 3> attributes, TensorView<const int32_t, 2> faces,
                             TensorView<const int32_t, 3> ids, TensorView<const T, 4> derivatives, TensorView<T, 4> out,
                             int64_t stream);

}  // namespace trellis::cuda
