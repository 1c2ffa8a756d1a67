"""How a worker leaves when another has taken its place: its connections go on elsewhere.

The wish to leave is a word in its process row. A signal only makes it look at once, so neither a
lost signal nor a supervisor that died meanwhile changes what it does. When the wish is withdrawn it
goes on with what it still has.
"""

from __future__ import annotations

import logging
import time
import typing

import numpy as np

from shmsock import Dispatcher, Runtime, Wish

if typing.TYPE_CHECKING:
    from .messenger import Messenger

log = logging.getLogger("shmsock")

_LOOK_EVERY_S = 0.5
_STEP_S = 0.02
_BATCH = 64  # then those that are not idle have a turn
_COUNT_FOR_S = 0.05
_LIVE = 1


class Leaving:
    """One worker's readiness to leave."""

    def __init__(self, runtime: Runtime, dispatcher: Dispatcher, messenger: Messenger) -> None:
        """Look at the wish twice a second."""
        self._runtime = runtime
        self._dispatcher = dispatcher
        self._messenger = messenger
        self._under_way = False
        self._heirs = np.zeros(0, "i8")
        self._loads = np.zeros(0, "i8")
        self._counted_s = 0.0
        dispatcher.call_later(_LOOK_EVERY_S, self._look_again)

    def _look_again(self) -> None:
        self._dispatcher.call_later(_LOOK_EVERY_S, self._look_again)
        self.look()

    def look(self) -> None:
        """Begin or stop leaving, as is wished."""
        wished = self._runtime.wishes.of(self._runtime.index) is Wish.LEAVE
        if wished == self._under_way:
            return
        self._under_way = wished
        if wished:
            count = len(self._messenger)
            log.info("process %d hands over %d connections", self._runtime.index, count)
            self._messenger.move(self._heir)
            self._step()
        else:
            log.info("process %d stays after all", self._runtime.index)
            self._messenger.move(None)

    def _step(self) -> None:
        if not self._under_way:
            return
        more = self._messenger.move_idle(_BATCH)
        if self._has_nothing_left():
            log.info("process %d has handed over everything", self._runtime.index)
            self._dispatcher.stop()
            return
        self._dispatcher.call_later(0.0 if more else _STEP_S, self._step)

    def _has_nothing_left(self) -> bool:
        """No connection, none under way to us, and no byte of ours unsent."""
        if len(self._messenger) or self._runtime.unwritten_bytes():
            return False
        rows = self._runtime.sockets()
        mine = (rows["owner"] == self._runtime.index) & (rows["state"] == _LIVE)
        return not mine.any()

    def _heir(self) -> int:
        """The least-loaded worker that stays, -1 if there is none.

        One that is to be replaced as well comes last: what it gets would move again.
        """
        now = time.monotonic()
        if now - self._counted_s > _COUNT_FOR_S:
            self._counted_s = now
            self._heirs, self._loads = self._candidates(), self._runtime.owned_counts()
        if not len(self._heirs):
            return -1
        index = int(self._heirs[np.argmin(self._loads[self._heirs])])
        self._loads[index] += 1
        return index

    def _candidates(self) -> np.ndarray[typing.Any, typing.Any]:
        wishes = self._runtime.wishes.all()
        by_wish: dict[Wish, list[int]] = {wish: [] for wish in Wish}
        for row in self._runtime.processes():
            if row.role == "worker" and row.alive and row.index != self._runtime.index:
                by_wish[wishes.get(row.index, Wish.NONE)].append(row.index)
        stay = by_wish[Wish.NONE] + by_wish[Wish.STAY]
        return np.array(stay or by_wish[Wish.REPLACE], "i8")
