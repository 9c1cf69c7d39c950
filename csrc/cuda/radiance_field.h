// Strivec radiance fields, see trellis_kernels/radiance_field. Everything here is float32 but geometry, which is
// float64.
#pragma once
#include <array>

#include "tensor_view.h"

namespace trellis::cuda {

constexpr int kFieldRun = 32;  // samples of one leaf that a ray takes in one run, at most

using FieldVector = TensorView<const float, 2>;
using FieldImage = TensorView<const float, 3>;
using FieldColors = TensorView<const float, 4>;
using FieldPositions = TensorView<const int32_t, 2>;

// Per leaf [3, D, rank], then density [rank] and features [3, rank] times C0, where `rank` is R rounded up to a
// multiple of 4, the rest zero. usable: 1 beforehand, 0 for leaves with a value that is not finite or above 1e9 in
// magnitude.
void pack_field(TensorView<const float, 4> trivec, TensorView<const float, 2> density,
                TensorView<const float, 3> features, TensorView<float, 2> packed, TensorView<int32_t, 1> usable,
                int64_t stream);

// blocks [2^depth / 4]^3 and leaves [M, 64]: which leaf fills a cell, see LeafGridView; box: origin and size.
// jitter may have no rows. crossings: runs of each ray.
void march_field(FieldVector packed, TensorView<const int32_t, 1> blocks, FieldPositions leaves,
                 TensorView<const double, 3> extrinsics, TensorView<const double, 3> intrinsics,
                 std::array<double, 6> box, int64_t depth, int64_t entries, FieldVector background, FieldImage jitter,
                 TensorView<float, 4> colors, TensorView<float, 3> depths, TensorView<float, 3> left,
                 TensorView<float, 3> medians, TensorView<int32_t, 3> crossings, int64_t stream);

// The first half of a gradient. Each ray writes its runs to its part of the lists: ends[i] is where the part of pixel i
// ends and that of pixel i + 1 begins. keys: the leaf; runs: pixel, samples, cell (10 bits per axis), transmittance
// before; firsts: number of the first sample; laters: what lies behind the run is worth. left: transmittance.
void note_field(FieldVector packed, TensorView<const int32_t, 1> blocks, FieldPositions leaves,
                TensorView<const double, 3> extrinsics, TensorView<const double, 3> intrinsics,
                std::array<double, 6> box, int64_t depth, int64_t entries, FieldVector background, FieldImage jitter,
                FieldColors colors_gradient, FieldImage depths_gradient, FieldImage left_gradient,
                TensorView<const int64_t, 1> ends, TensorView<int32_t, 1> keys, TensorView<int32_t, 2> runs,
                TensorView<double, 1> firsts, TensorView<float, 1> laters, TensorView<float, 3> left, int64_t stream);

// The second half. A warp adds up the runs order[starts[i]], ..., order[starts[i + 1] - 1] of leaf i, and the earlier
// value of its gradient if `resume`.
void sum_field_gradient(FieldVector packed, TensorView<const double, 3> extrinsics,
                        TensorView<const double, 3> intrinsics, std::array<double, 6> box, int64_t depth,
                        FieldImage jitter, FieldColors colors_gradient, FieldImage depths_gradient,
                        TensorView<const int64_t, 1> order, TensorView<const int32_t, 1> starts, FieldPositions runs,
                        TensorView<const double, 1> firsts, TensorView<const float, 1> laters, bool resume,
                        TensorView<float, 4> trivec_gradient, TensorView<float, 2> density_gradient,
                        TensorView<float, 3> features_gradient, int64_t stream);

void trace_voxels(TensorView<const int32_t, 1> blocks, FieldPositions leaves, TensorView<const double, 3> extrinsics,
                  TensorView<const double, 3> intrinsics, std::array<double, 6> box, int64_t depth,
                  TensorView<int32_t, 3> ids, TensorView<double, 3> depths, int64_t stream);

}  // namespace trellis::cuda
