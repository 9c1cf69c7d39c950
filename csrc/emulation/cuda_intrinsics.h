// The intrinsics and vector types of CUDA that csrc/cuda uses, in terms of cuda_emulation.h. Add what a kernel needs.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

using TrellisWhere = trellis::emulation::Location;

inline void __syncthreads(TrellisWhere where = TrellisWhere::current()) {
  trellis::emulation::wait_for_block(false, where);
}
inline int __syncthreads_count(int predicate, TrellisWhere where = TrellisWhere::current()) {
  return trellis::emulation::wait_for_block(predicate != 0, where);
}
inline int __syncthreads_or(int predicate, TrellisWhere where = TrellisWhere::current()) {
  return trellis::emulation::wait_for_block(predicate != 0, where) != 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, TrellisWhere where = TrellisWhere::current()) {
  trellis::emulation::wait_for_warp(mask, 0, where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { trellis::emulation::yield(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, TrellisWhere where = TrellisWhere::current()) {
  const int lane = trellis::emulation::self.lane;
  return trellis::emulation::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, TrellisWhere where = TrellisWhere::current()) {
  const int lane = trellis::emulation::self.lane, within = lane & (width - 1);
  return trellis::emulation::shuffle(mask, value,
                                     within < static_cast<int>(delta) ? lane : lane - static_cast<int>(delta), where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   TrellisWhere where = TrellisWhere::current()) {
  const int lane = trellis::emulation::self.lane, within = lane & (width - 1);
  return trellis::emulation::shuffle(
      mask, value, within + static_cast<int>(delta) >= width ? lane : lane + static_cast<int>(delta), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, TrellisWhere where = TrellisWhere::current()) {
  const int lane = trellis::emulation::self.lane, target = (lane & (width - 1)) ^ bits;
  return trellis::emulation::shuffle(mask, value, target >= width ? lane : (lane & ~(width - 1)) | target, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, TrellisWhere where = TrellisWhere::current()) {
  const auto given = trellis::emulation::wait_for_warp(mask, predicate != 0, where);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= mask >> lane & 1 ? static_cast<unsigned>(given[lane]) << lane : 0;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, TrellisWhere where = TrellisWhere::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, TrellisWhere where = TrellisWhere::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, TrellisWhere where = TrellisWhere::current()) {
  const uint64_t bits = trellis::emulation::to_bits(value);
  const auto given = trellis::emulation::wait_for_warp(mask, bits, where);
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane)
    same |= static_cast<unsigned>((mask >> lane & 1) && given[lane] == bits) << lane;
  return same;
}

// An atomic is a place where other threads may come in between.
template <class T, class Change>
T trellis_atomic(T* address, Change change) {
  trellis::emulation::yield();
  const T old = *address;
  *address = change(old);
  return old;
}
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return trellis_atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return trellis_atomic(address, [=](T old) { return std::min(old, value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return trellis_atomic(address, [=](T old) { return std::max(old, value); });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return trellis_atomic(address, [=](T old) { return old | value; });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return trellis_atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return trellis_atomic(address, [=](T old) { return old == expected ? value : old; });
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __clzll(long long value) { return std::countl_zero(static_cast<unsigned long long>(value)); }
inline int __ffs(int value) { return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1; }
inline int __ffsll(long long value) {
  return value == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(value)) + 1;
}
inline unsigned __brev(unsigned value) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (value >> bit & 1) << (31 - bit);
  return reversed;
}
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long value) { return std::bit_cast<double>(value); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float value) { return std::min(std::max(value, 0.0f), 1.0f); }
using std::max;
using std::min;

#define TRELLIS_VECTOR(type, element)                                                  \
  struct alignas(2 * sizeof(element)) type##2 { element x, y; };                       \
  struct type##3 { element x, y, z; };                                                 \
  struct alignas(16) type##4 { element x, y, z, w; };                                  \
  inline type##2 make_##type##2(element x, element y) { return {x, y}; }               \
  inline type##3 make_##type##3(element x, element y, element z) { return {x, y, z}; } \
  inline type##4 make_##type##4(element x, element y, element z, element w) { return {x, y, z, w}; }
TRELLIS_VECTOR(float, float)
TRELLIS_VECTOR(int, int)
#undef TRELLIS_VECTOR
