#pragma once
#include "tensor_view.h"

namespace trellis::cuda {

using Images = TensorView<const float, 4>;  // [B, C, H, W]

void ssim_map(Images images, Images targets, TensorView<float, 4> out, int64_t stream);

// The gradient in `images`.
void ssim_map_gradient(Images out_gradient, Images images, Images targets, TensorView<float, 4> out, int64_t stream);

}  // namespace trellis::cuda
