"""Descriptors from one another, while there is no host.

No process is critical: when the host has died, whoever has sockets of its own opens a *door*, and
who needs a descriptor asks the door of the socket's owner, then everybody's. A door is a socket in
the run directory (mode 0700) whose name follows from its process's row, so nobody has to be told
of it; it speaks the control channel's GET, GOT, GET_NO and FAILED, and closes when a host is back.
While there is a host nothing here exists.

A door has a loop and a thread of its own. WHY NOT the service loop: in a worker that is the
dispatcher's thread, and two workers that write to each other's brand-new clients at one moment
would each wait for the other's.

If killed: the kernel closes the door; whoever reaps the row takes its name away.
"""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time

from . import channel
from .layout import LIVE, SLOT_BITS, SLOT_MASK
from .segment import Segment, run_directory
from .service import Service

log = logging.getLogger("shmsock")

_PREFIX = "peer-"
_PAUSE_S = 0.1
# An owner that did not answer (stopped, or busy in a long call) is tried again once in so long, and
# then for so short: one stopped process must not cost everybody a deadline for each message.
_MUTED_S = 1.0
_MUTED_WAIT_S = 0.02


def address_of(name: str, word: int) -> str:
    """Where the process with this owner word listens while there is no host."""
    return f"{run_directory(name)}/{_PREFIX}{word:x}"  # the longest name still fits sun_path


def forget_name(name: str, word: int) -> None:
    """Take the name of a dead process's door away."""
    with contextlib.suppress(OSError):
        os.unlink(address_of(name, word))


def dial(
    address: str, hello: collections.abc.Sequence[int], purpose: int, timeout_s: float
) -> socket.socket:
    """Connect to a host or a door and say who we are.

    Raises:
        OSError: Nobody listens there, its backlog is full, or it is another user's.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(timeout_s)
        sock.connect(address)
        if channel.peer_uid(sock) != os.geteuid():
            raise PermissionError(errno.EPERM, "another user listens there", address)
        channel.send(sock, channel.HELLO, hello, code=purpose, flags=0)
    except BaseException:
        sock.close()
        raise
    return sock


class Door:
    """Answers others with the descriptors that this process has.

    Concurrency: ``resolve`` and ``on_failed`` are called in the door's own thread.
    """

    def __init__(
        self,
        segment: Segment,
        word: int,
        resolve: channel.Resolve,
        on_failed: collections.abc.Callable[[int], object],
    ) -> None:
        """Listen.

        Raises:
            OSError: This process is out of descriptors.
        """
        self._segment, self._resolve, self._on_failed = segment, resolve, on_failed
        self._address = address_of(segment.name, word)
        self._links: set[channel.Link] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.setblocking(False)
            forget_name(segment.name, word)  # of our own earlier door
            self._listener.bind(self._address)
            self._listener.listen(128)
            self._service = Service(f"{segment.name}-peers")
        except BaseException:
            self._listener.close()
            raise
        self._listen()
        self._service.ensure()

    def _listen(self) -> None:
        self._service.watch(self._listener.fileno(), select.EPOLLIN, self._accept)

    def close(self) -> None:
        """Close the door and end its thread; who waits in front of it asks again."""
        with contextlib.suppress(OSError):
            os.unlink(self._address)
        self._service.close()
        for link in list(self._links):
            link.close()
        self._listener.close()

    def forget(self) -> None:
        """Close the numbers alone; for a forked child, whose parent keeps its door."""
        self._service.close_descriptors()
        for link in self._links:
            link.sock.close()
        self._listener.close()

    def _accept(self, _: int) -> None:
        watch, unwatch, ended = self._service.watch, self._service.unwatch, self._links.discard
        try:
            for sock in channel.accept_all(self._listener):
                self._links.add(
                    channel.Link(sock, watch, unwatch, self._resolve, self._hear, ended)
                )
        except OSError:  # out of descriptors: look away for a moment instead of spinning
            self._service.unwatch(self._listener.fileno())
            self._service.call_later(_PAUSE_S, self._listen)

    def _hear(self, link: channel.Link, message: channel.Message) -> None:
        if message.descriptors:
            channel.close_all(message.descriptors)
            link.close()
        elif link.index < 0:
            self._greet(link, message)
        elif message.type == channel.GET:
            here = [sid for sid in message.ids if self._resolve(sid) >= 0]
            link.tell(channel.GOT, here)
            gone = [sid for sid in message.ids if sid not in here]
            link.tell(channel.GET_NO, gone, errno.ENOENT)
            self._push(link)
        elif message.type == channel.FAILED:
            for sid in message.ids:
                self._on_failed(sid)
        else:
            link.close()

    def _push(self, link: channel.Link) -> None:
        """See what waits sent: for too many descriptors in flight there is no event."""
        link.flush()
        if link.unsent:
            self._service.call_later(_PAUSE_S, lambda: self._push(link))

    def _greet(self, link: channel.Link, message: channel.Message) -> None:
        if message.type == channel.HELLO and len(message.ids) == 3:
            inode, index, epoch = message.ids
            rows = self._segment.cells.row_state
            if (
                inode == self._segment.inode
                and index < len(rows)
                and rows[index] == epoch << 8 | LIVE
            ):
                link.index, link.epoch = index, epoch
                return
        link.close()


class Peers:
    """One process's door, and its way to the others'."""

    def __init__(
        self,
        segment: Segment,
        hello: tuple[int, int, int],
        resolve: channel.Resolve,
        on_failed: collections.abc.Callable[[int], object],
    ) -> None:
        """No door is open.

        Args:
            segment: Whose rows name the doors.
            hello: What we say of ourselves: inode, index and epoch.
            resolve: The number this process has for an id, or -1.
            on_failed: Called with an id that another process says has failed.
        """
        # Whether a row's process lives: one that died has no door to wait for.
        self.is_alive: collections.abc.Callable[[int], bool] = lambda index: True
        self._segment, self._hello = segment, hello
        self._word = hello[2] << 16 | hello[1]
        self._resolve, self._on_failed = resolve, on_failed
        self._door: Door | None = None
        self._closed = self._told = False
        self._lock = threading.Lock()
        self._muted: dict[int, float] = {}

    # -- our own door ---------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether others can ask us."""
        return self._door is not None

    def open(self) -> None:
        """Let others ask us; from any thread, and as often as one likes."""
        if self._door is not None or self._closed:
            return
        with self._lock:
            if self._door is None and not self._closed:
                try:
                    self._door = Door(self._segment, self._word, self._resolve, self._on_failed)
                except OSError as error:  # tried again with the next look for a host
                    if not self._told:
                        log.warning("others cannot ask this process for descriptors: %s", error)
                    self._told = True

    def shut(self) -> None:
        """A host is back: nobody needs to ask us."""
        if self._door is not None:
            self._shut()

    def _shut(self) -> None:
        with self._lock:
            door, self._door = self._door, None
        if door is not None:
            door.close()
        self._muted.clear()

    def close(self) -> None:
        """Shut the door for good; another thread may be opening it."""
        self._closed = True
        self._shut()

    def forget(self) -> None:
        """In a forked child: close what was inherited."""
        door, self._door = self._door, None
        self._closed = True
        if door is not None:
            door.forget()

    # -- the others' ----------------------------------------------------------------------------

    def ask(
        self,
        sids: collections.abc.Iterable[int],
        deadline: float,
        exchange: collections.abc.Callable[[socket.socket, list[int], float], None],
        is_here: collections.abc.Callable[[int], bool],
    ) -> tuple[set[int], set[int]]:
        """Ask each socket's owner, then all others, once.

        Args:
            sids: What is wanted.
            deadline: Of the whole.
            exchange: Sends GET for the ids over a connection and receives the answers.
            is_here: Whether an id has arrived.

        Returns:
            The ids that may still come: those whose owner lives and gave no answer, and those whose
            owner said no, as it does between creating a socket and keeping its descriptor.
        """
        owners: dict[int, list[int]] = {}
        for sid in sids:
            owners.setdefault(int(self._segment.cells.owner[sid & SLOT_MASK]), []).append(sid)
        silent: set[int] = set()
        refused: set[int] = set()
        asked = {self._word}
        for word, ids in owners.items():
            if word in asked or not self._lives(word):
                continue
            asked.add(word)
            answered = self._ask(word, ids, deadline, exchange)
            if answered is not None:
                (refused if answered else silent).update(ids)
        rest = [sid for ids in owners.values() for sid in ids if not is_here(sid)]
        # An orphan, or one whose owner was never told of it: whoever wrote to it has a duplicate.
        for word in self._doors() - asked:
            if not rest:
                break
            if self._lives(word):
                self._ask(word, rest, deadline, exchange)
                rest = [sid for sid in rest if not is_here(sid)]
        return silent.intersection(rest), refused.intersection(rest)

    def _ask(
        self,
        word: int,
        sids: list[int],
        deadline: float,
        exchange: collections.abc.Callable[[socket.socket, list[int], float], None],
    ) -> bool | None:
        """Ask one process; whether it answered, None when it is not worth waiting for."""
        now = time.monotonic()
        muted = self._muted.get(word)
        if muted is not None:
            if now < muted:
                return None
            deadline = min(deadline, now + _MUTED_WAIT_S)
        try:
            sock = dial(
                address_of(self._segment.name, word), self._hello, 1, max(0.001, deadline - now)
            )
            with sock:
                exchange(sock, sids, deadline)
        except (OSError, channel.BadMessageError):
            if muted is not None or time.monotonic() >= deadline:
                self._muted[word] = time.monotonic() + _MUTED_S
            return None if muted is not None else False
        self._muted.pop(word, None)
        return True

    def tell_failed(self, sid: int) -> None:
        """Hint to all others that a socket has failed; never waits.

        WHY NOT to its owner alone: a slot that nobody held is FREE by now, and names none.
        """
        for word in self._doors() - {self._word}:
            with (
                contextlib.suppress(OSError),
                dial(address_of(self._segment.name, word), self._hello, 1, 0) as sock,
            ):
                channel.send(sock, channel.FAILED, [sid])

    def _lives(self, word: int) -> bool:
        index = word & 0xFFFF
        rows = self._segment.cells.row_state
        return index < len(rows) and rows[index] == word >> 16 << 8 | LIVE and self.is_alive(index)

    def _doors(self) -> set[int]:
        """The owner words of those whose doors have a name."""
        found = set()
        with contextlib.suppress(OSError):
            for entry in os.listdir(run_directory(self._segment.name)):
                if entry.startswith(_PREFIX):
                    with contextlib.suppress(ValueError):
                        found.add(int(entry.removeprefix(_PREFIX), 16))
        return found


def has_moved_on(segment: Segment, sid: int) -> bool:
    """Whether an id's socket has failed or was recycled."""
    return bool(segment.cells.versioned_ref[sid & SLOT_MASK] >> SLOT_BITS != sid >> SLOT_BITS)
