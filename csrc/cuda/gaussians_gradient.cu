// Runs the blending of gaussians.cu backwards: the gradients of what a tile shows, for each Gaussian that it shows.
//
// A block per tile, a thread per pixel, a warp per 8 x 4 pixels; batches of Gaussians from the last that contributed to
// the first. Of a Gaussian each pixel finds its weight, w = alpha T, and its share of d loss / d log alpha, s; T is
// divided by 1 - alpha on the way. Up to there a lane is a pixel. A group of 8 Gaussians later the warp turns round
// through shared memory: four lanes are a Gaussian, each sums w and s over a quarter of the pixels, so that a sum over
// 32 pixels costs no more than two exchanges. Sums of the eight warps are added in their order, and one record is
// written per tile and Gaussian; no two threads add to one number, so the result is the same each time.
#include "gaussians.cuh"
#include "gaussians.h"

namespace trellis::cuda {
namespace {

constexpr int kThreads = kTile * kTile;
constexpr int kGroup = 8;             // Gaussians a warp sums at once
constexpr int kParts = 32 / kGroup;   // lanes for each of them
constexpr int kStride = 32 + kParts;  // of their pixels in shared memory: no two lanes of a half warp meet in a bank
constexpr unsigned kAll = 0xffffffffu;

struct Gradient {
  const float *splats, *colors;
  const int32_t* slots;
  const int64_t* permutation;
  const int32_t* starts;
  const int64_t* firsts;
  const float *background, *grad_colors, *grad_depths, *grad_transmittances, *transmittances;
  const int32_t* last;
  int64_t count, view_stride, base;
  int channels, first_channel, width, height, across;
  bool resume, keep;
  float *running, *records;
  uint8_t* given;
};

// How many entries of the tile's list, which is permutation[begin, end), are not behind the last that contributed.
__device__ int entries_until(const Gradient& in, int begin, int end, int64_t view, int32_t last) {
  if (last < 0) return 0;
  DEVICE_CHECK(last < in.count, "last must hold indices of Gaussians");
  const int64_t first = in.firsts[view * in.count + last] - in.base;
  if (first < 0) return 0;  // in an earlier part of the lists
  int low = begin, high = end;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (in.permutation[middle] < first)
      low = middle + 1;
    else
      high = middle;
  }
  return min(low + 1, end) - begin;
}

// `kChannels` channels from in.first_channel on, and the depth, which is treated as one more channel.
template <int kChannels>
__global__ void __launch_bounds__(kThreads, kChannels <= 3 ? 4 : 2) blend_gradient(const Gradient in) {
  constexpr int kBatch = kChannels <= 3 ? 64 : 32;
  constexpr int kWords = kBatch / 32;
  constexpr int kTests = kPatches * kBatch / kThreads;
  constexpr int kQuads = (kChannels + 1) / 4;
  constexpr int kValues = kMoments + kChannels + 1;
  static_assert(kQuads * 4 == kChannels + 1 && kValues % 2 == 0);
  SHARED_ARRAY(float4, conics, kBatch);  // x, y, xx, xy
  SHARED_ARRAY(float2, rest, kBatch);    // yy, opacity
  SHARED_ARRAY(float4, shades, kBatch, kQuads);
  SHARED_ARRAY(int, entries, kBatch);
  SHARED_ARRAY(unsigned, reached, kPatches, kWords);  // a bit per Gaussian
  SHARED_ARRAY(unsigned, touched, kPatches, kWords);
  SHARED_ARRAY(float4, pulls, kThreads, kQuads);             // gradients of the pixels' channels
  SHARED_ARRAY(float2, shares, kPatches, kGroup * kStride);  // w, s
  SHARED_ARRAY(float, sums, kPatches, kBatch* kValues);
  SHARED_ARRAY(int, untils, kPatches);

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int left = static_cast<int>(blockIdx.x) % in.across * kTile;
  const int top = static_cast<int>(blockIdx.x) / in.across * kTile;
  const int patch_left = left + warp % kPatchesAcross * kPatchWide,
            patch_top = top + warp / kPatchesAcross * kPatchHigh;
  const int x = patch_left + lane % kPatchWide, y = patch_top + lane / kPatchWide;
  const bool inside = x < in.width && y < in.height;
  const int64_t view = blockIdx.y, list = view * gridDim.x + blockIdx.x;
  const int64_t pixel = (view * in.height + y) * in.width + x, pixels = in.height * int64_t{in.width} * gridDim.y;
  const int there = min(kChannels, in.channels - in.first_channel);
  const bool first_pass = in.first_channel == 0;
  const int list_begin = in.starts[list], list_end = in.starts[list + 1];

  float pull[4 * kQuads] = {};
  float transmittance = 1, behind = 0;  // behind: what the pixel loses of all that is farther, by its gradient
  int until = 0;
  if (inside) {
    float through = first_pass ? in.grad_transmittances[pixel] : 0;
    const float* const given = in.grad_colors + pixel * in.channels + in.first_channel;
    const float* const background = in.background + view * in.channels + in.first_channel;
    for (int i = 0; i < kChannels; ++i) {
      if (i >= there) break;
      pull[i] = given[i];
      through += background[i] * pull[i];
    }
    pull[kChannels] = first_pass ? in.grad_depths[pixel] : 0;
    transmittance = in.resume ? in.running[pixel] : in.transmittances[pixel];
    behind = in.resume ? in.running[pixels + pixel] : transmittance * through;
    until = entries_until(in, list_begin, list_end, view, in.last[pixel]);
  }
  for (int quad = 0; quad < kQuads; ++quad)
    pulls[thread][quad] = make_float4(pull[4 * quad], pull[4 * quad + 1], pull[4 * quad + 2], pull[4 * quad + 3]);
  const float column = static_cast<float>(x), row = static_cast<float>(y);
  int warp_until = until;
  for (int other = 16; other; other /= 2) warp_until = max(warp_until, __shfl_xor_sync(kAll, warp_until, other));
  if (lane == 0) untils[warp] = warp_until;
  __syncthreads();
  int block_until = 0;
  for (int i = 0; i < kPatches; ++i) block_until = max(block_until, untils[i]);

  // The sums over the pixels of the warp for the first n Gaussians of its group; `mine` is this lane's one.
  const auto sum_group = [&](int n, int mine) {
    __syncwarp();
    const int which = lane / kParts, part = lane % kParts;
    float value[kValues] = {};
    if (which < n) {
      const float4 conic = conics[mine];
      const float dx[2] = {conic.x - static_cast<float>(patch_left + part),
                           conic.x - static_cast<float>(patch_left + part + kParts)};
      const float dy = conic.y - static_cast<float>(patch_top);
      for (int line = 0; line < kPatchHigh; ++line) {
        float s[2];
        for (int half = 0; half < 2; ++half) {
          const int at = line * kPatchWide + half * kParts + part;
          const float2 share = shares[warp][which * kStride + at];
          s[half] = share.y;
          for (int quad = 0; quad < kQuads; ++quad) {
            const float4 its = pulls[warp * 32 + at][quad];
            value[kMoments + 4 * quad] += share.x * its.x;
            value[kMoments + 4 * quad + 1] += share.x * its.y;
            value[kMoments + 4 * quad + 2] += share.x * its.z;
            value[kMoments + 4 * quad + 3] += share.x * its.w;
          }
        }
        const float d = dy - static_cast<float>(line), both = s[0] + s[1];
        const float by_x = s[0] * dx[0], by_x1 = s[1] * dx[1], along = by_x + by_x1;
        value[0] += both;
        value[1] += along;
        value[2] += both * d;
        value[3] += by_x * dx[0] + by_x1 * dx[1];
        value[4] += along * d;
        value[5] += both * d * d;
      }
    }
    for (int i = 0; i < kValues; ++i) {
      value[i] += __shfl_xor_sync(kAll, value[i], 1);
      value[i] += __shfl_xor_sync(kAll, value[i], 2);
      if (which < n && part == i % kParts) sums[warp][mine * kValues + i] = value[i];
    }
    __syncwarp();
  };

  const int local = thread % kBatch, chunk = thread / kBatch;
  // The slot is looked up a batch ahead: three loads that wait for one another are too long to wait for at once.
  const auto slot_at = [&](int i) { return i >= 0 && i < block_until ? in.slots[in.permutation[list_begin + i]] : 0; };
  int begin = (block_until - 1) / kBatch * kBatch;
  int next_slot = slot_at(begin + local);
  for (; begin >= 0 && block_until > 0; begin -= kBatch) {
    Splat s{};
    s.limit = -1;  // reaches nothing
    if (begin + local < block_until) {
      const float4* const source = reinterpret_cast<const float4*>(in.splats + int64_t{next_slot} * kSplat);
      const float4 one = source[0], two = source[1];
      s = {one.x, one.y, one.z, one.w, two.x, two.y, two.z, two.w};
      if (chunk == 0) {
        conics[local] = one;
        rest[local] = make_float2(s.yy, s.opacity);
        entries[local] = static_cast<int>(in.permutation[list_begin + begin + local]);
      } else if (chunk == 1) {
        const int64_t index = next_slot - view * in.count;
        const float* const shade = in.colors + view * in.view_stride + index * in.channels + in.first_channel;
        const auto channel = [&](int i) { return i == kChannels ? s.depth : i < there ? shade[i] : 0; };
        for (int i = 0; i < kQuads; ++i)
          shades[local][i] = make_float4(channel(4 * i), channel(4 * i + 1), channel(4 * i + 2), channel(4 * i + 3));
      }
    }
    const Slopes slope = slopes(s);
    for (int test = 0; test < kTests; ++test) {
      const int patch = chunk * kTests + test;
      const float from_x = static_cast<float>(left + patch % kPatchesAcross * kPatchWide);
      const float from_y = static_cast<float>(top + patch / kPatchesAcross * kPatchHigh);
      const bool hit = reaches(s, slope, from_x, from_y, kPatchWide, kPatchHigh);
      const unsigned votes = __ballot_sync(kAll, hit);
      if (lane == 0) reached[patch][local / 32] = votes;
    }
    next_slot = slot_at(begin - kBatch + local);
    __syncthreads();

    // Through the Gaussians that reach the patch, from the last; a last round has none left and sums those that remain.
    unsigned here = 0, seen = 0;
    for (int word = kWords, n = 0, mine = 0;;) {
      while (here == 0 && word > 0) {
        if (lane == 0 && word < kWords) touched[warp][word] = seen;
        seen = 0;
        here = reached[warp][--word];
        const int ahead = warp_until - (begin + 32 * word);  // those of the word that are not behind all pixels' last
        if (ahead < 32) here = ahead <= 0 ? 0 : here & ((1u << ahead) - 1);
      }
      const bool more = here != 0;
      if (more) {
        const int bit = 31 - __clz(static_cast<int>(here)), i = 32 * word + bit;
        here ^= 1u << bit;
        const float4 conic = conics[i];
        const float2 other = rest[i];
        const float dx = conic.x - column, dy = conic.y - row;
        const float q = dx * (conic.z * dx + conic.w * dy) + other.x * dy * dy;
        const float alpha = other.y * exp2_approximately(-q);
        const bool contributes = begin + i < until && q >= 0 && alpha >= kSmallestAlpha;
        if (!__any_sync(kAll, contributes)) continue;
        float2 share = make_float2(0, 0);
        if (contributes) {
          const float kept = fminf(alpha, kLargestAlpha), inverse = __fdividef(1.0f, 1 - kept);
          transmittance *= inverse;
          share.x = kept * transmittance;
          float worth = 0;
          for (int quad = 0; quad < kQuads; ++quad) {
            const float4 shade = shades[i][quad];
            worth += shade.x * pull[4 * quad] + shade.y * pull[4 * quad + 1] + shade.z * pull[4 * quad + 2] +
                     shade.w * pull[4 * quad + 3];
          }
          if (alpha <= kLargestAlpha) share.y = kept * (transmittance * worth - behind * inverse);
          behind += share.x * worth;
        }
        shares[warp][n * kStride + lane] = share;
        if (lane / kParts == n) mine = i;
        seen |= 1u << bit;
        ++n;
      }
      if (n == kGroup || (!more && n > 0)) {
        sum_group(n, mine);
        n = 0;
      }
      if (!more) break;
    }
    if (lane == 0) touched[warp][0] = seen;
    __syncthreads();

    for (int item = thread; item < kBatch * (kValues / 2); item += kThreads) {
      const int i = item / (kValues / 2), pair = item % (kValues / 2);
      float2 total = make_float2(0, 0);
      bool any = false;
      for (int patch = 0; patch < kPatches; ++patch) {
        if (!(touched[patch][i / 32] >> i % 32 & 1)) continue;
        any = true;
        total.x += sums[patch][i * kValues + 2 * pair];
        total.y += sums[patch][i * kValues + 2 * pair + 1];
      }
      if (!any) continue;
      const int64_t entry = entries[i];
      reinterpret_cast<float2*>(in.records)[entry * (kValues / 2) + pair] = total;
      if (pair == 0) in.given[entry] = 1;
    }
    __syncthreads();
  }

  if (in.keep && inside) {
    in.running[pixel] = transmittance;
    in.running[pixels + pixel] = behind;
  }
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

void blend_tiles_gradient(TensorView<const float, 2> splats, TensorView<const float, 3> colors,
                          TensorView<const int32_t, 1> slots, TensorView<const int64_t, 1> permutation,
                          TensorView<const int32_t, 1> starts, TensorView<const int64_t, 1> firsts, int64_t base,
                          TensorView<const float, 2> background, TensorView<const float, 4> grad_colors,
                          TensorView<const float, 3> grad_depths, TensorView<const float, 3> grad_transmittances,
                          TensorView<const float, 3> transmittances, TensorView<const int32_t, 3> last, bool resume,
                          TensorView<float, 4> running, int64_t first_channel, TensorView<float, 2> records,
                          TensorView<uint8_t, 1> given, int64_t stream) {
  const int64_t views = last.size(0), height = last.size(1), width = last.size(2), count = colors.size(1);
  const int64_t channels = colors.size(2), across = (width + kTile - 1) / kTile;
  const int64_t tiles = across * ((height + kTile - 1) / kTile), pixels = views * height * width;
  const int64_t values = kMoments + 1 + (channels <= 3 ? 3 : 7);
  require(splats.size(1) == kSplat && splats.size(0) == views * count && firsts.size(0) == views * count,
          "splats and firsts must be [V * G, 8] and [V * G]");
  require(slots.size(0) == permutation.size(0) && given.size(0) == slots.size(0) && records.size(0) == slots.size(0) &&
              records.size(1) == values && starts.size(0) == views * tiles + 1,
          "slots, permutation, given and records [entries, 10 or 14] must be equally long, starts [V * tiles + 1]");
  require(background.size(0) == views && background.size(1) == channels && grad_colors.numel() == pixels * channels &&
              (colors.size(0) == 1 || colors.size(0) == views),
          "colors, background and gradients of colors must be [1 or V, G, C], [V, C] and [V, H, W, C]");
  require(grad_depths.shape == last.shape && grad_transmittances.shape == last.shape &&
              transmittances.shape == last.shape && (running.numel() == 0 || running.numel() == 2 * pixels),
          "gradients, transmittances and last must be [V, H, W]");
  require(first_channel >= 0 && first_channel <= channels && (!resume || running.numel() > 0),
          "first_channel must be in 0..C, and what resumes needs what was kept");
  require(views <= 65535 && width <= 16384 && height <= 16384, "too many cameras at once, or too large a picture");
  const Gradient in{splats.data,
                    colors.data,
                    slots.data,
                    permutation.data,
                    starts.data,
                    firsts.data,
                    background.data,
                    grad_colors.data,
                    grad_depths.data,
                    grad_transmittances.data,
                    transmittances.data,
                    last.data,
                    count,
                    colors.size(0) == views ? count * channels : 0,
                    base,
                    static_cast<int>(channels),
                    static_cast<int>(first_channel),
                    static_cast<int>(width),
                    static_cast<int>(height),
                    static_cast<int>(across),
                    resume,
                    running.numel() > 0,
                    running.data,
                    records.data,
                    given.data};
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(views));
  launch({"blend_tiles_gradient", grid, kThreads, stream}, channels <= 3 ? blend_gradient<3> : blend_gradient<7>, in);
}

}  // namespace trellis::cuda
