"""Process pools whose jobs answer clients themselves, and end when the client has gone.

    with shmsock.pool.ProcessPoolExecutor("shop", 2) as pool:
        pool.submit(answer, sid, client=sid)

A thread of the parent gives each child one job at a time over a pipe and watches all children. What
dies with a child is the one job that it ran.

    INVARIANT: children, and which job each one has, are the manager thread's alone.
    INVARIANT: every job is in the queue or with one child, until its future is done.
"""

from __future__ import annotations

import collections
import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import errno
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import pickle
import signal
import threading
import time
import typing
import warnings
import weakref
from multiprocessing.reduction import ForkingPickler

from .abort import abort_when_failed
from .errors import PoolProcessDiedError, ShmsockError, SocketFailedError
from .layout import Status
from .pool_child import BEGUN, READY, RESULT, initializer, run_jobs
from .runtime import Runtime, find

__all__ = ["PoolProcessDiedError", "ProcessPoolExecutor", "abort_when_failed", "initializer"]

log = logging.getLogger("shmsock")

T = typing.TypeVar("T")
P = typing.ParamSpec("P")

Fallback = collections.abc.Callable[[int, Exception], object]

_SWEEP_S = 0.05
_BIRTHS = 3  # so many children in a row that die before they are ready are no accident
_END_S = 10.0


@dataclasses.dataclass(eq=False)
class _Job:
    """A call on its way."""

    data: bytes
    future: concurrent.futures.Future[typing.Any]
    client: int | None
    fallback: bool = False  # it is the fallback of another job
    begun: bool = False
    tries: int = 0


@dataclasses.dataclass(eq=False)
class _Child:
    """A pool process."""

    process: multiprocessing.process.BaseProcess
    connection: multiprocessing.connection.Connection
    ready: bool = False
    job: _Job | None = None


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
    ) -> None:
        """Nothing is started before the first job."""
        if max_workers is None:
            max_workers = os.cpu_count() or 1
        if max_workers < 1:
            raise ValueError("max_workers must be at least 1")
        context = mp_context or multiprocessing.get_context("forkserver")
        self._manager = _Manager(name, max_workers, context, fallback)
        # Forgotten without shutdown, or at exit: what was submitted is done, then it ends.
        self._finalizer = weakref.finalize(self, self._manager.shut_down, True, False)

    def submit(  # type: ignore[override]
        self,
        fn: collections.abc.Callable[..., T],
        /,
        *args: typing.Any,
        client: int | None = None,
        **kwargs: typing.Any,
    ) -> concurrent.futures.Future[T]:
        """Have ``fn(*args, **kwargs)`` called in a child.

        Args:
            fn: Importable by the children, as of pickle.
            args: Its arguments.
            client: A SocketId: when that socket has failed, the job is dropped from the queue or
                interrupted as by ``abort_when_failed``; its future raises SocketFailedError.
            kwargs: Its arguments by name; not ``client``.

        Raises:
            RuntimeError: The pool was shut down, or belongs to another process.

        If killed: see the class.
        """
        return self._manager.submit(fn, args, kwargs, client)

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


class _Manager:
    """The queue and the thread; knows nothing of the executor, which may be collected."""

    def __init__(
        self,
        name: str,
        max_workers: int,
        context: multiprocessing.context.BaseContext,
        fallback: Fallback | None,
    ) -> None:
        self._name, self._max, self._context = name, max_workers, context
        self._fallback = fallback
        self._pid = os.getpid()
        self._lock = threading.Lock()  # the queue, closing, the thread
        self._queue: collections.deque[_Job] = collections.deque()
        self._children: list[_Child] = []
        self._closing = False
        self._broken: Exception | None = None
        self._failed_births = 0
        self._target = 0
        self._thread: threading.Thread | None = None
        self._wake_fd = -1
        self._mask: set[typing.Any] = set()
        self._sweep_at = 0.0

    # -- any thread -----------------------------------------------------------------------------

    def submit(
        self,
        function: collections.abc.Callable[..., typing.Any],
        args: tuple[typing.Any, ...],
        kwargs: dict[str, typing.Any],
        client: int | None,
    ) -> concurrent.futures.Future[typing.Any]:
        if self._pid != os.getpid():
            raise RuntimeError("this pool belongs to the process that made it: make another one")
        future: concurrent.futures.Future[typing.Any] = concurrent.futures.Future()
        try:
            data = _packed(function, args, kwargs, client)
        except Exception as error:
            future.set_exception(error)  # as concurrent.futures does
            return future
        self._put(_Job(data, future, client))
        return future

    def _put(self, job: _Job) -> None:
        with self._lock:
            if self._closing:
                raise RuntimeError("cannot submit after shutdown")
            if self._broken is not None:
                raise RuntimeError(f"the pool cannot start children: {self._broken}")
            self._queue.append(job)
            if self._thread is None:
                self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._thread = threading.Thread(
                    target=self._run, name=f"shmsock-pool-{self._name}", daemon=True
                )
                self._thread.start()
            os.eventfd_write(self._wake_fd, 1)

    def shut_down(self, wait: bool, cancel: bool) -> None:
        if self._pid != os.getpid():
            return  # inherited by a fork
        cancelled: list[_Job] = []
        with self._lock:
            self._closing = True
            if cancel:
                cancelled = [job for job in self._queue if not job.tries]
                self._queue = collections.deque(job for job in self._queue if job.tries)
            thread = self._thread
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)
        for job in cancelled:
            job.future.cancel()
            job.future.set_running_or_notify_cancel()
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()

    def pids(self) -> list[int]:
        return [child.process.pid or 0 for child in list(self._children)]

    # -- the manager thread ---------------------------------------------------------------------

    def _run(self) -> None:
        # A signal taken here would not end a wait of the main thread. Children must not inherit it.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            while not self._is_over():
                self._fill()
                self._dispatch()
                self._sweep()
                self._wait()
        except BaseException as error:
            log.exception("pool %r ends", self._name)
            self._break(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        finally:
            for child in self._children:
                with contextlib.suppress(OSError):
                    child.connection.send_bytes(b"")
            for child in list(self._children):
                self._end(child)
            with self._lock:
                self._closing = True
                fd, self._wake_fd = self._wake_fd, -1
            os.close(fd)

    def _is_over(self) -> bool:
        with self._lock:
            return self._closing and not self._queue and not any(c.job for c in self._children)

    def _fill(self) -> None:
        """Start what is missing: as many as there are jobs, and as many as there were."""
        busy = sum(1 for child in self._children if child.job is not None)
        wanted = min(self._max, busy + len(self._queue))
        if not self._closing:
            self._target = wanted = max(self._target, wanted)
        while len(self._children) < wanted and self._broken is None:
            try:
                self._start()
            except Exception as error:
                self._birth_failed(error)

    def _start(self) -> None:
        ours, theirs = self._context.Pipe(duplex=True)
        inherited: list[multiprocessing.connection.Connection] = []
        if self._context.get_start_method() == "fork":
            inherited = [ours, *(child.connection for child in self._children)]
        try:
            process = self._context.Process(  # type: ignore[attr-defined]
                target=run_jobs, args=(theirs, self._name, inherited), daemon=True
            )
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: a fork beside threads
                process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            theirs.close()
        self._children.append(_Child(process, ours))

    def _birth_failed(self, error: Exception) -> None:
        self._failed_births += 1
        log.error("pool %r: a child did not start: %s", self._name, error)
        if self._failed_births >= _BIRTHS:
            self._break(error)

    def _break(self, error: Exception) -> None:
        """No child will ever run: all that waits fails."""
        with self._lock:
            self._broken = error
            jobs, self._queue = list(self._queue), collections.deque()
        for job in jobs:
            _fail(job, error)

    def _dispatch(self) -> None:
        for child in self._children[:]:
            while child.ready and child.job is None:
                with self._lock:
                    if not self._queue:
                        return
                    job = self._queue.popleft()
                if not job.tries and not job.future.set_running_or_notify_cancel():
                    continue
                job.tries += 1
                child.job = job
                try:
                    child.connection.send_bytes(job.data)
                except OSError:
                    self._died(child)
                    break

    def _sweep(self) -> None:
        """Drop what waits for clients that have gone, if this process has the runtime too."""
        if time.monotonic() < self._sweep_at or not self._waiting_clients():
            return
        began = time.monotonic()
        runtime = find(self._name)
        if runtime is not None:
            with self._lock:
                jobs = [job for job in self._queue if job.client is not None and not job.tries]
                gone = {job for job in jobs if _is_gone(runtime, typing.cast(int, job.client))}
                if gone:
                    self._queue = collections.deque(j for j in self._queue if j not in gone)
            for job in gone:
                _fail(job, _error_of(runtime, typing.cast(int, job.client)))
        now = time.monotonic()
        self._sweep_at = now + max(_SWEEP_S, 20 * (now - began))

    def _waiting_clients(self) -> bool:
        with self._lock:
            return any(job.client is not None for job in self._queue)

    def _wait(self) -> None:
        """Handle what the children say, and their deaths."""
        sources: dict[typing.Any, _Child | None] = {self._wake_fd: None}
        for child in self._children:
            sources[child.connection] = child
            sources[child.process.sentinel] = child
        timeout_s = None
        if self._waiting_clients():
            timeout_s = max(0.0, self._sweep_at - time.monotonic())
        for source in multiprocessing.connection.wait(list(sources), timeout_s):
            heard = sources[source]
            if heard is None:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
            elif heard in self._children:
                self._hear(heard)

    def _hear(self, child: _Child) -> None:
        """Take what a child said; if it is dead, all of that comes before its death."""
        dead = not child.process.is_alive()
        try:
            while child.connection.poll(0):
                self._take(child, child.connection.recv_bytes())
        except (EOFError, OSError):  # it closed its end, or died in mid-message
            dead = True
        if dead:
            self._died(child)

    def _take(self, child: _Child, message: bytes) -> None:
        kind = message[:1]
        if kind == READY:
            child.ready, self._failed_births = True, 0
        elif child.job is not None and kind == BEGUN:
            child.job.begun = True
        elif child.job is not None:
            job, child.job = child.job, None
            try:
                value = pickle.loads(memoryview(message)[1:])
            except BaseException as error:
                _fail(job, error)
                return
            if kind == RESULT:
                _finish(job, value)
            else:
                _fail(job, value)

    def _died(self, child: _Child) -> None:
        self._children.remove(child)
        child.connection.close()
        child.process.join(_END_S)
        if child.process.exitcode is None:  # it closed its pipe, and lives: user code did that
            child.process.kill()
            child.process.join()
        code = child.process.exitcode or 0
        error = PoolProcessDiedError(child.process.pid or 0, max(0, -code), max(0, code))
        child.process.close()
        log.warning("pool %r: %s", self._name, error)
        if not child.ready:
            self._birth_failed(error)
        job, child.job = child.job, None
        if job is None:
            return
        if not job.begun and job.tries < 2:
            with self._lock:
                self._queue.appendleft(job)  # nobody has looked at it
            return
        if job.client is not None and self._fallback is not None and not job.fallback:
            self._fall_back(job.client, error)
        _fail(job, error)

    def _fall_back(self, client: int, error: PoolProcessDiedError) -> None:
        """Ahead of all others: a client has been waiting."""
        future: concurrent.futures.Future[typing.Any] = concurrent.futures.Future()
        future.add_done_callback(_log_fallback)
        try:
            data = _packed(self._fallback, (client, error), {}, client)
        except Exception as failure:
            future.set_exception(failure)
            return
        with self._lock:
            self._queue.appendleft(_Job(data, future, client, fallback=True))

    def _end(self, child: _Child) -> None:
        """Wait for a child that was told to end; one that does not is killed."""
        child.process.join(_END_S)
        if child.process.exitcode is None:
            child.process.kill()
            child.process.join()
        self._children.remove(child)
        child.connection.close()
        child.process.close()
        if child.job is not None:
            job, child.job = child.job, None
            _fail(job, self._broken or RuntimeError("the pool has ended"))


def _packed(
    function: typing.Any,
    args: tuple[typing.Any, ...],
    kwargs: dict[str, typing.Any],
    client: int | None,
) -> bytes:
    job = bytes(ForkingPickler.dumps((function, args, kwargs)))
    return pickle.dumps((client if client is None else int(client), job))


def _finish(job: _Job, value: object) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        job.future.set_result(value)


def _fail(job: _Job, error: BaseException) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        if job.tries or job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)


def _log_fallback(future: concurrent.futures.Future[typing.Any]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        if isinstance(error, SocketFailedError):
            return  # the client has gone: there is nobody to answer
        log.error("a fallback failed: %r", error)


def _is_gone(runtime: Runtime, client: int) -> bool:
    try:
        return runtime.status(client) is not Status.LIVE
    except ShmsockError:
        return False  # it is not for us to say


def _error_of(runtime: Runtime, client: int) -> SocketFailedError:
    with contextlib.suppress(ShmsockError):
        reference = runtime.address_failed_as_well(client)
        if reference is not None:
            with reference:
                return SocketFailedError(*reference.error)
    return SocketFailedError(errno.ENOTCONN, "the socket is gone")
