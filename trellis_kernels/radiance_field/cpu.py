"""CPU launch. The native kernel is being written; until it lands this runs the definition."""

from trellis_kernels.radiance_field.reference import (
    render_radiance_field,
    render_radiance_field_gradient,
    trace_voxels,
)

__all__ = ["render_radiance_field", "render_radiance_field_gradient", "trace_voxels"]
