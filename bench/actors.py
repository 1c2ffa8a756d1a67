"""The other processes of the push bench: the owner of the client's socket, and the one who pushes.

Run as ``python -m bench.actors`` by ``programs.actor``: a JSON line in, a JSON line out, until the
input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing.managers
import os
import signal
import socket
import threading
import time
import typing

import redis
import redis.asyncio

import shmsock

from . import programs
from .push import CHANNEL, FORWARDED, FORWARDED_ASYNCIO, MESSAGE_BYTES, STAMP

_PADDING = bytes(MESSAGE_BYTES - STAMP.size)

_KEY = b"bench"

Send = typing.Callable[[bytes], object]


class Sender:
    """What a manager serves: writes to one client."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, message: bytes) -> None:
        """Write it."""
        self._sock.sendall(message)


class Manager(multiprocessing.managers.BaseManager):
    """Serves senders, or asks for one."""


Manager.register("Sender")


class Actor:
    """Does what it is asked; every method is a request."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        """What is opened is closed with the stack."""
        self._stack = stack
        self._ways: dict[str, Send] = {}
        self._acknowledged: socket.socket | None = None
        self._resting = threading.Event()
        self._crowd: list[threading.Thread] = []

    # -- the owner of the client's socket ---------------------------------------------------

    def own(self, name: str, port: int) -> int:
        """Create a runtime; become the owner of a connection to the waiting client; its id."""
        runtime = self._stack.enter_context(
            shmsock.Runtime.create(name, slots=1024, processes=16, stripes=8)
        )
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return runtime.create_socket(sock)

    def forward(self, redis_port: int, sid: int) -> None:
        """Subscribe, and write what is published to the client: a worker behind a broker."""
        subscriber = redis.Redis(port=redis_port).pubsub(ignore_subscribe_messages=True)
        subscriber.subscribe(FORWARDED)
        subscriber.get_message(timeout=10)
        plain = self._duplicate(sid)

        def loop() -> None:
            for message in subscriber.listen():
                plain.sendall(message["data"])

        threading.Thread(target=loop, daemon=True).start()

    def forward_asyncio(self, redis_port: int, sid: int) -> None:
        """The same by redis-py's client for asyncio, in a loop of its own."""
        plain, ready = self._duplicate(sid), threading.Event()

        async def loop() -> None:
            client = redis.asyncio.Redis(port=redis_port)
            subscriber = client.pubsub(ignore_subscribe_messages=True)
            await subscriber.subscribe(FORWARDED_ASYNCIO)
            await subscriber.get_message(timeout=10)
            ready.set()
            async for message in subscriber.listen():
                plain.sendall(message["data"])

        threading.Thread(target=lambda: asyncio.run(loop()), daemon=True).start()
        if not ready.wait(10):
            raise RuntimeError("the asyncio subscriber did not start")

    def serve_manager(self, address: str, sid: int) -> None:
        """Let others call a method here that writes to the client."""
        sender = Sender(self._duplicate(sid))
        Manager.register("Sender", lambda: sender)
        server = Manager(address=address, authkey=_KEY).get_server()
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def _duplicate(self, sid: int) -> socket.socket:
        """The client's connection as a plain socket."""
        reference = self._stack.enter_context(
            typing.cast(shmsock.SocketRef, shmsock.current().address(sid))
        )
        plain = socket.socket(fileno=socket.dup(reference.fileno()))
        self._stack.callback(plain.close)
        return plain

    # -- the one who pushes -----------------------------------------------------------------

    def prepare(
        self, name: str, sid: int, fd: int, plain_fd: int, redis_port: int, manager: str
    ) -> None:
        """Get ready to push to ``sid`` by every way there is.

        Args:
            name: The runtime's.
            sid: The client's socket, which another process owns.
            fd: Where the receiver acknowledges each message with a byte.
            plain_fd: A connection of this process's own to the receiver.
            redis_port: Of the broker.
            manager: Where the client's owner serves a ``Sender``.
        """
        self._acknowledged = self._stack.enter_context(socket.socket(fileno=fd))
        runtime = self._stack.enter_context(shmsock.Runtime.attach(name))
        address = runtime.address
        plain = self._stack.enter_context(socket.socket(fileno=plain_fd))

        def push(message: bytes) -> None:
            reference = address(sid)
            assert reference is not None
            with reference:
                reference.write(message)

        held = address(sid)
        assert held is not None
        held.fileno()  # fetched from the host before anything is measured
        held.close()
        connected = Manager(address=manager, authkey=_KEY)
        connected.connect()
        broker = redis.Redis(port=redis_port, single_connection_client=True)
        self._stack.callback(broker.close)
        self._ways = {
            "shmsock": push,
            "plain": plain.send,
            "redis": lambda message: broker.publish(CHANNEL, message),
            "forwarded": lambda message: broker.publish(FORWARDED, message),
            "forwarded_asyncio": lambda message: broker.publish(FORWARDED_ASYNCIO, message),
            "manager": connected.Sender().send,  # type: ignore[attr-defined]
        }

    def push(self, way: str, count: int) -> list[int]:
        """Push ``count`` messages, each as soon as the one before it has arrived.

        Returns:
            How long each call took, in nanoseconds.
        """
        send, acknowledged = self._ways[way], self._acknowledged
        assert acknowledged is not None
        now, pack, wait = time.monotonic_ns, STAMP.pack, acknowledged.recv
        took = []
        for _ in range(count):
            started = now()
            send(pack(started) + _PADDING)
            took.append(now() - started)
            if not wait(1):
                raise RuntimeError("the receiver has gone")
        return took

    # -- who computes, and who is in a hurry ------------------------------------------------

    def gather(self, name: str) -> list[int]:
        """Create a runtime of one stripe with two sockets; their ids."""
        runtime = self._stack.enter_context(
            shmsock.Runtime.create(name, slots=64, processes=8, stripes=1)
        )
        sids = []
        for _ in range(2):
            ours, theirs = socket.socketpair()
            self._stack.callback(theirs.close)
            sids.append(runtime.create_socket(ours))
        return sids

    def come(self, name: str) -> None:
        """Attach to a runtime."""
        self._stack.enter_context(shmsock.Runtime.attach(name))

    def compute(self, threads: int, sid: int) -> None:
        """Compute in so many threads; attach and detach in one more."""
        address = shmsock.current().address

        def count() -> None:
            while not self._resting.is_set():
                sum(range(10_000))

        def attach() -> None:
            while not self._resting.is_set():
                reference = address(sid)
                assert reference is not None
                reference.close()

        self._resting.clear()
        self._crowd = [threading.Thread(target=count) for _ in range(threads)]
        self._crowd.append(threading.Thread(target=attach))
        for thread in self._crowd:
            thread.start()

    def rest(self) -> None:
        """End what ``compute`` began."""
        self._resting.set()
        while self._crowd:
            self._crowd.pop().join()

    def attach(self, sid: int, seconds: float) -> dict[str, float]:
        """Attach and detach now and then for so long: p50, p99, worst of a pair, in nanoseconds.

        Now and then: who did it all the time would do it a thousand times while the stripe is free,
        and wait once while it is not.
        """
        address, now = shmsock.current().address, time.monotonic_ns
        until = now() + int(seconds * 1e9)
        taken: list[int] = []
        started = 0
        while started < until or len(taken) < 100:
            time.sleep(500e-6)
            started = now()
            reference = address(sid)
            assert reference is not None
            reference.close()
            taken.append(now() - started)
        taken.sort()
        at = len(taken) * 99 // 100
        return {"p50": taken[len(taken) // 2], "p99": taken[at], "worst": taken[-1]}

    # -- who dies ---------------------------------------------------------------------------

    def host(self, name: str, count: int) -> list[int]:
        """Create a runtime with sockets that others hold; their ids."""
        runtime = self._stack.enter_context(
            shmsock.Runtime.create(name, slots=1024, processes=16, stripes=8)
        )
        sids = []
        for _ in range(count):
            ours, theirs = socket.socketpair()
            self._stack.callback(theirs.close)
            sids.append(runtime.create_socket(ours))
        return sids

    def victim(self, name: str, sids: list[int], inside: bool) -> int:
        """Fork a process that holds these sockets, inside a stripe if asked to; its pid.

        This one attaches nothing, so that its children are processes like any other.
        """
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            runtime = shmsock.Runtime.attach(name)
            held = [runtime.address(sid) for sid in sids]
            assert held[0] is not None
            if inside:

                def sit(slot: int, argument: object) -> int:
                    os.write(write, b".")
                    signal.pause()
                    return 1

                runtime._engine.run(0, sit, -1)
            held[0].fileno()
            os.write(write, b".")
            signal.pause()
        os.close(write)
        if not os.read(read, 1):
            raise RuntimeError("a victim died too early")
        os.close(read)
        return pid

    def bury(self) -> None:
        """Reap the last victim."""
        os.wait()


def main() -> None:
    with contextlib.ExitStack() as stack:
        programs.obey(Actor(stack))


if __name__ == "__main__":
    main()
