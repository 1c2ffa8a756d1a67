"""The side of a pool that runs in its children: attach, and run one job after the other."""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import logging
import multiprocessing.util
import os
import pickle
import signal
import threading
import time
import traceback
import typing
from multiprocessing.connection import Connection

from .abort import abort_when_failed
from .errors import OwnershipError, ShmsockError, SocketFailedError
from .runtime import Runtime, attach_once

log = logging.getLogger("shmsock")

# What a child says, first byte of its message.
READY, FAILED_TO_START, BEGUN, RESULT, ERROR = b"r", b"f", b"b", b"=", b"!"
# What it is told of the socket that its job shall own; never the first byte of a job.
GRANTED, REFUSED = b"+", b"-"
_DRAIN_S = 3.0
_LOOK_S = 0.02


def initializer(name: str) -> None:
    """Attach this process to a runtime, so that ``shmsock.current()`` is it: once is enough.

    For the ``initializer=`` of any process pool, with ``initargs=(name,)``; with fork, spawn and
    forkserver. A child forked from an attached parent attaches anew. It leaves in order when
    multiprocessing ends the process in order; else others give back what it held.

    Raises:
        As of ``Runtime.attach``.

    If killed: as of ``Runtime.attach``.
    """
    runtime = attach_once(name)
    if id(runtime) not in _registered:
        _registered.add(id(runtime))
        # Children of multiprocessing run no atexit; its own finalisers they do run.
        multiprocessing.util.Finalize(None, _leave, (runtime, os.getpid()), exitpriority=-10)


_registered: set[int] = set()
os.register_at_fork(after_in_child=_registered.clear)


def _leave(runtime: Runtime, pid: int) -> None:
    if os.getpid() == pid:
        runtime.close()


def run_jobs(
    connection: Connection,
    name: str,
    parents_ends: collections.abc.Sequence[Connection],
    initializer: collections.abc.Callable[..., object] | None,
    initargs: tuple[typing.Any, ...],
) -> None:
    """A child's whole life: jobs come by the connection until it ends."""
    for end in parents_ends:
        end.close()  # inherited by fork: else the parent's death would not be seen
    # The parent's handlers, inherited by fork, are not for us. Ctrl-C goes to the parent, which
    # ends us, or lets us finish.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    child = _Child(connection, name)
    try:
        if initializer is not None and not child.initialize(initializer, initargs):
            return
        connection.send_bytes(READY)
        while data := connection.recv_bytes():
            answer = child.answer(data)
            connection.send_bytes(answer)
            del data, answer
    except (EOFError, OSError):
        pass  # the parent has died: nobody waits for a result
    finally:
        child.leave()


class _Child:
    """What a child keeps from job to job."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection, self._name = connection, name
        self._runtime: Runtime | None = None

    def initialize(
        self,
        initializer: collections.abc.Callable[..., object],
        initargs: tuple[typing.Any, ...],
    ) -> bool:
        """Call the user's initializer, attached where there is a runtime already."""
        try:
            self._runtime = _attached(self._name, None, False)
            initializer(*initargs)
        except BaseException as error:
            self._connection.send_bytes(FAILED_TO_START + _pickled(error))
            return False
        return True

    def answer(self, data: bytes) -> bytes:
        """Run one job; what the parent is told of it.

        CRASH(begun): killed before BEGUN is sent, the job is given to another child.
        """
        # Two pickles: whatever the job is, its client is known.
        client, owner, job = pickle.loads(data)
        error: BaseException | None = None
        try:
            self._runtime = _attached(self._name, self._runtime, client is not None)
        except BaseException as failure:
            error = failure
        index = self._runtime.index if self._runtime is not None else -1
        self._connection.send_bytes(BEGUN + b"%d" % index)
        verdict = GRANTED if owner is None else self._connection.recv_bytes()
        try:
            if error is not None:
                raise error
            with self._owning(client, owner, verdict):
                return RESULT + pickle.dumps(self._run(client, job), pickle.HIGHEST_PROTOCOL)
        except BaseException as failure:
            return ERROR + _pickled(failure)

    def _run(self, client: int | None, job: bytes) -> object:
        function, args, kwargs = pickle.loads(job)
        if client is None:
            return function(*args, **kwargs)
        with abort_when_failed(client, self._runtime):
            return function(*args, **kwargs)

    @contextlib.contextmanager
    def _owning(
        self, client: int, owner: int | None, verdict: bytes
    ) -> collections.abc.Iterator[None]:
        """Own the client's socket meanwhile, if the job shall."""
        if owner is None or self._runtime is None:
            yield
            return
        if verdict != GRANTED:
            raise OwnershipError(verdict[1:].decode())
        if not self._runtime._engine.inherit(client):
            reference = self._runtime.address(client)
            if reference is not None:
                reference.close()
                raise OwnershipError("it was taken back before the job began")
            # else: that it has failed is the job's to say
        try:
            yield
        finally:
            _hand_back(self._runtime, client, owner)

    def leave(self) -> None:
        """Send what is left, and leave in order."""
        if self._runtime is not None:
            _drain(self._runtime)
            self._runtime.close()


def _hand_back(runtime: Runtime, client: int, owner: int) -> None:
    """Give a socket back to who lent it; one that cannot be is failed: nobody would read it.

    If killed: it is its own owner's that died, or on its way; see ``hand_over``.
    """
    reference = runtime.address(client)
    if reference is None:
        return
    with reference:
        said: list[bool] = []
        done = threading.Event()

        def on_done(_: int, gone: bool) -> None:
            said.append(gone)
            done.set()

        try:
            # Everything the job wrote goes first: the next owner's answers come behind it.
            reference.flush()
            if not reference.hand_over(owner, on_done):
                reference.set_failed(errno.EIO, "a job left it in mid-message")
                return
            while not done.wait(_LOOK_S) and not reference.failed:
                pass
        except SocketFailedError:
            return
        except ValueError:
            reference.set_failed(errno.EOWNERDEAD, "who lent it has died")
            return
        if said == [False]:
            reference.set_failed(errno.EHOSTDOWN, "who lent it did not take it back")


def _attached(name: str, runtime: Runtime | None, needed: bool) -> Runtime | None:
    """The runtime that has the name now; a job without client goes without if there is none."""
    try:
        attached = attach_once(name)
    except (ShmsockError, OSError):
        if needed:
            raise
        return runtime
    if runtime is not None and runtime is not attached:
        runtime.close()  # its runtime has ended
    return attached


def _pickled(error: BaseException) -> bytes:
    where = "".join(traceback.format_exception(error))
    error.__traceback__ = error.__context__ = error.__cause__ = None
    try:
        error.add_note(f"in pool process {os.getpid()}:\n{where}")
        data = pickle.dumps(error, pickle.HIGHEST_PROTOCOL)
        pickle.loads(data)
        return data
    except BaseException:
        return pickle.dumps(RuntimeError(f"in pool process {os.getpid()}:\n{where}"))


def _drain(runtime: Runtime) -> None:
    """Let the service thread send what jobs wrote and did not flush, for a while."""
    deadline = time.monotonic() + _DRAIN_S
    while runtime.unwritten_bytes() and time.monotonic() < deadline:
        time.sleep(0.002)
