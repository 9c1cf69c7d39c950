// The projection backwards: from the gradients of what is drawn of each Gaussian by each camera to those of the
// Gaussians and of the cameras. One thread per Gaussian, which goes through the cameras in their order; a camera's
// gradient is summed over each warp here, over warps by torch.
#include "gaussians.h"
#include "gaussians_project.cuh"

namespace trellis::cuda {
namespace {

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

struct Outputs {
  const int32_t* counts;
  const float *splats, *moments;
  bool resume;
  float *means, *quats, *scales, *opacities, *cameras;
};

struct OfGaussian {
  float mean[3], quat[4], scale[3], opacity;
};

// Adds what one camera sees of Gaussian n to its gradient `g`, and gives the gradient of the camera: rows of the
// extrinsic matrix, then fx, fy, cx, cy.
__device__ void add_view(const Projection& in, int64_t n, const float* e, const float* k, const float* splat,
                         const float* moments, OfGaussian& g, float* camera) {
  Seen s;
  if (!see(in, n, e, k, s)) return;
  const float fx = k[0], fy = k[4], cx = k[2], cy = k[5];
  const float width = static_cast<float>(in.width), height = static_cast<float>(in.height);
  const float a = s.a + in.kernel_size, b = s.b, c = s.c + in.kernel_size;
  const float det = a * c - b * b, inverse = 1 / det;
  const float p_xx = c * inverse, p_xy = -b * inverse, p_yy = a * inverse;  // the inverse covariance

  // Moments of the shares s of d loss / d log alpha: of 1, dx, dy, dx dx, dx dy, dy dy; and d loss / d depth.
  const float m = moments[0], m_x = moments[1], m_y = moments[2], m_xx = moments[3], m_xy = moments[4],
              m_yy = moments[5];
  const float center_x = -(p_xx * m_x + p_xy * m_y), center_y = -(p_xy * m_x + p_yy * m_y);
  // d alpha = -alpha/2 d' dP d, and dP = -P dS P: half of P M P.
  const float n_xx = p_xx * m_xx + p_xy * m_xy, n_xy = p_xx * m_xy + p_xy * m_yy;
  const float n_yx = p_xy * m_xx + p_yy * m_xy, n_yy = p_xy * m_xy + p_yy * m_yy;
  float d_a = 0.5f * (n_xx * p_xx + n_xy * p_xy), d_b = n_xx * p_xy + n_xy * p_yy,
        d_c = 0.5f * (n_yx * p_xy + n_yy * p_yy);

  // The opacity as drawn is the given one times sqrt(sharp / wide).
  const float faded = splat[5], d_faded = m / faded;
  const float det_sharp = s.a * s.c - b * b, ratio = det_sharp / (det + kSmallestDet);
  const float fading = sqrtf(ratio + kSmallestDet);
  g.opacity += d_faded * fading;
  const float d_ratio = d_faded * in.opacities[n] * 0.5f / fading;
  const float d_sharp = d_ratio / (det + kSmallestDet), d_wide = -d_sharp * ratio;
  d_a += d_sharp * s.c + d_wide * c;
  d_c += d_sharp * s.a + d_wide * a;
  d_b -= 2 * b * (d_sharp + d_wide);

  float d_row_x[3] = {}, d_row_y[3] = {}, d_axes[3][3];
  for (int i = 0; i < 3; ++i) {
    const float scale = in.scales[3 * n + i], u = scale * s.u[i], v = scale * s.v[i];
    const float d_u = 2 * u * d_a + v * d_b, d_v = 2 * v * d_c + u * d_b;
    g.scale[i] += d_u * s.u[i] + d_v * s.v[i];
    for (int j = 0; j < 3; ++j) {
      d_axes[i][j] = scale * (d_u * s.row_x[j] + d_v * s.row_y[j]);
      d_row_x[j] += scale * d_u * s.axes[i][j];
      d_row_y[j] += scale * d_v * s.axes[i][j];
    }
  }
  const float w = s.quat[0], x = s.quat[1], y = s.quat[2], z = s.quat[3];
  const auto& r = d_axes;
  const float d_quat[4] = {
      2 * (x * (r[1][2] - r[2][1]) + y * (r[2][0] - r[0][2]) + z * (r[0][1] - r[1][0])),
      2 * (w * (r[1][2] - r[2][1]) + y * (r[1][0] + r[0][1]) + z * (r[2][0] + r[0][2])) - 4 * x * (r[1][1] + r[2][2]),
      2 * (w * (r[2][0] - r[0][2]) + x * (r[1][0] + r[0][1]) + z * (r[2][1] + r[1][2])) - 4 * y * (r[0][0] + r[2][2]),
      2 * (w * (r[0][1] - r[1][0]) + x * (r[2][0] + r[0][2]) + y * (r[2][1] + r[1][2])) - 4 * z * (r[0][0] + r[1][1])};
  float along = 0;  // of the quaternion itself: its length has no effect
  for (int i = 0; i < 4; ++i) along += d_quat[i] * s.quat[i];
  for (int i = 0; i < 4; ++i) g.quat[i] += (d_quat[i] - along * s.quat[i]) / s.length;

  // The rows of the projection: j_x (e_0 - t_x e_2) and j_y (e_1 - t_y e_2).
  float d_jx = 0, d_jy = 0, d_tx = 0, d_ty = 0;
  for (int i = 0; i < 3; ++i) {
    d_jx += d_row_x[i] * (e[i] - s.tx * e[8 + i]);
    d_jy += d_row_y[i] * (e[4 + i] - s.ty * e[8 + i]);
    d_tx -= s.jx * d_row_x[i] * e[8 + i];
    d_ty -= s.jy * d_row_y[i] * e[8 + i];
    camera[i] = s.jx * d_row_x[i];
    camera[4 + i] = s.jy * d_row_y[i];
    camera[8 + i] = -s.tx * camera[i] - s.ty * camera[4 + i];
  }
  // The center, through the clip space of the official code, and the depth.
  const float clip = 1 / (s.z + kClipGuard), d_ndc_x = 0.5f * width * center_x, d_ndc_y = 0.5f * height * center_y;
  const float ndc_x = (2 * fx * s.x + (2 * cx - 1) * s.z) * clip, ndc_y = (2 * fy * s.y + (2 * cy - 1) * s.z) * clip;
  float d_x = d_ndc_x * 2 * fx * clip, d_y = d_ndc_y * 2 * fy * clip;
  float d_z = moments[kMoments] + clip * (d_ndc_x * (2 * cx - 1 - ndc_x) + d_ndc_y * (2 * cy - 1 - ndc_y));
  d_z -= (d_jx * s.jx + d_jy * s.jy) / s.z;
  camera[12] = d_ndc_x * 2 * s.x * clip + d_jx * width / s.z;
  camera[13] = d_ndc_y * 2 * s.y * clip + d_jy * height / s.z;
  camera[14] = d_ndc_x * 2 * s.z * clip;
  camera[15] = d_ndc_y * 2 * s.z * clip;
  const float slope_x = s.x / s.z, slope_y = s.y / s.z;
  if (slope_x == s.tx) {
    d_x += d_tx / s.z;
    d_z -= d_tx * slope_x / s.z;
  } else {
    camera[12] -= d_tx * s.tx / fx;  // t is a multiple of 1 / f there
  }
  if (slope_y == s.ty) {
    d_y += d_ty / s.z;
    d_z -= d_ty * slope_y / s.z;
  } else {
    camera[13] -= d_ty * s.ty / fy;
  }
  const float* const mean = in.means + 3 * n;
  for (int i = 0; i < 3; ++i) {
    g.mean[i] += d_x * e[i] + d_y * e[4 + i] + d_z * e[8 + i];
    camera[i] += d_x * mean[i];
    camera[4 + i] += d_y * mean[i];
    camera[8 + i] += d_z * mean[i];
  }
  camera[3] = d_x, camera[7] = d_y, camera[11] = d_z;
}

__global__ void __launch_bounds__(kThreads)
    project_slots_gradient(const Projection in, int64_t views, const Outputs out) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x, warp = n / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  OfGaussian g{};
  for (int64_t view = 0; view < views; ++view) {
    float camera[kCamera] = {};
    const int64_t slot = view * in.count + n;
    const bool drawn = n < in.count && out.counts[slot] > 0;
    if (drawn)
      add_view(in, n, in.extrinsics + 16 * view, in.intrinsics + 9 * view, out.splats + slot * kSplat,
               out.moments + slot * kSplat, g, camera);
    float* const target = out.cameras + (warp * views + view) * kCamera;
    const bool any = __any_sync(kAll, drawn);
    float mine = 0;
    for (int i = 0; any && i < kCamera; ++i) {
      for (int other = 16; other; other /= 2) camera[i] += __shfl_xor_sync(kAll, camera[i], other);
      if (lane == i) mine = camera[i];
    }
    if (lane < kCamera && n - lane < in.count) target[lane] = mine;
  }
  if (n >= in.count) return;
  const auto write = [&](float* to, const float* values, int size) {
    for (int i = 0; i < size; ++i) to[size * n + i] = out.resume ? to[size * n + i] + values[i] : values[i];
  };
  write(out.means, g.mean, 3);
  write(out.quats, g.quat, 4);
  write(out.scales, g.scale, 3);
  write(out.opacities, &g.opacity, 1);
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

void project_gaussians_gradient(TensorView<const float, 2> means, TensorView<const float, 2> quats,
                                TensorView<const float, 2> scales, TensorView<const float, 1> opacities,
                                TensorView<const float, 3> extrinsics, TensorView<const float, 3> intrinsics,
                                int64_t width, int64_t height, double kernel_size, TensorView<const int32_t, 2> counts,
                                TensorView<const float, 2> splats, TensorView<const float, 2> moments, bool resume,
                                TensorView<float, 2> mean_gradients, TensorView<float, 2> quat_gradients,
                                TensorView<float, 2> scale_gradients, TensorView<float, 1> opacity_gradients,
                                TensorView<float, 3> camera_gradients, int64_t stream) {
  const int64_t count = means.size(0), views = extrinsics.size(0);
  require(means.size(1) == 3 && quats.size(1) == 4 && scales.size(1) == 3 && quats.size(0) == count &&
              scales.size(0) == count && opacities.size(0) == count,
          "means, quats, scales and opacities must be [G, 3], [G, 4], [G, 3] and [G]");
  require(extrinsics.numel() == views * 16 && intrinsics.numel() == views * 9 && intrinsics.size(0) == views,
          "extrinsics and intrinsics must be [V, 4, 4] and [V, 3, 3]");
  require(
      counts.numel() == views * count && splats.numel() == views * count * kSplat && moments.numel() == splats.numel(),
      "counts, splats and moments must be [V, G] and twice [V * G, 8]");
  require(mean_gradients.shape == means.shape && quat_gradients.shape == quats.shape &&
              scale_gradients.shape == scales.shape && opacity_gradients.shape == opacities.shape &&
              camera_gradients.numel() == (count + 31) / 32 * views * kCamera,
          "gradients must have the shapes of what they belong to, those of cameras [warps, V, 16]");
  const Projection in{means.data,
                      quats.data,
                      scales.data,
                      opacities.data,
                      extrinsics.data,
                      intrinsics.data,
                      count,
                      static_cast<int>(width),
                      static_cast<int>(height),
                      float(kernel_size)};
  const Outputs out{counts.data,          splats.data,         moments.data,         resume,
                    mean_gradients.data,  quat_gradients.data, scale_gradients.data, opacity_gradients.data,
                    camera_gradients.data};
  launch({"project_gaussians_gradient", blocks(count, kThreads), kThreads, stream}, project_slots_gradient, in, views,
         out);
}

}  // namespace trellis::cuda
