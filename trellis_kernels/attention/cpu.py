"""CPU launch. The kernels are csrc/cpu/attention*."""
