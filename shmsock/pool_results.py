"""What ``Pool``, the twin of ``multiprocessing.Pool``, returns: results to come."""

from __future__ import annotations

import collections
import collections.abc
import concurrent.futures
import itertools
import multiprocessing
import threading
import time
import typing

Future = concurrent.futures.Future[typing.Any]
Callback = collections.abc.Callable[[typing.Any], object]


class AsyncResult:
    """``multiprocessing.pool.AsyncResult``: the result of ``apply_async`` and ``map_async``.

    Concurrency: any thread.
    """

    def __init__(
        self,
        futures: list[Future],
        combine: collections.abc.Callable[[list[typing.Any]], typing.Any],
        callback: Callback | None,
        error_callback: Callback | None,
    ) -> None:
        """Made by ``Pool``."""
        self._combine, self._callback, self._error_callback = combine, callback, error_callback
        self._lock = threading.Lock()
        self._left = len(futures)
        self._futures = futures
        self._done = threading.Event()
        self._value: typing.Any = None
        self._error: BaseException | None = None
        for future in futures:
            future.add_done_callback(self._one_is_done)
        if not futures:
            self._finish()

    def _one_is_done(self, future: Future) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _finish(self) -> None:
        errors = [error for each in self._futures if (error := _error_of(each)) is not None]
        if errors:
            self._error = errors[0]
        else:
            self._value = self._combine([each.result() for each in self._futures])
        self._done.set()
        if self._error is not None and self._error_callback is not None:
            self._error_callback(self._error)
        elif self._error is None and self._callback is not None:
            self._callback(self._value)

    def get(self, timeout: float | None = None) -> typing.Any:
        """The result, or what the job raised.

        Args:
            timeout: In seconds; None waits for ever.

        Raises:
            multiprocessing.TimeoutError: It is not there yet.
            PoolProcessDiedError: The child that ran it was killed.
            SocketFailedError: Its client has gone.
        """
        if not self._done.wait(timeout):
            raise multiprocessing.TimeoutError
        if self._error is not None:
            raise self._error
        return self._value

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it is done, at most ``timeout`` seconds."""
        self._done.wait(timeout)

    def ready(self) -> bool:
        """Whether it is done."""
        return self._done.is_set()

    def successful(self) -> bool:
        """Whether it is done without an error.

        Raises:
            ValueError: It is not done.
        """
        if not self.ready():
            raise ValueError("the job is not done yet")
        return self._error is None


class Results:
    """What ``imap`` and ``imap_unordered`` return: an iterator that keeps a window of jobs going.

    WHY NOT submit them all: the iterable may have no end.
    """

    def __init__(
        self,
        submit: collections.abc.Callable[[typing.Any], Future],
        iterable: collections.abc.Iterable[typing.Any],
        window: int,
        *,
        ordered: bool,
    ) -> None:
        """Made by ``Pool``."""
        self._submit, self._arguments, self._ordered = submit, iter(iterable), ordered
        self._jobs: collections.deque[Future] = collections.deque()
        for argument in itertools.islice(self._arguments, window):
            self._jobs.append(submit(argument))

    def __iter__(self) -> Results:
        """Itself."""
        return self

    def __next__(self) -> typing.Any:
        """As ``next()``."""
        return self.next()

    def next(self, timeout: float | None = None) -> typing.Any:
        """The next result, or what that job raised.

        Raises:
            StopIteration: There was one for each argument.
            multiprocessing.TimeoutError: It is not there after ``timeout`` seconds.
        """
        if not self._jobs:
            raise StopIteration
        deadline = None if timeout is None else time.monotonic() + timeout
        jobs = [self._jobs[0]] if self._ordered else list(self._jobs)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        first = concurrent.futures.FIRST_COMPLETED
        done = concurrent.futures.wait(jobs, left, return_when=first).done
        if not done:
            raise multiprocessing.TimeoutError
        job = next(each for each in jobs if each in done)
        self._jobs.remove(job)
        for argument in itertools.islice(self._arguments, 1):
            self._jobs.append(self._submit(argument))
        return job.result()


def _error_of(future: Future) -> BaseException | None:
    if future.cancelled():
        return concurrent.futures.CancelledError("the pool was terminated")
    return future.exception()
