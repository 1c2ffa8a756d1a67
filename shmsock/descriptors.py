"""A process's descriptors: an integer is shared, a descriptor is not.

The cache is keyed by SocketId, never by slot, and an entry is no reference.

    INVARIANT: data goes through a number only while its thread holds a reference to the id;
               shutdown and close may use it without one, under the local lock.
    INVARIANT: a number is closed only at count 0 and out of every epoll, popped under the local
               lock first. With count > 0 the entry is marked, and the thread that takes the count
               to 0 pops it. Hang-up, moved version, timer and bound all obey this, or one client's
               bytes reach another.

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
import resource
import select
import socket
import threading
import time

import numpy as np

from . import channel
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


class Entry:
    """One cached descriptor.

    Attributes:
        sock: The number, wrapped without asking the kernel what it is.
        used_ns: When it was last used.
        pollers: The epolls it is registered in, which must forget it before it is closed.
        stream: Whether several messages may share a send; None until somebody asked.
        told: Whether this process knows that the socket is its own: created here, or passed. Who
            becomes the owner of one that it had only written to is still to be told.
    """

    __slots__ = ("fd", "inode", "pollers", "put", "sid", "sock", "stream", "told", "used_ns")

    def __init__(self, sid: int, sock: socket.socket) -> None:
        """A fresh entry, in no epoll."""
        self.sid = sid
        self.sock = sock
        self.fd = sock.fileno()
        self.inode = os.fstat(self.fd).st_ino  # tells whether foreign code has reused the number
        self.used_ns = 0
        self.pollers: list[collections.abc.Callable[[int], None]] = []
        self.put = False  # whether the host has it, if it should
        self.told = False
        self.stream: bool | None = None


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


def _is_gone(error: Exception) -> bool:
    """Whether an error of talking to the host says that there is none."""
    return isinstance(error, ConnectionError | FileNotFoundError)


class Descriptors:
    """The cache, the way to the host, and what failing does to a descriptor."""

    def __init__(self, segment: Segment, engine: Engine, service: Service, epoch: int) -> None:
        """Nothing is connected until something is needed."""
        self.store: Store | None = None  # in the host
        # Called in the service loop with the ids of arrivals, whose descriptors are cached by then.
        self.on_arrival: collections.abc.Callable[[list[int]], None] | None = None
        # Called in the service loop when a socket whose descriptor was cached has ended.
        self.on_hang_up: collections.abc.Callable[[int], None] | None = None
        # Called with a socket of ours whose descriptor nobody has any more.
        self.on_lost: collections.abc.Callable[[int], object] = lambda sid: None
        self._missed: dict[int, int] = {}  # how many looks the host answered and did not give it
        self._answered = 0
        self._segment = segment
        self._cells = segment.cells
        self._engine = engine
        self._service = service
        self._hello = (segment.inode, engine.index, epoch)
        self._entries: dict[int, Entry] = {}
        self._limit = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._idle_fetchers: list[socket.socket] = []
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

    def peek(self, sid: int) -> Entry | None:
        """The cached entry, if there is one."""
        return self._entries.get(sid)

    def keep(self, sid: int, sock: socket.socket) -> Entry:
        """Cache a socket object of ours; one that is there already is kept instead."""
        entry = self._keep(Entry(sid, sock))
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

    def _arrived(self, sid: int, fd: int) -> None:
        """Cache a received descriptor if it is what its slot says."""
        if os.fstat(fd).st_ino != self._cells.inode[sid & SLOT_MASK]:
            os.close(fd)  # the slot has moved on between the host's look and ours
            return
        entry = Entry(sid, wrap(fd))
        entry.put = True
        # ORDER: watched before others can find it, or this would replace their wish for EPOLLOUT.
        self.watch_hang_up(entry)
        self._keep(entry)
        if self._cells.versioned_ref[sid & SLOT_MASK] >> SLOT_BITS != sid >> SLOT_BITS:
            # The hang-up may have been reported before there was anything to close.
            self._service.call_soon(functools.partial(self._hung_up, sid))

    # -- ending a descriptor --------------------------------------------------------------------

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
        channel.close_or_leave(entry.sock, entry.inode)

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
            if entry is not None and channel.is_inode(entry.fd, entry.inode):
                shut_down(entry.sock)
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

    def sweep(self) -> None:
        """Close the cached descriptors whose sockets failed or moved on."""
        entries = list(self._entries)
        if not entries:
            return
        ids = np.array(entries, "u8")
        shift = np.uint64(SLOT_BITS)
        versions = self._segment.columns.versioned_ref[ids & np.uint64(SLOT_MASK)] >> shift
        for sid in ids[versions != ids >> shift].tolist():
            if self.peers.is_open:  # no host's sweep ends the connection
                self._told_failed(sid)
            self._moved_on(sid)

    # -- the process's channel ------------------------------------------------------------------

    def put(self, sid: int) -> None:
        """Give the host a duplicate; tried again by the timer until it is acknowledged."""
        if self.store is not None:
            entry = self._entries.get(sid)
            if entry is not None:  # or it has failed already
                self.store.keep(sid, wrap(os.dup(entry.fd)))
                entry.put = True
            return
        self._wants_link = True
        link = self._link
        if link is None or link.closed or not link.tell(channel.PUT, [sid]):
            self._service.call_soon(lambda: self._put([sid]))
        self._service.ensure()

    def _put(self, sids: list[int]) -> None:
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

    def _fd_of(self, sid: int) -> int:
        entry = self._entries.get(sid)
        return entry.fd if entry is not None else -1

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
            if os.fstat(fd).st_ino != self._cells.inode[sid & SLOT_MASK]:
                os.close(fd)
                continue
            self.keep(sid, wrap(fd)).put = True
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
        while self._entries:
            entry = self._entries.popitem()[1]
            channel.close_or_leave(entry.sock, entry.inode)
