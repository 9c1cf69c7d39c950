// The inner loops of the derivative of the Gaussian rasteriser; included once per instruction set with TRELLIS_ISA as
// the namespace.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "gaussians_simd.h"

namespace trellis {
namespace TRELLIS_ISA {

#include "gaussians_lanes.inl.h"
#include "gaussians_projection.inl.h"

// In pairs, always the same ones.
template <class T>
INLINE T sum_of_lanes(typename Lanes<T>::V value) {
  T lanes[Lanes<T>::kWidth];
  store(lanes, value);
  for (int half = Lanes<T>::kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// kChannels 0: any number, read from the job. With v_i the value of a Gaussian (its color and depth times the
// gradients of the pixel) and R_i the sum of weight times value of all that is behind it, the derivative with respect
// to alpha_i is T_i v_i - R_i / (1 - alpha_i).
template <int kChannels, class T>
static bool blend_tile_backward(const BlendBackwardJob<T>& job) {
  typedef typename Lanes<T>::V V;
  typedef typename Lanes<T>::M M;
  constexpr int kWidth = Lanes<T>::kWidth;
  constexpr int kParts = kTile / kWidth;
  constexpr int kAhead = 6;
  const int64_t channels = kChannels ? kChannels : job.channels;
  T* const transmittances = job.state;
  T* const behind = transmittances + kTilePixels;
  const T* const depth_gradients = behind + kTilePixels;
  const T* const color_gradients = transmittances + kFirstGradient * kTilePixels;
  const V zero = splat(T(0)), one = splat(T(1));
  const V smallest_alpha = splat(T(1) / 255), largest_alpha = splat(T(0.99)), smallest_transmittance = splat(T(1e-4));

  T columns[kTile];
  for (int i = 0; i < kTile; ++i) columns[i] = T(job.left + i);
  unsigned open = 0;  // rows with a pixel that is not finished
  for (int row = 0; row < kTile; ++row) {
    for (int part = 0; part < kParts; ++part) {
      if (any(less(zero, load(transmittances + row * kTile + part * kWidth)))) open |= 1u << row;
    }
  }

  for (int64_t i = 0; i < job.count && open; ++i) {
    const Splat<T>& s = job.splats[job.list[i]];
    if (i + kAhead < job.count) {
      const Splat<T>& ahead = job.splats[job.list[i + kAhead]];
      __builtin_prefetch(&ahead);
      if (sizeof(ahead) > 64) __builtin_prefetch(reinterpret_cast<const char*>(&ahead) + 64);
    }
    unsigned rows = open & reached_rows(s, job.left, job.top);
    if (!rows) continue;
    const T* color = job.colors + int64_t{s.index} * channels;
    V xx[kParts], xy[kParts];
    V first[kParts], second[kParts], third[kParts];  // sums of the gradient times 1, dy, dy^2
    for (int part = 0; part < kParts; ++part) {
      const V dx = s.x - load(columns + part * kWidth);
      xx[part] = dx * dx * s.xx;
      xy[part] = dx * s.xy;
      first[part] = second[part] = third[part] = zero;
    }
    V depth = zero, shade[kChannels ? kChannels : 1];
    if (kChannels) {
      for (int channel = 0; channel < kChannels; ++channel) shade[channel] = zero;
    } else {
      for (int64_t channel = 0; channel < channels; ++channel) store(job.scratch + channel * kTile, zero);
    }
    bool contributes = false;
    for (; rows; rows &= rows - 1) {
      const int row = __builtin_ctz(rows);
      const T dy = s.y - T(job.top + row);
      bool stopped = false;
      for (int part = 0; part < kParts; ++part) {
        const int at = row * kTile + part * kWidth;
        const V power = xx[part] + dy * (xy[part] + dy * s.yy);
        const V before = load(transmittances + at);
        M hit = less_equal(splat(s.limit), power) & less_equal(power, zero) & less(zero, before);
        if (!any(hit)) continue;
        const V full = s.opacity * exp(max(power, splat(s.limit)));
        V alpha = min(full, largest_alpha);
        hit = hit & less_equal(smallest_alpha, alpha);
        alpha = select(hit, alpha, zero);
        const V left = one - alpha, after = before * left;
        const M stop = hit & less(after, smallest_transmittance);
        const V weight = select(stop, zero, alpha * before);
        store(transmittances + at, select(stop, -before, after));

        const V depth_gradient = load(depth_gradients + at);
        V value = depth_gradient * s.depth;
        depth += weight * depth_gradient;
        if (kChannels) {
          for (int channel = 0; channel < kChannels; ++channel) {
            const V gradient = load(color_gradients + channel * kTilePixels + at);
            value += gradient * color[channel];
            shade[channel] += weight * gradient;
          }
        } else {
          for (int64_t channel = 0; channel < channels; ++channel) {
            const V gradient = load(color_gradients + channel * kTilePixels + at);
            value += gradient * color[channel];
            T* const sum = job.scratch + channel * kTile;
            store(sum, load(sum) + weight * gradient);
          }
        }
        const V rest = load(behind + at) - weight * value;
        store(behind + at, rest);
        // alpha d/d alpha; a zero weight says that the pixel is not reached, or finished.
        const V slope = weight * value - alpha * rest / left;
        const M moves = less(zero, weight) & less_equal(full, largest_alpha);
        const V gradient = select(moves, slope, zero);
        first[part] += gradient;
        second[part] += gradient * dy;
        third[part] += gradient * (dy * dy);
        stopped |= any(stop);
        contributes |= any(hit);
      }
      if (stopped) {
        bool going = false;
        for (int part = 0; part < kParts; ++part) {
          going |= any(less(zero, load(transmittances + row * kTile + part * kWidth)));
        }
        if (!going) open &= ~(1u << row);
      }
    }
    if (!contributes) continue;
    V sums[6] = {zero, zero, zero, zero, zero, zero};
    for (int part = 0; part < kParts; ++part) {
      const V dx = s.x - load(columns + part * kWidth);
      sums[0] += first[part];
      sums[1] += first[part] * dx;
      sums[2] += second[part];
      sums[3] += first[part] * (dx * dx);
      sums[4] += second[part] * dx;
      sums[5] += third[part];
    }
    job.reached[i] = 1;
    T* const target = job.sums + i * (kMoments + channels);
    for (int moment = 0; moment < 6; ++moment) target[moment] = sum_of_lanes<T>(sums[moment]);
    target[6] = sum_of_lanes<T>(depth);
    for (int64_t channel = 0; channel < channels; ++channel) {
      target[kMoments + channel] = sum_of_lanes<T>(kChannels ? shade[channel] : load(job.scratch + channel * kTile));
    }
  }
  return open == 0;
}

// Adds columns to rows, as load_columns reads them.
template <int kColumns, class T>
INLINE void add_columns(T* rows, int64_t begin, int64_t end, const typename Lanes<T>::V* columns) {
  constexpr int kWidth = Lanes<T>::kWidth;
  T buffer[kColumns][kWidth];
  for (int column = 0; column < kColumns; ++column) store(buffer[column], columns[column]);
  for (int lane = 0; lane < kWidth && begin + lane < end; ++lane) {
    for (int column = 0; column < kColumns; ++column) rows[(begin + lane) * kColumns + column] += buffer[column][lane];
  }
}

template <class T>
static void project_all_backward(const ProjectBackwardJob<T>& job) {
  typedef typename Lanes<T>::V V;
  typedef typename Lanes<T>::M M;
  constexpr int kWidth = Lanes<T>::kWidth;
  const Camera<T>& camera = *job.camera;
  const T *r = camera.rotation, kernel_size = camera.kernel_size;
  const V zero = splat(T(0)), tiny = splat(T(1e-6));
  const T half_width = T(0.5) * T(camera.width), half_height = T(0.5) * T(camera.height);
  const T limit_x = T(1.3 * 0.5) / camera.fx, limit_y = T(1.3 * 0.5) / camera.fy;
  V d_camera[kCameraNumbers];
  for (V& number : d_camera) number = zero;

  for (int64_t begin = job.begin; begin < job.end; begin += kWidth) {
    V moments[8], mean[3], quat[4], scale[3], opacity;
    load_columns<8>(job.moments, begin, job.end, moments);
    // Lanes past the end repeat the last Gaussian; they count for nothing.
    const M drawn = less(zero, moments[7]) & less(lane_numbers(T(0)), splat(T(job.end - begin)));
    if (!any(drawn)) continue;
    load_columns<3>(job.means, begin, job.end, mean);
    load_columns<4>(job.quats, begin, job.end, quat);
    load_columns<3>(job.scales, begin, job.end, scale);
    load_columns<1>(job.opacities, begin, job.end, &opacity);
    Footprint<T> f;
    to_camera(camera, mean, f);
    footprint(camera, quat, scale, f);
    const V wide_a = f.a + kernel_size, wide_c = f.c + kernel_size;
    const V det_sharp = f.a * f.c - f.b * f.b, det = wide_a * wide_c - f.b * f.b;
    const V kept_sharp = max(det_sharp, tiny), kept_wide = max(det, tiny);
    const V share = kept_sharp / (kept_wide + tiny), fading = sqrt(share + tiny);

    // Opacity, and the center and inverse covariance (A, B, C) of the footprint.
    const V d_faded = moments[0] / (opacity * fading);
    const V d_opacity = d_faded * fading;
    const V inverse = 1 / det, A = wide_c * inverse, B = -f.b * inverse, C = wide_a * inverse;
    const V d_center_x = -(A * moments[1] + B * moments[2]), d_center_y = -(B * moments[1] + C * moments[2]);
    const V dA = T(-0.5) * moments[3], dB = -moments[4], dC = T(-0.5) * moments[5];

    // Covariance, through its inverse and through the fading.
    const V d_share = d_faded * opacity * T(0.5) / fading;
    const V d_sharp = select(less_equal(tiny, det_sharp), d_share / (kept_wide + tiny), zero);
    const V d_wide = select(less_equal(tiny, det), -d_share * share / (kept_wide + tiny), zero);
    const V d_a = d_sharp * f.c + d_wide * wide_c - (A * A * dA + A * B * dB + B * B * dC);
    const V d_c = d_sharp * f.a + d_wide * wide_a - (B * B * dA + B * C * dB + C * C * dC);
    const V d_b = -2 * f.b * (d_sharp + d_wide) - (2 * A * B * dA + (A * C + B * B) * dB + 2 * B * C * dC);

    // Axes of the ellipsoid, and the rows of the projection.
    V d_scale[3], d_axes[3][3], d_row_x[3] = {zero, zero, zero}, d_row_y[3] = {zero, zero, zero};
    for (int i = 0; i < 3; ++i) {
      const V u = scale[i] * f.along_x[i], v = scale[i] * f.along_y[i];
      const V d_u = 2 * d_a * u + d_b * v, d_v = 2 * d_c * v + d_b * u;
      d_scale[i] = d_u * f.along_x[i] + d_v * f.along_y[i];
      for (int j = 0; j < 3; ++j) {
        d_axes[i][j] = scale[i] * (d_u * f.row_x[j] + d_v * f.row_y[j]);
        d_row_x[j] += scale[i] * d_u * f.axes[i][j];
        d_row_y[j] += scale[i] * d_v * f.axes[i][j];
      }
    }

    // Quaternion of length 1, then of any length. axes[i] is column i of the rotation.
    const V w = f.qw, x = f.qx, y = f.qy, z = f.qz;
    const auto& d = d_axes;
    const V d_w = 2 * (z * (d[0][1] - d[1][0]) + y * (d[2][0] - d[0][2]) + x * (d[1][2] - d[2][1]));
    const V d_x =
        2 * (y * (d[0][1] + d[1][0]) + z * (d[0][2] + d[2][0]) + w * (d[1][2] - d[2][1]) - 2 * x * (d[1][1] + d[2][2]));
    const V d_y =
        2 * (x * (d[0][1] + d[1][0]) + z * (d[1][2] + d[2][1]) + w * (d[2][0] - d[0][2]) - 2 * y * (d[0][0] + d[2][2]));
    const V d_z =
        2 * (x * (d[0][2] + d[2][0]) + y * (d[1][2] + d[2][1]) + w * (d[0][1] - d[1][0]) - 2 * z * (d[0][0] + d[1][1]));
    const V along = w * d_w + x * d_x + y * d_y + z * d_z;
    V d_quat[4] = {(d_w - w * along) * f.shrink, (d_x - x * along) * f.shrink, (d_y - y * along) * f.shrink,
                   (d_z - z * along) * f.shrink};

    // Camera: rotation [9], translation [3], fx, fy, cx, cy.
    V d_jx = zero, d_jy = zero, d_tx = zero, d_ty = zero, number[kCameraNumbers];
    for (int j = 0; j < 3; ++j) {
      d_jx += d_row_x[j] * (r[j] - f.tx * r[6 + j]);
      d_jy += d_row_y[j] * (r[3 + j] - f.ty * r[6 + j]);
      d_tx -= f.jx * d_row_x[j] * r[6 + j];
      d_ty -= f.jy * d_row_y[j] * r[6 + j];
      number[j] = f.jx * d_row_x[j];
      number[3 + j] = f.jy * d_row_y[j];
      number[6 + j] = -(f.tx * number[j] + f.ty * number[3 + j]);
    }
    const V inside_x = select(less(splat(limit_x), max(f.x, -f.x) * f.near), zero, d_tx);
    const V inside_y = select(less(splat(limit_y), max(f.y, -f.y) * f.near), zero, d_ty);
    const V d_ndc_x = d_center_x * half_width / f.clip_w, d_ndc_y = d_center_y * half_height / f.clip_w;
    const V d_point_x = inside_x * f.near + 2 * camera.fx * d_ndc_x;
    const V d_point_y = inside_y * f.near + 2 * camera.fy * d_ndc_y;
    const V d_point_z = moments[6] - (inside_x * f.tx + inside_y * f.ty + d_jx * f.jx + d_jy * f.jy) * f.near +
                        d_ndc_x * (2 * camera.cx - 1 - f.ndc_x) + d_ndc_y * (2 * camera.cy - 1 - f.ndc_y);
    const V point[3] = {d_point_x, d_point_y, d_point_z};
    V d_mean[3];
    for (int j = 0; j < 3; ++j) {
      d_mean[j] = r[j] * d_point_x + r[3 + j] * d_point_y + r[6 + j] * d_point_z;
      for (int i = 0; i < 3; ++i) number[3 * i + j] += point[i] * mean[j];
      number[9 + j] = point[j];
    }
    number[12] = 2 * d_ndc_x * f.x + d_jx * T(camera.width) * f.near - (d_tx - inside_x) * f.tx / camera.fx;
    number[13] = 2 * d_ndc_y * f.y + d_jy * T(camera.height) * f.near - (d_ty - inside_y) * f.ty / camera.fy;
    number[14] = 2 * d_ndc_x * f.z;
    number[15] = 2 * d_ndc_y * f.z;

    for (int i = 0; i < kCameraNumbers; ++i) d_camera[i] += select(drawn, number[i], zero);
    for (int i = 0; i < 3; ++i) {
      d_mean[i] = select(drawn, d_mean[i], zero);
      d_scale[i] = select(drawn, d_scale[i], zero);
    }
    for (V& value : d_quat) value = select(drawn, value, zero);
    const V shown_opacity = select(drawn, d_opacity, zero);
    add_columns<3>(job.d_means, begin, job.end, d_mean);
    add_columns<4>(job.d_quats, begin, job.end, d_quat);
    add_columns<3>(job.d_scales, begin, job.end, d_scale);
    add_columns<1>(job.d_opacities, begin, job.end, &shown_opacity);
  }
  for (int i = 0; i < kCameraNumbers; ++i) job.d_camera[i] = sum_of_lanes<T>(d_camera[i]);
}

template <class T>
INLINE bool blend_any_backward(const BlendBackwardJob<T>& job) {
  return job.channels == 3 ? blend_tile_backward<3>(job) : blend_tile_backward<0>(job);
}

bool blend_backward(const BlendBackwardJob<float>& job) { return blend_any_backward(job); }
bool blend_backward(const BlendBackwardJob<double>& job) { return blend_any_backward(job); }
void project_backward(const ProjectBackwardJob<float>& job) { project_all_backward(job); }
void project_backward(const ProjectBackwardJob<double>& job) { project_all_backward(job); }

#undef INLINE

}  // namespace TRELLIS_ISA
}  // namespace trellis
