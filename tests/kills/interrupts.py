"""KeyboardInterrupt and PyThreadState_SetAsyncExc at every bytecode of every transition.

The one who is interrupted lives: what it held, owned or wrote stays its own, and nothing of it is
left for ever, neither a claim nor a lock.
"""

from __future__ import annotations

import collections.abc
import contextlib
import signal
import sys
import threading
import time
import types
import typing
from unittest import mock

from shmsock.processes import ARBITER, REGISTRATION, LockFile

from ..helpers import Forked, Member
from ..test_recovery import OPERATIONS, Operation, attach_and_die, kept, live_sockets
from .stage import SLOT, Plan, Stage, Tally, impatient
from .tracing import PROTOCOL, Pending, Tracer

GAPS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)  # how long after the first the second exception comes
KINDS = {"signal": "signal", "async": "async", "signal, twice": "signal"}


def interrupt(
    operation: Operation, kind: str, at: int, gap: int = 0, files: tuple[str, ...] = PROTOCOL
) -> bool:
    """Raise in the middle of an operation, and with a gap once more so much later.

    Returns:
        Whether it was interrupted; what is pending has been raised either way.
    """
    pending = Pending(kind)
    tracer = Tracer(at, pending.set, files)

    def handler(number: int, frame: types.FrameType | None) -> typing.NoReturn:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tracer.again(gap)
        raise KeyboardInterrupt

    if gap:
        signal.signal(signal.SIGINT, handler)
    interrupted = False
    try:
        try:
            try:
                with tracer:
                    operation()
                let_it_come()
            except KeyboardInterrupt:
                interrupted = True
            let_it_come()
        except KeyboardInterrupt:
            interrupted = True
        let_it_come()
    finally:
        Tracer._off()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return interrupted


def let_it_come() -> None:
    """Some bytecodes at which CPython looks for what is pending."""
    for _ in range(3):
        time.monotonic()


def bytecodes_of(operation: Operation, files: tuple[str, ...] = PROTOCOL) -> int:
    with Tracer(0, lambda: None, files) as tracer:
        operation()
    return tracer.count


def assert_unlocked(**locks: typing.Any) -> None:
    """None of these is held; called by the thread that would have it, with nothing going on."""
    for name, lock in locks.items():
        if isinstance(lock, type(threading.RLock())):
            assert not lock._is_owned(), f"{name} is still held"  # type: ignore[attr-defined]
        assert lock.acquire(timeout=1.0), f"{name} is still held"
        lock.release()


def locks_of(member: Member) -> dict[str, typing.Any]:
    """The local locks of a process's half of the protocol."""
    lock_file = member.lock_file
    return {
        "engine.lock": member.engine.lock,
        "lock_file._mutex": lock_file._mutex,
        "lock_file._open_lock": lock_file._open_lock,
        "the arbiter": Right(lock_file, ARBITER),
        "registration": Right(lock_file, REGISTRATION),
    }


class Right:
    """A byte that one process and thread has at a time, as a lock."""

    def __init__(self, lock_file: LockFile, byte: int) -> None:
        self._stack, self._lock_file, self._byte = contextlib.ExitStack(), lock_file, byte

    def acquire(self, timeout: float) -> bool:
        return self._stack.enter_context(self._lock_file.exclusive(self._byte, timeout))

    def release(self) -> None:
        self._stack.close()


class Sufferer:
    """A member that owns, holds and writes to a socket of its own all the while."""

    def __init__(self, table: Member) -> None:
        self.member = Member.attach(table.name, table.module)
        self.owned = self.member.new()
        assert self.member.engine.take_turn(self.owned)
        self.hold = self.member.engine.address(self.owned)

    def check(self) -> None:
        """Nothing of its own was lost, nothing else is left."""
        member = self.member
        status = member.engine.status(self.owned)
        assert status.name == "LIVE", f"its own socket is {status}"
        assert member.cells.writer[self.owned & SLOT] == member.word
        assert member.nref(self.owned) == 2
        assert member.engine.held_slots() == [self.owned & SLOT]

    def leave(self) -> None:
        self.hold.close()
        self.member.leave()


def _transition(stage: Stage, what: str, kind: str, at: int, gap: int, *, alone: bool) -> None:
    """One position.

    Args:
        alone: Whether the one who was interrupted mends it; else another process does.
    """
    table = stage.table
    scene = stage.scene()
    sufferer = Sufferer(table)
    other = sufferer.member
    operation = INTERRUPTED[what](other, scene.sid)
    interrupted = interrupt(operation, kind, at, gap)
    assert_unlocked(**locks_of(other))
    del operation
    while kept:
        kept.pop().close()  # whatever was interrupted, what is in hand can be given back
    if alone:
        for stripe in range(table.layout.stripes):
            assert other.engine.run(stripe, lambda *_: 1, -1) == 1
    else:
        other.engine.own_up()  # the timer
        for stripe in range(table.layout.stripes):
            assert table.engine.run(stripe, lambda *_: 1, -1) == 1
    other.engine.collect()  # the timer
    other.recovery.look()
    assert not other.columns.claims.any(), "a claim is left"
    scene.take_back(other)
    created = [sid for sid in live_sockets(other) if sid != sufferer.owned]
    assert len(created) <= (what == "create"), "a socket is left that nobody knows of"
    if interrupted and not gap:
        # The id may be on its way to the caller when the exception comes; nothing can be done then.
        assert len(created) <= 1
    for sid in created:
        other.engine.set_failed(sid, 1, "")
    sufferer.check()
    sufferer.leave()
    scene.check("interrupted")


def _repair(stage: Stage, what: str, kind: str, at: int, gap: int, *, alone: bool) -> None:
    """A repairer is interrupted; either it tries again, or another one does."""
    table = stage.table
    scene = stage.scene()
    sufferer = Sufferer(table)
    Forked(attach_and_die, table, scene.sid).wait()
    table.cells.claims[table.index * table.layout.stripes + 1] = table.cells.ctl[1] | 3
    interrupt(lambda: sufferer.member.recovery.look(), kind, at, gap)
    assert_unlocked(**locks_of(sufferer.member))
    if gap:
        sufferer.member.lock_file.reassert()  # the timer
    assert sufferer.member.lock_file.try_hold(ARBITER), "the arbiter's byte is left"
    sufferer.member.lock_file.drop(ARBITER)
    (sufferer.member if alone else table).recovery.look()
    table.recovery.look()
    sufferer.check()
    sufferer.leave()
    scene.check("attach")


def _leave(stage: Stage, what: str, kind: str, at: int, gap: int, *, alone: bool) -> None:
    """Leaving is interrupted; what is not given back by oneself is by others, once one is gone."""
    scene = stage.scene()
    sufferer = Sufferer(stage.table)
    member = sufferer.member
    reference = member.engine.address(scene.sid)
    interrupt(lambda: _reap_oneself(member), kind, at, gap)
    assert_unlocked(**locks_of(member))
    if alone:
        _reap_oneself(member)
    member.close()
    stage.table.recovery.look()
    del reference
    scene.check("attach")


def _reap_oneself(member: Member) -> None:
    member.engine.detach_all()
    with member.engine.lock:
        member.engine.closed = True
    with member.recovery.arbitrated(timeout_s=1.0):
        member.recovery.reap(member.index)


Trial = collections.abc.Callable[..., None]


def drop(member: Member, sid: int) -> Operation:
    """The last one to let go does so in a finaliser, which cannot pass on what it is raised."""
    kept.append(member.engine.address(sid))
    return kept.clear


UNRAISABLE = "drop"
INTERRUPTED = {**OPERATIONS, UNRAISABLE: drop}

TRIALS: dict[str, Trial] = {
    **dict.fromkeys(INTERRUPTED, _transition),
    "repair": _repair,
    "leave": _leave,
}
_RARE = {"repair": 4, "leave": 4}


def _bytecodes(stage: Stage, what: str) -> int:
    """How many bytecodes, about: the longest way that was seen."""
    if what in INTERRUPTED:
        scene, sufferer = stage.scene(), Sufferer(stage.table)
        count = bytecodes_of(INTERRUPTED[what](sufferer.member, scene.sid))
        while kept:
            kept.pop().close()
        scene.take_back(sufferer.member)
        for sid in live_sockets(sufferer.member):
            if sid != sufferer.owned:
                sufferer.member.engine.set_failed(sid, 1, "")
        sufferer.leave()
        scene.check("interrupted")
        return count
    return 2400 if what == "repair" else 2000


def run(stage: Stage, plan: Plan) -> collections.abc.Iterator[Tally]:
    """Both kinds of exception, and two of them."""
    for label, kind in KINDS.items():
        tally = Tally(label, must=("retired", "recounted"))
        gaps = GAPS if "twice" in label else (0,)
        with tally.timed(), impatient():
            for what, trial in TRIALS.items():
                stride = plan.stride * _RARE.get(what, 1) * (3 if len(gaps) > 1 else 1)
                count = _bytecodes(stage, what)
                for number, at in enumerate(plan.positions(count, f"{label} {what}", stride)):
                    gap = gaps[(number * 7) % len(gaps)]
                    with stage.trial(tally, f"{what} at {at} gap {gap}"), _whole(stage):
                        trial(stage, what, kind, at, gap, alone=bool(number % 2))
        yield tally


@contextlib.contextmanager
def _whole(stage: Stage) -> collections.abc.Iterator[None]:
    """A stray KeyboardInterrupt is a finding, not the end of the run."""
    try:
        # What is raised in a finaliser is told to this hook and goes no further.
        with mock.patch.object(sys, "unraisablehook", id):
            yield
    except KeyboardInterrupt as error:
        raise AssertionError("the exception came after everything was over") from error
