#pragma once
#include "tensor_view.h"

namespace trellis::cuda {

using Coords = TensorView<const int32_t, 2>;  // [N, 4]: batch, x, y, z
using Slots = TensorView<int64_t, 2>;         // [capacity, 2]: 16 bytes for each slot of the hash table, zeros

// neighbors [N, kernel_size^3]: row of each neighbor or -1. Room to work in: slot_of and rows [N],
// counter [1], a zero.
void neighbor_map(Coords coords, int64_t kernel_size, Slots slots, TensorView<int32_t, 1> slot_of,
                  TensorView<int32_t, 1> rows, TensorView<int32_t, 1> counter, TensorView<int32_t, 2> neighbors,
                  int64_t stream);

// Coarse voxels in runs of 32 along z. keys, used [N]: of the runs in the order of their first appearance, at random
// within it; counts [2], zeros: becomes how many runs and how many coarse voxels there are. slot_of [N]: ~slot for the
// voxel that was the first in its coarse voxel, else slot.
void gather_runs(Coords coords, int64_t factor, Slots slots, TensorView<int32_t, 1> slot_of,
                 TensorView<int64_t, 1> keys, TensorView<int32_t, 1> used, TensorView<int32_t, 1> counts,
                 int64_t stream);
// sizes [runs]: coarse voxels of run used[order[i]].
void run_sizes(Slots slots, TensorView<const int32_t, 1> used, TensorView<const int64_t, 1> order,
               TensorView<int32_t, 1> sizes, int64_t stream);
// ends [runs]: cumulated sizes.
void write_coarse(Coords coords, int64_t factor, Slots slots, TensorView<const int32_t, 1> slot_of,
                  TensorView<const int32_t, 1> used, TensorView<const int64_t, 1> order,
                  TensorView<const int32_t, 1> ends, TensorView<int32_t, 2> coarse, TensorView<int32_t, 1> inverse,
                  int64_t stream);

void subdivide_coords(Coords coords, TensorView<int32_t, 2> children, int64_t stream);

// neighbors [N, 27] -> children [8 N, 27].
void subdivided_neighbor_map(TensorView<const int32_t, 2> neighbors, TensorView<int32_t, 2> children, int64_t stream);

}  // namespace trellis::cuda
