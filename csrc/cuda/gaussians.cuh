// What projection and blending of Gaussians share: sizes, and whether an ellipse reaches a rectangle of pixels.
#pragma once
#include "launch.h"

namespace trellis::cuda {

constexpr int kTile = 16;                      // pixels per side; 16 x 16 threads draw one
constexpr int kPatchWide = 8, kPatchHigh = 4;  // pixels of a warp
constexpr int kPatchesAcross = kTile / kPatchWide, kPatches = kTile * kTile / 32;
constexpr int kSplat = 8;                  // floats per slot, see gaussians.h
constexpr int kMoments = 6, kCamera = 16;  // floats of gradients per slot and camera
constexpr float kNearest = 0.2f;           // camera depth
constexpr float kSmallestAlpha = 1.0f / 255;
constexpr float kLargestAlpha = 0.99f;
constexpr float kSmallestTransmittance = 1e-4f;

struct Splat {
  float x, y, xx, xy, yy, opacity, limit, depth;
};

// Where q is smallest along a column of pixels, as y over x, and along a row, as x over y. Approximate division will
// do: beside the smallest q it is smallest to second order.
struct Slopes {
  float y, x;
};
__device__ inline Slopes slopes(const Splat& s) {
  return {__fdividef(-0.5f * s.xy, s.yy), __fdividef(-0.5f * s.xy, s.xx)};
}

// Whether q may be at most `limit` at a pixel of [left, left + width) x [top, top + height). The smallest q of the
// rectangle lies at its center point if that is inside, else on one of the two sides that face it. Never false by
// rounding: `limit` has a margin.
__device__ inline bool reaches(const Splat& s, Slopes slope, float left, float top, int width, int height) {
  const float x0 = left - s.x, x1 = x0 + static_cast<float>(width - 1);
  const float y0 = top - s.y, y1 = y0 + static_cast<float>(height - 1);
  const float near_x = fminf(fmaxf(0.0f, x0), x1), near_y = fminf(fmaxf(0.0f, y0), y1);
  const float along_y = fminf(fmaxf(slope.y * near_x, y0), y1);
  const float along_x = fminf(fmaxf(slope.x * near_y, x0), x1);
  const float on_x = near_x * (s.xx * near_x + s.xy * along_y) + s.yy * along_y * along_y;
  const float on_y = near_y * (s.yy * near_y + s.xy * along_x) + s.xx * along_x * along_x;
  return !(fminf(on_x, on_y) > s.limit);
}

}  // namespace trellis::cuda
