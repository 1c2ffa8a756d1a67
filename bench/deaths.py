"""How long a death is felt: by who waits for what the dead one held, and by its clients.

Every sample is one SIGKILL of a real process. The peer of a time is what nobody can be faster than:
until the kernel reports the same death (a pidfd becomes readable), or until an interpreter with the
same extension modules has started. Both are measured in the same rounds.
"""

from __future__ import annotations

import collections.abc
import contextlib
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import typing

import posix_ipc

import shmsock

from . import programs
from .measure import Bench, BrokenError, Measure, Plan, Statement, time_statements

OURS, KERNEL, START = "shmsock", "the kernel reports the death", "an interpreter starts"
HELD = 100  # sockets that a victim holds
CLIENTS = 50
_WATCHDOG_S = 30.0
_LEAST = 2  # kills a round

Samples = dict[str, dict[str, list[float]]]
# Kills once; the seconds that ours and the peer took.
Kill = collections.abc.Callable[[], tuple[float, float]]


def _rounds(plan: Plan, peer: str, kill: Kill) -> Samples:
    """Median and worst of each round's kills."""
    taken: Samples = {figure: {OURS: [], peer: []} for figure in ("median", "worst")}
    for _ in range(plan.rounds):
        ours: list[float] = []
        theirs: list[float] = []
        until = time.monotonic() + plan.slice_s
        while len(ours) < _LEAST or time.monotonic() < until:
            pair = kill()
            ours.append(pair[0] * 1e9)
            theirs.append(pair[1] * 1e9)
        for name, values in ((OURS, ours), (peer, theirs)):
            taken["median"][name].append(statistics.median(values))
            taken["worst"][name].append(max(values))
    return taken


def _measures(title: str, taken: Samples) -> list[Measure]:
    return [
        Measure(f"{title}, {figure}", "ns", "lower", samples) for figure, samples in taken.items()
    ]


def _await(condition: collections.abc.Callable[[], object], what: str) -> None:
    """Look all the time, but let others have the processor."""
    deadline = time.monotonic() + _WATCHDOG_S
    while not condition():
        if time.monotonic() > deadline:
            raise BrokenError(f"it took more than {_WATCHDOG_S:.0f} s until {what}")
        time.sleep(50e-6)


class _Death:
    """One SIGKILL, and when the kernel reported it; through a pidfd, which no other can have."""

    def __init__(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)
        self.reported_s = 0.0
        self._watch = threading.Thread(target=self._wait)
        self.began = time.monotonic()
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._watch.start()

    def _wait(self) -> None:
        select.select([self._pidfd], [], [], _WATCHDOG_S)
        self.reported_s = time.monotonic() - self.began

    def wait(self) -> None:
        """Until the kernel has reported it."""
        self._watch.join()

    def close(self) -> None:
        self.wait()
        os.close(self._pidfd)


# -- what it held -------------------------------------------------------------------------------


def _held(plan: Plan, *, host: bool) -> Samples:
    """From SIGKILL until the last of the dead one's holds was given back."""
    name = f"bench-{os.getpid()}-deaths"
    with contextlib.ExitStack() as stack:
        stack.callback(shmsock.clean, name)
        keeper = stack.enter_context(programs.actor())
        nursery = stack.enter_context(programs.actor())
        sids = keeper.ask("host", name=name, count=HELD)
        runtime = stack.enter_context(shmsock.Runtime.attach(name))
        stripe_of_one = [runtime.address(sid) for sid in sids]  # they outlive their owner
        for reference in stripe_of_one:
            assert reference is not None
            stack.enter_context(reference)
        held = runtime._segment.columns.held

        def holds(index: int) -> int:
            return int(held[:, index].sum())

        if not host:
            os.kill(keeper.process.pid, signal.SIGKILL)
            keeper.process.wait()
            runtime.repair()

        def kill() -> tuple[float, float]:
            alive = sids if host else [_new(runtime) for _ in range(HELD)]
            pid = nursery.ask("victim", name=name, sids=alive, inside=not host)
            index = next(row.index for row in runtime.processes() if row.pid == pid)
            death = _Death(pid)
            done_s = 0.0

            def is_over() -> bool:
                nonlocal done_s
                if not done_s and not holds(index):
                    done_s = time.monotonic() - death.began
                return bool(done_s and death.reported_s)

            if not host:  # somebody wants in, and finds the stripe stuck
                runtime._engine.run(0, lambda *_: 1, -1)
            _await(is_over, "the holds were given back")
            death.close()
            nursery.ask("bury")
            if not host:
                for sid in alive:
                    runtime.set_failed(sid)
            return done_s, death.reported_s

        return _rounds(plan, KERNEL, kill)


def _new(runtime: shmsock.Runtime) -> int:
    ours, theirs = socket.socketpair()
    theirs.close()
    sid = runtime.create_socket(ours)
    return sid


def _holds(plan: Plan) -> list[Measure]:
    return [
        *_measures("death to last hold returned, with a host", _held(plan, host=True)),
        *_measures("death to last hold returned, without a host", _held(plan, host=False)),
    ]


# -- its clients --------------------------------------------------------------------------------


def _client(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=_WATCHDOG_S)
    sock.sendall(b"SUBSCRIBE news\r\n")
    _read(sock, b":1\r\n")
    return sock


def _read(sock: socket.socket, end: bytes) -> None:
    data = b""
    while not data.endswith(end):
        chunk = sock.recv(4096)
        if not chunk:
            raise BrokenError("a client's connection ended")
        data += chunk


_PONG = b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"


def _rehomed(plan: Plan) -> list[Measure]:
    """From SIGKILL of a worker until each of its idle subscribers was answered by another."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(programs.shmsock_server(2))
        runtime = stack.enter_context(shmsock.Runtime.attach(server.name))
        clients = [stack.enter_context(_client(server.port)) for _ in range(CLIENTS)]
        by_peer = {"{}:{}".format(*client.getsockname()): client for client in clients}

        def workers() -> dict[int, int]:
            return {
                row.index: row.pid
                for row in runtime.processes()
                if row.role == "worker" and row.alive
            }

        def is_quiet() -> bool:
            rows = runtime.sockets()
            mine = [row for row in rows if bytes(row["peer"]).decode() in by_peer]
            owners = {int(row["owner"]) for row in mine}
            return (
                len(workers()) == 2
                and len(mine) == CLIENTS
                and owners <= set(workers())
                and not any(row["busy"] for row in mine)
            )

        def kill() -> tuple[float, float]:
            _await(is_quiet, "two workers are there and all is quiet")
            counts = runtime.owned_counts()
            index = max(workers(), key=lambda worker: int(counts[worker]))
            theirs = [
                by_peer[bytes(row["peer"]).decode()]
                for row in runtime.sockets()
                if int(row["owner"]) == index and bytes(row["peer"]).decode() in by_peer
            ]
            death = _Death(workers()[index])
            death.wait()
            for client in theirs:
                client.sendall(b"PING\r\n")
            for client in theirs:
                _read(client, _PONG)
            done_s = time.monotonic() - death.began
            death.close()
            return done_s, death.reported_s

        taken = _rounds(plan, KERNEL, kill)
        if problems := runtime.audit():
            raise BrokenError("the audit found: " + "; ".join(problems))
    return _measures("worker's death to each idle client answered by another", taken)


# -- its successor ------------------------------------------------------------------------------


def _adopted(plan: Plan) -> list[Measure]:
    """From SIGKILL of the supervisor until the next one's banner says that it has taken over."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(programs.shmsock_server(2))
        supervisor = server.pid
        clients = [stack.enter_context(_client(server.port)) for _ in range(CLIENTS)]

        def kill() -> tuple[float, float]:
            nonlocal supervisor
            death = _Death(supervisor)
            death.wait()
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, supervisor, os.WEXITED | os.WNOWAIT)
            follower = stack.enter_context(programs.shmsock_follower(server.name))
            done_s = time.monotonic() - death.began
            if follower.port != server.port:
                raise BrokenError("the next supervisor has not taken over")
            supervisor = follower.pid
            death.close()
            for client in clients:
                client.sendall(b"PING\r\n")
                _read(client, _PONG)
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", "import numpy, posix_ipc, lmdb"], check=True)
            return done_s, time.monotonic() - began

        taken = _rounds(plan, START, kill)
    return _measures("supervisor's death to adopted by the next", taken)


# -- what it costs ------------------------------------------------------------------------------


def _take(plan: Plan) -> list[Measure]:
    """A stripe taken and given by the engine, nothing done inside, against its bare semaphore."""
    name = f"bench-{os.getpid()}-take"
    with shmsock.Runtime.create(name, slots=64, processes=8, stripes=2) as runtime:
        engine: typing.Any = runtime._engine
        semaphore = posix_ipc.Semaphore(f"/{name}", posix_ipc.O_CREX, initial_value=1)
        semaphore.unlink()
        try:
            samples = time_statements(
                plan,
                [
                    Statement(
                        OURS, "run(0, body, -1)", {"run": engine.run, "body": _nothing_inside}
                    ),
                    Statement(
                        "posix_ipc acquire(), release()",
                        "acquire(); release()",
                        {"acquire": semaphore.acquire, "release": semaphore.release},
                    ),
                    Statement(
                        "posix_ipc acquire(0), release()",
                        "acquire(0); release()",
                        {"acquire": semaphore.acquire, "release": semaphore.release},
                    ),
                ],
            )
        finally:
            semaphore.close()
    return [Measure("take + give of a stripe", "ns", "lower", samples)]


def _nothing_inside(slot: int, argument: object) -> int:
    return 1


BENCHES = (
    Bench(
        "take",
        "taking a stripe and giving it back, against a bare semaphore",
        "`engine.run(stripe, body, -1)` with a body that does nothing: the local lock, the claims, "
        "the generation, the row, the semaphore. One process, nobody else at the stripe.",
        _take,
    ),
    Bench(
        "holds",
        "SIGKILL of a process to the last of what it held given back",
        f"A process that holds {HELD} sockets is killed; with a host, which hears its channel "
        "hang up; and without one, killed inside a stripe that another process wants. The peer is "
        "the kernel's own report of the same death.",
        _holds,
    ),
    Bench(
        "rehome",
        "SIGKILL of a worker to each of its idle clients being answered by another",
        f"`shmsock serve --workers 2`, {CLIENTS} subscribers; those of the killed worker send PING "
        "as soon as the kernel has reported the death.",
        _rehomed,
    ),
    Bench(
        "adopt",
        "SIGKILL of the supervisor to adopted by the next `shmsock serve`",
        f"Two workers, {CLIENTS} subscribers. The next one is started as soon as the kernel has "
        "reported the death; most of it is an interpreter that starts, the peer.",
        _adopted,
    ),
)
