"""Turning clients away: told that there is no room, once they have said what they speak."""

from __future__ import annotations

import contextlib
import functools
import socket

from shmsock import Dispatcher

REFUSE_AFTER_S = 0.25  # how long who is turned away may take to say what it speaks
REFUSED_AT_ONCE = 32  # how many of those are waited for

_FULL_REPLY = b"-ERR max number of clients reached\r\n"
_FULL_PAGE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    b"Retry-After: 1\r\nContent-Length: 30\r\n\r\nmax number of clients reached\n"
)


class Refusing:
    """Those whom one process turns away; they never become Sockets."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        """Nobody yet."""
        self._dispatcher = dispatcher
        self._refused: set[socket.socket] = set()

    def turn_away(self, sock: socket.socket) -> None:
        """Take over an accepted socket, tell its client that there is no room, and close it."""
        sock.setblocking(False)
        self._refused.add(sock)
        if len(self._refused) > REFUSED_AT_ONCE:
            self._refuse(sock)
            return
        self._dispatcher.add_reader(sock.fileno(), functools.partial(self._refuse, sock))
        self._dispatcher.call_later(REFUSE_AFTER_S, functools.partial(self._refuse, sock))

    def _refuse(self, sock: socket.socket) -> None:
        if sock not in self._refused:
            return
        self._refused.discard(sock)
        self._dispatcher.remove_reader(sock.fileno())
        with sock, contextlib.suppress(OSError):
            head = b""
            with contextlib.suppress(BlockingIOError):
                head = sock.recv(64 << 10)
            sock.send(_FULL_PAGE if b" HTTP/1." in head else _FULL_REPLY, socket.MSG_NOSIGNAL)
            sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close them all at once."""
        for sock in self._refused:
            self._dispatcher.remove_reader(sock.fileno())
            sock.close()
        self._refused.clear()
