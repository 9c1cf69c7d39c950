#if defined(__x86_64__)
#define TRELLIS_ISA gaussians_avx2
#include "gaussians.inl.h"
#endif
