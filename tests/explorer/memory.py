"""What the simulated processes share, behind the interfaces that the real code uses.

The words are real: one buffer with the layout of a segment. But each process sees them through
views that ask the world before every access, and semaphores, the lock file, ``membarrier`` and the
clock are the world's. So ``Engine``, ``Recovery``, ``Processes``, ``LockFile.exclusive`` and
``Semaphores`` run as they are.

What is coarser than a machine: an element or a slice is read in one access; numpy reads a whole
column at once for each operation on it; of the store buffer only an OWN claim may linger.
"""

from __future__ import annotations

import collections
import collections.abc
import errno
import fcntl
import os
import stat
import struct
import types
import typing

import numpy as np
import posix_ipc

from shmsock.layout import BROKEN, HEADER_WORDS, OPEN, OWN, PAGE_BYTES, Layout
from shmsock.processes import LockFile
from shmsock.segment import Cells, Columns
from shmsock.semaphores import Semaphores

if typing.TYPE_CHECKING:
    from .world import World

FIRST_VERSION = 2
NAP_S = 0.6  # a nap, of whatever length, is this long: more than 50 ms, less than a drain

# Nobody decides anything by these, or nobody else stores to them: a kill there is tried, a switch
# there would lead nowhere new.
_QUIET = {
    "row_pid", "row_started_ns", "row_role", "row_heartbeat_ns", "hint", "kind", "on_owner_death",
    "selector", "error_code", "inode", "created_ns", "read_ns", "written_ns", "bytes_out",
    "messages_in", "messages_out", "error_text", "peer", "user_data",
}  # fmt: skip
# Whole columns that are looked at from outside a stripe; the others only inside, by a recount.
_LOUD_COLUMNS = {"claims", "row_state", "ctl"}


class Words:
    """A column as ``Cells`` has it: each access is one step of whoever makes it."""

    def __init__(self, world: World, name: str, view: memoryview) -> None:
        self.world, self.name, self.view = world, name, view
        self.reads, self.writes = f"read {name}", f"store {name}"
        self.quiet = name in _QUIET

    def __len__(self) -> int:
        return len(self.view)

    def __iter__(self) -> collections.abc.Iterator[int]:
        return iter(self[:])

    def __getitem__(self, key: typing.Any) -> typing.Any:
        world = self.world
        if not world.direct:
            world.step(self.reads, self.quiet)
        value: typing.Any = self.view[key]
        if isinstance(key, slice):
            value = bytes(value) if self.view.itemsize == 1 else value.tolist()
        elif self.name == "claims":
            value = world.own_claim(key, value)
        if not world.direct:
            world.saw(value if value.__class__ is not list else tuple(value), key)
        return value

    def __setitem__(self, key: int, value: int) -> None:
        world = self.world
        if not world.direct:
            world.step(self.writes, self.quiet)
            if world.log is not None:
                world.say(f"[{key}] = {describe(self.name, value)}")
        world.store(self, key, value)


def describe(name: str, value: int) -> str:
    """A word for people."""
    if name == "claims":
        return f"({value >> 2}, {('0', 'WANT', 'OWN', 'BROKEN')[value & 3]})"
    if name == "ctl":
        return f"({value >> 2}, {('OPEN', 'CLOSED', 'OPENING', '?')[value & 3]})"
    if name == "versioned_ref":
        return f"(version {value >> 32}, nref {value & 0xFFFFFFFF})"
    if name == "row_state":
        return f"(epoch {value >> 8}, {('FREE', 'LIVE', 'REAPING')[value & 255]})"
    return str(value)


class Whole:
    """A column, or a part of one, as ``Columns`` has it.

    Taking a part touches nothing; every operation on it is one access, as late as in numpy.
    """

    __array_priority__ = 100

    def __init__(self, world: World, name: str, array: np.ndarray[typing.Any, typing.Any]) -> None:
        self.world, self.name, self.array = world, name, array

    def _read(self) -> typing.Any:
        world = self.world
        if world.direct:
            return self.array
        world.step(f"read {self.name} column", self.name not in _LOUD_COLUMNS)
        taken = self.array.copy()
        world.saw(taken.tobytes())
        return taken

    def __getitem__(self, key: typing.Any) -> typing.Any:
        part = self.array[key]
        if isinstance(part, np.ndarray):
            return Whole(self.world, self.name, part)
        return self._read()[key]

    def __setitem__(self, key: typing.Any, value: typing.Any) -> None:
        world = self.world
        if world.direct:
            self.array[key] = value
            return
        flat = self.array[key : key + 1] if isinstance(key, int) else self.array[key]
        if isinstance(flat, np.ndarray) and flat.ndim:
            for offset in range(len(flat)):  # item by item, as numpy stores them
                world.step(f"store {self.name} column")
                world.drain_own()
                flat[offset] = value
                world.touched()
            return
        world.step(f"store {self.name} column", True)
        world.drain_own()
        self.array[key] = value
        world.touched()

    def __array__(self, dtype: typing.Any = None, copy: typing.Any = None) -> typing.Any:
        return np.array(self._read(), dtype)

    def __len__(self) -> int:
        return len(self.array)

    def __getattr__(self, name: str) -> typing.Any:
        if name in ("itemsize", "shape", "dtype", "ndim"):
            return getattr(self.array, name)
        return getattr(self._read(), name)

    def __eq__(self, other: object) -> typing.Any:
        return self._read() == other

    def __ne__(self, other: object) -> typing.Any:
        return self._read() != other

    def __gt__(self, other: typing.Any) -> typing.Any:
        return self._read() > other

    def __and__(self, other: typing.Any) -> typing.Any:
        return self._read() & other

    def __rshift__(self, other: typing.Any) -> typing.Any:
        return self._read() >> other

    __hash__ = object.__hash__


class Memory:
    """A segment without a name: the part of ``Segment`` that the layers above it use."""

    name = "explored"
    inode = 1

    def __init__(self, world: World, layout: Layout) -> None:
        self.layout = layout
        columns, self.total_bytes = layout.columns()
        self.buffer = bytearray(self.total_bytes)
        self.header = memoryview(bytearray(8 * len(HEADER_WORDS))).cast("Q")
        self.columns, self.cells = Columns(), Cells()
        self.raw: typing.Any = Columns()
        for column in columns:
            count = int(np.prod(column.shape))
            flat = np.frombuffer(self.buffer, column.dtype, count, column.offset)
            setattr(self.raw, column.name, flat.reshape(column.shape))
            whole: typing.Any = Whole(world, column.name, flat.reshape(column.shape))
            setattr(self.columns, column.name, whole)
            if not column.dtype.startswith("S"):
                words = Words(world, column.name, memoryview(typing.cast(typing.Any, flat)))
                setattr(self.cells, column.name, words)
        end = columns[-1].offset + int(np.prod(columns[-1].shape))
        self._used = memoryview(self.buffer)[PAGE_BYTES:end]
        self.raw.versioned_ref[:] = FIRST_VERSION << 32
        self.raw.ctl[:] = 1 << 2 | OPEN
        self._fresh = bytes(self._used)

    def check(self) -> None:
        """As ``Segment.check``: nobody poisons this one."""

    def reset(self) -> None:
        """As after create."""
        self._used[:] = self._fresh

    def digest(self) -> int:
        """One number for all there is."""
        return hash(bytes(self._used))

    def get(self, word: str) -> int:
        """No header word is ever set."""
        return 0

    def control_address(self) -> str:
        """There is no host."""
        return ""


class Semaphore:
    """The kernel's semaphore."""

    def __init__(self, world: World, place: tuple[int, int], value: int) -> None:
        self.world, self.place, self.value = world, place, value

    def acquire(self, timeout: float | None = None) -> None:
        """Never waits: nobody may sleep inside."""
        world = self.world
        if timeout != 0:
            world.violation("somebody sleeps inside a semaphore")
        world.enter_kernel(f"take token {self.place}")
        if self.value == 0:
            world.saw("busy")
            raise posix_ipc.BusyError("busy")
        self.value -= 1
        world.kernel_changed()
        world.saw("taken")

    def release(self) -> None:
        world = self.world
        world.enter_kernel(f"post token {self.place}")
        self.value += 1
        if self.value > 1:
            world.violation(f"the semaphore of stripe and generation {self.place} has two tokens")
        world.kernel_changed()
        world.progress += 1


class Handle:
    """What a process has opened: closed, it must not be used any more."""

    def __init__(self, semaphore: Semaphore) -> None:
        self.semaphore, self.closed = semaphore, False

    def _kernel(self) -> Semaphore:
        if self.closed and not self.semaphore.world.over:
            self.semaphore.world.violation("a semaphore is used after its handle was closed")
        return self.semaphore

    def acquire(self, timeout: float | None = None) -> None:
        self._kernel().acquire(timeout)

    def release(self) -> None:
        self._kernel().release()

    @property
    def value(self) -> int:
        semaphore = self._kernel()
        semaphore.world.enter_kernel(f"look at token {semaphore.place}", quiet=True)
        semaphore.world.saw(semaphore.value)
        return semaphore.value

    def close(self) -> None:
        self.closed = True


class FakePosixIpc:
    """``posix_ipc`` as semaphores.py uses it, over the world's names."""

    O_CREX = posix_ipc.O_CREX
    ExistentialError = posix_ipc.ExistentialError
    BusyError = posix_ipc.BusyError
    PermissionsError = posix_ipc.PermissionsError

    def __init__(self, world: World) -> None:
        self._world = world

    def Semaphore(self, path: str, flags: int = 0, mode: int = 0, value: int = 0) -> Handle:
        world = self._world
        place = place_of(path)
        world.enter_kernel(f"{'make' if flags else 'open'} semaphore {place}")
        found = world.names.get(place)
        world.saw(found is not None)
        if flags:
            if found is not None:
                raise posix_ipc.ExistentialError("exists")
            found = world.names[place] = Semaphore(world, place, value)
            world.kernel_changed()
        elif found is None:
            raise posix_ipc.ExistentialError("gone")
        return Handle(found)

    def unlink_semaphore(self, path: str) -> None:
        world = self._world
        world.enter_kernel(f"unlink semaphore {place_of(path)}")
        if world.names.pop(place_of(path), None) is None:
            raise posix_ipc.ExistentialError("gone")
        world.kernel_changed()


class FakeOs:
    """``os`` as the modules look at files with it.

    Every semaphore is a private file of this user; a number's inode is the socket it belongs to.
    """

    geteuid = staticmethod(os.geteuid)

    def __init__(self, world: World) -> None:
        self._world = world

    def lstat(self, path: str) -> typing.Any:
        found = place_of(path) in self._world.names
        self._world.saw(found)
        if not found:
            raise FileNotFoundError(path)
        return types.SimpleNamespace(st_mode=stat.S_IFREG | 0o600, st_uid=os.geteuid())

    def fstat(self, fd: int) -> typing.Any:
        world = self._world
        world.enter_kernel(f"look at number {fd}")
        world.saw(world.numbers.get(fd))
        if fd not in world.numbers:
            raise OSError(errno.EBADF, "closed")
        return types.SimpleNamespace(st_ino=world.numbers[fd])


def place_of(path: str) -> tuple[int, int]:
    stripe, generation = path.rsplit(".", 2)[1:]
    return int(stripe), int(generation)


class Handles(Semaphores):
    """The real handles of a process, without the descriptor to burn."""

    def __init__(self, stripes: int) -> None:
        self.name = "explored"
        self._handles = [{} for _ in range(stripes)]

    def burn_spare(self) -> None: ...

    def renew_spare(self) -> None: ...

    def known(self) -> tuple[tuple[int, ...], ...]:
        """Which generations need no opening any more."""
        return tuple(tuple(sorted(handles)) for handles in self._handles)


class Lock:
    """A process-local lock: whoever must wait lets the others go on."""

    def __init__(self, world: World, shared: bool) -> None:
        self.world, self.shared = world, shared
        self.owner: typing.Any = None

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Called as a method: an exception may come between having it and saying so."""
        taken = self._take(blocking, timeout)
        if taken and self.world.raises and not self.world.direct:
            self.world.step("has local lock", True)
        return taken

    def _take(self, blocking: bool = True, timeout: float = -1) -> bool:
        world = self.world
        if world.direct:
            if self.owner is not None:
                if not blocking or timeout >= 0:
                    return False
                world.violation("a process-local lock was left held")
            self.owner = world.current
            return True
        if self.shared or world.raises:
            world.step("take local lock", not self.shared)
        while self.owner is not None:
            if not blocking or (timeout >= 0 and not world.wait_for_lock(self, timed=True)):
                world.saw("held")
                return False
            if timeout < 0:
                world.wait_for_lock(self, timed=False)
        self.owner = world.current
        return True

    def release(self) -> None:
        if self.shared and not self.world.direct:
            self.world.step("let go of local lock", raisable=False)
        self.owner = None

    def locked(self) -> bool:
        return self.owner is not None

    def __enter__(self) -> bool:
        return self._take()

    def __exit__(self, *_: object) -> None:
        self.release()


class Bytes(LockFile):
    """The real lock file over the world's bytes, which the kernel drops with their process.

    Its descriptor is the number of the process, which ``FakeFcntl`` understands.
    """

    def __init__(self, world: World, process: int) -> None:
        self.world = world
        self.path, self._fd, self._inode = "the lock file", process, (0, 0)
        self._held, self._sharers = set(), 1
        self._mutex: typing.Any = Lock(world, False)
        self._users = {}
        self.lost = False  # foreign code has closed the number, and has another file there

    def _is_ours(self) -> bool:
        return not self.lost

    def __del__(self) -> None:
        """There is no descriptor to close."""


class FakeFcntl:
    """``fcntl`` as ``LockFile`` uses it: locks of one byte, by process.

    Of another file, behind a number that is lost, every byte is free.
    """

    F_SETLK, F_GETLK = fcntl.F_SETLK, fcntl.F_GETLK
    F_RDLCK, F_WRLCK, F_UNLCK = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
    _FLOCK = struct.Struct("hhqqi4x")

    def __init__(self, world: World) -> None:
        self._world = world

    def fcntl(self, fd: int, command: int, request: bytes) -> bytes:
        kind, _, byte, _, _ = self._FLOCK.unpack(request)
        if command == fcntl.F_GETLK:
            return self._ask(fd, byte)
        world = self._world
        world.enter_kernel(f"{'drop' if kind == fcntl.F_UNLCK else 'lock'} byte {byte}")
        if world.processes[fd].lock_file.lost:
            return request
        holder = world.bytes.get(byte)
        if kind == fcntl.F_UNLCK:
            if holder == fd:
                del world.bytes[byte]
                world.progress += 1
        elif holder is None:
            world.bytes[byte] = fd
        elif holder != fd:
            world.saw("refused")
            raise OSError(errno.EAGAIN, "another process has it")
        world.kernel_changed()
        return request

    def _ask(self, fd: int, byte: int) -> bytes:
        world = self._world
        world.enter_kernel(f"ask for byte {byte}", quiet=True)
        lost = world.processes[fd].lock_file.lost
        holder = fd if lost else world.bytes.get(byte, fd)
        world.saw(holder != fd)
        kind = fcntl.F_UNLCK if holder == fd else fcntl.F_WRLCK  # one's own is never reported
        return self._FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


class Clock:
    """``time`` as the modules use it: only naps take time, and each thread has its own."""

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        return float(self._world.current.clock_s)

    def monotonic_ns(self) -> int:
        """Never the same twice, as in reality."""
        thread = self._world.current
        thread.asked += 1
        return int(thread.clock_s * 1e9) + thread.asked * 16 + thread.id

    def sleep(self, seconds: float) -> None:
        self._world.nap()


class Private(dict[int, typing.Any]):
    """What the threads of one process share beside the segment: its counts, its descriptors.

    Looking and changing are steps too.
    """

    def __init__(self, world: World, name: str) -> None:
        super().__init__()
        self.world, self.name = world, name

    def _step(self, what: str) -> None:
        if not self.world.direct:
            self.world.step(f"{what} {self.name}")

    def get(self, key: int, default: typing.Any = None) -> typing.Any:
        self._step("read")
        found = super().get(key, default)
        if not self.world.direct:
            seen = tuple(sorted(found)) if isinstance(found, dict) else found is not None
            self.world.saw(seen)
        return found

    def pop(self, key: int, *default: typing.Any) -> typing.Any:
        self._step("drop")
        return super().pop(key, *default)

    def __delitem__(self, key: int) -> None:
        self._step("drop")
        super().__delitem__(key)

    def __setitem__(self, key: int, value: typing.Any) -> None:
        self._step("store")
        super().__setitem__(key, value)


def is_progress(old: int, new: int) -> bool:
    """Whether a store to a claim is one that somebody may be waiting for."""
    return old & 3 in (OWN, BROKEN) or new & 3 == BROKEN


def lingers(name: str, value: int) -> bool:
    """Whether a store may stay in the store buffer."""
    return name == "claims" and value & 3 == OWN
