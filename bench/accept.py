"""Connections that come and go: how many a second, what each costs, and who gets the long-lived.

The load generator is ``ab`` without keep-alive: each request is a connection of its own. The
answer is the same three bytes everywhere, from an application that does nothing else.
"""

from __future__ import annotations

import collections.abc
import contextlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import time
import typing

from . import programs
from .measure import Bench, BrokenError, Measure, Plan, Sampler, UnavailableError, interleave

OURS, PLACED = "shmsock", "shmsock, the supervisor accepts"
UVICORN, H11, NODE = "uvicorn --workers", "uvicorn --workers, h11 and asyncio", "Node cluster"
WORKERS, SPREAD_OVER = 2, 4
CONCURRENT = 50
LONG_LIVED = 400
APPLICATION = "bench.bare_app:Bare"
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
_FIRST_COUNT = 2_000
_TIMEOUT_S = 120.0
_HOW_TO_GET = {
    "ab": "apt-get install apache2-utils",
    "node": "apt-get install nodejs",
    "uvicorn": "python -m pip install uvicorn httptools uvloop h11",
}

Start = collections.abc.Callable[[], contextlib.AbstractContextManager[programs.Server]]


def _need(*names: str) -> None:
    """Raises: UnavailableError: Something is not installed; it says how to get it."""
    for name in names:
        packages = ("uvicorn", "httptools", "uvloop", "h11") if name == "uvicorn" else ()
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing or (not packages and shutil.which(name) is None):
            raise UnavailableError(
                f"{' '.join(missing) or name} is not installed: {_HOW_TO_GET[name]}"
            )


def _servers(workers: int) -> dict[str, Start]:
    return {
        OURS: lambda: programs.shmsock_server(workers, APPLICATION, "--accept", "workers"),
        PLACED: lambda: programs.shmsock_server(workers, APPLICATION),
        UVICORN: lambda: programs.uvicorn(workers),
        H11: lambda: programs.uvicorn(workers, "--http", "h11", "--loop", "asyncio"),
        NODE: lambda: programs.node_cluster(workers),
    }


@contextlib.contextmanager
def _all_of(starts: dict[str, Start]) -> collections.abc.Iterator[dict[str, programs.Server]]:
    with contextlib.ExitStack() as stack:
        yield {label: stack.enter_context(start()) for label, start in starts.items()}


# -- short connections --------------------------------------------------------------------------


def _run(plan: Plan) -> list[Measure]:
    _need("ab", "uvicorn", "node")
    with _all_of(_servers(WORKERS)) as servers:
        plan.report(f"accept: ab -c {CONCURRENT}, no keep-alive")
        taken = interleave(plan, {label: _load(server, plan) for label, server in servers.items()})
    title = f"short connections, ab -c {CONCURRENT}"
    return [
        Measure(f"{title}, rate", "1/s", "higher", taken["rate"]),
        Measure(f"{title}, server CPU per connection", "ns", "lower", taken["cpu"]),
    ]


def _load(server: programs.Server, plan: Plan) -> Sampler:
    def run(count: int) -> float:
        command = ["ab", "-q", "-c", str(CONCURRENT), "-n", str(count)]
        try:
            done = subprocess.run(
                [*command, f"http://127.0.0.1:{server.port}/"],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise BrokenError(f"ab did not end in {_TIMEOUT_S:.0f} s") from None
        return _rate(done, count)

    return programs.under_load(server, plan, run, _FIRST_COUNT)


def _rate(done: subprocess.CompletedProcess[str], count: int) -> float:
    found = re.search(r"^Requests per second: +([0-9.]+)", done.stdout, re.M)
    whole = re.search(rf"^Complete requests: +{count}$", done.stdout, re.M)
    failed = re.search(r"^(Failed|Non-2xx).*: +[1-9]", done.stdout, re.M)
    if done.returncode != 0 or not found or not whole or failed:
        raise BrokenError(f"ab: {(done.stderr or done.stdout).strip()[-300:]}")
    return float(found[1])


# -- long-lived ones ----------------------------------------------------------------------------


def _run_spread(plan: Plan) -> list[Measure]:
    _need("uvicorn", "node")
    starts = _servers(SPREAD_OVER)
    del starts[H11]  # it accepts as the other uvicorn does
    with _all_of(starts) as servers:
        plan.report(f"spread: {LONG_LIVED} connections over {SPREAD_OVER} workers")
        taken = interleave(plan, {label: _spread(server) for label, server in servers.items()})
    title = f"{LONG_LIVED} long-lived connections, most of a worker over the mean"
    return [Measure(f"{title}, {how}", "x", "lower", samples) for how, samples in taken.items()]


def _spread(server: programs.Server) -> Sampler:
    def one_after_another() -> collections.abc.Iterator[socket.socket]:
        for _ in range(LONG_LIVED):
            sock = socket.create_connection(("127.0.0.1", server.port), _TIMEOUT_S)
            sock.sendall(REQUEST)
            if not sock.recv(65536).startswith(b"HTTP/1.1 200 "):
                raise BrokenError("a server did not answer with 200")
            yield sock

    def in_a_burst() -> collections.abc.Iterator[socket.socket]:
        for _ in range(LONG_LIVED):
            yield socket.create_connection(("127.0.0.1", server.port), _TIMEOUT_S)

    def sample() -> dict[str, float]:
        return {
            "one after another": _most_over_mean(server, one_after_another),
            "in a burst": _most_over_mean(server, in_a_burst),
        }

    return sample


def _most_over_mean(
    server: programs.Server, opened: collections.abc.Callable[[], typing.Iterable[socket.socket]]
) -> float:
    """Open connections, and see which of the workers has how many of them."""
    workers = server.processes() - {server.pid}
    before = {pid: _sockets(pid) for pid in workers}

    def taken() -> list[int]:
        return [_sockets(pid) - before[pid] for pid in workers]

    with contextlib.ExitStack() as stack:
        for sock in opened():
            stack.enter_context(sock)
        _await(lambda: sum(taken()) >= LONG_LIVED, "every connection was accepted")
        counts = taken()
    _await(lambda: max(taken()) <= 0, "every connection was closed")
    return max(counts) / (sum(counts) / SPREAD_OVER)


def _sockets(pid: int) -> int:
    found = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:")
    return found


def _await(condition: collections.abc.Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise BrokenError(f"it took more than {_TIMEOUT_S:.0f} s until {what}")
        time.sleep(0.01)


BENCHES = (
    Bench(
        "accept",
        "short connections per second and server CPU per connection",
        f"ab -c {CONCURRENT} without keep-alive against `shmsock serve {APPLICATION}`, with "
        f"`--accept workers` and without; `uvicorn --workers {WORKERS}` with a bare ASGI "
        "application, on httptools and uvloop, and on h11 and asyncio; and Node's cluster, whose "
        f"primary accepts and passes handles in turn. {WORKERS} workers each, and all answer with "
        "the same three bytes. CPU: utime + stime of every process of the server over the "
        "connections of the run, in ticks of 10 ms.",
        _run,
    ),
    Bench(
        "spread",
        "how evenly long-lived connections are spread over the workers",
        f"{LONG_LIVED} connections that stay, over {SPREAD_OVER} workers: each opened when the one "
        "before was answered, and all at once. Which process holds which socket is read from "
        "/proc. 1 is even; with all at one worker it would be "
        f"{SPREAD_OVER}.",
        _run_spread,
    ),
)
