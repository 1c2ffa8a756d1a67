"""``python -m tests.kills``: run everything, print the figures; 0 when all was recovered.

Of the Python engine. In the C engine no bytecode is inside a stripe: its named kill points are all
tried by tests/test_recovery.py.
"""

from __future__ import annotations

import argparse
import collections.abc
import importlib
import os
import signal
import sys
import time

os.environ["SHMSOCK_ENGINE"] = "py"  # before shmsock is imported

from . import deaths, instructions, interrupts, public
from .stage import Plan, Stage, Tally

KINDS = {
    "deaths": deaths.run,
    "instructions": instructions.run,
    "interrupts": interrupts.run,
    "public": public.run,
}
_COLUMNS = (
    "kind", "positions", "recovered", "tokens_lost", "ownerless", "retired", "recounted",
    "reaped", "adrift", "seconds",
)  # fmt: skip


def main(arguments: collections.abc.Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kills",
        description="Kill and interrupt at every position; what is left must be sound.",
        epilog="Exit codes: 0 everything was recovered, 1 something was not or a class is zero, "
        "2 usage.",
    )
    parser.add_argument("--stride", type=int, default=1, help="try every so many positions")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args(arguments)
    if options.stride < 1:
        parser.error("--stride must be at least 1")
    sys.unraisablehook = id  # an exception in a finaliser is reported there, thousands of times
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plan = Plan(options.stride, options.seed)
    module = importlib.import_module("shmsock._engine_py")
    print(
        f"engine {module.NAME}, Python {sys.version.split()[0]}, "
        f"stride {plan.stride}, seed {plan.seed}"
    )
    tallies: list[Tally] = []
    print(_line(_COLUMNS), flush=True)
    with Stage(module) as stage:
        for kind in options.only:
            for tally in KINDS[kind](stage, plan):
                tallies.append(tally)
                print(_row(tally), flush=True)
                for problem in tally.problems():
                    print(problem, file=sys.stderr, flush=True)
    problems = [problem for tally in tallies for problem in tally.problems()]
    for tally in tallies:
        if tally.skipped:
            print(f"{tally.kind} was skipped: {tally.skipped}", file=sys.stderr)
    print(f"{len(problems)} problems, load {os.getloadavg()[0]:.1f}")
    return 1 if problems else 0


def _line(cells: collections.abc.Sequence[str]) -> str:
    return f"{cells[0]:<36}" + "".join(f"{cell.replace('_', ' '):>12}" for cell in cells[1:])


def _row(tally: Tally) -> str:
    values = [getattr(tally, column) for column in _COLUMNS[1:-1]]
    return _line([tally.kind, *map(str, values), f"{tally.seconds:.1f}"])


if __name__ == "__main__":
    raise SystemExit(main())
