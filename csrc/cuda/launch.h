// How a CUDA kernel is launched, and the few words in which device code differs between a GPU and csrc/emulation.
// Every .cu file includes this and nothing of CUDA's directly.
//
//   launch({"fill", blocks(count, 256), 256, stream}, fill, view.data, count);
//
//   SHARED_ARRAY(float, tile, 8, 33);    a __shared__ float tile[8][33], whose indices the emulation checks
//   exp2_approximately(x)                2^x by the special function unit, within 2 ulp; 0 below 2^-126
//   DEVICE_CHECK(i < n, "text");         on a GPU a device-side assert: the next synchronisation raises, like torch's
//   own
//                                        index checks; under emulation a ValueError with the text
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef TRELLIS_EMULATED
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>

#include <cassert>
#endif

namespace trellis {

struct Launch {
  const char* kernel;  // its name, for messages
  dim3 grid, block;
  int64_t stream;
};

// Blocks of `size` that cover `count` items.
inline unsigned blocks(int64_t count, int64_t size) {
  const int64_t needed = (count + size - 1) / size;
  if (needed > INT32_MAX) throw std::invalid_argument("too many elements for one launch: " + std::to_string(count));
  return static_cast<unsigned>(needed);
}

#ifdef TRELLIS_EMULATED

template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  emulation::run(how.kernel, how.grid, how.block, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

inline float exp2_approximately(float x) { return x < -126 ? 0.0f : std::exp2(x); }

#define SHARED_ARRAY(type, name, ...) static ::trellis::emulation::Shared<type, __VA_ARGS__> name(#name)
#define DEVICE_CHECK(condition, text) \
  if (!(condition)) throw std::invalid_argument(text)

#else

inline std::string describe(const char* kernel, cudaError_t error) {
  int device = -1;
  cudaDeviceProp properties{};
  std::string where = "no CUDA device";
  if (cudaGetDevice(&device) == cudaSuccess && cudaGetDeviceProperties(&properties, device) == cudaSuccess)
    where = "device " + std::to_string(device) + " (" + properties.name + ", capability " +
            std::to_string(properties.major) + "." + std::to_string(properties.minor) + ")";
  return std::string("CUDA kernel ") + kernel + " failed on " + where + ": " + cudaGetErrorString(error);
}

template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;  // nothing to do, which CUDA would call an error
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.stream = reinterpret_cast<cudaStream_t>(how.stream);
  if (const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
      error != cudaSuccess)
    throw std::runtime_error(describe(how.kernel, error));
}

__device__ inline float exp2_approximately(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

template <class T, int First, int... Rest>
struct ArrayOf {
  using Row = typename ArrayOf<T, Rest...>::type;
  using type = Row[First];
};
template <class T, int Last>
struct ArrayOf<T, Last> {
  using type = T[Last];
};

#define SHARED_ARRAY(kind, name, ...) __shared__ typename ::trellis::ArrayOf<kind, __VA_ARGS__>::type name
#define DEVICE_CHECK(condition, text) assert((condition) && text)

#endif

}  // namespace trellis
