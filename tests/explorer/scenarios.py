"""Who does what: small programs over the public methods of an engine, and what must hold after.

They know nothing of how an engine is made: whatever module has ``Engine``, ``Reference`` and
``NewSocket`` can be driven by them.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import typing

from shmsock.descriptors import Descriptors
from shmsock.layout import CLOSED, OPEN, OPENING, OWN

from .memory import Private
from .participants import Bounds
from .scene import SID, Actor, Program, Scene
from .world import World

Check = collections.abc.Callable[[], None]
Three = tuple[Bounds, Bounds, Bounds]
Row = tuple[str, collections.abc.Callable[[World], Check], Three, dict[str, typing.Any]]


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One set-up and the bounds within which it is explored.

    Attributes:
        build: Fills a fresh world with processes and threads; returns the check of its end.
        bounds: For every run of the tests, for the command, and for its ``--deep``.
        processes: Rows of the table; there is one slot, and one stripe.
        mortal: Which processes may be killed or fenced.
        interruptible: In which an exception may be raised.
    """

    name: str
    build: collections.abc.Callable[[World], Check]
    bounds: Three
    processes: int = 4
    mortal: tuple[int, ...] = (0, 1, 2, 3)
    interruptible: tuple[int, ...] = (0, 1, 2, 3)


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


def drop(actor: Actor) -> None:
    """Take a reference and let a finaliser give it back."""
    actor.address(SID)
    actor.use()
    actor.rest()
    actor.references.clear()


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


def suspect_and_hold(actor: Actor) -> None:
    """As ``suspect``, and go on there."""
    suspect(actor)
    hold(actor)


def visit(actor: Actor) -> None:
    """Take and give."""
    actor.do("run", 0, lambda *_: 1, -1)


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
    cache: typing.Any = Descriptors(*anything)
    cache._entries = Private(world, "descriptor")
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
    keeper = Actor(scene, world.processes[1])  # or failing it would end it at once
    scene.actors.append(keeper)
    world.current = keeper.process.idle
    keeper.references.append(keeper.process.engine.address(SID))

    def check() -> None:
        scene.check()
        if process.alive and (SID in numbers.values() or cache.peek(SID) is not None):
            world.violation("the descriptor of a socket that is gone was never closed")

    return check


# -- the table ----------------------------------------------------------------------------------


def bounds(*three: tuple[int, ...]) -> tuple[Bounds, Bounds, Bounds]:
    """Switches, kills, exceptions and fences: quick, usual and deep."""
    quick, usual, deep = (Bounds(*each) for each in three)
    return quick, usual, deep


PLAIN = bounds((1, 1), (2, 1), (4, 1))
LEFT = bounds((1, 1), (2, 1), (3, 2))
TWICE = bounds((0, 0, 2), (0, 1, 2), (1, 0, 2))

LEFT_RAISE = bounds((1, 0, 1), (2, 0, 1), (2, 1, 1))
FENCED = bounds((1, 0, 0, 1), (2, 0, 0, 1), (3, 1, 0, 1))
THREE_LEFT = bounds((0, 1), (1, 1), (2, 2))

_TABLE: list[Row] = [
    ("take-give-2", contention_2, bounds((2, 1), (4, 1), (9, 1)), {}),
    ("take-give-3", contention_3, bounds((0, 2), (1, 1), (2, 2)), {}),
    ("fail-hold", plain([fail], [hold]), bounds((2, 1), (2, 1), (4, 1)), {}),
    (
        "fail-fail-hold",
        plain([fail], [fail], [hold_failed_too]),
        bounds((0, 1), (1, 1), (2, 2)),
        {},
    ),
    ("release-hold", plain([release], [hold]), PLAIN, {}),
    ("release-fail", plain([release], [fail]), PLAIN, {}),
    ("renew-hold", plain([renew], [hold_either]), bounds((1, 1), (1, 1), (3, 1)), {}),
    ("turns", plain([turn], [turn]), PLAIN, {}),
    ("hand-over", plain([fail], [take_over], [take_over]), bounds((0, 1), (1, 1), (2, 2)), {}),
    ("threads", plain([hold, hold], [fail]), bounds((1,), (1, 1), (2, 1)), {}),
    ("threads-alone", plain([hold, hold], []), bounds((2,), (2, 1), (4, 1)), {}),
    ("threads-drop", plain([drop, drop], [fail]), bounds((1,), (2,), (2, 1)), {}),
    ("raise-drop", plain([drop, drop], []), bounds((0, 0, 1), (1, 0, 1), (2, 0, 1)), {}),
    ("raise-hold", plain([hold], [fail]), bounds((1, 0, 1), (2, 0, 1), (2, 1, 1)), {}),
    ("raise-fail", plain([fail], [hold]), bounds((1, 0, 1), (2, 0, 1), (2, 1, 1)), {}),
    ("raise-kill", plain([hold], [fail]), bounds((0, 1, 1), (0, 1, 1), (1, 1, 1)), {}),
    ("raise-twice", plain([ticking(hold)], [fail]), TWICE, {"interruptible": (0,)}),
    ("raise-renew", plain([ticking(renew)], [fail]), TWICE, {"interruptible": (0,)}),
    ("raise-release", plain([ticking(release)], [hold]), TWICE, {"interruptible": (0,)}),
    (
        "raise-threads",
        plain([hold, hold], [fail]),
        bounds((0, 0, 1), (1, 0, 1), (2, 1, 1)),
        {"interruptible": (0,)},
    ),
    ("raise-repair", left_behind((1, OPEN), 0, repair, hold), LEFT_RAISE, {}),
    ("died-inside", left_behind((1, OPEN), 0, repair, hold), LEFT, {}),
    ("died-closed", left_behind((2, CLOSED), 0, repair, repair), LEFT, {}),
    ("died-opening", left_behind((2, OPENING), 0, repair, repair), LEFT, {}),
    ("died-opened", left_behind((2, OPENING), 1, repair, repair), LEFT, {}),
    ("died-and-three", left_behind((2, CLOSED), 0, repair, repair, hold), THREE_LEFT, {}),
    ("suspicion", plain([hold], [suspect_and_hold]), bounds((1, 1), (2, 1), (4, 1)), {}),
    ("suspicion-stranger", plain([], [visit], [suspect]), bounds((1, 1), (2, 1), (3, 2)), {}),
    (
        "fenced",
        plain([hold], [hold]),
        bounds((1, 0, 0, 1), (2, 0, 0, 1), (3, 1, 0, 1)),
        {"mortal": (0,)},
    ),
    ("registration", registration, bounds((0, 1), (1, 1), (2, 2)), {}),
    ("descriptors", descriptors, bounds((2,), (3,), (5,)), {}),
]

SCENARIOS = [Scenario(name, build, three, **more) for name, build, three, more in _TABLE]
