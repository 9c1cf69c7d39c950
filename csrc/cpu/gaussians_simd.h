// What the driver of the Gaussian rasteriser (gaussians.cpp) asks of its inner loops (gaussians.inl.h), which are
// compiled once per instruction set.
#pragma once
#include <cstdint>

namespace trellis {

constexpr int kTile = 16;  // pixels per side
constexpr int kTilePixels = kTile * kTile;
constexpr int kFirstChannel = 3;  // plane of a tile's state

// A projected Gaussian: what a pixel needs to know.
template <class T>
struct alignas(64) Splat {
  T x, y;        // center, pixels
  T xx, xy, yy;  // log of the footprint = xx dx^2 + xy dx dy + yy dy^2
  T opacity;
  T limit;  // log of the footprint below which alpha is under 1/255, with a margin
  T ridge;  // dx / dy at which a row of pixels sees the footprint at its largest
  T depth;
  uint16_t x0, y0, x1, y1;  // pixels that it can reach, the last ones excluded; not empty
  int32_t index;            // into the inputs
};

template <class T>
struct Camera {
  T rotation[9], translation[3];
  T fx, fy, cx, cy;  // normalised
  int width, height;
  T kernel_size;
};

// Projects Gaussians [begin, end); writes those that are drawn, packed, and returns their number.
template <class T>
struct ProjectJob {
  const T *means, *quats, *scales, *opacities;
  int64_t begin, end;
  const Camera<T>* camera;
  Splat<T>* splats;
};

// Blends `count` splats, nearest first, into one tile. `state` holds planes of 16 x 16 pixels: transmittance (negative:
// the pixel is finished), depth, median depth, then the channels. Returns whether all pixels are finished.
template <class T>
struct BlendJob {
  const Splat<T>* splats;
  const int32_t* list;
  int64_t count;
  const T* colors;
  int64_t channels;
  int left, top;
  T* state;
  int32_t* last;
};

// The derivative of blending one tile, front to back again. `state` holds planes: transmittance (as above), what is to
// come (the sum of weight times value of all that is behind, background included), gradient of depth, then of the
// channels. For entry i of the list, sums[i * (kMoments + channels)] receives moments of the gradient with respect to
// the log of the footprint, times 1, dx, dy, dx^2, dx dy, dy^2, dx = center - pixel; then the gradient of depth, then
// of the color; reached[i] says whether it did. Returns whether all pixels are finished.
constexpr int kMoments = 7;
constexpr int kFirstGradient = 3;  // plane of the first channel
template <class T>
struct BlendBackwardJob {
  const Splat<T>* splats;
  const int32_t* list;
  int64_t count;
  const T* colors;
  int64_t channels;
  int left, top;
  T* state;
  T* sums;
  uint8_t* reached;
  T* scratch;  // [channels, 16]
};

// The derivative of projecting Gaussians [begin, end). moments [G, 8]: of each what the tiles have summed up, and 1
// behind it, or zeros where it was not drawn. Adds to the gradients of the inputs; writes those of the camera, 9
// numbers for the rotation, 3 for the translation, then fx, fy, cx, cy.
constexpr int kCameraNumbers = 16;
template <class T>
struct ProjectBackwardJob {
  const T *means, *quats, *scales, *opacities;
  int64_t begin, end;
  const Camera<T>* camera;
  const T* moments;
  T *d_means, *d_quats, *d_scales, *d_opacities;
  T* d_camera;
};

#define TRELLIS_GAUSSIANS(isa)                    \
  namespace isa {                                 \
  int64_t project(const ProjectJob<float>& job);  \
  int64_t project(const ProjectJob<double>& job); \
  bool blend(const BlendJob<float>& job);         \
  bool blend(const BlendJob<double>& job);        \
  }
TRELLIS_GAUSSIANS(gaussians_baseline)
TRELLIS_GAUSSIANS(gaussians_avx2)
TRELLIS_GAUSSIANS(gaussians_avx512)
#undef TRELLIS_GAUSSIANS

#define TRELLIS_GAUSSIANS_BACKWARD(isa)                         \
  namespace isa {                                               \
  bool blend_backward(const BlendBackwardJob<float>& job);      \
  bool blend_backward(const BlendBackwardJob<double>& job);     \
  void project_backward(const ProjectBackwardJob<float>& job);  \
  void project_backward(const ProjectBackwardJob<double>& job); \
  }
TRELLIS_GAUSSIANS_BACKWARD(gaussians_backward_baseline)
TRELLIS_GAUSSIANS_BACKWARD(gaussians_backward_avx2)
TRELLIS_GAUSSIANS_BACKWARD(gaussians_backward_avx512)
#undef TRELLIS_GAUSSIANS_BACKWARD

}  // namespace trellis
