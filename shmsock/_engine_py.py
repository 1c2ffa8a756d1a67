"""The reference engine: the transitions of a slot, and counted references.

What is true is stored once, by one absolute store: version, ``state``, ``retired``, ``owner``,
``writer``, ``held``. What is derived is recounted: nref is stored as ``additional + count(held)``
at the end of every transition, never added to. So whoever finds a stripe half-changed (recovery.py)
stores the same formula again, from any half-done state, as often as it likes.

    INVARIANT: count[slot] > 0  =>  held[slot, me] == 1, so the slot is not recycled and its version
               is v or v + 1. Reading it is all that a second reference costs.

The count of a slot is the set of serial numbers of the live reference objects. A set, because it
makes taking a reference away idempotent: an exception between two bytecodes can then lose nothing
and take nothing twice, as whoever drops the object repeats it. Beside each number is a weak
reference to its object: should even the finaliser be interrupted, the timer sees that it is gone.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import dataclasses
import errno
import itertools
import logging
import operator
import os
import socket
import time
import typing
import weakref

from ._stripes_py import (
    CONTENDED,
    DONE,
    NOTHING,
    RECYCLED,
    STRIPE_TIMEOUT_S,
    Body,
    Stripes,
    table_full,
)
from .errors import ClosedError, PoisonedError, StripeTimeoutError, TableFullError
from .layout import (
    FREE,
    LIVE,
    RECYCLING,
    SLOT_BITS,
    SLOT_MASK,
    Status,
    recycled_version,
)
from .segment import Cells, Segment, Semaphores

NAME = "py"

log = logging.getLogger("shmsock")

_SLOT_END = 1 << 63

# Serial number, version, whether a failed socket will do, and the reference.
Attachment = tuple[int, int, bool, "weakref.ref[Reference]"]


@dataclasses.dataclass
class NewSocket:
    """What ``create`` stores about a socket."""

    owner: int = 0
    inode: int = 0
    kind: int = 0
    on_owner_death: int = 0
    peer: bytes = b""
    user_data: bytes = b""
    slot: int = -1  # filled in: where it went, and as what
    sid: int = 0
    created_ns: int = 0


def attached(cells: Cells, slot: int, processes: int) -> int:
    """How many processes are attached to a slot."""
    begin = slot * processes
    return bytes(cells.held[begin : begin + processes]).count(1)


def settle(cells: Cells, slot: int, processes: int) -> int:
    """Store nref by the formula, and recycle the slot if it is 0; its stripe is taken.

    INVARIANT: nref = additional + attached, additional = version even and not retired.
    """
    version = cells.versioned_ref[slot] >> SLOT_BITS
    additional = not version & 1 and not cells.retired[slot]
    nref = additional + attached(cells, slot, processes)
    cells.versioned_ref[slot] = version << SLOT_BITS | nref
    if nref:
        return DONE
    recycle(cells, slot)
    return DONE | RECYCLED


def recycle(cells: Cells, slot: int) -> None:
    """End a life: the version moves to the next even number and the slot is FREE again.

    ORDER: RECYCLING first, FREE last; a slot found RECYCLING is finished by calling this again.
    A released socket goes through the odd version before ``retired`` is cleared, so that "even and
    retired" means *not begun* and "even and not retired" means *moved on*: no life is skipped.
    CRASH(recycle): any prefix is finished by recount.
    """
    cells.state[slot] = RECYCLING
    version = cells.versioned_ref[slot] >> SLOT_BITS
    if not version & 1 and cells.retired[slot]:
        version += 1
        cells.versioned_ref[slot] = version << SLOT_BITS
    cells.retired[slot] = 0
    if version & 1:
        cells.versioned_ref[slot] = recycled_version(version) << SLOT_BITS
    cells.owner[slot] = 0
    cells.heir[slot] = 0
    cells.writer[slot] = 0
    cells.busy[slot] = 0
    cells.inode[slot] = 0
    cells.state[slot] = FREE


def status_of(segment: Segment, sid: int) -> Status:
    """What an id names now; takes nothing."""
    slot = sid & SLOT_MASK
    if 0 < sid < _SLOT_END and slot < segment.layout.slots and not sid >> SLOT_BITS & 1:
        cells = segment.cells
        if cells.state[slot] == LIVE:
            version = cells.versioned_ref[slot] >> SLOT_BITS
            if version == sid >> SLOT_BITS:
                return Status.LIVE
            if version == (sid >> SLOT_BITS) + 1:
                return Status.FAILED
    return Status.GONE


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


class Engine(Stripes):
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
        # Called without the lock: a slot was let go of for the last time.
        self.let_go: collections.abc.Callable[[int, bool], None] = lambda sid, recycled: None
        # Who is at the other end of a connection that was accepted, as bytes (descriptors.py).
        self.peer_of: collections.abc.Callable[[int], bytes] = lambda number: b""
        # What this process's references can do beyond counting (socket.py).
        self.io: typing.Any = None
        # Ids whose cached descriptor waits for the count to reach 0 (descriptors.py).
        self.marked: set[int] = set()
        self._next_stripe = index * 7
        self._serials = itertools.count(1)
        self._reference_type = reference_type

    def _counts(self, body: Body) -> bool:
        return body in (self._attach, self._detach)

    # -- the life of a slot ---------------------------------------------------------------------

    def create(
        self,
        owner: int,
        inode: int = 0,
        kind: int = 0,
        on_owner_death: int = 0,
        peer: bytes = b"",
        user_data: bytes = b"",
        made: list[int] | None = None,
    ) -> int:
        """Put a socket into a free slot.

        Args:
            owner: The word of the process that reads it.
            inode: Of the kernel's socket.
            kind: As in layout.py; so is ``on_owner_death``.
            on_owner_death: What becomes of it when its owner is killed.
            peer: For people.
            user_data: The application's.
            made: Gets the new id before we return: an exception may come between that and the
                caller's next line.

        Returns:
            Its SocketId, LIVE, with the additional reference.

        Raises:
            TableFullError: There is no free slot.

        If killed: before ``state`` is LIVE nothing has happened; after, the socket is the owner's.
        """
        new = NewSocket(owner, inode, kind, on_owner_death, peer, user_data)
        self._next_stripe += 1
        first = self._next_stripe
        # One try each, then wait: a stripe in which a live process was stopped is passed over.
        for patience_s in (0.0, STRIPE_TIMEOUT_S):
            for turn in range(self._stripes):
                stripe = (first + turn) % self._stripes
                if self._find_free(stripe) < 0:
                    continue
                try:
                    if self.run(stripe, self._create, stripe, new, patience_s=patience_s):
                        if made is not None:
                            made.append(new.sid)
                        return new.sid
                except StripeTimeoutError:
                    if patience_s:
                        raise
                except BaseException:
                    self._abandon_creation(new)
                    raise
        raise table_full(self._slots)

    def accept(
        self, listener: int, owner: int, on_owner_death: int, tcp: int, unix: int
    ) -> tuple[int, int, int]:
        """Accept one connection and create its slot.

        Args:
            listener: The number of a socket that listens.
            owner: As of ``create``; so is ``on_owner_death``.
            on_owner_death: See ``owner``.
            tcp: The number of that kind; so is ``unix``.
            unix: See ``tcp``.

        Returns:
            The connection's number, which is the caller's, its inode, and its id: 0 if there is no
            free slot.

        If killed: before the slot is LIVE the kernel ends the connection.
        """
        listening = socket.socket(fileno=listener)
        try:
            accepted = listening.accept()[0]
        finally:
            listening.detach()
        with accepted:  # closed if anything goes wrong
            kind = unix if accepted.family == socket.AF_UNIX else tcp
            inode = os.fstat(accepted.fileno()).st_ino
            peer = self.peer_of(accepted.fileno())
            try:
                sid = self.create(owner, inode, kind, on_owner_death, peer)
            except TableFullError:
                sid = 0
            return accepted.detach(), inode, sid

    def _find_free(self, stripe: int) -> int:
        begin = stripe * self._block
        states = bytes(self.cells.state[begin : begin + self._block])
        hint = self.cells.hint[stripe] % self._block
        found = states.find(FREE, hint)
        return found if found >= 0 else states.find(FREE, 0, hint)

    def _create(self, stripe: int, new: NewSocket) -> int:
        found = self._find_free(stripe)
        if found < 0:
            return NOTHING
        slot = stripe * self._block + found
        cells, columns = self.cells, self.segment.columns
        now_ns = time.monotonic_ns()
        cells.retired[slot] = cells.busy[slot] = cells.selector[slot] = 0
        cells.error_code[slot] = cells.writer[slot] = cells.heir[slot] = 0
        cells.kind[slot] = new.kind
        cells.on_owner_death[slot] = new.on_owner_death
        cells.inode[slot] = new.inode
        cells.created_ns[slot] = now_ns
        cells.read_ns[slot] = cells.written_ns[slot] = 0
        cells.bytes_in[slot] = cells.messages_in[slot] = 0
        cells.bytes_out[slot] = cells.messages_out[slot] = 0
        columns.error_text[slot] = b""
        columns.peer[slot] = new.peer
        columns.user_data[slot, 0] = new.user_data
        cells.owner[slot] = new.owner
        version = cells.versioned_ref[slot] >> SLOT_BITS
        cells.versioned_ref[slot] = version << SLOT_BITS | 1
        # WHY NOT read the version again outside: the socket may have failed by then.
        new.slot, new.sid, new.created_ns = slot, version << SLOT_BITS | slot, now_ns
        cells.state[slot] = LIVE  # ORDER: last; before it the slot is as free as it was
        cells.hint[stripe] = found + 1
        return DONE

    def _abandon_creation(self, new: NewSocket) -> None:
        """An exception took the new id from its caller: nobody else will ever end that socket."""
        slot, cells = new.slot, self.cells
        # The slot may never have been ours, and be another thread's new socket of the same version.
        if slot >= 0 and cells.state[slot] == LIVE and cells.created_ns[slot] == new.created_ns:
            self.set_failed(new.sid, errno.ECANCELED, "creation was interrupted")

    def _slot_of(self, sid: int) -> int:
        """The slot that a well-formed id names, or -1."""
        if not 0 < sid < _SLOT_END or sid >> SLOT_BITS & 1:
            return -1
        slot = sid & SLOT_MASK
        return slot if slot < self._slots else -1

    def status(self, sid: int) -> Status:
        """What an id names now; takes nothing."""
        return status_of(self.segment, operator.index(sid))

    def set_failed(self, sid: int, code: int, text: str) -> int:
        """Fail a socket: DONE for the one winner, RECYCLED if nobody held it any more.

        Raises:
            ValueError: ``code`` does not fit 32 bits: found here, not inside the stripe.
        """
        code = operator.index(code)
        if not -1 << 31 <= code < 1 << 31:
            raise ValueError(f"error code {code} does not fit 32 bits")
        slot = self._slot_of(sid)
        if slot < 0 or self.cells.versioned_ref[slot] >> SLOT_BITS != sid >> SLOT_BITS:
            return NOTHING
        raw = text.encode("utf-8", "replace")[: self.segment.columns.error_text.itemsize]
        return self.run(slot // self._block, self._set_failed, slot, (sid, code, raw))

    def _set_failed(self, slot: int, argument: tuple[int, int, bytes]) -> int:
        sid, code, raw = argument
        if not self._is_live(slot, sid):
            return NOTHING
        # ORDER: error before version; a reader that sees the odd version finds the error (brpc
        # stores it after, and its readers map 0 to a default).
        self.cells.error_code[slot] = code
        self.segment.columns.error_text[slot] = raw
        version = (sid >> SLOT_BITS) + 1
        nref = self.cells.versioned_ref[slot] & SLOT_MASK
        self.cells.versioned_ref[slot] = version << SLOT_BITS | nref
        return settle(self.cells, slot, self._processes)

    def release_additional_reference(self, sid: int) -> int:
        """Let the socket end when the last one lets go of it; addressable until then."""
        slot = self._slot_of(sid)
        if slot < 0 or self.cells.versioned_ref[slot] >> SLOT_BITS != sid >> SLOT_BITS:
            return NOTHING
        return self.run(slot // self._block, self._release, slot, sid)

    def _release(self, slot: int, sid: int) -> int:
        if not self._is_live(slot, sid) or self.cells.retired[slot]:
            return NOTHING
        self.cells.retired[slot] = 1
        return settle(self.cells, slot, self._processes)

    def is_live(self, sid: int) -> bool:
        """Whether an id addresses a socket right now."""
        slot = self._slot_of(sid)
        return slot >= 0 and self._is_live(slot, sid)

    def _is_live(self, slot: int, sid: int) -> bool:
        version = self.cells.versioned_ref[slot] >> SLOT_BITS
        return self.cells.state[slot] == LIVE and version == sid >> SLOT_BITS

    # -- writer, owner, application data --------------------------------------------------------

    def take_turn(self, sid: int) -> int:
        """Take the write turn: DONE if it is ours, else NOTHING; a failed socket has none."""
        slot = sid & SLOT_MASK
        return self.run(slot // self._block, self._take_turn, slot, sid)

    def _take_turn(self, slot: int, sid: int) -> int:
        if not self._is_live(slot, sid) or self.cells.writer[slot]:
            return NOTHING
        self.cells.writer[slot] = self.word
        return DONE

    def give_turn(self, sid: int) -> int:
        """Give the write turn back; whose socket has failed meanwhile needs not."""
        slot = sid & SLOT_MASK
        return self.run(slot // self._block, self._give_turn, slot, sid)

    def _give_turn(self, slot: int, sid: int) -> int:
        if not self._is_live(slot, sid) or self.cells.writer[slot] != self.word:
            return NOTHING
        self.cells.writer[slot] = 0
        return DONE

    def change_owner(self, sid: int, expected: int, owner: int) -> int:
        """Store a new owner if ``expected`` is the present one and the socket is not busy."""
        slot = sid & SLOT_MASK
        return self.run(slot // self._block, self._change_owner, slot, (sid, expected, owner))

    def _change_owner(self, slot: int, argument: tuple[int, int, int]) -> int:
        sid, expected, owner = argument
        cells = self.cells
        if not self._is_live(slot, sid) or cells.owner[slot] != expected or cells.busy[slot]:
            return NOTHING
        cells.heir[slot] = 0  # whatever the old owner had offered
        cells.owner[slot] = owner
        return DONE

    def offer(self, sid: int, heir: int) -> int:
        """Offer a socket of ours to another process: DONE if it is idle, ours and not released.

        From here to ``withdraw`` or the heir's ``inherit`` nobody may read it.

        If killed: an orphan with an heir, who may still take it; so may whom the host chooses.
        """
        slot = sid & SLOT_MASK
        return self.run(slot // self._block, self._offer, slot, (sid, heir))

    def _offer(self, slot: int, argument: tuple[int, int]) -> int:
        sid, heir = argument
        cells = self.cells
        if not self._is_live(slot, sid) or cells.owner[slot] != self.word:
            return NOTHING
        if cells.busy[slot] or cells.retired[slot]:
            return NOTHING
        cells.heir[slot] = heir
        return DONE

    def withdraw(self, sid: int, heir: int) -> int:
        """Take an offer back: DONE if it stands, so that nobody else has had the socket since."""
        slot = sid & SLOT_MASK
        return self.run(slot // self._block, self._withdraw, slot, (sid, heir))

    def _withdraw(self, slot: int, argument: tuple[int, int]) -> int:
        sid, heir = argument
        cells = self.cells
        mine = cells.owner[slot] == self.word and cells.heir[slot] == heir
        if not self._is_live(slot, sid) or not mine:
            return NOTHING
        cells.heir[slot] = 0
        return DONE

    def inherit(self, sid: int) -> int:
        """Become the owner of a socket that was offered to us: DONE, unless it was withdrawn.

        ORDER: the heir before the owner. CRASH(inherit): in between nobody was offered anything;
        after both, the owner is dead and the socket an orphan.
        """
        slot = sid & SLOT_MASK
        return self.run(slot // self._block, self._inherit, slot, sid)

    def _inherit(self, slot: int, sid: int) -> int:
        cells = self.cells
        if not self._is_live(slot, sid) or cells.heir[slot] != self.word or cells.busy[slot]:
            return NOTHING
        cells.heir[slot] = 0
        cells.owner[slot] = self.word
        return DONE

    def set_user_data(self, sid: int, data: bytes) -> int:
        """Fill the idle buffer of application data and flip the selector."""
        slot = sid & SLOT_MASK
        return self.run(slot // self._block, self._set_user_data, slot, (sid, data))

    def _set_user_data(self, slot: int, argument: tuple[int, bytes]) -> int:
        sid, data = argument
        if not self._is_live(slot, sid):
            return NOTHING
        # The low bit selects. The others count, or a reader that copies while two stores pass would
        # find the selector as it was and take a torn copy for a good one.
        following = (self.cells.selector[slot] + 1) & 0xFF
        self.segment.columns.user_data[slot, following & 1] = data
        self.cells.selector[slot] = following
        return DONE

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
        if slot >= self._slots or not 0 < sid < _SLOT_END:
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
