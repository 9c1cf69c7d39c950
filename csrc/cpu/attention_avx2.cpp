// Attention for CPUs with AVX2 and FMA: 16 registers of 8 floats.
#define TRELLIS_ATTENTION_NAMESPACE attention_avx2
#define TRELLIS_VECTOR_BYTES 32
#define TRELLIS_ACCUMULATORS 12  // vectors of a tile
#define TRELLIS_PANEL_VECTORS 3  // vectors of a tile's row, at most
#include "attention_kernel.inl.h"
