// CUDA's device language on a host compiler, for tests: the .cu files of csrc/cuda compiled as C++. One block runs at a
// time, with one fiber per thread (fiber.h); scheduler.cpp switches between them at barriers and warp operations, in an
// order that changes from round to round, so that a missing barrier shows. Reported instead of hung or missed: barriers
// and warp operations that not all threads reach, threads that wait at different ones, indices outside a SHARED_ARRAY
// and (with `make check-sanitizers`) outside any tensor. Shared memory starts a block filled with 0xFF: NaN, or -1.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#ifndef __restrict__
#define __restrict__ __restrict
#endif

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace trellis::emulation {

using Location = std::source_location;

// The thread that is running.
struct Self {
  uint3 thread, block;
  dim3 block_size, grid_size;
  int lane;
};
extern Self self;

void run(const char* kernel, dim3 grid, dim3 block, const std::function<void()>& thread);

void yield();                                    // let others run
int wait_for_block(bool value, Location where);  // until every thread of the block waits here; how many gave true
std::array<uint64_t, 32> wait_for_warp(unsigned mask, uint64_t value, Location where);  // what each lane of mask gave

void register_shared(void* data, size_t bytes);
[[noreturn]] void index_error(const char* name, int64_t index, int64_t extent);

template <class T>
T& checked(T* data, int64_t index, int64_t extent, const char* name) {
  if (index < 0 || index >= extent) index_error(name, index, extent);
  return data[index];
}

// One row of a shared array, so that `tile[i][j]` checks j as well.
template <class T, int First, int... Rest>
struct SharedRow {
  T* data;
  const char* name;
  SharedRow<T, Rest...> operator[](int64_t index) const {
    if (index < 0 || index >= First) index_error(name, index, First);
    return {data + index * (int64_t{1} * ... * Rest), name};
  }
};
template <class T, int Last>
struct SharedRow<T, Last> {
  T* data;
  const char* name;
  T& operator[](int64_t index) const { return checked(data, index, Last, name); }
};

template <class T, int... Extents>
class Shared {
 public:
  explicit Shared(const char* name) : name_(name) { register_shared(data_, sizeof(data_)); }
  decltype(auto) operator[](int64_t index) { return SharedRow<T, Extents...>{data_, name_}[index]; }
  operator T*() { return data_; }  // a pointer's accesses are checked by AddressSanitizer only

 private:
  alignas(16) T data_[(Extents * ...)];
  const char* name_;
};

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, int source, Location where) {
  const auto given = wait_for_warp(mask, to_bits(value), where);
  if (!(mask >> source & 1))
    throw std::logic_error("a shuffle reads lane " + std::to_string(source) + ", not in its mask");
  return from_bits<T>(given[source]);
}

}  // namespace trellis::emulation

#define threadIdx (::trellis::emulation::self.thread)
#define blockIdx (::trellis::emulation::self.block)
#define blockDim (::trellis::emulation::self.block_size)
#define gridDim (::trellis::emulation::self.grid_size)
constexpr int warpSize = 32;

#include "cuda_intrinsics.h"
