"""What ``tests.fuzz`` throws at each parser, and what must hold afterwards."""

from __future__ import annotations

import array
import collections.abc
import contextlib
import http.client
import itertools
import os
import socket
import typing
from unittest import mock

import h11
import hiredis
from hypothesis import strategies as st

import shmsock
from shmsock import channel
from workers import http as workers_http
from workers import resp

from . import test_http, test_resp
from .helpers import descriptors

Target = tuple[st.SearchStrategy[typing.Any], collections.abc.Callable[[typing.Any], None]]
_numbers = itertools.count()


def _name() -> str:
    return f"fuzz{os.getpid()}-{next(_numbers)}"


# -- damage -------------------------------------------------------------------------------------

DAMAGE = st.lists(
    st.tuples(st.integers(0, 1 << 12), st.integers(0, 4), st.binary(max_size=4)), max_size=4
)
PLACES = st.lists(st.integers(0, 1 << 12), max_size=8)


def damaged(data: bytes, damage: list[tuple[int, int, bytes]]) -> bytes:
    """``data`` with some bytes removed, replaced or put in."""
    return test_resp.mutated(data, damage)


def mostly_whole(
    strategy: st.SearchStrategy[bytes],
) -> st.SearchStrategy[bytes]:
    """What the grammar says, or that with damage."""
    return st.one_of(strategy, st.builds(damaged, strategy, DAMAGE))


# -- SocketIds ----------------------------------------------------------------------------------


@contextlib.contextmanager
def socket_id() -> collections.abc.Iterator[Target]:
    """Text is an id or a ValueError; two ids never have one text, nor a text two ids."""
    number = st.integers(-(1 << 66), 1 << 66) | st.integers(0, (1 << 63) - 1)
    digits_of_others = ["\u0663", "\uff11", "\u0131"]
    piece = st.sampled_from(["sk-", "SK-", "-", "0x", "_", "+", " ", "\n", "\0", *digits_of_others])
    text = st.one_of(
        number.map(str),
        number.map(shmsock.format_socket_id),
        st.builds("sk-{:x}-{}".format, st.integers(0, 1 << 34), st.integers(0, 1 << 34)),
        st.text(max_size=24),
    )
    strategy = st.tuples(text, st.lists(st.tuples(st.integers(0, 30), piece), max_size=2), number)

    def check(value: tuple[str, list[tuple[int, str]], int]) -> None:
        text, inserted, number = value
        for at, more in inserted:
            text = text[:at] + more + text[at:]
        try:
            sid = shmsock.parse_socket_id(text)
        except ValueError:
            pass
        else:
            assert 0 <= sid < 1 << 63
            assert shmsock.parse_socket_id(shmsock.format_socket_id(sid)) == sid
            word = text.strip().lower()
            assert word.isascii()
            if word.startswith("sk-"):
                version, slot = word[3:].split("-")
                assert (int(version, 16), int(slot)) == (sid >> 32, sid & 0xFFFFFFFF)
            else:
                assert int(word) == sid
        written = shmsock.format_socket_id(number)
        if 0 <= number < 1 << 63:
            assert shmsock.parse_socket_id(written) == number
        else:
            with contextlib.suppress(ValueError):
                raise AssertionError(shmsock.parse_socket_id(written))

    yield strategy, check


# -- the control channel ------------------------------------------------------------------------

KINDS = st.integers(channel.HELLO, channel.KEEP)
CODES = st.integers(-(1 << 31), (1 << 31) - 1)
WORDS = st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 64))


@contextlib.contextmanager
def message() -> collections.abc.Iterator[Target]:
    """A message is read as it was written, or refused; its descriptors are ours or closed."""
    ours, peers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    full = st.integers(channel.MAX_IDS - 1, channel.MAX_IDS + 1).map(range)
    ids = st.lists(WORDS, max_size=8) | full
    whole = st.builds(channel.pack, KINDS, ids, CODES)
    strategy = st.tuples(mostly_whole(whole) | st.binary(max_size=64), st.integers(0, 6))

    def check(value: tuple[bytes, int]) -> None:
        data, count = value
        if not data:
            return  # the end of the stream
        before = descriptors()
        rights = array.array("i", [ours.fileno()] * count)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if count else []
        ours.sendmsg([data], ancillary)
        try:
            received = channel.receive(peers)
        except channel.BadMessageError:
            received = None
        else:
            assert received is not None
            assert channel.pack(received.type, received.ids, received.code)[:6] == data[:6]
            assert len(received.descriptors) == count <= len(received.ids)
            channel.close_all(received.descriptors)
        assert descriptors() == before

    with ours, peers:
        yield strategy, check


# -- RESP ---------------------------------------------------------------------------------------

RESP_STREAMS = test_resp.STREAMS.map(lambda stream: b"".join(encoded for encoded, _ in stream))


@contextlib.contextmanager
def resp_parser() -> collections.abc.Iterator[Target]:
    """However it is cut, a stream means the same; and what hiredis reads where both can."""
    special = st.sampled_from(
        [b"$-1\r\n", b"*2\r\n", b"*1\r\n*1\r\n", b":1\r\n", b"_\r\n", b"%1\r\n"]
    )
    data = st.builds(
        test_resp.mutated,
        st.builds(b"".join, st.lists(RESP_STREAMS | special, max_size=3)),
        test_resp.MUTATIONS | st.just([]),
    )
    strategy = st.tuples(data, PLACES, st.booleans())

    def check(value: tuple[bytes, list[int], bool]) -> None:
        data, places, restricted = value
        whole = test_resp.parse(data, restricted=restricted)
        assert test_resp.parse(*test_resp.cut(data, places), restricted=restricted) == whole
        bytewise = [data[at : at + 1] for at in range(len(data))]
        assert test_resp.parse(*bytewise, restricted=restricted) == whole
        commands, error, idle = whole
        if error is None and idle and (oracle := _by_hiredis(data)) is not None:
            assert commands == oracle

    yield strategy, check


def _by_hiredis(data: bytes) -> list[resp.Command] | None:
    """The commands in a stream that is nothing but whole arrays of bulk strings; else None."""
    last = [b"the last one"]
    reader = hiredis.Reader(notEnoughData=...)
    reader.feed(data + test_resp.packed(*last))  # it never says what is unfinished
    try:
        found = list(iter(reader.gets, ...))
    except Exception:
        return None
    if not found or found.pop() != last or not all(isinstance(value, list) for value in found):
        return None
    flat = all(isinstance(word, bytes) for value in found for word in value)
    return [value for value in found if value] if flat else None


# -- HTTP ---------------------------------------------------------------------------------------

_METHOD = st.sampled_from([b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS"])
_END = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\r\n"])
_CHUNK_SIZE = st.sampled_from([b"%x", b"%X", b"0%x", b"%x;a=b", b'%x;q="x"', b"%x ", b"0x%x"])
# Each is what some server and some proxy have read in two ways.
_SHAPES = st.sampled_from(
    [
        b"Content-Length: 3",
        b"Content-Length: 0",
        b"Content-Length: 30",
        b"Content-Length: +3",
        b"Content-Length: 3, 3",
        b"Content-Length : 3",
        b"Content-Length: 3 ",
        b"Content_Length: 3",
        b" Content-Length: 3",
        b"content-length:\t3",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: Chunked",
        b"Transfer-Encoding:\x0bchunked",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding : chunked",
        b"X: y\r\n Transfer-Encoding: chunked",
        b"X: y\nTransfer-Encoding: chunked",
        b"X: y\rTransfer-Encoding: chunked",
        b"Host: other",
        b"Connection: close",
        b"Connection: keep-alive, Content-Length",
        b"Expect: 100-continue",
        b"Upgrade: h2c",
    ]
)
_BODY = st.sampled_from([b"", b"abc", b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n", b"0\r\n\r\n", b"\r\n"])


@st.composite
def _chunked(draw: st.DrawFn) -> bytes:
    pieces = []
    for body in draw(st.lists(_BODY.filter(len), max_size=3)):
        pieces += [draw(_CHUNK_SIZE) % len(body), draw(_END), body, draw(_END)]
    last = draw(st.sampled_from([b"0", b"00", b"0;x"]))
    trailer = draw(st.sampled_from([b"", b"", b"T: 1\r\n", b"Content-Length: 9\r\n", b" x\r\n"]))
    return b"".join([*pieces, last, draw(_END), trailer, draw(_END)])


@st.composite
def _request(draw: st.DrawFn) -> bytes:
    """One request: good, or with a line that two readers may read in two ways."""
    version = draw(st.sampled_from([b"1.1", b"1.1", b"1.1", b"1.0"]))
    target = draw(st.sampled_from([b"/", b"/a?b=c", b"*", b"http://h/x", b"/%00", b"/a#b"]))
    lines = [b"%s %s HTTP/%s" % (draw(_METHOD), target, version), b"Host: localhost"]
    body = b""
    framing = draw(st.integers(0, 3))
    if framing == 1:
        body = draw(_BODY)
        lines.append(b"Content-Length: %d" % len(body))
    elif framing == 2:
        body = draw(_chunked())
        lines.append(b"Transfer-Encoding: chunked")
    elif framing == 3:
        lines += draw(st.lists(_SHAPES, max_size=3))
        body = draw(_BODY | _chunked())
    head = b"".join(line + draw(_END) for line in draw(st.permutations(lines[1:])))
    return lines[0] + draw(_END) + head + draw(_END) + body


HTTP_STREAMS = st.lists(_request(), min_size=1, max_size=4).map(b"".join)


@contextlib.contextmanager
def http_parser() -> collections.abc.Iterator[Target]:
    """One request has one answer or the connection ends, cut as it may; h11 sees the same ones."""
    strategy = st.tuples(mostly_whole(HTTP_STREAMS), PLACES)

    def check(value: tuple[bytes, list[int]]) -> None:
        data, places = value
        seen: list[tuple[bytes, bytes]] = []

        def handler(request: workers_http.Request, _: object) -> workers_http.Response:
            seen.append((request.method.encode(), request.body))
            return workers_http.Response(200, b"yes")

        client = test_http.Client(handler)
        goes_on = client.send(data)
        sent, requests = client.wire.sent, list(seen)
        assert client.session.messages() == len(requests)
        methods = [method.decode() for method, _ in requests]
        answers = _answers(sent, methods)
        refused = len(answers) - len(requests)
        assert refused in ((0,) if goes_on else (0, 1))
        for at, (_, headers, _) in enumerate(answers):
            ends = headers.get("connection") == "close"
            assert ends is (not goes_on and at == len(answers) - 1)
        for pieces in (test_http.cut(data, places), [data[i : i + 1] for i in range(len(data))]):
            again = test_http.Client(handler)
            stays = all([again.send(piece) for piece in pieces if piece])
            assert (again.wire.sent, stays) == (sent, goes_on)
        _agrees_with_h11(data, requests, bool(refused))

    with mock.patch.object(
        workers_http, "_http_date", return_value="Thu, 01 Jan 1970 00:00:00 GMT"
    ):
        yield strategy, check


def _answers(sent: bytes, methods: list[str]) -> list[tuple[int, dict[str, str], bytes]]:
    """The answers on the wire, as the standard library's client reads them, without 100s.

    The last method is that of what was refused, if something was: it may have been a HEAD.
    """
    for ends in ([], ["GET"], ["HEAD"]):
        with contextlib.suppress(http.client.HTTPException, ConnectionError, AssertionError):
            return test_http.parse(sent, methods + ends)
    raise AssertionError(f"not the answers to {methods}: {sent!r}")


def _agrees_with_h11(data: bytes, requests: list[tuple[bytes, bytes]], refused: bool) -> None:
    """What h11 finds in the same bytes, as far as both go."""
    other = h11.Connection(h11.SERVER)
    other.receive_data(data)
    theirs: list[tuple[bytes, bytes]] = []
    body = b""
    method = b""
    try:
        while True:
            event = other.next_event()
            if isinstance(event, h11.Request):
                method, body = event.method, b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                theirs.append((method, body))
                other.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
                other.send(h11.EndOfMessage())
                if other.our_state is not h11.DONE or other.their_state is not h11.DONE:
                    break
                other.start_next_cycle()
            else:
                break
    except (h11.RemoteProtocolError, h11.LocalProtocolError):
        pass
    both = min(len(requests), len(theirs))
    assert requests[:both] == theirs[:both]


TARGETS: dict[str, collections.abc.Callable[[], contextlib.AbstractContextManager[Target]]] = {
    "socket_id": socket_id,
    "message": message,
    "resp": resp_parser,
    "http": http_parser,
}
