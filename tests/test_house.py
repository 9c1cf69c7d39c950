"""The rules of the house that a machine can check."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

from trellis_kernels import OPERATORS

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent.name for path in (ROOT / "trellis_kernels").glob("*/reference.py"))
CODE = [
    path
    for folder in ("csrc", "trellis_kernels", "trellis", "benchmarks", "tests", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}
]
CPU_ONLY = {"voxelize"}  # rooms whose CUDA kernels are still to come
TOP = {"pyproject.toml", "setup.py", "csrc", "trellis_kernels", "trellis", "benchmarks", "tests", "README.md"}
MORE = {".ci", "docs", "examples", "LICENSE", "CHANGELOG.md", "Makefile"}
# GPL, AGPL or non-commercial, or what wraps them; named because their metadata does not always say so.
FORBIDDEN = {
    "igraph", "python-igraph", "pymeshfix", "plyfile", "pymeshlab", "nvdiffrast", "diff-gaussian-rasterization",
    "diffoctreerast", "kaolin", "pyvista-meshfix",
}  # fmt: skip
COPYLEFT = re.compile(r"\b(?<!l)(a?gpl|gnu (affero )?general public)|non-?commercial|cc-by-nc", re.IGNORECASE)


def test_top_level_is_the_design_card() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = {line.split("/")[0] for line in tracked.splitlines()} or {path.name for path in ROOT.iterdir()}
    assert names >= TOP
    visible = {name for name in names if not name.startswith(".")}
    assert visible <= TOP | MORE


def test_no_file_is_longer_than_400_lines() -> None:
    long = {str(path.relative_to(ROOT)): n for path in CODE if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_its_reference_kernel_test_and_benchmark(room: str) -> None:
    wanted = [
        f"trellis_kernels/{room}/__init__.py",
        f"trellis_kernels/{room}/reference.py",
        f"trellis_kernels/{room}/cpu.py",
        f"csrc/cpu/{room}.h",
        f"tests/kernels/test_{room}.py",
        f"benchmarks/bench_{room}.py",
    ]
    assert [name for name in wanted if not (ROOT / name).is_file()] == []
    sources = [path for path in (ROOT / "csrc/cpu").glob("*.cpp") if path.name != "bindings.cpp"]
    assert any(f'#include "{room}.h"' in path.read_text() for path in sources)


@pytest.mark.parametrize("room", ROOMS)
def test_every_gpu_kernel_is_tested_on_machines_without_a_gpu(room: str) -> None:
    """A CUDA room has its source, is emulated and mutated; a Triton room is interpreted and compiled ahead of time."""
    tests = "".join(path.read_text() for path in (ROOT / "tests/kernels").glob("*.py"))
    if (ROOT / f"trellis_kernels/{room}/cuda.py").is_file():
        assert (ROOT / f"csrc/cuda/{room}.cu").is_file()
        mistakes = (ROOT / "tests/mutations.py").read_text() + (ROOT / "tests/mutations_render.py").read_text()
        assert f'"csrc/cuda/{room}' in mistakes
        assert "CUDA_BACKENDS" in (ROOT / f"tests/kernels/test_{room}.py").read_text()
    if (ROOT / f"trellis_kernels/{room}/triton.py").is_file():
        assert "TRITON_BACKENDS" in tests
        assert f"tests.kernels.aot_{room}:" in tests


def test_rooms_are_those_of_the_plan() -> None:
    assert {
        "attention",
        "gaussians",
        "mesh_extraction",
        "normalization",
        "serialization",
        "sparse_conv",
        "voxel_hash",
    } <= set(ROOMS)


def test_every_operator_has_its_kernels_and_belongs_to_a_room() -> None:
    assert len(OPERATORS) > 10
    for name, operator in OPERATORS.items():
        room = _room(operator.kernels)
        assert operator.kernels.get("cpu", "").split(".")[:2] == ["trellis_kernels", room], name
        if room in CPU_ONLY:
            continue
        assert operator.kernels.get("cuda") in {f"trellis_kernels.{room}.cuda", f"trellis_kernels.{room}.triton"}, name


def _room(kernels: dict[str, str]) -> str:
    return next((room for room in ROOMS if kernels.get("cpu") == f"trellis_kernels.{room}.cpu"), "no room")


def test_no_dependency_is_forbidden_or_copyleft() -> None:
    """Declared dependencies, and what they need in turn as far as it is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    pending = [Requirement(text).name for text in declared]
    seen: set[str] = set()
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        assert name not in FORBIDDEN, f"{name} is not permissively licensed"
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        meta = distribution.metadata
        classifiers = [c for c in meta.get_all("Classifier", []) if c.startswith("License")]
        licence = " ".join(
            [meta.get("License-Expression") or (meta.get("License") or "").partition("\n")[0], *classifiers]
        )
        permissive_choice = " OR " in licence  # a choice that includes a permissive one
        assert permissive_choice or not COPYLEFT.search(licence.replace("LGPL", "")), f"{name}: {licence}"
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name)


def test_nothing_reads_environment_variables_or_the_global_seed() -> None:
    """Only setup.py may read the environment, and only tests and benchmarks may seed the global generator."""
    offenders = []
    for path in CODE:
        if path.suffix != ".py" or path.relative_to(ROOT).parts[0] not in ("trellis", "trellis_kernels"):
            continue
        text = path.read_text()
        words = {"os.environ", "os.getenv", "torch.manual_seed", "np.random.seed", "pickle.load", "torch.hub.load"}
        if path.name == "background.py":
            words.remove("os.environ")  # rembg's own variables say where its model file is
        for word in words:
            if word in text:
                offenders.append(f"{path.relative_to(ROOT)}: {word}")
    assert offenders == []


def test_no_exception_is_swallowed() -> None:
    for path in CODE:
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("trellis", "trellis_kernels"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ExceptHandler):
                    assert node.type is not None, f"{path}:{node.lineno}: bare except"
                    if isinstance(node.body[0], ast.Pass):
                        line = path.read_text().splitlines()[node.body[0].lineno - 1]
                        assert "#" in line, f"{path}:{node.lineno}: an ignored error must say why"
                        assert ast.unparse(node.type) not in ("Exception", "BaseException")


def test_import_is_light() -> None:
    """`import trellis` brings in no triton, no transformers and no native module; every public name resolves."""
    program = (
        "import torch, sys; before = set(sys.modules); import trellis;"
        "new = set(sys.modules) - before;"
        "assert not {'triton', 'transformers', 'trellis_kernels._cpu', 'cv2', 'trimesh'} & new, new;"
        "[getattr(trellis, name) for name in trellis.__all__];"
        "assert not {'transformers', 'trellis_kernels._cpu', 'cv2'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_instruction_set_objects_leave_no_weak_symbols() -> None:
    """Code compiled for AVX-512 must not be what the linker picks for everyone (see csrc/include/cpu_features.h)."""
    objects = [p for p in ROOT.glob("build/temp*/csrc/cpu/*.o") if p.stem.endswith(("_avx2", "_avx512"))]
    if not objects:
        pytest.skip("no object files here: build with `python setup.py build_ext --inplace`")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)]
        assert weak == [], f"{path.name}: {weak[:3]}"
