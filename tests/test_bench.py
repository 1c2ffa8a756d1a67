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
from bench.measure import BrokenError, Measure, Plan, interleave, quantiles
from bench.native import compiler
from bench.programs import tree as tree_of
from bench.table import render

from . import helpers

pytestmark = pytest.mark.once

_MEASURES = {
    "address": {"address + release, attached"},
    "attach": {"address + release, attach + detach"},
    "create": {"create + fail + recycle", "create + fail + recycle, no descriptor"},
    "fetch": {"first use of a socket in a process"},
    "write": {
        *(f"write of 64 B, {kind}" for kind in ("unix", "tcp")),
        *(f"ten writes of 64 B in one turn of the loop, {kind}" for kind in ("unix", "tcp")),
        *(f"write of 1 MiB to a peer that reads, {kind}" for kind in ("unix", "tcp")),
        "4 processes write 64 B to one socket, messages",
        "4 processes write 64 B to one socket, least over most of a writer",
    },
    "sharing": {
        "address + release on one socket, CPU per call, 1 process",
        *(
            f"address + release on one socket, CPU per call, {count} processes{over}"
            for count, over in ((2, ""), (4, ""), (8, ""), (2, " over 1"), (8, " over 1"))
        ),
        *(f"address + release on one socket, calls of {count} processes" for count in (2, 8)),
    },
    "convoy": {f"attach + detach beside a crowd, {figure}" for figure in ("p50", "p99", "worst")},
    "push": {
        f"push across workers, {figure}" for figure in ("p50", "p90", "p99", "time in the call p50")
    },
    "fanout": {
        f"1 message to 1000 clients {how}, {figure}"
        for how in ("by groups.broadcast", "by the hub's PUBLISH", "by 16 PUBLISH in a pipeline")
        for figure in ("deliveries per CPU-second", "until all have it")
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
    "abort": {
        f"client fails to job raises, {job}, {figure}"
        for job in ("asleep", "between calls of numpy", "in pure Python")
        for figure in ("median", "worst")
    },
    "requests": {
        f"{request}, -c 50 -P {pipeline}, {figure}"
        for request in ("PING inline", "PING mbulk", "ECHO")
        for pipeline in (1, 16)
        for figure in ("rate", "server CPU per request")
    },
    "accept": {
        f"short connections, ab -c 50, {figure}" for figure in ("rate", "server CPU per connection")
    },
    "spread": {
        f"400 long-lived connections, most of a worker over the mean, {how}"
        for how in ("one after another", "in a burst")
    },
    "idle": {"memory of an idle connection"},
    "scaling": {
        f"{operation}, {size}, should be {law}"
        for operation, of_slots, of_rows in (
            ("create + fail + recycle", "constant", "constant"),
            ("address + release, attached", "constant", "constant"),
            ("attach + detach", "constant", "constant"),
            ("sockets()", "linear", "constant"),
            ("doctor's audit", "linear", "linear"),
            ("reaping a dead process", "linear", "linear"),
            ("joining and leaving", "linear", "linear"),
            ("the timer's work, once a second", "linear", "constant"),
        )
        for size, law in (("1,000,000 slots", of_slots), ("512 rows", of_rows))
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
_IN_C = {"C sem_wait + sem_post"} if compiler() else set()
_SHARED_IN_C = {"C, count in a shared word"} if compiler() else set()
_REFERENCE_PEERS = {
    "no-op C method",
    "weakref()",
    "posix_ipc acquire(0), release()",
    "numpy word under posix_ipc semaphore",
    "multiprocessing.Value under its lock",
    *_IN_C,
}
# Of all a bench's measures together.
_PEERS = {
    "address": _REFERENCE_PEERS,
    "attach": _REFERENCE_PEERS,
    "create": {"plain socketpair", "brpc's own, a constant"},
    "fetch": {
        "raw SCM_RIGHTS round trip",
        "send_handle, recv_handle",
        "pickled socket (DupFd)",
    },
    "write": {
        "socket.send",
        "shmsock, not the owner",
        "shmsock, address + write",
        "ten times socket.send",
        "one socket.sendmsg",
        "socket.sendall",
        "sendall under an fcntl lock",
    },
    "sharing": {
        "shmsock, attach + detach",
        "numpy word under posix_ipc semaphore",
        "multiprocessing.Value under its lock",
        "numpy word under fcntl lock",
        "Manager proxy, a counter",
        *_SHARED_IN_C,
    },
    "convoy": {"Python engine", "C engine, nobody computes"},
    "push": {
        "plain send",
        "Redis pub/sub, to the subscriber",
        "Redis pub/sub, forwarded to the client",
        "Redis pub/sub, forwarded by asyncio",
        "Manager proxy in the owner",
    },
    "fanout": {"redis-server"},
    "pool": {"through the parent"},
    "gone": {"plain executor", "plain executor that cancels what is queued"},
    "abort": {"a signal whose handler raises"},
    "requests": {"redis-server", "asyncio, no parsing", "uvloop, no parsing"},
    "accept": {
        "shmsock, the supervisor accepts",
        "uvicorn --workers",
        "uvicorn --workers, h11 and asyncio",
        "Node cluster",
    },
    "spread": {"shmsock, the supervisor accepts", "uvicorn --workers", "Node cluster"},
    "idle": {"asyncio", "uvloop"},
    "scaling": {"1,000 slots", "65,536 slots", "8 rows", "64 rows"},
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
        timeout=3 * helpers.WATCHDOG_S,  # a dozen programs start in turn
        env={**os.environ, **(environment or {})},
    )


def _names_of_benches() -> list[str]:
    return [name for name in shmsock.names_on_machine() if name.startswith("bench-")]


# In one run, which spares as many interpreters.
_TOGETHER = ("fetch", "write", "sharing", "fanout", "idle", "scaling")


@pytest.mark.slow
@pytest.mark.parametrize(
    "benches", [[bench] for bench in BENCHES if bench not in _TOGETHER] + [list(_TOGETHER)], ids=str
)
def test_a_quick_run_ends_and_writes_every_promised_field(
    benches: list[str], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "made" / "result.json"
    done = _run("--quick", "--only", *benches, "--json", str(path))
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert written["format"] == 1
    assert written["settings"]["quick"] is True
    assert written["problems"] == {}
    assert written["environment"].keys() >= _ENVIRONMENT
    assert written["environment"]["packages"]["numpy"]
    assert written["environment"]["engine"] == shmsock.ENGINE
    assert [result["name"] for result in written["benches"]] == benches
    for result in written["benches"]:
        _check_result(result, written["settings"]["rounds"], done.stdout)
    assert _run("--show", str(path)).stdout == done.stdout


def _check_result(result: dict[str, typing.Any], rounds: int, printed: str) -> None:
    bench = result["name"]
    assert result["includes"]
    assert {measure["name"] for measure in result["measures"]} == _MEASURES[bench]
    measured = {name for measure in result["measures"] for name in measure["samples"]}
    assert measured == _PEERS[bench] | {"shmsock"}
    for measure in result["measures"]:
        assert measure["subject"] == "shmsock"
        peers = {ratio["peer"] for ratio in measure["ratios"]}
        assert measure["samples"].keys() == peers | {"shmsock"}
        for samples in measure["samples"].values():
            assert len(samples) == rounds
            assert min(samples) > 0
        assert measure["name"] in printed


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


# -- pictures -----------------------------------------------------------------------------------

_ENVIRONMENT_OF_A_RUN = {
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


def _a_run(bench: str, measures: list[Measure]) -> dict[str, typing.Any]:
    return {
        "environment": _ENVIRONMENT_OF_A_RUN,
        "settings": {"rounds": 2, "seconds": 1.0},
        "benches": [{"name": bench, "measures": [measure.as_json() for measure in measures]}],
    }


def test_a_run_is_drawn_from_its_file_alone(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    samples = {"shmsock": [1.0, 2.0], "redis-server": [3.0, 4.0]}
    runs = {
        "sharing": [Measure(name, "ns", "lower", samples) for name in sorted(_MEASURES["sharing"])],
        "push": [
            Measure("p50", "ns", "lower", samples, {n: quantiles(v) for n, v in samples.items()})
        ],
        "requests": [Measure(name, "ns", "lower", samples) for name in _MEASURES["requests"]],
    }
    run = _a_run("", [])
    run["benches"] = [_a_run(bench, runs[bench])["benches"][0] for bench in runs]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    done = _run("--plot", str(path), "--pictures", str(tmp_path / "made"))
    assert done.returncode == 0, done.stderr
    assert [os.path.basename(line) for line in done.stdout.splitlines()] == [
        f"{bench}.png" for bench in runs
    ]
    for bench in runs:
        with open(tmp_path / "made" / f"{bench}.png", "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_a_run_without_pictures_and_a_file_that_is_none_are_refused(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "run.json"
    measure = Measure("m", "ns", "lower", {"shmsock": [1.0], "peer": [1.0]})
    path.write_text(json.dumps(_a_run("take", [measure])))
    done = _run("--plot", str(path))
    assert done.returncode == 1
    assert "there is no picture of this run" in done.stderr
    path.write_text("[]")
    done = _run("--plot", str(path))
    assert done.returncode == 1
    assert "is no result of this bench" in done.stderr


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
    text = render(_a_run("a bench", [measure]))
    last = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert last == ["m (lower is better)", "peer", "2.25 µs", "1 µs", "2.25", "1.5 to 3"]
