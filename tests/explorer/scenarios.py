"""Who does what: small programs over the public methods of an engine, and what must hold after.

They know nothing of how an engine is made: whatever module has ``Engine``, ``Reference`` and
``NewSocket`` can be driven by them.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import typing

from shmsock.descriptors import Descriptors
from shmsock.layout import OWN

from .memory import Private
from .participants import Bounds
from .programs import hold, register, repair, visit
from .scene import SID, Actor, Program, Scene
from .world import World

Check = collections.abc.Callable[[], None]
Three = tuple[Bounds, Bounds, Bounds]


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One set-up and the bounds within which it is explored.

    Attributes:
        build: Fills a fresh world with processes and threads; returns the check of its end.
        bounds: For every run of the tests, for the command, and for its ``--deep``.
        processes: Rows of the table; there is one stripe.
        mortal: Which processes may be killed or fenced.
        interruptible: In which an exception may be raised.
    """

    name: str
    build: collections.abc.Callable[[World], Check]
    bounds: Three
    processes: int = 4
    slots: int = 1
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


# -- b: whatever programs there are ------------------------------------------------------------


def plain(
    *programs: collections.abc.Sequence[Program],
    ready: int = 1,
    rehomed: bool = False,
    given: bool = False,
) -> collections.abc.Callable[[World], Check]:
    """A scene in which each process runs the programs that are given for it, a thread each."""

    def build(world: World) -> Check:
        scene = Scene(world, [max(1, len(each)) for each in programs], ready, rehomed, given)
        for index, each in enumerate(programs):
            for program in each:
                scene.thread(index, program)
        return scene.check

    return build


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


def lost_file(world: World) -> Check:
    """Foreign code closes the lock file of P0, and P1 sees it; P0 looks for the dead meanwhile."""
    world.closes = True
    scene = Scene(world, [1, 1], 1)
    scene.thread(0, repair)
    scene.thread(1, hold)
    return scene.check


def fenced_tenant(world: World) -> Check:
    """P1 lives and is taken for dead; P0 reaps it, and P2 joins in its row."""
    scene = Scene(world, [1, 1], 1)
    world.add_process(registered=False)
    scene.thread(0, Actor.tick)
    scene.thread(1, visit)
    scene.thread(2, register)
    return scene.check


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

    def __init__(self, world: World, sid: int) -> None:
        self.world, self.table, self.sid = world, world.numbers, sid
        self.fd = next(fd for fd in range(3, 99) if fd not in self.table)
        self.table[self.fd] = sid

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

    def detach(self) -> None:
        self.use("leave")


class Quiet:
    """A service thread that is told much and does nothing."""

    def unwatch(self, fd: int) -> None: ...

    def call_soon(self, function: object) -> None: ...


def descriptors(world: World) -> Check:
    """Two threads use one cached descriptor while its socket fails and others are opened."""
    scene = Scene(world, [2, 1], 1)
    process = world.processes[0]
    anything: typing.Any = world.memory, process.engine, Quiet(), 1
    cache: typing.Any = Descriptors(*anything)
    cache._entries = Private(world, "descriptor")
    number: typing.Any = Number(world, SID)
    cache.keep(SID, number.fileno(), SID)._sock = number

    def send(actor: Actor) -> None:
        reference = actor.address(SID, True)
        entry = cache.peek(SID) if reference is not None else None
        if entry is not None:
            typing.cast(Number, entry.sock).use("send")
        actor.close()

    def hang_up(actor: Actor) -> None:
        actor.set_failed(SID)
        actor.call(cache.discard, SID)
        Number(world, SID + 1)  # the next connection takes the lowest number

    scene.thread(0, send)
    scene.thread(0, hang_up)
    keeper = Actor(scene, world.processes[1])  # or failing it would end it at once
    scene.actors.append(keeper)
    world.current = keeper.process.idle
    keeper.references.append(keeper.process.engine.address(SID))

    def check() -> None:
        scene.check()
        if process.alive and (SID in world.numbers.values() or cache.peek(SID) is not None):
            world.violation("the descriptor of a socket that is gone was never closed")

    return check
