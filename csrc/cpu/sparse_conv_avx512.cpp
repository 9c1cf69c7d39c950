#define TRELLIS_ISA avx512
#define TRELLIS_VECTOR_BYTES 64
#define TRELLIS_TILE_ROWS 14
#include "sparse_conv.inl.h"
