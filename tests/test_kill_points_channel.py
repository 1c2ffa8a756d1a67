"""Killed here: who closes the descriptors, and who has the bytes. Real processes, real SIGKILL.

Each test is a line of DESIGN section 10's table. Who dies at a line has it replaced, in its own
process, by one that kills it; what is in flight is held there by SIGSTOP.
"""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import os
import signal
import socket

import pytest

import shmsock
from shmsock import Runtime, Status

from .helpers import Forked, Peer, connected, die, holders_of, read_to_end, wait_until
from .test_rehome import ECHO, ask, echo_worker, hosted, owner_of

__all__ = ["hosted"]  # a fixture


def inode_of(runtime: Runtime, sid: int) -> int:
    return int(runtime._segment.cells.inode[sid & 0xFFFFFFFF])


def assert_nobody_has(inode: int, *pids: int) -> None:
    """No process keeps a dead connection's descriptor."""
    wait_until(lambda: holders_of(inode, [os.getpid(), *pids]) == [], "every duplicate is closed")


@contextlib.contextmanager
def stopped(*pids: int) -> collections.abc.Iterator[None]:
    """What is sent to these processes stays in flight."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda pid=pid: state_of(pid) == "T", "it stops")  # type: ignore[misc]
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def client_of(peer: Peer, **options: object) -> collections.abc.Iterator[tuple[int, socket.socket]]:
    """A connection whose server's end ``peer`` has made a Socket; its id and the client's end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        peer.run(f"import socket; sock = socket.create_connection(('127.0.0.1', {port}))")
        client = listener.accept()[0]
    client.settimeout(60)
    with client:
        yield peer.ask(f"rt.create_socket(sock, **{options!r})"), client


def writes(peer: Peer, sid: int, text: str) -> None:
    peer.run(f"with rt.address({sid}) as ref: ref.write({text.encode()!r})")


def follow(name: str, sid: int) -> Runtime:
    """The next host, once it has been given the descriptor."""
    runtime = Runtime.take_over(name)
    wait_until(lambda: runtime.has_descriptor(sid), "it is put again")
    return runtime


# -- put ----------------------------------------------------------------------------------------


def test_creator_killed_before_its_put_ends_the_connection(runtime: Runtime) -> None:
    ours, theirs = connected()

    def create() -> None:
        runtime._check()
        runtime._descriptors.put = lambda sid: die()  # type: ignore[method-assign]
        runtime.create_socket(ours)

    with theirs:
        victim = Forked(create)
        ours.close()
        assert victim.wait() == signal.SIGKILL
        assert read_to_end(theirs) == b""  # the kernel closed the only descriptor
        wait_until(lambda: runtime.in_use() == 0, "its slot comes back")
        assert runtime.audit() == []


@pytest.mark.parametrize("parked_by", ["host's death", "creator's death"])
def test_a_get_before_its_put_is_answered_after_any_death(
    hosted: Peer, name: str, parked_by: str
) -> None:
    with Peer(name) as creator, Peer(name) as getter:
        creator.run("real, rt._descriptors.put = rt._descriptors.put, lambda sid: None")
        with client_of(creator) as (sid, client):
            creator.run(f"rt._descriptors._entries[{sid}].put = True")  # no timer puts it either
            getter.start(f"with rt.address({sid}) as ref: ref.write(b'at last')")
            wait_until(lambda: hosted.ask(f"{sid} in rt._store._parked"), "it is parked")
            if parked_by == "host's death":
                creator.run("rt._descriptors.connect()")  # who has a channel notices the death
                hosted.kill()
                getter.finish()
                assert client.recv(100) == b"at last"
                with follow(name, sid) as runtime:
                    inode = inode_of(runtime, sid)
                    runtime.set_failed(sid)
                    assert read_to_end(client) == b""
                    assert_nobody_has(inode, creator.pid, getter.pid)
            else:
                creator.kill()
                with pytest.raises(AssertionError, match="the owner process died"):
                    getter.finish()
                assert read_to_end(client) == b""
                assert hosted.ask("rt._store._parked") == {}
                assert hosted.ask("len(rt._store)") == 0
                assert hosted.ask("rt.audit()") == []


def test_put_in_flight_dies_with_the_host_and_is_made_again(hosted: Peer, name: str) -> None:
    with Peer(name) as creator, Peer(name) as other:
        creator.run("assert rt._descriptors.connect()")
        with stopped(hosted.pid), client_of(creator) as (sid, client):
            hosted.kill()
            writes(other, sid, "without a host")
            assert client.recv(100) == b"without a host"
            with follow(name, sid) as runtime:
                wait_until(lambda: creator.ask(f"rt._descriptors.peek({sid}).put"), "acked")
                inode = inode_of(runtime, sid)
                runtime.set_failed(sid)
                assert read_to_end(client) == b""
                assert_nobody_has(inode, creator.pid, other.pid)


def test_put_in_flight_of_a_dead_creator_is_closed_by_the_host(hosted: Peer, name: str) -> None:
    with Peer(name) as creator, Runtime.attach(name) as runtime:
        creator.run("assert rt._descriptors.connect()")
        with contextlib.ExitStack() as stack:
            with stopped(hosted.pid):
                sid, client = stack.enter_context(client_of(creator))
                inode = inode_of(runtime, sid)
                creator.kill()
            assert read_to_end(client) == b""
            assert_nobody_has(inode, hosted.pid)
        wait_until(lambda: runtime.status(sid) is Status.GONE, "its slot comes back")
        assert runtime.audit() == []


def test_put_that_comes_after_recycle_is_closed_and_harms_no_later_life(
    hosted: Peer, name: str
) -> None:
    with Peer(name) as creator, Runtime.attach(name) as runtime:
        creator.run("assert rt._descriptors.connect()")
        with contextlib.ExitStack() as stack:
            with stopped(hosted.pid):
                sid, client = stack.enter_context(client_of(creator))
                old = inode_of(runtime, sid)
                assert runtime.set_failed(sid)
                assert runtime.status(sid) is Status.GONE
                later: list[int] = []
                while not later or later[-1] & 0xFFFFFFFF != sid & 0xFFFFFFFF:  # its slot again
                    ours, theirs = connected("unix")
                    stack.enter_context(theirs)
                    later.append(runtime.create_socket(ours))
            assert read_to_end(client) == b""
            assert_nobody_has(old, hosted.pid, creator.pid)
            tenant = later[-1]
            wait_until(lambda: hosted.ask(f"rt.has_descriptor({tenant})"), "its own put arrives")
            writes(creator, tenant, "the new tenant")
            assert theirs.recv(100) == b"the new tenant"
            for each in later:
                runtime.set_failed(each)
        assert runtime.audit() == []


# -- got ----------------------------------------------------------------------------------------


def receive_nothing(sock: socket.socket, deadline: float) -> None:
    """Die when the answer is there."""
    sock.recv(1, socket.MSG_PEEK)
    die()


def test_got_in_flight_to_a_dead_fetcher_is_closed_by_the_kernel(runtime: Runtime) -> None:
    ours, theirs = connected()
    sid = runtime.create_socket(ours)
    inode = inode_of(runtime, sid)

    def fetch() -> None:
        runtime._check()
        runtime._descriptors._receive = receive_nothing  # type: ignore[method-assign]
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(b"never")

    with theirs:
        assert Forked(fetch).wait() == signal.SIGKILL
        wait_until(lambda: len(runtime.processes()) == 1, "it is reaped")
        assert runtime.attached(sid) == []
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(b"alive")
        assert theirs.recv(100) == b"alive"
        runtime.set_failed(sid)
        assert read_to_end(theirs) == b""
        assert_nobody_has(inode)
        assert runtime.audit() == []


def test_got_in_flight_outlives_the_host_that_sent_it(hosted: Peer, name: str) -> None:
    with Peer(name) as creator, Peer(name) as fetcher, client_of(creator) as (sid, client):
        wait_until(lambda: hosted.ask(f"rt.has_descriptor({sid})"), "it is put")
        fetcher.run(
            """
            import time
            real = rt._descriptors._receive
            def late(sock, deadline):
                sock.recv(1, socket.MSG_PEEK)
                while rt.host_alive():
                    time.sleep(0.001)
                return real(sock, deadline)
            import socket
            rt._descriptors._receive = late
            """
        )
        fetcher.start(f"with rt.address({sid}) as ref: ref.write(b'from the dead')")
        wait_until(lambda: hosted.ask("len(rt._store._peers)") >= 2, "it has asked")
        hosted.kill()
        fetcher.finish()
        assert client.recv(100) == b"from the dead"
        with follow(name, sid) as runtime:
            inode = inode_of(runtime, sid)
            runtime.set_failed(sid)
            assert read_to_end(client) == b""
            assert_nobody_has(inode, creator.pid, fetcher.pid)


# -- pass ---------------------------------------------------------------------------------------


def test_pass_in_flight_outlives_the_host_that_sent_it(hosted: Peer, name: str) -> None:
    with Runtime.attach(name) as looker, contextlib.ExitStack() as stack:
        worker, index = stack.enter_context(hosted_worker(hosted, name))
        with stopped(worker.pid):
            options = {"owner": index, "on_owner_death": "rehome"}
            sid, client = stack.enter_context(client_of(hosted, **options))
            assert hosted.ask(f"rt.pass_to({index}, [{sid}])") == [sid]
            hosted.kill()
        assert ask(client, b"nobody supervises") == b"nobody supervises"
        with follow(name, sid) as runtime:
            assert ask(client, b"somebody does") == b"somebody does"
            assert owner_of(runtime, sid) == index
            inode = inode_of(looker, sid)
            runtime.set_failed(sid)
            assert read_to_end(client) == b""
            assert_nobody_has(inode, worker.pid)


@contextlib.contextmanager
def hosted_worker(hosted: Peer, name: str) -> collections.abc.Iterator[tuple[Peer, int]]:
    """An echo worker of a host that is another process."""
    with Peer(name, role="worker") as worker:
        worker.run(ECHO)
        index = worker.ask("rt.index")
        wait_until(lambda: hosted.ask(f"rt._store.is_connected({index})"), "it joins")
        yield worker, index


def test_pass_in_flight_to_a_dead_worker_goes_to_another(runtime: Runtime) -> None:
    with echo_worker(runtime) as (victim, index), echo_worker(runtime) as (_, other):
        ours, client = connected()
        with client:
            sid = runtime.create_socket(ours, owner=index, on_owner_death="rehome")
            with stopped(victim.pid):
                assert runtime.pass_to(index, [sid]) == [sid]
                client.sendall(b"spoken early")
                victim.kill()
            wait_until(lambda: runtime.rehome(sid, other), "it is an orphan")
            assert client.recv(100) == b"spoken early"
            runtime.set_failed(sid)
            assert read_to_end(client) == b""
            assert runtime.audit() == []


@pytest.mark.slow
@pytest.mark.parametrize("somebody", [False, True], ids=["nobody else has it", "another has it"])
def test_pass_that_was_never_sent_is_asked_for_or_lost_with_the_host(
    hosted: Peer, name: str, somebody: bool
) -> None:
    with contextlib.ExitStack() as stack:
        _, index = stack.enter_context(hosted_worker(hosted, name))
        other = stack.enter_context(Peer(name))
        other.run("assert rt._descriptors.connect()")
        options = {"owner": index, "on_owner_death": "rehome"}
        sid, client = stack.enter_context(client_of(hosted, **options))
        if somebody:
            writes(other, sid, "hello")
            assert client.recv(100) == b"hello"
        hosted.run("import os, signal; rt._store.pass_to = lambda *_: os.kill(os.getpid(), 9)")
        hosted.start(f"rt.pass_to({index}, [{sid}])")
        assert hosted.process.wait() == -signal.SIGKILL
        with Runtime.take_over(name) as runtime:
            if somebody:
                assert ask(client, b"at last") == b"at last"
                runtime.set_failed(sid)
            assert read_to_end(client) == b""  # the kernel closed the only descriptor
            wait_until(lambda: runtime.status(sid) is Status.GONE, "its owner gives it up")
            assert runtime.audit() == []


# -- keep, failed -------------------------------------------------------------------------------


def test_listeners_whose_keep_was_lost_are_asked_for(runtime: Runtime) -> None:
    """The message is a hint: the table says which listeners every worker has to hold."""
    with echo_worker(runtime) as (worker, _):
        listener = socket.create_server(("127.0.0.1", 0))
        sid = runtime.create_socket(listener, on_owner_death="rehome")  # and no spread
        wait_until(lambda: holders_of(inode_of(runtime, sid), [worker.pid]), "it is fetched")
        assert worker.ask(f"{sid} in dispatcher.consumers()") is False
        assert owner_of(runtime, sid) == runtime.index
        inode = inode_of(runtime, sid)
        runtime.set_failed(sid)
        assert_nobody_has(inode, worker.pid)


@pytest.mark.parametrize("who", ["winner", "recycler"])
def test_who_fails_or_recycles_and_is_killed_before_shutdown_is_made_good_by_the_sweep(
    runtime: Runtime, who: str
) -> None:
    ours, theirs = connected()
    sid = runtime.create_socket(ours)
    inode = inode_of(runtime, sid)

    def end() -> None:
        runtime._check()
        runtime._descriptors.shut_down = lambda sid: die()  # type: ignore[method-assign]
        if who == "winner":
            runtime.set_failed(sid, 5, "killed")
        else:
            with runtime.address(sid) as reference:  # type: ignore[union-attr]
                reference.fileno()
                reference.release_additional_reference()

    with theirs:
        assert Forked(end).wait() == signal.SIGKILL
        assert runtime.status(sid) is not Status.LIVE or who == "recycler"
        assert read_to_end(theirs) == b""
        assert_nobody_has(inode)
        wait_until(lambda: runtime.in_use() == 0, "its slot comes back")
        assert runtime.audit() == []


def test_failed_that_was_lost_is_made_good_by_the_sweep(runtime: Runtime) -> None:
    ours, theirs = connected()
    inode = inode_of(runtime, sid := runtime.create_socket(ours))
    with theirs, Peer(runtime.name) as winner:
        winner.run("rt._descriptors._tell_failed = lambda sid: None")
        assert winner.ask(f"rt.set_failed({sid}, 5, 'lost')")
        assert read_to_end(theirs) == b""
        assert_nobody_has(inode, winner.pid)


def test_failed_without_a_host_ends_the_connection_through_its_owner(
    hosted: Peer, name: str
) -> None:
    with Peer(name) as owner, Peer(name) as winner, client_of(owner) as (sid, client):
        wait_until(lambda: hosted.ask(f"rt.has_descriptor({sid})"), "it is put")
        hosted.kill()
        wait_until(lambda: owner.ask("rt._descriptors.peers.is_open"), "it noticed")
        owner.run("rt._descriptors.sweep = lambda: None")  # told, and not found out
        inode = int(winner.ask("int(rt.sockets()['inode'][0])"))
        assert winner.ask(f"rt.set_failed({sid}, {errno.ECONNABORTED}, 'kicked')")
        assert read_to_end(client) == b""
        assert_nobody_has(inode, owner.pid, winner.pid)
        with Runtime.take_over(name) as runtime:
            assert runtime.audit() == []


def test_door_of_the_dead_is_taken_away_by_who_reaps_them(hosted: Peer, name: str) -> None:
    with Peer(name) as victim, Runtime.attach(name) as runtime:
        victim.run("assert rt._descriptors.connect()")
        hosted.kill()

        def found() -> list[str]:
            return [e for e in os.listdir(runtime.run_directory) if e.startswith("peer-")]

        wait_until(found, "its door is open")
        victim.kill()
        runtime.repair()
        assert found() == []
        assert runtime.audit() == []
    assert shmsock.clean(name)
