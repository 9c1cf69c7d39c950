// The cells of a grid that triangles touch.
#pragma once
#include "tensor_view.h"

namespace trellis::cpu {

// Sets the bits [resolution, resolution, words of 64 along z] of the touched cells and returns how many are set.
// Throws std::invalid_argument if a face has a vertex outside [0, V) or bits has another shape.
int64_t voxelize_mesh(TensorView<const double, 2> vertices, TensorView<const int32_t, 2> faces, int64_t resolution,
                      TensorView<int64_t, 3> bits, int threads);

// The coordinates of the set bits, in lexicographic order.
void list_voxels(TensorView<const int64_t, 3> bits, TensorView<int32_t, 2> coords);

}  // namespace trellis::cpu
