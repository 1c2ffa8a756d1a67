"""Process pools whose jobs answer clients themselves, and end when the client has gone.

    with shmsock.pool.ProcessPoolExecutor("shop", 2) as pool:
        pool.submit(answer, sid, client=sid)

A thread of the parent gives each child one job at a time over a pipe and watches all children. What
dies with a child is the one job that it ran. ``initializer`` and ``abort_when_failed`` serve every
other pool as well: multiprocessing, concurrent.futures, joblib, Celery.
"""

from __future__ import annotations

import collections.abc
import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.context
import os
import types
import typing
import weakref

from .abort import abort_when_failed
from .errors import OwnershipError, PoolProcessDiedError
from .pool_child import initializer
from .pool_jobs import Fallback, Settings
from .pool_manager import Manager
from .pool_results import AsyncResult, Callback, Future, Results

__all__ = [
    "AsyncResult",
    "OwnershipError",
    "Pool",
    "PoolProcessDiedError",
    "ProcessPoolExecutor",
    "abort_when_failed",
    "initializer",
]

T = typing.TypeVar("T")

Function = collections.abc.Callable[..., typing.Any]
Arguments = collections.abc.Iterable[typing.Any]


class ProcessPoolExecutor(concurrent.futures.Executor):
    """``concurrent.futures.ProcessPoolExecutor`` with sockets, which survives its children.

    The children attach the runtime by themselves, before each job if need be: the pool may be made
    before the runtime is, and outlives it. A child that is killed fails the job it ran, with
    PoolProcessDiedError, and is replaced; no other job notices.

    Args:
        name: The runtime's.
        max_workers: How many children at most; they are started as needed. By default one a CPU.
        mp_context: As of ``multiprocessing.get_context``; forkserver by default, because the parent
            has threads.
        fallback: ``fallback(sid, error)`` is called in another child when one died with a job that
            was submitted with ``client=sid``: it can answer the client. It must be importable.
        initializer: Called in each child before its first job. A child where it raises ends; after
            three in a row the pool fails its jobs with what was raised.
        initargs: Its arguments.
        max_tasks_per_child: After so many jobs a child is replaced; None: never.

    Concurrency: every method from any thread of the process that made it.
    If killed: its children finish the job they run, and end.
    """

    def __init__(
        self,
        name: str,
        max_workers: int | None = None,
        *,
        mp_context: multiprocessing.context.BaseContext | None = None,
        fallback: Fallback | None = None,
        initializer: Function | None = None,
        initargs: tuple[typing.Any, ...] = (),
        max_tasks_per_child: int | None = None,
    ) -> None:
        """Nothing is started before the first job."""
        self._manager = _manager(
            name, max_workers, mp_context, fallback, initializer, initargs, max_tasks_per_child
        )
        # Forgotten without shutdown, or at exit: what was submitted is done, then it ends.
        self._finalizer = weakref.finalize(self, self._manager.shut_down, True, False)

    def submit(  # type: ignore[override]
        self,
        fn: collections.abc.Callable[..., T],
        /,
        *args: typing.Any,
        client: int | None = None,
        own: bool = False,
        **kwargs: typing.Any,
    ) -> concurrent.futures.Future[T]:
        """Have ``fn(*args, **kwargs)`` called in a child.

        Args:
            fn: Importable by the children, as of pickle.
            args: Its arguments.
            client: A SocketId: when that socket has failed, the job is dropped from the queue or
                interrupted as by ``abort_when_failed``; its future raises SocketFailedError.
            own: Lend the client's socket to the job, which reads it as its owner and gives it back
                when it ends. This process must own the socket, and have a Dispatcher with
                ``on_arrival``, by which it comes back. It is lent when the job begins, between two
                messages; if that cannot be, the future raises OwnershipError.
            kwargs: Its arguments by name; not ``client`` or ``own``.

        Raises:
            RuntimeError: The pool was shut down, or belongs to another process.
            ValueError: ``own`` without ``client``.

        If killed: see the class. A child that dies as owner: see ``create_socket``'s
            ``on_owner_death``.
        """
        return self._manager.submit(fn, args, kwargs, client, own)

    def map(
        self,
        fn: collections.abc.Callable[..., T],
        *iterables: Arguments,
        timeout: float | None = None,
        chunksize: int = 1,
        **_: typing.Any,
    ) -> collections.abc.Iterator[T]:
        """As of ``concurrent.futures``: the results of ``fn`` in the arguments' order.

        Args:
            fn: Importable by the children.
            iterables: Its arguments; all are submitted at once.
            timeout: In seconds, from now, for each result.
            chunksize: How many calls travel together, and die together with their child.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be at least 1")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout)
        chunks = _chunks(zip(*iterables, strict=False), chunksize)
        batches = super().map(_call_each, itertools.repeat(fn), chunks, timeout=timeout)
        return itertools.chain.from_iterable(batches)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs; the children end when all is done.

        Args:
            wait: For that; no thread and no child of the pool is left then.
            cancel_futures: Cancel what has not been given to a child.
        """
        if wait:
            self._finalizer.detach()
        self._manager.shut_down(wait, cancel_futures)

    def pids(self) -> list[int]:
        """The children there are at the moment."""
        return self._manager.pids()


class Pool:
    """``multiprocessing.Pool`` with sockets, which survives its children.

    It differs from that one as ``ProcessPoolExecutor`` does from its own: children attach by
    themselves, ``client=sid`` ties a job to its client, a killed child fails its own jobs (in
    ``multiprocessing.Pool`` their results never come) and is replaced. ``imap`` keeps four jobs a
    child under way, and takes more arguments as results are taken.

    Args:
        name: The runtime's.
        processes: How many children at most; by default one a CPU.
        initializer: Called in each child before its first job.
        initargs: Its arguments.
        maxtasksperchild: After so many jobs a child is replaced; None: never.
        context: As of ``multiprocessing.get_context``; forkserver by default.
        fallback: See ``ProcessPoolExecutor``.

    Concurrency: every method from any thread of the process that made it.
    If killed: its children finish the job they run, and end.
    """

    def __init__(
        self,
        name: str,
        processes: int | None = None,
        initializer: Function | None = None,
        initargs: tuple[typing.Any, ...] = (),
        maxtasksperchild: int | None = None,
        context: multiprocessing.context.BaseContext | None = None,
        *,
        fallback: Fallback | None = None,
    ) -> None:
        """Nothing is started before the first job."""
        self._manager = _manager(
            name, processes, context, fallback, initializer, initargs, maxtasksperchild
        )
        self._processes = self._manager.max_workers
        self._finalizer = weakref.finalize(self, self._manager.shut_down, True, True, True)

    def apply(
        self,
        func: collections.abc.Callable[..., T],
        args: Arguments = (),
        kwds: collections.abc.Mapping[str, typing.Any] | None = None,
        *,
        client: int | None = None,
        own: bool = False,
    ) -> T:
        """``func(*args, **kwds)`` in a child; ``client`` and ``own`` as of ``submit``."""
        job = self._manager.submit(func, tuple(args), dict(kwds or {}), client, own)
        return typing.cast(T, job.result())

    def apply_async(
        self,
        func: Function,
        args: Arguments = (),
        kwds: collections.abc.Mapping[str, typing.Any] | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
        *,
        client: int | None = None,
        own: bool = False,
    ) -> AsyncResult:
        """As ``apply``, without waiting; the callbacks are called in a thread of the pool's."""
        job = self._manager.submit(func, tuple(args), dict(kwds or {}), client, own)
        return AsyncResult([job], lambda values: values[0], callback, error_callback)

    def map(
        self, func: Function, iterable: Arguments, chunksize: int | None = None
    ) -> list[typing.Any]:
        """``func`` of each, in order; raises what the first job that failed raised."""
        return typing.cast("list[typing.Any]", self.map_async(func, iterable, chunksize).get())

    def map_async(
        self,
        func: Function,
        iterable: Arguments,
        chunksize: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> AsyncResult:
        """As ``map``, without waiting."""
        calls = [(each,) for each in iterable]
        return self._all(func, calls, chunksize, callback, error_callback)

    def starmap(
        self,
        func: Function,
        iterable: collections.abc.Iterable[Arguments],
        chunksize: int | None = None,
    ) -> list[typing.Any]:
        """As ``map``, of tuples of arguments."""
        return typing.cast("list[typing.Any]", self.starmap_async(func, iterable, chunksize).get())

    def starmap_async(
        self,
        func: Function,
        iterable: collections.abc.Iterable[Arguments],
        chunksize: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> AsyncResult:
        """As ``starmap``, without waiting."""
        calls = [tuple(each) for each in iterable]
        return self._all(func, calls, chunksize, callback, error_callback)

    def imap(self, func: Function, iterable: Arguments, chunksize: int = 1) -> Results:
        """An iterator over the results, in the arguments' order; ``chunksize`` is not used."""
        return self._results(func, iterable, ordered=True)

    def imap_unordered(self, func: Function, iterable: Arguments, chunksize: int = 1) -> Results:
        """An iterator over the results as they come; ``chunksize`` is not used."""
        return self._results(func, iterable, ordered=False)

    def close(self) -> None:
        """Take no more jobs; the children end when all is done."""
        self._manager.shut_down(False, False)

    def terminate(self) -> None:
        """End the children now: what is not done fails with CancelledError."""
        self._finalizer.detach()
        self._manager.shut_down(True, True, True)

    def join(self) -> None:
        """Wait until no thread and no child of the pool is left; after ``close``.

        Raises:
            ValueError: It was not closed.
        """
        if not self._manager.is_closing():
            raise ValueError("the pool was not closed")
        self._finalizer.detach()
        self._manager.shut_down(True, False)

    def pids(self) -> list[int]:
        """The children there are at the moment."""
        return self._manager.pids()

    def __enter__(self) -> Pool:
        """The pool itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        """As ``terminate``."""
        self.terminate()

    def _all(
        self,
        func: Function,
        calls: list[tuple[typing.Any, ...]],
        chunksize: int | None,
        callback: Callback | None,
        error_callback: Callback | None,
    ) -> AsyncResult:
        if chunksize is None:
            chunksize = max(1, -(-len(calls) // (4 * self._processes)))
        jobs = [
            self._manager.submit(_call_each, (func, chunk), {})
            for chunk in _chunks(calls, chunksize)
        ]
        return AsyncResult(
            jobs, lambda lists: list(itertools.chain(*lists)), callback, error_callback
        )

    def _results(self, func: Function, iterable: Arguments, *, ordered: bool) -> Results:
        def submit(argument: typing.Any) -> Future:
            return self._manager.submit(func, (argument,), {})

        return Results(submit, iterable, 4 * self._processes, ordered=ordered)


def _manager(
    name: str,
    max_workers: int | None,
    context: multiprocessing.context.BaseContext | None,
    fallback: Fallback | None,
    initializer: Function | None,
    initargs: tuple[typing.Any, ...],
    max_tasks: int | None,
) -> Manager:
    if max_workers is None:
        max_workers = os.cpu_count() or 1
    if max_workers < 1:
        raise ValueError("a pool has at least one process")
    if max_tasks is not None and max_tasks < 1:
        raise ValueError("a child runs at least one job")
    # WHY NOT fork by default: the parent has threads.
    context = context or multiprocessing.get_context("forkserver")
    settings = Settings(
        name, max_workers, context, fallback, initializer, tuple(initargs), max_tasks or 0
    )
    return Manager(settings)


def _chunks(
    calls: collections.abc.Iterable[T], size: int
) -> collections.abc.Iterator[tuple[T, ...]]:
    iterator = iter(calls)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk


def _call_each(
    function: Function, calls: collections.abc.Iterable[tuple[typing.Any, ...]]
) -> list[typing.Any]:
    return [function(*call) for call in calls]
