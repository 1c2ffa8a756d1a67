"""The explorer on the real code: every schedule within narrow bounds, and every mutant found.

``python -m tests.explorer`` looks further.
"""

from __future__ import annotations

import collections.abc
import typing

import pytest

from shmsock import _engine_py, recovery
from shmsock.layout import Layout

from .explorer.explorer import Explorer, Report, simulated
from .explorer.memory import Semaphore
from .explorer.mutants import MUTANTS, Change, Mutant, applied, find
from .explorer.participants import Bounds, Violation
from .explorer.scenarios import Scenario, plain
from .explorer.scene import SID, Actor
from .explorer.table import SCENARIOS
from .explorer.world import World

pytestmark = pytest.mark.once

QUICK = 0


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: str(scenario.name))
def test_no_schedule_breaks_a_promise(scenario: Scenario) -> None:
    bounds = scenario.bounds[QUICK]
    report = Explorer(scenario, bounds, _engine_py).explore()
    assert not report.found, str(report)
    assert report.complete
    # A class of which none was tried would prove nothing.
    assert bool(report.kills) == bool(bounds.kills)
    assert bool(report.raises) == bool(bounds.raises)
    assert bool(report.fences) == bool(bounds.fences)
    assert report.states > report.schedules > 100


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: str(mutant.name))
def test_mutant_is_found(mutant: Mutant) -> None:
    report = find(mutant, _engine_py)
    assert report.found, f"survived {report.schedules} schedules"
    assert report.trace
    # A promise was broken, not the mutant's own text or the simulation.
    kinds = "Violation", "ClosedError", "StripeTimeoutError"
    assert report.found.split(":")[0] in kinds, report.found


def test_mutant_whose_lines_are_gone_says_so() -> None:
    gone = Change("shmsock.recovery", "Recovery.retire", "no such line", "pass")
    before = recovery.Recovery.retire
    with pytest.raises(LookupError, match="must follow the code"), applied([gone]):
        pass
    assert recovery.Recovery.retire is before


# -- the explorer itself ------------------------------------------------------------------------


def explore(
    *programs: collections.abc.Callable[[Actor], None], bounds: Bounds, **more: typing.Any
) -> Report:
    build = plain(*([each] for each in programs))
    scenario = Scenario("test", build, (bounds, bounds, bounds), **more)
    return Explorer(scenario, bounds, _engine_py).explore()


@pytest.mark.parametrize("bounds", [Bounds(2), Bounds(1, kills=1)], ids=str)
def test_what_is_left_out_leads_nowhere_new(bounds: Bounds) -> None:
    """Runs that stop at a state seen before: without them the same ends are reached."""
    (scenario,) = [each for each in SCENARIOS if each.name == "take-give-2"]
    ends = []
    for prune in (True, False):
        explorer = Explorer(scenario, bounds, _engine_py, prune=prune)
        report = explorer.explore()
        assert report.complete, str(report)
        ends.append((explorer.ends, report.schedules))
    assert ends[0][0] == ends[1][0]
    assert len(ends[0][0]) > 1
    assert ends[0][1] < ends[1][1]


def test_killed_thread_runs_no_finally() -> None:
    ended = []

    def program(actor: Actor) -> None:
        try:
            actor.set_failed(SID)
        finally:
            ended.append(actor.world.over or actor.process.alive)

    report = explore(program, program, bounds=Bounds(1, kills=1))
    assert report.kills
    assert not report.found
    assert all(ended)


def test_lost_update_of_an_unguarded_word_is_found_with_one_switch_and_not_without() -> None:
    def count(actor: Actor) -> None:
        cells = actor.world.memory.cells
        cells.bytes_in[0] = cells.bytes_in[0] + 1
        done = vars(actor.scene).setdefault("done", [])
        done.append(actor.process.index)
        if len(done) == 2 and actor.world.memory.raw.bytes_in[0] != 2:
            actor.world.violation("lost")

    assert not explore(count, count, bounds=Bounds(0)).found
    report = explore(count, count, bounds=Bounds(1))
    assert report.found == "Violation: lost"
    assert len(report.deviations) == 1
    assert report.trace[-1].endswith("store bytes_in[0] = 1")


def test_own_claim_lingers_in_the_store_buffer_until_a_barrier() -> None:
    def claim(actor: Actor) -> None:
        claims = actor.world.memory.cells.claims
        claims[0] = 1 << 2 | 2
        assert claims[0] == 1 << 2 | 2  # its own store is visible to itself at once
        _ = actor.world.memory.cells.ctl[0]
        claims[0] = 0

    def look(barrier: bool) -> collections.abc.Callable[[Actor], None]:
        def program(actor: Actor) -> None:
            world = actor.world
            if barrier:
                world.barrier()
            pending = world.processes[0].pending
            seen.add((pending is not None, int(world.memory.cells.claims[0]) & 3))

        return program

    seen: set[tuple[bool, int]] = set()
    assert not explore(claim, look(False), bounds=Bounds(1)).found
    assert seen == {(False, 0), (True, 0), (False, 2)}
    seen.clear()
    assert not explore(claim, look(True), bounds=Bounds(1)).found
    assert seen == {(False, 0), (False, 2)}


def test_state_without_a_thread_that_can_go_on_is_a_deadlock() -> None:
    def cross(first: int, second: int) -> collections.abc.Callable[[Actor], None]:
        def program(actor: Actor) -> None:
            locks = [process.engine.lock for process in actor.world.processes]
            for lock in locks:
                lock.shared = True
            with locks[first], locks[second]:
                pass

        return program

    assert not explore(cross(0, 1), cross(0, 1), bounds=Bounds(2)).found
    assert "deadlock" in explore(cross(0, 1), cross(1, 0), bounds=Bounds(2)).found


def test_second_token_is_found() -> None:
    def post(actor: Actor) -> None:
        token: Semaphore = actor.world.names[0, 1]
        token.release()

    assert "two tokens" in explore(post, bounds=Bounds(0)).found


def test_schedule_is_the_same_when_it_is_run_again() -> None:
    def fail(actor: Actor) -> None:
        actor.set_failed(SID)
        if actor.scene.winners[:1] == [(SID, 1)]:
            actor.world.violation("the second one won")

    first, again = (explore(fail, fail, bounds=Bounds(1)) for _ in range(2))
    assert first.found == again.found == "Violation: the second one won"
    assert first.trace == again.trace
    assert first.deviations == again.deviations


def test_simulation_leaves_the_modules_as_they_were() -> None:
    before = vars(recovery).copy()
    world = World(Layout(1, 2, 1), _engine_py)
    with simulated(world):
        assert vars(recovery)["time"] is not before["time"]
        with pytest.raises(Violation):
            world.violation("for the test")
    assert vars(recovery) == before
