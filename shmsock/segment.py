"""The shared mapping of one runtime, its named semaphores and its run directory.

    /dev/shm/shmsock.<name>                      the segment: header page and columns (layout.py)
    /dev/shm/sem.shmsock.<name>.<stripe>.<gen>   one semaphore a stripe in use, two spare ones
    /dev/shm/shmsock.<name>.run/                 lock file, control socket, groups; mode 0700

Everything carries the runtime's name, so that what a crash of *everything* leaves behind is found
by the next ``create`` of that name and by ``clean``. All of it belongs to one uid.

The mapping is made with ``posix_ipc``, never ``multiprocessing.shared_memory``: on CPython 3.11 its
resource tracker unlinks a segment that a child merely attached (gh-82300).

The whole segment is allocated at create. On tmpfs even a *read* of a page that was never written
allocates it, so on a full /dev/shm a later touch would be SIGBUS, and would kill every process that
came to repair what the first one left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import secrets
import stat
import sys
import time
import typing

import numpy as np
import posix_ipc

from .errors import FormatError, InTransitionError, PoisonedError, RuntimeNotFoundError
from .layout import (
    ADDRESS_BYTES,
    ADDRESS_OFFSET,
    HEADER_INDEX,
    HEADER_WORDS,
    LAYOUT,
    MAGIC,
    OPEN,
    PAGE_BYTES,
    REASON_BYTES,
    REASON_OFFSET,
    Layout,
)

Words = memoryview  # of native u64 or u8 items: one item store is one machine store
Array = np.ndarray[typing.Any, typing.Any]

SHM_DIRECTORY = "/dev/shm"
FIRST_GENERATION = 1
SPARE_GENERATIONS = 2

_POISONED = HEADER_INDEX["poisoned"]
# From 3.13 on a mapping can do without a duplicate of the descriptor.
_NO_DESCRIPTOR: typing.Any = {"trackfd": False} if sys.version_info >= (3, 13) else {}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_name(name: str) -> str:
    """Return ``name`` if it can name a runtime.

    Raises:
        ValueError: It cannot: letters, digits, ``_`` and ``-``, at most 64.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a runtime: use 1 to 64 letters, digits, '_' and '-', "
            "starting with a letter or digit"
        )
    return name


def run_directory(name: str) -> str:
    """Where a runtime keeps its lock file, control socket and groups."""
    return f"{SHM_DIRECTORY}/shmsock.{name}.run"


def random_generation() -> int:
    """Where a runtime's generations start.

    Random, as the first version is: the names of semaphores carry their generation, so a repairer
    of an earlier runtime of this name that was stopped in the middle, and goes on, neither unlinks
    nor makes one of ours.
    """
    return secrets.randbelow(1 << 28) << 32 | FIRST_GENERATION


def names_on_machine() -> list[str]:
    """The runtimes that left anything in shared memory, alive or not."""
    found = set()
    for entry in os.listdir(SHM_DIRECTORY):
        match = re.fullmatch(r"(?:sem\.)?shmsock\.([^.]+)(?:\.run|\.\d+\.\d+)?", entry)
        if match and _NAME.fullmatch(match[1]):
            found.add(match[1])
    return sorted(found)


class Columns:
    """Every column as a numpy array over the mapping: for whole columns."""

    row_state: Array
    row_pid: Array
    row_started_ns: Array
    row_role: Array
    row_heartbeat_ns: Array
    row_wish: Array
    ctl: Array
    hint: Array
    claims: Array
    versioned_ref: Array
    owner: Array
    heir: Array
    writer: Array
    state: Array
    retired: Array
    busy: Array
    kind: Array
    on_owner_death: Array
    selector: Array
    error_code: Array
    inode: Array
    created_ns: Array
    read_ns: Array
    written_ns: Array
    bytes_in: Array
    messages_in: Array
    bytes_out: Array
    messages_out: Array
    error_text: Array
    peer: Array
    user_data: Array
    held: Array


class Cells:
    """The same memory as flat views of items: for one item at a time.

    An item store through a view is one aligned machine store, and costs a third of numpy's. This is
    the thin accessor through which the engine and recovery touch shared state: a test may put
    instrumented views in their place and step, stop or kill at every access.
    """

    row_state: Words
    row_pid: Words
    row_started_ns: Words
    row_role: Words
    row_heartbeat_ns: Words
    row_wish: Words
    ctl: Words
    hint: Words
    claims: Words
    versioned_ref: Words
    owner: Words
    heir: Words
    writer: Words
    state: Words
    retired: Words
    busy: Words
    kind: Words
    on_owner_death: Words
    selector: Words
    error_code: Words
    inode: Words
    created_ns: Words
    read_ns: Words
    written_ns: Words
    bytes_in: Words
    messages_in: Words
    bytes_out: Words
    messages_out: Words
    held: Words


class Segment:
    """One mapping: header, columns and cells."""

    def __init__(self, name: str, fd: int, layout: Layout, *, writable: bool = True) -> None:
        """Map an open segment; ``create`` and ``attach`` call this."""
        self.name = name
        self.layout = layout
        columns, self.total_bytes = layout.columns()
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.map = mmap.mmap(fd, self.total_bytes, prot=protection, **_NO_DESCRIPTOR)
        # Two mappings of one name may follow each other: the inode tells which this is.
        self.inode = os.fstat(fd).st_ino
        self.header: Words = memoryview(self.map)[: 8 * len(HEADER_WORDS)].cast("Q")
        self.columns = Columns()
        self.cells = Cells()
        for column in columns:
            count = int(np.prod(column.shape))
            flat = np.frombuffer(self.map, column.dtype, count, column.offset)
            setattr(self.columns, column.name, flat.reshape(column.shape))
            if not column.dtype.startswith("S"):
                setattr(self.cells, column.name, memoryview(typing.cast(typing.Any, flat)))

    def close(self, *, leave_number: bool = False) -> None:
        """Unmap; whoever still looks at a column keeps the mapping until it lets go.

        Args:
            leave_number: Keep the mapping for ever: Python's has a descriptor of its own, which
                foreign code has closed, and whose number may be another file's by now.
        """
        if leave_number and not _NO_DESCRIPTOR:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.map))
            return
        vars(self.columns).clear()
        for cells in vars(self.cells).values():
            cells.release()
        vars(self.cells).clear()
        self.header.release()
        with contextlib.suppress(BufferError):
            self.map.close()

    def get(self, word: str) -> int:
        """Read a header word."""
        return int(self.header[HEADER_INDEX[word]])

    def set(self, word: str, value: int) -> None:
        """Store a header word, in one store."""
        self.header[HEADER_INDEX[word]] = value

    def control_address(self) -> str:
        """Where the host listens; empty while there is none."""
        length = self.get("address_length")
        raw = bytes(self.map[ADDRESS_OFFSET : ADDRESS_OFFSET + min(length, ADDRESS_BYTES)])
        return raw.decode("ascii", "replace")

    def publish_control_address(self, address: str) -> None:
        """Tell all participants where the host listens.

        ORDER: length 0, text, length: a reader between finds no address, or the old text with the
        new length; both fail to connect and are tried again.
        """
        raw = address.encode("ascii")
        if len(raw) > ADDRESS_BYTES:
            raise ValueError(f"control address longer than {ADDRESS_BYTES} bytes: {address}")
        self.set("address_length", 0)
        self.map[ADDRESS_OFFSET : ADDRESS_OFFSET + len(raw)] = raw
        self.set("address_length", len(raw))

    # -- poisoned -------------------------------------------------------------------------------

    def poison(self, why: str) -> bool:
        """Mark the segment: nobody may rely on it any more.

        Returns:
            False if it was marked already; the first reason stays.

        ORDER: the text first: who finds the mark finds the reason.
        If killed: it is marked or it is not; a text without a mark means nothing.
        """
        if self.get("poisoned"):
            return False
        raw = why.encode("ascii", "replace")[: REASON_BYTES - 1]
        self.map[REASON_OFFSET : REASON_OFFSET + REASON_BYTES] = raw.ljust(REASON_BYTES, b"\0")
        self.set("poisoned", 1)
        return True

    def poisoned_why(self) -> str:
        """The reason that ``poison`` was given."""
        raw = bytes(self.map[REASON_OFFSET : REASON_OFFSET + REASON_BYTES])
        return raw.partition(b"\0")[0].decode("ascii", "replace") or "no reason was given"

    def check(self) -> None:
        """Raise PoisonedError if the segment is marked; does nothing once it is unmapped."""
        try:
            poisoned = self.header[_POISONED]
        except ValueError:  # closed
            return
        if poisoned:
            raise PoisonedError(
                f"runtime {self.name!r} failed its audit beyond repair ({self.poisoned_why()}): "
                "its supervisor starts a new one, so attach again; without a supervisor restart "
                f"`shmsock serve --name {self.name}`"
            )

    @classmethod
    def create(
        cls,
        name: str,
        layout: Layout,
        max_unwritten_bytes: int,
        first_generation: int = FIRST_GENERATION,
    ) -> Segment:
        """Make the segment; its semaphores are the caller's to make.

        Args:
            name: Of the runtime.
            layout: Its sizes.
            max_unwritten_bytes: Kept in the header.
            first_generation: Of every stripe's semaphore; see ``random_generation``.

        Raises:
            FileExistsError: The name is taken.
            OSError: ENOSPC: /dev/shm is too small; the message names the size needed.

        If killed: names without ``init_done``, or without a living participant; the next create of
        that name, or ``clean``, removes them.
        """
        total_bytes = layout.columns()[1]
        try:
            shm = posix_ipc.SharedMemory(f"/shmsock.{name}", posix_ipc.O_CREX, mode=0o600)
        except posix_ipc.ExistentialError:
            raise FileExistsError(errno.EEXIST, "segment exists", f"/shmsock.{name}") from None
        try:
            _allocate(shm.fd, total_bytes)
            segment = cls(name, shm.fd, layout)
        except BaseException:
            shm.unlink()
            raise
        finally:
            shm.close_fd()
        # ORDER: magic last of these: without it an attacher takes the segment for one that is still
        # being created, and with it every other word is there.
        for word, value in (
            ("layout", LAYOUT),
            ("total_bytes", total_bytes),
            ("slots", layout.slots),
            ("processes", layout.processes),
            ("stripes", layout.stripes),
            ("max_unwritten_bytes", max_unwritten_bytes),
            # Random, so that ids of an earlier runtime of this name do not match: even, 2 .. 2^30.
            ("first_version", 2 + 2 * secrets.randbelow((1 << 29) - 2)),
            ("uid", os.geteuid()),
            ("created_ns", time.monotonic_ns()),
            ("magic", MAGIC),
        ):
            segment.set(word, value)
        segment.columns.versioned_ref[:] = segment.get("first_version") << 32
        segment.columns.ctl[:] = first_generation << 2 | OPEN
        return segment

    @classmethod
    def attach(cls, name: str, *, writable: bool = True) -> Segment:
        """Map an existing segment, poisoned or not; not ``writable`` is to look only.

        Raises:
            RuntimeNotFoundError: There is none, or its creator has not finished (or died).
            FormatError: It is not one of ours, or of another layout. Nothing was touched.
            PermissionError: It belongs to another user.
        """
        try:
            shm = posix_ipc.SharedMemory(f"/shmsock.{name}", read_only=not writable)
        except posix_ipc.ExistentialError:
            raise RuntimeNotFoundError(
                f"no runtime named {name!r} here: start one with `shmsock serve --name {name}` "
                f"or Runtime.create({name!r})"
            ) from None
        except posix_ipc.PermissionsError:
            raise PermissionError(
                errno.EACCES, "the runtime belongs to another user", f"/shmsock.{name}"
            ) from None
        try:
            return cls(name, shm.fd, _read_header(name, shm.fd), writable=writable)
        finally:
            shm.close_fd()


def _allocate(fd: int, total_bytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, total_bytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free = os.statvfs(SHM_DIRECTORY)
        raise OSError(
            errno.ENOSPC,
            f"the segment needs {total_bytes >> 20} MiB of {SHM_DIRECTORY} but only "
            f"{free.f_bavail * free.f_frsize >> 20} MiB are free: use fewer slots or processes, "
            "or enlarge it (Docker: --shm-size)",
        ) from None


def _read_header(name: str, fd: int) -> Layout:
    """Check every word of the header before a column is mapped."""
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise PermissionError(
            errno.EACCES, f"runtime {name!r} belongs to uid {status.st_uid}", f"/shmsock.{name}"
        )
    if status.st_size == 0:
        raise InTransitionError(f"runtime {name!r} is still being created: try again")
    if status.st_size < PAGE_BYTES:
        raise FormatError(f"/shmsock.{name} is {status.st_size} bytes: too short for a header")
    with mmap.mmap(fd, PAGE_BYTES, prot=mmap.PROT_READ) as page:
        words = np.frombuffer(page, "u8", len(HEADER_WORDS)).tolist()
    header = dict(zip(HEADER_WORDS, words, strict=True))
    if header["magic"] == 0 and header["init_done"] == 0:
        raise InTransitionError(f"runtime {name!r} is still being created: try again")
    for word, expected in (("magic", MAGIC), ("layout", LAYOUT), ("uid", os.geteuid())):
        if header[word] != expected:
            raise FormatError(
                f"/shmsock.{name}: {word} is {header[word]:#x}, this version wants {expected:#x}"
            )
    if header["init_done"] == 0:
        raise InTransitionError(f"runtime {name!r} is still being created: try again")
    try:
        layout = Layout(header["slots"], header["processes"], header["stripes"])
    except ValueError as error:
        raise FormatError(f"/shmsock.{name}: {error}") from None
    total_bytes = layout.columns()[1]
    for word, value in (("total_bytes", header["total_bytes"]), ("size", status.st_size)):
        if value != total_bytes:
            raise FormatError(f"/shmsock.{name}: {word} is {value}, its sizes give {total_bytes}")
    first = header["first_version"]
    for word, wrong in (
        ("max_unwritten_bytes", header["max_unwritten_bytes"] == 0),
        ("first_version", first % 2 == 1 or not 2 <= first < 1 << 30),
        ("poisoned", header["poisoned"] > 1),
        ("address_length", header["address_length"] > ADDRESS_BYTES),
        ("init_done", header["init_done"] > 1),
    ):
        if wrong:
            raise FormatError(f"/shmsock.{name}: {word} is {header[word]:#x}, which cannot be")
    return layout


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


def make_run_directory(name: str) -> str:
    """Make the private directory, or check that what is there is private and ours.

    Raises:
        PermissionError: Somebody else made it first: /dev/shm is open to everybody.
    """
    path = run_directory(name)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    if not private or status.st_uid != os.geteuid():
        raise PermissionError(errno.EACCES, "not a private directory of this user", path)
    return path


def unlink_names(name: str) -> None:
    """Take away every name of a runtime but its lock file and run directory.

    Raises:
        PermissionError: The segment is another user's. A semaphore that is, is left: its
            generation is none of ours.
    """
    for entry in os.listdir(SHM_DIRECTORY):
        if re.fullmatch(rf"sem\.shmsock\.{re.escape(name)}\.\d+\.\d+", entry):
            with contextlib.suppress(posix_ipc.ExistentialError, posix_ipc.PermissionsError):
                posix_ipc.unlink_semaphore("/" + entry.removeprefix("sem."))
    try:
        posix_ipc.unlink_shared_memory(f"/shmsock.{name}")
    except posix_ipc.ExistentialError:
        pass
    except posix_ipc.PermissionsError:
        raise PermissionError(
            errno.EACCES, "the runtime belongs to another user", f"/shmsock.{name}"
        ) from None


def is_poisoned(name: str) -> bool | None:
    """Whether the segment of a name is marked poisoned; None when there is none."""
    try:
        segment = Segment.attach(name, writable=False)
    except (RuntimeNotFoundError, InTransitionError):
        return None
    except (FormatError, PermissionError):
        return False
    poisoned = bool(segment.get("poisoned"))
    segment.close()
    return poisoned
