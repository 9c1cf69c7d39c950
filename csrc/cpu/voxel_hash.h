#pragma once
#include "voxel_coords.h"

namespace trellis::cpu {

// neighbors [N, kernel_size^3]: row of each neighbor or -1. Throws for coordinates out of range and repeated voxels.
void neighbor_map(Coords coords, int64_t kernel_size, TensorView<int32_t, 2> neighbors, int threads);

// Writes the M distinct coarse voxels to the first rows of `coarse` [N, 4] in lexicographic order; returns M.
int64_t coarsen(Coords coords, int64_t factor, TensorView<int32_t, 2> coarse, TensorView<int32_t, 1> inverse,
                int threads);

void subdivide_coords(Coords coords, TensorView<int32_t, 2> children, int threads);

// neighbors [N, 27] -> children [8 N, 27].
void subdivided_neighbor_map(TensorView<const int32_t, 2> neighbors, TensorView<int32_t, 2> children, int threads);

}  // namespace trellis::cpu
