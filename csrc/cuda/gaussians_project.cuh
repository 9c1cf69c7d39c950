// The projection of one Gaussian by one camera, up to its covariance on the picture: what drawing and gradient share.
#pragma once
#include "gaussians.cuh"

namespace trellis::cuda {

struct Projection {
  const float *means, *quats, *scales, *opacities, *extrinsics, *intrinsics;
  int64_t count;
  int width, height;
  float kernel_size;
};

constexpr float kClipGuard = 1e-7f;  // added to the depth before the division, by the official code
constexpr float kSmallestDet = 1e-6f;
constexpr float kFieldMargin = 0.65f;  // of the picture's width from its middle: 1.3 times the field of view

struct Seen {
  float x, y, z;             // of the center, in the camera's frame
  float jx, jy, tx, ty;      // the projection, linearised near the center
  float row_x[3], row_y[3];  // its rows, for vectors of the world
  float quat[4], length;     // the unit quaternion, and how long it was
  float axes[3][3];          // of the ellipsoid, of length 1
  float u[3], v[3];          // these, on the picture
  float a, b, c;             // covariance xx, xy, yy before the filter
};

// False if the Gaussian cannot be drawn: too near, without a direction or an extent; then only `z` means anything.
__device__ inline bool see(const Projection& in, int64_t n, const float* e, const float* k, Seen& s) {
  const float fx = k[0], fy = k[4];
  const float *mean = in.means + 3 * n, *scale = in.scales + 3 * n;
  s.x = e[0] * mean[0] + e[1] * mean[1] + e[2] * mean[2] + e[3];
  s.y = e[4] * mean[0] + e[5] * mean[1] + e[6] * mean[2] + e[7];
  s.z = e[8] * mean[0] + e[9] * mean[1] + e[10] * mean[2] + e[11];
  if (!(s.z > kNearest && fminf(scale[0], fminf(scale[1], scale[2])) > 0)) return false;

  // Linearised at the center moved near the field of view, after the turn into the camera.
  const float limit_x = kFieldMargin / fx, limit_y = kFieldMargin / fy;
  s.tx = fminf(fmaxf(s.x / s.z, -limit_x), limit_x);
  s.ty = fminf(fmaxf(s.y / s.z, -limit_y), limit_y);
  s.jx = fx * static_cast<float>(in.width) / s.z;
  s.jy = fy * static_cast<float>(in.height) / s.z;
  for (int i = 0; i < 3; ++i) {
    s.row_x[i] = s.jx * (e[i] - s.tx * e[8 + i]);
    s.row_y[i] = s.jy * (e[4 + i] - s.ty * e[8 + i]);
  }
  const float4 given = reinterpret_cast<const float4*>(in.quats)[n];
  s.length = sqrtf(given.x * given.x + given.y * given.y + given.z * given.z + given.w * given.w);
  if (!(s.length > 0 && s.length < INFINITY)) return false;
  const float inverse = 1 / s.length;
  const float qw = given.x * inverse, qx = given.y * inverse, qy = given.z * inverse, qz = given.w * inverse;
  const float axes[3][3] = {
      {1 - 2 * (qy * qy + qz * qz), 2 * (qx * qy + qw * qz), 2 * (qx * qz - qw * qy)},
      {2 * (qx * qy - qw * qz), 1 - 2 * (qx * qx + qz * qz), 2 * (qy * qz + qw * qx)},
      {2 * (qx * qz + qw * qy), 2 * (qy * qz - qw * qx), 1 - 2 * (qx * qx + qy * qy)},
  };
  s.quat[0] = qw, s.quat[1] = qx, s.quat[2] = qy, s.quat[3] = qz;
  s.a = s.b = s.c = 0;
  for (int i = 0; i < 3; ++i) {  // each half axis of the ellipsoid, projected
    s.u[i] = s.v[i] = 0;
    for (int j = 0; j < 3; ++j) {
      s.axes[i][j] = axes[i][j];
      s.u[i] += s.row_x[j] * axes[i][j];
      s.v[i] += s.row_y[j] * axes[i][j];
    }
    const float u = scale[i] * s.u[i], v = scale[i] * s.v[i];
    s.a += u * u;
    s.b += u * v;
    s.c += v * v;
  }
  return true;
}

}  // namespace trellis::cuda
