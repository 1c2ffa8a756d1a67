"""The C engine, with what is rare: words for errors, logging, and callbacks.

``_engine.c`` has everything that is done often, or inside a stripe; what it calls back is here.
Behaviour is that of ``_engine_py``: one suite tests both.
"""

from __future__ import annotations

import logging
import typing

from . import _engine
from ._engine_common import (
    STRIPE_TIMEOUT_S,
    EngineBase,
    blockers,
    check_participation,
    table_full,
)
from .errors import ClosedError, PoisonedError, StripeTimeoutError
from .layout import HEADER_INDEX
from .segment import Segment
from .semaphores import Semaphores

NAME = "c"
Reference = _engine.Reference
arm, kill_points = _engine.arm, _engine.kill_points  # for tests: die here
__all__ = [
    "NAME",
    "STRIPE_TIMEOUT_S",
    "Engine",
    "Reference",
    "arm",
    "kill_points",
    "reference_class",
]

T = typing.TypeVar("T")

log = logging.getLogger("shmsock")


def reference_class(extended: type[T]) -> type[T]:
    """Put what a class adds to ``Reference`` into the one reference type, and return that.

    WHY NOT the subclass itself: see _engine.c.
    """
    here = {"__slots__", "__module__", "__dict__", "__weakref__", *vars(Reference)}
    for name, value in vars(extended).items():
        if name not in here:  # C's own `write` stays
            setattr(Reference, name, value)
    return typing.cast("type[T]", Reference)


class Engine(_engine.Engine, EngineBase):
    """One process's hands on the slot table."""

    def __init__(
        self,
        segment: Segment,
        semaphores: Semaphores,
        index: int,
        epoch: int,
        reference_type: type[Reference] = Reference,
    ) -> None:
        """For the process that registered row ``index`` at ``epoch``."""
        assert reference_type is Reference  # there is one, and nothing can be derived from it
        EngineBase.__init__(self, segment, semaphores)
        layout = segment.layout
        offsets = {column.name: column.offset for column in layout.columns()[0]}
        offsets["poisoned"] = 8 * HEADER_INDEX["poisoned"]
        _engine.Engine.__init__(
            self,
            segment.map,
            offsets,
            layout.slots,
            layout.processes,
            layout.stripes,
            index,
            epoch,
        )

    def collect(self) -> None:
        """Give back what was dropped; the counts themselves are exact: no finaliser is Python."""
        self.drain()

    # -- what _engine.c calls -------------------------------------------------------------------

    def _semaphore_path(self, stripe: int, generation: int) -> str:
        return self.semaphores.path(stripe, generation)

    def _burn_spare(self) -> None:
        self.semaphores.burn_spare()

    def _renew_spare(self) -> None:
        self.semaphores.renew_spare()

    def _repair(self, stripe: int) -> None:
        self.repair(stripe)

    def _let_go(self, sid: int, recycled: int) -> None:
        self.let_go(sid, bool(recycled))

    def _check_participation(self) -> None:
        check_participation(self)

    def _peer_of(self, number: int) -> bytes:
        return self.peer_of(number)

    def _timed_out(self, stripe: int, waited_s: float) -> typing.NoReturn:
        raise StripeTimeoutError(blockers(self, stripe, waited_s))

    def _table_full(self) -> typing.NoReturn:
        raise table_full(self.segment.layout.slots)

    def _reference_is_closed(self) -> typing.NoReturn:
        check_participation(self)
        raise ClosedError("the reference is closed: address the socket again")

    def _runtime_is_closed(self) -> typing.NoReturn:
        self.segment.check()
        raise ClosedError("this reference's runtime is closed here: attach and address again")

    def _recv(self, reference: Reference, size_bytes: int) -> bytes:
        return typing.cast(bytes, self._runtime_io().recv(reference, size_bytes))

    def _unwritten_bytes(self, sid: int) -> int:
        return typing.cast(int, self._runtime_io().writers.unwritten_bytes(sid))

    def _runtime_io(self) -> typing.Any:
        if self.io is None:
            raise ClosedError("this engine has no runtime")
        return self.io

    def _write(self, reference: Reference, buffers: tuple[typing.Any, ...]) -> None:
        self._runtime_io().writers.write(reference, buffers)

    def _write_rest(
        self, reference: Reference, buffers: tuple[bytes, ...], sent: int, code: int, whole: int
    ) -> None:
        self.io.writers.finish(reference, buffers, sent, code, whole=bool(whole))

    def _take_collected(
        self, reference: Reference, messages: tuple[bytes, ...], error: BaseException | None
    ) -> None:
        if not isinstance(error, (ClosedError, PoisonedError)):  # then nobody will ever send them
            self.io.writers.take_collected(reference, messages)
            if error is not None:
                raise error

    def _give_turn_later(self, sid: int) -> None:
        self.io.writers.give_turn(sid)

    def _gives_back_later(self, error: BaseException) -> bool:
        """Whether a reference whose stripe was refused is tried again later; else it is inert."""
        if isinstance(error, StripeTimeoutError):
            log.warning("a reference is given back later: %s", error)
            return True
        if isinstance(error, (ClosedError, PoisonedError)):
            return False
        raise error
