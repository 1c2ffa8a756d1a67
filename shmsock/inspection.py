"""Looking at a runtime without taking part in it: also one that is dead, poisoned or full."""

from __future__ import annotations

import types
import typing

from .audit import Audit
from .errors import AlreadyRunningError, RuntimeNotFoundError
from .mending import Mended, Mender
from .processes import LockFile, Processes
from .recovery import Recovery
from .segment import Segment, check_name
from .semaphores import Semaphores
from .view import View


class Inspector(View):
    """A reader of one runtime's table; its own context manager.

    It has no process row, takes no stripe and maps the segment to read only. ``mend`` is the one
    call that changes anything.
    """

    def __init__(self, name: str) -> None:
        """Map what is there, whether anybody lives in it or not.

        Raises:
            RuntimeNotFoundError: There is nothing of that name, or only part of its names.
            FormatError: Its header makes no sense, or another version made it.
            PermissionError: It is another user's.
        """
        self.name = check_name(name)
        self._segment = Segment.attach(name, writable=False)
        try:
            self._lock_file = LockFile.open(name, create=False)
        except BaseException:
            self._segment.close()
            raise
        self._processes = Processes(self._segment, self._lock_file)
        self._audit = Audit(self._segment, self._processes)
        self._closed = False

    def _check(self) -> None:
        if self._closed:
            raise ValueError("this Inspector is closed")

    @property
    def poisoned(self) -> str:
        """Why the segment is marked poisoned; empty when it is not."""
        self._check()
        return self._segment.poisoned_why() if self._segment.get("poisoned") else ""

    def audit(self, patience_s: float = 0.0) -> list[str]:
        """A line for each invariant that does not hold.

        Args:
            patience_s: How long to wait for what time cures: a death that is about to be reaped.

        Concurrency: takes nothing; what looks wrong is looked at again before it is reported.
        """
        self._check()
        return [breach.text for breach in self._audit.breaches(patience_s)]

    def mend(self) -> Mended:
        """Reap the dead, give every stripe a new semaphore, recount it, and look again.

        What stays wrong is beyond repair: the segment is marked poisoned.

        Raises:
            RuntimeNotFoundError: Its names were taken away meanwhile.
            AlreadyRunningError: Somebody else is repairing, or removing it.

        If killed: what was not done is found again by the next one.
        """
        self._check()
        if not self._lock_file.share():
            raise AlreadyRunningError(f"runtime {self.name!r} is just being removed")
        try:
            if not self._lock_file.is_current():
                raise RuntimeNotFoundError(f"runtime {self.name!r} was just removed or replaced")
            segment = Segment.attach(self.name)
            semaphores = Semaphores(self.name, segment.layout.stripes)
            try:
                processes = Processes(segment, self._lock_file)
                recovery = Recovery(segment, processes, semaphores)
                return Mender(segment, processes, semaphores, recovery).mend()
            finally:
                semaphores.close()
                segment.close()
        finally:
            self._lock_file.unshare()  # the last one in this process closes it
            self._processes.lock_file = self._lock_file = LockFile.open(self.name, create=False)

    def close(self) -> None:
        """Unmap."""
        if not self._closed:
            self._closed = True
            self._segment.close()

    def __enter__(self) -> typing.Self:
        """The inspector itself."""
        self._check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()
