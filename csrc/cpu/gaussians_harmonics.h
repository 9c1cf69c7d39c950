// Colors of Gaussians seen from somewhere: max(0, sum_k basis_k(direction) coefficients_k + 1/2), and its gradients.
#pragma once
#include "tensor_view.h"

namespace trellis::cpu {

// coefficients [G, K, 3], K = 4, 9 or 16; directions and out [V, G, 3].
template <class T>
void spherical_harmonics(TensorView<const T, 3> coefficients, TensorView<const T, 3> directions, TensorView<T, 3> out,
                         int threads);

// Gradients in `coefficients` (over views in order) and in `directions`.
template <class T>
void spherical_harmonics_gradient(TensorView<const T, 3> out_gradient, TensorView<const T, 3> coefficients,
                                  TensorView<const T, 3> directions, TensorView<T, 3> out_coefficients,
                                  TensorView<T, 3> out_directions, int threads);

}  // namespace trellis::cpu
