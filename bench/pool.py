"""Answers from a process pool: straight to the client, or through the parent; and who has left.

The parent and its pools are processes of their own (``bench.pool_parent``). This process is the
client of the answers, and takes the time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import statistics
import subprocess
import sys
import time
import typing

import shmsock

from . import programs
from .measure import Bench, BrokenError, Measure, Plan, interleave
from .pool_parent import CANCELLING, OURS, PLAIN, PROCESSES

SIZES = {"1 kB": 1_000, "1 MB": 1_000_000}
WAYS = {"shmsock": OURS, "through the parent": PLAIN}
CLIENTS = 1_000
_TIMEOUT_S = 30.0
_LEAST_S = 1e-6  # of CPU: less than that is not told from nothing


@contextlib.contextmanager
def _parent() -> typing.Iterator[programs.Actor]:
    name = f"bench-{os.getpid()}-pool"
    with (
        contextlib.ExitStack() as stack,
        programs._started(
            [sys.executable, "-m", "bench.pool_parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process,
    ):
        stack.callback(shmsock.clean, name)  # finds nothing, unless it had to be killed
        parent = programs.Actor(process)
        parent.ask("begin", name=name, clients=CLIENTS)
        yield parent


def _answers(plan: Plan) -> list[Measure]:
    with contextlib.ExitStack() as stack:
        parent = stack.enter_context(_parent())
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(_TIMEOUT_S)
        parent.tell("connect", port=listener.getsockname()[1])
        clients = {way: stack.enter_context(listener.accept()[0]) for way in WAYS.values()}
        parent.answer()
        found = []
        for size_name, size in SIZES.items():
            contestants = {
                title: _asking(parent, clients[way], way, size, plan) for title, way in WAYS.items()
            }
            taken = interleave(plan, contestants)
            found += [
                Measure(f"answer of {size_name}, {figure}", unit, "lower", taken[figure])
                for figure, unit in (
                    ("latency p50", "ns"),
                    ("latency p99", "ns"),
                    ("CPU of the parent", "ns"),
                    ("bytes through the parent", "B"),
                )
            ]
        return found


def _asking(
    parent: programs.Actor, client: socket.socket, way: str, size: int, plan: Plan
) -> typing.Callable[[], dict[str, float]]:
    client.settimeout(_TIMEOUT_S)
    buffer = memoryview(bytearray(size))

    def batch(count: int) -> tuple[list[int], dict[str, float]]:
        parent.tell("serve", way=way, size=size, count=count)
        took = []
        for _ in range(count):
            started = time.monotonic_ns()
            client.send(b"?")
            got = 0
            while got < size:
                more = client.recv_into(buffer[got:])
                if not more:
                    raise BrokenError(f"an answer by {way} ended after {got} bytes")
                got += more
            took.append(time.monotonic_ns() - started)
        return took, parent.answer()

    started = time.monotonic()
    batch(20)
    count = max(20, round(plan.slice_s / ((time.monotonic() - started) / 20)))

    def sample() -> dict[str, float]:
        took, cost = batch(count)
        cuts = statistics.quantiles(took, n=100, method="inclusive")
        return {
            "latency p50": cuts[49],
            "latency p99": cuts[98],
            "CPU of the parent": cost["cpu_ns"],
            "bytes through the parent": cost["bytes"],
        }

    return sample


def _gone(plan: Plan) -> list[Measure]:
    ways = {
        "shmsock": OURS,
        "plain executor": PLAIN,
        "plain executor that cancels what is queued": CANCELLING,
    }
    cpu_s = max(0.2e-3, plan.slice_s * PROCESSES / CLIENTS)
    with _parent() as parent:
        seeds = itertools.count()

        def sampler(way: str) -> typing.Callable[[], dict[str, float]]:
            def sample() -> dict[str, float]:
                taken = parent.ask(
                    "crowd", way=way, clients=CLIENTS, cpu_s=cpu_s, seed=next(seeds) // len(ways)
                )
                # Percent of what all who left would have cost.
                gone = 100 * max(taken["gone_s"], _LEAST_S) / (CLIENTS / 2 * cpu_s)
                return {"gone": gone, "took": taken["took_s"] * 1e9}

            return sample

        taken = interleave(plan, {title: sampler(way) for title, way in ways.items()})
    return [
        Measure(
            f"{CLIENTS} clients, half leave: CPU spent on who has left, of all it would cost",
            "%",
            "lower",
            taken["gone"],
        ),
        Measure(
            f"{CLIENTS} clients, half leave: time until all is done", "ns", "lower", taken["took"]
        ),
    ]


BENCHES = (
    Bench(
        "pool",
        "an answer from a process pool, straight to the client or through the parent",
        "A client sends a byte to the parent, which has a pool process make an answer of 1 kB or "
        "1 MB. shmsock: the pool process writes it to the client; through the parent: "
        "concurrent.futures brings it to the parent, which sends it. Latency is the client's, one "
        "request at a time; CPU of all the parent's threads; bytes that it read and wrote.",
        _answers,
    ),
    Bench(
        "gone",
        "what a process pool computes for clients that have left",
        f"{CLIENTS} clients at once on {PROCESSES} pool processes; every second one leaves, at a "
        "random moment before its turn is over. shmsock: `submit(..., client=sid)`; peers: "
        "concurrent.futures, whose parent does nothing about it, or cancels what is queued. CPU "
        "used after the client left, by the job's own clock, over what all who left would have "
        "cost; below a microsecond in all counts as one.",
        _gone,
    ),
)
