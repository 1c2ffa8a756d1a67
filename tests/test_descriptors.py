"""Descriptors: fetched at first use, never another client's, given back everywhere."""

from __future__ import annotations

import errno
import os
import socket
import threading

import pytest

import shmsock
from shmsock import channel
from shmsock.cache import kind_of, peer_of

from .helpers import (
    Peer,
    connected,
    descriptors,
    holders_of,
    out_of_descriptors,
    read_to_end,
    wait_until,
)

KINDS = ["tcp", "unix"]


def inode_of(runtime: shmsock.Runtime, sid: int) -> int:
    rows = runtime.sockets()
    return int(rows[rows["id"] == sid]["inode"][0])


# -- first use ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_any_process_fetches_a_descriptor_at_first_use(runtime: shmsock.Runtime, kind: str) -> None:
    ours, peers = connected(kind)
    sid = runtime.create_socket(ours)
    inode = inode_of(runtime, sid)
    with peers, Peer(runtime.name) as one, Peer(runtime.name) as two:
        for number, process in enumerate((one, two)):
            process.run(f"import os; ref = rt.address({sid})")
            assert holders_of(inode, [process.pid]) == [], "address asks nobody for a descriptor"
            assert process.ask("os.fstat(ref.fileno()).st_ino") == inode
            process.run(f"ref.write(b'from {number}')")
            assert peers.recv(100) == f"from {number}".encode()
            process.run("ref.close()")


def test_what_a_client_creates_is_kept_by_the_host_and_used_by_others(
    runtime: shmsock.Runtime,
) -> None:
    with Peer(runtime.name) as creator, Peer(runtime.name) as user:
        creator.run("import socket; a, b = socket.socketpair(); sid = rt.create_socket(a)")
        sid = creator.ask("sid")
        user.run(f"rt.address({sid}).write(b'hello')")
        assert creator.ask("b.recv(10).decode()") == "hello"
        reference = runtime.address(sid)
        assert reference is not None
        with reference:
            reference.write(b"from the host")
        assert creator.ask("b.recv(100).decode()") == "from the host"


def test_a_get_before_its_put_parks_until_the_put(runtime: shmsock.Runtime) -> None:
    store = runtime._store
    assert store is not None
    with Peer(runtime.name) as creator, Peer(runtime.name) as user:
        creator.run(
            """
            import socket
            put, rt._descriptors.put = rt._descriptors.put, lambda sid: None
            a, b = socket.socketpair(); sid = rt.create_socket(a)
            """
        )
        sid = creator.ask("sid")
        user.start(f"rt.address({sid}).write(b'late')")
        wait_until(lambda: sid in store._parked)
        host_wrote: list[str] = []

        def write_from_the_host() -> None:
            with runtime.address(sid) as reference:  # type: ignore[union-attr]
                reference.write(b"host!")
                host_wrote.append("written")

        thread = threading.Thread(target=write_from_the_host)
        thread.start()
        creator.run("put(sid)")
        user.finish()
        thread.join()
        assert host_wrote == ["written"]
        received = creator.ask("b.recv(9, socket.MSG_WAITALL).decode()")
        assert received in ("latehost!", "host!late")
        assert not store._parked


def test_a_parked_get_is_answered_when_its_creator_dies(runtime: shmsock.Runtime) -> None:
    store = runtime._store
    assert store is not None
    with Peer(runtime.name) as creator, Peer(runtime.name) as user:
        creator.run(
            """
            import socket
            rt._descriptors.put = lambda sid: None
            a, b = socket.socketpair(); sid = rt.create_socket(a)
            """
        )
        sid = creator.ask("sid")
        user.start(
            f"""
            try: rt.address({sid}).fileno(); found = None
            except shmsock.SocketFailedError as error: found = error.code
            """
        )
        wait_until(lambda: sid in store._parked)
        creator.kill()
        user.finish()
        assert user.ask("found") == errno.EOWNERDEAD


def test_the_hosts_own_loop_is_told_at_once_that_a_put_is_missing(
    runtime: shmsock.Runtime,
) -> None:
    with Peer(runtime.name) as creator:
        creator.run(
            """
            import socket
            rt._descriptors.put = lambda sid: None
            a, b = socket.socketpair(); sid = rt.create_socket(a)
            """
        )
        sid = creator.ask("sid")
        found: list[object] = []

        def use() -> None:
            with runtime.address(sid) as reference:  # type: ignore[union-attr]
                try:
                    reference.fileno()
                except shmsock.DescriptorError as error:
                    found.append(error)

        runtime._service.call_soon(use)
        wait_until(lambda: found)


def test_another_inode_than_the_slots_is_not_cached(runtime: shmsock.Runtime) -> None:
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)
    with Peer(runtime.name) as user, peers:
        user.run("import socket, os; x, y = socket.socketpair()")
        user.run(f"ref = rt.address({sid})")
        user.run(f"rt._descriptors._arrived({sid}, os.dup(x.fileno()))")
        assert user.ask(f"rt._descriptors.peek({sid})") is None
        assert user.ask("os.fstat(ref.fileno()).st_ino") == inode_of(runtime, sid)
        user.run("ref.close()")


# -- limits -------------------------------------------------------------------------------------


def test_a_host_out_of_descriptors_says_no_and_gets_it_later(name: str) -> None:
    with Peer() as host:
        host.run("import shmsock; from tests.helpers import out_of_descriptors")
        host.run(f"rt = shmsock.Runtime.create({name!r}, slots=64)")
        with shmsock.Runtime.attach(name) as runtime:
            first, first_peers = connected("unix")
            runtime.create_socket(first)
            wait_until(lambda: host.ask("len(rt._store)") == 1)  # the channel exists
            host.run("full = out_of_descriptors(); full.__enter__()")
            ours, peers = connected("unix")
            sid = runtime.create_socket(ours)
            wait_until(lambda: host.ask("rt._store._told_full"))
            entry = runtime._descriptors.peek(sid)
            assert entry is not None
            assert not entry.put
            assert host.ask("len(rt._store)") == 1
            host.run("full.__exit__(None, None, None)")
            wait_until(lambda: entry.put, "the put is tried again")
            assert host.ask("len(rt._store)") == 2
        for sock in (first_peers, peers):
            assert read_to_end(sock) == b""
            sock.close()
        host.run("rt.close(); rt.unlink()")


def test_a_put_is_tried_again_when_the_host_could_not_be_reached(name: str) -> None:
    with Peer() as host:
        host.run(f"import shmsock; rt = shmsock.Runtime.create({name!r}, slots=64)")
        with shmsock.Runtime.attach(name) as runtime:
            host.run("address = rt._store.address; rt._segment.publish_control_address('')")
            ours, peers = connected("unix")
            sid = runtime.create_socket(ours)
            done = threading.Event()
            runtime._service.call_soon(done.set)  # behind the attempt to connect
            assert done.wait(30)
            host.run("rt._segment.publish_control_address(address)")
            wait_until(lambda: runtime._descriptors.peek(sid).put)  # type: ignore[union-attr]
        peers.close()
        host.run("rt.close(); rt.unlink()")


def test_a_client_out_of_descriptors_is_told_and_goes_on_later(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    with peers, Peer(runtime.name) as user:
        user.run(
            f"""
            from tests.helpers import out_of_descriptors
            ref = rt.address({sid}); ref.fileno(); ref.close()   # now a fetcher is connected
            rt._descriptors.discard({sid})
            found = []
            with out_of_descriptors():
                ref = rt.address({sid})
                for attempt in range(2):    # with the fetcher that is connected, and with a new one
                    try: ref.write(b"no")
                    except shmsock.DescriptorError as error: found.append(str(error))
            ref.write(b"yes")
            ref.close()
            """
        )
        first, second = user.ask("found")
        assert "ulimit -n" in first
        assert second
        assert peers.recv(10) == b"yes"
        assert runtime.status(sid) is shmsock.Status.LIVE


def test_creating_at_the_hosts_limit_raises_and_leaves_no_socket(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    with out_of_descriptors(), pytest.raises(OSError, match="Too many open files"):
        runtime.create_socket(ours)
    assert len(runtime.sockets()) == 0
    assert runtime.in_use() == 0
    with peers:
        assert read_to_end(peers) == b""
    assert runtime.audit() == []


# -- giving back --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_idle_duplicates_are_closed_after_a_failure_without_any_call_by_their_process(
    runtime: shmsock.Runtime, kind: str
) -> None:
    ours, peers = connected(kind)
    sid = runtime.create_socket(ours)
    inode = inode_of(runtime, sid)
    with peers, Peer(runtime.name) as idle, Peer(runtime.name) as holding:
        idle.run(f"ref = rt.address({sid}); ref.fileno(); ref.close()")
        holding.run(f"ref = rt.address({sid}); ref.fileno()")
        everybody = [os.getpid(), idle.pid, holding.pid]
        assert holders_of(inode, everybody) == everybody
        assert runtime.set_failed(sid, errno.EPERM, "out")
        assert read_to_end(peers) == b""
        wait_until(lambda: holders_of(inode, everybody) == [holding.pid])
        assert holding.ask("ref.failed")
        holding.run("ref.close()")
        wait_until(lambda: holders_of(inode, everybody) == [])


def test_a_number_is_never_closed_while_its_process_holds_a_reference(
    runtime: shmsock.Runtime,
) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    cache = runtime._descriptors
    with peers:
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            number = reference.fileno()
            inode = os.fstat(number).st_ino
            runtime.set_failed(sid, 1, "x")
            for close in (
                lambda: cache.discard(sid),
                cache.sweep,
                cache._evict,
                lambda: cache._hung_up(sid),
            ):
                close()
                assert os.fstat(number).st_ino == inode
        wait_until(lambda: holders_of(inode, [os.getpid()]) == [])
        assert cache.peek(sid) is None


def test_the_cache_is_bounded_and_forgets_the_least_recently_used(
    runtime: shmsock.Runtime,
) -> None:
    clients = []
    ids = []
    for _ in range(24):
        ours, peers = connected("unix")
        clients.append(peers)
        ids.append(runtime.create_socket(ours))
    with Peer(runtime.name) as user:
        user.run(f"ids = {ids}; rt._descriptors._limit = 10")
        user.run(
            """
            held = rt.address(ids[0]); held.fileno()
            favourite = ids[1]
            for sid in ids[2:]:
                with rt.address(favourite) as ref: ref.fileno()
                with rt.address(sid) as ref: ref.fileno()
                assert len(rt._descriptors._entries) <= 10
            """
        )
        cached = set(user.ask("list(rt._descriptors._entries)"))
        assert {ids[0], ids[1], ids[-1]} <= cached
        assert ids[2] not in cached
        inodes = {sid: inode_of(runtime, sid) for sid in ids}
        open_there = descriptors(user.pid).values()
        for sid in ids:
            assert (f"socket:[{inodes[sid]}]" in open_there) == (sid in cached)
        user.run("for sid in ids:\n  with rt.address(sid) as ref: ref.write(b'still')")
        for client in clients:
            assert client.recv(10) == b"still"
            client.close()
        user.run("held.close()")


def test_what_this_process_owns_or_dispatches_is_never_evicted(runtime: shmsock.Runtime) -> None:
    mine, peers = connected("unix")
    with Peer(runtime.name) as other, peers:
        other.run("import socket; a, b = socket.socketpair(); sid = rt.create_socket(a)")
        watched = other.ask("sid")
        owned = runtime.create_socket(mine)
        dispatcher = shmsock.Dispatcher(runtime)
        assert dispatcher.add_consumer(watched, lambda ref: None)
        runtime._descriptors._evict()
        assert runtime._descriptors.peek(owned) is not None
        assert runtime._descriptors.peek(watched) is not None
        dispatcher.close()
        runtime._descriptors._evict()
        assert runtime._descriptors.peek(watched) is None


def test_without_a_living_host_only_what_nobody_has_cannot_be_written_to(name: str) -> None:
    with Peer() as host:
        host.run(f"import shmsock, socket; rt = shmsock.Runtime.create({name!r}, slots=64)")
        with Peer(name) as owner, shmsock.Runtime.attach(name) as runtime:
            owner.run(
                """
                import socket
                pairs = [socket.socketpair() for _ in range(2)]
                ids = [rt.create_socket(a) for a, b in pairs]
                """
            )
            known, unknown = owner.ask("ids")
            lost = host.ask(
                f"rt.create_socket(socket.socketpair()[0], owner={owner.ask('rt.index')},"
                " on_owner_death='rehome')"
            )
            with runtime.address(known) as reference:  # type: ignore[union-attr]
                reference.fileno()
            host.kill()
            with runtime.address(known) as reference:  # type: ignore[union-attr]
                reference.write(b"still")
            assert owner.ask("pairs[0][1].recv(10).decode()") == "still"
            with runtime.address(unknown) as reference:  # type: ignore[union-attr]
                reference.write(b"first")
            assert owner.ask("pairs[1][1].recv(10).decode()") == "first"
            with (
                runtime.address(lost) as reference,  # type: ignore[union-attr]
                pytest.raises(shmsock.DescriptorError, match="shmsock ps"),
            ):
                reference.write(b"no")
            assert runtime.set_failed(unknown, 5, "even without a host")
            owner.run("assert pairs[1][1].recv(10) == b''")
    assert shmsock.clean(name)


def test_two_runtimes_in_one_process_keep_their_sockets_apart(name: str) -> None:
    with (
        shmsock.Runtime.create(f"{name}-a", slots=16, stripes=2) as one,
        shmsock.Runtime.create(f"{name}-b", slots=16, stripes=2) as two,
        shmsock.Runtime.attach(f"{name}-a") as again,
    ):
        pairs = [connected("unix") for _ in range(2)]
        first, second = one.create_socket(pairs[0][0]), two.create_socket(pairs[1][0])
        assert two.address(first) is None
        assert one.address(second) is None
        with again.address(first) as reference:  # type: ignore[union-attr]
            reference.write(b"first")
        with two.address(second) as reference:  # type: ignore[union-attr]
            reference.write(b"second")
        assert pairs[0][1].recv(10) == b"first"
        assert pairs[1][1].recv(10) == b"second"
        assert sorted(info.index for info in one.processes()) == [one.index, again.index]
        again.close()
        assert one.status(first) is shmsock.Status.LIVE
        assert [info.index for info in one.processes()] == [one.index]
        assert one.audit() == two.audit() == []
        for _, peers in pairs:
            peers.close()


def test_a_failed_set_failed_hint_leaks_no_descriptor(name: str) -> None:
    with Peer() as host:
        host.run(f"import shmsock; rt = shmsock.Runtime.create({name!r}, slots=64)")
        with Peer(name) as owner, shmsock.Runtime.attach(name) as runtime:
            owner.run("import socket; a, b = socket.socketpair(); sid = rt.create_socket(a)")
            with runtime.address(owner.ask("sid")) as reference:  # type: ignore[union-attr]
                reference.fileno()
            (fetcher,) = runtime._descriptors._idle_fetchers
            host.kill()
            assert runtime.set_failed(owner.ask("sid"), 5, "x")
            assert runtime._descriptors._idle_fetchers == []
            assert fetcher.fileno() == -1
    assert shmsock.clean(name)


# -- what is said about a socket -----------------------------------------------------------------


def test_kinds_and_peers_are_told_as_people_read_them() -> None:
    ours, peers = connected()
    with ours, peers, socket.socket() as listener, socket.socket(type=socket.SOCK_DGRAM) as udp:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        names = [shmsock.KIND_NAMES[kind_of(each)] for each in (ours, listener, udp)]
        assert names == ["tcp", "listener", "udp"]
        assert peer_of(ours) == f"127.0.0.1:{peers.getsockname()[1]}"
        assert peer_of(listener) == ""
    ours, peers = connected("unix")
    with ours, peers:
        assert shmsock.KIND_NAMES[kind_of(ours)] == "unix"
        assert peer_of(ours) == "unix:-"


def test_a_peer_with_a_name_that_is_not_text_can_be_created(
    runtime: shmsock.Runtime, tmp_path: object
) -> None:
    path = os.fsencode(str(tmp_path)) + b"/\xff"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        server = socket.socket(socket.AF_UNIX)
        server.connect(path)
        client = listener.accept()[0]
        sid = runtime.create_socket(server)
        with client, runtime.address(sid) as reference:  # type: ignore[union-attr]
            assert reference.peer.startswith("unix:")


def test_the_messages_of_the_channel_name_the_types_that_carry_descriptors() -> None:
    kept = {channel.PUT, channel.GOT, channel.PASS, channel.KEEP}
    assert kept == channel.WITH_DESCRIPTORS
