"""A job that dies with its client: SocketFailedError raised in a running block of code.

One watcher thread a process, while any block is open, polls their descriptors for the end of the
connection and reads their versions. It interrupts the block's thread: the main thread by a signal,
whose handler raises, so also out of a sleep or a blocking call; others by
``PyThreadState_SetAsyncExc``, at their next bytecode. A signal is sent again and again until the
block has raised: one that came just before a blocking call would else be lost.

What is sent to another thread is raised wherever that thread is by then: abort_window.py has the
handshake.

SIGURG is used because nobody does, and because the kernel ignores one that comes late.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import threading
import types
import typing
import weakref

from .abort_window import WATCHER, ThreadState, depth_of, is_busy, is_lost, set_async
from .errors import DescriptorError, SocketFailedError
from .layout import SLOT_MASK
from .runtime import Runtime, current
from .socket import SocketRef

ABORT_SIGNAL = signal.SIGURG
_LOOK_S = 0.1  # where the kernel does not tell: no descriptor, or a winner killed before the end
_AGAIN_S = 0.5e-3, 10e-3  # between two interruptions, or two looks at a hang-up without failure

_lock = threading.Lock()  # the watcher and what it watches; never waited for with a window open
_watcher: _Watcher | None = None


class _Local(threading.local):
    def __init__(self) -> None:
        self.thread = ThreadState()


_local = _Local()


class AsyncAbort(SocketFailedError):
    """What is raised in another thread than the main one: the interpreter makes it, without a word.

    It pickles as a plain SocketFailedError.
    """

    def __init__(self) -> None:
        """Made in the interrupted thread, at the place of interruption.

        That thread may have any lock: nothing here may wait.
        """
        thread, frame = _local.thread, sys._getframe(1)
        code, text = errno.ENOTCONN, "the socket is gone"
        self._block: weakref.ref[abort_when_failed] | None = None
        if (block := thread.sent) is not None:
            self._block = weakref.ref(block)
            code, text = block.say()
            block.said = not is_lost(frame)
        super().__init__(code, text)
        if frame.f_code is _EXIT and isinstance(ending := frame.f_locals.get("self"), _BLOCK):
            # Perhaps before its first line, so that it would never close: it is closed here. On
            # 3.11 we are made in the next handler, and it ends when its frame is dropped.
            thread.take_surely()  # ORDER: before the next one can be sent
            ending._close(thread)
            thread.give()
        thread.sent = None  # last: another one may come from here on

    def take_back(self) -> None:
        """It was caught where it should not have come."""
        if self._block is not None and (block := self._block()) is not None:
            block.said = False

    def __reduce__(self) -> tuple[typing.Any, ...]:
        """As its base."""
        return SocketFailedError, (self.code, self.text)


class abort_when_failed:
    """Raise SocketFailedError in the block as soon as the socket fails: its client has gone.

    In a process's main thread it comes out of a sleep or a blocking call at once, and between two
    calls of numpy; in another thread at the next bytecode. It is raised once; a block that catches
    it goes on undisturbed. Blocks nest: the failure of an outer socket ends the inner blocks too.
    An exception of the block itself is not replaced, and nothing is raised after the block: one
    that ends before it is interrupted just ends. The last block's end restores the signal handler;
    the watching thread ends a tenth of a second later.

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
        self.fd = -1
        self.said = False
        self.hung_up = False
        self.depth = 0  # calls of this package around the block
        self.again_s = _AGAIN_S[0]

    @property
    def failed(self) -> bool:
        """Whether the client has gone, while the block is open."""
        reference = self._reference
        return reference is not None and reference.failed

    def __enter__(self) -> SocketRef:
        """A reference to the client, held as long as the block lasts."""
        runtime = self._runtime if self._runtime is not None else current()
        reference = runtime.address(self._sid)
        if reference is None:
            raise SocketFailedError(*error_of(runtime, self._sid))
        self._reference = reference
        thread = _local.thread
        try:
            with contextlib.suppress(DescriptorError):  # then we look now and again
                self.fd = reference.fileno()
            self.depth = depth_of(sys._getframe(1))
            self._open(thread)
            if reference.failed:
                raise SocketFailedError(*self.say())
            thread.give()
            return reference
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        """The block is over: nothing is raised any more."""
        thread = _local.thread
        while True:
            try:
                thread.shut()
                break
            except AsyncAbort as abort:  # too late for us; an outer block's is sent again
                abort.take_back()
        self._close(thread)
        if thread.blocks:
            thread.give()

    def say(self) -> tuple[int, str]:
        """It is being raised: raise no more. Code and text of the failure."""
        self.said = True
        reference = self._reference
        return reference.error if reference is not None else (errno.ENOTCONN, "the socket is gone")

    def _open(self, thread: ThreadState) -> None:
        """Be watched, with the window in this thread's hands from here on."""
        while True:
            try:
                thread.shut()
                break
            except AsyncAbort as abort:  # an outer block's: sent again
                abort.take_back()
        if not thread.blocks:
            thread.by_signal = thread.thread is threading.main_thread() and _install(thread)
        thread.blocks.append(weakref.ref(self))
        _watch(self, thread)

    def _close(self, thread: ThreadState) -> None:
        """Undo ``_open``, as often as it is called, with nothing under way to this thread."""
        _forget(self)
        thread.remove(self)
        if not thread.blocks and thread.installed:
            _uninstall(thread)
        reference, self._reference = self._reference, None
        if reference is not None:
            reference.close()


_BLOCK, _EXIT = abort_when_failed, abort_when_failed.__exit__.__code__


def _watch(block: abort_when_failed, thread: ThreadState) -> None:
    """Have the watcher look at a block; it is started if need be."""
    global _watcher
    with _lock:
        if _watcher is None:
            watcher = _Watcher()
            watcher.start()
            _watcher = watcher
        _watcher.add(block, thread)


def _forget(block: abort_when_failed) -> None:
    """Be watched no more."""
    with _lock:
        if _watcher is not None:
            _watcher.drop(lambda pair: pair.block() in (None, block))


class _Pair(typing.NamedTuple):
    """A block and its thread: what is local to a thread others cannot see."""

    block: weakref.ref[abort_when_failed]
    thread: ThreadState
    fd: int


class _Watcher:
    """The thread that waits for clients to go; ends when it has had nothing to watch for a while.

    Who opens a block puts its number into the epoll, and nobody is woken: a short job costs little.

    INVARIANT: one that ends is nobody's ``_watcher`` any more.
    INVARIANT: all but the waiting is under the lock.
    """

    def __init__(self) -> None:
        self.pairs: list[_Pair] = []
        self._epoll = select.epoll()
        self.thread = threading.Thread(target=self._run, name="shmsock-abort", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        try:
            self.thread.start()
        except BaseException:
            if not self.thread.is_alive():
                self.forget()
            raise

    def forget(self) -> None:
        """Close its number."""
        self._epoll.close()

    def add(self, block: abort_when_failed, thread: ThreadState) -> None:
        """Watch a block."""
        self.pairs.append(_Pair(weakref.ref(block), thread, block.fd))
        if block.fd >= 0:
            with contextlib.suppress(FileExistsError):  # of another block's
                self._epoll.register(block.fd, 0)  # EPOLLHUP and EPOLLERR

    def drop(self, is_over: typing.Callable[[_Pair], bool]) -> None:
        """Watch some no more; before their numbers are closed."""
        over = [pair for pair in self.pairs if is_over(pair)]
        self.pairs[:] = [pair for pair in self.pairs if pair not in over]
        left = {pair.fd for pair in self.pairs}
        for fd in {pair.fd for pair in over} - left - {-1}:
            with contextlib.suppress(OSError, ValueError):  # it had hung up
                self._epoll.unregister(fd)

    def _run(self) -> None:
        # A signal taken here would not end a wait of the main thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        idle = False
        happened: list[tuple[int, int]] = []
        while True:
            with _lock:
                for fd, _ in happened:
                    self._hung_up(fd)
                if idle and not self.pairs:
                    return self._end()
                idle = not self.pairs
                wait_s = self._look()
                epoll = self._epoll
            happened = epoll.poll(wait_s)

    def _end(self) -> None:
        global _watcher
        if _watcher is self:
            _watcher = None
        self.forget()

    def _hung_up(self, fd: int) -> None:
        """A connection is over: from here on its blocks are looked at by time."""
        for pair in self.pairs:
            if pair.fd == fd and (block := pair.block()) is not None:
                block.hung_up = True
        try:
            self._epoll.unregister(fd)
        except OSError:
            # A block that was dropped without being closed: its number is closed by now, and would
            # be reported for ever.
            self._epoll.close()
            self._epoll = select.epoll()
            for pair in self.pairs:
                if pair.fd >= 0 and (block := pair.block()) is not None and not block.hung_up:
                    with contextlib.suppress(OSError):
                        self._epoll.register(pair.fd, 0)

    def _look(self) -> float:
        """Interrupt where the client has gone; when to look again."""
        self.drop(lambda pair: pair.block() is None or not pair.thread.thread.is_alive())
        wait_s = _LOOK_S
        for pair in self.pairs:
            block = pair.block()
            if block is None or block.said or not (block.failed or block.hung_up):
                continue
            # Failed: until it has raised. Hung up: its owner is about to fail it.
            if block.failed:
                _interrupt(block, pair.thread)
            wait_s = min(wait_s, block.again_s)
            block.again_s = min(2 * block.again_s, _AGAIN_S[1])
        return wait_s


def _interrupt(block: abort_when_failed, thread: ThreadState) -> None:
    """Have the block's thread raise; under the lock, so that the block is open."""
    if thread.by_signal:
        signal.pthread_kill(thread.ident, ABORT_SIGNAL)
    elif thread.take(WATCHER):
        try:
            frame = sys._current_frames().get(thread.ident)
            if thread.sent is None and not block.said and not is_busy(frame, block.depth):
                thread.sent = block
                set_async(thread.ident, AsyncAbort)
        finally:
            thread.give()


def _on_signal(number: int, frame: types.FrameType | None) -> None:
    thread = _local.thread
    block = thread.failed()
    if block is None:
        if callable(thread.previous):
            thread.previous(number, frame)
    elif not thread.window and not is_busy(frame, block.depth):  # else it is sent again
        raise SocketFailedError(*block.say())


def _install(thread: ThreadState) -> bool:
    """Have the signal raise, in the main thread; false if the old handler is not Python's."""
    thread.previous = signal.getsignal(ABORT_SIGNAL)
    if thread.previous is None:
        return False
    thread.installed = True  # first: undone twice does no harm
    signal.signal(ABORT_SIGNAL, _on_signal)
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {ABORT_SIGNAL})
    thread.blocked = ABORT_SIGNAL in before
    return True


def _uninstall(thread: ThreadState) -> None:
    # A system call, so that one sent a moment ago comes now, to our handler: the next one might
    # already let it through to the old handler.
    signal.sigpending()
    if thread.blocked:
        signal.pthread_sigmask(signal.SIG_BLOCK, {ABORT_SIGNAL})
    signal.signal(ABORT_SIGNAL, thread.previous)
    thread.installed, thread.previous = False, None


def error_of(runtime: Runtime, sid: int) -> tuple[int, str]:
    """Why a socket is of no use any more, as far as that is known."""
    if sid & SLOT_MASK < runtime.slots:
        return runtime._io.error_of(sid)
    return errno.ENOTCONN, "the socket is gone"


def _forked() -> None:
    """In a forked child: the parent's blocks are not its own."""
    global _lock, _watcher
    thread = _local.thread
    if thread.sent is not None:
        set_async(thread.ident, None)
        thread.sent = None
    _lock = threading.Lock()
    watcher, _watcher = _watcher, None
    if watcher is not None:
        watcher.forget()
    for each in thread.blocks:
        if (block := each()) is not None:
            block._reference = None
    thread.blocks.clear()
    thread.window.clear()
    if thread.installed and threading.current_thread() is threading.main_thread():
        _uninstall(thread)
    _local.thread = ThreadState()


os.register_at_fork(after_in_child=_forked)
