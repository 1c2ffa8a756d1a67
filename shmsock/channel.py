"""The control channel's messages, and one end of a connection that never waits.

SOCK_SEQPACKET, so that a message is whole or absent, with descriptors as SCM_RIGHTS. Fixed structs,
never pickles: a header, then up to 253 SocketIds, then as many descriptors where the type has them.

    HELLO    segment inode, process index, epoch        who speaks; first on every connection
    PUT      ids + descriptors       to the host        keep these; answered PUT_OK or PUT_NO
    GET      ids                     to the host        answered GOT or GET_NO, now or later
    GOT      ids + descriptors       from the host
    PASS     ids + descriptors       from the host      these are yours to read from here on
    PASS_NO  ids                     to the host        their descriptors did not arrive
    FAILED   ids                     to the host        a hint: sweep these now
    KEEP     ids + descriptors       from the host      duplicates to hold for the next host
    OFFER    ids, code: an index     to the host        a hint: PASS these to their heir

What is said about state can be derived again from the table, so a message that finds the queue
full may be dropped.

If killed: the kernel closes the descriptors of messages in flight when the socket goes.
"""

from __future__ import annotations

import array
import collections
import collections.abc
import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
import typing

HELLO, PUT, PUT_OK, PUT_NO, GET, GOT, GET_NO, PASS, PASS_NO, FAILED, KEEP, OFFER = range(1, 13)
WITH_DESCRIPTORS = frozenset((PUT, GOT, PASS, KEEP))

MAX_IDS = 253  # SCM_MAX_FD of the kernel

_MAGIC = 0x6B6F7368
_HEADER = struct.Struct("<IBxHi")
_MAX_BYTES = _HEADER.size + 8 * MAX_IDS
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_IDS * 4)
_QUEUE_LIMIT = 4096
_STUCK_AFTER_S = 10.0

Resolve = collections.abc.Callable[[int], int]


class BadMessageError(Exception):
    """The peer sent something that is no message of ours: hang up."""


class Message(typing.NamedTuple):
    """One message as received.

    Attributes:
        descriptors: As many as arrived: at EMFILE fewer than ids, and nothing but MSG_CTRUNC says
            so. Ours to close.
    """

    type: int
    code: int
    ids: tuple[int, ...]
    descriptors: list[int]


def pack(kind: int, ids: collections.abc.Sequence[int], code: int = 0) -> bytes:
    """A message's bytes."""
    return _HEADER.pack(_MAGIC, kind, len(ids), code) + struct.pack(f"<{len(ids)}Q", *ids)


def unpack(data: bytes) -> tuple[int, int, tuple[int, ...]]:
    """Type, code and ids of a message's bytes.

    Raises:
        BadMessageError: They are none.
    """
    if len(data) < _HEADER.size:
        raise BadMessageError(f"{len(data)} bytes are too few")
    magic, kind, count, code = _HEADER.unpack_from(data)
    if magic != _MAGIC or not HELLO <= kind <= OFFER or count > MAX_IDS:
        raise BadMessageError("not a message of this version")
    if len(data) != _HEADER.size + 8 * count:
        raise BadMessageError(f"{len(data)} bytes do not hold {count} ids")
    return kind, code, struct.unpack_from(f"<{count}Q", data, _HEADER.size)


def send(
    sock: socket.socket,
    kind: int,
    ids: collections.abc.Sequence[int],
    descriptors: collections.abc.Sequence[int] = (),
    code: int = 0,
    flags: int = socket.MSG_DONTWAIT,
) -> None:
    """Send one message.

    Raises:
        BlockingIOError: The peer's queue is full, or too many descriptors of this user are in
            flight (ETOOMANYREFS): try again later.
    """
    rights = array.array("i", descriptors)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
    try:
        sock.sendmsg([pack(kind, ids, code)], ancillary, flags | socket.MSG_NOSIGNAL)
    except OSError as error:
        if error.errno in (errno.ETOOMANYREFS, errno.ENOBUFS):
            raise BlockingIOError(error.errno, "descriptors in flight") from None
        raise


def receive(sock: socket.socket, flags: int = socket.MSG_DONTWAIT) -> Message | None:
    """Receive one message; None at the end of the stream.

    ``recvmsg`` with MSG_CMSG_CLOEXEC, because ``socket.recv_fds`` ignores its flags: a process that
    forks and executes at this moment would leak every client into its child.

    Raises:
        BlockingIOError: There is none yet.
        BadMessageError: What came is not a message; its descriptors are closed.
    """
    data, ancillary, _, _ = sock.recvmsg(
        _MAX_BYTES + 1, _ANCILLARY_BYTES, flags | socket.MSG_CMSG_CLOEXEC
    )
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    if not data and not descriptors:
        return None
    try:
        message = Message(*unpack(data), descriptors.tolist())
        wanted = len(message.ids) if message.type in WITH_DESCRIPTORS else 0
        if len(descriptors) > wanted:
            raise BadMessageError("more descriptors than ids")
    except BadMessageError:
        close_all(descriptors)
        raise
    return message


def is_inode(fd: int, inode: int) -> bool:
    """Whether a number is open and still names this file."""
    try:
        return fd >= 0 and os.fstat(fd).st_ino == inode
    except OSError:
        return False


def close_or_leave(sock: socket.socket, inode: int) -> None:
    """Close a socket, unless foreign code did: its number may be another file's by now."""
    if is_inode(sock.fileno(), inode):
        sock.close()
    else:
        sock.detach()


def _is_number(fd: int) -> bool:
    return fd >= 0


def _is_open(fd: int) -> bool:
    try:
        return fd >= 0 and bool(os.fstat(fd))
    except OSError:
        return False


def close_all(descriptors: collections.abc.Iterable[int]) -> None:
    """Close received descriptors nobody wants."""
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)


def peer_uid(sock: socket.socket) -> int:
    """The uid of who is at the other end: SO_PEERCRED, which cannot be forged."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])


def accept_all(listener: socket.socket) -> collections.abc.Iterator[socket.socket]:
    """Those who wait in front of a listener that does not block, if they are of our uid.

    Raises:
        OSError: This process is out of descriptors, and they still wait.
    """
    while True:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        sock.setblocking(False)
        if peer_uid(sock) == os.geteuid():
            yield sock
        else:
            sock.close()


class Link:
    """One end of a channel in a service loop: queues what cannot be sent, never waits.

    Concurrency: ``tell``, ``flush`` and ``close`` from any thread; messages are heard in the loop.

    Args:
        sock: Connected, non-blocking.
        watch: ``Service.watch`` and ``unwatch`` of the loop that drives it.
        unwatch: See ``watch``.
        resolve: The descriptor of an id at the moment it is sent, or -1: a queue holds no
            descriptor, so nothing is kept open by a peer that does not read.
        on_message: Called with the link and each message.
        on_end: Called once, when the peer has gone or misbehaved.
    """

    def __init__(
        self,
        sock: socket.socket,
        watch: collections.abc.Callable[[int, int, collections.abc.Callable[[int], None]], None],
        unwatch: collections.abc.Callable[[int], None],
        resolve: Resolve,
        on_message: collections.abc.Callable[[Link, Message], None],
        on_end: collections.abc.Callable[[Link], None],
    ) -> None:
        """Start watching."""
        self.sock = sock
        self.index = -1  # the peer's process row, once it said HELLO
        self.epoch = 0
        self.full_since = 0.0
        self._inode = os.fstat(sock.fileno()).st_ino
        self._watch, self._unwatch = watch, unwatch
        self._resolve = resolve
        self._on_message, self._on_end = on_message, on_end
        self._queue: collections.deque[tuple[int, list[int], int]] = collections.deque()
        self._wants_out = False
        self._looks = False
        # Reentrant: what ``on_end`` and ``resolve`` do may come back here.
        self._lock = threading.RLock()
        watch(sock.fileno(), select.EPOLLIN, self._handle)

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self.sock.fileno() < 0

    @property
    def unsent(self) -> int:
        """How many messages wait for the peer."""
        return len(self._queue)

    def tell(self, kind: int, ids: collections.abc.Iterable[int], code: int = 0) -> bool:
        """Send, or queue behind what waits; false when the queue is full and it was dropped."""
        ids = list(ids)
        with self._lock:
            for begin in range(0, len(ids), MAX_IDS):
                if len(self._queue) >= _QUEUE_LIMIT:
                    self.full_since = self.full_since or time.monotonic()
                    return False
                self._queue.append((kind, ids[begin : begin + MAX_IDS], code))
            self.flush()
            return not self.closed

    def is_ours(self) -> bool:
        """Whether the number still is this socket: foreign code may have closed and reused it."""
        return is_inode(self.sock.fileno(), self._inode)

    def is_stuck(self) -> bool:
        """Whether the peer has not read for so long that it counts as dead."""
        return bool(self.full_since) and time.monotonic() - self.full_since > _STUCK_AFTER_S

    def flush(self) -> None:
        """Send what waits, until the peer's queue is full."""
        with self._lock:
            blocked = False
            if self._queue and not self.is_ours():
                self.close()
            while self._queue and not blocked and not self.closed:
                kind, ids, code = self._queue[0]
                try:
                    self._send(kind, ids, code)
                except BlockingIOError as error:
                    if error.errno != errno.EAGAIN:
                        return  # EPOLLOUT would not wait for these; the owner's timer flushes again
                    blocked = True
                except OSError as error:
                    if error.errno == errno.EBADF and kind in WITH_DESCRIPTORS and not self.closed:
                        self._looks = True
                        continue  # one was closed, perhaps after the look: look at each, again
                    self.close()
                else:
                    self._queue.popleft()
                    self.full_since = 0.0
            if not self.closed and self._wants_out != blocked:
                self._wants_out = blocked
                events = select.EPOLLIN | (select.EPOLLOUT if blocked else 0)
                self._watch(self.sock.fileno(), events, self._handle)

    def _send(self, kind: int, ids: list[int], code: int) -> None:
        descriptors: list[int] = []
        lost: set[int] = set()
        if kind in WITH_DESCRIPTORS:
            pairs = [(sid, self._resolve(sid)) for sid in ids]
            # WHY NOT ask for each: the kernel refuses the message if one is closed (EBADF).
            is_open = _is_open if self._looks else _is_number
            lost = {sid for sid, fd in pairs if not is_open(fd)}
            pairs = [(sid, fd) for sid, fd in pairs if sid not in lost]
            ids, descriptors = [sid for sid, _ in pairs], [fd for _, fd in pairs]
        # A number that another thread closes and reuses from here on names another file: whoever
        # receives it compares the inode.
        if ids:
            send(self.sock, kind, ids, descriptors, code)
        self._looks = False
        if lost and kind == GOT:  # who asked must not wait for what will not come
            self._queue.append((GET_NO, sorted(lost), errno.ESTALE))

    def _handle(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.flush()
        for _ in range(64):  # then let the others have a turn
            if self.closed:
                return
            try:
                message = receive(self.sock)
            except BlockingIOError:
                return
            except (OSError, BadMessageError):
                message = None
            if message is None:
                self.close()
                return
            self._on_message(self, message)

    def hang_up(self) -> None:
        """Close the number and touch no epoll, lock or peer; for a forked child, and at the end."""
        close_or_leave(self.sock, self._inode)

    def close(self) -> None:
        """Hang up; the end is told once."""
        with self._lock:
            if self.closed:
                return
            self._unwatch(self.sock.fileno())
            close_or_leave(self.sock, self._inode)
            self._queue.clear()
        self._on_end(self)
