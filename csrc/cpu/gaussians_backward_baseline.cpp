#define TRELLIS_ISA gaussians_backward_baseline
#include "gaussians_backward.inl.h"
