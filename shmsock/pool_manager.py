"""The parent's side of a pool: a queue, children, and the thread that gives each a job at a time.

    INVARIANT: children, and which job each one has, are the manager thread's alone.
    INVARIANT: every job is in the queue or with one child, until its future is done.

What dies with a child is the one job that it ran. CRASH, of a child:

    before it said BEGUN    the job is given to another child, once
    after                   the job fails, PoolProcessDiedError; its client is told by the fallback
    owning the client       as any owner: ``on_owner_death``; the parent gives it no second life
    in mid-message          the client's socket fails, EPIPE: nobody can go on with half a message
    idle                    nothing

CRASH of the parent: its children read the end of their pipe, finish what they run, and end.
"""

from __future__ import annotations

import collections
import collections.abc
import concurrent.futures
import contextlib
import functools
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

from .abort import error_of
from .errors import PoolProcessDiedError, RuntimeNotFoundError, SocketFailedError
from .pool_child import BEGUN, FAILED_TO_START, READY, REFUSED, RESULT, run_jobs
from .pool_jobs import (
    Child,
    Job,
    Settings,
    fail,
    finish,
    is_gone,
    log_fallback,
    offered,
    packed,
)
from .runtime import find

log = logging.getLogger("shmsock")

_SWEEP_S = 0.05
_BIRTHS = 3  # so many children in a row that die before they are ready are no accident
_END_S = 10.0
_LEND_S = 3.0  # how long a socket that is in mid-message is waited for
_LEND_AGAIN_S = 5e-3


class Manager:
    """The queue and the thread; knows nothing of the executor, which may be collected."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is started before the first job."""
        self._settings = settings
        self._name, self._context = settings.name, settings.context
        self._pid = os.getpid()
        self._lock = threading.Lock()  # the queue, closing, the thread
        self._queue: collections.deque[Job] = collections.deque()
        self._children: list[Child] = []
        self._closing = self._terminating = False
        self._soon: collections.deque[collections.abc.Callable[[], object]] = collections.deque()
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
        client: int | None = None,
        own: bool = False,
    ) -> concurrent.futures.Future[typing.Any]:
        """See ``ProcessPoolExecutor.submit``."""
        if own and client is None:
            raise ValueError("own: whose socket? it needs client=sid")
        if self._pid != os.getpid():
            raise RuntimeError("this pool belongs to the process that made it: make another one")
        future: concurrent.futures.Future[typing.Any] = concurrent.futures.Future()
        try:
            owner = self._index() if own else None
            data = packed(function, args, kwargs, client, owner)
        except Exception as error:
            future.set_exception(error)  # as concurrent.futures does
            return future
        runtime = None if client is None else find(self._name)
        if runtime is not None:  # what we wrote to the client comes before what the job writes
            runtime.unwritten_bytes()
        self._put(Job(data, future, client, own))
        return future

    def _index(self) -> int:
        runtime = find(self._name)
        if runtime is None:
            raise RuntimeNotFoundError(
                f"own: this process takes no part in {self._name!r}, so it has no sockets to lend"
            )
        return runtime.index

    def _put(self, job: Job) -> None:
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

    def shut_down(self, wait: bool, cancel: bool, terminate: bool = False) -> None:
        """Take no more jobs; see ``shutdown`` and ``terminate`` of the pools."""
        if self._pid != os.getpid():
            return  # inherited by a fork
        cancelled: list[Job] = []
        with self._lock:
            self._closing = True
            self._terminating |= terminate
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

    @property
    def max_workers(self) -> int:
        """How many children at most."""
        return self._settings.max_workers

    def is_closing(self) -> bool:
        """Whether it takes no more jobs."""
        return self._closing

    def pids(self) -> list[int]:
        """The children there are at the moment."""
        return [child.process.pid or 0 for child in list(self._children)]

    def call_soon(self, call: collections.abc.Callable[[], object]) -> None:
        """Make a call in the manager thread; nothing if that has ended."""
        self._soon.append(call)
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

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
                while self._soon:
                    self._soon.popleft()()
        except BaseException as error:
            log.exception("pool %r ends", self._name)
            self._break(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        finally:
            for child in self._children:
                self._tell_to_end(child)
            for child in list(self._children):
                self._end(child)
            with self._lock:
                self._closing = True
                fd, self._wake_fd = self._wake_fd, -1
                left, self._queue = list(self._queue), collections.deque()
            os.close(fd)
            for job in left:
                job.future.cancel()
                fail(job, concurrent.futures.CancelledError("the pool was terminated"))

    def _is_over(self) -> bool:
        with self._lock:
            if self._terminating:
                return True
            return self._closing and not self._queue and not any(c.job for c in self._children)

    def _fill(self) -> None:
        """Start what is missing: as many as there are jobs, and as many as there were."""
        staying = [child for child in self._children if not child.ending]
        busy = sum(1 for child in staying if child.job is not None)
        wanted = min(self._settings.max_workers, busy + len(self._queue))
        if not self._closing:
            self._target = wanted = max(self._target, wanted)
        missing = wanted - len(staying)
        while missing > 0 and self._broken is None:
            try:
                self._start()
                missing -= 1
            except Exception as error:
                self._birth_failed(error)

    def _start(self) -> None:
        settings = self._settings
        ours, theirs = self._context.Pipe(duplex=True)
        inherited: list[multiprocessing.connection.Connection] = []
        if self._context.get_start_method() == "fork":
            inherited = [ours, *(child.connection for child in self._children)]
        try:
            process = self._context.Process(  # type: ignore[attr-defined]
                target=run_jobs,
                args=(theirs, self._name, inherited, settings.initializer, settings.initargs),
                daemon=True,
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
        self._children.append(Child(process, ours))

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
            fail(job, error)

    def _dispatch(self) -> None:
        for child in self._children[:]:
            while child.ready and child.job is None and not child.ending:
                with self._lock:
                    if not self._queue:
                        return
                    job = self._queue.popleft()
                if not job.tries and not job.future.set_running_or_notify_cancel():
                    continue
                job.tries += 1
                child.job = job
                child.jobs += 1
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
                gone = {job for job in jobs if is_gone(runtime, typing.cast(int, job.client))}
                if gone:
                    self._queue = collections.deque(j for j in self._queue if j not in gone)
            for job in gone:
                fail(job, SocketFailedError(*error_of(runtime, typing.cast(int, job.client))))
        now = time.monotonic()
        self._sweep_at = now + max(_SWEEP_S, 20 * (now - began))

    def _waiting_clients(self) -> bool:
        with self._lock:
            return any(job.client is not None for job in self._queue)

    def _wait(self) -> None:
        """Handle what the children say, and their deaths."""
        sources: dict[typing.Any, Child | None] = {self._wake_fd: None}
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

    def _hear(self, child: Child) -> None:
        """Take what a child said; if it is dead, all of that comes before its death."""
        dead = not child.process.is_alive()
        try:
            while child.connection.poll(0):
                self._take(child, child.connection.recv_bytes())
        except (EOFError, OSError):  # it closed its end, or died in mid-message
            dead = True
        if dead:
            self._died(child)

    def _take(self, child: Child, message: bytes) -> None:
        kind = message[:1]
        if kind == READY:
            child.ready, self._failed_births = True, 0
        elif kind == FAILED_TO_START:
            child.error = pickle.loads(message[1:])
        elif child.job is not None and kind == BEGUN:
            child.job.begun = True
            if child.job.own:
                self._lend(child, child.job, int(message[1:]))
        elif child.job is not None:
            job, child.job = child.job, None
            if child.jobs == self._settings.max_tasks:
                self._tell_to_end(child)
            try:
                value = pickle.loads(memoryview(message)[1:])
            except BaseException as error:
                fail(job, error)
                return
            if kind == RESULT:
                finish(job, value)
            else:
                fail(job, value)

    def _died(self, child: Child) -> None:
        self._children.remove(child)
        child.connection.close()
        child.process.join(_END_S)
        if child.process.exitcode is None:  # it closed its pipe, and lives: user code did that
            child.process.kill()
            child.process.join()
        code = child.process.exitcode or 0
        error = PoolProcessDiedError(child.process.pid or 0, max(0, -code), max(0, code))
        child.process.close()
        if not child.ending or code:  # a job's owner is told by the future
            log.log(
                logging.INFO if child.job else logging.WARNING, "pool %r: %s", self._name, error
            )
        if not child.ready:
            self._birth_failed(child.error or error)
        job, child.job = child.job, None
        if job is None:
            return
        if not job.begun and job.tries < 2:
            with self._lock:
                self._queue.appendleft(job)  # nobody has looked at it
            return
        if job.client is not None and self._settings.fallback is not None and not job.fallback:
            self._fall_back(job.client, error)
        fail(job, error)

    def _fall_back(self, client: int, error: PoolProcessDiedError) -> None:
        """Ahead of all others: a client has been waiting."""
        future: concurrent.futures.Future[typing.Any] = concurrent.futures.Future()
        future.add_done_callback(log_fallback)
        try:
            data = packed(self._settings.fallback, (client, error), {}, client, None)
        except Exception as failure:
            future.set_exception(failure)
            return
        with self._lock:
            self._queue.appendleft(Job(data, future, client, fallback=True))

    def _tell_to_end(self, child: Child) -> None:
        child.ending = True
        if self._terminating:
            child.process.terminate()
        with contextlib.suppress(OSError):
            child.connection.send_bytes(b"")

    def _end(self, child: Child) -> None:
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
            fail(job, self._broken or concurrent.futures.CancelledError("the pool was terminated"))

    # -- lending a socket -----------------------------------------------------------------------

    def _lend(self, child: Child, job: Job, index: int) -> None:
        """Hand the client over to the child that begins its job, and tell the child."""
        runtime = find(self._name)
        if runtime is None:
            return self._answer(child, job, REFUSED + b"the runtime has ended")
        deadline = time.monotonic() + _LEND_S

        def offer() -> None:  # in the dispatcher's loop
            verdict = offered(runtime, typing.cast(int, job.client), index)
            if verdict is None and time.monotonic() < deadline:
                again = functools.partial(runtime._hand_over._tell, offer)
                runtime._service.call_later(_LEND_AGAIN_S, again)
                return
            verdict = verdict or REFUSED + b"it stayed busy"
            self.call_soon(functools.partial(self._answer, child, job, verdict))

        runtime._service.ensure()
        runtime._hand_over._tell(offer)

    def _answer(self, child: Child, job: Job, verdict: bytes) -> None:
        if child in self._children and child.job is job:
            with contextlib.suppress(OSError):  # its death is heard of
                child.connection.send_bytes(verdict)
