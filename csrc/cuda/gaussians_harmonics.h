#pragma once
#include "tensor_view.h"

namespace trellis::cuda {

// coefficients [G, K, 3], K = 4, 9 or 16; directions and out [V, G, 3].
void spherical_harmonics(TensorView<const float, 3> coefficients, TensorView<const float, 3> directions,
                         TensorView<float, 3> out, int64_t stream);

// Gradients in `coefficients` (over views in order) and in `directions`.
void spherical_harmonics_gradient(TensorView<const float, 3> out_gradient, TensorView<const float, 3> coefficients,
                                  TensorView<const float, 3> directions, TensorView<float, 3> out_coefficients,
                                  TensorView<float, 3> out_directions, int64_t stream);

}  // namespace trellis::cuda
