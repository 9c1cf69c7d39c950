// Gaussians to ellipses on the picture, one thread per Gaussian and camera, and from them the list of reached tiles.
#include "gaussians.h"
#include "gaussians_project.cuh"

namespace trellis::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaskBits = 64;
constexpr float kLog2E = 1.44269504f;

// Bounds that a whole number is clamped to before it becomes an int: what is not a number ends up outside.
__device__ float bounded(float value) { return fmaxf(fminf(value, 1048576.0f), -1048576.0f); }
__device__ int whole_tile(float tile, int tiles) { return min(max(static_cast<int>(bounded(tile)), 0), tiles); }

// The covariance on the picture: xx, yy, and the determinant.
struct Covariance {
  float a, c, det;
};

__device__ Splat project(const Projection& in, int64_t n, const float* e, const float* k, Covariance& covariance) {
  Seen seen;
  Splat s{};
  const bool visible = see(in, n, e, k, seen);
  s.depth = seen.z;
  if (!visible) return s;
  s.x =
      (((2 * k[0] * seen.x + (2 * k[2] - 1) * seen.z) / (seen.z + kClipGuard) + 1) * static_cast<float>(in.width) - 1) *
      0.5f;
  s.y = (((2 * k[4] * seen.y + (2 * k[5] - 1) * seen.z) / (seen.z + kClipGuard) + 1) * static_cast<float>(in.height) -
         1) *
        0.5f;

  // Mip filter: the Gaussian is widened by the pixel and keeps its integral.
  const float b = seen.b, det_sharp = fmaxf(seen.a * seen.c - b * b, kSmallestDet);
  const float a = seen.a + in.kernel_size, c = seen.c + in.kernel_size;
  const float det = a * c - b * b, det_wide = fmaxf(det, kSmallestDet);
  const bool faded = det_sharp <= kSmallestDet || det_wide <= kSmallestDet;
  const float opacity = faded ? 0 : in.opacities[n] * sqrtf(det_sharp / (det_wide + kSmallestDet) + kSmallestDet);
  const float inverse = 1 / det, xx = c * inverse, xy = -b * inverse, yy = a * inverse;
  const bool finite = fabsf(xx) < INFINITY && fabsf(xy) < INFINITY && fabsf(yy) < INFINITY && opacity < INFINITY;
  if (!(det > 0 && opacity >= kSmallestAlpha && finite)) return s;

  covariance = {a, c, det};
  s.opacity = opacity;
  s.xx = 0.5f * kLog2E * xx;
  s.xy = kLog2E * xy;
  s.yy = 0.5f * kLog2E * yy;
  // The margin covers the rounding of the inverse covariance and of q, which grows with the condition.
  s.limit = (log2f(255 * opacity) + 1e-3f) * (1.01f + 2e-6f * (a * c * inverse));
  return s;
}

__global__ void __launch_bounds__(kThreads)
    project_slots(const Projection in, float* __restrict__ splats, int32_t* __restrict__ places,
                  int32_t* __restrict__ counts, float* __restrict__ sort_depths) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x, view = blockIdx.y;
  if (n >= in.count) return;
  const int64_t slot = view * in.count + n;
  Covariance covariance{};
  const Splat s = project(in, n, in.extrinsics + 16 * view, in.intrinsics + 9 * view, covariance);

  int x0 = 0, y0 = 0, x1 = 0, y1 = 0;
  if (s.opacity > 0) {
    // The tiles that the square of 3 standard deviations touches, which the specification draws ...
    const int across = (in.width + kTile - 1) / kTile, down = (in.height + kTile - 1) / kTile;
    const auto [a, c, det] = covariance;
    const float middle = 0.5f * (a + c);
    const float radius = ceilf(3 * sqrtf(middle + sqrtf(fmaxf(middle * middle - det, 0.1f))));
    // ... and of these, the ones in the bounding box of the ellipse outside which alpha is too small.
    const float reach = 2 / kLog2E * s.limit;
    const float reach_x = sqrtf(reach * a) + 0.01f, reach_y = sqrtf(reach * c) + 0.01f;
    x0 = max(whole_tile((s.x - radius) / kTile, across), whole_tile((s.x - reach_x) / kTile, across));
    y0 = max(whole_tile((s.y - radius) / kTile, down), whole_tile((s.y - reach_y) / kTile, down));
    x1 = min(whole_tile((s.x + radius + (kTile - 1)) / kTile, across), whole_tile((s.x + reach_x) / kTile + 1, across));
    y1 = min(whole_tile((s.y + radius + (kTile - 1)) / kTile, down), whole_tile((s.y + reach_y) / kTile + 1, down));
  }
  const int wide = max(x1 - x0, 0), high = max(y1 - y0, 0);
  int reached = wide * high;
  uint64_t mask = 0;
  if (reached <= kMaskBits) {
    const Slopes slope = slopes(s);
    for (int y = 0; y < high; ++y)
      for (int x = 0; x < wide; ++x)
        if (reaches(s, slope, static_cast<float>((x0 + x) * kTile), static_cast<float>((y0 + y) * kTile), kTile, kTile))
          mask |= uint64_t{1} << (y * wide + x);
    reached = __popcll(mask);
  }

  float4* const splat = reinterpret_cast<float4*>(splats + kSplat * slot);
  splat[0] = make_float4(s.x, s.y, s.xx, s.xy);
  splat[1] = make_float4(s.yy, s.opacity, s.limit, s.depth);
  reinterpret_cast<int4*>(places)[slot] =
      make_int4(x0 | y0 << 16, wide | high << 16, static_cast<int>(static_cast<uint32_t>(mask)),
                static_cast<int>(static_cast<uint32_t>(mask >> 32)));
  counts[slot] = reached;
  sort_depths[slot] = reached ? s.depth : INFINITY;
}

struct Lists {
  const int32_t* places;
  const int64_t *order, *ends;
  int64_t count, begin, end;
  int across;
  int64_t tiles_per_view;
  int32_t *tiles, *slots;
};

// One thread per rank. More tiles than a mask has bits are written by the warp together.
__global__ void __launch_bounds__(kThreads) write_lists(const Lists in) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t rank = in.begin + int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t base = in.begin > 0 ? in.ends[in.begin - 1] : 0;
  int64_t target = 0, slot = 0, first = 0;
  int4 place{};
  int left = 0;  // entries to write
  if (rank < in.end) {
    const int64_t before = rank > 0 ? in.ends[rank - 1] : 0, view = rank / in.count;
    left = static_cast<int>(in.ends[rank] - before);
    if (left > 0) {
      target = before - base;
      slot = view * in.count + in.order[rank];
      place = reinterpret_cast<const int4*>(in.places)[slot];
      first = view * in.tiles_per_view + int64_t{place.x >> 16} * in.across + (place.x & 0xffff);
    }
  }
  const int wide = place.y & 0xffff;
  uint64_t mask = static_cast<uint32_t>(place.z) | uint64_t{static_cast<uint32_t>(place.w)} << 32;
  unsigned large = __ballot_sync(0xffffffffu, left > 0 && mask == 0);
  for (; mask; mask &= mask - 1) {
    const int bit = __ffsll(static_cast<long long>(mask)) - 1;
    in.tiles[target] = static_cast<int32_t>(first + int64_t{bit / wide} * in.across + bit % wide);
    in.slots[target++] = static_cast<int32_t>(slot);
  }
  for (; large; large &= large - 1) {
    const int owner = __ffs(static_cast<int>(large)) - 1;
    const int64_t to = __shfl_sync(0xffffffffu, target, owner), from = __shfl_sync(0xffffffffu, first, owner);
    const int its_slot = __shfl_sync(0xffffffffu, static_cast<int>(slot), owner);
    const int its_wide = __shfl_sync(0xffffffffu, wide, owner), total = __shfl_sync(0xffffffffu, left, owner);
    for (int i = lane; i < total; i += 32) {
      in.tiles[to + i] = static_cast<int32_t>(from + int64_t{i / its_wide} * in.across + i % its_wide);
      in.slots[to + i] = its_slot;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    write_firsts(const int64_t* order, const int64_t* ends, int64_t ranks, int64_t count, int64_t* firsts) {
  const int64_t rank = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (rank < ranks) firsts[rank / count * count + order[rank]] = rank > 0 ? ends[rank - 1] : 0;
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

void project_gaussians(TensorView<const float, 2> means, TensorView<const float, 2> quats,
                       TensorView<const float, 2> scales, TensorView<const float, 1> opacities,
                       TensorView<const float, 3> extrinsics, TensorView<const float, 3> intrinsics, int64_t width,
                       int64_t height, double kernel_size, TensorView<float, 2> splats, TensorView<int32_t, 2> places,
                       TensorView<int32_t, 2> counts, TensorView<float, 2> sort_depths, int64_t stream) {
  const int64_t count = means.size(0), views = extrinsics.size(0);
  require(means.size(1) == 3 && quats.size(1) == 4 && scales.size(1) == 3, "means, quats, scales must be [G, 3|4|3]");
  require(quats.size(0) == count && scales.size(0) == count && opacities.size(0) == count,
          "quats, scales and opacities must have as many rows as means");
  require(extrinsics.numel() == views * 16 && intrinsics.numel() == views * 9 && intrinsics.size(0) == views,
          "extrinsics and intrinsics must be [V, 4, 4] and [V, 3, 3]");
  require(splats.numel() == views * count * kSplat && splats.size(1) == kSplat && places.size(1) == 4 &&
              places.size(0) == splats.size(0) && counts.size(0) == views && counts.size(1) == count &&
              sort_depths.shape == counts.shape,
          "splats, places, counts and sort_depths must be [V * G, 8], [V * G, 4] and twice [V, G]");
  require(views * count <= INT32_MAX && views <= 65535, "too many Gaussians or cameras at once");
  require(width >= 1 && height >= 1 && width <= 16384 && height <= 16384, "width and height must be in 1..16384");
  const Projection in{means.data,
                      quats.data,
                      scales.data,
                      opacities.data,
                      extrinsics.data,
                      intrinsics.data,
                      count,
                      static_cast<int>(width),
                      static_cast<int>(height),
                      float(kernel_size)};
  launch({"project_gaussians", dim3(blocks(count, kThreads), static_cast<unsigned>(views)), kThreads, stream},
         project_slots, in, splats.data, places.data, counts.data, sort_depths.data);
}

void list_tiles(TensorView<const int32_t, 2> places, TensorView<const int64_t, 2> order,
                TensorView<const int64_t, 1> ends, int64_t begin, int64_t end, int64_t across, int64_t tiles_per_view,
                TensorView<int32_t, 1> tiles, TensorView<int32_t, 1> slots, int64_t stream) {
  require(places.size(1) == 4 && places.size(0) == order.numel() && ends.size(0) == order.numel(),
          "places, order and ends must be [V * G, 4], [V, G] and [V * G]");
  require(begin >= 0 && begin <= end && end <= ends.size(0), "begin and end must be in order and within ends");
  require(slots.size(0) == tiles.size(0), "tiles and slots must be equally long");
  require(across >= 1 && order.size(0) * tiles_per_view <= INT32_MAX, "too many tiles at once");
  const Lists in{places.data,    order.data, ends.data, order.size(1), begin, end, static_cast<int>(across),
                 tiles_per_view, tiles.data, slots.data};
  launch({"list_tiles", blocks(end - begin, kThreads), kThreads, stream}, write_lists, in);
}

void first_entries(TensorView<const int64_t, 2> order, TensorView<const int64_t, 1> ends, TensorView<int64_t, 1> firsts,
                   int64_t stream) {
  const int64_t ranks = order.numel();
  require(ends.size(0) == ranks && firsts.size(0) == ranks, "order, ends and firsts must be [V, G] and twice [V * G]");
  launch({"first_entries", blocks(ranks, kThreads), kThreads, stream}, write_firsts, order.data, ends.data, ranks,
         order.size(1), firsts.data);
}

}  // namespace trellis::cuda
