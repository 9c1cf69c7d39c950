#define TRELLIS_ISA rows_baseline
#include "normalization_rows.inl.h"
