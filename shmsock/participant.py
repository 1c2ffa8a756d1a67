"""One process's part in a runtime: it joins, is there, looks for the dead, and leaves.

    joining   semaphores and the service's epoll, the lock file, a row; then what stands on the row
    leaving   in order (``close``): tell the peers, be reaped, close the numbers
              taken for dead, or swept by foreign code (``_disown``): others reap us
              a poisoned segment (``_end_poisoned``): nothing there is worth giving back
              in a forked child (``_forked``): only numbers are closed

Dying is leaving with more to do for the others.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import errno
import functools
import logging
import os
import threading
import time
import types
import typing

import numpy as np

from .cache import peer_of_number
from .descriptors import Descriptors
from .engine import NAME as ENGINE
from .engine import Engine
from .errors import ClosedError, InTransitionError, PoisonedError, StripeTimeoutError
from .groups import Groups
from .handover import HandOver
from .layout import HEADER_INDEX, LIVE, SLOT_BITS, Status
from .names import remove
from .processes import HOST, LockFile, Processes
from .recovery import Recovery
from .segment import Segment, run_directory
from .semaphores import Semaphores
from .service import Service
from .socket import SocketIO, SocketRef
from .store import Store
from .view import View
from .wishes import Wishes
from .writing import Writers

if typing.TYPE_CHECKING:
    from .dispatcher import Dispatcher

log = logging.getLogger("shmsock")

_TICK_S = 1.0
_GONE_S = 0.5e-3, 0.1  # how soon a process that hung up is looked at again, and how late
_POISONED = HEADER_INDEX["poisoned"]

_fork_lock = threading.Lock()


class Participant(View):
    """What a Runtime is as long as nothing is done with it."""

    _pid = 0  # of the process that joined

    def __init__(self, name: str, segment: Segment, lock_file: LockFile, role: str) -> None:
        """Take a row; for Runtime alone."""
        self.name = name
        self.run_directory = run_directory(name)
        self.max_unwritten_bytes = segment.get("max_unwritten_bytes")
        self._segment = segment
        self._role = role
        self._lock_file = lock_file
        self._store: Store | None = None  # in the host
        pid = os.getpid()
        self._join()
        self._pid = pid  # at once: from here on ``close`` gives back what ``_join`` took

    def _join(self) -> None:
        """Take a row and build this process's side; again in a forked child."""
        segment = self._segment
        segment.check()
        undo = contextlib.ExitStack()
        try:
            # What needs descriptors comes before the row: nobody would give that back at EMFILE.
            self._semaphores = Semaphores(self.name, segment.layout.stripes)
            undo.callback(self._semaphores.close)
            # All at once: after an unlink their names are gone, or are another runtime's.
            for stripe, control in enumerate(segment.cells.ctl):
                self._semaphores.get(stripe, control >> 2)
            self._service = Service(self.name)
            undo.callback(self._service.close)
            if not self._lock_file.share():
                raise InTransitionError(f"runtime {self.name!r} is just being removed")
            undo.callback(self._lock_file.unshare)
            if not self._is_current():
                raise InTransitionError(f"runtime {self.name!r} was just removed or replaced")
            self._processes = Processes(segment, self._lock_file)
            undo.callback(self._processes.withdraw)
            self.index, epoch = self._processes.register(self._role)
            self._build(epoch)
        except BaseException:
            # WHY NOT with: an exception while the stack is told that all went well would undo
            # nothing.
            undo.close()
            raise

    def _build(self, epoch: int) -> None:
        """All that stands on the row; nothing here is seen by others."""
        segment = self._segment
        self._engine = Engine(segment, self._semaphores, self.index, epoch, SocketRef)
        self._recovery = Recovery(segment, self._processes, self._semaphores, self._engine)
        self._descriptors = Descriptors(segment, self._engine, self._service, epoch)
        self._io = SocketIO(segment, self._engine, self._descriptors)
        self._writers = Writers(
            self._engine,
            self._descriptors,
            self._service,
            self.max_unwritten_bytes,
            self._io.error_of,
            self._io.set_failed,
        )
        self._io.writers = self._writers
        self._engine.io = self._io
        if ENGINE != "py":
            # The C engine's method itself: a Python one around it would cost four times as much.
            vars(self)["address"] = self._engine.address
        self._engine.repair = self._look
        self._engine.peer_of = peer_of_number
        self._descriptors.peers.is_alive = self._processes.is_alive
        self._service.on_lost = self._disown
        self._descriptors.on_hang_up = self._hung_up
        self._descriptors.on_arrival = self._arrived
        self._descriptors.on_lost = lambda sid: self._io.set_failed(
            sid, errno.EBADF, "its descriptor was lost with the host"
        )
        self._hand_over = HandOver(self)
        self._io.hand_over = lambda sid, index, on_done: self._hand_over.offer(
            sid, self._word_of(index), on_done
        )
        self.wishes = Wishes(segment)
        self._dispatcher: Dispatcher | None = None
        self._groups: Groups | None = None
        self._closed = False
        self._disowned = False
        self._unlinks = False
        self._sharing = True
        self._leaving: collections.deque[collections.abc.Callable[[], object]] = collections.deque()
        self._service.call_later(_TICK_S, self._tick)

    # -- being there ----------------------------------------------------------------------------

    @property
    def is_host(self) -> bool:
        """Whether this process serves the descriptor store."""
        return self._store is not None

    def _check(self) -> None:
        """Raise if closed; in a forked child, attach first."""
        self._check_open()
        self._segment.check()

    def _check_open(self) -> None:
        """As ``_check``, for what is of use in a poisoned runtime too."""
        if self._closed:
            raise ClosedError(f"this Runtime of {self.name!r} is closed: attach again")
        if self._pid != os.getpid():
            self._attach_in_child()
        elif self._disowned:
            raise ClosedError(
                f"this process was taken for dead in {self.name!r}, or foreign code closed its "
                "descriptors: attach again"
            )

    def _attach_in_child(self, role: str = "client") -> None:
        with _fork_lock:
            if self._pid == os.getpid():
                return
            self._lock_file = LockFile.open(self.name, create=False)
            self._role = role
            self._join()
            self._pid = os.getpid()  # last: until here every call tries to attach

    def _word_of(self, index: int) -> int:
        if 0 <= index < self._segment.layout.processes:
            word = self._segment.cells.row_state[index]
            if word & 0xFF == LIVE:
                return word >> 8 << 16 | index
        raise ValueError(f"process {index} is not alive: no socket can be its own")

    def _adopt_dispatcher(self, dispatcher: Dispatcher | None) -> Service:
        if dispatcher is not None:
            self._check()
            if self._dispatcher is not None:
                raise ValueError("this Runtime has a Dispatcher already: one a process is enough")
        self._dispatcher = dispatcher
        return self._service

    def _hung_up(self, sid: int) -> None:
        self._writers.hung_up(sid)
        if self._dispatcher is not None and self._engine.status(sid) is not Status.LIVE:
            self._dispatcher._tell(self._dispatcher._ended, sid)

    def _arrived(self, sids: list[int]) -> None:
        dispatcher = self._dispatcher
        if dispatcher is not None and dispatcher._arrived is not None:
            dispatcher._tell(dispatcher._arrived, self._hand_over.take(sids))

    # -- looking for the dead -------------------------------------------------------------------

    def _is_current(self) -> bool:
        """Whether the names on this machine are still this runtime's."""
        return self._segment.has_name() and self._lock_file.is_current()

    def _look(self, stripe: int | None = None) -> None:
        """Somebody may have died.

        Not in a runtime whose names were taken away: a retirement would make names that nobody
        removes, or unlink those of the next runtime of this name.
        """
        if self._is_current() and not self._segment.header[_POISONED]:
            self._recovery.look(stripe)

    def _peer_gone(self, index: int, epoch: int, delay_s: float = _GONE_S[0]) -> None:
        """In the host: a process hung up. The dead are reaped as soon as the kernel says so.

        Its byte is let go *after* its sockets are closed, both while it dies: who looks once, and
        at once, finds it alive. One that lives has only closed a connection.
        """
        if self._closed or self._segment.cells.row_state[index] != epoch << 8 | LIVE:
            return
        if not self._processes.is_alive(index):
            self._look()
        if delay_s <= _GONE_S[1]:  # also where another process is at the repair
            again = functools.partial(self._peer_gone, index, epoch, 2 * delay_s)
            self._service.call_later(delay_s, again)

    # -- the timer ------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Once a second, in the service loop."""
        if self._engine.closed:
            return
        if self._segment.header[_POISONED]:
            self._end_poisoned()
            return
        self._service.call_later(_TICK_S, self._tick)
        if not self._engine.closed and not self._still_there():
            self._disown()
        if self._engine.closed:
            return
        self._segment.cells.row_heartbeat_ns[self.index] = time.monotonic_ns()
        # Each on its own: what fails is logged, and does not keep the others from being done.
        for step in (
            self._engine.collect,
            self._look_around,
            self._writers.tick,
            self._descriptors.tick,
            self._claim_unknown,
            self._hand_over.tick,
            self._renew_semaphores,
        ):
            self._service.call_soon(step)

    def _still_there(self) -> bool:
        """Whether our row is ours, and our numbers are."""
        mine = self._segment.cells.row_state[self.index] == self._engine.row_word
        return mine and self._lock_file.reassert() and self._service.is_intact()

    def _claim_unknown(self) -> None:
        if self._dispatcher is not None and self._dispatcher._arrived is not None:
            self._descriptors.claim_unknown()

    def _look_around(self) -> None:
        reaped = self._recovery.counters["reaped"]
        self._look()
        if self._groups is not None and self._recovery.counters["reaped"] != reaped:
            self._groups.reap_readers()

    def _renew_semaphores(self) -> None:
        self._semaphores.renew_spare()
        with self._engine.lock:
            for stripe, control in enumerate(self._segment.cells.ctl):
                self._semaphores.forget_retired(stripe, control >> 2)

    # -- leaving --------------------------------------------------------------------------------

    def close(self, *, unlink: bool = False) -> None:
        """Leave: give back what this process holds; the sockets it owns fail.

        The host's leaving ends the runtime's descriptor store. Closing twice does nothing.

        Args:
            unlink: The host also takes every name away, before anybody else can be host of that
                name: afterwards, with ``unlink()``, they might be the next runtime's.
        """
        if self._pid != os.getpid():
            return
        vars(self).pop("address", None)
        if not self._closed:
            if not self._engine.closed and not self._still_there():
                self._disown()
            self._unlinks = unlink and self._still_host()
            self._leaving = collections.deque(self._ways_out())
            self._closed = True
        # Repeating a step is harmless, so it goes last: who was interrupted closes again.
        while self._leaving:
            self._leaving[0]()
            self._leaving.popleft()

    @property
    def _has_left(self) -> bool:
        return self._closed and not self._leaving

    def _ways_out(self) -> collections.abc.Iterator[collections.abc.Callable[[], object]]:
        """What closing does, one after the other."""
        if self._dispatcher is not None:
            yield self._dispatcher.close
        if not self._segment.header[_POISONED]:
            yield self._fail_owned
        elif self._store is not None:
            yield self._store.end_connections
        yield self._service.close
        yield self._writers.close
        if self._groups is not None:
            yield self._groups.close
        yield self._leave
        yield self._unshare
        if self._store is not None:
            yield self._store.close
            if self._still_host():
                yield lambda: self._segment.publish_control_address("")
        yield self._descriptors.close
        yield self._semaphores.close
        yield lambda: self._segment.close(leave_number=self._disowned)

    def _fail_owned(self) -> None:
        """End our own sockets while their peers can still be told."""
        columns = self._segment.columns
        mine = (columns.owner == self._engine.word) & (columns.state == LIVE)
        for slot in np.flatnonzero(mine).tolist():
            version = int(columns.versioned_ref[slot]) >> SLOT_BITS
            with contextlib.suppress(StripeTimeoutError, ClosedError, PoisonedError):
                sid = (version & ~1) << SLOT_BITS | slot
                self._io.set_failed(sid, errno.EOWNERDEAD, "the owner process left")

    def _leave(self) -> None:
        """Be reaped: by ourselves if the arbiter can be had, else by whoever comes next."""
        self._engine.detach_all()
        self._end_engine()
        with contextlib.suppress(OSError, ClosedError):
            self._reap_oneself()
        self._withdraw()

    def _end_engine(self) -> None:
        with self._engine.lock:  # none of our threads is inside a stripe from here on
            self._engine.closed = True

    def _reap_oneself(self) -> None:
        with self._recovery.arbitrated(timeout_s=0.2) as arbiter:
            # Not ours any more if we were taken for dead: its tenant may be somebody else by now.
            epoch = self._segment.cells.row_state[self.index] >> 8
            mine = epoch == self._engine.row_word >> 8
            # Who is reaped is recounted, and a poisoned table makes no sense to recount.
            if arbiter and mine and self._is_current() and not self._segment.header[_POISONED]:
                self._recovery.reap(self.index)

    def _withdraw(self) -> None:
        """Let our proof of life go: others may reap us from here on, and be host."""
        self._processes.withdraw()
        if self._unlinks:
            remove(self.name)  # ORDER: while the host's byte is ours
        if self._store is not None:
            self._lock_file.drop(HOST)

    def _unshare(self) -> None:
        if self._sharing:
            self._sharing = False  # first: unsharing twice would be another Runtime's share
            self._lock_file.unshare()

    def _still_host(self) -> bool:
        """Whether the host's place is ours: after ``_disown`` somebody else may have it."""
        return self.is_host and not self._disowned

    def _disown(self) -> None:
        """We were taken for dead, or foreign code (``closerange``) closed our descriptors.

        Every later call raises ClosedError. What we held and owned is given back by whoever reaps
        us; a number that may be another file's by now is neither written to nor closed.
        """
        if self._engine.closed:
            return
        log.error(
            "runtime %r: this process was taken for dead, or its descriptors were closed by "
            "foreign code: attach again",
            self.name,
        )
        self._disowned = True
        self._end_engine()
        if not self._service.is_intact():
            self._service.abandon()
            self._descriptors.forget()
            if self._store is not None:
                self._store.abandon()
        self._withdraw()
        if self._dispatcher is not None:
            self._dispatcher._disowned()

    def _end_poisoned(self) -> None:
        """The segment is of no use any more: say so once, and let the dispatcher return."""
        log.critical(
            "runtime %r: process %d ends its part: the segment is poisoned: %s",
            self.name,
            self.index,
            self._segment.poisoned_why(),
        )
        self._engine.closed = True
        if self._dispatcher is not None:
            self._dispatcher.stop()

    def unlink(self) -> None:
        """Take every name of the runtime away; processes that are attached keep what they have."""
        remove(self.name)

    def __enter__(self) -> typing.Self:
        """The runtime itself."""
        self._check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        """Leave; the host also takes the names away."""
        closed, host = self._closed, self._still_host()
        self.close(unlink=True)
        if closed and host and self._segment.has_name():
            self.unlink()

    def __repr__(self) -> str:
        """For logs."""
        state = "closed" if self._closed else "host" if self.is_host else self._role
        return f"<Runtime {self.name!r} process {self.index} {state}>"

    # -- fork -----------------------------------------------------------------------------------

    def _forked(self) -> None:
        """In a forked child: nothing shared is touched, nothing of the parent's is unregistered.

        ORDER: epolls first, then the descriptors they watch; or a peer's end of stream would wait
        for the child, and closing numbers first would leave them in the parent's set.
        """
        vars(self).pop("address", None)
        self._engine.foreign = True
        self._engine.closed = True  # no inherited reference claims a stripe in the parent's name
        if self._dispatcher is not None:
            self._dispatcher._close_in_child()
            self._dispatcher = None
        self._service.forget_in_child()
        self._descriptors.forget()
        if self._store is not None:
            self._store.forget()
            self._store = None
        self._groups = None


def _renew_fork_lock() -> None:
    global _fork_lock
    _fork_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_fork_lock)
