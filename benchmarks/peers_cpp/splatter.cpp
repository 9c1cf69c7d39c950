// What a CPU user has without tiles, vectors and threads: Gaussians sorted by depth and blended one after the other,
// each over the pixels of its bounding box. The box is the usual square of 3 standard deviations of the longer axis,
// or, `tight`, ends on either axis where alpha falls below 1/255: the smallest box that gives the picture of
// `rasterize_gaussians`, which draws whole tiles.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

constexpr float kNearest = 0.2f, kSmallestAlpha = 1 / 255.0f, kLargestAlpha = 0.99f, kSmallestTransmittance = 1e-4f;
constexpr int kTile = 16;

struct Splat {
  float x, y, xx, xy, yy, opacity;
  int left, top, right, bottom;  // pixels, one past the last
};

int tile(float pixel, int across) { return std::clamp(static_cast<int>(pixel / kTile), 0, across); }

}  // namespace

extern "C" void splat(const float* means, const float* quats, const float* scales, const float* opacities,
                      const float* colors, int64_t count, int channels, const float* extrinsic, const float* intrinsic,
                      int width, int height, const float* background, float kernel, int tight, float* image) {
  const float fx = intrinsic[0], fy = intrinsic[4], cx = intrinsic[2], cy = intrinsic[5];
  const float limit_x = 0.65f / fx, limit_y = 0.65f / fy;
  const int across = (width + kTile - 1) / kTile, down = (height + kTile - 1) / kTile;
  std::vector<Splat> splats;
  std::vector<float> depths;
  std::vector<int64_t> sources;
  for (int64_t i = 0; i < count; ++i) {
    float eye[3];
    for (int row = 0; row < 3; ++row)
      eye[row] = extrinsic[4 * row] * means[3 * i] + extrinsic[4 * row + 1] * means[3 * i + 1] +
                 extrinsic[4 * row + 2] * means[3 * i + 2] + extrinsic[4 * row + 3];
    const float z = eye[2];
    if (!(z > kNearest)) continue;

    const float* q = quats + 4 * i;
    const float norm = 1 / std::sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
    const float w = q[0] * norm, u = q[1] * norm, v = q[2] * norm, t = q[3] * norm;
    const float rotation[3][3] = {{1 - 2 * (v * v + t * t), 2 * (u * v - w * t), 2 * (u * t + w * v)},
                                  {2 * (u * v + w * t), 1 - 2 * (u * u + t * t), 2 * (v * t - w * u)},
                                  {2 * (u * t - w * v), 2 * (v * t + w * u), 1 - 2 * (u * u + v * v)}};
    const float tx = std::clamp(eye[0] / z, -limit_x, limit_x), ty = std::clamp(eye[1] / z, -limit_y, limit_y);
    float a = 0, b = 0, c = 0;  // covariance in pixels, from the three axes of the Gaussian
    for (int axis = 0; axis < 3; ++axis) {
      float turned[3];
      for (int row = 0; row < 3; ++row)
        turned[row] = (extrinsic[4 * row] * rotation[0][axis] + extrinsic[4 * row + 1] * rotation[1][axis] +
                       extrinsic[4 * row + 2] * rotation[2][axis]) *
                      scales[3 * i + axis];
      const float x = fx * width / z * (turned[0] - tx * turned[2]), y = fy * height / z * (turned[1] - ty * turned[2]);
      a += x * x;
      b += x * y;
      c += y * y;
    }
    const float sharp = std::max(a * c - b * b, 1e-6f);
    a += kernel;
    c += kernel;
    const float det = a * c - b * b, wide = std::max(det, 1e-6f);
    if (!(det > 0) || sharp <= 1e-6f || wide <= 1e-6f) continue;
    const float opacity = opacities[i] * std::sqrt(sharp / (wide + 1e-6f) + 1e-6f);
    if (!(opacity >= kSmallestAlpha)) continue;

    const float x = ((2 * fx * eye[0] + (2 * cx - 1) * z) / (z + 1e-7f) * width + (width - 1)) / 2;
    const float y = ((2 * fy * eye[1] + (2 * cy - 1) * z) / (z + 1e-7f) * height + (height - 1)) / 2;
    const float middle = 0.5f * (a + c);
    const float radius = std::ceil(3 * std::sqrt(middle + std::sqrt(std::max(0.1f, middle * middle - det))));
    Splat splat{x, y, c / det, -b / det, a / det, opacity, 0, 0, 0, 0};
    float reach_x = radius, reach_y = radius;
    if (tight) {
      const float reach = 2 * std::log(255 * opacity);
      reach_x = std::sqrt(reach * a);
      reach_y = std::sqrt(reach * c);
    }
    splat.left = std::max(tile(x - radius, across) * kTile, static_cast<int>(std::ceil(std::max(x - reach_x, 0.0f))));
    splat.top = std::max(tile(y - radius, down) * kTile, static_cast<int>(std::ceil(std::max(y - reach_y, 0.0f))));
    splat.right = std::min({tile(x + radius + kTile - 1, across) * kTile, width,
                            static_cast<int>(std::floor(std::clamp<float>(x + reach_x, -1, width))) + 1});
    splat.bottom = std::min({tile(y + radius + kTile - 1, down) * kTile, height,
                             static_cast<int>(std::floor(std::clamp<float>(y + reach_y, -1, height))) + 1});
    if (splat.left >= splat.right || splat.top >= splat.bottom) continue;
    splats.push_back(splat);
    depths.push_back(z);
    sources.push_back(i);
  }

  std::vector<int64_t> order(splats.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t one, int64_t other) { return depths[one] < depths[other]; });

  std::vector<float> transmittances(static_cast<size_t>(width) * height, 1.0f);
  std::vector<char> finished(transmittances.size(), 0);
  std::fill_n(image, transmittances.size() * channels, 0.0f);
  for (const int64_t index : order) {
    const Splat& s = splats[index];
    const float* color = colors + channels * sources[index];
    for (int row = s.top; row < s.bottom; ++row)
      for (int column = s.left; column < s.right; ++column) {
        const size_t pixel = static_cast<size_t>(row) * width + column;
        if (finished[pixel]) continue;
        const float dx = s.x - column, dy = s.y - row;
        const float power = -0.5f * (s.xx * dx * dx + s.yy * dy * dy) - s.xy * dx * dy;
        if (power > 0) continue;
        const float alpha = std::min(kLargestAlpha, s.opacity * std::exp(power));
        if (alpha < kSmallestAlpha) continue;
        const float after = transmittances[pixel] * (1 - alpha);
        if (after < kSmallestTransmittance) {
          finished[pixel] = 1;
          continue;
        }
        const float weight = transmittances[pixel] * alpha;
        for (int channel = 0; channel < channels; ++channel)
          image[pixel * channels + channel] += weight * color[channel];
        transmittances[pixel] = after;
      }
  }
  for (size_t pixel = 0; pixel < transmittances.size(); ++pixel)
    for (int channel = 0; channel < channels; ++channel)
      image[pixel * channels + channel] += transmittances[pixel] * background[channel];
}
