"""The benches run to their end, say what they promise, and leave nothing; no figure is judged."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import typing

import pytest

import shmsock
from bench.__main__ import BENCHES
from bench.measure import BrokenError, Measure, Plan, interleave
from bench.programs import tree as tree_of
from bench.table import render

from . import helpers

_MEASURES = {
    "address": {"address + release, attached"},
    "attach": {"address + release, attach + detach"},
    "create": {"create + fail + recycle"},
    "convoy": {f"attach + detach beside a crowd, {figure}" for figure in ("p50", "p99", "worst")},
    "push": {
        f"push across workers, {figure}" for figure in ("p50", "p90", "p99", "time in the call p50")
    },
    "pool": {
        f"answer of {size}, {figure}"
        for size in ("1 kB", "1 MB")
        for figure in (
            "latency p50",
            "latency p99",
            "CPU of the parent",
            "bytes through the parent",
        )
    },
    "gone": {
        "1000 clients, half leave: CPU spent on who has left, of all it would cost",
        "1000 clients, half leave: time until all is done",
    },
    "requests": {
        f"{request}, -c 50 -P {pipeline}, {figure}"
        for request in ("PING inline", "PING mbulk", "ECHO")
        for pipeline in (1, 16)
        for figure in ("rate", "server CPU per request")
    },
    "take": {"take + give of a stripe"},
    "holds": {
        f"death to last hold returned, {host} a host, {figure}"
        for host in ("with", "without")
        for figure in ("median", "worst")
    },
    "rehome": {
        f"worker's death to each idle client answered by another, {figure}"
        for figure in ("median", "worst")
    },
    "adopt": {
        f"supervisor's death to adopted by the next, {figure}" for figure in ("median", "worst")
    },
}
_REFERENCE_PEERS = {
    "no-op C method",
    "weakref()",
    "posix_ipc acquire(0), release()",
    "numpy word under posix_ipc semaphore",
    "multiprocessing.Value under its lock",
}
_PEERS = {
    "address": _REFERENCE_PEERS,
    "attach": _REFERENCE_PEERS,
    "create": {"plain socketpair"},
    "convoy": {"Python engine", "C engine, nobody computes"},
    "push": {
        "plain send",
        "Redis pub/sub, to the subscriber",
        "Redis pub/sub, forwarded to the client",
    },
    "pool": {"through the parent"},
    "gone": {"plain executor", "plain executor that cancels what is queued"},
    "requests": {"redis-server", "asyncio, no parsing", "uvloop, no parsing"},
    "take": {"posix_ipc acquire(), release()", "posix_ipc acquire(0), release()"},
    "holds": {"the kernel reports the death"},
    "rehome": {"the kernel reports the death"},
    "adopt": {"an interpreter starts"},
}
_ENVIRONMENT = {"cpu", "cores", "kernel", "python", "packages", "engine", "commit", "redis_server"}


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bench", *arguments]


def _run(
    *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments),
        cwd=helpers.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=helpers.WATCHDOG_S,
        env={**os.environ, **(environment or {})},
    )


def _names_of_benches() -> list[str]:
    return [name for name in shmsock.names_on_machine() if name.startswith("bench-")]


@pytest.mark.slow
@pytest.mark.parametrize("bench", list(BENCHES))
def test_a_quick_run_ends_and_writes_every_promised_field(
    bench: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "made" / "result.json"
    done = _run("--quick", "--only", bench, "--json", str(path))
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert written["format"] == 1
    assert written["settings"]["quick"] is True
    assert written["problems"] == {}
    assert written["environment"].keys() >= _ENVIRONMENT
    assert written["environment"]["packages"]["numpy"]
    assert written["environment"]["engine"] == shmsock.ENGINE
    (result,) = written["benches"]
    assert result["name"] == bench
    assert result["includes"]
    assert {measure["name"] for measure in result["measures"]} == _MEASURES[bench]
    for measure in result["measures"]:
        assert measure["subject"] == "shmsock"
        assert measure["samples"].keys() == _PEERS[bench] | {"shmsock"}
        assert {ratio["peer"] for ratio in measure["ratios"]} == _PEERS[bench]
        for samples in measure["samples"].values():
            assert len(samples) == written["settings"]["rounds"]
            assert min(samples) > 0
        assert measure["name"] in done.stdout
    assert _run("--show", str(path)).stdout == done.stdout


def test_the_list_names_every_bench() -> None:
    done = _run("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(_MEASURES)


@pytest.mark.parametrize(
    "arguments", [["--only", "nothing"], ["--seconds", "soon"], ["--seconds", "0"], ["surplus"]]
)
def test_a_wrong_command_line_ends_with_2(arguments: list[str]) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")


def test_without_its_peer_a_bench_says_so_and_gives_no_figure(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "result.json"
    done = _run(
        "--quick",
        *("--only", "push", "requests", "--json", str(path)),
        environment={"PATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "bench push: cannot run here: redis-server is not installed" in done.stderr
    assert "bench requests: cannot run here: redis-benchmark is not installed" in done.stderr
    assert done.stdout == ""
    assert json.loads(path.read_text())["benches"] == []


def test_a_file_that_is_no_result_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("[]")
    done = _run("--show", str(path))
    assert done.returncode == 1
    assert "is no result of this bench" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bench", "processes"),
    [("requests", 5), ("push", 3)],  # supervisor, 2 workers, redis, load; redis, two actors
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_it_takes_every_process_and_name_along(
    bench: str, processes: int, number: signal.Signals
) -> None:
    with subprocess.Popen(
        _command("--only", bench, "--seconds", "600"),
        cwd=helpers.REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            own = f"bench-{process.pid}-"
            helpers.wait_until(
                lambda: (
                    len(tree_of(process.pid)) > processes
                    and any(name.startswith(own) for name in _names_of_benches())
                )
            )
            tree = tree_of(process.pid) - {process.pid}
            starts = {pid: _start(pid) for pid in tree}
            process.send_signal(number)
            assert process.wait(helpers.WATCHDOG_S) == 128 + number
        finally:
            process.kill()
    # Whose parent was among them ends when it notices: a moment later where there is much to do.
    helpers.wait_until(
        lambda: not [pid for pid in tree if starts[pid] and _start(pid) == starts[pid]],
        "every process has ended",
    )
    assert [name for name in _names_of_benches() if name.startswith(own)] == []


def _start(pid: int) -> str | None:
    """When a process started, which tells it from a later one of the same pid."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]
    return None


# -- the arithmetic -----------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round() -> None:
    measure = Measure("m", "ns", "lower", {"us": [1.0, 20.0, 3.0], "peer": [2.0, 10.0, 3.0]})
    (ratio,) = measure.ratios()
    assert (ratio.peer, ratio.low, ratio.median, ratio.high) == ("peer", 0.5, 1.0, 2.0)
    assert measure.median("us") == 3.0


@pytest.mark.parametrize(
    "samples",
    [
        {"us": [1.0]},
        {"us": [1.0], "peer": []},
        {"us": [], "peer": []},
        {"us": [1.0], "peer": [0.0]},
    ],
)
def test_what_cannot_be_compared_is_refused(samples: dict[str, list[float]]) -> None:
    with pytest.raises(BrokenError):
        Measure("m", "ns", "lower", samples)


def test_rounds_turn_the_order_around_and_keep_samples_apart() -> None:
    order: list[str] = []

    def contestant(name: str) -> typing.Callable[[], dict[str, float]]:
        def sample() -> dict[str, float]:
            order.append(name)
            return {"figure": float(len(order))}

        return sample

    taken = interleave(Plan(rounds=3), {name: contestant(name) for name in "abc"})
    assert "".join(order) == "abccbaabc"
    assert taken == {"figure": {"a": [1.0, 6.0, 7.0], "b": [2.0, 5.0, 8.0], "c": [3.0, 4.0, 9.0]}}
    assert list(taken["figure"]) == ["a", "b", "c"]


def test_the_table_shows_median_ratio_and_its_range() -> None:
    measure = Measure("m", "ns", "lower", {"shmsock": [1500.0, 3000.0], "peer": [1000.0, 1000.0]})
    environment = {
        "cpu": "a processor",
        "cores_usable": 2,
        "virtual_machine": True,
        "load_average_before": [0.5, 0, 0],
        "load_average_after": [1.5, 0, 0],
        "kernel": "6.1.0-x",
        "python": "CPython 3.11",
        "packages": {"numpy": "2"},
        "redis_server": None,
        "engine": "py",
        "commit": None,
        "uncommitted_changes": None,
    }
    text = render(
        {
            "environment": environment,
            "settings": {"rounds": 2, "seconds": 1.0},
            "benches": [{"measures": [measure.as_json()]}],
        }
    )
    last = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert last == ["m (lower is better)", "peer", "2.25 µs", "1 µs", "2.25", "1.5 to 3"]
