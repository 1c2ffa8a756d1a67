"""One process's view of a runtime: create or attach, address, fail, look, leave."""

from __future__ import annotations

import atexit
import collections
import collections.abc
import contextlib
import errno
import functools
import logging
import os
import resource
import socket
import threading
import time
import types
import typing
import weakref

import numpy as np

from . import descriptors as _descriptors
from ._stripes_py import table_full
from .descriptors import Descriptors, kind_of, peer_of
from .engine import NAME as ENGINE
from .engine import Engine
from .errors import (
    AlreadyRunningError,
    ClosedError,
    DescriptorError,
    InTransitionError,
    PoisonedError,
    RuntimeNotFoundError,
    StripeTimeoutError,
    TableFullError,
)
from .groups import Groups
from .handover import HandOver
from .layout import (
    HEADER_INDEX,
    KIND_NAMES,
    LIVE,
    ON_OWNER_DEATH,
    PEER_BYTES,
    ROLES,
    SLOT_BITS,
    SLOT_MASK,
    USER_DATA_BYTES,
    Layout,
    Status,
)
from .mending import Mended, Mender
from .names import own_name, remove
from .processes import HOST, REGISTRATION, LockFile, Processes
from .recovery import Recovery
from .segment import (
    SHM_DIRECTORY,
    SPARE_GENERATIONS,
    Segment,
    Semaphores,
    check_name,
    random_generation,
    run_directory,
)
from .service import Service
from .socket import SocketIO, SocketRef
from .store import Store
from .view import View, index_of
from .wishes import Wishes
from .writing import Writers

if typing.TYPE_CHECKING:
    from .dispatcher import Dispatcher

log = logging.getLogger("shmsock")

DEFAULT_MAX_UNWRITTEN_BYTES = 64 << 20
_TICK_S = 1.0
_POISONED = HEADER_INDEX["poisoned"]
_GONE_S = 0.5e-3, 0.1  # how soon a process that hung up is looked at again, and how late
_LISTENER, _TCP, _UNIX = map(KIND_NAMES.index, ("listener", "tcp", "unix"))
_FREE_FILES = 64  # what a process needs besides its sockets

_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()
_current: Runtime | None = None


class Sizes(typing.TypedDict):
    """What ``Runtime.create`` takes besides the name and role."""

    slots: int
    processes: int
    stripes: int
    max_unwritten_bytes: int


class Runtime(View):
    """A participant: made by ``create`` (the host) or ``attach``; closes with ``with``.

    Concurrency: every method may be called from any thread. A forked child that uses its parent's
        Runtime attaches as a process of its own at the first call; the references it inherited are
        inert.
    """

    _pid = 0  # of the process that joined

    def __init__(self, name: str, segment: Segment, lock_file: LockFile, role: str) -> None:
        """Use ``create`` or ``attach``."""
        self.name = name
        self.run_directory = run_directory(name)
        self.max_unwritten_bytes = segment.get("max_unwritten_bytes")
        self._segment = segment
        self._role = role
        self._lock_file = lock_file
        self._store: Store | None = None
        pid = os.getpid()
        self._join()
        self._pid = pid  # at once: from here on ``close`` gives back what ``_join`` took
        _runtimes.add(self)

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
        self._engine.repair = self._repair_stripe
        self._engine.peer_of = _descriptors.peer_of_number
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

    @classmethod
    def create(
        cls,
        name: str,
        *,
        slots: int = 65_536,
        processes: int = 128,
        stripes: int = 64,
        max_unwritten_bytes: int = DEFAULT_MAX_UNWRITTEN_BYTES,
        role: str = "supervisor",
    ) -> Runtime:
        """Make a runtime and be its host: the process that keeps a duplicate of every socket.

        What an earlier runtime of this name left behind is removed first, if nobody lives there.

        Args:
            name: 1 to 64 letters, digits, ``_`` and ``-``; one runtime of a name a machine.
            slots: How many sockets at once; about 0.5 KiB of shared memory each.
            processes: How many participants at once.
            stripes: How many semaphores guard the slots.
            max_unwritten_bytes: How much may wait for one peer in one process before ``write``
                raises OverCrowdedError.
            role: What ``shmsock ps`` shows.

        Raises:
            AlreadyRunningError: The name is alive; the message names its processes.
            OSError: ENOSPC when /dev/shm is too small; the message says what is needed.
            ValueError: A size or name that cannot be.

        If killed: names that the next create of this name removes.
        """
        check_name(name)
        layout = Layout.fit(slots, processes, stripes)
        if max_unwritten_bytes < 1:
            raise ValueError("max_unwritten_bytes must be at least 1")
        lock_file = own_name(name)
        try:
            first = random_generation()
            segment = Segment.create(name, layout, max_unwritten_bytes, first)
            _make_semaphores(name, layout.stripes, first)
            runtime = cls(name, segment, lock_file, role)
        except BaseException:
            remove(name)
            lock_file.drop(HOST)
            raise
        try:
            runtime._serve()
            segment.set("init_done", 1)
        except BaseException:
            runtime.close()
            remove(name)
            raise
        _adopt_current(runtime)
        return runtime

    def _serve(self) -> None:
        """Become the host: keep descriptors, answer the control channel."""
        _raise_open_files_limit(self._segment.layout.slots)
        self._store = Store(
            self._segment,
            self._service,
            lambda index, epoch: (
                index < self._segment.layout.processes
                and self._segment.cells.row_state[index] == epoch << 8 | LIVE
            ),
            self._peer_gone,
        )
        self._store.on_refused = self._refused
        self._store.on_offer = self._hand_over.route
        self._descriptors.store = self._store
        self._service.ensure()

    @classmethod
    def attach(cls, name: str, *, role: str = "client") -> Runtime:
        """Take part in a runtime that another process made.

        Raises:
            RuntimeNotFoundError: There is none.
            FormatError: It was made by another version. Nothing was touched.
            PermissionError: It is another user's.
            TableFullError: All process rows are taken.

        If killed: whoever notices gives back what it held.
        """
        check_name(name)
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}")
        for _ in range(50):
            # WHY NOT cls(...): an exception after it and before we have its result would leave a
            # row of this process that nobody gives back.
            runtime = cls.__new__(cls)
            try:
                segment = Segment.attach(name)
                try:
                    runtime._begin(segment, role)
                except TableFullError:
                    # Perhaps of the dead, and nobody is left to reap them.
                    _reap_from_outside(segment)
                    runtime._begin(segment, role)
                _adopt_current(runtime)
                with _repaired_later(name):
                    runtime._look()
                return runtime
            except InTransitionError as error:
                failure = error
            except BaseException:
                runtime.close()
                raise
            time.sleep(0.02)
        raise failure

    def _begin(self, segment: Segment, role: str) -> None:
        lock_file = LockFile.open(segment.name, create=False)
        self.__init__(segment.name, segment, lock_file, role)  # type: ignore[misc]

    @classmethod
    def take_over(cls, name: str, *, role: str = "supervisor") -> Runtime:
        """Become the host of a live runtime whose host has died.

        The others find the new control address within half a second, and give back the descriptors
        they have: of every socket that some live process owns, and of the listeners.

        Raises:
            RuntimeNotFoundError: There is none.
            AlreadyRunningError: It has a host.

        If killed: the host byte is free again, and the next one takes over.
        """
        check_name(name)
        lock_file = LockFile.open(name, create=False)
        with lock_file.exclusive(REGISTRATION, timeout_s=5.0) as registering:
            if not registering or not lock_file.try_hold(HOST):
                pid = lock_file.holder(HOST)
                raise AlreadyRunningError(f"runtime {name!r} is served by process {pid}")
        try:
            runtime = cls(name, Segment.attach(name), lock_file, role)
        except BaseException:
            lock_file.drop(HOST)
            raise
        try:
            runtime._serve()
        except BaseException:
            lock_file.drop(HOST)  # or nobody could follow while this process lives
            runtime.close()
            raise
        directory = runtime.run_directory
        for entry in os.listdir(directory):  # what earlier hosts listened at
            path = f"{directory}/{entry}"
            if entry.startswith("control-") and path != runtime._segment.control_address():
                os.unlink(path)
        _adopt_current(runtime)
        runtime._look()
        return runtime

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

    def _attach_in_child(self) -> None:
        with _fork_lock:
            if self._pid == os.getpid():
                return
            self._lock_file = LockFile.open(self.name, create=False)
            self._role = "client"
            self._join()
            self._pid = os.getpid()  # last: until here every call tries to attach

    # -- sockets --------------------------------------------------------------------------------

    def create_socket(
        self,
        sock: socket.socket,
        user_data: bytes = b"",
        *,
        owner: int | None = None,
        on_owner_death: str = "fail",
        deposit: bool = True,
    ) -> int:
        """Make a connected, listening or datagram socket a Socket of the runtime.

        Args:
            sock: Taken over: do not use or close it afterwards. Whether it blocks does not matter.
            user_data: Up to 64 bytes kept with it.
            owner: The index of the process that will read it; this process by default. In the
                host, naming another process keeps the descriptor in the store alone: see
                ``pass_to``.
            on_owner_death: What becomes of it when its owner is killed: ``fail``, or ``rehome``:
                if it was idle (not ``busy``, no message half written) it waits for the host to
                give it a new owner, and its peer notices nothing.
            deposit: Whether the host gets a duplicate at once. Whoever creates many gives them
                together afterwards, by ``deposit``: one message for 253 of them, and none for
                those that have ended by then.

        Returns:
            Its SocketId.

        Raises:
            TableFullError: No slot is free; ``sock`` is still yours.
            ValueError: ``user_data`` is too long, or ``owner`` no live process.

        If killed: before the slot is LIVE nothing happened; after, the socket fails with its owner.
        """
        self._check()
        if len(user_data) > USER_DATA_BYTES:
            raise ValueError(f"user_data holds {USER_DATA_BYTES} bytes, not {len(user_data)}")
        word = self._engine.word if owner is None else self._word_of(owner)
        inode, kind = os.fstat(sock.fileno()).st_ino, kind_of(sock)
        peer = peer_of(sock).encode("utf-8", "replace")[:PEER_BYTES]
        fate = ON_OWNER_DEATH.index(on_owner_death)
        made: list[int] = []
        try:
            sid = self._engine.create(word, inode, kind, fate, peer, bytes(user_data), made)
            self._keep(sid, word, sock.detach(), inode, deposit)
        except (TableFullError, StripeTimeoutError):
            raise  # nothing was made
        except BaseException:  # nobody else has the id: nobody else would ever end it
            for sid in made:
                self._io.set_failed(sid, errno.EMFILE, "it could not be created")
            raise
        return sid

    def accept(
        self,
        listener: socket.socket,
        *,
        owner: int | None = None,
        on_owner_death: str = "fail",
        deposit: bool = True,
    ) -> int:
        """Accept one connection and make it a Socket: ``accept`` and ``create_socket`` in one call.

        Arguments as of ``create_socket``.

        Raises:
            BlockingIOError: Nobody waits, and the listener does not block.
            OSError: As of ``accept``: EMFILE, EINVAL once the listener was shut down.
            TableFullError: No slot is free; its ``sock`` is the connection, yours to turn away.
            StripeTimeoutError, ValueError: As of ``create_socket``. The connection was dropped.

        If killed: before the slot is LIVE the connection ends; after, as of ``create_socket``.
        """
        if self._engine.closed or self._segment.header[_POISONED]:  # in a forked child too
            self._check()
        word = self._engine.word if owner is None else self._word_of(owner)
        fate = ON_OWNER_DEATH.index(on_owner_death)
        fd, inode, sid = self._engine.accept(listener.fileno(), word, fate, _TCP, _UNIX)
        if not sid:
            full = table_full(self.slots)
            full.sock = socket.socket(fileno=fd)
            raise full
        try:
            self._keep(sid, word, fd, inode, deposit)
        except BaseException:
            self._io.set_failed(sid, errno.EMFILE, "it could not be created")
            raise
        return sid

    def _keep(self, sid: int, word: int, fd: int, inode: int, deposit: bool) -> None:
        """Keep the number of a new socket where its owner or the host finds it."""
        if word != self._engine.word and self._store is not None:
            self._store.keep(sid, _descriptors.wrap(fd))
            return
        self._descriptors.keep(sid, fd, inode, shared=False)
        if deposit:
            self._descriptors.put(sid)
        else:
            self._descriptors.deposit_later(sid)

    def deposit(self, sids: collections.abc.Sequence[int]) -> None:
        """Give the host duplicates of sockets that this process made with ``deposit=False``.

        Until then a socket ends with this process, whatever its ``on_owner_death`` says, and others
        who want to write to it wait. What is forgotten here the timer does within a second; a fetch
        of this process does it too, so that two who wait for each other's new sockets go on.

        Concurrency: from any thread; again does nothing.
        If killed: each socket has been deposited or has not: those that were are rehomed.
        """
        self._check()
        self._descriptors.deposit(sids)

    def _word_of(self, index: int) -> int:
        if 0 <= index < self._segment.layout.processes:
            word = self._segment.cells.row_state[index]
            if word & 0xFF == LIVE:
                return word >> 8 << 16 | index
        raise ValueError(f"process {index} is not alive: no socket can be its own")

    def pass_to(self, index: int, sids: collections.abc.Iterable[int]) -> list[int]:
        """In the host: hand sockets created with ``owner=index`` to that process.

        They reach its dispatcher's ``on_arrival``. Those that cannot be handed over are failed;
        with ``rehome`` they stay: their owner asks for them, or has died and another one gets them.

        Returns:
            The ids that were handed on.
        """
        self._check()
        if self._store is None:
            raise ValueError("only the host passes descriptors on")
        ids = list(sids)
        if self._store.pass_to(index, ids):
            return ids
        for sid in ids:
            if not self._segment.cells.on_owner_death[sid & SLOT_MASK]:
                self.set_failed(sid, errno.EHOSTDOWN, f"process {index} could not take it")
        return []

    def rehome(self, sid: int, index: int | None = None) -> bool:
        """In the host: make a process the owner of an orphan, and pass it the descriptor.

        Args:
            sid: An orphan.
            index: The new owner, connected to us; this process by default.

        Returns:
            False if it is no orphan (any more), was busy, or its descriptor is not here (yet).

        If killed: the owner word is changed or not; a new owner that was not told asks for what it
            owns by itself, once a second.
        """
        self._check()
        store = self._store
        if store is None or not store.has(sid) or not self._engine.is_live(sid):
            return False
        word = int(self._segment.cells.owner[sid & SLOT_MASK])
        if word in self._processes.live_words():
            return False
        mine = index is None or index == self.index
        if not mine and not store.is_connected(typing.cast(int, index)):
            return False
        try:
            owner = self._engine.word if mine else self._word_of(typing.cast(int, index))
        except ValueError:  # it died a moment ago and was reaped: its channel is still to hang up
            return False
        if not self._engine.change_owner(sid, word, owner):
            return False
        return mine or store.pass_to(typing.cast(int, index), [sid])

    def has_descriptor(self, sid: int) -> bool:
        """In the host: whether the store keeps a duplicate of this socket."""
        return self._store is not None and self._store.has(sid)

    def spread(self, sids: collections.abc.Iterable[int]) -> None:
        """In the host: have every process with a channel hold a duplicate of these: listeners."""
        self._check()
        if self._store is not None:
            self._store.spread(list(sids))

    def on_join(self, callback: collections.abc.Callable[[int], object]) -> None:
        """In the host: call ``callback(index)`` when a process is ready to be passed sockets.

        Also for those that are ready already: a host that took over is joined from the moment its
        address is known. Called in the dispatcher's loop where there is one, else in the service
        loop.
        """
        self._check()
        store = self._store
        if store is None:
            raise ValueError("only the host is joined")

        def tell(index: int) -> None:
            if self._dispatcher is None:
                callback(index)
            else:
                self._dispatcher._tell(callback, index)

        # In the loop, where nobody joins between the two.
        self._service.call_soon(functools.partial(store.tell_who_joins, tell))

    def _refused(self, index: int, sids: tuple[int, ...]) -> None:
        """A process had no descriptor left for what it was passed.

        Said late, it is about a connection that somebody else reads by now: that one goes on.
        """
        cells = self._segment.cells
        word, owners = cells.row_state[index] >> 8 << 16 | index, cells.owner
        for sid in sids:
            if sid & SLOT_MASK < self.slots and owners[sid & SLOT_MASK] == word:
                self.set_failed(sid, errno.EMFILE, f"process {index} is out of descriptors")

    def address(self, sid: int) -> SocketRef | None:
        """Turn an id into a usable socket, or None once it has failed; see SocketRef.

        A stale id is not an error: one of an earlier life, of an earlier runtime, out of range or
        made up is None.

        Concurrency: attached already: one read of shared memory. Else the slot's stripe is taken.
        If killed: what this process held is given back by whoever reaps it.
        """
        if self._pid != os.getpid() or self._closed or self._segment.header[_POISONED]:
            self._check()
        return typing.cast("SocketRef | None", self._engine.address(sid))

    def address_failed_as_well(self, sid: int) -> SocketRef | None:
        """As ``address``, but also a socket that failed and that somebody still holds."""
        self._check()
        return typing.cast("SocketRef | None", self._engine.address(sid, True))

    def set_failed(self, sid: int, code: int = errno.ECONNABORTED, text: str = "") -> bool:
        """End a socket everywhere.

        Every later ``address`` is None, whoever waits is woken with ``code`` and ``text``, the peer
        sees the connection end, and when the last process lets go the slot is recycled.

        Returns:
            True for the one winner; False if it had failed already or never was.

        If killed: the failure has happened or has not; the host's sweep ends the connection.
        """
        self._check()
        return self._io.set_failed(index_of(sid), code, text)

    def status(self, sid: int) -> Status:
        """What an id names now, without a reference."""
        self._check()
        return self._engine.status(sid)

    def attached(self, sid: int) -> list[int]:
        """The indexes of the processes attached to a socket."""
        self._check()
        if self._engine.status(index_of(sid)) is Status.GONE:
            return []
        return self.attached_many(np.array([index_of(sid)], "u8"))[0]

    # -- groups ----------------------------------------------------------------------------------

    @property
    def groups(self) -> Groups:
        """Named sets of sockets, shared by all processes; needs the ``server`` extra (LMDB)."""
        self._check()
        if self._groups is None:
            directory = f"{self.run_directory}/groups"
            os.makedirs(directory, 0o700, exist_ok=True)
            self._groups = Groups(
                directory,
                address=self.address,
                is_live=lambda sid: self._engine.status(sid) is Status.LIVE,
                fetch=self._prefetch,
            )
            self._groups.check = self._segment.check
        return self._groups

    def unwritten_bytes(self) -> int:
        """How much this process has written that still waits here, for peers or for its turn."""
        return self._writers.total_bytes()

    def _prefetch(self, sids: collections.abc.Sequence[int]) -> None:
        with contextlib.suppress(DescriptorError):  # each write says it for itself
            self._descriptors.fetch(sids)

    # -- repair ---------------------------------------------------------------------------------

    def audit(self) -> list[str]:
        """Check every invariant of the whole table; a line for each breach, none when clean.

        Concurrency: takes nothing; what looks wrong is looked at again before it is reported.
        """
        self._check_open()
        return self._recovery.audit()

    def mend(self) -> Mended:
        """Repair all there is: reap, retire, recount every stripe, and audit again.

        What stays wrong is beyond repair: the segment is marked poisoned.

        Raises:
            AlreadyRunningError: Somebody else has been repairing for five seconds.
            PoisonedError: It is marked already.
            RuntimeNotFoundError: Its names were taken away: nothing can be retired.

        If killed: what was not done is found again by the next one.
        """
        self._check()
        if not self._is_current():
            raise RuntimeNotFoundError(f"the names of runtime {self.name!r} were taken away")
        return Mender(self._segment, self._processes, self._semaphores, self._recovery).mend()

    def check(self) -> None:
        """Raise if this process can do nothing here: ClosedError, PoisonedError."""
        self._check()

    def poison(self, why: str) -> bool:
        """Mark the segment as of no use: every operation of every process raises PoisonedError.

        For who finds that it cannot be trusted any more; nothing takes the mark away. The
        supervisor starts a new one.

        Args:
            why: What the error will say; at most 255 characters of ASCII.

        Returns:
            False if it was marked already.
        """
        self._check_open()
        return self._segment.poison(why)

    @property
    def sizes(self) -> Sizes:
        """What ``create`` was asked for, to make another of the same sizes."""
        layout = self._segment.layout
        return {
            "slots": layout.slots,
            "processes": layout.processes,
            "stripes": layout.stripes,
            "max_unwritten_bytes": self.max_unwritten_bytes,
        }

    def repair(self) -> dict[str, int]:
        """Reap the dead, retire broken stripes; returns how often each was done by this process."""
        self._check()
        self._look()
        return dict(self._recovery.counters)

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

    def _repair_stripe(self, stripe: int) -> None:
        self._look(stripe)

    def _is_current(self) -> bool:
        """Whether the names on this machine are still this runtime's."""
        return self._has_names() and self._lock_file.is_current()

    def _has_names(self) -> bool:
        try:
            inode = os.stat(f"{SHM_DIRECTORY}/shmsock.{self.name}").st_ino
        except FileNotFoundError:
            return False
        return inode == self._segment.inode

    def _hung_up(self, sid: int) -> None:
        self._writers.hung_up(sid)
        if self._dispatcher is not None and self._engine.status(sid) is not Status.LIVE:
            self._dispatcher._tell(self._dispatcher._ended, sid)

    def _arrived(self, sids: list[int]) -> None:
        dispatcher = self._dispatcher
        if dispatcher is not None and dispatcher._arrived is not None:
            dispatcher._tell(dispatcher._arrived, self._hand_over.take(sids))

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

    def _still_there(self) -> bool:
        """Whether our row is ours, and our numbers are."""
        mine = self._segment.cells.row_state[self.index] == self._engine.row_word
        return mine and self._lock_file.reassert() and self._service.is_intact()

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
        with self._engine.lock:  # none of our threads is inside a stripe from here on
            self._engine.closed = True
        if not self._service.is_intact():
            self._service.abandon()
            self._descriptors.forget()
            if self._store is not None:
                self._store.abandon()
        self._processes.withdraw()
        if self._store is not None:
            self._lock_file.drop(HOST)
        if self._dispatcher is not None:
            self._dispatcher._disowned()

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

    def _adopt_dispatcher(self, dispatcher: Dispatcher | None) -> Service:
        if dispatcher is not None:
            self._check()
            if self._dispatcher is not None:
                raise ValueError("this Runtime has a Dispatcher already: one a process is enough")
        self._dispatcher = dispatcher
        return self._service

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
        _runtimes.discard(self)

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
        with self._engine.lock:
            self._engine.closed = True
        # Not ours any more if we were taken for dead: its tenant may be somebody else by now.
        mine = self._segment.cells.row_state[self.index] >> 8 == self._engine.row_word >> 8
        with contextlib.suppress(OSError, ClosedError):
            if mine:
                self._reap_oneself()
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

    def _reap_oneself(self) -> None:
        with self._recovery.arbitrated(timeout_s=0.2) as arbiter:
            # Who is reaped is recounted, and a poisoned table makes no sense to recount.
            if arbiter and self._is_current() and not self._segment.header[_POISONED]:
                self._recovery.reap(self.index)

    def unlink(self) -> None:
        """Take every name of the runtime away; processes that are attached keep what they have."""
        remove(self.name)

    def __enter__(self) -> Runtime:
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
        if closed and host and self._has_names():
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


_fork_lock = threading.Lock()


def _forked() -> None:
    global _fork_lock
    _fork_lock = threading.Lock()
    for runtime in list(_runtimes):
        if not runtime._closed:
            runtime._forked()


def _leave_all() -> None:
    """At exit: leave in order. Dying without would only give the others more to do."""
    # Hosts last: they take away the names that the others may still need to open.
    for runtime in sorted(_runtimes, key=lambda runtime: runtime.is_host):
        if runtime._pid == os.getpid():
            runtime.__exit__(None, None, None)


os.register_at_fork(after_in_child=_forked)
atexit.register(_leave_all)


def current() -> Runtime:
    """The Runtime that this process created or attached last.

    Raises:
        RuntimeNotFoundError: None, or it was closed.
    """
    if _current is None or _current._closed:
        raise RuntimeNotFoundError("this process has attached no runtime: Runtime.attach(name)")
    return _current


def _adopt_current(runtime: Runtime) -> None:
    global _current
    _current = runtime


def _make_semaphores(name: str, stripes: int, first_generation: int) -> None:
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


@contextlib.contextmanager
def _repaired_later(name: str) -> collections.abc.Iterator[None]:
    """We take part also where repair is impossible at this moment; the timer looks again."""
    try:
        yield
    except OSError as error:
        log.error("runtime %r cannot be repaired now: %s", name, error)


def _reap_from_outside(segment: Segment) -> None:
    """Repair without being a participant; every stripe is retired instead of taken."""
    lock_file = LockFile.open(segment.name, create=False)
    if lock_file.share():
        semaphores = Semaphores(segment.name, segment.layout.stripes)
        try:
            if lock_file.is_current():
                Recovery(segment, Processes(segment, lock_file), semaphores).look()
        finally:
            semaphores.close()
            lock_file.unshare()


def _raise_open_files_limit(slots: int) -> None:
    """As many descriptors as the kernel lets us have, and a word about what that means."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft - _FREE_FILES < slots:
        log.info(
            "%d slots, but the open-files limit lets the host keep %d sockets: ulimit -n",
            slots,
            soft - _FREE_FILES,
        )
