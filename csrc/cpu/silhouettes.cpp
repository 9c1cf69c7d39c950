// Antialiasing in two passes: what neighboring pixels exchange, then each pixel's sum of it. The gradient of the
// positions lists the exchanges, which are few, in the order of the pixels and sums them by vertex.
#include "silhouettes.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "mesh_triangle.h"
#include "radix_sort.h"
#include "silhouette_walk.h"

namespace trellis::cpu {
namespace {

constexpr int64_t kRowChunk = 8;

// A pixel's exchanges with the pixels right, below, left and above it: visit(neighbor, share) with a share > 0 where it
// takes of the neighbor, < 0 where the neighbor takes of it.
template <class T, class Visit>
void for_exchanges(const T* shares, int64_t row, int64_t column, int64_t height, int64_t width, const Visit& visit) {
  const int64_t pixel = row * width + column;
  if (column + 1 < width && shares[2 * pixel] != 0) visit(pixel + 1, shares[2 * pixel]);
  if (row + 1 < height && shares[2 * pixel + 1] != 0) visit(pixel + width, shares[2 * pixel + 1]);
  if (column > 0 && shares[2 * (pixel - 1)] != 0) visit(pixel - 1, -shares[2 * (pixel - 1)]);
  if (row > 0 && shares[2 * (pixel - width) + 1] != 0) visit(pixel - width, -shares[2 * (pixel - width) + 1]);
}

// body(view, row) over all rows of all pictures.
template <class Body>
void for_rows(int64_t views, int64_t height, int threads, const Body& body) {
  parallel_for(views * height, kRowChunk, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / height, i % height);
  });
}

}  // namespace

void face_neighbors(TensorView<const int32_t, 2> faces, TensorView<int32_t, 2> out, int threads) {
  const int64_t corners = faces.numel();
  if (faces.size(1) != 3 || out.shape != faces.shape) throw std::invalid_argument("faces must be [F, 3]");
  int32_t highest = 0;
  for (int64_t i = 0; i < corners; ++i) {
    highest = std::max(highest, faces.data[i]);
    if (faces.data[i] < 0)
      throw std::invalid_argument("faces must not be negative; got " + std::to_string(faces.data[i]));
  }
  const int bits = std::bit_width(static_cast<uint32_t>(highest));
  const auto key_of = [&](int64_t corner) {
    const int32_t* const face = faces.row(corner / 3);
    const uint64_t j = face[(corner + 1) % 3], k = face[(corner + 2) % 3];
    return std::min(j, k) << bits | std::max(j, k);
  };
  sorted_rows(corners, std::max(1, 2 * bits), threads, key_of, [&](const auto& row_at, const auto& key_at) {
    for (int64_t begin = 0, end = 0; begin < corners; begin = end) {
      while (end < corners && key_at(end) == key_at(begin)) ++end;
      for (int64_t i = begin; i < end; ++i)
        out.data[row_at(i)] = end - begin == 2 ? static_cast<int32_t>(row_at(begin + end - 1 - i) / 3) : -1;
    }
  });
}

template <class T>
void antialias(TensorView<const T, 4> images, DrawnMesh<T> mesh, TensorView<T, 4> out, TensorView<T, 4> shares,
               TensorView<int32_t, 4> edges, int threads) {
  const int64_t views = mesh.ids.size(0), height = mesh.ids.size(1), width = mesh.ids.size(2);
  const int64_t channels = images.size(3), pixels = height * width;
  check_faces(mesh.faces, mesh.positions.size(1));
  check_ids(mesh.ids, mesh.faces.size(0));
  for (int64_t i = 0; i < mesh.neighbors.numel(); ++i)
    if (mesh.neighbors.data[i] >= mesh.faces.size(0))
      throw std::invalid_argument("neighbors must be below F=" + std::to_string(mesh.faces.size(0)) + "; got " +
                                  std::to_string(mesh.neighbors.data[i]));
  if (mesh.neighbors.shape != mesh.faces.shape || mesh.depths.shape != mesh.ids.shape ||
      mesh.positions.size(0) != views || images.numel() != mesh.ids.numel() * channels || out.shape != images.shape ||
      shares.numel() != 2 * mesh.ids.numel() || edges.shape != shares.shape)
    throw std::invalid_argument("pictures must be [B, H, W]");
  for_rows(views, height, threads, [&](int64_t view, int64_t row) {
    const Scene<T> scene{mesh.ids.row(view),
                         mesh.depths.row(view),
                         mesh.positions.row(view),
                         mesh.faces.data,
                         mesh.neighbors.data,
                         height,
                         width};
    for (int64_t column = 0; column < width; ++column)
      for (int axis = 0; axis < 2; ++axis) {
        const bool last = axis == 0 ? column + 1 == width : row + 1 == height;
        const Exchange<T> exchange = last ? Exchange<T>{T(0), -1} : exchange_between(scene, row, column, axis);
        const int64_t place = 2 * (view * pixels + row * width + column) + axis;
        shares.data[place] = exchange.share;
        edges.data[place] = exchange.edge;
      }
  });
  for_rows(views, height, threads, [&](int64_t view, int64_t row) {
    const T* const image = images.row(view);
    T* const result = out.row(view);
    std::copy_n(image + row * width * channels, width * channels, result + row * width * channels);
    for (int64_t column = 0; column < width; ++column) {
      const int64_t pixel = row * width + column;
      for_exchanges(shares.row(view), row, column, height, width, [&](int64_t other, T share) {
        if (share < 0) return;
        for (int64_t c = 0; c < channels; ++c)
          result[pixel * channels + c] += share * (image[other * channels + c] - image[pixel * channels + c]);
      });
    }
  });
}

template <class T>
void antialias_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 4> images,
                        TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                        TensorView<const T, 4> shares, TensorView<const int32_t, 4> edges,
                        TensorView<T, 4> images_gradient, TensorView<T, 3> positions_gradient, int threads) {
  const int64_t views = shares.size(0), height = shares.size(1), width = shares.size(2), pixels = height * width;
  const int64_t channels = images.size(3), vertices = positions.size(1);
  check_faces(faces, vertices);
  if (edges.shape != shares.shape || shares.size(3) != 2 || images.numel() != views * pixels * channels ||
      images_gradient.shape != images.shape || out_gradient.shape != images.shape ||
      positions_gradient.shape != positions.shape || positions.size(0) != views)
    throw std::invalid_argument("gradients must have the shapes of what they are of");
  for (int64_t i = 0; i < edges.numel(); ++i)
    if (edges.data[i] >= 3 * faces.size(0)) throw std::invalid_argument("edges must be those of the faces");
  for_rows(views, height, threads, [&](int64_t view, int64_t row) {
    const T* const given = out_gradient.row(view);
    T* const result = images_gradient.row(view);
    std::copy_n(given + row * width * channels, width * channels, result + row * width * channels);
    for (int64_t column = 0; column < width; ++column) {
      const int64_t pixel = row * width + column;
      for_exchanges(shares.row(view), row, column, height, width, [&](int64_t other, T share) {
        const T* const taker = given + (share > 0 ? pixel : other) * channels;
        for (int64_t c = 0; c < channels; ++c) result[pixel * channels + c] -= share * taker[c];
      });
    }
  });

  struct Pull {
    int32_t vertex;
    Ray gradient;
  };
  std::vector<std::vector<Pull>> of_row(static_cast<size_t>(views * height));
  for_rows(views, height, threads, [&](int64_t view, int64_t row) {
    std::vector<Pull>& pulls = of_row[view * height + row];
    for (int64_t column = 0; column < width; ++column)
      for (int axis = 0; axis < 2; ++axis) {
        const int64_t pixel = row * width + column, other = pixel + (axis == 0 ? 1 : width);
        const int64_t place = 2 * (view * pixels + pixel) + axis;
        if (edges.data[place] < 0) continue;
        const T* const taker = out_gradient.row(view) + (shares.data[place] > 0 ? pixel : other) * channels;
        const T *const first = images.row(view) + pixel * channels, *const second = images.row(view) + other * channels;
        double by_share = 0;
        for (int64_t c = 0; c < channels; ++c) by_share += double(taker[c]) * double(second[c] - first[c]);
        const EdgeGradient found = edge_gradient(edges.data[place], by_share, row, column, axis, height, width,
                                                 positions.row(view), faces.data);
        for (int end = 0; end < 2; ++end)
          pulls.push_back({static_cast<int32_t>(found.vertex[end]), found.gradient[end]});
      }
  });
  parallel_for(views, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t view = begin; view < end; ++view) {
      std::vector<double> sums(static_cast<size_t>(4 * vertices), 0.0);
      for (int64_t row = 0; row < height; ++row)
        for (const Pull& pull : of_row[view * height + row]) {
          sums[4 * pull.vertex] += pull.gradient.x;
          sums[4 * pull.vertex + 1] += pull.gradient.y;
          sums[4 * pull.vertex + 3] += pull.gradient.w;
        }
      std::transform(sums.begin(), sums.end(), positions_gradient.row(view), [](double sum) { return T(sum); });
    }
  });
}

#define TRELLIS_INSTANTIATE(T)                                                                                         \
  template void antialias(TensorView<const T, 4>, DrawnMesh<T>, TensorView<T, 4>, TensorView<T, 4>,                    \
                          TensorView<int32_t, 4>, int);                                                                \
  template void antialias_gradient(TensorView<const T, 4>, TensorView<const T, 4>, TensorView<const T, 3>,             \
                                   TensorView<const int32_t, 2>, TensorView<const T, 4>, TensorView<const int32_t, 4>, \
                                   TensorView<T, 4>, TensorView<T, 3>, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cpu
