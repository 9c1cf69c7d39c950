// Interpolation, and the gradients. What pixels add to vertices is summed in a fixed order and without atomics: the
// pixels of a triangle in rising order, then the corners of a vertex in rising order (ordered_sums.cuh).
#include "mesh_raster.h"
#include "mesh_triangle.cuh"
#include "ordered_sums.cuh"

namespace trellis::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 4;                    // at a time
constexpr int64_t kCornerSums = 3 * kChannels;  // of one face

// What each pixel shows.
struct Seen {
  const int32_t *faces, *ids;
  int64_t count, vertices, pixels;  // faces; pixels of one picture

  __device__ const int32_t* face(int64_t pixel) const {
    const int32_t id = ids[pixel];
    DEVICE_CHECK(id < count, "rasterization.faces must be below F");
    const int32_t* const face = faces + int64_t{3} * id;
    for (int i = 0; i < 3; ++i) DEVICE_CHECK(face[i] >= 0 && face[i] < vertices, "faces must be in [0, V)");
    return face;
  }
};

// A thread per channel and pixel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    interpolate_pixels(const Seen seen, const T* attributes, int64_t sets, int64_t channels, const T* barycentrics,
                       int64_t count, T* out) {
  const int64_t first = int64_t{blockIdx.x} * kThreads, at = first + threadIdx.x;
  if (at >= count) return;
  const unsigned behind = static_cast<unsigned>(first % channels) + threadIdx.x;  // few bits: a fast division
  const int64_t pixel = first / channels + behind / static_cast<unsigned>(channels);
  const int64_t channel = behind % static_cast<unsigned>(channels);
  if (seen.ids[pixel] < 0) {
    out[at] = T(0);
    return;
  }
  const int32_t* const face = seen.face(pixel);
  const T* const rows = attributes + (pixel / seen.pixels % sets * seen.vertices) * channels + channel;
  const T u = barycentrics[2 * pixel], v = barycentrics[2 * pixel + 1];
  out[at] = u * rows[face[0] * channels] + v * rows[face[1] * channels] + (1 - u - v) * rows[face[2] * channels];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    barycentrics_gradient_of_pixels(const Seen seen, const T* out_gradient, const T* attributes, int64_t sets,
                                    int64_t channels, int64_t count, T* barycentrics_gradient) {
  const int64_t pixel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pixel >= count) return;
  T by_u = 0, by_v = 0;
  if (seen.ids[pixel] >= 0) {
    const int32_t* const face = seen.face(pixel);
    const T* const rows = attributes + pixel / seen.pixels % sets * seen.vertices * channels;
    const T *const a = rows + face[0] * channels, *const b = rows + face[1] * channels,
                   *const last = rows + face[2] * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const T g = out_gradient[pixel * channels + c];
      by_u += g * (a[c] - last[c]);
      by_v += g * (b[c] - last[c]);
    }
  }
  barycentrics_gradient[2 * pixel] = by_u;
  barycentrics_gradient[2 * pixel + 1] = by_v;
}

struct FaceSums {
  static constexpr int kColumns = static_cast<int>(kCornerSums);
  static constexpr bool kEachCounts = false;
  Seen seen;
  double* sums;
  __device__ void store(int key, const double (&values)[kColumns]) const {
    for (int c = 0; c < kColumns; ++c) sums[int64_t{key} * kColumns + c] = values[c];
  }
};

// By x, y, z, w of the three corners. The formulas: reference.py.
template <class T>
struct PositionsGradient : FaceSums {
  const T *positions, *by_barycentrics, *by_depths;
  int width;
  double step_x, step_y;  // of a pixel

  __device__ const PositionsGradient& at(unsigned) const { return *this; }
  __device__ void load(int64_t pixel, double (&values)[kColumns]) const {
    const int32_t* const face = seen.face(pixel);
    const int64_t view = pixel / seen.pixels, place = pixel % seen.pixels;
    const Vector3 d = {pixel_center(place % width, step_x), pixel_center(place / width, step_y), 1.0};
    Vertex p[3];
    for (int i = 0; i < 3; ++i) p[i] = vertex_of(positions + 4 * view * seen.vertices, face[i]);
    Vector3 n[3];
    for (int i = 0; i < 3; ++i) n[i] = cross(p[(i + 1) % 3].xyw, p[(i + 2) % 3].xyw);
    const double e[3] = {dot(n[0], d), dot(n[1], d), dot(n[2], d)};
    const double all = e[0] + e[1] + e[2], determinant = dot(p[0].xyw, n[0]);
    const double gu = static_cast<double>(by_barycentrics[2 * pixel]);
    const double gv = static_cast<double>(by_barycentrics[2 * pixel + 1]);
    const double gd = static_cast<double>(by_depths[pixel]) / determinant;
    const double mean = (gu * e[0] + gv * e[1]) / all;  // u = e0 / all, v = e1 / all, depth = sum of e z / determinant
    const double by_edge[3] = {(gu - mean) / all + gd * p[0].z, (gv - mean) / all + gd * p[1].z,
                               -mean / all + gd * p[2].z};
    const double by_determinant = -gd * (e[0] * p[0].z + e[1] * p[1].z + e[2] * p[2].z) / determinant;
    for (int i = 0; i < 3; ++i) {  // e_i = (p_j x p_k) d
      const int j = (i + 1) % 3, k = (i + 2) % 3;
      const Vector3 g = by_determinant * n[i] + cross(p[j].xyw, by_edge[k] * d) + cross(by_edge[j] * d, p[k].xyw);
      values[4 * i] = g.x;
      values[4 * i + 1] = g.y;
      values[4 * i + 2] = gd * e[i];
      values[4 * i + 3] = g.z;
    }
  }
};

template <class T>
struct AttributesGradient : FaceSums {
  const T *out_gradient, *barycentrics;
  int64_t channels, first_channel;

  __device__ const AttributesGradient& at(unsigned) const { return *this; }
  __device__ void load(int64_t pixel, double (&values)[kColumns]) const {
    seen.face(pixel);  // checks
    const double u = static_cast<double>(barycentrics[2 * pixel]), v = static_cast<double>(barycentrics[2 * pixel + 1]);
    for (int c = 0; c < kChannels; ++c) {
      if (first_channel + c >= channels) continue;
      const double g = static_cast<double>(out_gradient[pixel * channels + first_channel + c]);
      values[c] = u * g;
      values[kChannels + c] = v * g;
      values[2 * kChannels + c] = (1 - u - v) * g;
    }
  }
};

// The corners of the faces that were seen by view `first_view`, or by `views` of them.
template <class T>
struct CornerSums {
  static constexpr int kColumns = kChannels;
  static constexpr bool kEachCounts = true;
  const double* sums;
  const int32_t* face_starts;
  int64_t count, vertices, channels, first_channel, views;
  T* out;
  int64_t set = 0;

  __device__ CornerSums at(unsigned y) const {
    CornerSums one = *this;
    one.set = y;
    return one;
  }
  __device__ void load(int64_t corner, double (&values)[kColumns]) const {
    for (int64_t view = set * views; view < (set + 1) * views; ++view) {
      const int64_t row = view * count + corner / 3;
      if (face_starts[row] == face_starts[row + 1]) continue;
      for (int c = 0; c < kColumns; ++c) values[c] += sums[row * kCornerSums + corner % 3 * kChannels + c];
    }
  }
  __device__ void store(int key, const double (&values)[kColumns]) const {
    T* const to = out + (set * vertices + key) * channels + first_channel;
    for (int c = 0; c < kColumns; ++c)
      if (first_channel + c < channels) to[c] = static_cast<T>(static_cast<double>(to[c]) + values[c]);
  }
};

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

Seen seen_in(TensorView<const int32_t, 2> faces, TensorView<const int32_t, 3> ids, int64_t vertices) {
  require(faces.size(1) == 3, "faces must be [F, 3]");
  return {faces.data, ids.data, faces.size(0), vertices, ids.size(1) * ids.size(2)};
}

template <class SourceOf>
void sum_runs(const char* name, const SourceOf& source_of, int64_t sources, TensorView<const int32_t, 1> keys,
              TensorView<const int64_t, 1> order, TensorView<const int32_t, 1> starts, TensorView<double, 3> partials,
              int64_t stream) {
  const dim3 grid(blocks(keys.size(0), kSumThreads / 32 * kSumChunk), static_cast<unsigned>(sources));
  require(order.size(0) == keys.size(0) && starts.size(0) > 0 && keys.size(0) <= INT32_MAX && sources <= 65535,
          "keys and order must be equally long");
  require(partials.numel() == sources * grid.x * (kSumThreads / 32) * 2 * SourceOf::kColumns,
          "partials must have room for two sums per chunk");
  const Runs runs{keys.data, order.data, starts.data, keys.size(0), starts.size(0) - 1, partials.data};
  launch({name, grid, kSumThreads, stream}, sum_chunks<SourceOf>, runs, source_of);
  launch({name, grid, kSumThreads, stream}, combine_chunks<SourceOf>, runs, source_of);
}

}  // namespace

template <class T>
void interpolate(TensorView<const T, 3> attributes, TensorView<const int32_t, 2> faces,
                 TensorView<const int32_t, 3> ids, TensorView<const T, 4> barycentrics, TensorView<T, 4> out,
                 int64_t stream) {
  const int64_t channels = attributes.size(2);
  require(barycentrics.numel() == 2 * ids.numel() && out.numel() == channels * ids.numel() && channels < 1 << 24,
          "pictures must be [B, H, W]");
  if (out.numel() == 0) return;
  launch({"interpolate", blocks(out.numel(), kThreads), kThreads, stream}, interpolate_pixels<T>,
         seen_in(faces, ids, attributes.size(1)), attributes.data, attributes.size(0), channels, barycentrics.data,
         out.numel(), out.data);
}

template <class T>
void interpolate_barycentrics_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 3> attributes,
                                       TensorView<const int32_t, 2> faces, TensorView<const int32_t, 3> ids,
                                       TensorView<T, 4> barycentrics_gradient, int64_t stream) {
  const int64_t channels = attributes.size(2);
  require(barycentrics_gradient.numel() == 2 * ids.numel() && out_gradient.numel() == channels * ids.numel(),
          "gradients must have the shapes of what they are of");
  launch({"interpolate_barycentrics_gradient", blocks(ids.numel(), kThreads), kThreads, stream},
         barycentrics_gradient_of_pixels<T>, seen_in(faces, ids, attributes.size(1)), out_gradient.data,
         attributes.data, attributes.size(0), channels, ids.numel(), barycentrics_gradient.data);
}

template <class T>
void mesh_gradient_of_faces(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                            TensorView<const int32_t, 3> ids, TensorView<const T, 4> barycentrics_gradient,
                            TensorView<const T, 3> depths_gradient, TensorView<const int32_t, 1> keys,
                            TensorView<const int64_t, 1> order, TensorView<const int32_t, 1> starts,
                            TensorView<double, 3> partials, TensorView<double, 2> sums, int64_t stream) {
  require(positions.size(0) == ids.size(0) && positions.size(2) == 4 && depths_gradient.shape == ids.shape &&
              barycentrics_gradient.numel() == 2 * ids.numel() && keys.numel() == ids.numel(),
          "gradients must have the shapes of what they are of");
  require(sums.numel() == (starts.size(0) - 1) * kCornerSums && starts.size(0) - 1 == ids.size(0) * faces.size(0),
          "sums must be [B * F, 12]");
  PositionsGradient<T> source{};
  source.seen = seen_in(faces, ids, positions.size(1));
  source.sums = sums.data;
  source.positions = positions.data;
  source.by_barycentrics = barycentrics_gradient.data;
  source.by_depths = depths_gradient.data;
  source.width = static_cast<int>(ids.size(2));
  source.step_x = 2.0 / static_cast<double>(ids.size(2));
  source.step_y = 2.0 / static_cast<double>(ids.size(1));
  sum_runs("mesh_gradient_of_faces", source, 1, keys, order, starts, partials, stream);
}

template <class T>
void interpolate_gradient_of_faces(TensorView<const T, 4> out_gradient, TensorView<const int32_t, 2> faces,
                                   int64_t vertices, TensorView<const int32_t, 3> ids,
                                   TensorView<const T, 4> barycentrics, int64_t first_channel,
                                   TensorView<const int32_t, 1> keys, TensorView<const int64_t, 1> order,
                                   TensorView<const int32_t, 1> starts, TensorView<double, 3> partials,
                                   TensorView<double, 2> sums, int64_t stream) {
  const int64_t channels = out_gradient.size(3);
  require(out_gradient.numel() == channels * ids.numel() && barycentrics.numel() == 2 * ids.numel() &&
              keys.numel() == ids.numel(),
          "gradients must have the shapes of what they are of");
  require(sums.numel() == (starts.size(0) - 1) * kCornerSums && starts.size(0) - 1 == ids.size(0) * faces.size(0),
          "sums must be [B * F, 12]");
  AttributesGradient<T> source{};
  source.seen = seen_in(faces, ids, vertices);
  source.sums = sums.data;
  source.out_gradient = out_gradient.data;
  source.barycentrics = barycentrics.data;
  source.channels = channels;
  source.first_channel = first_channel;
  sum_runs("interpolate_gradient_of_faces", source, 1, keys, order, starts, partials, stream);
}

template <class T>
void add_corners_to_vertices(TensorView<const double, 2> sums, TensorView<const int32_t, 1> face_starts,
                             int64_t first_channel, TensorView<const int32_t, 1> keys,
                             TensorView<const int64_t, 1> order, TensorView<const int32_t, 1> starts,
                             TensorView<double, 3> partials, TensorView<T, 3> out, int64_t stream) {
  const int64_t count = keys.size(0) / 3, sets = out.size(0);
  require(starts.size(0) == out.size(1) + 1 && keys.size(0) % 3 == 0, "starts must be [V + 1], keys [3 F]");
  const int64_t rows = face_starts.size(0) - 1;
  if (count == 0 || sets == 0) return;
  require(rows % (count * sets) == 0 && sums.numel() == rows * kCornerSums, "sums must be [B * F, 12]");
  const CornerSums<T> source{sums.data,     face_starts.data,      count,   out.size(1), out.size(2),
                             first_channel, rows / (count * sets), out.data};
  sum_runs("add_corners_to_vertices", source, sets, keys, order, starts, partials, stream);
}

#define TRELLIS_INSTANTIATE(T)                                                                                    \
  template void interpolate(TensorView<const T, 3>, TensorView<const int32_t, 2>, TensorView<const int32_t, 3>,   \
                            TensorView<const T, 4>, TensorView<T, 4>, int64_t);                                   \
  template void interpolate_barycentrics_gradient(TensorView<const T, 4>, TensorView<const T, 3>,                 \
                                                  TensorView<const int32_t, 2>, TensorView<const int32_t, 3>,     \
                                                  TensorView<T, 4>, int64_t);                                     \
  template void mesh_gradient_of_faces(                                                                           \
      TensorView<const T, 3>, TensorView<const int32_t, 2>, TensorView<const int32_t, 3>, TensorView<const T, 4>, \
      TensorView<const T, 3>, TensorView<const int32_t, 1>, TensorView<const int64_t, 1>,                         \
      TensorView<const int32_t, 1>, TensorView<double, 3>, TensorView<double, 2>, int64_t);                       \
  template void interpolate_gradient_of_faces(                                                                    \
      TensorView<const T, 4>, TensorView<const int32_t, 2>, int64_t, TensorView<const int32_t, 3>,                \
      TensorView<const T, 4>, int64_t, TensorView<const int32_t, 1>, TensorView<const int64_t, 1>,                \
      TensorView<const int32_t, 1>, TensorView<double, 3>, TensorView<double, 2>, int64_t);                       \
  template void add_corners_to_vertices(                                                                          \
      TensorView<const double, 2>, TensorView<const int32_t, 1>, int64_t, TensorView<const int32_t, 1>,           \
      TensorView<const int64_t, 1>, TensorView<const int32_t, 1>, TensorView<double, 3>, TensorView<T, 3>, int64_t);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cuda
