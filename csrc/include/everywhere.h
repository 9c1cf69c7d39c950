// TRELLIS_EVERYWHERE: a function that CPU and GPU kernels share.
#pragma once

#ifdef __CUDACC__
#define TRELLIS_EVERYWHERE __host__ __device__ inline
#else
#define TRELLIS_EVERYWHERE inline
#endif
