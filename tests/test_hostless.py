"""No process is critical: a server goes on without its supervisor, and the next one adopts it."""

from __future__ import annotations

import collections.abc
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import typing

import pytest

from .helpers import WATCHDOG_S, holders_of, stop, wait_until
from .servers import Client, Server


def kill_supervisor(server: Server) -> None:
    """SIGKILL it, and wait until nothing of it is left."""
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()


def holders(server: Server, sid: int) -> set[int]:
    """Which workers have a descriptor of a connection."""
    with server.attach() as runtime:
        rows = runtime.sockets()
        inode = int(rows["inode"][rows["id"] == sid][0])
    return set(holders_of(inode, server.worker_pids().values()))


def owner_pid(server: Server, sid: int) -> int:
    with server.attach() as runtime:
        rows = runtime.sockets()
        owner = int(rows["owner"][rows["id"] == sid][0])
    return server.worker_pids()[owner]


def doors(server: Server) -> list[str]:
    directory = f"/dev/shm/shmsock.{server.name}.run"
    return [entry for entry in os.listdir(directory) if entry.startswith("peer-")]


# -- while there is no supervisor ----------------------------------------------------------------


def test_workers_push_to_each_others_new_clients_at_one_moment_without_a_supervisor() -> None:
    """Neither has written to the other's client before, and each waits in a fetch of its own."""
    with Server() as server, contextlib.ExitStack() as stack:
        subscribers = server.on_each_worker(lambda: stack.enter_context(server.client()))
        publishers = server.on_each_worker(lambda: stack.enter_context(server.client()))
        ids = {index: client.id() for index, client in subscribers.items()}
        for index, client in subscribers.items():
            assert client.call("SUBSCRIBE", f"for{index}")[2] == 1
        for sid in ids.values():
            assert holders(server, sid) == {owner_pid(server, sid)}
        assert doors(server) == []
        kill_supervisor(server)
        one, other = subscribers
        publishers[one].send("PUBLISH", f"for{other}", "first push")
        publishers[other].send("PUBLISH", f"for{one}", "first push")
        for index in (one, other):
            assert publishers[index].read() == 1
            assert subscribers[index].read()[2] == b"first push"
            assert holders(server, ids[index]) == set(server.worker_pids().values())
        assert len(doors(server)) == 2
        # Groups go on too: what is subscribed to now is pushed to from everywhere.
        for index in (one, other):
            assert subscribers[index].call("SUBSCRIBE", "late")[2] == 2
        assert publishers[one].call("PUBLISH", "late", "all") == 2
        for index in (one, other):
            assert subscribers[index].read()[2] == b"all"
        with server.attach() as runtime:
            assert runtime.audit() == []
        with Server(name=server.name) as new:
            assert "was taken over" in new.output()
            wait_until(lambda: doors(server) == [], "nobody needs a door any more")
            assert publishers[one].call("PUBLISH", "late", "hosted") == 2


LOAD = ("-c", "20", "-P", "4", "-n", "100000000", "-q", "PUBLISH", "nowhere", "x")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("redis-benchmark") is None, reason="needs redis-benchmark")
def test_clients_nobody_here_wrote_notice_neither_death_nor_take_over() -> None:
    with Server() as server, server.redis() as subscriber, contextlib.ExitStack() as stack:
        pubsub = stack.enter_context(subscriber.pubsub())
        pubsub.subscribe("news")
        assert pubsub.get_message(timeout=WATCHDOG_S)["type"] == "subscribe"
        load = subprocess.Popen(
            ["redis-benchmark", "-p", str(server.port), *LOAD],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert load.stdout is not None
        stack.enter_context(load.stdout)
        stack.callback(load.wait)
        stack.callback(load.kill)
        wait_until(lambda: server.in_use() > 20, "it is connected")  # who is not placed yet is lost
        publisher = stack.enter_context(server.redis())
        publisher.ping()
        last = server
        for turn in range(3):
            kill_supervisor(last)
            assert publisher.publish("news", f"alone {turn}") == 1
            last = stack.enter_context(Server(name=server.name))
            assert publisher.publish("news", f"hosted {turn}") == 1
            for said in ("alone", "hosted"):
                message = pubsub.get_message(timeout=WATCHDOG_S)
                assert message["data"] == f"{said} {turn}".encode()
        ended = load.poll()  # it would have, at the first lost connection
        load.kill()
        assert ended is None, load.communicate()[0].decode()[-2000:]


# -- the next supervisor -------------------------------------------------------------------------

# A supervisor that dies at a place: module, class, function, at which call, before or after it.
PLACES = {
    "holding the host byte, without a row": "shmsock.runtime Runtime __init__ 1 before",
    "with a row, without an address": "shmsock.runtime Runtime _serve 1 before",
    "in the middle of storing its address": "shmsock.segment Segment set 1 after",
    "with an address, before it looks for the dead": "workers.supervisor Supervisor run 1 before",
    "before it is given back anything": "workers.supervisor Supervisor _collect 1 after",
    "in the middle of collecting": "workers.supervisor Supervisor _collect 2 after",
    "before its first listener": "workers.supervisor Supervisor _adopt_listener 1 before",
    "between two listeners": "workers.supervisor Supervisor _adopt_listener 1 after",
    "when it has collected all": "workers.supervisor Supervisor rehome 1 before",
    "before it accepts": "workers.supervisor Supervisor _start_accepting 1 before",
    "when it accepts": "workers.supervisor Supervisor _start_accepting 1 after",
}

DIES = """
import importlib, os, signal, sys, workers.cli
module, owner, name, at, when = {place!r}.split()
owner = getattr(importlib.import_module(module), owner)
original, calls = getattr(owner, name), 0
def dies(*arguments, **named):
    global calls
    calls += 1
    if calls == int(at) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments, **named)
    if calls == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, dies)
raise SystemExit(workers.cli.main())
"""


@contextlib.contextmanager
def waiting_clients(server: Server) -> collections.abc.Iterator[list[socket.socket]]:
    """One connection to every address, which nobody has accepted, and which has spoken."""
    with contextlib.ExitStack() as stack:
        waiting = []
        for address in server.addresses:
            unix = address.startswith("unix:")
            sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
            stack.enter_context(sock)
            sock.settimeout(WATCHDOG_S)
            host, _, port = address.rpartition(":")
            where: typing.Any = port if unix else (host, int(port))
            sock.connect(where)
            sock.sendall(b"PING\r\n")
            waiting.append(sock)
        yield waiting


@pytest.mark.slow
def test_supervisors_killed_at_awkward_moments_in_a_row_lose_nothing(
    tmp_path: os.PathLike[str],
) -> None:
    bind = ["127.0.0.1:0", f"unix:{tmp_path}/hub", "127.0.0.1:0"]
    with Server(bind=bind) as first, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(first.client()) for _ in range(10)]
        for client in clients:
            assert client.call("SUBSCRIBE", "news")[2] == 1
        publisher = stack.enter_context(first.client())
        assert publisher.call("PING") == "PONG"
        workers = first.worker_pids()
        kill_supervisor(first)
        waiting = stack.enter_context(waiting_clients(first))
        for where, place in PLACES.items():
            victim = stack.enter_context(
                Server(name=first.name, command=("-c", DIES.format(place=place)), wait=False)
            )
            assert victim.process.wait(WATCHDOG_S) == -signal.SIGKILL, (where, victim.log())
            assert publisher.call("PUBLISH", "news", where) == len(clients), where
            for client in clients:
                assert client.read()[2] == where.encode()
        last = stack.enter_context(Server(name=first.name))
        assert sorted(last.addresses) == sorted(first.addresses)
        assert last.worker_pids() == workers
        for sock in waiting:
            assert sock.recv(100) == b"+PONG\r\n"
        with waiting_clients(last) as more:
            for sock in more:
                assert sock.recv(100) == b"+PONG\r\n"
        assert publisher.call("PUBLISH", "news", "last") == len(clients)
        for client in clients:
            assert client.read()[2] == b"last"
        assert last.run("doctor").returncode == 0
        entries = os.listdir(f"/dev/shm/shmsock.{first.name}.run")
        assert len([entry for entry in entries if entry.startswith("control-")]) == 1
        last.stop()
        assert not os.path.exists(f"{tmp_path}/hub")


def ended(client: Client) -> bool:
    return client.ended() == b""


@pytest.mark.slow
def test_a_supervisor_and_a_worker_killed_at_one_moment_lose_what_only_they_had() -> None:
    with Server() as server, contextlib.ExitStack() as stack:
        known = server.on_each_worker(lambda: stack.enter_context(server.client()))
        unknown = server.on_each_worker(lambda: stack.enter_context(server.client()))
        for client in known.values():
            client.call("SUBSCRIBE", "news")
        publishers = server.on_each_worker(lambda: stack.enter_context(server.client()))
        for publisher in publishers.values():  # from here on each worker has all of ``known``
            assert publisher.call("PUBLISH", "news", "before") == 2
        for client in known.values():
            for _ in range(2):
                assert client.read()[2] == b"before"
        pids = server.worker_pids()
        (victim, pid), (survivor, _) = pids.items()
        for killed in (server.process.pid, pid):
            os.kill(killed, signal.SIGKILL)
        server.process.wait()
        # Nobody reads the dead worker's subscriber now, and it is still pushed to.
        assert publishers[survivor].call("PUBLISH", "news", "alone") == 2
        for client in known.values():
            assert client.read()[2] == b"alone"
        assert ended(unknown[victim])
        assert unknown[survivor].call("PING") == "PONG"
        with Server(name=server.name) as new:
            assert known[victim].call("UNSUBSCRIBE", "news")[2] == 0  # somebody reads it again
            assert publishers[survivor].call("PUBLISH", "news", "after") == 1
            assert known[survivor].read()[2] == b"after"
            wait_until(lambda: len(new.worker_pids()) == 2, "a worker takes the dead one's place")
            assert new.run("doctor").returncode == 0
            wait_until(lambda: doors(new) == [], "no door's name is left, of the dead neither")


def test_connections_made_while_nobody_supervises_wait_in_the_backlog() -> None:
    with Server("--backlog", "64") as server, contextlib.ExitStack() as stack:
        kill_supervisor(server)
        waiting = [stack.enter_context(server.connect()) for _ in range(50)]
        for sock in waiting:
            sock.sendall(b"PING\r\n")
        with Server(name=server.name, bind=["127.0.0.1:1"]) as new:
            for sock in waiting:
                assert sock.recv(100) == b"+PONG\r\n"
            assert new.in_use() == len(waiting)


@pytest.mark.slow
def test_a_stopped_worker_without_a_supervisor_costs_one_wait_and_not_one_for_each_push() -> None:
    with Server() as server, contextlib.ExitStack() as stack:
        subscribers = [stack.enter_context(server.client()) for _ in range(8)]
        ids = {client: client.id() for client in subscribers}
        publishers = server.on_each_worker(lambda: stack.enter_context(server.client()))
        for client in subscribers:
            client.call("SUBSCRIBE", "news")
        pids = server.worker_pids()
        (stopped, pid), (awake, _) = pids.items()
        mine = [client for client in subscribers if owner_pid(server, ids[client]) != pid]
        assert 0 < len(mine) < len(subscribers)
        stop(pid)
        kill_supervisor(server)
        for _ in range(5):
            assert publishers[awake].call("PUBLISH", "news", "to whom can be had") == len(mine)
        os.kill(pid, signal.SIGCONT)
        wait_until(
            lambda: publishers[awake].call("PUBLISH", "news", "all") == len(subscribers),
            "it is reached again",
        )
        assert publishers[stopped].call("PING") == "PONG"
        with Server(name=server.name) as new:
            assert new.run("doctor").returncode == 0
