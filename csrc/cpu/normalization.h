// Normalisation of rows and of heads, with what surrounds it in a transformer block; the contract is
// trellis_kernels/normalization/__init__.py. What a segment has of its own (gate, gain, shift) comes as [R, C] with
// R = 0: absent, 1: the same for every row, or one row per segment. `offsets` is empty where there is one segment.
#pragma once
#include "tensor_view.h"

namespace trellis::cpu {

// sum = x + gate * update (left out where `update` is empty), out = normalised(sum) * (unit + gain) + shift.
template <class T>
void layer_norm(TensorView<const T, 2> x, TensorView<const T, 2> update, TensorView<const T, 2> gate,
                TensorView<const T, 2> gain, TensorView<const T, 2> shift, TensorView<const int32_t, 1> offsets,
                double eps, double unit, TensorView<T, 2> sum, TensorView<T, 2> out, TensorView<T, 1> mean,
                TensorView<T, 1> rstd, int threads);

template <class T>
void layer_norm_backward(TensorView<const T, 2> out_gradient, TensorView<const T, 2> x, TensorView<const T, 2> gain,
                         TensorView<const int32_t, 1> offsets, TensorView<const T, 1> mean, TensorView<const T, 1> rstd,
                         double unit, TensorView<T, 2> x_gradient, TensorView<T, 2> gain_gradient,
                         TensorView<T, 2> shift_gradient, int threads);

template <class T>
void gated_residual(TensorView<const T, 2> x, TensorView<const T, 2> update, TensorView<const T, 2> gate,
                    TensorView<const int32_t, 1> offsets, TensorView<T, 2> out, int threads);

template <class T>
void gated_residual_backward(TensorView<const T, 2> out_gradient, TensorView<const T, 2> update,
                             TensorView<const T, 2> gate, TensorView<const int32_t, 1> offsets,
                             TensorView<T, 2> update_gradient, TensorView<T, 2> gate_gradient, int threads);

// x [N, P, H, D]; gamma [G, H, D] for the first G parts; out [N, Q, H, D] with G <= Q <= P, the rest is copied.
template <class T>
void head_rms_norm(TensorView<const T, 4> x, TensorView<const T, 3> gamma, TensorView<T, 4> out, int threads);

template <class T>
void head_rms_norm_backward(TensorView<const T, 4> out_gradient, TensorView<const T, 4> x, TensorView<const T, 3> gamma,
                            TensorView<T, 4> x_gradient, TensorView<T, 3> gamma_gradient, int threads);

}  // namespace trellis::cpu
