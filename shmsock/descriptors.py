"""Where a process's descriptors come from, and who is told of them.

A missing descriptor is fetched from the host at first use, over a connection of its own that one
thread has for one exchange: a fetch waits for the host alone, also in a dispatcher's callback.
While there is no host it is asked of the socket's owner, then of everybody (``peers``).
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
import socket
import threading
import time

import numpy as np

from . import channel
from .cache import Cache, Entry, wrap
from .engine import Engine
from .errors import DescriptorError
from .layout import KIND_NAMES, LIVE, SLOT_BITS, SLOT_MASK
from .peers import Peers, dial, has_moved_on
from .segment import Segment, run_directory
from .service import Service
from .store import Store, shut_down

log = logging.getLogger("shmsock")

FETCH_TIMEOUT_S = 5.0
_SILENT_FOR_S = 2.0  # how long an owner may take to answer while there is no host
_REFUSED_FOR_S = 0.1  # the creator of what everybody refuses may be between two lines
_DRIVE_EVERY_S = 0.01
_LOST_AFTER = 5  # looks, one a second
_LISTENER = KIND_NAMES.index("listener")
_RECONNECT_S = 0.02, 0.1


def _is_gone(error: Exception) -> bool:
    """Whether an error of talking to the host says that there is none."""
    return isinstance(error, ConnectionError | FileNotFoundError)


class Descriptors(Cache):
    """The cache with the way to the host, and what failing does to a descriptor."""

    def __init__(self, segment: Segment, engine: Engine, service: Service, epoch: int) -> None:
        """Nothing is connected until something is needed."""
        super().__init__(segment, engine, service)
        self.store: Store | None = None  # in the host
        # Called in the service loop with the ids of arrivals, whose descriptors are cached by then.
        self.on_arrival: collections.abc.Callable[[list[int]], None] | None = None
        # Called with a socket of ours whose descriptor nobody has any more.
        self.on_lost: collections.abc.Callable[[int], object] = lambda sid: None
        self._missed: dict[int, int] = {}  # how many looks the host answered and did not give it
        self._answered = 0
        self._hello = (segment.inode, engine.index, epoch)
        self._idle_fetchers: list[socket.socket] = []
        self._undeposited: set[int] = set()  # created, and to be given to the host together
        self._failed: collections.deque[int] = collections.deque()  # hints that wait for the loop
        self._link: channel.Link | None = None
        self._closed = False
        self._wants_link = False  # whether the timer should connect again
        self._linking = threading.RLock()
        self._connecting, self._delay_s = False, _RECONNECT_S[0]
        self.peers = Peers(segment, self._hello, self._fd_of, self._told_failed)
        engine.let_go = self._let_go

    # -- using a descriptor ---------------------------------------------------------------------

    def get(self, sid: int) -> Entry:
        """The cached entry of an id, fetched at first use; the caller holds a reference.

        Raises:
            DescriptorError: The host does not answer, or this process is out of descriptors.
            LookupError: The socket has failed meanwhile.
        """
        entry = self._entries.get(sid)
        if entry is None:
            self.fetch([sid])
            entry = self._entries.get(sid)
            if entry is None:
                raise LookupError(sid)
        entry.used_ns = time.monotonic_ns()
        return entry

    # -- fetching -------------------------------------------------------------------------------

    def fetch(self, sids: collections.abc.Iterable[int]) -> None:
        """Get the descriptors of these ids from the host, those that are not cached yet.

        Ids that failed meanwhile are left out. The caller holds references, or does not mind that
        an entry may be swept again before it is used.

        Raises:
            DescriptorError: The host did not answer in time, or a limit was reached.
        """
        missing = [sid for sid in sids if sid not in self._entries]
        for begin in range(0, len(missing), channel.MAX_IDS):
            self._fetch(missing[begin : begin + channel.MAX_IDS])

    def _fetch(self, sids: list[int]) -> None:
        deadline = time.monotonic() + FETCH_TIMEOUT_S
        if self.store is not None:
            for sid in sids:
                self._fetch_here(self.store, sid, deadline)
            return
        hostless_since, nap_s = 0.0, 0.001
        while sids:
            # An idle connection may be one that an earlier host closed: then try a new one.
            reused = bool(self._idle_fetchers)
            try:
                self._drive_puts()
                self._ask_host(sids, deadline)
                return
            except (OSError, channel.BadMessageError) as failure:
                error: Exception = failure
            now = time.monotonic()
            sids = [sid for sid in sids if self._is_missing(sid)]
            if reused and now < deadline:
                continue
            if sids and _is_gone(error):
                hostless_since = hostless_since or now
                patience = min(deadline, hostless_since + _SILENT_FOR_S)
                sids, silent, refused = self._ask_peers(sids, patience)
                if refused and not silent:
                    patience = hostless_since + _REFUSED_FOR_S
                if (silent or refused) and time.monotonic() < patience:
                    time.sleep(nap_s)
                    nap_s = min(2 * nap_s, 0.02)
                    continue
            if sids:
                who = "nobody gave a" if hostless_since else "the host gave no"
                raise DescriptorError(
                    f"runtime {self._segment.name!r}: {who} descriptor: {error}; "
                    "see `shmsock ps` whether its host runs"
                ) from error

    def _is_missing(self, sid: int) -> bool:
        return sid not in self._entries and not has_moved_on(self._segment, sid)

    def _ask_peers(self, sids: list[int], deadline: float) -> tuple[list[int], set[int], set[int]]:
        """There is no host: ask the others; what is missing still, and what of it may come.

        Whoever waits here opens its own door first: somebody who has ours to ask for may be waiting
        for us, and the loop that would open it may be what called.
        """
        if self._wants_link:
            self.peers.open()
        asked = self.peers.ask(sids, deadline, self._exchange, self._entries.__contains__)
        return [sid for sid in sids if self._is_missing(sid)], *asked

    def _fetch_here(self, store: Store, sid: int, deadline: float) -> None:
        """In the host: duplicate what the store has; a put that is on the way is waited for."""
        try:
            fd = store.duplicate(sid)
            if fd < 0 and not self._service.is_current_thread() and store.wait_for(sid, deadline):
                fd = store.duplicate(sid)
        except OSError as error:
            raise DescriptorError(f"no descriptor for the socket: {error}") from error
        if fd >= 0:
            self._arrived(sid, fd)
        elif self._cells.versioned_ref[sid & SLOT_MASK] >> SLOT_BITS == sid >> SLOT_BITS:
            raise DescriptorError("its creator has not handed the descriptor to the host yet")

    def _ask_host(self, sids: list[int], deadline: float) -> None:
        sock = self._fetcher(max(0.001, deadline - time.monotonic()))
        try:
            self._exchange(sock, sids, deadline)
        except BaseException:
            sock.close()  # an answer that comes late must not meet the next question
            raise
        self._idle_fetchers.append(sock)

    def _fetcher(self, timeout_s: float) -> socket.socket:
        """An idle connection to the host, or a new one."""
        with contextlib.suppress(IndexError):
            while True:
                sock = self._idle_fetchers.pop()
                if self._is_fetcher(sock):
                    return sock
                sock.detach()  # foreign code closed it: the number may be another file's by now
        return self._dial_host(1, timeout_s)

    def _is_fetcher(self, sock: socket.socket) -> bool:
        try:
            return str(sock.getpeername()).startswith(run_directory(self._segment.name))
        except OSError:
            return False

    def _exchange(self, sock: socket.socket, sids: list[int], deadline: float) -> None:
        """Send GET and receive until every id was answered for."""
        channel.send(sock, channel.GET, sids, flags=0)
        wanted = set(sids)
        while wanted:
            message = self._receive(sock, deadline)
            if message is None:
                raise ConnectionResetError("it hung up")
            wanted.difference_update(message.ids)
            for sid, fd in zip(message.ids, message.descriptors, strict=False):
                self._arrived(sid, fd)
            if message.type == channel.GOT and len(message.descriptors) < len(message.ids):
                raise DescriptorError(
                    "this process is out of descriptors: raise its open-files limit (ulimit -n)"
                )

    def _receive(self, sock: socket.socket, deadline: float) -> channel.Message | None:
        """Wait for an answer; what others may be waiting for from us goes on meanwhile.

        We may be the loop that sends our own puts, and whoever answers us may need one of them:
        two dispatchers that fetch each other's new sockets must not wait for each other.
        """
        poller = select.poll()
        poller.register(sock.fileno(), select.POLLIN)
        while True:
            left_s = max(0.001, deadline - time.monotonic())
            link = self._link
            queued = link is not None and not link.closed and link.unsent
            if poller.poll(1000 * (min(left_s, _DRIVE_EVERY_S) if queued else left_s)):
                return channel.receive(sock)
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, "it did not answer in time")
            self._drive_puts()

    def _drive_puts(self) -> None:
        """Send what waits for the host, connecting to it if that is still to be done."""
        if self._undeposited:
            self.deposit(list(self._undeposited))
        link = self._link
        if link is not None and not link.closed:
            link.flush()
        elif self._wants_link:
            self.connect()

    def _dial_host(self, purpose: int, timeout_s: float) -> socket.socket:
        """Connect to the host and say who we are."""
        address = self._segment.control_address()
        if not address:
            raise ConnectionRefusedError("there is no host")
        return dial(address, self._hello, purpose, timeout_s)

    # -- ending a descriptor --------------------------------------------------------------------

    def _let_go(self, sid: int, recycled: bool) -> None:
        """The engine's count of an id reached 0 while it was marked, or it recycled the slot.

        Whoever recycles shuts down: a graceful close must reach the peer while idle duplicates
        linger elsewhere. The host lets its own go at once when it is told.
        """
        if recycled:
            self.shut_down(sid)
        self.discard(sid)

    def shut_down(self, sid: int) -> None:
        """End the connection for everybody, and tell the host, which closes its duplicate."""
        with self._engine.lock:
            entry = self._entries.get(sid)
            if entry is not None:
                # Where ours is the only one, closing it ends the connection; but it is not closed
                # while a reference is held, and who waits with one must be woken.
                held = self._engine.count(sid & SLOT_MASK)
                if (entry.shared or held) and channel.is_inode(entry.fd, entry.inode):
                    shut_down(entry.sock)
                if not entry.shared:
                    return
        store = self.store
        if store is not None:
            self._service.call_soon(lambda: store.drop(sid))
        else:
            self._tell_failed(sid)

    def _tell_failed(self, sid: int) -> None:
        """Hint to the host; a hint that is lost costs one sweep's delay."""
        link = self._link
        if link is not None and not link.closed:
            self._failed.append(sid)
            self._service.call_soon(self._tell_all_failed)
            return
        sock = None
        try:
            sock = self._fetcher(0)
            channel.send(sock, channel.FAILED, [sid])
        except OSError as error:
            if sock is not None:
                sock.close()
            if _is_gone(error) and sid not in self._entries:
                self.peers.tell_failed(sid)
        else:
            self._idle_fetchers.append(sock)

    def _tell_all_failed(self) -> None:
        """What ended in one turn of the loop leaves in one message: connections end in bunches.

        WHY NOT schedule it for the first alone: an exception between the two lines would leave all
        later ones waiting for a call that never comes. Called again it finds nothing.
        """
        failed = [self._failed.popleft() for _ in range(len(self._failed))]
        link = self._link
        if failed and link is not None:
            link.tell(channel.FAILED, failed)

    def _told_failed(self, sid: int) -> None:
        """Another process failed a socket and had no descriptor to shut down: we have."""
        if has_moved_on(self._segment, sid):
            with self._engine.lock:
                entry = self._entries.get(sid)
                if entry is not None:
                    shut_down(entry.sock)
            self._service.call_soon(functools.partial(self._hung_up, sid))

    def sweep(self) -> None:
        """Close the cached descriptors whose sockets failed or moved on."""
        for sid in self._stale() if self._entries else ():
            if self.peers.is_open:  # no host's sweep ends the connection
                self._told_failed(sid)
            self._moved_on(sid)

    # -- the process's channel ------------------------------------------------------------------

    def put(self, sid: int) -> None:
        """Give the host a duplicate at once."""
        self.deposit([sid])

    def deposit_later(self, sid: int) -> None:
        """Note an id for ``deposit``, which its creator will call for several at once."""
        self._undeposited.add(sid)

    def deposit(self, sids: collections.abc.Sequence[int]) -> None:
        """Give the host duplicates; tried again by the timer until each is acknowledged."""
        self._undeposited.difference_update(sids)
        if self.store is not None:
            for sid in sids:
                entry = self._entries.get(sid)
                if entry is not None and not entry.put:  # or it has failed already
                    entry.shared = True
                    self.store.keep(sid, wrap(os.dup(entry.fd)))
                    entry.put = True
            return
        self._wants_link = True
        here = [sid for sid in sids if sid in self._entries]
        sids = [sid for sid in here if not has_moved_on(self._segment, sid)]
        for sid in set(here).difference(sids):  # another failed it, and had no descriptor
            self._service.call_soon(functools.partial(self._hung_up, sid))
        if not sids:
            return
        link = self._link
        if link is None or link.closed or not link.tell(channel.PUT, sids):
            self._service.call_soon(lambda: self._put(sids))
        self._service.ensure()

    def _put(self, sids: collections.abc.Sequence[int]) -> None:
        link = self.connect()
        if link is not None:  # else the timer tries again
            link.tell(channel.PUT, sids)

    def connect(self) -> channel.Link | None:
        """The channel to the host; None while there is no host. Never waits; from any thread."""
        if self.store is not None or self._closed:
            return None
        self._wants_link = True
        with self._linking:
            if self._link is not None and not self._link.closed:
                return self._link
            try:
                sock = self._dial_host(0, 0)
            except OSError as error:
                if _is_gone(error):
                    self.peers.open()
                self._connect_later()
                return None
            sock.setblocking(False)
            self._delay_s = _RECONNECT_S[0]
            service = self._service
            self._link = channel.Link(
                sock, service.watch, service.unwatch, self._fd_of, self._hear, self._lost
            )
            # A new host collects from everybody what its predecessor kept.
            missing = [sid for sid, entry in list(self._entries.items()) if not entry.put]
            if missing:
                self._link.tell(channel.PUT, missing)
        # In the loop: closing waits for the door's thread, and many a thread may connect.
        self._service.call_soon(self._shut_door)
        self._service.ensure()
        return self._link

    def _shut_door(self) -> None:
        if self._link is not None and not self._link.closed:
            self.peers.shut()

    def _lost(self, _: channel.Link) -> None:
        """The host hung up: it died, or left. Whoever follows it is given everything again."""
        if self._closed:
            return
        for entry in list(self._entries.values()):
            entry.put = False
        self._service.call_soon(self.connect)

    def _connect_later(self) -> None:
        """Look for a host again, more seldom each time; one timer a process."""
        if not self._connecting and not self._closed:
            self._connecting = True
            delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, _RECONNECT_S[1])
            self._service.call_later(delay_s, self._connect_again)

    def _connect_again(self) -> None:
        self._connecting = False
        self.connect()

    def tick(self) -> None:
        """Once a second, in the service loop."""
        self.sweep()
        if self._undeposited:
            self.deposit(list(self._undeposited))
        if self.store is not None:
            self.store.sweep()
        elif self._wants_link:
            link = self.connect()
            late = [sid for sid, entry in list(self._entries.items()) if not entry.put]
            if link is not None and late:
                link.tell(channel.PUT, late)
            elif link is not None:
                link.flush()
            self._shut_door()  # a fetch may have opened it after the host was back

    def claim_unknown(self) -> None:
        """Ask for what the table says should be here and that nobody has told us about.

        That is the sockets that are ours, and every listener that outlives its owner. The messages
        that bring them (PASS, KEEP) may be lost with their sender, dropped by a full queue, or
        arrive without their descriptors; the table is the truth. What is ours, and what a host that
        answers could not give at five looks, is lost for good, and fails.
        """
        link, columns = self._link, self._segment.columns
        if link is None or link.closed:
            return
        mine = columns.owner == self._engine.word
        kept = (columns.kind == _LISTENER) & (columns.on_owner_death != 0)
        versions = columns.versioned_ref >> np.uint64(SLOT_BITS)
        even = (versions & np.uint64(1)) == 0
        rows = np.flatnonzero((mine | kept) & even & (columns.state == LIVE)).tolist()
        unknown = {
            sid
            for row in rows
            if not self._knows(sid := int(versions[row]) << SLOT_BITS | row, bool(mine[row]))
        }
        # A hand-over may be under way to us: what is still missing at the next look is asked for.
        late = [sid for sid in unknown if sid in self._missed]
        self._missed = {sid: self._missed.get(sid, 0) + self._answered for sid in unknown}
        self._answered = 0
        # Of some we had a duplicate already, to write to them.
        self._arrive([sid for sid in late if sid in self._entries])
        asked = [sid for sid in late if sid not in self._entries]
        for sid in asked:
            if self._missed[sid] > _LOST_AFTER and mine[sid & SLOT_MASK]:
                self.on_lost(sid)
        if asked:
            # No id is 0: its refusal says that the host has seen what stands before it. A host that
            # is stopped answers nothing, and nothing is lost by that.
            link.tell(channel.GET, [*asked, 0])

    def _knows(self, sid: int, mine: bool) -> bool:
        """Whether a socket is here, and read here if it is ours."""
        entry = self._entries.get(sid)
        return entry is not None and (entry.told or not mine)

    def _hear(self, link: channel.Link, message: channel.Message) -> None:
        if message.type == channel.PUT_OK:
            for sid in message.ids:
                entry = self._entries.get(sid)
                if entry is not None:
                    entry.put = True
        elif message.type == channel.PASS:
            self._receive_passed(link, message)
        elif message.type == channel.GOT:  # answers claim_unknown
            for sid, fd in zip(message.ids, message.descriptors, strict=False):
                self._arrived(sid, fd)
            came = message.ids[: len(message.descriptors)]
            owner, mine = self._cells.owner, self._engine.word
            self._arrive([sid for sid in came if owner[sid & SLOT_MASK] == mine])
        elif message.type == channel.GET_NO:
            self._answered |= 0 in message.ids
        elif message.type == channel.KEEP:
            for sid, fd in zip(message.ids, message.descriptors, strict=False):
                self._arrived(sid, fd)
        else:
            channel.close_all(message.descriptors)

    def _arrive(self, sids: list[int]) -> None:
        for sid in sids:
            entry = self._entries.get(sid)
            if entry is not None:
                entry.told = True
        if sids and self.on_arrival is not None:
            self.on_arrival(sids)

    def _receive_passed(self, link: channel.Link, message: channel.Message) -> None:
        arrived = []
        for sid, fd in zip(message.ids, message.descriptors, strict=False):
            inode = os.fstat(fd).st_ino
            if inode != self._cells.inode[sid & SLOT_MASK]:
                os.close(fd)
                continue
            self.keep(sid, fd, inode).put = True
            arrived.append(sid)
        refused = message.ids[len(message.descriptors) :]
        if refused:  # EMFILE: the data arrives without its descriptor
            link.tell(channel.PASS_NO, refused, errno.EMFILE)
        if self.on_arrival is not None:
            self.on_arrival(arrived)

    def close(self) -> None:
        """Close the channel and every cached descriptor; nothing is shut down."""
        self._closed = True
        self.peers.close()
        if self._link is not None:
            self._link.close()
        self.forget()

    def forget(self) -> None:
        """Close every number and touch no epoll; for a forked child, and at the end."""
        self.peers.forget()
        if self._link is not None:
            self._link.hang_up()
        while self._idle_fetchers:
            sock = self._idle_fetchers.pop()
            if self._is_fetcher(sock):
                sock.close()
            else:
                sock.detach()
        super().forget()
