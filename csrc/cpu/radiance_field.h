// Strivec radiance fields, see trellis_kernels/radiance_field. radiance_field.cpp prepares the field and hands out
// tiles of pixels; rays are marched by kernels compiled once per instruction set.
#pragma once
#include <cstdint>
#include <vector>

#include "tensor_view.h"

namespace trellis::cpu {

// Which leaf fills each cell of the 2^depth grid: blocks of 4^3 cells, empty ones shared.
class LeafGrid {
 public:
  static constexpr int kBits = 2;
  static constexpr int32_t kBlockCells = 1 << (3 * kBits);

  // positions: in the unit cube; a leaf that is not usable (empty: all are), outside, or second in its cell is left
  // out.
  LeafGrid(TensorView<const double, 2> positions, const std::vector<uint8_t>& usable, int64_t depth);

  int32_t extent() const { return extent_; }
  int32_t blocks_per_side() const { return blocks_per_side_; }
  const int32_t* blocks() const { return blocks_.data(); }  // [blocks]^3, x slowest: number of a block, -1 if empty
  const int32_t* leaves() const { return leaves_.data(); }  // [number, 4, 4, 4]: row of the field, -1 if none

 private:
  int32_t extent_, blocks_per_side_;
  std::vector<int32_t> blocks_, leaves_;
};

}  // namespace trellis::cpu
