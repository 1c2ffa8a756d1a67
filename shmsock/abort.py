"""A job that dies with its client: SocketFailedError raised in a running block of code.

One watcher thread a process, while any block is open, polls their descriptors for the end of the
connection and reads their versions. It interrupts the block's thread: the main thread by a signal,
whose handler raises, so also out of a sleep or a blocking call; others by
``PyThreadState_SetAsyncExc``, at their next bytecode. It does so again and again until the block
has raised: a signal that came just before a blocking call would else be lost.

    INVARIANT: who raises is always the block's own thread, which alone opens and closes its blocks:
               once ``__exit__`` runs nothing is raised any more.

SIGURG is used because nobody does, and because the kernel ignores one that comes late.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import sys
import threading
import types
import typing

from .errors import DescriptorError, SocketFailedError
from .runtime import Runtime, current
from .socket import SocketRef
from .writing import Writers

ABORT_SIGNAL = signal.SIGURG
_LOOK_S = 0.1  # where the kernel does not tell: no descriptor, or a winner killed before the end
_AGAIN_S = 0.5e-3, 10e-3  # between two interruptions, or two looks at a hang-up without failure

_lock = threading.Lock()  # the watcher and what it watches
_watcher: _Watcher | None = None


class _State(threading.local):
    """A thread's open blocks, innermost last; ``masked`` while they are opened or closed."""

    def __init__(self) -> None:
        self.open: list[abort_when_failed] = []
        self.masked = False
        self.previous: typing.Any = None  # the signal's handler before ours
        self.installed = False
        self.blocked = False

    def failed(self) -> abort_when_failed | None:
        """The outermost open block whose client has gone."""
        return next((block for block in self.open if block.failed), None)


_state = _State()


class AsyncAbort(SocketFailedError):
    """What is raised in another thread than the main one: the interpreter makes it, without a word.

    It pickles as a plain SocketFailedError.
    """

    def __init__(self) -> None:
        """Made in the interrupted thread, at the place of interruption."""
        code, text = errno.ENOTCONN, "the socket is gone"
        # Closing blocks are closed by themselves, and hear of it there.
        if not _state.masked and (block := _state.failed()) is not None:
            code, text = block.end()
        super().__init__(code, text)

    def __reduce__(self) -> tuple[typing.Any, ...]:
        """As its base."""
        return SocketFailedError, (self.code, self.text)


class abort_when_failed:
    """Raise SocketFailedError in the block as soon as the socket fails: its client has gone.

    In a process's main thread it comes out of a sleep or a blocking call at once, and between two
    calls of numpy; in another thread at the next bytecode. It is raised once; a block that catches
    it goes on undisturbed. Blocks nest: the failure of an outer socket ends the inner blocks too.
    An exception of the block itself is not replaced, and nothing is raised after the block: one
    that ends before it is interrupted just ends.

        with abort_when_failed(sid) as ref:
            ref.write(compute())

    Args:
        sid: The client's id.
        runtime: By default ``shmsock.current()``.

    Raises:
        SocketFailedError: On entry, if the socket has failed or is gone.
        RuntimeNotFoundError: This process has attached none.

    Concurrency: any thread may open blocks; each block is opened and closed by one thread. A write
        of the main thread is never cut; in another thread an interrupted write ends its socket.
        In another thread, an abort that is under way when the block ends by an exception of its
        own may carry that one as its context instead.
    If killed: the reference it holds is given back by whoever reaps.
    """

    def __init__(self, sid: int, runtime: Runtime | None = None) -> None:
        """Nothing is watched yet."""
        self._sid = int(sid)
        self._runtime = runtime
        self._reference: SocketRef | None = None
        self._watcher: _Watcher | None = None
        self.fd = -1
        self.ident = 0
        self.by_signal = False
        self.hung_up = False
        self.depth = 0  # calls of this package around the block
        self.again_s = _AGAIN_S[0]

    @property
    def failed(self) -> bool:
        """Whether the client has gone, while the block is open."""
        return self._reference is not None and self._reference.failed

    def __enter__(self) -> SocketRef:
        """A reference to the client, held as long as the block lasts."""
        runtime = self._runtime if self._runtime is not None else current()
        reference = runtime.address(self._sid)
        if reference is None:
            raise SocketFailedError(*_error_of(runtime, self._sid))
        self._reference = reference
        try:
            with contextlib.suppress(DescriptorError):  # then we look now and again
                self.fd = reference.fileno()
            self._open()
            if reference.failed:
                raise SocketFailedError(*reference.error)
        except BaseException:
            self._close()
            raise
        return reference

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        """The block is over: nothing is raised any more."""
        try:
            self._close()
        except AsyncAbort:  # sent before, raised now: too late. Once only: we are masked.
            self._close()

    def end(self) -> tuple[int, str]:
        """Raise no more: the client has gone, and this is being said. Its code and text.

        Runs wherever the thread was interrupted, which may have any lock: the rest is for
        ``__exit__``, or for whoever collects us if that is not called.
        """
        assert self._reference is not None
        error = self._reference.error
        _state.open.remove(self)
        self._forget()
        return error

    def _open(self) -> None:
        global _watcher
        state = _state
        try:
            state.masked = True
            self.ident = threading.get_ident()
            self.depth = _depth(sys._getframe(2))
            if threading.current_thread() is threading.main_thread():
                self.by_signal = _install(state)
            state.open.append(self)
            with _lock:
                if _watcher is None:
                    _watcher = self._watcher = _Watcher(self, state.__dict__)
                else:
                    self._watcher = _watcher
                    self._watcher.blocks.append((self, state.__dict__))
                    self._watcher.wake()
        finally:
            state.masked = False

    def _close(self) -> None:
        """Undo ``_open``, as often as it is called."""
        state = _state
        try:
            state.masked = True
            if self in state.open:
                state.open.remove(self)
            over = self._forget()
            if self._watcher is not None and not self.by_signal:
                # What was sent and not raised; an outer block's is sent again.
                _set_async(self.ident, None)
            if over is not None:
                over.join()
            self._watcher = None
            if state.installed and not state.open:
                _uninstall(state)
            reference, self._reference = self._reference, None
            if reference is not None:
                reference.close()
        finally:
            state.masked = False

    def _forget(self) -> threading.Thread | None:
        """Be watched no more; the watcher's thread, if it ends therefore."""
        global _watcher
        watcher = self._watcher
        if watcher is None:
            return None
        with _lock:
            # INVARIANT: a watcher that watches nothing is never used again.
            watcher.blocks[:] = [pair for pair in watcher.blocks if pair[0] is not self]
            if watcher.blocks:
                return None
            if _watcher is watcher:
                _watcher = None
            watcher.wake()
        return watcher.thread


class _Watcher:
    """The thread that waits for clients to go; ends with the last block."""

    def __init__(self, first: abort_when_failed, state: dict[str, typing.Any]) -> None:
        # Each with its thread's state: a threading.local tells other threads nothing.
        self.blocks = [(first, state)]
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.thread = threading.Thread(target=self._run, name="shmsock-abort", daemon=True)
        try:
            self.thread.start()
        except BaseException:
            self.forget()
            raise

    def wake(self) -> None:
        """Have it look at what it watches; under the lock."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def forget(self) -> None:
        """Close its number; under the lock, or alone."""
        fd, self._wake_fd = self._wake_fd, -1
        if fd >= 0:
            os.close(fd)

    def _run(self) -> None:
        # A signal taken here would not end a wait of the main thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            watched = []
            poller = select.poll()
            poller.register(self._wake_fd, select.POLLIN)
            wait_s = _LOOK_S
            with _lock:
                if not self.blocks:
                    self.forget()
                    return
                for block, state in self.blocks:
                    if block.failed:
                        _interrupt(block, state)
                    elif block.fd < 0:
                        continue
                    elif not block.hung_up:
                        poller.register(block.fd, 0)  # POLLHUP and POLLERR
                        watched.append(block)
                        continue
                    # Failed: until it has raised. Hung up: its owner is about to fail it.
                    wait_s = min(wait_s, block.again_s)
                    block.again_s = min(2 * block.again_s, _AGAIN_S[1])
            happened = {fd for fd, _ in poller.poll(wait_s * 1000)}
            for block in watched:
                block.hung_up = block.fd in happened
            if self._wake_fd in happened:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)


def _interrupt(block: abort_when_failed, state: dict[str, typing.Any]) -> None:
    """Have the block's thread raise; under the lock, so that the block is open."""
    if state["masked"]:
        return
    if block.by_signal:
        signal.pthread_kill(block.ident, ABORT_SIGNAL)
    elif not _is_busy(sys._current_frames().get(block.ident), block.depth):
        _set_async(block.ident, AsyncAbort)


def _set_async(ident: int, error: type[AsyncAbort] | None) -> None:
    # A null pointer takes back what was sent and not raised yet.
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


def _depth(frame: types.FrameType | None) -> int:
    """How many calls of this package a thread is in."""
    depth = 0
    while frame is not None:
        depth += frame.f_code.co_filename.startswith(_PACKAGE)
        frame = frame.f_back
    return depth


def _is_busy(frame: types.FrameType | None, depth: int) -> bool:
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
                return _depth(frame) > depth
            inside = True
        frame = frame.f_back
    return False


def _on_signal(number: int, frame: types.FrameType | None) -> None:
    state = _state
    if state.masked:
        return
    block = state.failed()
    if block is not None:
        if not _is_busy(frame, block.depth):  # else it is sent again
            raise SocketFailedError(*block.end())
    elif callable(state.previous):
        state.previous(number, frame)


def _install(state: _State) -> bool:
    """Have the signal raise, in the main thread; false if the old handler is not Python's."""
    if not state.installed:
        state.previous = signal.getsignal(ABORT_SIGNAL)
        if state.previous is None:
            return False
        state.installed = True  # first: undone twice does no harm
        signal.signal(ABORT_SIGNAL, _on_signal)
        before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {ABORT_SIGNAL})
        state.blocked = ABORT_SIGNAL in before
    return True


def _uninstall(state: _State) -> None:
    # A system call, so that one sent a moment ago comes now, to our handler: the next one might
    # already let it through to the old handler.
    signal.sigpending()
    if state.blocked:
        signal.pthread_sigmask(signal.SIG_BLOCK, {ABORT_SIGNAL})
    signal.signal(ABORT_SIGNAL, state.previous)
    state.installed, state.previous = False, None


def _error_of(runtime: Runtime, sid: int) -> tuple[int, str]:
    reference = runtime.address_failed_as_well(sid)
    if reference is None:
        return errno.ENOTCONN, "the socket is gone"
    with reference:
        return reference.error


def _forked() -> None:
    """In a forked child: the parent's blocks are not its own."""
    global _lock, _watcher
    _lock = threading.Lock()
    watcher, _watcher = _watcher, None
    if watcher is not None:
        watcher.forget()
        watcher.blocks.clear()
    for block in _state.open:
        block._watcher = block._reference = None
    _state.open.clear()
    _state.masked = False
    if _state.installed and threading.current_thread() is threading.main_thread():
        _uninstall(_state)


os.register_at_fork(after_in_child=_forked)
