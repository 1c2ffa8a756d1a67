"""A reference to a socket, and everything that can be done with it."""

from __future__ import annotations

import collections.abc
import errno
import socket
import time

from .cache import Entry
from .descriptors import Descriptors
from .engine import Engine, Reference, reference_class
from .errors import ClosedError, SocketFailedError
from .layout import LIVE, SLOT_BITS, SLOT_MASK, USER_DATA_BYTES, recycled_version
from .segment import Segment
from .writing import Buffer, Writers

_DONTWAIT = int(socket.MSG_DONTWAIT)  # an enum's member takes longer to look up than to pass


@reference_class
class SocketRef(Reference):
    """A counted hold on a socket, from ``Runtime.address``.

    Until it is closed the slot is not recycled, and the descriptor stays. Hold it for one event,
    not across a wait for the next one: a held reference keeps a failed socket from being recycled.
    Its own context manager. A forked child's inherited references are inert.
    """

    __slots__ = ()

    @property
    def _io(self) -> SocketIO:
        return self._engine.io  # type: ignore[no-any-return]  # a cast would be one more call

    def fileno(self) -> int:
        """The number of this process's own duplicate, fetched from the host at first use.

        It is yours to poll and to read or write while this reference is open, never to close.

        Raises:
            SocketFailedError: The socket failed before its descriptor could be had.
            DescriptorError: The host did not answer.
        """
        return self._io.entry(self).fd

    @property
    def peer(self) -> str:
        """Who is at the other end, as it was when the socket was created."""
        raw = self._io.open_segment().columns.peer[self.id & SLOT_MASK]
        return bytes(raw).decode("utf-8", "replace")

    @property
    def error(self) -> tuple[int, str]:
        """Code and text of the failure; (0, "") while the socket has not failed."""
        return self._io.error_of(self.id) if self.failed else (0, "")

    @property
    def user_data(self) -> bytes:
        """Up to 64 bytes that the application keeps with the socket; trailing NULs are dropped.

        Concurrency: readers take no lock. The owner alone should store; a store takes the stripe.
        If killed: the store has happened or has not; it is never half.
        """
        return self._io.user_data(self.id)

    @user_data.setter
    def user_data(self, data: bytes) -> None:
        if len(data) > USER_DATA_BYTES:
            raise ValueError(f"user_data holds {USER_DATA_BYTES} bytes, not {len(data)}")
        self._engine.set_user_data(self.id, bytes(data))

    def write(self, *buffers: Buffer) -> None:
        """Send the buffers as one whole message; never waits for the peer.

        Messages of any processes never interleave, and each process's are sent in its order. What
        the kernel does not take now waits in this process and is sent by its service thread, or
        by its dispatcher's loop. What a dispatcher's callback writes, in its thread, leaves when
        this turn of the loop ends, with all else that was written to the socket in it: ``flush``
        first if the callback goes on to compute.

        Args:
            buffers: At least one; ``bytes`` are not copied.

        Raises:
            SocketFailedError: The socket has failed; nothing more will be sent.
            OverCrowdedError: Too much waits for this peer in this process; nothing of this message
                was taken.
            DescriptorError: The host gave no descriptor.

        Concurrency: from any thread of any process.
        If killed: in mid-message the socket is failed with EPIPE; what is queued here is lost.
        """
        self._io.writers.write(self, buffers)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything this process wrote is with the kernel.

        Args:
            timeout: In seconds; None waits for ever.

        Returns:
            False when the time was over first.

        Raises:
            SocketFailedError: The socket failed, with the winner's code and text.
        """
        return self._io.writers.flush(self, timeout)

    def wait_writable(self, timeout: float | None = None) -> bool:
        """Wait until nothing of this process waits for the peer and the kernel would take more.

        Arguments, result and errors as of ``flush``.
        """
        return self._io.writers.wait_writable(self, timeout)

    def unwritten_bytes(self) -> int:
        """How much waits for this peer in this process."""
        return self._io.writers.unwritten_bytes(self.id)

    def recv(self, size_bytes: int) -> bytes:
        """Read what is there, at most ``size_bytes``; ``b""`` at the end of the stream.

        The owner reads. Data that came before a failure stays readable.

        Raises:
            BlockingIOError: There is nothing yet.
            OSError: The connection is broken; what came before it was read.
        """
        return self._io.recv(self, size_bytes)

    def recv_into(self, buffer: Buffer) -> int:
        """Read what is there into ``buffer``; how many bytes, 0 at the end of the stream.

        As ``recv``, without a new object for every read.
        """
        io = self._io
        read_bytes = io.entry(self).sock.recv_into(buffer, 0, _DONTWAIT)
        io.count_read(self.id, read_bytes)
        return read_bytes

    @property
    def busy(self) -> bool:
        """Whether the owner is in the middle of a message: only an idle socket changes hands.

        The owner stores True before the first recv of a message, and False once its parse buffer
        is empty and every answer is out.
        """
        return bool(self._io.open_segment().cells.busy[self.id & SLOT_MASK])

    @busy.setter
    def busy(self, busy: bool) -> None:
        io = self._io
        segment = io.open_segment()
        if not busy:  # ORDER: the answers are out before anybody may take it for idle
            io.writers.turns.send_all_collected()
        segment.cells.busy[self.id & SLOT_MASK] = busy

    def count_messages(self, count: int) -> None:
        """Add to the statistics of messages read; the owner's to call."""
        self._io.open_segment().cells.messages_in[self.id & SLOT_MASK] += count

    def hand_over(
        self,
        index: int,
        on_done: collections.abc.Callable[[int, bool], object] | None = None,
    ) -> bool:
        """Offer an idle socket of this process to another one, which goes on reading it.

        Its consumer is removed first: from here on this process must not read it. The other is
        given it by its dispatcher's ``on_arrival``. If it does not take it within three seconds
        the offer is withdrawn and the consumer comes back.

        Args:
            index: Of the process that shall own it.
            on_done: Called once with the id and True when it is this process's no more, so that
                what it remembers of it should be forgotten; with False when it still is. Not at
                all if the socket has ended: then the consumer's ``on_failed`` is.

        Returns:
            False, and nothing changed, if it is not ours, ``busy``, offered already, released or
            failed.

        Raises:
            ValueError: ``index`` is no other live process.
            StripeTimeoutError: As of every transition; the consumer comes back.

        Concurrency: in the dispatcher's loop, and ``on_done`` too.
        If killed: the socket is the heir's, or an orphan; see ``on_owner_death``.
        """
        if index == self._io.engine.index:
            raise ValueError("a socket is handed over to another process")
        return self._io.hand_over(self.id, index, on_done)

    def set_failed(self, code: int = errno.ECONNABORTED, text: str = "") -> bool:
        """Fail the socket, as ``Runtime.set_failed``; true for the one winner."""
        return self._io.set_failed(self.id, code, text)

    def release_additional_reference(self) -> bool:
        """Close gracefully: the socket ends when the last process lets go of it.

        Until then it can be addressed. The peer sees the end of the stream after the last byte
        that was written.

        Returns:
            False if it was released already, or has failed.
        """
        return self._io.release(self.id)


class SocketIO:
    """What the references of one runtime in one process share."""

    def __init__(self, segment: Segment, engine: Engine, descriptors: Descriptors) -> None:
        """``writers`` is set right after, which needs our ``error_of`` and ``set_failed``."""
        self.segment = segment
        self.engine = engine
        self.descriptors = descriptors
        self.writers: Writers
        # What ``SocketRef.hand_over`` does (handover.py).
        self.hand_over: collections.abc.Callable[
            [int, int, collections.abc.Callable[[int, bool], object] | None], bool
        ]

    def entry(self, reference: SocketRef) -> Entry:
        """The cached descriptor of a held socket.

        Raises:
            ClosedError: The reference or the runtime was closed, or was inherited by a fork.
        """
        if reference.closed or self.engine.closed:
            self.segment.check()
            raise ClosedError("the reference is closed, or was inherited: address the socket again")
        try:
            return self.descriptors.get(reference.id)
        except LookupError:
            raise SocketFailedError(*self.error_of(reference.id)) from None

    def open_segment(self) -> Segment:
        """The segment; ClosedError once the runtime is closed, or in a fork; PoisonedError."""
        if self.engine.closed:
            self.segment.check()
            raise ClosedError("this reference's runtime is closed here: attach and address again")
        return self.segment

    def error_of(self, sid: int) -> tuple[int, str]:
        """Code and text of a failed socket, or of one that is gone as far as that is known.

        Recycling leaves the error where it is: it is lost when the slot is used again.
        """
        slot = sid & SLOT_MASK
        segment = self.open_segment()
        cells, columns = segment.cells, segment.columns
        code = int(cells.error_code[slot])
        text = bytes(columns.error_text[slot]).decode("utf-8", "replace")
        version = cells.versioned_ref[slot] >> SLOT_BITS
        failed = (sid >> SLOT_BITS) + 1
        if version == failed:
            return code, text
        if version == recycled_version(failed) and cells.state[slot] != LIVE and (code or text):
            return code, text
        return errno.ENOTCONN, "the socket is gone"

    def user_data(self, sid: int) -> bytes:
        """Read application data without a lock: version and selector, copy, both again."""
        slot = sid & SLOT_MASK
        segment = self.open_segment()
        cells, columns = segment.cells, segment.columns
        while True:
            seen = cells.versioned_ref[slot] >> SLOT_BITS, cells.selector[slot]
            data = bytes(columns.user_data[slot, seen[1] & 1])
            if seen == (cells.versioned_ref[slot] >> SLOT_BITS, cells.selector[slot]):
                return data

    def recv(self, reference: SocketRef, size_bytes: int) -> bytes:
        """Read what is there; the C engine comes here for the first descriptor only."""
        data = self.entry(reference).sock.recv(size_bytes, _DONTWAIT)
        self.count_read(reference.id, len(data))
        return data

    def count_read(self, sid: int, read_bytes: int) -> None:
        """Statistics, and when the peer was last heard; only the reader writes them."""
        slot = sid & SLOT_MASK
        cells = self.segment.cells
        cells.bytes_in[slot] += read_bytes
        cells.read_ns[slot] = time.monotonic_ns()

    def set_failed(self, sid: int, code: int, text: str) -> bool:
        """Fail a socket; the winner ends the connection for everybody."""
        self.open_segment()
        self.writers.turns.send_collected(sid)  # what was written before it is sent before it
        result = self.engine.set_failed(sid, code, text)
        if result:
            self.descriptors.shut_down(sid)
            self.descriptors.discard(sid)
        return bool(result)

    def release(self, sid: int) -> bool:
        """Release; with nobody attached the slot is recycled here and now."""
        self.open_segment()
        result = self.engine.release_additional_reference(sid)
        if result & 2:
            self.descriptors.shut_down(sid)
            self.descriptors.discard(sid)
        return bool(result)
