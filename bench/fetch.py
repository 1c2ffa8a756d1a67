"""The first use of a socket in a process: its descriptor has to come from somewhere.

Every way asks another process for each descriptor, one at a time, and gets it by SCM_RIGHTS. What
differs is what is said around it. Run as ``python -m bench.fetch`` it is that other process.
"""

from __future__ import annotations

import base64
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.reduction
import os
import pickle
import socket
import threading
import time

import shmsock

from . import programs
from .measure import Bench, BrokenError, Measure, Plan, Timed, time_calls

OURS, RAW = "shmsock", "raw SCM_RIGHTS round trip"
_ROW = 100  # fetched in a row that is timed
_KEY = b"bench"  # of both processes: a pickled socket is only given to who knows it


class Giver:
    """The process that has the descriptors: a host, and all the others."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        """What is opened is closed with the stack."""
        self._stack = stack
        self._runtime: shmsock.Runtime | None = None
        self._ours, theirs = socket.socketpair()
        stack.enter_context(self._ours)
        stack.enter_context(theirs)
        self._sids: list[int] = []
        self._peers: list[socket.socket] = []
        multiprocessing.current_process().authkey = _KEY

    def host(self, name: str) -> None:
        """Create a runtime."""
        self._runtime = self._stack.enter_context(
            shmsock.Runtime.create(name, slots=1024, processes=16, stripes=8)
        )

    def sockets(self, count: int) -> list[int]:
        """So many new sockets in the place of the last ones; their ids."""
        assert self._runtime is not None
        while self._sids:
            self._runtime.set_failed(self._sids.pop())
            self._peers.pop().close()
        for _ in range(count):
            ours, theirs = socket.socketpair()
            self._peers.append(theirs)  # open: the end of a connection is somebody else's bench
            self._sids.append(self._runtime.create_socket(ours))
        return self._sids

    def pickles(self, count: int) -> list[str]:
        """So many pickled sockets: each is one duplicate that waits to be asked for."""
        dumps = multiprocessing.reduction.ForkingPickler.dumps
        return [base64.b64encode(dumps(self._ours)).decode() for _ in range(count)]

    def give(self, fd: int, pid: int, how: str) -> None:
        """Answer every byte with a descriptor, until the other end is closed."""
        pipe = multiprocessing.connection.Connection(fd)
        give = {"raw": self._give_raw, "send_handle": self._send_handle}[how]
        threading.Thread(target=give, args=(pipe, pid), daemon=True).start()

    def _give_raw(self, pipe: multiprocessing.connection.Connection, _: int) -> None:
        with pipe, socket.socket(fileno=os.dup(pipe.fileno())) as sock:
            number = [self._ours.fileno()]
            while sock.recv(1):
                socket.send_fds(sock, [b"."], number)

    def _send_handle(self, pipe: multiprocessing.connection.Connection, pid: int) -> None:
        with pipe, contextlib.suppress(EOFError):
            number = self._ours.fileno()
            while pipe.recv_bytes():
                multiprocessing.reduction.send_handle(pipe, number, pid)


class _Taker:
    """This process's side: each method makes a row of fetches and times that alone."""

    def __init__(self, stack: contextlib.ExitStack, name: str) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        for sock in (each for pair in pairs for each in pair):
            stack.enter_context(sock)
        (self._raw, raw_there), (mine, pipe_there) = pairs
        self._pipe = stack.enter_context(multiprocessing.connection.Connection(mine.detach()))
        numbers = raw_there.fileno(), pipe_there.fileno()
        self._giver = stack.enter_context(programs.actor(*numbers, module="bench.fetch"))
        for fd, how in zip(numbers, ("raw", "send_handle"), strict=True):
            self._giver.ask("give", fd=fd, pid=os.getpid(), how=how)
        raw_there.close()
        pipe_there.close()
        self._giver.ask("host", name=name)
        self._runtime = stack.enter_context(shmsock.Runtime.attach(name))
        multiprocessing.current_process().authkey = _KEY

    def ours(self, count: int) -> float:
        """Address, and use the number, of sockets that this process never had."""
        sids = self._giver.ask("sockets", count=count)
        address, began = self._runtime.address, time.perf_counter()
        references = [address(sid) for sid in sids]
        for reference in references:
            assert reference is not None
            reference.fileno()
        took_s = time.perf_counter() - began
        for reference in references:
            assert reference is not None
            reference.close()
        return took_s

    def raw(self, count: int) -> float:
        """A byte there, a descriptor back."""
        sock, fetched = self._raw, []
        began = time.perf_counter()
        for _ in range(count):
            sock.send(b".")
            fetched += socket.recv_fds(sock, 1, 1)[1]
        took_s = time.perf_counter() - began
        return _closed(fetched, count, took_s)

    def send_handle(self, count: int) -> float:
        """The same by what multiprocessing offers for it."""
        pipe, fetched = self._pipe, []
        began = time.perf_counter()
        for _ in range(count):
            pipe.send_bytes(b".")
            fetched.append(multiprocessing.reduction.recv_handle(pipe))
        took_s = time.perf_counter() - began
        return _closed(fetched, count, took_s)

    def pickled(self, count: int) -> float:
        """A pickled socket is a name to ask for; loading it connects, proves the key and asks."""
        pickles = [base64.b64decode(text) for text in self._giver.ask("pickles", count=count)]
        began = time.perf_counter()
        sockets = [pickle.loads(each) for each in pickles]
        took_s = time.perf_counter() - began
        return _closed([sock.detach() for sock in sockets], count, took_s)


def _closed(fetched: list[int], count: int, took_s: float) -> float:
    for fd in fetched:
        os.close(fd)
    if len(fetched) != count:
        raise BrokenError(f"{count - len(fetched)} descriptors did not come")
    return took_s


def _in_rows(timed: Timed) -> Timed:
    """Rows that fit a table and the limit of open files; in between it is cleared up."""

    def repeated(count: int) -> float:
        rows = [_ROW] * (count // _ROW) + [count % _ROW] * bool(count % _ROW)
        return sum(timed(row) for row in rows)

    return repeated


def _fetch(plan: Plan) -> list[Measure]:
    name, key = f"bench-{os.getpid()}-fetch", multiprocessing.current_process().authkey
    with contextlib.ExitStack() as stack:
        stack.callback(shmsock.clean, name)  # finds nothing, unless the host had to be killed
        stack.callback(setattr, multiprocessing.current_process(), "authkey", key)
        taker = _Taker(stack, name)
        ways = {
            OURS: taker.ours,
            RAW: taker.raw,
            "send_handle, recv_handle": taker.send_handle,
            "pickled socket (DupFd)": taker.pickled,
        }
        samples = time_calls(plan, {way: _in_rows(timed) for way, timed in ways.items()})
    return [Measure("first use of a socket in a process", "ns", "lower", samples)]


BENCHES = (
    Bench(
        "fetch",
        "the first use of a socket in a process: its descriptor is fetched",
        "`ref = address(sid); ref.fileno()` of a socket that this process never had: attach, ask "
        "the host, check what came, cache it, watch for its end. Raw: a byte to another process, "
        "which answers with SCM_RIGHTS, both Python. send_handle: the same over a "
        "multiprocessing.Connection. Pickled: pickle.loads of a socket pickled in the other "
        "process, which connects to it, proves that it knows the key, and asks. What is fetched "
        "is closed after the time was taken.",
        _fetch,
    ),
)


def main() -> None:
    with contextlib.ExitStack() as stack:
        programs.obey(Giver(stack))


if __name__ == "__main__":
    main()
