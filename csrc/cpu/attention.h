// Attention over packed sequences and inside windows; the contract is trellis_kernels/attention/__init__.py.
#pragma once
#include "tensor_view.h"

namespace trellis::cpu {

template <class T>
void varlen_attention(TensorView<const T, 3> query, TensorView<const T, 3> key, TensorView<const T, 3> value,
                      TensorView<const int32_t, 1> query_offsets, TensorView<const int32_t, 1> key_offsets,
                      TensorView<T, 3> out, TensorView<T, 2> logsumexp, int threads);

template <class T>
void varlen_attention_backward(TensorView<const T, 3> out_gradient, TensorView<const T, 3> query,
                               TensorView<const T, 3> key, TensorView<const T, 3> value, TensorView<const T, 3> out,
                               TensorView<const T, 2> logsumexp, TensorView<const int32_t, 1> query_offsets,
                               TensorView<const int32_t, 1> key_offsets, TensorView<T, 3> query_gradient,
                               TensorView<T, 3> key_gradient, TensorView<T, 3> value_gradient, int threads);

template <class T>
void windowed_attention(TensorView<const T, 4> qkv, TensorView<const int32_t, 1> order,
                        TensorView<const int32_t, 1> offsets, TensorView<T, 3> out, TensorView<T, 2> logsumexp,
                        int threads);

template <class T>
void windowed_attention_backward(TensorView<const T, 3> out_gradient, TensorView<const T, 4> qkv,
                                 TensorView<const T, 3> out, TensorView<const T, 2> logsumexp,
                                 TensorView<const int32_t, 1> order, TensorView<const int32_t, 1> offsets,
                                 TensorView<T, 4> qkv_gradient, int threads);

// Fills `order` [N] and the first W + 1 of `offsets` [N + 1]; returns W.
int64_t window_partition(TensorView<const int32_t, 2> coords, int64_t window_size, int64_t shift,
                         TensorView<int32_t, 1> order, TensorView<int32_t, 1> offsets);

}  // namespace trellis::cpu
