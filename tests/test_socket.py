"""A socket in several processes: created in one, used in another, failed in a third."""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import socket
import threading

import pytest

import shmsock
from shmsock.layout import FREE, SLOT_BITS, SLOT_MASK, recycled_version

from .helpers import Forked, Peer, connected, holders_of, read_to_end, wait_until

KINDS = ["tcp", "unix"]


def cells_of(runtime: shmsock.Runtime, sid: int) -> tuple[int, int, int]:
    """State, version and nref of an id's slot."""
    cells, slot = runtime._segment.cells, sid & SLOT_MASK
    word = cells.versioned_ref[slot]
    return cells.state[slot], word >> SLOT_BITS, word & SLOT_MASK


def is_recycled(runtime: shmsock.Runtime, sid: int) -> bool:
    return cells_of(runtime, sid) == (FREE, recycled_version((sid >> SLOT_BITS) + 1), 0)


# -- create in A, address in B, set_failed in C, wait in D ---------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_many_racers_fails_a_socket_for_everybody(
    runtime: shmsock.Runtime, kind: str
) -> None:
    with Peer(runtime.name) as a, Peer(runtime.name) as b, Peer(runtime.name) as d:
        ours, peers = connected(kind, 8192)
        sid = runtime.create_socket(ours)
        with peers:
            inode = int(runtime.sockets()["inode"][0])
            a.run(f"idle = rt.address({sid}); idle.fileno(); idle.close()")
            b.run(f"ref = rt.address({sid}); ref.write(b'hello')")
            assert peers.recv(5, socket.MSG_WAITALL) == b"hello"
            d.run(f"ref = rt.address({sid}); ref.write(bytes(1 << 20))")
            assert d.ask("ref.unwritten_bytes()") > 0
            d.run("assert ref.wait_writable(0.0) is False")
            d.start(
                """
                try: ref.wait_writable(); found = "writable"
                except shmsock.SocketFailedError as error: found = [error.code, error.text]
                """
            )
            gate_read, gate_write = os.pipe()

            def race() -> bool:
                runtime.status(sid)  # attached, before the gate opens
                os.close(gate_write)
                os.read(gate_read, 1)
                won = runtime.set_failed(sid, errno.ECONNABORTED, f"by {os.getpid()}")
                assert runtime.address(sid) is None
                return won

            racers = [Forked(race) for _ in range(6)]
            wait_until(lambda: len(runtime.processes()) == 4 + 6)
            os.close(gate_write)
            os.close(gate_read)
            winners = [racer.pid for racer in racers if racer.result()]
            assert len(winners) == 1
            assert runtime.address(sid) is None
            assert a.ask(f"rt.address({sid})") is None
            assert b.ask(f"rt.address({sid})") is None
            d.finish()
            told = [errno.ECONNABORTED, f"by {winners[0]}"]
            assert d.ask("found") == told
            assert b.ask("ref.error") == told
            assert b.ask("ref.failed")
            assert d.ask(f"rt.address({sid})") is None
            assert set(read_to_end(peers)) <= {0}

            wait_until(lambda: runtime.attached(sid) == [b.ask("rt.index"), d.ask("rt.index")])
            assert cells_of(runtime, sid)[1:] == ((sid >> SLOT_BITS) + 1, 2)
            assert runtime.status(sid) is shmsock.Status.FAILED
            everybody = [os.getpid(), a.pid, b.pid, d.pid]
            d.run("ref.close()")
            b.run("ref.close()")
            wait_until(lambda: is_recycled(runtime, sid))
            assert runtime.status(sid) is shmsock.Status.GONE
            wait_until(lambda: holders_of(inode, everybody) == [])
            assert runtime.audit() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_never_had_the_descriptor_fails_the_socket_and_exits(
    runtime: shmsock.Runtime, kind: str
) -> None:
    ours, peers = connected(kind)
    sid = runtime.create_socket(ours)
    inode = int(runtime.sockets()["inode"][0])
    with peers, Peer(runtime.name) as idle:
        idle.run(f"ref = rt.address({sid}); ref.fileno(); ref.close()")
        with Peer(runtime.name) as brief:
            assert brief.ask(f"rt.set_failed({sid}, 42, 'short-lived')")
            assert holders_of(inode, [brief.pid]) == []
        assert read_to_end(peers) == b""
        wait_until(lambda: is_recycled(runtime, sid))
        wait_until(lambda: holders_of(inode, [os.getpid(), idle.pid]) == [])


def test_a_winner_killed_before_it_could_end_the_connection_is_made_good(
    runtime: shmsock.Runtime,
) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    with peers, Peer(runtime.name) as winner:
        assert winner.ask(f"rt._engine.set_failed({sid}, 42, 'and no more')")  # the table alone
        winner.kill()
        assert read_to_end(peers) == b""
        wait_until(lambda: is_recycled(runtime, sid))


@pytest.mark.parametrize("what", ["udp", "listener"])
def test_set_failed_is_felt_by_datagram_and_listening_sockets(
    runtime: shmsock.Runtime, what: str
) -> None:
    made = socket.socket(type=socket.SOCK_DGRAM if what == "udp" else socket.SOCK_STREAM)
    made.bind(("127.0.0.1", 0))
    where = made.getsockname()
    if what == "listener":
        made.listen()
    sid = runtime.create_socket(made)
    inode = int(runtime.sockets()["inode"][0])
    assert shmsock.KIND_NAMES[runtime.sockets()["kind"][0]] == what
    with Peer(runtime.name) as waiting, Peer(runtime.name) as failing:
        waiting.run(
            f"""
            import select
            ref = rt.address({sid})
            poller = select.poll(); poller.register(ref.fileno(), select.POLLIN)
            """
        )
        waiting.start("poller.poll(60000)", "ask")
        assert failing.ask(f"rt.set_failed({sid}, 5, 'x')")
        assert waiting.finish()[0][1] & select.POLLHUP
        waiting.run("ref.close()")
        wait_until(lambda: holders_of(inode, [os.getpid(), waiting.pid, failing.pid]) == [])
        wait_until(lambda: is_recycled(runtime, sid))
    if what == "listener":
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(where)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graceful_close_reaches_the_peer_after_the_last_byte_though_duplicates_idle(
    runtime: shmsock.Runtime, kind: str
) -> None:
    ours, peers = connected(kind, 8192)
    sid = runtime.create_socket(ours)
    message = os.urandom(3 << 20)
    with Peer(runtime.name) as idle, peers:
        idle.run(f"ref = rt.address({sid}); ref.fileno(); ref.close()")
        os.kill(idle.pid, signal.SIGSTOP)  # it runs no code, and its duplicate is open
        try:
            with runtime.address(sid) as reference:  # type: ignore[union-attr]
                reference.write(message)
                assert reference.unwritten_bytes() > 0
                assert reference.release_additional_reference()
                assert not reference.release_additional_reference()
            assert runtime.status(sid) is shmsock.Status.LIVE, "addressable while bytes wait"
            with runtime.address(sid) as reference:  # type: ignore[union-attr]
                reference.write(b"the end")
            assert read_to_end(peers) == message + b"the end"
            wait_until(lambda: is_recycled(runtime, sid))
        finally:
            os.kill(idle.pid, signal.SIGCONT)


def test_a_release_without_anybody_attached_recycles_at_once(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    with runtime.address(sid) as reference:  # type: ignore[union-attr]
        other = reference.add_reference()
    assert other.release_additional_reference()
    assert runtime.address(sid) is not None
    other.close()
    assert is_recycled(runtime, sid)
    with peers:
        assert read_to_end(peers) == b""


def test_the_last_holder_of_a_released_socket_may_be_any_process(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    with peers, Peer(runtime.name) as last:
        last.run(f"ref = rt.address({sid})")  # and never had the descriptor
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            assert reference.release_additional_reference()
        assert select.select([peers], [], [], 0)[0] == []
        last.run("ref.close()")
        assert read_to_end(peers) == b""
        assert is_recycled(runtime, sid)


# -- stale ids -----------------------------------------------------------------------------------


def test_stale_and_made_up_ids_are_none_and_touch_nothing(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    first = runtime.create_socket(ours)
    peers.close()
    runtime.set_failed(first, 1, "x")
    lives = []
    for _ in range(runtime.slots):  # next-fit goes round: the slot is reused
        ours, peers = connected("unix")
        lives.append(runtime.create_socket(ours))
        peers.close()
    assert first & SLOT_MASK in {sid & SLOT_MASK for sid in lives}
    before = runtime._segment.columns.versioned_ref.copy()
    generator = random.Random(7)
    made_up = [
        first,
        first + (1 << SLOT_BITS),
        0,
        -1,
        1,
        1 << 63,
        (1 << 64) - 1,
        lives[0] + (2 << SLOT_BITS),
    ]
    made_up += [lives[0] | 1 << 63, (lives[0] >> 32 << 32) + runtime.slots, 1 << 100, -(1 << 70)]
    made_up += [generator.getrandbits(64) for _ in range(500)]
    for sid in made_up:
        assert runtime.address(sid) is None
        assert runtime.address_failed_as_well(sid) is None
        assert runtime.set_failed(sid, 1, "x") is False
        assert runtime.status(sid) is shmsock.Status.GONE
        assert runtime.attached(sid) == []
    assert (runtime._segment.columns.versioned_ref == before).all()
    assert runtime.audit() == []


# -- what a reference can do ----------------------------------------------------------------------


@pytest.fixture
def pair(runtime: shmsock.Runtime):  # type: ignore[no-untyped-def]
    ours, peers = connected()
    sid = runtime.create_socket(ours, b"greeting")
    with peers, runtime.address(sid) as reference:  # type: ignore[union-attr]
        yield reference, peers


def test_a_closed_reference_does_nothing_any_more(
    runtime: shmsock.Runtime, pair: tuple[shmsock.SocketRef, socket.socket]
) -> None:
    reference, peers = pair
    another = reference.add_reference()
    another.close()
    another.close()
    assert another.closed
    for use in (
        another.fileno,
        lambda: another.write(b"x"),
        lambda: another.recv(1),
        another.flush,
        another.wait_writable,
        another.add_reference,
    ):
        with pytest.raises(shmsock.ClosedError):
            use()
    reference.write(b"alive")
    assert peers.recv(10) == b"alive"


def test_user_data_is_kept_with_the_socket_and_seen_everywhere(
    runtime: shmsock.Runtime, pair: tuple[shmsock.SocketRef, socket.socket]
) -> None:
    reference, _ = pair
    assert reference.user_data == b"greeting"
    with Peer(runtime.name) as other:
        other.run(f"ref = rt.address({reference.id})")
        for data in (b"", b"x", bytes(range(1, 65))):
            reference.user_data = data
            assert reference.user_data == data
            assert bytes.fromhex(other.ask("ref.user_data.hex()")) == data
            assert runtime.sockets()["user_data"][0] == data
        with pytest.raises(ValueError, match="64"):
            reference.user_data = bytes(65)
        assert len(reference.user_data) == 64
        other.run("ref.close()")
    with socket.socket() as mine, pytest.raises(ValueError, match="64"):
        runtime.create_socket(mine, bytes(65))


def test_a_reader_of_user_data_never_sees_half_of_a_change(
    pair: tuple[shmsock.SocketRef, socket.socket],
) -> None:
    reference, _ = pair
    reference.user_data = b"a" * 64
    done = threading.Event()

    def change() -> None:
        for number in range(300):
            reference.user_data = b"ab"[number % 2 : number % 2 + 1] * 64
        done.set()

    thread = threading.Thread(target=change)
    thread.start()
    while not done.is_set():
        assert len(set(reference.user_data)) == 1
    thread.join()


def test_reading_counts_and_tells_nothing_yet_from_the_end(
    runtime: shmsock.Runtime, pair: tuple[shmsock.SocketRef, socket.socket]
) -> None:
    reference, peers = pair
    with pytest.raises(BlockingIOError):
        reference.recv(10)
    peers.sendall(b"0123456789")
    wait_until(lambda: select.select([reference.fileno()], [], [], 0)[0])
    assert reference.recv(4) == b"0123"
    assert reference.recv(100) == b"456789"
    reference.count_messages(2)
    row = runtime.sockets()[0]
    assert (row["bytes_in"], row["messages_in"]) == (10, 2)
    assert row["read_ns"] >= row["created_ns"] > 0
    reference.busy = True
    assert reference.busy
    assert runtime.sockets()["busy"][0] == 1
    reference.busy = False
    peers.shutdown(socket.SHUT_WR)
    wait_until(lambda: select.select([reference.fileno()], [], [], 0)[0])
    assert reference.recv(10) == b""


def test_a_read_takes_no_more_than_was_asked_for_and_refuses_sizes_that_are_none(
    runtime: shmsock.Runtime,
) -> None:
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)
    reference = runtime.address(sid)
    assert reference is not None
    with peers, reference:
        much = bytes(range(256)) * 400
        peers.sendall(much)
        assert reference.recv(0) == b""
        with pytest.raises(ValueError, match="negative"):
            reference.recv(-1)
        with pytest.raises(TypeError):
            reference.recv("4")  # type: ignore[arg-type]
        assert int(runtime.sockets()["bytes_in"][0]) == 0
        assert reference.recv(100_000) == much[:100_000]  # more than the C engine's buffer
        room = bytearray(1_000)
        assert reference.recv_into(room) == 1_000
        assert reference.recv(65_536) == much[101_000:]
        assert bytes(room) == much[100_000:101_000]
        assert int(runtime.sockets()["bytes_in"][0]) == len(much)


def test_busy_and_the_count_of_messages_are_seen_by_others(runtime: shmsock.Runtime) -> None:
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)
    reference = runtime.address(sid)
    assert reference is not None
    with peers, reference, Peer(runtime.name) as b:
        assert not b.ask(f"rt.address({sid}).busy")
        reference.busy = True
        reference.count_messages(3)
        reference.count_messages(2)
        assert b.ask(f"rt.address({sid}).busy") is True
        reference.busy = False
        assert b.ask(f"rt.address({sid}).busy") is False
        assert int(runtime.sockets()["messages_in"][0]) == 5
        with pytest.raises(TypeError):
            reference.count_messages("1")  # type: ignore[arg-type]
        assert int(runtime.sockets()["messages_in"][0]) == 5
    runtime.close()
    with pytest.raises(shmsock.ClosedError):
        reference.busy = True
    with pytest.raises(shmsock.ClosedError):
        assert reference.busy
    with pytest.raises(shmsock.ClosedError):
        reference.count_messages(1)


def test_data_that_came_before_a_failure_stays_readable(
    runtime: shmsock.Runtime, pair: tuple[shmsock.SocketRef, socket.socket]
) -> None:
    reference, peers = pair
    peers.sendall(b"last words")
    wait_until(lambda: select.select([reference.fileno()], [], [], 0)[0])
    assert reference.error == (0, "")
    assert reference.set_failed(errno.EPERM, "kicked")
    assert not reference.set_failed(errno.EIO, "again")
    assert reference.error == (errno.EPERM, "kicked")
    assert reference.recv(100) == b"last words"
    for use in (lambda: reference.write(b"x"), reference.flush, reference.wait_writable):
        with pytest.raises(shmsock.SocketFailedError, match="kicked") as caught:
            use()
        assert (caught.value.code, caught.value.text) == (errno.EPERM, "kicked")
    assert runtime.address(reference.id) is None
    with runtime.address_failed_as_well(reference.id) as failed:  # type: ignore[union-attr]
        assert failed.failed


def test_an_error_code_that_does_not_fit_breaks_nothing(
    runtime: shmsock.Runtime, pair: tuple[shmsock.SocketRef, socket.socket]
) -> None:
    reference, _ = pair
    for code in (1 << 31, -(1 << 40)):
        with pytest.raises(ValueError, match="32 bits"):
            reference.set_failed(code, "x")
    with pytest.raises(TypeError):
        runtime.set_failed(reference.id, "not a number", "x")  # type: ignore[arg-type]
    assert not reference.failed
    assert runtime.audit() == []
    assert reference.set_failed(7, "é" * 200)
    code, text = reference.error
    assert (code, text.rstrip("\ufffd")) == (7, "é" * 48)


def test_the_error_is_known_after_recycling_until_the_slot_is_used_again(
    runtime: shmsock.Runtime,
) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    peers.close()
    runtime.set_failed(sid, errno.EPERM, "kicked")
    assert is_recycled(runtime, sid)
    assert runtime._io.error_of(sid) == (errno.EPERM, "kicked")
    assert runtime._io.error_of(sid + (2 << SLOT_BITS))[0] == errno.ENOTCONN
    for _ in range(runtime.slots):
        ours, peers = connected("unix")
        runtime.create_socket(ours)
        peers.close()
    assert runtime._io.error_of(sid)[0] == errno.ENOTCONN


def test_references_are_inert_after_their_runtime_closed(name: str) -> None:
    with shmsock.Runtime.create(name, slots=16, stripes=2) as runtime:
        ours, peers = connected()
        reference = runtime.address(runtime.create_socket(ours))
        assert reference is not None
    with peers:
        assert read_to_end(peers) == b""
    assert reference.failed
    for use in (
        reference.fileno,
        lambda: reference.write(b"x"),
        lambda: reference.recv(1),
        lambda: reference.peer,
        lambda: reference.user_data,
        lambda: reference.busy,
        lambda: reference.set_failed(1, "x"),
        lambda: runtime.address(reference.id),
    ):
        with pytest.raises(shmsock.ClosedError):
            use()
    reference.close()
