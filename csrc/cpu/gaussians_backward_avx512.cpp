#if defined(__x86_64__)
#define TRELLIS_ISA gaussians_backward_avx512
#include "gaussians_backward.inl.h"
#endif
