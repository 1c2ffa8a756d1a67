"""The campaign's clients: many connections in one loop, each noting exactly what it was told.

    Asker        ECHO, some at a time; every answer is the next one it waits for, or it complains
    SlowAsker    the same, its requests typed in pieces: its worker dies in the middle of one
    Publisher    PUBLISH of numbered messages, one at a time; notes each answer, and whose it was
    Subscriber   notes every message; some read slowly, with a small buffer
    Sink         the far end of what pool processes create: numbered lines without a gap

A connection that ends is no complaint: who may end when is in ``promises`` and ``checker``. Half a
message in the middle of a stream is, and so is an answer that nobody asked for.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import itertools
import random
import selectors
import socket
import threading
import time
import typing

import hiredis

import shmsock

from ..servers import encode
from .figures import Figures
from .pool import CHANNELS

_READ_BYTES = 1 << 16
_STUCK_S = 45.0  # an answer that took longer will not come: no stop is as long as 3 s
_AGAIN_S = 0.1  # after nobody listened
_SINK_LIVES_S = (0.5, 20.0)


@dataclasses.dataclass
class Sent:
    """One message of a publisher.

    Attributes:
        words: Who owned the publisher before it was sent and after it was answered.
        count: How many subscribers took it, by the answer; -1 for an error.
    """

    source: str
    number: int
    channel: str
    sent_s: float
    answered_s: float
    words: frozenset[int]
    count: int


class Stream:
    """One connection."""

    kind = ""
    receive_bytes = 0

    def __init__(self, load: Load, sock: socket.socket | None = None) -> None:
        self.load = load
        self.began_s = time.monotonic()
        self.ended_s = 0.0
        self.sid = 0
        self.owner = 0
        self.entered = False
        self.refused = False
        self.waiting_since_s = 0.0
        self._out = b""
        self.sock = sock or self._connect()
        self.sock.setblocking(False)
        self.port = 0

    def _connect(self) -> socket.socket:
        sock = socket.socket()
        if self.receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_bytes)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect(("127.0.0.1", self.load.port))
        return sock

    @property
    def alive(self) -> bool:
        """Whether it has seen no end."""
        return not self.ended_s

    def start(self) -> None:
        """Say the first words; they wait until the connection is made."""

    def readable(self, data: bytes) -> None:
        """Take what came."""
        raise NotImplementedError

    def tick(self, now: float) -> None:
        """Some times a second."""

    def send(self, data: bytes) -> None:
        """Send, sooner or later."""
        self._out += data
        self.flush()

    def flush(self) -> None:
        """Send what waits."""
        if not self._out or not self.alive:
            return
        try:
            sent = self.sock.send(self._out, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except ConnectionResetError:
            return  # what came before it can still be read; reading tells the end
        except OSError as error:
            self.refused |= error.errno == errno.ECONNREFUSED
            return
        self._out = self._out[sent:]
        self.load.want(self)

    @property
    def wants_out(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._out)

    def answered(self, now: float) -> None:
        """An answer came."""
        figures = self.load.figures
        figures.answers += 1
        if not self.entered:
            self.entered = True
            figures.worst_entry_s = max(figures.worst_entry_s, now - self.began_s)
        else:
            figures.worst_wait_s = max(figures.worst_wait_s, now - self.waiting_since_s)
        self.waiting_since_s = 0.0

    def asked(self, now: float) -> None:
        """A question is out."""
        self.waiting_since_s = self.waiting_since_s or now

    def complain(self, text: str) -> None:
        """A promise was broken on this connection."""
        self.load.figures.complain(f"{self.kind} {self.port} (sid {self.sid:#x}): {text}")

    def word(self) -> int:
        """The word of who owns it at this moment, or 0."""
        slot = self.sid & 0xFFFFFFFF
        cells = self.load.runtime._segment.cells
        if self.sid and cells.versioned_ref[slot] >> 32 == self.sid >> 32:
            return int(cells.owner[slot])
        return 0


class RespStream(Stream):
    """A connection that speaks RESP: whole values or a complaint."""

    def __init__(self, load: Load) -> None:
        super().__init__(load)
        self._reader = hiredis.Reader()

    def start(self) -> None:
        self.asked(time.monotonic())
        self.send(encode("CLIENT", "ID"))

    def readable(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (value := self._reader.gets()) is not False:
                self._take(value)
        except hiredis.ProtocolError as error:
            self.complain(f"half a message in its stream: {error}")
            self.load.end(self)

    def _take(self, value: typing.Any) -> None:
        now = time.monotonic()
        if not self.sid:
            if not isinstance(value, int):
                self.complain(f"CLIENT ID said {value!r}")
            else:
                self.sid = value
                self.answered(now)
                self.began(now)
            return
        self.take(value, now)

    def began(self, now: float) -> None:
        """It knows its id."""

    def take(self, value: typing.Any, now: float) -> None:
        """Take one whole value."""
        raise NotImplementedError


class Asker(RespStream):
    """Asks for echoes and checks their order."""

    kind = "asker"

    def __init__(self, load: Load) -> None:
        super().__init__(load)
        self._asked: list[tuple[bytes, float]] = []
        self._number = 0
        self._next_s = 0.0
        self._window = load.rng.choice((1, 1, 2, 8))
        self._long = load.rng.random() < 0.1

    def began(self, now: float) -> None:
        self.tick(now)

    def take(self, value: typing.Any, now: float) -> None:
        if not self._asked or value != self._asked[0][0]:
            waits = self._asked[0][0][:60] if self._asked else None
            self.complain(f"was answered {str(value)[:80]} and waits for {waits!r}")
            self.load.end(self)
            return
        self._asked.pop(0)
        self.answered(now)
        self.waiting_since_s = self._asked[0][1] if self._asked else 0.0

    def tick(self, now: float) -> None:
        if not self.sid or now < self._next_s or (self.load.quiet and self._number):
            return
        self._next_s = now + self.load.rng.uniform(0.0, 0.06)
        while len(self._asked) < self._window:
            self._ask(now)

    def _ask(self, now: float) -> None:
        text = b"%d:%d" % (self.sid, self._number)
        if self._long and self._number % 5 == 0:
            text = text.ljust(300_000, b".")
        self._number += 1
        self._asked.append((text, now))
        self.asked(now)
        self.say(encode("ECHO", text))

    def say(self, request: bytes) -> None:
        """Send a request."""
        self.send(request)

    def ask_last(self) -> None:
        """One more question, when all is quiet."""
        self._ask(time.monotonic())

    @property
    def satisfied(self) -> bool:
        """Whether every question was answered."""
        return not self._asked and bool(self.sid)


class SlowAsker(Asker):
    """Types its requests in pieces, so that it is often in the middle of one."""

    kind = "slow asker"

    def __init__(self, load: Load) -> None:
        super().__init__(load)
        self._typing: list[bytes] = []
        self._window, self._long = 1, False

    def say(self, request: bytes) -> None:
        cut = sorted(self.load.rng.randrange(1, len(request)) for _ in range(3))
        edges = [0, *cut, len(request)]
        self._typing += [request[a:b] for a, b in itertools.pairwise(edges) if b > a]

    def tick(self, now: float) -> None:
        if self._typing and now >= self._next_s:
            self._next_s = now + self.load.rng.uniform(0.0, 0.1)
            self.send(self._typing.pop(0))
            if not self._typing and self._asked:
                self.waiting_since_s = now  # until now it was not asked
                self._asked = [(text, now) for text, _ in self._asked]
        elif not self._typing:
            super().tick(now)


class Publisher(RespStream):
    """Publishes numbered messages, one at a time."""

    kind = "publisher"

    def __init__(self, load: Load) -> None:
        super().__init__(load)
        self.source = f"w{load.number()}"
        self._channel = load.rng.choice(CHANNELS).decode()
        self._number = 0
        self._next_s = 0.0
        self._sent_s = 0.0
        self._before = 0

    def tick(self, now: float) -> None:
        if not self.sid or self._sent_s or now < self._next_s or self.load.quiet:
            return
        self._next_s = now + self.load.rng.uniform(0.0, 0.04)
        self._before = self.word()
        self._sent_s = now
        self.asked(now)
        size = 60_000 if self.load.rng.random() < 0.08 else 0
        text = f"{self.source}:{self._number}"
        self.send(encode("PUBLISH", self._channel, text + ":" + "x" * size if size else text))

    def take(self, value: typing.Any, now: float) -> None:
        if not self._sent_s:
            self.complain(f"was answered {value!r} and asked nothing")
            return
        self.answered(now)
        failed = not isinstance(value, int)
        if failed:
            self.load.figures.programs["PUBLISH refused"] += 1
        words = frozenset((self._before, self.word()))
        self.load.sent.append(
            Sent(
                self.source,
                self._number,
                self._channel,
                self._sent_s,
                now,
                words,
                -1 if failed else value,
            )
        )
        self.load.figures.published += 1
        self._number += 1
        self._sent_s = 0.0

    @property
    def satisfied(self) -> bool:
        """Whether every question was answered."""
        return not self._sent_s and bool(self.sid)


class Subscriber(RespStream):
    """Listens, and notes what it hears."""

    kind = "subscriber"

    def __init__(self, load: Load) -> None:
        self._slow = load.rng.random() < 0.4
        self.receive_bytes = 4096 if self._slow else 0
        super().__init__(load)
        self._version = load.rng.choice((2, 3))
        self.pattern = load.rng.random() < 0.2
        self.channels = (
            {channel.decode() for channel in CHANNELS}
            if self.pattern
            else {load.rng.choice(CHANNELS).decode()}
        )
        self.confirmed_s = 0.0
        self.received: dict[str, list[int]] = {}
        self.last_words: set[bytes] = set()

    @property
    def reads_now(self) -> bool:
        """A slow one looks away most of the time."""
        return not self._slow or self.load.quiet or self.load.rng.random() < 0.01

    def start(self) -> None:
        self.asked(time.monotonic())
        if self._version == 3:
            self.send(encode("HELLO", "3"))
        self.send(encode("CLIENT", "ID"))

    def _take(self, value: typing.Any) -> None:
        if isinstance(value, list | dict) and not self.sid:
            return  # the answer to HELLO
        super()._take(value)

    def began(self, now: float) -> None:
        self.asked(now)
        if self.pattern:
            self.send(encode("PSUBSCRIBE", "c*"))
        else:
            self.send(encode("SUBSCRIBE", *self.channels))

    def take(self, value: typing.Any, now: float) -> None:
        what = value[0] if isinstance(value, list) and value else None
        if what in (b"subscribe", b"psubscribe") and not self.confirmed_s:
            self.answered(now)
            self.confirmed_s = now
        elif what in (b"message", b"pmessage"):
            self._hear(value[-2], value[-1])
        else:
            self.complain(f"heard {str(value)[:80]}")

    def _hear(self, channel: bytes, text: bytes) -> None:
        source, _, rest = text.partition(b":")
        if source == b"last":
            self.last_words.add(rest)
            return
        number = int(rest.partition(b":")[0])
        heard = self.received.setdefault(source.decode(), [])
        if channel == b"pool":
            # A pool process numbers what it writes to *this* socket.
            self.load.figures.pool_lines += 1
            if number != (heard[-1] + 1 if heard else 0):
                self.complain(f"heard {text!r} of a pool process after {heard[-1:]}")
        else:
            self.load.figures.delivered += 1
            if heard and number <= heard[-1]:
                self.complain(f"heard {text[:40]!r} after number {heard[-1]}")
        heard.append(number)


class Sink(Stream):
    """The far end of a connection that a pool process made a Socket."""

    kind = "sink"

    def __init__(self, load: Load, sock: socket.socket) -> None:
        super().__init__(load, sock)
        self._buffer = b""
        self._heard: dict[bytes, int] = {}
        self._until_s = self.began_s + load.rng.uniform(*_SINK_LIVES_S)

    def readable(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            if line.startswith(b"sid "):
                self.sid = int(line[4:])
                continue
            source, _, number = line.partition(b":")
            following = self._heard.get(source, -1) + 1
            if not number.isdigit() or int(number) != following:
                self.complain(f"got {line!r} instead of number {following}")
                self.load.end(self)
                return
            self._heard[source] = following
            self.load.figures.pool_lines += 1

    def tick(self, now: float) -> None:
        if now > self._until_s and not self.load.quiet:
            self.load.leave(self)


class Load:
    """All streams, in one thread."""

    def __init__(
        self,
        runtime: shmsock.Runtime,
        port: int,
        rng: random.Random,
        figures: Figures,
        counts: dict[type[RespStream], int],
    ) -> None:
        self.runtime, self.port, self.rng, self.figures = runtime, port, rng, figures
        self.sent: list[Sent] = []
        self.streams: list[Stream] = []
        self._alive: dict[Stream, None] = {}
        self.quiet = False  # no more questions: what is under way is answered
        self._counts = counts
        self._numbers = 0
        self._again_s = 0.0
        self._soon: collections.deque[typing.Callable[[], object]] = collections.deque()
        self._selector = selectors.DefaultSelector()
        self._stop = threading.Event()
        self._sink = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._sink.setblocking(False)
        self.sink_port = int(self._sink.getsockname()[1])
        self._selector.register(self._sink, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="load")
        self._owners: dict[int, int] = {}

    def number(self) -> int:
        """A number nobody else has."""
        self._numbers += 1
        return self._numbers

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End the loop and close everything."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        for stream in self.streams:
            stream.sock.close()
        self._selector.close()
        self._sink.close()

    def of(self, kind: type[S]) -> list[S]:
        """Every stream there was of a kind."""
        return [stream for stream in list(self.streams) if isinstance(stream, kind)]

    def living(self) -> list[Stream]:
        """Those that have seen no end."""
        return [stream for stream in list(self.streams) if stream.alive]

    # -- the loop -------------------------------------------------------------------------------

    def _run(self) -> None:
        ticked = 0.0
        try:
            while not self._stop.is_set():
                for key, events in self._selector.select(0.01):
                    if key.data is None:
                        self._accept()
                    else:
                        self._handle(key.data, events)
                now = time.monotonic()
                if now - ticked > 0.005:
                    ticked = now
                    self._tick(now)
                while self._soon:
                    self._soon.popleft()()
        except BaseException as error:
            self.figures.complain(f"the clients' loop ended: {error!r}")
            raise

    def _tick(self, now: float) -> None:
        if not self.quiet and now > self._again_s:
            for kind, count in self._counts.items():
                alive = sum(1 for stream in self._alive if type(stream) is kind)
                for _ in range(min(2, count - alive)):
                    self._add(kind(self))
        for stream in list(self._alive):
            stream.tick(now)
            if stream.alive and 0 < stream.waiting_since_s < now - _STUCK_S:
                stream.complain(f"waits for an answer since {_STUCK_S} s")
                self.end(stream)
        for stream in list(self._alive):
            if isinstance(stream, Subscriber):
                self.want(stream)
        self._watch_owners()

    def _add(self, stream: Stream) -> None:
        self.figures.connections[stream.kind] += 1
        self.streams.append(stream)
        self._alive[stream] = None
        self._watch(stream, selectors.EVENT_READ | selectors.EVENT_WRITE)
        stream.start()

    def _watch(self, stream: Stream, events: int) -> None:
        watched = self._selector.get_map().get(stream.sock)
        if not events:
            if watched is not None:
                self._selector.unregister(stream.sock)
        elif watched is None:
            self._selector.register(stream.sock, events, stream)
        elif watched.events != events:
            self._selector.modify(stream.sock, events, stream)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._add(Sink(self, self._sink.accept()[0]))

    def want(self, stream: Stream) -> None:
        """Watch for what a stream waits for."""
        if not stream.alive:
            return
        events = selectors.EVENT_WRITE if stream.wants_out else 0
        if not isinstance(stream, Subscriber) or stream.reads_now:
            events |= selectors.EVENT_READ
        self._watch(stream, events)

    def _handle(self, stream: Stream, events: int) -> None:
        if not stream.port:
            stream.port = int(stream.sock.getsockname()[1])
        if events & selectors.EVENT_WRITE:
            stream.flush()
            self.want(stream)
        if events & selectors.EVENT_READ:
            try:
                data = stream.sock.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                data = b""
                stream.refused |= error.errno == errno.ECONNREFUSED
            if data:
                stream.readable(data)
            else:
                self.end(stream)

    def end(self, stream: Stream) -> None:
        """A stream has seen its end."""
        if not stream.alive:
            return
        stream.ended_s = time.monotonic()
        if stream.entered or isinstance(stream, Sink):
            self.figures.ended[self._why(stream.sid)] += 1
        elif stream.refused:
            self.figures.ended["refused"] += 1
            self._again_s = stream.ended_s + _AGAIN_S
        else:
            self.figures.ended["not placed yet"] += 1
        self._forget(stream)

    def end_soon(self, stream: Stream) -> None:
        """Close a stream from our side; from any thread."""
        self.call_soon(lambda: self.leave(stream))

    def call_soon(self, call: typing.Callable[[], object]) -> None:
        """Make a call in the loop; from any thread."""
        self._soon.append(call)

    def leave(self, stream: Stream) -> None:
        """Close a stream from our side."""
        if stream.alive:
            stream.ended_s = time.monotonic()
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        self._watch(stream, 0)
        del self._alive[stream]
        stream.sock.close()
        self._owners.pop(stream.sid, None)

    def _why(self, sid: int) -> str:
        code = self.runtime._io.error_of(sid)[0] if sid else errno.ENOTCONN
        return "unknown" if code in (0, errno.ENOTCONN) else errno.errorcode.get(code, str(code))

    def _watch_owners(self) -> None:
        """Count the connections that changed hands."""
        for stream in list(self._alive):
            if stream.sid and not isinstance(stream, Sink):
                word = stream.word()
                before = self._owners.get(stream.sid)
                if word and before and word != before:
                    self.figures.rehomed += 1
                if word:
                    self._owners[stream.sid] = word


S = typing.TypeVar("S", bound=Stream)
