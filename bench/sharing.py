"""References of 1, 2, 4 and 8 processes to ONE socket: does what each pays depend on the others?

Each process is timed by its own processor time, so that eight of them on two cores are not charged
for waiting for a core. What they pay for meeting each other is in it: a line of memory that moves
between cores, a lock that is tried again. What they sleep is not; the rate of all together tells.
"""

from __future__ import annotations

import collections.abc
import contextlib
import ctypes
import fcntl
import gc
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.managers
import os
import signal
import time
import timeit
import typing

import numpy as np
import posix_ipc

import shmsock

from . import native, programs
from .measure import Bench, BrokenError, Measure, Plan, Sampler, interleave

OURS, UNHELD = "shmsock", "shmsock, attach + detach"
COUNTS = (1, 2, 4, 8)
FLAT = (2, 8)  # compared with alone
_ANSWER_S = 60.0
_CHUNK_S = 1e-3
_fork = multiprocessing.get_context("fork")

# Makes so many calls.
Chunk = collections.abc.Callable[[int], object]


class Counter:
    """Lives in a manager's server process; whoever counts asks it to."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, number: int) -> None:
        """Count."""
        self._count += number


class Manager(multiprocessing.managers.BaseManager):
    """Serves counters."""


Manager.register("Counter", Counter)


class Peers:
    """What else processes can count in together; made before they are forked."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        """Everything is closed with the stack."""
        self._semaphore = posix_ipc.Semaphore(
            f"/bench-shmsock.{os.getpid()}", posix_ipc.O_CREX, mode=0o600, initial_value=1
        )
        self._semaphore.unlink()
        stack.callback(self._semaphore.close)
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        self._words = np.frombuffer(self._shared, np.uint64)
        self._value = multiprocessing.Value("Q", 0)
        self._file = os.memfd_create("bench-shmsock")
        stack.callback(os.close, self._file)
        self._library = stack.enter_context(native.library())
        # ORDER: before the members, whose pipes its server process would keep open.
        self._manager = stack.enter_context(Manager(ctx=_fork))
        self._counter = self._manager.Counter()  # type: ignore[attr-defined]

    def ways(self) -> dict[str, Chunk]:
        """For one process, after the fork."""
        words = {"words": self._words, "one": np.uint64(1)}
        lock = {"acquire": self._semaphore.acquire, "release": self._semaphore.release}
        region = {
            "lockf": fcntl.lockf,
            "fd": self._file,
            "take": fcntl.LOCK_EX,
            "give": fcntl.LOCK_UN,
        }
        value: dict[str, object] = {"lock": self._value.get_lock(), "value": self._value}
        ways = {
            "numpy word under posix_ipc semaphore": _statement(
                "acquire(); words[3] += one; release()", {**lock, **words}
            ),
            "multiprocessing.Value under its lock": _statement(
                "with lock: value.value += 1", value
            ),
            "numpy word under fcntl lock": _statement(
                "lockf(fd, take, 1); words[4] += one; lockf(fd, give, 1)", {**region, **words}
            ),
            "Manager proxy, a counter": _statement("add(1)", {"add": self._counter.add}),
        }
        if self._library is not None:
            run = self._library.shared_counts
            word = ctypes.addressof(ctypes.c_char.from_buffer(self._shared, 512))
            ways["C, count in a shared word"] = lambda count: run(word, count)
        return ways


def _statement(code: str, names: dict[str, object]) -> Chunk:
    return timeit.Timer(code, globals=names).timeit


class Member:
    """One of the processes, as the bench sees it."""

    def __init__(self, stack: contextlib.ExitStack, peers: Peers, name: str) -> None:
        """Fork it; it is killed with the stack."""
        self._pipe, there = _fork.Pipe()
        stack.enter_context(self._pipe)
        process = _fork.Process(target=_member, args=(there, peers, name), daemon=True)
        process.start()
        there.close()
        stack.callback(process.join)
        stack.callback(process.kill)  # it is in the way of nobody: repaired by whoever looks

    def tell(self, *request: object) -> None:
        """Ask for something."""
        self._pipe.send(request)

    def answer(self) -> typing.Any:
        """Wait for the answer."""
        if not self._pipe.poll(_ANSWER_S):
            raise BrokenError(f"a process did not answer in {_ANSWER_S:.0f} s")
        try:
            return self._pipe.recv()
        except EOFError:
            raise BrokenError("a process has ended; what it said is above") from None


def _member(pipe: multiprocessing.connection.Connection, peers: Peers, name: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the bench ends us
    (sid,) = pipe.recv()
    with shmsock.Runtime.attach(name) as runtime:
        address = runtime.address
        ours = _statement("address(sid).close()", {"address": address, "sid": sid})
        ways = {OURS: ours, UNHELD: ours, **peers.ways()}
        sizes = {}
        for way, chunk in ways.items():
            with _held(runtime, sid, way):
                sizes[way] = _size(chunk)
        gc.disable()
        pipe.send(list(ways))
        with contextlib.suppress(EOFError):
            while True:
                way, seconds = pipe.recv()
                with _held(runtime, sid, way):
                    pipe.send(_count(ways[way], sizes[way], seconds))


def _held(
    runtime: shmsock.Runtime, sid: int, way: str
) -> contextlib.AbstractContextManager[object]:
    """What makes ours count in this process alone: a reference that is held meanwhile."""
    reference = runtime.address(sid) if way == OURS else None
    return contextlib.nullcontext() if reference is None else reference


def _size(chunk: Chunk) -> int:
    """How many calls take a millisecond; of three tries, as one may lose its core meanwhile."""
    size = 1
    while True:
        took = []
        for _ in range(3):
            began = time.perf_counter()
            chunk(size)
            took.append(time.perf_counter() - began)
        if min(took) >= _CHUNK_S:
            return size
        size *= 2


def _count(chunk: Chunk, size: int, seconds: float) -> tuple[int, int, int]:
    """Call for so long; how often, and the processor and wall time of it in nanoseconds."""
    calls, began, cpu = 0, time.monotonic_ns(), time.process_time_ns()
    until = began + int(seconds * 1e9)
    while time.monotonic_ns() < until:
        chunk(size)
        calls += size
    return calls, time.process_time_ns() - cpu, time.monotonic_ns() - began


def _sampler(members: list[Member], way: str, seconds: float) -> Sampler:
    def sample() -> dict[str, float]:
        figures: dict[str, float] = {}
        for count in COUNTS:
            for member in members[:count]:
                member.tell(way, seconds)
            counted = [member.answer() for member in members[:count]]
            each = [cpu / calls for calls, cpu, _ in counted]
            figures[f"CPU per call, {count}"] = sum(each) / count
            figures[f"rate, {count}"] = sum(calls / took * 1e9 for calls, _, took in counted)
        for count in FLAT:
            alone = figures[f"CPU per call, {COUNTS[0]}"]
            figures[f"over alone, {count}"] = figures[f"CPU per call, {count}"] / alone
        return figures

    return sample


def _sharing(plan: Plan) -> list[Measure]:
    name = f"bench-{os.getpid()}-sharing"
    with contextlib.ExitStack() as stack:
        stack.callback(shmsock.clean, name)  # finds nothing, unless the host had to be killed
        # ORDER: forked before the host is started: they would keep the pipe that ends it open.
        peers = Peers(stack)
        members = [Member(stack, peers, name) for _ in range(max(COUNTS))]
        host = stack.enter_context(programs.actor())
        (sid,) = host.ask("host", name=name, count=1)
        ways: list[str] = []
        for member in members:
            member.tell(sid)
            ways = member.answer()
        seconds = plan.slice_s / len(COUNTS)
        taken = interleave(plan, {way: _sampler(members, way, seconds) for way in ways})
        with shmsock.Runtime.attach(name) as runtime:
            if problems := runtime.audit():
                raise BrokenError("the audit found: " + "; ".join(problems))
    cpu, rate = "address + release on one socket, CPU per call", "address + release on one socket"
    named = {
        **{f"CPU per call, {n}": (f"{cpu}, {_processes(n)}", "ns", "lower") for n in COUNTS},
        **{f"over alone, {n}": (f"{cpu}, {_processes(n)} over 1", "x", "lower") for n in FLAT},
        **{f"rate, {n}": (f"{rate}, calls of {_processes(n)}", "1/s", "higher") for n in FLAT},
    }
    return [Measure(*words, taken[figure]) for figure, words in named.items()]


def _processes(count: int) -> str:
    return f"{count} process" if count == 1 else f"{count} processes"


BENCHES = (
    Bench(
        "sharing",
        "address and release by 1, 2, 4 and 8 processes on one socket",
        "Each process holds the socket and calls `address(sid).close()` as fast as it can; the "
        "socket is a third one's. Processor time of each process over its calls, the mean of the "
        "processes; the same over that of one process alone, of the same round; calls of all per "
        "second. The peers are counted in by the same processes. attach + detach: no process holds "
        "it meanwhile, so that every call takes the socket's stripe twice. C: fetch_add and "
        "fetch_sub of one word in shared memory, in a loop without Python, which is where brpc "
        "counts references. Manager proxy: one call, where a reference would need two.",
        _sharing,
    ),
)
