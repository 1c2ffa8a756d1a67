"""What must happen while nobody calls us: one loop a process, on a lazy daemon thread.

It watches the control channel, the hang-up of cached descriptors, unfinished writes, and a timer
that gives back, sweeps and repairs. In a process that runs a ``Dispatcher`` the same loop runs
inside the dispatcher's, and there is no thread.

Signals never raise in it: Python runs their handlers in the main thread alone. A dispatcher in the
main thread wants that too, so what the loop calls is short and is logged when it raises.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import ctypes
import heapq
import itertools
import logging
import os
import select
import signal
import threading
import time

from .errors import PoisonedError

log = logging.getLogger("shmsock")

Handler = collections.abc.Callable[[int], None]
Call = collections.abc.Callable[[], object]

_BATCH = 256


class Timer:
    """A call to come; ``cancel`` it any time."""

    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        """Made by ``Service.call_later``."""
        self.call: Call | None = call

    def cancel(self) -> None:
        """Do not call, after all."""
        self.call = None

    def fire(self) -> None:
        """Make the call, unless it was cancelled."""
        if self.call is not None:
            self.call()


def is_intact(epoll: select.epoll, wake_fd: int) -> bool:
    """Whether both numbers are still ours: foreign code may have closed and reused them.

    One system call tells: the kernel finds an eventfd in an epoll by its number and by its file.
    """
    try:
        epoll.modify(wake_fd, select.EPOLLIN)
    except (OSError, ValueError):
        return False
    return True


def close_epoll(epoll: select.epoll, wake_fd: int) -> bool:
    """Close an epoll, unless foreign code did: then its number may be somebody else's by now.

    Returns:
        Whether ``wake_fd`` is still ours to close. Again says the same: who was interrupted between
        the two repeats both.
    """
    if not epoll.closed and not is_intact(epoll, wake_fd):
        # An epoll object cannot be parted from its number, which its end would close.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(epoll))
        return False
    epoll.close()
    return wake_fd >= 0


class Service:
    """An epoll with handlers and timers, driven by its own thread or by a dispatcher."""

    def __init__(self, name: str) -> None:
        """Nothing runs yet; ``ensure`` starts the thread."""
        self._name = name
        self.epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.epoll.register(self._wake_fd, select.EPOLLIN)
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._lock = threading.Lock()  # timers and the thread
        # Reentrant: a finaliser that runs inside may close a descriptor, which unwatches it.
        self._watching = threading.RLock()
        self._soon: collections.deque[Call] = collections.deque()
        self._thread: threading.Thread | None = None
        self._adopted = False
        self._stopping = False
        self._runner = 0  # the ident of the thread that runs the loop now
        # Whether that thread looks at ``_soon`` once more before it waits. ORDER: false before the
        # look: a signal handler that comes between look and wait must end the wait.
        self.awake = False
        # Called in the loop when foreign code has closed our numbers; the loop ends.
        self.on_lost: Call = lambda: None

    # -- who runs it ----------------------------------------------------------------------------

    def ensure(self) -> None:
        """Start the thread, unless it runs, or a dispatcher runs us, or we were closed."""
        if self._thread is not None or self._adopted or self._stopping:
            return
        with self._lock:
            if self._thread is None and not self._adopted and not self._stopping:
                self._thread = threading.Thread(
                    target=self._run, name=f"shmsock-{self._name}", daemon=True
                )
                self._thread.start()

    def is_current_thread(self) -> bool:
        """Whether the caller is who runs the loop: it must not wait for what the loop does."""
        return threading.get_ident() == self._runner

    def adopt(self) -> None:
        """Let a dispatcher run the loop from here on: the thread ends."""
        with self._lock:
            self._adopted = True
            thread, self._thread = self._thread, None
        self._join(thread)
        self._runner = threading.get_ident()

    def release(self) -> None:
        """The dispatcher has stopped: a thread does the work again."""
        self._adopted = self.awake = False
        self._runner = 0
        self.ensure()

    def close(self) -> None:
        """End the thread and close the loop's own descriptors."""
        with self._lock:
            self._stopping = True
            thread, self._thread = self._thread, None
        self._join(thread)
        self._handlers.clear()
        self._timers.clear()
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close the epoll and eventfd; alone in a forked child, whose parent keeps its own.

        WHY NOT EPOLL_CTL_DEL first: the child shares the parent's epoll and would unregister the
        parent's descriptors.
        """
        self._stopping = True
        ours = close_epoll(self.epoll, self._wake_fd)
        fd, self._wake_fd = self._wake_fd, -1
        if ours:
            os.close(fd)

    def forget_in_child(self) -> None:
        """In a forked child: a thread that the fork left behind may have had the locks."""
        self._lock = threading.Lock()
        self._watching = threading.RLock()
        self._thread = None
        self._handlers.clear()
        self._timers.clear()
        self.close_descriptors()

    def is_intact(self) -> bool:
        """Whether our numbers are still ours, or were closed in order."""
        return self.epoll.closed or is_intact(self.epoll, self._wake_fd)

    def abandon(self) -> None:
        """Foreign code closed our numbers: the loop ends, and touches none of them again."""
        with self._lock:
            self._stopping, self._thread = True, None
        self._handlers.clear()
        self._timers.clear()
        self._soon.clear()
        self.close_descriptors()

    def _join(self, thread: threading.Thread | None) -> None:
        if thread is not None and thread is not threading.current_thread():
            self.wake()
            thread.join()

    def _run(self) -> None:
        # A signal taken here would neither end a wait of the main thread nor heed its mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        me = threading.current_thread()
        self._runner = threading.get_ident()
        while self._thread is me:
            self.awake = False
            self.run_once(self.delay_s())

    # -- the loop -------------------------------------------------------------------------------

    def run_once(self, timeout_s: float) -> None:
        """Wait for events at most ``timeout_s`` (-1: for ever), handle them and what is due."""
        try:
            events = self.epoll.poll(timeout_s, _BATCH)
        except ValueError:  # closed under us
            return
        except OSError as error:  # EBADF, EINVAL: foreign code closed it
            log.error("the service loop ends: %s", error)
            with self._lock:
                self._stopping, self._thread = True, None
            _call(self.on_lost)
            return
        self.awake = True
        # Handlers may close numbers, and the kernel reuses them: whose event it is, is settled
        # before the first one runs.
        batch = [(self._handlers.get(fd), happened) for fd, happened in events]
        if any(fd == self._wake_fd for fd, _ in events):
            with contextlib.suppress(BlockingIOError, OSError):
                os.eventfd_read(self._wake_fd)
        for handler, happened in batch:
            if handler is not None:
                _call(handler, happened)
        self.run_due()

    def run_due(self) -> None:
        """Make the calls whose time has come."""
        for _ in range(len(self._soon)):
            _call(self._soon.popleft())
        now = time.monotonic()
        while self._timers:
            with self._lock:
                if not self._timers or self._timers[0][0] > now:
                    return
                timer = heapq.heappop(self._timers)[2]
            _call(timer.fire)

    def delay_s(self) -> float:
        """How long the loop may wait: 0 if something is due, -1 for ever."""
        if self._soon:
            return 0.0
        timers = self._timers
        return max(0.0, timers[0][0] - time.monotonic()) if timers else -1.0

    # -- what it watches ------------------------------------------------------------------------

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call ``handler(events)`` in the loop; again with other events changes them."""
        # ORDER: known before it is in the set, and forgotten after it is out of it: an exception
        # between the two leaves what the next call puts right.
        with self._watching:
            before = self._handlers.get(fd)
            self._handlers[fd] = handler
            try:
                try:
                    if before is None:
                        self.epoll.register(fd, events)
                    else:
                        self.epoll.modify(fd, events)
                except FileExistsError:
                    self.epoll.modify(fd, events)
                except FileNotFoundError:
                    self.epoll.register(fd, events)
            except OSError:
                if before is None:
                    del self._handlers[fd]
                raise

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor; always before it is closed.

        With a duplicate alive elsewhere a closed number stays in the set for ever, reports events,
        and can no longer be removed.
        """
        with self._watching:
            if fd in self._handlers:
                with contextlib.suppress(OSError, ValueError):
                    self.epoll.unregister(fd)
                self._handlers.pop(fd, None)

    def call_soon(self, call: Call) -> None:
        """Make a call in the loop; from any thread, and from signal handlers."""
        self._soon.append(call)
        if not self.is_awake():
            self.wake()

    def is_awake(self) -> bool:
        """Whether the caller runs the loop, and looks once more before it waits."""
        return self.awake and threading.get_ident() == self._runner

    def call_later(self, delay_s: float, call: Call) -> Timer:
        """Make a call in the loop after a delay; from any thread."""
        timer = Timer(call)
        due = time.monotonic() + delay_s
        with self._lock:
            first = not self._timers or due < self._timers[0][0]
            heapq.heappush(self._timers, (due, next(self._order), timer))
        if first and not self.is_awake():
            self.wake()
        return timer

    def wake(self) -> None:
        """End a wait in progress."""
        if self._wake_fd >= 0 and is_intact(self.epoll, self._wake_fd):
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake_fd, 1)


def _call(call: collections.abc.Callable[..., object], *arguments: int) -> None:
    try:
        call(*arguments)
    except PoisonedError:  # the runtime's own timer says so, once, and ends the dispatcher
        pass
    except Exception:
        log.exception("a service call failed; the loop goes on")
