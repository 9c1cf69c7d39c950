#if defined(__x86_64__)
#define TRELLIS_ISA gaussians_backward_avx2
#include "gaussians_backward.inl.h"
#endif
