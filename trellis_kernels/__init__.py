"""Sparse 3D operators. Each lives in a folder of its own name; a tensor's device picks its kernel."""

from trellis_kernels.operator import OPERATORS, use_reference

__all__ = ["OPERATORS", "use_reference"]
