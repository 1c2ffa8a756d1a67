"""Repair: retiring a stripe, recounting its slots, reaping the dead.

Rare, so Python only, over both engines. Everything here is done under the arbiter, a kernel lock
that dies with its holder, and stores absolute values alone: a repairer may be killed anywhere, and
the next one starts over.

    retire(s)   1 fetch the spare semaphore of generation g+1, value 0; one that has a value (or is
                  another user's) is passed over for that of g+2
                2 ctl = (g+1, CLOSED)
                3 barrier: every OWN that was stored before its owner read g is visible now
                4 unlink the old semaphore's name
                5 wait while a *live* process claims OWN with <= g
                6 freeze the set {dead, BROKEN}; recount the block
                7 ctl = (g+1, OPENING); post the new semaphore once
                8 zero exactly the frozen set's claims; ctl = (g+1, OPEN)

Found CLOSED (not posted, for sure) it is resumed at 3; found OPENING (perhaps posted) the stripe is
retired again, from 1. A wrong suspicion costs one semaphore and nothing else.
"""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import logging
import time
import typing

import numpy as np

from .audit import Audit
from .engine import Engine, recycle, settle
from .errors import ClosedError, PoisonedError, StripeTimeoutError
from .layout import (
    BROKEN,
    CLOSED,
    FREE,
    LIVE,
    OPEN,
    OPENING,
    OWN,
    REAPING,
    RECYCLING,
    SLOT_BITS,
    SLOT_MASK,
)
from .peers import forget_name
from .processes import ARBITER, LockFile, Processes, barrier
from .segment import Segment
from .semaphores import Semaphores

log = logging.getLogger("shmsock")

DRAIN_TIMEOUT_S = 1.0
_PATIENCE_S = 0.1  # for an ordinary take while reaping; after that the stripe is retired


@contextlib.contextmanager
def _collected(failures: list[OSError]) -> collections.abc.Iterator[None]:
    """Go on after the kernel refused something (no room for a semaphore), and keep the error."""
    try:
        yield
    except OSError as error:
        failures.append(error)


class Recovery:
    """Repair as one process does it, participant or not.

    Attributes:
        counters: How often each kind of repair was done by this process.
    """

    def __init__(
        self,
        segment: Segment,
        processes: Processes,
        semaphores: Semaphores,
        engine: Engine | None = None,
    ) -> None:
        """Without an engine (a reader of the table) every stripe is retired instead of taken."""
        self._segment = segment
        self._cells = segment.cells
        self._columns = segment.columns
        self._layout = segment.layout
        self._processes = processes
        self._semaphores = semaphores
        self._engine = engine
        self._blocked: dict[int, float] = {}
        self.auditor = Audit(segment, processes)
        # Called with a stripe inside it, before it is recounted (mending.py).
        self.prepare: collections.abc.Callable[[int], object] | None = None
        self.counters = {"retired": 0, "recounted": 0, "reaped": 0}

    # -- when to repair -------------------------------------------------------------------------

    def look(self, stripe: int | None = None) -> bool:
        """Repair what needs it: the dead, and stripes that are broken or were left half retired.

        Args:
            stripe: One stripe that seems stuck; None looks at all of them.

        Returns:
            False when somebody else holds the arbiter, so is at it.

        Concurrency: called without the local lock; may wait up to a second for a live process
            that sits in a stripe under repair.
        If killed: the arbiter is free again and ctl, claims and row states say what is unfinished.
        """
        stripes = range(self._layout.stripes) if stripe is None else (stripe,)
        if stripe is None and self._engine is not None:
            self._engine.own_up()
        if not self._processes.dead() and not any(map(self._needs_retirement, stripes)):
            return True
        with self._processes.lock_file.exclusive(ARBITER, timeout_s=0) as arbiter:
            if not arbiter:
                return False
            failures: list[OSError] = []  # what cannot be had for one must not hinder the others
            for index in self._processes.dead():
                with _collected(failures):
                    self.reap(index)
            for each in stripes:
                if self._needs_retirement(each):
                    with _collected(failures):
                        self.retire(each)
        if failures:
            raise failures[0]
        return True

    def _needs_retirement(self, stripe: int) -> bool:
        if self._is_nonsense(self._cells.ctl[stripe]):
            return False
        if self._cells.ctl[stripe] & 3 != OPEN:
            # A blocker named less than a second ago is only looked at again.
            return time.monotonic() - self._blocked.get(stripe, -1e9) >= DRAIN_TIMEOUT_S or bool(
                not self._live_owners(stripe, self._cells.ctl[stripe] >> 2)
            )
        return bool(((self._columns.claims[:, stripe] & 3) == BROKEN).any())

    @staticmethod
    def _is_nonsense(control: int) -> bool:
        """No stripe ever has this word: whatever followed from it would let two processes in."""
        return control & 3 > OPENING or not control >> 2

    def arbitrated(self, timeout_s: float) -> contextlib.AbstractContextManager[bool]:
        """Hold the arbiter; yields whether it was had in time."""
        return self._processes.lock_file.exclusive(ARBITER, timeout_s)

    # -- retirement -----------------------------------------------------------------------------

    def retire(self, stripe: int) -> bool:
        """Give a stripe a new semaphore and recount its slots; the arbiter is held.

        Returns:
            False when a live process stayed inside for a second: the stripe is left CLOSED, and
            whoever looks next goes on.
        """
        control = self._cells.ctl[stripe]
        generation, phase = control >> 2, control & 3
        if self._is_nonsense(control):  # for the audit to find: the segment will be poisoned
            log.error("stripe %d has the word %#x, which cannot be", stripe, control)
            return False
        semaphore = self._spare(stripe, generation) if phase == CLOSED else None
        while semaphore is None:
            # A spare that has a value would let in whoever takes it while we recount.
            generation += 1
            semaphore = self._spare(stripe, generation)  # 1
        if control != generation << 2 | CLOSED:
            self._cells.ctl[stripe] = generation << 2 | CLOSED  # 2
        for index in self._processes.dead():
            self._processes.fence(index)
        barrier()  # 3. ORDER: pairs with OWN before ctl in Engine._attempt
        for old in range((control >> 2) - (phase == CLOSED), generation):
            self._semaphores.unlink(stripe, old)  # 4
        if not self._drained(stripe, generation):  # 5
            return False
        frozen = self._dead_rows()
        broken = np.flatnonzero((self._columns.claims[:, stripe] & 3) == BROKEN).tolist()  # 6
        self.recount(stripe, frozen)
        if self._cells.ctl[stripe] != generation << 2 | CLOSED:
            # Foreign code closed our lock file, and with it the arbiter: somebody else went on.
            return False
        self._cells.ctl[stripe] = generation << 2 | OPENING  # 7
        semaphore.release()
        for index in {*frozen, *broken}:  # 8
            self._cells.claims[index * self._layout.stripes + stripe] = 0
        self._cells.ctl[stripe] = generation << 2 | OPEN
        self._blocked.pop(stripe, None)
        self.counters["retired"] += 1
        log.info("stripe %d retired: generation %d", stripe, generation)
        with contextlib.suppress(OSError):  # the next retirement makes it, if it must
            self._semaphores.make(stripe, generation + 1)
            self._semaphores.make(stripe, generation + 2)
        return True

    def _spare(self, stripe: int, generation: int):  # type: ignore[no-untyped-def]
        try:
            return self._semaphores.make(stripe, generation)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(
                    errno.ENOSPC,
                    f"stripe {stripe} has no spare semaphore and /dev/shm is full: free some of it",
                ) from None
            raise

    def _dead_rows(self) -> list[int]:
        """The rows that were fenced: nothing they do can come later."""
        return np.flatnonzero((self._columns.row_state & 0xFF) == REAPING).tolist()

    def _live_owners(self, stripe: int, generation: int) -> list[int]:
        """Live processes that claim to be inside with an earlier generation's semaphore."""
        claims = self._columns.claims[:, stripe]
        inside = np.flatnonzero(((claims & 3) == OWN) & ((claims >> 2) < generation)).tolist()
        return [
            index
            for index in inside
            if self._cells.row_state[index] & 0xFF == LIVE and self._processes.is_alive(index)
        ]

    def _drained(self, stripe: int, generation: int) -> bool:
        """Step 5: wait for live owners of earlier generations; fence those who die meanwhile.

        A blocker that was named already is only looked at: whoever repairs has others to serve.
        """
        deadline = time.monotonic() + (0 if stripe in self._blocked else DRAIN_TIMEOUT_S)
        nap_s = 50e-6
        while owners := self._live_owners(stripe, generation):
            if time.monotonic() >= deadline:
                who = ", ".join(map(self._processes.describe, owners))
                if stripe not in self._blocked:
                    log.error("stripe %d stays closed: %s is alive inside it", stripe, who)
                self._blocked[stripe] = time.monotonic()
                return False
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, 0.005)
        dead = [i for i in self._processes.dead() if self._cells.row_state[i] & 0xFF == LIVE]
        for index in dead:
            self._processes.fence(index)
        return True

    # -- recount --------------------------------------------------------------------------------

    def recount(self, stripe: int, dead: collections.abc.Iterable[int]) -> None:
        """Recompute what is derived from what is true, in one block; the stripe is ours alone.

        Args:
            stripe: Its block is recounted.
            dead: Fenced rows whose ``held`` no longer counts. A BROKEN process lives: its held,
                owner and writer stay.
        """
        block = self._layout.block
        begin = stripe * block
        rows = slice(begin, begin + block)
        if self.prepare is not None:
            self.prepare(stripe)
        for index in dead:
            self._columns.held[rows, index] = 0
        live = np.array([0, *self._living_words(dead)], "u8")
        stale = np.flatnonzero(~np.isin(self._columns.heir[rows], live))
        for offset in stale.tolist():  # who offered it watches it again, or has died too
            self._cells.heir[begin + offset] = 0
        states = self._columns.state[rows]
        attached = np.count_nonzero(self._columns.held[rows], axis=1)
        vrefs = self._columns.versioned_ref[rows]
        versions, nrefs = vrefs >> np.uint64(SLOT_BITS), vrefs & np.uint64(SLOT_MASK)
        even = (versions & np.uint64(1)) == 0
        expected = attached + (even & (self._columns.retired[rows] == 0))
        # Half a request must never reach another parser: only an idle socket can go on elsewhere.
        rehomed = (self._columns.on_owner_death[rows] != 0) & (self._columns.busy[rows] == 0)
        orphaned = ~np.isin(self._columns.owner[rows], live) & ~rehomed
        torn = ~np.isin(self._columns.writer[rows], live)
        suspect = np.where(
            states == FREE,
            (nrefs != 0) | self._leftovers(rows),
            (states != LIVE) | (expected != nrefs) | (expected == 0) | (even & (orphaned | torn)),
        )
        for offset in np.flatnonzero(suspect).tolist():
            self._recount_slot(begin + offset, bool(orphaned[offset]), bool(torn[offset]))
        self.counters["recounted"] += 1

    def _leftovers(self, rows: slice) -> np.ndarray[typing.Any, typing.Any]:
        """Which slots still say something of a socket; of a FREE one that must be nothing."""
        columns = self._columns
        found: np.ndarray[typing.Any, typing.Any] = (
            (columns.owner[rows] != 0) | (columns.writer[rows] != 0) | (columns.retired[rows] != 0)
        ) | (columns.heir[rows] != 0)
        return found

    def _living_words(self, dead: collections.abc.Iterable[int]) -> list[int]:
        gone = set(dead)
        return [word for word in self._processes.live_words() if word & 0xFFFF not in gone]

    def _recount_slot(self, slot: int, orphaned: bool, torn: bool) -> None:
        cells = self._cells
        state = cells.state[slot]
        version = cells.versioned_ref[slot] >> SLOT_BITS
        if state == FREE:  # CRASH(create): killed before LIVE
            cells.owner[slot] = cells.writer[slot] = cells.retired[slot] = 0
            cells.heir[slot] = 0
            cells.versioned_ref[slot] = version << SLOT_BITS
        elif state == RECYCLING:  # CRASH(recycle)
            recycle(cells, slot)
        else:
            if not version & 1 and (torn or orphaned):
                self._fail(slot, version, torn=torn)
            settle(cells, slot, self._layout.processes)

    def _fail(self, slot: int, version: int, *, torn: bool) -> None:
        """Fail a socket on behalf of the dead; its descriptor is shut down by the host's sweep."""
        code = errno.EPIPE if torn else errno.EOWNERDEAD
        text = "a writer died in mid-message" if torn else "the owner process died"
        self._cells.error_code[slot] = code
        self._columns.error_text[slot] = text.encode()
        nref = self._cells.versioned_ref[slot] & SLOT_MASK
        self._cells.versioned_ref[slot] = (version + 1) << SLOT_BITS | nref

    # -- reaping --------------------------------------------------------------------------------

    def reap(self, index: int) -> bool:
        """Give back all that a dead process held; the arbiter is held, the byte was seen free.

        Also how a process leaves: leaving is dying with less to do.

        Returns:
            False when a live process kept a stripe closed: the row stays, for the next look.
        """
        who = self._processes.describe(index)
        word = self._cells.row_state[index] >> 8 << 16 | index
        self._processes.fence(index)
        barrier()  # a claim it stored is visible from here on
        complete = True
        failures: list[OSError] = []
        for stripe in self._stripes_of(index, word):
            claims = self._columns.claims[:, stripe]
            stuck = claims[index] != 0 or self._cells.ctl[stripe] & 3 != OPEN
            if stuck or not self.recount_in_turn(stripe):
                with _collected(failures):
                    complete &= self.retire(stripe)
        if failures:
            raise failures[0]
        if not complete or self._columns.claims[index].any():
            return False
        forget_name(self._segment.name, word)
        self._processes.free(index)
        self.counters["reaped"] += 1
        log.info("%s was reaped", who)
        return True

    def _stripes_of(self, index: int, word: int) -> list[int]:
        """The stripes where a process claims, is attached, owns, writes or is to inherit."""
        columns = self._columns
        slots = (columns.held[:, index] != 0) | (columns.owner == word) | (columns.writer == word)
        slots |= columns.heir == word
        touched = slots.reshape(self._layout.stripes, self._layout.block).any(axis=1)
        return np.flatnonzero(touched | (columns.claims[index] != 0)).tolist()

    def recount_in_turn(self, stripe: int) -> bool:
        """Recount inside the stripe, taken in the ordinary way; False if it could not be had."""
        if self._engine is None:
            return False

        def body(_: int, __: object) -> int:
            self.recount(stripe, self._dead_rows())
            return 1

        try:
            return bool(self._engine.run(stripe, body, -1, patience_s=_PATIENCE_S))
        except (StripeTimeoutError, ClosedError, PoisonedError):
            return False

    # -- audit ----------------------------------------------------------------------------------

    def audit(self, patience_s: float = 0.0) -> list[str]:
        """A line for each invariant that does not hold; see audit.py."""
        return [breach.text for breach in self.auditor.breaches(patience_s)]


def look_from_outside(segment: Segment) -> None:
    """Look for the dead without being a participant; every stripe is retired instead of taken."""
    lock_file = LockFile.open(segment.name, create=False)
    if lock_file.share():
        semaphores = Semaphores(segment.name, segment.layout.stripes)
        try:
            if lock_file.is_current():
                Recovery(segment, Processes(segment, lock_file), semaphores).look()
        finally:
            semaphores.close()
            lock_file.unshare()
