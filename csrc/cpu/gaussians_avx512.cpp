#if defined(__x86_64__)
#define TRELLIS_ISA gaussians_avx512
#include "gaussians.inl.h"
#endif
