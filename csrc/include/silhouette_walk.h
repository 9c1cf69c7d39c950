// From one pixel center to the next, across a mesh, to the silhouette between them. The same on CPU and GPU.
#pragma once
#include <cstdint>

#include "everywhere.h"

namespace trellis {

// A point x, y, w in clip space, a direction from the camera, or the normal of a plane through the camera.
struct Ray {
  double x, y, w;
};
TRELLIS_EVERYWHERE Ray crossed(const Ray& a, const Ray& b) {
  return {a.y * b.w - a.w * b.y, a.w * b.x - a.x * b.w, a.x * b.y - a.y * b.x};
}
TRELLIS_EVERYWHERE double product(const Ray& a, const Ray& b) { return a.x * b.x + a.y * b.y + a.w * b.w; }
template <class T>
TRELLIS_EVERYWHERE Ray clip_point(const T* positions, int32_t vertex) {
  const T* const row = positions + int64_t{4} * vertex;
  return {double(row[0]), double(row[1]), double(row[3])};
}
TRELLIS_EVERYWHERE Ray center_of(int64_t row, int64_t column, int64_t height, int64_t width) {
  return {(double(column) + 0.5) * (2.0 / double(width)) - 1.0, (double(row) + 0.5) * (2.0 / double(height)) - 1.0,
          1.0};
}

struct Crossing {
  int32_t edge;  // 3 face + the corner it is opposite of, -1: none
  double part;   // of the way from start to end
  Ray normal;    // of the plane through the camera and the edge
};

// From `start`, which triangle `face` covers, to `end`. Rows of `faces` and `neighbors` must be valid.
template <class T>
TRELLIS_EVERYWHERE Crossing walk_to_silhouette(int32_t face, const Ray& start, const Ray& end, const T* positions,
                                               const int32_t* faces, const int32_t* neighbors) {
  constexpr int kMaxSteps = 16;
  double part = 0;
  int entered = -1;
  for (int step = 0; step < kMaxSteps; ++step) {
    const int32_t* const vertices = faces + int64_t{3} * face;
    Ray corner[3], normal[3];
    TRELLIS_UNROLL
    for (int i = 0; i < 3; ++i) corner[i] = clip_point(positions, vertices[i]);
    TRELLIS_UNROLL
    for (int i = 0; i < 3; ++i) normal[i] = crossed(corner[(i + 1) % 3], corner[(i + 2) % 3]);
    const double turn = product(corner[0], normal[0]) < 0 ? -1.0 : 1.0;  // seen from behind
    int exit = -1;
    double nearest = 0;
    Ray plane{0, 0, 0};  // of the exit
    TRELLIS_UNROLL
    for (int i = 0; i < 3; ++i) {
      const double there = turn * product(normal[i], end);
      if (i == entered || !(there < 0)) continue;
      const double here = turn * product(normal[i], start), crossing = here > 0 ? here / (here - there) : 0.0;
      const double at = crossing > part ? crossing : part;
      if (exit < 0 || at < nearest) {
        exit = i;
        nearest = at;
        plane = normal[i];
      }
    }
    if (exit < 0) return {-1, 0, {}};  // this triangle reaches as far as the end
    part = nearest;
    const int32_t beyond = neighbors[int64_t{3} * face + exit];
    if (beyond >= 0) {
      const int32_t j = vertices[(exit + 1) % 3], k = vertices[(exit + 2) % 3];
      const int32_t* const theirs = faces + int64_t{3} * beyond;
      entered = 0;  // the corner that is not on our edge
      while (entered < 2 && (theirs[entered] == j || theirs[entered] == k)) ++entered;
      if (turn * product(plane, clip_point(positions, theirs[entered])) < 0) {  // it goes on behind the edge
        face = beyond;
        continue;
      }
    }
    return {3 * face + exit, part, plane};
  }
  return {-1, 0, {}};
}

// Whether an edge is looked at by pixels side by side (axis 0), and not by pixels one above the other (1).
TRELLIS_EVERYWHERE bool faces_axis(const Ray& normal, int axis, int64_t height, int64_t width) {
  const double across = (normal.x < 0 ? -normal.x : normal.x) * double(height);
  const double along = (normal.y < 0 ? -normal.y : normal.y) * double(width);
  return (across >= along) == (axis == 0);
}

// What a pixel and the next along an axis exchange: the first takes `share` of the second's color, or the second
// -share of the first's; `edge` is what is between them, or -1.
template <class T>
struct Exchange {
  T share;
  int32_t edge;
};
template <class T>
struct Scene {
  const int32_t* ids;
  const T *depths, *positions;
  const int32_t *faces, *neighbors;
  int64_t height, width;
};
template <class T>
TRELLIS_EVERYWHERE Exchange<T> exchange_between(const Scene<T>& scene, int64_t row, int64_t column, int axis) {
  const int64_t first = row * scene.width + column, second = first + (axis == 0 ? 1 : scene.width);
  const int32_t a = scene.ids[first], b = scene.ids[second];
  if (a == b || (a < 0 && b < 0)) return {T(0), -1};
  const bool from_second = a < 0 || (b >= 0 && scene.depths[second] < scene.depths[first]);
  const int right = axis == 0 ? 1 : 0, from = from_second ? 1 : 0;
  const Ray start = center_of(row + from * axis, column + from * right, scene.height, scene.width);
  const Ray end = center_of(row + (1 - from) * axis, column + (1 - from) * right, scene.height, scene.width);
  const Crossing found =
      walk_to_silhouette(from_second ? b : a, start, end, scene.positions, scene.faces, scene.neighbors);
  if (found.edge < 0 || !faces_axis(found.normal, axis, scene.height, scene.width)) return {T(0), -1};
  return {T(from_second ? found.part - 0.5 : 0.5 - found.part), found.edge};
}

// The gradient in the two ends of an edge, in x, y and w, from that in the share of an exchange.
struct EdgeGradient {
  int32_t vertex[2];
  Ray gradient[2];
};
template <class T>
TRELLIS_EVERYWHERE EdgeGradient edge_gradient(int32_t edge, double by_share, int64_t row, int64_t column, int axis,
                                              int64_t height, int64_t width, const T* positions, const int32_t* faces) {
  const int32_t* const face = faces + int64_t{3} * (edge / 3);
  const int32_t j = face[(edge + 1) % 3], k = face[(edge + 2) % 3];
  const Ray p = clip_point(positions, j), q = clip_point(positions, k), n = crossed(p, q);
  Ray at = center_of(row, column, height, width);  // becomes the crossing, where n at = 0
  if (axis == 0)
    at.x = -(n.y * at.y + n.w) / n.x;
  else
    at.y = -(n.x * at.x + n.w) / n.y;
  // share = 0.5 - (crossing - first center) size / 2, and the crossing moves by -(change of n) at / n
  const double size = double(axis == 0 ? width : height);
  const double scale = by_share * 0.5 * size / (axis == 0 ? n.x : n.y);
  const Ray by_normal = {scale * at.x, scale * at.y, scale};
  return {{j, k}, {crossed(q, by_normal), crossed(by_normal, p)}};
}

}  // namespace trellis
