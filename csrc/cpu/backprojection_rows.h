// Between backprojection.cpp and the kernels of each instruction set. Plain data only: see cpu_features.h.
#pragma once
#include <cstdint>

namespace trellis::cpu {

constexpr int kViewsAtOnce = 4;  // of one point: how often its sums are read and written
constexpr int kMaxTaps = 4 * kViewsAtOnce;

// The pixels that take part in one sum, with their weights.
template <class T>
struct Taps {
  int count = 0;
  const T* rows[kMaxTaps];
  T weights[kMaxTaps];
};

// A point that a pixel takes part in.
template <class T>
struct Share {
  int64_t point;
  T weight;
};

#define TRELLIS_BACKPROJECTION_KERNELS(NAMESPACE, T)                                                                  \
  namespace NAMESPACE {                                                                                               \
  /* sums[c] += the sum of the taps */                                                                                \
  void add_taps(const Taps<T>& taps, T* sums, int64_t channels);                                                      \
  /* best[c] = the sum of the taps where it is larger or there is no winner; then winners[c] = view */                \
  void keep_larger(const Taps<T>& taps, int32_t view, T* best, int32_t* winners, int64_t channels);                   \
  /* out[c] = the sum of weight rows[point, c] over the shares; with winners: where winners[point, c] == view */      \
  void sum_shares(const Share<T>* shares, int64_t count, const T* rows, const int32_t* winners, int32_t view, T* out, \
                  int64_t stride, int64_t channels);                                                                  \
  }
TRELLIS_BACKPROJECTION_KERNELS(backprojection_baseline, float)
TRELLIS_BACKPROJECTION_KERNELS(backprojection_baseline, double)
TRELLIS_BACKPROJECTION_KERNELS(backprojection_avx2, float)
TRELLIS_BACKPROJECTION_KERNELS(backprojection_avx2, double)
TRELLIS_BACKPROJECTION_KERNELS(backprojection_avx512, float)
TRELLIS_BACKPROJECTION_KERNELS(backprojection_avx512, double)
#undef TRELLIS_BACKPROJECTION_KERNELS

}  // namespace trellis::cpu
