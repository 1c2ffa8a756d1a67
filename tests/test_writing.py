"""Whole messages from anybody: never interleaved, in order, bounded, and never waited for."""

from __future__ import annotations

import errno
import os
import random
import resource
import select
import signal
import socket
import struct
import threading
import time

import pytest

import shmsock

from .helpers import WATCHDOG_S, Forked, Peer, connected, read_to_end, wait_until

MESSAGES = 20_000
_HEADER = struct.Struct("<IIII")  # length of the body, writer, number, checksum of the body
_NOISE = random.Random(1).randbytes(8192)


def message_of(writer: int, number: int) -> list[bytes]:
    """A message whose size and content follow from writer and number; sometimes in two buffers."""
    size = (number * 2654435761 + writer * 40503) % 200
    if number % 400 == 0:
        size = 5000 + number % 3000
    body = _NOISE[number % 97 : number % 97 + size]
    header = _HEADER.pack(size, writer, number, sum(body[:16]))
    return [header, body] if number % 3 == 0 else [header + body]


def write_all(runtime: shmsock.Runtime, sid: int, writer: int, messages: int) -> int:
    """Write ``messages`` numbered messages as a well-behaved writer; returns how often refused."""
    refused = 0
    with runtime.address(sid) as reference:  # type: ignore[union-attr]
        for number in range(messages):
            buffers = message_of(writer, number)
            while True:
                try:
                    reference.write(*buffers)
                    break
                except shmsock.OverCrowdedError:
                    refused += 1
                    assert reference.wait_writable(WATCHDOG_S)
        assert reference.flush(WATCHDOG_S)
        assert reference.unwritten_bytes() == 0
    return refused


def read_all(sock: socket.socket, writers: int, messages: int) -> None:
    """Read until every writer's messages came: each whole, none lost, in its writer's order."""
    sock.settimeout(WATCHDOG_S)
    following = dict.fromkeys(range(writers), 0)
    buffered = bytearray()
    while sum(following.values()) < writers * messages:
        chunk = sock.recv(16384)
        assert chunk, f"the stream ended early: {following}"
        buffered += chunk
        at = 0
        while len(buffered) - at >= _HEADER.size:
            size, writer, number, check = _HEADER.unpack_from(buffered, at)
            assert number == following[writer], "a message is torn, lost or out of order"
            if len(buffered) - at < _HEADER.size + size:
                break
            body = buffered[at + _HEADER.size : at + _HEADER.size + size]
            assert [_HEADER.pack(size, writer, number, check) + body] == [
                b"".join(message_of(writer, number))
            ]
            following[writer] += 1
            at += _HEADER.size + size
        del buffered[:at]
    assert not buffered


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_four_processes_write_20000_messages_each_to_one_slow_reader(name: str, kind: str) -> None:
    with shmsock.Runtime.create(
        name, slots=16, stripes=2, processes=8, max_unwritten_bytes=64 << 10
    ) as runtime:
        ours, peers = connected(kind, 16384)
        sid = runtime.create_socket(ours)
        with peers:
            writers = [Forked(write_all, runtime, sid, writer, MESSAGES) for writer in range(4)]
            read_all(peers, 4, MESSAGES)
            refused = [writer.result() for writer in writers]
            assert any(refused), "the reader was not slow enough to crowd anybody"
            row = runtime.sockets()[0]
            assert row["messages_out"] == 4 * MESSAGES
            assert row["writer"] == -1
            wait_until(lambda: runtime.audit() == [])  # the writers are reaped


def test_threads_of_one_process_write_whole_messages_in_their_order(name: str) -> None:
    with shmsock.Runtime.create(name, slots=16, stripes=2, max_unwritten_bytes=64 << 10) as runtime:
        ours, peers = connected("unix", 8192)
        sid = runtime.create_socket(ours)
        failures: list[BaseException] = []

        def write(writer: int) -> None:
            try:
                write_all(runtime, sid, writer, 2000)
            except BaseException as error:
                failures.append(error)

        with peers:
            threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
            for thread in threads:
                thread.start()
            read_all(peers, 4, 2000)
            for thread in threads:
                thread.join()
            assert failures == []
            assert runtime.sockets()["messages_out"][0] == 8000


def test_what_the_kernel_did_not_take_is_sent_without_any_further_call(
    runtime: shmsock.Runtime,
) -> None:
    ours, peers = connected("tcp", 8192)
    sid = runtime.create_socket(ours)
    with peers, Peer(runtime.name) as one, Peer(runtime.name) as two:
        one.run(f"ref = rt.address({sid}); ref.write(b'1' * 500_000); ref.close()")
        two.run(f"ref = rt.address({sid})")
        two.run("for _ in range(100): ref.write(b'2' * 5_000)\nref.close()")
        one.run(f"ref = rt.address({sid}); ref.write(b'3' * 10); ref.close()")
        peers.settimeout(WATCHDOG_S)
        received = b""
        while len(received) < 1_000_010:
            received += peers.recv(65536)
        assert received.startswith(b"1" * 500_000)
        assert received.replace(b"2", b"") == b"1" * 500_000 + b"3" * 10
        assert received.count(b"2") == 500_000
        row = wait_until(lambda: runtime.sockets()[runtime.sockets()["messages_out"] == 102])[0]
        assert row["bytes_out"] == 1_000_010


# -- the bound -----------------------------------------------------------------------------------


def test_over_the_bound_a_message_is_refused_whole_and_memory_stays_bounded(name: str) -> None:
    limit = 1 << 20
    with shmsock.Runtime.create(name, slots=16, stripes=2, max_unwritten_bytes=limit) as runtime:
        ours, peers = connected("unix", 8192)
        sid = runtime.create_socket(ours)
        with peers, runtime.address(sid) as reference:  # type: ignore[union-attr]
            accepted = 0
            message = b"m" * 10_000
            while True:
                try:
                    reference.write(message)
                    accepted += 1
                except shmsock.OverCrowdedError:
                    break
            assert limit - 10_000 < reference.unwritten_bytes() <= limit
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for _ in range(20_000):
                with pytest.raises(shmsock.OverCrowdedError, match="max_unwritten_bytes"):
                    reference.write(message)
            assert reference.unwritten_bytes() <= limit
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
            reference.release_additional_reference()
            assert not reference.failed
            reader: list[bytes] = []
            thread = threading.Thread(target=lambda: reader.append(read_to_end(peers)))
            thread.start()
            assert reference.flush(WATCHDOG_S)
            reference.write(b"room again")
            reference.close()
            thread.join()
            assert reader == [message * accepted + b"room again"], "a refused one was sent"


@pytest.mark.parametrize("queued", [False, True])
def test_a_message_larger_than_the_bound_is_refused_whether_or_not_something_waits(
    name: str, queued: bool
) -> None:
    with shmsock.Runtime.create(name, slots=16, stripes=2, max_unwritten_bytes=100_000) as runtime:
        ours, peers = connected("unix", 8192)
        with (
            peers,
            runtime.address(runtime.create_socket(ours)) as reference,  # type: ignore[union-attr]
        ):
            if queued:
                reference.write(b"q" * 50_000)
            for buffers in ([bytes(100_001)], [bytes(50_000)] * 3):
                with pytest.raises(shmsock.OverCrowdedError):
                    reference.write(*buffers)
            assert not reference.failed
            reference.write(b"small")
            reference.release_additional_reference()
            reference.close()
            assert read_to_end(peers) == b"q" * 50_000 * queued + b"small"


# -- what a message may be -----------------------------------------------------------------------


def test_a_message_of_any_buffers_arrives_as_their_bytes(runtime: shmsock.Runtime) -> None:
    ours, peers = connected("tcp", 8192)
    sid = runtime.create_socket(ours)
    numbers = memoryview(struct.pack("<100000Q", *range(100_000))).cast("Q")
    many = [bytes([n % 251]) * (n % 7) for n in range(5000)]
    whole = b"bytes" + b"array" + bytes(numbers) + b"".join(many)
    with peers:
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(b"bytes", bytearray(b"array"), b"")
            reference.write(numbers)  # len() is not its size in bytes
            reference.write(*many)  # more than the kernel takes at once
            reference.write()
            reference.write(b"", b"")
            reference.release_additional_reference()
        assert read_to_end(peers) == whole


def test_what_is_no_message_is_refused_and_nothing_happens(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    with peers, runtime.address(sid) as reference:  # type: ignore[union-attr]
        for wrong in ("text", 7, None, [b"list"]):
            with pytest.raises(TypeError):
                reference.write(b"good", wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="contiguous"):
            reference.write(memoryview(b"0123456789")[::2])
        assert not reference.failed
        assert runtime.sockets()["writer"][0] == -1
        reference.write(b"alive")
        assert peers.recv(10) == b"alive"


def test_a_changed_bytearray_does_not_change_what_waits(runtime: shmsock.Runtime) -> None:
    ours, peers = connected("unix", 8192)
    sid = runtime.create_socket(ours)
    with peers:
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            buffer = bytearray(b"a" * 500_000)
            reference.write(buffer)
            buffer[:] = b"b" * 500_000
            reference.write(buffer)
            buffer.clear()
            reference.release_additional_reference()
        assert read_to_end(peers) == b"a" * 500_000 + b"b" * 500_000


def test_datagrams_that_waited_stay_apart(runtime: shmsock.Runtime) -> None:
    ours, peers = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    sid = runtime.create_socket(ours)
    with peers, runtime.address(sid) as reference:  # type: ignore[union-attr]
        sent = [b"datagram %d" % number for number in range(2000)]
        for message in sent:
            reference.write(message)
        assert reference.unwritten_bytes() > 0
        peers.settimeout(WATCHDOG_S)
        assert [peers.recv(1000) for _ in sent] == sent
        assert reference.flush(WATCHDOG_S)


# -- the end of writers and peers -----------------------------------------------------------------


def test_a_writer_killed_in_mid_message_fails_the_socket(runtime: shmsock.Runtime) -> None:
    ours, peers = connected("tcp", 8192)
    sid = runtime.create_socket(ours)
    with peers, Peer(runtime.name) as writer:
        writer.run(f"ref = rt.address({sid}); ref.write(bytes(1 << 20))")
        assert runtime.sockets()["writer"][0] == writer.ask("rt.index")
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(b"must not follow half a message")
            writer.kill()
            with pytest.raises(shmsock.SocketFailedError) as caught:
                reference.flush(WATCHDOG_S)
            assert caught.value.code == errno.EPIPE
        received = read_to_end(peers)
        assert len(received) < 1 << 20
        assert set(received) <= {0}
    wait_until(lambda: runtime.in_use() == 0)
    assert runtime.audit() == []


def test_a_writer_killed_between_messages_harms_nobody(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    with peers, Peer(runtime.name) as writer:
        writer.run(f"ref = rt.address({sid}); ref.write(b'one')")
        writer.kill()
        wait_until(lambda: len(runtime.processes()) == 1)
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(b"two")
        assert peers.recv(6, socket.MSG_WAITALL) == b"onetwo"


def test_a_peer_that_has_gone_fails_the_socket_with_the_kernels_reason(
    runtime: shmsock.Runtime,
) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    peers.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peers.close()  # a reset
    with runtime.address(sid) as reference:  # type: ignore[union-attr]
        select.select([reference.fileno()], [], [], WATCHDOG_S)  # the reset has come
        with pytest.raises(shmsock.SocketFailedError) as caught:
            reference.write(b"x")
        assert caught.value.code in (errno.ECONNRESET, errno.EPIPE)
        assert reference.error == (caught.value.code, caught.value.text)
    assert runtime.address(sid) is None


def test_a_peer_that_goes_while_messages_wait_frees_them(runtime: shmsock.Runtime) -> None:
    ours, peers = connected("tcp", 8192)
    sid = runtime.create_socket(ours)
    with runtime.address(sid) as reference:  # type: ignore[union-attr]
        reference.write(bytes(1 << 20))
        assert reference.unwritten_bytes() > 0
        peers.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peers.close()
        wait_until(lambda: reference.failed)
        wait_until(lambda: reference.unwritten_bytes() == 0)
        assert runtime._writers._queues == {}
    wait_until(lambda: runtime.in_use() == 0)


# -- waiting --------------------------------------------------------------------------------------


def test_flush_and_wait_writable_give_up_when_their_time_is_over(runtime: shmsock.Runtime) -> None:
    ours, peers = connected("unix", 8192)
    sid = runtime.create_socket(ours)
    with peers, runtime.address(sid) as reference:  # type: ignore[union-attr]
        assert reference.flush(0)
        assert reference.wait_writable(0)
        reference.write(bytes(500_000))
        for wait in (reference.flush, reference.wait_writable):
            assert wait(0) is False
            started = time.monotonic()
            assert wait(0.05) is False
            assert time.monotonic() - started >= 0.05
        thread = threading.Thread(target=lambda: peers.recv(500_000, socket.MSG_WAITALL))
        thread.start()
        assert reference.flush() is True
        thread.join()
        assert reference.wait_writable() is True


def test_a_wait_is_ended_by_a_failure_from_another_thread(runtime: shmsock.Runtime) -> None:
    ours, peers = connected("unix", 8192)
    sid = runtime.create_socket(ours)
    with peers, runtime.address(sid) as reference:  # type: ignore[union-attr]
        reference.write(bytes(500_000))
        timer = threading.Timer(0, lambda: runtime.set_failed(sid, 99, "enough"))
        timer.start()
        with pytest.raises(shmsock.SocketFailedError, match="enough"):
            reference.wait_writable()
        timer.join()


def test_an_exception_in_mid_message_fails_the_socket(runtime: shmsock.Runtime) -> None:
    """KeyboardInterrupt between the kernel's part and the queue: the rest is lost."""
    ours, peers = connected("unix", 8192)
    sid = runtime.create_socket(ours)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with peers, runtime.address(sid) as reference:  # type: ignore[union-attr]
        runtime._writers._enqueue = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            reference.write(bytes(1 << 20))
        del runtime._writers._enqueue
        assert reference.error[0] == errno.EPIPE
        assert select.select([peers], [], [], WATCHDOG_S)[0]


def test_a_stopped_process_in_a_stripe_loses_no_message_that_waits(
    runtime: shmsock.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, peers = connected("unix", 8192)
    sid = runtime.create_socket(ours)
    real = runtime._engine.take_turn
    raised: list[int] = []

    def timed_out(asked: int) -> int:
        if len(raised) < 3:
            raised.append(asked)
            raise shmsock.StripeTimeoutError("on purpose")
        return real(asked)

    with peers, runtime.address(sid) as reference:  # type: ignore[union-attr]
        reference.write(b"a" * 500_000)
        with monkeypatch.context() as patch:
            reference.write(b"b" * 10)
            patch.setattr(runtime._engine, "take_turn", timed_out)
            reference.release_additional_reference()
            reference.close()
            received: list[bytes] = []
            thread = threading.Thread(target=lambda: received.append(read_to_end(peers)))
            thread.start()
            thread.join()
        assert received == [b"a" * 500_000 + b"b" * 10]


def test_a_sigkilled_readers_process_ends_what_waits_for_it(runtime: shmsock.Runtime) -> None:
    with Peer() as reader:
        reader.run(
            """
            import socket
            listener = socket.create_server(("127.0.0.1", 0)); port = listener.getsockname()[1]
            """
        )
        ours = socket.create_connection(("127.0.0.1", reader.ask("port")))
        reader.run("conn = listener.accept()[0]")
        sid = runtime.create_socket(ours)
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(bytes(16 << 20))
            os.kill(reader.pid, signal.SIGKILL)
            with pytest.raises(shmsock.SocketFailedError):
                reference.flush(WATCHDOG_S)
