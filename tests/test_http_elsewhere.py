"""Requests that another process answers: when it may begin, and what its client's leaving does."""

from __future__ import annotations

import collections.abc
import errno
import socket

import pytest

import shmsock
from workers.http import Elsewhere, HttpProtocol, Request, Response, stream_head, whole_answer
from workers.messenger import Messenger

from .helpers import Peer, connected, read_to_end, wait_until

LARGE = 1 << 20


class Site:
    """``/large`` is answered here, ``/there`` elsewhere, ``/fails`` cannot be started."""

    def __init__(self, runtime: shmsock.Runtime) -> None:
        self.runtime = runtime
        self.dispatcher = shmsock.Dispatcher(runtime)
        self.started: list[int] = []
        self.messenger = Messenger(runtime, self.dispatcher, (HttpProtocol(self.answer),))
        self.client = socket.socket()  # until one connects
        self.sid = 0

    def answer(self, request: Request, ref: shmsock.SocketRef) -> Response | Elsewhere:
        if request.path == "/large":
            return Response(200, b"x" * LARGE)
        if request.path == "/fails":
            return Elsewhere(lambda: 1 // 0)
        if request.path == "/there":
            sid = ref.id
            return Elsewhere(lambda: self.started.append(sid))
        return Response(200, b"here")

    def connect(self, buffer_bytes: int = 0) -> None:
        ours, self.client = connected("tcp", buffer_bytes)
        self.sid = self.runtime.create_socket(ours)
        self.messenger.take([self.sid])

    def ask(self, *paths: str) -> None:
        for path in paths:
            self.client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    def run_until(self, condition: collections.abc.Callable[[], object]) -> None:
        def look() -> object:
            self.dispatcher.run_once(0)
            return condition()

        wait_until(look)


@pytest.fixture
def site(runtime: shmsock.Runtime) -> collections.abc.Iterator[Site]:
    made = Site(runtime)
    made.client.close()
    yield made
    made.client.close()
    made.dispatcher.close()


def test_the_other_process_begins_after_earlier_answers_and_has_the_last_word(site: Site) -> None:
    site.connect()
    site.ask("/", "/there", "/", "/there")
    site.run_until(lambda: site.started)
    assert site.started == [site.sid]
    with Peer(site.runtime.name) as other:
        head, whole = stream_head("text/plain"), whole_answer(Response(200, b"whole"))
        other.run(f"ref = rt.address({site.sid}); ref.write({head!r}, b'there')")
        other.run("ref.release_additional_reference(); ref.close()")
        answer = read_to_end(site.client)
    first, _, second = answer.partition(b"here")
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert second.count(b"HTTP/1.1") == 1  # what was pipelined behind it is not answered
    assert second.endswith(b"\r\n\r\nthere")
    assert b"Content-Length" not in second
    assert b"Connection: close\r\n" in second
    assert b"Content-Length: 5\r\n" in whole
    assert b"Connection: close\r\n" in whole
    site.run_until(lambda: not len(site.messenger))


def test_while_another_process_answers_the_connection_is_busy(
    site: Site, runtime: shmsock.Runtime
) -> None:
    site.connect()
    site.ask("/there")
    site.run_until(lambda: site.started)
    assert runtime.sockets()["busy"].tolist() == [1]
    site.client.sendall(b"\0nonsense that is not looked at")
    site.run_until(lambda: int(runtime.sockets()["bytes_in"][0]) > 40)
    assert runtime.address(site.sid) is not None


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR])
def test_a_client_that_leaves_early_fails_its_socket_for_everybody(
    site: Site, runtime: shmsock.Runtime, how: int
) -> None:
    site.connect()
    site.ask("/there")
    site.run_until(lambda: site.started)
    with Peer(runtime.name) as other:
        other.run(f"ref = rt.address({site.sid}); assert not ref.failed")
        site.client.shutdown(how)
        site.run_until(lambda: not len(site.messenger))
        assert other.ask("ref.failed")
        assert other.ask("ref.error") == [
            errno.ECONNRESET, "the client left before its answer was whole"
        ]  # fmt: skip
        other.run("ref.close()")


def test_nothing_begins_elsewhere_before_a_slow_client_has_read_the_earlier_answers(
    site: Site,
) -> None:
    site.connect(4096)
    site.ask("/large", "/large", "/there")
    site.run_until(lambda: site.runtime.unwritten_bytes())
    site.client.settimeout(0)
    heard = bytearray()

    def read() -> bool:
        try:
            chunk = site.client.recv(1 << 16)
        except BlockingIOError:
            return False
        heard.extend(chunk)
        return not chunk

    site.run_until(read)
    assert site.started == []
    assert heard.count(b"HTTP/1.1 200") == 2
    assert b"HTTP/1.1 503 Service Unavailable" in heard
    assert heard.endswith(b"read the earlier answers first\n")


def test_what_cannot_be_started_is_an_error_of_the_server(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.connect()
    site.ask("/fails")
    site.run_until(lambda: "could not be started elsewhere" in caplog.text)
    site.run_until(lambda: not len(site.messenger))
    assert b"HTTP/1.1 500" in read_to_end(site.client)
