#include "radiance_field.h"

#include <stdexcept>

#include "parallel.h"
#include "radiance_field_scene.h"

namespace trellis::cpu {

template <class T>
void render_radiance_field(const FieldTensors<T>& field, const FieldCameras& cameras, const FieldOutputs<T>& out,
                           int threads) {
  const int64_t views = out.depths.size(0), height = out.depths.size(1), width = out.depths.size(2);
  const std::array<int64_t, 3> shape = out.depths.shape;
  if (out.colors.shape != std::array<int64_t, 4>{views, height, width, 3} || out.left.shape != shape ||
      out.medians.shape != shape || out.crossings.shape != shape)
    throw std::invalid_argument("images must have one shape");
  const FieldScene<T> scene(field, cameras, views, width, height, threads);
  const PackedField<T> packed = scene.packed();
  const LeafGridView grid = scene.grid();
  const int64_t across = (width + kFieldTile - 1) / kFieldTile, down = (height + kFieldTile - 1) / kFieldTile;
  parallel_for(views * across * down, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t view = tile / (across * down), place = tile % (across * down);
      const FieldImages<T> images{field.jitter.size(0) ? field.jitter.row(view) : nullptr,
                                  field.background.row(view),
                                  out.colors.row(view),
                                  out.depths.row(view),
                                  out.left.row(view),
                                  out.medians.row(view),
                                  out.crossings.row(view),
                                  nullptr,
                                  nullptr,
                                  nullptr};
      scene.kernels.march({&packed, &grid, &scene.cameras[view], &images, place % across * kFieldTile,
                           place / across * kFieldTile, nullptr, 0, nullptr});
    }
  });
}

void trace_voxels(TensorView<const double, 2> positions, const FieldCameras& cameras, TensorView<int32_t, 3> ids,
                  TensorView<double, 3> depths, int threads) {
  const int64_t height = ids.size(1), width = ids.size(2);
  if (depths.shape != ids.shape || cameras.extrinsics.size(0) != ids.size(0))
    throw std::invalid_argument("ids and depths must be [V, H, W]");
  const LeafGrid leaves(positions, {}, cameras.depth);
  const LeafGridView grid = leaves.view();
  const std::vector<FieldCamera> views = field_cameras(cameras, width, height);
  parallel_for(ids.size(0) * height, 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const FieldCamera& camera = views[row / height];
      for (int64_t x = 0; x < width; ++x) {
        const FieldRay ray = ray_of(camera, x, row % height);
        int32_t id = -1;
        double depth = 0;
        for_each_leaf(grid, camera, ray, [&](int32_t leaf, const int32_t*, double near, double far) {
          if (!(far > near)) return true;
          id = leaf;
          depth = near * ray.cosine;
          return false;
        });
        ids.data[row * width + x] = id;
        depths.data[row * width + x] = depth;
      }
    }
  });
}

#define TRELLIS_INSTANTIATE(T) \
  template void render_radiance_field<T>(const FieldTensors<T>&, const FieldCameras&, const FieldOutputs<T>&, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)
#undef TRELLIS_INSTANTIATE

}  // namespace trellis::cpu
