"""One epoll loop a process: tells consumers that their sockets can be read.

Edge-triggered, events coalesced, one handler at a time for a socket, which reads until EAGAIN, or
until a short read says the same (``data_only``). Hang-ups and errors are hints; recv tells.

The kernel facts that shape it: an epoll set holds open file descriptions, not numbers, and ours are
shared with other processes. A number that is closed while it is registered stays in the set as long
as any duplicate lives anywhere, goes on reporting, and can no longer be removed. So whoever closes
a number takes it out of every set first (``Entry.pollers``), and a batch of events is translated to
SocketIds before the first callback runs, because that callback may close and reuse numbers.

A consumer is no reference: the dispatcher addresses once per event, and what no longer addresses
has ended.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import errno
import functools
import logging
import os
import select
import threading
import typing

from .errors import ClosedError, PoisonedError, StripeTimeoutError
from .layout import KIND_NAMES, SLOT_MASK, format_socket_id
from .service import Timer, close_epoll, is_intact
from .socket import SocketRef

if typing.TYPE_CHECKING:
    from .runtime import Runtime

log = logging.getLogger("shmsock")

Callback = collections.abc.Callable[[SocketRef], typing.Any]
OnFailed = collections.abc.Callable[[int, int, str], object]

_EVENTS = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLET
_TCP = KIND_NAMES.index("tcp")
_BATCH = 128


class Consumer(typing.NamedTuple):
    """Who wants to know about one socket."""

    sid: int
    fd: int
    callback: Callback
    on_failed: OnFailed | None
    tcp: bool


class Dispatcher:
    """Dispatches one process's sockets; its own ``fileno`` can be polled, so it nests.

    Attributes:
        data_only: For a consumer that is being called: a recv that gave fewer bytes than were asked
            for has taken everything, and whatever comes later is a new event. Read on otherwise:
            there may be an end of the stream, or more.
    """

    def __init__(self, runtime: Runtime) -> None:
        """One a runtime and process.

        Raises:
            ValueError: The runtime has one already.
        """
        self._runtime = runtime
        self._thread = 0  # the ident of the thread that is in run()
        self._service_fd = -1  # in our epoll during run()
        self._soon: collections.deque[collections.abc.Callable[[], object]] = collections.deque()
        self._consumers: dict[int, Consumer] = {}
        self._by_fd: dict[int, Consumer | collections.abc.Callable[[], object]] = {}
        self._again: collections.deque[Consumer] = collections.deque()
        self._arrived: collections.abc.Callable[[list[int]], object] | None = None
        self.data_only = False
        self._stopping = False
        self._lost = False
        self._wake_fd = -1
        self._epoll = select.epoll()
        # ORDER: whole before it is known: the service thread looks at the runtime's dispatcher.
        try:
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._epoll.register(self._wake_fd, select.EPOLLIN)
            self._service = runtime._adopt_dispatcher(self)
        except BaseException:
            if runtime._dispatcher is self:
                runtime._adopt_dispatcher(None)
            self._close_numbers()
            raise

    def fileno(self) -> int:
        """The epoll's number: readable when ``run_once(0)`` would do something."""
        return self._epoll.fileno()

    def __len__(self) -> int:
        """How many consumers there are."""
        return len(self._consumers)

    # -- consumers ------------------------------------------------------------------------------

    def add_consumer(self, sid: int, callback: Callback, on_failed: OnFailed | None = None) -> bool:
        """Watch a socket that this process owns.

        Args:
            sid: The socket.
            callback: Called with a reference, closed when it returns, after something arrived: read
                until BlockingIOError, or return True to be called again in the next round.
            on_failed: Called once with id, code and text after the socket has ended for any
                reason other than ``remove_consumer``.

        Returns:
            False if the socket has failed.

        Raises:
            DescriptorError: The host gave no descriptor.
            ValueError: The socket has a consumer here.
        """
        if sid in self._consumers:
            raise ValueError(f"{format_socket_id(sid)} has a consumer already")
        reference = self._runtime.address(sid)
        if reference is None:
            return False
        with reference:
            entry = reference._io.entry(reference)
            tcp = self._runtime._segment.cells.kind[sid & SLOT_MASK] == _TCP
            consumer = Consumer(sid, entry.fd, callback, on_failed, tcp)
            self._consumers[sid] = consumer
            self._by_fd[entry.fd] = consumer
            entry.pollers.append(self._forget)
            try:
                self._epoll.register(entry.fd, _EVENTS)
            except BaseException:
                del self._consumers[sid], self._by_fd[entry.fd]
                entry.pollers.remove(self._forget)
                raise
        return True

    def remove_consumer(self, sid: int) -> bool:
        """Stop watching a socket; returns whether it was watched."""
        consumer = self._consumers.pop(sid, None)
        if consumer is None:
            return False
        entry = self._runtime._descriptors.peek(sid)
        if entry is not None and self._forget in entry.pollers:
            entry.pollers.remove(self._forget)
            self._forget(entry.fd)
        return True

    def _forget(self, fd: int) -> None:
        """Take a number out of the set; called before it is closed."""
        if fd in self._by_fd:
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(fd)
            self._by_fd.pop(fd, None)  # ORDER: last, or an exception would leave it in the set

    def consumers(self) -> list[int]:
        """The ids that are watched."""
        return list(self._consumers)

    def on_arrival(self, callback: collections.abc.Callable[[list[int]], object]) -> None:
        """Call ``callback(ids)`` with sockets that another process has made ours to read."""
        self._arrived = callback
        self._service.call_soon(self._runtime._descriptors.connect)
        self._service.ensure()

    # -- other descriptors ----------------------------------------------------------------------

    def add_reader(
        self,
        fd: int,
        callback: collections.abc.Callable[[], object],
        *,
        exclusive: bool = False,
    ) -> None:
        """Call ``callback`` while ``fd`` is readable; level-triggered: listeners, pidfds, pipes.

        Args:
            fd: The descriptor.
            callback: Called without arguments.
            exclusive: For a listener that several processes watch: the kernel wakes one of those
                that wait, the one that was added first. Who is woken and does nothing has taken
                the event from the others: look again after a while, everybody.
        """
        self._epoll.register(fd, select.EPOLLIN | (select.EPOLLEXCLUSIVE if exclusive else 0))
        self._by_fd[fd] = callback

    def remove_reader(self, fd: int) -> None:
        """Stop watching ``fd``; always before it is closed."""
        self._forget(fd)

    def call_soon(self, call: collections.abc.Callable[[], object]) -> None:
        """Make a call in the loop; from any thread, and from signal handlers."""
        self._soon.append(call)
        if not (self._thread and self._service.is_awake()):
            self._wake()

    def call_later(self, delay_s: float, call: collections.abc.Callable[[], object]) -> Timer:
        """Make a call in the loop after a delay."""
        timer = Timer(call)
        self._service.call_later(delay_s, lambda: self._tell(timer.fire))
        self._service.ensure()
        return timer

    def _tell(self, call: collections.abc.Callable[..., object], *arguments: object) -> None:
        """From the service loop: call now if that is our loop, else hand over to ours."""
        if self._thread == threading.get_ident():
            call(*arguments)
        else:
            self.call_soon(functools.partial(call, *arguments))

    def _wake(self) -> None:
        if self._wake_fd >= 0 and is_intact(self._epoll, self._wake_fd):
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake_fd, 1)

    # -- the loop -------------------------------------------------------------------------------

    def run(self) -> None:
        """Dispatch until ``stop``; the service thread's work is done here meanwhile.

        Raises:
            ClosedError: The process was taken for dead, or foreign code closed its descriptors.
            PoisonedError: The runtime failed its audit: attach again once there is a new one.

        What a signal handler raises comes out of here, and nothing is lost by it: ``run`` may be
        called again.
        """
        try:
            self._service.adopt()
            self._thread = threading.get_ident()
            self._service_fd = self._service.epoll.fileno()
            self._epoll.register(self._service_fd, select.EPOLLIN)
            while not self._stopping:
                self.run_once(-1.0)
                if self._lost:
                    raise ClosedError("this process was taken for dead: attach again")
            self._runtime._segment.check()
        finally:
            self._stopping = False
            with contextlib.suppress(OSError, ValueError):  # a callback may have closed us
                self._epoll.unregister(self._service_fd)
            self._thread = 0
            if self._again:
                self._wake()
            self._service.release()

    def stop(self) -> None:
        """Let ``run`` return after the batch it is at; from any thread or signal handler.

        Before ``run`` it is not lost: that ``run`` returns at once.
        """
        self._stopping = True
        self._wake()

    def run_once(self, timeout_s: float) -> None:
        """Wait at most ``timeout_s`` (-1: for ever) and dispatch one batch.

        Nested in another loop the service thread goes on with its own work, and hands over what is
        ours; inside ``run`` that work is done here.
        """
        adopted = self._thread == threading.get_ident()
        if adopted:
            self._service.awake = False  # ORDER: before the looks below; see Service
        due_s = self._service.delay_s() if adopted else -1.0
        if self._again or self._soon:
            due_s = 0.0
        if due_s >= 0 and (timeout_s < 0 or due_s < timeout_s):
            timeout_s = due_s
        if not adopted:
            self._service.ensure()
        try:
            events = self._poll(timeout_s)
            if adopted:
                self._service.awake = True
            with self._runtime._writers.turn:
                self._run_batch(events, adopted)
        except BaseException:
            # Edges were taken from the kernel that it will not report again: a signal handler's
            # exception may strike between any two lines. So everybody is asked once more.
            self.data_only = False
            self._again.extend(self._consumers.values())
            self._wake()
            self._runtime._writers.turns.end_turn()  # once more: the end itself may be what failed
            raise

    def _poll(self, timeout_s: float) -> list[tuple[int, int]]:
        try:
            return self._epoll.poll(timeout_s, _BATCH)
        except OSError as error:
            if is_intact(self._epoll, self._wake_fd):
                raise
            self._runtime._disown()
            raise ClosedError(f"foreign code closed the dispatcher's epoll: {error}") from None

    def _run_batch(self, events: list[tuple[int, int]], adopted: bool) -> None:
        self._runtime._segment.check()
        by_fd = self._by_fd
        batch = [(fd, happened, by_fd.get(fd)) for fd, happened in events]
        again, self._again = self._again, collections.deque()
        in_service = False
        for fd, happened, target in batch:
            if isinstance(target, Consumer):
                # A short read of TCP is the end of what came before it, and every byte, end and
                # error after this event is another event. But it is short too before an end that
                # this event reports, or at an urgent mark (EPOLLPRI): those are not told again.
                # WHY NOT unix: it stops short at a message that carries descriptors.
                self.data_only = happened == select.EPOLLIN and target.tcp
                self._dispatch(target)
            elif target is not None and self._by_fd.get(fd) is target:
                self._call(target)
            elif fd == self._wake_fd:
                with contextlib.suppress(OSError):
                    os.eventfd_read(fd)
            elif fd == self._service_fd:
                in_service = True
        self.data_only = False  # for those who are called again, an event was long ago
        for consumer in again:
            self._dispatch(consumer)
        for _ in range(len(self._soon)):
            self._call(self._soon.popleft())
        if adopted:
            if in_service:
                self._service.run_once(0)
            else:
                self._service.run_due()
        elif self._again or self._soon:
            self._wake()  # whoever polls our number must come back

    def _dispatch(self, consumer: Consumer) -> None:
        sid = consumer.sid
        if self._consumers.get(sid) is not consumer:
            return
        try:
            # Runtime.address without its look at who we are: a cast, too, would be one more call.
            reference: SocketRef | None = self._runtime._engine.address(sid)  # type: ignore[assignment]
        except StripeTimeoutError as error:  # the edge will not come again
            log.error("%s is dispatched later: %s", format_socket_id(sid), error)
            self._again.append(consumer)
            return
        if reference is None:
            self._call(functools.partial(self._ended, sid))
            return
        with reference:
            try:
                if consumer.callback(reference):
                    self._again.append(consumer)
            except PoisonedError:
                raise
            except Exception as error:
                log.exception("a consumer raised; %s is failed", format_socket_id(sid))
                text = f"a consumer raised {type(error).__name__}"
                with contextlib.suppress(StripeTimeoutError):
                    self._runtime.set_failed(sid, errno.EIO, text)

    def _call(self, callback: collections.abc.Callable[[], object]) -> None:
        try:
            callback()
        except PoisonedError:  # of nothing here anything can come
            raise
        except Exception:
            log.exception("a callback raised; the loop goes on")

    def _ended(self, sid: int) -> None:
        """A watched socket failed or was recycled."""
        consumer = self._consumers.get(sid)
        if consumer is None:
            return
        code, text = self._runtime._io.error_of(sid)
        self.remove_consumer(sid)
        self._runtime._descriptors.discard(sid)
        if consumer.on_failed is not None:
            consumer.on_failed(sid, code, text)

    def close(self) -> None:
        """Stop watching everything, and dispatching; what is watched stays open."""
        self._stopping = True
        for sid in list(self._consumers):
            self.remove_consumer(sid)
        self._by_fd.clear()
        self._soon.clear()
        self._close_numbers()
        self._runtime._adopt_dispatcher(None)

    def _close_in_child(self) -> None:
        """In a forked child: close the epoll, and never EPOLL_CTL_DEL: it is the parent's too."""
        self._close_numbers()
        self._by_fd.clear()
        self._consumers.clear()

    def _disowned(self) -> None:
        """This process is no participant any more: ``run`` says so, and ends."""
        self._lost = True
        if not is_intact(self._epoll, self._wake_fd):
            self._by_fd.clear()
            self._consumers.clear()
        self._wake()

    def _close_numbers(self) -> None:
        ours = close_epoll(self._epoll, self._wake_fd)
        fd, self._wake_fd = self._wake_fd, -1
        if ours:
            os.close(fd)
