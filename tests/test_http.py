"""HTTP on the wire: what is a request, when is it whole, what is refused, how it is answered."""

from __future__ import annotations

import http.client
import io
import logging
import typing

import httptools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shmsock import SocketFailedError
from workers import http as shmsock_http
from workers.http import BODY_LIMIT_BYTES, HEAD_LIMIT_BYTES, HttpProtocol, Request, Response

if typing.TYPE_CHECKING:
    from shmsock import SocketRef

HOST = b"Host: localhost\r\n"
LF = b"\r\n"


class Wire:
    """Stands for the SocketRef of a connection: records what is written to it."""

    id = 17
    peer = "127.0.0.1:5555"

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, *buffers: bytes) -> None:
        self.writes.append(b"".join(buffers))

    @property
    def sent(self) -> bytes:
        return b"".join(self.writes)


class Client:
    """One connection to a handler, without a network."""

    def __init__(self, handler: shmsock_http.Handler, **options: typing.Any) -> None:
        self.wire = Wire()
        self.session = HttpProtocol(handler, **options).open(self.ref)

    @property
    def ref(self) -> SocketRef:
        return typing.cast("SocketRef", self.wire)

    def send(self, *pieces: bytes) -> bool:
        goes_on = True
        for piece in pieces:
            goes_on = self.session.receive(self.ref, piece)
        return goes_on


def tell(request: Request, ref: SocketRef) -> Response:
    """Answer with what was understood."""
    said = f"{request.method} {request.path} {request.query} {request.body!r}"
    return Response(200, said.encode())


def exchange(data: bytes, handler: shmsock_http.Handler = tell) -> tuple[Client, bool]:
    client = Client(handler)
    return client, client.send(data)


class _Socket:
    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def makefile(self, mode: str) -> io.BytesIO:
        return self._file


def parse(data: bytes, methods: list[str]) -> list[tuple[int, dict[str, str], bytes]]:
    """Read responses with the standard library's client, and insist that nothing is left."""
    sock = _Socket(data)
    # http.client closes the file after each response; the next one needs it.
    sock._file.close = lambda: None  # type: ignore[method-assign]
    found = []
    for method in methods:
        response = http.client.HTTPResponse(typing.cast(typing.Any, sock), method=method)
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        found.append((response.status, headers, response.read()))
    assert sock._file.read() == b""
    return found


def answer(data: bytes, handler: shmsock_http.Handler = tell) -> tuple[int, dict[str, str], bytes]:
    client, _ = exchange(data, handler)
    return parse(client.wire.sent, ["HEAD" if data.startswith(b"HEAD") else "GET"])[0]


# -- recognising ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "verdict"),
    [
        (b"GET / HTTP/1.1\r\n", True),
        (b"GET / HTTP/1.0\r\nHost", True),
        (b"POST /sockets/sk-2-1/fail HTTP/1.1\r\n", True),
        (b"OPTIONS * HTTP/1.", True),
        (b"", None),
        (b"G", None),
        (b"GET", None),
        (b"GET ", None),
        (b"GET /sockets?format=json HTT", None),
        (b"PO", None),
        (b"PING\r\n", False),
        (b"P", None),
        (b"PI", False),
        (b"GET\r\n", False),
        (b"GET foo\r\n", False),
        (b"get / HTTP/1.1\r\n", False),
        (b"SUBSCRIBE a HTTP/1.1\r\n", False),
        (b"GET foo\r\nGET / HTTP/1.1\r\n", False),
        (b"*1\r\n$4\r\nPING\r\n", False),
        (b"\x16\x03\x01", False),
        (b"GET " + b"a" * 17_000, False),
        (b"GET " + b"a" * 17_000 + b" HTTP/1.1\r\n", False),
    ],
)
def test_the_first_line_tells_http_from_inline_resp(head: bytes, verdict: bool | None) -> None:
    assert HttpProtocol(tell).match(head) is verdict


@given(st.sampled_from([b"GET /x HTTP/1.1\r\n", b"GET foo\r\n", b"PUT a b\n", b"HEADER x\r\n"]))
def test_the_verdict_is_the_same_for_every_prefix_that_gives_one(line: bytes) -> None:
    match = HttpProtocol(tell).match
    verdicts = {match(line[:end]) for end in range(len(line) + 1)} - {None}
    assert verdicts == {match(line)}


# -- requests ------------------------------------------------------------------------------------


def test_a_request_reaches_the_handler_whole_and_decoded() -> None:
    seen: list[Request] = []

    def handler(request: Request, ref: SocketRef) -> Response:
        seen.append(request)
        return Response(200)

    client = Client(handler)
    head = b"POST /a%20b/c?x=1&x=2&givemeall HTTP/1.1\r\nHOST: here\r\nX-A: 1\r\nx-a:  2 \r\n"
    assert client.send(head + b"Content-Length: 4\r\n\r\nbo", b"dy")
    (request,) = seen
    assert (request.method, request.path) == ("POST", "/a b/c")
    assert request.query == {"x": ["1", "2"], "givemeall": [""]}
    assert request.headers[b"host"] == b"here"
    assert request.headers[b"x-a"] == b"1, 2"
    assert request.body == b"body"
    assert request.keep_alive


def test_a_chunked_body_is_joined_and_its_trailers_cannot_replace_headers() -> None:
    seen: list[Request] = []

    def handler(request: Request, ref: SocketRef) -> Response:
        seen.append(request)
        return Response(200)

    body = b"3;ext=1\r\nab\n\r\n0000A\r\n0123456789\r\n0\r\nHost: evil\r\nOrigin: x\r\n\r\n"
    client = Client(handler)
    data = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + body
    assert client.send(data + b"GET /next HTTP/1.1\r\n" + HOST + LF)
    assert seen[0].body == b"ab\n0123456789"
    assert seen[0].headers[b"host"] == b"localhost"
    assert b"origin" not in seen[0].headers
    assert seen[1].path == "/next"


def test_an_absolute_target_names_the_host() -> None:
    seen: list[Request] = []

    def handler(request: Request, ref: SocketRef) -> Response:
        seen.append(request)
        return Response(200)

    exchange(b"GET http://evil:80/p?q=1#f HTTP/1.1\r\n" + HOST + LF, handler)
    assert (seen[0].path, seen[0].query) == ("/p", {"q": ["1"]})
    assert seen[0].headers[b"host"] == b"evil:80"


def test_a_pipelined_batch_is_answered_in_order_with_one_write() -> None:
    batch = b"".join(b"GET /%d HTTP/1.1\r\n%s\r\n" % (n, HOST) for n in range(50))
    client, goes_on = exchange(batch)
    assert goes_on
    assert len(client.wire.writes) == 1
    bodies = [body for _, _, body in parse(client.wire.sent, ["GET"] * 50)]
    assert [body.split()[1] for body in bodies] == [b"/%d" % n for n in range(50)]
    assert client.session.messages() == 50
    assert client.session.idle()


def test_answers_too_large_to_collect_are_written_as_they_come() -> None:
    def handler(request: Request, ref: SocketRef) -> Response:
        return Response(200, b"x" * (1 << 20))

    client, _ = exchange((b"GET / HTTP/1.1\r\n" + HOST + LF) * 3, handler)
    assert len(client.wire.writes) == 3


def test_nothing_is_written_while_a_request_is_incomplete() -> None:
    client, goes_on = exchange(b"GET / HTTP/1.1\r\nHost: loc")
    assert goes_on
    assert client.wire.writes == []
    assert not client.session.idle()
    assert client.session.messages() == 0


def test_empty_lines_between_requests_are_no_part_of_a_message() -> None:
    client, _ = exchange(b"GET / HTTP/1.1\r\n" + HOST + LF + b"\r\n\r\n")
    assert client.session.idle()
    assert client.send(b"\r\nGET /2 HTTP/1.1\r\n" + HOST + LF)
    assert client.session.messages() == 2


@pytest.mark.parametrize(
    ("version", "header", "goes_on", "connection"),
    [
        (b"1.1", b"", True, None),
        (b"1.1", b"Connection: close\r\n", False, "close"),
        (b"1.1", b"Connection: x, Close\r\n", False, "close"),
        (b"1.0", b"", False, "close"),
        (b"1.0", b"Connection: Keep-Alive\r\n", True, "keep-alive"),
    ],
)
def test_a_connection_goes_on_as_the_client_asked(
    version: bytes, header: bytes, goes_on: bool, connection: str | None
) -> None:
    client, goes = exchange(b"GET / HTTP/" + version + LF + HOST + header + LF)
    assert goes is goes_on
    assert parse(client.wire.sent, ["GET"])[0][1].get("connection") == connection


def test_what_follows_the_last_request_is_not_answered() -> None:
    client, goes_on = exchange((b"GET / HTTP/1.1\r\nConnection: close\r\n" + HOST + LF) * 2)
    assert not goes_on
    assert not client.send(b"GET / HTTP/1.1\r\n" + HOST + LF)
    assert len(parse(client.wire.sent, ["GET"])) == 1


def test_while_the_server_closes_each_answer_is_the_last() -> None:
    client = Client(tell, closing=lambda: True)
    assert not client.send(b"GET / HTTP/1.1\r\n" + HOST + LF)
    assert parse(client.wire.sent, ["GET"])[0][1]["connection"] == "close"


def test_head_is_answered_with_the_length_and_without_the_body() -> None:
    status, headers, body = answer(b"HEAD /x HTTP/1.1\r\n" + HOST + LF)
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) == len(b"HEAD /x {} b''")


def test_a_client_that_expects_100_is_told_to_continue_before_the_body() -> None:
    client = Client(tell)
    head = b"POST / HTTP/1.1\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n" + HOST + LF
    assert client.send(head)
    assert client.wire.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert client.send(b"ab")
    assert parse(client.wire.writes[1], ["POST"])[0][0] == 200


def test_a_client_is_not_told_to_continue_with_a_body_that_will_be_refused() -> None:
    head = b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9999999\r\n" + HOST + LF
    assert answer(head)[0] == 413


def test_an_upgrade_is_ignored_and_its_body_is_not_the_next_request() -> None:
    smuggled = b"GET /smuggled HTTP/1.1\r\n" + HOST + LF
    head = b"POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: "
    client, goes_on = exchange(head + b"%d\r\n" % len(smuggled) + HOST + LF + smuggled)
    assert goes_on
    ((status, _, body),) = parse(client.wire.sent, ["POST"])
    assert status == 200
    assert body.startswith(b"POST / ")


def test_httptools_still_takes_the_body_of_an_upgrade_for_another_protocol() -> None:
    """If this fails, the Upgrade line need not be kept from the parser any more."""
    parser = httptools.HttpRequestParser(object())
    head = b"POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\n"
    with pytest.raises(httptools.HttpParserUpgrade) as caught:
        parser.feed_data(head + b"abc")
    assert caught.value.args == (len(head),)


# -- refusals ------------------------------------------------------------------------------------

POST = b"POST / HTTP/1.1\r\n" + HOST


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + HOST + LF, 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nUpgrade: h2c\n" + HOST + LF, 400),
        (b"GET / HTTP/1.1\r\nUpgrade: h2c\r\n x: y\r\n" + HOST + LF, 400),
        (b"GET / HTTP/1.1\r\nnocolon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: a\0b\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n", 400),
        (b"GET / HTTP/1.12\r\n", 400),
        (b"GET / RTSP/1.0\r\n", 400),
        (b"GET /\r\n", 400),
        (b"GET x HTTP/1.1\r\n" + HOST + LF, 400),
        (b"GET * HTTP/1.1\r\n" + HOST + LF, 400),
        (b"GET http:///x HTTP/1.1\r\n" + HOST + LF, 400),
        (b"\x16\x03\x01\n", 400),
        (b"GET /?" + b"a=1&" * 101 + b" HTTP/1.1\r\n" + HOST + LF, 400),
        (POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
        (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", 400),
        (POST + b"Content-Length: +3\r\n\r\nabc", 400),
        (POST + b"Content-Length: 3, 3\r\n\r\nabc", 400),
        (POST + b"Content-Length: 0x3\r\n\r\nabc", 400),
        (POST + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n", 400),
        (POST + b"Content-Length: 1048577\r\n\r\n", 413),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n100001\r\n", 413),
        (
            POST
            + b"Transfer-Encoding: chunked\r\n\r\n80000\r\n"
            + b"x" * 0x80000
            + b"\r\n80001\r\n",
            413,
        ),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * HEAD_LIMIT_BYTES, 413),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 14_000, 413),
        (b"GET /" + b"a" * 16_400, 414),
        (POST + b"Expect: tea\r\nContent-Length: 1\r\n\r\n", 417),
        (b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * HEAD_LIMIT_BYTES, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 11_000, 431),
        (b"GET / HTTP/1.1\r\nX:" + b" " * HEAD_LIMIT_BYTES + b"y\r\n", 431),
        (b"BREW / HTTP/1.1\r\n", 501),
        (b"TRACE / HTTP/1.1\r\n", 501),
        (b"CONNECT a:1 HTTP/1.1\r\n", 501),
        (b"SUBSCRIBE / HTTP/1.1\r\n", 501),
        (b"GET / HTTP/2.0\r\n", 505),
        (b"GET / HTTP/0.9\r\n", 505),
    ],
)
def test_what_cannot_be_trusted_is_refused_once_and_the_connection_closes(
    data: bytes, status: int
) -> None:
    calls: list[Request] = []

    def handler(request: Request, ref: SocketRef) -> Response:
        calls.append(request)
        return Response(200)

    client, goes_on = exchange(data + b"GET / HTTP/1.1\r\n" + HOST + LF, handler)
    assert not goes_on
    assert calls == []
    ((got, headers, body),) = parse(client.wire.sent, ["GET"])
    assert got == status, body
    assert headers["connection"] == "close"
    assert headers["content-length"] == str(len(body))
    assert body.startswith(b"%d " % status)
    assert status != 501 or headers["allow"] == "GET, HEAD, POST"


def test_heads_and_bodies_up_to_the_limits_are_accepted() -> None:
    line = b"POST / HTTP/1.1\r\n"
    rest = HOST + b"Content-Length: %d\r\n\r\n" % BODY_LIMIT_BYTES
    filler = b"X: " + b"y" * (HEAD_LIMIT_BYTES - len(line) - len(rest) - 5) + LF
    client = Client(lambda request, ref: Response(200, b"%d" % len(request.body)))
    head = line + filler + rest
    assert len(head) == HEAD_LIMIT_BYTES
    assert client.send(head, b"b" * BODY_LIMIT_BYTES)
    assert parse(client.wire.sent, ["POST"])[0][2] == b"%d" % BODY_LIMIT_BYTES
    longer, goes_on = exchange(line + filler.replace(b"y", b"yy", 1) + rest)
    assert not goes_on
    assert parse(longer.wire.sent, ["POST"])[0][0] == 431


def test_good_requests_before_a_bad_one_are_answered_with_it_in_one_write() -> None:
    client, goes_on = exchange(b"GET /1 HTTP/1.1\r\n" + HOST + LF + b"nonsense\r\n")
    assert not goes_on
    assert len(client.wire.writes) == 1
    assert [status for status, _, _ in parse(client.wire.sent, ["GET"] * 2)] == [200, 400]


# -- answers -------------------------------------------------------------------------------------


def test_every_answer_has_its_length_date_and_protective_headers() -> None:
    _, headers, _ = answer(b"GET / HTTP/1.1\r\n" + HOST + LF)
    assert headers["date"].endswith(" GMT")
    assert headers["server"] == "shmsock"
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert "content-security-policy" not in headers


def test_html_has_a_strict_policy_unless_the_handler_has_its_own() -> None:
    def plain(request: Request, ref: SocketRef) -> Response:
        return Response(200, b"<p>", "text/html")

    def own(request: Request, ref: SocketRef) -> Response:
        return Response(200, b"<p>", "text/html", {"Content-Security-Policy": "sandbox"})

    request = b"GET / HTTP/1.1\r\n" + HOST + LF
    assert "default-src 'none'" in answer(request, plain)[1]["content-security-policy"]
    assert answer(request, own)[1]["content-security-policy"] == "sandbox"


def broken(request: Request, ref: SocketRef) -> Response:
    raise LookupError("a bug")


def injecting(request: Request, ref: SocketRef) -> Response:
    return Response(200, headers={"X": "a\r\nSet-Cookie: b"})


@pytest.mark.parametrize("handler", [broken, injecting])
def test_a_failing_handler_is_logged_and_answered_with_500_and_the_end(
    handler: shmsock_http.Handler, caplog: pytest.LogCaptureFixture
) -> None:
    client, goes_on = exchange((b"GET /x HTTP/1.1\r\n" + HOST + LF) * 2, handler)
    assert not goes_on
    ((status, headers, body),) = parse(client.wire.sent, ["GET"])
    assert (status, headers["connection"]) == (500, "close")
    assert b"bug" not in body
    (record,) = [record for record in caplog.records if record.name == "shmsock"]
    assert record.exc_info is not None


def test_a_client_that_failed_is_the_messengers_business() -> None:
    class Failed(Wire):
        def write(self, *buffers: bytes) -> None:
            raise SocketFailedError(104, "reset")

    session = HttpProtocol(tell).open(typing.cast("SocketRef", Failed()))
    with pytest.raises(SocketFailedError):
        session.receive(typing.cast("SocketRef", Failed()), b"GET / HTTP/1.1\r\n" + HOST + LF)


def test_a_signal_in_a_parser_callback_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(tell)

    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shmsock_http._Message, "on_headers_complete", interrupted)
    client = Client(tell)
    with pytest.raises(KeyboardInterrupt):
        client.send(b"GET / HTTP/1.1\r\n" + HOST + LF)


def test_the_access_log_has_a_line_for_each_answer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shmsock.access")
    exchange(b"GET /a?b=%0a HTTP/1.1\r\n" + HOST + LF + b"nonsense\r\n")
    lines = [record.getMessage() for record in caplog.records if record.name == "shmsock.access"]
    assert lines[0].startswith('127.0.0.1:5555 "GET /a?b=%0a HTTP/1.1" 200 ')
    assert lines[1].startswith('127.0.0.1:5555 "- - HTTP/-" 400 ')


def test_an_ended_session_takes_nothing_more() -> None:
    client, _ = exchange(b"GET / HTTP/1.1\r\nHost")
    client.session.end(17)
    assert client.session.idle()
    assert not client.send(b": a\r\n\r\n")
    assert client.wire.writes == []


# -- any cut, any bytes --------------------------------------------------------------------------

STREAMS = [
    (
        b"GET /1 HTTP/1.1\r\n" + HOST + LF
        + b"POST /2?a=b HTTP/1.1\r\nContent-Length: 5\r\n" + HOST + LF + b"a\r\n\nb"
        + b"\r\nHEAD /3 HTTP/1.1\r\n" + HOST + LF
        + POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"4\r\nGET \r\nb;x\r\nx HTTP/1.1\r\n\r\n0\r\nT: 1\r\n\r\n"
        + b"GET /5 HTTP/1.0\r\nConnection: keep-alive, Upgrade\r\nUpgrade: x\r\n\r\n"
        + b"GET /6 HTTP/1.1\r\nConnection: close\r\n" + HOST + LF + b"GET /7 HTTP/1.1\r\n"
    ),
    b"GET /1 HTTP/1.1\r\n" + HOST + LF + b"GET /2 HTTP/1.1\nHost: a\n\n" + b"more",
    POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nContent-Length: 5\r\n\r\nhello",
]  # fmt: skip


def outcome(pieces: typing.Iterable[bytes]) -> tuple[bytes, bool, int]:
    client = Client(tell)
    goes_on = all([client.send(piece) for piece in pieces if piece])
    return client.wire.sent, goes_on, client.session.messages()


def cut(data: bytes, places: typing.Iterable[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places})
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]


@pytest.fixture(autouse=True, scope="module")
def _one_date() -> typing.Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shmsock_http, "_http_date", lambda: "Thu, 01 Jan 1970 00:00:00 GMT")
        yield


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_byte_by_byte_gets_the_same_answers(stream: bytes) -> None:
    assert outcome(stream[i : i + 1] for i in range(len(stream))) == outcome([stream])


@given(st.sampled_from(STREAMS), st.lists(st.integers(0, 1 << 16), max_size=12))
def test_however_a_stream_is_cut_it_gets_the_same_answers(stream: bytes, at: list[int]) -> None:
    assert outcome(cut(stream, at)) == outcome([stream])


@settings(max_examples=300)
@given(
    st.sampled_from(STREAMS),
    st.lists(
        st.tuples(st.integers(0, 1 << 16), st.integers(0, 3), st.binary(max_size=3)), max_size=6
    ),
    st.lists(st.integers(0, 1 << 16), max_size=4),
)
@example(b"\r\n", [], [])
def test_damaged_bytes_are_answered_or_refused_alike_and_never_raise(
    stream: bytes, damage: list[tuple[int, int, bytes]], at: list[int]
) -> None:
    data = bytearray(stream)
    for place, length, instead in damage:
        start = place % (len(data) + 1)
        data[start : start + length] = instead
    whole = outcome([bytes(data)])
    assert outcome(cut(bytes(data), at)) == whole
    sent, goes_on, _ = whole
    assert goes_on or sent.startswith(b"HTTP/1.1 ")
