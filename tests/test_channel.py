"""The control channel's messages, and what a host does with peers that are hostile or slow."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shmsock
from shmsock import channel

from .helpers import Forked, Peer, connected, descriptors, wait_until

IDS = st.lists(st.integers(0, (1 << 64) - 1), max_size=channel.MAX_IDS)


def seqpacket_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def dial(runtime: shmsock.Runtime) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(30)
    sock.connect(runtime._segment.control_address())
    return sock


def hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(4096) == b""
    except ConnectionError:
        return True


# -- messages -----------------------------------------------------------------------------------


@given(
    kind=st.integers(channel.HELLO, channel.FAILED), ids=IDS, code=st.integers(-(2**31), 2**31 - 1)
)
def test_what_was_packed_unpacks_to_the_same(kind: int, ids: list[int], code: int) -> None:
    assert channel.unpack(channel.pack(kind, ids, code)) == (kind, code, tuple(ids))


@given(data=st.binary(max_size=4096))
def test_random_bytes_are_a_bad_message_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(channel.BadMessageError):
        kind, code, ids = channel.unpack(data)
        assert channel.pack(kind, ids, code)[:5] == data[:5]


@given(ids=IDS, cut=st.integers(1, 40), more=st.binary(min_size=1, max_size=16))
def test_a_truncated_or_lengthened_message_is_refused(
    ids: list[int], cut: int, more: bytes
) -> None:
    whole = channel.pack(channel.GET, ids)
    for data in (whole[:-cut], whole + more):
        with pytest.raises(channel.BadMessageError):
            channel.unpack(data)


def test_253_descriptors_travel_in_one_message_close_on_exec() -> None:
    ours, peers = seqpacket_pair()
    read, write = os.pipe()
    with ours, peers:
        ids = list(range(1, channel.MAX_IDS + 1))
        channel.send(ours, channel.GOT, ids, [read] * len(ids))
        message = channel.receive(peers)
        assert message is not None
        assert message.ids == tuple(ids)
        assert len(message.descriptors) == len(ids)
        assert not any(map(os.get_inheritable, message.descriptors))
        channel.close_all(message.descriptors)
    os.close(read)
    os.close(write)


def test_more_descriptors_than_ids_are_closed_and_refused() -> None:
    ours, peers = seqpacket_pair()
    with ours, peers:
        rights = array.array("i", [ours.fileno()] * 3)
        for kind in (channel.GOT, channel.HELLO):
            before = len(descriptors())
            ours.sendmsg(
                [channel.pack(kind, [7, 8])], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            )
            with pytest.raises(channel.BadMessageError):
                channel.receive(peers)
            assert len(descriptors()) == before


def test_the_end_of_the_stream_is_none_and_no_message_yet_raises() -> None:
    ours, peers = seqpacket_pair()
    with peers:
        with pytest.raises(BlockingIOError):
            channel.receive(peers)
        ours.close()
        assert channel.receive(peers) is None


def test_a_link_sends_every_message_once_when_several_threads_tell() -> None:
    ours, peers = seqpacket_pair()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    with ours, peers:
        link = channel.Link(
            ours, lambda *_: None, lambda _: None, lambda _: -1, lambda *_: None, lambda _: None
        )
        told = [[caller << 32 | number for number in range(300)] for caller in range(4)]

        def tell(ids: list[int]) -> None:
            for sid in ids:
                assert link.tell(channel.FAILED, [sid])

        threads = [threading.Thread(target=tell, args=(ids,)) for ids in told]
        for thread in threads:
            thread.start()
        heard: list[int] = []
        peers.settimeout(30)
        while len(heard) < 1200:
            while not select.select([peers], [], [], 0)[0]:
                link.flush()
            message = channel.receive(peers)
            assert message is not None
            heard += message.ids
        for thread in threads:
            thread.join()
        assert sorted(heard) == sorted(sid for ids in told for sid in ids)
        for caller, ids in enumerate(told):
            assert [sid for sid in heard if sid >> 32 == caller] == ids


def test_a_full_link_drops_says_so_and_counts_as_stuck_only_after_its_time() -> None:
    ours, peers = seqpacket_pair()
    ours.setblocking(False)
    with ours, peers:
        link = channel.Link(
            ours, lambda *_: None, lambda _: None, lambda _: -1, lambda *_: None, lambda _: None
        )
        sent = 0
        while link.tell(channel.FAILED, [1]):
            sent += 1
        assert sent >= channel._QUEUE_LIMIT
        assert link.full_since > 0
        assert not link.is_stuck()
        link.full_since -= channel._STUCK_AFTER_S + 1
        assert link.is_stuck()
        assert channel.receive(peers) is not None
        link.flush()
        assert not link.is_stuck()


def test_a_descriptor_closed_before_it_is_sent_answers_no_and_keeps_the_link() -> None:
    ours, peers = seqpacket_pair()
    ours.setblocking(False)
    read, write = os.pipe()
    closed = os.dup(read)
    os.close(closed)
    with ours, peers:
        numbers = {1: read, 2: closed, 3: -1}
        link = channel.Link(
            ours,
            lambda *_: None,
            lambda _: None,
            numbers.__getitem__,
            lambda *_: None,
            lambda _: None,
        )
        assert link.tell(channel.GOT, [1, 2, 3])
        got, refused = channel.receive(peers), channel.receive(peers)
        assert got is not None
        assert refused is not None
        assert (got.type, got.ids, len(got.descriptors)) == (channel.GOT, (1,), 1)
        assert (refused.type, refused.ids) == (channel.GET_NO, (2, 3))
        channel.close_all(got.descriptors)
    os.close(read)
    os.close(write)


# -- hostile peers of a host --------------------------------------------------------------------


def hello(runtime: shmsock.Runtime) -> tuple[int, int, int]:
    return runtime._descriptors._hello


GARBAGE = {
    "nothing of ours": b"GET / HTTP/1.1\r\n\r\n",
    "a wrong magic": b"\0" * 12,
    "an unknown type": channel.pack(channel.HELLO, []).replace(b"\x01", b"\x7f", 1),
    "a lie about its length": channel.pack(channel.GET, [1, 2, 3])[:-8],
    "too long": channel.pack(channel.GET, range(channel.MAX_IDS)) + b"x" * 9000,
}


@pytest.mark.parametrize("greeted", [False, True], ids=["stranger", "participant"])
@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_with_descriptors_attached_is_hung_up_on_and_leaks_nothing(
    runtime: shmsock.Runtime, what: str, greeted: bool
) -> None:
    with dial(runtime) as sock:
        if greeted:
            channel.send(sock, channel.HELLO, hello(runtime), code=1)
        wait_until(lambda: len(runtime._store._peers) == 1)  # type: ignore[union-attr]
        before = len(descriptors())
        rights = array.array("i", [sock.fileno()] * 20)
        sock.sendmsg([GARBAGE[what]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert hung_up(sock)
        wait_until(lambda: len(descriptors()) == before - 1)  # the host's end of this connection


@pytest.mark.parametrize("field", range(3), ids=["inode", "index", "epoch"])
def test_a_hello_that_does_not_fit_the_segment_is_hung_up_on(
    runtime: shmsock.Runtime, field: int
) -> None:
    for wrong in (1 << 63, 9):
        greeting = list(hello(runtime))
        greeting[field] += wrong
        with dial(runtime) as sock:
            channel.send(sock, channel.HELLO, greeting)
            assert hung_up(sock)


@pytest.mark.parametrize(
    "kind", [channel.PUT_OK, channel.GOT, channel.PASS, channel.GET_NO, channel.HELLO]
)
def test_a_message_that_only_a_host_sends_is_hung_up_on(
    runtime: shmsock.Runtime, kind: int
) -> None:
    with dial(runtime) as sock:
        channel.send(sock, channel.HELLO, hello(runtime), code=1)
        rights = [sock.fileno()] if kind in channel.WITH_DESCRIPTORS else []
        channel.send(sock, kind, [1], rights)
        assert hung_up(sock)


def test_strange_ids_are_answered_and_touch_nothing(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    strange = [0, 1, sid + 1, sid | 1 << 63, sid + (1 << 32), (1 << 64) - 1, 0xFFFFFFFF]
    with peers, dial(runtime) as sock:
        channel.send(sock, channel.HELLO, hello(runtime), code=1)
        channel.send(sock, channel.GET, strange)
        answer = channel.receive(sock, 0)
        assert answer is not None
        assert (answer.type, set(answer.ids)) == (channel.GET_NO, set(strange))
        channel.send(sock, channel.PUT, strange, [sock.fileno()] * len(strange))
        answer = channel.receive(sock, 0)
        assert answer is not None
        assert (answer.type, set(answer.ids)) == (channel.PUT_OK, set(strange))
        channel.send(sock, channel.FAILED, [sid, *strange])
        channel.send(sock, channel.GET, [sid])
        answer = channel.receive(sock, 0)
        assert answer is not None
        assert answer.type == channel.GOT, "a hint drops nothing that lives"
        assert os.fstat(answer.descriptors[0]).st_ino == runtime.sockets()["inode"][0]
        channel.close_all(answer.descriptors)
        assert runtime.status(sid) is shmsock.Status.LIVE


def test_another_file_put_for_a_live_socket_is_not_kept(runtime: shmsock.Runtime) -> None:
    with Peer(runtime.name) as creator:
        creator.run(
            """
            import socket
            rt._descriptors.put = lambda sid: None       # so that only we put something
            a, b = socket.socketpair(); sid = rt.create_socket(a)
            """
        )
        sid = creator.ask("sid")
        read, write = os.pipe()
        with dial(runtime) as sock:
            channel.send(sock, channel.HELLO, hello(runtime), code=1)
            channel.send(sock, channel.PUT, [sid], [read])
            assert channel.receive(sock, 0) is not None
            assert runtime._store is not None
            assert runtime._store.duplicate(sid) == -1
        os.close(read)
        os.close(write)


def test_a_peer_that_never_reads_does_not_stall_the_host(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    with peers, dial(runtime) as deaf, Peer(runtime.name) as other:
        channel.send(deaf, channel.HELLO, hello(runtime), code=1)
        deaf.settimeout(0.5)
        with contextlib.suppress(TimeoutError, ConnectionError):
            for _ in range(3000):  # its own receive buffer fills; the host's queue for it too
                channel.send(deaf, channel.GET, [sid], flags=0)
        assert other.ask(f"rt.address({sid}).fileno()") > 0


def test_a_stuck_peer_is_hung_up_on_by_the_sweep(runtime: shmsock.Runtime) -> None:
    store = runtime._store
    assert store is not None
    with dial(runtime) as deaf:
        channel.send(deaf, channel.HELLO, hello(runtime), code=1)
        wait_until(lambda: store._peers and all(link.index >= 0 for link in store._peers))
        (link,) = store._peers
        link.full_since = 1e-9  # for ever
        runtime._service.call_soon(store.sweep)
        assert hung_up(deaf)
        wait_until(lambda: not store._peers)  # told after the number is closed


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused(runtime: shmsock.Runtime) -> None:
    address = runtime._segment.control_address()
    os.chmod(runtime.run_directory, 0o777)  # so that the channel itself has to refuse
    os.chmod(address, 0o777)

    def intrude() -> list[str]:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        found = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(30)
            sock.connect(address)
            with contextlib.suppress(BrokenPipeError):
                channel.send(sock, channel.HELLO, hello(runtime))
            found.append("hung up" if hung_up(sock) else "served")
        try:
            shmsock.Runtime.attach(runtime.name)
        except PermissionError as error:
            found.append(errno.errorcode[error.errno or 0])
        return found

    assert Forked(intrude).result() == ["hung up", "EACCES"]


def test_a_refusal_that_comes_late_does_not_fail_what_another_process_owns_by_now(
    runtime: shmsock.Runtime,
) -> None:
    ours, peers = connected()
    with peers, Peer(runtime.name, "worker") as worker, dial(runtime) as sock:
        sid = runtime.create_socket(ours)
        word, cells = runtime._engine.word, runtime._segment.cells
        (_, index) = (row.index for row in runtime.processes())
        theirs = runtime._word_of(index)
        channel.send(sock, channel.HELLO, worker.ask("rt._descriptors._hello"), code=1)
        for owner, status in ((word, shmsock.Status.LIVE), (theirs, shmsock.Status.GONE)):
            cells.owner[sid & 0xFFFFFFFF] = owner
            channel.send(sock, channel.PASS_NO, [sid, sid + 1, (1 << 64) - 1])
            channel.send(sock, channel.GET, [0])  # its answer: what came before was heard
            answer = channel.receive(sock, 0)
            assert answer is not None
            assert answer.type == channel.GET_NO
            assert runtime.status(sid) is status
