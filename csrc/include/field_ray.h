// Rays through the grid of leaves of a radiance field, in double precision: for the CPU kernels of every instruction
// set (everything is inlined) and for CUDA (no array is indexed by a variable, so all of them are registers).
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FIELD_INLINE __device__ __forceinline__
#define FIELD_UNROLL _Pragma("unroll")
#define FIELD_FLOOR(x) floor(x)
#define FIELD_SQRT(x) sqrt(x)
#else
#define FIELD_INLINE __attribute__((always_inline)) inline
#define FIELD_UNROLL _Pragma("GCC unroll 3")
#define FIELD_FLOOR(x) __builtin_floor(x)
#define FIELD_SQRT(x) __builtin_sqrt(x)
#endif

namespace trellis {

// Which leaf fills each cell of the 2^depth grid: blocks of 4^3 cells, empty ones shared.
struct LeafGridView {
  const int32_t* blocks;  // [side, side, side], x slowest: number of a block, -1 if empty
  const int32_t* leaves;  // [number, 4, 4, 4]: row of the field, -1 if none
  int32_t extent, side;
};

struct FieldBox {
  double low[3], size[3];
};

// One camera, in units of cells from the corner of the grid.
struct FieldCamera {
  double rotation[9];           // world to camera
  double fx, fy, cx, cy;        // normalised
  double origin[3], cell[3];    // where it is; size of a cell in world units
  double depth_step[3], depth;  // camera depth of the center of cell i: depth + sum_a depth_step[a] i[a]
  int64_t width, height;
  bool finite;
};

namespace {

FIELD_INLINE bool is_finite(double x) { return x - x == 0; }

// extrinsics [4, 4], intrinsics [3, 3]; extent: cells per axis.
FIELD_INLINE FieldCamera camera_of(const double* extrinsics, const double* intrinsics, const FieldBox& box,
                                   int64_t extent, int64_t width, int64_t height) {
  FieldCamera camera;
  camera.fx = intrinsics[0];
  camera.fy = intrinsics[4];
  camera.cx = intrinsics[2];
  camera.cy = intrinsics[5];
  camera.width = width;
  camera.height = height;
  camera.finite = true;
  camera.depth = extrinsics[11];
  FIELD_UNROLL
  for (int axis = 0; axis < 3; ++axis) {
    const double cell = box.size[axis] / double(extent);
    double origin = 0;
    FIELD_UNROLL
    for (int row = 0; row < 3; ++row) {
      camera.rotation[3 * row + axis] = extrinsics[4 * row + axis];
      origin -= extrinsics[4 * row + 3] * extrinsics[4 * row + axis];
    }
    camera.cell[axis] = cell;
    camera.origin[axis] = (origin - box.low[axis]) / cell;
    camera.depth_step[axis] = extrinsics[8 + axis] * cell;
    camera.depth += extrinsics[8 + axis] * (box.low[axis] + 0.5 * cell);
    camera.finite = camera.finite && camera.origin[axis] < 1e15 && camera.origin[axis] > -1e15;
  }
  camera.finite = camera.finite && is_finite(camera.depth);
  return camera;
}

struct FieldRay {
  double direction[3];  // cells per world unit
  double cosine;        // camera depth per world unit
  bool finite;
};

// The center of pixel (x, y).
FIELD_INLINE FieldRay ray_of(const FieldCamera& camera, int64_t x, int64_t y) {
  const double across = ((double(x) + 0.5) / double(camera.width) - camera.cx) / camera.fx;
  const double down = ((double(y) + 0.5) / double(camera.height) - camera.cy) / camera.fy;
  FieldRay ray;
  ray.cosine = 1 / FIELD_SQRT(across * across + down * down + 1);
  const double toward[3] = {across * ray.cosine, down * ray.cosine, ray.cosine};
  ray.finite = camera.finite;
  FIELD_UNROLL
  for (int axis = 0; axis < 3; ++axis) {
    ray.direction[axis] = (toward[0] * camera.rotation[axis] + toward[1] * camera.rotation[3 + axis] +
                           toward[2] * camera.rotation[6 + axis]) /
                          camera.cell[axis];
    ray.finite = ray.finite && is_finite(ray.direction[axis]);
  }
  return ray;
}

FIELD_INLINE int32_t cell_at(double place, int32_t lowest, int32_t highest) {
  const double whole = FIELD_FLOOR(place);
  return whole < lowest ? lowest : whole > highest ? highest : int32_t(whole);
}

// Calls visit(leaf, cell, near, far) for the leaves that the camera draws, front to back, until it returns false.
// `near` and `far` are distances from the camera; those of neighbors meet exactly, whatever rounding does.
template <class Visit>
FIELD_INLINE void for_each_leaf(const LeafGridView& grid, const FieldCamera& camera, const FieldRay& ray,
                                const Visit& visit) {
  if (!ray.finite) return;
  constexpr double kInfinity = __builtin_huge_val();
  const int32_t extent = grid.extent;
  double origin[3], inverse[3];
  bool up[3];
  double near = 0, end = kInfinity;
  bool misses = false;
  FIELD_UNROLL
  for (int axis = 0; axis < 3; ++axis) {
    const double d = ray.direction[axis];
    origin[axis] = camera.origin[axis];
    const bool level = d < 1e-290 && d > -1e-290;  // along the planes of this axis
    up[axis] = level || d > 0;
    inverse[axis] = level ? kInfinity : 1 / d;
    misses = misses || (level && !(origin[axis] >= 0 && origin[axis] < extent));
    if (level) continue;
    const double low = (0 - origin[axis]) * inverse[axis], high = (extent - origin[axis]) * inverse[axis];
    const double enters = up[axis] ? low : high, leaves = up[axis] ? high : low;
    near = enters > near ? enters : near;
    end = leaves < end ? leaves : end;
  }
  if (misses || !(near < end)) return;
  int32_t cell[3];
  FIELD_UNROLL
  for (int axis = 0; axis < 3; ++axis) cell[axis] = cell_at(origin[axis] + near * ray.direction[axis], 0, extent - 1);
  const int64_t side = grid.side;
  for (;;) {
    const int32_t block = grid.blocks[((cell[0] >> 2) * side + (cell[1] >> 2)) * side + (cell[2] >> 2)];
    // Of a block with leaves, cross one cell; of another, all of it.
    const int32_t size = block < 0 ? 4 : 1;
    double far = kInfinity;
    int axis = 0;
    FIELD_UNROLL
    for (int a = 0; a < 3; ++a) {
      const int32_t low = cell[a] & -size;
      const double plane = up[a] ? low + size : low;
      const double distance = inverse[a] == kInfinity ? kInfinity : (plane - origin[a]) * inverse[a];
      if (distance < far) {
        far = distance;
        axis = a;
      }
    }
    if (block >= 0) {
      const int32_t leaf =
          grid.leaves[int64_t{block} * 64 + (((cell[0] & 3) << 4) | ((cell[1] & 3) << 2) | (cell[2] & 3))];
      if (leaf >= 0) {
        const double depth = camera.depth + camera.depth_step[0] * cell[0] + camera.depth_step[1] * cell[1] +
                             camera.depth_step[2] * cell[2];
        if (depth > 0.2 && !visit(leaf, cell, near, far)) return;
      }
    }
    near = far > near ? far : near;
    bool outside = false;
    FIELD_UNROLL
    for (int a = 0; a < 3; ++a) {
      const int32_t low = cell[a] & -size;
      if (a == axis) {
        cell[a] = up[a] ? low + size : low - 1;
        outside = cell[a] < 0 || cell[a] >= extent;
      } else if (size == 4) {
        const int32_t high = low + 3 < extent - 1 ? low + 3 : extent - 1;
        cell[a] = cell_at(origin[a] + far * ray.direction[a], low, high);
      }
    }
    if (outside) return;
  }
}

}  // namespace
}  // namespace trellis
