"""Real kills and exceptions at a sample of all bytecodes; ``python -m tests.kills`` tries each.

Which ones is decided by a seed; SHMSOCK_TEST_SEED takes another, and goes elsewhere.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import os
import sys
import types

import pytest

import shmsock
from shmsock.layout import OWN

from .helpers import Forked
from .kills import deaths, instructions, interrupts, public
from .kills.stage import DYING, Plan, Stage, Tally, impatient, killed_at
from .kills.tracing import Pending, Tracer

# WHY NOT newer ones: sys.monitoring runs the exceptions far slower; that is for the command.
pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="the bytecodes are sampled by sys.settrace, on 3.11"
)

SEED = int(os.environ.get("SHMSOCK_TEST_SEED", "20261125"))


@pytest.fixture
def stage(
    engine_module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> collections.abc.Iterator[Stage]:
    if engine_module.NAME != "py":
        pytest.skip("no bytecode of it; its named kill points: tests/test_recovery.py")
    # What is raised in a finaliser ends there, and pytest would warn of each.
    monkeypatch.setattr("sys.unraisablehook", id)
    with Stage(engine_module) as made:
        yield made


# A sample may miss the few positions between a token and its OWN claim; the command must not.
SAMPLED = ("tokens_lost", "retired", "recounted", "reaped")


def check(tallies: collections.abc.Iterable[Tally]) -> list[Tally]:
    """Everything was recovered, and no class of positions was missed."""
    done = list(tallies)
    for tally in done:
        print(f"seed {SEED}: {tally}")
        if tally.skipped:
            pytest.skip(tally.skipped)
        assert not tally.problems(), "\n".join(tally.problems())
        assert tally.recovered == tally.positions
    return done


@pytest.mark.parametrize("repair", [deaths.repaired_by_looking, deaths.repaired_by_taking])
def test_a_process_killed_at_any_bytecode_leaves_nothing_that_cannot_be_repaired(
    repair: collections.abc.Callable[[Stage], None], stage: Stage
) -> None:
    tally = Tally("victim", must=SAMPLED)
    whats = [what for what in DYING if what not in deaths.ROWS]
    deaths.victims(stage, Plan(61, SEED), whats, repair, tally)
    check([tally])


def test_a_process_killed_while_it_registers_leaves_a_row_that_is_free_again(stage: Stage) -> None:
    tally = Tally("registration", must=("reaped",))
    deaths.victims(stage, Plan(61, SEED), deaths.ROWS, deaths.repaired_by_looking, tally)
    check([tally])


def test_a_repairer_killed_at_any_bytecode_is_followed_by_the_next(stage: Stage) -> None:
    tally = Tally("repairer", must=SAMPLED)
    deaths.repairers(stage, Plan(61, SEED), tally)
    check([tally])


def test_the_repairer_may_die_twice(stage: Stage) -> None:
    tally = Tally("repairer, twice", must=SAMPLED)
    deaths.repairers_twice(stage, Plan(50, SEED), tally)
    check([tally])


def test_a_process_killed_between_two_machine_instructions_is_repaired(stage: Stage) -> None:
    check(instructions.run(stage, Plan(16, SEED)))


def test_an_exception_at_any_bytecode_leaves_no_claim_lock_or_reference(stage: Stage) -> None:
    check(interrupts.run(stage, Plan(47, SEED)))


def test_an_interrupted_call_leaks_nothing_and_tears_no_message(
    engine_module: types.ModuleType,
) -> None:
    """In a process of its own: an exception may come before a new number has an owner."""
    if engine_module.NAME != shmsock.ENGINE or engine_module.NAME != "py":
        pytest.skip("the runtime's engine is in C: no bytecode of it")

    def child() -> list[dict[str, object]]:
        sys.unraisablehook = id
        with Stage(engine_module) as stage:
            return [dataclasses.asdict(tally) for tally in public.run(stage, Plan(97, SEED))]

    with Forked(child) as forked:
        check(Tally(**tally) for tally in forked.result())


# -- the apparatus itself -----------------------------------------------------------------------


def test_a_kill_that_is_not_repaired_is_noticed(stage: Stage) -> None:
    """If nobody repairs, the run fails: it would fail if recovery were a stub."""
    tally = Tally("victim", must=SAMPLED)
    deaths.victims(stage, Plan(29, 1), ["set_failed"], lambda _: None, tally)
    assert tally.failures
    assert tally.recovered < tally.positions
    assert not tally.reaped
    assert any("is zero" in problem for problem in tally.problems())


def test_every_bytecode_is_a_position_and_the_last_one_ends_it(stage: Stage) -> None:
    with impatient():
        count = deaths.bytecodes_of(stage, "take_turn")
        assert count > 100
        scene = stage.scene()
        assert killed_at(stage.table, DYING["take_turn"], scene.sid, count) == 0
        stage.table.recovery.look()
        scene.check("take_turn")
        scene = stage.scene()
        assert killed_at(stage.table, DYING["take_turn"], scene.sid, count + 1) == count
        stage.table.recovery.look()
        scene.check("take_turn")


@pytest.mark.parametrize("kind", ["signal", "async"])
def test_a_pending_exception_comes_in_the_traced_code_and_not_in_the_tracer(
    kind: str, stage: Stage
) -> None:
    table = stage.table
    sid = table.new()
    found = set()
    for at in range(1, 200, 3):
        try:
            with Tracer(at, Pending(kind).set):
                table.engine.take_turn(sid)
        except KeyboardInterrupt as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            assert trace is not None
            found.add(os.path.basename(trace.tb_frame.f_code.co_filename))
        table.recovery.look()
        table.engine.give_turn(sid)
    assert "tracing.py" not in found
    assert "_stripes_py.py" in found
    table.engine.set_failed(sid, 1, "")
    assert not (table.columns.claims & 3 == OWN).any()
