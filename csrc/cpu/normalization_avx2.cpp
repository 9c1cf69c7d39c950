#if defined(__x86_64__)
#define TRELLIS_ISA rows_avx2
#include "normalization_rows.inl.h"
#endif
