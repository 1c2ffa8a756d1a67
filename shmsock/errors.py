"""What can go wrong, and what the caller should do about it.

    ShmsockError
    ├── FormatError             the segment is not ours, or of another layout: nothing was touched
    ├── RuntimeNotFoundError    no runtime of that name: start one
    ├── AlreadyRunningError     a runtime of that name is alive: attach to it, or take another name
    │   └── HostLostError       it is alive but its host has died: Runtime.take_over
    ├── TableFullError          no free slot or process row: raise the option it names
    ├── StripeTimeoutError      a live process sits on a stripe (also a TimeoutError)
    ├── SocketFailedError       the socket has failed; carries the winner's code and text
    ├── OverCrowdedError        the peer reads too slowly: too much is queued for it here
    ├── DescriptorError         the socket is alive but its descriptor could not be had
    ├── ClosedError             this process has left the runtime, or was taken for dead
    ├── PoolProcessDiedError    a pool process died with the job: submit it again, if it may be
    ├── OwnershipError          the socket cannot be lent to the job: its owner has not got it idle
    └── PoisonedError           the segment failed its audit: start a new runtime

A stale SocketId is none of these: ``address`` returns None. The kernel's refusals stay OSError.
"""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    import socket

import os
import signal as _signal


class ShmsockError(Exception):
    """Base of everything shmsock raises itself."""


class FormatError(ShmsockError):
    """The segment is foreign, truncated or of another layout; the message names the field."""


class RuntimeNotFoundError(ShmsockError):
    """No runtime of that name exists on this machine."""


class InTransitionError(RuntimeNotFoundError):
    """It is just being created, replaced or removed: ``attach`` tries again for a second."""


class AlreadyRunningError(ShmsockError):
    """A runtime of that name is alive; the message names its processes."""


class HostLostError(AlreadyRunningError):
    """The runtime is alive but its host has died: ``Runtime.take_over`` makes this process it."""


class TableFullError(ShmsockError):
    """No free slot, or no free process row; the message names the option to raise.

    Attributes:
        sock: From ``Runtime.accept``: the connection that found no slot, yours to turn away.
    """

    sock: socket.socket | None = None


class StripeTimeoutError(ShmsockError, TimeoutError):
    """A stripe could not be taken; the message names stripe, process, claim and how long."""


class SocketFailedError(ShmsockError):
    """The socket has failed: drop the reference.

    Attributes:
        code: The errno that ``set_failed`` was given.
        text: Its text.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text

    def __str__(self) -> str:
        name = os.strerror(self.code) if self.code else "closed"
        return f"{self.text or name} (error {self.code})"


class OverCrowdedError(ShmsockError):
    """More than ``max_unwritten_bytes`` wait here for this peer; nothing of the message is sent.

    Wait with ``wait_writable``, or give the client up with ``set_failed``.
    """


class DescriptorError(ShmsockError):
    """Neither the host nor, while there is none, another process gave the descriptor: try again."""


class ClosedError(ShmsockError):
    """This process is not (or no longer) a participant: attach anew."""


class PoisonedError(ShmsockError):
    """The segment failed an audit beyond repair; the supervisor must start a new one."""


class PoolProcessDiedError(ShmsockError):
    """The pool process that ran the job died; how much of the job was done is not known.

    The other jobs and the pool are not touched.

    Attributes:
        pid: The process.
        signal: The signal that killed it, or 0.
        exit_status: What it exited with, or 0 if a signal killed it.
    """

    def __init__(self, pid: int, signal: int, exit_status: int) -> None:
        super().__init__(pid, signal, exit_status)
        self.pid = pid
        self.signal = signal
        self.exit_status = exit_status

    def __str__(self) -> str:
        if not self.signal:
            return f"pool process {self.pid} exited with status {self.exit_status}"
        name = _signal.strsignal(self.signal)
        return f"pool process {self.pid} was killed by signal {self.signal} ({name})"


class OwnershipError(ShmsockError):
    """A job was to own its client's socket, and its owner could not lend it; the message says why.

    Submit from the process that owns the socket, between two messages.
    """
