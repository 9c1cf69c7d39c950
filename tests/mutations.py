"""Break each GPU kernel on purpose and see its tests fail: ``python -m tests.mutations [WORD]``.

Every mutation is one replacement in one source file. It is made in a copy of the project; then the tests named with it
must fail. A mutation that survives means a test is missing. With a word, only mutations whose file or meaning has it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.mutations_render import MISTAKES

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Args:
        meaning: what kind of mistake it is.
        file: where.
        old: text that occurs there once.
        new: what it becomes.
        tests: arguments of pytest that must fail.
    """

    meaning: str
    file: str
    old: str
    new: str
    tests: str


_VOXEL_HASH = "tests/kernels/test_voxel_hash.py -k emulated"
_MESH_VALUES = "tests/kernels/test_mesh_extraction.py -k agrees_with_the_reference and emulated and float64"
_MESH_TOPOLOGY = "tests/kernels/test_mesh_extraction.py -k test_topology and emulated and float32"
_SERIALIZATION = "tests/kernels/test_serialization.py -k emulated"
_ATTENTION = "tests/kernels/test_attention_gpu.py -k interpreter"
_GAUSSIANS = "tests/kernels/test_gaussians_gpu.py -k emulated"
_SPARSE_CONV = "tests/kernels/test_sparse_conv_gpu.py -k interpreter and (agree_with_references or plan_agrees)"
_RESAMPLING = "tests/kernels/test_resampling.py -k interpreter"

# File, meaning, the text that occurs once, what it becomes, tests.
_SPARSE_CONV_MISTAKES = [
    ("triton_gather", "wrong stride: gathered rows are one channel too long",
     "feats + source[:, None] * in_channels", "feats + source[:, None] * (in_channels + 1)", _SPARSE_CONV),
    ("triton_gather", "off-by-one tile edge: the last row is left out",
     "inside = position < rows", "inside = position < rows - 1", _SPARSE_CONV),
    ("triton_gather", "dropped tap mask: only taps that all rows of a tile have are visited",
     "return a | b", "return a & b", _SPARSE_CONV),
    ("triton_gather", "the second tile of columns reads the weights of the first",
     "(BLOCK_N + tl.arange(0, BLOCK_T))[None, :] * weight", "tl.arange(0, BLOCK_T)[None, :] * weight", _SPARSE_CONV),
    ("triton_gather", "the kernel is not turned round in the input gradient",
     "columns - 1 - tap if MIRRORED else tap", "tap", _SPARSE_CONV),
    ("triton_gather", "wrong stride: taps are summed z slowest for the children",
     "tap = (kx * 3 + ky) * 3 + kz", "tap = (kz * 3 + ky) * 3 + kx", _SPARSE_CONV),
    ("triton_pairs", "off-by-one block: pairs looked up ahead are those of one block before",
     "_listed(lists, block + 2,", "_listed(lists, block + 1,", _SPARSE_CONV),
    ("triton_pairs", "the gradient of a child goes to its neighbor's tap",
     "(tap % 3 > child % 2)", "(tap % 3 >= child % 2)", _SPARSE_CONV),
    ("triton_plan", "off-by-one: lists of pairs begin one entry late",
     "tl.cumsum(present, 0) - 1", "tl.cumsum(present, 0)", _SPARSE_CONV),
    ("triton_rows", "the last row of a coarse voxel is left out",
     "range(begin, end)", "range(begin, end - 1)", _RESAMPLING),
]  # fmt: skip

_NORMALIZATION = "tests/kernels/test_normalization_gpu.py -k interpreter"
_NORMALIZATION_MISTAKES = (
    ("triton_rows", "wrong stride: every segment has the gate of the first",
     "tl.load(gate + segment * gate_stride + column", "tl.load(gate + column"),
    ("triton_rows", "off-by-one edge: a segment begins one row late",
     "found = tl.load(offsets + middle) <= row", "found = tl.load(offsets + middle) < row"),
    ("triton_rows", "dropped mask: columns past the last count in the variance",
     "centered = tl.where(mask, value - mean[:, None], 0.0)", "centered = value - mean[:, None]"),
    ("triton_rows", "the last tile of a slice is left out of the sums",
     "return first, tl.minimum(first + each, end)", "return first, tl.minimum(first + each - ROWS, end)"),
    ("triton_heads", "keys are scaled by the gamma of the queries, in the gradient",
     "    if part == 1:\n        own = second_gamma\n    own_gamma", "    own_gamma"),
    ("triton_heads", "off-by-one edge: the last row of heads is not written",
     "mask = (row < rows)[:, None]", "mask = (row < rows - 1)[:, None]"),
)  # fmt: skip

MUTATIONS = [
    Mutation(
        "removed barrier: vertices are added up before their edges are weighed",
        "csrc/cuda/mesh_values.cu",
        "    betas[local][edge] = own.beta;\n  }\n  __syncthreads();",
        "    betas[local][edge] = own.beta;\n  }",
        _MESH_VALUES,
    ),
    Mutation(
        "off-by-one tile edge: the last point of a tile is left out",
        "csrc/cuda/mesh_values.cu",
        "item < kTilePoints * s.width",
        "item < (kTilePoints - 1) * s.width",
        _MESH_VALUES,
    ),
    Mutation(
        "a partial sum is read before all warps have written theirs",
        "csrc/cuda/mesh_surface.cuh",
        "partial[thread / 32] = value;\n  __syncthreads();",
        "partial[thread / 32] = value;",
        _MESH_VALUES,
    ),
    Mutation(
        "wrong stride: shares of the corners of a vertex",
        "csrc/cuda/mesh_gradient.cu",
        "work.corner_shares[8 * vertex + k]",
        "work.corner_shares[4 * vertex + k]",
        _MESH_VALUES,
    ),
    Mutation(
        "removed barrier: gradients of corners before all edges have said theirs",
        "csrc/cuda/mesh_gradient.cu",
        "  __syncthreads();\n  if (cell >= s.cell_count) return;",
        "  if (cell >= s.cell_count) return;",
        _MESH_VALUES,
    ),
    Mutation(
        "the first of a corner's three edges is forgotten",
        "csrc/cuda/mesh_gradient.cu",
        "T sdf_sum = 0, alpha_sum = 0, position[3] = {};\n    for (int i = 0;",
        "T sdf_sum = 0, alpha_sum = 0, position[3] = {};\n    for (int i = 1;",
        _MESH_VALUES,
    ),
    Mutation(
        "the other diagonal",
        "csrc/cuda/mesh_extraction.cu",
        "gammas[q.x] * gammas[q.z] >",
        "gammas[q.x] * gammas[q.z] <",
        _MESH_TOPOLOGY,
    ),
    Mutation(
        "removed atomic: a bit set by another thread is lost",
        "csrc/cuda/mesh_topology.cu",
        "if ((*word & bits) != bits) atomicOr(word, bits);",
        "const Word old = *word; __nanosleep(1); *word = old | bits;",
        _MESH_TOPOLOGY,
    ),
    Mutation(
        "off-by-one edge: the point above the last cell of a word of 64 is lost",
        "csrc/cuda/mesh_topology.cu",
        "if (at.segment > 0) word |=",
        "if (at.segment > 1) word |=",
        _MESH_TOPOLOGY,
    ),
    Mutation(
        "wrong stride: vertices start where those of the next word do",
        "csrc/cuda/mesh_fill_topology.cu",
        "sums[set.capacity + before]",
        "sums[set.capacity + index]",
        _MESH_TOPOLOGY,
    ),
    Mutation(
        "a lane too few takes part in the mean of a point",
        "csrc/cuda/mesh_topology.cu",
        "__shfl_sync(kAll, value, k, 8)",
        "__shfl_sync(kAll, value, k, 4)",
        _MESH_TOPOLOGY,
    ),
    Mutation(
        "removed barrier: a batch is blended before it is in shared memory",
        "csrc/cuda/gaussians.cu",
        "    __syncthreads();\n",
        "",
        _GAUSSIANS,
    ),
    Mutation(
        "removed barrier: a batch overwrites one that others still blend",
        "csrc/cuda/gaussians.cu",
        "    if (__syncthreads_count(finished) == kThreads) break;",
        "    if (kThreads < 0) break;",
        _GAUSSIANS,
    ),
    Mutation(
        "off-by-one tile edge: the last tile of a box is left out",
        "csrc/cuda/gaussians_project.cu",
        "whole_tile((s.x + reach_x) / kTile + 1, across)",
        "whole_tile((s.x + reach_x) / kTile, across)",
        _GAUSSIANS,
    ),
    Mutation(
        "off-by-one tile edge: a patch of pixels ends one too early",
        "csrc/cuda/gaussians.cuh",
        "x1 = x0 + static_cast<float>(width - 1)",
        "x1 = x0 + static_cast<float>(width - 2)",
        _GAUSSIANS,
    ),
    Mutation(
        "wrong stride: of a splat, half its size",
        "csrc/cuda/gaussians.cu",
        "in.splats + int64_t{slot} * kSplat",
        "in.splats + int64_t{slot} * (kSplat - 4)",
        _GAUSSIANS,
    ),
    Mutation(
        "a tile's list begins one entry late",
        "csrc/cuda/gaussians.cu",
        "begin = in.starts[list];",
        "begin = in.starts[list] + 1;",
        _GAUSSIANS,
    ),
    Mutation(
        "wrong stride: the batch lands one bit too low",
        "csrc/cuda/serialization.cu",
        "<< 3 * bits",
        "<< (3 * bits - 1)",
        _SERIALIZATION,
    ),
    Mutation(
        "off-by-one tile edge: the first thread of each block is skipped",
        "csrc/cuda/serialization.cu",
        "int64_t{blockIdx.x} * kThreads + threadIdx.x;",
        "int64_t{blockIdx.x} * kThreads + threadIdx.x + 1;",
        _SERIALIZATION,
    ),
    Mutation(
        "a level of the curve is left out",
        "csrc/cuda/serialization.cu",
        "level = bits - 1; level > 0",
        "level = bits - 1; level > 1",
        _SERIALIZATION,
    ),
    Mutation(
        "removed atomic: two threads may both be the first of a coarse voxel",
        "csrc/cuda/voxel_hash_resample.cu",
        "first = !(atomicOr(&table.slots[slot].occupied, run.bit()) & run.bit());",
        "first = !(table.slots[slot].occupied & run.bit());\n    atomicOr(&table.slots[slot].occupied, run.bit());",
        _VOXEL_HASH,
    ),
    Mutation(
        "removed atomic: two threads may both take an empty slot",
        "csrc/cuda/voxel_hash.cuh",
        "there = atomicCAS(slot, Word{0}, key);",
        "atomicExch(slot, key);",
        _VOXEL_HASH,
    ),
    Mutation(
        "removed barrier: shares are read before they are known",
        "csrc/cuda/voxel_hash.cuh",
        "  __syncthreads();\n  const int start = starts[warp]",
        "  const int start = starts[warp]",
        _VOXEL_HASH,
    ),
    Mutation(
        "removed barrier: neighbors are read before they are staged",
        "csrc/cuda/voxel_hash_resample.cu",
        "  __syncthreads();\n",
        "",
        _VOXEL_HASH,
    ),
    Mutation(
        "off-by-one tile edge: the last voxel of a tile is not staged",
        "csrc/cuda/voxel_hash_resample.cu",
        "i < size * kTaps;",
        "i < (size - 1) * kTaps;",
        _VOXEL_HASH,
    ),
    Mutation(
        "wrong stride: voxels of a tile are written one quad apart",
        "csrc/cuda/voxel_hash_resample.cu",
        "(first + voxel) * kQuads + quad",
        "(first + voxel) * (kQuads - 1) + quad",
        _VOXEL_HASH,
    ),
    Mutation(
        "a probe does not go round the end of the table",
        "csrc/cuda/voxel_hash.cu",
        "at = at + 1 < table.capacity ? at + 1 : 0;",
        "if (++at == table.capacity) break;",
        _VOXEL_HASH,
    ),
    Mutation(
        "the last entries of a map whose size is no multiple of four are left out",
        "csrc/cuda/voxel_hash.cu",
        "if (i < entries - first)",
        "if (i + 1 < entries - first)",
        _VOXEL_HASH,
    ),
    Mutation(
        "off-by-one tile edge: a sequence that ends inside a tile loses a slot",
        "trellis_kernels/attention/triton_tiles.py",
        "// BLOCK + middle <= slot",
        "// BLOCK + middle - 1 <= slot",
        _ATTENTION,
    ),
    Mutation(
        "dropped mask: keys past the end of the sequence count",
        "trellis_kernels/attention/triton_forward.py",
        'logits = tl.where((positions < end)[None, :], logits, float("-inf"))',
        "pass",
        _ATTENTION,
    ),
    Mutation(
        "the running sum is not corrected when a higher logit comes",
        "trellis_kernels/attention/triton_forward.py",
        "total = total * correction + ",
        "total = total + ",
        _ATTENTION,
    ),
    Mutation(
        "wrong stride: heads of the log-sum-exp are read one row apart",
        "trellis_kernels/attention/triton_backward.py",
        "logarithm = tl.load(logsumexp + row * heads,",
        "logarithm = tl.load(logsumexp + row,",
        _ATTENTION,
    ),
    Mutation(
        "dropped mask: in the gradient, keys past the end have a probability",
        "trellis_kernels/attention/triton_backward.py",
        "        probability = tl.where((positions < end)[None, :], probability, 0.0)",
        "        pass",
        _ATTENTION,
    ),
    Mutation(
        "the last columns of heads of 80 are left out of the logits",
        "trellis_kernels/attention/triton_tiles.py",
        "total = add_product(a_tail, tl.trans(b_tail), total, WIDEN)",
        "pass",
        _ATTENTION,
    ),
    Mutation(
        "tiles of keys begin one tile late in the gradients of keys",
        "trellis_kernels/attention/triton_backward.py",
        "for start in tl.range(begin, whole, BLOCK_Q):",
        "for start in tl.range(begin + BLOCK_Q, whole, BLOCK_Q):",
        _ATTENTION,
    ),
    *(
        Mutation(meaning, f"trellis_kernels/sparse_conv/{file}.py", old, new, tests)
        for file, meaning, old, new, tests in _SPARSE_CONV_MISTAKES
    ),
    *(
        Mutation(meaning, f"trellis_kernels/normalization/{file}.py", old, new, _NORMALIZATION)
        for file, meaning, old, new in _NORMALIZATION_MISTAKES
    ),
    *(Mutation(meaning, file, old, new, tests) for file, meaning, old, new, tests in MISTAKES),
]


def survives(mutation: Mutation, copy: Path) -> tuple[bool, str]:
    """Whether the tests pass in spite of the mistake, and the first failure."""
    path = copy / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.file} must hold once: {mutation.old!r}; it occurs {text.count(mutation.old)} times"
        )
    path.write_text(text.replace(mutation.old, mutation.new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *_split(mutation.tests)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    path.write_text(text)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutation.meaning}: pytest could not run\n{done.stdout[-3000:]}")
    failure = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    return done.returncode == 0, failure[1] if failure else ""


def _split(tests: str) -> list[str]:
    arguments, _, words = tests.partition(" -k ")
    return [*arguments.split(), *(["-k", words] if words else [])]


def main() -> int:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "trellis")
        skip = shutil.ignore_patterns(".git", "temp*", "lib*", "__pycache__", "pretrained", "results")
        shutil.copytree(ROOT, copy, ignore=skip)
        for mutation in MUTATIONS:
            if word in mutation.file or word in mutation.meaning:
                survived, failure = survives(mutation, copy)
                survivors += survived
                outcome = "SURVIVED" if survived else f"caught by {failure.rpartition('/')[2]}"
                sys.stdout.write(f"{mutation.file}: {mutation.meaning}: {outcome}\n")
                sys.stdout.flush()
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
