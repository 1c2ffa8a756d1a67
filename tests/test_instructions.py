"""The hot calls cost no more instructions than the committed baseline, give or take a tenth."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench import instructions
from bench.environment import REPOSITORY
from bench.measure import UnavailableError


def test_no_hot_call_has_become_dearer_by_a_tenth() -> None:
    before = instructions.baseline()
    if before is None:
        pytest.skip(f"no baseline for {instructions.key()}: python -m bench.instructions --save")
    try:
        counts = instructions.measure()
    except UnavailableError as error:
        pytest.skip(str(error))
    assert set(counts) == set(before) == set(instructions.CALLS)
    assert not instructions.compare(counts, before)


def test_a_call_that_is_dearer_by_more_than_a_tenth_is_named() -> None:
    before = {"cheap": 1000, "dear": 1000}
    assert instructions.compare({"cheap": 1100, "dear": 1100}, before) == []
    (line,) = instructions.compare({"cheap": 500, "dear": 1101}, before)
    assert line == "dear: 1101 instructions, +10.1% of the baseline's 1000"


def test_what_is_counted_runs_without_valgrind_too() -> None:
    command = [sys.executable, "-m", "bench.instructions", "--calls"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
