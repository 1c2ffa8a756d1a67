"""Requests per second, and what each costs the server's processors, under redis-benchmark.

The second figure is the fairer one: with as many workers as cores, the load generator competes with
the server for them, so the rate depends on who gets a core; the time that a request takes away does
not.
"""

from __future__ import annotations

import contextlib
import csv
import os
import subprocess
import typing

from . import answerers, programs
from .measure import Bench, BrokenError, Measure, Plan, interleave

OURS, PEER = "shmsock", "redis-server"
FLOORS = {f"{loop}, no parsing": loop for loop in answerers.LOOPS}
CONNECTIONS = 50
PIPELINES = (1, 16)
REQUESTS = {
    "PING inline": ["-t", "ping_inline"],
    "PING mbulk": ["-t", "ping_mbulk"],
    "ECHO": ["ECHO", "hello"],
}
_FIRST_COUNT = 2_000
_TIMEOUT_S = 120.0


def workers() -> int:
    """As many as ``shmsock serve`` starts on this machine."""
    return max(2, os.cpu_count() or 2)


def _run(plan: Plan) -> list[Measure]:
    program = programs.which("redis-benchmark")
    measures = []
    with contextlib.ExitStack() as stack:
        servers = {
            OURS: stack.enter_context(programs.shmsock_server(workers())),
            PEER: stack.enter_context(programs.redis_server()),
        }
        for label, loop in FLOORS.items():
            servers[label] = stack.enter_context(programs.answerer(loop))
        for pipeline in PIPELINES:
            for name, request in REQUESTS.items():
                plan.report(f"requests: {name}, -P {pipeline}")
                contestants = {
                    label: _load(program, server, request, pipeline, plan)
                    for label, server in servers.items()
                }
                taken = interleave(plan, contestants)
                title = f"{name}, -c {CONNECTIONS} -P {pipeline}"
                measures += [
                    Measure(f"{title}, rate", "1/s", "higher", taken["rate"]),
                    Measure(f"{title}, server CPU per request", "ns", "lower", taken["cpu"]),
                ]
    return measures


def _load(
    program: str, server: programs.Server, request: list[str], pipeline: int, plan: Plan
) -> typing.Callable[[], dict[str, float]]:
    def run(count: int) -> float:
        command = [program, "-h", "127.0.0.1", "-p", str(server.port), "-c", str(CONNECTIONS)]
        command += ["-P", str(pipeline), "-n", str(count), "--csv", *request]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise BrokenError(f"redis-benchmark did not end in {_TIMEOUT_S:.0f} s") from None
        return _rate(done)

    return programs.under_load(server, plan, run, _FIRST_COUNT)


def _rate(done: subprocess.CompletedProcess[str]) -> float:
    rows = list(csv.DictReader(done.stdout.splitlines()))
    if done.returncode != 0 or len(rows) != 1 or "Error" in done.stdout + done.stderr:
        raise BrokenError(f"redis-benchmark: {(done.stderr or done.stdout).strip()[-300:]}")
    return float(rows[0]["rps"])


BENCHES = (
    Bench(
        "requests",
        "requests per second and server CPU per request",
        f"redis-benchmark -c {CONNECTIONS} with -P {' and -P '.join(map(str, PIPELINES))} against "
        "`shmsock serve` (one worker per core, at least 2), redis-server (one thread, nothing "
        "saved), and an asyncio.Protocol server that answers without parsing, under asyncio's own "
        "loop and uvloop's (one process). CPU: utime + stime of every process of the server, "
        "supervisor included, over the requests of the run; accepting and closing the connections "
        "is in it. Counted in ticks of 10 ms.",
        _run,
    ),
)
