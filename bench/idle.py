"""What a connection costs in memory while it says nothing, over all the processes of a server."""

from __future__ import annotations

import contextlib
import resource
import socket
import typing

from . import programs
from .answerers import LOOPS
from .measure import Bench, BrokenError, Measure, Plan, Sampler, interleave
from .requests import workers

OURS = "shmsock"
FEW, MANY = 1_000, 5_000
_QUICK = 20  # times fewer in a --quick run
_WATCHDOG_S = 60.0

Start = typing.Callable[[], contextlib.AbstractContextManager[programs.Server]]


def _pss_bytes(pids: set[int]) -> int:
    """Proportional set size: a page that several processes map counts once in all."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total << 10


def _connect(stack: contextlib.ExitStack, port: int, count: int) -> None:
    """So many more connections, each of which was answered once."""
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", port), timeout=_WATCHDOG_S)
        stack.enter_context(sock)
        sock.sendall(b"PING\r\n")
        if sock.recv(64) != b"+PONG\r\n":
            raise BrokenError("a connection was not answered")


def _sampler(start: Start, few: int, many: int) -> Sampler:
    def sample() -> dict[str, float]:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(start())
            _connect(stack, server.port, few)
            before = _pss_bytes(server.processes())
            _connect(stack, server.port, many - few)
            return {"memory": (_pss_bytes(server.processes()) - before) / (many - few)}

    return sample


def _idle(plan: Plan) -> list[Measure]:
    few, many = (FEW, MANY) if plan.seconds >= 0.5 else (FEW // _QUICK, MANY // _QUICK)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < many + 100 <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    starts: dict[str, Start] = {OURS: lambda: programs.shmsock_server(workers())}
    starts |= {
        loop: (lambda loop=loop: programs.answerer(loop))  # type: ignore[misc]
        for loop in LOOPS
    }
    taken = interleave(plan, {name: _sampler(start, few, many) for name, start in starts.items()})
    return [Measure("memory of an idle connection", "B", "lower", taken["memory"])]


BENCHES = (
    Bench(
        "idle",
        "memory of a connection that says nothing",
        f"PSS of all the server's processes with {MANY:,} connections less that with {FEW:,}, over "
        f"the difference (a {_QUICK}th of them in a --quick run); each was answered once. shmsock: "
        "`shmsock serve`, supervisor and shared memory included. The peers are servers of one "
        "process that answer without parsing, on asyncio's loop and on uvloop's. What the kernel "
        "keeps of a socket is in nobody's figure.",
        _idle,
    ),
)
