// Rows of channels, compiled once per instruction set: TRELLIS_ISA names the namespace. A block of channels stays in
// registers while all taps are added to it.
#include "backprojection_rows.h"

namespace trellis::cpu::TRELLIS_ISA {
namespace {

constexpr int kBytes = 64;  // of a vector; the compiler splits it where registers are smaller
constexpr int kVectors = 4;

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
};

template <class T>
inline void sum_taps(const Taps<T>& taps, T* sums, int64_t channels) {
  using V = typename Vector<T>::type;
  constexpr int64_t kLanes = kBytes / sizeof(T);
  int64_t c = 0;
  for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes) {
    V block[kVectors];
    for (int k = 0; k < kVectors; ++k) block[k] = *reinterpret_cast<const V*>(sums + c + k * kLanes);
    for (int tap = 0; tap < taps.count; ++tap) {
      const T* const row = taps.rows[tap] + c;
      const T weight = taps.weights[tap];
      for (int k = 0; k < kVectors; ++k) block[k] += weight * *reinterpret_cast<const V*>(row + k * kLanes);
    }
    for (int k = 0; k < kVectors; ++k) *reinterpret_cast<V*>(sums + c + k * kLanes) = block[k];
  }
  for (; c < channels; ++c) {
    T sum = sums[c];
    for (int tap = 0; tap < taps.count; ++tap) sum += taps.weights[tap] * taps.rows[tap][c];
    sums[c] = sum;
  }
}

template <class T>
inline void keep(const Taps<T>& taps, int32_t view, T* best, int32_t* winners, int64_t channels) {
  constexpr int64_t kBlock = 64;
  T sample[kBlock];
  for (int64_t first = 0; first < channels; first += kBlock) {
    const int64_t count = channels - first < kBlock ? channels - first : kBlock;
    for (int64_t c = 0; c < count; ++c) sample[c] = T(0);
    for (int tap = 0; tap < taps.count; ++tap) {
      const T* __restrict__ const row = taps.rows[tap] + first;
      const T weight = taps.weights[tap];
      for (int64_t c = 0; c < count; ++c) sample[c] += weight * row[c];
    }
    for (int64_t c = 0; c < count; ++c) {
      const bool better = sample[c] > best[first + c] || winners[first + c] < 0;
      best[first + c] = better ? sample[c] : best[first + c];
      winners[first + c] = better ? view : winners[first + c];
    }
  }
}

template <class T>
inline void gather(const Share<T>* shares, int64_t count, const T* rows, const int32_t* winners, int32_t view, T* out,
                   int64_t stride, int64_t channels) {
  using V = typename Vector<T>::type;
  constexpr int64_t kLanes = kBytes / sizeof(T), kBlock = kVectors * kLanes;
  int64_t c = 0;
  for (; !winners && c + kBlock <= channels; c += kBlock) {
    V block[kVectors] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T* const row = rows + shares[i].point * stride + c;
      for (int k = 0; k < kVectors; ++k) block[k] += shares[i].weight * *reinterpret_cast<const V*>(row + k * kLanes);
    }
    for (int k = 0; k < kVectors; ++k) *reinterpret_cast<V*>(out + c + k * kLanes) = block[k];
  }
  for (; c < channels; c += kBlock) {
    const int64_t width = channels - c < kBlock ? channels - c : kBlock;
    T sums[kBlock] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T* __restrict__ const row = rows + shares[i].point * stride + c;
      const T weight = shares[i].weight;
      if (winners) {
        const int32_t* __restrict__ const winner = winners + shares[i].point * stride + c;
        for (int64_t k = 0; k < width; ++k) sums[k] += winner[k] == view ? weight * row[k] : T(0);
      } else {
        for (int64_t k = 0; k < width; ++k) sums[k] += weight * row[k];
      }
    }
    for (int64_t k = 0; k < width; ++k) out[c + k] = sums[k];
  }
}

}  // namespace

#define TRELLIS_BACKPROJECTION_KERNELS(T)                                                                             \
  void add_taps(const Taps<T>& taps, T* sums, int64_t channels) { sum_taps(taps, sums, channels); }                   \
  void keep_larger(const Taps<T>& taps, int32_t view, T* best, int32_t* winners, int64_t channels) {                  \
    keep(taps, view, best, winners, channels);                                                                        \
  }                                                                                                                   \
  void sum_shares(const Share<T>* shares, int64_t count, const T* rows, const int32_t* winners, int32_t view, T* out, \
                  int64_t stride, int64_t channels) {                                                                 \
    gather(shares, count, rows, winners, view, out, stride, channels);                                                \
  }
TRELLIS_BACKPROJECTION_KERNELS(float)
TRELLIS_BACKPROJECTION_KERNELS(double)
#undef TRELLIS_BACKPROJECTION_KERNELS

}  // namespace trellis::cpu::TRELLIS_ISA
