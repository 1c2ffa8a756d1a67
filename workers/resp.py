"""RESP on the wire: bytes into commands, values into bytes. What a command means is hub's.

hiredis parses. It is a parser of *replies*, though, and a server's input needs more:

 1. It never says how much it consumed, and takes types that no command contains.
 2. Its arrays are allocated by their header: thirteen bytes ask for gigabytes.
 3. It knows nothing of inline commands, nor of Redis's limits and their error texts.

So a chunk is first taken at its word: hiredis parses all of it, and the outcome is believed only
if it accounts for every byte, exactly (``_arrays``; ``_lines`` for inline commands). Whatever is
left, or does not add up, goes through ``_Framer``, which finds the end of one message at a time by
the rules of redis-server (networking.c) and hands each whole one to hiredis. The framer decides
alone what is an error, so it does not matter how the stream was cut into chunks.

What waits for more bytes waits in the framer, which knows how many it needs: a large message costs
its length, not its length times the number of its chunks.
"""

from __future__ import annotations

import collections.abc
import functools
import re
import typing

import hiredis

Command = list[bytes]

MAX_ARGUMENTS = 1024 * 1024
MAX_INLINE_BYTES = 64 << 10
# What a client may send before it has given the password.
MAX_ARGUMENTS_UNAUTHENTICATED = 10
MAX_BULK_BYTES_UNAUTHENTICATED = 16384

# ---------------------------------------------------------------------------------------- replies

OK = b"+OK\r\n"
PONG = b"+PONG\r\n"
EMPTY_ARRAY = b"*0\r\n"


def error(text: str | bytes) -> bytes:
    """An error reply; line ends inside become spaces, as in Redis."""
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return b"-" + raw.strip(b"\r\n").replace(b"\r", b" ").replace(b"\n", b" ") + b"\r\n"


def c_string(raw: bytes, limit: int | None = None) -> bytes:
    """What Redis's errors show of an argument: up to a NUL, perhaps up to a length."""
    return raw.split(b"\0", 1)[0][:limit]


def simple(text: str) -> bytes:
    """A simple string."""
    return b"+%s\r\n" % text.encode()


def integer(value: int) -> bytes:
    """An integer."""
    return b":%d\r\n" % value


def bulk(value: bytes) -> bytes:
    """A bulk string."""
    return b"$%d\r\n%s\r\n" % (len(value), value)


def verbatim(value: bytes, resp: int) -> bytes:
    """Text for people: a verbatim string where there are any."""
    return bulk(value) if resp == 2 else b"=%d\r\ntxt:%s\r\n" % (len(value) + 4, value)


def null(resp: int) -> bytes:
    """Nothing, where a bulk string could be."""
    return b"$-1\r\n" if resp == 2 else b"_\r\n"


def array(items: collections.abc.Sequence[bytes]) -> bytes:
    """An array of encoded items."""
    return b"*%d\r\n%s" % (len(items), b"".join(items))


def unordered(items: collections.abc.Sequence[bytes], resp: int) -> bytes:
    """A set of encoded items: an array in RESP2."""
    return (b"*%d\r\n%s" if resp == 2 else b"~%d\r\n%s") % (len(items), b"".join(items))


def mapping(items: collections.abc.Sequence[bytes], resp: int) -> bytes:
    """A map, from keys and values in turn: a flat array in RESP2."""
    if resp == 2:
        return array(items)
    return b"%%%d\r\n%s" % (len(items) // 2, b"".join(items))


def push(items: collections.abc.Sequence[bytes], resp: int) -> bytes:
    """What nobody asked for: an array in RESP2."""
    return (b"*%d\r\n%s" if resp == 2 else b">%d\r\n%s") % (len(items), b"".join(items))


# --------------------------------------------------------------------------------------- integers

_INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")


def strict_integer(raw: bytes) -> int | None:
    """What Redis takes for a 64-bit integer: no plus, no leading zero, no blank (string2ll)."""
    if _INTEGER.fullmatch(raw) is None:
        return None
    value = int(raw)
    return value if -(1 << 63) <= value < 1 << 63 else None


# --------------------------------------------------------------------------------- inline commands

_BLANKS = b" \t\n\v\f\r"
_ENDS = b" \t\n\r"
_ESCAPES = {ord("n"): 10, ord("r"): 13, ord("t"): 9, ord("b"): 8, ord("a"): 7}
_HEX = re.compile(rb"[0-9a-fA-F]{2}")


def split_inline(line: bytes) -> Command | None:
    """Cut a line into arguments with the quoting of Redis (sdssplitargs); None: bad quotes."""
    words: Command = []
    at, end = 0, len(line)
    while True:
        while at < end and line[at] in _BLANKS:
            at += 1
        if at == end:
            return words
        word = bytearray()
        while at < end and line[at] not in _ENDS:
            byte = line[at]
            at += 1
            if byte in b"\"'":
                closed = _quoted(line, at, byte, word)
                if closed is None:
                    return None
                at = closed
                break
            word.append(byte)
        words.append(bytes(word))


def _quoted(line: bytes, at: int, quote: int, word: bytearray) -> int | None:
    """Read up to the closing quote into ``word``; where it ended, None when it does badly."""
    end = len(line)
    while at < end:
        byte = line[at]
        at += 1
        if byte == quote:
            # What follows a closing quote is a blank, or nothing.
            return at if at == end or line[at] in _BLANKS else None
        if byte == 0x5C and at < end:  # backslash
            byte = line[at]
            if quote == 0x27:
                if byte == 0x27:
                    at += 1
                else:
                    byte = 0x5C
            elif byte == 0x78 and _HEX.match(line, at + 1):
                byte = int(line[at + 1 : at + 3], 16)
                at += 3
            else:
                byte = _ESCAPES.get(byte, byte)
                at += 1
        word.append(byte)
    return None


# --------------------------------------------------------------------------------------- commands


class CommandError(Exception):
    """A command is refused: answer ``reply``, go on.

    Attributes:
        reply: The error reply.
    """

    def __init__(self, what: str | bytes) -> None:
        super().__init__(what)
        self.reply = error(what)


MAX_PATTERN_BYTES = 4000


def checked_pattern(pattern: bytes) -> bytes:
    """A glob short enough to be compiled at once: every PUBLISH of every worker looks at it.

    Raises:
        CommandError: It is longer than ``MAX_PATTERN_BYTES``.
    """
    if len(pattern) > MAX_PATTERN_BYTES:
        raise CommandError(f"ERR a pattern has at most {MAX_PATTERN_BYTES} bytes here")
    return pattern


class ProtocolError(Exception):
    """The stream is not RESP from here on: answer ``reply``, close.

    Attributes:
        reply: The error as redis-server words it.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.reply = error(f"ERR Protocol error: {what}")


class _Framer:
    """Finds where one message ends, by the rules of redis-server, as its bytes come in.

    Attributes:
        bytes: From the start of the message on; what is behind it stays when it is taken.
        need: It cannot end before this many bytes are here.
        max_message_bytes: Longer arrays are refused, by their headers.
        restricted: The client has not given the password: small messages only.
    """

    __slots__ = ("_at", "_left", "_reader", "bytes", "max_message_bytes", "need", "restricted")

    def __init__(self, max_message_bytes: int, restricted: bool) -> None:
        self.bytes = bytearray()
        self.need = 0
        self.restricted = restricted
        self.max_message_bytes = max_message_bytes
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._at = 0  # the next header; 0 at the start of a message
        self._left = 0  # arguments to come

    def take(self) -> Command | None:
        """Take the first message off ``bytes``: a command, perhaps an empty one; None: not whole.

        Raises:
            ProtocolError: As redis-server would answer it.
        """
        data = self.bytes
        if len(data) <= self.need:
            return None
        if not self._at:
            if data[0] != 0x2A:
                return self._inline()
            self._array()
        while self._left and self._bulk():
            pass
        if self._left or not self._at:
            return None
        return self._finish(self._at)

    def _finish(self, end: int) -> Command:
        data = self.bytes
        with memoryview(data) as view:
            message = bytes(view[:end])
        del data[:end]
        self.need = self._at = 0
        if not message.startswith(b"*") or message[1] in b"-0":
            return []
        self._reader.feed(message)
        return typing.cast(Command, self._reader.gets())

    def _header(self, what: str) -> tuple[bytes, int] | None:
        """The line at ``_at`` without its end, and where the next one starts; None: not whole.

        Redis searches with strchr: a NUL ends its view, and the carriage return's neighbour may
        be anything.
        """
        data, at = self.bytes, self._at
        end = data.find(b"\r", at, at + MAX_INLINE_BYTES + 1)
        if end < 0 or data.find(b"\0", at, end) >= 0:
            if len(data) - at > MAX_INLINE_BYTES:
                raise ProtocolError(f"too big {what} string")
        elif end + 2 <= len(data):
            data[end + 1] = 0x0A  # hiredis does look
            return bytes(data[at:end]), end + 2
        self.need = len(data)
        return None

    def _array(self) -> None:
        """Read the header of an array; sets ``_at`` when it is whole."""
        header = self._header("mbulk count")
        if header is None:
            return
        count = strict_integer(header[0][1:])
        if count is None or count > MAX_ARGUMENTS:
            raise ProtocolError("invalid multibulk length")
        if self.restricted and count > MAX_ARGUMENTS_UNAUTHENTICATED:
            raise ProtocolError("unauthenticated multibulk length")
        self._left = max(count, 0)
        self._at = header[1]

    def _bulk(self) -> bool:
        """Step over one argument; False: not whole."""
        header = self._header("bulk count")
        if header is None:
            return False
        line, start = header
        if line[:1] != b"$":
            # Redis prints the byte as it is; the carriage return of an empty line as a blank.
            got = (line[:1] or b"\r").decode("utf-8", "surrogateescape")
            raise ProtocolError(f"expected '$', got '{got}'")
        length = strict_integer(line[1:])
        if length is None or length < 0 or start + length > self.max_message_bytes:
            raise ProtocolError("invalid bulk length")
        if self.restricted and length > MAX_BULK_BYTES_UNAUTHENTICATED:
            raise ProtocolError("unauthenticated bulk length")
        end = start + length + 2
        if end > len(self.bytes):
            self.need = end - 1
            return False
        self._at = end
        self._left -= 1
        return True

    def _inline(self) -> Command | None:
        data = self.bytes
        end = data.find(b"\n", 0, MAX_INLINE_BYTES + 1)
        if end < 0 or data.find(b"\0", 0, end) >= 0:
            if len(data) > MAX_INLINE_BYTES:
                raise ProtocolError("too big inline request")
            self.need = len(data)
            return None
        command = split_inline(bytes(data[: end - (data[end - 1 : end] == b"\r")]))
        if command is None:
            raise ProtocolError("unbalanced quotes in request")
        del data[: end + 1]
        self.need = 0
        return command


_MORE = object()

# What a chunk is made of, byte by byte: "*" may open an array, "A" another type that holds others,
# "F" one that holds none, "0" is a digit. None of these means it for sure: a payload may hold any.
# That only sends a chunk the longer way.
_CLASSES = (
    (b"*", ord("*")),
    (b">~%|", ord("A")),
    (b"+-:_,#!=(", ord("F")),
    (b"0123456789", ord("0")),
)
_SHAPE = bytes(
    next((mark for members, mark in _CLASSES if byte in members), ord(".")) for byte in range(256)
)
# hiredis allocates what a header announces. So it sees none above 9,999.
_LARGE_ARRAY, _LARGE_OTHER = b"*00000", b"A00000"
_LISTS = {list}
_SHORT_BYTES = 1 << 10


@functools.lru_cache(256)  # clients repeat themselves: of short chunks there are few shapes
def _arrays_of(shape: bytes) -> int:
    """How many arrays a chunk may open if it opens nothing else; -1 if it may, -2 if too large."""
    if _LARGE_ARRAY in shape or _LARGE_OTHER in shape:
        return -2
    return -1 if b"F" in shape or b"A" in shape else shape.count(b"*")


_NOT_PLAIN = b"\"'\0\v\f"


class CommandParser:
    """A stream of bytes into commands.

    ``feed``, then ``batch`` until it gives nothing:

        parser.feed(data)
        while commands := parser.batch():
            ...

    Args:
        max_message_bytes: A command longer than this is a protocol error.
        restricted: Keep to the limits of clients without password, until told otherwise.
    """

    __slots__ = ("_data", "_error", "_framer", "_reader")

    def __init__(self, max_message_bytes: int = 64 << 20, restricted: bool = False) -> None:
        self._framer = _Framer(max_message_bytes, restricted)
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._data = b""  # INVARIANT: starts with a message; not both this and the framer have any
        self._error: ProtocolError | None = None

    @property
    def restricted(self) -> bool:
        """Whether the limits of clients without password hold."""
        return self._framer.restricted

    @restricted.setter
    def restricted(self, restricted: bool) -> None:
        self._framer.restricted = restricted

    def idle(self) -> bool:
        """Whether no part of a message is kept."""
        return not self._data and not self._framer.bytes

    def feed(self, data: bytes) -> None:
        """Add what was read."""
        if self._framer.bytes:
            self._framer.bytes += data
        else:
            self._data += data

    def batch(self) -> list[Command]:
        """The next whole commands in order, as many as come cheaply; nothing: more bytes needed.

        A command may be empty (``*0``, a blank line): Redis skips it.

        Raises:
            ProtocolError: Those before it were given out by earlier calls.
        """
        framer = self._framer
        if not (self._data or framer.bytes or self._error):
            return []
        if self._error is not None:
            raise self._error
        if framer.restricted and self._data:
            framer.bytes += self._data
            self._data = b""
        if framer.bytes:
            command = framer.take()
            if command is None:
                return []
            if framer.bytes and not framer.restricted:
                self._data = bytes(framer.bytes)
                framer.bytes.clear()
            return [command]
        data, self._data = self._data, b""
        if len(data) > framer.max_message_bytes:
            return self._framed(data)
        commands = self._arrays(data) if data[0] == 0x2A else self._lines(data)
        return self._framed(data) if commands is None else commands

    def _arrays(self, data: bytes) -> list[Command] | None:
        """All of a chunk by hiredis, if it is nothing but arrays of bulk strings."""
        shape = data.translate(_SHAPE)
        arrays = _arrays_of(shape) if len(shape) <= _SHORT_BYTES else _arrays_of.__wrapped__(shape)
        if arrays < -1:
            return None
        reader = self._reader
        reader.feed(data)
        try:
            commands = list(iter(reader.gets, _MORE))
            # Nothing is left over (a "$" at the end is not counted as that), nothing but "*" and
            # "$" can have opened anything, each command is an array (the chunk starts with one):
            # then as many stars as arrays means that none is in another or unfinished.
            if (
                arrays == len(commands)
                and (arrays == 1 or set(map(type, commands)) == _LISTS)
                and data[-1] == 0x0A
                and not reader.has_data()
            ):
                return commands
            # Otherwise by what they must have looked like: there is one way to write a command.
            canonical = b"".join(map(hiredis.pack_command, map(tuple, commands)))
        except Exception:  # of many kinds, some of them odd: a map with a list as its key
            self._reader = hiredis.Reader(notEnoughData=_MORE)
            return None
        if data == canonical:
            return commands
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        if not data.startswith(canonical):
            return None
        self._framer.bytes += memoryview(data)[len(canonical) :]
        return commands or self.batch()

    def _lines(self, data: bytes) -> list[Command] | None:
        """All of a chunk by lines, if it is nothing but inline commands without quotes."""
        if len(data) != len(data.translate(None, _NOT_PLAIN)) or b"\n*" in data:
            return None
        lines = data.split(b"\n")
        rest = lines.pop()
        if len(data) > MAX_INLINE_BYTES and max(map(len, lines), default=0) > MAX_INLINE_BYTES:
            return None
        self._framer.bytes += rest
        return list(map(bytes.split, lines)) or self.batch()

    def _framed(self, data: bytes) -> list[Command]:
        """All of a chunk message by message."""
        framer = self._framer
        framer.bytes += data
        commands: list[Command] = []
        try:
            while (command := framer.take()) is not None:
                commands.append(command)
        except ProtocolError as problem:
            if not commands:
                raise
            self._error = problem
        return commands
