// Triangle rasterization. mesh_raster.cpp finds the triangle of each pixel, mesh_raster_gradient.cpp holds
// interpolation and the gradients.
#pragma once
#include "tensor_view.h"

namespace trellis::cpu {

template <class T>
struct RasterizedMesh {
  TensorView<int32_t, 3> ids;
  TensorView<T, 4> barycentrics;  // [B, H, W, 2]
  TensorView<T, 3> depths;
  TensorView<T, 4> derivatives;  // [B, H, W, 4]
};

// An earlier layer, or tensors without elements.
template <class T>
struct LayerInFront {
  TensorView<const int32_t, 3> ids;
  TensorView<const T, 3> depths;
};

template <class T>
void rasterize_mesh(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces, LayerInFront<T> behind,
                    RasterizedMesh<T> out, int threads);

template <class T>
void rasterize_mesh_gradient(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                             TensorView<const int32_t, 3> ids, TensorView<const T, 4> barycentrics_gradient,
                             TensorView<const T, 3> depths_gradient, TensorView<T, 3> out, int threads);

template <class T>
void interpolate(TensorView<const T, 3> attributes, TensorView<const int32_t, 2> faces,
                 TensorView<const int32_t, 3> ids, TensorView<const T, 4> barycentrics, TensorView<T, 4> out,
                 int threads);

template <class T>
void interpolate_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 3> attributes,
                          TensorView<const int32_t, 2> faces, TensorView<const int32_t, 3> ids,
                          TensorView<const T, 4> barycentrics, TensorView<T, 3> attributes_gradient,
                          TensorView<T, 4> barycentrics_gradient, int threads);

}  // namespace trellis::cpu
