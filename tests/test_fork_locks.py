"""A fork at the worst moment: every lock of the library is held by a thread that is not copied."""

from __future__ import annotations

import collections.abc
import contextlib
import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import types
import typing
import warnings

import pytest

import shmsock

from .helpers import REPOSITORY, WATCHDOG_S, Forked, connected, descriptors, wait_until

_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition)
_OURS = "LocalLock"  # the C engine's


def library_locks() -> dict[str, typing.Any]:
    """Every lock that any object or module of shmsock has, by where it was found."""
    found: dict[int, tuple[str, typing.Any]] = {}

    def look(where: str, value: object) -> None:
        values = list(value.values()) if isinstance(value, dict) else [value]
        for each in values:
            if isinstance(each, _LOCKS) or type(each).__name__ == _OURS:
                found.setdefault(id(each), (where, each))

    for thing in gc.get_objects():
        module = getattr(type(thing), "__module__", "")
        if isinstance(module, str) and module.startswith("shmsock"):
            attributes = dict(getattr(thing, "__dict__", {}))
            for kind in type(thing).__mro__:
                for slot, descriptor in vars(kind).items():
                    if isinstance(descriptor, types.MemberDescriptorType):
                        attributes[slot] = getattr(thing, slot, None)
            for attribute, value in attributes.items():
                look(f"{type(thing).__name__}.{attribute}", value)
    for name, module in list(sys.modules.items()):
        if name.startswith("shmsock"):
            for attribute, value in list(vars(module).items()):
                look(f"{name}.{attribute}", value)
                if isinstance(value, type):
                    for inner, each in list(vars(value).items()):
                        look(f"{attribute}.{inner}", each)
    return {where: lock for where, lock in found.values()}


@contextlib.contextmanager
def held_by_a_thread(locks: list[typing.Any]) -> collections.abc.Iterator[None]:
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            leave.wait(WATCHDOG_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(WATCHDOG_S)
    try:
        yield
    finally:
        leave.set()
        thread.join()


def test_a_child_forked_while_every_lock_of_the_library_is_held_works(
    runtime: shmsock.Runtime,
) -> None:
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)
    dispatcher = shmsock.Dispatcher(runtime)
    dispatcher.add_consumer(sid, lambda ref: None)
    reference = runtime.address(sid)
    assert reference is not None
    reference.write(b"p")
    runtime.groups.add("news", sid)
    assert Forked(lambda: runtime.address(sid) is not None).result()  # the channel has links
    wait_until(lambda: len(runtime.processes()) == 1)
    locks = library_locks()
    # The groups' lock is the one that a fork itself waits for, so that none can be held there.
    for where in [where for where in locks if "group_store" in where]:
        del locks[where]
    assert {
        "Engine.lock",
        "Service._lock",
        "Service._watching",
        "Writers._lock",
        "LockFile._mutex",
        "LockFile._open_lock",
        "Store._arrival",
        "shmsock.participant._fork_lock",
    } <= set(locks), sorted(locks)

    go_read, go = os.pipe()

    def use() -> list[str]:
        os.read(go_read, 1)  # the host needs its own locks again before it can give us anything
        assert shmsock.current() is runtime
        reference.close()
        with contextlib.suppress(shmsock.ClosedError):
            reference.write(b"no")
        for call in (dispatcher.close, lambda: dispatcher.call_later(0, print)):
            with contextlib.suppress(ValueError, OSError):
                call()
        with runtime.address(sid) as mine:  # type: ignore[union-attr]
            mine.write(b"c")
            assert mine.flush(WATCHDOG_S)
        new = runtime.create_socket(socket.socketpair()[0])
        done = threading.Event()
        runtime._service.call_later(0.0, done.set)
        runtime._service.ensure()
        assert done.wait(WATCHDOG_S)
        loop = shmsock.Dispatcher(runtime)
        loop.call_soon(loop.stop)
        loop.run()
        assert runtime.groups.add("weather", sid)
        assert runtime.groups.broadcast("news", b"g") == 1
        assert runtime.set_failed(new)
        audit = runtime.audit()
        runtime.close()
        gc.collect()  # whatever of the parent's ends here
        return audit

    with peers:
        with held_by_a_thread(list(locks.values())):
            child = Forked(use)
        os.write(go, b"!")
        assert child.result() == []
        assert peers.recv(10) == b"pcg"
        reference.write(b"parent")
        assert peers.recv(10) == b"parent"
        assert sorted(runtime.groups.names()) == [b"news", b"weather"]
    wait_until(lambda: len(runtime.processes()) == 1)
    assert runtime.audit() == []
    reference.close()
    dispatcher.close()
    runtime.set_failed(sid)
    os.close(go_read)
    os.close(go)


# -- pools ----------------------------------------------------------------------------------------

_pool_runtime: shmsock.Runtime | None = None


def join(name: str, inherited: bool) -> None:
    global _pool_runtime
    _pool_runtime = shmsock.current() if inherited else shmsock.Runtime.attach(name)


def push(task: tuple[int, bytes]) -> int:
    sid, message = task
    assert _pool_runtime is not None
    with _pool_runtime.address(sid) as reference:  # type: ignore[union-attr]
        reference.write(message)
        assert reference.flush(WATCHDOG_S)
    return os.getpid()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_processes_of_a_pool_address_and_write(runtime: shmsock.Runtime, method: str) -> None:
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)
    tasks = [(sid, b"%04d" % number) for number in range(60)]
    context: typing.Any = multiprocessing.get_context(method)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pool = context.Pool(3, join, (runtime.name, method == "fork"))
        with pool:
            pids = set(pool.map(push, tasks, chunksize=1))
            assert os.getpid() not in pids
            received = b""
            while len(received) < 4 * len(tasks):
                received += peers.recv(65536)
            found = sorted(received[at : at + 4] for at in range(0, len(received), 4))
            assert found == [message for _, message in tasks]
            pool.terminate()  # SIGTERM: no atexit there; whoever notices reaps
            pool.join()
    finally:
        if method == "forkserver":
            multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    wait_until(lambda: (runtime.repair(), len(runtime.processes()) == 1)[1])
    assert runtime.attached(sid) == []
    assert runtime.audit() == []
    peers.close()
    runtime.set_failed(sid)


def test_a_fork_in_a_consumers_callback_works_on_both_sides(runtime: shmsock.Runtime) -> None:
    """A pool started lazily by the first request: the fork happens inside the dispatcher."""
    dispatcher = shmsock.Dispatcher(runtime)
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)
    children: list[Forked] = []

    def answer() -> object:
        with runtime.address(sid) as mine:  # type: ignore[union-attr]
            mine.write(b"child")
            mine.flush(WATCHDOG_S)
        loop = shmsock.Dispatcher(runtime)
        loop.call_soon(loop.stop)
        loop.run()
        return runtime.audit()

    def consume(reference: shmsock.SocketRef) -> None:
        if reference.recv(100) == b"fork":
            children.append(Forked(answer))  # not waited for here: we are the host it asks
            reference.write(b"parent")
        else:
            dispatcher.stop()

    dispatcher.add_consumer(sid, consume)
    with peers:
        peers.send(b"fork")
        runner = threading.Thread(target=dispatcher.run)
        runner.start()
        wait_until(lambda: children)
        assert children[0].result() == []
        peers.send(b"stop")
        runner.join(WATCHDOG_S)
        assert peers.recv(100) in (b"childparent", b"parentchild")
    dispatcher.close()
    wait_until(lambda: (runtime.repair(), len(runtime.processes()) == 1)[1])
    runtime.set_failed(sid)


# -- exec -----------------------------------------------------------------------------------------


def test_a_subprocess_inherits_no_descriptor_even_with_close_fds_false(
    runtime: shmsock.Runtime,
) -> None:
    before = {fd for fd in descriptors() if os.get_inheritable(fd)}
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    listener = runtime.create_socket(socket.create_server(("127.0.0.1", 0)))
    dispatcher = shmsock.Dispatcher(runtime)
    dispatcher.add_consumer(sid, lambda ref: None)
    runtime.groups.add("news", sid)

    def fetched() -> list[int]:
        """In a guest, whose descriptors came over the channel."""
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(b"x")
            runtime.groups.names()
            return inherited()

    def inherited() -> list[int]:
        script = (
            "from tests.helpers import descriptors as d;"
            "print(*[fd for fd, what in d().items() if '/proc/' not in what])"
        )
        ran = subprocess.run(
            [sys.executable, "-c", script],
            close_fds=False,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        return [fd for fd in map(int, ran.stdout.split()) if fd > 2]

    with peers:
        assert set(inherited()) <= before
        assert set(Forked(fetched).result()) <= before
        assert peers.recv(10) == b"x"
    dispatcher.close()
    runtime.set_failed(sid)
    runtime.set_failed(listener)
    wait_until(lambda: (runtime.repair(), len(runtime.processes()) == 1)[1])
