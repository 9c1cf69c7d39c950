#include "backprojection.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "backprojection_rows.h"
#include "cpu_features.h"
#include "parallel.h"

namespace trellis::cpu {
namespace {

constexpr int64_t kPointsAtOnce = 128;  // their sums stay in the second-level cache while the views pass by

template <class T>
struct Kernels {
  void (*add_taps)(const Taps<T>&, T*, int64_t);
  void (*keep_larger)(const Taps<T>&, int32_t, T*, int32_t*, int64_t);
  void (*sum_shares)(const Share<T>*, int64_t, const T*, const int32_t*, int32_t, T*, int64_t, int64_t);
};

template <class T>
Kernels<T> kernels() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512)
    return {backprojection_avx512::add_taps, backprojection_avx512::keep_larger, backprojection_avx512::sum_shares};
  if (instruction_set() == InstructionSet::avx2)
    return {backprojection_avx2::add_taps, backprojection_avx2::keep_larger, backprojection_avx2::sum_shares};
#endif
  return {backprojection_baseline::add_taps, backprojection_baseline::keep_larger, backprojection_baseline::sum_shares};
}

// The pixels around the place where a point is seen.
struct Footprint {
  bool seen = false;  // in front of the camera, in the picture, and not hidden
  int count = 0;
  std::array<int64_t, 4> pixels{};
  std::array<double, 4> weights{};
};

class Views {
 public:
  Views(TensorView<const double, 3> extrinsics, TensorView<const double, 3> intrinsics,
        TensorView<const double, 3> depths, bool has_depths, double tolerance, int64_t height, int64_t width)
      : cameras_(extrinsics.size(0)),
        depths_(depths),
        has_depths_(has_depths && depths.size(1) * depths.size(2) > 0),
        tolerance_(tolerance),
        height_(height),
        width_(width) {
    if (extrinsics.size(1) != 4 || extrinsics.size(2) != 4 || intrinsics.size(1) != 3 || intrinsics.size(2) != 3 ||
        intrinsics.size(0) != extrinsics.size(0) || (has_depths && depths.size(0) != extrinsics.size(0)))
      throw std::invalid_argument("extrinsics, intrinsics and depths must be of the same views");
    for (size_t view = 0; view < cameras_.size(); ++view) {
      const double* const inner = intrinsics.row(view);
      const double* const outer = extrinsics.row(view);
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 4; ++j) {
          double sum = 0;
          for (int k = 0; k < 3; ++k) sum += inner[3 * i + k] * outer[4 * k + j];
          cameras_[view][4 * i + j] = sum;
        }
    }
  }

  int64_t count() const { return static_cast<int64_t>(cameras_.size()); }

  Footprint footprint(int64_t view, const double* point) const {
    Footprint found;
    const auto& m = cameras_[view];
    const auto along = [&](int row) {
      return m[4 * row] * point[0] + m[4 * row + 1] * point[1] + m[4 * row + 2] * point[2] + m[4 * row + 3];
    };
    const double z = along(2);
    if (!(z > 0)) return found;
    const double u = along(0) / z, v = along(1) / z;
    found.seen = u >= 0 && u < 1 && v >= 0 && v < 1;
    if (found.seen && has_depths_) {
      const int64_t rows = depths_.size(1), columns = depths_.size(2);
      const int64_t i = std::min(rows - 1, static_cast<int64_t>(v * static_cast<double>(rows)));
      const int64_t j = std::min(columns - 1, static_cast<int64_t>(u * static_cast<double>(columns)));
      const double surface = depths_.data[(view * rows + i) * columns + j];
      found.seen = surface <= 0 || z <= surface + tolerance_;
    }
    const double x = u * static_cast<double>(width_) - 0.5, y = v * static_cast<double>(height_) - 0.5;
    if (!(x > -1 && x < static_cast<double>(width_) && y > -1 && y < static_cast<double>(height_))) return found;
    const double left = std::floor(x), top = std::floor(y);
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t column = static_cast<int64_t>(left) + corner % 2, row = static_cast<int64_t>(top) + corner / 2;
      if (column < 0 || column >= width_ || row < 0 || row >= height_) continue;
      found.pixels[found.count] = row * width_ + column;
      found.weights[found.count++] = (corner % 2 ? x - left : left + 1 - x) * (corner / 2 ? y - top : top + 1 - y);
    }
    return found;
  }

 private:
  std::vector<std::array<double, 12>> cameras_;  // [3, 4] each: world to picture
  TensorView<const double, 3> depths_;
  bool has_depths_;
  double tolerance_;
  int64_t height_, width_;
};

template <class T>
void append(Taps<T>& taps, const Footprint& found, const T* picture, int64_t channels) {
  for (int i = 0; i < found.count; ++i) {
    taps.rows[taps.count] = picture + found.pixels[i] * channels;
    taps.weights[taps.count++] = static_cast<T>(found.weights[i]);
  }
}

}  // namespace

template <class T>
void backproject(TensorView<const T, 4> features, TensorView<const double, 2> positions,
                 TensorView<const int64_t, 1> order, TensorView<const double, 3> extrinsics,
                 TensorView<const double, 3> intrinsics, TensorView<const double, 3> depths, bool has_depths,
                 double tolerance, int64_t first_view, TensorView<T, 2> out, TensorView<int32_t, 1> counts,
                 TensorView<int32_t, 2> winners, int threads) {
  const int64_t points = positions.size(0), channels = features.size(3);
  const bool maximum = winners.size(0) == points && winners.size(1) == channels;
  if (positions.size(1) != 3 || features.size(0) != extrinsics.size(0) || out.size(0) != points ||
      out.size(1) != channels || counts.size(0) != points || order.size(0) != points ||
      (!maximum && winners.numel() != 0))
    throw std::invalid_argument("features, positions, order, out, counts and winners must be of one shape");
  if (std::any_of(order.data, order.data + points, [points](int64_t point) { return point < 0 || point >= points; }))
    throw std::invalid_argument("order must be a permutation of the points");
  const Views views(extrinsics, intrinsics, depths, has_depths, tolerance, features.size(1), features.size(2));
  const auto kernel = kernels<T>();
  parallel_for(points, kPointsAtOnce, threads, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile += kPointsAtOnce) {
      const int64_t last = std::min(end, tile + kPointsAtOnce);
      for (int64_t group = 0; group < views.count(); group += kViewsAtOnce) {
        const int64_t group_end = std::min(views.count(), group + kViewsAtOnce);
        for (int64_t place = tile; place < last; ++place) {
          const int64_t point = order.data[place];
          Taps<T> taps;
          for (int64_t view = group; view < group_end; ++view) {
            const Footprint found = views.footprint(view, positions.row(point));
            const bool counted = found.seen || (!maximum && !has_depths);
            if (!counted) continue;
            counts.data[point] += 1;
            append(taps, found, features.row(view), channels);
            if (maximum) {
              const auto id = static_cast<int32_t>(first_view + view);
              kernel.keep_larger(taps, id, out.row(point), winners.row(point), channels);
              taps.count = 0;
            }
          }
          if (taps.count) kernel.add_taps(taps, out.row(point), channels);
        }
      }
    }
  });
}

template <class T>
void backproject_gradient(TensorView<const T, 3> out_gradient, TensorView<const int32_t, 3> winners,
                          TensorView<const double, 2> positions, TensorView<const double, 3> extrinsics,
                          TensorView<const double, 3> intrinsics, TensorView<const double, 3> depths, bool has_depths,
                          double tolerance, int64_t first_view, TensorView<T, 4> out, int threads) {
  const int64_t points = positions.size(0), channels = out.size(3), pixels = out.size(1) * out.size(2);
  const bool maximum = winners.numel() != 0;
  const int64_t blocks = out_gradient.size(0), block = out_gradient.size(2);
  if (positions.size(1) != 3 || out.size(0) != extrinsics.size(0) || out_gradient.size(1) != points ||
      blocks * block < channels || (blocks - 1) * block >= std::max<int64_t>(channels, 1) ||
      (maximum && winners.shape != out_gradient.shape))
    throw std::invalid_argument("out_gradient, winners, positions and out must be of one shape");
  const Views views(extrinsics, intrinsics, depths, has_depths, tolerance, out.size(1), out.size(2));
  const auto kernel = kernels<T>();
  // A view belongs to one thread. The shares of each of its pixels are listed in the order of the points, so the sums
  // have a fixed order.
  parallel_chunks(views.count(), threads, [&](int64_t view) {
    std::vector<Footprint> found(points);
    std::vector<int64_t> ends(pixels + 1, 0);
    for (int64_t point = 0; point < points; ++point) {
      found[point] = views.footprint(view, positions.row(point));
      if (!found[point].seen && (maximum || has_depths)) found[point].count = 0;
      for (int i = 0; i < found[point].count; ++i) ++ends[found[point].pixels[i] + 1];
    }
    for (int64_t pixel = 0; pixel < pixels; ++pixel) ends[pixel + 1] += ends[pixel];
    std::vector<Share<T>> shares(ends[pixels]);
    for (int64_t point = 0; point < points; ++point)  // afterwards ends[i] is where pixel i ends
      for (int i = 0; i < found[point].count; ++i)
        shares[ends[found[point].pixels[i]]++] = {point, static_cast<T>(found[point].weights[i])};
    for (int64_t first = 0; first < channels; first += block) {
      const int64_t width = std::min(block, channels - first), part = first / block;
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        const int64_t begin = pixel ? ends[pixel - 1] : 0;
        kernel.sum_shares(shares.data() + begin, ends[pixel] - begin, out_gradient.row(part),
                          maximum ? winners.row(part) : nullptr, static_cast<int32_t>(first_view + view),
                          out.row(view) + pixel * channels + first, block, width);
      }
    }
  });
}

#define TRELLIS_INSTANTIATE(T)                                                                                        \
  template void backproject(TensorView<const T, 4>, TensorView<const double, 2>, TensorView<const int64_t, 1>,        \
                            TensorView<const double, 3>, TensorView<const double, 3>, TensorView<const double, 3>,    \
                            bool, double, int64_t, TensorView<T, 2>, TensorView<int32_t, 1>, TensorView<int32_t, 2>,  \
                            int);                                                                                     \
  template void backproject_gradient(                                                                                 \
      TensorView<const T, 3>, TensorView<const int32_t, 3>, TensorView<const double, 2>, TensorView<const double, 3>, \
      TensorView<const double, 3>, TensorView<const double, 3>, bool, double, int64_t, TensorView<T, 4>, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)
#undef TRELLIS_INSTANTIATE

}  // namespace trellis::cpu
