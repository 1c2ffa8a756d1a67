"""Mending: reap, retire, recount all there is, look again; poison what stays wrong.

Everything is done under the arbiter and by absolute stores, so that a mender may be killed anywhere
and the next one starts over. What is derived is recomputed. A socket whose own words make no sense
is failed: one connection is lost. What is stored once and concerns everybody (a version, a stripe's
word, a process row, the header) cannot be made up: then the segment is marked poisoned, every
operation says so from there on, and the supervisor starts a new one.
"""

from __future__ import annotations

import errno
import logging
import typing

import numpy as np

from .audit import Audit, Breach, Cure
from .errors import AlreadyRunningError
from .layout import (
    BROKEN,
    FREE,
    KIND_NAMES,
    LIVE,
    ON_OWNER_DEATH,
    OPEN,
    RECYCLING,
    ROLES,
    SLOT_BITS,
    SLOT_MASK,
    VERSION_LIMIT,
    recycled_version,
)
from .processes import ARBITER, Processes
from .recovery import Recovery
from .segment import Segment
from .semaphores import SPARE_GENERATIONS, Semaphores

log = logging.getLogger("shmsock")

_ARBITER_TIMEOUT_S = 5.0


class Mended(typing.NamedTuple):
    """What ``mend`` did.

    Attributes:
        found: The breaches before.
        left: Those after it; of a poisoned segment also why.
        reaped: How many dead processes were reaped,
        retired: how many stripes got a new semaphore,
        recounted: and how many were recounted.
        poisoned: Why the segment is poisoned; empty when it is not.
    """

    found: list[str]
    left: list[str]
    reaped: int
    retired: int
    recounted: int
    poisoned: str


class Mender:
    """Mends one segment, for a participant or somebody outside."""

    def __init__(
        self,
        segment: Segment,
        processes: Processes,
        semaphores: Semaphores,
        recovery: Recovery,
    ) -> None:
        """Nothing is done yet."""
        self._segment = segment
        self._cells, self._columns = segment.cells, segment.columns
        self._layout = segment.layout
        self._processes = processes
        self._semaphores = semaphores
        self._recovery = recovery
        self._audit: Audit = recovery.auditor

    def mend(self) -> Mended:
        """Put right what can be; mark the segment poisoned if that is not all.

        Raises:
            AlreadyRunningError: Somebody else has been repairing for five seconds.

        Concurrency: others wait while their stripe is recounted; a stripe in which a live process
            was stopped is left as it is.
        If killed: what was not done is found again by the next one.
        """
        recovery, segment = self._recovery, self._segment
        before = dict(recovery.counters)
        with recovery.arbitrated(_ARBITER_TIMEOUT_S) as arbiter:
            if not arbiter:
                pid = self._processes.lock_file.holder(ARBITER)
                raise AlreadyRunningError(f"process {pid} has been repairing for 5 s: try again")
            found = left = self._audit.breaches()
            hopeless = [breach for breach in found if breach.cure is Cure.BEYOND]
            if not hopeless:
                self._repair(found)
                left = self._audit.breaches()
                hopeless = [breach for breach in left if breach.cure is not Cure.WAITS]
            if hopeless and segment.poison(hopeless[0].text):
                log.critical("runtime %r is poisoned: %s", segment.name, hopeless[0].text)
        done = {key: recovery.counters[key] - count for key, count in before.items()}
        why = segment.poisoned_why() if segment.get("poisoned") else ""
        return Mended([b.text for b in found], [b.text for b in left], **done, poisoned=why)

    def _repair(self, found: list[Breach]) -> None:
        """The arbiter is held, and nothing that was found is beyond repair."""
        recovery = self._recovery
        for index in self._processes.dead():
            recovery.reap(index)
        # A lost or doubled token, or a claim without a process: that semaphore is worth nothing.
        doubtful = {breach.stripe for breach in found} | set(self._claimed_by_nobody())
        recovery.prepare = self._prepare
        try:
            for stripe in range(self._layout.stripes):
                if stripe in doubtful or self._is_broken(stripe):
                    generation = self._cells.ctl[stripe] >> 2
                    for spare in range(generation + 1, generation + 1 + SPARE_GENERATIONS):
                        self._semaphores.empty(stripe, spare)
                    recovery.retire(stripe)
                elif not recovery.recount_in_turn(stripe):
                    recovery.retire(stripe)
        finally:
            recovery.prepare = None
        self._clear_claims()
        for index in self._processes.taken():
            if self._cells.row_role[index] >= len(ROLES):
                self._cells.row_role[index] = 0

    def _is_broken(self, stripe: int) -> bool:
        claims = self._columns.claims[:, stripe] & 3
        return self._cells.ctl[stripe] & 3 != OPEN or bool((claims == BROKEN).any())

    def _free_rows(self) -> list[int]:
        return np.flatnonzero((self._columns.row_state & np.uint64(0xFF)) == FREE).tolist()

    def _claimed_by_nobody(self) -> list[int]:
        """The stripes that a row without a process claims."""
        rows = self._free_rows()
        return np.flatnonzero(self._columns.claims[rows].any(axis=0)).tolist()

    def _clear_claims(self) -> None:
        """Zero what FREE rows claim; their stripes were retired.

        ORDER: gathered first. Nobody registers in a row that is not clean, and after the last of
        these stores it is: nothing may be stored to it then.
        """
        rows = self._free_rows()
        for at, stripe in np.argwhere(self._columns.claims[rows]).tolist():
            self._cells.claims[rows[at] * self._layout.stripes + stripe] = 0

    # -- inside a stripe ------------------------------------------------------------------------

    def _prepare(self, stripe: int) -> None:
        """Make of a block something that recount can finish; the stripe is ours alone."""
        columns, block = self._columns, self._layout.block
        rows = slice(stripe * block, (stripe + 1) * block)
        held, states = columns.held[rows], columns.state[rows]
        odd = (columns.versioned_ref[rows] >> np.uint64(SLOT_BITS) & np.uint64(1)) == 1
        free = states == FREE
        nobodys = np.zeros(self._layout.processes, "?")
        nobodys[self._free_rows()] = True
        wrong = (held != 0) & (free[:, None] | nobodys | (held > 1))
        for offset, index in np.argwhere(wrong).tolist():
            keep = not free[offset] and not nobodys[index]
            self._cells.held[(rows.start + offset) * self._layout.processes + index] = keep
        for offset in np.flatnonzero(free & odd).tolist():
            self._skip_life(rows.start + offset)
        strange = (states > RECYCLING) | (
            (states == LIVE)
            & (
                (columns.kind[rows] >= len(KIND_NAMES))
                | (columns.on_owner_death[rows] >= len(ON_OWNER_DEATH))
                | (columns.retired[rows] > 1)
                | (columns.busy[rows] > 1)
            )
        )
        for offset in np.flatnonzero(strange).tolist():
            self._fail(rows.start + offset)

    def _skip_life(self, slot: int) -> None:
        """A FREE slot with an odd version: whatever that life was, it is over."""
        version = self._cells.versioned_ref[slot] >> SLOT_BITS
        if version < VERSION_LIMIT:
            self._cells.versioned_ref[slot] = recycled_version(version) << SLOT_BITS

    def _fail(self, slot: int) -> None:
        """Nobody can say what this socket was: fail it, and let recount recycle it when it may.

        ORDER: the version before the state: what becomes LIVE has failed already.
        """
        cells = self._cells
        cells.kind[slot] = cells.on_owner_death[slot] = cells.busy[slot] = 0
        cells.retired[slot] = cells.retired[slot] != 0
        word = cells.versioned_ref[slot]
        version = word >> SLOT_BITS
        if not version & 1 and 0 < version < VERSION_LIMIT:
            cells.error_code[slot] = errno.EIO
            self._columns.error_text[slot] = b"its words in the table were damaged"
            cells.versioned_ref[slot] = (version + 1) << SLOT_BITS | word & SLOT_MASK
        cells.state[slot] = LIVE
