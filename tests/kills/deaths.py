"""SIGKILL at every bytecode: of whoever does something, of who repairs, and of who repairs that."""

from __future__ import annotations

import collections.abc

from .stage import (
    DYING,
    Plan,
    Prepare,
    Stage,
    Tally,
    assert_tokens,
    impatient,
    killed_at,
    look,
    take_every_stripe,
)

# What touches rows alone, and never loses a token.
ROWS = ("register", "runtime_join")
_RARE = 8  # repairers are tried at this many times the stride, for each of many operations


def bytecodes_of(stage: Stage, what: str) -> int:
    """How many bytecodes an operation has."""
    scene = stage.scene()
    count = killed_at(stage.table, DYING[what], scene.sid, 0)
    stage.table.recovery.look()
    scene.check("completed")
    return count


def repaired_by_looking(stage: Stage) -> None:
    stage.table.recovery.look()


def repaired_by_taking(stage: Stage) -> None:
    """The survivor only wants in; what nobody waits for is left to the timer."""
    table = stage.table
    for stripe in range(table.layout.stripes):
        assert table.engine.run(stripe, lambda *_: 1, -1) == 1
    assert_tokens(table)
    table.recovery.look()


def victims(
    stage: Stage,
    plan: Plan,
    whats: collections.abc.Collection[str],
    repair: collections.abc.Callable[[Stage], None],
    tally: Tally,
) -> None:
    """Kill at every position of every operation; a survivor repairs."""
    with tally.timed(), impatient():
        for what in whats:
            for at in plan.positions(bytecodes_of(stage, what), f"{tally.kind} {what}"):
                _victim(stage, tally, what, at, repair)


def _victim(
    stage: Stage,
    tally: Tally,
    what: str,
    at: int,
    repair: collections.abc.Callable[[Stage], None],
) -> bool:
    """One kill; returns whether a token was lost."""
    lost = False
    with stage.trial(tally, f"{what} at {at}"):
        scene = stage.scene()
        killed_at(stage.table, DYING[what], scene.sid, at)
        lost = stage.count_lost(tally)
        repair(stage)
        scene.check(what)
    return lost


def _a_kill_inside(stage: Stage, plan: Plan, what: str) -> int:
    """A position at which the token is lost, so that there is everything to repair."""
    scratch = Tally("scratch")
    order = list(range(1, bytecodes_of(stage, what) + 1))
    plan.random(f"inside {what}").shuffle(order)
    for at in order:
        if _victim(stage, scratch, what, at, repaired_by_looking):
            return at
    raise AssertionError(f"{what} never loses a token")


def repairers(stage: Stage, plan: Plan, tally: Tally) -> None:
    """For a victim of every operation, kill its repairer at every bytecode."""
    with tally.timed(), impatient():
        for number, what in enumerate(DYING):
            if what in ROWS:
                continue
            prepare = (look, take_every_stripe)[number % 2]
            stride = plan.stride * _RARE
            at = _a_kill_inside(stage, plan, what)
            first = plan.positions(stride, f"{tally.kind} {what}", stride)[0]
            for second in range(first, 1_000_000, stride):
                if not _victim_and_repairers(stage, tally, what, at, [(prepare, second)]):
                    break


def repairers_twice(stage: Stage, plan: Plan, tally: Tally) -> None:
    """The second repairer dies too: random positions of all three."""
    random = plan.random(tally.kind)
    whats = [what for what in DYING if what not in ROWS]
    with tally.timed(), impatient():
        inside = {what: _a_kill_inside(stage, plan, what) for what in whats}
        for number in range(max(40, 2000 // plan.stride)):
            what = whats[number % len(whats)]
            both = [
                (random.choice((look, take_every_stripe)), random.randrange(1, 1300))
                for _ in range(2)
            ]
            _victim_and_repairers(stage, tally, what, inside[what], both)


def _victim_and_repairers(
    stage: Stage,
    tally: Tally,
    what: str,
    at: int,
    repairers: collections.abc.Sequence[tuple[Prepare, int]],
) -> bool:
    """Kill, and kill each repairer in turn; returns whether the last one was killed too."""
    killed = True
    where = f"{what} at {at}, then " + ", ".join(f"{p.__name__} at {j}" for p, j in repairers)
    with stage.trial(tally, where):
        scene = stage.scene()
        killed_at(stage.table, DYING[what], scene.sid, at)
        stage.count_lost(tally)
        for prepare, position in repairers:
            killed = not killed_at(stage.table, prepare, scene.sid, position)
        stage.table.recovery.look()
        scene.check(what)
    return killed


def run(stage: Stage, plan: Plan) -> collections.abc.Iterator[Tally]:
    """Every kind, one after the other."""
    whats = [what for what in DYING if what not in ROWS]
    tally = Tally("victim, then look")
    victims(stage, plan, whats, repaired_by_looking, tally)
    yield tally
    tally = Tally("victim, then take")
    victims(stage, plan, whats, repaired_by_taking, tally)
    yield tally
    tally = Tally("registration", must=("reaped",))
    victims(stage, plan, ROWS, repaired_by_looking, tally)
    yield tally
    tally = Tally("repairer")
    repairers(stage, plan, tally)
    yield tally
    tally = Tally("repairer, twice")
    repairers_twice(stage, plan, tally)
    yield tally
