// The geometry of one triangle as the rasterizer and its gradient see it: homogeneous edge functions in double, in
// which the products of float coordinates are exact. What decides about pixels is computed with the roundings of
// csrc/cpu/mesh_triangle.h, none of them fused, so that GPU and CPU decide alike.
#pragma once
#include <cmath>

#include "launch.h"

namespace trellis::cuda {

struct Vector3 {
  double x, y, z;
};

__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }
__device__ inline double sum(double a, double b) { return __dadd_rn(a, b); }
__device__ inline Vector3 cross(const Vector3& a, const Vector3& b) {
  return {sum(product(a.y, b.z), -product(a.z, b.y)), sum(product(a.z, b.x), -product(a.x, b.z)),
          sum(product(a.x, b.y), -product(a.y, b.x))};
}
__device__ inline double dot(const Vector3& a, const Vector3& b) {
  return sum(sum(product(a.x, b.x), product(a.y, b.y)), product(a.z, b.z));
}
__device__ inline Vector3 operator*(double factor, const Vector3& a) {
  return {factor * a.x, factor * a.y, factor * a.z};
}
__device__ inline Vector3 operator+(const Vector3& a, const Vector3& b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }

struct Vertex {
  Vector3 xyw;
  double z;
};
template <class T>
__device__ inline Vertex vertex_of(const T* positions, int32_t row) {
  const T* const p = positions + int64_t{4} * row;
  return {{static_cast<double>(p[0]), static_cast<double>(p[1]), static_cast<double>(p[3])}, static_cast<double>(p[2])};
}

// Normal of the plane through the camera and two vertices, from the lower row to the higher: the two triangles of an
// edge get normals that are exactly opposite.
__device__ inline Vector3 edge_normal(const Vertex& a, int32_t row_of_a, const Vertex& b, int32_t row_of_b) {
  return row_of_a < row_of_b ? cross(a.xyw, b.xyw) : -1.0 * cross(b.xyw, a.xyw);
}

struct Triangle {
  Vector3 normal[3];   // a direction d is covered where normal d > 0 for all three
  double determinant;  // > 0 for a triangle that can be seen
  double z[3];

  __device__ bool valid() const {
    double total = determinant;
    for (const Vector3& n : normal) total += fabs(n.x) + fabs(n.y) + fabs(n.z);
    return determinant > 0 && total < INFINITY;
  }
};

__device__ inline Triangle triangle_of(const Vertex (&vertices)[3], const int32_t* face) {
  Triangle t;
  t.normal[0] = edge_normal(vertices[1], face[1], vertices[2], face[2]);
  t.normal[1] = edge_normal(vertices[2], face[2], vertices[0], face[0]);
  t.normal[2] = edge_normal(vertices[0], face[0], vertices[1], face[1]);
  t.determinant = dot(vertices[0].xyw, t.normal[0]);
  for (int i = 0; i < 3; ++i) t.z[i] = vertices[i].z;
  if (t.determinant < 0) {  // seen from behind
    t.determinant = -t.determinant;
    for (Vector3& n : t.normal) n = -1.0 * n;
  }
  return t;
}

// `step` is 2 / extent, computed on the host.
__device__ inline double pixel_center(int64_t pixel, double step) {
  return sum(product(static_cast<double>(pixel) + 0.5, step), -1.0);
}

// Pixels, ends included.
struct Box {
  int left, right, top, bottom;

  __device__ int across() const { return right - left + 1; }
  __device__ int down() const { return bottom - top + 1; }
  __device__ bool empty() const { return left > right || top > bottom; }
};

// First and last pixel whose centers are in [low, high], of [-1, 1] across `extent`, give or take rounding.
__device__ inline void pixels_between(double low, double high, int extent, int& first, int& last) {
  const double half = 0.5 * extent, margin = 1e-3;
  first = static_cast<int>(fmin(fmax(ceil((low + 1) * half - 0.5 - margin), 0.0), static_cast<double>(extent)));
  last = static_cast<int>(fmin(fmax(floor((high + 1) * half - 0.5 + margin), -1.0), static_cast<double>(extent - 1)));
}

// Pixels whose centers the triangle may cover.
__device__ inline Box box_of(const Vertex (&vertices)[3], int width, int height) {
  double low_x = 1e300, low_y = 1e300, high_x = -1e300, high_y = -1e300;
  int behind = 0;
  for (const Vertex& v : vertices) {
    if (!(v.xyw.z > 0)) {
      ++behind;
      continue;
    }
    const double x = v.xyw.x / v.xyw.z, y = v.xyw.y / v.xyw.z;
    low_x = fmin(low_x, x);
    high_x = fmax(high_x, x);
    low_y = fmin(low_y, y);
    high_y = fmax(high_y, y);
  }
  if (behind == 3) return {0, -1, 0, -1};
  if (behind > 0) return {0, width - 1, 0, height - 1};  // it reaches the plane of the camera
  Box box;
  pixels_between(low_x, high_x, width, box.left, box.right);
  pixels_between(low_y, high_y, height, box.top, box.bottom);
  return box;
}

}  // namespace trellis::cuda
