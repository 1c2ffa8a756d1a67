"""A killed owner's idle sockets go on elsewhere; a killed host is followed by another."""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import functools
import os
import resource
import socket

import pytest

import shmsock
from shmsock import Runtime, Status

from .helpers import Forked, Peer, descriptors, wait_until

ECHO = """
import threading
def echo(ref):
    ref.busy = True
    while True:
        try:
            data = ref.recv(65536)
        except BlockingIOError:
            break
        if not data:
            ref.release_additional_reference()
            break
        ref.write(data)
    ref.busy = False
def arrived(sids):
    for sid in sids:
        if sid not in dispatcher.consumers():
            dispatcher.add_consumer(sid, echo)
dispatcher = shmsock.Dispatcher(rt)
dispatcher.on_arrival(arrived)
threading.Thread(target=dispatcher.run, daemon=True).start()
"""


@contextlib.contextmanager
def echo_worker(runtime: Runtime) -> collections.abc.Iterator[tuple[Peer, int]]:
    """A process that echoes what is passed to it, and its index."""
    with Peer(runtime.name, role="worker") as peer:
        peer.run(ECHO)
        index = peer.ask("rt.index")
        store = runtime._store
        assert store is not None
        wait_until(lambda: store.is_connected(index), "it joins")
        yield peer, index


def place(runtime: Runtime, index: int, policy: str = "rehome") -> tuple[int, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(60)
    sid = runtime.create_socket(ours, owner=index, on_owner_death=policy)
    assert runtime.pass_to(index, [sid]) == [sid]
    assert ask(theirs, b"first") == b"first"
    wait_until(lambda: not runtime.sockets()["busy"].any(), "it is idle")
    return sid, theirs


def ask(sock: socket.socket, data: bytes) -> bytes:
    sock.sendall(data)
    return sock.recv(100)


def owner_of(runtime: Runtime, sid: int) -> int:
    rows = runtime.sockets()
    return int(rows["owner"][rows["id"] == sid][0])


def test_an_idle_socket_goes_on_elsewhere_when_its_owner_is_killed(runtime: Runtime) -> None:
    with echo_worker(runtime) as (first, index), echo_worker(runtime) as (_, other):
        sid, client = place(runtime, index)
        with client:
            client.sendall(b"")
            first.kill()
            wait_until(lambda: runtime.orphans() == [sid], "it waits for a new owner")
            assert runtime.status(sid) is Status.LIVE
            assert runtime.rehome(sid, other)
            assert not runtime.rehome(sid, other)
            assert ask(client, b"second") == b"second"
            assert owner_of(runtime, sid) == other
            assert runtime.audit() == []


def test_what_came_while_nobody_read_is_read_by_the_new_owner(runtime: Runtime) -> None:
    with echo_worker(runtime) as (first, index), echo_worker(runtime) as (_, other):
        sid, client = place(runtime, index)
        with client:
            first.kill()
            wait_until(lambda: runtime.orphans() == [sid], "it waits for a new owner")
            client.sendall(b"early")
            assert runtime.rehome(sid, other)
            assert client.recv(100) == b"early"


@pytest.mark.parametrize("policy", ["rehome", "fail"])
def test_a_busy_socket_fails_with_its_owner_and_so_does_one_that_asks_for_it(
    runtime: Runtime, policy: str
) -> None:
    with echo_worker(runtime) as (first, index):
        sid, client = place(runtime, index, policy)
        with client, held(runtime, sid) as reference:
            if policy == "rehome":
                first.run(f"ref = rt.address({sid}); ref.busy = True")
            first.kill()
            wait_until(lambda: reference.failed, "it fails")
            assert reference.error == (errno.EOWNERDEAD, "the owner process died")
            assert client.recv(100) == b""
            assert runtime.orphans() == []


@contextlib.contextmanager
def held(runtime: Runtime, sid: int) -> collections.abc.Iterator[shmsock.SocketRef]:
    reference = runtime.address(sid)
    assert reference is not None
    with reference:
        yield reference


def test_a_socket_whose_dead_owner_was_in_mid_message_fails(runtime: Runtime) -> None:
    with echo_worker(runtime) as (first, index):
        sid, client = place(runtime, index)
        with client, held(runtime, sid) as reference:
            first.run(f"assert rt._engine.take_turn({sid})")
            first.kill()
            wait_until(lambda: reference.failed, "it fails")
            assert reference.error[0] == errno.EPIPE


def test_a_socket_is_not_rehomed_to_who_is_not_connected(runtime: Runtime, name: str) -> None:
    with echo_worker(runtime) as (first, index), Peer(name) as mute:
        sid, client = place(runtime, index)
        with client:
            first.kill()
            wait_until(lambda: runtime.orphans() == [sid], "it waits for a new owner")
            assert not runtime.rehome(sid, mute.ask("rt.index"))
            assert runtime.orphans() == [sid]
            runtime.set_failed(sid)


def test_a_live_owner_keeps_its_socket(runtime: Runtime) -> None:
    with echo_worker(runtime) as (_, index), echo_worker(runtime) as (_, other):
        sid, client = place(runtime, index)
        with client:
            assert runtime.orphans() == []
            assert not runtime.rehome(sid, other)
            assert ask(client, b"still here") == b"still here"
            assert owner_of(runtime, sid) == index


def test_a_new_owner_that_was_never_told_asks_for_its_socket(runtime: Runtime) -> None:
    """The message that tells it may die with its sender; the owner word is the truth."""
    with echo_worker(runtime) as (first, index), echo_worker(runtime) as (_, other):
        sid, client = place(runtime, index)
        with client:
            first.kill()
            wait_until(lambda: runtime.orphans() == [sid], "it waits for a new owner")
            word = int(runtime._segment.cells.owner[sid & 0xFFFFFFFF])
            assert runtime._engine.change_owner(sid, word, runtime._word_of(other))
            assert ask(client, b"found") == b"found"


@pytest.mark.slow
def test_a_socket_whose_descriptor_nobody_has_any_more_fails(runtime: Runtime) -> None:
    with echo_worker(runtime) as (worker, index):
        worker.run("import shmsock.descriptors as d; d.FETCH_TIMEOUT_S = 0.5")  # not for five
        ours, theirs = socket.socketpair()
        sid = runtime.create_socket(ours, owner=index, on_owner_death="rehome")
        store = runtime._store
        assert store is not None
        store._sockets.pop(sid).close()
        with theirs, held(runtime, sid) as reference:
            wait_until(lambda: reference.failed, "its owner gives it up")
            assert reference.error == (errno.EBADF, "its descriptor was lost with the host")


# -- the host -----------------------------------------------------------------------------------


@pytest.fixture
def hosted(name: str) -> collections.abc.Iterator[Peer]:
    """A runtime whose host is another process, which the test may kill."""
    with Peer() as host:
        host.run(
            f"""
            import shmsock, socket
            rt = shmsock.Runtime.create({name!r}, slots=256, processes=16, stripes=8)
            """
        )
        yield host
        if host.process.poll() is None:
            host.run("rt.close(); rt.unlink()")


def test_a_live_host_is_not_taken_over(hosted: Peer, name: str) -> None:
    with pytest.raises(shmsock.AlreadyRunningError, match=str(hosted.pid)):
        Runtime.take_over(name)
    assert hosted.ask("rt.audit()") == []


def test_nothing_is_not_taken_over(name: str) -> None:
    with pytest.raises(shmsock.RuntimeNotFoundError):
        Runtime.take_over(name)


def test_create_says_that_a_runtime_lost_its_host(hosted: Peer, name: str) -> None:
    with Runtime.attach(name) as runtime:
        hosted.kill()
        with pytest.raises(shmsock.HostLostError):
            Runtime.create(name)
        runtime.unlink()


def take_over_with(name: str, files: int) -> str:
    """Try with room for so many more descriptors, then with all of them."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(descriptors()) + 32
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    filler: list[int] = []
    with contextlib.suppress(OSError):
        while True:
            filler.append(os.open("/dev/null", os.O_RDONLY))
    for _ in range(files):
        os.close(filler.pop())
    try:
        runtime, said = Runtime.take_over(name), "taken"
    except OSError:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in filler:
            os.close(fd)
        runtime, said = Runtime.take_over(name), "refused"
    assert runtime.is_host
    runtime.close()
    return said


def test_a_take_over_without_descriptors_leaves_the_place_of_the_host_free(
    hosted: Peer, name: str
) -> None:
    with Peer(name):
        hosted.kill()
        said = [Forked(take_over_with, name, files).result() for files in range(12)]
        assert {"refused", "taken"} == set(said)
        with Runtime.take_over(name) as runtime:
            assert runtime.audit() == []


def test_a_new_host_is_given_back_what_the_others_have(hosted: Peer, name: str) -> None:
    with Peer(name, role="worker") as owner, Peer(name) as late:
        owner.run("import socket; ours, theirs = socket.socketpair(); theirs.settimeout(60)")
        sid = owner.ask("rt.create_socket(ours)")
        hosted.kill()
        runtime = Runtime.take_over(name)
        with runtime:
            wait_until(lambda: runtime.has_descriptor(sid), "it is put again")
            assert runtime.is_host
            assert [row.role for row in runtime.processes() if row.pid == os.getpid()] == [
                "supervisor"
            ]
            late.run(f"ref = rt.address({sid}); ref.write(b'through the new host'); ref.close()")
            assert owner.ask("theirs.recv(100).decode()") == "through the new host"
            assert runtime.audit() == []
            entries = os.listdir(runtime.run_directory)
            assert len([entry for entry in entries if entry.startswith("control-")]) == 1
            runtime.set_failed(sid)


def test_a_listener_and_its_backlog_outlive_the_host(hosted: Peer, name: str) -> None:
    with Peer(name, role="worker") as worker:
        worker.run(ECHO)
        hosted.run(
            """
            listener = socket.create_server(("127.0.0.1", 0))
            address = listener.getsockname()
            sid = rt.create_socket(listener, on_owner_death="rehome")
            rt.spread([sid])
            """
        )
        sid = hosted.ask("sid")
        wait_until(lambda: worker.ask(f"rt._descriptors.peek({sid}) is not None"), "it is spread")
        with socket.create_connection(tuple(hosted.ask("address"))) as client:
            client.settimeout(60)
            hosted.kill()
            with Runtime.take_over(name) as runtime:
                wait_until(lambda: runtime.rehome(sid), "the listener is ours")
                assert runtime.is_listener(sid)
                with held(runtime, sid) as reference:
                    taken = socket.socket(fileno=os.dup(reference.fileno()))
                with taken:
                    connection, _ = taken.accept()
                    with connection:
                        connection.sendall(b"hello")
                        assert client.recv(100) == b"hello"
                runtime.set_failed(sid)


def test_hosts_killed_in_turn_lose_nothing(name: str) -> None:
    with Peer() as first:
        first.run(f"import shmsock; rt = shmsock.Runtime.create({name!r}, slots=64, processes=16)")
        with Peer(name, role="worker") as owner:
            owner.run("import socket; ours, theirs = socket.socketpair(); theirs.settimeout(60)")
            sid = owner.ask("rt.create_socket(ours)")
            host = first
            for _ in range(3):
                host.kill()
                host = Peer()
                host.run(f"import shmsock; rt = shmsock.Runtime.take_over({name!r})")
                wait_until(functools.partial(host.ask, f"rt.has_descriptor({sid})"), "it is put")
                host.run(f"ref = rt.address({sid}); ref.write(b'again'); ref.close()")
                assert owner.ask("theirs.recv(100).decode()") == "again"
            assert host.ask("rt.audit()") == []
            owner.run("rt.close()")
            host.run("rt.close(); rt.unlink()")
            host.close()


def test_a_host_gives_back_what_a_dead_process_held_without_waiting_for_its_timer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dying process's channel hangs up before its proof of life goes: looking once is too early.

    Nobody else would do it: the timer does not come.
    """
    monkeypatch.setattr("shmsock.participant._TICK_S", 3600.0)
    with Runtime.create(name, slots=64, processes=8, stripes=2) as runtime:
        ours, theirs = socket.socketpair()
        sid = runtime.create_socket(ours)
        with theirs:
            for _ in range(5):
                with Peer(name) as peer:
                    peer.run(f"ref = rt.address({sid}); ref.fileno()")
                    assert len(runtime.attached(sid)) == 1
                    peer.kill()
                    wait_until(lambda: not runtime.attached(sid), "its hold is given back")
            wait_until(lambda: len(runtime.processes()) == 1, "its row is given back")
