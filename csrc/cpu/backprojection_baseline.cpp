#define TRELLIS_ISA backprojection_baseline
#include "backprojection_rows.inl.h"
