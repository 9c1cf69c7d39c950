#define TRELLIS_ISA field_baseline
#include "radiance_field_march.inl.h"
