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

_GRADIENTS = "tests/kernels/test_gaussians_gradient_gpu.py -k emulated"

_GAUSSIANS: list[Mistake] = [
    ("csrc/cuda/gaussians.cu", "the median depth is that of the first Gaussian",
     "transmittance >= 0.5f && after < 0.5f", "transmittance == 1.0f",
     "tests/kernels/test_gaussians_gpu.py -k emulated"),
    ("csrc/cuda/gaussians_gradient.cu", "removed barrier: where to begin is asked before all warps have said it",
     "  if (lane == 0) untils[warp] = warp_until;\n  __syncthreads();\n",
     "  if (lane == 0) untils[warp] = warp_until;\n", _GRADIENTS),
    ("csrc/cuda/gaussians_gradient.cu", "removed barrier: the next batch comes before this one is added up",
     "      if (pair == 0) in.given[entry] = 1;\n    }\n    __syncthreads();\n",
     "      if (pair == 0) in.given[entry] = 1;\n    }\n", _GRADIENTS),
    ("csrc/cuda/gaussians_gradient.cu", "removed barrier: a warp sums a group before all lanes have said their shares",
     "    __syncwarp();\n    const int which", "    const int which", _GRADIENTS),
    ("csrc/cuda/gaussians_gradient.cu", "off-by-one edge: the last Gaussian of each pixel is left out",
     "return min(low + 1, end) - begin;", "return min(low, end) - begin;", _GRADIENTS),
    ("csrc/cuda/gaussians_gradient.cu", "wrong stride: pixels of a lane are those of its neighbor",
     "half * kParts + part;", "half + 2 * part;", _GRADIENTS),
    ("csrc/cuda/gaussians_gradient.cu", "what is behind a Gaussian is forgotten",
     "behind += share.x * worth;", "", _GRADIENTS),
    ("csrc/cuda/gaussians_sums.cu", "off-by-one tile: a Gaussian on many tiles is summed over every other one",
     "for (int other = kLanes; other < 32; other *= 2) {", "for (int other = kLanes; other < 16; other *= 2) {",
     _GRADIENTS),
    ("csrc/cuda/gaussians_project_gradient.cu", "the filter's fading of the opacity has no gradient",
     "d_a += d_sharp * s.c + d_wide * c;", "", _GRADIENTS),
    ("csrc/cuda/gaussians_project_gradient.cu", "wrong stride: all cameras add to the gradient of the first",
     "(warp * views + view) * kCamera", "warp * views * kCamera", _GRADIENTS),
    ("csrc/cuda/gaussians_project_gradient.cu", "quaternions are taken to be of length 1",
     "(d_quat[i] - along * s.quat[i]) / s.length", "d_quat[i]", _GRADIENTS),
]  # fmt: skip

_FIELD = "tests/kernels/test_radiance_field.py -k emulated and backends_agree"

_RADIANCE_FIELD: list[Mistake] = [
    ("csrc/cuda/radiance_field.cu", "off-by-one: the last sample of each leaf is left out",
     "ceil(far / scene.step - jitter);", "ceil(far / scene.step - jitter) - 1;", _FIELD),
    ("csrc/cuda/radiance_field.cu", "what lies behind a run is not passed on", "notes.laters[noted] = later;",
     "notes.laters[noted] = 0;", _FIELD),
    ("csrc/cuda/radiance_field.cuh", "dropped clamp: the last interval is looked for behind the last entry",
     "scene.entries - 2);", "scene.entries - 1);", _FIELD),
    ("csrc/cuda/radiance_field.cuh", "wrong stride: the z axis reads the entries of y",
     "rows + 2 * axis_quads", "rows + axis_quads", _FIELD),
    ("csrc/cuda/radiance_field_gradient.cu", "every other sample is dropped: two lanes of a factor are not added",
     "if (kGroups == 2) sum +=", "if (kGroups == 3) sum +=", _FIELD),
    ("csrc/cuda/radiance_field_gradient.cu", "dropped mask: alphas that are clamped have a gradient",
     "shade.alpha < 0.999f", "shade.alpha < 2.0f", _FIELD),
    ("csrc/cuda/radiance_field_gradient.cu", "off-by-one window: the first entry of the next eight is left out",
     "entry >= -1 && entry", "entry >= 0 && entry", _FIELD),
    ("csrc/cuda/radiance_field_gradient.cu", "the scan of transmittances skips its first lane",
     "if (lane >= distance) product", "if (lane > distance) product", _FIELD),
]  # fmt: skip

_TEXTURE = "tests/kernels/test_texture.py -k emulated and (agree or share)"
_SILHOUETTES = "tests/kernels/test_silhouettes.py -k emulated and agree and 120"

_TEXTURES: list[Mistake] = [
    ("csrc/cuda/texture.cu", "off-by-one: the third texel of an odd side is left out of the next level",
     "column < 3; ++column", "column < 2; ++column", _TEXTURE),
    ("csrc/cuda/texture.cu", "wrong stride: every picture reads the first image's levels",
     "mips + (image * lookup.pyramid.texels + lookup", "mips + (lookup", _TEXTURE),
    ("csrc/cuda/texture.cu", "texels beyond the border count in the slopes",
     "sums[corner] *= T(corners.there[corner]);", "sums[corner] *= T(1);", _TEXTURE),
    ("csrc/cuda/texture_gradient.cu", "a chunk that ends in another place is taken for one that has been summed",
     "i % kTextureChunk == 0 && i + kTextureChunk <= run.y", "i % kTextureChunk == 0",
     "tests/kernels/test_texture.py -k emulated and share"),
    ("csrc/cuda/texture_gradient.cu", "wrong stride: all summed chunks are the first",
     "(4 * (i / kTextureChunk) + corner)", "corner", "tests/kernels/test_texture.py -k emulated and share"),
    ("csrc/cuda/texture_gradient.cu", "off-by-one: the last lookup of a run is left out",
     "runs[keys[i]].y = static_cast<int>(i + 1)", "runs[keys[i]].y = static_cast<int>(i)", _TEXTURE),
    ("csrc/cuda/texture_gradient.cu", "what wraps round from the last row is forgotten",
     "number < 16; ++number", "number < 12; ++number", _TEXTURE),
    ("csrc/cuda/texture_gradient.cu", "a level takes nothing of the second texel of the next one",
     "row < 2; ++row)\n      for (int column = 0; column < 2", "row < 2; ++row)\n      for (int column = 0; column < 1",
     _TEXTURE),
    ("csrc/cuda/silhouettes.cu", "dropped lane: the last steps of an edge are not added up",
     "int step = kLanes / 2;", "int step = kLanes / 4;", _SILHOUETTES),
    ("csrc/cuda/silhouettes.cu", "off-by-one: an edge does not look at the pixel in front of its crossing",
     "k = static_cast<int64_t>(crossing) - 1; k <=", "k = static_cast<int64_t>(crossing) + 1; k <=", _SILHOUETTES),
    ("csrc/cuda/silhouettes.cu", "only pixels above and left give",
     "if (row + 1 < height && shares[2 * pixel + 1] != 0)", "if (row + 2 < height && shares[2 * pixel + 1] != 0)",
     _SILHOUETTES),
    ("csrc/cuda/silhouettes.cu", "the two ends of an edge are taken for each other",
     "(edge + 1) % 3 == own ? crossed(far", "(edge + 1) % 3 != own ? crossed(far", _SILHOUETTES),
]  # fmt: skip

_HARMONICS = [
    ("csrc/cuda/gaussians_harmonics.cu", "off-by-one tile edge: the last Gaussian of a block is left out",
     "if (thread >= here) return;", "if (thread >= here - 1) return;"),
    ("csrc/cuda/gaussians_harmonics.cu", "wrong stride: every view reads the directions of the first",
     "direction_of(directions + at);\n    float basis[Sizes::count], value[3] = {0.5f, 0.5f, 0.5f};",
     "direction_of(directions + 3 * own);\n    float basis[Sizes::count], value[3] = {0.5f, 0.5f, 0.5f};"),
    ("csrc/cuda/gaussians_harmonics.cu", "the clamp lets gradients through",
     "value[channel] >= 0 ?", "value[channel] >= -9 ?"),
    ("csrc/cuda/gaussians_harmonics.cu", "gradients of the coefficients are those of the last view",
     "+= factor * slope[channel];", "= factor * slope[channel];"),
    ("csrc/include/spherical_harmonics.h", "a direction that is not finite is used",
     "return inverse > 0 ? component * inverse : T(0);", "return component * inverse;"),
]  # fmt: skip

MISTAKES: list[Mistake] = [
    *((*mistake, "tests/kernels/test_gaussians_harmonics.py -k emulated") for mistake in _HARMONICS),
    *_GAUSSIANS,
    *_MESH_RASTER,
    *_RADIANCE_FIELD,
    *_TEXTURES,
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
