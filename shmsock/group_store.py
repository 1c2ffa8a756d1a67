"""The LMDB environment of one directory of groups: open at most once a process, never over a fork.

An environment never crosses a fork. py-lmdb 3.0 refuses to open files that the inherited object
still has open, and closes them in the child when that object is dropped, whatever was under way in
the parent (cpython.c: open_env_keys, env_clear; ``test_py_lmdb_refuses_...``). So it is closed
*before* each fork, when no thread has a transaction, and opened at its next use on either side.
"""

from __future__ import annotations

import collections.abc
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import logging
import os
import threading
import typing
import weakref

from .errors import ClosedError, ShmsockError

if typing.TYPE_CHECKING:
    import lmdb

log = logging.getLogger("shmsock")

T = typing.TypeVar("T")
Txn: typing.TypeAlias = "lmdb.Transaction[bytes]"

FILE_NAME = "groups.mdb"
# Rows are 64 bytes. A process uses as many as it has threads reading at one moment, seldom two.
_MAX_READERS = 1024
# How long a fork waits for other threads' transactions. They take microseconds, unless they wait
# for a writer in another process that was stopped in the middle.
_FORK_WAIT_S = 1.0


class GroupsFullError(ShmsockError, OSError):
    """The groups outgrew their map: attach with a larger ``map_size_bytes``, in any process."""


# One lock for all of them: it guards who uses which, for some bytecodes at a time, and is held
# across a fork. Reentrant, because a signal handler may fork.
_lock = threading.RLock()
_changed = threading.Condition(_lock)
# By path, device and inode: a directory removed and made again is another one.
Place = tuple[str, int, int]
_stores: dict[Place, Store] = {}
_forking = False


@dataclasses.dataclass(slots=True)
class Opened:
    """An open environment and its databases."""

    env: lmdb.Environment
    members: lmdb._Database
    groups_of: lmdb._Database
    long_names: lmdb._Database
    pid: int
    numbers: dict[int, int]  # its descriptors, and the inode of each

    def is_intact(self) -> bool:
        """Whether its descriptors are still its own: foreign code may have closed them."""
        try:
            return all(os.fstat(fd).st_ino == inode for fd, inode in self.numbers.items())
        except OSError:
            return False

    def close(self) -> None:
        """Close, unless the numbers may be other files' by now: LMDB would close those."""
        if self.is_intact():
            self.env.close()
        else:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.env))


@dataclasses.dataclass(slots=True, eq=False, weakref_slot=True)
class _Use:
    """One transaction under way."""

    opened: Opened
    thread: int


class Store:
    """The environment of one directory, open at most once in this process.

    LMDB forbids more: its locks are fcntl locks, which the first close would drop for both.
    """

    def __init__(self, place: Place, map_size_bytes: int) -> None:
        # Weak: a Groups that was dropped without a close holds nothing.
        self.holders: weakref.WeakSet[typing.Any] = weakref.WeakSet()
        self._place = place
        self._directory = place[0]
        self._map_size_bytes = map_size_bytes
        self._opened: Opened | None = None
        # Weak: an exception from a signal handler may strike anywhere and must not leave a use
        # behind that every later fork would wait for.
        self.uses: weakref.WeakSet[_Use] = weakref.WeakSet()

    def run(self, operation: collections.abc.Callable[[Txn, Opened], T], write: bool) -> T:
        """Run one transaction; what can be mended is mended, and the operation run once more."""
        for last in (False, True):
            use = self._enter()
            import lmdb

            try:
                if write and not use.opened.is_intact():  # or pages go into somebody else's file
                    raise ClosedError("foreign code closed the groups' files: attach again")
                with use.opened.env.begin(write=write) as txn:
                    return operation(txn, use.opened)
            except (lmdb.ReadersFullError, lmdb.MapResizedError, lmdb.PanicError) as error:
                if last:
                    raise _translated(error, self._directory) from error
                failure: lmdb.Error = error
            except lmdb.Error as error:
                raise _translated(error, self._directory) from error
            finally:
                self._leave(use)
            if isinstance(failure, lmdb.ReadersFullError):
                self.reap_readers()
            else:
                # Another process has a larger map, or a commit could not write its last page:
                # either way a new mapping is all it takes.
                self.close_if_idle(_FORK_WAIT_S)
        raise AssertionError("unreachable")

    def reap_readers(self) -> int:
        """Free the reader rows of killed processes."""
        use = self._enter()
        try:
            return use.opened.env.reader_check()
        finally:
            self._leave(use)

    def _enter(self) -> _Use:
        with _lock:
            _changed.wait_for(lambda: not _forking)
            if not self.holders:
                raise ClosedError("these groups are closed")
            if self._opened is None:
                self._opened = self._open()
            if self._opened.pid != os.getpid():
                raise ShmsockError("this process was forked behind Python's back: no groups here")
            use = _Use(self._opened, threading.get_ident())
            self.uses.add(use)
            return use

    def _leave(self, use: _Use) -> None:
        with _lock:
            self.uses.discard(use)
            self.close_if_unheld()
            _changed.notify_all()

    def close_if_idle(self, timeout_s: float) -> bool:
        """Close when no other thread has a transaction; False: it stayed open."""
        with _lock:
            me = threading.get_ident()
            _changed.wait_for(lambda: all(use.thread == me for use in self.uses), timeout_s)
            if self.uses:
                return False
            if self._opened is not None:
                self._opened.close()
                self._opened = None
            return True

    def close_if_unheld(self) -> None:
        """Close when nobody is left: the last ``close``, or the last use that it met under way."""
        if not self.holders and self.close_if_idle(0):
            _stores.pop(self._place, None)

    def abandon(self) -> None:
        """In a fork child: never touch, close or drop what is still open of the parent's."""
        self.uses = weakref.WeakSet()
        if self._opened is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._opened.env))
            self._opened = None

    def _open(self) -> Opened:
        try:
            import lmdb
        except ImportError as error:
            raise ImportError(
                "groups are kept in LMDB: pip install 'shmsock[server]'", name="lmdb"
            ) from error
        path = os.path.join(self._directory, FILE_NAME)
        guard = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
            _prepare(path)
            env = lmdb.open(
                path,
                subdir=False,
                mode=0o600,
                map_size=self._map_size_bytes,
                max_dbs=3,
                max_readers=_MAX_READERS,
                # One idle reader row is kept and renewed: no mutex at all, then. Not to be carried
                # across a fork (py-lmdb's manual), which nothing here is. MDB_NOTLS is always on.
                max_spare_txns=1,
                # tmpfs: nothing outlives the machine, and a dead process's writes are in the file.
                sync=False,
                metasync=False,
                readahead=False,
                # Never a writable map: on a full tmpfs a store into it is SIGBUS, pwrite is ENOSPC.
                writemap=False,
                # 0.9, whatever LMDB_DEFAULT_LIB_VERSION is in somebody's environment.
                lib_version=0,
            )
            return _open_databases(env, _numbers_of(path))
        except lmdb.Error as error:
            raise _translated(error, self._directory) from error
        finally:
            os.close(guard)


def _prepare(path: str) -> None:
    """Make the next open safe: under the directory's flock, with nothing open in this process.

    The lock file is allocated: LMDB maps it writable and only truncates it to its size, so on a
    full /dev/shm its first touch would be SIGBUS. A data file shorter than its two meta pages is
    what a killed or refused creation left, and LMDB would not take it.
    """
    fd = os.open(path + "-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, 64 * (_MAX_READERS + 4))
    except OSError as error:
        raise OSError(error.errno, _NO_ROOM, path + "-lock") from error
    finally:
        os.close(fd)
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_size < 2 * os.sysconf("SC_PAGE_SIZE"):
            os.unlink(path)


def _numbers_of(path: str) -> dict[int, int]:
    """Which descriptors of this process are LMDB's; it does not tell itself."""
    inodes = {os.stat(path).st_ino, os.stat(path + "-lock").st_ino}
    numbers = {}
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            inode = os.fstat(int(entry)).st_ino
            if inode in inodes and os.readlink(f"/proc/self/fd/{entry}").startswith(path):
                numbers[int(entry)] = inode
                os.set_inheritable(int(entry), False)  # LMDB leaves its data file to programs
    return numbers


def _open_databases(env: lmdb.Environment, numbers: dict[int, int]) -> Opened:
    # WHY NOT a read transaction when they exist: handles opened in one are closed with it, because
    # py-lmdb ends it by a reset. Nor open_db by itself: it waits for a writer with the GIL held.
    try:
        # An open needs a row itself and cannot reap before it has one. So everyone reaps the dead
        # of earlier days right here, and the table never fills with them.
        env.reader_check()
        with env.begin(write=True) as txn:
            return Opened(
                env,
                env.open_db(b"members", txn, dupsort=True, dupfixed=True),
                env.open_db(b"groups_of", txn, dupsort=True),
                env.open_db(b"long_names", txn),
                os.getpid(),
                numbers,
            )
    except BaseException:
        env.close()
        raise


_NO_ROOM = "no room for the groups: enlarge /dev/shm (Docker: --shm-size)"


def _translated(error: lmdb.Error, directory: str) -> Exception:
    import lmdb

    path = os.path.join(directory, FILE_NAME)
    if isinstance(error, lmdb.MapFullError):
        return GroupsFullError(
            errno.ENOSPC, "the groups are full: attach with a larger map_size_bytes", path
        )
    if error.code in (errno.ENOSPC, errno.EIO):  # EIO: mdb_page_flush calls a short write that
        return OSError(errno.ENOSPC, _NO_ROOM, path)
    if error.code == errno.EAGAIN:
        return ShmsockError(f"{path}: a process of another pid namespace has this pid: {error}")
    if error.code > 0:
        return OSError(error.code, str(error), path)
    return ShmsockError(f"{path}: {error}")


def _before_fork() -> None:
    global _forking
    _lock.acquire()
    _forking = True
    for store in list(_stores.values()):
        if not store.close_if_idle(_FORK_WAIT_S):
            log.warning("a fork could not wait for a group transaction: no groups in the child")


def _after_fork_in_parent() -> None:
    global _forking
    _forking = False
    _changed.notify_all()
    _lock.release()


def _after_fork_in_child() -> None:
    global _forking, _lock, _changed
    _forking = False
    _lock = threading.RLock()
    _changed = threading.Condition(_lock)
    for store in _stores.values():
        store.abandon()


def join(holder: object, directory: str, map_size_bytes: int) -> Store:
    """The one store of a directory in this process, which ``holder`` uses from here on."""
    with _lock:
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        status = os.stat(directory)
        place = (directory, status.st_dev, status.st_ino)
        store = _stores.get(place)
        if store is None:
            store = _stores[place] = Store(place, map_size_bytes)
        store.holders.add(holder)
        return store


def leave(holder: object, store: Store) -> None:
    """Use a store no more; the last one closes it."""
    with _lock:
        store.holders.discard(holder)
        store.close_if_unheld()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
