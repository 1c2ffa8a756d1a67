"""What both engines have: what they work on, whom they call, and words for their errors."""

from __future__ import annotations

import collections.abc
import operator
import typing

from .errors import ClosedError, TableFullError
from .layout import BROKEN, LIVE, OWN, SLOT_BITS, SLOT_MASK, WANT, Status
from .segment import Segment
from .semaphores import Semaphores

STRIPE_TIMEOUT_S = 10.0
SLOT_END = 1 << 63  # no id is as large

# What a transition did, as bits.
NOTHING, DONE, RECYCLED = 0, 1, 2


class EngineBase:
    """One process's engine, as far as both are alike.

    Attributes:
        repair: Called without the local lock: a stripe may be stuck.
        let_go: Called without the lock: a slot was let go of for the last time.
        peer_of: Who is at the other end of a connection that was accepted (cache.py).
        io: What this process's references can do beyond counting (socket.py).
    """

    def __init__(self, segment: Segment, semaphores: Semaphores) -> None:
        """Nobody is called yet."""
        self.segment = segment
        self.cells = segment.cells
        self.semaphores = semaphores
        self.repair: collections.abc.Callable[[int], object] = lambda stripe: None
        self.let_go: collections.abc.Callable[[int, bool], None] = lambda sid, recycled: None
        self.peer_of: collections.abc.Callable[[int], bytes] = lambda number: b""
        self.io: typing.Any = None

    def status(self, sid: int) -> Status:
        """What an id names now; takes nothing."""
        sid = operator.index(sid)
        slot = sid & SLOT_MASK
        slots = self.segment.layout.slots
        if 0 < sid < SLOT_END and slot < slots and not sid >> SLOT_BITS & 1:
            cells = self.cells
            if cells.state[slot] == LIVE:
                version = cells.versioned_ref[slot] >> SLOT_BITS
                if version == sid >> SLOT_BITS:
                    return Status.LIVE
                if version == (sid >> SLOT_BITS) + 1:
                    return Status.FAILED
        return Status.GONE


class Participant(typing.Protocol):
    """What the words below need of an engine."""

    segment: Segment
    closed: bool
    foreign: bool

    @property
    def index(self) -> int:
        """Its process row."""

    @property
    def row_word(self) -> int:
        """What its row holds as long as nobody fenced it: ``epoch << 8 | LIVE``."""


def check_participation(engine: Participant) -> None:
    """Raise what keeps a process out of the stripes: poisoned, closed, fenced or forked."""
    segment = engine.segment
    segment.check()
    # A forked child's inherited engine would claim in its parent's name.
    if engine.foreign or engine.closed or segment.cells.row_state[engine.index] != engine.row_word:
        raise ClosedError(
            f"this process is no participant of runtime {segment.name!r} any more: "
            "Runtime.attach again"
        )


def blockers(engine: Participant, stripe: int, waited_s: float) -> str:
    """Who claims a stripe, for StripeTimeoutError."""
    names = {WANT: "WANT", OWN: "OWN", BROKEN: "BROKEN"}
    segment, found = engine.segment, []
    for index in range(segment.layout.processes):
        claim = segment.cells.claims[index * segment.layout.stripes + stripe]
        if claim and index != engine.index:
            pid = segment.cells.row_pid[index]
            found.append(f"process {index} (pid {pid}) claims {names[claim & 3]}")
    who = ", ".join(found) or "no process claims it"
    return f"stripe {stripe} could not be taken in {waited_s:.1f} s: {who}"


def table_full(slots: int) -> TableFullError:
    """What create raises."""
    return TableFullError(
        f"all {slots} slots are in use: raise `slots` of Runtime.create "
        "(or --slots of `shmsock serve`), or close connections"
    )
