// Features of pictures, gathered at points: backprojection.cpp projects and hands out work; rows of channels are added
// up by kernels compiled once per instruction set (backprojection_rows.inl.h).
#pragma once
#include "tensor_view.h"

namespace trellis::cpu {

// Adds the samples of these views to out [N, C] and counts [N]. With winners [N, C]: keeps the largest sample instead,
// and where it came from (the index of the view, plus first_view). Empty winners: the sum. The depths count only if
// has_depths. The points are visited in the given order, a permutation: in good ones neighbors see the same pixels.
template <class T>
void backproject(TensorView<const T, 4> features, TensorView<const double, 2> positions,
                 TensorView<const int64_t, 1> order, TensorView<const double, 3> extrinsics,
                 TensorView<const double, 3> intrinsics, TensorView<const double, 3> depths, bool has_depths,
                 double tolerance, int64_t first_view, TensorView<T, 2> out, TensorView<int32_t, 1> counts,
                 TensorView<int32_t, 2> winners, int threads);

// out_gradient, divided by the counts already, to out [V, H, W, C]. It and the winners (or [0, 0, 0]) are [B, N, D]: in
// blocks of D channels, so that neighbors of one block lie side by side; B D is C or more.
template <class T>
void backproject_gradient(TensorView<const T, 3> out_gradient, TensorView<const int32_t, 3> winners,
                          TensorView<const double, 2> positions, TensorView<const double, 3> extrinsics,
                          TensorView<const double, 3> intrinsics, TensorView<const double, 3> depths, bool has_depths,
                          double tolerance, int64_t first_view, TensorView<T, 4> out, int threads);

}  // namespace trellis::cpu
