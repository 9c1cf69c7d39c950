#pragma once
#include "tensor_view.h"

namespace trellis::cuda {

// A slot is a Gaussian seen by one of V cameras: slot = view * G + index. What is known of it for drawing:
// splats [V * G, 8] float: center x, y; the exponent q = xx dx^2 + xy dx dy + yy dy^2, alpha = opacity 2^-q; opacity;
// the q beyond which alpha is too small everywhere; depth. places [V * G, 4] int32: first tile x | y << 16, tiles
// across | down << 16, and which of these are reached, as 64 bits, row by row (0: all; so if there are more than 64).
// counts [V, G]: how many tiles are reached. sort_depths [V, G]: the depth, or infinity if none is.
void project_gaussians(TensorView<const float, 2> means, TensorView<const float, 2> quats,
                       TensorView<const float, 2> scales, TensorView<const float, 1> opacities,
                       TensorView<const float, 3> extrinsics, TensorView<const float, 3> intrinsics, int64_t width,
                       int64_t height, double kernel_size, TensorView<float, 2> splats, TensorView<int32_t, 2> places,
                       TensorView<int32_t, 2> counts, TensorView<float, 2> sort_depths, int64_t stream);

// The (view, tile) pairs of the Gaussians of ranks [begin, end), in rank order: tiles[i] = view * tiles per view +
// tile, slots[i]. Ranks run through the cameras, and in each through order [V, G], nearest first; ends [V * G] is the
// cumulative sum of counts in rank order.
void list_tiles(TensorView<const int32_t, 2> places, TensorView<const int64_t, 2> order,
                TensorView<const int64_t, 1> ends, int64_t begin, int64_t end, int64_t across, int64_t tiles_per_view,
                TensorView<int32_t, 1> tiles, TensorView<int32_t, 1> slots, int64_t stream);

// Blends, for every (view, tile) t, the entries permutation[starts[t], starts[t + 1]) of slots, in that order.
// Colors are [1, G, C] or [V, G, C]. `resume`: the outputs hold what earlier calls left (a finished pixel has its
// transmittance negated); `finish`: no call follows.
void blend_tiles(TensorView<const float, 2> splats, TensorView<const float, 3> colors,
                 TensorView<const int32_t, 1> slots, TensorView<const int64_t, 1> permutation,
                 TensorView<const int32_t, 1> starts, TensorView<const float, 2> background, bool resume, bool finish,
                 TensorView<float, 4> out_colors, TensorView<float, 3> out_depths,
                 TensorView<float, 3> out_transmittances, TensorView<int32_t, 3> out_last,
                 TensorView<float, 3> out_medians, int64_t stream);

}  // namespace trellis::cuda
