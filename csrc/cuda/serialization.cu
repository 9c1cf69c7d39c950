// Space-filling curves: one thread per voxel, bit tricks in registers. Bound by its 16 bytes in and 8 out.
#include "launch.h"
#include "serialization.h"

namespace trellis::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBatch = (1 << 15) - 1;

__device__ uint64_t spread(uint32_t value) {  // bit i of 16 moves to bit 3 i
  uint64_t bits = value;
  bits = (bits | bits << 16) & 0x0000ff0000ffu;
  bits = (bits | bits << 8) & 0x00f00f00f00fu;
  bits = (bits | bits << 4) & 0x0c30c30c30c3u;
  return (bits | bits << 2) & 0x249249249249u;
}

// Skilling 2004: axes to the transposed index of the Hilbert curve.
__device__ void to_hilbert(uint32_t (&axis)[3], int bits) {
  for (int level = bits - 1; level > 0; --level) {
    const uint32_t below = (1u << level) - 1;
    for (int i = 0; i < 3; ++i) {
      const bool reflected = axis[i] >> level & 1;
      const uint32_t exchanged = reflected ? 0 : (axis[0] ^ axis[i]) & below;
      axis[0] ^= reflected ? below : exchanged;
      if (i > 0) axis[i] ^= exchanged;
    }
  }
  axis[1] ^= axis[0];
  axis[2] ^= axis[1];
  uint32_t parity = axis[2] >> 1;  // bit j of the result: how many bits of z above j are set, modulo 2
  for (int step = 1; step < 16; step *= 2) parity ^= parity >> step;
  for (int i = 0; i < 3; ++i) axis[i] ^= parity;
}

__global__ void encode_voxels(const int4* __restrict__ coords, int64_t count, bool hilbert, bool transposed, int bits,
                              int64_t* __restrict__ codes) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= count) return;
  const int4 voxel = coords[n];  // batch, x, y, z
  const uint32_t limit = (1u << bits) - 1;
  DEVICE_CHECK(voxel.x >= 0 && voxel.x <= kMaxBatch && static_cast<uint32_t>(voxel.y) <= limit &&
                   static_cast<uint32_t>(voxel.z) <= limit && static_cast<uint32_t>(voxel.w) <= limit,
               "coords must be in [0, 2^bits), batch in [0, 32767]");
  uint32_t axis[3] = {static_cast<uint32_t>(transposed ? voxel.z : voxel.y),
                      static_cast<uint32_t>(transposed ? voxel.y : voxel.z), static_cast<uint32_t>(voxel.w)};
  if (hilbert) to_hilbert(axis, bits);
  const uint64_t position = spread(axis[0]) << 2 | spread(axis[1]) << 1 | spread(axis[2]);
  codes[n] = static_cast<int64_t>(static_cast<uint64_t>(voxel.x) << 3 * bits | position);
}

}  // namespace

void curve_codes(TensorView<const int32_t, 2> coords, bool hilbert, bool transposed, int64_t bits,
                 TensorView<int64_t, 1> codes, int64_t stream) {
  const int64_t count = coords.size(0);
  if (coords.size(1) != 4 || codes.size(0) != count) throw std::invalid_argument("codes must be [N] for coords [N, 4]");
  if (bits < 1 || bits > 16) throw std::invalid_argument("bits must be in [1, 16]; got " + std::to_string(bits));
  launch({"encode_voxels", blocks(count, kThreads), kThreads, stream}, encode_voxels,
         reinterpret_cast<const int4*>(coords.data), count, hilbert, transposed, static_cast<int>(bits), codes.data);
}

}  // namespace trellis::cuda
