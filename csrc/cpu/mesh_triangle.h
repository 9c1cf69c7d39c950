// The geometry of one triangle as the rasterizer and its gradient see it: homogeneous edge functions in double, in
// which the products of float coordinates are exact.
#pragma once
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "tensor_view.h"

namespace trellis::cpu {

struct Vector3 {
  double x, y, z;
};

inline Vector3 cross(const Vector3& a, const Vector3& b) {
  return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}
inline double dot(const Vector3& a, const Vector3& b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
inline Vector3 operator*(double factor, const Vector3& a) { return {factor * a.x, factor * a.y, factor * a.z}; }
inline Vector3 operator+(const Vector3& a, const Vector3& b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }

template <class T>
inline Vector3 clip_xyw(const T* position) {  // of a row x, y, z, w
  return {double(position[0]), double(position[1]), double(position[3])};
}

// Normal of the plane through the camera and the vertices j and k. Computed from the lower row to the higher, so that
// the two triangles of an edge get normals that are exactly opposite, and each pixel is on one side of it.
template <class T>
inline Vector3 edge_normal(const T* positions, int32_t j, int32_t k) {
  const Vector3 a = clip_xyw(positions + int64_t{4} * j), b = clip_xyw(positions + int64_t{4} * k);
  return j < k ? cross(a, b) : -1.0 * cross(b, a);
}

struct Triangle {
  Vector3 normal[3];   // a direction d is covered where normal d > 0 for all three
  double determinant;  // > 0 for a triangle that can be seen
  double z[3];

  bool valid() const {
    double sum = determinant;
    for (const Vector3& n : normal) sum += std::abs(n.x) + std::abs(n.y) + std::abs(n.z);
    return determinant > 0 && std::isfinite(sum);
  }
};

template <class T>
inline Triangle triangle_of(const T* positions, const int32_t* face) {
  Triangle t;
  t.normal[0] = edge_normal(positions, face[1], face[2]);
  t.normal[1] = edge_normal(positions, face[2], face[0]);
  t.normal[2] = edge_normal(positions, face[0], face[1]);
  t.determinant = dot(clip_xyw(positions + int64_t{4} * face[0]), t.normal[0]);
  for (int i = 0; i < 3; ++i) t.z[i] = double(positions[int64_t{4} * face[i] + 2]);
  if (t.determinant < 0) {  // seen from behind
    t.determinant = -t.determinant;
    for (Vector3& n : t.normal) n = -1.0 * n;
  }
  return t;
}

inline double pixel_center(int64_t pixel, int64_t extent) {
  return (double(pixel) + 0.5) * (2.0 / double(extent)) - 1.0;
}

inline void check_faces(TensorView<const int32_t, 2> faces, int64_t vertices) {
  if (faces.size(1) != 3) throw std::invalid_argument("faces must be [F, 3]");
  for (int64_t f = 0; f < faces.size(0); ++f) {
    const int32_t* const face = faces.row(f);
    for (int i = 0; i < 3; ++i)
      if (face[i] < 0 || face[i] >= vertices)
        throw std::invalid_argument("faces must be in [0, " + std::to_string(vertices) + "); got [" +
                                    std::to_string(face[0]) + ", " + std::to_string(face[1]) + ", " +
                                    std::to_string(face[2]) + "] in row " + std::to_string(f));
  }
}

inline void check_ids(TensorView<const int32_t, 3> ids, int64_t faces) {
  int32_t highest = -1;
  for (int64_t i = 0; i < ids.numel(); ++i) highest = ids.data[i] > highest ? ids.data[i] : highest;
  if (highest >= faces)
    throw std::invalid_argument("rasterization.faces must be below F=" + std::to_string(faces) + "; got " +
                                std::to_string(highest));
}

}  // namespace trellis::cpu
