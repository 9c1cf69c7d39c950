// Looking a texture up: pixels are independent; so are the rows of a level once the one before is there.
#include "texture.h"

#include <memory>

#include "mesh_triangle.h"
#include "parallel.h"

namespace trellis::cpu {
namespace {

constexpr int64_t kPixelChunk = 4096;
constexpr int64_t kRowChunk = 8;

// The next level of one image: rows are averaged first, then the columns of what comes out.
template <class T>
void halve(const T* from, int height, int width, T* to, int next_height, int next_width, int64_t channels,
           int threads) {
  parallel_for(next_height, kRowChunk, threads, [&](int64_t begin, int64_t end) {
    const int64_t length = width * channels;
    const auto row = std::make_unique_for_overwrite<T[]>(length);
    for (int64_t i = begin; i < end; ++i) {
      const Means down = means_of(static_cast<int>(i), height);
      const T* const first = from + down.first * length;
      if (down.count == 2) {
        for (int64_t k = 0; k < length; ++k) row[k] = T(0.5) * (first[k] + first[length + k]);
      } else {
        const T a = T(down.weight[0]), b = T(down.weight[1]), c = T(down.weight[2]);
        for (int64_t k = 0; k < length; ++k) row[k] = a * first[k];
        if (down.count == 3)
          for (int64_t k = 0; k < length; ++k) row[k] += b * first[length + k] + c * first[2 * length + k];
      }
      T* const out = to + i * next_width * channels;
      for (int j = 0; j < next_width; ++j) {
        const Means across = means_of(j, width);
        const T* const at = row.get() + across.first * channels;
        const T a = T(across.weight[0]), b = T(across.weight[1]), c = T(across.weight[2]);
        for (int64_t k = 0; k < channels; ++k) {
          T sum = a * at[k];
          if (across.count > 1) sum += b * at[channels + k];
          if (across.count > 2) sum += c * at[2 * channels + k];
          out[j * channels + k] = sum;
        }
      }
    }
  });
}

// One image of a texture and its levels.
template <class T>
struct Image {
  const T* texture;
  const T* mips;
  const Pyramid& pyramid;
  int64_t channels;

  const T* level(int i) const { return i == 0 ? texture : mips + pyramid.start[i] * channels; }
};

// The four texels around a pixel on one level: upper left, upper right, lower left, lower right. Those that are not
// there point to some other.
template <class T>
struct Corners {
  const T* at[4];
  T x, y;  // weights of the right and of the lower ones
  bool whole;
  bool there[4];  // unless `whole`

  [[gnu::always_inline]] bool found(const Image<T>& image, int level, const T* uv, Wrap wrap, bool nearest) {
    const int width = image.pyramid.width[level], height = image.pyramid.height[level];
    const Along<T> columns = along(uv[0], width, wrap, nearest), rows = along(uv[1], height, wrap, nearest);
    x = columns.weight;
    y = rows.weight;
    const int64_t line = width * image.channels;
    whole = static_cast<unsigned>(columns.first) < static_cast<unsigned>(width - 1) &&
            static_cast<unsigned>(rows.first) < static_cast<unsigned>(height - 1);
    if (whole) [[likely]] {
      at[0] = image.level(level) + rows.first * line + columns.first * image.channels;
      at[1] = at[0] + image.channels;
      at[2] = at[0] + line;
      at[3] = at[2] + image.channels;
      return true;
    }
    if (columns.first == Along<T>::kNowhere || rows.first == Along<T>::kNowhere) return false;
    at_the_border(image, level, rows.first, columns.first, wrap);
    return true;
  }

  T weight(int corner) const {
    const T all = (corner % 2 ? x : 1 - x) * (corner / 2 ? y : 1 - y);
    return whole || there[corner] ? all : T(0);
  }

 private:
  [[gnu::noinline]] void at_the_border(const Image<T>& image, int level, int row, int column, Wrap wrap) {
    const int width = image.pyramid.width[level], height = image.pyramid.height[level];
    for (int corner = 0; corner < 4; ++corner) {
      const int i = wrapped(row + corner / 2, height, wrap), j = wrapped(column + corner % 2, width, wrap);
      there[corner] = i >= 0 && j >= 0;
      at[corner] = image.level(level) + (there[corner] ? (int64_t{i} * width + j) * image.channels : 0);
    }
  }
};

// visit(level, share) for the one or two levels of a pixel.
template <class T, class Visit>
[[gnu::always_inline]] inline void for_levels(const Pixels<T>& pixels, const Pyramid& pyramid, int64_t pixel,
                                              const Visit& visit) {
  const T* const uv = pixels.uv.data + 2 * pixel;
  if (!is_finite(uv[0]) || !is_finite(uv[1])) return;
  if (pyramid.count == 1) return visit(0, T(1));
  const T level = level_of(pixels.derivatives.data + 4 * pixel, pyramid.height[0], pyramid.width[0], pyramid.count - 1,
                           pixels.nearest);
  const int lower = static_cast<int>(level);
  const T share = level - T(lower);
  visit(lower, 1 - share);
  if (share > 0) visit(lower + 1, share);
}

// kChannels: how many, if known when compiling, or 0.
template <class T, int kChannels>
void look_up(const Image<T>& image, const Pixels<T>& pixels, int64_t begin, int64_t end, T* out) {
  const int64_t channels = kChannels ? kChannels : image.channels;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    T known[kChannels ? kChannels : 1] = {};
    T* const to = kChannels ? known : out + pixel * channels;
    if (!kChannels)
      for (int64_t c = 0; c < channels; ++c) to[c] = T(0);
    for_levels(pixels, image.pyramid, pixel, [&](int level, T share) __attribute__((always_inline)) {
      Corners<T> corners;
      if (!corners.found(image, level, pixels.uv.data + 2 * pixel, pixels.wrap, pixels.nearest)) return;
      const T a = share * corners.weight(0), b = share * corners.weight(1);
      const T c = share * corners.weight(2), d = share * corners.weight(3);
      for (int64_t k = 0; k < channels; ++k)
        to[k] += a * corners.at[0][k] + b * corners.at[1][k] + c * corners.at[2][k] + d * corners.at[3][k];
    });
    if (kChannels)
      for (int64_t c = 0; c < channels; ++c) out[pixel * channels + c] = known[c];
  }
}

template <class T>
Image<T> image_of(const T* texture, const T* mips, const Pyramid& pyramid, int64_t channels, int64_t image) {
  return {texture + image * pyramid.height[0] * pyramid.width[0] * channels, mips + image * pyramid.texels * channels,
          pyramid, channels};
}

template <class T>
void check(TensorView<const T, 4> texture, const Pixels<T>& pixels, const Pyramid& pyramid, int64_t mip_texels) {
  if ((texture.size(0) != 1 && texture.size(0) != pixels.uv.size(0)) || mip_texels != pyramid.texels)
    throw std::invalid_argument("texture must be [1, H, W, C] or [B, H, W, C], and mips its levels");
}

// body(image, begin, end) over all pixels, cut where the image of the texture changes.
template <class T, class Body>
void for_images(int64_t images, const Pixels<T>& pixels, int threads, const Body& body) {
  const int64_t each = pixels.count() / images;
  for (int64_t image = 0; image < images; ++image)
    parallel_for(each, kPixelChunk, threads,
                 [&](int64_t begin, int64_t end) { body(image, image * each + begin, image * each + end); });
}

}  // namespace

template <class T>
void sample_texture(TensorView<const T, 4> texture, Pixels<T> pixels, TensorView<T, 4> out, TensorView<T, 3> mips,
                    int threads) {
  const Pyramid pyramid(texture.size(1), texture.size(2), pixels.has_levels());
  const int64_t images = texture.size(0), channels = texture.size(3);
  check(texture, pixels, pyramid, mips.size(1));
  if (out.numel() != pixels.count() * channels) throw std::invalid_argument("out must be [B, h, w, C]");
  for (int64_t image = 0; image < images; ++image) {
    const T* from = texture.row(image);
    for (int level = 1; level < pyramid.count; ++level) {
      T* const to = mips.row(image) + pyramid.start[level] * channels;
      halve(from, pyramid.height[level - 1], pyramid.width[level - 1], to, pyramid.height[level], pyramid.width[level],
            channels, threads);
      from = to;
    }
  }
  if (pixels.count() == 0) return;
  for_images(images, pixels, threads, [&](int64_t index, int64_t begin, int64_t end) {
    const Image<T> image = image_of<T>(texture.data, mips.data, pyramid, channels, index);
    const auto look = channels == 1   ? look_up<T, 1>
                      : channels == 3 ? look_up<T, 3>
                      : channels == 4 ? look_up<T, 4>
                                      : look_up<T, 0>;
    look(image, pixels, begin, end, out.data);
  });
}

template <class T>
void sample_texture_uv_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 4> texture,
                                TensorView<const T, 3> mips, Pixels<T> pixels, TensorView<T, 4> out, int threads) {
  const Pyramid pyramid(texture.size(1), texture.size(2), pixels.has_levels());
  const int64_t channels = texture.size(3);
  check(texture, pixels, pyramid, mips.size(1));
  if (out_gradient.numel() != pixels.count() * channels || out.shape != pixels.uv.shape)
    throw std::invalid_argument("gradients must have the shapes of what they are of");
  if (pixels.count() == 0) return;
  for_images(texture.size(0), pixels, threads, [&](int64_t index, int64_t begin, int64_t end) {
    const Image<T> image = image_of(texture.data, mips.data, pyramid, channels, index);
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const T* const gradient = out_gradient.data + pixel * channels;
      T by_u = 0, by_v = 0;
      for_levels(pixels, pyramid, pixel, [&](int level, T share) __attribute__((always_inline)) {
        Corners<T> corners;
        if (pixels.nearest || !corners.found(image, level, pixels.uv.data + 2 * pixel, pixels.wrap, pixels.nearest))
          return;
        T sums[4] = {};
        for (int64_t k = 0; k < channels; ++k)
          for (int corner = 0; corner < 4; ++corner) sums[corner] += gradient[k] * corners.at[corner][k];
        for (int corner = 0; corner < 4; ++corner)
          if (!corners.whole && !corners.there[corner]) sums[corner] = T(0);
        const auto [a, b, c, d] = sums;
        by_u += share * pyramid.width[level] * ((1 - corners.y) * (b - a) + corners.y * (d - c));
        by_v += share * pyramid.height[level] * ((1 - corners.x) * (c - a) + corners.x * (d - b));
      });
      out.data[2 * pixel] = by_u;
      out.data[2 * pixel + 1] = by_v;
    }
  });
}

template <class T>
void interpolate_derivatives(TensorView<const T, 3> attributes, TensorView<const int32_t, 2> faces,
                             TensorView<const int32_t, 3> ids, TensorView<const T, 4> derivatives, TensorView<T, 4> out,
                             int threads) {
  const int64_t pixels = ids.size(1) * ids.size(2), columns = attributes.size(2);
  check_faces(faces, attributes.size(1));
  check_ids(ids, faces.size(0));
  if (derivatives.numel() != 4 * ids.numel() || out.numel() != 2 * columns * ids.numel())
    throw std::invalid_argument("pictures must be [B, H, W]");
  parallel_for(ids.numel(), kPixelChunk, threads, [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      T* const to = out.data + 2 * pixel * columns;
      const T* const d = derivatives.data + 4 * pixel;
      if (ids.data[pixel] < 0) {
        for (int64_t c = 0; c < 2 * columns; ++c) to[c] = T(0);
        continue;
      }
      const int32_t* const face = faces.row(ids.data[pixel]);
      const T* const rows = attributes.row(pixel / pixels % attributes.size(0));
      for (int64_t c = 0; c < columns; ++c) {
        const T last = rows[face[2] * columns + c];
        const T by_u = rows[face[0] * columns + c] - last, by_v = rows[face[1] * columns + c] - last;
        to[2 * c] = by_u * d[0] + by_v * d[2];
        to[2 * c + 1] = by_u * d[1] + by_v * d[3];
      }
    }
  });
}

#define TRELLIS_INSTANTIATE(T)                                                                                     \
  template void sample_texture(TensorView<const T, 4>, Pixels<T>, TensorView<T, 4>, TensorView<T, 3>, int);        \
  template void sample_texture_uv_gradient(TensorView<const T, 4>, TensorView<const T, 4>, TensorView<const T, 3>, \
                                           Pixels<T>, TensorView<T, 4>, int);                                      \
  template void interpolate_derivatives(TensorView<const T, 3>, TensorView<const int32_t, 2>,                      \
                                        TensorView<const int32_t, 3>, TensorView<const T, 4>, TensorView<T, 4>, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cpu
