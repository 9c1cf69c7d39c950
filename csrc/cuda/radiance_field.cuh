// What the forward and the gradient of a radiance field share: where samples lie in a leaf, and what they are worth.
#pragma once
#include "field_ray.h"
#include "launch.h"
#include "radiance_field.h"

namespace trellis::cuda {

struct FieldScene {
  const float* packed;
  int64_t stride;     // per leaf
  int rank, entries;  // rank: padded
  double step;        // between samples, world units
  FieldBox box;
  const double *extrinsics, *intrinsics;
  const float* jitter;  // or null
  int extent;
  int64_t height, width;
};

inline FieldScene field_scene(FieldVector packed, TensorView<const double, 3> extrinsics,
                              TensorView<const double, 3> intrinsics, const std::array<double, 6>& box, int64_t depth,
                              int64_t entries, FieldImage jitter, int64_t height, int64_t width) {
  const int64_t views = extrinsics.size(0), rank = packed.size(1) / (3 * entries + 4);
  if (packed.size(1) != rank * (3 * entries + 4) || rank % 4 != 0 || entries < 2 || entries > 1024)
    throw std::invalid_argument("packed must be [N, (3 D + 4) rank]");
  if (depth < 0 || depth > 10) throw std::invalid_argument("depth must be in 0..10");
  if (intrinsics.size(0) != views || (jitter.size(0) && jitter.shape != std::array<int64_t, 3>{views, height, width}))
    throw std::invalid_argument("intrinsics and jitter must be for every view");
  if (views * height * width > INT32_MAX) throw std::invalid_argument("there must be fewer than 2^31 pixels");
  FieldScene scene{packed.data,
                   packed.size(1),
                   static_cast<int>(rank),
                   static_cast<int>(entries),
                   0.5 / static_cast<double>(entries) * (box[3] / static_cast<double>(int64_t{1} << depth)),
                   {},
                   extrinsics.data,
                   intrinsics.data,
                   jitter.size(0) ? jitter.data : nullptr,
                   1 << depth,
                   height,
                   width};
  for (int axis = 0; axis < 3; ++axis) {
    scene.box.low[axis] = box[axis];
    scene.box.size[axis] = box[3 + axis];
  }
  return scene;
}

inline LeafGridView field_grid(TensorView<const int32_t, 1> blocks, FieldPositions leaves, int64_t depth) {
  if (depth < 0 || depth > 10) throw std::invalid_argument("depth must be in 0..10");
  const int32_t extent = 1 << depth, side = extent > 4 ? extent / 4 : 1;
  if (blocks.size(0) != int64_t{side} * side * side || leaves.size(1) != 64)
    throw std::invalid_argument("blocks and leaves must be those of the grid");
  return {blocks.data, leaves.data, extent, side};
}

namespace {

__device__ FieldCamera camera_of_view(const FieldScene& scene, int64_t view) {
  return camera_of(scene.extrinsics + 16 * view, scene.intrinsics + 9 * view, scene.box, scene.extent, scene.width,
                   scene.height);
}

__device__ double jitter_of(const FieldScene& scene, int64_t pixel) {
  if (scene.jitter == nullptr) return 0;
  const double value = scene.jitter[pixel];
  return value > 0 ? (value < 1 ? value : 1) : 0;  // 0 for NaN
}

// Where a run of samples lies in its leaf: entry = start + step * number, per axis.
struct Run {
  float start[3], step[3];
  float depth, depth_step;
};

__device__ Run run_of(const FieldScene& scene, const FieldCamera& camera, const FieldRay& ray, const int32_t* cell,
                      double first, double jitter) {
  const double distance = (first + jitter) * scene.step;
  Run run;
  FIELD_UNROLL
  for (int axis = 0; axis < 3; ++axis) {
    const double local = camera.origin[axis] + distance * ray.direction[axis] - cell[axis];
    run.start[axis] = static_cast<float>(local * scene.entries - 0.5);
    run.step[axis] = static_cast<float>(scene.step * ray.direction[axis] * scene.entries);
  }
  run.depth = static_cast<float>(distance * ray.cosine);
  run.depth_step = static_cast<float>(scene.step * ray.cosine);
  return run;
}

// One sample: the first of the two entries that are interpolated on each axis, and the weight of the second.
struct Place {
  int lower[3];
  float weight[3];
};

__device__ Place place_of(const FieldScene& scene, const Run& run, int number) {
  Place place;
  const float last = static_cast<float>(scene.entries - 2);
  FIELD_UNROLL
  for (int axis = 0; axis < 3; ++axis) {
    const float scaled = run.start[axis] + run.step[axis] * static_cast<float>(number);
    place.lower[axis] = static_cast<int>(max(min(scaled, last), 0.0f));
    place.weight[axis] = scaled - static_cast<float>(place.lower[axis]);
  }
  return place;
}

__device__ float4 lerp(const float4* row, int next, float weight) {
  const float4 a = row[0], b = row[next];
  return make_float4(a.x + weight * (b.x - a.x), a.y + weight * (b.y - a.y), a.z + weight * (b.z - a.z),
                     a.w + weight * (b.w - a.w));
}

__device__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

struct Shade {
  float alpha, slope;  // slope: of softplus
  float color[3];
};

__device__ Shade shade_of(const FieldScene& scene, const float* leaf, const Place& place) {
  const int quads = scene.rank / 4, axis_quads = scene.entries * quads;
  const float4* const rows = reinterpret_cast<const float4*>(leaf);
  const float4* const a = rows + place.lower[0] * quads;
  const float4* const b = rows + axis_quads + place.lower[1] * quads;
  const float4* const c = rows + 2 * axis_quads + place.lower[2] * quads;
  const float4* const last = rows + 3 * axis_quads;
  float density = 0, red = 0, green = 0, blue = 0;
  for (int q = 0; q < quads; ++q) {
    const float4 x = lerp(a + q, quads, place.weight[0]), y = lerp(b + q, quads, place.weight[1]),
                 z = lerp(c + q, quads, place.weight[2]);
    const float4 product = make_float4(x.x * y.x * z.x, x.y * y.y * z.y, x.z * y.z * z.z, x.w * y.w * z.w);
    density += dot(product, last[q]);
    red += dot(product, last[quads + q]);
    green += dot(product, last[2 * quads + q]);
    blue += dot(product, last[3 * quads + q]);
  }
  Shade shade;
  const float e = expf(max(min(density, 10.0f), -80.0f));
  const float sigma = density < 10 ? log1pf(e) : density;
  shade.slope = density < 10 ? e / (1 + e) : 1.0f;
  shade.alpha = min(1 - expf(-min(sigma * static_cast<float>(scene.step), 80.0f)), 0.999f);
  shade.color[0] = 1 / (1 + expf(min(max(-red, -80.0f), 80.0f)));
  shade.color[1] = 1 / (1 + expf(min(max(-green, -80.0f), 80.0f)));
  shade.color[2] = 1 / (1 + expf(min(max(-blue, -80.0f), 80.0f)));
  return shade;
}

}  // namespace
}  // namespace trellis::cuda
