"""Taking a stripe: process p, stripe s (DESIGN 5).

    take   g = generation(ctl[s])                     give   post the semaphore
           claims[p,s] = (g, WANT)                           claims[p,s] = 0
           trywait; contended: claims[p,s] = 0, sleep, again
           claims[p,s] = (g, OWN)
           generation(ctl[s]) == g, my row LIVE ? inside : claims[p,s] = 0, again

A semaphore has no owner, and a process killed inside ``acquire`` often has the token and has told
nobody. So nobody ever asks who has it: the claims say who *may* be inside, and a stripe at which
somebody died is given a new semaphore. Nobody sleeps inside the semaphore either: ``acquire(0)``,
and a nap outside.

One process-local lock makes the process one thread here. It is dropped between tries, so that a
thread that naps stops nobody, and it is held from the last look at the count to give.

An exception inside the stripe (KeyboardInterrupt, ``PyThreadState_SetAsyncExc``) leaves the claim
BROKEN: "as if dead, for this stripe". Any waiter may then retire the stripe, and we do so ourselves
before anything else. A finaliser or signal handler may run inside, so it only appends to a deque.

These plain stores rely on x86-64 keeping them in order.
"""

from __future__ import annotations

import collections
import collections.abc
import threading
import time
import typing
import weakref

import posix_ipc

from ._engine_common import (
    NOTHING,
    STRIPE_TIMEOUT_S,
    EngineBase,
    blockers,
    check_participation,
)
from .errors import StripeTimeoutError
from .layout import BROKEN, HEADER_INDEX, LIVE, OWN, WANT
from .segment import Segment
from .semaphores import Semaphores

_LOOK_AFTER_S = 0.05  # a stripe contended for this long may be stuck: look for the dead
_NAP_S = (20e-6, 1e-3)

CONTENDED = -1  # beside what a transition did: it was not tried

Body = collections.abc.Callable[[int, typing.Any], int]
_POISONED = HEADER_INDEX["poisoned"]


class Stripes(EngineBase):
    """One process's way into the stripes; the transitions that run inside are its subclass's."""

    def __init__(self, segment: Segment, semaphores: Semaphores, index: int, epoch: int) -> None:
        """For the process that registered row ``index`` at ``epoch``."""
        super().__init__(segment, semaphores)
        self._header = segment.header
        self.index = index
        self.word = epoch << 16 | index
        self.closed = False
        self.foreign = False  # a forked child's inherited engine: references are inert
        self.lock = threading.Lock()
        self._slots = segment.layout.slots
        self._processes = segment.layout.processes
        self._stripes = segment.layout.stripes
        self._block = segment.layout.block
        self.row_word = epoch << 8 | LIVE
        self._claims_at = index * self._stripes
        # The serial numbers of the live references, and these weakly, by slot.
        self._holds: dict[int, dict[int, weakref.ref[typing.Any]]] = {}
        # What finalisers could not give back, as id and serial number.
        self._dropped: collections.deque[tuple[int, int]] = collections.deque()

    def drain(self) -> None:
        """Give back what finalisers could not; the subclass knows how."""
        raise NotImplementedError

    def _counts(self, body: Body) -> bool:
        """Whether ``body`` attaches or detaches, so changes the count of its slot."""
        raise NotImplementedError

    def run(
        self,
        stripe: int,
        body: Body,
        slot: int,
        argument: typing.Any = None,
        *,
        quick: Body | None = None,
        patience_s: float = STRIPE_TIMEOUT_S,
    ) -> int:
        """Run a transition inside a stripe.

        Args:
            stripe: Which.
            body: Called with ``slot`` and ``argument`` inside; stores, and returns bits.
            slot: Passed on; for attach and detach also what an exception lets go of.
            argument: Passed on.
            quick: Called under the local lock before every try; if it returns a number other than
                0 that is the result and the stripe is not needed after all.
            patience_s: How long to wait for the stripe.

        Raises:
            StripeTimeoutError: A live process sits in the stripe.
            ClosedError: We left, or were taken for dead.
            PoisonedError: The segment failed its audit.

        Concurrency: naps between tries, without the local lock; never waits inside.
        If killed: the claim says where; recovery retires the stripe and recounts its block.
        """
        if self.foreign:  # before the lock: a thread that the fork left behind may have it
            self._check_participation()
        nap_s = _NAP_S[0]
        started = looked = 0.0
        while True:
            with self.lock:
                result = quick(slot, argument) if quick is not None else NOTHING
                if not result:
                    result = self._attempt(stripe, body, slot, argument)
            if result != CONTENDED:
                if self._dropped:
                    self.drain()
                return result
            now = time.monotonic()
            started = started or now
            looked = looked or now
            if now - looked >= _LOOK_AFTER_S or self.cells.claims[self._claims_at + stripe]:
                self.repair(stripe)
                looked = time.monotonic()
            if now - started >= patience_s:
                raise StripeTimeoutError(blockers(self, stripe, now - started))
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _NAP_S[1])

    def _attempt(self, stripe: int, body: Body, slot: int, argument: typing.Any) -> int:
        """Try once to take the stripe and run ``body``; the local lock is held."""
        cells = self.cells
        if (
            self.closed
            or self.foreign
            or self._header[_POISONED]
            or cells.row_state[self.index] != self.row_word
        ):
            self._check_participation()
        claims, control = cells.claims, cells.ctl
        mine = self._claims_at + stripe
        if claims[mine]:
            # An exception left it. WANT is never stored over it: that would hide the break.
            self._admit(stripe)
            return CONTENDED
        before = control[stripe] & ~3
        semaphore = self.semaphores.get(stripe, before >> 2)
        if semaphore is None:  # retired between the two lines
            return CONTENDED
        try:
            claims[mine] = before | WANT
            try:
                semaphore.acquire(0)
            except posix_ipc.BusyError:
                claims[mine] = 0
                return CONTENDED
            # ORDER: OWN before the generation; pairs with the barrier in recovery.retire, which
            # makes this store visible to whoever stored the next generation before us reading it.
            claims[mine] = before | OWN
            if control[stripe] & ~3 != before:
                claims[mine] = 0  # retired meanwhile: the token is worthless, never post it
                return CONTENDED
            if cells.row_state[self.index] != self.row_word:
                # Fenced, with a good token: post it, or the stripe would be stuck with no claim.
                # WHY NOT raise here: ``_break`` would speak for a row that may have a new tenant by
                # then. The next try looks at the row first, and raises.
                semaphore.release()
                claims[mine] = 0
                return CONTENDED
            result = body(slot, argument)
            # ORDER: post, then clear. The other way round a kill between would leave a taken token
            # that no claim speaks of.
            semaphore.release()
            claims[mine] = 0
        except BaseException:
            self._break(mine, before, body, slot)
            raise
        return result

    def _break(self, mine: int, before: int, body: Body, slot: int) -> None:
        """After an exception between WANT and give: say so in one store; recount does the rest.

        ORDER: held and count first. A second exception here leaves WANT or OWN, which the next
        ``_attempt``, or the timer, turns into BROKEN.
        """
        if not self.cells.claims[mine]:
            return
        if self._counts(body):
            self.cells.held[slot * self._processes + self.index] = 0
            self._holds.pop(slot, None)
        self.cells.claims[mine] = before | BROKEN

    def _check_participation(self) -> int:
        check_participation(self)
        return 0

    def own_up(self) -> None:
        """Say BROKEN where an exception in ``_break`` itself left a WANT or OWN of ours.

        Under the local lock none of our threads is inside, so a claim of ours is a leftover; others
        would wait for it for ever if we never took that stripe again. For the timer.
        """
        with self.lock:
            if self.closed or self.cells.row_state[self.index] != self.row_word:
                return
            for stripe in range(self._stripes):
                if self.cells.claims[self._claims_at + stripe]:
                    self._admit(stripe)

    def _admit(self, stripe: int) -> None:
        """Finish an interrupted ``_break``: held and counts must agree before the recount.

        Held without a count would never be given back; a count without held would keep references
        to a slot that may be recycled.
        """
        mine = self._claims_at + stripe
        if self.cells.claims[mine] & 3 == BROKEN:
            return
        for slot in range(stripe * self._block, (stripe + 1) * self._block):
            at = slot * self._processes + self.index
            if slot not in self._holds:
                if self.cells.held[at]:
                    self.cells.held[at] = 0
            elif not self.cells.held[at]:
                self._holds.pop(slot)
        self.cells.claims[mine] = self.cells.claims[mine] | BROKEN
