// Where a pixel looks in a texture: levels of the mip chain, texels and weights. The same on CPU and GPU.
#pragma once
#include <cmath>
#include <cstdint>

#include "everywhere.h"

namespace trellis {

enum class Wrap { repeat, clamp, zero };

// Sizes of the levels of a texture, from itself (0) to one texel. Levels from 1 on lie behind each other.
struct Pyramid {
  static constexpr int kMaxLevels = 15;  // 16384 texels per side
  int count = 1;
  int height[kMaxLevels], width[kMaxLevels];
  int64_t start[kMaxLevels];  // texels in front of a level, from level 1 on
  int64_t texels = 0;         // of all levels from 1 on

  Pyramid(int64_t full_height, int64_t full_width, bool mips) {
    height[0] = static_cast<int>(full_height);
    width[0] = static_cast<int>(full_width);
    start[0] = 0;
    while (mips && (height[count - 1] > 1 || width[count - 1] > 1) && count < kMaxLevels) {
      height[count] = height[count - 1] > 1 ? height[count - 1] / 2 : 1;
      width[count] = width[count - 1] > 1 ? width[count - 1] / 2 : 1;
      start[count] = texels;
      texels += int64_t{height[count]} * width[count];
      ++count;
    }
  }
};

// What texel i of the next level takes of a side of `size` texels: weight[k] of texel first + k.
struct Means {
  int first, count;
  double weight[3];
};
TRELLIS_EVERYWHERE Means means_of(int i, int size) {
  if (size == 1) return {0, 1, {1.0, 0.0, 0.0}};
  if (size % 2 == 0) return {2 * i, 2, {0.5, 0.5, 0.0}};
  const int half = size / 2;
  const double unit = 1.0 / size;
  return {2 * i, 3, {(half - i) * unit, half * unit, (i + 1) * unit}};
}

// The other way round: how much texels first and first + 1 of the next level take of texel i.
struct Takers {
  int first, count;
  double weight[2];
};
TRELLIS_EVERYWHERE Takers takers_of(int i, int size) {
  if (size == 1) return {0, 1, {1.0, 0.0}};
  const int k = i / 2, half = size / 2;
  if (size % 2 == 0) return {k, 1, {0.5, 0.0}};
  const double unit = 1.0 / size;
  if (i % 2 == 1) return {k, 1, {half * unit, 0.0}};
  if (k == 0) return {0, 1, {half * unit, 0.0}};
  if (k == half) return {k - 1, 1, {k * unit, 0.0}};
  return {k - 1, 2, {k * unit, (half - k) * unit}};
}

// The level of a pixel, in [0, last], from du/dx, du/dy, dv/dx, dv/dy.
template <class T>
TRELLIS_EVERYWHERE T level_of(const T* derivatives, int height, int width, int last, bool nearest) {
  const T ux = derivatives[0] * width, uy = derivatives[1] * width;
  const T vx = derivatives[2] * height, vy = derivatives[3] * height;
  const T xx = ux * ux + vx * vx, yy = uy * uy + vy * vy, xy = ux * uy + vx * vy, difference = xx - yy;
  const T squared = T(0.5) * (xx + yy + std::sqrt(difference * difference + 4 * xy * xy));
  if (!(squared < T(INFINITY))) return T(last);
  if (!(squared > 1)) return T(0);
  const T level = T(0.5) * std::log2(squared);
  if (nearest) {
    const int whole = static_cast<int>(level + T(0.5));
    return T(whole < last ? whole : last);
  }
  return level < T(last) ? level : T(last);
}

template <class T>
TRELLIS_EVERYWHERE T rounded_down(T x) {
#ifndef __CUDA_ARCH__
  if (x > T(-1e9) && x < T(1e9)) {  // a call of the library where the instruction set has no rounding
    const T whole = static_cast<T>(static_cast<int>(x));
    return x < whole ? whole - 1 : whole;
  }
#endif
  return std::floor(x);
}

// Two neighboring texels on a side, first and first + 1, and what the second one weighs; first is -1 to size - 1, or
// kNowhere.
template <class T>
struct Along {
  static constexpr int kNowhere = -2;
  int first;
  T weight;
};
template <class T>
TRELLIS_EVERYWHERE Along<T> along(T u, int size, Wrap wrap, bool nearest) {
  if (wrap == Wrap::repeat)
    u -= rounded_down(u);
  else if (wrap == Wrap::clamp)
    u = u < 0 ? T(0) : u > 1 ? T(1) : u;
  else
    u = u < -1 ? T(-1) : u > 2 ? T(2) : u;
  const T at = nearest ? u * size : u * size - T(0.5);
  int first = static_cast<int>(at);
  if (at < T(first)) --first;  // towards minus infinity
  if (nearest) {
    if (wrap == Wrap::zero) return {first >= 0 && first < size ? first : Along<T>::kNowhere, T(0)};
    return {first < size ? first : wrap == Wrap::repeat ? 0 : size - 1, T(0)};
  }
  if (wrap == Wrap::zero && (first < -1 || first >= size)) return {Along<T>::kNowhere, T(0)};
  return {first, at - T(first)};
}

// The texel that position i of a side, -1 to size, stands for; -1: none.
TRELLIS_EVERYWHERE int wrapped(int i, int size, Wrap wrap) {
  if (i >= 0 && i < size) return i;
  if (wrap == Wrap::zero) return -1;
  return (i < 0) == (wrap == Wrap::repeat) ? size - 1 : 0;
}

}  // namespace trellis
