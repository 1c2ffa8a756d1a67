"""The plainest protocol: a message is a line."""

from __future__ import annotations

import collections.abc
import errno
import typing

if typing.TYPE_CHECKING:
    from shmsock import SocketRef

OnMessage = collections.abc.Callable[["SocketRef", bytes], "bool | None"]
LINE_LIMIT_BYTES = 64 << 10


class Lines:
    """Lines that end with LF or CR LF, handed on without that."""

    name = "lines"

    def __init__(self, on_message: OnMessage, limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        """Call ``on_message(ref, line)`` for each; a longer line fails its connection.

        ``on_message`` returns False to close once everything written is out.
        """
        self.on_message = on_message
        self.limit_bytes = limit_bytes

    def match(self, head: bytes) -> bool | None:
        """Anything may be a line: protocols that are more particular are named before this."""
        return True if head else None

    def resumes(self, user_data: bytes) -> bool:
        """Between two lines there is no state: whose user data it is, the application knows."""
        return False

    def open(self, ref: SocketRef) -> LineSession:
        """Start with nothing read."""
        return LineSession(self)


class LineSession:
    """One connection."""

    __slots__ = ("_messages", "_protocol", "_rest")

    def __init__(self, protocol: Lines) -> None:
        self._protocol = protocol
        self._rest = bytearray()
        self._messages = 0

    def receive(self, ref: SocketRef, data: bytes) -> bool:
        """Hand on every whole line."""
        self._rest += data
        if b"\n" in data:
            *lines, self._rest = self._rest.split(b"\n")
            for line in lines:
                if line.endswith(b"\r"):
                    del line[-1]
                if self._is_too_long(ref, line):
                    return True
                self._messages += 1
                if self._protocol.on_message(ref, bytes(line)) is False:
                    self._rest.clear()
                    return False
        self._is_too_long(ref, self._rest)
        return True

    def _is_too_long(self, ref: SocketRef, line: bytearray) -> bool:
        limit_bytes = self._protocol.limit_bytes
        if len(line) <= limit_bytes:
            return False
        self._rest.clear()
        ref.set_failed(errno.EMSGSIZE, f"a line of more than {limit_bytes} bytes")
        return True

    def idle(self) -> bool:
        """Whether no part of a line is kept."""
        return not self._rest

    def messages(self) -> int:
        """How many lines were handed on."""
        return self._messages

    def movable(self) -> bool:
        """Always between two lines."""
        return not self._rest

    def moved(self, sid: int) -> None:
        """Nothing is kept of it."""

    def end(self, sid: int) -> None:
        """Nothing is kept of it."""
