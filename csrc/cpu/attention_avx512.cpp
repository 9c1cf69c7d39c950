// Attention for CPUs with AVX-512: 32 registers of 16 floats.
#define TRELLIS_ATTENTION_NAMESPACE attention_avx512
#define TRELLIS_VECTOR_BYTES 64
#define TRELLIS_ACCUMULATORS 24  // vectors of a tile
#define TRELLIS_PANEL_VECTORS 4  // vectors of a tile's row, at most
#include "attention_kernel.inl.h"
