"""What can be read off the launches of GPU kernels without running them: they do not make the host wait."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from tests.support.pretend_cuda import DATA_SIZED
from trellis_kernels import OPERATORS

MODULES = sorted({operator.kernels["cuda"] for operator in OPERATORS.values() if "cuda" in operator.kernels})
# Methods that read a tensor's values back, or whose result's size depends on them.
WAITING = {
    *("item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"),
    *("bincount", "histc", "equal", "allclose", "synchronize"),
}

# Their outputs do not depend on data, but the size of a list in between does; the launch says what it costs.
SIZES_INSIDE = {"rasterize_gaussians", "rasterize_gaussians_backward", "render_radiance_field_gradient"}


def waiting_functions(path: Path) -> dict[str, list[str]]:
    """Function -> the waiting calls in it, with those of the functions of the module that it calls."""
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}

    def waits(name: str, seen: frozenset[str]) -> list[str]:
        found = []
        for node in ast.walk(functions[name]):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if isinstance(node.func, ast.Attribute) and called in WAITING:
                found.append(f"{called} in line {node.lineno}")
            if called in ("int", "bool", "float") and node.args and isinstance(node.args[0], ast.Subscript | ast.Call):
                found.append(f"{called}() in line {node.lineno}")
            if called == "repeat_interleave" and not any(k.arg == "output_size" for k in node.keywords):
                found.append(f"{called} in line {node.lineno}")
            if called == "tensor" and any(k.arg == "device" for k in node.keywords):
                found.append(f"torch.tensor copied to the device in line {node.lineno}")
            if called in functions and called not in seen:
                found += waits(called, seen | {called})
        return found

    return {name: waits(name, frozenset({name})) for name in functions}


@pytest.mark.parametrize("module", MODULES)
def test_only_launches_that_size_their_output_from_data_wait(module: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    operators = {operator.name for operator in OPERATORS.values() if operator.kernels.get("cuda") == module}
    found = waiting_functions(Path(spec.origin))
    for path in Path(spec.origin).parent.glob("cuda_*.py"):  # the rest of the launches of a large room
        found |= waiting_functions(path)
    waiting = {name: calls for name, calls in found.items() if name in operators and calls}
    assert set(waiting) <= DATA_SIZED | SIZES_INSIDE, waiting


def test_a_waiting_call_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "launch.py"
    functions = ("one(x):\n    return two(x)", "two(x):\n    return x.sum().item()", "none(x):\n    return x")
    path.write_text("\n\n".join(f"def {function}" for function in functions))
    assert waiting_functions(path) == {"one": ["item in line 5"], "two": ["item in line 5"], "none": []}
