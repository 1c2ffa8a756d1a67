"""A worker that accepts by itself, with ``--accept workers``: from the listeners that all share.

Each worker has a duplicate of every listener anyway, so that not even the backlog is lost with the
supervisor. Here it also watches them, with EPOLLEXCLUSIVE: of the workers that wait the kernel
wakes one. What it accepts it makes Sockets of its own, serves what has come already, and deposits
what is still there: duplicates of a whole batch with the host, in one message.

WHY NOT a listener of its own for each worker (SO_REUSEPORT): then each has a queue of its own, and
who connects is in one of them before anybody accepts. With a worker that dies, or leaves, or is
stopped, or computes, its queue is lost or waits, and somebody would have to be given that listener;
with no supervisor there is nobody to give it. One queue is emptied by whoever lives. And two
servers of one user could listen at one address without knowing of each other.

The kernel wakes first who has watched longest, so a worker that has more connections than another
goes to the end of that row after each batch, and one that has many more lets a moment pass.

    If killed: woken, before it accepts: nobody else was woken, so all look ten times a second.
               accepted, before the id is LIVE: the connection ends with its only descriptor.
               LIVE, before the deposit, milliseconds later: so does it; recount, or the
               supervisor, fails the id.
               deposited, also in flight: rehomed like any other.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import select
import socket
import time

from shmsock import (
    Dispatcher,
    Runtime,
    ShmsockError,
    TableFullError,
    Wish,
    format_socket_id,
)

from .messenger import Messenger
from .refusing import Refusing

log = logging.getLogger("shmsock")

PAUSE_S = 0.1  # out of descriptors: look away from the listeners
RAISE_LIMIT = "others wait in the backlog; raise the open-files limit (ulimit -n)"
NOT_NOW = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_LOOK_EVERY_S = 0.1
_LISTENERS_EVERY = 5  # looks: they seldom change
_BATCH = 32  # then others have a turn, and what was accepted is deposited
_COUNT_FOR_S = 0.02  # how long a look at the table is good for
_ASIDE_S = 0.002
# Most short connections have ended by then: a duplicate of each would cost as much as serving it.
_DEPOSIT_AFTER_S = 0.005
_FAR_AHEAD = 1 / 8, 16  # part of the others' connections, and how many at least


class Accepting:
    """One worker's share in accepting."""

    def __init__(
        self,
        runtime: Runtime,
        dispatcher: Dispatcher,
        messenger: Messenger,
        *,
        max_connections: int,
        keeps: int,
        on_owner_death: str,
    ) -> None:
        """Look for listeners from the dispatcher's first turn on.

        Args:
            runtime: Whose listeners.
            dispatcher: Watches them.
            messenger: Reads what was accepted.
            max_connections: Beyond so many, over all workers, clients are turned away. Workers
                that accept at one moment may pass it, each by one.
            keeps: How many the host can keep duplicates of: beyond, they wait in the backlog.
            on_owner_death: What becomes of a connection when this worker is killed.
        """
        self._runtime, self._dispatcher, self._messenger = runtime, dispatcher, messenger
        self._max_connections, self._keeps = max_connections, keeps
        self._on_owner_death = on_owner_death
        self._refusing = Refusing(dispatcher)
        self._listeners: dict[int, socket.socket] = {}
        self._watched: set[int] = set()
        self._undeposited: list[int] = []
        self._told: set[str] = set()
        self._paused = self._closed = False
        self._counted_s = 0.0
        self._looks = 0
        self._fewest = 0  # connections of the worker that has the fewest, without us
        self._room = self._kept_room = 0  # how many we may accept before we count again
        dispatcher.call_later(0.0, self._look_again)

    def close(self) -> None:
        """Accept nothing more."""
        self._closed = True
        for sid in list(self._listeners):
            self._forget(sid)
        self._refusing.close()

    # -- listeners ------------------------------------------------------------------------------

    def _look_again(self) -> None:
        """See which listeners there are, and whether anybody waits whom nobody was woken for."""
        if self._closed:
            return
        self._dispatcher.call_later(_LOOK_EVERY_S, self._look_again)
        if self._runtime.wishes.of(self._runtime.index) is Wish.LEAVE:
            for sid in list(self._watched):  # others go on with the backlog
                self._unwatch(sid)
            return
        self._looks += 1
        if self._looks % _LISTENERS_EVERY == 1:
            listeners = self._runtime.listeners()
            for sid in set(self._listeners).difference(listeners):
                self._forget(sid)
            for sid in listeners:
                if sid not in self._listeners:
                    self._adopt(sid)
        if self._paused or not self._listeners:
            return
        poller = select.poll()
        for sid, sock in self._listeners.items():
            self._watch(sid)
            poller.register(sock, select.POLLIN)
        waiting = {fd for fd, _ in poller.poll(0)}
        for sid in [sid for sid, sock in self._listeners.items() if sock.fileno() in waiting]:
            if sid in self._listeners and not self._paused:
                self._accept(sid)

    def _adopt(self, sid: int) -> None:
        """Have a number of our own for a listener."""
        ref = self._runtime.address(sid)
        if ref is None:
            return
        with ref:
            try:
                sock = socket.socket(fileno=os.dup(ref.fileno()))
            except (OSError, ShmsockError) as error:  # the next look finds it again
                self._tell_once(f"{format_socket_id(sid)} is accepted from later: {error}")
                return
        sock.setblocking(False)
        self._listeners[sid] = sock

    def _forget(self, sid: int) -> None:
        self._unwatch(sid)
        self._listeners.pop(sid).close()

    def _watch(self, sid: int) -> None:
        if sid not in self._watched:
            accept = functools.partial(self._readable, sid)
            self._dispatcher.add_reader(self._listeners[sid].fileno(), accept, exclusive=True)
            self._watched.add(sid)

    def _unwatch(self, sid: int) -> None:
        if sid in self._watched:
            self._watched.discard(sid)
            self._dispatcher.remove_reader(self._listeners[sid].fileno())

    def _pause(self, why: str) -> None:
        """Look away from the listeners for a moment instead of spinning; the backlog holds."""
        self._tell_once(why)
        self._paused = True
        for sid in list(self._watched):
            self._unwatch(sid)
        self._dispatcher.call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        self._paused = False  # the next look watches again

    def _tell_once(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.error("%s", what)

    # -- accepting ------------------------------------------------------------------------------

    def _readable(self, sid: int) -> None:
        """Somebody connected, and of those that waited we were woken."""
        self._count()
        ahead = len(self._messenger) - self._fewest
        if ahead <= 0:
            self._accept(sid)
            return
        # To the end of the row, before we accept: who connects meanwhile wakes another.
        self._unwatch(sid)
        # Of those that were accepted a moment ago most have ended, or are about to.
        staying = ahead - len(self._undeposited)
        if staying > max(_FAR_AHEAD[1], _FAR_AHEAD[0] * self._fewest):
            # Those who wait are everybody's, so nobody is kept waiting by a worker that cannot
            # come: what is there after this is ours all the same.
            self._dispatcher.call_later(_ASIDE_S, functools.partial(self._come_back, sid))
            return
        self._watch(sid)
        self._accept(sid)

    def _come_back(self, sid: int) -> None:
        if sid in self._listeners and not self._paused and not self._closed:
            self._accept(sid)
            if sid in self._listeners and not self._paused:
                self._watch(sid)

    def _count(self) -> None:
        """Now and then, see how many connections there are and who has them."""
        now = time.monotonic()
        if now - self._counted_s < _COUNT_FOR_S and self._room > 0 and self._kept_room > 0:
            return
        self._counted_s = now
        runtime, wishes = self._runtime, self._runtime.wishes.all()
        loads = runtime.loads("worker")
        del loads[runtime.index]
        others = [load for row, load in loads.items() if wishes.get(row) is not Wish.LEAVE]
        self._fewest = min(others, default=self._max_connections)
        # Each may take its part of the room before it counts again, so that all together do not
        # take more than there is.
        in_use, sharers = runtime.connections(), 1 + len(others)
        self._room = _share(self._max_connections - in_use, sharers)
        self._kept_room = _share(self._keeps - in_use, sharers)

    def _accept(self, sid: int) -> None:
        """Accept a batch, serve what it has sent already, deposit what is still there."""
        self._count()
        listener, sids = self._listeners[sid], list[int]()
        if self._kept_room <= 0 and self._room > 0:
            # Before the kernel says so: the host's channels need some as well.
            self._pause(f"no more than {self._keeps} connections: {RAISE_LIMIT}")
            return
        try:
            for _ in range(_BATCH):
                if self._room <= 0:
                    sock, _ = listener.accept()
                    self._turn_away(sock, f"--max-connections {self._max_connections}")
                    continue
                made = self._runtime.accept(
                    listener, on_owner_death=self._on_owner_death, deposit=False
                )
                sids.append(made)
                self._room -= 1
                self._kept_room -= 1
                if self._room <= 0 or self._kept_room <= 0:
                    break  # count again
        except TableFullError as error:
            if error.sock is not None:
                self._turn_away(error.sock, f"--slots {self._runtime.slots}")
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            pass
        except OSError as error:
            if error.errno in NOT_NOW:
                self._pause(f"cannot accept ({error.strerror}): {RAISE_LIMIT}")
            elif not isinstance(error, ShmsockError):  # EINVAL: the server stops
                self._forget(sid)
            else:
                log.error("an accepted connection was dropped: %s", error)
        finally:
            if sids:
                if not self._undeposited:
                    self._dispatcher.call_later(_DEPOSIT_AFTER_S, self._deposit)
                self._undeposited += sids
                self._messenger.take(sids, fresh=True)

    def _deposit(self) -> None:
        """Give the host duplicates of what was accepted a moment ago and is still there."""
        sids, self._undeposited = self._undeposited, []
        self._runtime.deposit(sids)

    def _turn_away(self, sock: socket.socket, limit: str) -> None:
        self._tell_once(f"full: connections are turned away at {limit}")
        self._refusing.turn_away(sock)


def _share(room: int, sharers: int) -> int:
    """A fair part of what is left, at least one while there is anything."""
    return min(room, max(1, room // sharers))
