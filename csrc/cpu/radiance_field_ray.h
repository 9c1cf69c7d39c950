// Rays through the grid of leaves, in double precision. Everything is inlined: included for every instruction set.
#pragma once
#include "radiance_field_march.h"

namespace trellis::cpu {
namespace {

struct FieldRay {
  double direction[3];  // cells per world unit
  double cosine;        // camera depth per world unit
  bool finite;
};

// The center of pixel (x, y).
__attribute__((always_inline)) inline FieldRay ray_of(const FieldCamera& camera, int64_t x, int64_t y) {
  const double across = ((double(x) + 0.5) / double(camera.width) - camera.cx) / camera.fx;
  const double down = ((double(y) + 0.5) / double(camera.height) - camera.cy) / camera.fy;
  FieldRay ray;
  ray.cosine = 1 / __builtin_sqrt(across * across + down * down + 1);
  const double toward[3] = {across * ray.cosine, down * ray.cosine, ray.cosine};
  double sum = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const double* const r = camera.rotation + axis;
    ray.direction[axis] = (toward[0] * r[0] + toward[1] * r[3] + toward[2] * r[6]) / camera.cell[axis];
    sum += ray.direction[axis];
  }
  ray.finite = camera.finite && sum - sum == 0;
  return ray;
}

__attribute__((always_inline)) inline int32_t cell_at(double place, int32_t lowest, int32_t highest) {
  const double whole = __builtin_floor(place);
  return whole < lowest ? lowest : whole > highest ? highest : int32_t(whole);
}

// Calls visit(leaf, cell, near, far) for the leaves that the camera draws, front to back, until it returns false.
// `near` and `far` are distances from the camera; those of neighbors meet exactly, whatever rounding does.
template <class Visit>
__attribute__((always_inline)) inline void for_each_leaf(const LeafGridView& grid, const FieldCamera& camera,
                                                         const FieldRay& ray, const Visit& visit) {
  if (!ray.finite) return;
  constexpr double kInfinity = __builtin_inf();
  const double* const origin = camera.origin;
  const int32_t extent = grid.extent;
  double inverse[3];
  bool up[3];
  double near = 0, end = kInfinity;
  for (int axis = 0; axis < 3; ++axis) {
    const double d = ray.direction[axis];
    up[axis] = true;
    inverse[axis] = kInfinity;
    if (__builtin_fabs(d) < 1e-290) {
      if (!(origin[axis] >= 0 && origin[axis] < extent)) return;
      continue;
    }
    up[axis] = d > 0;
    inverse[axis] = 1 / d;
    const double low = (0 - origin[axis]) * inverse[axis], high = (extent - origin[axis]) * inverse[axis];
    const double enters = up[axis] ? low : high, leaves = up[axis] ? high : low;
    near = enters > near ? enters : near;
    end = leaves < end ? leaves : end;
  }
  if (!(near < end)) return;
  int32_t cell[3];
  for (int axis = 0; axis < 3; ++axis) cell[axis] = cell_at(origin[axis] + near * ray.direction[axis], 0, extent - 1);
  const int64_t side = grid.blocks_per_side;
  for (;;) {
    const int64_t number = ((cell[0] >> 2) * side + (cell[1] >> 2)) * side + (cell[2] >> 2);
    const int32_t block = grid.blocks[number];
    // Of a block with leaves, cross one cell; of another, all of it.
    const int32_t size = block < 0 ? 4 : 1;
    double planes[3];
    int axis = 0;
    for (int a = 0; a < 3; ++a) {
      const int32_t low = cell[a] & -size;
      const double plane = up[a] ? low + size : low;
      planes[a] = inverse[a] == kInfinity ? kInfinity : (plane - origin[a]) * inverse[a];
      if (planes[a] < planes[axis]) axis = a;
    }
    const double far = planes[axis];
    if (block >= 0) {
      const int32_t leaf =
          grid.leaves[int64_t{block} * 64 + (((cell[0] & 3) << 4) | ((cell[1] & 3) << 2) | (cell[2] & 3))];
      if (leaf >= 0) {
        const double depth = camera.depth + camera.depth_step[0] * cell[0] + camera.depth_step[1] * cell[1] +
                             camera.depth_step[2] * cell[2];
        if (depth > 0.2 && !visit(leaf, cell, near, far)) return;
      }
    } else {
      for (int a = 0; a < 3; ++a) {
        const int32_t low = cell[a] & -4;
        const int32_t high = low + 3 < extent - 1 ? low + 3 : extent - 1;
        if (a != axis) cell[a] = cell_at(origin[a] + far * ray.direction[a], low, high);
      }
    }
    near = far > near ? far : near;
    const int32_t low = cell[axis] & -size;
    cell[axis] = up[axis] ? low + size : low - 1;
    if (cell[axis] < 0 || cell[axis] >= extent) return;
  }
}

}  // namespace
}  // namespace trellis::cpu
