#include "voxelize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace trellis::cpu {
namespace {

constexpr double kSlack = 1e-9;  // voxels, in the triangle's favor
constexpr int64_t kFacesAtOnce = 256;

// The triangle's shadow along one axis against the unit square at (a, b): three half-planes, moved outward by what the
// square reaches. Where the shadow is a segment, its two sides are the half-planes, so nothing needs a special case.
struct Shadow {
  double a[3], b[3], offset[3];

  // corner[i] = {first, second} coordinate; turned: whether the corners run clockwise.
  Shadow(const double (&corner)[3][2], bool turned) {
    for (int i = 0; i < 3; ++i) {
      const double* const from = corner[i];
      const double* const to = corner[(i + 1) % 3];
      const double sign = turned ? -1 : 1;
      a[i] = sign * (from[1] - to[1]);
      b[i] = sign * (to[0] - from[0]);
      offset[i] = -(a[i] * from[0] + b[i] * from[1]) + std::max(0.0, a[i]) + std::max(0.0, b[i]) +
                  kSlack * (std::abs(a[i]) + std::abs(b[i]));
    }
  }

  bool touches(double x, double y) const {
    for (int i = 0; i < 3; ++i)
      if (!(a[i] * x + b[i] * y + offset[i] >= 0)) return false;
    return true;
  }
};

struct Range {
  int64_t begin, end;
};

// Cells [i, i + 1] that share a point with [low, high].
Range cells(double low, double high, int64_t resolution) {
  const double side = static_cast<double>(resolution);
  return {static_cast<int64_t>(std::clamp(std::ceil(low - 1 - kSlack), 0.0, side)),
          static_cast<int64_t>(std::clamp(std::floor(high + kSlack) + 1, 0.0, side))};
}

// mark(x, y, z) for every cell that the triangle touches.
template <class Mark>
void visit_cells(const double (&v)[3][3], int64_t resolution, const Mark& mark) {
  Range range[3];
  for (int axis = 0; axis < 3; ++axis) {
    const auto [low, high] = std::minmax({v[0][axis], v[1][axis], v[2][axis]});
    range[axis] = cells(low, high, resolution);
    if (range[axis].begin >= range[axis].end) return;
  }
  double e[2][3], n[3];
  for (int axis = 0; axis < 3; ++axis) {
    e[0][axis] = v[1][axis] - v[0][axis];
    e[1][axis] = v[2][axis] - v[1][axis];
  }
  for (int axis = 0; axis < 3; ++axis) {
    const int next = (axis + 1) % 3, last = (axis + 2) % 3;
    n[axis] = e[0][next] * e[1][last] - e[0][last] * e[1][next];
  }
  const auto shadow = [&](int first, int second, int along) {
    const double corner[3][2] = {{v[0][first], v[0][second]}, {v[1][first], v[1][second]}, {v[2][first], v[2][second]}};
    return Shadow(corner, n[along] < 0);
  };
  const Shadow xy = shadow(0, 1, 2), yz = shadow(1, 2, 0), zx = shadow(2, 0, 1);
  // The plane against the box: n . cell + low <= 0 <= n . cell + high.
  const double at = n[0] * v[0][0] + n[1] * v[0][1] + n[2] * v[0][2];
  double low = -at, high = -at;
  for (const double component : n) {
    low += std::min(0.0, component) - kSlack * std::abs(component);
    high += std::max(0.0, component) + kSlack * std::abs(component);
  }
  for (int64_t x = range[0].begin; x < range[0].end; ++x)
    for (int64_t y = range[1].begin; y < range[1].end; ++y) {
      if (!xy.touches(static_cast<double>(x), static_cast<double>(y))) continue;
      const double across = n[0] * static_cast<double>(x) + n[1] * static_cast<double>(y);
      for (int64_t z = range[2].begin; z < range[2].end; ++z) {
        const double distance = across + n[2] * static_cast<double>(z);
        if (distance + low <= 0 && distance + high >= 0 && yz.touches(static_cast<double>(y), static_cast<double>(z)) &&
            zx.touches(static_cast<double>(z), static_cast<double>(x)))
          mark(x, y, z);
      }
    }
}

}  // namespace

int64_t voxelize_mesh(TensorView<const double, 2> vertices, TensorView<const int32_t, 2> faces, int64_t resolution,
                      TensorView<int64_t, 3> bits, int threads) {
  const int64_t words = (resolution + 63) / 64;
  if (vertices.size(1) != 3 || faces.size(1) != 3 || bits.size(0) != resolution || bits.size(1) != resolution ||
      bits.size(2) != words)
    throw std::invalid_argument("vertices, faces and bits must be [V, 3], [F, 3] and [R, R, words]");
  for (int64_t i = 0; i < faces.numel(); ++i)
    if (faces.data[i] < 0 || faces.data[i] >= vertices.size(0))
      throw std::invalid_argument("faces must be rows of vertices, in [0, " + std::to_string(vertices.size(0)) +
                                  "); got " + std::to_string(faces.data[i]));
  const double scale = static_cast<double>(resolution);
  parallel_for(faces.size(0), kFacesAtOnce, threads, [&](int64_t begin, int64_t end) {
    for (int64_t face = begin; face < end; ++face) {
      double corners[3][3];
      bool finite = true;
      for (int i = 0; i < 3; ++i)
        for (int axis = 0; axis < 3; ++axis) {
          corners[i][axis] = (vertices.row(faces.row(face)[i])[axis] + 0.5) * scale;
          finite = finite && std::isfinite(corners[i][axis]);
        }
      if (!finite) continue;
      // Bits are only ever set: whoever comes first, the result is the same.
      visit_cells(corners, resolution, [&](int64_t x, int64_t y, int64_t z) {
        int64_t* const word = bits.data + (x * resolution + y) * words + z / 64;
        __atomic_fetch_or(word, static_cast<int64_t>(uint64_t{1} << (z % 64)), __ATOMIC_RELAXED);
      });
    }
  });
  int64_t count = 0;
  for (int64_t i = 0; i < bits.numel(); ++i) count += std::popcount(static_cast<uint64_t>(bits.data[i]));
  return count;
}

void list_voxels(TensorView<const int64_t, 3> bits, TensorView<int32_t, 2> coords) {
  int64_t row = 0;
  for (int64_t i = 0; i < bits.numel(); ++i)
    for (auto word = static_cast<uint64_t>(bits.data[i]); word; word &= word - 1) {
      if (row == coords.size(0)) throw std::invalid_argument("coords must have a row for every bit that is set");
      int32_t* const out = coords.row(row++);
      const int64_t column = i / bits.size(2);
      out[0] = static_cast<int32_t>(column / bits.size(1));
      out[1] = static_cast<int32_t>(column % bits.size(1));
      out[2] = static_cast<int32_t>(i % bits.size(2) * 64 + std::countr_zero(word));
    }
}

}  // namespace trellis::cpu
