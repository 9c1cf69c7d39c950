// Adds up the records of each Gaussian that a camera sees: eight lanes per slot, two numbers each, tile by tile in the
// order of the lists. A slot on more tiles than kMany is summed by the warp together, eight lanes for every fourth
// tile.
#include "gaussians.cuh"
#include "gaussians.h"

namespace trellis::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kLanes = 8, kSlots = 32 / kLanes, kMany = 64;

struct Sums {
  const float2* records;
  const uint8_t* given;
  const int64_t* firsts;
  const int32_t* counts;
  int64_t slot_count, base, entry_count;
  int pairs, channels, first_channel;
  float *moments, *colors;
};

__device__ float2 sum_entries(const Sums& in, int64_t begin, int64_t end, int step, int pair) {
  float2 total = make_float2(0, 0);
  for (int64_t entry = begin; entry < end; entry += step) {
    if (!in.given[entry] || pair >= in.pairs) continue;
    const float2 value = in.records[entry * in.pairs + pair];
    total.x += value.x;
    total.y += value.y;
  }
  return total;
}

__global__ void __launch_bounds__(kThreads) sum_slots(const Sums in) {
  const int lane = static_cast<int>(threadIdx.x) % 32, pair = lane % kLanes;
  const int64_t slot = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  int64_t begin = 0, end = 0;
  if (slot < in.slot_count) {
    begin = in.firsts[slot] - in.base;
    end = begin + in.counts[slot];
    if (begin < 0 || end > in.entry_count) begin = end = 0;  // not in this part of the lists
  }
  const bool many = end - begin > kMany;
  float2 total = many ? make_float2(0, 0) : sum_entries(in, begin, end, 1, pair);
  for (unsigned large = __ballot_sync(kAll, many); large;
       large &= ~(((1u << kLanes) - 1) << (__ffs(static_cast<int>(large)) - 1))) {
    const int owner = __ffs(static_cast<int>(large)) - 1;
    const int64_t from = __shfl_sync(kAll, begin, owner), to = __shfl_sync(kAll, end, owner);
    float2 share = sum_entries(in, from + lane / kLanes, to, kSlots, pair);
    for (int other = kLanes; other < 32; other *= 2) {
      share.x += __shfl_xor_sync(kAll, share.x, other);
      share.y += __shfl_xor_sync(kAll, share.y, other);
    }
    if (lane / kLanes == owner / kLanes) total = share;
  }
  if (begin == end || pair >= in.pairs) return;
  const float values[2] = {total.x, total.y};
  float* const moments = in.moments + slot * kSplat;
  const int colors = 2 * in.pairs - kMoments - 1, there = min(colors, in.channels - in.first_channel);
  for (int i = 0; i < 2; ++i) {
    const int at = 2 * pair + i, channel = at - kMoments;
    if (channel < 0 || channel == colors) {
      float* const target = moments + (channel < 0 ? at : kMoments);
      *target = in.first_channel == 0 ? values[i] : *target + values[i];
    } else if (channel < there) {
      in.colors[slot * in.channels + in.first_channel + channel] = values[i];
    }
  }
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

void sum_entries(TensorView<const float, 2> records, TensorView<const uint8_t, 1> given,
                 TensorView<const int64_t, 1> firsts, TensorView<const int32_t, 2> counts, int64_t base,
                 int64_t first_channel, TensorView<float, 2> moments, TensorView<float, 3> color_gradients,
                 int64_t stream) {
  const int64_t slots = counts.numel(), channels = color_gradients.size(2), width = records.size(1);
  require(records.size(0) == given.size(0) && width % 2 == 0 && width > kMoments && width <= 2 * kLanes,
          "records must be [entries, 10 or 14] and given [entries]");
  require(firsts.size(0) == slots && moments.size(0) == slots && moments.size(1) == kSplat &&
              color_gradients.numel() == slots * channels,
          "firsts, moments and gradients of colors must be [V * G], [V * G, 8] and [V, G, C]");
  require(first_channel >= 0 && first_channel <= channels, "first_channel must be in 0..C");
  const Sums in{reinterpret_cast<const float2*>(records.data),
                given.data,
                firsts.data,
                counts.data,
                slots,
                base,
                given.size(0),
                static_cast<int>(width / 2),
                static_cast<int>(channels),
                static_cast<int>(first_channel),
                moments.data,
                color_gradients.data};
  launch({"sum_entries", blocks(slots * kLanes, kThreads), kThreads, stream}, sum_slots, in);
}

}  // namespace trellis::cuda
