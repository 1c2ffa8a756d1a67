"""What a pool's manager keeps in its books: jobs, children, settings; and how a job ends."""

from __future__ import annotations

import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import logging
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.process
import pickle
import typing
from multiprocessing.reduction import ForkingPickler

from .errors import ShmsockError, SocketFailedError
from .layout import Status
from .pool_child import GRANTED, REFUSED
from .runtime import Runtime

log = logging.getLogger("shmsock")

Fallback = collections.abc.Callable[[int, Exception], object]


@dataclasses.dataclass(eq=False)
class Job:
    """A call on its way."""

    data: bytes
    future: concurrent.futures.Future[typing.Any]
    client: int | None
    own: bool = False
    fallback: bool = False  # it is the fallback of another job
    begun: bool = False
    tries: int = 0


@dataclasses.dataclass(eq=False)
class Child:
    """A pool process."""

    process: multiprocessing.process.BaseProcess
    connection: multiprocessing.connection.Connection
    ready: bool = False
    error: Exception | None = None  # why its initializer failed
    job: Job | None = None
    jobs: int = 0  # how many it was given
    ending: bool = False  # it was told to


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a pool's children are made.

    Attributes:
        name: The runtime's.
        max_workers: How many at most.
        context: Of multiprocessing.
        fallback: Answers clients of jobs that died with their child.
        initializer: Called in each child before its first job, with ``initargs``.
        max_tasks: After so many jobs a child is replaced; 0: never.
    """

    name: str
    max_workers: int
    context: multiprocessing.context.BaseContext
    fallback: Fallback | None = None
    initializer: collections.abc.Callable[..., object] | None = None
    initargs: tuple[typing.Any, ...] = ()
    max_tasks: int = 0


def offered(runtime: Runtime, client: int, index: int) -> bytes | None:
    """Offer a socket of ours to a child; None while it is in the middle of a message."""
    try:
        reference = runtime.address(client)
        if reference is None:
            return GRANTED  # the job finds that it has failed
        with reference:
            if reference.hand_over(index):
                return GRANTED
            if reference.busy:
                return None
            return REFUSED + b"it is not this process's to lend"
    except (ShmsockError, ValueError) as error:
        return REFUSED + str(error).encode()


def packed(
    function: typing.Any,
    args: tuple[typing.Any, ...],
    kwargs: dict[str, typing.Any],
    client: int | None,
    owner: int | None,
) -> bytes:
    """A message to a child; ``owner`` is the process that lends the client's socket."""
    job = bytes(ForkingPickler.dumps((function, args, kwargs)))
    return pickle.dumps((client if client is None else int(client), owner, job))


def finish(job: Job, value: object) -> None:
    """The job's future has its result."""
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        job.future.set_result(value)


def fail(job: Job, error: BaseException) -> None:
    """The job's future raises, unless it was cancelled."""
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        if job.tries or job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)


def log_fallback(future: concurrent.futures.Future[typing.Any]) -> None:
    """Nobody waits for a fallback: say that it failed."""
    if not future.cancelled() and (error := future.exception()) is not None:
        if isinstance(error, SocketFailedError):
            return  # the client has gone: there is nobody to answer
        log.error("a fallback failed: %r", error)


def is_gone(runtime: Runtime, client: int) -> bool:
    """Whether a job's client has gone, as far as this process can tell."""
    try:
        return runtime.status(client) is not Status.LIVE
    except ShmsockError:
        return False  # it is not for us to say
