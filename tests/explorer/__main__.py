"""Explore every scenario and every mutant, and print what was tried.

Fails if a promise was broken, or if a mutant was not found: an explorer that finds nothing anywhere
would prove nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time

from .explorer import Explorer, Report
from .mutants import MUTANTS, find
from .table import SCENARIOS


def main(arguments: list[str] | None = None) -> int:
    """Return 1 if there is something to mend."""
    parser = argparse.ArgumentParser(prog="python -m tests.explorer", description=__doc__)
    parser.add_argument("--deep", action="store_true", help="wider bounds, in random order")
    parser.add_argument("--quick", action="store_true", help="the bounds of the test suite")
    parser.add_argument("--seconds", type=float, default=60, help="of --deep, for each scenario")
    parser.add_argument("--seed", type=int, help="of the order (default of --deep: the time)")
    parser.add_argument("--only", default="", help="scenarios and mutants with this in their name")
    parser.add_argument("--engine", default="shmsock._engine_py", help="the module to explore")
    options = parser.parse_args(arguments)
    seed = options.seed
    if options.deep and seed is None:
        seed = int(time.time())
    if seed is not None:
        print(f"seed {seed}")
    began = time.monotonic()
    module = importlib.import_module(options.engine)
    reports: list[Report] = []
    for scenario in SCENARIOS:
        if options.only not in scenario.name:
            continue
        bounds = scenario.bounds[2 if options.deep else 0 if options.quick else 1]
        seconds = options.seconds if options.deep else 1e9
        explorer = Explorer(scenario, bounds, module)
        reports.append(explorer.explore(seconds=seconds, seed=seed))
        print(f"{reports[-1]}", flush=True)
    survived, longest = 0, 0
    wanted = [
        each for each in MUTANTS if options.only in each.name or options.only in each.scenario
    ]
    for mutant in wanted:
        report = find(mutant, module, seed=1 if seed is None else seed)
        survived += not report.found
        longest = max(longest, report.steps)
        how = (
            f"found in schedule {report.schedules}, {report.steps} accesses long"
            if report.found
            else f"SURVIVED {report.schedules} schedules"
        )
        print(f"mutant: {mutant.name:58} {how}", flush=True)
    broken = [report.scenario for report in reports if report.found]
    print(
        f"\n{len(reports)} scenarios: {sum(r.schedules for r in reports)} schedules, "
        f"{sum(r.states for r in reports)} distinct states, {sum(r.kills for r in reports)} kills, "
        f"{sum(r.raises for r in reports)} exceptions, {sum(r.fences for r in reports)} live ones "
        f"fenced, {sum(not r.complete for r in reports)} stopped at a limit; "
        f"{len(wanted) - survived} of {len(wanted)} mutants found, the longest schedule {longest} "
        f"accesses; {time.monotonic() - began:.1f} s"
    )
    for name in broken:
        print(f"BROKEN: {name}")
    return 1 if broken or survived else 0


if __name__ == "__main__":
    sys.exit(main())
