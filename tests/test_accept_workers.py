"""``serve --accept workers``: a whole server whose workers accept by themselves."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import re
import select
import signal
import socket
import threading
import typing

import pytest

from .helpers import WATCHDOG_S, descriptors, stop, wait_until
from .servers import Client, Server, shmsock_command
from .test_hostless import kill_supervisor
from .test_starting_over import inode, poison, wait_for_new_segment

WORKERS = ("--accept", "workers")


def owner_of_each(server: Server) -> dict[int, int]:
    """Each connection's owner, as a pid; 0 while it has none."""
    with server.attach() as runtime:
        rows, kept = runtime.sockets(), runtime.listeners()
        pids = {row.index: row.pid for row in runtime.processes() if row.alive}
    found = {int(row["id"]): pids.get(int(row["owner"]), 0) for row in rows}
    return {sid: pid for sid, pid in found.items() if sid not in kept}


def watches_a_listener(pid: int, server: Server) -> bool:
    """Whether one of its epolls waits for a listener of the server to be readable."""
    with server.attach() as runtime:
        rows, kept = runtime.sockets(), runtime.listeners()
    inodes = {int(row["inode"]) for row in rows if int(row["id"]) in kept}
    watched: set[int] = set()
    for fd, what in descriptors(pid).items():
        if what == "anon_inode:[eventpoll]":
            with open(f"/proc/{pid}/fdinfo/{fd}") as file:
                for events, number in _WATCHED.findall(file.read()):
                    if int(events, 16) & select.EPOLLIN:
                        watched.add(int(number, 16))
    return bool(inodes & watched)


_WATCHED = re.compile(r"events: *(\w+).* ino: *(\w+)")


def all_watch(server: Server) -> bool:
    return all(watches_a_listener(pid, server) for pid in server.worker_pids().values())


def all_deposited(server: Server) -> bool:
    """Whether the supervisor has a duplicate of every connection."""
    with server.attach() as runtime:
        inodes = runtime.sockets()["inode"].tolist()
    kept = set(descriptors(server.process.pid).values())
    return {f"socket:[{number}]" for number in inodes} <= kept


def all_idle(server: Server) -> bool:
    """Whether none would fail with its owner: one that answers, or looks, is busy."""
    with server.attach() as runtime:
        return not runtime.sockets()["busy"].any()


def nobody_has_a_dead_owner(server: Server, dead: int) -> bool:
    return not {0, dead} & set(owner_of_each(server).values())


def ask(server: Server) -> object:
    with server.client() as client:
        return client.call("PING")


def test_workers_accept_from_one_listener_and_the_supervisor_does_not() -> None:
    with Server(*WORKERS, bind=["127.0.0.1:0"]) as server:
        wait_until(functools.partial(all_watch, server), "both watch it")
        assert not watches_a_listener(server.process.pid, server)
        assert ask(server) == "PONG"


def test_long_lived_connections_are_spread_evenly() -> None:
    with Server(*WORKERS, workers=3) as server, contextlib.ExitStack() as stack:
        wait_until(functools.partial(all_watch, server), "all three accept")
        for _ in range(90):
            client = stack.enter_context(server.client())
            assert client.call("PING") == "PONG"
        spread = collections.Counter(owner_of_each(server).values())
        assert sum(spread.values()) == 90
        assert len(spread) == 3
        assert max(spread.values()) <= 45  # without a thought for the others one would have all


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_what_a_worker_accepted_is_deposited_and_goes_on_elsewhere_when_it_is_killed(
    family: str, tmp_path: typing.Any
) -> None:
    path = f"{tmp_path}/hub.sock"
    bind = ["127.0.0.1:0"] if family == "tcp" else [f"unix:{path}"]
    with Server(*WORKERS, bind=bind) as server, contextlib.ExitStack() as stack:
        clients = []
        for _ in range(8):
            if family == "tcp":
                client = server.client()
            else:
                sock = socket.socket(socket.AF_UNIX)
                sock.settimeout(WATCHDOG_S)
                sock.connect(path)
                client = Client(sock)
            clients.append(stack.enter_context(client))
        ids = [client.id() for client in clients]
        wait_until(functools.partial(all_deposited, server), "they are deposited")
        for victim in server.worker_pids().values():
            assert [client.id() for client in clients] == ids
            wait_until(functools.partial(all_idle, server), "every answer is out")
            os.kill(victim, signal.SIGKILL)
            wait_until(
                functools.partial(nobody_has_a_dead_owner, server, victim), "they have moved"
            )
        assert [client.id() for client in clients] == ids
        assert server.run("doctor").returncode == 0


def test_without_a_supervisor_workers_go_on_accepting_and_the_next_one_has_it_all() -> None:
    with Server(*WORKERS) as old, contextlib.ExitStack() as stack:
        before = stack.enter_context(old.client())
        assert before.call("SUBSCRIBE", "news")[2] == 1
        kill_supervisor(old)
        during = [stack.enter_context(old.client()) for _ in range(10)]
        for client in during:
            assert client.call("SUBSCRIBE", "news")[2] == 1
        with old.client() as publisher:
            assert publisher.call("PUBLISH", "news", "alone") == 11
        with Server(*WORKERS, name=old.name, bind=["127.0.0.1:1"]) as new:
            assert new.addresses == old.addresses
            ids = [row["id"] for row in new.json("conns")]
            assert len(ids) >= 11
            wait_until(functools.partial(all_deposited, new), "the new one is given them")
            for victim in new.worker_pids().values():
                os.kill(victim, signal.SIGKILL)
                wait_until(lambda: len(new.worker_pids()) == 2, "a new worker")
            with new.client() as publisher:
                wait_until(lambda: publisher.call("PUBLISH", "news", "more") == 11, "all are read")
            for client in [before, *during]:
                assert client.read()[2] == b"alone"
                assert client.read()[2] == b"more"
            new.stop()
        for client in [before, *during]:
            client.ended()


@pytest.mark.parametrize("survivor", [0, 1])
def test_a_connection_for_which_the_dead_was_woken_is_served_by_another(survivor: int) -> None:
    """The kernel wakes one of them, and whoever that is has died before it could accept."""
    with Server(*WORKERS) as server:
        pids = list(server.worker_pids().values())
        stop(server.process.pid)  # no new worker looks instead
        try:
            for pid in pids:
                stop(pid)
            with server.client() as client:
                client.send("PING")
                os.kill(pids[1 - survivor], signal.SIGKILL)
                os.kill(pids[survivor], signal.SIGCONT)
                assert client.read() == "PONG"
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        wait_until(lambda: len(server.worker_pids()) == 2, "a new worker")


def test_a_stopped_worker_keeps_nobody_waiting() -> None:
    with Server(*WORKERS) as server:
        for pid in server.worker_pids().values():
            server.settle()  # or it might be stopped with a stripe that the other needs
            stop(pid)
            try:
                for _ in range(20):
                    assert ask(server) == "PONG"
            finally:
                os.kill(pid, signal.SIGCONT)


def test_nobody_is_refused_while_workers_are_replaced() -> None:
    with Server(*WORKERS) as server:
        before = set(server.worker_pids().values())
        answers, stop = collections.Counter[object](), threading.Event()

        def churn() -> None:
            while not stop.is_set():
                try:
                    answers[ask(server)] += 1
                except (OSError, EOFError) as error:
                    answers[repr(error)] += 1

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            with server.client() as client:
                sid = client.id()
                assert server.run("reload").returncode == 0
                assert client.id() == sid
        finally:
            stop.set()
            thread.join()
        assert set(answers) == {"PONG"}
        assert before.isdisjoint(server.worker_pids().values())
        assert ask(server) == "PONG"


def test_a_worker_that_leaves_accepts_no_more() -> None:
    with Server(*WORKERS) as server, contextlib.ExitStack() as stack:
        keepers = server.on_each_worker(lambda: stack.enter_context(server.client()))
        pids = server.worker_pids()
        pid, client = next((pids[index], client) for index, client in keepers.items())
        client.raw(b"*2\r\n$4\r\nECHO\r\n$5\r\nhel")  # busy: it cannot move, so its worker stays
        with server.attach() as runtime:
            wait_until(lambda: runtime.sockets()["busy"].any(), "half a command was read")
        draining = threading.Thread(target=server.run, args=("drain", str(pid)))
        draining.start()
        wait_until(lambda: not watches_a_listener(pid, server), "it looks away from the listener")
        fresh = [stack.enter_context(server.client()) for _ in range(10)]
        for other in fresh:
            assert other.call("PING") == "PONG"
        assert list(owner_of_each(server).values()).count(pid) == 1
        client.raw(b"lo\r\n")
        assert client.read() == b"hello"
        wait_until(lambda: pid not in server.worker_pids().values(), "it has left")
        draining.join()


def test_more_than_max_connections_are_turned_away_until_there_is_room() -> None:
    with Server(*WORKERS, "--max-connections", "6") as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(6)]
        for client in clients:
            assert client.call("PING") == "PONG"

        def is_turned_away() -> bool:
            with server.client() as client:
                answer = client.call("PING")
                if answer == "PONG":  # by who has counted before the last of them came
                    return False
                assert answer == "-ERR max number of clients reached"
                assert client.ended() == b""
                return True

        wait_until(is_turned_away, "there is no room")
        clients.pop().close()

        def is_let_in() -> bool:
            with server.client() as client:
                try:
                    return bool(client.call("PING") == "PONG")
                except EOFError:
                    return False

        wait_until(is_let_in, "there is room again")
        assert server.in_use() >= 5
        assert server.log().count("turned away at --max-connections 6") <= 2  # each says it once


def test_out_of_descriptors_others_wait_in_the_backlog_and_are_served_later() -> None:
    with Server(*WORKERS, workers=2, open_files=110) as server, contextlib.ExitStack() as stack:
        clients: list[Client] = []

        def refused() -> bool:
            clients.append(server.client())
            clients[-1].send("PING")
            return "open-files limit" in server.log()

        wait_until(refused, "there is a limit")
        waiting = [client for client in clients if client.silent()]
        for client in clients:
            if client not in waiting:
                client.close()
        for client in waiting:
            stack.enter_context(client)
            assert client.read() == "PONG"


def test_a_new_segment_is_accepted_into_by_its_workers() -> None:
    with Server(*WORKERS, "--slots", "500") as server:
        before = inode(server.name)
        with server.client() as client:
            assert client.call("PING") == "PONG"
            poison(server.name)
            client.ended()
        wait_for_new_segment(server, before)
        wait_until(lambda: ask(server) == "PONG", "it serves")


def test_what_the_option_takes() -> None:
    with Server("--accept", "reuseport") as server:  # what others call it
        wait_until(functools.partial(all_watch, server), "they accept")
    with Server("--accept", "supervisor") as server:
        assert watches_a_listener(server.process.pid, server)
        assert not any(watches_a_listener(pid, server) for pid in server.worker_pids().values())
    done = shmsock_command("serve", "--accept", "nobody")
    assert done.returncode == 2
    assert "neither supervisor nor workers" in done.stderr
