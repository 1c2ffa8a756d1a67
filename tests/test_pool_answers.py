"""Answers from a pool: in parts, against a slow reader, and by a job that owns the connection.

The test process is the I/O worker: its dispatcher's thread reads, and it has the pool.
"""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import http.client
import os
import signal
import socket
import threading
import time
import typing

import pytest

import shmsock
import shmsock.pool_manager
from shmsock.pool import ProcessPoolExecutor

from .helpers import WATCHDOG_S, connected, holders_of, stop, wait_until
from .servers import Server as Hub
from .test_pool import answer, error_of, fork, result, started, wait_for


class Worker:
    """An I/O worker: reads requests ended by a newline, answers them, or has the pool do it."""

    def __init__(self, runtime: shmsock.Runtime) -> None:
        self.runtime = runtime
        self.heard: list[bytes] = []
        self.arrived: list[int] = []
        self.submit: typing.Callable[[int, bytes], object] = lambda sid, line: None
        self.dispatcher = shmsock.Dispatcher(runtime)
        self.dispatcher.on_arrival(self._arrived)
        self._thread = threading.Thread(target=self.dispatcher.run)
        self._thread.start()

    def _arrived(self, sids: list[int]) -> None:
        for sid in sids:
            self.arrived.append(sid)
            self.dispatcher.add_consumer(sid, self._read)

    def adopt(self, sock: socket.socket, policy: str = "fail") -> int:
        sid = self.runtime.create_socket(sock, on_owner_death=policy)
        done = threading.Event()

        def add() -> None:
            self.dispatcher.add_consumer(sid, self._read)
            done.set()

        self.dispatcher.call_soon(add)
        assert done.wait(WATCHDOG_S)
        return sid

    def _read(self, ref: shmsock.SocketRef) -> None:
        ref.busy = True
        while True:
            try:
                data = ref.recv(65536)
            except BlockingIOError:
                break
            if not data:
                ref.set_failed(errno.ECONNRESET, "the client left")
                return
            for line in data.split(b"\n"):
                if line.startswith(b"echo "):
                    ref.write(line[5:])
                elif line.strip():
                    self.heard.append(line)
                    self.submit(ref.id, line)
        ref.busy = False

    def close(self) -> None:
        self.dispatcher.stop()
        self._thread.join()
        self.dispatcher.close()


@pytest.fixture
def worker(runtime: shmsock.Runtime) -> collections.abc.Iterator[Worker]:
    made = Worker(runtime)
    yield made
    made.close()


@pytest.fixture
def pool(runtime: shmsock.Runtime) -> collections.abc.Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(runtime.name, 2, mp_context=fork()) as made:
        yield made


@pytest.fixture
def client(worker: Worker) -> collections.abc.Iterator[tuple[int, socket.socket]]:
    """A client of the I/O worker, and its id."""
    ours, theirs = connected()
    theirs.settimeout(WATCHDOG_S)
    with theirs:
        yield worker.adopt(ours), theirs


def owner_of(runtime: shmsock.Runtime, sid: int) -> int:
    rows = runtime.sockets()
    return int(rows["owner"][rows["id"] == sid][0])


# -- jobs -----------------------------------------------------------------------------------------


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def send_events(sid: int, go: str) -> None:
    """A chunked answer of server-sent events; the last ones when the file is there."""
    with shmsock.current().address(sid) as ref:  # type: ignore[union-attr]
        ref.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for n in range(10):
            if n == 5:
                wait_for(go)
            ref.write(chunk(b"event: progress\ndata: %d\n\n" % n))
        ref.write(b"0\r\n\r\n")
        ref.flush()


def push(sid: int, count: int) -> None:
    """RESP3 pushes."""
    with shmsock.current().address(sid) as ref:  # type: ignore[union-attr]
        for n in range(count):
            ref.write(b">2\r\n+progress\r\n:%d\r\n" % n)
        ref.flush()


def crowd(sid: int, path: str) -> list[int]:
    """Write until it is refused, wait for room, write on."""
    written = 0
    with shmsock.current().address(sid) as ref:  # type: ignore[union-attr]
        with contextlib.suppress(shmsock.OverCrowdedError):
            while True:
                ref.write(b"x" * 50_000)
                written += 50_000
        waiting = ref.unwritten_bytes()
        open(path, "w").close()
        assert ref.wait_writable(WATCHDOG_S)
        assert ref.unwritten_bytes() == 0
        ref.write(b"end")
        ref.flush()
    return [written, waiting]


def converse(sid: int, path: str) -> list[int]:
    """Own the connection: answer each line, until ``bye``."""
    runtime = shmsock.current()
    owner = owner_of(runtime, sid)
    with open(path + "~", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + "~", path)
    with runtime.address(sid) as ref:  # type: ignore[union-attr]
        while True:
            try:
                data = ref.recv(1000)
            except BlockingIOError:
                time.sleep(0.001)
                continue
            if not data:
                ref.set_failed(errno.ECONNRESET, "the client left")
                return [owner, runtime.index]
            ref.write(b"pool:" + data)
            if data == b"bye\n":
                return [owner, runtime.index]


def converse_badly(sid: int) -> None:
    """Leave in mid-message."""
    with shmsock.current().address(sid) as ref:  # type: ignore[union-attr]
        ref.busy = True


# -- in parts -------------------------------------------------------------------------------------


def test_events_are_sent_from_the_pool_while_the_io_worker_goes_on_reading(
    worker: Worker,
    client: tuple[int, socket.socket],
    pool: ProcessPoolExecutor,
    tmp_path: typing.Any,
) -> None:
    _, sock = client
    go = str(tmp_path / "go")
    worker.submit = lambda sid, line: (
        line == b"GET / HTTP/1.1\r" and pool.submit(send_events, sid, go, client=sid)
    )
    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
    reply = http.client.HTTPResponse(sock, method="GET")
    reply.begin()
    assert reply.status == 200
    lines = [reply.readline() for _ in range(5 * 3)]
    sock.sendall(b"meanwhile\n")
    wait_until(lambda: b"meanwhile" in worker.heard, "the I/O worker reads")
    open(go, "w").close()
    lines += reply.read().splitlines(True)
    data = [line for line in lines if line.startswith(b"data")]
    assert data == [b"data: %d\n" % n for n in range(10)]
    sock.sendall(b"echo the next answer is the worker's own\n")
    assert sock.recv(100) == b"the next answer is the worker's own"


def test_pushes_from_the_pool_and_replies_of_the_server_never_interleave() -> None:
    with Hub(workers=1) as server, server.client() as client:
        with ProcessPoolExecutor(server.name, 2, mp_context=fork()) as pool:
            assert client.call("HELLO", "3")
            futures = [pool.submit(push, client.id(), 200, client=client.id()) for _ in range(2)]
            pushes: list[int] = []
            pongs = 0
            while len(pushes) < 400:
                client.send("PING")
                while (value := client.read()) != "PONG":
                    pushes.append(value[1])
                pongs += 1
                if pongs > 10 and all(future.done() for future in futures):
                    while len(pushes) < 400:
                        pushes.append(client.read()[1])
            for future in futures:
                result(future)
        assert sorted(pushes) == sorted([*range(200), *range(200)])
        assert pongs > 0
        client.call("PING")
        assert client.silent()


# -- backpressure ---------------------------------------------------------------------------------


def test_a_job_is_refused_when_its_client_does_not_read_and_may_wait_until_it_does(
    name: str, tmp_path: typing.Any
) -> None:
    sizes = {"slots": 64, "processes": 8, "stripes": 4, "max_unwritten_bytes": 200_000}
    with (
        shmsock.Runtime.create(name, **sizes) as runtime,  # type: ignore[arg-type]
        ProcessPoolExecutor(runtime.name, 1, mp_context=fork()) as pool,
    ):
        ours, peers = connected(buffer_bytes=20_000)
        sid = runtime.create_socket(ours)
        refused = str(tmp_path / "refused")
        with peers:
            future = pool.submit(crowd, sid, refused, client=sid)
            wait_until(lambda: os.path.exists(refused))
            assert not future.done()
            peers.settimeout(WATCHDOG_S)
            got = 0
            while (data := peers.recv(65536))[-3:] != b"end":
                got += len(data)
            got += len(data) - 3
            written, waiting = result(future)
            assert got == written
            assert 150_000 < waiting <= 200_000
        assert runtime.audit() == []


# -- owning ---------------------------------------------------------------------------------------


def test_a_job_may_own_its_client_and_gives_it_back(
    runtime: shmsock.Runtime,
    worker: Worker,
    client: tuple[int, socket.socket],
    pool: ProcessPoolExecutor,
    tmp_path: typing.Any,
) -> None:
    sid, sock = client
    for turn in range(3):
        path = str(tmp_path / str(turn))
        future = pool.submit(converse, sid, path, client=sid, own=True)
        started(path)
        sock.sendall(b"echo who are you\n")
        assert sock.recv(100) == b"pool:echo who are you\n"
        sock.sendall(b"bye\n")
        assert sock.recv(100) == b"pool:bye\n"
        owner, index = result(future)
        assert owner == index != runtime.index
        # What comes before its worker has it again waits in the kernel.
        sock.sendall(b"echo back again\n")
        assert sock.recv(100) == b"back again"
        assert owner_of(runtime, sid) == runtime.index
        assert worker.arrived == [sid] * (turn + 1)
        wait_until(lambda: not runtime.sockets()["busy"].any(), "it is idle")
    assert runtime.audit() == []


def test_a_client_that_leaves_while_a_job_owns_it_ends_the_job(
    runtime: shmsock.Runtime,
    client: tuple[int, socket.socket],
    pool: ProcessPoolExecutor,
    tmp_path: typing.Any,
) -> None:
    sid, sock = client
    path = str(tmp_path / "running")
    future = pool.submit(converse, sid, path, client=sid, own=True)
    started(path)
    sock.shutdown(socket.SHUT_RDWR)  # a forked child has a duplicate of the client's end too
    error = future.exception(WATCHDOG_S)  # its own return, or the abort: either may be first
    assert error is None or isinstance(error, shmsock.SocketFailedError)
    wait_until(lambda: runtime.status(sid) is shmsock.Status.GONE)
    assert result(pool.submit(abs, -1)) == 1


@pytest.mark.parametrize("policy", ["fail", "rehome"])
def test_a_child_killed_as_owner_is_any_owner_that_died(
    runtime: shmsock.Runtime,
    worker: Worker,
    pool: ProcessPoolExecutor,
    tmp_path: typing.Any,
    policy: str,
) -> None:
    ours, theirs = connected()
    with theirs:
        theirs.settimeout(WATCHDOG_S)
        sid = worker.adopt(ours, policy)
        path = str(tmp_path / "running")
        future = pool.submit(converse, sid, path, client=sid, own=True)
        os.kill(started(path), signal.SIGKILL)
        assert isinstance(error_of(future), shmsock.PoolProcessDiedError)
        if policy == "fail":
            wait_until(lambda: runtime.status(sid) is not shmsock.Status.LIVE)
            assert theirs.recv(1) == b""
        else:
            wait_until(lambda: runtime.rehome(sid), "an orphan")
            worker.dispatcher.call_soon(lambda: worker._arrived([sid]))
            theirs.sendall(b"echo home\n")
            assert theirs.recv(100) == b"home"
            runtime.set_failed(sid)
    assert result(pool.submit(abs, -1)) == 1
    wait_until(lambda: runtime.in_use() == 0)
    assert runtime.audit() == []


def test_a_socket_that_a_job_leaves_in_mid_message_is_failed(
    runtime: shmsock.Runtime, client: tuple[int, socket.socket], pool: ProcessPoolExecutor
) -> None:
    sid, sock = client
    result(pool.submit(converse_badly, sid, client=sid, own=True))
    assert sock.recv(1) == b""
    wait_until(lambda: runtime.status(sid) is shmsock.Status.GONE)


def test_what_cannot_be_lent_says_why_and_stays_where_it_is(
    runtime: shmsock.Runtime,
    worker: Worker,
    client: tuple[int, socket.socket],
    pool: ProcessPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(shmsock.pool_manager, "_LEND_S", 0.02)
    sid, sock = client
    with runtime.address(sid) as ref:  # type: ignore[union-attr]
        ref.busy = True
        error = error_of(pool.submit(converse, sid, "", client=sid, own=True))
        assert isinstance(error, shmsock.OwnershipError)
        assert "busy" in str(error)
        ref.busy = False
    with ProcessPoolExecutor(name + "-", 1, mp_context=fork()) as foreign:
        error = error_of(foreign.submit(converse, sid, "", client=sid, own=True))
        assert isinstance(error, shmsock.RuntimeNotFoundError)
    with pytest.raises(ValueError, match="client"):
        pool.submit(converse, sid, "", own=True)
    sock.sendall(b"echo still here\n")
    assert sock.recv(100) == b"still here"
    runtime.set_failed(sid, errno.ECONNRESET, "closed the tab")
    error = error_of(pool.submit(converse, sid, "", client=sid, own=True))
    assert isinstance(error, shmsock.SocketFailedError)


# -- moments --------------------------------------------------------------------------------------


def test_a_job_that_had_not_begun_when_its_child_was_killed_is_run_by_another(
    runtime: shmsock.Runtime, client: tuple[int, socket.socket]
) -> None:
    sid, sock = client
    with ProcessPoolExecutor(runtime.name, 1, mp_context=fork()) as pool:
        pid = result(pool.submit(os.getpid))
        stop(pid)
        future = pool.submit(answer, sid, b"by another", client=sid)
        wait_until(future.running, "it was given to the child")
        os.kill(pid, signal.SIGKILL)
        assert result(future) != pid
        assert sock.recv(100) == b"by another"


def test_a_child_in_a_long_job_lets_go_of_what_failed(
    runtime: shmsock.Runtime,
    client: tuple[int, socket.socket],
    tmp_path: typing.Any,
) -> None:
    sid, _ = client
    go = str(tmp_path / "go")
    with ProcessPoolExecutor(runtime.name, 1, mp_context=fork()) as pool:
        with runtime.address(sid) as ref:  # type: ignore[union-attr]
            inode = os.fstat(ref.fileno()).st_ino
        result(pool.submit(answer, sid, b"!", client=sid))
        assert holders_of(inode, pool.pids()) == pool.pids()
        busy = pool.submit(wait_for, go)
        wait_until(busy.running)
        runtime.set_failed(sid)
        wait_until(lambda: holders_of(inode, pool.pids()) == [], "its duplicate is closed")
        assert not busy.done()
        open(go, "w").close()
        result(busy)
