"""The table as anybody may look at it: whole columns, no lock, no reference taken."""

from __future__ import annotations

import dataclasses
import operator
import time
import typing

import numpy as np

from .layout import (
    FREE,
    KIND_NAMES,
    LIVE,
    ROLES,
    SLOT_BITS,
    SLOT_MASK,
    SOCKET_DTYPE,
)
from .processes import HOST, LockFile, Processes
from .segment import Segment

_LISTENER = KIND_NAMES.index("listener")


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """A participant, as ``Runtime.processes`` tells.

    Attributes:
        alive: Whether the kernel says so; a dead one that is listed waits to be reaped.
        sockets: How many it owns.
        attached: How many slots it holds references on.
    """

    index: int
    epoch: int
    pid: int
    role: str
    alive: bool
    age_s: float
    sockets: int
    attached: int


class View:
    """What ``Runtime`` can tell of its table; nothing here stores anything shared."""

    _segment: Segment
    _processes: Processes
    _lock_file: LockFile

    def _check(self) -> None:
        """Raise if this process is no participant."""
        raise NotImplementedError

    def sockets(self) -> np.ndarray[typing.Any, np.dtype[np.void]]:
        """A numpy structured array (layout.SOCKET_DTYPE), one row per live or failed socket.

        Concurrency: takes no lock. Each row is copied with its version looked at before and after;
            a slot that changed hands meanwhile is left out.
        """
        self._check()
        columns = self._segment.columns
        before = columns.versioned_ref.copy()
        rows = np.flatnonzero(columns.state == LIVE)
        table = np.zeros(len(rows), SOCKET_DTYPE)
        shift, mask = np.uint64(SLOT_BITS), np.uint64(SLOT_MASK)
        versions = before[rows] >> shift
        table["id"] = (versions & ~np.uint64(1)) << shift | rows.astype("u8")
        table["state"] = 1 + (versions & np.uint64(1))
        table["nref"] = before[rows] & mask
        table["attached"] = np.count_nonzero(columns.held[rows], axis=1)
        for name in ("owner", "writer"):
            word = getattr(columns, name)[rows]
            table[name] = np.where(word == 0, -1, (word & np.uint64(0xFFFF)).astype("i4"))
        for name in SOCKET_DTYPE.names or ():
            if name not in ("id", "state", "nref", "attached", "owner", "writer", "user_data"):
                table[name] = getattr(columns, name)[rows]
        table["user_data"] = columns.user_data[rows, columns.selector[rows] & 1]
        after = columns.versioned_ref[rows] >> shift
        same = ((after & ~np.uint64(1)) == (versions & ~np.uint64(1))) & (
            columns.state[rows] == LIVE
        )
        return typing.cast("np.ndarray[typing.Any, np.dtype[np.void]]", table[same])

    def attached_many(self, ids: np.ndarray[typing.Any, typing.Any]) -> list[list[int]]:
        """``attached`` of many ids at once."""
        slots = np.asarray(ids, "u8") & np.uint64(SLOT_MASK)
        inside = slots < self._segment.layout.slots
        held = self._segment.columns.held[np.where(inside, slots, 0)]
        return [
            np.flatnonzero(row).tolist() if known else []
            for row, known in zip(held, inside, strict=True)
        ]

    def processes(self) -> list[ProcessInfo]:
        """Every participant."""
        self._check()
        columns = self._segment.columns
        live = columns.state == LIVE
        owners = columns.owner[live]
        now_ns = time.monotonic_ns()
        found = []
        for index in self._processes.taken():
            epoch = int(columns.row_state[index]) >> 8
            found.append(
                ProcessInfo(
                    index=index,
                    epoch=epoch,
                    pid=int(columns.row_pid[index]),
                    role=ROLES[int(columns.row_role[index]) % len(ROLES)],
                    alive=self._processes.is_alive(index),
                    age_s=(now_ns - int(columns.row_started_ns[index])) / 1e9,
                    sockets=int(np.count_nonzero(owners == (epoch << 16 | index))),
                    attached=int(np.count_nonzero(columns.held[live, index])),
                )
            )
        return found

    def owned_counts(self) -> np.ndarray[typing.Any, typing.Any]:
        """How many sockets each process index owns: one pass of numpy over the table."""
        self._check()
        columns = self._segment.columns
        # WHY NOT a mask: of a table that is mostly empty few words are read this way.
        owners = columns.owner[np.flatnonzero(columns.state == LIVE)] & np.uint64(0xFFFF)
        return np.bincount(owners.astype("i8"), minlength=self._segment.layout.processes)

    def loads(self, role: str) -> dict[int, int]:
        """How many sockets each process of a role owns, by index; asks the kernel nothing.

        One that has died and was not yet reaped is among them.
        """
        counts = self.owned_counts()
        columns = self._segment.columns
        live = (columns.row_state & np.uint64(0xFF)) == LIVE
        rows = np.flatnonzero(live & (columns.row_role == ROLES.index(role)))
        return dict(zip(rows.tolist(), counts[rows].tolist(), strict=True))

    @property
    def slots(self) -> int:
        """How many sockets the table holds."""
        return self._segment.layout.slots

    def host_alive(self) -> bool:
        """Whether some process serves the descriptor store."""
        self._check()
        return self._lock_file.holder(HOST) != 0

    def in_use(self) -> int:
        """How many slots are taken."""
        self._check()
        return int(np.count_nonzero(self._segment.columns.state != FREE))

    def connections(self) -> int:
        """How many slots hold something else than a listener."""
        columns = self._segment.columns
        return int(np.count_nonzero((columns.state != FREE) & (columns.kind != _LISTENER)))

    def orphans(self) -> list[int]:
        """The live sockets whose owner has died and that wait for a new one, listeners included."""
        self._check()
        columns = self._segment.columns
        versions = columns.versioned_ref >> np.uint64(SLOT_BITS)
        even = (versions & np.uint64(1)) == 0
        rehomed = (columns.state == LIVE) & even & (columns.on_owner_death != 0)
        # A copy: numpy reads its argument more than once, and others store while it does. And the
        # owners before the living: who joins in between must not look dead.
        owners = columns.owner.copy()
        words = np.array(self._processes.live_words(), "u8")
        rows = np.flatnonzero(rehomed & ~np.isin(owners, words))
        return [int(versions[row]) << SLOT_BITS | row for row in rows.tolist()]

    def listeners(self) -> list[int]:
        """The live sockets that listen and outlive their owner: those of a server."""
        self._check()
        columns = self._segment.columns
        rows = np.flatnonzero(
            (columns.kind == _LISTENER) & (columns.state == LIVE) & (columns.on_owner_death != 0)
        )
        versions = (columns.versioned_ref[rows] >> np.uint64(SLOT_BITS)).tolist()
        found = zip(rows.tolist(), versions, strict=True)
        return [version << SLOT_BITS | row for row, version in found if not version & 1]

    def is_listener(self, sid: int) -> bool:
        """Whether an id names a socket that listens."""
        return bool(self._segment.cells.kind[index_of(sid) & SLOT_MASK] == _LISTENER)


def index_of(sid: int) -> int:
    """An id of any integer type as a plain int."""
    return sid if sid.__class__ is int else operator.index(sid)
