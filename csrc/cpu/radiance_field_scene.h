// What marching needs of a field and its cameras: the grid of leaves, packed factors, and the kernels of this CPU.
#pragma once
#include <vector>

#include "radiance_field.h"
#include "radiance_field_march.h"

namespace trellis::cpu {

// Which leaf fills each cell of the 2^depth grid: blocks of 4^3 cells, empty ones shared.
class LeafGrid {
 public:
  // positions: in the unit cube. A leaf that is not usable (none listed: all are), outside, or second in its cell is
  // left out.
  LeafGrid(TensorView<const double, 2> positions, const std::vector<uint8_t>& usable, int64_t depth);

  LeafGridView view() const { return {blocks_.data(), leaves_.data(), extent_, blocks_per_side_}; }

 private:
  int32_t extent_, blocks_per_side_;
  std::vector<int32_t> blocks_;  // x slowest: number of a block, -1 if empty
  std::vector<int32_t> leaves_;  // [number, 4, 4, 4]: row of the field, -1 if none
};

std::vector<FieldCamera> field_cameras(const FieldCameras& cameras, int64_t width, int64_t height);

template <class T>
struct FieldKernels {
  int64_t (*rank_multiple)(T);
  int64_t (*march)(const MarchJob<T>&);
  void (*leaf_gradient)(const LeafGradientJob<T>&);
};

template <class T>
FieldKernels<T> field_kernels();

// The factors of every leaf next to each other.
template <class T>
class FieldScene {
  std::vector<T> storage_;  // first: filled while the others are made
  PackedField<T> packed_;

 public:
  FieldScene(const FieldTensors<T>& field, const FieldCameras& cameras, int64_t views, int64_t width, int64_t height,
             int threads);

  FieldKernels<T> kernels;
  std::vector<FieldCamera> cameras;
  std::vector<uint8_t> usable;

  PackedField<T> packed() const { return packed_; }
  LeafGridView grid() const { return grid_.view(); }

 private:
  std::vector<uint8_t> pack(const FieldTensors<T>& field, int threads);

  LeafGrid grid_;
};

constexpr double kDegreeZero = 0.28209479177387814;  // the spherical harmonic of degree 0

}  // namespace trellis::cpu
