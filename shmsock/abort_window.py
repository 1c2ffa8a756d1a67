"""Into which moment of a thread an exception may come: its window, and where it should not be.

``PyThreadState_SetAsyncExc`` raises in another thread wherever that one is by then. Each thread has
a window:

    watcher   takes the window, looks, sends, gives it back
    thread    takes the window, takes back what was sent, opens or closes a block, gives it back

    INVARIANT: with the window in a thread's hands nothing is on its way to it.
    INVARIANT: to one thread at most one exception is under way.

Taking the window is one atomic step that does no harm when repeated, so the thread repeats all of
it until no exception has come between. Nobody joins a thread, or waits for a lock, with its window
open.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import types
import typing
import weakref

from .errors import SocketFailedError
from .socket import SocketRef
from .writing import Writers

if typing.TYPE_CHECKING:
    from .abort import abort_when_failed

WATCHER, OWNER = "watcher", "thread"


class ThreadState:
    """A thread's open blocks and its window."""

    def __init__(self) -> None:
        self.ident = threading.get_ident()
        self.thread = threading.current_thread()
        # Innermost last. Weak: one whose ``__exit__`` could not begin ends with its statement.
        self.blocks: list[weakref.ref[abort_when_failed]] = []
        self.window: dict[str, str] = {}  # "of": whose it is; empty while it is open
        self.sent: abort_when_failed | None = None  # what is under way is about this block
        self.by_signal = False
        self.previous: typing.Any = None  # the signal's handler before ours
        self.installed = self.blocked = False

    def take(self, who: str) -> bool:
        """Take the window; whether it is ours. One step, and again says the same."""
        return self.window.setdefault("of", who) is who

    def take_surely(self) -> None:
        """Take the window for the thread itself; the watcher has it for a moment at most."""
        while not self.take(OWNER):
            time.sleep(0)

    def shut(self) -> None:
        """Take the window, and take back what is under way; again after an AsyncAbort in it."""
        self.take_surely()
        if self.sent is not None:
            set_async(self.ident, None)
            self.sent = None

    def give(self) -> None:
        """Open the window."""
        self.window.pop("of", None)

    def failed(self) -> abort_when_failed | None:
        """The outermost open block whose client has gone and that has not raised."""
        blocks = (reference() for reference in self.blocks)
        return next((b for b in blocks if b is not None and b.failed and not b.said), None)

    def remove(self, block: abort_when_failed) -> None:
        """It is open no more."""
        self.blocks[:] = [each for each in self.blocks if each() not in (None, block)]


def set_async(ident: int, error: type[SocketFailedError] | None) -> None:
    """Have a thread raise at its next bytecode; None takes back what it has not raised yet."""
    what = ctypes.py_object(error) if error is not None else ctypes.c_void_p()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), what)


_PACKAGE = os.path.dirname(__file__) + os.sep
# Where a thread waits, and has no lock.
_WAITING = {
    function.__code__
    for function in (SocketRef.flush, SocketRef.wait_writable, Writers._wait, Writers._poll)
}
_BEGINNING = 2  # bytes of bytecode: nothing but RESUME
_ENDS = {"__exit__", "close", "__del__"}  # not to be left out


def depth_of(frame: types.FrameType | None) -> int:
    """How many calls of this package a thread is in."""
    depth = 0
    while frame is not None:
        depth += frame.f_code.co_filename.startswith(_PACKAGE)
        frame = frame.f_back
    return depth


def is_busy(frame: types.FrameType | None, depth: int) -> bool:
    """Whether a thread is where it should not be interrupted: it will be somewhere else soon.

    That is inside this package, where it may have a lock, or be in the middle of another client's
    message; and in a finaliser, where what is raised is lost.
    """
    inside = False
    if frame is not None and frame.f_lasti <= _BEGINNING and frame.f_code.co_name not in _ENDS:
        # It has only just been called. WHY NOT later: a loop of numpy and ``ref.failed`` looks for
        # signals nowhere else.
        frame = frame.f_back
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__":
            return True
        if not inside and code.co_filename.startswith(_PACKAGE):
            if code not in _WAITING:
                return depth_of(frame) > depth
            inside = True
        frame = frame.f_back
    return False


def is_lost(frame: types.FrameType | None) -> bool:
    """Whether what is raised there only gets a line in the log."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
