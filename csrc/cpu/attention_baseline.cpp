// Attention for any CPU.
#define TRELLIS_ATTENTION_NAMESPACE attention_baseline
#define TRELLIS_VECTOR_BYTES 16
#define TRELLIS_ACCUMULATORS 12  // vectors of a tile
#define TRELLIS_PANEL_VECTORS 3  // vectors of a tile's row, at most
#include "attention_kernel.inl.h"
