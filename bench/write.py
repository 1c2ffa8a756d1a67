"""Writing to a socket: alone, much at once, and together with other processes.

Run as ``python -m bench.write`` it is one of the other processes: it reads, or writes in turn.
"""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import fcntl
import gc
import os
import socket
import threading
import time
import timeit

import shmsock

from . import programs
from .measure import Bench, BrokenError, Measure, Plan, Sampler, Timed, interleave, time_calls

OURS, NOT_OWNER, ADDRESSED = "shmsock", "shmsock, not the owner", "shmsock, address + write"
KINDS = ("unix", "tcp")
WRITERS = 4
_SMALL, _LARGE = bytes(64), bytes(1 << 20)
_ROW = 100  # messages that fit the kernel's buffers, written before somebody reads
_A_TURN = 10
_WATCHDOG_S = 60.0


def _connected(kind: str) -> tuple[socket.socket, socket.socket]:
    if kind == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours = listener.accept()[0]
    for sock in (ours, theirs):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


class Other:
    """Another process of the bench."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        """What is opened is closed with the stack."""
        self._stack = stack
        self._runtime: shmsock.Runtime | None = None

    def come(self, name: str) -> int:
        """Attach; returns the index."""
        self._runtime = self._stack.enter_context(shmsock.Runtime.attach(name))
        return self._runtime.index

    def close(self, fds: list[int]) -> None:
        """Close what is another one's to use."""
        for fd in fds:
            os.close(fd)

    def drain(self, fds: list[int]) -> None:
        """Read these to their ends, all the time."""
        for fd in fds:
            threading.Thread(target=_drain, args=(socket.socket(fileno=fd),), daemon=True).start()

    def write(self, sid: int, letter: str, seconds: float) -> int:
        """Write messages of one letter for so long; how many."""
        assert self._runtime is not None
        reference = self._runtime.address(sid)
        assert reference is not None
        with reference:

            def write(message: bytes) -> None:
                try:
                    reference.write(message)
                except shmsock.OverCrowdedError:
                    reference.wait_writable(_WATCHDOG_S)
                    reference.write(message)

            written = _write_for(write, letter, seconds)
            reference.flush(_WATCHDOG_S)
        return written

    def write_locked(self, fd: int, lock: int, letter: str, seconds: float) -> int:
        """The same by a lock around ``sendall``, as processes do that inherited a socket."""
        with socket.socket(fileno=os.dup(fd)) as sock:

            def write(message: bytes) -> None:
                fcntl.lockf(lock, fcntl.LOCK_EX, 1)
                try:
                    sock.sendall(message)
                finally:
                    fcntl.lockf(lock, fcntl.LOCK_UN, 1)

            return _write_for(write, letter, seconds)


def _drain(sock: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    with sock:
        while sock.recv_into(buffer):
            pass


def _write_for(write: collections.abc.Callable[[bytes], None], letter: str, seconds: float) -> int:
    message, written = letter.encode() * len(_SMALL), 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        write(message)
        written += 1
    return written


# -- one writer ---------------------------------------------------------------------------------


def _rows(code: str, names: dict[str, object], peer: socket.socket, calls: int = 1) -> Timed:
    """Time rows of writes; in between, and not timed, everything is read."""
    timer = timeit.Timer(code, globals=names)

    def timed(count: int) -> float:
        took_s = 0.0
        for begin in range(0, count, _ROW // calls):
            row = min(_ROW // calls, count - begin)
            took_s += timer.timeit(row)
            left = row * calls * len(_SMALL)
            while left:
                left -= len(peer.recv(left))
        return took_s

    return timed


def _small(plan: Plan, kind: str, runtime: shmsock.Runtime, other: int) -> list[Measure]:
    with contextlib.ExitStack() as stack:

        def pair() -> tuple[socket.socket, socket.socket]:
            ours, theirs = _connected(kind)
            stack.enter_context(theirs)
            return ours, theirs

        def reference(owner: int) -> tuple[shmsock.SocketRef, socket.socket]:
            ours, theirs = pair()
            sid = runtime.create_socket(ours, owner=owner)
            stack.callback(runtime.set_failed, sid, errno.ECONNABORTED, "")
            held = runtime.address(sid)
            assert held is not None
            return stack.enter_context(held), theirs

        mine, mine_read = reference(runtime.index)
        others, others_read = reference(other)
        addressed, addressed_read = reference(runtime.index)
        plain, plain_read = pair()
        stack.enter_context(plain)
        message: dict[str, object] = {"message": _SMALL}
        address = {"address": runtime.address, "sid": addressed.id}
        with_address = "with address(sid) as ref: ref.write(message)"
        small = time_calls(
            plan,
            {
                OURS: _rows("write(message)", {"write": mine.write, **message}, mine_read),
                "socket.send": _rows("send(message)", {"send": plain.send, **message}, plain_read),
                NOT_OWNER: _rows("write(message)", {"write": others.write, **message}, others_read),
                ADDRESSED: _rows(with_address, {**address, **message}, addressed_read),
            },
        )
        dispatcher = stack.enter_context(contextlib.closing(shmsock.Dispatcher(runtime)))
        write, send, sendmsg = mine.write, plain.send, plain.sendmsg

        def ten_writes() -> None:
            for _ in range(_A_TURN):
                write(_SMALL)

        turn: dict[str, object] = {
            "soon": dispatcher.call_soon,
            "turn": dispatcher.run_once,
            "ten": ten_writes,
        }
        ten = {"send": send, "message": _SMALL, "ten": range(_A_TURN)}
        ten_sends = "for _ in ten: send(message)"
        one = {"sendmsg": sendmsg, "ten": [_SMALL] * _A_TURN}
        turns = time_calls(
            plan,
            {
                OURS: _rows("soon(ten); turn(0)", turn, mine_read, _A_TURN),
                "ten times socket.send": _rows(ten_sends, ten, plain_read, _A_TURN),
                "one socket.sendmsg": _rows("sendmsg(ten)", one, plain_read, _A_TURN),
            },
        )
    return [
        Measure(f"write of 64 B, {kind}", "ns", "lower", small),
        Measure(f"ten writes of 64 B in one turn of the loop, {kind}", "ns", "lower", turns),
    ]


# Ours, its peer's end, a plain one, and its peer's.
Ends = tuple[socket.socket, socket.socket, socket.socket, socket.socket]


def _large(
    plan: Plan, kind: str, runtime: shmsock.Runtime, ends: Ends, reader: programs.Actor
) -> Measure:
    ours, ours_read, plain, plain_read = ends
    with contextlib.ExitStack() as stack:
        sid = runtime.create_socket(ours)
        stack.callback(runtime.set_failed, sid, errno.ECONNABORTED, "")
        held = runtime.address(sid)
        assert held is not None
        stack.enter_context(plain)
        stack.enter_context(held)
        reader.ask("drain", fds=[ours_read.fileno(), plain_read.fileno()])
        ours_read.close()
        plain_read.close()
        write, flush, sendall = held.write, held.flush, plain.sendall
        ours_names = {"write": write, "flush": flush, "message": _LARGE}
        statements = {
            OURS: timeit.Timer("write(message); flush()", globals=ours_names).timeit,
            "socket.sendall": timeit.Timer(
                "sendall(message)", globals={"sendall": sendall, "message": _LARGE}
            ).timeit,
        }
        samples = time_calls(plan, statements)
    return Measure(f"write of 1 MiB to a peer that reads, {kind}", "ns", "lower", samples)


# -- several writers ----------------------------------------------------------------------------


def _together(
    plan: Plan, runtime: shmsock.Runtime, ends: Ends, lock: int, writers: list[programs.Actor]
) -> list[Measure]:
    """Four processes write to one socket as fast as it takes them."""
    letters = "abcdefgh"[:WRITERS]
    ours, ours_read, plain, plain_read = ends
    with contextlib.ExitStack() as stack:
        sid = runtime.create_socket(ours)
        stack.callback(runtime.set_failed, sid, errno.ECONNABORTED, "")
        for sock in (plain, plain_read, ours_read):
            stack.enter_context(sock)

        def sampler(peer: socket.socket, do: str, **arguments: int) -> Sampler:
            def sample() -> dict[str, float]:
                began = time.monotonic()
                for writer, letter in zip(writers, letters, strict=True):
                    writer.tell(do, letter=letter, seconds=plan.slice_s, **arguments)
                answers: list[int] = []
                threading.Thread(
                    target=lambda: answers.extend(writer.answer() for writer in writers)
                ).start()
                counts = _count_letters(peer, letters, answers)
                rate = sum(counts) / (time.monotonic() - began)
                return {"rate": rate, "least over most": min(counts) / max(counts)}

            return sample

        taken = interleave(
            plan,
            {
                OURS: sampler(ours_read, "write", sid=sid),
                "sendall under an fcntl lock": sampler(
                    plain_read, "write_locked", fd=plain.fileno(), lock=lock
                ),
            },
        )
    title = f"{WRITERS} processes write 64 B to one socket"
    return [
        Measure(f"{title}, messages", "1/s", "higher", taken["rate"]),
        Measure(f"{title}, least over most of a writer", "x", "higher", taken["least over most"]),
    ]


def _count_letters(peer: socket.socket, letters: str, answers: list[int]) -> list[int]:
    """Read until everybody has said how much was written, and that has come."""
    counts = [0] * len(letters)
    peer.settimeout(0.05)
    deadline = time.monotonic() + _WATCHDOG_S
    while len(answers) < len(letters) or sum(counts) < sum(answers) * len(_SMALL):
        with contextlib.suppress(TimeoutError):
            data = peer.recv(1 << 18)
            counts = [
                n + data.count(letter.encode()) for n, letter in zip(counts, letters, strict=True)
            ]
        if time.monotonic() > deadline:
            raise BrokenError("a message was lost on its way")
    return [count // len(_SMALL) for count in counts]


def _write(plan: Plan) -> list[Measure]:
    name = f"bench-{os.getpid()}-write"
    with contextlib.ExitStack() as stack:
        runtime = stack.enter_context(
            shmsock.Runtime.create(name, slots=64, processes=16, stripes=8)
        )
        lock = os.memfd_create("bench-shmsock")
        stack.callback(os.close, lock)
        together, *large = ((*_connected(kind), *_connected(kind)) for kind in ("tcp", *KINDS))
        numbers = [lock, together[2].fileno()]
        numbers += [ends[at].fileno() for ends in large for at in (1, 3)]
        others = [
            stack.enter_context(programs.actor(*numbers, module="bench.write"))
            for _ in range(WRITERS)
        ]
        indexes = [other.ask("come", name=name) for other in others]
        for other in others[1:]:  # whose ends the first one alone will read
            other.ask("close", fds=numbers[2:])
        gc.collect()
        measures = [each for kind in KINDS for each in _small(plan, kind, runtime, indexes[0])]
        for kind, ends in zip(KINDS, large, strict=True):
            measures.append(_large(plan, kind, runtime, ends, others[0]))
        return measures + _together(plan, runtime, together, lock, others)


BENCHES = (
    Bench(
        "write",
        "writing: 64 bytes, ten times in a turn, 1 MiB, and four processes together",
        "`ref.write(message)` with nobody else at it: the turn is taken under the stripe, sent, "
        f"given back. The peer reads {_ROW} messages at a time, when nobody is timed. Not the "
        "owner: another process owns the socket. Ten in a turn: ten writes in one callback of a "
        "dispatcher, and that turn of its loop. 1 MiB: `write` and `flush`, against `sendall`; "
        f"another process reads. {WRITERS} processes: each writes as fast as it can to one TCP "
        "connection that this one reads; the peer is a socket that all inherited, and a lock.",
        _write,
    ),
)


def main() -> None:
    with contextlib.ExitStack() as stack:
        programs.obey(Other(stack))


if __name__ == "__main__":
    main()
