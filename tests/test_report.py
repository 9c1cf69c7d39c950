"""benchmarks/report.py without a GPU, and without waiting for a benchmark: fake rows, and tiny tests that end badly."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record, report, table
from benchmarks.results import FORMAT, benchmark_parts, problems, summary_of_tests, validate


def entry(name: str, group: str, seconds: float, outcome: str = "passed", **info: Any) -> dict[str, Any]:
    """A recorded outcome with pytest-benchmark's record of a row."""
    implementation = info.pop("implementation", name)
    stats = {"min": 0.9 * seconds, "max": 2 * seconds, "mean": seconds, "median": seconds, "iqr": 0.1 * seconds}
    row = {
        "group": group,
        "name": f"test_{name}[x]",
        "fullname": f"benchmarks/bench_x.py::test_{name}[x]",
        "params": {"implementation": implementation},
        "extra_info": info,
        "stats": stats | {"rounds": 7, "ops": 1 / seconds},
    }
    return {"id": row["fullname"], "outcome": outcome, "reason": "", "row": row}


def entries() -> dict[str, dict[str, Any]]:
    found = [
        entry("copy", "machine: copy", 1e-3, implementation=None, rate="copy", **{"GB/s": 3000.0}),
        entry(
            "matmul", "machine: matmul", 1e-3, implementation=None, rate="matmul", dtype="float16", **{"GFLOP/s": 8e5}
        ),
        entry("a", "conv", 2e-3, implementation="trellis", dtype="float16", **{"GFLOP/s": 4e5, "peak MiB": 12.4}),
        entry("b", "conv", 6e-3, implementation="torch_taps", dtype="float16", **{"GFLOP/s": 1.3e5, "peak MiB": 50}),
        entry("c", "conv", 5e-3, implementation="torch_pairs", dtype="float16", **{"GFLOP/s": 1.6e5, "peak MiB": 70}),
        entry("d", "conv", 1e-3, implementation="reference", dtype="float16"),
        entry("e", "map", 5e-4, implementation="ours", dtype="float32", **{"GB/s": 600.0}),
        entry("f", "map", 5e-2, implementation="reference"),
        entry("g", "alone", 0.25, implementation="ours_varlen"),
    ]
    found += [
        {"id": "x::skipped", "outcome": "skipped", "reason": "could not import 'spconv'", "row": None},
        {"id": "x::late", "outcome": "skipped", "reason": record.NO_TIME, "row": None},
        {"id": "x::never", "outcome": "collected"},
        {"id": "x::wrong", "outcome": "failed", "reason": "AssertionError: 1 != 2\nmore", "row": None},
    ]
    return {item["id"]: item for item in found}


def fake_report(kind: str = "cuda") -> dict[str, Any]:
    gpu = kind == "cuda"
    return {
        "format": FORMAT,
        "created": "2027-01-02T03:04:05+00:00",
        "device": {"name": "NVIDIA H100 80GB HBM3", "kind": kind, "threads": 16, "capability": "9.0" if gpu else None,
                   "driver": "580.1" if gpu else None, "multiprocessors": 132, "memory GiB": 79.1},
        "machine": {"cpu": "Xeon", "cores": 16, "memory GiB": 128.0, "system": "Linux", "python": "3.12.3"},
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "numpy": "2.5.2", "nvcc": "13.0"},
        "commit": {"id": "0123456789abcdef", "dirty": True},
        "options": {"minutes": 10.0, "full": False, "selection": None},
        "steps": [{"name": "build", "status": "passed", "seconds": 1.5, "detail": ""}],
        "tests": summary_of_tests({}),
        **benchmark_parts(entries()),
    }  # fmt: skip


def test_rows_are_fractions_of_the_rates_of_the_same_run() -> None:
    parts = benchmark_parts(entries())
    assert parts["rates"] == {"copy": 3000.0, "matmul": {"float16": 8e5}}
    rows = {row["id"][-4:-3]: row for row in parts["rows"]}
    assert (rows["a"]["of matmul"], rows["a"]["of copy"], rows["e"]["of copy"]) == (0.5, None, 0.2)
    assert rows["e"]["of matmul"] is None  # no float32 matmul was measured
    assert [rows[name]["role"] for name in "abdg"] == ["ours", "peer", "reference", "ours"]
    assert (rows["a"]["median"], rows["a"]["iqr"], rows["a"]["rounds"], rows["a"]["peak MiB"]) == (2e-3, 2e-4, 7, 12.4)
    assert [row["role"] for row in parts["rows"][:2]] == ["rate", "rate"]


def test_what_did_not_run_is_listed_with_its_reason() -> None:
    parts = benchmark_parts(entries())
    assert {item["id"]: item["reason"] for item in parts["not run"]} == {
        "x::skipped": "could not import 'spconv'",
        "x::late": record.NO_TIME,
        "x::never": "not reached",
    }
    assert [item["id"] for item in parts["failed"]] == ["x::wrong"]
    tests = summary_of_tests(entries())
    assert (tests["passed"], tests["skipped"]) == (9, 1)
    assert [item["id"] for item in tests["not run"]] == ["x::late", "x::never"]


def test_gpu_table() -> None:
    lines = table.table(fake_report()).splitlines()
    assert lines[2] == "| conv | 2 ms, 12 MiB | torch pairs: 5 ms, 70 MiB | 2.5x | 50 % |  |"
    assert lines[3] == "| map | 0.5 ms | reference: 50 ms | 100.0x |  | 20 % |"
    assert lines[4] == "| alone | 250 ms | none |  |  |  |"
    assert lines[6] == (
        "NVIDIA H100 80GB HBM3, driver 580.1, torch 2.11.0, commit 0123456789 with changes, 2027-01-02; "
        "in the same run: copy 3.00 TB/s, matmul float16 800 TFLOP/s; median of the rounds, peak memory added."
    )


def test_cpu_table_gives_least_times_and_only_problems_with_a_peer() -> None:
    lines = table.table(fake_report("cpu")).splitlines()
    assert lines[2] == "| conv | 1.8 ms, 12 MiB | torch pairs: 4.5 ms, 70 MiB | 2.5x |"
    assert not any("alone" in line for line in lines)


def test_only_the_part_between_the_marks_changes(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    text = "a\n{}\nold cpu\n{}\nb\n{}\nold gpu\n{}\nc\n".format(*table.MARKS["cpu"], *table.MARKS["cuda"])
    readme.write_text(text)
    table.write_into(readme, fake_report())
    new = readme.read_text()
    assert new.startswith(text.partition("old gpu")[0])
    assert new.endswith(f"{table.MARKS['cuda'][1]}\nc\n")
    assert "old gpu" not in new
    assert "| conv |" in new
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="gpu benchmarks: begin"):
        table.write_into(readme, fake_report())
    assert readme.read_text() == "no marks"


def test_readme_has_both_marks() -> None:
    text = table.README.read_text()
    assert all(text.count(mark) == 1 for pair in table.MARKS.values() for mark in pair)


def test_a_report_passes_its_own_check_and_survives_json() -> None:
    assert validate(json.loads(json.dumps(fake_report()))) == []
    assert list(problems(fake_report()))[2:] == ["conv", "map", "alone"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda r: r.pop("commit"), "report.commit is missing"),
        (lambda r: r["rows"][0].pop("median"), "report.rows[0].median is missing"),
        (lambda r: r["rows"][1].update(median=float("nan")), "report.rows[1].median must be finite; got nan"),
        (lambda r: r["rows"][1].update(rounds="7"), "report.rows[1].rounds must be int; got '7'"),
        (lambda r: r["rows"][1].update(rounds=True), "report.rows[1].rounds must be int; got True"),
        (lambda r: r.update(rows={}), "report.rows must be a list; got {}"),
        (lambda r: r.update(format=2), "format must be 1; got 2"),
        (lambda r: r["rows"][1].update(min=1.0), "0 < min <= median must hold"),
        (lambda r: r["rows"].append(r["rows"][0]), "two rows are called benchmarks/bench_x.py::test_copy[x]"),
        (lambda r: r["failed"].append({"id": r["rows"][0]["id"], "reason": ""}), "has a row and is listed as failed"),
    ],
)
def test_the_check_finds_what_is_wrong(spoil: Any, complaint: str) -> None:
    spoiled = fake_report()
    spoil(spoiled)
    assert any(complaint in line for line in validate(spoiled)), validate(spoiled)


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    record.append(path, [{"id": "a", "outcome": "collected"}, {"id": "a", "outcome": "passed"}])
    with path.open("a") as file:
        file.write('{"id": "b", "outc')
    assert record.read(path) == {"a": {"id": "a", "outcome": "passed"}}


ENDS_BADLY = """
import os, signal, time, pytest
def test_first(): pass
def test_dies(): os.kill(os.getpid(), signal.SIGKILL)
def test_after_it(): pass
def test_wrong(): assert 1 == 2
def test_skips(): pytest.skip("no peer")
def test_lost(): pytest.exit("GPU", returncode=86)
def test_hangs(): time.sleep(60)
def test_last(): pass
"""


def test_tests_that_end_their_process_cost_only_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "STALL", 4.0)
    (tmp_path / "test_some.py").write_text(ENDS_BADLY)
    path = tmp_path / "rows.jsonl"
    step = report.supervise("some", [str(tmp_path), "-p", "no:cacheprovider"], path, time.monotonic() + 60)
    outcomes = {name.rpartition("_")[2]: (e["outcome"], e["reason"]) for name, e in record.read(path).items()}
    assert outcomes == {
        "first": ("passed", ""),
        "dies": ("failed", "its process ended with status -9"),
        "it": ("passed", ""),
        "wrong": ("failed", "assert 1 == 2"),
        "skips": ("skipped", "no peer"),
        "lost": ("failed", "its process ended with status 86"),
        "hangs": ("failed", "no end within 4 s"),
        "last": ("passed", ""),
    }
    assert (step.status, step.detail.partition(";")[0]) == ("failed", "3 passed, 4 failed, 1 skipped")


def test_what_does_not_fit_the_time_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "GRACE", 0.5)
    body = "import time\ndef test_slow(): time.sleep(60)\ndef test_next(): pass\n"
    (tmp_path / "test_some.py").write_text(body)
    path = tmp_path / "rows.jsonl"
    step = report.supervise("some", [str(tmp_path), "-p", "no:cacheprovider"], path, time.monotonic() + 6)
    parts = benchmark_parts(record.read(path))
    assert step.status == "out of time"
    assert parts["failed"] == []
    assert [item["reason"] for item in parts["not run"]] == [record.NO_TIME, "not reached"]


def test_a_file_that_cannot_be_collected_is_a_failure_and_the_rest_runs(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("import no_such_module\n")
    (tmp_path / "test_b.py").write_text("def test_b(): pass\n")
    step = report.supervise("some", [str(tmp_path), "-p", "no:cacheprovider"], tmp_path / "r", time.monotonic() + 60)
    assert (step.status, step.detail) == ("failed", "1 passed, 1 failed, 0 skipped")


@pytest.mark.parametrize("failing", [False, True])
def test_every_step_runs_and_the_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    def supervise(name: str, arguments: list[str], path: Path, end: float) -> report.Step:
        kept = [e for e in entries().values() if failing or e["outcome"] != "failed"]
        record.append(path, kept)
        return report.Step(name, "failed" if failing else "passed", 1.0, "")

    monkeypatch.setattr(report, "supervise", supervise)
    monkeypatch.setattr(report, "BUILD", ["false" if failing else "true"])
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text("{}\n{}\n{}\n{}\n".format(*table.MARKS["cpu"], *table.MARKS["cuda"]))
    status = report.main(["--out", str(tmp_path / "out"), "--readme", str(readme), "--minutes", "1"])
    assert status == int(failing)
    (written,) = (tmp_path / "results").glob("*.json")
    found = json.loads(written.read_text())
    assert validate(found) == []
    assert json.loads((tmp_path / "out" / written.name).read_text()) == found
    assert "| conv |" in (tmp_path / "out" / written.with_suffix(".md").name).read_text()
    assert "| conv |" in readme.read_text()
    assert found["steps"][0]["status"] == ("failed" if failing else "passed")
    assert [step["name"] for step in found["steps"]] == ["build", "gpu tests", "benchmarks"]


def test_a_selection_replaces_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["-k", "conv"])
    assert "-k needs --out" in capsys.readouterr().err
