"""What ``tests.fuzz`` throws at a real host and at a real messenger, beside others that go on."""

from __future__ import annotations

import array
import collections.abc
import contextlib
import dataclasses
import errno
import itertools
import logging
import os
import socket
import typing

from hypothesis import strategies as st

import shmsock
from shmsock import channel
from workers.http import HttpProtocol
from workers.hub_client import ClientInfo, Reply, client_name
from workers.hub_protocol import Hub
from workers.messenger import Messenger
from workers.pages import Pages

from . import test_resp
from .fuzz_targets import (
    CODES,
    HTTP_STREAMS,
    KINDS,
    PLACES,
    RESP_STREAMS,
    WORDS,
    Target,
    mostly_whole,
)
from .helpers import Peer, after_a_round, connected, descriptors, wait_until

_numbers = itertools.count()


def _name() -> str:
    return f"fuzz{os.getpid()}-{next(_numbers)}"


# -- the host ----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Host:
    """A host with two sockets, one that failed but is held, and somebody else's channel."""

    runtime: shmsock.Runtime
    live: list[int]
    failed: int
    peers: list[socket.socket]
    witness: socket.socket
    hello: tuple[int, int, int]  # of another participant, who says all this

    def ids(self) -> list[int]:
        """What a message may be about, right and wrong."""
        first = self.live[0]
        hello = *self.runtime._descriptors._hello, *self.hello
        strange = [first + 2, first ^ 1 << 63, first + (1 << 32), first | 0xFFFFFFFF, 0]
        return [*self.live, self.failed, *hello, *strange]


def _dial(runtime: shmsock.Runtime) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(30)
    sock.connect(runtime._segment.control_address())
    return sock


def _is_served(host: _Host) -> None:
    """Who was connected all the time still gets what he asks for, and nothing else."""
    for sid, peer in zip(host.live, host.peers, strict=False):
        channel.send(host.witness, channel.GET, [sid], flags=0)
        answer = channel.receive(host.witness, 0)
        assert answer is not None
        assert (answer.type, answer.ids) == (channel.GOT, (sid,))
        with socket.socket(fileno=answer.descriptors[0]) as sock:
            sock.send(b"!")
        assert peer.recv(2) == b"!"
        assert host.runtime.status(sid) is shmsock.Status.LIVE
    assert host.runtime.status(host.failed) is shmsock.Status.FAILED


@contextlib.contextmanager
def host() -> collections.abc.Iterator[Target]:
    """A real host hears anything, with any descriptors: nothing leaks, nobody else notices."""
    with contextlib.ExitStack() as stack:
        runtime = stack.enter_context(
            shmsock.Runtime.create(_name(), slots=64, processes=8, stripes=2)
        )
        live, peers = [], []
        for _ in range(3):
            ours, peer = connected("unix")
            peers.append(stack.enter_context(peer))
            live.append(runtime.create_socket(ours))
        failed = live.pop()
        stack.enter_context(typing.cast(shmsock.SocketRef, runtime.address(failed)))
        runtime.set_failed(failed, errno.EIO, "failed")
        other = stack.enter_context(Peer(runtime.name))
        other.run("import socket; a, b = socket.socketpair(); rt.create_socket(a)")
        hello = tuple(other.ask("rt._descriptors._hello"))
        store = runtime._store
        assert store is not None
        witness = stack.enter_context(_dial(runtime))
        channel.send(witness, channel.HELLO, runtime._descriptors._hello, code=1)
        made = _Host(runtime, live, failed, peers, witness, hello)
        _is_served(made)
        wait_until(lambda: len(store) == len(live) + 1, "the failed one is let go of")
        known = made.ids()
        word = st.integers(0, len(known) - 1).map(known.__getitem__) | WORDS
        whole = st.builds(channel.pack, KINDS, st.lists(word, max_size=6), CODES)
        wait_until(lambda: store.is_connected(hello[1]), "the other's channel is here")
        greetings = st.sampled_from((0, 1, -1)).map(
            lambda code: channel.pack(channel.HELLO, hello, code)
        )
        said = st.tuples(mostly_whole(whole) | st.binary(max_size=40), st.integers(0, 4))
        strategy = st.tuples(st.booleans(), greetings, st.lists(said, max_size=6), st.booleans())
        read, write = os.pipe()
        stack.callback(os.close, read)
        stack.callback(os.close, write)
        gifts = [read, peers[0].fileno(), witness.fileno(), write]
        quiet, quiet_peers = _open_files(), len(store._peers)

        def check(value: tuple[bool, bytes, list[tuple[bytes, int]], bool]) -> None:
            greets, greeting, messages, reads = value
            table = runtime._segment.columns.versioned_ref.tolist()
            hung_up = contextlib.suppress(BrokenPipeError, ConnectionResetError)
            with _dial(runtime) as sock, hung_up:
                if greets:
                    sock.sendmsg([greeting])
                for data, count in messages:
                    rights = array.array("i", gifts[:count])
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                    sock.sendmsg([data], ancillary if count else [])
                sock.shutdown(socket.SHUT_WR)
                while reads and (data := _drop(sock)):
                    pass
            wait_until(lambda: len(store._peers) == quiet_peers, "the host hung up")
            assert runtime._segment.columns.versioned_ref.tolist() == table
            assert store._parked == {}
            _is_served(made)
            wait_until(lambda: _open_files() == quiet, "nothing leaked")

        yield strategy, check


def _drop(sock: socket.socket) -> bytes:
    """Read one message and close what came with it."""
    data, ancillary, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(4 * channel.MAX_IDS))
    for _, _, payload in ancillary:
        rights = array.array("i")
        rights.frombytes(payload)
        channel.close_all(rights)
    return data


def _open_files() -> int:
    return len(descriptors())


# -- the whole port -----------------------------------------------------------------------------


class _Errors(logging.Handler):
    """Collects what the library reports: a consumer that raised is logged, and survived."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


class _Port:
    """What a worker serves, in this process: the messenger with both protocols, and a witness."""

    def __init__(self, runtime: shmsock.Runtime) -> None:
        self.runtime = runtime
        self.dispatcher = shmsock.Dispatcher(runtime)
        self.hub = Hub(runtime)
        pages = Pages(runtime, allow_remote=False, health=lambda: None, name_of=client_name)
        self.messenger = Messenger(runtime, self.dispatcher, (HttpProtocol(pages), self.hub))
        self.errors = _Errors()
        logging.getLogger("shmsock").addHandler(self.errors)
        self.witness = self.connect()

    def connect(self, user_data: bytes = b"") -> tuple[int, socket.socket]:
        ours, peer = connected("unix")
        peer.setblocking(False)
        sid = self.runtime.create_socket(ours, user_data=user_data)
        self.messenger.take([sid])
        return sid, peer

    def hear(self, peer: socket.socket, end: bytes | None) -> bytes:
        """Dispatch until what comes ends like this; None: until the connection ends."""
        heard = bytearray()

        def more() -> bool:
            self.dispatcher.run_once(0)
            with contextlib.suppress(BlockingIOError):
                while data := peer.recv(1 << 16):
                    heard.extend(data)
                return True  # the end of the stream
            return end is not None and heard.endswith(end)

        with contextlib.suppress(ConnectionResetError):
            wait_until(more, "an answer, or the end")
        return bytes(heard)

    def is_well(self) -> None:
        """Nothing raised, the other connection is served, and everything else is gone."""
        _, peer = self.witness
        peer.send(b"PING\r\n")
        assert self.hear(peer, b"+PONG\r\n").endswith(b"+PONG\r\n")
        wait_until(after_a_round(self.dispatcher, lambda: len(self.messenger) == 1))
        assert self.errors.found == []
        assert list(self.hub.sessions) == [self.witness[0]]

    def close(self) -> None:
        logging.getLogger("shmsock").removeHandler(self.errors)
        self.witness[1].close()
        self.runtime.set_failed(self.witness[0])
        self.dispatcher.run_once(0)
        self.dispatcher.close()


@contextlib.contextmanager
def _port() -> collections.abc.Iterator[_Port]:
    with shmsock.Runtime.create(_name(), slots=64, processes=4, stripes=2) as runtime:
        made = _Port(runtime)
        try:
            yield made
        finally:
            made.close()


_WORDS = ["CLIENT", "LIST", "KILL", "SETNAME", "REPLY", "HELLO", "SUBSCRIBE", "PUBLISH", "RESET"]
_WORDS += ["CONFIG", "GET", "INFO", "AUTH", "SELECT", "PSUBSCRIBE", "PUBSUB", "ID", "TYPE", "OFF"]
_COMMANDS = st.lists(
    st.sampled_from([word.encode() for word in _WORDS]) | test_resp.ARGUMENTS,
    min_size=1,
    max_size=4,
).map(lambda words: test_resp.packed(*words))


@contextlib.contextmanager
def port() -> collections.abc.Iterator[Target]:
    """Bytes of either protocol, whole or not, over a real socket: the worker goes on."""
    both = st.lists(_COMMANDS | RESP_STREAMS | HTTP_STREAMS, max_size=3).map(b"".join)
    strategy = st.tuples(mostly_whole(both) | st.binary(max_size=64), PLACES)
    with _port() as served:

        def check(value: tuple[bytes, list[int]]) -> None:
            data, places = value
            _, peer = served.connect()
            with peer, contextlib.suppress(BrokenPipeError):
                for piece in test_resp.cut(data, places):
                    peer.send(piece)
                    served.dispatcher.run_once(0)
                peer.shutdown(socket.SHUT_WR)
                served.hear(peer, None)
            _end_witness_noise(served)
            served.is_well()

        yield strategy, check


def _end_witness_noise(served: _Port) -> None:
    """A fuzzed CLIENT KILL may have hit the witness: then there is a new one."""
    sid, peer = served.witness
    if served.runtime.status(sid) is not shmsock.Status.LIVE:
        served.hear(peer, None)
        peer.close()
        served.witness = served.connect()
        peer = served.witness[1]
        peer.send(b"PING\r\n")
        served.hear(peer, b"+PONG\r\n")


_INFOS = st.builds(
    ClientInfo,
    resp=st.sampled_from((2, 3)),
    authenticated=st.just(True),
    no_evict=st.booleans(),
    no_touch=st.booleans(),
    reply=st.sampled_from(Reply),
    db=st.integers(0, 255),
    sub=st.integers(0, 3),
    psub=st.integers(0, 3),
    name=st.sampled_from([b"", b"bob", b"n" * 55]),
    lib_name=st.sampled_from([b"", b"lib"]),
    lib_ver=st.sampled_from([b"", b"1.0"]),
)


@contextlib.contextmanager
def resume() -> collections.abc.Iterator[Target]:
    """Whatever is in its user data, a connection is taken over, listed, and served."""
    packed = _INFOS.map(ClientInfo.pack)
    tagged = st.binary(max_size=63).map(lambda data: b"R" + data)
    strategy = st.tuples(
        st.one_of(mostly_whole(packed).map(lambda data: data[:64]), tagged, st.binary(max_size=64)),
        st.sampled_from((b"PING\r\n", b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n", b"")),
    )
    with _port() as served:

        def check(value: tuple[bytes, bytes]) -> None:
            user_data, said = value
            _, peer = served.connect(user_data)
            info = ClientInfo.unpack(user_data)
            with peer:
                _, witness = served.witness
                witness.send(b"CLIENT LIST\r\nPING\r\n")
                listed = served.hear(witness, b"+PONG\r\n")
                count = len(served.hub.sessions)
                assert count == 1 + (info is not None)
                assert listed.count(b"\n") == count + 3
                peer.send(said)
                peer.shutdown(socket.SHUT_WR)
                heard = served.hear(peer, None)
            assert info is None or ClientInfo.unpack(info.pack()) == info
            answers = info is None or (info.authenticated and info.reply is Reply.ON)
            if said.startswith(b"PING") and answers:
                assert b"PONG" in heard or b"pong" in heard
            served.is_well()

        yield strategy, check


TARGETS: dict[str, collections.abc.Callable[[], contextlib.AbstractContextManager[Target]]] = {
    "host": host,
    "port": port,
    "resume": resume,
}
