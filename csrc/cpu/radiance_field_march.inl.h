// Marching and its gradient; included once per instruction set with TRELLIS_ISA as the namespace. Sums over the factors
// run across lanes, everything after them across samples.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "radiance_field_march.h"

namespace trellis::cpu {
namespace TRELLIS_ISA {

#include "gaussians_lanes.inl.h"

// log(1 + e) of 0 <= e <= e^10: the exponent of u = 1 + e, and log m = 2 atanh((m - 1) / (m + 1)) of the mantissa,
// which lies around 1; the last term is what 1 + e has lost of a small e.
INLINE F log1p(F e) {
  const F u = e + 1.0f;
  const FloatBits bits = reinterpret_cast<FloatBits>(u);
  const FloatBits whole = (bits - 0x3F3504F3) >> 23;
  const F m = reinterpret_cast<F>(bits - (whole << 23));
  const F s = (m - 1.0f) / (m + 1.0f), q = s * s;
  const F series = (((q * (1.0f / 9) + 1.0f / 7) * q + 1.0f / 5) * q + 1.0f / 3) * q + 1.0f;
  return __builtin_convertvector(whole, F) * 0.69314718f + 2 * s * series + (e - (u - 1.0f)) / u;
}
INLINE D log1p(D e) {
  const D u = e + 1.0;
  const DoubleBits bits = reinterpret_cast<DoubleBits>(u);
  const DoubleBits whole = (bits - 0x3FE6A09E667F3BCD) >> 52;
  const D m = reinterpret_cast<D>(bits - (whole << 52));
  const D s = (m - 1.0) / (m + 1.0), q = s * s;
  D series = q * (1.0 / 23) + 1.0 / 21;
  for (int n = 19; n >= 1; n -= 2) series = series * q + 1.0 / n;
  return __builtin_convertvector(whole, D) * 0.69314718055994530942 + 2 * s * series + (e - (u - 1.0)) / u;
}

// Sums of the lanes of four vectors.
#if defined(__SSE2__)
INLINE void add_lanes(__m128 a, __m128 b, __m128 c, __m128 d, float* sums) {
  const __m128 ab = _mm_add_ps(_mm_shuffle_ps(a, b, 0x88), _mm_shuffle_ps(a, b, 0xDD));
  const __m128 cd = _mm_add_ps(_mm_shuffle_ps(c, d, 0x88), _mm_shuffle_ps(c, d, 0xDD));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xDD)));
}
#if defined(__AVX2__)
INLINE void add_lanes(__m256 a, __m256 b, __m256 c, __m256 d, float* sums) {
  const __m256 ab = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));
  const __m256 cd = _mm256_add_ps(_mm256_shuffle_ps(c, d, 0x88), _mm256_shuffle_ps(c, d, 0xDD));
  const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x88), _mm256_shuffle_ps(ab, cd, 0xDD));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
#endif
#if defined(__AVX512F__)
INLINE __m256 halves(__m512 a) {
  __m256 parts[2];
  __builtin_memcpy(parts, &a, sizeof(a));
  return parts[0] + parts[1];
}
INLINE void add_lanes(__m512 a, __m512 b, __m512 c, __m512 d, float* sums) {
  add_lanes(halves(a), halves(b), halves(c), halves(d), sums);
}
#endif
#endif
template <class V, class T>
INLINE void add_lanes(V a, V b, V c, V d, T* sums) {
  const V vectors[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    T sum = vectors[i][0];
    for (unsigned lane = 1; lane < sizeof(V) / sizeof(T); ++lane) sum += vectors[i][lane];
    sums[i] = sum;
  }
}

template <class T>
struct Whole;
template <>
struct Whole<float> {
  typedef int32_t Scalar;
  typedef FloatBits Vector;
};
template <>
struct Whole<double> {
  typedef int64_t Scalar;
  typedef DoubleBits Vector;
};

// Up to kFieldChunk samples of one leaf.
template <class T>
struct Samples {
  int64_t count;
  T depths[kFieldChunk];                            // of the camera
  T weights[3][kFieldChunk];                        // of the second of the two entries that are interpolated
  typename Whole<T>::Scalar lower[3][kFieldChunk];  // the first
  T sums[kFieldChunk][4];                           // density and colors, before softplus and sigmoid
  T alphas[kFieldChunk], slopes[kFieldChunk], colors[3][kFieldChunk];  // slopes: of softplus
};

template <class T>
INLINE T largest_exponent() {
  return sizeof(T) == 4 ? T(80) : T(600);
}

// Where samples first, first + 1, ... lie in a leaf.
template <class T>
INLINE void place(const PackedField<T>& field, const FieldCamera& camera, const FieldRay& ray, const int32_t* cell,
                  double first, double jitter, int64_t count, Samples<T>& samples) {
  typedef typename Lanes<T>::V V;
  constexpr int kWidth = Lanes<T>::kWidth;
  samples.count = count;
  const double distance = (first + jitter) * field.step;
  const V zero = splat(T(0)), last = splat(T(field.entries - 2));
  const V depth = splat(T(distance * ray.cosine)), depth_step = splat(T(field.step * ray.cosine));
  V start[3], step[3];
  for (int axis = 0; axis < 3; ++axis) {
    const double local = camera.origin[axis] + distance * ray.direction[axis] - cell[axis];
    start[axis] = splat(T(local * double(field.entries) - 0.5));
    step[axis] = splat(T(field.step * ray.direction[axis] * double(field.entries)));
  }
  for (int64_t i = 0; i < count; i += kWidth) {
    const V number = lane_numbers(T(0)) + splat(T(i));
    store(samples.depths + i, depth + depth_step * number);
    for (int axis = 0; axis < 3; ++axis) {
      const V scaled = start[axis] + step[axis] * number;
      const auto whole = __builtin_convertvector(max(min(scaled, last), zero), typename Whole<T>::Vector);
      __builtin_memcpy(samples.lower[axis] + i, &whole, sizeof(whole));
      store(samples.weights[axis] + i, scaled - __builtin_convertvector(whole, V));
    }
  }
}

template <class T>
INLINE void add_factors(const PackedField<T>& field, const T* leaf, Samples<T>& samples) {
  typedef typename Lanes<T>::V V;
  constexpr int kWidth = Lanes<T>::kWidth;
  const int64_t rank = field.rank, axis_stride = field.entries * rank;
  const T* const last = leaf + 3 * axis_stride;
  for (int64_t i = 0; i < samples.count; ++i) {
    const T* const a = leaf + samples.lower[0][i] * rank;
    const T* const b = leaf + axis_stride + samples.lower[1][i] * rank;
    const T* const c = leaf + 2 * axis_stride + samples.lower[2][i] * rank;
    const V wa = splat(samples.weights[0][i]), wb = splat(samples.weights[1][i]), wc = splat(samples.weights[2][i]);
    V density = splat(T(0)), red = density, green = density, blue = density;
    for (int64_t r = 0; r < rank; r += kWidth) {
      const V a0 = load(a + r), b0 = load(b + r), c0 = load(c + r);
      const V product = (a0 + wa * (load(a + rank + r) - a0)) * (b0 + wb * (load(b + rank + r) - b0)) *
                        (c0 + wc * (load(c + rank + r) - c0));
      density += product * load(last + r);
      red += product * load(last + rank + r);
      green += product * load(last + 2 * rank + r);
      blue += product * load(last + 3 * rank + r);
    }
    add_lanes(density, red, green, blue, samples.sums[i]);
  }
}

template <class T>
INLINE void shade(T step, Samples<T>& samples) {
  typedef typename Lanes<T>::V V;
  constexpr int kWidth = Lanes<T>::kWidth;
  const V one = splat(T(1)), limit = splat(largest_exponent<T>()), ten = splat(T(10));
  T columns[4][kFieldChunk];
  for (int64_t i = samples.count; i % kWidth; ++i) {
    for (int k = 0; k < 4; ++k) samples.sums[i][k] = 0;
  }
  for (int64_t i = 0; i < samples.count; i += kWidth) {
    for (int lane = 0; lane < kWidth; ++lane) {
      for (int k = 0; k < 4; ++k) columns[k][i + lane] = samples.sums[i + lane][k];
    }
  }
  for (int64_t i = 0; i < samples.count; i += kWidth) {
    const V x = load(columns[0] + i);
    const V e = exp(max(min(x, ten), -limit));
    const auto soft = less(x, ten);
    const V sigma = select(soft, log1p(e), x);
    store(samples.alphas + i, min(one - exp(-min(sigma * step, limit)), splat(T(0.999))));
    store(samples.slopes + i, select(soft, e / (one + e), one));
    for (int k = 0; k < 3; ++k)
      store(samples.colors[k] + i, one / (one + exp(min(max(-load(columns[k + 1] + i), -limit), limit))));
  }
}

template <class T>
INLINE double jitter_of(const FieldImages<T>& images, int64_t pixel) {
  if (!images.jitter) return 0;
  const double value = double(images.jitter[pixel]);
  return value > 0 ? (value < 1 ? value : 1) : 0;  // 0 for NaN
}

// What one pixel gathers on its way.
template <class T>
struct Ray {
  T passed = 1, colors[3] = {}, depth = 0, median = 0;
  int32_t crossings = 0;
};

// Goes through the samples until the ray ends; returns how many were taken.
template <class T>
INLINE int64_t blend(const Samples<T>& samples, Ray<T>& ray) {
  int64_t i = 0;
  while (i < samples.count && ray.passed >= T(0.001)) {
    const T share = ray.passed * samples.alphas[i];
    for (int k = 0; k < 3; ++k) ray.colors[k] += share * samples.colors[k][i];
    ray.depth += share * samples.depths[i];
    const T before = ray.passed;
    ray.passed *= 1 - samples.alphas[i];
    if (before >= T(0.5) && ray.passed < T(0.5)) ray.median = samples.depths[i];
    ++i;
  }
  return i;
}

template <class T>
static int64_t march_tile(const MarchJob<T>& job) {
  const PackedField<T>& field = *job.field;
  const FieldCamera& camera = *job.camera;
  const FieldImages<T>& images = *job.images;
  const bool backward = images.colors_gradient != nullptr;
  const int64_t right = job.left + kFieldTile < camera.width ? job.left + kFieldTile : camera.width;
  const int64_t bottom = job.top + kFieldTile < camera.height ? job.top + kFieldTile : camera.height;
  int64_t noted = 0;
  Samples<T> samples;
  for (int64_t y = job.top; y < bottom; ++y) {
    for (int64_t x = job.left; x < right; ++x) {
      const int64_t pixel = y * camera.width + x;
      const FieldRay line = ray_of(camera, x, y);
      const double jitter = jitter_of(images, pixel);
      T by_color[3] = {}, by_depth = 0;
      if (backward) {
        for (int k = 0; k < 3; ++k) by_color[k] = images.colors_gradient[3 * pixel + k];
        by_depth = images.depths_gradient[pixel];
      }
      Ray<T> ray;
      const int64_t begin = noted;
      for_each_leaf(*job.grid, camera, line, [&](int32_t leaf, const int32_t* cell, double near, double far) {
        const double first = __builtin_ceil(near / field.step - jitter);
        const double last = __builtin_ceil(far / field.step - jitter);
        if (!(last > first)) return true;
        for (double k = first; k < last && ray.passed >= T(0.001); k += kFieldChunk) {
          ++ray.crossings;
          const int64_t count = last - k < kFieldChunk ? int64_t(last - k) : int64_t{kFieldChunk};
          place(field, camera, line, cell, k, jitter, count, samples);
          add_factors(field, job.field->data + leaf * field.stride, samples);
          shade(T(field.step), samples);
          Ray<T> part;
          part.passed = ray.passed;
          const int64_t taken = blend(samples, part);
          for (int a = 0; a < 3; ++a) ray.colors[a] += part.colors[a];
          ray.depth += part.depth;
          if (part.median > 0) ray.median = part.median;
          const T before = ray.passed;
          ray.passed = part.passed;
          if (!backward) continue;
          if (noted < job.capacity) {
            T worth = by_depth * part.depth;
            for (int a = 0; a < 3; ++a) worth += by_color[a] * part.colors[a];
            job.segments[noted] = {leaf, int32_t(pixel), int32_t(taken), {}, k, before, worth};
            for (int a = 0; a < 3; ++a) job.segments[noted].cell[a] = int16_t(cell[a]);
          }
          ++noted;
        }
        return ray.passed >= T(0.001);
      });
      if (!backward) {
        for (int k = 0; k < 3; ++k) images.colors[3 * pixel + k] = ray.colors[k] + ray.passed * images.background[k];
        images.depths[pixel] = ray.depth;
        images.left[pixel] = ray.passed;
        images.medians[pixel] = ray.median;
        images.crossings[pixel] = ray.crossings;
        continue;
      }
      T later = images.left_gradient[pixel];
      for (int k = 0; k < 3; ++k) {
        later += by_color[k] * images.background[k];
        job.background_gradient[k] += ray.passed * by_color[k];
      }
      later *= ray.passed;
      for (int64_t i = noted < job.capacity ? noted : begin; i-- > begin;) {
        const T worth = job.segments[i].later;
        job.segments[i].later = later;
        later += worth;
      }
    }
  }
  return noted;
}

// The gradient of one sample's factors.
template <class T>
INLINE void add_gradient(const PackedField<T>& field, const T* leaf, const Samples<T>& samples, int64_t i, T by_sum,
                         const T* by_tone, T* gradient) {
  typedef typename Lanes<T>::V V;
  constexpr int kWidth = Lanes<T>::kWidth;
  const int64_t rank = field.rank, axis_stride = field.entries * rank, last = 3 * axis_stride;
  const int64_t a = samples.lower[0][i] * rank, b = axis_stride + samples.lower[1][i] * rank;
  const int64_t c = 2 * axis_stride + samples.lower[2][i] * rank;
  const V wa = splat(samples.weights[0][i]), wb = splat(samples.weights[1][i]), wc = splat(samples.weights[2][i]);
  const V by_density = splat(by_sum), by_red = splat(by_tone[0]), by_green = splat(by_tone[1]),
          by_blue = splat(by_tone[2]);
  for (int64_t r = 0; r < rank; r += kWidth) {
    const V a0 = load(leaf + a + r), b0 = load(leaf + b + r), c0 = load(leaf + c + r);
    const V va = a0 + wa * (load(leaf + a + rank + r) - a0);
    const V vb = b0 + wb * (load(leaf + b + rank + r) - b0);
    const V vc = c0 + wc * (load(leaf + c + rank + r) - c0);
    const V bc = vb * vc, product = va * bc;
    T* const g = gradient + r;
    const T* const f = leaf + last + r;
    const V by_product =
        by_density * load(f) + by_red * load(f + rank) + by_green * load(f + 2 * rank) + by_blue * load(f + 3 * rank);
    store(g + last, load(g + last) + by_density * product);
    store(g + last + rank, load(g + last + rank) + by_red * product);
    store(g + last + 2 * rank, load(g + last + 2 * rank) + by_green * product);
    store(g + last + 3 * rank, load(g + last + 3 * rank) + by_blue * product);
    const V by_a = by_product * bc, by_b = by_product * va * vc, by_c = by_product * va * vb;
    const V upper_a = by_a * wa, upper_b = by_b * wb, upper_c = by_c * wc;
    store(g + a, load(g + a) + (by_a - upper_a));
    store(g + a + rank, load(g + a + rank) + upper_a);
    store(g + b, load(g + b) + (by_b - upper_b));
    store(g + b + rank, load(g + b + rank) + upper_b);
    store(g + c, load(g + c) + (by_c - upper_c));
    store(g + c + rank, load(g + c + rank) + upper_c);
  }
}

template <class T>
static void differentiate_leaf(const LeafGradientJob<T>& job) {
  const PackedField<T>& field = *job.field;
  const FieldImages<T>& images = *job.images;
  const T step = T(field.step);
  Samples<T> samples;
  for (int64_t n = 0; n < job.count; ++n) {
    const FieldSegment<T>& segment = job.segments[job.list[n]];
    const int64_t pixel = segment.pixel;
    const FieldRay line = ray_of(*job.camera, pixel % job.camera->width, pixel / job.camera->width);
    const T* const leaf = field.data + segment.leaf * field.stride;
    const double jitter = jitter_of(images, pixel);
    const int32_t cell[3] = {segment.cell[0], segment.cell[1], segment.cell[2]};
    place(field, *job.camera, line, cell, segment.first, jitter, segment.count, samples);
    add_factors(field, leaf, samples);
    shade(step, samples);
    const T* const by_color = images.colors_gradient + 3 * pixel;
    const T by_depth = images.depths_gradient[pixel];
    T shares[kFieldChunk], after[kFieldChunk], passed = segment.before, later = segment.later;
    for (int64_t i = 0; i < segment.count; ++i) {
      shares[i] = passed * samples.alphas[i];
      passed *= 1 - samples.alphas[i];
      after[i] = passed;
    }
    for (int64_t i = segment.count; i-- > 0;) {
      T worth = by_depth * samples.depths[i], by_tone[3];
      for (int k = 0; k < 3; ++k) {
        const T color = samples.colors[k][i];
        worth += by_color[k] * color;
        by_tone[k] = shares[i] * by_color[k] * color * (1 - color);
      }
      T by_sum = step * (after[i] * worth - later) * samples.slopes[i];
      if (samples.alphas[i] >= T(0.999)) by_sum = 0;
      later += shares[i] * worth;
      add_gradient(field, leaf, samples, i, by_sum, by_tone, job.gradient);
    }
  }
}

int64_t rank_multiple(float) { return Lanes<float>::kWidth; }
int64_t rank_multiple(double) { return Lanes<double>::kWidth; }
int64_t march(const MarchJob<float>& job) { return march_tile(job); }
int64_t march(const MarchJob<double>& job) { return march_tile(job); }
void leaf_gradient(const LeafGradientJob<float>& job) { differentiate_leaf(job); }
void leaf_gradient(const LeafGradientJob<double>& job) { differentiate_leaf(job); }

}  // namespace TRELLIS_ISA
}  // namespace trellis::cpu
