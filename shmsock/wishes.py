"""What is wished of a process: one word a row, that outlives whoever stored it.

A wish names the epoch of the process it is meant for, so the row's next tenant does not inherit it
and nobody has to take it back. Each is one absolute store; the last one counts.
"""

from __future__ import annotations

import enum

import numpy as np

from .layout import LIVE
from .segment import Segment


class Wish(enum.Enum):
    """What somebody wishes of a process.

    Attributes:
        NONE: Nothing.
        REPLACE: Whoever supervises should start another in its place, and let it go.
        LEAVE: Its place is taken: it should hand over what it owns as it falls idle, and end.
        STAY: No other came up in its place: it goes on as before.
    """

    NONE = 0
    REPLACE = 1
    LEAVE = 2
    STAY = 3


class Wishes:
    """The wishes of one runtime, by process index."""

    def __init__(self, segment: Segment) -> None:
        """Reads and stores words of ``segment``."""
        self._segment = segment

    def of(self, index: int) -> Wish:
        """What is wished of the process that lives in a row now."""
        cells = self._segment.cells
        state, word = cells.row_state[index], cells.row_wish[index]
        if state & 0xFF != LIVE or state >> 8 != word >> 8:
            return Wish.NONE
        number = word & 0xFF
        return Wish(number) if number <= Wish.STAY.value else Wish.NONE

    def store(self, index: int, wish: Wish) -> bool:
        """Wish something of the process that lives in a row.

        Returns:
            False if none does.

        Concurrency: from any process; the last store counts. One that is late meets another epoch
            and means nothing.
        If killed: the wish is stored or is not.
        """
        if not 0 <= index < self._segment.layout.processes:
            return False
        cells = self._segment.cells
        state = cells.row_state[index]
        if state & 0xFF != LIVE:
            return False
        cells.row_wish[index] = state & ~0xFF | wish.value
        return True

    def all(self) -> dict[int, Wish]:
        """Every process of which something is wished."""
        rows = np.flatnonzero(self._segment.columns.row_wish).tolist()
        wishes = {index: self.of(index) for index in rows}
        return {index: wish for index, wish in wishes.items() if wish is not Wish.NONE}
