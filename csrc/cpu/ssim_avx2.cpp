#if defined(__x86_64__)
#define TRELLIS_ISA ssim_avx2
#include "ssim_strip.inl.h"
#endif
