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
"""

from __future__ import annotations

import collections.abc
import contextlib
import hashlib
import logging
import os
import typing

import numpy as np

from . import group_store
from .errors import (
    ClosedError,
    DescriptorError,
    OverCrowdedError,
    ShmsockError,
    SocketFailedError,
    StripeTimeoutError,
)
from .globs import MAX_PATTERN_BYTES, compile_glob, escape_glob, literal_prefix
from .group_store import GroupsFullError, Opened, Store, T, Txn

if typing.TYPE_CHECKING:
    import lmdb

log = logging.getLogger("shmsock")

__all__ = ["MAX_PATTERN_BYTES", "Groups", "GroupsFullError", "compile_glob", "escape_glob"]

Buffer = bytes | bytearray | memoryview

_KEY_BYTES = 511
_SHORT_BYTES = _KEY_BYTES - 1 - hashlib.sha256().digest_size
# Members changed in one write transaction: others wait for it.
_BATCH = 256
# What a member may be refused by, and hurts no other: it is tried again by itself, and then said.
_REFUSALS = (OverCrowdedError, SocketFailedError, DescriptorError, StripeTimeoutError, OSError)

WriteToAll = collections.abc.Callable[
    [list[int], bytes, tuple[type[BaseException], ...]], list[int]
]


class Reference(typing.Protocol):
    """What groups need of a SocketRef."""

    def write(self, *buffers: Buffer) -> object:
        """Write the buffers as one message."""

    def close(self) -> None:
        """Give the reference back."""


def _bytes(name: bytes | str) -> bytes:
    return name.encode() if isinstance(name, str) else bytes(name)


def _key(name: bytes) -> bytes:
    if len(name) <= _SHORT_BYTES:
        return b"n" + name
    return b"n" + name[:_SHORT_BYTES] + hashlib.sha256(name).digest()


def _values(txn: Txn, database: lmdb._Database, key: bytes) -> list[bytes]:
    with txn.cursor(database) as cursor:
        return list(cursor.iternext_dup()) if cursor.set_key(key) else []


def _ids(txn: Txn, opened: Opened, key: bytes) -> list[int]:
    """The members of a group, ascending: all at once, as LMDB packs them."""
    with txn.cursor(opened.members) as cursor:
        packed = cursor.getmulti([key], dupdata=True, dupfixed_bytes=8, keyfixed=True)
    pair = np.dtype([("key", f"V{len(key)}"), ("id", ">u8")])
    return typing.cast("list[int]", np.frombuffer(packed, pair)["id"].tolist()) if packed else []


def _has(txn: Txn, opened: Opened, key: bytes, value: bytes) -> bool:
    with txn.cursor(opened.members) as cursor:
        return cursor.set_key_dup(key, value)


def _remove(txn: Txn, opened: Opened, key: bytes, value: bytes) -> bool:
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
        # Called before every use: raises when the runtime is of no use any more.
        self.check: collections.abc.Callable[[], object] = lambda: None
        # The C engine's: writes to many, and says which places are left; None with the other.
        self.write_to_all: WriteToAll | None = None
        # Called with the id of a member that reads too slowly for a broadcast: an application
        # that wants no gaps ends it.
        self.on_crowded: collections.abc.Callable[[int], object] | None = None
        self._store: Store | None = None
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

        def insert(txn: Txn, opened: Opened) -> bool:
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

    def names_of(self, sid: int) -> list[bytes]:
        """The groups that an id is in, sorted."""
        if not 0 < sid < 1 << 64:
            return []
        value = sid.to_bytes(8, "big")

        def look(txn: Txn, opened: Opened) -> list[bytes]:
            return [
                txn.get(key, b"", opened.long_names) if len(key) == _KEY_BYTES else key[1:]
                for key in _values(txn, opened.groups_of, value)
                if _has(txn, opened, key, value)
            ]

        return sorted(self._read(look))

    def members(self, name: bytes | str) -> list[int]:
        """The live ids of a group, ascending."""
        key = _key(_bytes(name))
        live, stale = [], []
        for sid in self._read(lambda txn, opened: _ids(txn, opened, key)):
            if self._is_live(sid):
                live.append(sid)
            else:
                stale.append((key, sid.to_bytes(8, "big")))
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
        start = b"n" + literal_prefix(pattern)[:_SHORT_BYTES]
        names: list[bytes] = []
        stale: list[tuple[bytes, bytes]] = []

        def scan(txn: Txn, opened: Opened) -> None:
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
        sids = self._read(lambda txn, opened: _ids(txn, opened, key))
        if self._fetch is not None and sids:
            with contextlib.suppress(OSError, DescriptorError):  # then one by one, as they come
                self._fetch(sids)
        taken, crowded, unreachable = len(sids), 0, []
        stale: list[tuple[bytes, bytes]] = []
        address = self._address
        for place in self._write_quickly(sids, buffers):
            sid = sids[place]
            reference = None
            try:
                reference = address(sid)
                if reference is None:
                    taken -= 1
                    stale.append((key, sid.to_bytes(8, "big")))
                    continue
                reference.write(*buffers)
            except OverCrowdedError:
                taken -= 1
                crowded += 1
                if self.on_crowded is not None:
                    self.on_crowded(sid)
            except SocketFailedError:
                taken -= 1
            except (OSError, DescriptorError) as error:
                taken -= 1
                unreachable.append(error)
            finally:
                if reference is not None:
                    reference.close()
        if crowded:
            log.warning("group %r: %d members read too slowly and missed one", name, crowded)
        if unreachable:
            log.warning(
                "group %r: %d members out of reach: %s", name, len(unreachable), unreachable[0]
            )
        self._drop(stale)
        return taken

    def _write_quickly(
        self, sids: list[int], buffers: tuple[Buffer, ...]
    ) -> collections.abc.Iterable[int]:
        """Write to those that nothing stands in the way of; the places of the others.

        In pieces, between which other threads and signals have their turn.
        """
        if self.write_to_all is None:
            yield from range(len(sids))
            return
        message = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        message = bytes(message)
        for first in range(0, len(sids), _BATCH):
            left = self.write_to_all(sids[first : first + _BATCH], message, _REFUSALS)
            yield from (first + place for place in left)

    def reap_readers(self) -> int:
        """Free what killed processes held while reading; call it when a death was seen."""
        return self._shared().reap_readers()

    def close(self) -> None:
        """Leave; the last one of this process closes the environment. May be repeated."""
        self._closed = True
        store, self._store = self._store, None
        if store is not None:
            group_store.leave(self, store)

    def _shared(self) -> Store:
        self.check()
        if self._closed:
            raise ClosedError("these groups are closed")
        store = self._store
        if store is None:
            store = self._store = group_store.join(self, self._directory, self._map_size_bytes)
        return store

    def _read(self, operation: collections.abc.Callable[[Txn, Opened], T]) -> T:
        return self._shared().run(operation, write=False)

    def _write(self, operation: collections.abc.Callable[[Txn, Opened], T]) -> T:
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
            log.warning("%d stale members stay for now: %s", len(stale), error)

    def _remove_all(self, pairs: list[tuple[bytes, bytes]], only_stale: bool) -> int:
        def remove(txn: Txn, opened: Opened) -> int:
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
