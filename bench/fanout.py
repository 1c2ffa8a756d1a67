"""One message to a thousand clients: how many deliveries a second of the servers' processors buys.

The clients are connections of this process, which reads them all; its own time counts for nobody.
Run as ``python -m bench.fanout`` it is a process that publishes by the library.
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import time
import typing

import shmsock

from . import programs
from .measure import Bench, BrokenError, Measure, Plan, Sampler, interleave
from .requests import workers

OURS, PEER = "shmsock", "redis-server"
CLIENTS, QUICK_CLIENTS = 1000, 100
BURST = 16
CHANNEL = "bench"
_MESSAGE = bytes(64).replace(b"\0", b".")
_PUBLISH = b"*3\r\n$7\r\nPUBLISH\r\n$5\r\nbench\r\n$64\r\n" + _MESSAGE + b"\r\n"
_DELIVERY = b"*3\r\n$7\r\nmessage\r\n$5\r\nbench\r\n$64\r\n" + _MESSAGE + b"\r\n"
_WATCHDOG_S = 60.0

Publish = typing.Callable[[int], None]


class Publisher:
    """A process of the runtime that is neither worker nor host."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        """What is opened is closed with the stack."""
        self._stack = stack
        self._runtime: shmsock.Runtime | None = None

    def come(self, name: str) -> None:
        """Attach."""
        self._runtime = self._stack.enter_context(shmsock.Runtime.attach(name))

    def publish(self, count: int) -> int:
        """Send so many messages to everybody in the channel's group; how many took the last."""
        assert self._runtime is not None
        groups, taken = self._runtime.groups, 0
        for _ in range(count):
            taken = groups.broadcast(f"2c:{CHANNEL}", _DELIVERY)  # RESP 2's, as the hub names it
        return taken


class Clients:
    """Subscribers of one server, and a connection that publishes."""

    def __init__(self, stack: contextlib.ExitStack, port: int, count: int) -> None:
        """Connect and subscribe them all."""
        self.count = count
        self._epoll = stack.enter_context(select.epoll())
        self._socks = {}
        for _ in range(count):
            sock = stack.enter_context(_connect(port))
            sock.sendall(b"SUBSCRIBE bench\r\n")
            _read(sock, b":1\r\n")
            self._socks[sock.fileno()] = sock
            self._epoll.register(sock.fileno(), select.EPOLLIN)
        self._publisher = stack.enter_context(_connect(port))

    def publish(self, count: int) -> None:
        """So many messages in one write."""
        self._publisher.sendall(_PUBLISH * count)

    def confirm(self, count: int) -> None:
        """Read the publisher's answers: how many clients each went to."""
        answer = b":%d\r\n" % self.count
        _read(self._publisher, answer, count * len(answer))

    def receive(self, count: int) -> None:
        """Read until every client has so many messages."""
        left, socks = count * self.count * len(_DELIVERY), self._socks
        deadline = time.monotonic() + _WATCHDOG_S
        while left:
            for fd, _ in self._epoll.poll(1.0, 1024):
                left -= len(socks[fd].recv(1 << 16))
            if left < 0 or time.monotonic() > deadline:
                raise BrokenError(f"{left} bytes of the messages did not come")


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=_WATCHDOG_S)


def _read(sock: socket.socket, end: bytes, size: int = 0) -> None:
    data = b""
    while not (data.endswith(end) and len(data) >= size):
        chunk = sock.recv(1 << 16)
        if not chunk:
            raise BrokenError(f"a server hung up after {data[-80:]!r}")
        data += chunk


# Who receives, what publishes so many messages, and what waits for the answers.
Way = tuple[Clients, Publish, Publish]


def _sampler(plan: Plan, way: Way, burst: int, pids: set[int]) -> Sampler:
    """Bursts one after the other, each when the last one has come to everybody."""
    clients, publish, confirm = way

    def bursts(count: int) -> float:
        began = time.monotonic()
        for _ in range(count):
            publish(burst)
            clients.receive(burst)
            confirm(burst)
        return time.monotonic() - began

    bursts(2)
    count = max(2, round(2 * plan.slice_s / bursts(2)))

    def sample() -> dict[str, float]:
        before = programs.cpu_ns(pids)
        took_s = bursts(count)
        spent_s = (programs.cpu_ns(pids) - before) / 1e9
        deliveries = count * burst * clients.count
        return {"rate": deliveries / spent_s, "time": took_s / count * 1e9}

    return sample


def _fanout(plan: Plan) -> list[Measure]:
    count = CLIENTS if plan.seconds >= 0.5 else QUICK_CLIENTS
    with contextlib.ExitStack() as stack:
        _allow_files(3 * count + 100)
        server = stack.enter_context(programs.shmsock_server(workers()))
        broker = stack.enter_context(programs.redis_server())
        actor = stack.enter_context(programs.actor(module="bench.fanout"))
        ours = Clients(stack, server.port, count)
        theirs = Clients(stack, broker.port, count)
        actor.ask("come", name=server.name)

        def confirm(_: int) -> None:
            if (taken := actor.answer()) != count:
                raise BrokenError(f"a broadcast went to {taken} of {count} clients")

        tree, program = server.processes(), broker.processes()
        redis: Way = (theirs, theirs.publish, theirs.confirm)
        hub: Way = (ours, ours.publish, ours.confirm)
        library: Way = (ours, lambda number: actor.tell("publish", count=number), confirm)
        measures = []
        for title, mine, pids, burst in (
            ("by groups.broadcast", library, tree | {actor.process.pid}, 1),
            ("by the hub's PUBLISH", hub, tree, 1),
            (f"by {BURST} PUBLISH in a pipeline", hub, tree, BURST),
        ):
            plan.report(f"fanout: {title}")
            taken = interleave(
                plan,
                {
                    OURS: _sampler(plan, mine, burst, pids),
                    PEER: _sampler(plan, redis, burst, program),
                },
            )
            named = f"1 message to {CLIENTS} clients {title}"
            measures += [
                Measure(f"{named}, deliveries per CPU-second", "1/s", "higher", taken["rate"]),
                Measure(f"{named}, until all have it", "ns", "lower", taken["time"]),
            ]
        if server.processes() != tree:
            raise BrokenError("a server's process died under load")
    return measures


def _allow_files(count: int) -> None:
    """Two thousand connections need as many numbers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


BENCHES = (
    Bench(
        "fanout",
        "one message to a thousand clients spread over the workers",
        f"{CLIENTS} connections SUBSCRIBE to one channel ({QUICK_CLIENTS} in a --quick run); 64 "
        "bytes are published, the next when all have the last. Deliveries over the processor "
        "time of all the server's processes, supervisor included, and of the publishing process "
        "where it writes by itself: `groups.broadcast` in a process that is no worker. The hub's: "
        "PUBLISH over a connection, also in a pipeline. The peer is redis-server's PUBLISH.",
        _fanout,
    ),
)


def main() -> None:
    with contextlib.ExitStack() as stack:
        programs.obey(Publisher(stack))


if __name__ == "__main__":
    main()
