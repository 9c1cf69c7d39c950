#define TRELLIS_ISA ssim_baseline
#include "ssim_strip.inl.h"
