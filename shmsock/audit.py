"""The audit: every invariant of the table that can be seen from outside, in one pass of numpy.

It stores nothing and takes nothing, so a slot in mid-transition may look wrong on a live table.
What looks wrong is therefore looked at again, ten times, and only what was wrong each time is a
breach. A breach says what may be done about it:

    WAITS     time or a repair cures it: a death not yet reaped, a stripe under repair or in use
    MENDABLE  derived, or one socket's own: recomputed, or that one socket is failed (mending.py)
    BEYOND    a truth that is stored once was lost: nobody can say what it was. The segment is
              marked poisoned, and the supervisor starts a new one.
"""

from __future__ import annotations

import collections.abc
import enum
import os
import re
import time
import typing

import numpy as np

from .layout import (
    ADDRESS_BYTES,
    BROKEN,
    FREE,
    HEADER_WORDS,
    KIND_NAMES,
    LIVE,
    ON_OWNER_DEATH,
    OPEN,
    OPENING,
    OWN,
    REAPING,
    RECYCLING,
    ROLES,
    SLOT_BITS,
    SLOT_MASK,
    VERSION_LIMIT,
)
from .processes import Processes
from .segment import SHM_DIRECTORY, Segment, run_directory
from .semaphores import SPARE_GENERATIONS, Semaphores

Array = np.ndarray[typing.Any, typing.Any]

LOOKS = 10
_BETWEEN_LOOKS_S = 0.01
_WAITING_LOOK_S = 0.05
_FOREIGN_GENERATIONS = 1 << 32  # further ahead than any runtime's own can be
# Words that nobody stores again once the segment is made.
_CONSTANT = set(HEADER_WORDS) - {"poisoned", "address_length", "init_done"}


class Cure(enum.Enum):
    """What may be done about a breach."""

    WAITS = "waits"
    MENDABLE = "mendable"
    BEYOND = "beyond repair"


class Breach(typing.NamedTuple):
    """One invariant that does not hold; ``slot`` or ``stripe`` is -1 where there is none."""

    text: str
    cure: Cure
    slot: int = -1
    stripe: int = -1


class Audit:
    """Looks at one segment, for whoever maps it, participant or not."""

    def __init__(self, segment: Segment, processes: Processes) -> None:
        """Remember the words of the header that must not change."""
        self._segment = segment
        self._columns = segment.columns
        self._layout = segment.layout
        self._processes = processes
        self._header = {word: segment.get(word) for word in _CONSTANT}

    def breaches(self, patience_s: float = 0.0) -> list[Breach]:
        """What is wrong at every one of several looks.

        Args:
            patience_s: How long to wait for the end of what only WAITS.

        Concurrency: takes nothing; ten looks, 10 ms apart, when the first finds anything.
        """
        found = {breach.text: breach for breach in self.look()}
        deadline = time.monotonic() + patience_s
        looks = 1
        while found:
            waits = any(breach.cure is Cure.WAITS for breach in found.values())
            if looks >= LOOKS and not (waits and time.monotonic() < deadline):
                break
            time.sleep(_BETWEEN_LOOKS_S if looks < LOOKS else _WAITING_LOOK_S)
            rows = sorted({breach.slot for breach in found.values() if breach.slot >= 0})
            again = {breach.text: breach for breach in self.look(np.array(rows, "i8"))}
            # What some look found to be only under way is under way.
            found = {
                text: breach if breach.cure is Cure.WAITS else again[text]
                for text, breach in found.items()
                if text in again
            }
            looks += 1
        return sorted(found.values())

    def look(self, rows: Array | None = None) -> collections.abc.Iterator[Breach]:
        """What looks wrong at this moment; of the slots only ``rows``, if given."""
        yield from self._header_words()
        yield from self._rows()
        unsettled = self._unsettled()
        yield from self._slots(rows, unsettled)
        yield from self._stripes()
        if self._has_names():
            yield from self._semaphores()

    # -- header and process rows ----------------------------------------------------------------

    def _header_words(self) -> collections.abc.Iterator[Breach]:
        segment = self._segment
        if segment.get("poisoned"):
            yield Breach(f"the segment is marked poisoned: {segment.poisoned_why()}", Cure.BEYOND)
        for word, expected in self._header.items():
            if segment.get(word) != expected:
                text = f"header word {word} is {segment.get(word):#x}, it was {expected:#x}"
                yield Breach(text, Cure.BEYOND)
        length = segment.get("address_length")
        directory = f"{run_directory(segment.name)}/control-"
        # While it is published anew the text may be older than the length.
        if length > ADDRESS_BYTES or (
            length and not segment.control_address().startswith(directory)
        ):
            text = f"the host's address is nonsense: {segment.control_address()[:40]!r}"
            yield Breach(text, Cure.BEYOND)

    def _rows(self) -> collections.abc.Iterator[Breach]:
        columns, processes = self._columns, self._processes
        words = columns.row_state.tolist()
        claims, held = np.asarray(columns.claims.any(axis=1)), self._held_columns()
        for index, word in enumerate(words):
            state, epoch = word & 0xFF, word >> 8
            if state not in (FREE, LIVE, REAPING) or (state != FREE and not epoch) or epoch >> 47:
                text = f"process row {index} has the word {word:#x}, which cannot be"
                yield Breach(text, Cure.BEYOND)
            elif state == FREE:
                if claims[index] or held[index]:
                    text = f"process row {index} is FREE but still claims or holds something"
                    yield Breach(text, Cure.MENDABLE)
            elif not processes.is_alive(index):
                text = f"{processes.describe(index)} died and was not reaped"
                yield Breach(text, Cure.WAITS)
            elif columns.row_role[index] >= len(ROLES):
                text = f"process row {index} has role {columns.row_role[index]}, which cannot be"
                yield Breach(text, Cure.MENDABLE)

    def _held_columns(self) -> Array:
        """Which process rows hold anything."""
        held = self._columns.held
        return np.asarray(held[_any(held)].any(axis=0))

    # -- slots ----------------------------------------------------------------------------------

    def _unsettled(self) -> Array:
        """By stripe: whether somebody is in it, died in it, or repairs it."""
        columns = self._columns
        claimed = np.asarray((columns.claims != 0).any(axis=0))
        busy: Array = claimed | (columns.ctl & np.uint64(3) != OPEN)
        return busy

    def _slots(self, rows: Array | None, unsettled: Array) -> collections.abc.Iterator[Breach]:
        columns = self._columns
        numbers = np.arange(self._layout.slots) if rows is None else rows
        if not len(numbers):
            return

        def take(column: Array) -> Array:
            # Copies: numpy reads its argument more than once, and others store while it does.
            return column.copy() if rows is None else column[rows]

        vrefs, states = take(columns.versioned_ref), take(columns.state)
        retired, owners, writers = map(take, (columns.retired, columns.owner, columns.writer))
        heirs = take(columns.heir)
        held = columns.held if rows is None else columns.held[rows]
        attached = held.sum(axis=1, dtype="u4").astype("u8")
        versions, nrefs = vrefs >> np.uint64(SLOT_BITS), vrefs & np.uint64(SLOT_MASK)
        even = (versions & np.uint64(1)) == 0
        free, live = states == FREE, states == LIVE
        expected = attached + (even & (retired == 0))
        busy, rehomed = take(columns.busy), take(columns.on_owner_death)
        # Not only the fenced: a death is seen by the byte before anybody stores it.
        words = np.array([0, *self._processes.live_words()], "u8")
        idle = (rehomed != 0) & (busy == 0)  # waits for a new owner
        strange = live & (
            (take(columns.kind) >= len(KIND_NAMES))
            | (rehomed >= len(ON_OWNER_DEATH))
            | (retired > 1)
            | (busy > 1)
        )
        lost = Cure.WAITS if self._any_dying() else Cure.MENDABLE

        def left(word: int, verb: str) -> str:
            return f"is {verb} by process {word & 0xFFFF}, which has left"

        checks: tuple[tuple[Array, Cure, collections.abc.Callable[[int], str]], ...] = (
            (
                free & ((nrefs != 0) | ~even | (attached != 0)),
                Cure.MENDABLE,
                lambda i: (
                    f"is FREE with version {versions[i]}, nref {nrefs[i]} "
                    f"and {attached[i]} attached"
                ),
            ),
            (
                free & ((owners != 0) | (writers != 0) | (heirs != 0) | (retired != 0)),
                Cure.MENDABLE,
                lambda i: (
                    f"is FREE with owner {owners[i]:#x}, writer {writers[i]:#x}, "
                    f"heir {heirs[i]:#x}, retired {retired[i]}"
                ),
            ),
            (
                (versions == 0) | (versions >= VERSION_LIMIT),
                Cure.BEYOND,
                lambda i: f"has version {versions[i]}, which cannot be",
            ),
            (
                live & (expected != nrefs),
                Cure.MENDABLE,
                lambda i: (
                    f"has nref {nrefs[i]}, its formula gives {expected[i]} (version {versions[i]})"
                ),
            ),
            (
                live & (expected == 0),
                Cure.MENDABLE,
                lambda i: f"is held by nobody and was not recycled (version {versions[i]})",
            ),
            (
                states == RECYCLING,
                Cure.MENDABLE,
                lambda i: f"is in the middle of recycling (version {versions[i]})",
            ),
            (
                states > RECYCLING,
                Cure.MENDABLE,
                lambda i: f"has state {states[i]}, which cannot be",
            ),
            (
                strange,
                Cure.MENDABLE,
                lambda i: "has a kind, policy, retired or busy that cannot be",
            ),
            (
                _too_high(held),
                Cure.MENDABLE,
                lambda i: "is held by something that is neither 0 nor 1",
            ),
            (
                live & even & ~idle & ~_known(owners, live, words),
                lost,
                lambda i: left(int(owners[i]), "owned"),
            ),
            (
                live & even & ~_known(writers, live, words),
                lost,
                lambda i: left(int(writers[i]), "written"),
            ),
            (
                live & even & ~_known(heirs, live, words),
                lost,
                lambda i: left(int(heirs[i]), "to be inherited"),
            ),
        )
        block = self._layout.block
        for wrong, cure, tell in checks:
            for i in np.flatnonzero(wrong).tolist():
                slot = int(numbers[i])
                if cure is Cure.MENDABLE and unsettled[slot // block]:
                    yield Breach(f"slot {slot} {tell(i)}", Cure.WAITS, slot)
                else:
                    yield Breach(f"slot {slot} {tell(i)}", cure, slot)

    def _any_dying(self) -> bool:
        return bool(((self._columns.row_state & np.uint64(0xFF)) == REAPING).any())

    # -- stripes and their semaphores -----------------------------------------------------------

    def _stripes(self) -> collections.abc.Iterator[Breach]:
        columns, three = self._columns, np.uint64(3)
        claims, controls = columns.claims.copy(), columns.ctl.copy()
        generations = controls >> np.uint64(2)
        for stripe in np.flatnonzero((generations == 0) | (controls & three > OPENING)).tolist():
            text = f"stripe {stripe} has the word {int(controls[stripe]):#x}, which cannot be"
            yield Breach(text, Cure.BEYOND, stripe=stripe)
        for stripe in np.flatnonzero(controls & three != OPEN).tolist():
            yield Breach(f"stripe {stripe} is being retired", Cure.WAITS, stripe=stripe)
        kinds = claims & three
        for index, stripe in np.argwhere(kinds == BROKEN).tolist():
            text = f"stripe {stripe} was broken by process {index}"
            yield Breach(text, Cure.WAITS, stripe=stripe)
        # A claim is stored after its generation was read, and the claims were copied first.
        wrong = (claims != 0) & ((claims >> np.uint64(2) > generations) | (kinds == 0))
        for index, stripe in np.argwhere(wrong).tolist():
            word = int(claims[index, stripe])
            text = f"process {index} claims stripe {stripe} with {word:#x}, which cannot be"
            yield Breach(text, Cure.WAITS, stripe=stripe)
        for index, stripe in np.argwhere(kinds == OWN).tolist():
            state = columns.row_state[index] & 0xFF
            if state == LIVE and not self._processes.is_alive(index):
                text = f"stripe {stripe} is claimed by process {index}, which died"
                yield Breach(text, Cure.WAITS, stripe=stripe)

    def _has_names(self) -> bool:
        """Whether the names on this machine are still this segment's."""
        try:
            status = os.stat(f"{SHM_DIRECTORY}/shmsock.{self._segment.name}")
        except FileNotFoundError:
            return False
        return status.st_ino == self._segment.inode

    def _semaphores(self) -> collections.abc.Iterator[Breach]:
        cells = self._segment.cells
        newest = self._newest_generations()
        for stripe in range(self._layout.stripes):
            control = cells.ctl[stripe]
            if control & 3 != OPEN or not control >> 2:
                continue
            try:
                text, cure = self._semaphores_of(stripe, control >> 2, newest.get(stripe, 0))
            except OSError:  # no descriptor to open it with: nothing is known
                continue
            if text and cells.ctl[stripe] == control:
                yield Breach(text, cure, stripe=stripe)

    def _semaphores_of(self, stripe: int, generation: int, newest: int) -> tuple[str, Cure]:
        name = self._segment.name
        if newest > generation + SPARE_GENERATIONS:
            was = newest - SPARE_GENERATIONS
            text = f"stripe {stripe} is at generation {generation} but was at {was} already"
            # Processes still have the later ones open: they would not exclude each other.
            return text, Cure.BEYOND
        value = Semaphores.value(name, stripe, generation)
        if value is None:
            text = f"stripe {stripe} has no semaphore of its generation {generation}"
            return text, Cure.MENDABLE
        if value > 1:
            return f"the semaphore of stripe {stripe} is {value}", Cure.MENDABLE
        if value == 0 and self._is_stuck(stripe, generation):
            text = f"stripe {stripe} is stuck: its semaphore is taken and no process claims it"
            return text, Cure.MENDABLE
        for spare in range(generation + 1, generation + 1 + SPARE_GENERATIONS):
            if Semaphores.value(name, stripe, spare):
                text = f"the spare semaphore {spare} of stripe {stripe} is not 0"
                return text, Cure.MENDABLE
        return "", Cure.WAITS

    def _is_stuck(self, stripe: int, generation: int) -> bool:
        """Taken, and nobody says so; three times, for a taker may come and go in between.

        A claim is stored before the token is taken and cleared after it was posted.
        """
        for _ in range(3):
            if self._columns.claims[:, stripe].any():
                return False
            if Semaphores.value(self._segment.name, stripe, generation) != 0:
                return False
        return True

    def _newest_generations(self) -> dict[int, int]:
        """By stripe, the latest generation of ours that has a name.

        What an earlier runtime of the name left is far away: generations start at random.
        """
        pattern = re.compile(rf"sem\.shmsock\.{re.escape(self._segment.name)}\.(\d+)\.(\d+)")
        newest: dict[int, int] = {}
        for entry in os.listdir(SHM_DIRECTORY):
            match = pattern.fullmatch(entry)
            if match:
                stripe, generation = int(match[1]), int(match[2])
                if stripe >= self._layout.stripes:
                    continue
                if generation - (self._segment.cells.ctl[stripe] >> 2) > _FOREIGN_GENERATIONS:
                    continue
                newest[stripe] = max(newest.get(stripe, 0), generation)
        return newest


def _known(words: Array, live: Array, known: Array) -> Array:
    """Which of the live slots' words are among the known ones."""
    found = np.zeros(len(words), "?")
    found[live] = np.isin(words[live], known)
    return found


def _too_high(held: Array) -> Array:
    """Which rows of ``held`` have something else than 0 and 1."""
    found = np.zeros(len(held), "?")
    some = np.flatnonzero(_any(held))
    found[some] = (held[some] > 1).any(axis=1)
    return found


def _any(held: Array) -> Array:
    """Which rows of ``held`` are not all 0, eight at a time where that goes."""
    wide = held.shape[1] % 8 == 0 and held.flags.c_contiguous
    return np.asarray((held.view("u8") if wide else held).any(axis=1))
