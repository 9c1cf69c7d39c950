#pragma once
#include "voxel_coords.h"

namespace trellis::cpu {

// codes [N]: batch * 8^bits + position on the curve. Throws for coordinates out of range.
void curve_codes(Coords coords, bool hilbert, bool transposed, int64_t bits, TensorView<int64_t, 1> codes, int threads);

// order [N]: the stable permutation that sorts by those codes.
void curve_order(Coords coords, bool hilbert, bool transposed, int64_t bits, TensorView<int64_t, 1> order, int threads);

}  // namespace trellis::cpu
