// The inner loops of the Gaussian rasteriser; included once per instruction set with TRELLIS_ISA as the namespace.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "gaussians_simd.h"

namespace trellis {
namespace TRELLIS_ISA {

#include "gaussians_lanes.inl.h"
#include "gaussians_projection.inl.h"

template <class T>
static int64_t project_all(const ProjectJob<T>& job) {
  typedef typename Lanes<T>::V V;
  typedef typename Lanes<T>::M M;
  constexpr int kWidth = Lanes<T>::kWidth;
  const Camera<T>& camera = *job.camera;
  const V zero = splat(T(0));
  const T grid_x = T((camera.width + kTile - 1) / kTile), grid_y = T((camera.height + kTile - 1) / kTile);

  int64_t drawn = 0;
  for (int64_t begin = job.begin; begin < job.end; begin += kWidth) {
    V mean[3], quat[4], scale[3], opacity;
    load_columns<3>(job.means, begin, job.end, mean);
    Footprint<T> f;
    to_camera(camera, mean, f);
    const V z = f.z;
    M visible = less(splat(T(0.2)), z);
    if (!any(visible)) continue;
    load_columns<4>(job.quats, begin, job.end, quat);
    load_columns<3>(job.scales, begin, job.end, scale);
    load_columns<1>(job.opacities, begin, job.end, &opacity);

    footprint(camera, quat, scale, f);
    const V center_x = ((f.ndc_x + 1) * T(camera.width) - 1) * T(0.5);
    const V center_y = ((f.ndc_y + 1) * T(camera.height) - 1) * T(0.5);
    V a = f.a, b = f.b, c = f.c;

    // Mip filter.
    const V tiny = splat(T(1e-6));
    const V det_sharp = max(a * c - b * b, tiny);
    const V det_wide = max((a + camera.kernel_size) * (c + camera.kernel_size) - b * b, tiny);
    V fading = sqrt(det_sharp / (det_wide + tiny) + tiny);
    fading = select(less_equal(det_sharp, tiny), zero, select(less_equal(det_wide, tiny), zero, fading));
    a += camera.kernel_size;
    c += camera.kernel_size;
    const V det = a * c - b * b, inverse = 1 / det;
    opacity *= fading;

    // Tiles that the square of 3 standard deviations touches, rounded as the specification does.
    const V middle = T(0.5) * (a + c);
    const V largest = middle + sqrt(max(middle * middle - det, splat(T(0.1))));
    const V far = splat(T(1 << 20));
    const V radius = ceil(min(3 * sqrt(largest), far));
    const V px = min(max(center_x, -far), far), py = min(max(center_y, -far), far);
    const V tile_x0 = min(max(trunc((px - radius) * T(1.0 / kTile)), zero), splat(grid_x));
    const V tile_y0 = min(max(trunc((py - radius) * T(1.0 / kTile)), zero), splat(grid_y));
    const V tile_x1 = min(max(trunc((px + radius + T(kTile - 1)) * T(1.0 / kTile)), zero), splat(grid_x));
    const V tile_y1 = min(max(trunc((py + radius + T(kTile - 1)) * T(1.0 / kTile)), zero), splat(grid_y));

    // Of these, pixels where alpha can reach 1/255: the bounding box of an ellipse. The margin covers the rounding of
    // the inverse covariance, which grows with its condition.
    // 0 where everything is finite, else NaN.
    const V flaw = zero * (center_x + center_y + inverse * (a + b + c) + opacity + z + f.length2);
    const V smallest = min(min(scale[0], scale[1]), scale[2]);
    const M sound = less_equal(flaw, zero) & less(zero, smallest) & less(zero, scale[2]);
    opacity = select(sound, opacity, zero);

    const V margin = T(1.01) + T(1e-6) * (a * c * inverse);
    const V limit = max(log_above(opacity * T(255)), zero) + T(1e-3);
    const V reach_x = sqrt(2 * limit * a * margin) + T(0.01), reach_y = sqrt(2 * limit * c * margin) + T(0.01);
    const V side = splat(T(kTile));
    const V x0 = max(tile_x0 * side, floor(px - min(reach_x, far))),
            y0 = max(tile_y0 * side, floor(py - min(reach_y, far)));
    const V x1 = min(min(tile_x1 * side, splat(T(camera.width))), ceil(px + min(reach_x, far)) + 1);
    const V y1 = min(min(tile_y1 * side, splat(T(camera.height))), ceil(py + min(reach_y, far)) + 1);

    const V everything[13] = {
        center_x, center_y, T(-0.5) * c * inverse, b * inverse, T(-0.5) * a * inverse, opacity, -limit, z, x0, y0, x1,
        y1,       b / c};
    T table[13][kWidth], determinants[kWidth];
    for (int i = 0; i < 13; ++i) store(table[i], everything[i]);
    store(determinants, det);
    for (int lane = 0; lane < kWidth && begin + lane < job.end; ++lane) {
      const bool inside = table[8][lane] < table[10][lane] && table[9][lane] < table[11][lane];
      if (!(table[7][lane] > T(0.2) && determinants[lane] > 0 && table[5][lane] >= T(1) / 255 && inside)) continue;
      Splat<T>& s = job.splats[drawn++];
      s.x = table[0][lane];
      s.y = table[1][lane];
      s.xx = table[2][lane];
      s.xy = table[3][lane];
      s.yy = table[4][lane];
      s.opacity = table[5][lane];
      s.limit = table[6][lane];
      s.depth = table[7][lane];
      s.ridge = table[12][lane];
      s.x0 = static_cast<uint16_t>(table[8][lane]);
      s.y0 = static_cast<uint16_t>(table[9][lane]);
      s.x1 = static_cast<uint16_t>(table[10][lane]);
      s.y1 = static_cast<uint16_t>(table[11][lane]);
      s.index = static_cast<int32_t>(begin + lane);
    }
  }
  return drawn;
}

// kChannels 0: any number, read from the job.
template <int kChannels, class T>
static bool blend_tile(const BlendJob<T>& job) {
  typedef typename Lanes<T>::V V;
  typedef typename Lanes<T>::M M;
  constexpr int kWidth = Lanes<T>::kWidth;
  constexpr int kParts = kTile / kWidth;
  constexpr int kAhead = 6;
  const int64_t channels = kChannels ? kChannels : job.channels;
  T* const transmittances = job.state;
  T* const depths = transmittances + kTilePixels;
  T* const medians = depths + kTilePixels;
  T* const colors = transmittances + kFirstChannel * kTilePixels;
  const V zero = splat(T(0)), half = splat(T(0.5)), one = splat(T(1));
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
    const T* color = job.colors + int64_t{s.index} * channels;
    unsigned rows = open & reached_rows(s, job.left, job.top);
    if (!rows) continue;
    V xx[kParts], xy[kParts];
    for (int part = 0; part < kParts; ++part) {
      const V dx = s.x - load(columns + part * kWidth);
      xx[part] = dx * dx * s.xx;
      xy[part] = dx * s.xy;
    }
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
        V alpha = min(s.opacity * exp(max(power, splat(s.limit))), largest_alpha);
        hit = hit & less_equal(smallest_alpha, alpha);
        alpha = select(hit, alpha, zero);
        const V after = before * (one - alpha);
        const M stop = hit & less(after, smallest_transmittance);
        const V weight = select(stop, zero, alpha * before);
        store(transmittances + at, select(stop, -before, after));
        store(depths + at, load(depths + at) + weight * s.depth);
        for (int64_t channel = 0; channel < channels; ++channel) {
          T* plane = colors + channel * kTilePixels + at;
          store(plane, load(plane) + weight * color[channel]);
        }
        store_where(static_cast<M>(hit & ~stop), job.last + at, s.index);
        const M halves = less_equal(half, before) & less(after, half);
        if (any(halves)) store(medians + at, select(halves, splat(s.depth), load(medians + at)));
        stopped |= any(stop);
      }
      if (stopped) {
        bool going = false;
        for (int part = 0; part < kParts; ++part) {
          going |= any(less(zero, load(transmittances + row * kTile + part * kWidth)));
        }
        if (!going) open &= ~(1u << row);
      }
    }
  }
  return open == 0;
}

template <class T>
INLINE bool blend_any(const BlendJob<T>& job) {
  return job.channels == 3 ? blend_tile<3>(job) : blend_tile<0>(job);
}

int64_t project(const ProjectJob<float>& job) { return project_all(job); }
int64_t project(const ProjectJob<double>& job) { return project_all(job); }
bool blend(const BlendJob<float>& job) { return blend_any(job); }
bool blend(const BlendJob<double>& job) { return blend_any(job); }

#undef INLINE

}  // namespace TRELLIS_ISA
}  // namespace trellis
