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

// Where the entries of each slot begin in the lists of all ranks: firsts [V * G].
void first_entries(TensorView<const int64_t, 2> order, TensorView<const int64_t, 1> ends, TensorView<int64_t, 1> firsts,
                   int64_t stream);

// Blends, for every (view, tile) t, the entries permutation[starts[t], starts[t + 1]) of slots, in that order.
// `resume`: the outputs hold what earlier calls left (a finished pixel has its transmittance negated); `finish`: no
// call follows. Colors are [1, G, C], or [V, G, C].
void blend_tiles(TensorView<const float, 2> splats, TensorView<const float, 3> colors,
                 TensorView<const int32_t, 1> slots, TensorView<const int64_t, 1> permutation,
                 TensorView<const int32_t, 1> starts, TensorView<const float, 2> background, bool resume, bool finish,
                 TensorView<float, 4> out_colors, TensorView<float, 3> out_depths,
                 TensorView<float, 3> out_transmittances, TensorView<int32_t, 3> out_last,
                 TensorView<float, 3> out_medians, int64_t stream);

// The gradients of blend_tiles for the channels from first_channel on, 3 of them if C is at most 3, else 7 (with the
// first ones: of depths and transmittances). Of the lists, base entries in earlier parts precede these; the last part
// comes first. `running` [2, V, H, W], or empty if there is one part only: each pixel's state between the parts,
// there if `resume`. A record is written for each entry that contributes, and its `given`, which must be 0, set to 1:
// of the shares s of d loss / d log alpha over dx, dy = center - pixel the sums of s, s dx, s dy, s dx dx, s dx dy,
// s dy dy; then gradients of 3 or 7 channels and of the depth.
void blend_tiles_gradient(TensorView<const float, 2> splats, TensorView<const float, 3> colors,
                          TensorView<const int32_t, 1> slots, TensorView<const int64_t, 1> permutation,
                          TensorView<const int32_t, 1> starts, TensorView<const int64_t, 1> firsts, int64_t base,
                          TensorView<const float, 2> background, TensorView<const float, 4> grad_colors,
                          TensorView<const float, 3> grad_depths, TensorView<const float, 3> grad_transmittances,
                          TensorView<const float, 3> transmittances, TensorView<const int32_t, 3> last, bool resume,
                          TensorView<float, 4> running, int64_t first_channel, TensorView<float, 2> records,
                          TensorView<uint8_t, 1> given, int64_t stream);

// Adds up the records of each slot that has entries among these: moments [V * G, 8], the six sums, then the gradient of
// the depth (added to what is there from the second channels on), and gradients of colors from first_channel on.
void sum_entries(TensorView<const float, 2> records, TensorView<const uint8_t, 1> given,
                 TensorView<const int64_t, 1> firsts, TensorView<const int32_t, 2> counts, int64_t base,
                 int64_t first_channel, TensorView<float, 2> moments, TensorView<float, 3> color_gradients,
                 int64_t stream);

// The gradients of project_gaussians from these moments; `resume`: added to what is there. Those of the cameras are
// sums over 32 Gaussians each, [ceil(G / 32), V, 16]: three rows of the extrinsic matrix, then fx, fy, cx, cy.
void project_gaussians_gradient(TensorView<const float, 2> means, TensorView<const float, 2> quats,
                                TensorView<const float, 2> scales, TensorView<const float, 1> opacities,
                                TensorView<const float, 3> extrinsics, TensorView<const float, 3> intrinsics,
                                int64_t width, int64_t height, double kernel_size, TensorView<const int32_t, 2> counts,
                                TensorView<const float, 2> splats, TensorView<const float, 2> moments, bool resume,
                                TensorView<float, 2> mean_gradients, TensorView<float, 2> quat_gradients,
                                TensorView<float, 2> scale_gradients, TensorView<float, 1> opacity_gradients,
                                TensorView<float, 3> camera_gradients, int64_t stream);

}  // namespace trellis::cuda
