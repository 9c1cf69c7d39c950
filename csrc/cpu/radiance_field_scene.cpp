#include "radiance_field_scene.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cpu_features.h"
#include "parallel.h"

namespace trellis::cpu {
namespace {

void expect(bool condition, const char* text) {
  if (!condition) throw std::invalid_argument(text);
}

// False for NaN too.
template <class T>
bool usable_values(const T* values, int64_t count) {
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all &= std::abs(values[i]) <= T(1e9);
  return all;
}

}  // namespace

LeafGrid::LeafGrid(TensorView<const double, 2> positions, const std::vector<uint8_t>& usable, int64_t depth) {
  expect(depth >= 0 && depth <= 10, "depth must be in 0..10");
  expect(positions.size(1) == 3 && positions.size(0) < INT32_MAX / 64, "positions must be [N, 3], N below 2^25");
  extent_ = int32_t{1} << depth;
  blocks_per_side_ = std::max(extent_ >> 2, 1);
  blocks_.assign(int64_t{blocks_per_side_} * blocks_per_side_ * blocks_per_side_, -1);
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
    const int64_t side = blocks_per_side_;
    int32_t& block = blocks_[((cell[0] >> 2) * side + (cell[1] >> 2)) * side + (cell[2] >> 2)];
    if (block < 0) {
      block = static_cast<int32_t>(leaves_.size() / 64);
      leaves_.resize(leaves_.size() + 64, -1);
    }
    int32_t& leaf = leaves_[int64_t{block} * 64 + (((cell[0] & 3) << 4) | ((cell[1] & 3) << 2) | (cell[2] & 3))];
    if (leaf < 0) leaf = static_cast<int32_t>(row);
  }
}

std::vector<FieldCamera> field_cameras(const FieldCameras& cameras, int64_t width, int64_t height) {
  const int64_t views = cameras.extrinsics.size(0);
  expect(cameras.extrinsics.size(1) == 4 && cameras.extrinsics.size(2) == 4, "extrinsics must be [V, 4, 4]");
  expect(cameras.intrinsics.shape == std::array<int64_t, 3>{views, 3, 3}, "intrinsics must be [V, 3, 3]");
  expect(cameras.box.size(0) == 6, "aabb must have six numbers");
  expect(cameras.depth >= 0 && cameras.depth <= 10, "depth must be in 0..10");
  const double* const b = cameras.box.data;
  const FieldBox box{{b[0], b[1], b[2]}, {b[3], b[4], b[5]}};
  std::vector<FieldCamera> result(views);
  for (int64_t view = 0; view < views; ++view) {
    result[view] = camera_of(cameras.extrinsics.row(view), cameras.intrinsics.row(view), box,
                             int64_t{1} << cameras.depth, width, height);
  }
  return result;
}

template <class T>
FieldKernels<T> field_kernels() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512)
    return {field_avx512::rank_multiple, field_avx512::march, field_avx512::leaf_gradient};
  if (instruction_set() == InstructionSet::avx2)
    return {field_avx2::rank_multiple, field_avx2::march, field_avx2::leaf_gradient};
#endif
  return {field_baseline::rank_multiple, field_baseline::march, field_baseline::leaf_gradient};
}

template <class T>
FieldScene<T>::FieldScene(const FieldTensors<T>& field, const FieldCameras& cameras, int64_t views, int64_t width,
                          int64_t height, int threads)
    : kernels(field_kernels<T>()),
      cameras(field_cameras(cameras, width, height)),
      usable(pack(field, threads)),
      grid_(field.positions, usable, cameras.depth) {
  expect(cameras.extrinsics.size(0) == views, "extrinsics and images must have one number of views");
  expect(width * height <= INT32_MAX, "an image must have fewer than 2^31 pixels");
  expect(field.background.shape == std::array<int64_t, 2>{views, 3}, "background must be [V, 3]");
  expect(field.jitter.size(0) == 0 || field.jitter.shape == std::array<int64_t, 3>{views, height, width},
         "jitter must be [V, H, W]");
  packed_.step = 0.5 / static_cast<double>(packed_.entries) * (cameras.box.data[3] / (int64_t{1} << cameras.depth));
}

template <class T>
std::vector<uint8_t> FieldScene<T>::pack(const FieldTensors<T>& field, int threads) {
  const int64_t count = field.trivec.size(0), rank = field.trivec.size(1), entries = field.trivec.size(3);
  expect(field.positions.size(0) == count && field.positions.size(1) == 3, "positions must be [N, 3]");
  expect(field.trivec.size(2) == 3 && entries >= 2 && entries < (1 << 20), "trivec must be [N, R, 3, D]");
  expect(field.density.shape == std::array<int64_t, 2>{count, rank}, "density must be [N, R]");
  expect(field.features.shape == std::array<int64_t, 3>{count, rank, 3}, "features must be [N, R, 3]");
  const int64_t multiple = kernels.rank_multiple(T(0)), padded = (rank + multiple - 1) / multiple * multiple;
  const int64_t stride = (3 * entries + 4) * padded, line = 64 / sizeof(T);
  storage_ = std::vector<T>(count * stride + line);
  T* const begin = storage_.data();
  const int64_t skip = (64 - reinterpret_cast<uintptr_t>(begin) % 64) % 64 / sizeof(T);
  packed_ = {begin + skip, stride, padded, entries, 0};
  std::vector<uint8_t> good(count);
  parallel_for(count, 64, threads, [&](int64_t from, int64_t to) {
    for (int64_t leaf = from; leaf < to; ++leaf) {
      const T* const trivec = field.trivec.row(leaf);
      const T* const density = field.density.row(leaf);
      const T* const features = field.features.row(leaf);
      good[leaf] = usable_values(trivec, rank * 3 * entries) && usable_values(density, rank) &&
                   usable_values(features, 3 * rank);
      T* const out = begin + skip + leaf * stride;
      for (int64_t r = 0; r < rank; ++r) {
        for (int64_t i = 0; i < 3 * entries; ++i) out[i * padded + r] = trivec[r * 3 * entries + i];
        T* const last = out + 3 * entries * padded + r;
        last[0] = density[r];
        for (int k = 0; k < 3; ++k) last[(k + 1) * padded] = features[3 * r + k] * T(kDegreeZero);
      }
    }
  });
  return good;
}

template FieldKernels<float> field_kernels();
template FieldKernels<double> field_kernels();
template class FieldScene<float>;
template class FieldScene<double>;

}  // namespace trellis::cpu
