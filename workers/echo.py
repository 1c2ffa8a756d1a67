"""The smallest application: every line comes back. ``shmsock serve workers.echo:app``."""

from __future__ import annotations

import typing

from .application import Application

if typing.TYPE_CHECKING:
    from shmsock import SocketRef


class Echo(Application):
    """Answers each line with itself; ``quit`` closes."""

    def on_message(self, ref: SocketRef, message: bytes) -> bool | None:
        """Write the line back as one message, whichever process else writes to this client."""
        ref.write(message, b"\r\n")
        return message != b"quit"


app = Echo
