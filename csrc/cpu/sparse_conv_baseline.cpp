#define TRELLIS_ISA baseline
#define TRELLIS_VECTOR_BYTES 16
#define TRELLIS_TILE_ROWS 6
#include "sparse_conv.inl.h"
