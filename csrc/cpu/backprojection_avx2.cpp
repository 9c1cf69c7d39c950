#if defined(__x86_64__)
#define TRELLIS_ISA backprojection_avx2
#include "backprojection_rows.inl.h"
#endif
