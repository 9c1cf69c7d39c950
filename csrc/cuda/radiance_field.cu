// Marching, one thread per ray. A warp has 8 x 4 neighboring pixels, whose rays meet the same leaves at about the same
// time, so that factors come from the first-level cache.
#include "radiance_field.cuh"

namespace trellis::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTileWidth = 16, kTileHeight = 8;
constexpr float kStop = 0.001f;

struct Pixel {
  int64_t view, x, y;
  bool inside;
};

// Of 4 warps of 8 x 4 pixels, two beside each other.
__device__ Pixel pixel_of(int64_t height, int64_t width) {
  const int64_t across = (width + kTileWidth - 1) / kTileWidth, down = (height + kTileHeight - 1) / kTileHeight;
  const int64_t tile = blockIdx.x % (across * down);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Pixel pixel{blockIdx.x / (across * down), tile % across * kTileWidth + (warp % 2) * 8 + lane % 8,
              tile / across * kTileHeight + warp / 2 * 4 + lane / 8, false};
  pixel.inside = pixel.x < width && pixel.y < height;
  return pixel;
}

unsigned tiles(int64_t views, int64_t height, int64_t width) {
  const int64_t across = (width + kTileWidth - 1) / kTileWidth, down = (height + kTileHeight - 1) / kTileHeight;
  return blocks(views * across * down, 1);
}

__global__ void pack_kernel(const float* trivec, const float* density, const float* features, int rank, int padded,
                            int entries, int64_t count, float* packed, int32_t* usable) {
  const int64_t stride = int64_t{3 * entries + 4} * padded;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count * stride) return;
  const int64_t leaf = i / stride;
  const int row = static_cast<int>(i % stride) / padded, r = static_cast<int>(i % stride) % padded;
  float value = 0;
  if (r < rank) {
    const int feature = row - 3 * entries - 1;
    if (row < 3 * entries)
      value = trivec[(leaf * rank + r) * 3 * entries + row];
    else
      value = feature < 0 ? density[leaf * rank + r] : features[(leaf * rank + r) * 3 + feature];
    if (!(value <= 1e9f && value >= -1e9f)) usable[leaf] = 0;  // NaN too; whoever writes, it is the same
    if (feature >= 0) value *= 0.28209479f;
  }
  packed[i] = value;
}

struct Images {
  const float* background;
  float *colors, *depths, *left, *medians;
  int32_t* crossings;
};

// What a ray notes for the gradient.
struct Notes {
  const float *background, *colors_gradient, *depths_gradient, *left_gradient;
  const int64_t* ends;
  int64_t capacity;
  int32_t* keys;
  int4* runs;
  double* firsts;
  float *laters, *left;
};

template <bool kNoting>
__global__ void __launch_bounds__(kThreads, 3)
    march_kernel(FieldScene scene, LeafGridView grid, Images images, Notes notes) {
  const Pixel at = pixel_of(scene.height, scene.width);
  if (!at.inside) return;
  const int64_t pixel = (at.view * scene.height + at.y) * scene.width + at.x;
  const FieldCamera camera = camera_of_view(scene, at.view);
  const FieldRay ray = ray_of(camera, at.x, at.y);
  const double jitter = jitter_of(scene, pixel);
  float by_red = 0, by_green = 0, by_blue = 0, by_depth = 0;
  int64_t begin = 0, end = 0;
  if (kNoting) {
    by_red = notes.colors_gradient[3 * pixel];
    by_green = notes.colors_gradient[3 * pixel + 1];
    by_blue = notes.colors_gradient[3 * pixel + 2];
    by_depth = notes.depths_gradient[pixel];
    begin = pixel ? notes.ends[pixel - 1] : 0;
    end = notes.ends[pixel];
    DEVICE_CHECK(begin >= 0 && begin <= end && end <= notes.capacity, "crossings must be those of the forward");
  }
  float passed = 1, red = 0, green = 0, blue = 0, depth = 0, median = 0;
  int32_t crossings = 0;
  int64_t noted = begin;
  for_each_leaf(grid, camera, ray, [&](int32_t leaf, const int32_t* cell, double near, double far) {
    const double last = ceil(far / scene.step - jitter);
    const float* const factors = scene.packed + leaf * scene.stride;
    for (double first = ceil(near / scene.step - jitter); first < last && passed >= kStop; first += kFieldRun) {
      const int count = last - first < kFieldRun ? static_cast<int>(last - first) : kFieldRun;
      const Run run = run_of(scene, camera, ray, cell, first, jitter);
      const float before = passed;
      float worth = 0;
      int taken = 0;
      for (; taken < count && passed >= kStop; ++taken) {
        const Shade shade = shade_of(scene, factors, place_of(scene, run, taken));
        const float share = passed * shade.alpha, z = run.depth + run.depth_step * static_cast<float>(taken);
        const float behind = passed * (1 - shade.alpha);
        if (kNoting) {
          worth +=
              share * (by_red * shade.color[0] + by_green * shade.color[1] + by_blue * shade.color[2] + by_depth * z);
        } else {
          red += share * shade.color[0];
          green += share * shade.color[1];
          blue += share * shade.color[2];
          depth += share * z;
          median = passed >= 0.5f && behind < 0.5f ? z : median;
        }
        passed = behind;
      }
      ++crossings;
      if (kNoting && noted < end) {
        notes.keys[noted] = leaf;
        notes.runs[noted] =
            make_int4(static_cast<int>(pixel), taken, cell[0] | cell[1] << 10 | cell[2] << 20, __float_as_int(before));
        notes.firsts[noted] = first;
        notes.laters[noted] = worth;
        ++noted;
      }
    }
    return passed >= kStop;
  });
  const float* const background = (kNoting ? notes.background : images.background) + 3 * at.view;
  if (!kNoting) {
    images.colors[3 * pixel] = red + passed * background[0];
    images.colors[3 * pixel + 1] = green + passed * background[1];
    images.colors[3 * pixel + 2] = blue + passed * background[2];
    images.depths[pixel] = depth;
    images.left[pixel] = passed;
    images.medians[pixel] = median;
    images.crossings[pixel] = crossings;
    return;
  }
  notes.left[pixel] = passed;
  float later = passed * (by_red * background[0] + by_green * background[1] + by_blue * background[2] +
                          notes.left_gradient[pixel]);
  while (noted-- > begin) {
    const float worth = notes.laters[noted];
    notes.laters[noted] = later;
    later += worth;
  }
}

__global__ void trace_kernel(FieldScene scene, LeafGridView grid, int32_t* ids, double* depths) {
  const Pixel at = pixel_of(scene.height, scene.width);
  if (!at.inside) return;
  const FieldCamera camera = camera_of_view(scene, at.view);
  const FieldRay ray = ray_of(camera, at.x, at.y);
  int32_t id = -1;
  double depth = 0;
  for_each_leaf(grid, camera, ray, [&](int32_t leaf, const int32_t*, double near, double far) {
    if (!(far > near)) return true;
    id = leaf;
    depth = near * ray.cosine;
    return false;
  });
  const int64_t pixel = (at.view * scene.height + at.y) * scene.width + at.x;
  ids[pixel] = id;
  depths[pixel] = depth;
}

}  // namespace

void pack_field(TensorView<const float, 4> trivec, TensorView<const float, 2> density,
                TensorView<const float, 3> features, TensorView<float, 2> packed, TensorView<int32_t, 1> usable,
                int64_t stream) {
  const int64_t count = trivec.size(0), rank = trivec.size(1), entries = trivec.size(3), padded = (rank + 3) / 4 * 4;
  if (packed.shape != std::array<int64_t, 2>{count, (3 * entries + 4) * padded} || usable.size(0) != count ||
      density.shape != std::array<int64_t, 2>{count, rank} || features.shape != std::array<int64_t, 3>{count, rank, 3})
    throw std::invalid_argument("density, features, packed and usable must fit trivec");
  launch({"pack_field", blocks(packed.numel(), kThreads), kThreads, stream}, pack_kernel, trivec.data, density.data,
         features.data, static_cast<int>(rank), static_cast<int>(padded), static_cast<int>(entries), count, packed.data,
         usable.data);
}

void march_field(FieldVector packed, TensorView<const int32_t, 1> blocks, FieldPositions leaves,
                 TensorView<const double, 3> extrinsics, TensorView<const double, 3> intrinsics,
                 std::array<double, 6> box, int64_t depth, int64_t entries, FieldVector background, FieldImage jitter,
                 TensorView<float, 4> colors, TensorView<float, 3> depths, TensorView<float, 3> left,
                 TensorView<float, 3> medians, TensorView<int32_t, 3> crossings, int64_t stream) {
  const int64_t height = depths.size(1), width = depths.size(2);
  const FieldScene scene = field_scene(packed, extrinsics, intrinsics, box, depth, entries, jitter, height, width);
  const Images images{background.data, colors.data, depths.data, left.data, medians.data, crossings.data};
  launch({"march_field", tiles(extrinsics.size(0), height, width), kThreads, stream}, march_kernel<false>, scene,
         field_grid(blocks, leaves, depth), images, Notes{});
}

void note_field(FieldVector packed, TensorView<const int32_t, 1> blocks, FieldPositions leaves,
                TensorView<const double, 3> extrinsics, TensorView<const double, 3> intrinsics,
                std::array<double, 6> box, int64_t depth, int64_t entries, FieldVector background, FieldImage jitter,
                FieldColors colors_gradient, FieldImage depths_gradient, FieldImage left_gradient,
                TensorView<const int64_t, 1> ends, TensorView<int32_t, 1> keys, TensorView<int32_t, 2> runs,
                TensorView<double, 1> firsts, TensorView<float, 1> laters, TensorView<float, 3> left, int64_t stream) {
  const int64_t height = left.size(1), width = left.size(2);
  const FieldScene scene = field_scene(packed, extrinsics, intrinsics, box, depth, entries, jitter, height, width);
  const Notes notes{background.data,
                    colors_gradient.data,
                    depths_gradient.data,
                    left_gradient.data,
                    ends.data,
                    keys.size(0),
                    keys.data,
                    reinterpret_cast<int4*>(runs.data),
                    firsts.data,
                    laters.data,
                    left.data};
  launch({"note_field", tiles(extrinsics.size(0), height, width), kThreads, stream}, march_kernel<true>, scene,
         field_grid(blocks, leaves, depth), Images{}, notes);
}

void trace_voxels(TensorView<const int32_t, 1> blocks, FieldPositions leaves, TensorView<const double, 3> extrinsics,
                  TensorView<const double, 3> intrinsics, std::array<double, 6> box, int64_t depth,
                  TensorView<int32_t, 3> ids, TensorView<double, 3> depths, int64_t stream) {
  const int64_t height = ids.size(1), width = ids.size(2), entries = 2;
  const FieldVector none{nullptr, {0, (3 * entries + 4) * 4}};
  const FieldScene scene = field_scene(none, extrinsics, intrinsics, box, depth, entries, {}, height, width);
  launch({"trace_voxels", tiles(ids.size(0), height, width), kThreads, stream}, trace_kernel, scene,
         field_grid(blocks, leaves, depth), ids.data, depths.data);
}

}  // namespace trellis::cuda
