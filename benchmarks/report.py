"""Everything that a machine can tell about Trellis, in one command and ten minutes.

    python -m benchmarks.report                                # results/<device>.json and the README's table
    python -m benchmarks.report --minutes 9 --out $OUT         # and a copy of both, with the logs, in a folder
    python -m benchmarks.report -k sparse_conv --out /tmp/some # some rows only, to a folder only

Builds the native modules, runs ``pytest -m gpu`` (where there is a GPU), then every benchmark beside its peers, the
most important first, and writes what was measured. A step that fails is reported and the others still run. A test that
ends its process or leaves the GPU unusable costs that process only: the rest runs in a new one. What does not fit the
time is listed as not run. The exit status is 0 only if nothing failed. How to read the results: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine, record, table
from benchmarks.results import FORMAT, benchmark_parts, summary_of_tests, validate
from trellis.atomic import atomic_path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUILD = [sys.executable, "setup.py", "build_ext", "--inplace"]
SHARE_OF_TESTS = 0.35  # of the whole time, at most
FOR_WRITING = 5.0  # seconds
GRACE = 10.0  # seconds before the end in which nothing new begins
STALL = 150.0  # seconds without an outcome, after which a process hangs
PROCESSES = 8  # at most, to get past tests that end theirs
PYTEST_ENDED = (0, 1, 5)  # all passed, some failed, none there


class Step(NamedTuple):
    name: str
    status: str  # passed, failed, skipped, "out of time"
    seconds: float
    detail: str


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    end = time.monotonic() + 60 * options.minutes - FOR_WRITING
    with tempfile.TemporaryDirectory() as temporary:
        work = options.out or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        report = run(options, work, end)
    return finish(report, options)


def run(options: argparse.Namespace, work: Path, end: float) -> dict[str, Any]:
    """The three steps, and what came out."""
    gpu = torch.cuda.is_available()
    selection = ["-k", options.select] if options.select else []
    _say(f"{machine.device_facts()['name']}: {options.minutes:g} minutes")
    steps = [_command("build", BUILD, end)]
    _say_step(steps[-1])
    tests, rows = work / "tests.jsonl", work / "rows.jsonl"
    for path in (tests, rows):
        path.unlink(missing_ok=True)  # of an earlier run
    if gpu:
        until = min(end, time.monotonic() + SHARE_OF_TESTS * 60 * options.minutes)
        steps.append(supervise("gpu tests", ["tests", "-m", "gpu", *selection], tests, until))
    else:
        steps.append(Step("gpu tests", "skipped", 0.0, "no GPU here"))
    _say_step(steps[-1])
    full = ["--full"] if options.full else []
    steps.append(supervise("benchmarks", ["benchmarks", "--benchmark-only", *full, *selection], rows, end))
    _say_step(steps[-1])
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **machine.facts(),
        "commit": machine.commit(options.commit),
        "options": {"minutes": options.minutes, "full": options.full, "selection": options.select},
        "steps": [step._asdict() for step in steps],
        "tests": summary_of_tests(record.read(tests)),
        **benchmark_parts(record.read(rows)),
    }


def supervise(name: str, arguments: list[str], path: Path, end: float) -> Step:
    """Run pytest until each of its tests has an outcome in `path`, in new processes after those that die."""
    start, notes = time.monotonic(), []
    log = path.with_suffix(".log")
    status = "passed"
    with log.open("w") as output:
        for _ in range(PROCESSES):
            left = end - time.monotonic()
            if left <= 0:
                status = "out of time"
                break
            command = [sys.executable, "-m", "pytest", "-p", "benchmarks.record", "--record", str(path)]
            command += ["--minutes", f"{max(left - GRACE, 0) / 60:.3f}"]
            command += ["-q", "--tb=short", "--continue-on-collection-errors"]
            why = _watch(command + arguments, path, end, output)
            if why in PYTEST_ENDED:
                break
            status, blamed = "failed", _blame(path, why)
            if why == record.DEVICE_LOST:
                notes.append("the GPU did not answer after an error; went on in a new process")
            elif not blamed:
                notes.append(f"pytest ended with status {why}: {_tail(log)}")
                break
            if why == "out of time":
                status = why
                break
        else:
            status = "failed"
            notes.append(f"gave up after {PROCESSES} processes")
    outcomes = [entry["outcome"] for entry in record.read(path).values()]
    if "failed" in outcomes:
        status = "failed"
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in record.ENDED)
    return Step(name, status, round(time.monotonic() - start, 1), "; ".join([counts, *notes]))


def finish(report: dict[str, Any], options: argparse.Namespace) -> int:
    """Check the report, write it everywhere it belongs, say what failed; returns the exit status."""
    wrong = validate(report)
    name = machine.slug(report["device"]["name"])
    folders = [] if options.select else [RESULTS]
    for folder in [*folders, *([options.out] if options.out else [])]:
        write_json(folder / f"{name}.json", report)
    tables = table.table(report)
    if options.out:
        with atomic_path(options.out / f"{name}.md") as path:
            path.write_text(tables)
    if not options.select and report["rows"]:
        table.write_into(options.readme, report)
    _say(tables)
    failed = [*report["tests"]["failed"], *report["failed"]]
    for outcome in failed:
        _say(f"FAILED {outcome['id']}: {outcome['reason'].splitlines()[0] if outcome['reason'] else ''}")
    for line in wrong:
        _say(f"INVALID {line}")
    _say(f"{len(report['rows'])} rows, {len(failed)} failures, {len(report['not run'])} rows not run (see {name}.json)")
    return int(bool(wrong or failed or any(step["status"] == "failed" for step in report["steps"])))


def write_json(path: Path, report: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=True) + "\n")


def _command(name: str, command: list[str], end: float) -> Step:
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(end - start, 1)
        )
        lines = (done.stdout + done.stderr).strip().splitlines()
        status, lines = (
            ("failed", lines[-8:]) if done.returncode else ("passed", [s for s in lines if "nvcc" in s][-1:])
        )
        detail = "\n".join(line[-300:] for line in lines)
    except subprocess.TimeoutExpired:
        status, detail = "failed", "took longer than all the time there is"
    return Step(name, status, round(time.monotonic() - start, 1), detail)


def _watch(command: list[str], path: Path, end: float, output: Any) -> int | str:
    """Exit status of the process, or why it was ended: "out of time", "hangs"."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    size, grown = path.stat().st_size if path.exists() else 0, float("inf")  # not counted: imports, collection
    while True:
        try:
            return process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            now, found = time.monotonic(), path.stat().st_size if path.exists() else 0
            if found != size:
                size, grown = found, now
            if now > end or now - grown > STALL:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return "out of time" if now > end else "hangs"


def _blame(path: Path, why: int | str) -> bool:
    """Give the test during which the process ended its outcome; whether there was one."""
    started = [name for name, entry in record.read(path).items() if entry["outcome"] == "started"]
    if why == "out of time":
        record.append(path, ({"id": name, "outcome": "skipped", "reason": record.NO_TIME} for name in started))
        return True
    reason = f"no end within {STALL:.0f} s" if why == "hangs" else f"its process ended with status {why}"
    record.append(path, ({"id": name, "outcome": "failed", "reason": reason} for name in started))
    return bool(started)


def _tail(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])[-500:]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything, the build included")
    parser.add_argument("--out", type=Path, help="folder for a copy of the results, the table and the logs")
    parser.add_argument("--full", action="store_true", help="also the large problems of the CPU")
    parser.add_argument("-k", dest="select", help="only tests and rows that match, as pytest's -k; needs --out")
    parser.add_argument("--commit", help="to write down where the tree has no git history")
    parser.add_argument("--readme", type=Path, default=table.README, help="file whose table is rewritten")
    options = parser.parse_args(arguments)
    if options.select and not options.out:
        parser.error("-k needs --out: a selection does not replace the results of a whole run")
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive; got {options.minutes}")
    return options


def _say_step(step: Step) -> None:
    _say(f"{step.name}: {step.status} after {step.seconds:.0f} s. {step.detail}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
