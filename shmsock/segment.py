"""The shared mapping of one runtime, and where its names are.

    /dev/shm/shmsock.<name>                      the segment: header page and columns (layout.py)
    /dev/shm/sem.shmsock.<name>.<stripe>.<gen>   semaphores.py: one a stripe in use, two spare ones
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

_POISONED = HEADER_INDEX["poisoned"]
# From 3.13 on a mapping can do without a duplicate of the descriptor.
_NO_DESCRIPTOR: typing.Any = {"trackfd": False} if sys.version_info >= (3, 13) else {}

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"


def check_name(name: str) -> str:
    """Return ``name`` if it can name a runtime.

    Raises:
        ValueError: It cannot: letters, digits, ``_`` and ``-``, at most 64.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(
            f"{name!r} cannot name a runtime: use 1 to 64 letters, digits, '_' and '-', "
            "starting with a letter or digit"
        )
    return name


def run_directory(name: str) -> str:
    """Where a runtime keeps its lock file, control socket and groups."""
    return f"{SHM_DIRECTORY}/shmsock.{name}.run"


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

    def has_name(self) -> bool:
        """Whether the name on this machine is still this segment's."""
        try:
            return os.stat(f"{SHM_DIRECTORY}/shmsock.{self.name}").st_ino == self.inode
        except FileNotFoundError:
            return False

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
            first_generation: Of every stripe's semaphore; see semaphores.py.

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
