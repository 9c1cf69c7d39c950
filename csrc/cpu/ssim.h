// Structural similarity. ssim.cpp checks and hands out strips of rows; the strips are computed by kernels compiled once
// per instruction set (ssim_strip.inl.h).
#pragma once
#include "tensor_view.h"

namespace trellis::cpu {

template <class T>
void ssim_map(TensorView<const T, 4> images, TensorView<const T, 4> targets, TensorView<T, 4> out, int threads);

// The gradient in `images`.
template <class T>
void ssim_map_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 4> images,
                       TensorView<const T, 4> targets, TensorView<T, 4> out, int threads);

}  // namespace trellis::cpu
