#define TRELLIS_ISA avx512
#include "serialization_kernel.inl.h"
