"""A process's cached descriptors: an integer is shared, a descriptor is not.

The cache is keyed by SocketId, never by slot, and an entry is no reference.

    INVARIANT: data goes through a number only while its thread holds a reference to the id;
               shutdown and close may use it without one, under the local lock.
    INVARIANT: a number is closed only at count 0 and out of every epoll, popped under the local
               lock first. With count > 0 the entry is marked, and the thread that takes the count
               to 0 pops it. Hang-up, moved version, timer and bound all obey this, or one client's
               bytes reach another.
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import os
import resource
import select
import socket

import numpy as np

from . import channel
from .engine import Engine
from .layout import KIND_NAMES, PEER_BYTES, SLOT_BITS, SLOT_MASK
from .segment import Segment
from .service import Service

_LISTENER = KIND_NAMES.index("listener")


class Entry:
    """One cached descriptor.

    Attributes:
        fd: The number.
        sock: It, wrapped without asking the kernel what it is, once somebody needs that.
        used_ns: When it was last used.
        pollers: The epolls it is registered in, which must forget it before it is closed.
        stream: Whether several messages may share a send; None until somebody asked.
        told: Whether this process knows that the socket is its own: created here, or passed. Who
            becomes the owner of one that it had only written to is still to be told.
        shared: Whether somebody else may have a duplicate, so that closing ours ends nothing.
    """

    __slots__ = (
        "_sock",
        "fd",
        "inode",
        "pollers",
        "put",
        "shared",
        "sid",
        "stream",
        "told",
        "used_ns",
    )

    def __init__(self, sid: int, fd: int, inode: int) -> None:
        """A fresh entry, in no epoll; the number is its to close."""
        self.sid = sid
        self.fd = fd
        self._sock: socket.socket | None = None
        self.inode = inode  # tells whether foreign code has reused the number
        self.used_ns = 0
        self.pollers: list[collections.abc.Callable[[int], None]] = []
        self.put = False  # whether the host has it, if it should
        self.told = False
        self.shared = True
        self.stream: bool | None = None

    @property
    def sock(self) -> socket.socket:
        """The number as a socket object."""
        sock = self._sock
        if sock is None:
            sock = self._sock = wrap(self.fd)
        return sock

    def close(self) -> None:
        """Close the number, unless foreign code did: it may be another file's by now."""
        if self._sock is not None:
            channel.close_or_leave(self._sock, self.inode)
        elif channel.is_inode(self.fd, self.inode):
            os.close(self.fd)


def wrap(fd: int) -> socket.socket:
    """A socket object over a number; no system call: family and type are not asked for."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
    if socket.getdefaulttimeout() is not None:  # a process-wide default would make calls wait
        sock.settimeout(0)
    return sock


def kind_of(sock: socket.socket) -> int:
    """The number of a socket's kind, as stored in its slot."""
    with contextlib.suppress(OSError):
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return KIND_NAMES.index("listener")
    if sock.family == socket.AF_UNIX:
        return KIND_NAMES.index("unix")
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        name = "tcp" if sock.type == socket.SOCK_STREAM else "udp"
        return KIND_NAMES.index(name)
    return 0


def peer_of(sock: socket.socket) -> str:
    """Who is at the other end, for people."""
    try:
        name = sock.getpeername()
    except OSError:
        return ""
    if isinstance(name, tuple):
        host, port = str(name[0]), name[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    return f"unix:{text.lstrip(chr(0)) or '-'}"


def peer_of_number(fd: int) -> bytes:
    """As ``peer_of``, of a number that stays the caller's."""
    sock = socket.socket(fileno=fd)
    try:
        return peer_of(sock).encode("utf-8", "replace")[:PEER_BYTES]
    finally:
        sock.detach()


class Cache:
    """The descriptors that this process has, and when their numbers may be closed."""

    def __init__(self, segment: Segment, engine: Engine, service: Service) -> None:
        """Nothing is cached."""
        # Called in the service loop when a socket whose descriptor was cached has ended.
        self.on_hang_up: collections.abc.Callable[[int], None] | None = None
        self._segment = segment
        self._cells = segment.cells
        self._engine = engine
        self._service = service
        self._entries: dict[int, Entry] = {}
        self._limit = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def peek(self, sid: int) -> Entry | None:
        """The cached entry, if there is one."""
        return self._entries.get(sid)

    def keep(self, sid: int, fd: int, inode: int, *, shared: bool = True) -> Entry:
        """Cache a number of ours; one that is there already is kept instead."""
        entry = Entry(sid, fd, inode)
        entry.shared = shared
        entry = self._keep(entry)
        entry.told = True
        return entry

    def _keep(self, entry: Entry) -> Entry:
        if len(self._entries) >= self._limit:
            self._evict()
        with self._engine.lock:  # or a discard in between would leave the engine a closed number
            kept = self._entries.setdefault(entry.sid, entry)
            if kept is entry:
                self._engine.set_descriptor(entry.sid, entry.fd)
        if kept is not entry:
            self._close(entry)
        return kept

    def _arrived(self, sid: int, fd: int) -> None:
        """Cache a received descriptor if it is what its slot says."""
        inode = os.fstat(fd).st_ino
        if inode != self._cells.inode[sid & SLOT_MASK]:
            os.close(fd)  # the slot has moved on between the host's look and ours
            return
        entry = Entry(sid, fd, inode)
        entry.put = True
        # ORDER: watched before others can find it, or this would replace their wish for EPOLLOUT.
        self.watch_hang_up(entry)
        self._keep(entry)
        if self._cells.versioned_ref[sid & SLOT_MASK] >> SLOT_BITS != sid >> SLOT_BITS:
            # The hang-up may have been reported before there was anything to close.
            self._service.call_soon(functools.partial(self._hung_up, sid))

    def _fd_of(self, sid: int) -> int:
        """The number to send to somebody else.

        ORDER: said to be shared before it is. Who closes at this moment and has not seen it has
        moved the version first, and whoever receives a number looks at that.
        """
        entry = self._entries.get(sid)
        if entry is None:
            return -1
        entry.shared = True
        return entry.fd

    def watch_hang_up(self, entry: Entry) -> None:
        """Notice in the service loop when an idle duplicate's connection ends."""
        sid = entry.sid
        self._service.watch(entry.fd, select.EPOLLET, lambda _: self._hung_up(sid))
        entry.pollers.append(self._service.unwatch)
        self._service.ensure()

    def _hung_up(self, sid: int) -> None:
        slot = sid & SLOT_MASK
        if self._cells.versioned_ref[slot] >> SLOT_BITS != sid >> SLOT_BITS:
            self._moved_on(sid)

    def _moved_on(self, sid: int) -> None:
        """The socket failed or was recycled: close its number when that may be, and say so."""
        self.discard(sid)
        if self.on_hang_up is not None:
            self.on_hang_up(sid)

    # -- closing a number -----------------------------------------------------------------------

    def discard(self, sid: int) -> None:
        """Close a cached descriptor, now or when the count reaches 0."""
        slot = sid & SLOT_MASK
        with self._engine.lock:
            entry = self._entries.get(sid)
            if entry is None:
                return
            version = self._cells.versioned_ref[slot] >> SLOT_BITS
            if self._engine.count(slot) and version & ~1 == sid >> SLOT_BITS:
                self._engine.marked.add(sid)
                return
            del self._entries[sid]
            self._engine.set_descriptor(sid, -1)
            self._engine.marked.discard(sid)
        self._close(entry)
        # A consumer or a queue that waits for an event of this number waits in vain.
        if entry.pollers and self.on_hang_up is not None:
            self._service.call_soon(functools.partial(self.on_hang_up, sid))

    def _close(self, entry: Entry) -> None:
        for forget in entry.pollers:
            forget(entry.fd)
        entry.close()

    def _evict(self) -> None:
        """Over the bound: close the least recently used that nobody is using."""
        with self._engine.lock:
            idle = [
                entry
                for sid, entry in list(self._entries.items())
                if entry.put
                and not self._engine.count(sid & SLOT_MASK)
                and self._cells.owner[sid & SLOT_MASK] != self._engine.word
                and self._cells.kind[sid & SLOT_MASK] != _LISTENER  # held for the next host
                and all(forget == self._service.unwatch for forget in entry.pollers)
            ]
            idle.sort(key=self._used_ns)
            evicted = idle[: max(1, len(self._entries) // 10)]
            for entry in evicted:
                del self._entries[entry.sid]
                self._engine.set_descriptor(entry.sid, -1)
        for entry in evicted:
            self._close(entry)

    def _used_ns(self, entry: Entry) -> int:
        """When it was last used: here, or, as the C engine's writes do not come by here, at all."""
        return max(entry.used_ns, self._cells.written_ns[entry.sid & SLOT_MASK])

    def _stale(self) -> list[int]:
        """The ids of cached descriptors whose sockets failed or moved on."""
        ids = np.array(list(self._entries), "u8")
        shift = np.uint64(SLOT_BITS)
        versions = self._segment.columns.versioned_ref[ids & np.uint64(SLOT_MASK)] >> shift
        stale: list[int] = ids[versions != ids >> shift].tolist()
        return stale

    def forget(self) -> None:
        """Close every number and touch no epoll; for a forked child, and at the end."""
        while self._entries:
            entry = self._entries.popitem()[1]
            entry.close()
