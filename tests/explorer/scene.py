"""What one thread does, and what must hold when all have ended or died."""

from __future__ import annotations

import collections.abc
import typing

from shmsock.errors import ClosedError, TableFullError
from shmsock.layout import FREE, LIVE, OPEN, SLOT_MASK

from .memory import FIRST_VERSION
from .participants import Process
from .world import World

Program = collections.abc.Callable[["Actor"], None]
SID = FIRST_VERSION << 32  # the first life of slot 0


class Actor:
    """What one thread does, and what it remembers."""

    def __init__(self, scene: Scene, process: Process) -> None:
        self.scene, self.world, self.process = scene, scene.world, process
        self.references: list[typing.Any] = []
        self.operations = self.interrupted = 0
        # Whether it is in the middle of reading the socket, and has said so in ``busy``.
        self.reads = self.half_read = False
        self.books: list[int] = []

    def do(self, operation: str, *arguments: typing.Any) -> typing.Any:
        """Call a method of the engine; an exception that was raised into it ends it alone."""
        return self.call(getattr(self.process.engine, operation), *arguments)

    def call(self, function: typing.Any, *arguments: typing.Any) -> typing.Any:
        """Call anything."""
        self.rest()
        try:
            return function(*arguments)
        except KeyboardInterrupt:
            self.interrupted += 1
            return None
        except ClosedError:
            if not self.process.fenced:
                raise
            return None

    def rest(self) -> None:
        """Between two operations only what is remembered matters, not how it came about."""
        thread = self.world.current
        self.operations += 1
        thread.digest = hash(
            (self.operations, self.interrupted, self.remembered(), self.process.summary())
        )

    def remembered(self) -> tuple[typing.Any, ...]:
        references = tuple((each.id, each._serial) for each in self.references)
        return references, self.reads, tuple(self.books)

    def remember(self, value: int) -> None:
        """For later: what is not written down here must not matter after the next operation."""
        self.books.append(value)

    def address(self, sid: int, failed_too: bool = False) -> typing.Any:
        """Take a reference; it must be one."""
        ended = sid in self.scene.failed
        reference = self.do("address", sid, failed_too)
        if reference is not None:
            if ended and not failed_too:
                self.world.violation(f"{sid:#x} was addressed after it had failed")
            self.references.append(reference)
            self.look(reference)
        return reference

    def look(self, reference: typing.Any) -> None:
        """While it is held the slot is ours: the version v or v + 1, and nobody may recycle it."""
        if self.process.fenced:
            return
        version, _, state = self.world.peek(reference.id)
        slot = reference.id & SLOT_MASK
        held = int(self.world.memory.raw.held[slot, self.process.index])
        if not held or state != LIVE or version & ~1 != reference.id >> 32:
            self.world.violation(
                f"P{self.process.index} has a reference on {reference.id:#x}, but held is {held}, "
                f"state {state}, version {version}"
            )

    def use(self) -> None:
        """Look at what is held, in one more access so that others may come between."""
        for reference in self.references:
            self.call(lambda reference=reference: reference.failed)
            self.look(reference)

    def tick(self) -> None:
        """What the timer does."""
        self.call(self.process.recovery.look)
        self.call(self.process.engine.collect)

    def close(self) -> None:
        """Give everything back."""
        while self.references:
            reference = self.references.pop()
            self.call(reference.close)
            if not reference.closed:  # interrupted: whoever drops it repeats it
                self.call(reference.close)

    def set_failed(self, sid: int) -> None:
        """Fail a socket, and keep the books about who won."""
        result = self.do("set_failed", sid, 5, "failed")
        if result:
            self.scene.winners.append((sid, self.process.index))
        if result is not None and not self.process.fenced:
            self.scene.failed.add(sid)

    def create(self) -> int:
        """Make a socket that this process owns."""
        try:
            sid = self.do("create", self.process.engine.word)
        except TableFullError:  # somebody holds the one slot there is
            return 0
        if sid:
            self.scene.created.append(sid)
        return sid or 0


class Scene:
    """The processes of one run, and the checks at its end."""

    def __init__(
        self,
        world: World,
        threads: collections.abc.Sequence[int],
        ready: int,
        rehomed: bool = False,
        given: bool = False,
    ) -> None:
        """``threads`` of each process; ``ready`` sockets are made by process 0.

        They outlive their owner if ``rehomed`` or ``given``, which has its own checks each.
        """
        self.world = world
        self.rehomed = rehomed
        self.failed: set[int] = set()
        self.winners: list[tuple[int, int]] = []
        self.created: list[int] = []
        self.actors: list[Actor] = []
        self.offering = False  # whether somebody ended without withdrawing
        for count in threads:
            world.add_process(count)
        first = world.processes[0]
        world.current = first.idle
        for _ in range(ready):
            first.engine._next_stripe = -1
            first.engine.create(first.engine.word, on_owner_death=int(rehomed or given))

    def thread(self, index: int, program: Program) -> Actor:
        """One more thread of process ``index``."""
        actor = Actor(self, self.world.processes[index])
        self.actors.append(actor)
        self.world.add_thread(self.world.processes[index], lambda: program(actor))
        return actor

    def acts(self, process: Process) -> collections.abc.Iterator[Actor]:
        return (actor for actor in self.actors if actor.process is process)

    # -- the end --------------------------------------------------------------------------------

    def survivors(self) -> list[Process]:
        return [
            each
            for each in self.world.processes
            if each.alive and not each.fenced and not each.left
        ]

    def check(self) -> None:
        """Those who live repair what the dead left; then the books balance and all can be used."""
        for process in self.survivors():
            self._as(process)
            for _ in range(4):
                process.recovery.look()
        self.audit()
        for process in self.survivors():
            self._as(process)
            for actor in self.acts(process):
                actor.use()
            self._check_counts(process)
        for process in self.survivors():
            self._as(process)
            for actor in self.acts(process):
                while actor.references:
                    actor.references.pop().close()
            process.engine.collect()
            self._check_counts(process)
            if process.engine._holds or process.engine._dropped:
                self.world.violation(f"P{process.index} still counts a reference after the last")
        self.audit()
        self._check_known()
        self._check_rehomed()
        self._check_heirs()
        self._check_winners()
        self._check_usable()

    def _as(self, process: Process) -> None:
        self.world.current = process.idle

    def audit(self) -> None:
        """DESIGN section 5's invariants, by the real audit and by looking at the stripes."""
        world = self.world
        process = self.survivors()[0]
        self._as(process)
        complaints = sorted(breach.text for breach in process.recovery.auditor.look())
        if complaints:
            world.violation("after recovery: " + "; ".join(complaints))
        for stripe, control in enumerate(world.memory.raw.ctl.tolist()):
            token = world.names.get((stripe, control >> 2))
            if control & 3 != OPEN or token is None or token.value != 1:
                world.violation(
                    f"stripe {stripe} is stuck: ctl ({control >> 2}, {control & 3}), "
                    f"token {'gone' if token is None else token.value}"
                )
        if world.memory.raw.claims.any():
            world.violation(f"a claim was left: {world.memory.raw.claims.tolist()}")
        versions = (world.memory.raw.versioned_ref >> 32).tolist()
        for slot, (version, lives) in enumerate(zip(versions, world.recycled, strict=True)):
            if version & ~1 != FIRST_VERSION + 2 * lives:
                world.violation(f"slot {slot} has version {version} after {lives} lives")

    def _check_counts(self, process: Process) -> None:
        """A process is attached exactly to what it counts references on."""
        held = self.world.memory.raw.held[:, process.index].tolist()
        counted = [int(bool(process.engine.count(slot))) for slot in range(len(held))]
        if held != counted:
            self.world.violation(f"P{process.index}: held {held}, but it counts {counted}")

    def _check_known(self) -> None:
        """Nothing lives that nobody can end: whoever made it was told, or died."""
        raw = self.world.memory.raw
        told = not any(actor.interrupted for actor in self.actors)
        for slot, state in enumerate(raw.state.tolist()):
            sid = int(raw.versioned_ref[slot]) >> 32 << 32 | slot
            if state == LIVE and sid not in self.created and sid != SID | slot and told:
                self.world.violation(f"{sid:#x} is live, and nobody made it")

    def _check_rehomed(self) -> None:
        """A socket whose owner died goes on elsewhere if it was idle, and fails if it was busy."""
        first = self.world.processes[0]
        if not self.rehomed or first.alive:
            return
        live = self.world.peek(SID)[0] == SID >> 32
        adopted = any(sid == -1 for sid, _ in self.winners)
        if live == first.was_busy or (adopted and not live):
            self.world.violation(f"was busy: {first.was_busy}, lives: {live}, adopted: {adopted}")

    def _check_heirs(self) -> None:
        """Whoever has a socket has it alone: an offer ended, or its owner knows of it."""
        raw, processes = self.world.memory.raw, self.world.processes
        words = {process.word: process for process in processes if process.is_participant()}
        for slot, (owner, heir) in enumerate(
            zip(raw.owner.tolist(), raw.heir.tolist(), strict=True)
        ):
            if heir and (heir not in words or heir == owner):
                self.world.violation(f"slot {slot} of {owner:#x} is offered to {heir:#x}")
            if owner in words and heir and not self.offering:
                self.world.violation(f"slot {slot} is offered to {heir:#x}, and nobody knows")

    def _check_winners(self) -> None:
        for sid in {sid for sid, _ in self.winners}:
            winners = [index for each, index in self.winners if each == sid]
            if len(winners) > 1:
                self.world.violation(f"{sid:#x} was failed by each of {winners}")
        for sid in self.failed:
            version, _, state = self.world.peek(sid)
            if version == sid >> 32 or (version == (sid >> 32) + 1 and state == LIVE):
                self.world.violation(f"{sid:#x} failed, but its slot was not recycled")

    def _check_usable(self) -> None:
        """Every stripe can be taken and every slot used, by everybody who lives."""
        world = self.world
        for process in self.survivors():
            self._as(process)
            engine = process.engine
            for stripe in range(world.layout.stripes):
                if engine.run(stripe, lambda *_: 1, -1) != 1:
                    world.violation(f"stripe {stripe} cannot be taken")
            for _ in range(world.memory.raw.state.tolist().count(FREE)):
                sid = engine.create(engine.word)
                with engine.address(sid) as reference:
                    if engine.set_failed(sid, 1, "") != 1 or not reference.failed:
                        world.violation(f"{sid:#x} could not be failed")
        if list(self.survivors()[0].recovery.auditor.look()):
            world.violation("using the table broke it")
