"""The messenger alone: which protocol gets which bytes, when a connection is busy, how it ends.

The protocols here do as they are told; the dispatcher, the runtime and the sockets are real.
"""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import socket
import threading

import pytest

import shmsock
from workers.messenger import Messenger

from .helpers import Peer, connected, read_to_end, wait_until

MUCH = 700_000  # more than the kernel takes at once


class Lines:
    """A protocol of lines: each is answered with itself; some do something."""

    def __init__(self, name: str, head: bytes) -> None:
        self.name = name
        self.head = head
        self.sessions: list[LineSession] = []
        self.asked: list[bytes] = []

    def resumes(self, user_data: bytes) -> bool:
        return False

    def match(self, head: bytes) -> bool | None:
        self.asked.append(head)
        if len(head) < len(self.head):
            return None if self.head.startswith(head) else False
        return head.startswith(self.head)

    def open(self, ref: shmsock.SocketRef) -> LineSession:
        self.sessions.append(LineSession(self))
        return self.sessions[-1]


class LineSession:
    def __init__(self, protocol: Lines) -> None:
        self.protocol = protocol
        self.buffer = b""
        self.lines: list[bytes] = []
        self.ended: list[int] = []
        self.gone: list[int] = []
        self.stays = False

    def receive(self, ref: shmsock.SocketRef, data: bytes) -> bool:
        self.buffer += data
        *lines, self.buffer = self.buffer.split(b"\n")
        self.lines += lines
        answers: list[bytes] = []
        for line in lines:
            if line == b"raise":
                raise ZeroDivisionError
            if line == b"much":
                ref.write(b"m" * MUCH)
                continue
            if line == b"quit":
                ref.write(b"".join(answers), b"bye\n")
                return False
            answers.append(line + b"\n")
        if answers:
            ref.write(b"".join(answers))
        return True

    def idle(self) -> bool:
        return not self.buffer

    def messages(self) -> int:
        return len(self.lines)

    def movable(self) -> bool:
        return not self.stays

    def peer_ended(self, ref: shmsock.SocketRef) -> None:
        pass

    def moved(self, sid: int) -> None:
        self.gone.append(sid)

    def end(self, sid: int) -> None:
        self.ended.append(sid)


class Bench:
    """A messenger with two protocols, driven by hand."""

    def __init__(self, runtime: shmsock.Runtime) -> None:
        self.runtime = runtime
        self.dispatcher = shmsock.Dispatcher(runtime)
        self.first, self.rest = Lines("first", b"HEAD"), Lines("rest", b"")
        self.messenger = Messenger(runtime, self.dispatcher, (self.first, self.rest))
        self.peers: list[socket.socket] = []

    def connect(self, buffer_bytes: int = 0, kind: str = "tcp") -> tuple[int, socket.socket]:
        ours, peer = connected(kind, buffer_bytes)
        peer.setblocking(False)
        self.peers.append(peer)
        sid = self.runtime.create_socket(ours)
        self.messenger.take([sid])
        return sid, peer

    def run_until(self, condition: collections.abc.Callable[[], object], what: str = "") -> None:
        def look() -> object:
            for _ in range(20):
                self.dispatcher.run_once(0)
                if result := condition():
                    return result
            return None

        wait_until(look, what)

    def hear(self, peer: socket.socket, size: int) -> bytes:
        """Exactly so many bytes, with the loop running."""
        got = bytearray()

        def more() -> bool:
            with contextlib.suppress(BlockingIOError):
                got.extend(peer.recv(size - len(got)))
            return len(got) >= size

        self.run_until(more, f"{size} bytes")
        return bytes(got)

    def busy(self, sid: int) -> bool:
        rows = self.runtime.sockets()
        return bool(rows["busy"][rows["id"] == sid][0])


@pytest.fixture
def bench(runtime: shmsock.Runtime) -> collections.abc.Iterator[Bench]:
    made = Bench(runtime)
    yield made
    made.dispatcher.close()
    for peer in made.peers:
        peer.close()


def test_the_first_protocol_that_matches_gets_the_bytes_and_keeps_the_connection(
    bench: Bench,
) -> None:
    _, peer = bench.connect()
    peer.send(b"HEAD 1\n")
    assert bench.hear(peer, 7) == b"HEAD 1\n"
    peer.send(b"other\n")
    assert bench.hear(peer, 6) == b"other\n"
    assert bench.first.sessions[0].lines == [b"HEAD 1", b"other"]
    assert bench.rest.asked == []
    assert len(bench.first.asked) == 1


def test_a_later_protocol_waits_until_the_earlier_one_is_sure(bench: Bench) -> None:
    sid, peer = bench.connect()
    peer.send(b"HE")
    bench.run_until(lambda: bench.first.asked == [b"HE"])
    assert bench.busy(sid)
    assert not bench.rest.asked
    peer.send(b"LLO\n")
    assert bench.hear(peer, 6) == b"HELLO\n"
    assert bench.rest.sessions[0].lines == [b"HELLO"]
    assert not bench.busy(sid)


def test_what_no_protocol_wants_is_failed(bench: Bench) -> None:
    bench.rest.head = b"NEVER"
    sid, peer = bench.connect()
    with bench.runtime.address(sid) or pytest.fail("it lives") as ref:
        peer.send(b"x")
        bench.run_until(lambda: ref.failed)
        assert ref.error == (errno.EPROTO, "no protocol matches its first bytes")
    assert read_to_end(peer) == b""


def test_a_head_that_stays_unsure_is_not_collected_for_ever(bench: Bench) -> None:
    bench.first.match = lambda head: None  # type: ignore[method-assign]
    sid, peer = bench.connect()
    with bench.runtime.address(sid) or pytest.fail("it lives") as ref:

        def send() -> bool:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                peer.send(b"x" * 10_000)
            return ref.failed

        bench.run_until(send)
        assert ref.error[0] == errno.EPROTO


def test_busy_is_from_the_first_byte_of_a_message_to_the_last_of_its_answer(bench: Bench) -> None:
    sid, peer = bench.connect(4096)
    assert not bench.busy(sid)
    peer.send(b"mu")
    bench.run_until(lambda: bench.busy(sid))
    peer.send(b"ch\n")
    session = lambda: bench.rest.sessions[0]  # noqa: E731
    bench.run_until(lambda: session().lines)
    assert session().idle()
    assert bench.busy(sid)
    assert bench.hear(peer, MUCH) == b"m" * MUCH
    bench.run_until(lambda: not bench.busy(sid), "all is out")
    rows = bench.runtime.sockets()
    assert rows["messages_in"][rows["id"] == sid].tolist() == [1]


def test_looking_again_for_a_slow_reader_is_one_timer_not_one_a_read(bench: Bench) -> None:
    _, peer = bench.connect(4096)
    looks = []
    later = bench.dispatcher.call_later

    def count(delay_s: float, call: collections.abc.Callable[[], object]) -> object:
        looks.append(delay_s)
        return later(delay_s, call)

    bench.dispatcher.call_later = count  # type: ignore[method-assign,assignment]
    peer.send(b"much\n")
    bench.run_until(lambda: bench.rest.sessions and bench.rest.sessions[0].lines)
    for number in range(50):
        peer.send(b"x\n")
        bench.run_until(lambda n=number: len(bench.rest.sessions[0].lines) == n + 2)  # type: ignore[misc]
    # Fifty reads; each timer is a tenth of a second apart from the last.
    assert len(looks) < 25


# -- how often it is read -------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what was read, 0 for an end; -1 where there was nothing."""
    sizes: list[int] = []
    real = shmsock.SocketRef.recv

    def recv(ref: shmsock.SocketRef, size_bytes: int) -> bytes:
        try:
            data = real(ref, size_bytes)
        except BlockingIOError:
            sizes.append(-1)
            raise
        sizes.append(len(data))
        return data

    monkeypatch.setattr(shmsock.SocketRef, "recv", recv)
    return sizes


def test_a_request_costs_one_read(bench: Bench, reads: list[int]) -> None:
    _, peer = bench.connect()
    assert reads == [-1]  # the look when it came
    reads.clear()
    for number in range(5):
        peer.sendall(b"%d\n" % number)
        assert bench.hear(peer, 2) == b"%d\n" % number
    assert reads == [2] * 5


def test_what_is_longer_than_the_buffer_is_read_to_its_end(bench: Bench, reads: list[int]) -> None:
    _, peer = bench.connect()
    much = b"x" * 200_000 + b"\n"
    peer.setblocking(True)
    sender = threading.Thread(target=peer.sendall, args=(much,))
    sender.start()
    bench.run_until(lambda: not sender.is_alive(), "all of it is read")
    sender.join()
    peer.setblocking(False)
    assert bench.hear(peer, len(much)) == much
    assert sum(size for size in reads if size > 0) == len(much)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_an_end_that_came_with_the_last_bytes_is_not_missed(bench: Bench, kind: str) -> None:
    sid, peer = bench.connect(kind=kind)
    peer.sendall(b"one\n")
    peer.shutdown(socket.SHUT_WR)
    assert bench.hear(peer, 4) == b"one\n"
    bench.run_until(lambda: not len(bench.messenger), "the connection has ended")
    assert bench.runtime.status(sid) is shmsock.Status.GONE
    assert read_to_end(peer) == b""


def test_an_end_that_comes_after_a_short_read_is_an_event_of_its_own(bench: Bench) -> None:
    _, peer = bench.connect()
    peer.sendall(b"one\n")
    assert bench.hear(peer, 4) == b"one\n"
    peer.shutdown(socket.SHUT_WR)
    bench.run_until(lambda: not len(bench.messenger), "the connection has ended")


def test_what_is_behind_an_urgent_byte_is_read_in_the_same_turn(bench: Bench) -> None:
    # A read of TCP stops short there, and what was behind is no new event.
    _, peer = bench.connect()
    peer.sendall(b"one\n")
    peer.send(b"!", socket.MSG_OOB)
    peer.sendall(b"two\n")
    assert bench.hear(peer, 8) == b"one\ntwo\n"


def test_what_is_behind_a_message_with_descriptors_is_read_in_the_same_turn(bench: Bench) -> None:
    # A read of a unix socket stops short there.
    _, peer = bench.connect(kind="unix")
    socket.send_fds(peer, [b"one\n"], [0])
    peer.sendall(b"two\n")
    assert bench.hear(peer, 8) == b"one\ntwo\n"


def test_a_connection_that_is_finished_outside_an_event_is_read_until_there_is_nothing(
    bench: Bench, reads: list[int]
) -> None:
    _, peer = bench.connect()
    peer.sendall(b"one\n")
    peer.shutdown(socket.SHUT_WR)
    bench.messenger.drain()
    assert reads[-1] in (-1, 0)
    assert read_to_end(peer) == b"one\n"


# -- how it ends ----------------------------------------------------------------------------------


def test_a_session_that_is_done_is_closed_after_its_last_byte(bench: Bench) -> None:
    sid, peer = bench.connect()
    peer.send(b"a\nquit\nb\n")
    bench.run_until(lambda: len(bench.messenger) == 0)
    assert read_to_end(peer) == b"a\nbye\n"
    assert bench.rest.sessions[0].ended == [sid]
    assert bench.runtime.in_use() == 0


def test_the_end_of_the_stream_closes_after_the_last_byte(bench: Bench) -> None:
    sid, peer = bench.connect(4096)
    peer.send(b"much\nx\n")
    peer.shutdown(socket.SHUT_WR)
    bench.run_until(lambda: bench.rest.sessions)
    assert bench.hear(peer, (MUCH) + 2) == b"m" * MUCH + b"x\n"
    bench.run_until(lambda: len(bench.messenger) == 0)
    assert read_to_end(peer) == b""
    assert bench.rest.sessions[0].ended == [sid]


def test_a_session_that_raises_loses_its_connection_and_no_other(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    sid, peer = bench.connect()
    _, other = bench.connect()
    with bench.runtime.address(sid) or pytest.fail("it lives") as ref:
        peer.send(b"raise\n")
        bench.run_until(lambda: ref.failed)
        assert "ZeroDivisionError" in ref.error[1]
    assert "ZeroDivisionError" in caplog.text
    other.send(b"x\n")
    assert bench.hear(other, 2) == b"x\n"
    bench.run_until(lambda: len(bench.messenger) == 1)
    assert bench.rest.sessions[0].ended == [sid]


def test_too_much_unwritten_fails_the_connection(name: str) -> None:
    with shmsock.Runtime.create(name, slots=64, max_unwritten_bytes=1 << 20) as runtime:
        bench = Bench(runtime)
        sid, peer = bench.connect(4096)
        with runtime.address(sid) or pytest.fail("it lives") as ref:
            peer.send(b"much\nmuch\n")
            bench.run_until(lambda: ref.failed)
            assert ref.error[0] == errno.ENOBUFS
        peer.close()
        bench.run_until(lambda: len(bench.messenger) == 0)
        bench.dispatcher.close()


def test_one_connection_that_cannot_be_watched_does_not_keep_the_others_out(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    add = bench.dispatcher.add_consumer
    made = [connected() for _ in range(3)]
    ids = [bench.runtime.create_socket(ours) for ours, _ in made]
    bench.peers += [peer for _, peer in made]

    def refuse(sid: int, *callbacks: collections.abc.Callable[..., object]) -> bool:
        if sid == ids[1]:
            raise shmsock.DescriptorError("none is left")
        return add(sid, *callbacks)

    bench.dispatcher.add_consumer = refuse  # type: ignore[method-assign,assignment]
    bench.messenger.take(ids)
    assert len(bench.messenger) == 2
    assert "none is left" in caplog.text
    for _, peer in (made[0], made[2]):
        peer.setblocking(False)
        peer.send(b"x\n")
        assert bench.hear(peer, 2) == b"x\n"
    assert read_to_end(made[1][1]) == b""


def test_draining_closes_idle_connections_and_answers_what_has_come(bench: Bench) -> None:
    _, idle = bench.connect()
    _, asked = bench.connect()
    sid, halfway = bench.connect()
    halfway.send(b"half")
    bench.run_until(lambda: bench.busy(sid))
    asked.send(b"a\nb\n")  # sent before, not read yet
    bench.messenger.drain()
    assert read_to_end(asked) == b"a\nb\n"
    assert read_to_end(idle) == b""
    halfway.send(b" more\n")
    assert bench.hear(halfway, 10) == b"half more\n"
    bench.run_until(lambda: len(bench.messenger) == 0)
    assert read_to_end(halfway) == b""


def test_what_arrives_while_draining_is_closed_too(bench: Bench) -> None:
    bench.messenger.drain()
    _, late = bench.connect()
    bench.run_until(lambda: len(bench.messenger) == 0)
    assert read_to_end(late) == b""


def test_a_protocol_that_cannot_go_on_with_one_connection_keeps_the_others(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resumes(user_data: bytes) -> bool:
        raise ZeroDivisionError(user_data)

    monkeypatch.setattr(bench.first, "resumes", resumes)
    pairs = [connected("unix") for _ in range(2)]
    bench.peers += [peer for _, peer in pairs]
    pairs[1][1].setblocking(False)
    data = (b"left by another owner", b"")
    sids = [
        bench.runtime.create_socket(ours, each) for (ours, _), each in zip(pairs, data, strict=True)
    ]
    bench.messenger.take(sids)
    assert "cannot go on here" in caplog.text
    assert [bench.runtime.status(sid) for sid in sids] == [
        shmsock.Status.GONE,
        shmsock.Status.LIVE,
    ]
    pairs[1][1].sendall(b"hello\n")
    assert bench.hear(pairs[1][1], 6) == b"hello\n"
    bench.run_until(lambda: len(bench.messenger) == 1)


# -- moving -------------------------------------------------------------------------------------


@contextlib.contextmanager
def elsewhere(bench: Bench) -> collections.abc.Iterator[tuple[Peer, int]]:
    """A process that takes nothing by itself: what is offered to it stays offered."""
    with Peer(bench.runtime.name, role="worker") as peer:
        yield peer, peer.ask("rt.index")


def heir_of(bench: Bench, sid: int) -> int:
    return int(bench.runtime._segment.cells.heir[sid & 0xFFFFFFFF]) & 0xFFFF


def test_a_connection_moves_between_two_messages_and_is_forgotten_and_not_ended(
    bench: Bench,
) -> None:
    sid, peer = bench.connect()
    peer.send(b"one\nha")
    assert bench.hear(peer, 4) == b"one\n"
    with elsewhere(bench) as (other, index):
        bench.messenger.move(lambda: index)
        assert not bench.messenger.move_idle(10)
        assert heir_of(bench, sid) == 0  # half a message was read
        peer.send(b"lf\n")
        assert bench.hear(peer, 5) == b"half\n"
        bench.run_until(lambda: heir_of(bench, sid) == index, "it is offered")
        assert sid not in bench.dispatcher.consumers()
        assert other.ask(f"rt._engine.inherit({sid})")
        bench.run_until(lambda: not len(bench.messenger), "it is gone")
        assert bench.rest.sessions[0].gone == [sid]
        assert bench.rest.sessions[0].ended == []
        bench.runtime.set_failed(sid)


def test_what_its_protocol_cannot_move_or_has_nowhere_to_go_stays(bench: Bench) -> None:
    sid, peer = bench.connect()
    peer.send(b"one\n")
    assert bench.hear(peer, 4) == b"one\n"
    with elsewhere(bench) as (_, index):
        bench.messenger.move(lambda: -1)
        assert not bench.messenger.move_idle(10)
        bench.messenger.move(lambda: 15)  # nobody there: it has just died
        bench.messenger.move_idle(10)
        bench.rest.sessions[0].stays = True
        bench.messenger.move(lambda: index)
        bench.messenger.move_idle(10)
        assert heir_of(bench, sid) == 0
        bench.messenger.move(None)
        bench.rest.sessions[0].stays = False
        bench.messenger.move_idle(10)
        assert heir_of(bench, sid) == 0
        peer.send(b"two\n")
        assert bench.hear(peer, 4) == b"two\n"


def test_who_has_offered_a_connection_never_touches_busy_again(bench: Bench) -> None:
    """Its new owner may be in mid-message: a late look at what was unwritten must not say idle."""
    sid, peer = bench.connect(4096)
    peer.send(b"much\n")
    bench.run_until(lambda: bench.busy(sid))
    bench.run_until(lambda: bench.messenger._connections[sid].rechecked, "it will look again")
    with elsewhere(bench) as (other, index):
        bench.hear(peer, MUCH)
        bench.run_until(lambda: not bench.runtime.unwritten_bytes(), "all is out")
        bench.messenger.move(lambda: index)
        peer.send(b"one\n")
        assert bench.hear(peer, 4) == b"one\n"
        bench.run_until(lambda: heir_of(bench, sid) == index, "it is offered")
        other.run(f"assert rt._engine.inherit({sid}); ref = rt.address({sid}); ref.busy = True")
        assert bench.messenger._connections[sid].offered  # nobody has looked yet
        bench.messenger._recheck(sid)
        assert bench.busy(sid)
        other.run("ref.close()")
        bench.runtime.set_failed(sid)


def test_draining_leaves_an_offered_connection_alone_until_it_is_back(bench: Bench) -> None:
    sid, peer = bench.connect()
    with elsewhere(bench) as (_, index):
        bench.messenger.move(lambda: index)
        bench.messenger.move_idle(10)
        assert heir_of(bench, sid) == index
        peer.send(b"unread\n")
        bench.messenger.drain()
        assert len(bench.messenger) == 1
        assert not bench.rest.sessions
        for offer in bench.runtime._hand_over._offers.values():
            offer.deadline_s = 0.0
        assert bench.hear(peer, 7) == b"unread\n"  # withdrawn: answered, and closed
        bench.run_until(lambda: not len(bench.messenger), "it is closed")
