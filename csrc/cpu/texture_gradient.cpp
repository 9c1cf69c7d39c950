// The gradient of the texture. Lookups are listed by the pair of texel rows they fall between; a texel row then sums
// the lists above and below it, pixels in rising order, and adds what the next level says: every sum has one order,
// however many threads there are.
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "parallel.h"
#include "texture.h"

namespace trellis::cpu {
namespace {

constexpr int64_t kEntryChunk = 16384;
constexpr int64_t kRowChunk = 8;

// Entries 0 .. count-1 by a key in [0, keys) or -1 for none, in rising order for each: a counting sort.
struct Lists {
  std::vector<int64_t> starts;
  std::unique_ptr<int32_t[]> entries;

  Lists(int64_t count, int64_t keys, const int32_t* key_of, int threads) : starts(keys + 1, 0) {
    const int64_t parts = std::clamp<int64_t>(count / kEntryChunk, 1, std::max(threads, 1));
    std::vector<int64_t> places(static_cast<size_t>(parts * keys), 0);
    const auto for_part = [&](int64_t part, const auto& visit) {
      int64_t* const mine = places.data() + part * keys;
      for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i)
        if (key_of[i] >= 0) visit(mine[key_of[i]], i);
    };
    parallel_chunks(parts, threads, [&](int64_t part) { for_part(part, [](int64_t& n, int64_t) { ++n; }); });
    int64_t total = 0;
    for (int64_t key = 0; key < keys; ++key) {
      starts[key] = total;
      for (int64_t part = 0; part < parts; ++part) total += std::exchange(places[part * keys + key], total);
    }
    starts[keys] = total;
    entries = std::make_unique_for_overwrite<int32_t[]>(total);
    parallel_chunks(parts, threads, [&](int64_t part) {
      for_part(part, [&](int64_t& place, int64_t i) { entries[place++] = static_cast<int32_t>(i); });
    });
  }
};

// One image of the texture and the pixels that look it up.
template <class T>
class Scatter {
 public:
  Scatter(const Pyramid& pyramid, const Pixels<T>& pixels, int64_t first_pixel, int64_t pixel_count,
          const T* out_gradient, int64_t channels, int threads)
      : pyramid_(pyramid),
        wrap_(pixels.wrap),
        nearest_(pixels.nearest),
        uv_(pixels.uv.data + 2 * first_pixel),
        gradient_(out_gradient + first_pixel * channels),
        channels_(channels),
        threads_(threads),
        slots_(pyramid.count > 1 ? 2 : 1) {
    int64_t rows = 0;
    for (int level = 0; level < pyramid.count; ++level) {
      first_list_[level] = rows;
      rows += pyramid.height[level] + 1;  // list i of a level is between texel rows i - 1 and i
    }
    levels_ = std::make_unique_for_overwrite<T[]>(pixel_count);
    const auto keys = std::make_unique_for_overwrite<int32_t[]>(slots_ * pixel_count);
    parallel_for(pixel_count, kEntryChunk, threads, [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        int32_t* const key = keys.get() + slots_ * pixel;
        for (int slot = 0; slot < slots_; ++slot) key[slot] = -1;
        const T *const uv = uv_ + 2 * pixel, *const by_color = gradient_ + pixel * channels_;
        if (!is_finite(uv[0]) || !is_finite(uv[1]) ||
            std::all_of(by_color, by_color + channels_, [](T value) { return value == 0; }))
          continue;
        T& level = levels_[pixel] = T(0);
        if (slots_ == 2)
          level = level_of(pixels.derivatives.data + 4 * (first_pixel + pixel), pyramid.height[0], pyramid.width[0],
                           pyramid.count - 1, nearest_);
        const int lower = static_cast<int>(level);
        key[0] = list_of(lower, uv[1]);
        if (level > T(lower)) key[1] = list_of(lower + 1, uv[1]);
      }
    });
    lists_ = std::make_unique<Lists>(slots_ * pixel_count, rows, keys.get(), threads);
  }

  // The gradient of a level: what is listed for it, and what `next`, the gradient of the next level, says of it.
  void sum_level(int level, const T* next, T* out) const {
    const int64_t height = pyramid_.height[level], length = pyramid_.width[level] * channels_;
    parallel_for(height, kRowChunk, threads_, [&](int64_t begin, int64_t end) {
      std::vector<double> rows(static_cast<size_t>(2 * length), 0.0), from_next;
      double *row = rows.data(), *below = row + length;
      add(level, begin, nullptr, row);
      for (int64_t i = begin; i < end; ++i) {
        add(level, i + 1, row, i + 1 < end ? below : nullptr);
        if (wrap_ != Wrap::zero) {
          if (i == (wrap_ == Wrap::repeat ? height - 1 : 0)) add(level, 0, row, nullptr);
          if (i == (wrap_ == Wrap::repeat ? 0 : height - 1)) add(level, height, nullptr, row);
        }
        if (next) add_next(level, i, next, row, from_next);
        T* const to = out + i * length;
        for (int64_t k = 0; k < length; ++k) to[k] = T(row[k]);
        std::fill(row, row + length, 0.0);
        std::swap(row, below);
      }
    });
  }

 private:
  int32_t list_of(int level, T v) const {
    const Along<T> rows = along(v, pyramid_.height[level], wrap_, nearest_);
    return rows.first == Along<T>::kNowhere ? -1 : static_cast<int32_t>(first_list_[level] + rows.first + 1);
  }

  void add(int level, int64_t index, double* above, double* below) const {
    channels_ == 3 ? add_list<3>(level, index, above, below) : add_list<0>(level, index, above, below);
  }

  // Adds list `index` to the texel row above it and to the one below it, where given. kChannels: how many, if known
  // when compiling, or 0.
  template <int kChannels>
  void add_list(int level, int64_t index, double* above, double* below) const {
    const int64_t channels = kChannels ? kChannels : channels_;
    const int width = pyramid_.width[level], height = pyramid_.height[level];
    const int64_t list = first_list_[level] + index;
    const auto accumulate = [channels](double weight, const T* by_color, double* to) {
      for (int64_t c = 0; c < channels; ++c) to[c] += weight * double(by_color[c]);
    };
    for (int64_t place = lists_->starts[list]; place < lists_->starts[list + 1]; ++place) {
      const int64_t entry = lists_->entries[place], pixel = slots_ == 2 ? entry >> 1 : entry;
      const T *const uv = uv_ + 2 * pixel, *const by_color = gradient_ + pixel * channels;
      const Along<T> columns = along(uv[0], width, wrap_, nearest_);
      if (columns.first == Along<T>::kNowhere) continue;
      const T y = along(uv[1], height, wrap_, nearest_).weight, share = levels_[pixel] - T(int(levels_[pixel]));
      const double weight = double(slots_ == 2 && (entry & 1) ? share : 1 - share);
      for (int side = 0; side < 2; ++side) {
        const int column = wrapped(columns.first + side, width, wrap_);
        if (column < 0) continue;
        const double across = weight * double(side ? columns.weight : 1 - columns.weight);
        if (above) accumulate(across * double(1 - y), by_color, above + column * channels);
        if (below) accumulate(across * double(y), by_color, below + column * channels);
      }
    }
  }

  void add_next(int level, int64_t i, const T* next, double* row, std::vector<double>& sums) const {
    const int width = pyramid_.width[level];
    const int64_t length = pyramid_.width[level + 1] * channels_;
    const Takers down = takers_of(static_cast<int>(i), pyramid_.height[level]);
    sums.assign(length, 0.0);
    for (int tap = 0; tap < down.count; ++tap) {
      const T* const from = next + (down.first + tap) * length;
      for (int64_t k = 0; k < length; ++k) sums[k] += down.weight[tap] * double(from[k]);
    }
    if (width > 1 && width % 2 == 0) {
      for (int64_t j = 0; j < width / 2; ++j)
        for (int64_t c = 0; c < channels_; ++c) {
          const double half = 0.5 * sums[j * channels_ + c];
          row[2 * j * channels_ + c] += half;
          row[(2 * j + 1) * channels_ + c] += half;
        }
      return;
    }
    for (int j = 0; j < width; ++j) {
      const Takers across = takers_of(j, width);
      for (int tap = 0; tap < across.count; ++tap)
        for (int64_t c = 0; c < channels_; ++c)
          row[j * channels_ + c] += across.weight[tap] * sums[(across.first + tap) * channels_ + c];
    }
  }

  const Pyramid& pyramid_;
  Wrap wrap_;
  bool nearest_;
  const T *uv_, *gradient_;
  int64_t channels_;
  int threads_, slots_;
  int64_t first_list_[Pyramid::kMaxLevels];
  std::unique_ptr<T[]> levels_;  // of each pixel that has an entry; entry = pixel, or 2 pixel + which of its levels
  std::unique_ptr<Lists> lists_;
};

}  // namespace

template <class T>
void sample_texture_gradient(TensorView<const T, 4> out_gradient, Pixels<T> pixels, TensorView<T, 4> out, int threads) {
  const Pyramid pyramid(out.size(1), out.size(2), pixels.has_levels());
  const int64_t images = out.size(0), channels = out.size(3), count = pixels.count();
  if ((images != 1 && images != pixels.uv.size(0)) || out_gradient.numel() != count * channels)
    throw std::invalid_argument("gradients must have the shapes of what they are of");
  if (count == 0) {
    std::fill(out.data, out.data + out.numel(), T(0));
    return;
  }
  if (2 * (count / images) > INT32_MAX)
    throw std::invalid_argument("uv must have less than 2^30 pixels per image of the texture; got " +
                                std::to_string(count / images));
  std::vector<T> levels(static_cast<size_t>(pyramid.texels * channels));
  for (int64_t image = 0; image < images; ++image) {
    const Scatter<T> scatter(pyramid, pixels, image * (count / images), count / images, out_gradient.data, channels,
                             threads);
    const T* next = nullptr;
    for (int level = pyramid.count - 1; level >= 0; --level) {
      T* const to = level == 0 ? out.row(image) : levels.data() + pyramid.start[level] * channels;
      scatter.sum_level(level, next, to);
      next = to;
    }
  }
}

#define TRELLIS_INSTANTIATE(T) \
  template void sample_texture_gradient(TensorView<const T, 4>, Pixels<T>, TensorView<T, 4>, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cpu
