"""What one process's computing threads do to another one that wants the same stripe.

A thread that is inside a stripe and has to wait for the GIL keeps the stripe for as long as the
others compute: a switch interval, 5 ms, each. Then everybody in the machine who wants that stripe
waits as well. The C engine never lets the GIL go inside. Each engine runs in processes of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import typing

import shmsock

from . import programs
from .measure import Bench, Measure, Plan, Sampler, UnavailableError, interleave

THREADS = 4  # of one process, that compute
ENGINES = {"shmsock": "c", "Python engine": "py"}  # what the C engine is compared with


@contextlib.contextmanager
def _pair(engine: str, plan: Plan, quiet: bool) -> typing.Iterator[Sampler]:
    """A crowd that attaches all the time while it computes, and one who attaches and is timed."""
    name = f"bench-{os.getpid()}-{engine}-{int(quiet)}"
    with contextlib.ExitStack() as stack:
        stack.callback(shmsock.clean, name)
        crowd = stack.enter_context(programs.actor(engine=engine))
        probe = stack.enter_context(programs.actor(engine=engine))
        sids = crowd.ask("gather", name=name)
        probe.ask("come", name=name)

        def sample() -> dict[str, float]:
            crowd.ask("compute", threads=0 if quiet else THREADS, sid=sids[0])
            try:
                taken: dict[str, float] = probe.ask("attach", sid=sids[1], seconds=plan.slice_s)
            finally:
                crowd.ask("rest")
            return taken

        yield sample


def _convoy(plan: Plan) -> list[Measure]:
    if importlib.util.find_spec("shmsock._engine") is None:
        raise UnavailableError("the C engine was not built")
    with contextlib.ExitStack() as stack:
        contestants = {
            title: stack.enter_context(_pair(engine, plan, quiet=False))
            for title, engine in ENGINES.items()
        }
        contestants["C engine, nobody computes"] = stack.enter_context(_pair("c", plan, quiet=True))
        taken = interleave(plan, contestants)
    return [
        Measure(f"attach + detach beside a crowd, {figure}", "ns", "lower", samples)
        for figure, samples in taken.items()
    ]


BENCHES = (
    Bench(
        "convoy",
        "attach and detach while another process computes in four threads, and attaches",
        f"Process A computes in {THREADS} threads and attaches and detaches one socket in a fifth; "
        "every half a millisecond B does the same to another socket of the same stripe, and is "
        "timed. The peers are the Python engine, and the C engine while A only attaches.",
        _convoy,
    ),
)
