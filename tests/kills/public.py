"""What an application calls, interrupted at every bytecode: nothing leaks, nothing stays locked.

A host and a client share this process, so that everything that is kept anywhere can be looked at;
both have their service threads, and the exceptions come to the main thread alone.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import gc
import itertools
import os
import socket
import traceback
import typing

import shmsock
from shmsock.layout import SLOT_MASK
from shmsock.processes import ARBITER, REGISTRATION

from ..helpers import connected, descriptors, wait_until
from ..test_recovery import Operation
from .interrupts import Right, assert_unlocked, bytecodes_of, interrupt
from .stage import Plan, Stage, Tally
from .tracing import PUBLIC

MESSAGE = b"<" + b"0123456789abcdef" * 64 + b">"
_numbers = itertools.count()


@dataclasses.dataclass
class Set:
    """What one trial plays with.

    Attributes:
        sid: A socket of the client's, whose other end is ``peer``.
        made: What the operation made and the test must end.
        wrote: Whether whole messages must be found at the peer, or the socket have failed.
    """

    host: shmsock.Runtime
    client: shmsock.Runtime
    sid: int = 0
    peer: socket.socket | None = None
    made: list[typing.Any] = dataclasses.field(default_factory=list)
    wrote: bool = False


def create(trial: Set) -> Operation:
    ours, theirs = socket.socketpair()
    trial.made += [ours, theirs]
    return lambda: trial.made.append(trial.client.create_socket(ours, b"data"))


def address_and_close(trial: Set) -> Operation:
    return lambda: trial.client.address(trial.sid).close()  # type: ignore[union-attr]


def with_block(trial: Set) -> Operation:
    def block() -> None:
        with trial.client.address(trial.sid) as reference:  # type: ignore[union-attr]
            reference.user_data = b"new"
            assert reference.peer is not None

    return block


def fetch(trial: Set) -> Operation:
    """The first use of a descriptor that only the host has."""
    ours, theirs = socket.socketpair()
    sid = trial.host.create_socket(ours)
    trial.made += [theirs, sid]

    def first_use() -> None:
        with trial.client.address(sid) as reference:  # type: ignore[union-attr]
            reference.fileno()

    return first_use


def write(trial: Set) -> Operation:
    trial.wrote = True

    def send() -> None:
        with trial.client.address(trial.sid) as reference:  # type: ignore[union-attr]
            reference.write(MESSAGE)

    return send


def write_too_much(trial: Set) -> Operation:
    """The kernel takes a part; the rest is queued, with the turn and a reference."""
    trial.wrote = True

    def send() -> None:
        with trial.client.address(trial.sid) as reference:  # type: ignore[union-attr]
            reference.write(MESSAGE * 64)
            reference.write(MESSAGE)

    return send


def flush(trial: Set) -> Operation:
    """What waits is sent by whoever flushes."""
    send = write_too_much(trial)
    send()

    def drain() -> None:
        assert trial.peer is not None
        trial.peer.setblocking(False)
        with trial.client.address(trial.sid) as reference:  # type: ignore[union-attr]
            for _ in range(3):
                reference.flush(0.0)

    return drain


def set_failed(trial: Set) -> Operation:
    return lambda: trial.client.set_failed(trial.sid, 5, "interrupted")


def release(trial: Set) -> Operation:
    def let_go() -> None:
        with trial.client.address(trial.sid) as reference:  # type: ignore[union-attr]
            reference.release_additional_reference()

    return let_go


def dispatch(trial: Set) -> Operation:
    """A consumer is told, reads and answers."""
    dispatcher = shmsock.Dispatcher(trial.client)
    trial.made.append(dispatcher)

    def echo(reference: shmsock.SocketRef) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := reference.recv(100):
                reference.write(data)

    def run() -> None:
        dispatcher.add_consumer(trial.sid, echo)
        dispatcher.run_once(0)
        dispatcher.remove_consumer(trial.sid)

    assert trial.peer is not None
    trial.peer.sendall(b"ping")
    return run


def join_and_leave(trial: Set) -> Operation:
    def both() -> None:
        runtime = shmsock.Runtime.attach(trial.host.name)
        trial.made.append(runtime)
        runtime.address(trial.sid)
        runtime.close()

    return both


OPERATIONS = {
    operation.__name__: operation
    for operation in (
        create, address_and_close, with_block, fetch, write, write_too_much, flush, set_failed,
        release, dispatch, join_and_leave,
    )
}  # fmt: skip


# A number that the kernel has just given, and that no object owns yet when the exception comes, is
# lost: no Python code can do anything about that. One at a time, and it is counted.
ADRIFT = ("create", "fetch", "join_and_leave")


def locks_of(*runtimes: shmsock.Runtime) -> dict[str, typing.Any]:
    found: dict[str, typing.Any] = {}
    for number, runtime in enumerate(runtimes):
        found |= {
            f"{number} engine.lock": runtime._engine.lock,
            f"{number} writers._lock": runtime._writers._lock,
            f"{number} service._lock": runtime._service._lock,
            f"{number} service._watching": runtime._service._watching,
            f"{number} lock_file._mutex": runtime._lock_file._mutex,
        }
        link = runtime._descriptors._link
        if link is not None:
            found[f"{number} link._lock"] = link._lock
        for byte in (ARBITER, REGISTRATION):
            found[f"{number} lock_file byte {byte}"] = Right(runtime._lock_file, byte)
    return found


class Theatre:
    """A host and a client that live through all trials, until one has failed."""

    def __init__(self) -> None:
        self._where = ""
        self.adrift = 0
        name = f"t{os.getpid()}-p{next(_numbers)}"
        self.host = shmsock.Runtime.create(name, slots=16, processes=8, stripes=2)
        self.client = shmsock.Runtime.attach(name)
        self._trial("with_block", lambda operation: operation())  # connects what stays connected
        self._trial("create", lambda operation: operation())
        self._trial("fetch", lambda operation: operation())
        seen: list[int] = []  # the host lets go of what it kept in its own time
        wait_until(lambda: seen.append(self._census()) or len(seen) > 100)  # type: ignore[func-returns-value]
        self._descriptors = min(seen)

    def _census(self) -> int:
        """How many numbers are open, without what is kept for later, of which there may be more.

        An idle connection to the host has two ends.
        """
        kept = 2 * len(self.client._descriptors._idle_fetchers)
        for runtime in (self.host, self.client):
            kept += len(runtime._semaphores._spares)
        return len(descriptors()) - kept

    def close(self) -> None:
        self.client.close()
        self.host.close()
        self.host.unlink()

    def bytecodes_of(self, what: str) -> int:
        counts: list[int] = []
        self._trial(what, lambda operation: counts.append(bytecodes_of(operation, PUBLIC)))
        return counts[0]

    def trial(self, what: str, kind: str, at: int) -> None:
        """One position."""
        self._where = ""

        def interrupted(operation: Operation) -> None:
            def watched() -> None:
                try:
                    operation()
                except KeyboardInterrupt as error:
                    self._where = str(traceback.extract_tb(error.__traceback__)[-1])
                    raise

            interrupt(watched, kind, at, 0, PUBLIC)

        self._trial(what, interrupted, lambda: "/shmsock/" not in self._where)
        gc.collect(0)
        try:
            wait_until(lambda: self._census() <= self._descriptors, "", 3.0)
        except AssertionError:
            if what in ADRIFT and self._census() == self._descriptors + 1:
                self.adrift += 1
                self._descriptors += 1
                return
            raise AssertionError(
                f"{self._census() - self._descriptors} descriptors are left: {descriptors()}; "
                f"it came in {self._where}"
            ) from None

    def _trial(
        self,
        what: str,
        run: collections.abc.Callable[[Operation], object],
        is_outside: collections.abc.Callable[[], bool] = lambda: False,
    ) -> None:
        ours, peer = connected("unix", 4096)
        trial = Set(self.host, self.client, self.client.create_socket(ours), peer)
        try:
            run(OPERATIONS[what](trial))
            assert_unlocked(**locks_of(self.host, self.client))
            self._end(trial, is_outside())
        finally:
            peer.close()

    def _end(self, trial: Set, lost_outside: bool) -> None:
        """Close what the test can reach; then nothing may be left."""
        assert trial.peer is not None
        if trial.wrote:
            self._check_stream(trial)
        for made in trial.made:
            if isinstance(made, int):
                self.host.set_failed(made)
            else:
                made.close()
        self.client.set_failed(trial.sid)
        self.client._service.call_soon(self.client._tick)
        self.host._service.call_soon(self.host._tick)
        if lost_outside:  # an id or a runtime that was returned and never arrived: nobody's fault
            for row in self.client.sockets():
                self.client.set_failed(int(row["id"]))
        wait_until(lambda: self.host.in_use() == 0, f"slots are left: {self._left()}", 3.0)
        wait_until(lambda: not self.client._engine.held_slots(), "a reference is left", 3.0)
        wait_until(lambda: len(self.host.processes()) == 2, "a process row is left", 3.0)
        assert self.host.audit() == []

    def _left(self) -> list[dict[str, object]]:
        return [{n: row[n] for n in row.dtype.names} for row in self.host.sockets()]

    def _check_stream(self, trial: Set) -> None:
        """The peer has whole messages, or the socket has failed."""
        assert trial.peer is not None
        trial.peer.settimeout(3.0)
        reference = self.client.address(trial.sid)
        if reference is not None:
            with reference:
                received = bytearray()
                trial.peer.setblocking(False)

                def is_out() -> bool:
                    with contextlib.suppress(BlockingIOError):
                        while chunk := trial.peer.recv(65536):  # type: ignore[union-attr]
                            received.extend(chunk)
                    return reference.failed or reference.flush(0.01)

                with contextlib.suppress(shmsock.SocketFailedError):
                    wait_until(is_out, "what is queued is sent", 3.0)
                    is_out()
                    if not reference.failed:
                        assert len(received) % len(MESSAGE) == 0, "a message was torn"
                        assert bytes(received) == MESSAGE * (len(received) // len(MESSAGE))
                        writer = self.client._segment.cells.writer[trial.sid & SLOT_MASK]
                        assert not writer, "the write turn is left"


def run(stage: Stage, plan: Plan) -> collections.abc.Iterator[Tally]:
    """Both kinds of exception, one at a time."""
    theatre = Theatre()
    try:
        for kind in ("signal", "async"):
            tally = Tally(f"public, {kind}", must=())
            with tally.timed():
                for what in OPERATIONS:
                    count = theatre.bytecodes_of(what)
                    for at in plan.positions(count, f"{tally.kind} {what}"):
                        if not _one(tally, theatre, what, kind, at):
                            tally.adrift += theatre.adrift
                            theatre.close()
                            theatre = Theatre()
            tally.adrift += theatre.adrift
            theatre.adrift = 0
            yield tally
    finally:
        theatre.close()


def _one(tally: Tally, theatre: Theatre, what: str, kind: str, at: int) -> bool:
    """One position; returns whether the theatre can go on."""
    tally.positions += 1
    try:
        theatre.trial(what, kind, at)
    except Exception:
        tally.failures.append(f"{tally.kind}, {what} at {at}:\n{traceback.format_exc()}")
        return False
    tally.recovered += 1
    return True
