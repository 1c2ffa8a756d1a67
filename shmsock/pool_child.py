"""The side of a pool that runs in its children: attach, and run one job after the other."""

from __future__ import annotations

import collections.abc
import logging
import multiprocessing.util
import os
import pickle
import signal
import time
import traceback
import typing
from multiprocessing.connection import Connection

from .abort import abort_when_failed
from .errors import ShmsockError
from .runtime import Runtime, attach_once

log = logging.getLogger("shmsock")

# What a child says, first byte of its message.
READY, BEGUN, RESULT, ERROR = b"r", b"b", b"=", b"!"
_DRAIN_S = 3.0

Job = tuple[
    collections.abc.Callable[..., typing.Any], tuple[typing.Any, ...], dict[str, typing.Any]
]


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
    connection: Connection, name: str, parents_ends: collections.abc.Sequence[Connection]
) -> None:
    """A child's whole life: jobs come by the connection until it ends."""
    for end in parents_ends:
        end.close()  # inherited by fork: else the parent's death would not be seen
    # The parent's handlers, inherited by fork, are not for us. Ctrl-C goes to the parent, which
    # ends us, or lets us finish.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    runtime = None
    try:
        connection.send_bytes(READY)
        while data := connection.recv_bytes():
            # CRASH(begun): killed before it, the job is given to another child.
            connection.send_bytes(BEGUN)
            answer, runtime = _answer(name, data, runtime)
            connection.send_bytes(answer)
            del data, answer
    except (EOFError, OSError):
        pass  # the parent has died: nobody waits for a result
    finally:
        if runtime is not None:
            _drain(runtime)
            runtime.close()


def _answer(name: str, data: bytes, runtime: Runtime | None) -> tuple[bytes, Runtime | None]:
    try:
        client, (function, args, kwargs) = _unpack(data)
        runtime = _attached(name, runtime, client is not None)
        if client is None:
            result = function(*args, **kwargs)
        else:
            with abort_when_failed(client, runtime):
                result = function(*args, **kwargs)
        return RESULT + pickle.dumps(result, pickle.HIGHEST_PROTOCOL), runtime
    except BaseException as error:
        return ERROR + _pickled(error), runtime


def _unpack(data: bytes) -> tuple[int | None, Job]:
    # Two pickles: whatever the job is, its client is known.
    client, job = pickle.loads(data)
    return client, pickle.loads(job)


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
