"""Hand-over: an idle socket changes its owner while both live, and no bytes travel.

    giver   out of the dispatcher; then heir = the other's word     owner, not busy, not released
            from here on neither reads: what comes waits in the kernel
    heir    heir = 0, owner = its own word                          heir still its own, not busy
    giver   or, if it was not taken in time: heir = 0; reads again  heir still the other's

Each line is one transition under the stripe, so an offer that was withdrawn cannot be taken later.
The messages that carry the descriptor to the heir are hints: it also looks once a second for
sockets whose heir it is.

CRASH, after each:

    giver, offered          an orphan: whoever is first of its heir and whom the host chooses has it
    heir, before it took    the recount clears the word, the giver reads again
    heir, after             an orphan like any other
    host, or the message    the heir asks the next host; else the giver withdraws
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import dataclasses
import errno
import functools
import logging
import threading
import time
import typing

import numpy as np

from . import channel
from .errors import DescriptorError, ShmsockError, StripeTimeoutError
from .layout import LIVE, SLOT_BITS, SLOT_MASK, format_socket_id

if typing.TYPE_CHECKING:
    from .dispatcher import Consumer
    from .participant import Participant

log = logging.getLogger("shmsock")

OFFER_FOR_S = 3.0  # more than the heir's own second between two looks
_LOOK_EVERY_S = 0.01

OnDone = collections.abc.Callable[[int, bool], object]


@dataclasses.dataclass
class Offer:
    """A socket of ours that another process may take."""

    heir: int
    deadline_s: float
    consumer: Consumer | None
    on_done: OnDone | None


class HandOver:
    """One process's offers, and what it is offered.

    Concurrency: offers are made, and ended, in the dispatcher's loop; without a dispatcher, by one
        thread and the service thread.
    """

    def __init__(self, runtime: Participant) -> None:
        """Nothing is offered."""
        self._runtime = runtime
        self._engine = runtime._engine
        self._segment = runtime._segment
        self._offers: dict[int, Offer] = {}
        # Had by who makes an offer, until it is whole. Reentrant: callbacks may offer the next one.
        self._making = threading.RLock()
        self._hints: collections.deque[tuple[int, int]] = collections.deque()
        self._telling = False
        self._looking = False

    # -- giving ---------------------------------------------------------------------------------

    def offer(self, sid: int, heir: int, on_done: OnDone | None) -> bool:
        """See ``SocketRef.hand_over``; ``heir`` is an owner word."""
        with self._making:
            return self._offer(sid, heir, on_done)

    def _offer(self, sid: int, heir: int, on_done: OnDone | None) -> bool:
        if sid in self._offers:
            return False
        dispatcher = self._runtime._dispatcher
        consumer = dispatcher._consumers.get(sid) if dispatcher is not None else None
        # ORDER: known, unwatched, offered. An exception anywhere leaves an offer whose time is
        # over, which the next look withdraws, or finds taken.
        offer = Offer(heir, 0.0, consumer, on_done)
        self._offers[sid] = offer
        self._look_later()
        if dispatcher is not None:
            dispatcher.remove_consumer(sid)
        if not self._engine.offer(sid, heir):
            del self._offers[sid]
            self._watch_again(sid, offer)
            return False
        offer.deadline_s = time.monotonic() + OFFER_FOR_S
        self._hint(heir & 0xFFFF, sid)
        return True

    def _hint(self, index: int, sid: int) -> None:
        """Have the host pass the descriptor on; what is offered in one turn goes together."""
        # ORDER: the hint before the call, which another thread may run at once.
        self._hints.append((index, sid))
        if not self._telling:
            self._telling = True
            self._runtime._service.call_soon(self._tell_host)
            self._runtime._service.ensure()

    def _tell_host(self) -> None:
        self._telling = False  # ORDER: before the look at the hints: who comes later calls again
        hints: dict[int, list[int]] = {}
        while self._hints:
            index, sid = self._hints.popleft()
            hints.setdefault(index, []).append(sid)
        for index, sids in hints.items():
            if self._runtime.is_host:
                self.route(index, sids)
            elif (link := self._runtime._descriptors.connect()) is not None:
                link.tell(channel.OFFER, sids, index)

    def route(self, index: int, sids: list[int]) -> None:
        """In the host: pass descriptors of offered sockets to their heir."""
        heirs = self._segment.cells.heir
        slots = self._segment.layout.slots
        offered = [
            sid
            for sid in sids
            if sid & SLOT_MASK < slots and heirs[sid & SLOT_MASK] & 0xFFFF == index
        ]
        store = self._runtime._store
        if store is not None and index != self._runtime.index:
            store.pass_to(index, offered)
        elif store is not None:
            self._claim(offered)

    def _look_later(self) -> None:
        if not self._looking:
            self._looking = True
            self._runtime._service.call_later(_LOOK_EVERY_S, lambda: self._tell(self._look))
            self._runtime._service.ensure()

    def _tell(self, call: collections.abc.Callable[[], object]) -> None:
        dispatcher = self._runtime._dispatcher
        if dispatcher is not None:
            dispatcher._tell(call)
        else:
            call()

    def _look(self) -> None:
        self._looking = False
        if self._offers:
            self._look_later()
        self._look_at_all()

    def _look_at_all(self) -> None:
        """See which offers were taken, withdraw those that were not in time."""
        # WHY NOT without: another thread, where there is no dispatcher, may be between two lines of
        # one. Its time looks over, or not yet begun; what is said then to have stayed is taken.
        with self._making:
            offers = list(self._offers.items())
        now = time.monotonic()
        living = set(self._runtime._processes.live_words())
        for sid, offer in offers:
            if self._stands(sid, offer) and now < offer.deadline_s and offer.heir in living:
                continue
            try:
                self._end(sid, offer)
            except StripeTimeoutError as error:
                log.warning("an offer is looked at again later: %s", error)

    def _stands(self, sid: int, offer: Offer) -> bool:
        slot, cells = sid & SLOT_MASK, self._segment.cells
        mine = cells.owner[slot] == self._engine.word and cells.heir[slot] == offer.heir
        return mine and self._engine.is_live(sid)

    def _end(self, sid: int, offer: Offer) -> None:
        """An offer is over: it was taken, is withdrawn here, or the socket has ended."""
        withdrawn = self._engine.withdraw(sid, offer.heir)
        if self._offers.pop(sid, None) is None:
            return
        if withdrawn:
            self._watch_again(sid, offer)
            _call(offer.on_done, sid, False)
        elif not self._engine.is_live(sid):
            self._ended(sid, offer)
        elif self._segment.cells.owner[sid & SLOT_MASK] != self._engine.word:
            self._keep_for_writing(sid)
            _call(offer.on_done, sid, True)
        elif self._accepts():
            # Ours, and not offered any more, by no withdrawal: its heir died, and perhaps had it
            # meanwhile. What we remember of it may be old: it comes to us as to anybody.
            _call(offer.on_done, sid, True)
            self._runtime._arrived([sid])
        else:
            self._watch_again(sid, offer)
            _call(offer.on_done, sid, False)

    def _keep_for_writing(self, sid: int) -> None:
        """Our descriptor is a duplicate like any other from here on: its hang-up is watched."""
        descriptors = self._runtime._descriptors
        entry = descriptors.peek(sid)
        # A writer's wish for EPOLLOUT hears the hang-up as well, and must not be replaced.
        if entry is not None and self._runtime._service.unwatch not in entry.pollers:
            descriptors.watch_hang_up(entry)

    def _watch_again(self, sid: int, offer: Offer) -> None:
        dispatcher, consumer = self._runtime._dispatcher, offer.consumer
        if dispatcher is None or consumer is None:
            return
        try:
            if dispatcher.add_consumer(sid, consumer.callback, consumer.on_failed):
                return
        except (OSError, ShmsockError) as error:
            log.error("%s cannot be watched again: %s", format_socket_id(sid), error)
            self._runtime._io.set_failed(sid, errno.EIO, "its owner could not watch it again")
        self._ended(sid, offer)

    def _ended(self, sid: int, offer: Offer) -> None:
        self._runtime._descriptors.discard(sid)
        if offer.consumer is not None and offer.consumer.on_failed is not None:
            _call(offer.consumer.on_failed, sid, *self._runtime._io.error_of(sid))

    # -- taking ---------------------------------------------------------------------------------

    def _accepts(self) -> bool:
        dispatcher = self._runtime._dispatcher
        return dispatcher is not None and dispatcher._arrived is not None

    def take(self, sids: collections.abc.Iterable[int]) -> list[int]:
        """Of sockets whose descriptors arrived, those that are ours: placed, rehomed, inherited.

        The rest are not ours any more, or not yet; their descriptors stay cached as any others.
        """
        cells, mine = self._segment.cells, []
        for sid in sids:
            if sid in self._offers:  # we have given it away: has it come back?
                self._tell(functools.partial(self._came_back, sid))
                continue
            slot = sid & SLOT_MASK
            if cells.heir[slot] == self._engine.word and self._accepts():
                try:
                    self._engine.inherit(sid)
                except StripeTimeoutError:
                    continue  # the next look finds it again
            if cells.owner[slot] == self._engine.word:
                mine.append(sid)
        return mine

    def _came_back(self, sid: int) -> None:
        """Its descriptor arrived before we saw that it was taken: first things first."""
        self._look_at_all()
        offered = self._segment.cells.heir[sid & SLOT_MASK] == self._engine.word
        if sid not in self._offers and offered:
            self._runtime._arrived([sid])

    def tick(self) -> None:
        """Once a second: see what is offered to us that nobody has told us about."""
        columns = self._segment.columns
        rows = np.flatnonzero((columns.heir == self._engine.word) & (columns.state == LIVE))
        if len(rows) and self._accepts():
            versions = (columns.versioned_ref[rows] >> np.uint64(SLOT_BITS)).tolist()
            found = zip(rows.tolist(), versions, strict=True)
            self._claim([version << SLOT_BITS | row for row, version in found if not version & 1])

    def _claim(self, sids: list[int]) -> None:
        """Get the descriptors of what is offered to us, then take it."""
        descriptors = self._runtime._descriptors
        if self._runtime.is_host:
            with contextlib.suppress(DescriptorError):
                descriptors.fetch(sids)
        here = [sid for sid in sids if descriptors.peek(sid) is not None]
        missing = [sid for sid in sids if sid not in here]
        if missing and (link := descriptors.connect()) is not None:
            link.tell(channel.GET, missing)  # GOT is an arrival
        if here:
            self._runtime._arrived(here)


def _call(call: collections.abc.Callable[..., object] | None, *arguments: object) -> None:
    if call is None:
        return
    try:
        call(*arguments)
    except Exception:
        log.exception("a callback of a hand-over raised; the loop goes on")
