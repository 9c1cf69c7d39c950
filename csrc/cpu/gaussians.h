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

}  // namespace trellis
