"""The named semaphores of the stripes: handles, generations, and the spare ones of each stripe.

    /dev/shm/sem.shmsock.<name>.<stripe>.<generation>

One is in use, and two of the following generations, with value 0, are made ahead of time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat

import posix_ipc

from .segment import FIRST_GENERATION, SHM_DIRECTORY

SPARE_GENERATIONS = 2


def random_generation() -> int:
    """Where a runtime's generations start.

    Random, as the first version is: the names of semaphores carry their generation, so a repairer
    of an earlier runtime of this name that was stopped in the middle, and goes on, neither unlinks
    nor makes one of ours.
    """
    return secrets.randbelow(1 << 28) << 32 | FIRST_GENERATION


def _open_spare() -> tuple[int, int]:
    """A descriptor that is nobody else's, and its inode, which tells that it still is."""
    fd = os.memfd_create("shmsock-spare", os.MFD_CLOEXEC)
    return fd, os.fstat(fd).st_ino


class Semaphores:
    """A process's handles on the stripes' semaphores.

    A handle is a mapping, not a descriptor, but opening one needs a descriptor for a moment. One
    spare is kept to burn, so that recovery works at the limit of open files.
    """

    def __init__(self, name: str, stripes: int) -> None:
        """Nothing is opened yet."""
        self.name = name
        self._handles: list[dict[int, posix_ipc.Semaphore]] = [{} for _ in range(stripes)]
        # A list: two threads that renew at once keep two, and lose none.
        self._spares = [_open_spare()]

    def path(self, stripe: int, generation: int) -> str:
        """The POSIX name."""
        return f"/shmsock.{self.name}.{stripe}.{generation}"

    def get(self, stripe: int, generation: int) -> posix_ipc.Semaphore | None:
        """The semaphore, opened once; None when its name is gone, so it has been retired."""
        try:
            return self._handles[stripe][generation]
        except KeyError:
            handle = self._open(stripe, generation)
        if handle is not None:
            self._handles[stripe][generation] = handle
        return handle

    def _open(self, stripe: int, generation: int) -> posix_ipc.Semaphore | None:
        path = self.path(stripe, generation)
        try:
            return posix_ipc.Semaphore(path)
        except posix_ipc.ExistentialError:
            return None
        except OSError as error:  # EMFILE or ENFILE: posix_ipc gives them a text and no errno
            if not self._spares:
                raise OSError(
                    error.errno or errno.EMFILE, f"a stripe's semaphore: {error}"
                ) from None
        # WHY NOT under a lock: two threads here at once both fail or both succeed; a spare that
        # another thread's file took is opened again at the next timer.
        self.burn_spare()
        try:
            return posix_ipc.Semaphore(path)
        except posix_ipc.ExistentialError:
            return None
        finally:
            self.renew_spare()

    def burn_spare(self) -> None:
        """Let the spare descriptors go, for something that needs one for a moment."""
        with contextlib.suppress(IndexError):
            while True:
                fd, inode = self._spares.pop()
                # Foreign code may have closed and reused the number.
                with contextlib.suppress(OSError):
                    if os.fstat(fd).st_ino == inode:
                        os.close(fd)

    def renew_spare(self) -> None:
        """Hold a descriptor to burn, if there is one to be had."""
        if not self._spares:
            with contextlib.suppress(OSError):
                self._spares.append(_open_spare())

    def make(self, stripe: int, generation: int, value: int = 0) -> posix_ipc.Semaphore | None:
        """Open the semaphore of a generation not yet in use, making it if it does not exist.

        Returns:
            None if what has the name cannot be trusted: it is another user's, or open to others,
            or has not ``value`` (a token nobody may have). The caller takes another generation:
            WHY NOT unlink it and make it anew: others may have this one open already.

        Raises:
            OSError: ENOSPC, EMFILE.
        """
        try:
            handle = self.get(stripe, generation)
            if handle is None:
                self.burn_spare()
                try:
                    handle = posix_ipc.Semaphore(
                        self.path(stripe, generation), posix_ipc.O_CREX, 0o600, value
                    )
                finally:
                    self.renew_spare()
                self._handles[stripe][generation] = handle
            status = os.lstat(f"{SHM_DIRECTORY}/sem.{self.path(stripe, generation)[1:]}")
        except (posix_ipc.PermissionsError, posix_ipc.ExistentialError, FileNotFoundError):
            return None  # another user's; or made, or taken away, by somebody else at this moment
        private = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077
        found = self._handles[stripe][generation].value
        return handle if private and status.st_uid == os.geteuid() and found == value else None

    @staticmethod
    def value(name: str, stripe: int, generation: int) -> int | None:
        """What a semaphore's value is now, by its name; None if it has none.

        WHY NOT a cached handle: the timer may close it meanwhile, and a look must not keep any.
        """
        try:
            semaphore = posix_ipc.Semaphore(f"/shmsock.{name}.{stripe}.{generation}")
        except posix_ipc.ExistentialError:
            return None
        try:
            return int(semaphore.value)
        finally:
            semaphore.close()

    def empty(self, stripe: int, generation: int) -> None:
        """Take every token out of a spare semaphore; the arbiter is held, so nobody waits for one.

        WHY NOT a new one of its name: who has the old one open would not exclude who opens it anew.
        """
        semaphore = self.get(stripe, generation)
        while semaphore is not None and semaphore.value:
            with contextlib.suppress(posix_ipc.BusyError):
                semaphore.acquire(0)

    def unlink(self, stripe: int, generation: int) -> None:
        """Take the name away, if it is ours; those who have the semaphore open keep it."""
        with contextlib.suppress(posix_ipc.ExistentialError, posix_ipc.PermissionsError):
            posix_ipc.unlink_semaphore(self.path(stripe, generation))

    def forget_retired(self, stripe: int, generation: int) -> None:
        """Close the handles of generations before ``generation``; nobody may be using them."""
        handles = self._handles[stripe]
        for old in [g for g in list(handles) if g < generation]:  # a repairer may be adding one
            handles.pop(old).close()

    def close(self) -> None:
        """Close every handle."""
        for handles in self._handles:
            while handles:
                handles.popitem()[1].close()
        self.burn_spare()


def make_first(name: str, stripes: int, first_generation: int) -> None:
    """Every stripe's semaphore, and its spare ones.

    Raises:
        OSError: ENOSPC: /dev/shm is full.
        PermissionError: Somebody else made one of these names first.
    """
    semaphores = Semaphores(name, stripes)
    try:
        for stripe in range(stripes):
            for ahead in range(1 + SPARE_GENERATIONS):
                generation = first_generation + ahead
                if semaphores.make(stripe, generation, int(ahead == 0)) is None:
                    path = semaphores.path(stripe, generation)
                    raise PermissionError(errno.EEXIST, "somebody else's semaphore", path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"{SHM_DIRECTORY} is full: {stripes} stripes need {stripes * (1 + SPARE_GENERATIONS)} "
            f"semaphores of {os.sysconf('SC_PAGE_SIZE')} bytes beside the segment: use fewer "
            "stripes or slots, or enlarge it (Docker: --shm-size)",
        ) from None
    finally:
        semaphores.close()
