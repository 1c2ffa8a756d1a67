"""One process's view of a runtime: create or attach, address, fail, look."""

from __future__ import annotations

import atexit
import collections
import collections.abc
import contextlib
import errno
import functools
import logging
import os
import socket
import time
import typing
import weakref

import numpy as np

from ._engine_common import table_full
from .cache import kind_of, peer_of, wrap
from .channel import is_inode
from .errors import (
    AlreadyRunningError,
    DescriptorError,
    InTransitionError,
    RuntimeNotFoundError,
    StripeTimeoutError,
    TableFullError,
)
from .groups import Groups
from .layout import (
    HEADER_INDEX,
    KIND_NAMES,
    LIVE,
    ON_OWNER_DEATH,
    PEER_BYTES,
    ROLES,
    SLOT_MASK,
    USER_DATA_BYTES,
    Layout,
    Status,
)
from .mending import Mended, Mender
from .names import own_name, remove
from .participant import Participant
from .processes import HOST, REGISTRATION, LockFile
from .recovery import look_from_outside
from .segment import (
    Segment,
    check_name,
)
from .semaphores import make_first, random_generation
from .socket import SocketRef
from .store import Store, raise_open_files_limit
from .view import index_of

log = logging.getLogger("shmsock")

DEFAULT_MAX_UNWRITTEN_BYTES = 64 << 20
_POISONED = HEADER_INDEX["poisoned"]
_TCP, _UNIX = KIND_NAMES.index("tcp"), KIND_NAMES.index("unix")

_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()
_current: Runtime | None = None


class Sizes(typing.TypedDict):
    """What ``Runtime.create`` takes besides the name and role."""

    slots: int
    processes: int
    stripes: int
    max_unwritten_bytes: int


class Runtime(Participant):
    """A participant: made by ``create`` (the host) or ``attach``; closes with ``with``.

    Concurrency: every method may be called from any thread. A forked child that uses its parent's
        Runtime attaches as a process of its own at the first call; the references it inherited are
        inert.
    """

    def __init__(self, name: str, segment: Segment, lock_file: LockFile, role: str) -> None:
        """Use ``create`` or ``attach``."""
        super().__init__(name, segment, lock_file, role)
        _runtimes.add(self)

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
            make_first(name, layout.stripes, first)
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
        raise_open_files_limit(self._segment.layout.slots)
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
                    look_from_outside(segment)
                    runtime._begin(segment, role)
                _adopt_current(runtime)
                try:
                    runtime._look()
                except OSError as error:  # we take part all the same; the timer looks again
                    log.error("runtime %r cannot be repaired now: %s", name, error)
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
            # WHY NOT shared=False: whose else this socket is, its creator does not tell us.
            self._keep(sid, word, sock.detach(), inode, shared=True, deposit=deposit)
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
        made: list[tuple[int, int, int]] = []
        full: TableFullError | None = None
        try:
            fd, inode, sid = self._engine.accept(listener.fileno(), word, fate, _TCP, _UNIX, made)
            if sid:
                self._keep(sid, word, fd, inode, shared=False, deposit=deposit)
            else:
                full = table_full(self.slots)
                full.sock = socket.socket(fileno=fd)
        except BaseException:  # nobody else has the id, nor perhaps the number
            for fd, inode, sid in made:
                self._drop(fd, inode, sid)
            raise
        if full is not None:
            raise full
        return sid

    def _keep(
        self, sid: int, word: int, fd: int, inode: int, *, shared: bool, deposit: bool
    ) -> None:
        """Keep the number of a new socket where its owner or the host finds it."""
        if word != self._engine.word and self._store is not None:
            self._store.keep(sid, wrap(fd))
            return
        self._descriptors.keep(sid, fd, inode, shared=shared)
        if deposit:
            self._descriptors.put(sid)
        else:
            self._descriptors.deposit_later(sid)

    def _drop(self, fd: int, inode: int, sid: int) -> None:
        """End a connection whose acceptance was interrupted, wherever its number had come to."""
        if sid:
            self._io.set_failed(sid, errno.ECANCELED, "its acceptance was interrupted")
            if self.has_descriptor(sid) or self._descriptors.peek(sid) is not None:
                return  # it is closed there
        if is_inode(fd, inode):
            os.close(fd)

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
            self._groups.write_to_all = getattr(self._engine, "write_to_all", None)
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


def _forked() -> None:
    for runtime in list(_runtimes):
        if not runtime._closed:
            runtime._forked()


def _leave_all() -> None:
    """At exit: leave in order. Dying without would only give the others more to do."""
    # Hosts last: they take away the names that the others may still need to open.
    for runtime in sorted(_runtimes, key=lambda runtime: runtime.is_host):
        if runtime._pid == os.getpid() and not runtime._has_left:
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


def attach_once(name: str, *, role: str = "client") -> Runtime:
    """The Runtime of this name that this process has, or a new one; it becomes ``current()``.

    One that was inherited by a fork attaches anew; one that was closed, or whose runtime has ended,
    is left for the runtime that has the name now.

    Raises:
        As of ``attach``.

    If killed: as of ``attach``.
    """
    runtime = find(name)
    if runtime is None:
        for inherited in list(_runtimes):
            if inherited.name == name and inherited._pid != os.getpid():
                if inherited._closed or not inherited._is_current():
                    continue
                inherited._attach_in_child(role)
                runtime = inherited
                break
    if runtime is None:
        return Runtime.attach(name, role=role)
    _adopt_current(runtime)
    return runtime


def find(name: str) -> Runtime | None:
    """A Runtime of this name that this process takes part in, if that runtime has not ended."""
    for runtime in list(_runtimes):
        if runtime.name != name or runtime._pid != os.getpid() or runtime._engine.closed:
            continue
        if not runtime._segment.header[_POISONED] and runtime._is_current():
            return runtime
    return None


def _adopt_current(runtime: Runtime) -> None:
    global _current
    _current = runtime
