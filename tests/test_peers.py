"""The door that a process opens while there is no host: who may ask, and what it leaves."""

from __future__ import annotations

import array
import collections.abc
import contextlib
import os
import signal
import socket
import threading

import pytest

import shmsock
from shmsock import Runtime, channel, peers

from .helpers import Forked, Peer, connected, descriptors, out_of_descriptors, wait_until
from .test_channel import hello, hung_up
from .test_kill_points_channel import client_of, writes
from .test_kill_points_writing import read_exactly
from .test_rehome import hosted

__all__ = ["hosted"]  # a fixture


@pytest.fixture
def orphaned(hosted: Peer, name: str) -> collections.abc.Iterator[Runtime]:
    """This process as a participant that has lost its host, with its door open."""
    with Runtime.attach(name) as runtime:
        assert runtime._descriptors.connect()
        hosted.kill()
        wait_until(lambda: runtime._descriptors.peers.is_open, "its door is open")
        yield runtime
    shmsock.clean(name)


def door_of(runtime: Runtime) -> str:
    return peers.address_of(runtime.name, runtime._engine.word)


def dial(runtime: Runtime, greet: bool = True) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(30)
    try:
        sock.connect(door_of(runtime))
    except OSError:
        sock.close()
        raise
    if greet:
        channel.send(sock, channel.HELLO, hello(runtime))
    return sock


def is_unharmed(runtime: Runtime) -> bool:
    """Whether the door still answers who asks in order."""
    ours, theirs = connected("unix")
    sid = runtime.create_socket(ours)
    with theirs, dial(runtime) as sock:
        channel.send(sock, channel.GET, [sid])
        message = channel.receive(sock, 0)
        assert message is not None
        channel.close_all(message.descriptors)
        runtime.set_failed(sid)
        return (message.type, len(message.descriptors)) == (channel.GOT, 1)


def test_there_is_no_door_while_there_is_a_host(runtime: Runtime, name: str) -> None:
    with Peer(name) as peer:
        peer.run("import socket, threading; a, b = socket.socketpair(); sid = rt.create_socket(a)")
        wait_until(lambda: peer.ask("rt._descriptors.peek(sid).put"), "it has a channel")
        assert not peer.ask("rt._descriptors.peers.is_open")
        assert peer.ask("[t.name for t in threading.enumerate() if 'peers' in t.name]") == []
        assert not [e for e in os.listdir(runtime.run_directory) if e.startswith("peer-")]


def test_a_door_and_its_thread_go_when_a_host_is_back(hosted: Peer, name: str) -> None:
    with Peer(name) as peer:
        peer.run("import socket, threading; a, b = socket.socketpair(); sid = rt.create_socket(a)")
        files = "len(__import__('os').listdir('/proc/self/fd'))"
        names = "[t.name for t in threading.enumerate() if 'peers' in t.name]"
        wait_until(lambda: peer.ask("rt._descriptors.peek(sid).put"), "it has a channel")
        before = peer.ask(files)
        for _ in range(3):
            if hosted.process.poll() is None:
                hosted.kill()
            wait_until(lambda: peer.ask("rt._descriptors.peers.is_open"), "it has lost its host")
            with contextlib.closing(Runtime.take_over(name)) as runtime:
                wait_until(lambda: not peer.ask("rt._descriptors.peers.is_open"), "it is shut")
                wait_until(lambda: peer.ask(names) == [], "its thread has ended")
                # Its numbers go after its thread.
                wait_until(lambda: peer.ask(files) == before, "all of it is closed")
                assert not [e for e in os.listdir(runtime.run_directory) if e[:5] == "peer-"]
    shmsock.clean(name)


@pytest.mark.parametrize("kind", [channel.PUT, channel.PASS, channel.GOT, channel.KEEP])
def test_a_door_takes_no_descriptors_from_anybody(orphaned: Runtime, kind: int) -> None:
    before = len(descriptors())
    with dial(orphaned) as sock:
        channel.send(sock, kind, [7], [sock.fileno()])
        assert hung_up(sock)
    wait_until(lambda: len(descriptors()) == before, "all are closed")
    assert is_unharmed(orphaned)


@pytest.mark.parametrize("data", [b"", b"x", channel.pack(channel.GET, [1]), b"\0" * 4096])
def test_who_does_not_greet_a_door_is_hung_up_on(orphaned: Runtime, data: bytes) -> None:
    with dial(orphaned, greet=False) as sock:
        rights = array.array("i", [sock.fileno()])
        sock.sendmsg([data or b"y"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert hung_up(sock)
    assert is_unharmed(orphaned)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_greeting_that_does_not_fit_the_segment_is_hung_up_on(
    orphaned: Runtime, wrong: int
) -> None:
    words = list(hello(orphaned))
    words[wrong] += 1000
    with dial(orphaned, greet=False) as sock:
        channel.send(sock, channel.HELLO, words)
        assert hung_up(sock)
    assert is_unharmed(orphaned)


def test_strange_ids_are_refused_by_a_door(orphaned: Runtime) -> None:
    with dial(orphaned) as sock:
        strange = [0, 1, (1 << 64) - 1, 2 << 32 | 10_000]
        channel.send(sock, channel.GET, strange)
        message = channel.receive(sock, 0)
        assert message is not None
        assert (message.type, list(message.ids)) == (channel.GET_NO, strange)
        channel.send(sock, channel.FAILED, strange)
    assert is_unharmed(orphaned)


def test_failing_a_live_socket_by_a_hint_alone_does_nothing(orphaned: Runtime) -> None:
    ours, theirs = connected("unix")
    sid = orphaned.create_socket(ours)
    with theirs, dial(orphaned) as sock:
        channel.send(sock, channel.FAILED, [sid])
        channel.send(sock, channel.GET, [sid])
        message = channel.receive(sock, 0)
        assert message is not None
        channel.close_all(message.descriptors)
        with orphaned.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(b"alive")
        assert theirs.recv(10) == b"alive"
        orphaned.set_failed(sid)


def test_a_thousand_sockets_are_fetched_through_a_door_in_batches(orphaned: Runtime) -> None:
    with Peer(orphaned.name) as peer, contextlib.ExitStack() as stack:
        ids = []
        for _ in range(200):
            ours, theirs = connected("unix")
            stack.enter_context(theirs)
            ids.append(orphaned.create_socket(ours))
        peer.run(f"ids = {ids}; rt._descriptors.fetch(ids)")
        assert peer.ask("all(rt._descriptors.peek(sid) for sid in ids)")
        for sid in ids:
            orphaned.set_failed(sid)


def test_threads_fetch_through_doors_at_once(hosted: Peer, name: str) -> None:
    with Peer(name) as owner, Runtime.attach(name) as runtime, contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(client_of(owner)) for _ in range(8)]
        hosted.kill()
        errors: list[BaseException] = []

        def write(sid: int) -> None:
            try:
                with runtime.address(sid) as reference:  # type: ignore[union-attr]
                    reference.write(b"at once")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=write, args=(sid,)) for sid, _ in pairs * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        for _, client in pairs:
            assert read_exactly(client, 14) == b"at onceat once"
    shmsock.clean(name)


def test_a_forked_child_keeps_nothing_of_its_parents_door(orphaned: Runtime) -> None:
    ready, go = os.pipe(), os.pipe()

    def wait() -> None:
        os.write(ready[1], b"x")
        os.read(go[0], 1)

    with Forked(wait) as child:
        os.read(ready[0], 1)
        with dial(orphaned) as sock:
            orphaned._descriptors.peers.close()
            assert hung_up(sock)  # the child has no duplicate of either end
        with pytest.raises(FileNotFoundError):
            dial(orphaned)
        os.write(go[1], b"x")
        assert child.wait() == 0
    for fd in (*ready, *go):
        os.close(fd)


def test_a_door_that_cannot_be_opened_is_opened_later(hosted: Peer, name: str) -> None:
    with Runtime.attach(name) as runtime:
        assert runtime._descriptors.connect()
        with out_of_descriptors():
            os.kill(hosted.pid, signal.SIGKILL)
            hosted.process.wait()
            wait_until(lambda: runtime._descriptors._link.closed, "it noticed")  # type: ignore[union-attr]
            runtime._descriptors.connect()
            assert not runtime._descriptors.peers.is_open
        wait_until(lambda: runtime._descriptors.peers.is_open, "its door is open")
        assert is_unharmed(runtime)
    shmsock.clean(name)


def test_a_socket_made_while_there_is_no_host_is_put_when_one_comes(
    orphaned: Runtime,
) -> None:
    with Peer(orphaned.name) as creator, client_of(creator) as (sid, client):
        writes(creator, sid, "before, ")
        with orphaned.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(b"by another, ")
        with Peer() as host:
            host.run(f"import shmsock; rt = shmsock.Runtime.take_over({orphaned.name!r})")
            wait_until(lambda: host.ask(f"rt.has_descriptor({sid})"), "it is put")
            writes(host, sid, "and after")
            said = b"before, by another, and after"
            assert read_exactly(client, len(said)) == said
            host.run("rt.close()")


def test_the_longest_name_has_room_for_every_address(name: str) -> None:
    longest = name.ljust(64, "x")
    with Runtime.create(longest, slots=64, processes=4, stripes=2) as runtime:
        assert len(peers.address_of(longest, (1 << 64) - 1)) <= 107
        assert runtime._segment.control_address()
        with Peer(longest) as peer:
            ours, theirs = connected("unix")
            with theirs:
                sid = runtime.create_socket(ours)
                writes(peer, sid, "far")
                assert theirs.recv(10) == b"far"
                runtime.set_failed(sid)
