// Which instruction set the running CPU has. Kernels compiled for one live in files ending in _avx2.cpp / _avx512.cpp.
// Such a file must not emit weak symbols (no std containers, no inline functions that survive inlining): the linker
// would be free to use its copy everywhere. tests/test_house.py checks the object files.
#pragma once

namespace trellis {

enum class InstructionSet { baseline = 0, avx2 = 1, avx512 = 2 };

inline InstructionSet detect_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

// Also settable from a test (`_cpu.set_instruction_set`), never above what the CPU has, so that each path is tested.
InstructionSet instruction_set();

}  // namespace trellis
