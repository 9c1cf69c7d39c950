#pragma once
#include "tensor_view.h"

namespace trellis::cuda {

// codes [N]: batch * 8^bits + position on the curve.
void curve_codes(TensorView<const int32_t, 2> coords, bool hilbert, bool transposed, int64_t bits,
                 TensorView<int64_t, 1> codes, int64_t stream);

}  // namespace trellis::cuda
