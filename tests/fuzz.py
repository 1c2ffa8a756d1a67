"""Fuzz what reads bytes of others: ``python -m tests.fuzz --seconds 60 --seed 1 --target http``.

A target is a context manager that yields a hypothesis strategy and what must hold of each of its
values. The values are built from the grammar and then damaged: random bytes alone are refused by
the first line of any parser. ``tests/test_fuzz.py`` runs each target for a moment; a failure prints
the value, made as small as it gets, and the command that finds it again.
"""

from __future__ import annotations

import argparse
import collections.abc
import contextlib
import random
import sys
import time
import typing

from hypothesis import HealthCheck, Phase, given, seed, settings

from . import fuzz_live, fuzz_targets

_ROUND = 100  # examples; a new seed for each round

TARGETS = {**fuzz_targets.TARGETS, **fuzz_live.TARGETS}


def run(target: str, seconds: float, first_seed: int) -> int:
    """Run a target until its time is over, one round at least; returns how many examples.

    Raises:
        AssertionError, or whatever the target raised; a note says how to repeat it.
    """
    examples, rounds = 0, 0
    deadline = time.monotonic() + seconds
    with TARGETS[target]() as (strategy, check):

        def counted(value: typing.Any) -> None:
            nonlocal examples
            examples += 1
            check(value)

        while rounds == 0 or time.monotonic() < deadline:
            played = settings(
                max_examples=_ROUND,
                deadline=None,
                database=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            )(seed(first_seed + rounds)(given(strategy)(counted)))
            try:
                played()
            except BaseException as error:
                again = f"python -m tests.fuzz --seconds 0 --seed {first_seed + rounds}"
                error.add_note(f"found again by: {again} --target {target}")
                raise
            rounds += 1
    return examples


def main(arguments: collections.abc.Sequence[str] | None = None) -> int:
    """Run the targets one after the other, each with its share of the time."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of all targets together")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--target", choices=TARGETS, action="append")
    options = parser.parse_args(arguments)
    chosen = options.target or list(TARGETS)
    print(f"seed {options.seed}, {options.seconds:g} s for {', '.join(chosen)}", flush=True)
    for target in chosen:
        began = time.monotonic()
        with contextlib.redirect_stdout(sys.stderr):
            examples = run(target, options.seconds / len(chosen), options.seed)
        print(f"{target:12} {examples:8} examples in {time.monotonic() - began:6.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
