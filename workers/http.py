"""HTTP/1.1 on the shared port: what is a request, when is it whole, how is it answered.

Owns the framing of a connection's bytes into requests and the bytes of responses. What a request
*means* is the handler's; this file knows no path. Reading and closing are the messenger's.

The bytes are checked by httptools (llhttp, all leniencies off), but the cutting is done here: it is
fed whole lines and counted slices of a body. So the limits are exact, the outcome cannot depend on
how the network cut the stream, and these properties of httptools 0.9 cannot hurt:

* Callbacks swallow every exception, KeyboardInterrupt too: ours only record, everything else
  happens after ``feed_data`` has returned.
* An Upgrade request's body is taken for the first bytes of the next protocol, which, for a server
  that ignores Upgrade, is the next request: the Upgrade line is not shown to the parser.
* Trailers of a chunked body arrive through ``on_header`` like headers: dropped, or a trailer could
  replace the Host or Origin that was checked.
* HTTP/0.9, HTTP/2.0, RTSP and ICE pass as versions; "gzip, chunked", and chunked in HTTP/1.0, pass
  as transfer codings: refused here.
* A field name or URL is buffered without a bound until it is whole: lines are bounded here.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import email.utils
import errno
import functools
import logging
import re
import time
import typing
import urllib.parse
from http import HTTPStatus

import httptools

if typing.TYPE_CHECKING:
    from shmsock import SocketRef

log = logging.getLogger("shmsock")
access_log = logging.getLogger("shmsock.access")

LINE_LIMIT_BYTES = 16 << 10  # of a request line; also how far ``match`` looks
HEAD_LIMIT_BYTES = 64 << 10  # request line, headers; separately: chunk sizes and trailers
BODY_LIMIT_BYTES = 1 << 20
# A pipelined batch is answered with one write, unless its answers are as large as this.
_FLUSH_BYTES = 1 << 20

METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT")
_NOT_IMPLEMENTED = (b"TRACE", b"CONNECT")
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/(\d)\.(\d)\r\n")
_UPGRADE = re.compile(rb"\nupgrade:", re.IGNORECASE)
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_HTML_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@dataclasses.dataclass(slots=True)  # WHY NOT frozen: it costs each field a call
class Request:
    """One whole request.

    Attributes:
        path: Decoded; ``*`` for OPTIONS of the server.
        query: Each name with its values, in order; a name without ``=`` has the value "".
        headers: Lower-case names; the values of a repeated one joined by ", ".
        keep_alive: Whether the client means to go on.
    """

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[bytes, bytes]
    body: bytes
    keep_alive: bool


@dataclasses.dataclass(slots=True)
class Response:
    """What a handler answers; length, date and the protective headers are added on the way out."""

    status: int
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"
    headers: collections.abc.Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Another process answers this request, and its answer is the connection's last.

    ``start`` is called as soon as that process may write: everything said before is with the
    kernel. What the other process writes begins with ``stream_head`` or is ``whole_answer``, and
    ends with ``release_additional_reference``. This worker goes on reading: when the client leaves
    it fails the socket, and so ends what is done for it.
    """

    start: collections.abc.Callable[[], object]


Handler = collections.abc.Callable[[Request, "SocketRef"], Response | Elsewhere]


class _RefusedError(Exception):
    """The stream cannot be trusted from here on: answer this, close."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, text)
        phrase = HTTPStatus(status).phrase
        self.response = Response(
            status, f"{status} {phrase}: {text}\n".encode(), headers=headers or {}
        )


class _Message:
    """What httptools says about the message in progress. Records, does nothing, never raises."""

    def reset(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = bytearray()
        self.head_complete = self.chunk_header = self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.head_complete:
            self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.head_complete = True

    def on_chunk_header(self) -> None:
        self.chunk_header = True

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


class HttpProtocol:
    """HTTP for the messenger: answers every request with ``handler``."""

    name = "http"

    def __init__(
        self, handler: Handler, *, closing: collections.abc.Callable[[], bool] | None = None
    ) -> None:
        """Serve ``handler``; while ``closing`` says true, each answer is a connection's last."""
        self.handler = handler
        self.closing = closing or (lambda: False)

    def match(self, head: bytes) -> bool | None:
        """Whether the first line is a request's: a method, a space, and later `` HTTP/1.``.

        The method alone is not enough: ``GET key`` is an inline command of RESP.
        """
        if (
            head[: head.find(b" ", 0, 8)] in METHODS
            and b" HTTP/1." in head.partition(b"\n")[0][:LINE_LIMIT_BYTES]
        ):
            return True
        window = head[:LINE_LIMIT_BYTES]
        line, newline, _ = window.partition(b"\n")
        method, space, _ = line.partition(b" ")
        if not space:
            could_become = not newline and any(known.startswith(method) for known in METHODS)
            return None if could_become else False
        if method not in METHODS:
            return False
        if b" HTTP/1." in line:
            return True
        return False if newline or len(window) == LINE_LIMIT_BYTES else None

    def resumes(self, user_data: bytes) -> bool:
        """Never: between two requests a connection has no state, and says again what it is."""
        return False

    def open(self, ref: SocketRef) -> HttpSession:
        """Start parsing a connection."""
        return HttpSession(self)


class HttpSession:
    """One connection: a line-by-line reader around httptools, and the answers."""

    def __init__(self, protocol: HttpProtocol) -> None:
        """With nothing read yet."""
        self._protocol = protocol
        self._buffer = bytearray()
        self._at = 0  # the buffer is consumed up to here
        self._scanned = 0  # and has no newline between _at and here
        self._message = _Message()
        self._parser = httptools.HttpRequestParser(self._message)
        self._messages = 0
        self._closed = False
        self._elsewhere = False
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._begin()

    def _begin(self) -> None:
        """Expect the first line of a request."""
        self._message.reset()
        self._method = self._target = self._version = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._framing_bytes = 0
        self._data_left_bytes = 0
        self._started_s = 0.0

    # -- Session --------------------------------------------------------------------------------

    def receive(self, ref: SocketRef, data: bytes) -> bool:
        """Answer every request that ``data`` completes."""
        if self._closed:
            return False
        if self._elsewhere:  # there is no next request
            return True
        self._buffer += data
        try:
            while not (self._closed or self._elsewhere) and (
                self._take_whole_head(ref)
                or ((piece := self._next_piece()) and self._take(piece, ref))
            ):
                pass
        except _RefusedError as error:
            self._closed = True
            self._send(ref, error.response, keep_alive=False)
        if self._closed or self._elsewhere:
            self._buffer.clear()
        else:
            del self._buffer[: self._at]
        self._scanned -= self._at
        self._at = 0
        self._flush(ref)
        return not self._closed

    def idle(self) -> bool:
        """Whether we are between two requests, or after the last."""
        return self._closed or not (self._elsewhere or self._buffer or self._head_bytes)

    def messages(self) -> int:
        """Requests handed to the handler."""
        return self._messages

    def movable(self) -> bool:
        """Between two requests there is no state."""
        return not self._closed and self.idle()

    def peer_ended(self, ref: SocketRef) -> None:
        """Who computes for this client need not go on."""
        if self._elsewhere:
            ref.set_failed(errno.ECONNRESET, "the client left before its answer was whole")

    def moved(self, sid: int) -> None:
        """Nothing is kept of it."""
        self.end(sid)

    def end(self, sid: int) -> None:
        """Drop what was buffered."""
        self._closed = True
        self._buffer.clear()
        self._message.reset()

    # -- cutting --------------------------------------------------------------------------------

    def _next_piece(self) -> bytes:
        """The next line, or part of a body; empty when more must be read first."""
        begin = self._at
        if self._data_left_bytes:
            end = min(len(self._buffer), begin + self._data_left_bytes)
        else:
            newline = self._buffer.find(b"\n", max(begin, self._scanned))
            self._scanned = len(self._buffer)
            end = newline + 1
            # Also without the newline: what is too long now is too long with the rest, so where
            # the stream was cut makes no difference.
            self._check_line((end or len(self._buffer)) - begin)
            if not end:
                return b""
        self._at = self._scanned = end
        return bytes(self._buffer[begin:end])

    def _check_line(self, line_bytes: int) -> None:
        if self._message.head_complete:
            if self._framing_bytes + line_bytes > HEAD_LIMIT_BYTES:
                raise _RefusedError(413, "too many bytes of chunk sizes and trailers")
        elif not self._head_bytes and line_bytes > LINE_LIMIT_BYTES:
            raise _RefusedError(414, f"a request line may have {LINE_LIMIT_BYTES} bytes")
        elif self._head_bytes + line_bytes > HEAD_LIMIT_BYTES:
            raise _RefusedError(431, f"request line and headers may have {HEAD_LIMIT_BYTES} bytes")

    def _take_whole_head(self, ref: SocketRef) -> bool:
        """Feed a head that is here whole and within every limit at once; else false.

        What follows from it is what would follow line by line: the parser is a stream's, and the
        one line that it must not see (see the head of this file) sends us the other way.
        """
        begin, message = self._at, self._message
        if self._head_bytes or self._data_left_bytes or message.head_complete:
            return False
        end = self._buffer.find(b"\r\n\r\n", begin, begin + HEAD_LIMIT_BYTES) + 4
        line_end = self._buffer.find(b"\n", begin, begin + LINE_LIMIT_BYTES) + 1
        if end < 4 or not line_end or line_end - begin <= 2:
            return False
        head = bytes(self._buffer[begin:end])
        if _UPGRADE.search(head):
            return False
        self._at = self._scanned = end
        self._head_bytes = len(head)
        self._started_s = time.monotonic()
        self._check_request_line(head[: line_end - begin])
        self._feed(head)
        if message.head_complete:
            self._check_head()
        if message.complete:
            self._handle(ref)
            self._begin()
        return True

    def _take(self, piece: bytes, ref: SocketRef) -> bool:
        """Feed one piece and do what follows from it; true."""
        message = self._message
        if not message.head_complete:
            self._take_head_line(piece)
            if message.head_complete:
                self._check_head()
        elif self._data_left_bytes:
            self._feed(piece)
            self._data_left_bytes -= len(piece)
        else:
            self._framing_bytes += len(piece)
            self._feed(piece)
            if message.chunk_header:
                message.chunk_header = False
                # The parser has checked it: hexadecimal digits, then ";" or the end of the line.
                self._expect_data(int(piece.partition(b";")[0], 16))
        if message.complete:
            self._handle(ref)
            self._begin()
        return True

    def _take_head_line(self, line: bytes) -> None:
        if not self._head_bytes:
            if line in (b"\r\n", b"\n"):  # allowed before a request (RFC 9112, 2.2)
                return
            self._head_bytes = len(line)
            self._started_s = time.monotonic()
            self._check_request_line(line)
        else:
            self._head_bytes += len(line)
            # Ignored, also by the parser: see the head of this file.
            if line[:8].lower() == b"upgrade:" and line.endswith(b"\r\n"):
                return
        self._feed(line)

    def _feed(self, piece: bytes) -> None:
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserError as error:
            cause = error.__context__
            if cause is not None and not isinstance(cause, Exception):
                raise cause from None  # a signal's, raised in a callback
            raise _RefusedError(400, f"{error}".lower()) from error
        except httptools.HttpParserUpgrade as error:
            raise _RefusedError(400, "this server does not upgrade") from error

    # -- checking -------------------------------------------------------------------------------

    def _check_request_line(self, line: bytes) -> None:
        matched = _REQUEST_LINE.fullmatch(line)
        if not matched:
            raise _RefusedError(400, "not a request line of HTTP/1.1")
        self._method, self._target, major, minor = matched.groups()
        if self._method not in METHODS or self._method in _NOT_IMPLEMENTED:
            raise _RefusedError(
                501, "this server does not know the method", {"Allow": "GET, HEAD, POST"}
            )
        self._version = major + b"." + minor
        if self._version not in (b"1.0", b"1.1"):
            raise _RefusedError(505, "this server speaks HTTP/1.1 and HTTP/1.0")

    def _check_head(self) -> None:
        """Refuse what two readers could understand in two ways, then expect the body."""
        headers = self._headers
        for name, value in self._message.headers:
            if name in (b"host", b"content-length", b"transfer-encoding") and name in headers:
                raise _RefusedError(400, f"more than one {name.decode()} header")
            headers[name] = headers[name] + b", " + value if name in headers else value
        host = headers.get(b"host")
        if host is None and self._version == b"1.1":
            raise _RefusedError(400, "no Host header")
        if host is not None and not _HOST.fullmatch(host):
            raise _RefusedError(400, "bad Host header")
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (self._version == b"1.0" or coding.lower() != b"chunked"):
            raise _RefusedError(400, "bad Transfer-Encoding: only chunked, and only in HTTP/1.1")
        self._expect_data(int(headers.get(b"content-length", b"0")))
        expectation = headers.get(b"expect") if self._version == b"1.1" else None
        if expectation is not None:
            if expectation.lower() != b"100-continue":
                raise _RefusedError(417, "only 100-continue can be expected")
            if not self._message.complete:
                # Also when the body is here already, which the client cannot know.
                self._append(_CONTINUE)

    def _expect_data(self, data_bytes: int) -> None:
        if len(self._message.body) + data_bytes > BODY_LIMIT_BYTES:
            raise _RefusedError(413, f"a body may have {BODY_LIMIT_BYTES} bytes")
        self._data_left_bytes = data_bytes

    def _request(self) -> Request:
        """The whole message as the handler gets it."""
        target = self._target.decode("ascii").partition("#")[0]
        if target[:7].lower() == "http://":
            # Absolute form: the target says the host, whatever the header says (RFC 9112, 3.2.2).
            authority, slash, rest = target[7:].partition("/")
            if not authority or "@" in authority or "?" in authority:
                raise _RefusedError(400, "bad request target")
            self._headers[b"host"] = authority.encode("ascii")
            target = slash + rest or "/"
        if not target.startswith("/") and (target, self._method) != ("*", b"OPTIONS"):
            raise _RefusedError(400, "bad request target")
        path, _, query = target.partition("?")
        try:
            parsed = (
                urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=100)
                if query
                else {}
            )
        except ValueError as error:
            raise _RefusedError(400, "bad query") from error
        return Request(
            method=self._method.decode("ascii"),
            path=urllib.parse.unquote(path) if "%" in path else path,
            query=parsed,
            headers=self._headers,
            body=bytes(self._message.body),
            keep_alive=self._keep_alive(),
        )

    def _keep_alive(self) -> bool:
        options = self._headers.get(b"connection", b"").lower().split(b",")
        options = [option.strip() for option in options]
        return b"close" not in options and (self._version == b"1.1" or b"keep-alive" in options)

    # -- answering ------------------------------------------------------------------------------

    def _handle(self, ref: SocketRef) -> None:
        request = self._request()
        self._messages += 1
        keep_alive = request.keep_alive
        try:
            response = self._protocol.handler(request, ref)
            if isinstance(response, Response):
                self._send(ref, response, keep_alive=keep_alive and not self._protocol.closing())
        except Exception:
            log.exception("the handler of %s %s failed", request.method, ascii(request.path))
            raise _RefusedError(500, "the server has failed here; its log says how") from None
        if isinstance(response, Elsewhere):
            self._leave(ref, response)
        elif self._out_bytes >= _FLUSH_BYTES:
            # A few kilobytes of pipelined requests can ask for gigabytes of pages: let the bound
            # on unwritten bytes see them as they come.
            self._flush(ref)

    def _send(self, ref: SocketRef, response: Response, *, keep_alive: bool) -> None:
        """Queue one response, with its line in the access log."""
        head = _head_of(response, keep_alive=keep_alive, old=self._version == b"1.0")
        self._closed = not keep_alive
        self._append(head if self._method == b"HEAD" else head + response.body)
        if access_log.isEnabledFor(logging.INFO):
            took_ms = (time.monotonic() - self._started_s) * 1e3 if self._started_s else 0.0
            access_log.info(
                '%s "%s %s HTTP/%s" %d %d %.1fms',
                ref.peer or "-",
                self._method.decode("ascii") or "-",
                self._target.decode("ascii") or "-",
                self._version.decode("ascii") or "-",
                response.status,
                len(response.body),
                took_ms,
            )

    def _leave(self, ref: SocketRef, response: Elsewhere) -> None:
        """Let another process answer, once what we have said ourselves is out."""
        self._flush(ref)
        if ref.unwritten_bytes():  # another process's message would overtake it
            raise _RefusedError(503, "read the earlier answers first")
        try:
            response.start()
        except Exception:
            log.exception("an answer could not be started elsewhere")
            raise _RefusedError(500, "the server has failed here; its log says how") from None
        self._elsewhere = True
        if access_log.isEnabledFor(logging.INFO):
            method, target = self._method.decode("ascii"), self._target.decode("ascii")
            access_log.info('%s "%s %s" is answered elsewhere', ref.peer or "-", method, target)

    def _append(self, data: bytes) -> None:
        self._out.append(data)
        self._out_bytes += len(data)

    def _flush(self, ref: SocketRef) -> None:
        out, self._out, self._out_bytes = self._out, [], 0
        if out:
            ref.write(*out)


_date = (0, "")


def _http_date() -> str:
    """Now, in a Date header's form; made once a second."""
    global _date
    now_s = int(time.time())
    if _date[0] != now_s:
        _date = (now_s, email.utils.formatdate(now_s, usegmt=True))
    return _date[1]


def whole_answer(response: Response) -> bytes:
    """A response as a connection's last; for who answers from another process."""
    return _head_of(response, keep_alive=False, old=False) + response.body


def stream_head(
    content_type: str, headers: collections.abc.Mapping[str, str] | None = None
) -> bytes:
    """The head of an answer whose body goes on until the connection is closed."""
    response = Response(200, b"", content_type, headers or {})
    head = _head_of(response, keep_alive=False, old=False)
    return head.replace(b"Content-Length: 0\r\n", b"", 1)


def _head_of(response: Response, *, keep_alive: bool, old: bool) -> bytes:
    """Status line and headers.

    Raises:
        ValueError: The handler put a line break, or what is not Latin-1, into a header.
    """
    return _made_head(
        response.status,
        response.content_type,
        len(response.body),
        tuple(response.headers.items()),
        "close" if not keep_alive else "keep-alive" if old else "",
        _http_date(),
    )


@functools.lru_cache(64)
def _made_head(
    status: int,
    content_type: str,
    length_bytes: int,
    headers: tuple[tuple[str, str], ...],
    connection: str,
    date: str,
) -> bytes:
    """A head, once a second for each kind of answer."""
    fields = {
        "Date": date,
        "Server": "shmsock",
        "Content-Type": content_type,
        "Content-Length": str(length_bytes),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }
    if content_type.startswith("text/html"):
        fields["Content-Security-Policy"] = _HTML_POLICY
    fields.update(headers)
    if connection:
        fields["Connection"] = connection
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header with a line break")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
