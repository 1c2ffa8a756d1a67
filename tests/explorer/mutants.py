"""Known mistakes, each a small change of the real source: the explorer must find every one.

A mutant replaces lines in the source of one function and compiles it anew in its own module, for as
long as it is explored. The lines must be there exactly once: code that moved on breaks its mutants
loudly, so none is ever tested in name only.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import inspect
import sys
import textwrap
import types
import typing
import unittest.mock

from .explorer import Explorer, Report
from .participants import Bounds
from .table import SCENARIOS

STRIPES, TABLE = "shmsock._stripes_py", "shmsock._table_py"
ENGINE = "shmsock._engine_py"
RECOVERY, CACHE = "shmsock.recovery", "shmsock.cache"
# Functions that other modules have imported by name.
_ALSO_IN = {"settle": (ENGINE, RECOVERY), "recycle": (RECOVERY,)}


@dataclasses.dataclass(frozen=True)
class Change:
    """In ``module.function``, the text ``old``, which is there once, becomes ``new``."""

    module: str
    function: str
    old: str
    new: str


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A mistake, and the scenario and bounds within which it must be found."""

    name: str
    scenario: str
    bounds: Bounds
    changes: tuple[Change, ...]


def mutant(name: str, scenario: str, bounds: Bounds, *changes: Change) -> Mutant:
    return Mutant(name, scenario, bounds, changes)


def _compile(functions: list[Change], module: types.ModuleType) -> typing.Any:
    """The changed function, made in the module's own namespace."""
    owner: typing.Any = module
    *path, name = functions[0].function.split(".")
    for part in path:
        owner = getattr(owner, part)
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    for change in functions:
        old, new = textwrap.dedent(change.old).strip("\n"), textwrap.dedent(change.new).strip("\n")
        lines = [line for line in source.split("\n") if line.strip() == old.split("\n")[0]]
        indent = " " * (len(lines[0]) - len(lines[0].lstrip())) if lines else ""
        found = textwrap.indent(old, indent)
        if source.count(found + "\n") != 1:
            raise LookupError(
                f"{change.module}.{change.function} has {old!r} {source.count(found)} times: "
                "the mutant must follow the code"
            )
        source = source.replace(found + "\n", textwrap.indent(new, indent) + "\n")
    space: dict[str, typing.Any] = {}
    exec(
        compile("from __future__ import annotations\n" + source, name, "exec"), vars(module), space
    )
    return owner, name, space[name]


@contextlib.contextmanager
def applied(changes: collections.abc.Iterable[Change]) -> collections.abc.Iterator[None]:
    """The mistakes are made as long as it lasts.

    Raises:
        LookupError: The text to change is not there, or more than once.
    """
    by_function: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        by_function.setdefault((change.module, change.function), []).append(change)
    with contextlib.ExitStack() as stack:
        for (module_name, _), each in by_function.items():
            owner, name, changed = _compile(each, sys.modules[module_name])
            also = [sys.modules[other] for other in _ALSO_IN.get(name, ())]
            for target in (owner, *also):
                stack.enter_context(unittest.mock.patch.object(target, name, changed))
        yield


def find(
    mutant: Mutant, engine_module: typing.Any, *, schedules: int = 60_000, seed: int | None = 1
) -> Report:
    """Explore a mutant's scenario with its mistake in place."""
    (scenario,) = [each for each in SCENARIOS if each.name == mutant.scenario]
    with applied(mutant.changes):
        return Explorer(scenario, mutant.bounds, engine_module).explore(
            schedules=schedules, seed=seed
        )


ATTEMPT = STRIPES, "Stripes._attempt"
RETIRE = RECOVERY, "Recovery.retire"
RECYCLE = TABLE, "recycle"
MAKE = "shmsock.semaphores", "Semaphores.make"

MUTANTS = [
    mutant(
        "no look at the generation after OWN",
        "suspicion",
        Bounds(2),
        Change(*ATTEMPT, "if control[stripe] & ~3 != before:", "if False:"),
    ),
    mutant(
        "no barrier in retire",
        "suspicion",
        Bounds(2),
        Change(
            *RETIRE, "barrier()  # 3. ORDER: pairs with OWN before ctl in Engine._attempt", "pass"
        ),
    ),
    mutant(
        "no drain",
        "suspicion",
        Bounds(2),
        Change(*RETIRE, "if not self._drained(stripe, generation):  # 5", "if False:"),
    ),
    mutant(
        "give clears its claim before it posts",
        "take-give-2",
        Bounds(2, kills=1),
        Change(
            *ATTEMPT,
            """
            # ORDER: post, then clear. The other way round a kill between would leave a taken token
            # that no claim speaks of.
            semaphore.release()
            claims[mine] = 0
            """,
            "claims[mine] = 0\nsemaphore.release()",
        ),
    ),
    mutant(
        "no WANT",
        "take-give-2",
        Bounds(2, kills=1),
        Change(*ATTEMPT, "claims[mine] = before | WANT", "pass"),
    ),
    mutant(
        "no CLOSED: the stripe is OPEN from step 2",
        "suspicion-stranger",
        Bounds(1, kills=1),
        Change(
            *RETIRE,
            "self._cells.ctl[stripe] = generation << 2 | CLOSED  # 2",
            "self._cells.ctl[stripe] = generation << 2 | OPEN",
        ),
    ),
    mutant(
        "claims of those who died late are zeroed",
        "suspicion-stranger",
        Bounds(1, kills=1),
        Change(
            *RETIRE,
            "for index in {*frozen, *broken}:  # 8",
            "for index in {*frozen, *broken, *self._processes.dead()}:",
        ),
    ),
    mutant(
        "an unfinished retirement is resumed after OPENING",
        "died-opened-taken",
        Bounds(2),
        Change(
            *RETIRE,
            "semaphore = self._spare(stripe, generation) if phase == CLOSED else None",
            "semaphore = self._spare(stripe, generation) if phase != OPEN else None",
        ),
    ),
    mutant(
        "a spare that has a token is posted once more",
        "died-tokened",
        Bounds(1),
        Change(
            *MAKE,
            "return handle if private and status.st_uid == os.geteuid() and found == value "
            "else None",
            "return handle",
        ),
    ),
    mutant(
        "nref is counted by +-1",
        "fail-hold",
        Bounds(1, kills=1),
        Change(
            TABLE,
            "settle",
            "nref = additional + attached(cells, slot, processes)",
            "nref = cells.versioned_ref[slot] & SLOT_MASK",
        ),
        Change(
            ENGINE,
            "Engine._attach",
            "result = settle(cells, slot, self._processes)",
            "cells.versioned_ref[slot] += 1\nresult = DONE",
        ),
        Change(
            ENGINE,
            "Engine._detach",
            "return settle(self.cells, slot, self._processes) | 4",
            "self.cells.versioned_ref[slot] -= 1\n"
            "return settle(self.cells, slot, self._processes) | 4",
        ),
        Change(
            TABLE,
            "Table._set_failed",
            "nref = self.cells.versioned_ref[slot] & SLOT_MASK",
            "nref = (self.cells.versioned_ref[slot] & SLOT_MASK) - 1",
        ),
        Change(
            RECOVERY,
            "Recovery._fail",
            "nref = self._cells.versioned_ref[slot] & SLOT_MASK",
            "nref = (self._cells.versioned_ref[slot] & SLOT_MASK) - 1",
        ),
        Change(
            RECOVERY,
            "Recovery.recount",
            "self._columns.held[rows, index] = 0",
            """
            for slot in range(begin, begin + block):
                if self._cells.held[slot * self._layout.processes + index]:
                    self._cells.versioned_ref[slot] -= 1
            self._columns.held[rows, index] = 0
            """,
        ),
    ),
    mutant(
        "recycle: FREE not last",
        "release-hold",
        Bounds(0, kills=1),
        Change(
            *RECYCLE, "cells.retired[slot] = 0", "cells.state[slot] = FREE\ncells.retired[slot] = 0"
        ),
    ),
    mutant(
        "recycle: RECYCLING not first",
        "release-hold",
        Bounds(0, kills=1),
        Change(*RECYCLE, "cells.state[slot] = RECYCLING", "pass"),
    ),
    mutant(
        "create: LIVE not last",
        "renew-hold",
        Bounds(1, kills=1),
        Change(
            TABLE,
            "Table._create",
            "now_ns = time.monotonic_ns()",
            "now_ns = time.monotonic_ns()\ncells.state[slot] = LIVE",
        ),
    ),
    mutant(
        "a descriptor is closed outside the local critical section",
        "descriptors",
        Bounds(2),
        Change(
            CACHE,
            "Cache.discard",
            "del self._entries[sid]",
            "pass",
        ),
        Change(
            CACHE,
            "Cache.discard",
            "self._close(entry)",
            "self._entries.pop(sid, None)\nself._close(entry)",
        ),
    ),
    mutant(
        "the hot path counts outside its lock",
        "threads-alone",
        Bounds(2),
        Change(
            ENGINE,
            "Engine.address",
            """
            with self.lock:
                result = self._attach_again(slot, argument)
            """,
            "result = self._attach_again(slot, argument)",
        ),
    ),
    mutant(
        "the count is not looked at again once the stripe is had",
        "threads-alone",
        Bounds(2),
        Change(
            ENGINE,
            "Engine.dereference",
            "result = self.run(stripe, self._detach, slot, serial, quick=self._detach_one)",
            "result = self.run(stripe, self._detach, slot, serial)",
        ),
    ),
    mutant(
        "BROKEN forgotten: an exception leaves OWN or WANT",
        "raise-hold",
        Bounds(0, raises=1),
        Change(STRIPES, "Stripes._break", "self.cells.claims[mine] = before | BROKEN", "pass"),
    ),
    mutant(
        "BROKEN forgotten: an exception zeroes the claim",
        "raise-hold",
        Bounds(0, raises=1),
        Change(
            STRIPES,
            "Stripes._break",
            "self.cells.claims[mine] = before | BROKEN",
            "self.cells.claims[mine] = 0",
        ),
    ),
    mutant(
        "a BROKEN process loses what it holds, as if it were dead",
        "raise-neighbours",
        Bounds(0, raises=1),
        Change(*RETIRE, "self.recount(stripe, frozen)", "self.recount(stripe, {*frozen, *broken})"),
    ),
    mutant(
        "an exception finds a local lock that nobody knows to be held",
        "raise-drop",
        Bounds(0, raises=1),
        Change(
            ENGINE,
            "Engine._give_back",
            "with self.lock:",
            """
            self.lock.acquire()
            stack = contextlib.ExitStack()
            stack.callback(self.lock.release)
            with stack:
            """,
        ),
    ),
    mutant(
        "half a request is rehomed",
        "rehome",
        Bounds(0, kills=1),
        Change(
            RECOVERY,
            "Recovery.recount",
            "rehomed = (self._columns.on_owner_death[rows] != 0) & (self._columns.busy[rows] == 0)",
            "rehomed = self._columns.on_owner_death[rows] != 0",
        ),
    ),
    mutant(
        "WANT is stored over a leftover claim",
        "raise-twice",
        Bounds(0, raises=2),
        Change(*ATTEMPT, "if claims[mine]:", "if False:"),
    ),
    mutant(
        "take does not look at its own row",
        "fenced",
        Bounds(2, fences=1),
        Change(*ATTEMPT, "if cells.row_state[self.index] != self.row_word:", "if False:"),
    ),
    mutant(
        "a row is given back before its claims and holds are",
        "registration",
        Bounds(2, kills=1),
        Change(
            RECOVERY,
            "Recovery.reap",
            "complete = True",
            "complete = True\nself._processes.free(index)",
        ),
    ),
    mutant(
        "attach does not look at the version inside the stripe",
        "renew-hold",
        Bounds(1),
        Change(
            ENGINE,
            "Engine._attach",
            "if seen != version and not (failed_too and seen == version + 1):",
            "if False:",
        ),
    ),
    mutant(
        "set_failed looks at the version outside the stripe alone",
        "release-fail",
        Bounds(1),
        Change(TABLE, "Table._set_failed", "if not self._is_live(slot, sid):", "if False:"),
    ),
    mutant(
        "inherit does not look at the heir",
        "give-take",
        Bounds(1),
        Change(
            TABLE,
            "Table._inherit",
            "if not self._is_live(slot, sid) or cells.heir[slot] != self.word or cells.busy[slot]:",
            "if not self._is_live(slot, sid) or cells.busy[slot]:",
        ),
    ),
    mutant(
        "withdraw does not look at the heir",
        "give-place",
        Bounds(1, kills=1),
        Change(
            TABLE,
            "Table._withdraw",
            "mine = cells.owner[slot] == self.word and cells.heir[slot] == heir",
            "mine = cells.owner[slot] == self.word",
        ),
    ),
    mutant(
        "withdraw does not look at the owner and the heir",
        "give-take",
        Bounds(1),
        Change(
            TABLE,
            "Table._withdraw",
            "mine = cells.owner[slot] == self.word and cells.heir[slot] == heir",
            "mine = True",
        ),
    ),
    mutant(
        "inherit does not clear the heir",
        "give-take",
        Bounds(1, kills=1),
        Change(TABLE, "Table._inherit", "cells.heir[slot] = 0", "pass"),
    ),
    mutant(
        "offer does not look whether a request is half read",
        "give-busy",
        Bounds(1),
        Change(
            TABLE,
            "Table._offer",
            "if cells.busy[slot] or cells.retired[slot]:",
            "if cells.retired[slot]:",
        ),
    ),
    mutant(
        "recount leaves a dead heir",
        "give-wait",
        Bounds(0, kills=1),
        Change(RECOVERY, "Recovery.recount", "self._cells.heir[begin + offset] = 0", "pass"),
    ),
    mutant(
        "reap does not look where the dead was to inherit",
        "give-wait",
        Bounds(1, kills=1),
        Change(RECOVERY, "Recovery._stripes_of", "slots |= columns.heir == word", "pass"),
    ),
    mutant(
        "what the kernel says of a number that is not ours counts",
        "lost-file",
        Bounds(1, fences=1),
        Change(
            "shmsock.processes",
            "LockFile._check_ours",
            "if not self._is_ours():",
            "if False:",
        ),
    ),
]
