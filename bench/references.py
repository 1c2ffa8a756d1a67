"""What a reference costs in one process: hold one more, take the first, live a whole life.

Everything runs in one process that is also the runtime's host, alone in its segment: no contention,
no control channel.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import multiprocessing
import os
import socket
import typing
import weakref

import numpy as np
import posix_ipc

import shmsock

from . import native
from .measure import Bench, BrokenError, Measure, Plan, Statement, Timed, time_statements

OURS = "shmsock"
IN_C = "C sem_wait + sem_post"
# brpc's own SocketId: create + SetFailed + recycle, compiled with -O2, measured once and elsewhere
# than this run, though on a machine like that of README.md. So its ratio is no ratio of one run.
BRPC, BRPC_NS = "brpc's own, a constant", 457.0


@contextlib.contextmanager
def _runtime() -> typing.Iterator[shmsock.Runtime]:
    name = f"bench-{os.getpid()}"
    with shmsock.Runtime.create(name, slots=4096, processes=16, stripes=8) as runtime:
        yield runtime


class _Referent:
    """Something a weak reference can point to."""


@contextlib.contextmanager
def _peers() -> typing.Iterator[list[Statement]]:
    """What else Python offers, from nothing at all to a counter shared by processes."""
    number, referent = 1, _Referent()
    semaphore = posix_ipc.Semaphore(
        f"/bench-shmsock.{os.getpid()}", posix_ipc.O_CREX, mode=0o600, initial_value=1
    )
    semaphore.unlink()
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    lock = {"acquire": semaphore.acquire, "release": semaphore.release}
    value = multiprocessing.Value("Q", 0)
    words = np.frombuffer(shared, np.uint64)
    try:
        yield [
            Statement("no-op C method", "conjugate()", {"conjugate": number.conjugate}),
            Statement("weakref()", "reference()", {"reference": weakref.ref(referent)}),
            Statement("posix_ipc acquire(0), release()", "acquire(0); release()", dict(lock)),
            Statement(
                "numpy word under posix_ipc semaphore",
                "acquire(0); words[3] += one; release()",
                {**lock, "words": words, "one": np.uint64(1)},
            ),
            Statement(
                "multiprocessing.Value under its lock",
                "with lock: value.value += 1",
                {"lock": value.get_lock(), "value": value},
            ),
        ]
    finally:
        semaphore.close()


@contextlib.contextmanager
def _in_c() -> typing.Iterator[dict[str, Timed]]:
    """A semaphore taken and given by C alone, where there is a compiler."""
    with native.library() as library:
        if library is None:
            yield {}
        else:
            pairs = library.semaphore_pairs
            yield {IN_C: lambda count: pairs(count) / 1e9}


def _address_and_release(plan: Plan, *, attached: bool) -> dict[str, list[float]]:
    with _runtime() as runtime, _peers() as peers, _in_c() as others:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as held:
            sid = runtime.create_socket(ours)
            if attached:
                reference = runtime.address(sid)
                assert reference is not None
                held.enter_context(reference)
            names = {"address": runtime.address, "sid": sid}
            samples = time_statements(
                plan, [Statement(OURS, "address(sid).close()", names), *peers], others
            )
        _check(runtime)
    return samples


def _address(plan: Plan) -> list[Measure]:
    samples = _address_and_release(plan, attached=True)
    return [Measure("address + release, attached", "ns", "lower", samples)]


def _attach(plan: Plan) -> list[Measure]:
    samples = _address_and_release(plan, attached=False)
    return [Measure("address + release, attach + detach", "ns", "lower", samples)]


_LIFE = "a, b = socketpair(); fail(create(a), code, ''); b.close()"
_PLAIN_LIFE = "a, b = socketpair(); a.shutdown(how); a.close(); b.close()"


def _create(plan: Plan) -> list[Measure]:
    with _runtime() as runtime:
        names = {
            "socketpair": socket.socketpair,
            "create": runtime.create_socket,
            "fail": runtime.set_failed,
            "code": errno.ECONNABORTED,
        }
        plain = {"socketpair": socket.socketpair, "how": socket.SHUT_RDWR}
        samples = time_statements(
            plan,
            [
                Statement(OURS, _LIFE, names),
                Statement("plain socketpair", _PLAIN_LIFE, plain),
            ],
        )
        bare = _create_bare(plan, runtime)
        if runtime.in_use():
            raise BrokenError(f"{runtime.in_use()} slots were not recycled")
        _check(runtime)
    return [
        Measure("create + fail + recycle", "ns", "lower", samples),
        Measure("create + fail + recycle, no descriptor", "ns", "lower", bare),
    ]


_BARE_LIFE = "fail(create(owner), code, '')"


def _create_bare(plan: Plan, runtime: shmsock.Runtime) -> dict[str, list[float]]:
    """The table's part alone: no socket, so nothing to keep, to shut down or to close."""
    engine: typing.Any = runtime._engine
    names = {
        "create": engine.create,
        "fail": engine.set_failed,
        "owner": engine.word,
        "code": errno.ECONNABORTED,
    }
    samples = time_statements(plan, [Statement(OURS, _BARE_LIFE, names)])
    return {**samples, BRPC: [BRPC_NS] * plan.rounds}


def _check(runtime: shmsock.Runtime) -> None:
    """The books balance after all this, or the figures mean nothing."""
    if problems := runtime.audit():
        raise BrokenError("the audit found: " + "; ".join(problems))


BENCHES = (
    Bench(
        "address",
        "address(sid) and release while this process is attached already",
        "`address(sid).close()` while another reference to the socket is held: no lock, no shared "
        "write. One process, one thread.",
        _address,
    ),
    Bench(
        "attach",
        "address(sid) and release of the first and only reference",
        "`address(sid).close()` while no other is held: the stripe is taken twice, once to attach "
        "and once to detach. One process, one thread, nobody else at the stripe. C: sem_wait and "
        "sem_post of an unnamed semaphore, in a loop without Python.",
        _attach,
    ),
    Bench(
        "create",
        "the whole life of a socket: create, fail, recycle",
        f"`{_LIFE}`, in the host: socketpair, the slot's create, the store's duplicate, set_failed "
        "with shutdown, recycle, and closing every descriptor. The peer is the same life of a "
        f"plain one: `{_PLAIN_LIFE}`. No descriptor: `{_BARE_LIFE}` of the engine alone, beside "
        f"what brpc's own took compiled, {BRPC_NS:.0f} ns: a constant, not measured in this run.",
        _create,
    ),
)
