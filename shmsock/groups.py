"""Groups: who subscribes to what, kept for every process of a runtime.

A group is a name with SocketIds in it. It exists while it has a member. Names are any bytes of any
length (str is UTF-8). One LMDB environment in the runtime's run directory holds three databases:

    members     key -> ids              DUPSORT, DUPFIXED: 8 bytes each, big-endian, so sorted
    groups_of   id  -> keys             DUPSORT: read by ``discard_everywhere`` instead of a scan
    long_names  key -> the whole name   only for names longer than a key can hold

An LMDB key, and a value under DUPSORT, has at most 511 bytes (MDB_MAXKEYSIZE; ``max_key_size()``)
and at least one. So a key is "n" and the name, up to 478 bytes of it; of a longer name it is "n",
the first 478 bytes, and the sha256 of the whole: exactly 511 bytes, which no short name can be. One
order, and every name's key starts with the name's first 478 bytes, so that a prefix is a range.

Readers wait for nobody, whichever process writes or dies (but the first use in a process, which
opens, waits for a writer once). A writer takes LMDB's writer mutex, one
for all processes: transactions are kept tiny, and what would not change anything never starts one.
A process killed in the middle of one leaves nothing of it: the mutex is robust (py-lmdb builds it
so on Linux), the next writer inherits it and the last committed tree. A process killed while it
*reads* leaves a row in the reader table, and with it pages nobody reuses, until ``reap_readers``.

Stale ids are dropped by whoever meets them, after the read, in a transaction of their own, looked
at again inside it. That is safe in any order: an id that is not live never becomes live again.

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
import functools
import hashlib
import logging
import os
import re
import threading
import typing
import weakref

from .errors import (
    ClosedError,
    DescriptorError,
    OverCrowdedError,
    ShmsockError,
    SocketFailedError,
)

if typing.TYPE_CHECKING:
    import lmdb

logger = logging.getLogger("shmsock")

Buffer = bytes | bytearray | memoryview
_T = typing.TypeVar("_T")
_Txn: typing.TypeAlias = "lmdb.Transaction[bytes]"

FILE_NAME = "groups.mdb"
_KEY_BYTES = 511
_SHORT_BYTES = _KEY_BYTES - 1 - hashlib.sha256().digest_size
# Rows are 64 bytes. A process uses as many as it has threads reading at one moment, seldom two.
_MAX_READERS = 1024
# Members changed in one write transaction: others wait for it.
_BATCH = 256
# How long a fork waits for other threads' transactions. They take microseconds, unless they wait
# for a writer in another process that was stopped in the middle.
_FORK_WAIT_S = 1.0


class GroupsFullError(ShmsockError, OSError):
    """The groups outgrew their map: attach with a larger ``map_size_bytes``, in any process."""


class Reference(typing.Protocol):
    """What groups need of a SocketRef."""

    def write(self, *buffers: Buffer) -> object:
        """Write the buffers as one message."""

    def close(self) -> None:
        """Give the reference back."""


# ---------------------------------------------------------------------------------- glob patterns

_STAR, _ANY, _NEVER = b".*", b".", b"(?!)"
# Compiling costs some microseconds a byte: a pattern of a megabyte would take a worker's minute.
MAX_PATTERN_BYTES = 4096
# Redis gives up on patterns with more stars (those at the end not counted), since CVE-2024-31228.
_MAX_STARS = 1000


def _parse_class(pattern: bytes, at: int) -> tuple[bytes, int]:
    """Read a ``[...]`` from behind its bracket: a regular expression, and where it ended."""
    negated = pattern[at : at + 1] == b"^"
    at += negated
    chosen: set[int] = set()
    while at < len(pattern):
        byte, left = pattern[at], len(pattern) - at
        if byte == 0x5C and left >= 2:  # backslash
            chosen.add(pattern[at + 1])
            at += 2
        elif byte == 0x5D:  # ]
            at += 1
            break
        elif left >= 3 and pattern[at + 1] == 0x2D:  # a-z; the end may be any byte, even ]
            # Redis compares plain chars, and on x86-64 those are signed.
            ends = sorted((end ^ 0x80) - 0x80 for end in (byte, pattern[at + 2]))
            chosen.update(value & 0xFF for value in range(ends[0], ends[1] + 1))
            at += 3
        else:
            chosen.add(byte)
            at += 1
    if negated:
        chosen = set(range(256)) - chosen
    return _one_of(chosen), at


def _one_of(chosen: set[int]) -> bytes:
    if len(chosen) in (0, 256):
        return _ANY if chosen else _NEVER
    # As ranges: the expression stays as long as the pattern was.
    firsts = sorted(byte for byte in chosen if byte - 1 not in chosen)
    lasts = sorted(byte for byte in chosen if byte + 1 not in chosen)
    ranges = zip(firsts, lasts, strict=True)
    return b"[" + b"".join(b"\\x%02x-\\x%02x" % ends for ends in ranges) + b"]"


@functools.lru_cache(maxsize=128)
def _parse(pattern: bytes) -> tuple[int | bytes, ...]:
    """Cut a glob into literal bytes (int) and regular expressions; runs of stars are one."""
    elements: list[int | bytes] = []
    at = 0
    while at < len(pattern):
        byte = pattern[at]
        at += 1
        if byte == 0x2A:  # *
            if not elements or elements[-1] is not _STAR:
                elements.append(_STAR)
        elif byte == 0x3F:  # ?
            elements.append(_ANY)
        elif byte == 0x5B:  # [
            element, at = _parse_class(pattern, at)
            elements.append(element)
        else:
            if byte == 0x5C and at < len(pattern):  # backslash; the last byte of all is itself
                byte = pattern[at]
                at += 1
            elements.append(byte)
    return tuple(elements)


@functools.lru_cache(maxsize=128)
def compile_glob(pattern: bytes) -> re.Pattern[bytes]:
    """Translate a glob as Redis matches it (stringmatchlen of 7.0) for use with ``fullmatch``.

    The oddities of the original are kept: an empty name matches the empty pattern alone, not even
    ``*`` (KEYS never asks about a bare ``*``, and neither does ``Groups.names``); ``[a-]`` is a
    range that ends in ``]``; more than 1,000 stars match nothing.

    A pattern may come from an enemy. Between two stars stands a run of fixed length, so the first
    place where it fits is as good as any later one and never needs to be reconsidered: every star
    but the last is atomic, and the cost is at most name times pattern. Atomic groups and not
    possessive quantifiers, which are wrong before CPython 3.11.5 (gh-106052).

    Raises:
        ValueError: The pattern has more than ``MAX_PATTERN_BYTES``.
    """
    if len(pattern) > MAX_PATTERN_BYTES:
        raise ValueError(f"a pattern has at most {MAX_PATTERN_BYTES} bytes, not {len(pattern)}")
    elements = _parse(pattern)
    if elements == (_STAR,):
        return re.compile(b".+", re.DOTALL)
    runs = [b""]
    for element in elements:
        if element is _STAR:
            runs.append(b"")
        else:
            runs[-1] += re.escape(bytes((element,))) if isinstance(element, int) else element
    if len(runs) - 1 - (not runs[-1]) > _MAX_STARS:
        return re.compile(_NEVER)
    source = runs[0] + b"".join(b"(?>.*?" + run + b")" for run in runs[1:-1])
    if len(runs) > 1:
        source += _STAR + runs[-1]
    return re.compile(source, re.DOTALL)


def escape_glob(literal: bytes) -> bytes:
    """Make the pattern that matches exactly this name."""
    return re.sub(rb"[*?\[\\]", rb"\\\g<0>", literal)


def _literal_prefix(pattern: bytes) -> bytes:
    """What every name that matches begins with."""
    prefix = bytearray()
    for element in _parse(pattern):
        if not isinstance(element, int):
            break
        prefix.append(element)
    return bytes(prefix)


# ------------------------------------------------------------------------------- the environment

# One lock for all of them: it guards who uses which, for some bytecodes at a time, and is held
# across a fork. Reentrant, because a signal handler may fork.
_lock = threading.RLock()
_changed = threading.Condition(_lock)
# By path, device and inode: a directory removed and made again is another one.
_Place = tuple[str, int, int]
_stores: dict[_Place, _Store] = {}
_forking = False


@dataclasses.dataclass(slots=True)
class _Opened:
    env: lmdb.Environment
    members: lmdb._Database
    groups_of: lmdb._Database
    long_names: lmdb._Database
    pid: int


@dataclasses.dataclass(slots=True, eq=False, weakref_slot=True)
class _Use:
    """One transaction under way."""

    opened: _Opened
    thread: int


class _Store:
    """The environment of one directory, open at most once in this process.

    LMDB forbids more: its locks are fcntl locks, which the first close would drop for both.
    """

    def __init__(self, place: _Place, map_size_bytes: int) -> None:
        # Weak: a Groups that was dropped without a close holds nothing.
        self.holders: weakref.WeakSet[Groups] = weakref.WeakSet()
        self._place = place
        self._directory = place[0]
        self._map_size_bytes = map_size_bytes
        self._opened: _Opened | None = None
        # Weak: an exception from a signal handler may strike anywhere and must not leave a use
        # behind that every later fork would wait for.
        self.uses: weakref.WeakSet[_Use] = weakref.WeakSet()

    def run(self, operation: collections.abc.Callable[[_Txn, _Opened], _T], write: bool) -> _T:
        """Run one transaction; what can be mended is mended, and the operation run once more."""
        for last in (False, True):
            use = self._enter()
            import lmdb

            try:
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
                self._opened.env.close()
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

    def _open(self) -> _Opened:
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
            return _open_databases(env)
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


def _open_databases(env: lmdb.Environment) -> _Opened:
    # WHY NOT a read transaction when they exist: handles opened in one are closed with it, because
    # py-lmdb ends it by a reset. Nor open_db by itself: it waits for a writer with the GIL held.
    try:
        # An open needs a row itself and cannot reap before it has one. So everyone reaps the dead
        # of earlier days right here, and the table never fills with them.
        env.reader_check()
        with env.begin(write=True) as txn:
            return _Opened(
                env,
                env.open_db(b"members", txn, dupsort=True, dupfixed=True),
                env.open_db(b"groups_of", txn, dupsort=True),
                env.open_db(b"long_names", txn),
                os.getpid(),
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
            logger.warning("a fork could not wait for a group transaction: no groups in the child")


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


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


# ----------------------------------------------------------------------------------------- groups


def _bytes(name: bytes | str) -> bytes:
    return name.encode() if isinstance(name, str) else bytes(name)


def _key(name: bytes) -> bytes:
    if len(name) <= _SHORT_BYTES:
        return b"n" + name
    return b"n" + name[:_SHORT_BYTES] + hashlib.sha256(name).digest()


def _values(txn: _Txn, database: lmdb._Database, key: bytes) -> list[bytes]:
    with txn.cursor(database) as cursor:
        return list(cursor.iternext_dup()) if cursor.set_key(key) else []


def _has(txn: _Txn, opened: _Opened, key: bytes, value: bytes) -> bool:
    with txn.cursor(opened.members) as cursor:
        return cursor.set_key_dup(key, value)


def _remove(txn: _Txn, opened: _Opened, key: bytes, value: bytes) -> bool:
    if not txn.delete(key, value, opened.members):
        return False
    txn.delete(value, key, opened.groups_of)
    if len(key) == _KEY_BYTES and txn.get(key, db=opened.members) is None:
        txn.delete(key, db=opened.long_names)
    return True


class Groups:
    """Named sets of SocketIds, shared by all processes of a runtime.

    Args:
        directory: In the runtime's run directory; made if it is not there. Nothing is opened
            before the first use.
        address: Turns an id into a reference, or None once it no longer addresses.
        is_live: False once the id has failed or gone; called inside transactions, so it must
            neither wait nor use these groups.
        fetch: Brings the descriptors of many ids here in one go. It may be given stale ones.
        map_size_bytes: Bound of the database; address space, not memory, until it is used.

    Concurrency: any thread of any process. Reading takes no lock that another process can hold;
    changing waits for whoever changes at the moment, also in other processes. Not for signal
    handlers. A fork child may go on using it.
    """

    def __init__(
        self,
        directory: str,
        address: collections.abc.Callable[[int], Reference | None],
        is_live: collections.abc.Callable[[int], bool],
        fetch: collections.abc.Callable[[collections.abc.Sequence[int]], object] | None = None,
        map_size_bytes: int = 1 << 30,
    ) -> None:
        self._directory = os.path.realpath(directory)
        self._address = address
        self._is_live = is_live
        self._fetch = fetch
        self._map_size_bytes = map_size_bytes
        self._store: _Store | None = None
        self._closed = False

    def add(self, name: bytes | str, sid: int) -> bool:
        """Put a live id into a group.

        Returns:
            True if it was not a member. False if it was, or is not live: then nothing is stored.

        Raises:
            GroupsFullError: The map is full; nothing is stored.
            OSError: ENOSPC: /dev/shm is full; nothing is stored.
        """
        name = _bytes(name)
        if not self._is_live(sid):
            return False
        key, value = _key(name), sid.to_bytes(8, "big")

        def insert(txn: _Txn, opened: _Opened) -> bool:
            # ORDER: looked at inside, under the writer mutex: either a discard_everywhere that
            # follows the failure comes after us and finds it, or we see the failure here.
            if not self._is_live(sid) or not txn.put(key, value, dupdata=False, db=opened.members):
                return False
            txn.put(value, key, db=opened.groups_of)
            if len(key) == _KEY_BYTES:
                txn.put(key, name, db=opened.long_names)
            return True

        if self._read(lambda txn, opened: _has(txn, opened, key, value)):
            return False
        return self._write(insert)

    def discard(self, name: bytes | str, sid: int) -> bool:
        """Take an id out of a group; True if it was a member."""
        if not 0 < sid < 1 << 64:
            return False
        key, value = _key(_bytes(name)), sid.to_bytes(8, "big")
        if not self._read(lambda txn, opened: _has(txn, opened, key, value)):
            return False
        return self._write(lambda txn, opened: _remove(txn, opened, key, value))

    def discard_everywhere(self, sid: int) -> int:
        """Take an id out of all groups; returns out of how many."""
        if not 0 < sid < 1 << 64:
            return 0
        value = sid.to_bytes(8, "big")
        keys = self._read(lambda txn, opened: _values(txn, opened.groups_of, value))
        return self._remove_all([(key, value) for key in keys], only_stale=False)

    def members(self, name: bytes | str) -> list[int]:
        """The live ids of a group, ascending."""
        key = _key(_bytes(name))
        live, stale = [], []
        for value in self._read(lambda txn, opened: _values(txn, opened.members, key)):
            sid = int.from_bytes(value, "big")
            if self._is_live(sid):
                live.append(sid)
            else:
                stale.append((key, value))
        self._drop(stale)
        return live

    def count(self, name: bytes | str) -> int:
        """How many live ids a group has."""
        return len(self.members(name))

    def names(self, pattern: bytes | str = b"*") -> list[bytes]:
        """The groups that match a Redis glob and have a live member, sorted.

        Raises:
            ValueError: The pattern has more than ``MAX_PATTERN_BYTES``.
        """
        pattern = _bytes(pattern)
        matches = compile_glob(pattern).fullmatch if pattern != b"*" else None
        start = b"n" + _literal_prefix(pattern)[:_SHORT_BYTES]
        names: list[bytes] = []
        stale: list[tuple[bytes, bytes]] = []

        def scan(txn: _Txn, opened: _Opened) -> None:
            names.clear()
            stale.clear()
            with txn.cursor(opened.members) as cursor:
                more = cursor.set_range(start)
                while more and (key := cursor.key()).startswith(start):
                    long = len(key) == _KEY_BYTES
                    name = txn.get(key, b"", opened.long_names) if long else key[1:]
                    if (matches is None or matches(name)) and self._any_live(cursor, key, stale):
                        names.append(name)
                    more = cursor.next_nodup()

        self._read(scan)
        self._drop(stale)
        return sorted(names)

    def broadcast(self, name: bytes | str, *buffers: Buffer) -> int:
        """Write the buffers as one message to every live member; returns how many took it.

        What one member raises never hurts another: a failed one is skipped, and so is one that
        reads too slowly or whose descriptor cannot be had, with one warning a call.
        """
        key = _key(_bytes(name))
        values = self._read(lambda txn, opened: _values(txn, opened.members, key))
        sids = [int.from_bytes(value, "big") for value in values]
        if self._fetch is not None and sids:
            with contextlib.suppress(OSError, DescriptorError):  # then one by one, as they come
                self._fetch(sids)
        taken, crowded, unreachable = 0, 0, []
        stale: list[tuple[bytes, bytes]] = []
        for sid, value in zip(sids, values, strict=True):
            try:
                reference = self._address(sid)
                if reference is None:
                    stale.append((key, value))
                    continue
                with contextlib.closing(reference):
                    reference.write(*buffers)
                taken += 1
            except OverCrowdedError:
                crowded += 1
            except SocketFailedError:
                pass
            except (OSError, DescriptorError) as error:
                unreachable.append(error)
        if crowded:
            logger.warning("group %r: %d members read too slowly and missed one", name, crowded)
        if unreachable:
            logger.warning(
                "group %r: %d members out of reach: %s", name, len(unreachable), unreachable[0]
            )
        self._drop(stale)
        return taken

    def reap_readers(self) -> int:
        """Free what killed processes held while reading; call it when a death was seen."""
        return self._shared().reap_readers()

    def close(self) -> None:
        """Leave; the last one of this process closes the environment. May be repeated."""
        with _lock:
            self._closed = True
            store, self._store = self._store, None
            if store is not None:
                store.holders.discard(self)
                store.close_if_unheld()

    def _shared(self) -> _Store:
        with _lock:
            if self._closed:
                raise ClosedError("these groups are closed")
            if self._store is None:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self._directory, 0o700)
                status = os.stat(self._directory)
                place = (self._directory, status.st_dev, status.st_ino)
                self._store = _stores.get(place)
                if self._store is None:
                    self._store = _stores[place] = _Store(place, self._map_size_bytes)
                self._store.holders.add(self)
            return self._store

    def _read(self, operation: collections.abc.Callable[[_Txn, _Opened], _T]) -> _T:
        return self._shared().run(operation, write=False)

    def _write(self, operation: collections.abc.Callable[[_Txn, _Opened], _T]) -> _T:
        return self._shared().run(operation, write=True)

    def _any_live(
        self, cursor: lmdb.Cursor[bytes], key: bytes, stale: list[tuple[bytes, bytes]]
    ) -> bool:
        more = True
        while more:
            value = cursor.value()
            if self._is_live(int.from_bytes(value, "big")):
                return True
            stale.append((key, value))
            more = cursor.next_dup()
        cursor.set_key(key)  # not to rely on where a next_dup that failed leaves it
        return False

    def _drop(self, stale: list[tuple[bytes, bytes]]) -> None:
        """Remove what a reader found stale; a reader has its answer and must not fail by this."""
        try:
            self._remove_all(stale, only_stale=True)
        except (ShmsockError, OSError) as error:
            logger.warning("%d stale members stay for now: %s", len(stale), error)

    def _remove_all(self, pairs: list[tuple[bytes, bytes]], only_stale: bool) -> int:
        def remove(txn: _Txn, opened: _Opened) -> int:
            return sum(
                _remove(txn, opened, key, value)
                for key, value in batch
                if not only_stale or not self._is_live(int.from_bytes(value, "big"))
            )

        removed = 0
        for first in range(0, len(pairs), _BATCH):
            batch = pairs[first : first + _BATCH]
            removed += self._write(remove)
        return removed
