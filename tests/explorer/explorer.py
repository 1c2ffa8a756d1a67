"""Every schedule within a bound, by running it: depth first, each from the beginning.

A schedule is the list of its deviations: at decision 17 thread b goes on, at 42 process 1 is
killed. A run follows its plan, and then nobody is interrupted; at each further decision the
alternatives are put on a stack, and a run stops where the world is in a state that was seen before
with as much left to spend. A state is one number: a hash of memory, semaphores, lock bytes, store
buffers, and for each thread a digest of all that it has read, which determines where it is.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import gc
import logging
import random
import sys
import time
import typing
import unittest.mock

import shmsock._stripes_py
import shmsock._table_py
import shmsock.cache
import shmsock.channel
import shmsock.processes
import shmsock.recovery
import shmsock.semaphores
from shmsock.layout import Layout

from . import memory
from .participants import Bounds, Thread
from .world import Action, World

if typing.TYPE_CHECKING:
    from .scenarios import Scenario


@dataclasses.dataclass
class Report:
    """What came of exploring one scenario.

    Attributes:
        complete: Whether every schedule within the bounds was tried.
        found: The violation, or nothing.
        steps: How long the schedule that led to it is, in accesses.
        deviations: How many decisions of it were not the ordinary ones.
        trace: Its last accesses, for people.
    """

    scenario: str
    schedules: int = 0
    states: int = 0
    kills: int = 0
    raises: int = 0
    fences: int = 0
    longest: int = 0
    seconds: float = 0.0
    complete: bool = False
    found: str = ""
    steps: int = 0
    deviations: tuple[tuple[int, Action], ...] = ()
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line, and the trace if something was found."""
        line = (
            f"{self.scenario:28} {self.schedules:8} schedules {self.states:9} states "
            f"{self.kills:7} kills {self.raises:6} exceptions {self.seconds:6.1f} s"
            f"{'' if self.complete or self.found else '  (stopped at its limit)'}"
        )
        if self.found:
            line += f"\n    VIOLATION after {self.steps} accesses: {self.found}\n    plan: "
            line += ", ".join(f"at {at} {action}" for at, action in self.deviations)
            shown = list(self.trace)
            if len(shown) > 150:
                shown[120:-30] = ["..."]
            line += "".join(f"\n      {each}" for each in shown)
        return line


class Explorer:
    """Explores one scenario."""

    def __init__(
        self, scenario: Scenario, bounds: Bounds, engine_module: typing.Any, *, prune: bool = True
    ) -> None:
        """Without ``prune`` no run stops at a state that was seen: for a test of just that."""
        self.scenario, self.bounds, self.prune = scenario, bounds, prune
        self.ends: set[int] = set()  # what the runs came to, before the survivors repair
        self.world = World(Layout(scenario.slots, scenario.processes, 1), engine_module)
        self.world.consider, self.world.choose = self._consider, self._choose
        self._visited: dict[int, int] = {}
        self._stack: list[tuple[int, dict[int, Action]]] = [(0, {})]
        self.report = Report(scenario.name)

    def explore(
        self, *, schedules: int = 1 << 60, seconds: float = 1e9, seed: int | None = None
    ) -> Report:
        """Try schedules until all are tried, one breaks a promise, or a limit is reached.

        With a seed, in random order: better where the limit is reached.
        """
        report, stack = self.report, self._stack
        order = random.Random(seed)
        began = time.monotonic()
        with simulated(self.world):
            while stack and report.schedules < schedules and not report.found:
                if seed is not None:
                    at = order.randrange(len(stack))
                    stack[at], stack[-1] = stack[-1], stack[at]
                prefix, plan = stack.pop()
                report.found = self._run(plan, prefix)
                report.schedules += 1
                if report.found:
                    self._tell(plan)
                if report.schedules % 256 == 0:
                    gc.collect(0)
                    if time.monotonic() - began > seconds:
                        break
            gc.collect()
        report.states = len(self._visited)
        report.complete = not stack and not report.found
        report.seconds = time.monotonic() - began
        return report

    def _run(self, plan: dict[int, Action], prefix: int) -> str:
        world, report = self.world, self.report
        world.begin(plan, prefix, self.bounds)
        self._plan = plan
        try:
            check = self.scenario.build(world)
            world.run()
            if not world.pruned:
                self.ends.add(hash((world.shared_hash(), world.threads_hash())))
                check()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            world.end()
            if plan:
                kind = plan[max(plan)][0]
                report.kills += kind == "kill"
                report.raises += kind == "raise"
                report.fences += kind == "fence"
            report.longest = max(report.longest, world.count)
        return ""

    def _tell(self, plan: dict[int, Action]) -> None:
        """Run a schedule once more and write down what happens."""
        report, world = self.report, self.world
        report.deviations = tuple(sorted(plan.items()))
        report.steps = world.count
        world.log = []
        self._run(plan, 1 << 60)
        report.trace = tuple(world.log)
        world.log = None

    # -- what else could be done at a decision --------------------------------------------------

    def _known(self, key: int) -> bool:
        """Whether a state was seen with as many switches left; it is now."""
        left = self.world.switches
        if self._visited.get(key, -1) >= left:
            return self.prune
        self._visited[key] = left
        return False

    def _offer(self, number: int, action: Action) -> None:
        self._stack.append((number + 1, {**self._plan, number: action}))

    def _consider(self, thread: Thread, number: int, quiet: bool, raisable: bool) -> None:
        """Before an access."""
        world = self.world
        left = world.kills, world.raises, world.fences
        state = hash((world.shared_hash(), world.threads_hash(), thread.id, left))
        if self._known(state):
            world.pruned = True
            return
        if world.switches and not quiet:
            for other in world.threads:
                if other is not thread and world.enabled(other):
                    self._offer(number, ("to", other.id, False))
                    if thread.process.pending and other.process is not thread.process:
                        self._offer(number, ("to", other.id, True))
        if world.raises and raisable and thread.process.index in self.scenario.interruptible:
            self._offer(number, ("raise", thread.id))
        if world.kills or world.fences:
            self._consider_processes(thread, number)

    def _consider_processes(self, thread: Thread, number: int) -> None:
        """A kill of any process, also one that waits, and a wrong suspicion."""
        world = self.world
        alive = [
            process
            for process in world.processes
            if process.alive and not process.fenced and not process.left
        ]
        if len(alive) < 2:
            return
        for process in alive:
            if process.number not in self.scenario.mortal:
                continue
            if world.kills:
                pending, bytes_before = process.pending, world.shared_hash()
                rest = world.threads_hash(without=process)
                after = hash(
                    (bytes_before, pending, rest, process.number, thread.process is process)
                )
                after = hash((after, thread.id, world.kills, world.raises, world.fences, "kill"))
                if not self._known(after):
                    self._offer(number, ("kill", process.number))
            if world.fences and world.can_be_fenced(process):
                self._offer(number, ("fence", process.number))

    def _choose(self, ready: list[Thread], napping: list[Thread], number: int) -> None:
        """When whoever ran is blocked, or has ended."""
        world = self.world
        left = world.kills, world.raises, world.fences
        state = hash((world.shared_hash(), world.threads_hash(), -1, left))
        if self._known(state):
            world.pruned = True
            return
        for thread in ready[1:]:
            self._offer(number, ("pick", thread.id, 0))
        if world.switches:
            for thread in napping:
                self._offer(number, ("pick", thread.id, 1))


@contextlib.contextmanager
def simulated(world: World) -> collections.abc.Iterator[None]:
    """The modules' clock, ``posix_ipc`` and ``membarrier`` are the world's as long as it lasts."""
    clock, log = memory.Clock(world), logging.getLogger("shmsock")
    files = memory.FakeOs(world)
    patches: list[tuple[typing.Any, str, typing.Any]] = [
        (shmsock.semaphores, "posix_ipc", memory.FakePosixIpc(world)),
        (shmsock.semaphores, "os", files),
        (shmsock.cache, "os", files),
        (shmsock.channel, "os", files),
        (shmsock.processes, "fcntl", memory.FakeFcntl(world)),
        (shmsock.recovery, "barrier", world.barrier),
        (shmsock.processes, "register_barrier", lambda: None),
        (sys, "unraisablehook", lambda _: None),  # finalisers of greenlets that are disposed of
        (log, "disabled", True),
    ]
    for module in (
        shmsock.processes,
        shmsock.recovery,
        shmsock._stripes_py,
        shmsock._table_py,
        world.module,
    ):
        if hasattr(module, "time"):
            patches.append((module, "time", clock))
    enabled = gc.isenabled()
    gc.disable()  # a finaliser must not run at a moment that no plan knows
    try:
        with contextlib.ExitStack() as stack:
            for target, name, value in patches:
                stack.enter_context(unittest.mock.patch.object(target, name, value))
            yield
    finally:
        if enabled:
            gc.enable()
