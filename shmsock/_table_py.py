"""The transitions of a slot.

What is true is stored once, by one absolute store: version, ``state``, ``retired``, ``owner``,
``writer``, ``held``. What is derived is recounted: nref is stored as ``additional + count(held)``
at the end of every transition, never added to. So whoever finds a stripe half-changed (recovery.py)
stores the same formula again, from any half-done state, as often as it likes.

Each transition is a pair: a method that looks without the lock whether there is anything to do, and
the body with a leading underscore, which runs inside the stripe and looks again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import operator
import os
import socket
import time

from ._engine_common import (
    DONE,
    NOTHING,
    RECYCLED,
    SLOT_END,
    STRIPE_TIMEOUT_S,
    table_full,
)
from ._stripes_py import Stripes
from .errors import StripeTimeoutError, TableFullError
from .layout import FREE, LIVE, RECYCLING, SLOT_BITS, SLOT_MASK, recycled_version
from .segment import Cells, Segment
from .semaphores import Semaphores


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


class Table(Stripes):
    """One process's hands on the slot table: all that needs no reference."""

    def __init__(self, segment: Segment, semaphores: Semaphores, index: int, epoch: int) -> None:
        """For the process that registered row ``index`` at ``epoch``."""
        super().__init__(segment, semaphores, index, epoch)
        self._next_stripe = index * 7

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
        self,
        listener: int,
        owner: int,
        on_owner_death: int,
        tcp: int,
        unix: int,
        made: list[tuple[int, int, int]],
    ) -> tuple[int, int, int]:
        """Accept one connection and create its slot.

        Args:
            listener: The number of a socket that listens.
            owner: As of ``create``; so is ``on_owner_death``.
            on_owner_death: See ``owner``.
            tcp: The number of that kind; so is ``unix``.
            unix: See ``tcp``.
            made: Gets the result before we return: an exception may come between that and the
                caller's next line.

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
        ids: list[int] = []
        with accepted:  # closed if anything goes wrong
            kind = unix if accepted.family == socket.AF_UNIX else tcp
            inode = os.fstat(accepted.fileno()).st_ino
            peer = self.peer_of(accepted.fileno())
            try:
                with contextlib.suppress(TableFullError):
                    self.create(owner, inode, kind, on_owner_death, peer, b"", ids)
                made.append((accepted.fileno(), inode, ids[0] if ids else 0))
            except BaseException:
                for sid in ids:
                    self.set_failed(sid, errno.ECANCELED, "creation was interrupted")
                raise
            accepted.detach()
        return made[-1]

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
        if not 0 < sid < SLOT_END or sid >> SLOT_BITS & 1:
            return -1
        slot = sid & SLOT_MASK
        return slot if slot < self._slots else -1

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
