"""Anyone writes: whole messages, each process's order kept, never waiting for the peer.

A process with a message takes the write turn (the slot's writer word, under the stripe), sends with
MSG_DONTWAIT and gives the turn back. If the kernel took only part of a message the process keeps
the turn, and the rest, until EPOLLOUT. If another process has the turn the message waits in this
process's own queue for the socket, behind what is there already, and the turn is tried again: at
once, on EPOLLOUT, and by a back-off timer. Trying again is all the signalling there is: no list of
waiters, no wake-up to lose, no bytes in anybody else's hands.

What a dispatcher's callbacks write in one turn of its loop is kept until the turn ends, if it is
small, and then leaves in one send a socket (collecting.py).

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
import logging
import os
import random
import select
import socket
import threading
import time
import typing

from .cache import Entry
from .collecting import Collector, Turn, Turns
from .descriptors import Descriptors
from .engine import Engine, Reference
from .errors import (
    ClosedError,
    DescriptorError,
    OverCrowdedError,
    PoisonedError,
    SocketFailedError,
    StripeTimeoutError,
)
from .layout import SLOT_MASK
from .service import Service

Buffer = bytes | bytearray | memoryview

log = logging.getLogger("shmsock")

_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_NOT_NOW = (errno.EAGAIN, errno.EINTR, errno.ENOBUFS)
_TRIES = 3
_BACK_OFF_S = (100e-6, 10e-3)
_GIVE_AGAIN_S = 0.1
# One turn's batch: then others may have the turn, so that nobody starves.
_BATCH_BUFFERS = 64
_BATCH_BYTES = 256 << 10


class Queue:
    """What this process has not yet sent to one socket.

    Attributes:
        messages: Whole messages; the first may have been sent in part.
        turn: Whether this process has the write turn.
        partial: Whether the first message is under way.
        full: Whether the kernel takes no more, until it says so.
    """

    __slots__ = (
        "back_off_s",
        "full",
        "messages",
        "partial",
        "pumping",
        "reference",
        "retrying",
        "turn",
        "unwritten",
    )

    def __init__(self, reference: Reference) -> None:
        """An empty queue that keeps ``reference`` until it is empty again."""
        self.reference = reference
        self.messages: collections.deque[memoryview] = collections.deque()
        self.turn = False
        self.partial = False
        self.full = False
        self.pumping = False
        self.retrying = False
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
        engine.set_direct_limit(max_unwritten_bytes)
        self._engine = engine
        self._cells = engine.cells
        self._descriptors = descriptors
        self._service = service
        self._error_of = error_of
        self._fail = fail
        self._queues: dict[int, Queue] = {}
        self._lock = threading.Lock()
        # The C engine keeps a turn's messages itself: they never come by here.
        self._collector = None if hasattr(engine, "begin_turn") else Collector(self.take_collected)
        self.turns: Turns = typing.cast(Turns, self._collector or engine)
        self.turn = Turn(self.turns)

    # -- the whole message ----------------------------------------------------------------------

    def write(self, reference: Reference, buffers: tuple[Buffer, ...]) -> None:
        """Send a message or queue what is left of it; see SocketRef.write."""
        sid = reference.id
        total = _size(buffers)  # whatever is wrong with them is said before anything is sent
        if total > self.max_unwritten_bytes:
            # WHY NOT try: the peer's kernel might take a part, and the rest must fit here.
            raise OverCrowdedError(
                f"a message of {total} bytes is larger than max_unwritten_bytes "
                f"({self.max_unwritten_bytes})"
            )
        if not total:
            if reference.failed:
                raise SocketFailedError(*self._error_of(sid))
            return
        if len(buffers) > _BATCH_BUFFERS:  # the kernel takes no more than IOV_MAX
            buffers = (b"".join(buffers),)
        entry = self._entry(reference)
        if self._collector is not None and self._collect(entry, reference, buffers, total):
            return
        if sid in self._queues and self._append(sid, buffers):
            self._press(sid)
            return
        try:
            for _ in range(_TRIES):
                if self._engine.take_turn(sid):
                    break
                if reference.failed:
                    raise SocketFailedError(*self._error_of(sid))
            else:
                self._enqueue(reference, [_join(buffers)], turn=False)
                return
            sent = self._send(entry, sid, buffers)
            if sent < total:
                self._count(sid, sent, 0)
                rest = _join(buffers)[sent:]
                self._enqueue(reference, [rest], turn=True, partial=sent > 0)
                return
            self._count(sid, sent, 1)
            self.give_turn(sid)
        except (OverCrowdedError, SocketFailedError, StripeTimeoutError):
            raise  # no message is under way
        except BaseException:
            self._interrupted(sid)
            raise

    def _collect(
        self, entry: Entry, reference: Reference, buffers: tuple[Buffer, ...], total: int
    ) -> bool:
        """Whether a message was kept for the end of the turn; C's twin is collect_or_send."""
        collector, sid = self._collector, reference.id
        if collector is None or collector.idle or sid in self._queues:
            return False
        if reference.failed:
            raise SocketFailedError(*self._error_of(sid))
        if not _is_stream(entry) or not collector.takes(sid, total) or sid in self._queues:
            return False  # behind what it has just sent, or queued
        collector.collect(reference, bytes(_join(buffers)))
        return True

    def take_collected(
        self, reference: Reference, messages: collections.abc.Sequence[bytes]
    ) -> None:
        """Send a turn's messages: whole ones that were accepted already, so without a bound."""
        if not reference.failed:
            self._put(reference, [memoryview(each) for each in messages], turn=False)
            self.pump(reference.id)

    def finish(
        self,
        reference: Reference,
        buffers: tuple[bytes, ...],
        sent: int,
        code: int,
        *,
        whole: bool = False,
    ) -> None:
        """Go on where the C engine's ``write`` left off: it has the turn, and sent a part.

        Args:
            reference: The socket.
            buffers: The message.
            sent: How many bytes of it the kernel took.
            code: The errno of a send that failed, else 0.
            whole: Each buffer is a message, of a turn that has ended: nobody waits for an error.
        """
        sid = reference.id
        try:
            if code and code not in _NOT_NOW:
                self._fail(sid, code, os.strerror(code))
                if whole:
                    return
                raise SocketFailedError(*self._error_of(sid))
            messages = [memoryview(each) for each in buffers] if whole else [_join(buffers)]
            out, left = 0, sent
            while left >= len(messages[out]):
                left -= len(messages[out])
                out += 1
            self._count(sid, sent, out)
            rest = [messages[out][left:], *messages[out + 1 :]]
            self._enqueue(reference, rest, turn=True, partial=left > 0)
        except (OverCrowdedError, SocketFailedError, StripeTimeoutError):
            raise  # no message is under way
        except BaseException:
            self._interrupted(sid)
            raise

    def give_turn(self, sid: int) -> None:
        """The message is out: whatever keeps the turn from being given is no error of its writer.

        CRASH(give_turn): killed before it, the turn is found with a dead writer and the socket is
        failed, although nothing was torn.
        """
        try:
            self._engine.give_turn(sid)
        except StripeTimeoutError as error:
            log.warning("a write turn is given back later: %s", error)
            self._service.call_later(_GIVE_AGAIN_S, lambda: self.give_turn(sid))
            self._service.ensure()
        except BaseException:
            self._interrupted(sid)
            raise

    def _interrupted(self, sid: int) -> None:
        """An exception while we may have had the turn and no queue finishes the message: fail it.

        Another thread of ours that has the turn at this moment is failed with us: whose it is, an
        exception between two bytecodes does not tell, and a torn message is worse.
        """
        if self._engine.closed:
            return  # whoever reaps us finds the turn
        queue = self._queues.get(sid)
        if (queue is None or not queue.turn) and (
            self._cells.writer[sid & SLOT_MASK] == self._engine.word
        ):
            self._fail(sid, errno.EPIPE, "a writer was interrupted in mid-message")
        if queue is not None:  # it may not have come to that
            self._retry_later(sid, queue)
            self._service.ensure()

    def _check(self, reference: Reference) -> None:
        self._engine.segment.check()
        if reference.closed or self._engine.closed:
            raise ClosedError("the reference is closed, or was inherited: address the socket again")

    def _entry(self, reference: Reference) -> Entry:
        self._check(reference)
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
            if error.errno in _NOT_NOW:
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
        """How much waits in this process for a socket; what this turn has kept is sent first.

        WHY NOT this socket's alone: an answer that overtakes what was said to others before it lets
        its reader act on something that the others have not heard.
        """
        self.turns.send_all_collected()
        queue = self._queues.get(sid)
        return queue.unwritten if queue is not None else 0

    def total_bytes(self) -> int:
        """How much waits in this process for all sockets; likewise."""
        self.turns.send_all_collected()
        return sum(queue.unwritten for queue in list(self._queues.values()))

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

    def _press(self, sid: int) -> None:
        """Send of what waits here, if nothing but another process's turn was in the way.

        WHY NOT leave it to the timer: its thread gets the GIL from a writer that goes on writing
        once in a switch interval, and sends one batch; the queue would only grow.
        """
        queue = self._queues.get(sid)
        if queue is not None and not (queue.full or queue.partial or queue.pumping):
            self.pump(sid)

    def _bound(self, queue: Queue, more_bytes: int) -> None:
        if queue.unwritten + more_bytes > self.max_unwritten_bytes:
            raise OverCrowdedError(
                f"{queue.unwritten} bytes wait for this peer and {more_bytes} more would pass "
                f"max_unwritten_bytes ({self.max_unwritten_bytes})"
            )

    def _enqueue(
        self,
        reference: Reference,
        messages: list[memoryview],
        *,
        turn: bool,
        partial: bool = False,
    ) -> None:
        """Queue what could not be sent now, and see to it that it is tried again."""
        queue = self._put(reference, messages, turn=turn, partial=partial, bounded=True)
        if turn:
            self._watch_out(reference.id)
        self._retry_later(reference.id, queue)
        self._service.ensure()

    def _put(
        self,
        reference: Reference,
        messages: list[memoryview],
        *,
        turn: bool,
        partial: bool = False,
        bounded: bool = False,
    ) -> Queue:
        """Put messages into a socket's queue, which is made if there is none."""
        sid, size = reference.id, sum(map(len, messages))
        with self._lock:
            queue = self._queues.get(sid)
            if queue is None:
                queue = Queue(reference.add_reference())
                self._queues[sid] = queue
                self._engine.set_queued(sid, True)
            if turn:
                # Ours is under way: whatever another thread queued meanwhile comes behind it.
                queue.messages.extendleft(reversed(messages))
                queue.turn, queue.partial = True, partial
            else:
                if bounded:
                    self._bound(queue, size)
                queue.messages.extend(messages)
            queue.unwritten += size
        return queue

    def _retry_later(self, sid: int, queue: Queue) -> None:
        """See to it that the queue is tried again; one timer a queue."""
        if queue.retrying:
            return
        queue.retrying = True
        delay_s = queue.back_off_s * random.uniform(0.5, 1.0)
        queue.back_off_s = min(2 * queue.back_off_s, _BACK_OFF_S[1])
        self._service.call_later(delay_s, lambda: self._retry(sid, queue))

    def _retry(self, sid: int, queue: Queue) -> None:
        queue.retrying = False
        if self._queues.get(sid) is queue and self.pump(sid) is None:
            self._retry_later(sid, queue)  # the thread that is at it may have looked before us

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
        queue.full = False
        self.pump(sid)

    def pump(self, sid: int) -> bool | None:
        """Send what waits for a socket, as far as turn and kernel allow.

        Returns:
            True when nothing waits any more; False when something does; None when another thread
            is at it.
        """
        done = mine = False
        queue = None
        try:
            with self._lock:
                queue = self._queues.get(sid)
                if queue is None:
                    return True
                if queue.pumping:
                    return None
                queue.pumping = mine = True
            done = self._pump(sid, queue)
        except (SocketFailedError, ClosedError, PoisonedError):
            self._give_up(sid)
            done = True
        except DescriptorError:
            pass  # the host may be away for a moment
        except StripeTimeoutError as error:
            log.warning("what waits for a socket is tried again: %s", error)
        except BaseException:
            # How much of it was sent is not known any more. Without the turn, nothing was.
            if mine and queue is not None:
                queue.turn = False
                self._interrupted(sid)
            raise
        finally:
            if mine and queue is not None:
                queue.pumping = False
                if not done and not queue.partial:
                    self._retry_later(sid, queue)
        return done

    def _pump(self, sid: int, queue: Queue) -> bool:
        if queue.reference.failed:
            raise SocketFailedError(*self._error_of(sid))
        entry = self._entry(queue.reference)
        if not queue.turn:
            if not self._engine.take_turn(sid):
                return False
            queue.turn = True
        batch, size = self._batch(queue, _is_stream(entry))
        sent = self._send(entry, sid, batch)
        queue.full = sent < size
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
                self._engine.set_queued(sid, False)
        queue.turn = False
        self.give_turn(sid)
        if done:
            queue.reference.close()
        elif sent < size:
            self._watch_out(sid)
        return done

    def _batch(self, queue: Queue, stream: bool) -> tuple[list[memoryview], int]:
        batch: list[memoryview] = []
        size = 0
        with self._lock:
            for message in queue.messages:
                full = len(batch) >= _BATCH_BUFFERS or size + len(message) > _BATCH_BYTES
                if batch and (full or not stream):  # a datagram is one message
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
            self._engine.set_queued(sid, False)
        if queue is not None:
            queue.messages.clear()
            queue.reference.close()

    def hung_up(self, sid: int) -> None:
        """A cached descriptor's connection ended: see whether something waits for it."""
        if sid in self._queues:
            self.pump(sid)

    def tick(self) -> None:
        """Once a second: whatever waits is tried, should every other signal have been missed."""
        self.turns.send_all_collected()
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
        self.turns.send_collected(sid)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        nap_s = _BACK_OFF_S[0]
        while True:
            self._check(reference)
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
        self.turns.end_turn()
        for sid in list(self._queues):
            self._give_up(sid)


def _is_stream(entry: Entry) -> bool:
    """Whether messages may share a send: one question to the kernel a descriptor."""
    if entry.stream is None:
        kind = entry.sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        entry.stream = kind == socket.SOCK_STREAM
    return entry.stream


def _size(buffers: tuple[Buffer, ...]) -> int:
    """How many bytes a message has; TypeError or ValueError if it is none."""
    total = 0
    for buffer in buffers:
        if buffer.__class__ is bytes:
            total += len(buffer)
            continue
        with memoryview(buffer) as view:
            if not view.c_contiguous:
                raise ValueError("a message's buffers must be contiguous")
            total += view.nbytes
    return total


def _join(buffers: tuple[Buffer, ...]) -> memoryview:
    """One immutable message of its buffers; a single ``bytes`` is not copied."""
    if len(buffers) == 1 and isinstance(buffers[0], bytes):
        return memoryview(buffers[0])
    return memoryview(b"".join(buffers))
