// One strip of rows, compiled once per instruction set: TRELLIS_ISA names the namespace. Filters are separable: first
// along the rows into the scratch, then down the columns. Every inner loop runs along a row and is vectorised by the
// compiler.
#include "ssim_strip.h"

namespace trellis::cpu::TRELLIS_ISA {
namespace {

template <class T>
inline void filter_row(const T* __restrict__ padded, const T* weights, int64_t width, T* __restrict__ out) {
  const T w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3], w4 = weights[4], w5 = weights[5];
  for (int64_t i = 0; i < width; ++i) {  // the window is symmetric
    const T* const p = padded + i;
    out[i] = w0 * (p[0] + p[10]) + w1 * (p[1] + p[9]) + w2 * (p[2] + p[8]) + w3 * (p[3] + p[7]) + w4 * (p[4] + p[6]) +
             w5 * p[5];
  }
}

// rows: kSsimTaps rows of `width`, `stride` apart.
template <class T>
inline void filter_columns(const T* __restrict__ rows, int64_t stride, const T* weights, int64_t width,
                           T* __restrict__ out) {
  const T w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3], w4 = weights[4], w5 = weights[5];
  for (int64_t i = 0; i < width; ++i) {
    const T* const p = rows + i;
    out[i] = w0 * (p[0] + p[10 * stride]) + w1 * (p[stride] + p[9 * stride]) + w2 * (p[2 * stride] + p[8 * stride]) +
             w3 * (p[3 * stride] + p[7 * stride]) + w4 * (p[4 * stride] + p[6 * stride]) + w5 * p[5 * stride];
  }
}

template <class T>
inline void clear(T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = T(0);
}

// The moments x, y, xx, yy, xy of rows [first, last), filtered along the rows; zeros for rows outside the picture.
template <class T>
static void moment_rows(const SsimStrip<T>& s, int64_t first, int64_t last, T* moments, int64_t plane, T* padded) {
  const int64_t length = s.width + 2 * kSsimRadius;
  clear(padded, 5 * length);
  for (int64_t row = first; row < last; ++row) {
    T* const out = moments + (row - first) * s.width;
    if (row < 0 || row >= s.height) {
      for (int k = 0; k < 5; ++k) clear(out + k * plane, s.width);
      continue;
    }
    const T* __restrict__ const x = s.x + row * s.width;
    const T* __restrict__ const y = s.y + row * s.width;
    T* __restrict__ const px = padded + kSsimRadius;
    T* __restrict__ const py = px + length;
    T* __restrict__ const pxx = py + length;
    T* __restrict__ const pyy = pxx + length;
    T* __restrict__ const pxy = pyy + length;
    for (int64_t i = 0; i < s.width; ++i) {
      px[i] = x[i];
      py[i] = y[i];
      pxx[i] = x[i] * x[i];
      pyy[i] = y[i] * y[i];
      pxy[i] = x[i] * y[i];
    }
    for (int k = 0; k < 5; ++k) filter_row(padded + k * length, s.weights, s.width, out + k * plane);
  }
}

constexpr double kC1 = 0.01 * 0.01, kC2 = 0.03 * 0.03;

template <class T>
static void forward(const SsimStrip<T>& s) {
  const int64_t plane = (kSsimStripRows + 4 * kSsimRadius) * s.width;
  T* const moments = s.scratch;
  T* const lines = moments + 8 * plane;  // five filtered rows; before that, padded ones
  moment_rows(s, s.begin - kSsimRadius, s.end + kSsimRadius, moments, plane, lines);
  for (int64_t row = s.begin; row < s.end; ++row) {
    for (int k = 0; k < 5; ++k)
      filter_columns(moments + k * plane + (row - s.begin) * s.width, s.width, s.weights, s.width, lines + k * s.width);
    const T* __restrict__ const mx = lines;
    const T* __restrict__ const my = mx + s.width;
    const T* __restrict__ const xx = my + s.width;
    const T* __restrict__ const yy = xx + s.width;
    const T* __restrict__ const xy = yy + s.width;
    T* __restrict__ const out = s.out + row * s.width;
    for (int64_t i = 0; i < s.width; ++i) {
      const T mean_xy = mx[i] * my[i], means = mx[i] * mx[i] + my[i] * my[i];
      const T spread = xx[i] + yy[i] - means + T(kC2);
      out[i] = (2 * mean_xy + T(kC1)) * (2 * (xy[i] - mean_xy) + T(kC2)) / ((means + T(kC1)) * spread);
    }
  }
}

template <class T>
static void backward(const SsimStrip<T>& s) {
  const int64_t plane = (kSsimStripRows + 4 * kSsimRadius) * s.width;
  T* const moments = s.scratch;
  T* const partials = moments + 5 * plane;  // by the mean, by xx, by xy: filtered along the rows
  T* const lines = moments + 8 * plane;
  const int64_t length = s.width + 2 * kSsimRadius;
  moment_rows(s, s.begin - 2 * kSsimRadius, s.end + 2 * kSsimRadius, moments, plane, lines);
  T* const padded = lines + 5 * length;
  clear(padded, 3 * length);
  for (int64_t row = s.begin - kSsimRadius; row < s.end + kSsimRadius; ++row) {
    const int64_t local = row - (s.begin - kSsimRadius);
    if (row < 0 || row >= s.height) {
      for (int k = 0; k < 3; ++k) clear(partials + k * plane + local * s.width, s.width);
      continue;
    }
    for (int k = 0; k < 5; ++k)
      filter_columns(moments + k * plane + local * s.width, s.width, s.weights, s.width, lines + k * s.width);
    const T* __restrict__ const mx = lines;
    const T* __restrict__ const my = mx + s.width;
    const T* __restrict__ const xx = my + s.width;
    const T* __restrict__ const yy = xx + s.width;
    const T* __restrict__ const xy = yy + s.width;
    const T* __restrict__ const gradient = s.gradient + row * s.width;
    T* __restrict__ const by_mean = padded + kSsimRadius;
    T* __restrict__ const by_xx = by_mean + length;
    T* __restrict__ const by_xy = by_xx + length;
    for (int64_t i = 0; i < s.width; ++i) {
      const T mean_xy = mx[i] * my[i], squares = mx[i] * mx[i] + my[i] * my[i];
      const T means = 1 / (squares + T(kC1)), spread = 1 / (xx[i] + yy[i] - squares + T(kC2));
      const T luminance = (2 * mean_xy + T(kC1)) * means, contrast = (2 * (xy[i] - mean_xy) + T(kC2)) * spread;
      const T similarity = luminance * contrast;
      const T d_xx = -similarity * spread, d_xy = 2 * luminance * spread;
      by_xx[i] = gradient[i] * d_xx;
      by_xy[i] = gradient[i] * d_xy;
      by_mean[i] =
          gradient[i] * (2 * (my[i] * contrast - mx[i] * similarity) * means - 2 * mx[i] * d_xx - my[i] * d_xy);
    }
    for (int k = 0; k < 3; ++k)
      filter_row(padded + k * length, s.weights, s.width, partials + k * plane + local * s.width);
  }
  for (int64_t row = s.begin; row < s.end; ++row) {
    for (int k = 0; k < 3; ++k)
      filter_columns(partials + k * plane + (row - s.begin) * s.width, s.width, s.weights, s.width,
                     lines + k * s.width);
    const T* __restrict__ const x = s.x + row * s.width;
    const T* __restrict__ const y = s.y + row * s.width;
    const T* __restrict__ const by_mean = lines;
    const T* __restrict__ const by_xx = by_mean + s.width;
    const T* __restrict__ const by_xy = by_xx + s.width;
    T* __restrict__ const out = s.out + row * s.width;
    for (int64_t i = 0; i < s.width; ++i) out[i] = by_mean[i] + 2 * x[i] * by_xx[i] + y[i] * by_xy[i];
  }
}

template <class T>
static void run(const SsimStrip<T>& strip) {
  if (strip.gradient)
    backward(strip);
  else
    forward(strip);
}

}  // namespace

void ssim_strip(const SsimStrip<float>& strip) { run(strip); }
void ssim_strip(const SsimStrip<double>& strip) { run(strip); }

}  // namespace trellis::cpu::TRELLIS_ISA
