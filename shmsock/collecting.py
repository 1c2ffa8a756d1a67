"""Small messages of one turn of the event loop leave together, at its end.

The Python engine's half; the C engine does the same inside (_collecting.h, which says what must
hold). A message is kept under its socket's id, with a reference, until the turn ends or something
wants it sent: an ``unwritten_bytes``, a ``flush``, a ``set_failed``, a longer message, or the owner
who says that it is not ``busy`` any more.
"""

from __future__ import annotations

import collections.abc
import threading
import typing

from .engine import Reference

Take = collections.abc.Callable[[Reference, collections.abc.Sequence[bytes]], None]

# As in _collecting.h.
MESSAGES, MESSAGE_BYTES, ROOM_BYTES = 64, 4096, 65536


class Turns(typing.Protocol):
    """What either engine offers."""

    def begin_turn(self) -> None:
        """From here on keep what this thread writes."""

    def end_turn(self) -> None:
        """Send it all."""

    def send_collected(self, sid: int) -> None:
        """Send what is kept of a socket."""

    def send_all_collected(self) -> None:
        """Send what is kept; the turn goes on."""


class Turn:
    """One turn of the loop, with ``with``."""

    def __init__(self, turns: Turns) -> None:
        """Begun and ended any number of times."""
        self._turns = turns

    def __enter__(self) -> None:
        """Begin."""
        self._turns.begin_turn()

    def __exit__(self, *_: object) -> None:
        """End, whatever happened in it."""
        self._turns.end_turn()


class _Kept:
    """One socket's messages."""

    __slots__ = ("bytes", "messages", "reference")

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.messages: list[bytes] = []
        self.bytes = 0


class Collector:
    """What is written in a turn of the loop by the thread that is at it."""

    def __init__(self, take: Take) -> None:
        """``take`` queues messages of a socket and sends what can be sent of them."""
        self._take = take
        self._thread = 0
        self._kept: dict[int, _Kept] = {}

    def begin_turn(self) -> None:
        """From here on keep what this thread writes."""
        self._thread = threading.get_ident()

    def end_turn(self) -> None:
        """Send it all; who is interrupted leaves the others to the next turn, or the timer."""
        self._thread = 0
        self.send_all_collected()

    @property
    def idle(self) -> bool:
        """Whether there is no turn, and nothing is kept."""
        return not self._thread and not self._kept

    def takes(self, sid: int, size: int) -> bool:
        """Whether a message may be kept; if not, what came before it is on its way."""
        if self._thread != threading.get_ident() or size > MESSAGE_BYTES:
            self.send_collected(sid)
            return False
        kept = self._kept.get(sid)
        if kept is not None and (len(kept.messages) == MESSAGES or kept.bytes + size > ROOM_BYTES):
            self.send_collected(sid)
        return True

    def collect(self, reference: Reference, message: bytes) -> None:
        """Keep a message that may be kept."""
        kept = self._kept.get(reference.id)
        if kept is None:
            kept = self._kept[reference.id] = _Kept(reference.add_reference())
        kept.messages.append(message)
        kept.bytes += len(message)

    def send_collected(self, sid: int) -> None:
        """Send what is kept of a socket."""
        kept = self._kept.pop(sid, None)
        if kept is not None:
            with kept.reference:
                self._take(kept.reference, kept.messages)

    def send_all_collected(self) -> None:
        """Send what is kept; the turn goes on."""
        for sid in list(self._kept):
            self.send_collected(sid)
