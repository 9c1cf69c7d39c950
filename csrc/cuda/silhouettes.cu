// Antialiasing: one thread per pixel finds what it exchanges with the pixels right and below, another sums what a pixel
// takes. The gradient of the positions asks each edge, not each pixel: an edge knows which pixels it can pass between,
// so nothing has to be sorted, and sums have one order.
#include "launch.h"
#include "silhouette_walk.h"
#include "silhouettes.h"

namespace trellis::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 8;  // of one edge
constexpr unsigned kAll = 0xffffffffu;

__global__ void __launch_bounds__(kThreads)
    check_mesh(const int* __restrict__ faces, const int* __restrict__ neighbors, int64_t corners, int64_t vertices) {
  const int64_t corner = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (corner >= corners) return;
  DEVICE_CHECK(faces[corner] >= 0 && faces[corner] < vertices, "faces must be rows of the positions");
  if (neighbors) DEVICE_CHECK(3 * int64_t{neighbors[corner]} < corners, "neighbors must be below F");
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    find_exchanges(const __grid_constant__ Scene<T> scene, int64_t vertices, int64_t face_count, T* __restrict__ shares,
                   int* __restrict__ edges) {
  const int64_t pixel = int64_t{blockIdx.x} * kThreads + threadIdx.x, pixels = scene.height * scene.width;
  if (pixel >= pixels) return;
  const int64_t view = blockIdx.y, row = pixel / scene.width, column = pixel % scene.width;
  Scene<T> here = scene;
  here.ids += view * pixels;
  here.depths += view * pixels;
  here.positions += view * vertices * 4;
  DEVICE_CHECK(here.ids[pixel] < face_count, "rasterization.faces must be below F");
  for (int axis = 0; axis < 2; ++axis) {
    const bool last = axis == 0 ? column + 1 == scene.width : row + 1 == scene.height;
    Exchange<T> exchange{T(0), -1};
    if (!last) {
      DEVICE_CHECK(here.ids[pixel + (axis == 0 ? 1 : scene.width)] < face_count, "rasterization.faces must be below F");
      exchange = exchange_between(here, row, column, axis);
    }
    const int64_t place = 2 * (view * pixels + pixel) + axis;
    shares[place] = exchange.share;
    edges[place] = exchange.edge;
  }
}

// visit(neighbor, share): a share > 0 where the pixel takes of the neighbor, < 0 where the neighbor takes of it.
template <class T, class Visit>
__device__ void for_exchanges(const T* __restrict__ shares, int64_t pixel, int64_t height, int64_t width,
                              const Visit& visit) {
  const int64_t row = pixel / width, column = pixel % width;
  if (column + 1 < width && shares[2 * pixel] != 0) visit(pixel + 1, shares[2 * pixel]);
  if (row + 1 < height && shares[2 * pixel + 1] != 0) visit(pixel + width, shares[2 * pixel + 1]);
  if (column > 0 && shares[2 * (pixel - 1)] != 0) visit(pixel - 1, -shares[2 * (pixel - 1)]);
  if (row > 0 && shares[2 * (pixel - width) + 1] != 0) visit(pixel - width, -shares[2 * (pixel - width) + 1]);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    blend_exchanges(const T* __restrict__ images, const T* __restrict__ shares, int64_t height, int64_t width,
                    int channels, T* __restrict__ out) {
  const int64_t pixel = int64_t{blockIdx.x} * kThreads + threadIdx.x, first = blockIdx.y * height * width;
  if (pixel >= height * width) return;
  const T* const image = images + first * channels;
  T* const to = out + (first + pixel) * channels;
  for (int c = 0; c < channels; ++c) to[c] = image[pixel * channels + c];
  for_exchanges(shares + 2 * first, pixel, height, width, [&](int64_t other, T share) {
    if (share < 0) return;
    for (int c = 0; c < channels; ++c) to[c] += share * (image[other * channels + c] - image[pixel * channels + c]);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    blend_exchanges_gradient(const T* __restrict__ gradients, const T* __restrict__ shares, int64_t height,
                             int64_t width, int channels, T* __restrict__ out) {
  const int64_t pixel = int64_t{blockIdx.x} * kThreads + threadIdx.x, first = blockIdx.y * height * width;
  if (pixel >= height * width) return;
  const T* const gradient = gradients + first * channels;
  T* const to = out + (first + pixel) * channels;
  for (int c = 0; c < channels; ++c) to[c] = gradient[pixel * channels + c];
  for_exchanges(shares + 2 * first, pixel, height, width, [&](int64_t other, T share) {
    const T* const taker = gradient + (share > 0 ? pixel : other) * channels;
    for (int c = 0; c < channels; ++c) to[c] -= share * taker[c];
  });
}

// The pixels along one axis, first to last, that an edge may reach; all of them if it reaches behind the camera.
__device__ __forceinline__ void reach_of(double a, double wa, double b, double wb, int64_t extent, int64_t& first,
                                         int64_t& last) {
  first = 0;
  last = extent - 1;
  if (!(wa > 0 && wb > 0)) return;
  const double one = a / wa, other = b / wb, half = 0.5 * double(extent);
  const double low = ((one < other ? one : other) + 1) * half - 2, high = ((one < other ? other : one) + 1) * half + 2;
  if (low > double(first)) first = low < double(extent) ? static_cast<int64_t>(low) : extent;
  if (high < double(last)) last = high > -1 ? static_cast<int64_t>(high) : -1;
}

// kLanes threads per edge: its pairs of pixels are those it passes between, one for each row (an upright edge) or
// column that it reaches.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_edges(const T* __restrict__ gradients, const T* __restrict__ images, const T* __restrict__ positions,
              const int* __restrict__ faces, const T* __restrict__ shares, const int* __restrict__ edges,
              int64_t edge_count, int64_t vertices, int64_t height, int64_t width, int channels,
              double* __restrict__ sums) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, view = blockIdx.y;
  const int edge = static_cast<int>(thread / kLanes), lane = static_cast<int>(thread % kLanes);
  double x = 0, y = 0, w = 0;
  if (edge < edge_count) {
    const int* const face = faces + int64_t{3} * (edge / 3);
    const T* const rows = positions + view * vertices * 4;
    const Ray p = clip_point(rows, face[(edge + 1) % 3]), q = clip_point(rows, face[(edge + 2) % 3]);
    const Ray n = crossed(p, q);
    const int axis = faces_axis(n, 0, height, width) ? 0 : 1;
    const int64_t across = axis == 0 ? width : height;
    int64_t first = 0, last = -1;
    if (is_finite(n.x + n.y + n.w) && (n.x != 0 || n.y != 0)) {
      if (axis == 0)
        reach_of(p.y, p.w, q.y, q.w, height, first, last);
      else
        reach_of(p.x, p.w, q.x, q.w, width, first, last);
    }
    const double step = 2.0 / double(axis == 0 ? height : width), inverse = 1 / (axis == 0 ? n.x : n.y);
    for (int64_t line = first + lane; line <= last; line += kLanes) {
      const double middle = (double(line) + 0.5) * step - 1.0;
      Ray at = {middle, middle, 1.0};  // becomes where the edge crosses this row or column
      if (axis == 0)
        at.x = -(n.y * at.y + n.w) * inverse;
      else
        at.y = -(n.x * at.x + n.w) * inverse;
      const double crossing = ((axis == 0 ? at.x : at.y) + 1) * 0.5 * double(across) - 0.5;
      if (!(crossing > -2 && crossing < double(across) + 1)) continue;
      for (int64_t k = static_cast<int64_t>(crossing) - 1; k <= static_cast<int64_t>(crossing) + 1; ++k) {
        if (k < 0 || k + 1 >= across) continue;
        const int64_t pixel = (view * height + (axis == 0 ? line : k)) * width + (axis == 0 ? k : line);
        if (edges[2 * pixel + axis] != edge) continue;
        const int64_t other = pixel + (axis == 0 ? 1 : width);
        const T* const taker = gradients + (shares[2 * pixel + axis] > 0 ? pixel : other) * channels;
        double by_share = 0;
        for (int c = 0; c < channels; ++c)
          by_share += double(taker[c]) * double(images[other * channels + c] - images[pixel * channels + c]);
        // share = 0.5 - (crossing - first center) size / 2, and the crossing moves by -(change of n) at / n
        const double scale = by_share * 0.5 * double(across) * inverse;
        x += scale * at.x;
        y += scale * at.y;
        w += scale;
      }
    }
  }
  for (int step = kLanes / 2; step > 0; step /= 2) {
    x += __shfl_xor_sync(kAll, x, step, kLanes);
    y += __shfl_xor_sync(kAll, y, step, kLanes);
    w += __shfl_xor_sync(kAll, w, step, kLanes);
  }
  if (lane == 0 && edge < edge_count) {
    double* const to = sums + 3 * (view * edge_count + edge);
    to[0] = x;
    to[1] = y;
    to[2] = w;
  }
}

// One thread per vertex: the two edges at each of its corners.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_vertices(const double* __restrict__ sums, const T* __restrict__ positions, const int* __restrict__ faces,
                 const int64_t* __restrict__ corners, const int* __restrict__ starts, int64_t edge_count,
                 int64_t vertices, T* __restrict__ out) {
  const int64_t vertex = int64_t{blockIdx.x} * kThreads + threadIdx.x, view = blockIdx.y;
  if (vertex >= vertices) return;
  const T* const rows = positions + view * vertices * 4;
  Ray total{0, 0, 0};
  for (int64_t i = starts[vertex]; i < starts[vertex + 1]; ++i) {
    const int64_t corner = corners[i], face = corner / 3;
    const int own = static_cast<int>(corner % 3);
    for (int which = 1; which <= 2; ++which) {  // the edge opposite the next corner, and the one after
      const int edge = (own + which) % 3, end = (own + 3 - which) % 3;  // its other end
      const double* const sum = sums + 3 * (view * edge_count + 3 * face + edge);
      const Ray by_normal{sum[0], sum[1], sum[2]};
      if (by_normal.x == 0 && by_normal.y == 0 && by_normal.w == 0) continue;
      const Ray far = clip_point(rows, faces[3 * face + end]);
      // n = p x q, where p follows the corner that the edge is opposite of, and q follows p
      const Ray gradient = (edge + 1) % 3 == own ? crossed(far, by_normal) : crossed(by_normal, far);
      total = {total.x + gradient.x, total.y + gradient.y, total.w + gradient.w};
    }
  }
  T* const to = out + 4 * (view * vertices + vertex);
  to[0] = T(total.x);
  to[1] = T(total.y);
  to[2] = T(0);
  to[3] = T(total.w);
}

dim3 per_view(int64_t items, int64_t views) {
  if (views > 65535) throw std::invalid_argument("B must be at most 65535; got " + std::to_string(views));
  return {blocks(items, kThreads), static_cast<unsigned>(views)};
}

void expect(bool fits) {
  if (!fits) throw std::invalid_argument("pictures must be [B, H, W], and gradients like what they are of");
}

}  // namespace

template <class T>
void antialias(TensorView<const T, 4> images, TensorView<const int32_t, 3> ids, TensorView<const T, 3> depths,
               TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
               TensorView<const int32_t, 2> neighbors, TensorView<T, 4> out, TensorView<T, 4> shares,
               TensorView<int32_t, 4> edges, int64_t stream) {
  const int64_t views = ids.size(0), height = ids.size(1), width = ids.size(2), channels = images.size(3);
  expect(faces.size(1) == 3 && neighbors.shape == faces.shape && depths.shape == ids.shape &&
         positions.size(0) == views && positions.size(2) == 4 && images.numel() == ids.numel() * channels &&
         out.shape == images.shape && shares.numel() == 2 * ids.numel() && edges.shape == shares.shape);
  launch({"check_mesh", blocks(faces.numel(), kThreads), kThreads, stream}, check_mesh, faces.data, neighbors.data,
         faces.numel(), positions.size(1));
  const Scene<T> scene{ids.data, depths.data, positions.data, faces.data, neighbors.data, height, width};
  const dim3 grid = per_view(height * width, views);
  launch({"find_exchanges", grid, kThreads, stream}, find_exchanges<T>, scene, positions.size(1), faces.size(0),
         shares.data, edges.data);
  launch({"blend_exchanges", grid, kThreads, stream}, blend_exchanges<T>, images.data, shares.data, height, width,
         static_cast<int>(channels), out.data);
}

template <class T>
void antialias_images_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 4> shares, TensorView<T, 4> out,
                               int64_t stream) {
  const int64_t views = shares.size(0), height = shares.size(1), width = shares.size(2);
  expect(out_gradient.shape == out.shape && shares.size(3) == 2 && out.size(0) == views && out.size(1) == height &&
         out.size(2) == width);
  launch({"blend_exchanges_gradient", per_view(height * width, views), kThreads, stream}, blend_exchanges_gradient<T>,
         out_gradient.data, shares.data, height, width, static_cast<int>(out.size(3)), out.data);
}

template <class T>
void antialias_edges_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 4> images,
                              TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                              TensorView<const T, 4> shares, TensorView<const int32_t, 4> edges,
                              TensorView<double, 3> sums, int64_t stream) {
  const int64_t views = shares.size(0), height = shares.size(1), width = shares.size(2);
  expect(out_gradient.shape == images.shape && edges.shape == shares.shape && positions.size(0) == views &&
         sums.size(0) == views && sums.size(1) == faces.numel() && sums.size(2) == 3 && images.size(0) == views &&
         images.size(1) == height && images.size(2) == width && faces.numel() <= INT32_MAX / kLanes);
  launch({"check_mesh", blocks(faces.numel(), kThreads), kThreads, stream}, check_mesh, faces.data,
         static_cast<const int32_t*>(nullptr), faces.numel(), positions.size(1));
  launch({"sum_edges", per_view(faces.numel() * kLanes, views), kThreads, stream}, sum_edges<T>, out_gradient.data,
         images.data, positions.data, faces.data, shares.data, edges.data, faces.numel(), positions.size(1), height,
         width, static_cast<int>(images.size(3)), sums.data);
}

template <class T>
void antialias_positions_gradient(TensorView<const double, 3> sums, TensorView<const T, 3> positions,
                                  TensorView<const int32_t, 2> faces, TensorView<const int64_t, 1> corners,
                                  TensorView<const int32_t, 1> starts, TensorView<T, 3> out, int64_t stream) {
  expect(out.shape == positions.shape && positions.size(2) == 4 && sums.size(0) == positions.size(0) &&
         sums.size(1) == faces.numel() && corners.size(0) == faces.numel() && starts.size(0) == positions.size(1) + 1);
  launch({"sum_vertices", per_view(positions.size(1), positions.size(0)), kThreads, stream}, sum_vertices<T>, sums.data,
         positions.data, faces.data, corners.data, starts.data, faces.numel(), positions.size(1), out.data);
}

#define TRELLIS_INSTANTIATE(T)                                                                                        \
  template void antialias(TensorView<const T, 4>, TensorView<const int32_t, 3>, TensorView<const T, 3>,               \
                          TensorView<const T, 3>, TensorView<const int32_t, 2>, TensorView<const int32_t, 2>,         \
                          TensorView<T, 4>, TensorView<T, 4>, TensorView<int32_t, 4>, int64_t);                       \
  template void antialias_images_gradient(TensorView<const T, 4>, TensorView<const T, 4>, TensorView<T, 4>, int64_t); \
  template void antialias_edges_gradient(TensorView<const T, 4>, TensorView<const T, 4>, TensorView<const T, 3>,      \
                                         TensorView<const int32_t, 2>, TensorView<const T, 4>,                        \
                                         TensorView<const int32_t, 4>, TensorView<double, 3>, int64_t);               \
  template void antialias_positions_gradient(TensorView<const double, 3>, TensorView<const T, 3>,                     \
                                             TensorView<const int32_t, 2>, TensorView<const int64_t, 1>,              \
                                             TensorView<const int32_t, 1>, TensorView<T, 3>, int64_t);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cuda
