#include "radiance_field.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace trellis::cpu {

LeafGrid::LeafGrid(TensorView<const double, 2> positions, const std::vector<uint8_t>& usable, int64_t depth) {
  if (depth < 0 || depth > 10) throw std::invalid_argument("depth must be in 0..10");
  extent_ = int32_t{1} << depth;
  blocks_per_side_ = std::max(extent_ >> kBits, 1);
  blocks_.assign(int64_t{blocks_per_side_} * blocks_per_side_ * blocks_per_side_, -1);
  constexpr int32_t kMask = (1 << kBits) - 1;
  for (int64_t row = 0; row < positions.size(0); ++row) {
    int32_t cell[3];
    bool inside = usable.empty() || usable[row];
    for (int axis = 0; axis < 3; ++axis) {
      const double place = std::floor(positions.data[3 * row + axis] * extent_);
      const bool fits = place >= 0 && place < extent_;  // false for NaN
      cell[axis] = fits ? static_cast<int32_t>(place) : 0;
      inside = inside && fits;
    }
    if (!inside) continue;
    int32_t& block = blocks_[(int64_t{cell[0] >> kBits} * blocks_per_side_ + (cell[1] >> kBits)) * blocks_per_side_ +
                             (cell[2] >> kBits)];
    if (block < 0) {
      block = static_cast<int32_t>(leaves_.size() / kBlockCells);
      leaves_.resize(leaves_.size() + kBlockCells, -1);
    }
    int32_t& leaf = leaves_[int64_t{block} * kBlockCells +
                            ((((cell[0] & kMask) << kBits) + (cell[1] & kMask)) << kBits) + (cell[2] & kMask)];
    if (leaf < 0) leaf = static_cast<int32_t>(row);
  }
}

}  // namespace trellis::cpu
