"""Anyone writes: whole messages, each process's order kept, never waiting for the peer.

A process with a message takes the write turn (the slot's writer word, under the stripe), sends with
MSG_DONTWAIT and gives the turn back. If the kernel took only part of a message the process keeps
the turn, and the rest, until EPOLLOUT. If another process has the turn the message waits in this
process's own queue for the socket, behind what is there already, and the turn is tried again: at
once, on EPOLLOUT, and by a back-off timer. Trying again is all the signalling there is: no list of
waiters, no wake-up to lose, no bytes in anybody else's hands.

    INVARIANT: a process's queue for a socket exists while it is not empty, and holds a reference:
               a graceful close comes after the last byte.
    INVARIANT: between messages nobody needs the turn; in mid-message nobody else can have it.

If killed in mid-message: recount finds the writer dead and fails the socket (EPIPE): half a frame
on the wire cannot be mended. What was only queued dies with its process.
"""

from __future__ import annotations

import collections
import collections.abc
import errno
import random
import select
import socket
import threading
import time

from .descriptors import Descriptors, Entry
from .engine import Engine, Reference
from .errors import DescriptorError, OverCrowdedError, SocketFailedError
from .layout import SLOT_MASK
from .service import Service

Buffer = bytes | bytearray | memoryview

_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_TRIES = 3
_BACK_OFF_S = (100e-6, 10e-3)
# One turn's batch: then others may have the turn, so that nobody starves.
_BATCH_BUFFERS = 64
_BATCH_BYTES = 256 << 10


class Queue:
    """What this process has not yet sent to one socket.

    Attributes:
        messages: Whole messages; the first may have been sent in part.
        turn: Whether this process has the write turn.
        partial: Whether the first message is under way.
    """

    __slots__ = ("back_off_s", "messages", "partial", "pumping", "reference", "turn", "unwritten")

    def __init__(self, reference: Reference) -> None:
        """An empty queue that keeps ``reference`` until it is empty again."""
        self.reference = reference
        self.messages: collections.deque[memoryview] = collections.deque()
        self.turn = False
        self.partial = False
        self.pumping = False
        self.unwritten = 0
        self.back_off_s = _BACK_OFF_S[0]


class Writers:
    """A process's half of every write."""

    def __init__(
        self,
        engine: Engine,
        descriptors: Descriptors,
        service: Service,
        max_unwritten_bytes: int,
        error_of: collections.abc.Callable[[int], tuple[int, str]],
        fail: collections.abc.Callable[[int, int, str], bool],
    ) -> None:
        """Nothing is queued."""
        self.max_unwritten_bytes = max_unwritten_bytes
        self._engine = engine
        self._cells = engine.cells
        self._descriptors = descriptors
        self._service = service
        self._error_of = error_of
        self._fail = fail
        self._queues: dict[int, Queue] = {}
        self._lock = threading.Lock()

    # -- the whole message ----------------------------------------------------------------------

    def write(self, reference: Reference, buffers: tuple[Buffer, ...]) -> None:
        """Send a message or queue what is left of it; see SocketRef.write."""
        sid = reference.id
        if sid in self._queues and self._append(sid, buffers):
            return
        entry = self._entry(reference)
        sent = -1
        try:
            for _ in range(_TRIES):
                if self._engine.take_turn(sid):
                    break
                if reference.failed:
                    raise SocketFailedError(*self._error_of(sid))
            else:
                self._enqueue(reference, _join(buffers), turn=False)
                return
            sent = self._send(entry, sid, buffers)
            total = sum(map(len, buffers)) if len(buffers) > 1 else len(buffers[0])
            if sent < total:
                rest = _join(buffers)[sent:]
                self._enqueue(reference, rest, turn=True, partial=sent > 0)
            else:
                self._count(sid, sent, 1)
                self._engine.give_turn(sid)
        except BaseException as error:
            self._interrupted(sid, error)
            raise

    def _interrupted(self, sid: int, error: BaseException) -> None:
        """An exception while we had the turn and no queue to finish the message: fail it."""
        if isinstance(error, OverCrowdedError | SocketFailedError):
            return
        queue = self._queues.get(sid)
        if (queue is None or not queue.turn) and (
            self._cells.writer[sid & SLOT_MASK] == self._engine.word
        ):
            self._fail(sid, errno.EPIPE, "a writer was interrupted in mid-message")

    def _entry(self, reference: Reference) -> Entry:
        try:
            return self._descriptors.get(reference.id)
        except LookupError:
            raise SocketFailedError(*self._error_of(reference.id)) from None

    def _send(self, entry: Entry, sid: int, buffers: collections.abc.Sequence[Buffer]) -> int:
        """Send now what the kernel takes, 0 if nothing; a broken connection fails the socket."""
        try:
            if len(buffers) == 1:
                return entry.sock.send(buffers[0], _FLAGS)
            return entry.sock.sendmsg(buffers, (), _FLAGS)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return 0
            self._fail(sid, error.errno or errno.EPIPE, error.strerror or str(error))
            raise SocketFailedError(*self._error_of(sid)) from error

    def _count(self, sid: int, sent_bytes: int, messages: int) -> None:
        """Statistics; only who has the turn writes them."""
        slot = sid & SLOT_MASK
        cells = self._cells
        cells.bytes_out[slot] += sent_bytes
        cells.messages_out[slot] += messages
        cells.written_ns[slot] = time.monotonic_ns()

    # -- the queue ------------------------------------------------------------------------------

    def unwritten_bytes(self, sid: int) -> int:
        """How much waits in this process for a socket."""
        queue = self._queues.get(sid)
        return queue.unwritten if queue is not None else 0

    def _append(self, sid: int, buffers: tuple[Buffer, ...]) -> bool:
        """Put a message behind what waits; false when nothing waits any more."""
        message = _join(buffers)
        with self._lock:
            queue = self._queues.get(sid)
            if queue is None:
                return False
            if queue.reference.failed:
                raise SocketFailedError(*self._error_of(sid))
            self._bound(queue, len(message))
            queue.messages.append(message)
            queue.unwritten += len(message)
        return True

    def _bound(self, queue: Queue, more_bytes: int) -> None:
        if queue.unwritten + more_bytes > self.max_unwritten_bytes:
            raise OverCrowdedError(
                f"{queue.unwritten} bytes wait for this peer and {more_bytes} more would pass "
                f"max_unwritten_bytes ({self.max_unwritten_bytes})"
            )

    def _enqueue(
        self, reference: Reference, message: memoryview, *, turn: bool, partial: bool = False
    ) -> None:
        """Queue what could not be sent now, and see to it that it is tried again."""
        sid = reference.id
        with self._lock:
            queue = self._queues.get(sid)
            if queue is None:
                queue = Queue(reference.add_reference())
                self._queues[sid] = queue
            if turn:
                # Ours is under way: whatever another thread queued meanwhile comes behind it.
                queue.messages.appendleft(message)
                queue.turn, queue.partial = True, partial
            else:
                self._bound(queue, len(message))
                queue.messages.append(message)
            queue.unwritten += len(message)
        if turn:
            self._watch_out(sid)
        self._retry_later(sid, queue)
        self._service.ensure()

    def _retry_later(self, sid: int, queue: Queue) -> None:
        delay_s = queue.back_off_s * random.uniform(0.5, 1.0)
        queue.back_off_s = min(2 * queue.back_off_s, _BACK_OFF_S[1])
        self._service.call_later(delay_s, lambda: self._retry(sid))

    def _retry(self, sid: int) -> None:
        queue = self._queues.get(sid)
        if queue is not None and not self.pump(sid) and not queue.turn:
            self._retry_later(sid, queue)

    def _watch_out(self, sid: int) -> None:
        """Have the service loop told when the kernel takes more; the queue holds the number."""
        entry = self._descriptors.peek(sid)
        if entry is None:
            return
        self._service.watch(entry.fd, select.EPOLLOUT | select.EPOLLET, lambda _: self._out(sid))
        if self._service.unwatch not in entry.pollers:
            entry.pollers.append(self._service.unwatch)

    def _out(self, sid: int) -> None:
        queue = self._queues.get(sid)
        if queue is None:
            return
        queue.back_off_s = _BACK_OFF_S[0]
        if not self.pump(sid) and not queue.turn:
            self._retry_later(sid, queue)

    def pump(self, sid: int) -> bool | None:
        """Send what waits for a socket, as far as turn and kernel allow.

        Returns:
            True when nothing waits any more; False when something does; None when another thread
            is at it.
        """
        with self._lock:
            queue = self._queues.get(sid)
            if queue is None:
                return True
            if queue.pumping:
                return None
            queue.pumping = True
        try:
            return self._pump(sid, queue)
        except SocketFailedError:
            self._give_up(sid)
            return True
        except DescriptorError:
            return False  # the host may be away for a moment
        except BaseException as error:
            queue.turn = False
            self._interrupted(sid, error)
            self._give_up(sid)
            raise
        finally:
            queue.pumping = False

    def _pump(self, sid: int, queue: Queue) -> bool:
        if queue.reference.failed:
            raise SocketFailedError(*self._error_of(sid))
        entry = self._entry(queue.reference)
        if not queue.turn:
            if not self._engine.take_turn(sid):
                return False
            queue.turn = True
        batch, size = self._batch(queue)
        sent = self._send(entry, sid, batch)
        finished = self._consume(queue, batch, sent)
        self._count(sid, sent, finished)
        if queue.partial:  # keep the turn until the rest is out
            self._watch_out(sid)
            return False
        # ORDER: the queue goes before the turn is given, so that a message of another thread of
        # ours either finds the queue or waits for the turn; either way behind these.
        with self._lock:
            done = not queue.messages
            if done:
                del self._queues[sid]
        queue.turn = False
        self._engine.give_turn(sid)
        if done:
            queue.reference.close()
        elif sent < size:
            self._watch_out(sid)
        return done

    def _batch(self, queue: Queue) -> tuple[list[memoryview], int]:
        batch: list[memoryview] = []
        size = 0
        with self._lock:
            for message in queue.messages:
                if batch and (len(batch) >= _BATCH_BUFFERS or size + len(message) > _BATCH_BYTES):
                    break
                batch.append(message)
                size += len(message)
        return batch, size

    def _consume(self, queue: Queue, batch: list[memoryview], sent: int) -> int:
        """Take what was sent off the queue; returns how many messages that finished."""
        finished = 0
        with self._lock:
            queue.unwritten -= sent
            for message in batch:
                if sent < len(message):
                    break
                sent -= len(message)
                queue.messages.popleft()
                queue.partial = False
                finished += 1
            if sent:
                queue.messages[0] = queue.messages[0][sent:]
                queue.partial = True
        return finished

    def _give_up(self, sid: int) -> None:
        """Drop what waits for a failed socket."""
        with self._lock:
            queue = self._queues.pop(sid, None)
        if queue is not None:
            queue.messages.clear()
            queue.reference.close()

    def hung_up(self, sid: int) -> None:
        """A cached descriptor's connection ended: see whether something waits for it."""
        if sid in self._queues:
            self.pump(sid)

    def tick(self) -> None:
        """Once a second: whatever waits is tried, should every other signal have been missed."""
        for sid in list(self._queues):
            self.pump(sid)

    # -- waiting --------------------------------------------------------------------------------

    def flush(self, reference: Reference, timeout_s: float | None) -> bool:
        """Wait until nothing waits here for the socket; the caller's own thread does the work."""
        return self._wait(reference, timeout_s, room=False)

    def wait_writable(self, reference: Reference, timeout_s: float | None) -> bool:
        """Wait until nothing waits here and the kernel would take more."""
        return self._wait(reference, timeout_s, room=True)

    def _wait(self, reference: Reference, timeout_s: float | None, *, room: bool) -> bool:
        sid = reference.id
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        nap_s = _BACK_OFF_S[0]
        while True:
            if reference.failed:
                raise SocketFailedError(*self._error_of(sid))
            done = self.pump(sid)
            if done and not room:
                if reference.failed:
                    raise SocketFailedError(*self._error_of(sid))
                return True
            left_s = 1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            ready = self._poll(self._entry(reference), min(left_s, 1.0))
            if ready and done and not reference.failed:
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
            if ready:
                # The kernel has room but another process has the turn, or a hang-up came before
                # the version did: look again a little later.
                time.sleep(nap_s)
                nap_s = min(2 * nap_s, _BACK_OFF_S[1])

    @staticmethod
    def _poll(entry: Entry, timeout_s: float) -> bool:
        poller = select.poll()
        poller.register(entry.fd, select.POLLOUT)
        return bool(poller.poll(timeout_s * 1000))

    def close(self) -> None:
        """Forget what waits; its bytes are lost with this process."""
        for sid in list(self._queues):
            self._give_up(sid)


def _join(buffers: tuple[Buffer, ...]) -> memoryview:
    """One immutable message of its buffers; a single ``bytes`` is not copied."""
    if len(buffers) == 1 and isinstance(buffers[0], bytes):
        return memoryview(buffers[0])
    return memoryview(b"".join(buffers))


