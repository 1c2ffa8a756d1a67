"""What one turn of the loop writes leaves at its end: together, in order, and before any end."""

from __future__ import annotations

import collections.abc
import contextlib
import os
import select
import socket
import threading
import time
import tracemalloc

import pytest

import shmsock

from .helpers import WATCHDOG_S, Peer, after_a_round, connected, read_to_end, wait_until

_DATA_SEGMENTS_IN = 152  # of Linux's struct tcp_info: what a send makes of a small message is one


@pytest.fixture
def dispatcher(runtime: shmsock.Runtime) -> collections.abc.Iterator[shmsock.Dispatcher]:
    with contextlib.closing(shmsock.Dispatcher(runtime)) as made:
        yield made


class Client:
    """A connection, its reference here, and the other end."""

    def __init__(self, runtime: shmsock.Runtime, kind: str = "tcp", buffer_bytes: int = 0) -> None:
        ours, self.peer = connected(kind, buffer_bytes)
        if kind == "tcp":
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer.settimeout(WATCHDOG_S)
        self.sid = runtime.create_socket(ours)
        reference = runtime.address(self.sid)
        assert reference is not None
        self.reference = reference

    def segments(self) -> int:
        """How many sends there were, as the peer's kernel sees it."""
        info = self.peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return int.from_bytes(info[_DATA_SEGMENTS_IN : _DATA_SEGMENTS_IN + 4], "little")

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self.peer.recv(size - len(data))
            assert chunk, f"it ended after {data!r}"
            data += chunk
        return data

    def has_read(self) -> bytes:
        """What there is, without waiting."""
        poll = select.poll()
        poll.register(self.peer, select.POLLIN)
        return self.peer.recv(1 << 20) if poll.poll(0) else b""


@pytest.fixture
def client(runtime: shmsock.Runtime) -> collections.abc.Iterator[Client]:
    made = Client(runtime)
    with made.peer:
        yield made
        made.reference.close()


def turn(dispatcher: shmsock.Dispatcher, call: collections.abc.Callable[[], object]) -> None:
    """Make a call in one turn of the loop."""
    dispatcher.call_soon(call)
    dispatcher.run_once(0)


def writes(
    reference: shmsock.SocketRef, messages: list[bytes]
) -> collections.abc.Callable[[], None]:
    """A call that writes each of these."""

    def write() -> None:
        for message in messages:
            reference.write(message)

    return write


def test_ten_small_writes_of_one_turn_leave_in_one_send(
    dispatcher: shmsock.Dispatcher, runtime: shmsock.Runtime, client: Client
) -> None:
    def ten() -> None:
        for number in range(10):
            client.reference.write(b"%d" % number, b",")
        assert client.has_read() == b""

    turn(dispatcher, ten)
    assert client.read(20) == b"0,1,2,3,4,5,6,7,8,9,"
    assert client.segments() == 1
    (row,) = runtime.sockets()
    assert (row["messages_out"], row["bytes_out"], row["writer"]) == (10, 20, -1)
    for _ in range(10):  # outside of a turn each leaves at once
        client.reference.write(b"x")
    assert client.read(10) == b"x" * 10
    assert client.segments() == 11


def test_messages_to_many_sockets_leave_although_their_references_were_closed(
    dispatcher: shmsock.Dispatcher, runtime: shmsock.Runtime
) -> None:
    clients = [Client(runtime) for _ in range(5)]
    for each in clients:
        each.reference.close()

    def publish() -> None:
        for number in range(200):  # more than one send takes
            for each in clients:
                with runtime.address(each.sid) as reference:  # type: ignore[union-attr]
                    reference.write(b"%03d" % number)

    turn(dispatcher, publish)
    for each in clients:
        with each.peer:
            assert each.read(600) == b"".join(b"%03d" % number for number in range(200))
            assert each.segments() <= 4
            assert runtime.attached(each.sid) == []


@pytest.mark.parametrize("end", ["set_failed", "release", "raises"])
def test_what_was_written_before_an_end_is_read_before_it(
    end: str, dispatcher: shmsock.Dispatcher, runtime: shmsock.Runtime
) -> None:
    client = Client(runtime)

    def last_words(reference: shmsock.SocketRef) -> None:
        reference.write(b"good")
        reference.write(b"bye")
        if end == "set_failed":
            assert reference.set_failed()
        elif end == "release":
            assert reference.release_additional_reference()
        else:
            raise ValueError("as a consumer may")

    client.reference.close()
    assert dispatcher.add_consumer(client.sid, last_words)
    with client.peer:
        client.peer.sendall(b"?")
        wait_until(after_a_round(dispatcher, lambda: runtime.in_use() == 0))
        assert read_to_end(client.peer) == b"goodbye"


def test_flush_and_unwritten_bytes_send_what_this_turn_has_kept(
    dispatcher: shmsock.Dispatcher, client: Client
) -> None:
    def progress() -> None:
        client.reference.write(b"first")
        assert client.reference.flush(WATCHDOG_S)
        assert client.read(5) == b"first"
        client.reference.write(b"second")
        assert client.reference.unwritten_bytes() == 0
        assert client.read(6) == b"second"

    turn(dispatcher, progress)
    assert client.has_read() == b""


def test_who_is_not_busy_any_more_has_sent_its_answer(
    dispatcher: shmsock.Dispatcher, client: Client
) -> None:
    def answer() -> None:
        client.reference.busy = True
        client.reference.write(b"answer")
        assert client.has_read() == b""
        client.reference.busy = False
        assert client.read(6) == b"answer"

    turn(dispatcher, answer)


def test_another_threads_message_comes_behind_what_was_written_before_it(
    dispatcher: shmsock.Dispatcher, client: Client
) -> None:
    def write(message: bytes) -> None:
        thread = threading.Thread(target=client.reference.write, args=(message,))
        thread.start()
        thread.join()

    def both() -> None:
        client.reference.write(b"1")
        write(b"2")
        client.reference.write(b"3")
        client.reference.write(b"4")
        write(b"5")

    turn(dispatcher, both)
    assert client.read(5) == b"12345"


def test_long_and_strange_messages_keep_their_place(
    dispatcher: shmsock.Dispatcher, client: Client
) -> None:
    parts: list[bytes | bytearray] = [b"a", b"b" * 9000, b"c", bytearray(b"d"), b"e", b"f" * 70_000]

    def write() -> None:
        for part in parts:
            client.reference.write(part)
        client.reference.write(b"g", bytearray(b"h"))

    turn(dispatcher, write)
    expected = b"".join(parts) + b"gh"
    assert client.read(len(expected)) == expected


def test_datagrams_of_a_turn_stay_apart(
    dispatcher: shmsock.Dispatcher, runtime: shmsock.Runtime
) -> None:
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sid = runtime.create_socket(ours)
    with peer, runtime.address(sid) as reference:  # type: ignore[union-attr]
        turn(dispatcher, writes(reference, [b"0", b"1", b"2"]))
        peer.settimeout(WATCHDOG_S)
        assert [peer.recv(10) for _ in range(3)] == [b"0", b"1", b"2"]


def test_a_failed_socket_refuses_a_message_of_the_same_turn(
    dispatcher: shmsock.Dispatcher, runtime: shmsock.Runtime, client: Client
) -> None:
    def write() -> None:
        client.reference.write(b"one")
        assert runtime.set_failed(client.sid, 7, "enough")
        with pytest.raises(shmsock.SocketFailedError, match="enough"):
            client.reference.write(b"two")

    turn(dispatcher, write)
    assert read_to_end(client.peer) == b"one"


def test_a_turn_that_is_interrupted_has_sent_what_it_wrote(
    dispatcher: shmsock.Dispatcher, client: Client
) -> None:
    def write() -> None:
        client.reference.write(b"one")
        client.reference.write(b"two")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turn(dispatcher, write)
    assert client.read(6) == b"onetwo"


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_what_the_kernel_did_not_take_of_a_turn_follows_in_order(
    kind: str, dispatcher: shmsock.Dispatcher, runtime: shmsock.Runtime
) -> None:
    client = Client(runtime, kind, 4608)
    messages = [b"%04d" % number * 1000 for number in range(300)]
    with client.peer:
        turn(dispatcher, writes(client.reference, messages))
        assert client.reference.unwritten_bytes() > 0
        assert client.read(300 * 4000) == b"".join(messages)
        assert client.reference.flush(WATCHDOG_S)
        (row,) = runtime.sockets()
        assert (row["messages_out"], row["bytes_out"]) == (300, 300 * 4000)
        client.reference.close()


def test_a_turns_messages_wait_behind_another_processs_message(
    dispatcher: shmsock.Dispatcher, runtime: shmsock.Runtime
) -> None:
    client = Client(runtime, "tcp", 8192)
    with client.peer, Peer(runtime.name) as other:
        other.run(f"ref = rt.address({client.sid}); ref.write(b'o' * 500_000)")
        turn(dispatcher, writes(client.reference, [b"%d" % number for number in range(10)]))
        assert client.read(500_010) == b"o" * 500_000 + b"0123456789"
        client.reference.close()


def test_killed_within_a_turn_what_it_kept_is_lost_and_nobody_else_harmed(
    runtime: shmsock.Runtime, client: Client
) -> None:
    with Peer(runtime.name) as victim:
        victim.run(
            f"""
            dispatcher = shmsock.Dispatcher(rt)
            ref = rt.address({client.sid})
            ref.fileno()
            """
        )
        victim.start(
            """
            import os, signal
            def write():
                ref.write(b"kept"); ref.write(b"too")
                os.kill(os.getpid(), signal.SIGSTOP)
            dispatcher.call_soon(write)
            dispatcher.run_once(0)
            """
        )
        wait_until(lambda: _state(victim.pid) == "T", "it is in the turn")
        assert runtime.sockets()["writer"][0] == -1
        victim.kill()
    client.reference.write(b"mine")
    assert client.read(4) == b"mine"
    wait_until(lambda: runtime.audit() == [] and len(runtime.processes()) == 1)
    assert runtime.status(client.sid) is shmsock.Status.LIVE


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_fork_within_a_turn_leaves_the_messages_to_the_parent(
    dispatcher: shmsock.Dispatcher, client: Client
) -> None:
    def write() -> None:
        client.reference.write(b"once")
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                client.reference.unwritten_bytes()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

    turn(dispatcher, write)
    assert client.read(4) == b"once"
    assert client.has_read() == b""


# -- fairness -----------------------------------------------------------------------------------


def test_no_process_starves_when_four_write_to_one_socket_without_a_pause(
    runtime: shmsock.Runtime,
) -> None:
    client = Client(runtime)
    letters = "abcd"
    writing = """
        ref = rt.address({sid})
        while True:
            try:
                ref.write(b"{letter}" * 64)
            except shmsock.OverCrowdedError:
                ref.wait_writable(60)
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(client.peer)
        for letter in letters:
            writer = stack.enter_context(Peer(runtime.name))
            stack.callback(writer.kill)
            writer.start(writing.format(sid=client.sid, letter=letter))
        everybody = dict.fromkeys(letters, 0)
        deadline = time.monotonic() + WATCHDOG_S
        # Each one goes on writing until all have written as much as this.
        while min(everybody.values()) < 500 * 64:
            assert time.monotonic() < deadline, everybody
            data = client.peer.recv(1 << 18)
            for letter in letters:
                everybody[letter] += data.count(letter.encode())
        client.reference.close()


def test_a_megabyte_is_queued_without_being_copied(runtime: shmsock.Runtime) -> None:
    client = Client(runtime, "unix", 8192)
    message = bytes(1 << 20)
    with client.peer:
        client.reference.fileno()
        tracemalloc.start()
        try:
            client.reference.write(message)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert client.reference.unwritten_bytes() > 900_000
        assert peak < 100_000
        assert client.read(len(message)) == message
        client.reference.close()


# -- to many ------------------------------------------------------------------------------------


def test_a_broadcast_reaches_everybody_whatever_stands_in_the_way_of_some(name: str) -> None:
    with shmsock.Runtime.create(
        name, slots=1024, processes=8, stripes=4, max_unwritten_bytes=100_000
    ) as runtime:
        groups = runtime.groups
        clients = [Client(runtime, "unix", 4608) for _ in range(400)]  # more than one piece
        for client in clients:
            client.reference.close()
            assert groups.add("news", client.sid)
        failed, crowded, waiting = clients[3], clients[5], clients[300]
        runtime.set_failed(failed.sid)
        with runtime.address(crowded.sid) as reference:  # type: ignore[union-attr]
            reference.write(b"c" * 100_000)
            with contextlib.suppress(shmsock.OverCrowdedError):
                while True:  # the kernel took some of it: there is room
                    reference.write(b"c")
        with runtime.address(waiting.sid) as reference:  # type: ignore[union-attr]
            reference.write(b"w" * 50_000)
        assert groups.broadcast("news", b"the ", bytearray(b"news")) == 398
        with contextlib.ExitStack() as stack:
            for client in clients:
                stack.enter_context(client.peer)
            for client in clients:
                if client not in (failed, crowded, waiting):
                    assert client.read(8) == b"the news"
                    assert client.has_read() == b""
            assert read_to_end(failed.peer) == b""
            assert waiting.read(50_008) == b"w" * 50_000 + b"the news"
            assert groups.count("news") == 399
            with Peer(name) as other:  # which has no descriptor of any of them yet
                # There is room for the crowded one in this process: what waits is each one's own.
                assert other.ask("rt.groups.broadcast('news', b'more')") == 399
            for client in clients:
                if client not in (failed, crowded):
                    assert client.read(4) == b"more"
            assert set(crowded.read(4000)) == set(b"c")


def test_a_broadcast_of_a_closed_runtime_is_refused(name: str) -> None:
    with shmsock.Runtime.create(name, slots=16, stripes=2) as runtime:
        groups, client = runtime.groups, Client(runtime)
        with client.peer:
            client.reference.close()
            groups.add("news", client.sid)
            runtime._engine.closed = True
            with pytest.raises(shmsock.ClosedError):
                groups.broadcast("news", b"x")
            runtime._engine.closed = False
            assert groups.broadcast("news", b"x") == 1
            assert client.read(1) == b"x"
