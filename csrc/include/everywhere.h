// TRELLIS_EVERYWHERE: a function that CPU and GPU kernels share. TRELLIS_UNROLL: a loop whose arrays stay in registers.
#pragma once

#ifdef __CUDACC__
#define TRELLIS_EVERYWHERE __host__ __device__ inline
#define TRELLIS_UNROLL _Pragma("unroll")
#else
#define TRELLIS_EVERYWHERE inline
#define TRELLIS_UNROLL
#endif

namespace trellis {

template <class T>
TRELLIS_EVERYWHERE bool is_finite(T x) {
  return x - x == 0;
}

}  // namespace trellis
