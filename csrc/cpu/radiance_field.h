// Strivec radiance fields, see trellis_kernels/radiance_field. radiance_field.cpp prepares the field and hands out
// tiles of pixels; rays are marched by kernels compiled once per instruction set.
#pragma once
#include <cstdint>

#include "tensor_view.h"

namespace trellis::cpu {

struct FieldCameras {
  TensorView<const double, 3> extrinsics, intrinsics;
  TensorView<const double, 1> box;  // origin and size
  int64_t depth;
};

template <class T>
struct FieldTensors {
  TensorView<const double, 2> positions;
  TensorView<const T, 4> trivec;
  TensorView<const T, 2> density;
  TensorView<const T, 3> features;
  TensorView<const T, 2> background;
  TensorView<const T, 3> jitter;  // no rows: 0
};

template <class T>
struct FieldOutputs {
  TensorView<T, 4> colors;
  TensorView<T, 3> depths, left, medians;
  TensorView<int32_t, 3> crossings;
};

template <class T>
struct FieldOutputGradients {
  TensorView<const T, 4> colors;
  TensorView<const T, 3> depths, left;
};

template <class T>
struct FieldGradients {
  TensorView<T, 4> trivec;
  TensorView<T, 2> density;
  TensorView<T, 3> features;
  TensorView<T, 2> background;
};

template <class T>
void render_radiance_field(const FieldTensors<T>& field, const FieldCameras& cameras, const FieldOutputs<T>& out,
                           int threads);

// Pictures are taken in batches of 65536 rays. For each, every ray notes what it meets in which leaf, in one fixed
// order, and then every leaf adds up what was noted for it: sums do not depend on the number of threads.
template <class T>
void render_radiance_field_gradient(const FieldOutputGradients<T>& gradients, const FieldTensors<T>& field,
                                    const FieldCameras& cameras, const FieldGradients<T>& out, int threads);

void trace_voxels(TensorView<const double, 2> positions, const FieldCameras& cameras, TensorView<int32_t, 3> ids,
                  TensorView<double, 3> depths, int threads);

}  // namespace trellis::cpu
