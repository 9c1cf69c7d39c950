// The curves for a list of voxels, compiled once per instruction set: TRELLIS_ISA names the namespace. Voxels are
// worked on kLanes at a time, one array per axis, so that every step is a loop over lanes that the compiler vectorises.
#pragma once
#include <cstdint>

namespace trellis::cpu::TRELLIS_ISA {

namespace {

constexpr int kLanes = 32;

struct Lanes {
  uint32_t axis[3][kLanes];
};

// Skilling 2004: axes to the transposed index of the Hilbert curve.
inline void to_hilbert(Lanes& lanes, int levels) {
  uint32_t* const x = lanes.axis[0];
  uint32_t* const y = lanes.axis[1];
  uint32_t* const z = lanes.axis[2];
  for (int level = levels - 1; level > 0; --level) {
    const uint32_t below = (1u << level) - 1;
    for (int i = 0; i < kLanes; ++i) {
      // Bit set: reflect x; clear: exchange x with that axis. Both below the bit.
      uint32_t first = x[i] ^ ((0u - (x[i] >> level & 1)) & below);
      for (int axis = 1; axis < 3; ++axis) {
        uint32_t& other = lanes.axis[axis][i];
        const uint32_t set = 0u - (other >> level & 1);
        const uint32_t swapped = (first ^ other) & below & ~set;
        first ^= swapped | (set & below);
        other ^= swapped;
      }
      x[i] = first;
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    y[i] ^= x[i];
    z[i] ^= y[i];
    uint32_t parity = z[i] >> 1;  // bit j of the result: how many bits of z above j are set, modulo 2
    parity ^= parity >> 1;
    parity ^= parity >> 2;
    parity ^= parity >> 4;
    parity ^= parity >> 8;
    x[i] ^= parity;
    y[i] ^= parity;
    z[i] ^= parity;
  }
}

inline uint64_t spread(uint32_t value) {  // bit i of 16 moves to bit 3 i
  uint64_t bits = value;
  bits = (bits | bits << 16) & 0x0000ff0000ffu;
  bits = (bits | bits << 8) & 0x00f00f00f00fu;
  bits = (bits | bits << 4) & 0x0c30c30c30c3u;
  return (bits | bits << 2) & 0x249249249249u;
}

}  // namespace

void encode_voxels(const int32_t* coords, int64_t count, bool hilbert, bool transposed, int levels, int batch_shift,
                   uint64_t* codes) {
  const int columns[3] = {transposed ? 2 : 1, transposed ? 1 : 2, 3};
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    const int lanes = count - begin < kLanes ? static_cast<int>(count - begin) : kLanes;
    const int32_t* const rows = coords + 4 * begin;
    Lanes voxels;
    uint64_t result[kLanes];
    for (int axis = 0; axis < 3; ++axis)
      for (int i = 0; i < kLanes; ++i)
        voxels.axis[axis][i] = i < lanes ? static_cast<uint32_t>(rows[4 * i + columns[axis]]) : 0;
    if (hilbert) to_hilbert(voxels, levels);
    for (int i = 0; i < kLanes; ++i)
      result[i] = spread(voxels.axis[0][i]) << 2 | spread(voxels.axis[1][i]) << 1 | spread(voxels.axis[2][i]);
    for (int i = 0; i < lanes; ++i) codes[begin + i] = static_cast<uint64_t>(rows[4 * i]) << batch_shift | result[i];
  }
}

}  // namespace trellis::cpu::TRELLIS_ISA
