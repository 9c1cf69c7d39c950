// Kernels, most of them wrong on purpose, for tests/kernels/test_emulation.py: `cases NAME` prints what came of one.
#include <cstdio>
#include <map>
#include <numeric>
#include <vector>

#include "launch.h"

namespace {

constexpr int kThreads = 96;  // three warps

using Values = std::vector<int>;

// The sum of a block by shuffles and shared memory: a correct kernel.
__global__ void block_sum(const int* values, int* sums) {
  SHARED_ARRAY(int, partial, kThreads / 32);
  const int thread = static_cast<int>(threadIdx.x);
  int sum = values[blockIdx.x * kThreads + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (thread % 32 == 0) partial[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) sums[blockIdx.x] = partial[0] + partial[1] + partial[2];
}

template <bool Barrier>
__global__ void rotate_block(const int* values, int* out) {
  SHARED_ARRAY(int, tile, kThreads);
  const int thread = static_cast<int>(threadIdx.x);
  tile[thread] = values[thread];
  if (Barrier) __syncthreads();
  out[thread] = tile[(thread + 1) % kThreads];
}

__global__ void grid_position(const int*, int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * 24 + thread] = static_cast<int>(block * 100 + thread);
}

__global__ void warp_votes(const int*, int* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned odd = __ballot_sync(0xffffffffu, lane & 1);
  const unsigned thirds = __match_any_sync(0xffffffffu, lane % 3);
  const int partner = __shfl_xor_sync(0xffffffffu, lane, 5), next = __shfl_up_sync(0xffffffffu, lane, 2);
  out[threadIdx.x] = odd == 0xaaaaaaaau && (thirds >> lane & 1) && __popc(thirds) == (lane % 3 == 2 ? 10 : 11) &&
                     partner == (lane ^ 5) && next == (lane < 2 ? lane : lane - 2);
}

__global__ void block_votes(const int*, int* out) {
  const int thread = static_cast<int>(threadIdx.x), odd = __syncthreads_count(thread & 1);
  out[thread] = odd == kThreads / 2 && __syncthreads_or(thread == 40) && !__syncthreads_or(0);
}

__global__ void histogram(const int* values, int* counts) { atomicAdd(&counts[values[threadIdx.x] % 4], 1); }

// What atomicAdd is there for: the read and the write of one thread with another's in between.
__global__ void lost_updates(const int*, int* counts) {
  const int old = *counts;
  __nanosleep(1);
  *counts = old + 1;
}

__global__ void barrier_not_reached(const int*, int*) {
  if (threadIdx.x < 40) return;
  __syncthreads();
}

__global__ void two_barriers(const int*, int*) {
  if (threadIdx.x % 2 == 0)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void lane_missing(const int*, int* out) {
  if (threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void lane_not_in_mask(const int*, int* out) { out[threadIdx.x] = __shfl_sync(0xffffu, 1, 0); }

__global__ void shared_overrun(const int*, int* out) {
  SHARED_ARRAY(int, tile, 4, 8);
  const int thread = static_cast<int>(threadIdx.x);
  tile[thread / 9 % 4][thread % 9] = 1;  // a row has 8
  out[thread] = 0;
}

__global__ void shared_unset(const int*, int* out) {
  SHARED_ARRAY(int, tile, 4);
  out[threadIdx.x] = tile[threadIdx.x % 4];
}

__global__ void bad_value(const int* values, int* out) {
  DEVICE_CHECK(values[threadIdx.x] < 5, "values must be below 5");
  out[threadIdx.x] = 0;
}

__global__ void tensor_overrun(const int* values, int* out) { out[threadIdx.x] = values[threadIdx.x + 1]; }

void print(const Values& values) {
  for (const int value : values) std::printf("%d ", value);
  std::printf("\n");
}

using Kernel = void (*)(const int*, int*);

struct Case {
  Kernel kernel;
  dim3 grid, block;
  size_t outputs;
};

}  // namespace

int main(int, char** arguments) {
  const std::map<std::string, Case> cases = {
      {"block_sum", {block_sum, 2, kThreads, 2}},
      {"rotate", {rotate_block<true>, 1, kThreads, kThreads}},
      {"rotate_without_barrier", {rotate_block<false>, 1, kThreads, kThreads}},
      {"grid_position", {grid_position, dim3(2, 3, 2), dim3(4, 3, 2), 12 * 24}},
      {"warp_votes", {warp_votes, 1, kThreads, kThreads}},
      {"block_votes", {block_votes, 1, kThreads, kThreads}},
      {"histogram", {histogram, 1, kThreads, 4}},
      {"lost_updates", {lost_updates, 1, kThreads, 1}},
      {"barrier_not_reached", {barrier_not_reached, 1, kThreads, 1}},
      {"two_barriers", {two_barriers, 1, kThreads, 1}},
      {"lane_missing", {lane_missing, 1, kThreads, kThreads}},
      {"lane_not_in_mask", {lane_not_in_mask, 1, kThreads, kThreads}},
      {"shared_overrun", {shared_overrun, 1, kThreads, kThreads}},
      {"shared_unset", {shared_unset, 1, kThreads, kThreads}},
      {"bad_value", {bad_value, 1, kThreads, kThreads}},
      {"tensor_overrun", {tensor_overrun, 1, 2 * kThreads, 2 * kThreads}},
      {"block_too_large", {histogram, 1, 1025, 4}},
      {"empty_grid", {block_sum, dim3(0), kThreads, 1}},
  };
  const Case& chosen = cases.at(arguments[1]);
  Values values(2 * kThreads), outputs(chosen.outputs);
  std::iota(values.begin(), values.end(), 0);
  try {
    trellis::launch({arguments[1], chosen.grid, chosen.block, 0}, chosen.kernel, values.data(), outputs.data());
    print(outputs);
  } catch (const std::invalid_argument& error) {
    std::printf("invalid_argument: %s\n", error.what());
  } catch (const std::runtime_error& error) {
    std::printf("runtime_error: %s\n", error.what());
  }
}
