"""Simulated processes and their threads: the real engine and recovery of each."""

from __future__ import annotations

import dataclasses
import functools
import typing

from shmsock.processes import Processes
from shmsock.recovery import Recovery

from . import memory

if typing.TYPE_CHECKING:
    from .world import World

READY, NAPS, WAITS, ENDED = range(4)

_BODIES = (
    "_attach", "_detach", "_create", "_set_failed", "_release", "_take_turn", "_give_turn",
    "_change_owner", "_offer", "_withdraw", "_inherit", "_set_user_data",
)  # fmt: skip


class Violation(AssertionError):
    """The protocol broke a promise."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How far to look.

    Attributes:
        switches: Times a thread is interrupted though it could go on; being blocked is free.
        kills: Processes killed; at least one survives.
        raises: Asynchronous exceptions.
        fences: Live processes taken for dead.
    """

    switches: int = 2
    kills: int = 0
    raises: int = 0
    fences: int = 0


class Thread:
    """One thread of one simulated process."""

    def __init__(self, number: int, process: Process, name: str) -> None:
        self.id, self.process, self.name = number, process, name
        self.greenlet: typing.Any = None
        self.digest, self.status = 0, READY
        self.waits_for: typing.Any = None
        self.timed = False
        self.napped_at = 0  # world.progress when the nap began
        self.naps = self.asked = 0
        self.clock_s = 1000.0
        self.dead = False


class Process:
    """One participant: the real engine and recovery over simulated memory."""

    def __init__(self, world: World, index: int, engine_module: typing.Any, threads: int) -> None:
        # Its place in the world, and its row once it has registered.
        self.number = self.index = index
        self.world, self.module = world, engine_module
        shared = threads > 1
        self.alive, self.fenced, self.left = True, False, False
        self.was_busy = False  # when it was killed
        self.word = 0
        self.threads: list[Thread] = []
        self.idle = Thread(-1 - index, self, f"P{index}")
        self.pending: tuple[int, int] | None = None  # an OWN claim in the store buffer
        self.lock_file = memory.Bytes(world, index)
        segment: typing.Any = world.memory
        self.processes = Processes(segment, self.lock_file)
        self.semaphores = memory.Handles(world.layout.stripes)
        self.engine: typing.Any = None
        self.recovery: typing.Any = None
        self.shared = shared

    def is_participant(self) -> bool:
        """Whether it lives, has not left and was not taken for dead."""
        return self.alive and not self.fenced and not self.left

    def join(self, index: int, epoch: int) -> None:
        """Have an engine and a recovery, for the row that was registered."""
        self.index, self.word = index, epoch << 16 | index
        world, segment = self.world, typing.cast(typing.Any, self.world.memory)
        self.engine = self.module.Engine(
            segment, self.semaphores, self.index, epoch, self.module.Reference
        )
        self.engine.lock = memory.Lock(world, self.shared)
        if self.shared:
            self.engine._holds = memory.Private(world, "count")
        self.recovery = Recovery(segment, self.processes, self.semaphores, self.engine)
        self.engine.repair = self.recovery.look
        block = world.layout.block
        for name in _BODIES:
            body = getattr(self.engine, name)
            by_slot = name != "_create"
            setattr(self.engine, name, functools.partial(self._inside, body, by_slot, block))
        recount = self.recovery.recount
        self.recovery.recount = functools.partial(self._recount, recount)

    def _inside(self, body: typing.Any, by_slot: bool, block: int, slot: int, arg: object) -> int:
        world = self.world
        stripe = slot // block if by_slot else slot
        if world.enter(stripe):
            try:
                return int(body(slot, arg))
            finally:
                world.leave(stripe)
        return int(body(slot, arg))

    def _recount(self, recount: typing.Any, stripe: int, dead: typing.Any) -> None:
        world = self.world
        entered = world.enter(stripe)
        try:
            recount(stripe, dead)
        finally:
            if entered:
                world.leave(stripe)

    def counts(self) -> tuple[typing.Any, ...]:
        """The private memory that a later operation may depend on."""
        engine = self.engine
        if engine is None:
            return ()
        return (
            tuple(sorted((slot, tuple(sorted(found))) for slot, found in engine._holds.items())),
            tuple(engine._dropped),
            tuple(sorted(engine.marked)),
            engine.lock.owner.id if engine.lock.owner is not None else None,
        )

    def summary(self) -> tuple[typing.Any, ...]:
        """``counts`` and all else that is private."""
        return (
            *self.counts(),
            self.semaphores.known(),
            tuple(self.recovery._blocked) if self.recovery else (),
            getattr(self.engine, "_next_stripe", 0),
            tuple(sorted(self.lock_file._held)),
            tuple(sorted(self.lock_file._users)),
        )
