#pragma once
#include "tensor_view.h"

namespace trellis {

// `list_entries` bounds the memory for the tile lists of a batch of Gaussians (4 bytes each).
template <class T>
void rasterize_gaussians(TensorView<const T, 2> means, TensorView<const T, 2> quats, TensorView<const T, 2> scales,
                         TensorView<const T, 1> opacities, TensorView<const T, 3> colors,
                         TensorView<const T, 3> extrinsics, TensorView<const T, 3> intrinsics,
                         TensorView<const T, 2> background, TensorView<T, 4> out_colors, TensorView<T, 3> out_depths,
                         TensorView<T, 3> out_transmittances, TensorView<int32_t, 3> out_last,
                         TensorView<T, 3> out_medians, double kernel_size, int64_t list_entries, int threads);

// The derivative: from gradients of what was drawn and what was drawn, to gradients of the inputs. Those of means,
// quats, scales, opacities, colors, extrinsics and intrinsics must be zeros before.
template <class T>
void rasterize_gaussians_backward(TensorView<const T, 4> colors_gradient, TensorView<const T, 3> depths_gradient,
                                  TensorView<const T, 3> transmittances_gradient, TensorView<const T, 2> means,
                                  TensorView<const T, 2> quats, TensorView<const T, 2> scales,
                                  TensorView<const T, 1> opacities, TensorView<const T, 3> colors,
                                  TensorView<const T, 3> extrinsics, TensorView<const T, 3> intrinsics,
                                  TensorView<const T, 2> background, TensorView<const T, 4> out_colors,
                                  TensorView<const T, 3> out_depths, TensorView<const T, 3> out_transmittances,
                                  TensorView<T, 2> d_means, TensorView<T, 2> d_quats, TensorView<T, 2> d_scales,
                                  TensorView<T, 1> d_opacities, TensorView<T, 3> d_colors,
                                  TensorView<T, 3> d_extrinsics, TensorView<T, 3> d_intrinsics,
                                  TensorView<T, 2> d_background, double kernel_size, int64_t list_entries, int threads);

}  // namespace trellis
