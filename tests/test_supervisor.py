"""Starting, stopping, dying and coming back: what is left afterwards is nothing."""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import itertools
import os
import pathlib
import re
import signal
import socket
import subprocess
import time

import pytest

import shmsock

from .helpers import (
    REPOSITORY,
    WATCHDOG_S,
    Peer,
    children,
    descriptors,
    free_port,
    stop,
    wait_until,
)
from .servers import Client, Server, encode, new_name, shmsock_command

HALF = b"*2\r\n$4\r\nECHO\r\n$5\r\nhel"
OTHER_HALF = b"lo\r\n"


def drained(server: Server) -> None:
    """Wait until the supervisor and every worker have begun to drain."""
    count = len(re.findall(r"worker \d+ is process", server.log()))
    wait_until(
        lambda: len(re.findall(r"process \d+ drains", server.log())) >= count, "all are draining"
    )


# -- stopping -----------------------------------------------------------------------------------


def test_sigterm_leaves_nothing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "hub.sock"
    with Server(bind=["127.0.0.1:0", f"unix:{path}"]) as server:
        assert path.is_socket()
        with server.client() as client, server.client() as listener:
            assert client.call("PING") == "PONG"
            assert listener.call("SUBSCRIBE", "c")[2] == 1
            server.stop(signal.SIGTERM)
            assert (client.ended(), listener.ended()) == (b"", b"")
        assert not path.exists()


def test_ctrl_c_in_a_terminal_reaches_all_and_leaves_nothing() -> None:
    with Server() as server, server.client() as client:
        assert client.call("PING") == "PONG"
        os.killpg(server.process.pid, signal.SIGINT)
        assert client.ended() == b""
        server.stop(signal.SIGCONT)
        assert "Traceback" not in server.log()
        assert "killed" not in server.log()


def _segment_exists(server: Server) -> bool:
    return os.path.exists(f"/dev/shm/shmsock.{server.name}")


def _a_worker_starts(server: Server) -> bool:
    return bool(children(server.process.pid))


def _a_worker_has_joined(server: Server) -> bool:
    return "is process" in server.log()


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        (_segment_exists, signal.SIGTERM),
        (_segment_exists, signal.SIGINT),
        (_a_worker_starts, signal.SIGINT),
        (_a_worker_has_joined, signal.SIGINT),
    ],
)
def test_a_signal_while_it_starts_leaves_nothing(
    number: signal.Signals, moment: collections.abc.Callable[[Server], bool]
) -> None:
    with Server(wait=False) as server:
        wait_until(lambda: moment(server), "it is starting")
        os.killpg(server.process.pid, number)
        server.stop(signal.SIGCONT)


def test_draining_lets_a_request_in_progress_finish() -> None:
    with Server() as server, contextlib.ExitStack() as stack:
        busy, idle, http = (stack.enter_context(server.client()) for _ in range(3))
        assert busy.call("PING") == "PONG"
        assert idle.call("PING") == "PONG"
        busy.raw(HALF)
        http.raw(b"GET /health HTTP/1.1\r\nHost: local")
        with server.attach() as runtime:
            wait_until(lambda: (runtime.sockets()["busy"] == 1).sum() == 2, "both are busy")
        server.process.send_signal(signal.SIGTERM)
        drained(server)
        assert idle.ended() == b""
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        busy.raw(OTHER_HALF)
        assert busy.ended() == b"$5\r\nhello\r\n"
        http.raw(b"host\r\n\r\n")
        answer = http.ended()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nConnection: close\r\n" in answer
        assert b"draining" in answer
        server.stop(signal.SIGCONT)
        assert "killed" not in server.log()


def test_draining_waits_until_a_slow_reader_has_its_answer() -> None:
    size = 16 << 20
    with Server("--graceful-timeout", "60") as server:
        with Client(server.connect(receive_bytes=4096)) as slow:
            slow.raw(encode("ECHO", b"x" * size))
            slow.sock.recv(1, socket.MSG_PEEK)
            server.process.send_signal(signal.SIGTERM)
            drained(server)
            assert slow.read() == b"x" * size
            assert slow.ended() == b""
        server.stop(signal.SIGCONT)


def test_a_busy_client_is_waited_for_as_long_as_the_option_says_and_no_longer() -> None:
    with Server("--graceful-timeout", "0.7") as server, server.client() as busy:
        busy.raw(HALF)
        with server.attach() as runtime:
            wait_until(lambda: (runtime.sockets()["busy"] == 1).any(), "it is busy")
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began >= 0.7
        assert busy.ended() == b""
        assert len(re.findall("did not stop in time", server.log())) == 1


def test_asking_twice_kills_at_once() -> None:
    with Server("--graceful-timeout", "100000") as server, server.client() as busy:
        busy.raw(HALF)
        with server.attach() as runtime:
            wait_until(lambda: (runtime.sockets()["busy"] == 1).any(), "it is busy")
        os.killpg(server.process.pid, signal.SIGINT)
        drained(server)
        os.killpg(server.process.pid, signal.SIGINT)
        assert busy.ended() == b""
        server.stop(signal.SIGCONT)
        assert "asked to stop again" in server.log()


# -- starting where something is left, or in the way --------------------------------------------


def test_after_sigkill_of_the_whole_tree_the_name_starts_clean() -> None:
    name = new_name()
    with Server(name=name) as server, server.client() as client:
        assert client.call("SUBSCRIBE", "ghosts")[2] == 1
        server.kill()
        assert any(name in entry for entry in os.listdir("/dev/shm"))
        done = shmsock_command("ps", "--name", name)
        assert (done.returncode, done.stdout) == (3, "")
    with Server(name=name) as server:
        assert server.in_use() == 0
        assert server.run("doctor").returncode == 0
        with server.client() as client:
            assert client.call("PUBSUB", "CHANNELS") == []
            assert client.call("PUBLISH", "ghosts", "x") == 0


def test_a_name_is_served_once() -> None:
    with Server() as server:
        done = shmsock_command("serve", "--name", server.name, "--bind", "127.0.0.1:0")
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert f"{server.name!r} is served by process {server.process.pid}" in done.stderr
        with server.client() as client:
            assert client.call("PING") == "PONG"
        assert server.run("doctor").returncode == 0


def test_workers_that_survive_their_supervisor_serve_on_until_they_are_cleaned_away() -> None:
    with Server() as server, contextlib.ExitStack() as stack:
        clients = server.on_each_worker(server.client)
        for client in clients.values():
            stack.enter_context(client)
        first, second = clients.values()
        assert first.call("SUBSCRIBE", "c")[2] == 1
        second.call("PUBLISH", "c", "before")
        server.process.kill()
        server.process.wait()
        assert second.call("PUBLISH", "c", "after") == 1
        assert [first.read()[2], first.read()[2]] == [b"before", b"after"]
        done = server.run("doctor")
        assert done.returncode == 1
        assert "BROKEN  host" in done.stdout
        done = server.run("clean")
        assert done.returncode == 1
        assert second.call("PING") == "PONG"
        done = server.run("clean", "--kill")
        assert (done.returncode, done.stdout) == (0, f"{server.name}: removed\n")
        assert (first.ended(), second.ended()) == (b"", b"")
        server.check_nothing_is_left()
        assert server.run("ps").returncode == 3


@pytest.mark.parametrize("other", [(), ("--bind", "127.0.0.1:0")])
def test_an_address_in_use_is_named_and_nothing_is_left(other: tuple[str, ...]) -> None:
    name = new_name()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = shmsock_command("serve", "--name", name, *other, "--bind", address)
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"shmsock: cannot listen at {address}: Address already in use\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [entry for entry in os.listdir("/dev/shm") if name in entry]


# -- workers that die ---------------------------------------------------------------------------

SITE = """
import os, sys
if "workers.worker" in sys.orig_argv and os.path.exists({flag!r}):
    os._exit(7)
"""


def breakable(directory: pathlib.Path) -> tuple[dict[str, str], pathlib.Path]:
    """Environment in which workers exit with 7 while a file exists, and that file."""
    flag = directory / "broken"
    (directory / "sitecustomize.py").write_text(SITE.format(flag=str(flag)))
    return {"PYTHONPATH": f"{directory}:{REPOSITORY}"}, flag


def test_workers_that_never_come_up_end_the_server(tmp_path: pathlib.Path) -> None:
    env, flag = breakable(tmp_path)
    flag.touch()
    path = tmp_path / "hub.sock"
    with Server(bind=[f"unix:{path}"], env=env, wait=False) as server:
        assert server.process.wait(WATCHDOG_S) == 1
        assert "giving up" in server.log()
        assert "exited with code 7" in server.log()
        assert "Traceback" not in server.log()
        assert server.output() == ""
        server.check_nothing_is_left()
        assert not path.exists()


@pytest.mark.slow
def test_a_worker_that_does_not_come_back_is_tried_again_more_and_more_slowly(
    tmp_path: pathlib.Path,
) -> None:
    env, flag = breakable(tmp_path)
    with Server(env=env) as server:
        (_, pid), (other, _) = server.worker_pids().items()
        flag.touch()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: server.log().count("exited with code 7") >= 3, "three more deaths")
        flag.unlink()
        # The other goes on, and gives up nothing.
        with server.client() as client:
            row = next(row for row in server.json("conns") if row["id"] == client.id())
            assert row["owner"] == other
        wait_until(lambda: len(server.worker_pids()) == 2, "it comes back")
        stamps = re.findall(r"^\S+ (\d+):(\d+):(\d+),(\d+) ERROR .* worker ", server.log(), re.M)
        seconds = [int(h) * 3600 + int(m) * 60 + int(s) + int(ms) / 1e3 for h, m, s, ms in stamps]
        gaps = [b - a for a, b in itertools.pairwise(seconds) if b >= a]
        assert min(gaps) >= 0.19, gaps
        assert gaps == sorted(gaps) or gaps[-1] > gaps[0], gaps


def test_with_all_workers_dead_connections_wait_for_the_next_one() -> None:
    with Server() as server:
        for pid in server.worker_pids().values():
            os.kill(pid, signal.SIGSTOP)
        for pid in server.worker_pids().values():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not server.worker_pids(), "they are dead")
        wait_until(lambda: server.log().count("was killed by signal 9") == 2, "and it knows")
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(server.client()) for _ in range(10)]
            for client in clients:
                assert client.call("PING") == "PONG"
        wait_until(lambda: len(server.worker_pids()) == 2, "both come back")


def replaced(server: Server, victim: int) -> bool:
    there = server.worker_pids().values()
    return len(there) == 2 and victim not in there


def test_dying_workers_leave_no_descriptor_in_the_supervisor() -> None:
    with Server("--on-owner-death", "fail") as server:
        pid = server.process.pid
        with server.client() as client:
            assert client.call("PING") == "PONG"
        server.settle()
        before = len(descriptors(pid))
        for _ in range(2):
            with server.client() as client:
                sid = client.id()
                (victim,) = [row["pid"] for row in server.json("conns") if row["id"] == sid]
                os.kill(victim, signal.SIGKILL)
                assert client.ended() == b""
            wait_until(functools.partial(replaced, server, victim), "another comes")
        server.settle()
        wait_until(lambda: len(descriptors(pid)) == before, "as many descriptors as before")
        assert len(children(pid)) == 2
        assert server.run("doctor").returncode == 0


def test_who_joins_is_not_taken_for_a_worker(tmp_path: pathlib.Path) -> None:
    env, flag = breakable(tmp_path)
    with Server(env=env, workers=1) as server, Peer(server.name) as peer:
        flag.touch()
        (pid,) = server.worker_pids().values()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "exited with code 7" in server.log(), "no worker is there")
        # What it hands to the host makes it a process with a channel, as a worker has.
        peer.run("import socket; ours, theirs = socket.socketpair(); sid = rt.create_socket(ours)")
        wait_until(lambda: peer.ask("rt._descriptors.peek(sid).put"), "the host has it")
        with server.client() as client:
            flag.unlink()
            assert client.call("PING") == "PONG"
        peer.run("rt.set_failed(sid); theirs.close()")


def test_a_stopped_worker_does_not_stop_the_others() -> None:
    """Nobody waits for a process that does not run: its clients do, and those alone."""
    with Server() as server, contextlib.ExitStack() as stack:
        clients = server.on_each_worker(server.client)
        for client in clients.values():
            stack.enter_context(client)
        (frozen, silent), (_, lively) = clients.items()
        pid = server.worker_pids()[frozen]
        assert silent.call("SUBSCRIBE", "c")[2] == 1
        with server.attach() as runtime:  # stopped with the write turn it would keep it
            wait_until(lambda: not runtime.sockets()["busy"].any(), "the answer is out")
        stop(pid)
        try:
            for number in range(50):
                assert lively.call("PUBLISH", "c", str(number)) == 1
            for number in range(50):
                assert silent.read() == [b"message", b"c", str(number).encode()]
            assert lively.call("CLIENT", "KILL", "TYPE", "pubsub") == 1
            assert silent.ended() == b""
        finally:
            os.kill(pid, signal.SIGCONT)
        server.stop()


# -- where it is started ------------------------------------------------------------------------


def test_packages_of_the_working_directory_do_not_replace_ours(tmp_path: pathlib.Path) -> None:
    for package in ("workers", "shmsock"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong package')")
    command = ("-P", "-m", "workers.cli")
    with Server(command=command, cwd=str(tmp_path)) as server, server.client() as client:
        assert client.call("PING") == "PONG"


def test_the_banner_says_where_and_what_to_try() -> None:
    with Server() as server:
        text = server.output()
        assert len(text.splitlines()) <= 24
        assert f"127.0.0.1:{server.port}" in text
        assert repr(server.name) in text
        for pid in server.worker_pids().values():
            assert str(pid) in text
        for line in re.findall(r"^  ((?:redis-cli|curl|shmsock) .*)$", text, re.M):
            command = line.split(";")[0].split()
            if command[0] == "shmsock":
                done = shmsock_command(*command[1:])
                assert done.returncode == 0
            elif command[0] == "curl" or command[-1] == "hello":
                with contextlib.suppress(FileNotFoundError):
                    ran = subprocess.run(command, capture_output=True, timeout=WATCHDOG_S)
                    assert ran.returncode == 0


def test_port_0_takes_a_free_port_and_a_given_port_is_kept() -> None:
    port = free_port()
    with Server(bind=[f"127.0.0.1:{port}", "127.0.0.1:0"]) as server:
        assert server.port == port
        second = int(server.addresses[1].rpartition(":")[2])
        assert second not in (0, port)
        with Client(socket.create_connection(("127.0.0.1", second))) as client:
            assert client.call("PING") == "PONG"
    # And the port is free again at once, although connections to it were closed just now.
    with Server(bind=[f"127.0.0.1:{port}"]) as server, server.client() as client:
        assert client.call("PING") == "PONG"
    with pytest.raises(shmsock.RuntimeNotFoundError):
        server.attach()
