"""Reads connections, finds their protocol, and feeds it: brpc's InputMessenger.

A connection's protocols are tried in turn on its first bytes, and the one that matched is
remembered. Everything here runs in the owner's dispatcher, one connection at a time.

``busy`` is true from before the first recv of a message until the parse buffer is empty and every
answer is out: while it is true the connection cannot change hands, because half a request must
never reach another parser.
"""

from __future__ import annotations

import collections.abc
import errno
import logging
import typing

from shmsock import (
    Dispatcher,
    OverCrowdedError,
    PoisonedError,
    Runtime,
    ShmsockError,
    SocketFailedError,
    SocketRef,
    format_socket_id,
)

from .protocol import Protocol, Session

log = logging.getLogger("shmsock")
access = logging.getLogger("shmsock.access")

_READ_BYTES = 64 << 10
_READS_A_ROUND = 8  # then other connections have a turn
_HEAD_BYTES = 64 << 10  # no protocol needs more to be known by
_RECHECK_S = 0.1
_GONE = errno.ENOTCONN, "the socket is gone"


class Connection:
    """A connection this worker reads.

    Attributes:
        session: The protocol's side of it, once the protocol is known.
        head: What came before that.
        offered: Another worker may take it at any moment: it must not be touched.
        closing: Nothing is parsed any more: what still comes is read and dropped, so that closing
            with unread data does not make the kernel reset a peer that has not read our answer.
    """

    __slots__ = ("closing", "counted", "head", "offered", "rechecked", "session")

    def __init__(self) -> None:
        """Nothing was read yet."""
        self.session: Session | None = None
        self.head = b""
        self.closing = False
        self.counted = 0
        self.rechecked = False
        self.offered = False


class Hooks(typing.Protocol):
    """What an application hears of connections; see ``Application``."""

    def on_connect(self, ref: SocketRef) -> None:
        """It is read here from now on."""

    def on_failed(self, sid: int, code: int, text: str) -> None:
        """It was read here, and has ended."""


class Messenger:
    """The connections of one worker."""

    def __init__(
        self,
        runtime: Runtime,
        dispatcher: Dispatcher,
        protocols: collections.abc.Sequence[Protocol],
        hooks: Hooks | None = None,
    ) -> None:
        """Protocols are tried in the order given; ``hooks`` hear of connections as such."""
        self._runtime = runtime
        self._dispatcher = dispatcher
        self._protocols = tuple(protocols)
        self._hooks = hooks
        self._connections: dict[int, Connection] = {}
        self._draining = False
        # Where to connections should move: an index, or -1 for nowhere now.
        self._heir: collections.abc.Callable[[], int] | None = None
        dispatcher.on_arrival(self.take)

    def __len__(self) -> int:
        """How many connections are read here."""
        return len(self._connections)

    def take(self, sids: list[int], *, fresh: bool = False) -> None:
        """Read these from here on: they are ours, placed here or another worker's until now.

        Args:
            sids: The connections.
            fresh: Whether nobody had them before.

        What has come already is served before the dispatcher watches: most short connections end
        with that, and the kernel tells of what is there when watching begins.
        """
        for sid in sids:
            if sid in self._connections:
                continue
            connection = self._connections[sid] = Connection()
            failure = _GONE
            ref = self._runtime.address(sid)
            if ref is None:
                del self._connections[sid]
                continue
            with ref:
                self._look(ref, connection, fresh)
                if ref.failed:
                    failure = ref.error
            watched = False
            try:
                watched = self._dispatcher.add_consumer(sid, self._readable, self._ended)
            except (OSError, ShmsockError) as error:  # the others must be taken all the same
                log.error("%s cannot be read here: %s", format_socket_id(sid), error)
                failure = errno.EIO, "its worker could not watch it"
                self._runtime.set_failed(sid, *failure)
            if not watched:
                self._end_unwatched(sid, *failure)
            elif self._draining:
                self._finish(sid)

    def _look(self, ref: SocketRef, connection: Connection, fresh: bool) -> None:
        """Tell of it, go on with what an earlier owner left, and serve what has come."""
        try:
            if self._hooks is not None:
                self._hooks.on_connect(ref)
            user_data = b"" if fresh else ref.user_data
            for protocol in self._protocols if user_data else ():
                if protocol.resumes(user_data):
                    connection.session = protocol.open(ref)
                    break
        except Exception:  # likewise; what a protocol finds there is the application's
            log.exception("%s cannot go on here", format_socket_id(ref.id))
            ref.set_failed(errno.EPROTO, "its worker could not go on with it")
            return
        # WHY NOT while connections move or end: what is offered, and comes back, needs a consumer.
        if self._heir is None and not self._draining:
            try:
                self._serve(ref, True)
            except PoisonedError:
                raise
            except Exception as error:  # as the dispatcher does
                log.exception("a consumer raised; %s is failed", format_socket_id(ref.id))
                ref.set_failed(errno.EIO, f"a consumer raised {type(error).__name__}")

    def _end_unwatched(self, sid: int, code: int, text: str) -> None:
        try:
            self._ended(sid, code, text)
        except PoisonedError:
            raise
        except Exception:  # as the dispatcher does
            log.exception("a callback raised; the loop goes on")

    # -- reading --------------------------------------------------------------------------------

    def _readable(self, ref: SocketRef) -> bool:
        """What the dispatcher calls; true to be called again in the next round."""
        return self._serve(ref, self._dispatcher.data_only)

    def _serve(self, ref: SocketRef, data_only: bool) -> bool:
        """Read until there is nothing more, which a short read tells if there is only data."""
        connection = self._connections[ref.id]
        ref.busy = True
        try:
            more = self._read(ref, connection, data_only)
        except (SocketFailedError, OverCrowdedError) as error:
            code = error.code if isinstance(error, SocketFailedError) else errno.ENOBUFS
            ref.set_failed(code, str(error))
            return False
        self._settle(ref, connection)
        if self._draining or self._heir is not None:
            self._when_idle(ref, connection)
        return more

    def _read(self, ref: SocketRef, connection: Connection, data_only: bool) -> bool:
        for _ in range(_READS_A_ROUND):
            try:
                data = ref.recv(_READ_BYTES)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                ref.set_failed(error.errno or errno.EIO, error.strerror or "read failed")
                return False
            if not data:
                # The peer will send no more, but may still read: what is queued goes out first.
                if connection.session is not None:
                    connection.session.peer_ended(ref)
                self._close(ref, connection)
                return False
            session = connection.session
            if connection.closing:
                pass
            elif session is None:
                if not self._begin(ref, connection, data):
                    self._close(ref, connection)
            elif not session.receive(ref, data):
                self._close(ref, connection)
            if data_only and len(data) < _READ_BYTES:
                return False
        return True

    def _begin(self, ref: SocketRef, connection: Connection, data: bytes) -> bool:
        """What ``Session.receive`` does, before the protocol is known."""
        head = connection.head + data
        session = self._recognise(ref, head)
        if session is None:
            connection.head = head
            if len(head) > _HEAD_BYTES:
                ref.set_failed(errno.EPROTO, "no protocol matches its first bytes")
            return True
        connection.session, connection.head = session, b""
        return session.receive(ref, head)

    def _recognise(self, ref: SocketRef, head: bytes) -> Session | None:
        for protocol in self._protocols:
            match = protocol.match(head)
            if match is None:
                return None  # an earlier protocol may still want it
            if match:
                return protocol.open(ref)
        ref.set_failed(errno.EPROTO, "no protocol matches its first bytes")
        return None

    def _settle(self, ref: SocketRef, connection: Connection) -> None:
        """Say whether the connection is idle, and count its messages."""
        if connection.closing and not ref.unwritten_bytes():
            return  # it ends here and now, with this reference
        session = connection.session
        if session is not None:
            handled = session.messages()
            if handled != connection.counted:
                ref.count_messages(handled - connection.counted)
                connection.counted = handled
        parsed = not connection.head and (session is None or session.idle())
        if parsed and not ref.unwritten_bytes():
            ref.busy = False
        elif parsed and not connection.rechecked:
            connection.rechecked = True
            sid = ref.id  # the reference itself would be kept open
            self._dispatcher.call_later(_RECHECK_S, lambda: self._recheck(sid))

    def _recheck(self, sid: int) -> None:
        """Whether an answer that the peer was slow to take is out by now."""
        connection = self._connections.get(sid)
        if connection is None or connection.offered:  # its new owner says what is busy
            return
        connection.rechecked = False
        ref = self._runtime.address(sid)
        if ref is not None:
            with ref:
                self._settle(ref, connection)
                self._when_idle(ref, connection)

    def _when_idle(self, ref: SocketRef, connection: Connection) -> None:
        """Between two messages is where a connection ends, or moves, if it should."""
        if self._draining and not ref.busy:
            self._close(ref, connection)
        elif self._heir is not None:
            self._offer(ref, connection)

    # -- moving ---------------------------------------------------------------------------------

    def move(self, heir: collections.abc.Callable[[], int] | None) -> None:
        """Offer each connection to the process ``heir()`` as it falls idle; None: no more.

        What another worker has taken is forgotten here; what it does not take stays.
        """
        self._heir = heir

    def move_idle(self, at_most: int) -> bool:
        """Offer some that are idle now; whether there are perhaps more."""
        for sid, connection in list(self._connections.items()):
            if self._heir is None or not at_most:
                break
            ref = None if connection.offered else self._runtime.address(sid)
            if ref is not None:
                with ref:
                    at_most -= self._offer(ref, connection)
        return not at_most

    def _offer(self, ref: SocketRef, connection: Connection) -> bool:
        session = connection.session
        if self._heir is None or self._draining or connection.offered or connection.closing:
            return False
        if ref.busy or ref.unwritten_bytes() or not (session is None or session.movable()):
            return False
        if (index := self._heir()) < 0:
            return False
        connection.offered = True  # ORDER: before it is; what is not settled is told later
        try:
            connection.offered = ref.hand_over(index, self._handed_over)
        except ValueError:  # it has just died
            connection.offered = False
        except ShmsockError as error:
            log.warning("%s is handed over later: %s", format_socket_id(ref.id), error)
        return connection.offered

    def _handed_over(self, sid: int, gone: bool) -> None:
        connection = self._connections.get(sid)
        if connection is None:
            return
        if gone:
            del self._connections[sid]
            if connection.session is not None:
                connection.session.moved(sid)
            return
        connection.offered = False
        if self._draining:
            self._finish(sid)

    # -- ending ---------------------------------------------------------------------------------

    def _close(self, ref: SocketRef, connection: Connection) -> None:
        """Close once everything written is out."""
        connection.closing = True
        ref.release_additional_reference()

    def _ended(self, sid: int, code: int, text: str) -> None:
        connection = self._connections.pop(sid, None)
        if connection is None:
            return
        if access.isEnabledFor(logging.DEBUG):
            access.debug("%d ended: %s (error %d)", sid, text, code)
        if connection.session is not None:
            connection.session.end(sid)
        if self._hooks is not None:
            self._hooks.on_failed(sid, code, text)

    def drain(self) -> None:
        """Close every connection as soon as it is idle; new ones are closed at once."""
        self._draining = True
        for sid in list(self._connections):
            self._finish(sid)

    def _finish(self, sid: int) -> None:
        """Answer what has come already, and close if that was all."""
        if self._connections[sid].offered:  # it comes back, or is another's to end
            return
        ref = self._runtime.address(sid)
        if ref is not None:
            with ref:
                self._serve(ref, False)
