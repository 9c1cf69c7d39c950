// The gradient of the factors: one warp per leaf goes through what rays have noted for it, in their order. First a lane
// is a sample: densities, colors, and by scans along the run what each sample adds to the loss. Then a lane is a factor
// (of 16 or fewer: two lanes, for every other sample), and each adds to sums that no other lane touches.
#include "radiance_field.cuh"

namespace trellis::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kWindow = 8;  // entries per axis whose sums are kept at once; of more, all runs are gone through again
constexpr unsigned kAll = 0xffffffffu;

struct Lists {
  const int64_t* order;
  const int32_t* starts;
  const int4* runs;
  const double* firsts;
  const float *laters, *colors_gradient, *depths_gradient;
};

struct Gradients {
  float *trivec, *density, *features;
  int rank;  // not padded
  bool resume;
};

// One sample's share in the gradient.
struct SampleGradient {
  Place place;
  float by_sum, by_tone[3];
};

__device__ SampleGradient sample_gradient(const FieldScene& scene, const Lists& lists, const float* factors,
                                          int64_t number, int lane, int* count) {
  const int4 noted = lists.runs[number];
  const int64_t pixel = noted.x, per_view = scene.height * scene.width;
  *count = noted.y;
  const int32_t cell[3] = {noted.z & 1023, noted.z >> 10 & 1023, noted.z >> 20 & 1023};
  const FieldCamera camera = camera_of_view(scene, pixel / per_view);
  const FieldRay ray = ray_of(camera, pixel % scene.width, pixel / scene.width % scene.height);
  const Run run = run_of(scene, camera, ray, cell, lists.firsts[number], jitter_of(scene, pixel));
  SampleGradient gradient;
  gradient.place = place_of(scene, run, lane < noted.y ? lane : 0);
  Shade shade{};
  if (lane < noted.y) shade = shade_of(scene, factors, gradient.place);
  float product = 1 - shade.alpha;  // of this and all samples before
  for (int distance = 1; distance < 32; distance *= 2) {
    const float other = __shfl_up_sync(kAll, product, distance);
    if (lane >= distance) product *= other;
  }
  const float others = __shfl_up_sync(kAll, product, 1);
  const float before = __int_as_float(noted.w), passed = lane ? before * others : before;
  const float share = passed * shade.alpha;
  float worth = lists.depths_gradient[pixel] * (run.depth + run.depth_step * static_cast<float>(lane));
  FIELD_UNROLL
  for (int k = 0; k < 3; ++k) {
    const float by_color = lists.colors_gradient[3 * pixel + k];
    worth += by_color * shade.color[k];
    gradient.by_tone[k] = share * by_color * shade.color[k] * (1 - shade.color[k]);
  }
  float earned = share * worth;  // by this and all later samples of the run
  for (int distance = 1; distance < 32; distance *= 2) {
    const float other = __shfl_down_sync(kAll, earned, distance);
    if (lane + distance < 32) earned += other;
  }
  const float later = __shfl_down_sync(kAll, earned, 1);
  const float behind = lists.laters[number] + (lane < 31 ? later : 0.0f);
  const float by_sigma = static_cast<float>(scene.step) * (before * product * worth - behind);
  gradient.by_sum = lane < noted.y && shade.alpha < 0.999f ? by_sigma * shade.slope : 0.0f;
  return gradient;
}

template <int kSlots>
__global__ void __launch_bounds__(32 * kWarps, 4)
    sum_kernel(FieldScene scene, Lists lists, Gradients out, int64_t count) {
  SHARED_ARRAY(float, sums, kWarps, 3 * kWindow, 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slot = lane % kSlots, group = lane / kSlots;
  constexpr int kGroups = 32 / kSlots;
  const int64_t leaf = int64_t{blockIdx.x} * kWarps + warp;
  if (leaf >= count) return;
  const float* const factors = scene.packed + leaf * scene.stride;
  const int axis_stride = scene.entries * scene.rank;
  const int32_t begin = lists.starts[leaf], end = lists.starts[leaf + 1];
  for (int first_rank = 0; first_rank < out.rank; first_rank += kSlots) {
    const int r = first_rank + slot;
    const bool mine = r < out.rank;
    const float* const column = factors + (mine ? r : 0);
    const float* const last = column + 3 * axis_stride;
    const float density = last[0], red = last[scene.rank], green = last[2 * scene.rank], blue = last[3 * scene.rank];
    for (int window = 0; window < scene.entries; window += kWindow) {
      for (int row = 0; row < 3 * kWindow; ++row) sums[warp][row][lane] = 0;
      float by_density = 0, by_red = 0, by_green = 0, by_blue = 0;
      for (int32_t n = begin; n < end; ++n) {
        int samples;
        const SampleGradient own = sample_gradient(scene, lists, factors, lists.order[n], lane, &samples);
        const int own_lower = own.place.lower[0] | own.place.lower[1] << 10 | own.place.lower[2] << 20;
        for (int i = 0; i < samples; i += kGroups) {
          const int source = i + group;  // below 32; its gradient is 0 beyond the last sample
          const float by_sum = __shfl_sync(kAll, own.by_sum, source);
          const float tone_red = __shfl_sync(kAll, own.by_tone[0], source);
          const float tone_green = __shfl_sync(kAll, own.by_tone[1], source);
          const float tone_blue = __shfl_sync(kAll, own.by_tone[2], source);
          const int packed_lower = __shfl_sync(kAll, own_lower, source);
          float value[3], weight[3];
          int lower[3];
          FIELD_UNROLL
          for (int axis = 0; axis < 3; ++axis) {
            weight[axis] = __shfl_sync(kAll, own.place.weight[axis], source);
            lower[axis] = packed_lower >> (10 * axis) & 1023;
            const float* const row = column + axis * axis_stride + lower[axis] * scene.rank;
            value[axis] = row[0] + weight[axis] * (row[scene.rank] - row[0]);
          }
          const float product = value[0] * value[1] * value[2];
          by_density += by_sum * product;
          by_red += tone_red * product;
          by_green += tone_green * product;
          by_blue += tone_blue * product;
          const float by_product = by_sum * density + tone_red * red + tone_green * green + tone_blue * blue;
          FIELD_UNROLL
          for (int axis = 0; axis < 3; ++axis) {
            const float by_value = by_product * value[(axis + 1) % 3] * value[(axis + 2) % 3];
            const float upper = by_value * weight[axis];
            const int entry = lower[axis] - window;
            if (entry >= 0 && entry < kWindow) sums[warp][axis * kWindow + entry][lane] += by_value - upper;
            if (entry >= -1 && entry < kWindow - 1) sums[warp][axis * kWindow + entry + 1][lane] += upper;
          }
        }
      }
      const int64_t row = leaf * out.rank + (mine ? r : 0);
      const auto put = [&](float* target, float sum) {
        if (kGroups == 2) sum += __shfl_down_sync(kAll, sum, 16);
        if (mine && group == 0) *target = out.resume ? *target + sum : sum;
      };
      for (int i = 0; i < 3 * kWindow; ++i) {
        const int entry = window + i % kWindow;
        if (entry < scene.entries)
          put(out.trivec + (row * 3 + i / kWindow) * scene.entries + entry, sums[warp][i][lane]);
      }
      if (window == 0) {
        constexpr float kDegreeZero = 0.28209479f;
        put(out.density + row, by_density);
        put(out.features + 3 * row, by_red * kDegreeZero);
        put(out.features + 3 * row + 1, by_green * kDegreeZero);
        put(out.features + 3 * row + 2, by_blue * kDegreeZero);
      }
    }
  }
}

}  // namespace

void sum_field_gradient(FieldVector packed, TensorView<const double, 3> extrinsics,
                        TensorView<const double, 3> intrinsics, std::array<double, 6> box, int64_t depth,
                        FieldImage jitter, FieldColors colors_gradient, FieldImage depths_gradient,
                        TensorView<const int64_t, 1> order, TensorView<const int32_t, 1> starts, FieldPositions runs,
                        TensorView<const double, 1> firsts, TensorView<const float, 1> laters, bool resume,
                        TensorView<float, 4> trivec_gradient, TensorView<float, 2> density_gradient,
                        TensorView<float, 3> features_gradient, int64_t stream) {
  const int64_t count = trivec_gradient.size(0), rank = trivec_gradient.size(1), entries = trivec_gradient.size(3);
  const FieldScene scene = field_scene(packed, extrinsics, intrinsics, box, depth, entries, jitter,
                                       depths_gradient.size(1), depths_gradient.size(2));
  if (packed.size(0) != count || starts.size(0) != count + 1 || scene.rank != (rank + 3) / 4 * 4)
    throw std::invalid_argument("packed and starts must fit trivec_gradient");
  const Lists lists{order.data,          starts.data, reinterpret_cast<const int4*>(runs.data),
                    firsts.data,         laters.data, colors_gradient.data,
                    depths_gradient.data};
  const Gradients out{trivec_gradient.data, density_gradient.data, features_gradient.data, static_cast<int>(rank),
                      resume};
  const Launch how{"sum_field_gradient", blocks(count, kWarps), 32 * kWarps, stream};
  if (rank <= 16)
    launch(how, sum_kernel<16>, scene, lists, out, count);
  else
    launch(how, sum_kernel<32>, scene, lists, out, count);
}

}  // namespace trellis::cuda
