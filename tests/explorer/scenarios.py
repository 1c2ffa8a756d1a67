"""Who does what: small programs over the public methods of an engine, and what must hold after.

They know nothing of how an engine is made: whatever module has ``Engine``, ``Reference`` and
``NewSocket`` can be driven by them.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import typing

from shmsock.descriptors import Descriptors
from shmsock.errors import ClosedError, TableFullError
from shmsock.layout import CLOSED, FREE, LIVE, OPEN, OPENING, OWN, SLOT_MASK, Layout

from .memory import FIRST_VERSION
from .world import Bounds, Process, World

Check = collections.abc.Callable[[], None]
Program = collections.abc.Callable[["Actor"], None]
SID = FIRST_VERSION << 32  # the first life of slot 0


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One set-up and the bounds within which it is explored.

    Attributes:
        build: Fills a fresh world with processes and threads; returns the check of its end.
        bounds: In every run of the tests.
        deep: In a longer run.
        mortal: Which processes may be killed or fenced.
        interruptible: In which an exception may be raised.
    """

    name: str
    build: collections.abc.Callable[[World], Check]
    bounds: Bounds
    deep: Bounds
    layout: Layout = Layout(1, 3, 1)
    mortal: tuple[int, ...] = (0, 1, 2)
    interruptible: tuple[int, ...] = (0, 1, 2)
    trace: int = 60


class Actor:
    """What one thread does, and what it remembers."""

    def __init__(self, scene: Scene, process: Process) -> None:
        self.scene, self.world, self.process = scene, scene.world, process
        self.references: list[typing.Any] = []
        self.operations = self.interrupted = 0

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
        return tuple((each.id, each._serial) for each in self.references)

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
        new = self.process.module.NewSocket(owner=self.process.engine.word)
        try:
            sid = self.do("create", new)
        except TableFullError:  # somebody holds the one slot there is
            return 0
        if sid:
            self.scene.created.append(sid)
        return sid or 0


class Scene:
    """The processes of one run, and the checks at its end."""

    def __init__(self, world: World, threads: collections.abc.Sequence[int], ready: int) -> None:
        """``threads`` of each process; ``ready`` sockets are made by process 0."""
        self.world = world
        self.failed: set[int] = set()
        self.winners: list[tuple[int, int]] = []
        self.created: list[int] = []
        self.actors: list[Actor] = []
        for count in threads:
            world.add_process(count)
        first = world.processes[0]
        world.current = first.idle
        for _ in range(ready):
            first.engine._next_stripe = -1
            first.engine.create(first.module.NewSocket(owner=first.engine.word))

    def thread(
        self, index: int, program: Program
    ) -> Actor:
        """One more thread of process ``index``."""
        actor = Actor(self, self.world.processes[index])
        self.actors.append(actor)
        self.world.add_thread(self.world.processes[index], lambda: program(actor))
        return actor

    def acts(self, process: Process) -> collections.abc.Iterator[Actor]:
        return (actor for actor in self.actors if actor.process is process)

    # -- the end --------------------------------------------------------------------------------

    def survivors(self) -> list[Process]:
        return [each for each in self.world.processes if each.alive and not each.fenced]

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
            process.engine.drain()
            self._check_counts(process)
            if process.engine._holds or process.engine._dropped:
                self.world.violation(f"P{process.index} still counts a reference after the last")
        self.audit()
        self._check_winners()
        self._check_usable()

    def _as(self, process: Process) -> None:
        self.world.current = process.idle

    def audit(self) -> None:
        """DESIGN section 5's invariants, by the real audit and by looking at the stripes."""
        world = self.world
        process = self.survivors()[0]
        self._as(process)
        complaints = sorted(process.recovery._audit_once())
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
                sid = engine.create(process.module.NewSocket(owner=engine.word))
                with engine.address(sid) as reference:
                    if engine.set_failed(sid, 1, "") != 1 or not reference.failed:
                        world.violation(f"{sid:#x} could not be failed")
        if sorted(self.survivors()[0].recovery._audit_once()):
            world.violation("using the table broke it")


# -- a: take and give ---------------------------------------------------------------------------


def contention(world: World, processes: int) -> Check:
    """Each process once counts in a word that only the stripe guards."""
    scene = Scene(world, [1] * processes, 1)
    cells = world.memory.cells
    done = []

    def count(slot: int, _: object) -> int:
        world.enter(0)
        try:
            before = cells.bytes_in[slot]
            cells.bytes_in[slot] = before + 1
        finally:
            world.leave(0)
        return 1

    def program(actor: Actor) -> None:
        if actor.do("run", 0, count, 0):
            done.append(actor)

    for index in range(processes):
        scene.thread(index, program)

    def check() -> None:
        counted = int(world.memory.raw.bytes_in[0])
        if not len(done) <= counted <= processes:
            world.violation(f"{len(done)} were inside, but {counted} were counted")
        scene.check()

    return check


def contention_2(world: World) -> Check:
    return contention(world, 2)


def contention_3(world: World) -> Check:
    return contention(world, 3)



# -- b: the life of a slot ----------------------------------------------------------------------


def hold(actor: Actor) -> None:
    """Take a reference, use it, give it back."""
    actor.address(SID)
    actor.use()
    actor.close()


def hold_failed_too(actor: Actor) -> None:
    """As ``hold``, also when it has failed."""
    actor.address(SID, True)
    actor.use()
    actor.close()


def fail(actor: Actor) -> None:
    """Fail the socket."""
    actor.set_failed(SID)


def release(actor: Actor) -> None:
    """Let it end when the last one lets go."""
    actor.do("release_additional_reference", SID)


def renew(actor: Actor) -> None:
    """End the socket, and make one in what may be its slot."""
    actor.set_failed(SID)
    actor.create()


def hold_either(actor: Actor) -> None:
    """Use the first life or the second of a slot."""
    for sid in (SID, SID + (2 << 32)):
        actor.address(sid)
        actor.use()
        actor.close()


def turn(actor: Actor) -> None:
    """Write, if it is our turn."""
    world, me = actor.world, actor.process
    if actor.do("take_turn", SID):
        writer = int(world.memory.raw.writer[0])
        if writer != me.engine.word and not me.fenced and world.peek(SID)[0] == SID >> 32:
            world.violation(f"P{me.index} has the turn, but the writer is {writer:#x}")
        actor.do("give_turn", SID)


def take_over(actor: Actor) -> None:
    """Become the owner, as the receiver of a hand-over does."""
    first = actor.world.processes[0].engine.word
    if actor.do("change_owner", SID, first, actor.process.engine.word):
        actor.scene.winners.append((-1, actor.process.index))


def plain(
    *programs: collections.abc.Sequence[Program], ready: int = 1
) -> collections.abc.Callable[[World], Check]:
    """A scene in which each process runs the programs that are given for it, a thread each."""

    def build(world: World) -> Check:
        scene = Scene(world, [max(1, len(each)) for each in programs], ready)
        for index, each in enumerate(programs):
            for program in each:
                scene.thread(index, program)
        return scene.check

    return build


def ticking(program: Program) -> Program:
    """A program after which the timer looks: it mends what a second exception may leave."""

    def run(actor: Actor) -> None:
        program(actor)
        actor.tick()

    return run


# -- d: what others left half done --------------------------------------------------------------


def left_behind(
    control: tuple[int, int], token: int, *programs: Program
) -> collections.abc.Callable[[World], Check]:
    """The last process died in the stripe, recycling; perhaps another while retiring it."""

    def build(world: World) -> Check:
        scene = Scene(world, [1] * (len(programs) + 1), 1)
        raw = world.memory.raw
        dead = world.processes[-1]
        world.current = dead.idle
        dead.engine.address(SID)
        raw.claims[dead.index, 0] = 1 << 2 | OWN
        raw.versioned_ref[0] = (SID >> 32) + 1 << 32 | 2  # set_failed, before the formula
        world.names[0, 1].value = 0
        raw.ctl[0] = control[0] << 2 | control[1]
        if control[0] > 1:
            world.names[0, control[0]].value = token
        world.kill(dead)
        scene.failed.add(SID)
        for index, program in enumerate(programs):
            scene.thread(index, program)
        return scene.check

    return build


def repair(actor: Actor) -> None:
    """What the timer does, and then an ordinary operation."""
    actor.tick()
    actor.address(SID)
    actor.close()


def suspect(actor: Actor) -> None:
    """Retire a stripe in which nobody died: a wrong suspicion."""
    recovery = actor.process.recovery

    def retire() -> None:
        with recovery.arbitrated(1.0) as arbiter:
            if arbiter:
                recovery.retire(0)

    actor.call(retire)


def register(actor: Actor) -> None:
    """Join while others reap, perhaps in the row of the dead."""
    process, world = actor.process, actor.world

    def join() -> None:
        index, epoch = process.processes.register("client")
        raw = world.memory.raw
        if raw.claims[index].any() or raw.held[:, index].any():
            world.violation(f"row {index} was given out, but is not clean")
        process.join(index, epoch)

    actor.call(join)
    hold(actor)


def registration(world: World) -> Check:
    """P2 is dead; P0 reaps it while P1 joins."""
    scene = Scene(world, [1, 1, 1], 1)
    dead = world.processes[2]
    world.current = dead.idle
    dead.engine.address(SID)
    world.kill(dead)
    world.add_process(registered=False)
    scene.thread(0, repair)
    scene.thread(3, register)
    return scene.check


# -- f: descriptors -----------------------------------------------------------------------------


class Number:
    """A descriptor of a simulated process: a number that is given out again once it is closed."""

    def __init__(self, world: World, table: dict[int, int], sid: int) -> None:
        self.world, self.table, self.sid = world, table, sid
        self.fd = next(fd for fd in range(3, 99) if fd not in table)
        table[self.fd] = sid

    def fileno(self) -> int:
        return self.fd

    def use(self, what: str) -> None:
        """Act on whatever the number is by now, as the kernel would."""
        if not self.world.direct:
            self.world.step(f"{what} {self.fd}")
        found = self.table.get(self.fd)
        if found != self.sid:
            now = "closed" if found is None else f"the descriptor of {found:#x}"
            self.world.violation(f"{what} of {self.sid:#x} on {self.fd}, which is {now}")

    def shutdown(self, _: int) -> None:
        self.use("shutdown")

    def close(self) -> None:
        self.use("close")
        del self.table[self.fd]


class Quiet:
    """A service thread that is told much and does nothing."""

    def unwatch(self, fd: int) -> None: ...

    def call_soon(self, function: object) -> None: ...


def descriptors(world: World) -> Check:
    """Two threads use one cached descriptor while its socket fails and others are opened."""
    scene = Scene(world, [2, 1], 1)
    process = world.processes[0]
    numbers: dict[int, int] = {}
    anything: typing.Any = world.memory, process.engine, Quiet(), 1
    cache = Descriptors(*anything)
    number: typing.Any = Number(world, numbers, SID)
    cache.keep(SID, number)

    def send(actor: Actor) -> None:
        reference = actor.address(SID, True)
        entry = cache.peek(SID) if reference is not None else None
        if entry is not None:
            typing.cast(Number, entry.sock).use("send")
        actor.close()

    def hang_up(actor: Actor) -> None:
        actor.set_failed(SID)
        actor.call(cache.discard, SID)
        Number(world, numbers, SID + 1)  # the next connection takes the lowest number

    scene.thread(0, send)
    scene.thread(0, hang_up)

    def check() -> None:
        scene.check()
        if process.alive and (SID in numbers.values() or cache.peek(SID) is not None):
            world.violation("the descriptor of a socket that is gone was never closed")

    return check


# -- the table ----------------------------------------------------------------------------------

KILL, DEEP = Bounds(2, kills=1), Bounds(4, kills=1)
RAISE, RAISE2 = Bounds(2, kills=1, raises=1), Bounds(1, raises=2)
TWO, THREE, FOUR = Layout(1, 2, 1), Layout(1, 3, 1), Layout(1, 4, 1)

SCENARIOS = [
    Scenario("take-give-2", contention_2, Bounds(3, kills=1), Bounds(9, kills=1), TWO),
    Scenario("take-give-3", contention_3, Bounds(1, kills=1), Bounds(2, kills=2)),
    Scenario("fail-hold", plain([fail], [hold]), KILL, DEEP, TWO),
    Scenario("fail-fail-hold", plain([fail], [fail], [hold_failed_too]), Bounds(1, kills=1), KILL),
    Scenario("release-hold", plain([release], [hold]), KILL, DEEP, TWO),
    Scenario("release-fail", plain([release], [fail]), KILL, DEEP, TWO),
    Scenario("renew-hold", plain([renew], [hold_either]), Bounds(1, kills=1), KILL, TWO),
    Scenario("turns", plain([turn], [turn]), Bounds(1, kills=1), DEEP, TWO),
    Scenario("hand-over", plain([fail], [take_over], [take_over]), Bounds(1, kills=1), KILL),
    Scenario("threads", plain([hold, hold], [fail]), Bounds(2), Bounds(3, kills=1), TWO),
    Scenario("raise-hold", plain([hold], [fail]), Bounds(1, raises=1), RAISE, TWO),
    Scenario("raise-fail", plain([fail], [hold]), Bounds(1, raises=1), RAISE, TWO),
    Scenario("raise-kill", plain([hold], [fail]), Bounds(0, 1, 1), Bounds(1, 1, 1), TWO),
    Scenario("raise-twice", plain([ticking(hold)], [fail]), Bounds(0, 0, 2), RAISE2, TWO, interruptible=(0,)),
    Scenario("raise-renew", plain([ticking(renew)], [fail]), Bounds(0, 0, 2), RAISE2, TWO, interruptible=(0,)),
    Scenario("raise-release", plain([ticking(release)], [hold]), Bounds(0, 0, 2), RAISE2, TWO, interruptible=(0,)),
    Scenario("raise-threads", plain([hold, hold], [fail]), Bounds(1, 0, 1), Bounds(2, 0, 1), TWO),
    Scenario("raise-repair", left_behind((1, OPEN), 0, repair, hold), Bounds(1, 0, 1), RAISE),
    Scenario("died-inside", left_behind((1, OPEN), 0, repair, hold), KILL, DEEP),
    Scenario("died-closed", left_behind((2, CLOSED), 0, repair, repair), KILL, DEEP),
    Scenario("died-opening", left_behind((2, OPENING), 0, repair, repair), KILL, DEEP),
    Scenario("died-opened", left_behind((2, OPENING), 1, repair, repair), KILL, DEEP),
    Scenario("suspicion", plain([suspect], [hold]), Bounds(2, kills=1), DEEP, TWO),
    Scenario("suspicion-3", plain([suspect], [hold], [fail]), Bounds(1, kills=1), DEEP),
    Scenario("fenced", plain([hold], [hold]), Bounds(1, fences=1), DEEP, TWO, mortal=(0,)),
    Scenario("registration", registration, Bounds(2, kills=1), DEEP, FOUR),
    Scenario("descriptors", descriptors, Bounds(2), Bounds(3), TWO),
]
