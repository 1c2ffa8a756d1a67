"""The command line: what each command prints, touches, and ends with."""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import typing

import pytest

import shmsock
from workers import cli

from .helpers import REPOSITORY, Peer, wait_until
from .servers import Client, Row, Server, encode, environment, new_name, shmsock_command

READERS = ("conns", "ps", "doctor")


@pytest.fixture(scope="module")
def server() -> collections.abc.Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def clients(server: Server) -> collections.abc.Iterator[list[Client]]:
    """One client of each worker, and nobody else."""
    server.settle()
    made = list(server.on_each_worker(server.client).values())
    with server.attach() as runtime:
        wait_until(lambda: runtime.connections() == len(made), "the extra ones have gone")
    yield made
    for client in made:
        client.close()


def row_of(server: Server, client: Client) -> Row:
    peer = "{}:{}".format(*client.sock.getsockname())
    (row,) = [row for row in server.json("conns") if row["peer"] == peer]
    return typing.cast(Row, row)


# -- looking ------------------------------------------------------------------------------------


def test_conns_as_json_is_one_object_a_connection(server: Server, clients: list[Client]) -> None:
    sid = clients[0].id()
    with server.attach() as runtime, Peer(server.name) as peer:
        peer.run(f"held = rt.address({sid})")
        row = row_of(server, clients[0])
        assert row["id"] == sid
        assert row["text"] == shmsock.format_socket_id(sid)
        assert row["state"] == "live"
        assert row["pid"] == server.worker_pids()[row["owner"]]
        assert row["kind"] == "tcp"
        assert row["attached"] == [peer.pid]
        assert row["nref"] == 2
        assert row["bytes_in"] == 2 * len(encode("CLIENT", "ID"))  # one to choose its worker
        assert row["bytes_out"] == 2 * len(f":{sid}\r\n")
        assert row["age_s"] >= row["idle_s"] >= 0
        # One that failed is shown as long as somebody holds it.
        assert runtime.set_failed(sid, errno.EIO, "broken\x1b[31m")
        wait_until(lambda: row_of(server, clients[0])["attached"] == [peer.pid], "others let go")
        row = row_of(server, clients[0])
        assert (row["state"], row["nref"]) == ("failed", 1)
        assert (row["error_code"], row["error_text"]) == (errno.EIO, "broken\x1b[31m")
    with server.attach() as runtime:
        wait_until(lambda: runtime.connections() == 1, "nobody holds it")
    promised = "id text state owner pid peer kind nref attached age_s idle_s bytes_in bytes_out"
    (row,) = server.json("conns")
    assert set(promised.split()) <= set(row)


def test_conns_for_people_is_a_table(server: Server, clients: list[Client]) -> None:
    assert clients[0].call("CLIENT", "SETNAME", "visible") == "OK"
    done = server.run("conns")
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows = done.stdout.splitlines()
    assert head.split()[0] == "CREATED"
    assert len(rows) == 2
    assert sum("visible" in row for row in rows) == 1
    assert {row.split()[-1] for row in rows} == {
        shmsock.format_socket_id(client.id()) for client in clients
    }


def test_ps_as_json_is_one_object_a_process(server: Server, clients: list[Client]) -> None:
    with Peer(server.name) as peer:
        sid = clients[0].id()
        peer.run(f"held = rt.address({sid})")
        rows = server.json("ps")
        keys = {"index", "pid", "role", "sockets", "attached", "alive"}
        assert all(keys <= set(row) for row in rows)
        by_role: dict[str, list[Row]] = {}
        for row in rows:
            by_role.setdefault(row["role"], []).append(row)
        assert {role: len(found) for role, found in by_role.items()} == {
            "supervisor": 1,
            "worker": 2,
            "client": 1,  # the command itself is not shown
        }
        assert by_role["supervisor"][0]["pid"] == server.process.pid
        assert {row["index"]: row["pid"] for row in by_role["worker"]} == server.worker_pids()
        assert [row["sockets"] for row in by_role["worker"]] == [1, 1]
        (client,) = by_role["client"]
        assert (client["pid"], client["attached"], client["alive"]) == (peer.pid, 1, True)
    text = server.run("ps").stdout
    assert text.split()[:2] == ["INDEX", "PID"]
    assert str(server.process.pid) in text


def test_doctor_finds_a_healthy_server_healthy(server: Server, clients: list[Client]) -> None:
    found = server.json("doctor")
    assert found["ok"] is True
    checks = {check["check"] for check in found["checks"]}
    assert checks == {"table", "host", "open files", "shared memory", "backlog"}
    done = server.run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == len(found["checks"])
    assert all(line.startswith("ok") for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("plant", "undo", "complaint"),
    [
        ("cells.versioned_ref[{slot}] += 5", "cells.versioned_ref[{slot}] -= 5", "nref"),
        (
            "columns.held[{slot}, 77] = 1",
            "columns.held[{slot}, 77] = 0",
            "nref",
        ),
        ("cells.writer[{slot}] = 9 << 16 | 99", "cells.writer[{slot}] = 0", "written by process"),
    ],
)
def test_doctor_names_what_is_broken(
    server: Server, clients: list[Client], plant: str, undo: str, complaint: str
) -> None:
    slot = clients[0].id() & 0xFFFFFFFF
    with Peer(server.name) as peer:
        peer.run("cells, columns = rt._segment.cells, rt._segment.columns")
        peer.run(plant.format(slot=slot))
        done = server.run("doctor", "--json")
        text = server.run("doctor")
        peer.run(undo.format(slot=slot))
    assert done.returncode == text.returncode == 1
    found = json.loads(done.stdout)
    assert found["ok"] is False
    broken = [check for check in found["checks"] if not check["ok"]]
    assert {check["check"] for check in broken} == {"table"}
    details = [check["detail"] for check in broken]
    assert any(f"slot {slot} " in detail and complaint in detail for detail in details)
    assert [line.split()[0] for line in text.stdout.splitlines()].count("BROKEN") == len(broken)


def test_doctor_sees_a_host_that_is_short_of_descriptors(
    server: Server, clients: list[Client]
) -> None:
    pid = server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (60, before[1]))
    try:
        done = server.run("doctor")
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert done.returncode == 1
    assert "BROKEN  open files: RLIMIT_NOFILE of the host is 60" in done.stdout


def test_a_reader_that_stops_reading_is_no_error(server: Server, clients: list[Client]) -> None:
    for command in ("conns", "conns --json", "ps", "doctor"):
        # Its end of the pipe is closed before the first line is written.
        program = f"{sys.executable} -m workers.cli {command} --name {server.name}"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {program} | exec true"],
            cwd=REPOSITORY,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")


# -- touching -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [str, shmsock.format_socket_id])
def test_kick_ends_a_connection_and_says_why(
    server: Server, clients: list[Client], form: collections.abc.Callable[[int], str]
) -> None:
    for client in clients:
        sid = client.id()
        with server.attach() as runtime:
            held = runtime.address(sid)
            assert held is not None
            with held:
                done = server.run("kick", form(sid), "--reason", "spam and eggs")
                text = shmsock.format_socket_id(sid)
                assert (done.returncode, done.stdout) == (0, f"{text} kicked\n")
                assert held.error == (errno.ECONNABORTED, "spam and eggs")
        assert client.ended() == b""
    done = server.run("kick", form(sid))
    assert (done.returncode, done.stdout) == (1, "")
    assert "no live connection" in done.stderr


def test_kick_has_a_reason_of_its_own(server: Server, clients: list[Client]) -> None:
    sid = clients[0].id()
    with server.attach() as runtime:
        held = runtime.address(sid)
        assert held is not None
        with held:
            assert server.run("kick", str(sid)).returncode == 0
            assert held.error == (errno.ECONNABORTED, "kicked")


@pytest.mark.parametrize("form", [str, shmsock.format_socket_id])
def test_push_writes_to_a_client_of_any_worker(
    server: Server, clients: list[Client], form: collections.abc.Callable[[int], str]
) -> None:
    for client in clients:
        sid = client.id()
        done = server.run("push", form(sid), "+hello ü\r\n")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert client.read() == "hello ü"
        data = b"$300000\r\n" + bytes(range(256)) * 1171 + b"x" * 224 + b"\r\n"
        done = server.run("push", form(sid), "-", input=data, text=False)
        assert done.returncode == 0
        assert client.read() == data[9:-2]
        assert client.call("PING") == "PONG"


def test_push_of_nothing_is_done_at_once(server: Server, clients: list[Client]) -> None:
    assert server.run("push", str(clients[0].id()), "").returncode == 0
    assert clients[0].call("PING") == "PONG"


def test_push_to_somebody_who_has_gone_is_not_done(server: Server, clients: list[Client]) -> None:
    sid = clients[0].id()
    clients[0].close()
    with server.attach() as runtime:
        wait_until(lambda: runtime.status(sid) is shmsock.Status.GONE, "it is gone")
    for gone in (str(sid), "1", str(2**62), "sk-2-0"):
        done = server.run("push", gone, "x")
        assert (done.returncode, done.stdout) == (1, "")
        assert "no live connection" in done.stderr


# -- cleaning -----------------------------------------------------------------------------------


def test_clean_removes_what_a_crash_of_everything_left() -> None:
    with Server(workers=1) as server, Server(workers=1) as living:
        done = living.run("clean")
        assert done.returncode == 1
        assert "alive" in done.stderr
        server.kill()
        left = [entry for entry in os.listdir("/dev/shm") if f".{server.name}" in entry]
        assert left
        done = server.run("clean")
        assert (done.returncode, done.stdout) == (0, f"{server.name}: removed\n")
        server.check_nothing_is_left()
        done = server.run("clean")
        assert (done.returncode, done.stdout) == (0, f"{server.name}: nothing to remove\n")
        with living.client() as client:
            assert client.call("PING") == "PONG"


def test_clean_all_spares_the_living(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(workers=1) as dead, Server(workers=1) as living:
        dead.kill()
        ours = [dead.name, living.name]
        assert set(ours) <= set(shmsock.names_on_machine())
        # Not those of others on this machine, who may want to look at what is left of them.
        monkeypatch.setattr(shmsock, "names_on_machine", lambda: ours)
        said: list[str] = []

        def cleaned() -> bool:
            assert cli.main(["clean", "--all"]) == 1
            said[:] = capsys.readouterr()
            return bool(said[0])

        wait_until(cleaned, "the killed have let go of their locks")
        assert said[0] == f"{dead.name}: removed\n"
        assert f"{living.name!r} is alive" in said[1]
        dead.check_nothing_is_left()
        with living.client() as client:
            assert client.call("PING") == "PONG"


def test_clean_kill_ends_workers_that_lost_their_supervisor() -> None:
    with Server() as server, server.client() as client, Peer(server.name) as peer:
        assert client.call("PING") == "PONG"
        server.process.kill()
        server.process.wait()
        assert client.call("PING") == "PONG"
        assert server.run("clean").returncode == 1
        assert len(server.pids()) == 2
        done = server.run("clean", "--kill")
        assert (done.returncode, done.stdout) == (0, f"{server.name}: removed\n")
        assert client.ended() == b""
        assert peer.process.wait() == -signal.SIGKILL
        server.check_nothing_is_left()


# -- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        *([reader] for reader in READERS),
        *([reader, "--json"] for reader in READERS),
        ["kick", "1"],
        ["push", "1", "x"],
    ],
)
def test_not_running_is_3(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name = new_name()
    assert cli.main([*command, "--name", name]) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"shmsock serve --name {name}" in err
    assert not [entry for entry in os.listdir("/dev/shm") if name in entry]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ([], "COMMAND"),
        (["nonsense"], "invalid choice"),
        (["conns", "extra"], "unrecognized arguments"),
        (["conns", "--name", "a/b"], "name"),
        (["conns", "--name", ""], "name"),
        (["conns", "--name", "x" * 65], "name"),
        (["kick"], "required: id"),
        (["kick", "abc"], "abc"),
        (["kick", "sk-1"], "sk-1"),
        (["kick", "-1"], "-1"),
        (["kick", str(1 << 64)], str(1 << 64)),
        (["push", "1"], "required: text"),
        (["push", "x", "y"], "'x'"),
        (["serve", "--workers", "0"], "not a number of 1 or more"),
        (["serve", "--workers", "two"], "'two' is not a number"),
        (["serve", "--slots", "-5"], "number"),
        (["serve", "--graceful-timeout", "-1"], "not a number of seconds"),
        (["serve", "--graceful-timeout", "nan"], "not a number of seconds"),
        (["serve", "--graceful-timeout", "inf"], "not a number of seconds"),
        (["serve", "--log-level", "loud"], "invalid choice: 'loud'"),
        (["serve", "--backlog", "0"], "not a number of 1 or more"),
        (["serve", "--max-connections", "0"], "not a number of 1 or more"),
        (["serve", "--max-unwritten-bytes", "1M"], "'1M' is not a number"),
    ],
)
def test_a_wrong_command_line_is_2_and_says_what_is_wrong(
    command: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: shmsock")
    assert says in err


def test_more_slots_than_there_can_be_are_refused_in_words() -> None:
    name = new_name()
    done = shmsock_command("serve", "--name", name, "--slots", str(1 << 40))
    assert done.returncode in (1, 2)
    assert "slots" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [entry for entry in os.listdir("/dev/shm") if name in entry]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert said("--version") == f"shmsock {shmsock.__version__}\n"
    text = said("--help")
    assert "Exit codes: 0" in text
    for command in ("serve", "conns", "ps", "kick", "push", "doctor", "clean"):
        assert command in text
        assert "--name" in said(command, "--help")


def test_the_name_may_come_from_the_environment(server: Server, clients: list[Client]) -> None:
    done = shmsock_command("ps", "--json", env={"SHMSOCK_NAME": server.name})
    assert done.returncode == 0
    assert server.process.pid in [row["pid"] for row in json.loads(done.stdout)]
    done = shmsock_command("ps", env={"SHMSOCK_NAME": "a/b"})
    assert done.returncode == 2


def test_interrupting_a_push_leaves_nothing() -> None:
    """The client does not read, so the command waits; Ctrl-C, and the table is in order."""
    with Server(workers=1) as server, Client(server.connect(receive_bytes=4096)) as slow:
        sid = slow.id()
        command = ["-m", "workers.cli", "push", "--name", server.name, str(sid), "-"]
        with subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
            env=environment(),
        ) as push:
            assert push.stdin is not None
            push.stdin.write(b"x" * (8 << 20))
            push.stdin.close()
            with server.attach() as runtime:
                wait_until(lambda: (runtime.sockets()["writer"] >= 0).any(), "it writes")
            push.send_signal(signal.SIGINT)
            assert push.wait() == 130
            assert push.stderr is not None
            assert b"Traceback" not in push.stderr.read()
        # Half a message is on the wire: nobody can go on behind it.
        assert len(slow.ended()) < 8 << 20
        server.settle()
        assert server.run("doctor").returncode == 0


def test_a_wide_and_wild_name_does_not_reach_the_terminal(
    server: Server, clients: list[Client]
) -> None:
    with server.attach() as runtime:
        reference = runtime.address(clients[0].id())
        assert reference is not None
        with reference, contextlib.suppress(ValueError):
            reference.set_failed(errno.EIO, "\x1b]0;owned\x07 \u202e \n")
            for command in ("conns", "ps", "doctor"):
                done = server.run(command)
                assert done.stdout.replace("\n", "").isprintable()
