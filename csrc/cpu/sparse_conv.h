// Convolutions over occupied voxels and their gradients, and pooling. Contracts: trellis_kernels/sparse_conv.
#pragma once
#include "tensor_view.h"

namespace trellis::cpu {

template <class T>
void submanifold_conv(TensorView<const T, 2> feats, TensorView<const int32_t, 2> neighbors,
                      TensorView<const T, 3> weight, TensorView<const T, 1> bias, TensorView<T, 2> out, int threads);
template <class T>
void submanifold_conv_input_gradient(TensorView<const T, 2> out_gradient, TensorView<const int32_t, 2> neighbors,
                                     TensorView<const T, 3> weight, TensorView<T, 2> out, int threads);
template <class T>
void submanifold_conv_weight_gradient(TensorView<const T, 2> feats, TensorView<const int32_t, 2> neighbors,
                                      TensorView<const T, 2> out_gradient, TensorView<T, 3> out, int threads);

template <class T>
void subdivided_conv(TensorView<const T, 2> feats, TensorView<const int32_t, 2> neighbors,
                     TensorView<const T, 3> weight, TensorView<const T, 1> bias, TensorView<T, 2> out, int threads);
template <class T>
void subdivided_conv_input_gradient(TensorView<const T, 2> out_gradient, TensorView<const int32_t, 2> neighbors,
                                    TensorView<const T, 3> weight, TensorView<T, 2> out, int threads);
template <class T>
void subdivided_conv_weight_gradient(TensorView<const T, 2> feats, TensorView<const int32_t, 2> neighbors,
                                     TensorView<const T, 2> out_gradient, TensorView<T, 3> out, int threads);

// mode: 0 sum, 1 mean, 2 biased mean
template <class T>
void sparse_pool(TensorView<const T, 2> feats, TensorView<const int32_t, 1> inverse, int mode, TensorView<T, 2> out,
                 int threads);

}  // namespace trellis::cpu
