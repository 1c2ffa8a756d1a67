"""A control channel that is full: what a full queue dropped is made good by somebody."""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import socket

import pytest

import shmsock
from shmsock import Runtime, channel

from .helpers import Peer, connected, holders_of, wait_until
from .test_kill_points_channel import (
    assert_nobody_has,
    client_of,
    hosted_worker,
    inode_of,
    stopped,
    writes,
)
from .test_rehome import ask, echo_worker, hosted

__all__ = ["hosted"]  # a fixture

SMALL = 3  # messages; then a queue is full


@pytest.fixture
def small_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_QUEUE_LIMIT", SMALL)


def fill(link: channel.Link) -> None:
    """Leave no room for one more message to a peer that does not read."""
    while link.tell(channel.PUT_OK, [1]):
        pass


def link_to(runtime: Runtime, index: int) -> channel.Link:
    store = runtime._store
    assert store is not None
    return wait_until(lambda: store._workers.get(index), "it is connected")  # type: ignore[return-value]


# -- from a process to the host -------------------------------------------------------------------


def test_puts_that_a_full_channel_dropped_are_made_again(hosted: Peer, name: str) -> None:
    with Peer(name) as creator, Peer(name) as other, contextlib.ExitStack() as stack:
        creator.run(
            f"""
            from shmsock import channel
            channel._QUEUE_LIMIT = {SMALL}
            link = rt._descriptors.connect()
            dropped, tell = [], link.tell
            def told(kind, ids, code=0):
                ids = list(ids)
                done = tell(kind, ids, code)
                if not done:
                    dropped.extend(ids)
                return done
            link.tell = told
            """
        )
        with stopped(hosted.pid):
            creator.run("while tell(channel.FAILED, [1]): pass")
            pairs = [stack.enter_context(client_of(creator)) for _ in range(5)]
            assert set(creator.ask("dropped")) == {sid for sid, _ in pairs}
        for sid, client in pairs:
            wait_until(lambda sid=sid: hosted.ask(f"rt.has_descriptor({sid})"), "it is put again")  # type: ignore[misc]
            writes(other, sid, "through the host")
            assert client.recv(100) == b"through the host"
        wait_until(
            lambda: creator.ask("all(e.put for e in rt._descriptors._entries.values())"), "acked"
        )


def test_a_failure_that_a_full_channel_dropped_is_found_by_the_hosts_sweep(
    hosted: Peer, name: str
) -> None:
    with Peer(name) as creator, Peer(name) as winner, client_of(creator) as (sid, client):
        wait_until(lambda: hosted.ask(f"rt.has_descriptor({sid})"), "it is put")
        winner.run(
            f"""
            from shmsock import channel
            channel._QUEUE_LIMIT = {SMALL}
            link = rt._descriptors.connect()
            """
        )
        with stopped(hosted.pid):
            winner.run("while link.tell(channel.FAILED, [1]): pass")
            assert winner.ask(f"rt.set_failed({sid}, {errno.EPIPE}, 'dropped')")
        assert client.recv(100) == b""
        wait_until(lambda: hosted.ask("len(rt._store)") == 0, "the sweep finds it")


def test_a_refused_pass_that_a_full_channel_dropped_is_asked_for(
    runtime: Runtime, name: str
) -> None:
    with echo_worker(runtime) as (worker, index):
        worker.run("link = rt._descriptors.connect(); real = link.tell")
        worker.run(
            "link.tell = lambda kind, ids, code=0: kind != 9 and real(kind, ids, code)"
        )  # PASS_NO
        assert channel.PASS_NO == 9
        worker.run(
            """
            import shmsock.descriptors, os
            hear = rt._descriptors._hear
            def without(link, message):
                if message.type == 8:
                    for fd in message.descriptors:
                        os.close(fd)
                    message = message._replace(descriptors=[])
                    link._on_message = hear
                hear(link, message)
            link._on_message = without
            """
        )
        ours, client = connected()
        with client:
            client.settimeout(60)
            sid = runtime.create_socket(ours, owner=index, on_owner_death="rehome")
            assert runtime.pass_to(index, [sid]) == [sid]
            assert ask(client, b"asked for") == b"asked for"
            runtime.set_failed(sid)


MEET = """
import select, socket, threading, time
from shmsock import channel
sid = other = None
said = []
ours, theirs = socket.socketpair()
theirs.settimeout(60)
def meet(queue_first):
    global sid
    try:
        if queue_first:
            link = rt._descriptors.connect()
            while link.unsent < 2:
                link.tell(channel.FAILED, [1])
        sid = rt.create_socket(ours)
        while other is None:
            time.sleep(0.001)
        with rt.address(other) as ref:
            ref.write(b"from a callback")
        said.append("done")
    except BaseException as error:
        said.append(repr(error))
dispatcher = shmsock.Dispatcher(rt)
threading.Thread(target=dispatcher.run, daemon=True).start()
"""


@pytest.mark.parametrize("queued", [False, True], ids=["not connected yet", "put is queued"])
def test_two_dispatchers_fetch_each_others_new_sockets_at_one_moment(
    hosted: Peer, name: str, queued: bool
) -> None:
    """The loop that would send the put is the one that waits for the other's."""
    with Peer(name) as one, Peer(name) as two:
        with stopped(*[hosted.pid] * queued):
            for peer in (one, two):
                peer.run(MEET)
                peer.run(f"dispatcher.call_soon(lambda: meet({queued}))")
                wait_until(lambda peer=peer: peer.ask("sid"), "it is created")  # type: ignore[misc]
            for peer, other in ((one, two), (two, one)):
                peer.run(f"other = {other.ask('sid')}")
        for peer in (one, two):
            wait_until(lambda peer=peer: peer.ask("said"), "it is done")  # type: ignore[misc]
            assert peer.ask("said") == ["done"]
            assert peer.ask("theirs.recv(100).decode()") == "from a callback"


# -- from the host to a process -------------------------------------------------------------------


def test_passes_that_a_full_channel_dropped_are_asked_for(
    runtime: Runtime, small_queues: None
) -> None:
    with echo_worker(runtime) as (worker, index), contextlib.ExitStack() as stack:
        clients = []
        with stopped(worker.pid):
            fill(link_to(runtime, index))
            for _ in range(5):
                ours, client = connected()
                clients.append(stack.enter_context(client))
                client.settimeout(60)
                sid = runtime.create_socket(ours, owner=index, on_owner_death="rehome")
                assert runtime.pass_to(index, [sid]) == []
            ours, refused = connected()
            stack.enter_context(refused)
            sid = runtime.create_socket(ours, owner=index)  # fails rather than waits
            assert runtime.pass_to(index, [sid]) == []
            assert refused.recv(100) == b""
        for client in clients:
            assert ask(client, b"asked for") == b"asked for"
        for row in runtime.sockets():
            runtime.set_failed(int(row["id"]))


def test_listeners_that_a_full_channel_dropped_are_asked_for(
    runtime: Runtime, small_queues: None
) -> None:
    with echo_worker(runtime) as (worker, index):
        with stopped(worker.pid):
            fill(link_to(runtime, index))
            listener = socket.create_server(("127.0.0.1", 0))
            sid = runtime.create_socket(listener, on_owner_death="rehome")
            runtime.spread([sid])
        inode = inode_of(runtime, sid)
        wait_until(lambda: holders_of(inode, [worker.pid]), "it holds a duplicate")
        runtime.set_failed(sid)
        assert_nobody_has(inode, worker.pid)


def test_an_acknowledgement_that_a_full_channel_dropped_comes_with_the_next_put(
    runtime: Runtime, small_queues: None
) -> None:
    with echo_worker(runtime) as (worker, index):
        link = link_to(runtime, index)
        kinds = []
        real = link.tell

        def tell(kind: int, ids: collections.abc.Iterable[int], code: int = 0) -> bool:
            kinds.append(kind)
            return kinds.count(channel.PUT_OK) > 1 and real(kind, ids, code)

        link.tell = tell  # type: ignore[method-assign]
        worker.run("a, b = __import__('socket').socketpair(); sid = rt.create_socket(a)")
        wait_until(lambda: worker.ask("rt._descriptors.peek(sid).put"), "it is acknowledged")
        assert kinds.count(channel.PUT_OK) > 1
        runtime.set_failed(worker.ask("sid"))


def test_a_worker_that_did_not_read_for_its_time_is_hung_up_on_and_comes_back(
    runtime: Runtime, small_queues: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_STUCK_AFTER_S", 0.2)
    with echo_worker(runtime) as (worker, index):
        ours, client = connected()
        with client, contextlib.ExitStack() as stack:
            client.settimeout(60)
            with stopped(worker.pid):
                link = link_to(runtime, index)
                fill(link)
                sid = runtime.create_socket(ours, owner=index, on_owner_death="rehome")
                runtime.pass_to(index, [sid])
                wait_until(lambda: link.closed, "it is hung up on")
                store = runtime._store
                assert store is not None
                wait_until(lambda: not store.is_connected(index))
            assert ask(client, b"back again") == b"back again"
            stack.callback(runtime.set_failed, sid)


def test_a_stopped_host_makes_no_worker_give_up_what_it_owns(hosted: Peer, name: str) -> None:
    """Only a host that answers can say that a descriptor is lost."""
    with hosted_worker(hosted, name) as (worker, index), Runtime.attach(name) as looker:
        options = {"owner": index, "on_owner_death": "rehome"}
        with client_of(hosted, **options) as (sid, client):
            with stopped(hosted.pid):
                worker.run("for _ in range(20): rt._descriptors.claim_unknown()")
                assert looker.status(sid) is shmsock.Status.LIVE
            assert ask(client, b"told at last") == b"told at last"
