"""The reference engine: counted references on top of the transitions (_table_py).

    INVARIANT: count[slot] > 0  =>  held[slot, me] == 1, so the slot is not recycled and its version
               is v or v + 1. Reading it is all that a second reference costs.

The count of a slot is the set of serial numbers of the live reference objects. A set, because it
makes taking a reference away idempotent: an exception between two bytecodes can then lose nothing
and take nothing twice, as whoever drops the object repeats it. Beside each number is a weak
reference to its object: should even the finaliser be interrupted, the timer sees that it is gone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import typing
import weakref

from ._engine_common import DONE, NOTHING, RECYCLED, SLOT_END
from ._stripes_py import CONTENDED, Body
from ._table_py import Table, settle
from .errors import ClosedError, PoisonedError, StripeTimeoutError
from .layout import LIVE, SLOT_BITS, SLOT_MASK
from .segment import Segment
from .semaphores import Semaphores

NAME = "py"

log = logging.getLogger("shmsock")

# Serial number, version, whether a failed socket will do, and the reference.
Attachment = tuple[int, int, bool, "weakref.ref[Reference]"]


class Reference:
    """A counted hold on a socket: closed by ``close``, by ``with``, or by being dropped; once."""

    __slots__ = ("__weakref__", "_engine", "_serial", "id")

    _engine: Engine
    _serial: int
    id: int

    def __init__(self, engine: Engine, sid: int, serial: int) -> None:
        """Made by ``Engine.address`` alone."""
        self._engine = engine
        self._serial = serial
        self.id = sid

    @property
    def failed(self) -> bool:
        """Whether the socket has failed: one read of shared memory."""
        sid = self.id
        try:
            vref = self._engine.cells.versioned_ref[sid & SLOT_MASK]
        except AttributeError:  # the runtime was closed under the reference
            return True
        return vref >> SLOT_BITS != sid >> SLOT_BITS

    @property
    def closed(self) -> bool:
        """Whether this reference was given back."""
        return not self._serial

    def add_reference(self) -> typing.Self:
        """Take one more reference; works on a failed socket too.

        Raises:
            ClosedError: This one was closed.
        """
        return typing.cast(typing.Self, self._engine.add_reference(self))

    def close(self) -> None:
        """Give the reference back. Again does nothing."""
        serial = self._serial
        if serial:
            self._engine.dereference(self.id, serial)
            self._serial = 0

    def __enter__(self) -> typing.Self:
        """The reference itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""
        self.close()

    def __del__(self) -> None:
        """Close it if nobody did; may run inside a stripe, so it never waits."""
        serial = getattr(self, "_serial", 0)
        if serial:
            self._engine.dropped_reference(self.id, serial)

    def __repr__(self) -> str:
        """For logs."""
        state = "closed" if not self._serial else "failed" if self.failed else "live"
        return f"<{type(self).__name__} sk-{self.id >> SLOT_BITS:x}-{self.id & SLOT_MASK} {state}>"


T = typing.TypeVar("T")


def reference_class(extended: type[T]) -> type[T]:
    """The class that references are made of; the C engine does something to it."""
    return extended


class Engine(Table):
    """One process's hands on the slot table."""

    def __init__(
        self,
        segment: Segment,
        semaphores: Semaphores,
        index: int,
        epoch: int,
        reference_type: type[Reference],
    ) -> None:
        """For the process that registered row ``index`` at ``epoch``."""
        super().__init__(segment, semaphores, index, epoch)
        # Ids whose cached descriptor waits for the count to reach 0 (descriptors.py).
        self.marked: set[int] = set()
        self._serials = itertools.count(1)
        self._reference_type = reference_type

    def _counts(self, body: Body) -> bool:
        return body in (self._attach, self._detach)

    # -- references -----------------------------------------------------------------------------

    def address(self, sid: int, failed_too: bool = False) -> Reference | None:
        """Take a reference on a socket, or None once it has failed (or, failed_too, is gone).

        The version is looked at *before* anything is counted, so the transient +1 of brpc's
        wait-free Address does not exist, nor the races that come with it.

        Concurrency: with a reference in this process already, one read of shared memory under the
            local lock; else the stripe is taken, and may be waited for.
        If killed: ``held`` says that this process was attached; it is zeroed when it is reaped.
        """
        if sid.__class__ is not int:
            sid = operator.index(sid)
        slot = sid & SLOT_MASK
        if slot >= self._slots or not 0 < sid < SLOT_END:
            return None
        version = sid >> SLOT_BITS
        seen = self.cells.versioned_ref[slot] >> SLOT_BITS
        if (seen != version and not (failed_too and seen == version + 1)) or version & 1:
            return None
        if self.closed:
            self._check_participation()
        serial = next(self._serials)
        reference = self._reference_type(self, sid, serial)
        argument = (serial, version, failed_too, weakref.ref(reference))
        with self.lock:
            result = self._attach_again(slot, argument)
        if not result:
            stripe = slot // self._block
            result = self.run(stripe, self._attach, slot, argument, quick=self._attach_again)
        elif self._dropped:
            self.drain()
        if result == DONE:
            return reference
        reference._serial = 0
        return None

    def _attach_again(self, slot: int, argument: Attachment) -> int:
        """Count one more reference of an attached process: 0 if it is not attached."""
        serials = self._holds.get(slot)
        if not serials:
            return NOTHING
        serial, version, failed_too, watched = argument
        seen = self.cells.versioned_ref[slot] >> SLOT_BITS
        if seen != version and not (failed_too and seen == version + 1):
            return RECYCLED  # an older life than the one we hold: gone
        serials[serial] = watched
        return DONE

    def _attach(self, slot: int, argument: Attachment) -> int:
        serial, version, failed_too, watched = argument
        cells = self.cells
        seen = cells.versioned_ref[slot] >> SLOT_BITS
        if cells.state[slot] != LIVE:
            return NOTHING
        if seen != version and not (failed_too and seen == version + 1):
            return NOTHING
        cells.held[slot * self._processes + self.index] = 1
        result = settle(cells, slot, self._processes)
        self._holds[slot] = {serial: watched}
        return result

    def add_reference(self, reference: Reference) -> Reference:
        """One more reference beside one that is held: needs no look at the version."""
        sid = reference.id
        if self.foreign:
            self._check_participation()
        another = self._reference_type(self, sid, next(self._serials))
        with self.lock:
            serials = self._holds.get(sid & SLOT_MASK, {})
            known = reference._serial in serials
            if known:
                serials[another._serial] = weakref.ref(another)
        if self._dropped:
            self.drain()
        if known:
            return another
        another._serial = 0
        raise ClosedError("the reference is closed: address the socket again")

    def dereference(self, sid: int, serial: int) -> None:
        """Give one reference back; the last one detaches this process, and may recycle the slot.

        Never raises for a stripe that cannot be had: the rest is then done by the next caller or
        the service thread.
        """
        if self.foreign or self.closed:
            return
        slot = sid & SLOT_MASK
        with self.lock:
            result = self._detach_one(slot, serial)
        if not result:
            stripe = slot // self._block
            try:
                result = self.run(stripe, self._detach, slot, serial, quick=self._detach_one)
            except StripeTimeoutError as error:
                log.warning("a reference is given back later: %s", error)
                self._dropped.append((sid, serial))
                return
            except (ClosedError, PoisonedError):
                return
        elif self._dropped:
            self.drain()
        self._after_detach(sid, result)

    def _detach_one(self, slot: int, serial: int) -> int:
        """Take one serial away if it is not the last: 0 if it is."""
        serials = self._holds.get(slot)
        if serials is None or serial not in serials:
            return DONE
        if len(serials) == 1:
            return NOTHING
        serials.pop(serial, None)
        return DONE

    def _detach(self, slot: int, serial: int) -> int:
        self._holds.pop(slot, None)
        self.cells.held[slot * self._processes + self.index] = 0
        return settle(self.cells, slot, self._processes) | 4

    def _after_detach(self, sid: int, result: int) -> None:
        if result & 4 and (result & RECYCLED or sid in self.marked):
            self.let_go(sid, bool(result & RECYCLED))

    def dropped_reference(self, sid: int, serial: int) -> None:
        """From a finaliser, which may run inside a stripe or the local lock: never wait."""
        if self.foreign or self.closed:
            return
        self._dropped.append((sid, serial))
        self.drain()

    def drain(self) -> None:
        """Give back what finalisers and signal handlers dropped; never waits.

        What cannot be had now stays in the deque: whoever has the local lock drains after letting
        it go, and so does the timer. Repeating an item is harmless, so it leaves last.
        """
        late = 0
        while len(self._dropped) > late:
            try:
                item = self._dropped[0]
            except IndexError:  # another thread drained it meanwhile
                return
            try:
                if not self._give_back(*item):
                    self._dropped.rotate(-1)
                    late += 1
                    continue
            except (ClosedError, PoisonedError):
                return
            except OSError as error:  # no descriptor to open the semaphore with
                log.warning("a reference is given back later: %s", error)
                late += 1
                continue
            with contextlib.suppress(ValueError):
                self._dropped.remove(item)

    def collect(self) -> None:
        """Give back what was dropped, also where the finaliser itself was interrupted; the timer's.

        A KeyboardInterrupt may come before a finaliser's first line, is reported and ignored there,
        and nobody else knows of the reference. But its weak reference is dead.
        """
        for slot, serials in list(self._holds.items()):
            for serial, watched in list(serials.items()):
                if watched() is None:
                    version = self.cells.versioned_ref[slot] >> SLOT_BITS & ~1
                    self._dropped.append((version << SLOT_BITS | slot, serial))
        self.drain()

    def _give_back(self, sid: int, serial: int) -> bool:
        """Dereference if neither a lock that is ours already nor the stripe must be waited for.

        The lock is not reentrant: if we have it we are inside, in a finaliser or signal handler,
        and it stays locked. If another thread has it, that is for a moment: nobody sleeps with it.
        """
        # WHY NOT acquire(blocking=False): an exception that comes between having the lock and the
        # next line would leave it held for ever. ``with`` leaves no such gap.
        if self.lock.locked():
            return False
        with self.lock:
            slot = sid & SLOT_MASK
            result = self._detach_one(slot, serial)
            if not result:
                result = self._attempt(slot // self._block, self._detach, slot, serial)
        if result == CONTENDED:
            return False
        self._after_detach(sid, result)
        return True

    def set_descriptor(self, sid: int, number: int) -> None:
        """Tell the engine this process's duplicate of a socket, -1 when it goes; for C's writes."""

    def set_direct_limit(self, max_bytes: int) -> None:
        """Tell the engine how long a message may be that C's writes send; see Writers.write."""

    def set_queued(self, sid: int, queued: bool) -> None:
        """Tell the engine whether messages wait for a socket: the next goes behind them; for C."""

    def count(self, slot: int) -> int:
        """How many references this process has on a slot; the local lock should be held."""
        serials = self._holds.get(slot)
        return len(serials) if serials else 0

    def detach_all(self) -> None:
        """Let go of every slot, whatever references exist: they are inert from here on."""
        for slot, serials in list(self._holds.items()):
            version = self.cells.versioned_ref[slot] >> SLOT_BITS & ~1
            for serial in list(serials):
                self.dereference(version << SLOT_BITS | slot, serial)

    def held_slots(self) -> list[int]:
        """The slots this process is attached to."""
        return [slot for slot, serials in list(self._holds.items()) if serials]
