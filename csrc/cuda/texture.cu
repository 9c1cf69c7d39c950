// Looking a texture up: one thread per pixel; one per value of a level for the levels, one level after the other.
#include "texture.cuh"
#include "texture.h"

namespace trellis::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    halve_texture(const T* __restrict__ from, int64_t from_stride, int height, int width, T* __restrict__ to,
                  int64_t to_stride, int next_height, int next_width, int channels) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= int64_t{next_height} * next_width * channels) return;
  const int channel = static_cast<int>(item % channels), j = static_cast<int>(item / channels % next_width);
  const int i = static_cast<int>(item / channels / next_width);
  const Means down = means_of(i, height), across = means_of(j, width);
  const T* const image = from + blockIdx.y * from_stride;
  T sum = 0;
  for (int column = 0; column < 3; ++column) {
    if (column >= across.count) break;
    T rows = 0;
    for (int row = 0; row < 3; ++row)
      if (row < down.count)
        rows += T(down.weight[row]) *
                image[(int64_t{down.first + row} * width + across.first + column) * channels + channel];
    sum += T(across.weight[column]) * rows;
  }
  to[blockIdx.y * to_stride + item] = sum;
}

// The four texels around a pixel on one level, with no weight where there is none.
template <class T>
struct Corners {
  const T* at[4];  // upper left, upper right, lower left, lower right
  T x, y;          // weights of the right and of the lower ones
  bool there[4];

  __device__ bool found(const Lookup<T>& lookup, const T* __restrict__ texture, const T* __restrict__ mips, int level,
                        int64_t pixel) {
    const int width = lookup.pyramid.width[level], height = lookup.pyramid.height[level];
    const Along<T> columns = along(lookup.uv[2 * pixel], width, lookup.wrap, lookup.nearest);
    const Along<T> rows = along(lookup.uv[2 * pixel + 1], height, lookup.wrap, lookup.nearest);
    if (columns.first == Along<T>::kNowhere || rows.first == Along<T>::kNowhere) return false;
    const int64_t image = pixel / lookup.pixels_per_image;
    const T* const texels =
        level == 0 ? texture + image * height * width * lookup.channels
                   : mips + (image * lookup.pyramid.texels + lookup.pyramid.start[level]) * lookup.channels;
    x = columns.weight;
    y = rows.weight;
    TRELLIS_UNROLL
    for (int corner = 0; corner < 4; ++corner) {
      const int i = wrapped(rows.first + corner / 2, height, lookup.wrap);
      const int j = wrapped(columns.first + corner % 2, width, lookup.wrap);
      there[corner] = i >= 0 && j >= 0;
      at[corner] = texels + (there[corner] ? (int64_t{i} * width + j) * lookup.channels : 0);
    }
    return true;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    look_up_texture(const __grid_constant__ Lookup<T> lookup, const T* __restrict__ texture, const T* __restrict__ mips,
                    T* __restrict__ out) {
  const int64_t pixel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pixel >= lookup.pixels) return;
  T* const to = out + pixel * lookup.channels;
  for (int c = 0; c < lookup.channels; ++c) to[c] = T(0);
  if (!is_somewhere(lookup.uv + 2 * pixel)) return;
  const T level = level_of_pixel(lookup, pixel);
  const int lower = static_cast<int>(level);
  for (int slot = 0; slot < 2; ++slot) {
    const T share = slot == 0 ? 1 - (level - T(lower)) : level - T(lower);
    Corners<T> corners;
    if (!(share > 0) || !corners.found(lookup, texture, mips, lower + slot, pixel)) continue;
    const T a = share * (1 - corners.y) * (1 - corners.x) * T(corners.there[0]);
    const T b = share * (1 - corners.y) * corners.x * T(corners.there[1]);
    const T c = share * corners.y * (1 - corners.x) * T(corners.there[2]);
    const T d = share * corners.y * corners.x * T(corners.there[3]);
    for (int k = 0; k < lookup.channels; ++k)
      to[k] += a * corners.at[0][k] + b * corners.at[1][k] + c * corners.at[2][k] + d * corners.at[3][k];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    texture_uv_gradient(const __grid_constant__ Lookup<T> lookup, const T* __restrict__ gradients,
                        const T* __restrict__ texture, const T* __restrict__ mips, T* __restrict__ out) {
  const int64_t pixel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pixel >= lookup.pixels) return;
  T by_u = 0, by_v = 0;
  if (is_somewhere(lookup.uv + 2 * pixel) && !lookup.nearest) {
    const T* const gradient = gradients + pixel * lookup.channels;
    const T level = level_of_pixel(lookup, pixel);
    const int lower = static_cast<int>(level);
    for (int slot = 0; slot < 2; ++slot) {
      const T share = slot == 0 ? 1 - (level - T(lower)) : level - T(lower);
      Corners<T> corners;
      if (!(share > 0) || !corners.found(lookup, texture, mips, lower + slot, pixel)) continue;
      T sums[4] = {};
      for (int k = 0; k < lookup.channels; ++k) {
        TRELLIS_UNROLL
        for (int corner = 0; corner < 4; ++corner) sums[corner] += gradient[k] * corners.at[corner][k];
      }
      TRELLIS_UNROLL
      for (int corner = 0; corner < 4; ++corner) sums[corner] *= T(corners.there[corner]);
      by_u += share * lookup.pyramid.width[lower + slot] *
              ((1 - corners.y) * (sums[1] - sums[0]) + corners.y * (sums[3] - sums[2]));
      by_v += share * lookup.pyramid.height[lower + slot] *
              ((1 - corners.x) * (sums[2] - sums[0]) + corners.x * (sums[3] - sums[1]));
    }
  }
  out[2 * pixel] = by_u;
  out[2 * pixel + 1] = by_v;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    attribute_derivatives(const T* __restrict__ attributes, int64_t attributes_stride, const int* __restrict__ faces,
                          int64_t face_count, int64_t vertices, const int* __restrict__ ids,
                          const T* __restrict__ derivatives, int64_t pixels, int64_t pixels_per_view, int columns,
                          T* __restrict__ out) {
  const int64_t pixel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pixel >= pixels) return;
  T* const to = out + 2 * pixel * columns;
  const int id = ids[pixel];
  DEVICE_CHECK(id < face_count, "rasterization.faces must be below F");
  if (id < 0) {
    for (int c = 0; c < 2 * columns; ++c) to[c] = T(0);
    return;
  }
  const T* const rows = attributes + pixel / pixels_per_view * attributes_stride;
  const int* const face = faces + int64_t{3} * id;
  for (int i = 0; i < 3; ++i) DEVICE_CHECK(face[i] >= 0 && face[i] < vertices, "faces must be rows of the attributes");
  const T* const d = derivatives + 4 * pixel;
  for (int c = 0; c < columns; ++c) {
    const T last = rows[int64_t{face[2]} * columns + c];
    const T by_u = rows[int64_t{face[0]} * columns + c] - last, by_v = rows[int64_t{face[1]} * columns + c] - last;
    to[2 * c] = by_u * d[0] + by_v * d[2];
    to[2 * c + 1] = by_u * d[1] + by_v * d[3];
  }
}

template <class T>
Lookup<T> checked_lookup(const TensorView<const T, 4>& texture, int64_t mip_texels, const TensorView<const T, 4>& uv,
                         const TensorView<const T, 4>& derivatives, const std::string& wrap,
                         const std::string& filter) {
  const bool has_levels = derivatives.size(3) == 4;
  const Lookup<T> lookup = lookup_of(uv, derivatives.data, has_levels, texture.size(0), texture.size(1),
                                     texture.size(2), texture.size(3), wrap, filter);
  if (mip_texels != lookup.pyramid.texels || (has_levels && derivatives.numel() != 4 * lookup.pixels))
    throw std::invalid_argument("derivatives must be [B, h, w, 4] and mips the levels of the texture");
  return lookup;
}

}  // namespace

template <class T>
void sample_texture(TensorView<const T, 4> texture, TensorView<const T, 4> uv, TensorView<const T, 4> derivatives,
                    TensorView<T, 4> out, TensorView<T, 3> mips, const std::string& wrap, const std::string& filter,
                    int64_t stream) {
  const Lookup<T> lookup = checked_lookup(texture, mips.size(1), uv, derivatives, wrap, filter);
  const Pyramid& pyramid = lookup.pyramid;
  const int64_t images = texture.size(0), channels = lookup.channels;
  if (out.numel() != lookup.pixels * channels) throw std::invalid_argument("out must be [B, h, w, C]");
  if (images > 65535) throw std::invalid_argument("texture must have at most 65535 images");
  for (int level = 1; level < pyramid.count; ++level) {
    const int64_t items = int64_t{pyramid.height[level]} * pyramid.width[level] * channels;
    const int64_t full = int64_t{pyramid.height[0]} * pyramid.width[0] * channels, all = pyramid.texels * channels;
    launch({"halve_texture", {blocks(items, kThreads), static_cast<unsigned>(images)}, kThreads, stream},
           halve_texture<T>, level == 1 ? texture.data : mips.data + pyramid.start[level - 1] * channels,
           level == 1 ? full : all, pyramid.height[level - 1], pyramid.width[level - 1],
           mips.data + pyramid.start[level] * channels, all, pyramid.height[level], pyramid.width[level],
           lookup.channels);
  }
  launch({"look_up_texture", blocks(lookup.pixels, kThreads), kThreads, stream}, look_up_texture<T>, lookup,
         texture.data, mips.data, out.data);
}

template <class T>
void sample_texture_uv_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 4> texture,
                                TensorView<const T, 3> mips, TensorView<const T, 4> uv,
                                TensorView<const T, 4> derivatives, TensorView<T, 4> out, const std::string& wrap,
                                const std::string& filter, int64_t stream) {
  const Lookup<T> lookup = checked_lookup(texture, mips.size(1), uv, derivatives, wrap, filter);
  if (out_gradient.numel() != lookup.pixels * lookup.channels || out.shape != uv.shape)
    throw std::invalid_argument("gradients must have the shapes of what they are of");
  launch({"texture_uv_gradient", blocks(lookup.pixels, kThreads), kThreads, stream}, texture_uv_gradient<T>, lookup,
         out_gradient.data, texture.data, mips.data, out.data);
}

template <class T>
void interpolate_derivatives(TensorView<const T, 3> attributes, TensorView<const int32_t, 2> faces,
                             TensorView<const int32_t, 3> ids, TensorView<const T, 4> derivatives, TensorView<T, 4> out,
                             int64_t stream) {
  const int64_t vertices = attributes.size(1), columns = attributes.size(2), views = ids.size(0);
  if (faces.size(1) != 3 || derivatives.numel() != 4 * ids.numel() || out.numel() != 2 * columns * ids.numel() ||
      (attributes.size(0) != 1 && attributes.size(0) != views))
    throw std::invalid_argument("pictures must be [B, H, W] and attributes [1 or B, V, C]");
  launch({"attribute_derivatives", blocks(ids.numel(), kThreads), kThreads, stream}, attribute_derivatives<T>,
         attributes.data, attributes.size(0) == 1 ? int64_t{0} : vertices * columns, faces.data, faces.size(0),
         vertices, ids.data, derivatives.data, ids.numel(), ids.size(1) * ids.size(2), static_cast<int>(columns),
         out.data);
}

#define TRELLIS_INSTANTIATE(T)                                                                                       \
  template void sample_texture(TensorView<const T, 4>, TensorView<const T, 4>, TensorView<const T, 4>,               \
                               TensorView<T, 4>, TensorView<T, 3>, const std::string&, const std::string&, int64_t); \
  template void sample_texture_uv_gradient(TensorView<const T, 4>, TensorView<const T, 4>, TensorView<const T, 3>,   \
                                           TensorView<const T, 4>, TensorView<const T, 4>, TensorView<T, 4>,         \
                                           const std::string&, const std::string&, int64_t);                         \
  template void interpolate_derivatives(TensorView<const T, 3>, TensorView<const int32_t, 2>,                        \
                                        TensorView<const int32_t, 3>, TensorView<const T, 4>, TensorView<T, 4>,      \
                                        int64_t);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cuda
