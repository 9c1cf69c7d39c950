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


_SERIALIZATION = "tests/kernels/test_serialization.py -k emulated"

MUTATIONS = [
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
