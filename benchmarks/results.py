"""The JSON a report writes: put together from recorded outcomes (record.py), and checked.

A row is one implementation of one problem. Its times are in seconds; "of matmul" and "of copy" are its rates over what
a matmul of the same dtype and a copy reached in the same run (bench_machine.py), or None where it has no such rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from benchmarks.record import NO_TIME

FORMAT = 1
NOT_REACHED = "not reached"
OURS = re.compile(r"(trellis|ours)(_|$)")
NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))
TEXT = (str, type(None))
_OUTCOME = {"id": str, "reason": str}
SCHEMA = {
    "format": int,
    "created": str,
    "device": {
        "name": str,
        "kind": str,
        "threads": int,
        "capability": TEXT,
        "driver": TEXT,
        "multiprocessors": (int, type(None)),
        "memory GiB": NUMBER,
    },
    "machine": {"cpu": str, "cores": int, "memory GiB": NUMBER, "system": str, "python": str},
    "versions": {"torch": str, "triton": TEXT, "cuda": TEXT, "numpy": str, "nvcc": TEXT},
    "commit": {"id": TEXT, "dirty": (bool, type(None))},
    "options": {"minutes": NUMBER, "full": bool, "selection": TEXT},
    "steps": [{"name": str, "status": str, "seconds": NUMBER, "detail": str}],
    "rates": {"copy": OPTIONAL_NUMBER, "matmul": dict},
    "tests": {"passed": int, "skipped": int, "failed": [_OUTCOME], "not run": [_OUTCOME]},
    "rows": [
        {
            "id": str,
            "problem": str,
            "implementation": str,
            "role": str,
            "dtype": TEXT,
            "median": NUMBER,
            "iqr": NUMBER,
            "min": NUMBER,
            "rounds": int,
            "peak MiB": OPTIONAL_NUMBER,
            "GFLOP/s": OPTIONAL_NUMBER,
            "GB/s": OPTIONAL_NUMBER,
            "of matmul": OPTIONAL_NUMBER,
            "of copy": OPTIONAL_NUMBER,
            "more": dict,
        }
    ],
    "failed": [_OUTCOME],
    "not run": [_OUTCOME],
}
_KNOWN = {"peak MiB", "GFLOP/s", "GB/s", "dtype", "rate", "implementation"}


def benchmark_parts(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """ "rates", "rows", "failed" and "not run" of a report, from the recorded outcomes of the benchmarks."""
    raw = [entry["row"] for entry in entries.values() if entry.get("row")]
    # "rate" of a row: "copy" or "matmul", of the machine, or anything else for a row that is nobody's peer
    rates: dict[str, Any] = {"copy": None, "matmul": {}}
    for row in raw:
        info = row["extra_info"]
        if info.get("rate") == "copy":
            rates["copy"] = info["GB/s"]
        elif info.get("rate") == "matmul":
            rates["matmul"][info["dtype"]] = info["GFLOP/s"]
    return {"rates": rates, "rows": [_row(row, rates) for row in raw], **_without_row(entries)}


def summary_of_tests(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """ "tests" of a report, from the recorded outcomes of ``pytest -m gpu``."""
    passed = [name for name, entry in entries.items() if entry["outcome"] == "passed"]
    rest = _without_row(entries)
    missed = [outcome for outcome in rest["not run"] if outcome["reason"] in (NO_TIME, NOT_REACHED)]
    skipped = len(rest["not run"]) - len(missed)  # those that skip themselves are counted, those not reached named
    return {"passed": len(passed), "skipped": skipped, "failed": rest["failed"], "not run": missed}


def problems(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each problem, in the order they ran."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault(row["problem"], []).append(row)
    return groups


def validate(report: Any) -> list[str]:
    """What is wrong with a report; empty if nothing is."""
    wrong = list(_mismatches(report, SCHEMA, "report"))
    if wrong:
        return wrong
    if report["format"] != FORMAT:
        wrong.append(f"format must be {FORMAT}; got {report['format']}")
    names = [row["id"] for row in report["rows"]]
    wrong += [f"two rows are called {name}" for name in sorted({name for name in names if names.count(name) > 1})]
    for row in report["rows"]:
        if not 0 < row["min"] <= row["median"]:
            wrong.append(f"{row['id']}: 0 < min <= median must hold; got {row['min']}, {row['median']}")
        if row["rounds"] < 1 or row["iqr"] < 0:
            wrong.append(f"{row['id']}: rounds must be positive and iqr not negative")
    listed = {outcome["id"] for key in ("failed", "not run") for outcome in report[key]}
    wrong += [f"{name} has a row and is listed as failed or not run" for name in sorted(listed & set(names))]
    return wrong


def _row(row: Mapping[str, Any], rates: Mapping[str, Any]) -> dict[str, Any]:
    info, stats = row["extra_info"], row["stats"]
    name = str(info.get("implementation") or (row.get("params") or {}).get("implementation") or _function(row))
    role = (
        "rate" if info.get("rate") else "ours" if OURS.match(name) else "reference" if name == "reference" else "peer"
    )
    matmul, copy = rates["matmul"].get(info.get("dtype")), rates["copy"]
    return {
        "id": row["fullname"],
        "problem": row["group"] or row["fullname"],
        "implementation": name.replace("_", " "),
        "role": "rate" if info.get("rate") else role,
        "dtype": info.get("dtype"),
        **{key: stats[key] for key in ("median", "iqr", "min", "rounds")},
        **{key: info.get(key) for key in ("peak MiB", "GFLOP/s", "GB/s")},
        "of matmul": _fraction(info.get("GFLOP/s"), matmul),
        "of copy": _fraction(info.get("GB/s"), copy),
        "more": {key: value for key, value in info.items() if key not in _KNOWN},
    }


def _function(row: Mapping[str, Any]) -> str:
    return row["name"].partition("[")[0].removeprefix("test_")


def _fraction(rate: float | None, limit: float | None) -> float | None:
    return None if rate is None or not limit else float(f"{rate / limit:.3g}")


def _without_row(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {"failed": [], "not run": []}
    for name, entry in entries.items():
        outcome = entry["outcome"]
        if outcome == "failed":
            found["failed"].append({"id": name, "reason": entry["reason"]})
        elif outcome == "skipped":
            found["not run"].append({"id": name, "reason": entry["reason"]})
        elif outcome != "passed":
            found["not run"].append({"id": name, "reason": NOT_REACHED})
    return found


def _mismatches(value: Any, wanted: Any, where: str) -> Any:
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            yield f"{where} must be an object; got {value!r}"
            return
        for key, inner in wanted.items():
            if key in value:
                yield from _mismatches(value[key], inner, f"{where}.{key}")
            else:
                yield f"{where}.{key} is missing"
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            yield f"{where} must be a list; got {value!r}"
            return
        for index, item in enumerate(value):
            yield from _mismatches(item, wanted[0], f"{where}[{index}]")
    else:
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
            yield f"{where} must be {' or '.join(kind.__name__ for kind in kinds)}; got {value!r}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{where} must be finite; got {value}"
