// Antialiasing of silhouettes, and its gradient.
#pragma once
#include "tensor_view.h"

namespace trellis::cuda {

template <class T>
void antialias(TensorView<const T, 4> images, TensorView<const int32_t, 3> ids, TensorView<const T, 3> depths,
               TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
               TensorView<const int32_t, 2> neighbors, TensorView<T, 4> out, TensorView<T, 4> shares,
               TensorView<int32_t, 4> edges, int64_t stream);

template <class T>
void antialias_images_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 4> shares, TensorView<T, 4> out,
                               int64_t stream);

// The gradient in the normal of each edge's plane, sums [B, 3 F, 3], then in the vertices: the 3 F corners in the order
// of their vertex, starts [V + 1] where each vertex begins in `corners`.
template <class T>
void antialias_edges_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 4> images,
                              TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                              TensorView<const T, 4> shares, TensorView<const int32_t, 4> edges,
                              TensorView<double, 3> sums, int64_t stream);
template <class T>
void antialias_positions_gradient(TensorView<const double, 3> sums, TensorView<const T, 3> positions,
                                  TensorView<const int32_t, 2> faces, TensorView<const int64_t, 1> corners,
                                  TensorView<const int32_t, 1> starts, TensorView<T, 3> out, int64_t stream);

}  // namespace trellis::cuda
