"""What a worker speaks: the two shapes that a wire protocol gives to the messenger.

The messenger owns reading and closing; a protocol owns the meaning of the bytes. Neither knows the
other's insides, so RESP and HTTP share one port, and a third protocol is one more file.
"""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    from shmsock import SocketRef


class Session(typing.Protocol):
    """One connection, in the process that owns it, once its protocol is known."""

    def receive(self, ref: SocketRef, data: bytes) -> bool:
        """Take what was read, handle every whole message in it, keep the partial rest.

        Answers leave through ``ref.write``: one write a call, so that the answers to a pipelined
        batch leave together.

        Args:
            ref: The connection, held by the caller for the length of this call.
            data: The next bytes of the stream, at least one.

        Returns:
            False to close gracefully once everything written is out.

        Raises:
            SocketFailedError, OverCrowdedError: from writing to this client; the messenger fails
                the connection.
        """

    def idle(self) -> bool:
        """Whether no part of a message is buffered."""

    def messages(self) -> int:
        """How many whole messages were handled since the connection was opened."""

    def movable(self) -> bool:
        """Whether another worker may go on from the user data alone, the connection being idle."""

    def peer_ended(self, ref: SocketRef) -> None:
        """The peer will send no more; what is written still goes out, and then it is closed."""

    def moved(self, sid: int) -> None:
        """Forget the connection: another worker has it, and may be at it already."""

    def end(self, sid: int) -> None:
        """Forget the connection: it has ended, for whatever reason, and addresses no more."""


class Protocol(typing.Protocol):
    """One wire protocol."""

    name: str

    def match(self, head: bytes) -> bool | None:
        """Whether a connection that starts with ``head`` speaks this; None: more bytes needed."""

    def resumes(self, user_data: bytes) -> bool:
        """Whether a connection with this user data spoke this protocol with its last owner."""

    def open(self, ref: SocketRef) -> Session:
        """Start a session on a connection that matched; called once a connection."""
