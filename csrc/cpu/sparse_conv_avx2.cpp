#define TRELLIS_ISA avx2
#define TRELLIS_VECTOR_BYTES 32
#define TRELLIS_TILE_ROWS 6
#include "sparse_conv.inl.h"
