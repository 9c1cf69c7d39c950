#if defined(__x86_64__)
#define TRELLIS_ISA field_avx2
#include "radiance_field_march.inl.h"
#endif
