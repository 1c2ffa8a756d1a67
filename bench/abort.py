"""From ``set_failed`` in one process to the exception in a job of another: ``abort_when_failed``.

The job is in its process's main thread: asleep, between calls of numpy, or in pure Python. The peer
is the least that could do it: a signal whose handler raises.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import statistics
import time
import typing

import numpy as np

import shmsock
import shmsock.pool

from .measure import Bench, Measure, Plan, interleave

OURS, PEER = "shmsock", "a signal whose handler raises"
_GET_GOING_S = 0.01
_A_TRY_S = 0.03  # about

Pipe = typing.Any  # of multiprocessing; its type differs between versions


class _ToldError(Exception):
    """Raised by the signal's handler."""


def _sleep() -> None:
    time.sleep(60)


def _numpy() -> None:
    matrix = np.random.default_rng(1).random((100, 100))
    while True:
        matrix = matrix @ matrix % 1.0


def _python() -> None:
    while True:
        sum(range(100))


JOBS = {"asleep": _sleep, "between calls of numpy": _numpy, "in pure Python": _python}


def _child(name: str, pipe: Pipe) -> None:
    def told(*_: object) -> None:
        raise _ToldError

    signal.signal(signal.SIGUSR1, told)
    with shmsock.Runtime.attach(name):
        for job, sid in iter(pipe.recv, None):
            block = shmsock.pool.abort_when_failed(sid) if sid else contextlib.nullcontext()
            try:
                with block:
                    pipe.send("begun")
                    JOBS[job]()
            except (_ToldError, shmsock.SocketFailedError):
                pipe.send(time.monotonic_ns())


def _run(plan: Plan) -> list[Measure]:
    name = f"bench-{os.getpid()}-abort"
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    measures = []
    with shmsock.Runtime.create(name, slots=64) as runtime, pipe:
        child = context.Process(target=_child, args=(name, theirs))
        child.start()
        theirs.close()

        def one(job: str, ours: bool) -> int:
            connection, client = socket.socketpair()
            sid = runtime.create_socket(connection)
            pipe.send((job, sid if ours else 0))
            assert pipe.recv() == "begun"
            time.sleep(_GET_GOING_S)
            begun_ns = time.monotonic_ns()
            if ours:
                runtime.set_failed(sid)
            else:
                os.kill(typing.cast(int, child.pid), signal.SIGUSR1)
            took_ns: int = pipe.recv() - begun_ns
            client.close()
            if not ours:
                runtime.set_failed(sid)
            return took_ns

        def several(job: str, ours: bool) -> dict[str, float]:
            times = [one(job, ours) for _ in range(max(1, round(plan.slice_s / _A_TRY_S)))]
            return {"median": statistics.median(times), "worst": max(times)}

        try:
            for job in JOBS:
                plan.report(f"abort: {job}")
                one(job, True)
                taken = interleave(
                    plan,
                    {
                        OURS: lambda job=job: several(job, True),  # type: ignore[misc]
                        PEER: lambda job=job: several(job, False),  # type: ignore[misc]
                    },
                )
                measures += [
                    Measure(f"client fails to job raises, {job}, {which}", "ns", "lower", samples)
                    for which, samples in taken.items()
                ]
        finally:
            pipe.send(None)
            child.join()
    return measures


BENCHES = (
    Bench(
        "abort",
        "set_failed in one process to the exception in another's job",
        "`with abort_when_failed(sid):` in the main thread of a process that sleeps, computes with "
        "numpy, or runs pure Python; another process calls `set_failed(sid)` 10 ms later. The peer "
        "is a signal sent by that process, whose handler raises.",
        _run,
    ),
)
