// Interpolation, and the gradients. What pixels add to vertices is summed in a fixed order: the pixels of a triangle in
// rising order, then the triangles of a vertex in rising order. So threads never meet, and their number changes
// nothing.
#include <bit>
#include <vector>

#include "mesh_raster.h"
#include "mesh_triangle.h"
#include "radix_sort.h"

namespace trellis::cpu {
namespace {

constexpr int64_t kPixelChunk = 8192;

// Items 0 .. count-1 grouped by a key in [0, keys) or -1 for none; in rising order inside a group.
struct Groups {
  std::vector<int32_t> items;
  std::vector<int64_t> starts;

  template <class KeyOf>
  Groups(int64_t count, int64_t keys, int threads, const KeyOf& key_of) : items(count), starts(keys + 2, 0) {
    sorted_rows(
        count, std::bit_width(static_cast<uint64_t>(keys)), threads,
        [&](int64_t i) { return static_cast<uint64_t>(key_of(i) + 1); },
        [&](const auto& row_at, const auto& key_at) {
          for (int64_t i = 0; i < count; ++i) {
            items[i] = static_cast<int32_t>(row_at(i));
            ++starts[key_at(i)];
          }
        });
    int64_t total = 0;  // counts of the keys -1, 0, 1, ... become starts
    for (int64_t& start : starts) total += std::exchange(start, total);
    starts.erase(starts.begin());  // what has no key is in front of starts[0]
  }
};

// out[vertex, :] += sum over its triangles of corner sums, which add(face, pixel, sums[3 * columns]) collects.
template <class T, class Add>
void add_to_vertices(TensorView<const int32_t, 2> faces, const int32_t* ids, int64_t pixels, int64_t vertices,
                     int64_t columns, const Groups& corners, T* out, int threads, const Add& add) {
  const Groups of_face(pixels, faces.size(0), threads, [&](int64_t pixel) { return int64_t{ids[pixel]}; });
  std::vector<double> sums(static_cast<size_t>(faces.size(0) * 3 * columns), 0.0);
  parallel_for(faces.size(0), 512, threads, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; ++f)
      for (int64_t i = of_face.starts[f]; i < of_face.starts[f + 1]; ++i)
        add(f, int64_t{of_face.items[i]}, sums.data() + f * 3 * columns);
  });
  parallel_for(vertices, 1024, threads, [&](int64_t begin, int64_t end) {
    std::vector<double> total(columns);
    for (int64_t v = begin; v < end; ++v) {
      for (int64_t c = 0; c < columns; ++c) total[c] = double(out[v * columns + c]);
      for (int64_t i = corners.starts[v]; i < corners.starts[v + 1]; ++i)
        for (int64_t c = 0; c < columns; ++c) total[c] += sums[int64_t{corners.items[i]} * columns + c];
      for (int64_t c = 0; c < columns; ++c) out[v * columns + c] = T(total[c]);
    }
  });
}

Groups corners_of_vertices(TensorView<const int32_t, 2> faces, int64_t vertices, int threads) {
  return Groups(3 * faces.size(0), vertices, threads, [&](int64_t corner) { return int64_t{faces.data[corner]}; });
}

}  // namespace

template <class T>
void rasterize_mesh_gradient(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                             TensorView<const int32_t, 3> ids, TensorView<const T, 4> barycentrics_gradient,
                             TensorView<const T, 3> depths_gradient, TensorView<T, 3> out, int threads) {
  const int64_t vertices = positions.size(1), height = ids.size(1), width = ids.size(2), pixels = height * width;
  check_faces(faces, vertices);
  check_ids(ids, faces.size(0));
  if (out.shape != positions.shape || depths_gradient.shape != ids.shape ||
      barycentrics_gradient.numel() != 2 * ids.numel() || ids.size(0) != positions.size(0))
    throw std::invalid_argument("gradients must have the shapes of what they are of");
  const Groups corners = corners_of_vertices(faces, vertices, threads);
  for (int64_t i = 0; i < out.numel(); ++i) out.data[i] = T(0);
  for (int64_t view = 0; view < positions.size(0); ++view) {
    const T* const rows = positions.row(view);
    const T* const by_barycentrics = barycentrics_gradient.data + 2 * view * pixels;
    const T* const by_depths = depths_gradient.data + view * pixels;
    add_to_vertices(faces, ids.row(view), pixels, vertices, 4, corners, out.row(view), threads,
                    [&](int64_t f, int64_t pixel, double* sums) {
                      const int32_t* const face = faces.row(f);
                      const Vector3 d = {pixel_center(pixel % width, width), pixel_center(pixel / width, height), 1.0};
                      Vector3 p[3], n[3];
                      double z[3], e[3];
                      for (int i = 0; i < 3; ++i) {
                        p[i] = clip_xyw(rows + int64_t{4} * face[i]);
                        z[i] = double(rows[int64_t{4} * face[i] + 2]);
                      }
                      for (int i = 0; i < 3; ++i) n[i] = cross(p[(i + 1) % 3], p[(i + 2) % 3]);
                      for (int i = 0; i < 3; ++i) e[i] = dot(n[i], d);
                      const double sum = e[0] + e[1] + e[2], determinant = dot(p[0], n[0]);
                      const double gu = double(by_barycentrics[2 * pixel]), gv = double(by_barycentrics[2 * pixel + 1]);
                      const double gd = double(by_depths[pixel]) / determinant;
                      const double mean =
                          (gu * e[0] + gv * e[1]) / sum;  // u = e0 / sum, v = e1 / sum, depth = sum e z / det
                      const double by_edge[3] = {(gu - mean) / sum + gd * z[0], (gv - mean) / sum + gd * z[1],
                                                 -mean / sum + gd * z[2]};
                      const double by_determinant = -gd * (e[0] * z[0] + e[1] * z[1] + e[2] * z[2]) / determinant;
                      Vector3 by_position[3] = {};
                      for (int i = 0; i < 3; ++i) {  // e_i = (p_j x p_k) d
                        const int j = (i + 1) % 3, k = (i + 2) % 3;
                        const Vector3 by_normal = by_edge[i] * d;
                        by_position[j] = by_position[j] + cross(p[k], by_normal);
                        by_position[k] = by_position[k] + cross(by_normal, p[j]);
                      }
                      for (int i = 0; i < 3; ++i) {
                        const Vector3 g = by_position[i] + by_determinant * n[i];
                        sums[4 * i] += g.x;
                        sums[4 * i + 1] += g.y;
                        sums[4 * i + 2] += gd * e[i];
                        sums[4 * i + 3] += g.z;
                      }
                    });
  }
}

template <class T>
void interpolate(TensorView<const T, 3> attributes, TensorView<const int32_t, 2> faces,
                 TensorView<const int32_t, 3> ids, TensorView<const T, 4> barycentrics, TensorView<T, 4> out,
                 int threads) {
  const int64_t pixels = ids.size(1) * ids.size(2), columns = attributes.size(2);
  check_faces(faces, attributes.size(1));
  check_ids(ids, faces.size(0));
  if (barycentrics.numel() != 2 * ids.numel() || out.numel() != columns * ids.numel())
    throw std::invalid_argument("pictures must be [B, H, W]");
  parallel_for(ids.numel(), kPixelChunk, threads, [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      T* const to = out.data + pixel * columns;
      if (ids.data[pixel] < 0) {
        for (int64_t c = 0; c < columns; ++c) to[c] = T(0);
        continue;
      }
      const int32_t* const face = faces.row(ids.data[pixel]);
      const T* const rows = attributes.row(pixel / pixels % attributes.size(0));
      const T u = barycentrics.data[2 * pixel], v = barycentrics.data[2 * pixel + 1], w = 1 - u - v;
      const T *const a = rows + face[0] * columns, *const b = rows + face[1] * columns,
                     *const c = rows + face[2] * columns;
      for (int64_t i = 0; i < columns; ++i) to[i] = u * a[i] + v * b[i] + w * c[i];
    }
  });
}

template <class T>
void interpolate_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 3> attributes,
                          TensorView<const int32_t, 2> faces, TensorView<const int32_t, 3> ids,
                          TensorView<const T, 4> barycentrics, TensorView<T, 3> attributes_gradient,
                          TensorView<T, 4> barycentrics_gradient, int threads) {
  const int64_t pixels = ids.size(1) * ids.size(2), columns = attributes.size(2), vertices = attributes.size(1);
  check_faces(faces, vertices);
  check_ids(ids, faces.size(0));
  if (attributes_gradient.shape != attributes.shape || barycentrics_gradient.shape != barycentrics.shape ||
      out_gradient.numel() != columns * ids.numel() || barycentrics.numel() != 2 * ids.numel())
    throw std::invalid_argument("gradients must have the shapes of what they are of");
  parallel_for(ids.numel(), kPixelChunk, threads, [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      T by_u = 0, by_v = 0;
      if (ids.data[pixel] >= 0) {
        const int32_t* const face = faces.row(ids.data[pixel]);
        const T* const rows = attributes.row(pixel / pixels % attributes.size(0));
        const T* const g = out_gradient.data + pixel * columns;
        for (int64_t i = 0; i < columns; ++i) {
          const T last = rows[face[2] * columns + i];
          by_u += g[i] * (rows[face[0] * columns + i] - last);
          by_v += g[i] * (rows[face[1] * columns + i] - last);
        }
      }
      barycentrics_gradient.data[2 * pixel] = by_u;
      barycentrics_gradient.data[2 * pixel + 1] = by_v;
    }
  });
  const Groups corners = corners_of_vertices(faces, vertices, threads);
  for (int64_t i = 0; i < attributes_gradient.numel(); ++i) attributes_gradient.data[i] = T(0);
  for (int64_t view = 0; view < ids.size(0); ++view) {
    const T* const gradients = out_gradient.data + view * pixels * columns;
    const T* const weights = barycentrics.data + 2 * view * pixels;
    add_to_vertices(faces, ids.row(view), pixels, vertices, columns, corners,
                    attributes_gradient.row(view % attributes.size(0)), threads,
                    [&](int64_t, int64_t pixel, double* sums) {
                      const double u = double(weights[2 * pixel]), v = double(weights[2 * pixel + 1]);
                      const double corner[3] = {u, v, 1 - u - v};
                      for (int i = 0; i < 3; ++i)
                        for (int64_t c = 0; c < columns; ++c)
                          sums[i * columns + c] += corner[i] * double(gradients[pixel * columns + c]);
                    });
  }
}

#define TRELLIS_INSTANTIATE(T)                                                                                        \
  template void rasterize_mesh_gradient(TensorView<const T, 3>, TensorView<const int32_t, 2>,                         \
                                        TensorView<const int32_t, 3>, TensorView<const T, 4>, TensorView<const T, 3>, \
                                        TensorView<T, 3>, int);                                                       \
  template void interpolate(TensorView<const T, 3>, TensorView<const int32_t, 2>, TensorView<const int32_t, 3>,       \
                            TensorView<const T, 4>, TensorView<T, 4>, int);                                           \
  template void interpolate_gradient(TensorView<const T, 4>, TensorView<const T, 3>, TensorView<const int32_t, 2>,    \
                                     TensorView<const int32_t, 3>, TensorView<const T, 4>, TensorView<T, 3>,          \
                                     TensorView<T, 4>, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cpu
