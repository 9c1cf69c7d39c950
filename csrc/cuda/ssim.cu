// Structural similarity: a block makes a tile of 16 x 16 pixels of one channel, filtering along rows, then columns, in
// shared memory. The gradient filters twice; its block reads the 36 x 36 pixels its tile depends on.
#include "launch.h"
#include "ssim.h"

namespace trellis::cuda {
namespace {

constexpr int kTile = 16;
constexpr int kRadius = 5;
constexpr int kTaps = 2 * kRadius + 1;
constexpr int kThreads = kTile * kTile;
constexpr int kOnce = kTile + 2 * kRadius;   // what a tile depends on through one filter
constexpr int kTwice = kTile + 4 * kRadius;  // and through two
constexpr float kC1 = 0.01f * 0.01f, kC2 = 0.03f * 0.03f;

// exp(-(i - 5)^2 / (2 * 1.5^2)), normalised.
__device__ constexpr float kWeights[kTaps] = {0.00102838008f, 0.00759875814f, 0.0360007721f, 0.109360687f,
                                              0.213005537f,   0.26601172f,    0.213005537f,  0.109360687f,
                                              0.0360007721f,  0.00759875814f, 0.00102838008f};

struct Moments {
  float x, y, xx, yy, xy;
};

struct Tile {
  int height, width, top, left;

  __device__ bool inside(int row, int column) const {
    return row >= 0 && row < height && column >= 0 && column < width;
  }
  __device__ float at(const float* image, int row, int column) const {
    return inside(row, column) ? image[int64_t{row} * width + column] : 0.0f;
  }
};

__device__ float similarity_of(const Moments& m) {
  const float mean_xy = m.x * m.y, squares = m.x * m.x + m.y * m.y;
  return (2 * mean_xy + kC1) * (2 * (m.xy - mean_xy) + kC2) / ((squares + kC1) * (m.xx + m.yy - squares + kC2));
}

// Filter along rows: moments of row `row`, columns from `column` on.
template <class Shared>
__device__ Moments along_row(Shared& x, Shared& y, int row, int column) {
  Moments m{};
  for (int tap = 0; tap < kTaps; ++tap) {
    const float weight = kWeights[tap], a = x[row][column + tap], b = y[row][column + tap];
    m.x += weight * a;
    m.y += weight * b;
    m.xx += weight * (a * a);
    m.yy += weight * (b * b);
    m.xy += weight * (a * b);
  }
  return m;
}

template <class Shared>
__device__ Moments down_column(Shared& rows, int row, int column) {
  Moments m{};
  for (int tap = 0; tap < kTaps; ++tap) {
    const float weight = kWeights[tap];
    m.x += weight * rows[0][row + tap][column];
    m.y += weight * rows[1][row + tap][column];
    m.xx += weight * rows[2][row + tap][column];
    m.yy += weight * rows[3][row + tap][column];
    m.xy += weight * rows[4][row + tap][column];
  }
  return m;
}

__global__ void __launch_bounds__(kThreads) ssim(const float* __restrict__ images, const float* __restrict__ targets,
                                                 int height, int width, float* __restrict__ out) {
  SHARED_ARRAY(float, x, kOnce, kOnce);
  SHARED_ARRAY(float, y, kOnce, kOnce);
  SHARED_ARRAY(float, rows, 5, kOnce, kTile);
  const int64_t plane = int64_t{blockIdx.z} * height * width;
  const Tile tile{height, width, static_cast<int>(blockIdx.y) * kTile, static_cast<int>(blockIdx.x) * kTile};
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kOnce * kOnce; i += kThreads) {
    const int row = i / kOnce, column = i % kOnce;
    x[row][column] = tile.at(images + plane, tile.top - kRadius + row, tile.left - kRadius + column);
    y[row][column] = tile.at(targets + plane, tile.top - kRadius + row, tile.left - kRadius + column);
  }
  __syncthreads();
  for (int i = thread; i < kOnce * kTile; i += kThreads) {
    const int row = i / kTile, column = i % kTile;
    const Moments m = along_row(x, y, row, column);
    rows[0][row][column] = m.x;
    rows[1][row][column] = m.y;
    rows[2][row][column] = m.xx;
    rows[3][row][column] = m.yy;
    rows[4][row][column] = m.xy;
  }
  __syncthreads();
  const int row = thread / kTile, column = thread % kTile;
  if (tile.inside(tile.top + row, tile.left + column))
    out[plane + int64_t{tile.top + row} * width + tile.left + column] = similarity_of(down_column(rows, row, column));
}

__global__ void __launch_bounds__(kThreads)
    ssim_gradient(const float* __restrict__ gradients, const float* __restrict__ images,
                  const float* __restrict__ targets, int height, int width, float* __restrict__ out) {
  SHARED_ARRAY(float, x, kTwice, kTwice);
  SHARED_ARRAY(float, y, kTwice, kTwice);
  SHARED_ARRAY(float, rows, 5, kTwice, kOnce);
  SHARED_ARRAY(float, partials, 3, kOnce, kOnce);  // derivatives by the mean, by xx and by xy
  const int64_t plane = int64_t{blockIdx.z} * height * width;
  const Tile tile{height, width, static_cast<int>(blockIdx.y) * kTile, static_cast<int>(blockIdx.x) * kTile};
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kTwice * kTwice; i += kThreads) {
    const int row = i / kTwice, column = i % kTwice;
    x[row][column] = tile.at(images + plane, tile.top - 2 * kRadius + row, tile.left - 2 * kRadius + column);
    y[row][column] = tile.at(targets + plane, tile.top - 2 * kRadius + row, tile.left - 2 * kRadius + column);
  }
  __syncthreads();
  for (int i = thread; i < kTwice * kOnce; i += kThreads) {
    const int row = i / kOnce, column = i % kOnce;
    const Moments m = along_row(x, y, row, column);
    rows[0][row][column] = m.x;
    rows[1][row][column] = m.y;
    rows[2][row][column] = m.xx;
    rows[3][row][column] = m.yy;
    rows[4][row][column] = m.xy;
  }
  __syncthreads();
  for (int i = thread; i < kOnce * kOnce; i += kThreads) {
    const int row = i / kOnce, column = i % kOnce;
    const float gradient = tile.at(gradients + plane, tile.top - kRadius + row, tile.left - kRadius + column);
    const Moments m = down_column(rows, row, column);
    const float mean_xy = m.x * m.y, squares = m.x * m.x + m.y * m.y;
    const float means = 1 / (squares + kC1), spread = 1 / (m.xx + m.yy - squares + kC2);
    const float luminance = (2 * mean_xy + kC1) * means, contrast = (2 * (m.xy - mean_xy) + kC2) * spread;
    const float similarity = luminance * contrast, by_xx = -similarity * spread, by_xy = 2 * luminance * spread;
    partials[0][row][column] =
        gradient * (2 * (m.y * contrast - m.x * similarity) * means - 2 * m.x * by_xx - m.y * by_xy);
    partials[1][row][column] = gradient * by_xx;
    partials[2][row][column] = gradient * by_xy;
  }
  __syncthreads();
  for (int i = thread; i < kOnce * kTile; i += kThreads) {  // the moments are used up
    const int row = i / kTile, column = i % kTile;
    for (int k = 0; k < 3; ++k) {
      float sum = 0;
      for (int tap = 0; tap < kTaps; ++tap) sum += kWeights[tap] * partials[k][row][column + tap];
      rows[k][row][column] = sum;
    }
  }
  __syncthreads();
  const int row = thread / kTile, column = thread % kTile;
  if (!tile.inside(tile.top + row, tile.left + column)) return;
  float sums[3] = {};
  for (int k = 0; k < 3; ++k)
    for (int tap = 0; tap < kTaps; ++tap) sums[k] += kWeights[tap] * rows[k][row + tap][column];
  const float a = x[row + 2 * kRadius][column + 2 * kRadius], b = y[row + 2 * kRadius][column + 2 * kRadius];
  out[plane + int64_t{tile.top + row} * width + tile.left + column] = sums[0] + 2 * a * sums[1] + b * sums[2];
}

dim3 grid_of(const Images& images, const TensorView<float, 4>& out) {
  if (images.shape != out.shape) throw std::invalid_argument("images, targets and out must have one shape");
  const int64_t planes = images.size(0) * images.size(1);
  if (planes > 65535) throw std::invalid_argument("B * C must be at most 65535; got " + std::to_string(planes));
  if (images.size(2) > INT32_MAX - kTwice || images.size(3) > INT32_MAX - kTwice)
    throw std::invalid_argument("H and W must be below 2^31");
  return {blocks(images.size(3), kTile), blocks(images.size(2), kTile), static_cast<unsigned>(planes)};
}

}  // namespace

void ssim_map(Images images, Images targets, TensorView<float, 4> out, int64_t stream) {
  if (targets.shape != images.shape) throw std::invalid_argument("targets must have the shape of images");
  launch({"ssim", grid_of(images, out), kThreads, stream}, ssim, images.data, targets.data,
         static_cast<int>(images.size(2)), static_cast<int>(images.size(3)), out.data);
}

void ssim_map_gradient(Images out_gradient, Images images, Images targets, TensorView<float, 4> out, int64_t stream) {
  if (targets.shape != images.shape || out_gradient.shape != images.shape)
    throw std::invalid_argument("out_gradient and targets must have the shape of images");
  launch({"ssim_gradient", grid_of(images, out), kThreads, stream}, ssim_gradient, out_gradient.data, images.data,
         targets.data, static_cast<int>(images.size(2)), static_cast<int>(images.size(3)), out.data);
}

}  // namespace trellis::cuda
