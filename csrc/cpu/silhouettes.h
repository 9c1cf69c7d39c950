// Neighboring triangles, and antialiasing of silhouettes with its gradient.
#pragma once
#include "tensor_view.h"

namespace trellis::cpu {

void face_neighbors(TensorView<const int32_t, 2> faces, TensorView<int32_t, 2> out, int threads);

template <class T>
struct DrawnMesh {
  TensorView<const int32_t, 3> ids;
  TensorView<const T, 3> depths, positions;
  TensorView<const int32_t, 2> faces, neighbors;
};

template <class T>
void antialias(TensorView<const T, 4> images, DrawnMesh<T> mesh, TensorView<T, 4> out, TensorView<T, 4> shares,
               TensorView<int32_t, 4> edges, int threads);

template <class T>
void antialias_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 4> images,
                        TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                        TensorView<const T, 4> shares, TensorView<const int32_t, 4> edges,
                        TensorView<T, 4> images_gradient, TensorView<T, 3> positions_gradient, int threads);

}  // namespace trellis::cpu
