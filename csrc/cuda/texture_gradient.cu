// The gradient of the texture. Lookups are sorted by the place between four texels that they fall into (torch.sort, in
// cuda.py); each texel then sums the lookups of the four places around it, in order, and adds what the next level says.
// A place that very many lookups share has been summed in aligned chunks before. Every sum has one order.
#include "texture.cuh"
#include "texture.h"

namespace trellis::cuda {
namespace {

constexpr int kGroup = 4;  // channels at a time
constexpr int kWarp = 32;

// Places of a level are (H + 1) x (W + 1): place (i, j) has texel rows i - 1, i and columns j - 1, j around it.
struct Places {
  int64_t start[Pyramid::kMaxLevels];
  int64_t count;
};
Places places_of(const Pyramid& pyramid) {
  Places places{};
  for (int level = 0; level < pyramid.count; ++level) {
    places.start[level] = places.count;
    places.count += int64_t{pyramid.height[level] + 1} * (pyramid.width[level] + 1);
  }
  return places;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    list_texture_keys(const __grid_constant__ Lookup<T> lookup, const __grid_constant__ Places places,
                      const T* __restrict__ gradients, int nowhere, int* __restrict__ keys, T* __restrict__ levels) {
  const int64_t pixel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pixel >= lookup.pixels) return;
  const int slots = lookup.pyramid.count > 1 ? 2 : 1;
  bool counts = is_somewhere(lookup.uv + 2 * pixel), any = false;
  for (int c = 0; counts && c < lookup.channels; ++c) any |= gradients[pixel * lookup.channels + c] != 0;
  counts &= any;
  const T level = counts ? level_of_pixel(lookup, pixel) : T(0);
  const int lower = static_cast<int>(level);
  levels[pixel] = level;
  for (int slot = 0; slot < slots; ++slot) {
    int key = nowhere;
    if (counts && (slot == 0 || level > T(lower))) {
      const int at = lower + slot, width = lookup.pyramid.width[at];
      const Along<T> columns = along(lookup.uv[2 * pixel], width, lookup.wrap, lookup.nearest);
      const Along<T> rows = along(lookup.uv[2 * pixel + 1], lookup.pyramid.height[at], lookup.wrap, lookup.nearest);
      if (columns.first != Along<T>::kNowhere && rows.first != Along<T>::kNowhere)
        key = static_cast<int>(pixel / lookup.pixels_per_image * places.count + places.start[at] +
                               int64_t{rows.first + 1} * (width + 1) + columns.first + 1);
    }
    keys[slots * pixel + slot] = key;
  }
}

__global__ void __launch_bounds__(kThreads)
    find_texture_runs(const int* __restrict__ keys, int64_t count, int nowhere, int2* __restrict__ runs) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count || keys[i] == nowhere) return;
  if (i == 0 || keys[i - 1] != keys[i]) runs[keys[i]].x = static_cast<int>(i);
  if (i + 1 == count || keys[i + 1] != keys[i]) runs[keys[i]].y = static_cast<int>(i + 1);
}

// Lookup `entry` on a level: its pixel and the weights of the right, the lower texels and of the level.
template <class T>
struct Entry {
  int64_t pixel;
  T x, y, share;

  __device__ Entry(const Lookup<T>& lookup, const T* levels, int64_t entry, int level) {
    const bool slots = lookup.pyramid.count > 1;
    pixel = slots ? entry / 2 : entry;
    const T fraction = levels[pixel] - T(static_cast<int>(levels[pixel]));
    share = slots && entry % 2 == 1 ? fraction : 1 - fraction;
    x = along(lookup.uv[2 * pixel], lookup.pyramid.width[level], lookup.wrap, lookup.nearest).weight;
    y = along(lookup.uv[2 * pixel + 1], lookup.pyramid.height[level], lookup.wrap, lookup.nearest).weight;
  }
};

// One warp per aligned chunk that lies in one place: sums of its lookups for the four texels around.
template <class T>
__global__ void __launch_bounds__(kWarp)
    sum_texture_chunks(const __grid_constant__ Lookup<T> lookup, const __grid_constant__ Places places,
                       const T* __restrict__ gradients, const T* __restrict__ levels, const int* __restrict__ keys,
                       const int64_t* __restrict__ order, int nowhere, T* __restrict__ partials) {
  const int64_t chunk = blockIdx.x, begin = chunk * kTextureChunk;
  const int key = keys[begin], lane = static_cast<int>(threadIdx.x);
  if (key == nowhere || keys[begin + kTextureChunk - 1] != key) return;
  const int64_t place = key % places.count;
  int level = 0;
  while (level + 1 < lookup.pyramid.count && place >= places.start[level + 1]) ++level;
  for (int group = 0; group < lookup.channels; group += kGroup) {
    T sums[4][kGroup] = {};
    for (int k = lane; k < kTextureChunk; k += kWarp) {
      const Entry<T> entry(lookup, levels, order[begin + k], level);
      const T* const gradient = gradients + entry.pixel * lookup.channels;
      for (int c = 0; c < kGroup; ++c) {
        if (group + c >= lookup.channels) break;
        const T value = entry.share * gradient[group + c];
        const T left = value * (1 - entry.x), right = value * entry.x;
        sums[0][c] += left * (1 - entry.y);
        sums[1][c] += right * (1 - entry.y);
        sums[2][c] += left * entry.y;
        sums[3][c] += right * entry.y;
      }
    }
    for (int corner = 0; corner < 4; ++corner)
      for (int c = 0; c < kGroup; ++c) {
        T sum = sums[corner][c];
        for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0 && group + c < lookup.channels)
          partials[(4 * chunk + corner) * lookup.channels + group + c] = sum;
      }
  }
}

template <class T>
struct Sorted {
  const T *gradients, *levels, *partials;
  const int64_t* order;
  const int2* runs;
};

// Adds to `sums` what the lookups of a place give to one of the four texels around it.
template <class T>
__device__ void add_place(const Lookup<T>& lookup, const Sorted<T>& sorted, int level, int64_t place, int corner,
                          int group, T (&sums)[kGroup]) {
  const int2 run = sorted.runs[place];
  for (int64_t i = run.x; i < run.y;) {
    if (i % kTextureChunk == 0 && i + kTextureChunk <= run.y) {
      const T* const partial = sorted.partials + (4 * (i / kTextureChunk) + corner) * lookup.channels;
      for (int c = 0; c < kGroup; ++c)
        if (group + c < lookup.channels) sums[c] += partial[group + c];
      i += kTextureChunk;
      continue;
    }
    const Entry<T> entry(lookup, sorted.levels, sorted.order[i], level);
    const T weight = entry.share * (corner / 2 ? entry.y : 1 - entry.y) * (corner % 2 ? entry.x : 1 - entry.x);
    const T* const gradient = sorted.gradients + entry.pixel * lookup.channels;
    for (int c = 0; c < kGroup; ++c)
      if (group + c < lookup.channels) sums[c] += weight * gradient[group + c];
    ++i;
  }
}

// The places along one side that texel i belongs to, number 0 to 3; -1: none. It is the first or (side 1) the second
// texel of its place.
struct Membership {
  int place, side;
};
__device__ inline Membership membership(int number, int i, int size, Wrap wrap) {
  if (number < 2) return {i + number, 1 - number};
  const bool low = i == 0, high = i == size - 1, repeat = wrap == Wrap::repeat;
  if (wrap == Wrap::zero || !(number == 2 ? (repeat ? high : low) : (repeat ? low : high))) return {-1, 0};
  return {number == 2 ? 0 : size, number - 2};
}

// One thread per texel and group of channels.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_texture_level(const __grid_constant__ Lookup<T> lookup, const __grid_constant__ Sorted<T> sorted, int level,
                      int64_t first_place, int64_t places_per_image, const T* __restrict__ next, int64_t next_stride,
                      T* __restrict__ out, int64_t out_stride) {
  const int64_t texel = int64_t{blockIdx.x} * kThreads + threadIdx.x, image = blockIdx.y;
  const int width = lookup.pyramid.width[level], height = lookup.pyramid.height[level];
  const int group = static_cast<int>(blockIdx.z) * kGroup, channels = lookup.channels;
  if (texel >= int64_t{height} * width) return;
  const int i = static_cast<int>(texel / width), j = static_cast<int>(texel % width);
  T sums[kGroup] = {};
  for (int number = 0; number < 16; ++number) {
    const Membership row = membership(number / 4, i, height, lookup.wrap);
    const Membership column = membership(number % 4, j, width, lookup.wrap);
    if (row.place < 0 || column.place < 0) continue;
    const int64_t place = image * places_per_image + first_place + int64_t{row.place} * (width + 1) + column.place;
    add_place(lookup, sorted, level, place, 2 * row.side + column.side, group, sums);
  }
  if (next) {
    const int next_width = lookup.pyramid.width[level + 1];
    const Takers down = takers_of(i, height), across = takers_of(j, width);
    for (int row = 0; row < 2; ++row)
      for (int column = 0; column < 2; ++column) {
        if (row >= down.count || column >= across.count) continue;
        const T weight = T(down.weight[row] * across.weight[column]);
        const T* const from =
            next + image * next_stride + (int64_t{down.first + row} * next_width + across.first + column) * channels;
        for (int c = 0; c < kGroup; ++c)
          if (group + c < channels) sums[c] += weight * from[group + c];
      }
  }
  for (int c = 0; c < kGroup; ++c)
    if (group + c < channels) out[image * out_stride + texel * channels + group + c] = sums[c];
}

template <class T>
Lookup<T> listed(const TensorView<const T, 4>& out_gradient, const TensorView<const T, 4>& uv, const T* derivatives,
                 bool has_levels, const int64_t (&texture)[4], const std::string& wrap, const std::string& filter) {
  const Lookup<T> lookup =
      lookup_of(uv, derivatives, has_levels, texture[0], texture[1], texture[2], texture[3], wrap, filter);
  if (out_gradient.numel() != lookup.pixels * lookup.channels)
    throw std::invalid_argument("out_gradient must be [B, h, w, C]");
  if (texture[0] * places_of(lookup.pyramid).count > INT32_MAX)
    throw std::invalid_argument("texture must have less than 2^31 texels in all, levels included");
  return lookup;
}

template <class T, int Rank>
void expect_size(const TensorView<T, Rank>& tensor, int64_t count, const char* name) {
  if (tensor.numel() != count) throw std::invalid_argument(std::string(name) + " must fit the pixels and the texture");
}

}  // namespace

int64_t texture_places(int64_t height, int64_t width, bool levels) { return places_of({height, width, levels}).count; }

template <class T>
void texture_keys(TensorView<const T, 4> out_gradient, TensorView<const T, 4> uv, TensorView<const T, 4> derivatives,
                  TensorView<const T, 4> texture, TensorView<int32_t, 2> keys, TensorView<T, 1> levels,
                  const std::string& wrap, const std::string& filter, int64_t stream) {
  const bool has_levels = derivatives.size(3) == 4;
  const int64_t (&shape)[4] = {texture.size(0), texture.size(1), texture.size(2), texture.size(3)};
  const Lookup<T> lookup = listed(out_gradient, uv, derivatives.data, has_levels, shape, wrap, filter);
  const Places places = places_of(lookup.pyramid);
  expect_size(levels, lookup.pixels, "levels");
  expect_size(keys, lookup.pixels * (lookup.pyramid.count > 1 ? 2 : 1), "keys");
  if (has_levels && derivatives.numel() != 4 * lookup.pixels)
    throw std::invalid_argument("derivatives must be [B, h, w, 4]");
  launch({"list_texture_keys", blocks(lookup.pixels, kThreads), kThreads, stream}, list_texture_keys<T>, lookup, places,
         out_gradient.data, static_cast<int>(places.count * texture.size(0)), keys.data, levels.data);
}

template <class T>
void texture_runs(TensorView<const T, 4> out_gradient, TensorView<const T, 4> uv, TensorView<const T, 1> levels,
                  TensorView<const T, 4> texture, TensorView<const int32_t, 1> keys, TensorView<const int64_t, 1> order,
                  bool has_levels, TensorView<int32_t, 2> runs, TensorView<T, 3> partials, const std::string& wrap,
                  const std::string& filter, int64_t stream) {
  const int64_t (&shape)[4] = {texture.size(0), texture.size(1), texture.size(2), texture.size(3)};
  const Lookup<T> lookup = listed(out_gradient, uv, static_cast<const T*>(nullptr), has_levels, shape, wrap, filter);
  const Places places = places_of(lookup.pyramid);
  const int64_t count = keys.size(0), chunks = count / kTextureChunk;
  const int nowhere = static_cast<int>(places.count * texture.size(0));
  expect_size(levels, lookup.pixels, "levels");
  expect_size(order, count, "order");
  expect_size(runs, int64_t{2} * nowhere, "runs");
  expect_size(partials, chunks * 4 * lookup.channels, "partials");
  if (count > INT32_MAX) throw std::invalid_argument("uv must have less than 2^30 pixels in all");
  launch({"find_texture_runs", blocks(count, kThreads), kThreads, stream}, find_texture_runs, keys.data, count, nowhere,
         reinterpret_cast<int2*>(runs.data));
  launch({"sum_texture_chunks", blocks(chunks, 1), kWarp, stream}, sum_texture_chunks<T>, lookup, places,
         out_gradient.data, levels.data, keys.data, order.data, nowhere, partials.data);
}

template <class T>
void sum_texture(TensorView<const T, 4> out_gradient, TensorView<const T, 4> uv, TensorView<const T, 1> levels,
                 TensorView<const int64_t, 1> order, TensorView<const int32_t, 2> runs, TensorView<const T, 3> partials,
                 bool has_levels, TensorView<T, 4> out, TensorView<T, 3> mips, const std::string& wrap,
                 const std::string& filter, int64_t stream) {
  const int64_t (&shape)[4] = {out.size(0), out.size(1), out.size(2), out.size(3)};
  const Lookup<T> lookup = listed(out_gradient, uv, static_cast<const T*>(nullptr), has_levels, shape, wrap, filter);
  const Pyramid& pyramid = lookup.pyramid;
  const Places places = places_of(pyramid);
  const int64_t images = out.size(0), channels = lookup.channels;
  const int64_t groups = (channels + kGroup - 1) / kGroup;
  expect_size(levels, lookup.pixels, "levels");
  expect_size(mips, images * pyramid.texels * channels, "mips");
  expect_size(runs, 2 * places.count * images, "runs");
  if (images > 65535 || groups > 65535) throw std::invalid_argument("texture must have at most 65535 images");
  const Sorted<T> sorted{out_gradient.data, levels.data, partials.data, order.data,
                         reinterpret_cast<const int2*>(runs.data)};
  const T* next = nullptr;
  const int64_t stride = pyramid.texels * channels;
  for (int level = pyramid.count - 1; level >= 0; --level) {
    const int64_t texels = int64_t{pyramid.height[level]} * pyramid.width[level];
    T* const to = level == 0 ? out.data : mips.data + pyramid.start[level] * channels;
    const dim3 grid = {blocks(texels, kThreads), static_cast<unsigned>(images), static_cast<unsigned>(groups)};
    launch({"sum_texture_level", grid, kThreads, stream}, sum_texture_level<T>, lookup, sorted, level,
           places.start[level], places.count, next, stride, to, level == 0 ? texels * channels : stride);
    next = to;
  }
}

#define TRELLIS_INSTANTIATE(T)                                                                                         \
  template void texture_keys(TensorView<const T, 4>, TensorView<const T, 4>, TensorView<const T, 4>,                   \
                             TensorView<const T, 4>, TensorView<int32_t, 2>, TensorView<T, 1>, const std::string&,     \
                             const std::string&, int64_t);                                                             \
  template void texture_runs(TensorView<const T, 4>, TensorView<const T, 4>, TensorView<const T, 1>,                   \
                             TensorView<const T, 4>, TensorView<const int32_t, 1>, TensorView<const int64_t, 1>, bool, \
                             TensorView<int32_t, 2>, TensorView<T, 3>, const std::string&, const std::string&,         \
                             int64_t);                                                                                 \
  template void sum_texture(TensorView<const T, 4>, TensorView<const T, 4>, TensorView<const T, 1>,                    \
                            TensorView<const int64_t, 1>, TensorView<const int32_t, 2>, TensorView<const T, 3>, bool,  \
                            TensorView<T, 4>, TensorView<T, 3>, const std::string&, const std::string&, int64_t);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cuda
