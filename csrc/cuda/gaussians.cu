// Blends tiles of 16 x 16 pixels front to back: a block per tile, a thread per pixel, a warp per 8 x 4 pixels. The
// block takes 256 Gaussians at a time into shared memory and finds, a Gaussian per thread, which warps each of them
// reaches; a warp then runs through those that reach it. A block ends when all of its pixels are opaque.
#include "gaussians.cuh"
#include "gaussians.h"

namespace trellis::cuda {
namespace {

constexpr int kThreads = kTile * kTile;

struct Blend {
  const float *splats, *colors;
  const int32_t* slots;
  const int64_t* permutation;
  const int32_t* starts;
  const float* background;
  int64_t count, view_stride;
  int channels, first_channel, width, height, across;
  bool resume, finish, leave_state;
  float *out_colors, *out_depths, *out_transmittances, *out_medians;
  int32_t* out_last;
};

// `kChannels` channels from in.first_channel on; those that are not there count as 0 and are not written.
template <int kChannels>
__global__ void __launch_bounds__(kThreads) blend_pixels(const Blend in) {
  constexpr int kQuads = (kChannels + 3) / 4;
  SHARED_ARRAY(float4, conics, kThreads);  // x, y, xx, xy
  SHARED_ARRAY(float4, rest, kThreads);    // yy, opacity, depth, index
  SHARED_ARRAY(float4, shades, kThreads, kQuads);
  SHARED_ARRAY(unsigned, reached, kPatches, kThreads / 32);  // by patch: a bit per Gaussian

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int left = static_cast<int>(blockIdx.x) % in.across * kTile;
  const int top = static_cast<int>(blockIdx.x) / in.across * kTile;
  const int x = left + warp % kPatchesAcross * kPatchWide + lane % kPatchWide;
  const int y = top + warp / kPatchesAcross * kPatchHigh + lane / kPatchWide;
  const bool inside = x < in.width && y < in.height;
  const int64_t view = blockIdx.y, list = view * gridDim.x + blockIdx.x;
  const int64_t pixel = (view * in.height + y) * in.width + x;
  const int there = min(kChannels, in.channels - in.first_channel);

  float transmittance = 1, depth = 0, median = 0, color[4 * kQuads] = {};
  int last = -1;
  if (in.resume && inside) {
    transmittance = in.out_transmittances[pixel];
    depth = in.out_depths[pixel];
    median = in.out_medians[pixel];
    last = in.out_last[pixel];
    for (int i = 0; i < kChannels; ++i)
      color[i] = i < there ? in.out_colors[pixel * in.channels + in.first_channel + i] : 0;
  }
  bool finished = !inside || transmittance < 0;
  transmittance = fabsf(transmittance);
  const float column = static_cast<float>(x), row = static_cast<float>(y);

  const int end = in.starts[list + 1];
  // The slot is looked up a batch ahead: three loads that wait for one another are too long to wait for at once.
  const auto slot_at = [&](int i) { return i < end ? in.slots[in.permutation[i]] : 0; };
  int32_t next_slot = slot_at(in.starts[list] + thread);
  for (int begin = in.starts[list]; begin < end; begin += kThreads) {
    const int32_t slot = next_slot;
    if (__syncthreads_count(finished) == kThreads) break;  // also: all have read the shared arrays
    Splat s{};
    s.limit = -1;  // reaches nothing
    if (begin + thread < end) {
      const float4* const source = reinterpret_cast<const float4*>(in.splats + int64_t{slot} * kSplat);
      const float4 one = source[0], two = source[1];
      const int64_t index = slot - view * in.count;
      s = {one.x, one.y, one.z, one.w, two.x, two.y, two.z, two.w};
      conics[thread] = one;
      rest[thread] = make_float4(s.yy, s.opacity, s.depth, __int_as_float(static_cast<int>(index)));
      const float* const shade = in.colors + view * in.view_stride + index * in.channels + in.first_channel;
      const auto channel = [&](int i) { return i < there ? shade[i] : 0; };
      for (int i = 0; i < kQuads; ++i)
        shades[thread][i] = make_float4(channel(4 * i), channel(4 * i + 1), channel(4 * i + 2), channel(4 * i + 3));
    }
    const Slopes slope = slopes(s);
    for (int patch = 0; patch < kPatches; ++patch) {
      const float patch_left = static_cast<float>(left + patch % kPatchesAcross * kPatchWide);
      const float patch_top = static_cast<float>(top + patch / kPatchesAcross * kPatchHigh);
      const bool hit = reaches(s, slope, patch_left, patch_top, kPatchWide, kPatchHigh);
      const unsigned votes = __ballot_sync(0xffffffffu, hit);
      if (lane == patch) reached[patch][warp] = votes;
    }
    next_slot = slot_at(begin + kThreads + thread);
    __syncthreads();

    for (int group = 0; group < kThreads / 32; ++group) {
      unsigned here = reached[warp][group];
      if (here == 0) continue;
      if (__all_sync(0xffffffffu, finished)) break;
      for (; here; here &= here - 1) {
        const int i = group * 32 + __ffs(static_cast<int>(here)) - 1;
        const float4 conic = conics[i], more = rest[i];
        const float dx = conic.x - column, dy = conic.y - row;
        const float q = dx * (conic.z * dx + conic.w * dy) + more.x * dy * dy;
        float alpha = more.y * exp2_approximately(-q);
        if (finished || q < 0 || !(alpha >= kSmallestAlpha)) continue;
        alpha = fminf(alpha, kLargestAlpha);
        const float after = transmittance * (1 - alpha);
        if (after < kSmallestTransmittance) {
          finished = true;
          continue;
        }
        const float weight = alpha * transmittance;
        if (transmittance >= 0.5f && after < 0.5f) median = more.z;
        transmittance = after;
        depth += weight * more.z;
        last = __float_as_int(more.w);
        for (int quad = 0; quad < kQuads; ++quad) {
          const float4 shade = shades[i][quad];
          color[4 * quad] += weight * shade.x;
          color[4 * quad + 1] += weight * shade.y;
          color[4 * quad + 2] += weight * shade.z;
          color[4 * quad + 3] += weight * shade.w;
        }
      }
    }
  }

  if (!inside) return;
  if (in.leave_state) {
    in.out_transmittances[pixel] = finished && !in.finish ? -transmittance : transmittance;
    in.out_depths[pixel] = depth;
    in.out_last[pixel] = last;
    in.out_medians[pixel] = median;
  }
  float* const out_color = in.out_colors + pixel * in.channels + in.first_channel;
  const float* const behind = in.background + view * in.channels + in.first_channel;
  for (int i = 0; i < kChannels; ++i)
    if (i < there) out_color[i] = in.finish ? color[i] + transmittance * behind[i] : color[i];
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

void blend_tiles(TensorView<const float, 2> splats, TensorView<const float, 3> colors,
                 TensorView<const int32_t, 1> slots, TensorView<const int64_t, 1> permutation,
                 TensorView<const int32_t, 1> starts, TensorView<const float, 2> background, bool resume, bool finish,
                 TensorView<float, 4> out_colors, TensorView<float, 3> out_depths,
                 TensorView<float, 3> out_transmittances, TensorView<int32_t, 3> out_last,
                 TensorView<float, 3> out_medians, int64_t stream) {
  const int64_t views = out_depths.size(0), height = out_depths.size(1), width = out_depths.size(2);
  const int64_t channels = colors.size(2), across = (width + kTile - 1) / kTile;
  const int64_t tiles = across * ((height + kTile - 1) / kTile);
  require(splats.size(1) == kSplat && splats.size(0) == views * colors.size(1) &&
              (colors.size(0) == 1 || colors.size(0) == views),
          "splats and colors must be [V * G, 8] and [1 or V, G, C]");
  require(slots.size(0) == permutation.size(0) && starts.size(0) == views * tiles + 1,
          "slots and permutation must be equally long, starts must be [V * tiles + 1]");
  require(background.size(0) == views && background.size(1) == channels, "background must be [V, C]");
  require(out_colors.numel() == views * height * width * channels && out_colors.size(3) == channels &&
              out_transmittances.shape == out_depths.shape && out_last.shape == out_depths.shape &&
              out_medians.shape == out_depths.shape,
          "outputs must be [V, H, W, C] and four times [V, H, W]");
  require(views <= 65535 && width <= 16384 && height <= 16384, "too many cameras at once, or too large a picture");
  Blend in{splats.data,
           colors.data,
           slots.data,
           permutation.data,
           starts.data,
           background.data,
           colors.size(1),
           colors.size(0) == views ? colors.size(1) * channels : 0,
           static_cast<int>(channels),
           0,
           static_cast<int>(width),
           static_cast<int>(height),
           static_cast<int>(across),
           resume,
           finish,
           false,
           out_colors.data,
           out_depths.data,
           out_transmittances.data,
           out_medians.data,
           out_last.data};
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(views));
  if (channels <= 3) {
    in.leave_state = true;
    return launch({"blend_tiles", grid, kThreads, stream}, blend_pixels<3>, in);
  }
  // Many channels, 16 at a time. The first ones come last: until then the pixels' state stays as it was.
  constexpr int kMany = 16;
  for (int64_t first = (channels - 1) / kMany * kMany; first >= 0; first -= kMany) {
    in.first_channel = static_cast<int>(first);
    in.leave_state = first == 0;
    launch({"blend_tiles", grid, kThreads, stream}, blend_pixels<kMany>, in);
  }
}

}  // namespace trellis::cuda
