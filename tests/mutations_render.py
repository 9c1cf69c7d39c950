"""Mistakes in the kernels that draw and compare pictures, for tests/mutations.py.

Each is a file, a meaning, a text that occurs once in it, what it becomes, and the tests that must fail.
"""

from __future__ import annotations

Mistake = tuple[str, str, str, str, str]

_SSIM = "tests/kernels/test_ssim.py -k emulated"

_MESH = "tests/kernels/test_mesh_raster_gpu.py -k emulated and "
_BITS = _MESH + "pixel and 83"
_SUMS = _MESH + "long_runs and 6"

_MESH_RASTER: list[Mistake] = [
    ("csrc/cuda/mesh_raster.cu", "the top-left rule is dropped: edges belong to nobody",
     "(e[i] == 0 && takes_zero[i])", "false", "tests/kernels/test_mesh_raster.py -k emulated and watertight"),
    ("csrc/cuda/mesh_raster.cu", "off-by-one: the list of a warp's pixels gives the first to the triangle before",
     "starts[warp][which + step] <= entry", "starts[warp][which + step] < entry", _BITS),
    ("csrc/cuda/mesh_raster.cu", "dropped tie rule: equally deep layers are never drawn",
     "(depth == front_depth && front >= 0 && face > front)", "false",
     "tests/kernels/test_mesh_raster.py -k emulated and layers_follow"),
    ("csrc/cuda/mesh_raster.cu", "the key takes the depth's bits as they are: negative depths come last",
     "return bits >> 31 ? ~bits : bits | 0x80000000u;", "return bits | 0x80000000u;", _BITS),
    ("csrc/cuda/mesh_raster.cu", "off-by-one tile: the last row of a large triangle's tile is left out",
     "y <= bottom; ++y", "y < bottom; ++y", _BITS),
    ("csrc/cuda/mesh_raster.cu", "a tile is dropped by the wrong corner",
     "pixel_center(n.x > 0 ? right : left, in.step_x)", "pixel_center(n.x > 0 ? left : right, in.step_x)", _BITS),
    ("csrc/cuda/ordered_sums.cuh", "a run that goes on in the next 32 items is dropped",
     "values[c] += open[c];", "values[c] += 0;", _SUMS),
    ("csrc/cuda/ordered_sums.cuh", "dropped mask: sums run across keys",
     "== key && lane >= delta", "!= -2 && lane >= delta", _SUMS),
    ("csrc/cuda/ordered_sums.cuh", "off-by-one chunk: the last partial sum of a long run is left out",
     "i <= last; i += 32", "i < last; i += 32", _SUMS),
    ("csrc/cuda/mesh_raster_gradient.cu", "wrong stride: the third corner has the sums of the second",
     "corner % 3 * kChannels", "corner % 3 / 2 * kChannels", _SUMS),
    ("csrc/cuda/mesh_raster_gradient.cu", "channels past the first four read those of the first four",
     "channels + first_channel + c]);", "channels + c]);", _SUMS),
    ("csrc/cuda/mesh_raster_gradient.cu", "every view reads the attributes of the first",
     "(pixel / seen.pixels % sets * seen.vertices) * channels", "0 * channels",
     "tests/kernels/test_mesh_raster.py -k emulated and agrees_with_reference"),
]  # fmt: skip

MISTAKES: list[Mistake] = [
    *_MESH_RASTER,
    (
        "csrc/cuda/ssim.cu",
        "a removed barrier",
        "xy;\n  }\n  __syncthreads();\n  const int row",
        "xy;\n  }\n  const int row",
        _SSIM,
    ),
    (
        "csrc/cuda/ssim.cu",
        "off-by-one tile edge",
        "for (int tap = 0; tap < kTaps; ++tap) sums[k]",
        "for (int tap = 1; tap < kTaps; ++tap) sums[k]",
        _SSIM,
    ),
    ("csrc/cuda/ssim.cu", "wrong stride: planes overlap", "tile.at(gradients + plane,", "tile.at(gradients,", _SSIM),
]
