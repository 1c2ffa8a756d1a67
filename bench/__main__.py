"""``python -m bench``: run benches, print the table, write the JSON where asked.

Exit codes: 0 every bench ran to its end; 1 one could not run, or what it measured is worthless;
2 the command line is wrong; 130 or 143 stopped by Ctrl-C or SIGTERM, with everything cleaned up.
"""

from __future__ import annotations

import argparse
import collections.abc
import json
import os
import signal
import sys
import time
import traceback
import types
import typing

from . import (
    abort,
    accept,
    convoy,
    deaths,
    environment,
    fanout,
    fetch,
    idle,
    plot,
    pool,
    push,
    references,
    requests,
    scaling,
    sharing,
    table,
    write,
)
from .measure import Bench, BrokenError, Plan, UnavailableError

OK, FAILED, USAGE = 0, 1, 2
FORMAT = 1  # of the JSON
BENCHES: dict[str, Bench] = {
    bench.name: bench
    for module in (
        references,
        fetch,
        write,
        sharing,
        convoy,
        push,
        fanout,
        pool,
        abort,
        requests,
        accept,
        idle,
        scaling,
        deaths,
    )
    for bench in module.BENCHES
}
_QUICK = Plan(seconds=0.1, rounds=2)
_BY_DATE = ""


def main(arguments: collections.abc.Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.list:
        for bench in BENCHES.values():
            print(f"{bench.name:10}{bench.title}")
        return OK
    if options.show is not None:
        return _show(options.show)
    if options.plot is not None:
        return _plot(options.plot, options.pictures)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stopped)
    run, problems = _run(options)
    if run["benches"]:
        print(table.render(run), flush=True)
    for name, problem in problems.items():
        print(f"bench {name}: {problem}", file=sys.stderr)
    if options.json is not None:
        try:
            path = _write(options.json, run)
        except OSError as error:
            print(f"bench: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
            return FAILED
        print(f"written to {path}", file=sys.stderr)
    return FAILED if problems else OK


def _stopped(number: int, frame: types.FrameType | None) -> typing.NoReturn:
    """Unwind, which stops every server and actor; impatience must not break that off."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    print("stopping", file=sys.stderr)
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures shmsock beside its peers, in turn, and prints the ratios.",
        epilog="Exit codes: 0 all ran, 1 one could not run or broke, 2 usage. bench/README.md has "
        "the method.",
    )
    add = parser.add_argument
    add("--list", action="store_true", help="list the benches and stop")
    add(
        "--only",
        nargs="+",
        choices=list(BENCHES),
        metavar="NAME",
        default=list(BENCHES),
        help=f"run these: {', '.join(BENCHES)}",
    )
    add("--quick", action="store_true", help="see that everything runs; its figures mean nothing")
    add(
        "--seconds",
        type=_seconds,
        metavar="S",
        help=f"how long to measure each contestant of a bench (default {Plan.seconds:g}); "
        "about five minutes in all by default",
    )
    add(
        "--json",
        nargs="?",
        const=_BY_DATE,
        metavar="FILE",
        help="also write every sample to FILE, or to bench/results/<date>-<commit>[-changed].json",
    )
    add("--show", metavar="FILE", help="print the table of an earlier run's JSON and stop")
    add("--plot", metavar="FILE", help="draw an earlier run's JSON and stop")
    add(
        "--pictures",
        metavar="DIRECTORY",
        default=os.path.join(environment.REPOSITORY, plot.PICTURES),
        help=f"where --plot puts what it draws (default {plot.PICTURES})",
    )
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.01 to 3600")
    return value


def _run(options: argparse.Namespace) -> tuple[table.Json, dict[str, str]]:
    plan = _QUICK if options.quick else Plan()
    plan = Plan(options.seconds or plan.seconds, plan.rounds, _report)
    run: table.Json = {
        "format": FORMAT,
        "settings": {"quick": options.quick, "seconds": plan.seconds, "rounds": plan.rounds},
        "environment": {
            **environment.describe(),
            "load_average_before": os.getloadavg(),
        },
        "benches": [],
    }
    problems: dict[str, str] = {}
    for name in dict.fromkeys(options.only):
        bench = BENCHES[name]
        _report(f"{name}: {bench.title}")
        started = time.monotonic()
        try:
            measures = [measure.as_json() for measure in bench.run(plan)]
        except UnavailableError as error:
            problems[name] = f"cannot run here: {error}"
        except BrokenError as error:
            problems[name] = f"broke: {error}"
        except Exception as error:  # the others' figures are not lost with it
            traceback.print_exc()
            problems[name] = f"broke: {type(error).__name__}: {error}"
        else:
            took_s = round(time.monotonic() - started, 1)
            run["benches"].append(
                {"name": name, "title": bench.title, "includes": bench.includes}
                | {"took_s": took_s, "measures": measures}
            )
    run["environment"]["load_average_after"] = os.getloadavg()
    run["problems"] = problems
    return run, problems


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(path: str, run: table.Json) -> str:
    if path == _BY_DATE:
        date = run["environment"]["date"].partition("T")[0]
        changed = "-changed" if run["environment"]["uncommitted_changes"] else ""
        name = f"{date}-{environment.short_commit()}{changed}.json"
        path = os.path.join(environment.REPOSITORY, "bench", "results", name)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as file:
        json.dump(run, file, indent=1)
        file.write("\n")
    return os.path.relpath(path)


def _show(path: str) -> int:
    try:
        with open(path) as file:
            print(table.render(json.load(file)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"bench: {path} is no result of this bench: {error}", file=sys.stderr)
        return FAILED
    return OK


def _plot(path: str, directory: str) -> int:
    try:
        with open(path) as file:
            drawn = plot.draw(json.load(file), directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"bench: {path} is no result of this bench: {error}", file=sys.stderr)
        return FAILED
    except (UnavailableError, BrokenError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return FAILED
    for picture in drawn:
        print(os.path.relpath(picture))
    return OK


if __name__ == "__main__":
    raise SystemExit(main())
