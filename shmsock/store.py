"""The host's side of the control channel: a duplicate of every live socket, for whoever asks.

The host accepted most sockets anyway, so a first use elsewhere does not wake a busy owner, and
connections outlive workers. What is here is no reference: an entry lives as long as its version,
and a sweep compares them all with one numpy expression.

Everything here runs in the host's service loop, and never waits for a peer.
"""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import logging
import os
import resource
import secrets
import select
import socket
import threading
import time

import numpy as np

from . import channel
from .layout import LIVE, SLOT_BITS, SLOT_MASK
from .segment import Segment, run_directory
from .service import Service

log = logging.getLogger("shmsock")

_FREE_FILES = 64  # what a process needs besides its sockets


def shut_down(sock: socket.socket) -> None:
    """End a connection for everybody who has it.

    ``shutdown`` acts on the shared open file description: every epoll in every process reports a
    hang-up at once. ENOTCONN is success: there was nobody at the other end.
    """
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class Store:
    """Keeps descriptors, hands them out, and hands connections to workers."""

    def __init__(
        self,
        segment: Segment,
        service: Service,
        is_participant: collections.abc.Callable[[int, int], bool],
        on_hang_up: collections.abc.Callable[[int, int], None],
    ) -> None:
        """Listen at a path with a random part, and publish it in the segment."""
        self._segment = segment
        self._service = service
        self._is_participant = is_participant
        self._on_hang_up = on_hang_up
        self._sockets: dict[int, socket.socket] = {}
        self._peers: set[channel.Link] = set()
        self._workers: dict[int, channel.Link] = {}
        self._parked: dict[int, list[channel.Link]] = {}
        self._spread: list[int] = []
        self._told_full = False
        self._abandoned = False
        self._arrival = threading.Condition(threading.Lock())
        # Called with a process index when it can be passed sockets.
        self.on_join: collections.abc.Callable[[int], object] | None = None
        # Called with the ids whose hand-over did not arrive.
        self.on_refused: collections.abc.Callable[[int, tuple[int, ...]], None] | None = None
        # Called with an index and the ids that a process has offered to it.
        self.on_offer: collections.abc.Callable[[int, list[int]], None] | None = None
        # Random, so that nobody can sit on the name beforehand.
        # No longer: with the longest name of a runtime it must fit ADDRESS_BYTES.
        self.address = f"{run_directory(segment.name)}/control-{secrets.token_hex(5)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(self.address)
        self._listener.listen(128)
        service.watch(self._listener.fileno(), select.EPOLLIN, self._accept)
        segment.publish_control_address(self.address)

    def __len__(self) -> int:
        """How many descriptors are kept."""
        return len(self._sockets)

    # -- the host's own use ---------------------------------------------------------------------

    def keep(self, sid: int, sock: socket.socket) -> None:
        """Take over a socket object for an id; from any thread."""
        self._sockets[sid] = sock
        with self._arrival:
            self._arrival.notify_all()
        for link in self._parked.pop(sid, ()):
            link.tell(channel.GOT, [sid])

    def duplicate(self, sid: int) -> int:
        """A new descriptor for the host's own use, or -1."""
        sock = self._sockets.get(sid)
        try:
            return os.dup(sock.fileno()) if sock is not None else -1
        except OSError as error:
            if error.errno == errno.EBADF:  # dropped between the two lines
                return -1
            raise

    def wait_for(self, sid: int, deadline: float) -> bool:
        """Wait for an id's put; false if it failed meanwhile, or the time was over.

        Not in the service loop, which is who receives the put.
        """
        with self._arrival:
            while sid not in self._sockets:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._is_live(sid):
                    return False
                self._arrival.wait(min(left_s, 0.05))  # a failure is not notified
        return True

    def pass_to(self, index: int, sids: list[int]) -> bool:
        """Tell a worker that these sockets are its own to read; false if it cannot be told."""
        link = self._workers.get(index)
        return link is not None and link.tell(channel.PASS, sids)

    def tell_who_joins(self, callback: collections.abc.Callable[[int], object]) -> None:
        """Call ``callback(index)`` for who has joined and who will; in the service loop."""
        self.on_join = callback
        for index in list(self._workers):
            callback(index)

    def is_connected(self, index: int) -> bool:
        """Whether a process has its channel open, so can be passed sockets."""
        return index in self._workers

    def has(self, sid: int) -> bool:
        """Whether a descriptor is kept for an id."""
        return sid in self._sockets

    def spread(self, sids: list[int]) -> None:
        """Have every process with a channel hold a duplicate, also those that join later.

        Then not even a listener's backlog is lost with the host.
        """
        self._spread.extend(sids)
        for link in list(self._workers.values()):  # telling the dead takes them out
            link.tell(channel.KEEP, sids)

    def sweep(self) -> int:
        """Let go of what failed, was released and unheld, or moved on; returns how many.

        INVARIANT: afterwards every id kept here has the version it was kept with.
        """
        if self._sockets:
            ids = np.array(list(self._sockets), "u8")  # at once: other threads keep sockets too
            shift = np.uint64(SLOT_BITS)
            versions = self._segment.columns.versioned_ref[ids & np.uint64(SLOT_MASK)] >> shift
            stale = ids[versions != ids >> shift].tolist()
            for sid in stale:
                self.drop(sid)
        else:
            stale = []
        for sid in [sid for sid in list(self._parked) if not self._is_live(sid)]:
            for link in self._parked.pop(sid, ()):
                link.tell(channel.GET_NO, [sid], errno.ESTALE)
        for link in list(self._peers):
            if link.is_stuck():
                log.warning("process %d does not read its control channel: hung up", link.index)
                link.close()
            else:
                link.flush()
        return len(stale)

    def drop(self, sid: int) -> None:
        """Shut a socket down and let go of it."""
        sock = self._sockets.pop(sid, None)
        if sock is not None:
            shut_down(sock)
            sock.close()

    def _is_live(self, sid: int) -> bool:
        slot = sid & SLOT_MASK
        cells = self._segment.cells
        return (
            not sid >> SLOT_BITS & 1
            and slot < self._segment.layout.slots
            and cells.versioned_ref[slot] >> SLOT_BITS == sid >> SLOT_BITS
            and cells.state[slot] == LIVE
        )

    def end_connections(self) -> None:
        """Shut down every connection for everybody, listeners excepted; for a poisoned segment.

        What is a listener the kernel says: the table is not to be believed any more.
        """
        for sock in list(self._sockets.values()):
            with contextlib.suppress(OSError):
                if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    shut_down(sock)

    def close(self) -> None:
        """Hang up on everybody and close what is kept, without shutting it down."""
        self._service.unwatch(self._listener.fileno())
        self._close_listener()
        with contextlib.suppress(OSError):
            os.unlink(self.address)
        self._on_hang_up = lambda index, epoch: None
        for link in list(self._peers):
            link.close()
        self.forget()

    def forget(self) -> None:
        """Close every descriptor and tell nobody; for a forked child."""
        self._close_listener()
        for link in self._peers:
            link.hang_up()
        while self._sockets:
            sid, sock = self._sockets.popitem()
            self._end(sid, sock)

    def _close_listener(self) -> None:
        try:
            ours = self._listener.getsockname() == self.address
        except OSError:
            ours = False
        if ours:
            self._listener.close()
        else:
            self._listener.detach()  # foreign code closed it: the number may be another file's

    def _end(self, sid: int, sock: socket.socket) -> None:
        """Close a duplicate, if the number still is what its slot says."""
        slot = sid & SLOT_MASK
        if self._segment.cells.versioned_ref[slot] >> SLOT_BITS & ~1 == sid >> SLOT_BITS:
            channel.close_or_leave(sock, self._segment.cells.inode[slot])
        elif self._abandoned:
            sock.detach()
        else:
            sock.close()

    def abandon(self) -> None:
        """Foreign code closed our numbers: close those that are ours for sure, tell nobody."""
        self._abandoned = True
        self.forget()

    # -- the peers ------------------------------------------------------------------------------

    def _accept(self, _: int) -> None:
        watch, unwatch = self._service.watch, self._service.unwatch
        try:
            for sock in channel.accept_all(self._listener):
                self._peers.add(
                    channel.Link(sock, watch, unwatch, self._fd_of, self._hear, self._lost)
                )
        except OSError as error:
            self._pause(error)

    def _pause(self, error: OSError) -> None:
        """Out of descriptors: look away for 100 ms instead of spinning."""
        log.error("the control channel cannot accept: %s", error)
        fd = self._listener.fileno()
        self._service.unwatch(fd)
        self._service.call_later(0.1, lambda: self._service.watch(fd, select.EPOLLIN, self._accept))

    def _fd_of(self, sid: int) -> int:
        sock = self._sockets.get(sid)
        return sock.fileno() if sock is not None else -1

    def _lost(self, link: channel.Link) -> None:
        self._peers.discard(link)
        if self._workers.get(link.index) is link:
            del self._workers[link.index]
        if link.index >= 0:
            self._on_hang_up(link.index, link.epoch)
        for sid, waiting in list(self._parked.items()):
            if link in waiting:
                waiting.remove(link)
            if not waiting:
                self._parked.pop(sid, None)

    def _hear(self, link: channel.Link, message: channel.Message) -> None:
        if link.index < 0:
            self._greet(link, message)
        elif message.type == channel.PUT:
            self._put(link, message)
        elif message.type == channel.GET:
            self._get(link, message.ids)
        elif message.type == channel.FAILED:
            for sid in message.ids:
                if not self._is_live(sid):
                    self.drop(sid)
        elif message.type == channel.OFFER:
            if self.on_offer is not None:
                self.on_offer(message.code, list(message.ids))
        elif message.type == channel.PASS_NO:
            if self.on_refused is not None:
                self.on_refused(link.index, message.ids)
        else:
            channel.close_all(message.descriptors)
            link.close()

    def _greet(self, link: channel.Link, message: channel.Message) -> None:
        channel.close_all(message.descriptors)
        if message.type != channel.HELLO or len(message.ids) != 3:
            link.close()
            return
        inode, index, epoch = message.ids
        if inode != self._segment.inode or not self._is_participant(index, epoch):
            link.close()
            return
        link.index, link.epoch = index, epoch
        if message.code == 0:  # the process's one channel; others only fetch
            self._workers[index] = link
            link.tell(channel.KEEP, self._spread)
            if self.on_join is not None:
                self.on_join(index)

    def _put(self, link: channel.Link, message: channel.Message) -> None:
        accepted = []
        for sid, fd in zip(message.ids, message.descriptors, strict=False):
            right = self._is_live(sid) and sid not in self._sockets
            if right and os.fstat(fd).st_ino == self._segment.cells.inode[sid & SLOT_MASK]:
                self.keep(sid, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd))
            else:
                os.close(fd)
            accepted.append(sid)
        refused = message.ids[len(message.descriptors) :]
        if accepted:
            link.tell(channel.PUT_OK, accepted)
        if refused:
            if not self._told_full:
                log.error("the host is out of descriptors: raise its open-files limit")
                self._told_full = True
            link.tell(channel.PUT_NO, refused, errno.EMFILE)

    def _get(self, link: channel.Link, sids: tuple[int, ...]) -> None:
        here = [sid for sid in sids if sid in self._sockets and self._is_live(sid)]
        if here:
            link.tell(channel.GOT, here)
        gone = []
        for sid in sids:
            if sid in here:
                continue
            if self._is_live(sid):
                # Its put is on the way, or will fail with its creator.
                waiting = self._parked.setdefault(sid, [])
                if link not in waiting:
                    waiting.append(link)
                if sid in self._sockets:  # kept by another thread since we looked
                    for each in self._parked.pop(sid, ()):
                        each.tell(channel.GOT, [sid])
            else:
                gone.append(sid)
        if gone:
            link.tell(channel.GET_NO, gone, errno.ESTALE)


def raise_open_files_limit(slots: int) -> None:
    """As many descriptors as the kernel lets us have, and a word about what that means."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft - _FREE_FILES < slots:
        log.info(
            "%d slots, but the open-files limit lets the host keep %d sockets: ulimit -n",
            slots,
            soft - _FREE_FILES,
        )
