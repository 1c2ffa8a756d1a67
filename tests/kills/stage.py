"""A table, what is done to it while dying, and the books of a run."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import itertools
import os
import random
import signal
import time
import traceback
import types
import typing

import shmsock
from shmsock import _stripes_py
from shmsock.layout import CLOSED, OPEN, OWN

from ..helpers import Forked, Member, die
from ..test_recovery import OPERATIONS, SLOT, Operation, Scene, kept
from .tracing import PROTOCOL, Tracer

# In the child: attach, get ready, and return what dies.
Prepare = collections.abc.Callable[[Member, int], Operation]

_numbers = itertools.count()


@dataclasses.dataclass
class Tally:
    """What one kind of test found.

    Attributes:
        kind: What was killed or interrupted, and how.
        must: Which of the figures may not be zero, or the kind has not tested what it is for.
        positions: How many were tried; equally many processes died, or exceptions were raised.
        recovered: After how many of them everything was sound again.
        tokens_lost: How often a semaphore was left without its token.
        ownerless: How often of those no claim said that anybody was inside.
        retired: Stripes that were given a new semaphore.
        recounted: Blocks that were recounted.
        reaped: Rows that were given back.
        adrift: Descriptors that an exception took before any object had them.
        failures: What was not sound, with its position.
    """

    kind: str
    must: tuple[str, ...] = ("tokens_lost", "ownerless", "retired", "recounted", "reaped")
    positions: int = 0
    recovered: int = 0
    tokens_lost: int = 0
    ownerless: int = 0
    retired: int = 0
    recounted: int = 0
    reaped: int = 0
    adrift: int = 0
    seconds: float = 0.0
    skipped: str = ""
    failures: list[str] = dataclasses.field(default_factory=list)

    def problems(self) -> list[str]:
        """Why the run has failed; nothing if it has not."""
        if self.skipped:
            return []
        empty = [each for each in ("positions", *self.must) if not getattr(self, each)]
        return [*self.failures, *(f"{self.kind}: {each} is zero" for each in empty)]

    @contextlib.contextmanager
    def timed(self) -> collections.abc.Iterator[Tally]:
        """Count the seconds."""
        started = time.monotonic()
        try:
            yield self
        finally:
            self.seconds += time.monotonic() - started


@dataclasses.dataclass(frozen=True)
class Plan:
    """How densely to try.

    Attributes:
        stride: Every how many bytecodes.
        seed: Where to begin, and what the random positions are.
    """

    stride: int = 1
    seed: int = 0

    def positions(self, count: int, what: str, stride: int = 0) -> range:
        """Which of ``count`` positions to try; different ones for each ``what``."""
        stride = stride or self.stride
        return range(1 + random.Random(f"{self.seed} {what}").randrange(stride), count + 1, stride)

    def random(self, what: str) -> random.Random:
        """Random numbers that the seed alone decides."""
        return random.Random(f"{self.seed} {what}")


class Stage:
    """One table after the other: what has failed a check is not used again."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module = module
        self.table = self._make()

    def _make(self) -> Member:
        return Member.create(f"t{os.getpid()}-k{next(_numbers)}", self.module)

    def close(self) -> None:
        self.table.close()
        self.table.unlink()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def trial(self, tally: Tally, where: str) -> collections.abc.Iterator[None]:
        """One position: count it, and note it if what is inside raises."""
        before = dict(self.table.recovery.counters)
        try:
            yield
        except Exception:
            tally.failures.append(f"{tally.kind}, {where}:\n{traceback.format_exc()}")
            self.close()
            self.table = self._make()
        else:
            tally.recovered += 1
            after = self.table.recovery.counters
            tally.retired += after["retired"] - before["retired"]
            tally.recounted += after["recounted"] - before["recounted"]
            tally.reaped += after["reaped"] - before["reaped"]
        finally:
            tally.positions += 1
            kept.clear()

    def scene(self) -> Scene:
        """A socket to act on, held by the survivor, and a bystander in the same stripe."""
        return Scene(self.table, held=True)

    def count_lost(self, tally: Tally) -> bool:
        """Look for semaphores without a token, before anybody repairs; nobody is inside."""
        found = False
        for stripe, control in enumerate(self.table.cells.ctl):
            semaphore = self.table.semaphores.get(stripe, control >> 2)
            if semaphore is not None and semaphore.value == 0 and control & 3 == OPEN:
                found = True
                tally.tokens_lost += 1
                claims = self.table.columns.claims[:, stripe]
                tally.ownerless += not ((claims & 3) == OWN).any()
        return found


# -- dying --------------------------------------------------------------------------------------


def _of_a_member(what: str) -> Prepare:
    def prepare(table: Member, sid: int) -> Operation:
        return OPERATIONS[what](Member.attach(table.name, table.module), sid)

    return prepare


def register(table: Member, sid: int) -> Operation:
    """Take a row."""
    return lambda: kept.append(Member.attach(table.name, table.module))


def leave(table: Member, sid: int) -> Operation:
    """Be reaped by oneself, with something to give back."""
    member = Member.attach(table.name, table.module)
    kept.extend([member.engine.address(member.new()), member.engine.address(sid)])
    member.engine.take_turn(member.new())
    return member.leave


def runtime_join(table: Member, sid: int) -> Operation:
    """All of ``Runtime.attach``."""
    return lambda: kept.append(shmsock.Runtime.attach(table.name))


def runtime_leave(table: Member, sid: int) -> Operation:
    """``Runtime._leave``, with something to give back."""
    runtime = shmsock.Runtime.attach(table.name)
    kept.append(runtime.address(sid))
    runtime._engine.create(runtime._engine.word)
    return runtime._leave


DYING: dict[str, Prepare] = {
    **{what: _of_a_member(what) for what in OPERATIONS},
    "register": register,
    "leave": leave,
    "runtime_join": runtime_join,
    "runtime_leave": runtime_leave,
}


def look(table: Member, sid: int) -> Operation:
    """Repair as the timer does."""
    member = Member.attach(table.name, table.module)
    return lambda: member.recovery.look()


def take_every_stripe(table: Member, sid: int) -> Operation:
    """Repair as somebody does who merely wants in."""
    member = Member.attach(table.name, table.module)

    def take() -> None:
        for stripe in range(table.layout.stripes):
            member.engine.run(stripe, lambda *_: 1, -1)

    return take


def killed_at(table: Member, prepare: Prepare, sid: int, at: int) -> int:
    """Let a child die by SIGKILL before a bytecode.

    Returns:
        0 when it was killed; else how many bytecodes it took to the end of what it does.
    """

    def child() -> int:
        operation = prepare(table, sid)
        with Tracer(at, die, PROTOCOL) as tracer:
            operation()
        return tracer.count

    with Forked(child) as victim:
        try:
            return int(victim.result())
        except AssertionError:
            status = victim.wait()
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                return 0
            raise


@contextlib.contextmanager
def impatient() -> collections.abc.Iterator[None]:
    """A contended stripe is looked at soon: a run waits at thousands of them."""
    before = _stripes_py._LOOK_AFTER_S
    _stripes_py._LOOK_AFTER_S = 0.001
    try:
        yield
    finally:
        _stripes_py._LOOK_AFTER_S = before


def assert_tokens(table: Member) -> None:
    """Whoever merely took each stripe has left each with one token.

    A stripe may still be OPENING: its token was posted, and whoever wants in need not wait for the
    timer to retire it.
    """
    for stripe, control in enumerate(table.cells.ctl):
        assert control & 3 != CLOSED, f"stripe {stripe} is closed"
        semaphore: typing.Any = table.semaphores.get(stripe, control >> 2)
        assert semaphore.value == 1, f"stripe {stripe} has {semaphore.value} tokens"


__all__ = ["DYING", "SLOT", "Plan", "Stage", "Tally"]
