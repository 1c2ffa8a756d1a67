"""Rolling restart: workers are replaced under load, and no client notices."""

from __future__ import annotations

import collections.abc
import contextlib
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import threading
import time
import typing

import pytest

from shmsock import Wish

from .helpers import WATCHDOG_S, wait_until
from .servers import Client, Server, environment
from .test_takeover import owner_of

HALF, OTHER_HALF = b"*2\r\n$4\r\nECHO\r\n$5\r\nhel", b"lo\r\n"


class Command:
    """A ``shmsock`` command that runs beside the test."""

    def __init__(self, server: Server, *arguments: str) -> None:
        command, *rest = arguments
        self._process = subprocess.Popen(
            [sys.executable, "-m", "workers.cli", command, "--name", server.name, *rest],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def finish(self) -> tuple[int, str]:
        _, said = self._process.communicate(timeout=WATCHDOG_S)
        return self._process.returncode, said


def wish_of(server: Server, index: int) -> Wish:
    with server.attach() as runtime:
        return runtime.wishes.of(index)


def half_a_command(server: Server, client: Client) -> None:
    """Make a connection busy, so that it cannot move."""
    sid = client.id()
    client.raw(HALF)
    with server.attach() as runtime:

        def busy() -> bool:
            rows = runtime.sockets()
            return bool(rows["busy"][rows["id"] == sid].all())

        wait_until(busy, "half a command was read")


def assert_served(server: Server, clients: collections.abc.Iterable[Client]) -> None:
    for client in clients:
        assert client.call("PING") == "PONG"
    assert server.run("doctor").returncode == 0


def test_drain_replaces_one_worker_and_its_clients_notice_nothing() -> None:
    with Server("--password", "secret") as server, contextlib.ExitStack() as stack:
        clients: list[Client] = []
        for number in range(12):
            client = stack.enter_context(server.client())
            clients.append(client)
            assert client.call("HELLO", "3", "AUTH", "default", "secret")[b"proto"] == 3
            assert client.call("CLIENT", "SETNAME", f"client-{number}") == "OK"
            assert client.call("SUBSCRIBE", "news")[1:] == [b"news", 1]
            assert client.call("PSUBSCRIBE", "n*")[1:] == [b"n*", 2]
        web = stack.enter_context(server.connect())
        request = b"GET /connections HTTP/1.1\r\nHost: localhost\r\n\r\n"

        def get() -> bytes:
            web.sendall(request)
            head, _, body = web.recv(1 << 20).partition(b"\r\n\r\n")
            found = re.search(rb"content-length: (\d+)", head, re.I)
            assert found
            while len(body) < int(found[1]):
                body += web.recv(1 << 20)
            return head

        assert get().startswith(b"HTTP/1.1 200")
        before = server.worker_pids()
        for index, pid in before.items():
            done = server.run("drain", str(index if index % 2 else pid))
            assert (done.returncode, done.stderr) == (0, "")
            assert pid not in server.worker_pids().values()
        after = server.worker_pids()
        assert len(after) == 2
        assert not set(before.values()) & set(after.values())
        assert get().startswith(b"HTTP/1.1 200")
        assert b"close" not in get().lower()
        publisher = stack.enter_context(server.client())
        assert publisher.call("AUTH", "secret") == "OK"
        assert publisher.call("PUBLISH", "news", "moved") == 2 * len(clients)
        for number, client in enumerate(clients):
            assert sorted(client.read()[0] for _ in range(2)) == [b"message", b"pmessage"]
            assert client.call("CLIENT", "GETNAME") == b"client-%d" % number
            assert client.call("UNSUBSCRIBE", "news")[1:] == [b"news", 1]
        assert publisher.call("PUBLISH", "news", "again") == len(clients)
        assert {row["owner"] for row in server.json("conns")} <= set(after)
        assert server.run("doctor").returncode == 0


def test_a_connection_in_mid_command_moves_after_it() -> None:
    with Server() as server, server.client() as client:
        sid = client.id()
        index = owner_of(server, sid)
        half_a_command(server, client)
        drain = Command(server, "drain", str(index))
        wait_until(lambda: wish_of(server, index) is Wish.LEAVE, "it is to leave")
        with server.client() as other:  # who leaves is given nothing new
            assert owner_of(server, other.id()) != index
        assert owner_of(server, sid) == index
        client.raw(OTHER_HALF)
        assert client.read() == b"hello"
        assert drain.finish() == (0, "")
        assert_served(server, [client])


def test_sighup_replaces_every_worker() -> None:
    with Server() as server, server.client() as client:
        assert client.call("PING") == "PONG"
        before = set(server.worker_pids().values())
        server.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: len(now := set(server.worker_pids().values())) == 2 and not now & before,
            "all are replaced",
        )
        assert_served(server, [client])


def test_a_worker_that_does_not_leave_in_time_is_killed_and_the_rest_goes_on() -> None:
    with Server("--graceful-timeout", "0.3") as server, contextlib.ExitStack() as stack:
        stuck, *idle = (stack.enter_context(server.client()) for _ in range(4))
        index = owner_of(server, stuck.id())
        half_a_command(server, stuck)
        assert server.run("drain", str(index)).returncode == 0
        assert stuck.ended() == b""
        assert_served(server, idle)
        assert "did not leave in time" in server.log()


def test_drain_says_what_it_cannot_do() -> None:
    with Server() as server:
        done = server.run("drain", "99")
        assert done.returncode == 1
        assert "99 is no worker's index or pid" in done.stderr
        assert server.run("drain", str(server.process.pid)).returncode == 1
        assert server.run("drain", "nobody").returncode == 2
        with server.client() as client:
            index = owner_of(server, client.id())
            half_a_command(server, client)
            done = server.run("drain", str(index), "--timeout", "0")
            assert done.returncode == 1
            assert "not done after 0 s" in done.stderr
    assert Server.run(server, "reload").returncode == 3


# -- what dies meanwhile ------------------------------------------------------------------------

# The supervisor as it is, except that while a file is there its new workers end at once.
FAILING = """
import os, subprocess, sys
import workers.supervisor
from workers import cli
real = subprocess.Popen
class Popen(real):
    def __init__(self, command, **options):
        if os.path.exists(os.environ["FAIL"]):
            command = [sys.executable, "-c", "raise SystemExit(7)"]
        super().__init__(command, **options)
workers.supervisor.subprocess.Popen = Popen
raise SystemExit(cli.main())
"""


def test_when_no_new_worker_comes_up_the_old_ones_stay(tmp_path: pathlib.Path) -> None:
    fail = tmp_path / "fail"
    failing = Server(command=("-c", FAILING), env={"FAIL": str(fail)})
    with failing as server, server.client() as client:
        before = server.worker_pids()
        fail.touch()
        done = server.run("reload")
        assert done.returncode == 1
        assert "no new worker came up" in done.stderr
        assert "exited with code 7 before it was ready: nothing is replaced" in server.log()
        assert server.worker_pids() == before
        assert_served(server, [client])
        done = server.run("drain", str(min(before)))
        assert done.returncode == 1
        fail.unlink()
        assert server.run("reload").returncode == 0
        assert not set(before.values()) & set(server.worker_pids().values())
        assert_served(server, [client])


@contextlib.contextmanager
def leaving(
    **options: typing.Any,
) -> collections.abc.Iterator[tuple[Server, list[Client], Client, int, Command]]:
    """A server one of whose workers is leaving, and cannot: one of its clients is busy."""
    slow = Server("--graceful-timeout", "600", **options)
    with slow as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(10)]
        stuck = stack.enter_context(server.client())
        index = owner_of(server, stuck.id())
        half_a_command(server, stuck)
        reload = Command(server, "reload")
        wait_until(lambda: wish_of(server, index) is Wish.LEAVE, "it is to leave")
        yield server, clients, stuck, index, reload


def test_an_old_worker_killed_while_it_leaves_loses_only_what_was_busy() -> None:
    with leaving() as (server, clients, stuck, index, reload):
        os.kill(server.worker_pids()[index], signal.SIGKILL)
        assert stuck.ended() == b""
        assert reload.finish() == (0, "")
        assert_served(server, clients)
        wait_until(lambda: len(server.worker_pids()) == 2, "there are as many as before")


def test_a_new_worker_killed_while_the_old_one_leaves_is_replaced() -> None:
    with leaving() as (server, clients, stuck, index, reload):
        before = server.worker_pids()
        for number, pid in before.items():
            if number != index:
                os.kill(pid, signal.SIGKILL)
        for client in clients:
            assert client.call("PING") == "PONG"
        stuck.raw(OTHER_HALF)
        assert stuck.read() == b"hello"
        assert reload.finish() == (0, "")
        wait_until(lambda: len(server.worker_pids()) == 2, "there are as many as before")
        assert not set(before.values()) & set(server.worker_pids().values())
        assert_served(server, [*clients, stuck])


def test_an_old_worker_stays_when_its_successor_dies_and_no_other_comes_up(
    tmp_path: pathlib.Path,
) -> None:
    fail = tmp_path / "fail"
    options = {"workers": 1, "command": ("-c", FAILING), "env": {"FAIL": str(fail)}}
    with leaving(**options) as (server, clients, stuck, index, reload):
        old = server.worker_pids()
        (new,) = (pid for number, pid in old.items() if number != index)
        fail.touch()
        os.kill(new, signal.SIGKILL)
        code, said = reload.finish()
        assert code == 1
        assert "no new worker came up" in said
        assert_served(server, clients)
        assert list(server.worker_pids().values()) == [old[index]]
        stuck.raw(OTHER_HALF)
        assert stuck.read() == b"hello"
        assert owner_of(server, stuck.id()) == index
        assert_served(server, [*clients, stuck])


def test_a_supervisor_killed_in_a_reload_is_followed_by_one_that_goes_on() -> None:
    with Server("--graceful-timeout", "600") as old, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(old.client()) for _ in range(10)]
        for client in clients:
            assert client.call("PING") == "PONG"
        stuck = stack.enter_context(old.client())
        index = owner_of(old, stuck.id())
        half_a_command(old, stuck)
        before = set(old.worker_pids().values())
        reload = Command(old, "reload")
        wait_until(lambda: wish_of(old, index) is Wish.LEAVE, "it is to leave")
        os.kill(old.process.pid, signal.SIGKILL)
        old.process.wait()
        code, said = reload.finish()
        assert code == 1
        assert "the next one goes on with it" in said
        assert old.run("reload").returncode == 1  # nobody can start a worker now
        for client in clients:
            assert client.call("PING") == "PONG"
        with Server("--graceful-timeout", "600", name=old.name) as new:
            stuck.raw(OTHER_HALF)
            assert stuck.read() == b"hello"
            wait_until(
                lambda: len(now := set(new.worker_pids().values())) == 2 and not now & before,
                "the rest is replaced",
            )
            assert_served(new, [*clients, stuck])
        old.check_nothing_is_left()


# -- under load ---------------------------------------------------------------------------------


class Subscribers:
    """Raw subscribers that check that every numbered message comes once and in order."""

    def __init__(self, server: Server, count: int) -> None:
        self.clients = [server.client() for _ in range(count)]
        for client in self.clients:
            client.send("SUBSCRIBE", "numbers")
        for client in self.clients:
            assert client.read()[2] == 1
        self.seen = [0] * count
        self.problems: list[str] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        poller = select.epoll()
        by_fd = {client.sock.fileno(): i for i, client in enumerate(self.clients)}
        for fd in by_fd:
            poller.register(fd, select.EPOLLIN)
        while not self._done.is_set():
            for fd, _ in poller.poll(0.1):
                i = by_fd[fd]
                try:
                    self._take(i, self.clients[i])
                except (EOFError, OSError) as error:
                    self.problems.append(f"subscriber {i} was dropped: {error}")
                    poller.unregister(fd)
        poller.close()

    def _take(self, i: int, client: Client) -> None:
        while True:
            kind, channel, number = client.read()
            if (kind, channel, int(number)) != (b"message", b"numbers", self.seen[i] + 1):
                self.problems.append(f"subscriber {i} got {number!r} after {self.seen[i]}")
            self.seen[i] = int(number)
            if client.silent():
                return

    def finish(self, last: int) -> None:
        wait_until(lambda: self.problems or min(self.seen) == last, f"all see {last}")
        self._done.set()
        self._thread.join()
        for client in self.clients:
            client.close()
        assert not self.problems, self.problems[:10]


class Publisher:
    """Publishes numbers one after the other over one connection, as fast as they are taken."""

    def __init__(self, server: Server, subscribers: int, pause_s: float) -> None:
        self.last = 0
        self.problems: list[str] = []
        self._server, self._subscribers, self._pause_s = server, subscribers, pause_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._publish)
        self._thread.start()

    def _publish(self) -> None:
        try:
            with self._server.client() as client:
                while not self._done.wait(self._pause_s):
                    taken = client.call("PUBLISH", "numbers", str(self.last + 1))
                    self.last += 1
                    if taken != self._subscribers:
                        self.problems.append(f"{self.last} was taken by {taken}")
        except (EOFError, OSError) as error:
            self.problems.append(f"the publisher was dropped: {error!r}")

    def finish(self) -> int:
        self._done.set()
        self._thread.join()
        assert not self.problems, self.problems[:10]
        return self.last


def benchmark(server: Server) -> subprocess.Popen[str]:
    """redis-benchmark over kept connections, until it is interrupted."""
    return subprocess.Popen(
        f"redis-benchmark -p {server.port} -c 20 -n 2000000000 -t ping_mbulk".split(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def reload_under_load(subscribers: int, reloads: int, pause_s: float) -> dict[str, typing.Any]:
    """Returns figures; raises if anything was lost, dropped or refused."""
    with Server("--graceful-timeout", "60") as server:
        heard = Subscribers(server, subscribers)
        publisher = Publisher(server, subscribers, pause_s)
        load = benchmark(server)
        took: list[float] = []
        try:
            with server.attach() as runtime:
                wait_until(lambda: runtime.connections() > subscribers + 20, "the load is there")
                for _ in range(reloads):
                    before = server.worker_pids()
                    begin = time.monotonic()
                    done = server.run("reload", "--timeout", "120", timeout=180)
                    took.append(time.monotonic() - begin)
                    assert done.returncode == 0, (done.stderr, server.log()[-5000:])
                    assert not set(before.values()) & set(server.worker_pids().values())
                    assert load.poll() is None, load.communicate()
                    assert runtime.connections() > subscribers + 20
                    assert not heard.problems, (heard.problems[:10], server.log()[-5000:])
        finally:
            load.send_signal(signal.SIGINT)
            said = load.communicate(timeout=WATCHDOG_S)[0]
            with contextlib.suppress(AssertionError):
                last = publisher.finish()
        assert not publisher.problems, publisher.problems[:10]
        heard.finish(last)
        assert "rror" not in said, said[-2000:]
        assert "did not leave in time" not in server.log()
        assert "Traceback" not in server.log()
        wait_until(lambda: server.run("doctor").returncode == 0, "the books balance")
        rates = [float(rate) for rate in re.findall(r"rps=([\d.]+)", said)]
        return {
            "reloads": reloads,
            "subscribers": subscribers,
            "messages": last,
            "delivered": last * subscribers,
            "reload_s": [round(seconds, 2) for seconds in took],
            "redis_benchmark_rps_median": sorted(rates)[len(rates) // 2] if rates else None,
        }


def test_reloads_under_load_lose_no_message_and_drop_no_connection() -> None:
    figures = reload_under_load(subscribers=100, reloads=2, pause_s=0.01)
    assert figures["messages"] > 10


@pytest.mark.slow
def test_reload_after_reload_under_load_loses_no_message_and_drops_no_connection(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reloads = int(os.environ.get("SHMSOCK_RELOADS", "5"))  # 20 for the figures in a release
    figures = reload_under_load(subscribers=500, reloads=reloads, pause_s=0.05)
    with capsys.disabled():
        print(f"\n{figures}")
