"""What grows with the size of the table, and what must not.

Every table lives in this process, which is its host; nobody else is in it but who is about to die.
Run as ``python -m bench.scaling`` it is who makes those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import signal
import socket
import time
import timeit
import typing

import shmsock

from . import programs
from .measure import Bench, BrokenError, Measure, Plan, Sampler, Timed, interleave, time_calls

OURS = "shmsock"
SLOTS, ROWS = (1_000, 65_536, 1_000_000), (8, 64, 512)
USUAL_SLOTS, USUAL_ROWS = 65_536, 64
LIVE, HELD = 100, 10
CONSTANT, LINEAR = "constant", "linear"


class Operation(typing.NamedTuple):
    """What is measured, and how it should grow with slots and with process rows."""

    name: str
    slots: str
    rows: str


OPERATIONS = (
    Operation("create + fail + recycle", CONSTANT, CONSTANT),
    Operation("address + release, attached", CONSTANT, CONSTANT),
    Operation("attach + detach", CONSTANT, CONSTANT),
    Operation("sockets()", LINEAR, CONSTANT),
    Operation("doctor's audit", LINEAR, LINEAR),
    Operation("reaping a dead process", LINEAR, LINEAR),
    Operation("joining and leaving", LINEAR, LINEAR),
    Operation("the timer's work, once a second", LINEAR, CONSTANT),
)


LONG = ("reaping a dead process", "joining and leaving")


class Nursery:
    """Makes processes that die."""

    def __init__(self) -> None:
        self._victim = 0

    def victim(self, name: str, sids: list[int]) -> int:
        """Fork one that holds these; its pid. It has no channel, so its host hears of no end."""
        read, write = os.pipe()
        self._victim = os.fork()
        if not self._victim:
            runtime = shmsock.Runtime.attach(name)
            held = [runtime.address(sid) for sid in sids]
            os.write(write, b"." * len(held))
            signal.pause()
        os.close(write)
        if len(os.read(read, len(sids))) != len(sids):
            raise RuntimeError("a victim died too early")
        os.close(read)
        return self._victim

    def kill(self) -> None:
        """Kill the last one, and wait until the kernel has."""
        os.kill(self._victim, signal.SIGKILL)
        os.waitpid(self._victim, 0)


class _Table:
    """One runtime, and every operation on it."""

    def __init__(
        self, stack: contextlib.ExitStack, slots: int, rows: int, nursery: programs.Actor
    ) -> None:
        self.name = f"bench-{os.getpid()}-{slots}-{rows}"
        stack.callback(shmsock.clean, self.name)
        self.runtime = stack.enter_context(
            shmsock.Runtime.create(self.name, slots=slots, processes=rows, stripes=64)
        )
        self._nursery = nursery
        self._sids = []
        for _ in range(LIVE):
            ours, theirs = socket.socketpair()
            stack.enter_context(theirs)
            self._sids.append(self.runtime.create_socket(ours))
        held = self.runtime.address(self._sids[0])
        assert held is not None
        stack.enter_context(held)

    def timed(self, operation: str) -> Timed:
        """What makes so many calls of an operation."""
        runtime, engine = self.runtime, typing.cast(typing.Any, self.runtime._engine)
        names: dict[str, object] = {
            "create": engine.create,
            "fail": engine.set_failed,
            "owner": engine.word,
            "code": errno.ECONNABORTED,
            "address": runtime.address,
            "held": self._sids[0],
            "other": self._sids[1],
            "runtime": runtime,
            "tick": self._tick,
        }
        code = {
            "create + fail + recycle": "fail(create(owner), code, '')",
            "address + release, attached": "address(held).close()",
            "attach + detach": "address(other).close()",
            "sockets()": "runtime.sockets()",
            "doctor's audit": "runtime.audit()",
            "the timer's work, once a second": "tick()",
        }
        if operation in code:
            return timeit.Timer(code[operation], globals=names).timeit
        return self._reap if operation == "reaping a dead process" else self._join

    def _tick(self) -> None:
        """As Runtime._tick, now."""
        runtime = self.runtime
        runtime._still_there()
        for step in (
            runtime._engine.collect,
            runtime._look_around,
            runtime._writers.tick,
            runtime._descriptors.tick,
            runtime._descriptors.claim_unknown,
            runtime._hand_over.tick,
            runtime._renew_semaphores,
        ):
            step()

    def _reap(self, count: int) -> float:
        took_s, done = 0.0, 0
        while done < count:
            self._nursery.ask("victim", name=self.name, sids=self._sids[:HELD])
            self._nursery.ask("kill")
            reaped, began = self.runtime._recovery.counters["reaped"], time.perf_counter()
            counted = self.runtime.repair()["reaped"]
            each_s = time.perf_counter() - began
            if counted == reaped + 1:  # else the timer came first
                took_s, done = took_s + each_s, done + 1
        return took_s

    def _join(self, count: int) -> float:
        took_s = 0.0
        for _ in range(count):
            began = time.perf_counter()
            shmsock.Runtime.attach(self.name).close()
            took_s += time.perf_counter() - began
        return took_s


def _measures(
    plan: Plan, operation: Operation, tables: dict[tuple[int, int], _Table]
) -> list[Measure]:
    timed = {f"{size}": table.timed(operation.name) for size, table in tables.items()}
    if operation.name in LONG:  # a process each: not so many as would fill the time
        count = 5 if plan.slice_s > 0.05 else 1
        samples = interleave(plan, {size: _a_few(each, count) for size, each in timed.items()})[
            "ns"
        ]
    else:
        samples = time_calls(plan, timed)
    measures = []
    for what, sizes, law in (("slots", SLOTS, operation.slots), ("rows", ROWS, operation.rows)):
        by_size = {
            size: samples[f"{(size, USUAL_ROWS) if what == 'slots' else (USUAL_SLOTS, size)}"]
            for size in sizes
        }
        *smaller, largest = sizes
        contestants = {OURS: by_size[largest]}
        contestants |= {f"{size:,} {what}": by_size[size] for size in reversed(smaller)}
        name = f"{operation.name}, {largest:,} {what}, should be {law}"
        measure = Measure(name, "ns", "lower", contestants)
        if plan.rounds > 2:  # two rounds are a trial of the bench, whose figures mean nothing
            _check(measure, law, largest / sizes[0])
        measures.append(measure)
    return measures


def _a_few(timed: Timed, count: int) -> Sampler:
    return lambda: {"ns": timed(count) / count * 1e9}


def _check(measure: Measure, law: str, growth: float) -> None:
    """Far from the law is no figure but an error; the least of the rounds, as noise only adds."""
    low = measure.ratios()[-1].low
    most = math.sqrt(growth) if law == CONSTANT else 2 * growth
    if low > most:
        raise BrokenError(f"{measure.name}: grew {low:.0f} times where the table grew {growth:.0f}")


def _scaling(plan: Plan) -> list[Measure]:
    short = dataclasses.replace(plan, seconds=plan.seconds / 4)
    sizes = [(slots, USUAL_ROWS) for slots in SLOTS] + [(USUAL_SLOTS, rows) for rows in ROWS]
    with contextlib.ExitStack() as stack:
        nursery = stack.enter_context(programs.actor(module="bench.scaling"))
        tables = {size: _Table(stack, *size, nursery) for size in dict.fromkeys(sizes)}
        measures = []
        for operation in OPERATIONS:
            plan.report(f"scaling: {operation.name}")
            measures += _measures(short, operation, tables)
        for table in tables.values():
            if problems := table.runtime.audit():
                raise BrokenError("the audit found: " + "; ".join(problems))
    return measures


BENCHES = (
    Bench(
        "scaling",
        "what grows with slots and with process rows",
        f"Tables of {', '.join(f'{n:,}' for n in SLOTS)} slots with {USUAL_ROWS} process rows, and "
        f"of {USUAL_SLOTS:,} slots with {', '.join(map(str, ROWS))} rows, 64 stripes; {LIVE} "
        "sockets live in each. The largest is compared with the smaller ones. What should be "
        "constant and grows by more than the root of the table's growth, or should be linear and "
        "grows by more than twice, is an error. Create: the engine's, no descriptor. Reaping: of "
        f"a process that held {HELD} sockets, from the kernel's report to its row being free. "
        "Joining and leaving: `Runtime.attach(name).close()`.",
        _scaling,
    ),
)


def main() -> None:
    programs.obey(Nursery())


if __name__ == "__main__":
    main()
