#define TRELLIS_ISA gaussians_baseline
#include "gaussians.inl.h"
