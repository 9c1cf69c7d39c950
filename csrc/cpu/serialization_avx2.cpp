#define TRELLIS_ISA avx2
#include "serialization_kernel.inl.h"
