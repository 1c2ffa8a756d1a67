"""No process is critical: a killed worker's and a killed supervisor's clients notice nothing."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import threading

import pytest

import shmsock

from .helpers import WATCHDOG_S, Peer, wait_until
from .servers import Server


def owner_of(server: Server, sid: int) -> int:
    return next(int(row["owner"]) for row in server.json("conns") if row["id"] == sid)


def has_moved(server: Server, sid: int, victim: int) -> bool:
    return server.worker_pids().get(owner_of(server, sid), victim) != victim


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_redis_py_subscriber_survives_the_death_of_its_worker(protocol: int) -> None:
    with Server() as server, server.redis(protocol) as client, server.redis() as publisher:
        with client.pubsub() as pubsub:
            pubsub.subscribe("news")
            pubsub.psubscribe("n*")
            for _ in range(2):
                assert pubsub.get_message(timeout=WATCHDOG_S)["type"].endswith("subscribe")
            sid = next(row["id"] for row in publisher.client_list() if int(row["sub"]))
            for _ in range(3):
                victim = server.worker_pids()[owner_of(server, int(sid))]
                os.kill(victim, signal.SIGKILL)
                wait_until(functools.partial(has_moved, server, int(sid), victim), "it has moved")
                with server.redis() as fresh:
                    assert fresh.publish("news", str(victim)) == 2
                for _ in range(2):
                    message = pubsub.get_message(timeout=WATCHDOG_S)
                    assert message["data"] == str(victim).encode()
            pubsub.unsubscribe("news")  # the new owner knows what it subscribed to
            assert pubsub.get_message(timeout=WATCHDOG_S)["type"] == "unsubscribe"
            with server.redis() as fresh:
                assert fresh.publish("news", "last") == 1
        assert server.run("doctor").returncode == 0


def test_half_a_request_never_reaches_another_worker() -> None:
    """What one worker has read of a request is gone with it: the rest must not look like one."""
    with Server() as server, server.connect() as client:
        head = b"POST /sockets/1/fail HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60\r\n\r\n"
        client.sendall(head)
        with server.attach() as runtime:
            wait_until(lambda: runtime.sockets()["busy"].any(), "half a request was read")
        (row,) = server.json("conns")
        os.kill(server.worker_pids()[row["owner"]], signal.SIGKILL)
        with contextlib.suppress(OSError):
            client.sendall(b"GET /connections HTTP/1.1\r\nHost: localhost\r\n\r\n".ljust(60))
        client.settimeout(WATCHDOG_S)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1000) == b""
        assert "GET /connections" not in server.log()


def test_a_new_supervisor_takes_over_and_not_one_connection_is_lost() -> None:
    with Server() as old, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(old.client()) for _ in range(40)]
        for client in clients:
            assert client.call("SUBSCRIBE", "news")[2] == 1
        ids = {row["id"] for row in old.json("conns")}
        workers = old.worker_pids()
        publisher = stack.enter_context(old.client())
        # From here on its worker has every descriptor: without a host there are no new ones.
        assert publisher.call("PUBLISH", "news", "first") == len(clients)
        os.kill(old.process.pid, signal.SIGKILL)
        old.process.wait()
        assert publisher.call("PUBLISH", "news", "alone") == len(clients)
        # Nobody accepts now: this one waits in the backlog, and has spoken already.
        waiting = stack.enter_context(old.connect())
        waiting.sendall(b"PING\r\n")

        with Server(name=old.name, bind=["127.0.0.1:1"]) as new:
            assert "was taken over" in new.output()
            assert new.addresses == old.addresses
            assert waiting.recv(100) == b"+PONG\r\n"
            assert new.worker_pids() == workers
            assert ids <= {row["id"] for row in new.json("conns")}
            assert publisher.call("PUBLISH", "news", "together") == len(clients)
            for client in clients:
                said = [client.read()[2] for _ in range(3)]
                assert said == [b"first", b"alone", b"together"]
            fresh = stack.enter_context(new.client())
            assert fresh.call("PUBLISH", "news", "fresh") == len(clients)
            for client in clients:
                assert client.read()[2] == b"fresh"
            # It is a supervisor like any other: it replaces a worker that is not its child.
            victim = next(iter(workers.values()))
            os.kill(victim, signal.SIGKILL)
            wait_until(
                lambda: len(new.worker_pids()) == 2 and victim not in new.worker_pids().values(),
                "a new worker takes its place",
            )
            with new.client() as last:
                assert last.call("PUBLISH", "news", "last") == len(clients)
            for client in clients:
                assert client.read()[2] == b"last"
            assert new.run("doctor").returncode == 0
        for client in clients:
            assert client.ended() == b""
        old.check_nothing_is_left()


def test_a_running_server_is_not_taken_over() -> None:
    with Server() as server:
        done = server.run("serve", "--bind", "127.0.0.1:0")
        assert done.returncode == 1
        assert str(server.process.pid) in done.stderr
        with server.client() as client:
            assert client.call("PING") == "PONG"


@pytest.mark.slow
def test_requests_go_on_while_supervisors_are_killed_and_followed() -> None:
    """The workers' clients see every answer, whoever supervises."""
    with Server() as first:
        failures: list[str] = []
        done = threading.Event()
        # Who was accepted and not yet placed dies with the supervisor that has it.
        placed = threading.Barrier(5)

        def ask() -> None:
            with first.client() as client:
                assert client.call("PING") == "PONG"
                placed.wait(WATCHDOG_S)
                while not done.is_set():
                    if client.call("PING") != "PONG":
                        failures.append("a wrong answer")

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        placed.wait(WATCHDOG_S)
        servers = [first]
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                os.kill(servers[-1].process.pid, signal.SIGKILL)
                servers[-1].process.wait()
                servers.append(stack.enter_context(Server(name=first.name)))
                with socket.create_connection(("127.0.0.1", first.port)) as probe:
                    probe.sendall(b"PING\r\n")
                    assert probe.recv(100) == b"+PONG\r\n"
            done.set()
            for thread in threads:
                thread.join()
            assert not failures
            assert servers[-1].run("doctor").returncode == 0


def test_who_joined_before_the_new_host_asked_is_told_of_all_the_same(name: str) -> None:
    """Workers look for a new host ten times a second: the first may come before anybody listens."""
    with Peer() as first:
        first.run(f"import shmsock; rt = shmsock.Runtime.create({name!r}, slots=64, processes=8)")
        with Peer(name, role="worker") as worker:
            worker.run("""
                import threading
                loop = shmsock.Dispatcher(rt)
                loop.on_arrival(print)
                threading.Thread(target=loop.run, daemon=True).start()
            """)
            index = worker.ask("rt.index")
            first.kill()
            with shmsock.Runtime.take_over(name) as host:
                store = host._store
                assert store is not None
                wait_until(lambda: store.is_connected(index))
                joined: list[int] = []
                host.on_join(joined.append)
                wait_until(lambda: joined == [index])
                worker.run("loop.stop()")
