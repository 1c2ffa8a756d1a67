"""A push across workers: process B writes to a client's socket whose owner is process A.

This process is the client: it reads, takes the time, and acknowledges by a byte, which lets B go
on. One message is under way at a time, so what is measured is latency without queueing; clocks are
CLOCK_MONOTONIC, one for all processes of a machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import struct
import tempfile
import time
import typing

import shmsock

from . import programs
from .measure import Bench, BrokenError, Measure, Plan, UnavailableError, interleave, quantiles

OURS = "shmsock"
STAMP = struct.Struct("<Q")  # when it was sent, at the head of every message
MESSAGE_BYTES = 64
CHANNEL, FORWARDED, FORWARDED_ASYNCIO = "bench", "bench-forwarded", "bench-forwarded-asyncio"
_TIMEOUT_S = 30.0
_PERCENTILES = {"p50": 50, "p90": 90, "p99": 99}

Receive = typing.Callable[[], bytes]


def _run(plan: Plan) -> list[Measure]:
    try:
        import redis
    except ImportError as error:
        raise UnavailableError(f"the bench extra is not installed: {error}") from None
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        name = f"bench-{os.getpid()}-push"
        stack.callback(shmsock.clean, name)  # finds nothing, unless the owner had to be killed
        broker = enter(programs.redis_server())
        mine, theirs = (enter(sock) for sock in socket.socketpair())
        listener = enter(socket.create_server(("127.0.0.1", 0)))
        port = listener.getsockname()[1]

        directory = enter(tempfile.TemporaryDirectory(prefix="shmsock-bench-"))
        owner = enter(programs.actor())
        owner.tell("own", name=name, port=port)
        client = enter(_accept(listener))
        sid = owner.answer()
        owner.ask("forward", redis_port=broker.port, sid=sid)
        owner.ask("forward_asyncio", redis_port=broker.port, sid=sid)
        manager = os.path.join(directory, "manager")
        owner.ask("serve_manager", address=manager, sid=sid)

        plain_there = enter(socket.create_connection(("127.0.0.1", port)))
        plain_there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain = enter(_accept(listener))
        pusher = enter(programs.actor(theirs.fileno(), plain_there.fileno()))
        pusher.ask(
            "prepare",
            name=name,
            sid=sid,
            fd=theirs.fileno(),
            plain_fd=plain_there.fileno(),
            redis_port=broker.port,
            manager=manager,
        )
        subscriber = redis.Redis(port=broker.port).pubsub(ignore_subscribe_messages=True)
        stack.callback(subscriber.close)
        subscriber.subscribe(CHANNEL)
        subscriber.get_message(timeout=_TIMEOUT_S)
        messages = subscriber.listen()
        ways: dict[str, tuple[str, Receive]] = {
            OURS: ("shmsock", _reading(client)),
            "plain send": ("plain", _reading(plain)),
            "Redis pub/sub, to the subscriber": ("redis", lambda: bytes(next(messages)["data"])),
            "Redis pub/sub, forwarded to the client": ("forwarded", _reading(client)),
            "Redis pub/sub, forwarded by asyncio": ("forwarded_asyncio", _reading(client)),
            "Manager proxy in the owner": ("manager", _reading(client)),
        }
        every: dict[str, list[int]] = {label: [] for label in ways}
        contestants = {
            label: _batches(pusher, way, receive, mine, plan, every[label])
            for label, (way, receive) in ways.items()
        }
        taken = interleave(plan, contestants)
    curves = {label: quantiles(took) for label, took in every.items()}
    return [
        Measure(
            f"push across workers, {figure}",
            "ns",
            "lower",
            samples,
            curves if figure == "p50" else {},
        )
        for figure, samples in taken.items()
    ]


def _accept(listener: socket.socket) -> socket.socket:
    listener.settimeout(_TIMEOUT_S)
    sock, _ = listener.accept()
    sock.settimeout(None)
    # WHY NOT settimeout: it makes every recv two system calls, and the floor would be too high.
    timeval = struct.pack("@ll", int(_TIMEOUT_S), 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    return sock


def _reading(sock: socket.socket) -> Receive:
    return lambda: sock.recv(MESSAGE_BYTES, socket.MSG_WAITALL)


def _batches(
    pusher: programs.Actor,
    way: str,
    receive: Receive,
    acknowledge: socket.socket,
    plan: Plan,
    every: list[int],
) -> typing.Callable[[], dict[str, float]]:
    """Samples of one way to push; a batch's first tenth is warm-up and thrown away.

    What is left of all batches is added to ``every``.
    """

    def batch(count: int) -> tuple[list[int], list[int]]:
        pusher.tell("push", way=way, count=count)
        now, unpack, acknowledged = time.monotonic_ns, STAMP.unpack_from, acknowledge.send
        took = []
        for _ in range(count):
            message = receive()
            arrived = now()
            if len(message) != MESSAGE_BYTES:
                raise BrokenError(f"a message was lost on its way by {way}")
            took.append(arrived - unpack(message)[0])
            acknowledged(b".")
        return took, pusher.answer()

    started = time.monotonic()
    batch(50)
    a_message_s = (time.monotonic() - started) / 50
    count = max(50, round(plan.slice_s / a_message_s))

    def sample() -> dict[str, float]:
        took, called = (each[count // 10 :] for each in batch(count))
        every.extend(took)
        cuts = statistics.quantiles(took, n=100, method="inclusive")
        figures = {name: cuts[percent - 1] for name, percent in _PERCENTILES.items()}
        return figures | {"time in the call p50": statistics.median(called)}

    return sample


BENCHES = (
    Bench(
        "push",
        "a push to a client that another process owns",
        "From just before the call in process B until the client has read all 64 bytes, and how "
        "long the call kept B. "
        "shmsock: `with rt.address(sid) as ref: ref.write(message)` in B, the socket being A's; "
        "plain send: `sock.send` by B on a connection of its own, the floor; Redis to the "
        "subscriber: redis-py's publish in B, redis-server, redis-py's pubsub in the client "
        "itself, so one hop is missing; forwarded: pubsub in A, which then writes to the client "
        "with a plain sendall, what applications do; by asyncio: A's subscriber is redis-py's of "
        "asyncio; Manager proxy: B calls a method of an object that A serves by multiprocessing's "
        "manager, which writes to the client. All over TCP on loopback, one message at a time.",
        _run,
    ),
)
