"""A poisoned server: its workers end, its clients see the end, and a new segment takes over."""

from __future__ import annotations

import logging
import os
import signal
import typing

import pytest
import redis

import shmsock
from shmsock import Inspector, Runtime
from workers import starting_over

from .helpers import Peer, wait_until
from .servers import Server, new_name, shmsock_command


def answers(server: Server) -> bool:
    """Whether a new client is served; that it is refused is an error: the listeners stay open."""
    with server.client() as client:
        try:
            return bool(client.call("PING") == "PONG")
        except (EOFError, ConnectionResetError, BrokenPipeError):  # it met the old segment
            return False


def inode(name: str) -> int:
    """Of its segment; 0 while there is none."""
    try:
        return os.stat(f"/dev/shm/shmsock.{name}").st_ino
    except FileNotFoundError:
        return 0


def poison(name: str, why: str = "by the test") -> None:
    with Runtime.attach(name) as runtime:
        assert runtime.poison(why)


def wait_for_new_segment(server: Server, before: int) -> None:
    def is_new() -> bool:
        try:
            if inode(server.name) in (0, before):
                return False
            with server.attach() as runtime:
                rows = runtime.processes()
        except (shmsock.ShmsockError, OSError):
            return False
        return sum(row.role == "worker" and row.alive for row in rows) == 2

    wait_until(is_new, "a new segment with its workers")


def test_clients_of_a_poisoned_server_see_the_end_reconnect_and_are_served() -> None:
    with Server("--slots", "500") as server:
        before, pids = inode(server.name), set(server.worker_pids().values())
        client, subscriber = server.redis(), server.redis()
        pubsub = subscriber.pubsub()
        pubsub.subscribe("news")
        assert pubsub.get_message(timeout=30) is not None
        assert client.ping()
        with server.attach() as runtime:
            sizes = runtime.sizes
        poison(server.name)
        with pytest.raises(redis.ConnectionError):
            wait_until(lambda: not client.ping(), "its connection ends")
        with pytest.raises(redis.ConnectionError):
            wait_until(lambda: pubsub.get_message(timeout=0.1) == "never", "its connection ends")
        # The listener was open all the time: this waits in the backlog, and then is served.
        wait_until(lambda: answers(server), "a new client is served")
        wait_for_new_segment(server, before)
        with server.attach() as runtime:
            assert runtime.sizes == sizes
        assert not pids & set(server.worker_pids().values())
        pubsub.close()
        again = subscriber.pubsub()
        again.subscribe("news")
        assert again.get_message(timeout=30) is not None
        assert client.publish("news", "hello") == 1  # redis-py has connected anew
        assert again.get_message(timeout=30)["data"] == b"hello"
        for each in (again, client, subscriber):
            each.close()
        assert server.run("doctor").returncode == 0
        assert "CRITICAL" in server.log()
        assert "by the test" in server.log()
        # It goes on as any other: and may even have to start over again.
        before = inode(server.name)
        poison(server.name, "once more")
        wait_until(lambda: inode(server.name) not in (0, before) and answers(server), "again")
        wait_for_new_segment(server, before)


def test_damage_beyond_repair_is_poisoned_by_doctor_and_the_server_starts_over() -> None:
    with Server() as server, server.client() as client:
        before = inode(server.name)
        with Peer(server.name) as peer:
            peer.run("rt._segment.cells.ctl[2] = 3")
            found = server.run("doctor")
            assert found.returncode == 1
            assert "BROKEN  table: stripe 2 has the word 0x3, which cannot be" in found.stdout
            done = server.run("doctor", "--repair")
            peer.run("rt.close()")
        assert done.returncode == 1
        assert "beyond repair, so the runtime is marked poisoned: stripe 2 has" in done.stdout
        assert client.ended() == b""
        wait_for_new_segment(server, before)
        assert server.run("doctor").returncode == 0
        assert answers(server)


@pytest.mark.parametrize("command", ["conns", "ps", "kick 4294967296", "push 4294967296 x"])
def test_commands_on_a_poisoned_runtime_say_what_to_do(name: str, command: str) -> None:
    with Runtime.create(name, slots=8, stripes=2) as runtime:
        runtime.poison("by the test")
        first, *rest = command.split()
        done = shmsock_command(first, "--name", name, *rest)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "failed its audit beyond repair (by the test)" in done.stderr
    assert f"restart `shmsock serve --name {name}`" in done.stderr


def test_workers_of_a_poisoned_runtime_end_without_a_supervisor_and_serve_starts_anew() -> None:
    with Server() as server, server.client() as client:
        bind = server.addresses
        poisoned_by = server.attach()
        server.process.kill()
        server.process.wait()
        assert poisoned_by.poison("while nobody was there")
        # The next server waits until they are gone: they hold its listener.
        with Server(name=server.name, bind=bind) as new:
            assert client.ended() == b""
            assert answers(new)
            assert new.run("doctor").returncode == 0
        poisoned_by.close()
        assert server.log().count("while nobody was there") >= 2
        assert "Traceback" not in server.log()


# Where the supervisor dies: the function whose n-th call kills it, once it starts over.
KILL_POINTS = [
    ("posix_ipc.unlink_semaphore", 100),
    ("posix_ipc.unlink_shared_memory", 1),
    ("os.unlink", 1),
    ("os.rmdir", 1),
    ("os.posix_fallocate", 1),
    ("shmsock.semaphores.Semaphores.make", 100),
    ("shmsock.store.Store.__init__", 1),
]

DYING = """
import importlib, os, signal, sys
import posix_ipc, shmsock, shmsock.segment, shmsock.store
from workers import cli, starting_over
where, number = {where!r}, {number}
start_over = starting_over.start_over
def dying(supervisor):
    space, _, name = where.rpartition(".")
    target = eval(space)
    call, calls = getattr(target, name), []
    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    setattr(target, name, counted)
    start_over(supervisor)
starting_over.start_over = dying
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "number"), KILL_POINTS)
def test_supervisor_killed_while_it_starts_over_is_followed_by_the_next_serve(
    where: str, number: int
) -> None:
    name = new_name()
    script = DYING.format(where=where, number=number)
    with Server(name=name, command=("-c", script), workers=1) as server:
        bind = server.addresses
        poison(name)
        assert server.process.wait() == -signal.SIGKILL, server.log()
        with Server(name=name, bind=bind, workers=1) as new:
            assert answers(new)
            assert new.run("doctor").returncode == 0


# -- the supervisor's own audit -----------------------------------------------------------------


class Stand:
    """What the audit needs of a supervisor: a runtime, and timers that the test fires."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.dispatcher = self
        self.later: list[tuple[float, typing.Callable[[], None]]] = []

    def call_later(self, delay_s: float, call: typing.Callable[[], None]) -> None:
        self.later.append((delay_s, call))

    def fire(self) -> float:
        delay_s, call = self.later.pop()
        assert not self.later
        call()
        return delay_s


def test_supervisor_audits_now_and_then_and_mends_what_it_finds_twice(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    stand: typing.Any = Stand(runtime)
    starting_over.audit_later(stand)
    assert stand.fire() == starting_over.AUDIT_EVERY_S
    runtime._segment.cells.versioned_ref[7] += 3
    assert stand.fire() == starting_over.AUDIT_EVERY_S
    assert runtime.audit() != []  # seen once: perhaps somebody mends it
    assert stand.fire() == starting_over.LOOK_AGAIN_S
    assert runtime.audit() == []
    assert "slot 7 is FREE" in caplog.text
    runtime._segment.cells.versioned_ref[7] = 0
    stand.fire()
    with pytest.raises(shmsock.PoisonedError, match="slot 7 has version 0"):
        stand.fire()
    with Inspector(runtime.name) as inspector:
        assert "slot 7 has version 0" in inspector.poisoned
