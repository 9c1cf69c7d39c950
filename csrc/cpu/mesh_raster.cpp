// Which triangle each pixel shows. The picture is cut into bands of rows; every band goes through the triangles that
// touch it, in their order, with its own depth buffer: no two threads write the same pixel, and equal depths keep the
// lower row.
#include "mesh_raster.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "mesh_triangle.h"
#include "parallel.h"

namespace trellis::cpu {
namespace {

constexpr int64_t kBandRows = 16;
constexpr int64_t kFaceChunk = 4096;

struct Box {
  int32_t left = 0, right = -1, top = 0, bottom = -1;  // pixels, ends included
};

// Pixels whose centers the triangle may cover.
template <class T>
Box box_of(const T* positions, const int32_t* face, int64_t width, int64_t height) {
  double low[2] = {1e300, 1e300}, high[2] = {-1e300, -1e300};
  int behind = 0;
  for (int i = 0; i < 3; ++i) {
    const T* const p = positions + int64_t{4} * face[i];
    if (!(p[3] > 0)) {
      ++behind;
      continue;
    }
    for (int axis = 0; axis < 2; ++axis) {
      const double at = double(p[axis]) / double(p[3]);
      low[axis] = std::min(low[axis], at);
      high[axis] = std::max(high[axis], at);
    }
  }
  if (behind == 3) return {};
  if (behind > 0) return {0, int32_t(width - 1), 0, int32_t(height - 1)};  // it reaches the plane of the camera
  const auto range = [&](int axis, int64_t extent, int32_t& first, int32_t& last) {
    const double half = 0.5 * double(extent), margin = 1e-3;  // of a pixel, against rounding
    first = int32_t(std::clamp(std::ceil((low[axis] + 1) * half - 0.5 - margin), 0.0, double(extent)));
    last = int32_t(std::clamp(std::floor((high[axis] + 1) * half - 0.5 + margin), -1.0, double(extent - 1)));
  };
  Box box;
  range(0, width, box.left, box.right);
  range(1, height, box.top, box.bottom);
  return box;
}

template <class T>
class View {
 public:
  View(const T* positions, TensorView<const int32_t, 2> faces, int64_t width, int64_t height, int threads)
      : positions_(positions),
        faces_(faces),
        width_(width),
        height_(height),
        bands_((height + kBandRows - 1) / kBandRows),
        triangles_(std::make_unique_for_overwrite<Triangle[]>(faces.size(0))),
        boxes_(std::make_unique<Box[]>(faces.size(0))) {
    parallel_for(faces.size(0), kFaceChunk, threads, [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; ++f) {
        triangles_[f] = triangle_of(positions, faces.row(f));
        if (triangles_[f].valid()) boxes_[f] = box_of(positions, faces.row(f), width, height);
      }
    });
    list_faces_of_bands(threads);
  }

  void draw(int64_t band, const int32_t* behind_ids, const T* behind_depths, int32_t* ids, T* depths, T* barycentrics,
            T* derivatives) const {
    const int64_t top = band * kBandRows, bottom = std::min(height_, top + kBandRows);
    for (int64_t i = top * width_; i < bottom * width_; ++i) {
      ids[i] = -1;
      depths[i] = T(1);
    }
    for (int64_t entry = starts_[band]; entry < starts_[band + 1]; ++entry) {
      const int32_t face = list_[entry];
      const Box& box = boxes_[face];
      for (int64_t row = std::max<int64_t>(top, box.top); row < std::min<int64_t>(bottom, box.bottom + 1); ++row)
        draw_row(face, row, box, behind_ids, behind_depths, ids, depths);
    }
    for (int64_t row = top; row < bottom; ++row)
      for (int64_t column = 0; column < width_; ++column) describe(row, column, ids, barycentrics, derivatives);
  }

  int64_t bands() const { return bands_; }

 private:
  // Faces in ascending order for each band, by counting, over fixed chunks of faces.
  void list_faces_of_bands(int threads) {
    const int64_t chunks = (faces_.size(0) + kFaceChunk - 1) / kFaceChunk;
    std::vector<int64_t> places(static_cast<size_t>(chunks * bands_), 0);
    const auto for_bands = [&](int64_t chunk, const auto& visit) {
      for (int64_t f = chunk * kFaceChunk; f < std::min(faces_.size(0), (chunk + 1) * kFaceChunk); ++f) {
        if (boxes_[f].left > boxes_[f].right || boxes_[f].top > boxes_[f].bottom) continue;
        for (int64_t band = boxes_[f].top / kBandRows; band <= boxes_[f].bottom / kBandRows; ++band)
          visit(places[chunk * bands_ + band], int32_t(f));
      }
    };
    parallel_chunks(chunks, threads,
                    [&](int64_t chunk) { for_bands(chunk, [](int64_t& count, int32_t) { ++count; }); });
    starts_.resize(bands_ + 1);
    int64_t total = 0;
    for (int64_t band = 0; band < bands_; ++band) {
      starts_[band] = total;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += std::exchange(places[chunk * bands_ + band], total);
    }
    starts_[bands_] = total;
    list_ = std::make_unique_for_overwrite<int32_t[]>(total);
    parallel_chunks(chunks, threads, [&](int64_t chunk) {
      for_bands(chunk, [&](int64_t& place, int32_t face) { list_[place++] = face; });
    });
  }

  // Whether a triangle comes after that of the layer in front, which shows none if `front` is -1.
  static bool hidden(int32_t face, T depth, int32_t front, T front_depth) {
    return face != front && (depth > front_depth || (depth == front_depth && front >= 0 && face > front));
  }

  void draw_row(int32_t face, int64_t row, const Box& box, const int32_t* behind_ids, const T* behind_depths,
                int32_t* ids, T* depths) const {
    const Triangle& t = triangles_[face];
    const double y = pixel_center(row, height_);
    double base[3], slope[3];
    bool takes_zero[3];
    double first = box.left, last = box.right;
    for (int i = 0; i < 3; ++i) {
      const Vector3& n = t.normal[i];
      base[i] = n.y * y + n.z;
      slope[i] = n.x;
      takes_zero[i] = n.x > 0 || (n.x == 0 && n.y > 0);  // the top-left rule
      if (last - first >= 8 && n.x != 0) {               // where a long row crosses this edge, give or take a pixel
        const double crossing = (-base[i] / n.x + 1) * (0.5 * double(width_)) - 0.5;
        if (n.x > 0)
          first = std::max(first, std::min(std::floor(crossing) - 1, last + 1));
        else
          last = std::min(last, std::max(std::ceil(crossing) + 1, first - 1));
      }
    }
    const int64_t begin = row * width_ + int64_t(first), end = row * width_ + int64_t(last);
    for (int64_t pixel = begin; pixel <= end; ++pixel) {
      const double x = pixel_center(pixel - row * width_, width_);
      const double e0 = slope[0] * x + base[0], e1 = slope[1] * x + base[1], e2 = slope[2] * x + base[2];
      if (!((e0 > 0 || (e0 == 0 && takes_zero[0])) && (e1 > 0 || (e1 == 0 && takes_zero[1])) &&
            (e2 > 0 || (e2 == 0 && takes_zero[2]))))
        continue;
      const T depth = T((e0 * t.z[0] + e1 * t.z[1] + e2 * t.z[2]) / t.determinant);
      if (!(depth >= T(-1) && depth <= T(1))) continue;
      if (ids[pixel] >= 0 && !(depth < depths[pixel])) continue;  // faces come in order: equal depths keep the first
      if (behind_ids && !hidden(face, depth, behind_ids[pixel], behind_depths[pixel])) continue;
      ids[pixel] = face;
      depths[pixel] = depth;
    }
  }

  void describe(int64_t row, int64_t column, const int32_t* ids, T* barycentrics, T* derivatives) const {
    const int64_t pixel = row * width_ + column;
    T* const b = barycentrics + 2 * pixel;
    T* const d = derivatives + 4 * pixel;
    if (ids[pixel] < 0) {
      b[0] = b[1] = d[0] = d[1] = d[2] = d[3] = T(0);
      return;
    }
    const Triangle& t = triangles_[ids[pixel]];
    const double x = pixel_center(column, width_), y = pixel_center(row, height_);
    double e[3];
    for (int i = 0; i < 3; ++i) e[i] = t.normal[i].x * x + t.normal[i].y * y + t.normal[i].z;
    const double inverse = 1 / (e[0] + e[1] + e[2]);
    const double sum_x = t.normal[0].x + t.normal[1].x + t.normal[2].x;
    const double sum_y = t.normal[0].y + t.normal[1].y + t.normal[2].y;
    const double step_x = 2 / double(width_) * inverse, step_y = 2 / double(height_) * inverse;
    for (int i = 0; i < 2; ++i) {
      const double weight = e[i] * inverse;
      b[i] = T(std::clamp(weight, 0.0, 1.0));
      d[2 * i] = T((t.normal[i].x - weight * sum_x) * step_x);
      d[2 * i + 1] = T((t.normal[i].y - weight * sum_y) * step_y);
    }
  }

  const T* positions_;
  TensorView<const int32_t, 2> faces_;
  int64_t width_, height_, bands_;
  std::unique_ptr<Triangle[]> triangles_;
  std::unique_ptr<Box[]> boxes_;
  std::vector<int64_t> starts_;  // of each band in list_
  std::unique_ptr<int32_t[]> list_;
};

}  // namespace

template <class T>
void rasterize_mesh(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces, LayerInFront<T> behind,
                    RasterizedMesh<T> out, int threads) {
  const int64_t views = positions.size(0), height = out.ids.size(1), width = out.ids.size(2), pixels = height * width;
  if (positions.size(2) != 4) throw std::invalid_argument("positions must be [B, V, 4]");
  check_faces(faces, positions.size(1));
  const bool peeling = behind.ids.numel() > 0;
  if (out.ids.size(0) != views || out.depths.shape != out.ids.shape ||
      out.barycentrics.numel() != 2 * out.ids.numel() || out.derivatives.numel() != 4 * out.ids.numel() ||
      (peeling && (behind.ids.shape != out.ids.shape || behind.depths.shape != out.ids.shape)))
    throw std::invalid_argument("pictures must be [B, H, W]");
  for (int64_t v = 0; v < views; ++v) {
    const View<T> view(positions.row(v), faces, width, height, threads);
    parallel_chunks(view.bands(), threads, [&](int64_t band) {
      view.draw(band, peeling ? behind.ids.row(v) : nullptr, peeling ? behind.depths.row(v) : nullptr, out.ids.row(v),
                out.depths.row(v), out.barycentrics.data + 2 * v * pixels, out.derivatives.data + 4 * v * pixels);
    });
  }
}

#define TRELLIS_INSTANTIATE(T)                                                                        \
  template void rasterize_mesh(TensorView<const T, 3>, TensorView<const int32_t, 2>, LayerInFront<T>, \
                               RasterizedMesh<T>, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cpu
