"""Who takes part: process rows, and the kernel's proof that a process lives.

Each participant holds a POSIX ``fcntl`` write lock on byte 64 + index of the runtime's lock file.
The kernel drops it after the last instruction of the last thread, even while the process is still a
zombie; a forked child does not inherit it; reused pids and pid namespaces cannot confuse it. So
"the byte is free" means: no store of that process can come later. Everything recovery does rests on
that one sentence, and never on a pid.

    byte 0        the arbiter: who holds it may repair          byte 2   the host's
    byte 1        read-locked by every participant              byte 3   registration
    byte 64 + i   process row i is alive

Traps, each seen to spring:

* Any open and close of that file in the process drops every lock: one LockFile a process and inode,
  its descriptor high where ``closerange`` seldom reaches, re-asserted by a timer.
* Threads share the locks: a local mutex goes with each byte that excludes.
* F_GETLK never reports one's own lock: what we hold ourselves is remembered here.
* The inode may have been unlinked while we waited: compare with the path after locking.
* Foreign code may have closed our number and reused it: of another file every byte is free, and
  everybody would look dead. So nothing the kernel says counts before the number is seen to be ours.
"""

from __future__ import annotations

import collections.abc
import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import threading
import time
import weakref

from .errors import AlreadyRunningError, ClosedError, RuntimeNotFoundError, TableFullError
from .layout import FREE, LIVE, REAPING, ROLES
from .segment import Segment, run_directory

ARBITER, ATTACHED, HOST, REGISTRATION, FIRST_ROW = 0, 1, 2, 3, 64

# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid, padding.
_FLOCK = struct.Struct("hhqqi4x")
_HIGH_FD = 512

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_MEMBARRIER = {"x86_64": 324, "aarch64": 283}.get(os.uname().machine)
_GLOBAL_EXPEDITED, _REGISTER_GLOBAL_EXPEDITED = 1 << 1, 1 << 2


def _membarrier(command: int) -> None:
    if _SYS_MEMBARRIER is None:
        raise OSError(errno.ENOSYS, "membarrier's number is unknown on this machine")
    if _libc.syscall(_SYS_MEMBARRIER, command, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(
            code, f"membarrier was refused ({os.strerror(code)}): shmsock cannot recover without it"
        )


def register_barrier() -> None:
    """Take part in others' barriers; before the process becomes visible. membarrier(2)."""
    _membarrier(_REGISTER_GLOBAL_EXPEDITED)


def barrier() -> None:
    """Drain the store buffers of every registered process's running threads."""
    _membarrier(_GLOBAL_EXPEDITED)


class _User:
    """A call of ``LockFile.exclusive``, which excludes our other threads as long as it exists.

    WHY NOT a lock: an exception between having it and saying so would leave it held for ever, and
    this process unable to repair. This goes with the frame of the call, however that ends.
    """

    __slots__ = ("__weakref__",)


class LockFile:
    """The lock file of one runtime, open once in this process."""

    _open: weakref.WeakValueDictionary[tuple[int, int], LockFile] = weakref.WeakValueDictionary()
    _open_lock = threading.Lock()

    def __init__(self, path: str, fd: int) -> None:
        """Called by ``open`` alone."""
        self.path = path
        self._fd = fd
        status = os.fstat(fd)
        self._inode = (status.st_dev, status.st_ino)
        self._held: set[int] = set()
        self._sharers = 0
        self._mutex = threading.Lock()
        self._users: dict[int, weakref.ref[_User]] = {}

    @classmethod
    def open(cls, name: str, *, create: bool) -> LockFile:
        """The one LockFile of this process for the runtime's current lock file.

        Raises:
            RuntimeNotFoundError: There is none and ``create`` is false.
        """
        path = f"{run_directory(name)}/lock"
        with cls._open_lock:
            # WHY NOT open first and compare afterwards: closing the second descriptor would drop
            # every lock that the first one holds.
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)
                known = cls._open.get((status.st_dev, status.st_ino))
                if known is not None and known._fd >= 0:
                    return known
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
            try:
                low = os.open(path, flags, 0o600)
            except FileNotFoundError:
                raise RuntimeNotFoundError(f"no runtime named {name!r} here") from None
            lock_file = cls(path, _move_high(low))
            cls._open[lock_file._inode] = lock_file
            return lock_file

    def is_current(self) -> bool:
        """Whether the path still names this file: it may have been unlinked while we waited."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._inode and self._is_ours()

    def _is_ours(self) -> bool:
        """Whether our number still is this file: foreign code may have closed and reused it."""
        try:
            status = os.fstat(self._fd)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._inode

    def _check_ours(self) -> None:
        if not self._is_ours():
            raise ClosedError(
                f"foreign code closed this process's {self.path}: it counts as dead, attach again"
            )

    def _set(self, byte: int, kind: int) -> bool:
        self._check_ours()
        request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETLK, request)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        self._check_ours()
        return True

    def try_hold(self, byte: int) -> bool:
        """Write-lock a byte if nobody has it, another thread of ours included."""
        with self._mutex:
            return byte not in self._held and self._hold(byte)

    def _hold(self, byte: int) -> bool:
        self._held.add(byte)  # ORDER: said before it is so, or an exception would hide it
        try:
            got = self._set(byte, fcntl.F_WRLCK)
        except BaseException:
            self._let_go(byte)
            raise
        if not got:
            self._held.discard(byte)
        return got

    def holds(self, byte: int) -> bool:
        """Whether some thread of this process has a byte, or is about to."""
        return byte in self._held

    def share(self) -> bool:
        """Read-lock the participants' byte, once more; false while a janitor is at work."""
        with self._mutex:
            if not self._set(ATTACHED, fcntl.F_RDLCK):
                return False
            self._sharers += 1
            return True

    def unshare(self) -> None:
        """Undo one ``share``; the last one closes the file, which lets every byte go."""
        with self._open_lock, self._mutex:
            self._sharers -= 1
            if self._sharers == 0:
                self._close()

    def _close(self) -> None:
        self._open.pop(self._inode, None)
        self._held.clear()
        if self._is_ours():
            os.close(self._fd)
        self._fd = -1

    def drop(self, byte: int) -> None:
        """Let a byte go."""
        with self._mutex:
            self._let_go(byte)

    def _let_go(self, byte: int) -> None:
        """ORDER: let go, then forgotten: what an exception leaves is repeated by ``reassert``."""
        with contextlib.suppress(ClosedError):
            self._set(byte, fcntl.F_UNLCK)
        self._held.discard(byte)

    def holder(self, byte: int, kind: int = fcntl.F_WRLCK) -> int:
        """The pid of who keeps us from locking a byte; our own if we do; 0 when it is free.

        A pid of another pid namespace is reported as a negative number or 0 by the kernel with a
        lock type other than F_UNLCK: it counts as held, by -1.

        Raises:
            ClosedError: Foreign code closed the file, so nothing can be told of anybody.
        """
        if byte in self._held or (byte == ATTACHED and self._sharers):
            return os.getpid()
        request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
        try:
            answer = fcntl.fcntl(self._fd, fcntl.F_GETLK, request)
        except OSError:
            self._check_ours()
            raise
        self._check_ours()  # ORDER: after; what was asked of another file's number is no answer
        found, _, _, _, pid = _FLOCK.unpack(answer)
        return 0 if found == fcntl.F_UNLCK else pid if pid > 0 else -1

    def reassert(self) -> bool:
        """Take every byte we hold once more: foreign code may have closed the file.

        Returns:
            False when one of them belongs to somebody else by now, or the file is gone from us.
        """
        for byte in (ARBITER, REGISTRATION):
            if byte in self._held:  # perhaps nobody is inside, and an exception left it
                with self.exclusive(byte, timeout_s=0):
                    pass
        with self._mutex:
            if not self._is_ours():
                return False
            try:
                mine = all(self._set(byte, fcntl.F_WRLCK) for byte in sorted(self._held))
                return mine and (not self._sharers or self._set(ATTACHED, fcntl.F_RDLCK))
            except (OSError, ClosedError):
                return False

    @contextlib.contextmanager
    def exclusive(self, byte: int, timeout_s: float) -> collections.abc.Iterator[bool]:
        """Hold a byte against processes and threads; yields whether it was had in time.

        Waits by trying again, 1 ms apart: a blocking F_SETLKW cannot be bounded.
        """
        deadline = time.monotonic() + timeout_s
        mine = _User()
        try:
            while not (got := self._enter(byte, mine)) and time.monotonic() < deadline:
                time.sleep(0.001)
            yield got
        finally:
            self._leave(byte, mine)

    def _enter(self, byte: int, mine: _User) -> bool:
        """Be the user of a byte, and hold it: also where an interrupted ``_leave`` kept it."""
        with self._mutex:
            user = self._users.get(byte)
            if user is None or user() is None:
                self._users[byte] = weakref.ref(mine)
            return self._users[byte]() is mine and self._hold(byte)

    def _leave(self, byte: int, mine: _User) -> None:
        with self._mutex:
            if byte in self._users and self._users[byte]() is mine:
                self._let_go(byte)
                del self._users[byte]

    def forget_in_child(self) -> None:
        """In a forked child: close the inherited descriptor; it holds no lock of ours."""
        if self._is_ours():
            os.close(self._fd)
        self._fd = -1

    def __del__(self) -> None:
        """Close what nobody shared."""
        if self._is_ours():
            os.close(self._fd)


def _move_high(fd: int) -> int:
    """Move a descriptor above the numbers that ``closerange`` and daemonisers sweep."""
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
    except OSError:  # EINVAL: the limit is below; EMFILE
        return fd
    os.close(fd)
    return high


def _forget_all_in_child() -> None:
    inherited = list(LockFile._open.values())
    LockFile._open = weakref.WeakValueDictionary()
    LockFile._open_lock = threading.Lock()
    for lock_file in inherited:
        lock_file.forget_in_child()


os.register_at_fork(after_in_child=_forget_all_in_child)


class Processes:
    """The process rows of one segment, seen from one process."""

    def __init__(self, segment: Segment, lock_file: LockFile) -> None:
        """Look only; ``register`` takes a row."""
        self._cells = segment.cells
        self._columns = segment.columns
        self._count = segment.layout.processes
        self._stripes = segment.layout.stripes
        self._row = -1  # ours, since register
        self.lock_file = lock_file

    def register(self, role: str) -> tuple[int, int]:
        """Take a free row, and become visible.

        Returns:
            The row's index and the epoch it now has.

        Raises:
            TableFullError: Every row is taken.
            AlreadyRunningError: Somebody else has been registering for five seconds.

        ORDER: byte, barrier, row, LIVE last. Whoever sees LIVE finds the byte locked and us in
        every barrier.
        If killed: the byte is free again and the row FREE; its pid is overwritten by the next.
        """
        with self.lock_file.exclusive(REGISTRATION, timeout_s=5.0) as registering:
            if not registering:
                pid = self.lock_file.holder(REGISTRATION)
                raise AlreadyRunningError(f"process {pid} has been registering for 5 s")
            register_barrier()
            for index in range(self._count):
                word = self._cells.row_state[index]
                if word & 0xFF != FREE or not self._is_clean(index):
                    continue
                if self.lock_file.holds(FIRST_ROW + index):
                    continue
                self._row = index  # ORDER: known before it is taken; see withdraw
                try:
                    if self.lock_file.try_hold(FIRST_ROW + index):
                        return index, self._fill_row(index, role)
                except BaseException:  # whatever is in the row by now is a dead process's
                    self.withdraw()
                    raise
                self._row = -1
        raise TableFullError(
            f"all {self._count} process rows are taken: raise `processes` of Runtime.create"
        )

    def withdraw(self) -> None:
        """Let the row's byte go: to the others its process has died. Again does nothing."""
        if self._row >= 0:
            self.lock_file.drop(FIRST_ROW + self._row)
            self._row = -1

    def _fill_row(self, index: int, role: str) -> int:
        cells = self._cells
        epoch = (cells.row_state[index] >> 8) or 1
        cells.row_pid[index] = os.getpid()
        cells.row_started_ns[index] = time.monotonic_ns()
        cells.row_heartbeat_ns[index] = time.monotonic_ns()
        cells.row_role[index] = ROLES.index(role)
        cells.row_state[index] = epoch << 8 | LIVE
        return epoch

    def _is_clean(self, index: int) -> bool:
        """Whether nothing of an earlier tenant is left in the row."""
        claims = self._columns.claims[index]
        return not claims.any() and not self._columns.held[:, index].any()

    def is_alive(self, index: int) -> bool:
        """Whether the kernel says the row's process lives; ask only about rows that are taken."""
        return self.lock_file.holder(FIRST_ROW + index) != 0

    def taken(self) -> list[int]:
        """Rows that are not FREE."""
        return [i for i, word in enumerate(self._cells.row_state) if word & 0xFF != FREE]

    def dead(self) -> list[int]:
        """Rows whose process has died and was not yet reaped."""
        return [index for index in self.taken() if not self.is_alive(index)]

    def fence(self, index: int) -> None:
        """Say that a row's process counts as dead from here on.

        A process that was wrongly taken for dead (foreign code closed its lock file) finds this
        when it next takes a stripe, and leaves.
        """
        word = self._cells.row_state[index]
        if word & 0xFF == LIVE:
            self._cells.row_state[index] = word & ~0xFF | REAPING

    def free(self, index: int) -> None:
        """Give a reaped row back: the last store of a reaping. The epoch moves on."""
        epoch = (self._cells.row_state[index] >> 8) + 1
        self._cells.row_state[index] = (epoch & ((1 << 47) - 1) or 1) << 8 | FREE

    def describe(self, index: int) -> str:
        """A row for messages."""
        role = ROLES[self._cells.row_role[index] % len(ROLES)]
        return f"process {index} (pid {self._cells.row_pid[index]}, {role})"

    def live_words(self) -> list[int]:
        """What ``owner`` and ``writer`` hold for the rows that are LIVE."""
        return [
            word >> 8 << 16 | index
            for index, word in enumerate(self._cells.row_state)
            if word & 0xFF == LIVE
        ]
