"""Clients that break rules, flood, dawdle or vanish: they end, the others notice nothing."""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import os
import random
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time

import pytest

from .helpers import WATCHDOG_S, descriptors, wait_until
from .servers import Client, Server, cpu_ticks, encode, resident_bytes

MAX_UNWRITTEN = 1 << 20
FULL = "-ERR max number of clients reached"


@pytest.fixture(scope="module")
def server() -> collections.abc.Iterator[Server]:
    with Server("--max-unwritten-bytes", str(MAX_UNWRITTEN)) as running:
        yield running


@pytest.fixture
def witnesses(server: Server) -> collections.abc.Iterator[list[Client]]:
    """Well-behaved clients of every worker, which must not notice anything."""
    server.settle()
    found = list(server.on_each_worker(server.client).values())
    assert [witness.call("PING") for witness in found] == ["PONG"] * 2
    yield found
    for witness in found:
        assert witness.call("ECHO", "still here") == b"still here"
        assert witness.silent()
        witness.close()
    server.settle()
    assert len(server.worker_pids()) == 2
    assert "Traceback" not in server.log()


def reset(sock: socket.socket) -> None:
    """Close with a reset instead of an end of stream."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# -- RESP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"*1\r\n$-5\r\n", b"invalid bulk length"),
        (b"*1\r\n$99999999999999999999\r\n", b"invalid bulk length"),
        (b"*1\r\n$600000000\r\n", b"invalid bulk length"),
        (b"*1048577\r\n", b"invalid multibulk length"),
        (b"*99999999999999999999\r\n", b"invalid multibulk length"),
        (b"*x\r\n", b"invalid multibulk length"),
        (b"*1\r\n:4\r\n", b"expected '$', got ':'"),
        (b"*2\r\n$4\r\nECHO\r\n*1\r\n$1\r\nx\r\n", b"expected '$', got '*'"),
        (b"*1" + b"0" * 70_000, b"too big mbulk count string"),
        (b"*1\r\n$" + b"1" * 70_000, b"too big bulk count string"),
        (b"x" * 70_000, b"too big inline request"),
        (b"\0" * 70_000, b"too big inline request"),
        (b"PING 'x\r\n", b"unbalanced quotes in request"),
    ],
)
def test_what_is_no_resp_is_answered_and_ended(
    server: Server, witnesses: list[Client], data: bytes, answer: bytes
) -> None:
    with server.client() as client:
        client.raw(encode("PING") + data)
        expected = b"+PONG\r\n-ERR Protocol error: " + answer + b"\r\n"
        assert client.ended() == expected


@pytest.mark.parametrize("ending", ["close", "shutdown", "reset"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"P",
        b"*2\r\n$4\r\nECHO\r\n$5\r\nhel",
        b"*1000000\r\n$4\r\nPING\r\n",
        b"*1\r\n$60000000\r\nx",
        b"GET /status HT",
        b"POST /sockets/1/fail HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx",
    ],
)
def test_half_a_message_and_then_nothing(
    server: Server, witnesses: list[Client], data: bytes, ending: str
) -> None:
    sock = server.connect()
    sock.sendall(data)
    if ending == "reset":
        reset(sock)
    elif ending == "close":
        sock.close()
    else:
        sock.shutdown(socket.SHUT_WR)
        assert Client(sock).ended() == b""
        sock.close()


def test_random_bytes(server: Server, witnesses: list[Client]) -> None:
    chance = random.Random(5)
    marks = (b"*", b"$", b"\r\n", b"-1", b"3", b"PING", b"\0", b"GET / HTTP/1.1\r\n", b'"', b"%")
    for _ in range(100):
        with server.client() as client:
            if chance.random() < 0.5:
                data = chance.randbytes(chance.randint(1, 3000))
            else:
                data = b"".join(chance.choice(marks) for _ in range(chance.randint(1, 300)))
            with contextlib.suppress(ConnectionError):
                client.raw(data)
                client.sock.shutdown(socket.SHUT_WR)
            client.ended()


def test_a_large_message_is_taken_whole_and_a_larger_one_refused(witnesses: list[Client]) -> None:
    client = witnesses[0]
    assert client.call("PUBLISH", "nobody", b"x" * (32 << 20)) == 0
    assert client.call("ECHO", b"\r\n" * 200_000) == b"\r\n" * 200_000


def test_one_byte_at_a_time(server: Server, witnesses: list[Client]) -> None:
    with server.client() as slow, server.client() as http:
        for client in (slow, http):
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        said = encode("ECHO", "a\r\nb") + b"PING\r\n"
        asked = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        for one in said:
            slow.raw(bytes([one]))
            assert witnesses[0].call("PING") == "PONG"
        for one in asked:
            http.raw(bytes([one]))
            assert witnesses[1].call("PING") == "PONG"
        assert slow.read() == b"a\r\nb"
        assert slow.read() == "PONG"
        assert http.ended().startswith(b"HTTP/1.1 200 OK\r\n")


# -- HTTP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET /status HTTP/1.1\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\nHost localhost\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\nHost: localhost\r\nX\0: y\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\nHost: localhost\r\nX : y\r\n\r\n", 400),
        (b"GET /status HTTP/1.9\r\nHost: localhost\r\n\r\n", 505),
        (b"GET /\x01 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 15_000, 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", 413),
        (
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (
            b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
        ),
        (b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    ],
)
def test_broken_http_is_refused_and_ended(
    server: Server, witnesses: list[Client], request_head: bytes, status: int | None
) -> None:
    with server.client() as client:
        client.raw(request_head)
        answer = client.ended()
        if status is None:  # a first line so long that it is none of HTTP's: see hub._run
            assert answer == b""
        else:
            assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:300]
            assert b"\r\nConnection: close\r\n" in answer


# -- clients that do not read -------------------------------------------------------------------


def test_who_never_reads_is_ended_and_the_others_get_everything(
    server: Server, witnesses: list[Client]
) -> None:
    publisher, reader = witnesses
    assert reader.call("HELLO", "3")[b"proto"] == 3
    assert reader.call("SUBSCRIBE", "flood") == [b"subscribe", b"flood", 1]
    memory = {pid: resident_bytes(pid) for pid in server.worker_pids().values()}
    with contextlib.ExitStack() as stack:
        deaf = [stack.enter_context(Client(server.connect(receive_bytes=4096))) for _ in range(4)]
        ids = [client.id() for client in deaf]
        for client in deaf:
            assert client.call("SUBSCRIBE", "flood") == [b"subscribe", b"flood", 1]
        runtime = stack.enter_context(server.attach())
        held = []
        for sid in ids:
            reference = runtime.address(sid)
            assert reference is not None
            held.append(stack.enter_context(reference))
        sent = 0
        message = b"x" * (64 << 10)
        while not all(reference.failed for reference in held):
            taken = publisher.call("PUBLISH", "flood", message)
            sent += 1
            assert 1 <= taken <= 1 + len(deaf)
            assert reader.read()[2] == message
            assert sent < 2000, "it was never given up"
        for reference in held:
            assert reference.error[0] == errno.ENOBUFS
            assert "too slow" in reference.error[1]
        for pid, before in memory.items():
            assert resident_bytes(pid) - before < len(deaf) * MAX_UNWRITTEN + (24 << 20)
        for client in deaf:
            assert len(client.ended()) < sent * len(message)
    assert publisher.call("PUBSUB", "NUMSUB", "flood") == [b"flood", 1]
    assert reader.call("UNSUBSCRIBE", "flood") == [b"unsubscribe", b"flood", 0]


@pytest.mark.parametrize(
    "data",
    [
        encode("ECHO", b"x" * 10_000),
        encode("COMMAND"),
        encode("CLIENT", "LIST"),
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["echo", "command", "client list", "pages"],
)
def test_who_asks_without_reading_is_ended(
    server: Server, witnesses: list[Client], data: bytes
) -> None:
    memory = {pid: resident_bytes(pid) for pid in server.worker_pids().values()}
    with Client(server.connect(receive_bytes=4096)) as rude:
        with contextlib.suppress(ConnectionError):
            rude.raw(data * 100_000)
        poller = select.poll()
        poller.register(rude.sock, select.POLLRDHUP)
        assert poller.poll(WATCHDOG_S * 1000), "it was never given up"
        for pid, before in memory.items():
            assert resident_bytes(pid) - before < MAX_UNWRITTEN + (24 << 20)


def test_a_slow_reader_within_the_bound_gets_everything(
    server: Server, witnesses: list[Client]
) -> None:
    with Client(server.connect(receive_bytes=4096)) as slow:
        slow.raw(encode("ECHO", b"y" * (MAX_UNWRITTEN // 2)) + encode("PING"))
        for witness in witnesses:
            assert witness.call("PING") == "PONG"
        assert slow.read() == b"y" * (MAX_UNWRITTEN // 2)
        assert slow.read() == "PONG"
        with server.attach() as runtime:
            sid = slow.id()
            wait_until(
                lambda: not runtime.sockets()["busy"][runtime.sockets()["id"] == sid].any(),
                "it is idle again",
            )


# -- many, at once ------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_connect_and_close(server: Server, witnesses: list[Client]) -> None:
    pids = [server.process.pid, *server.worker_pids().values()]
    before = [len(descriptors(pid)) for pid in pids]
    address = ("127.0.0.1", server.port)

    def knock(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(2500):
            sock = socket.create_connection(address)
            way = chance.randrange(4)
            with contextlib.suppress(ConnectionError):
                if way == 1:
                    sock.sendall(b"PING\r\n")
                elif way == 2:
                    sock.sendall(b"*1\r\n$4\r\nPI")
            if way == 3:
                reset(sock)
            else:
                sock.close()

    threads = [threading.Thread(target=knock, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for witness in witnesses:
            assert witness.call("PING") == "PONG"
    for thread in threads:
        thread.join()
    with server.attach() as runtime:
        wait_until(lambda: runtime.connections() == len(witnesses), "every slot comes back")
        wait_until(lambda: runtime.audit() == [], "the table is in order")
    # Each worker may have kept a connection of its own to the host.
    wait_until(
        lambda: all(
            len(descriptors(pid)) <= count + 2 for pid, count in zip(pids, before, strict=True)
        ),
        "every descriptor is closed",
    )


# -- limits -------------------------------------------------------------------------------------


def spent_while_we_work(pid: int) -> float:
    """CPU seconds that a process used while we used one half."""
    before = cpu_ticks(pid)
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    return (cpu_ticks(pid) - before) / 100


def test_out_of_descriptors_it_waits_says_so_once_and_goes_on() -> None:
    """The host keeps some for its workers' channels, so that it is never quite out of them."""
    with Server(open_files=128) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(90)]
        for client in clients:
            client.send("PING")
        served = wait_until(lambda: _served(clients, at_least=40))
        assert len(served) < len(clients)
        waiting = [client for client in clients if client not in served]
        wait_until(lambda: "raise the open-files limit" in server.log(), "it says so")
        assert spent_while_we_work(server.process.pid) < 0.25
        for client in served:  # who is there is served as ever, across workers too
            assert client.call("SUBSCRIBE", "c")[2] == 1
        publisher, *subscribers = served
        assert publisher.call("RESET") == "RESET"
        assert publisher.call("PUBLISH", "c", "x") == len(subscribers)
        for client in subscribers:
            assert client.read() == [b"message", b"c", b"x"]
        assert server.json("doctor")["ok"]
        for client in served:
            client.close()
        for client in waiting:
            assert client.read() == "PONG"
            assert client.call("PING") == "PONG"
        assert server.log().count("ulimit -n)") == 1
        # A worker that dies meanwhile is replaced.
        assert len(server.worker_pids()) == 2


def _served(clients: list[Client], at_least: int) -> list[Client]:
    found = [client for client in clients if not client.silent()]
    if len(found) < at_least:
        return []
    for client in found:
        assert client.read() == "PONG"
    return found


def test_emfile_itself_is_survived_too() -> None:
    with Server() as server, contextlib.ExitStack() as stack:
        first = stack.enter_context(server.client())
        assert first.call("PING") == "PONG"
        pid = server.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        low = len([fd for fd in descriptors(pid) if fd < 500]) + 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (low, before[1]))
        clients = [stack.enter_context(server.client()) for _ in range(20)]
        for client in clients:
            client.send("PING")
        wait_until(lambda: "cannot accept (Too many open files)" in server.log(), "it says so")
        assert spent_while_we_work(pid) < 0.25
        assert first.call("PING") == "PONG"
        # A worker cannot be started now either, but later it can.
        victim = next(iter(server.worker_pids().values()))
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: "was killed by signal 9" in server.log(), "it has seen the death")
        wait_until(lambda: "cannot start a worker" in server.log(), "and cannot help it")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        alive = [client for client in clients if not _has_ended(client, "PING")]
        assert alive
        assert server.log().count("cannot accept") == 1
        wait_until(lambda: len(server.worker_pids()) == 2, "the worker is replaced at last")
        assert server.run("doctor").returncode == 0


def _has_ended(client: Client, *then: str) -> bool:
    """Whether a client that said PING gets no answer to it, nor to what it says next."""
    try:
        assert client.read() == "PONG"
        if then:
            assert client.call(*then) == "PONG"
    except (EOFError, ConnectionError):
        return True
    return False


def test_a_worker_out_of_descriptors_refuses_what_it_cannot_take() -> None:
    with Server() as server, contextlib.ExitStack() as stack:
        pid = next(iter(server.worker_pids().values()))
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        low = len([fd for fd in descriptors(pid) if fd < 500]) + 4
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (low, before[1]))
        clients = [stack.enter_context(server.client()) for _ in range(40)]
        for client in clients:
            client.send("PING")
        ended = [client for client in clients if _has_ended(client)]
        assert 10 <= len(ended) <= 30
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        for client in clients:
            if client not in ended:
                assert client.call("PING") == "PONG"
        for _ in range(20):
            with server.client() as fresh:
                assert fresh.call("PING") == "PONG"
        assert server.run("doctor").returncode == 0


@pytest.mark.parametrize(
    ("flags", "room"), [(("--slots", "64"), 63), (("--max-connections", "64"), 64)]
)
def test_when_it_is_full_clients_are_told_and_room_is_used_again(
    flags: tuple[str, ...], room: int
) -> None:
    """A listener takes a slot of the table, but is no connection."""
    with Server(*flags, workers=1) as server:
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(server.client()) for _ in range(room)]
                for client in clients:
                    assert client.call("PING") == "PONG"
                for _ in range(3):
                    with server.client() as late:
                        late.send("PING")
                        assert late.ended() == f"{FULL}\r\n".encode()
                with server.client() as http:
                    http.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    answer = http.ended()
                    assert answer.startswith(b"HTTP/1.1 503 ")
                    assert answer.endswith(b"\r\n\r\nmax number of clients reached\n")
                with server.client() as silent:
                    assert silent.ended() == f"{FULL}\r\n".encode()
                crowd = [stack.enter_context(server.client()) for _ in range(100)]
                for client in crowd:
                    assert client.ended() == f"{FULL}\r\n".encode()
                for client in clients:
                    assert client.call("PING") == "PONG"
                assert server.in_use() == room
                clients[0].close()
                with server.attach() as runtime:
                    wait_until(lambda: runtime.connections() == room - 1, "there is room again")
                with server.client() as lucky:
                    assert lucky.call("PING") == "PONG"
            server.settle()
        assert server.log().count("turned away") == 1
        assert server.run("doctor").returncode == 0


@pytest.mark.skipif(shutil.which("redis-cli") is None, reason="needs redis-cli")
def test_redis_cli_is_told_that_it_is_full() -> None:
    with Server("--max-connections", "1", workers=1) as server, server.client() as only:
        assert only.call("PING") == "PONG"
        done = subprocess.run(
            ["redis-cli", "-p", str(server.port), "ping"],
            capture_output=True,
            text=True,
            timeout=WATCHDOG_S,
        )
        assert "max number of clients reached" in done.stdout + done.stderr
