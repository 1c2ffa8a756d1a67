"""What campaigns found, each made to happen on purpose: deaths that several are told of at once."""

from __future__ import annotations

import collections.abc
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import pytest

from shmsock import Runtime, Status
from workers.supervisor import GIVE_UP_AFTER

from .helpers import REPOSITORY, WATCHDOG_S, Forked, Peer, children, wait_until
from .servers import Server
from .test_rehome import ask, echo_worker, place


@contextlib.contextmanager
def stopped(pid: int) -> collections.abc.Iterator[None]:
    """A process that does nothing meanwhile, and then learns of everything in one batch."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: state(pid) == "T", "it has stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def state(pid: int) -> str:
    gone = FileNotFoundError, ProcessLookupError  # before the file is opened, and before it is read
    with contextlib.suppress(*gone), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
    return ""


def kill_and_reap(server: Server, index: int) -> None:
    """Kill a worker and have its row given back before its supervisor is told of anything."""
    os.kill(server.worker_pids()[index], signal.SIGKILL)
    with server.attach() as runtime:

        def reaped() -> bool:
            runtime.repair()
            return index not in {row.index for row in runtime.processes() if row.role == "worker"}

        wait_until(reaped, "it is reaped")


def test_a_client_accepted_for_a_worker_that_was_just_reaped_gets_another() -> None:
    with Server(workers=2) as server, contextlib.ExitStack() as stack:
        clients = server.on_each_worker(server.client)
        for client in clients.values():
            stack.enter_context(client)
        victim, other = clients
        clients[victim].close()
        wait_until(lambda: server.in_use() == 1, "the victim has the fewest")
        with stopped(server.process.pid):
            late = [stack.enter_context(server.connect()) for _ in range(3)]
            for sock in late:
                sock.sendall(b"PING\r\n")
            kill_and_reap(server, victim)
        for sock in late:
            assert sock.recv(100) == b"+PONG\r\n"
        assert clients[other].call("PING") == "PONG"
        wait_until(lambda: len(server.worker_pids()) == 2, "another takes its place")


def test_clients_accepted_when_every_worker_was_just_reaped_wait_for_the_next() -> None:
    with Server(workers=2) as server, contextlib.ExitStack() as stack:
        victims = list(server.worker_pids())
        with stopped(server.process.pid):
            late = [stack.enter_context(server.connect()) for _ in range(3)]
            for sock in late:
                sock.sendall(b"PING\r\n")
            for victim in victims:
                kill_and_reap(server, victim)
        for sock in late:
            assert sock.recv(100) == b"+PONG\r\n"
        wait_until(lambda: len(server.worker_pids()) == 2, "others take their place")


def test_workers_that_died_together_are_all_replaced_and_their_clients_served() -> None:
    with Server(workers=3) as server, contextlib.ExitStack() as stack:
        clients = server.on_each_worker(server.client)
        for client in clients.values():
            stack.enter_context(client)
        victims = list(clients)[:2]
        with server.attach() as runtime:
            wait_until(lambda: not runtime.sockets()["busy"].any(), "all are idle")
        with stopped(server.process.pid):
            for victim in victims:
                kill_and_reap(server, victim)
        for client in clients.values():
            assert client.call("PING") == "PONG"
        wait_until(lambda: len(server.worker_pids()) == 3, "both are replaced")


def attach_and_die(runtime: Runtime) -> int:
    runtime._check()
    return runtime.index


@pytest.mark.parametrize("policy", ["fail", "rehome"])
def test_a_socket_is_not_given_to_a_process_that_was_reaped(runtime: Runtime, policy: str) -> None:
    with Forked(attach_and_die, runtime) as child:
        index = child.result()
    wait_until(lambda: runtime.repair()["reaped"], "it is reaped")
    ours, theirs = socket.socketpair()
    with theirs:
        with pytest.raises(ValueError, match="not alive"):
            runtime.create_socket(ours, owner=index, on_owner_death=policy)
        theirs.settimeout(WATCHDOG_S)
        ours.sendall(b"still ours")
        assert theirs.recv(100) == b"still ours"
        ours.close()
        assert runtime.in_use() == 0


def test_a_new_owner_that_was_never_told_finds_a_socket_it_had_written_to(
    runtime: Runtime,
) -> None:
    """A duplicate kept for writing is no sign that it knows of the socket as its own."""
    with echo_worker(runtime) as (first, index), echo_worker(runtime) as (other, heir):
        sid, client = place(runtime, index)
        with client:
            other.run(f"ref = rt.address({sid}); ref.write(b'from aside'); ref.close()")
            assert client.recv(100) == b"from aside"
            first.kill()
            wait_until(lambda: runtime.orphans() == [sid], "it waits for a new owner")
            word = int(runtime._segment.cells.owner[sid & 0xFFFFFFFF])
            # As if killed between this and passing it on.
            assert runtime._engine.change_owner(sid, word, runtime._word_of(heir))
            assert ask(client, b"found") == b"found"


def test_spreading_a_listener_while_processes_die_reaches_the_others(runtime: Runtime) -> None:
    with contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(echo_worker(runtime))[0] for _ in range(3))
        with socket.create_server(("127.0.0.1", 0)) as sock:
            sid = runtime.create_socket(sock.dup(), on_owner_death="rehome")
            noticed = threading.Event()
            runtime._service.call_soon(noticed.wait)  # nobody notices the hang-ups before us
            first.kill()
            second.kill()
            try:
                runtime.spread([sid])
            finally:
                noticed.set()
            wait_until(lambda: third.ask(f"rt._descriptors.peek({sid}) is not None"), "it has it")
            runtime.set_failed(sid)


CREATE_AND_DIE = """
rt._descriptors.put = lambda sid: None  # killed before it
import os, socket
sid = rt.create_socket(socket.create_connection({address!r}), on_owner_death="rehome")
"""


@pytest.mark.slow
def test_an_orphan_whose_creator_died_before_its_put_is_not_kept_for_ever() -> None:
    """It waits for a new owner, but there is no descriptor to give to one."""
    with Server() as server, socket.create_server(("127.0.0.1", 0)) as listener:
        with Peer(server.name) as creator:
            creator.run(CREATE_AND_DIE.format(address=listener.getsockname()))
            sid = creator.ask("sid")
            creator.kill()
        peer, _ = listener.accept()
        with peer, server.attach() as runtime:
            wait_until(lambda: runtime.status(sid) is Status.GONE, "it fails")
            assert peer.recv(100) == b""
            assert runtime.audit() == []


WAITS_TO_BE_KILLED = """
import os, signal, sys
if "workers.worker" in sys.orig_argv and os.path.exists({flag!r}):
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.slow
def test_workers_killed_while_they_start_are_no_reason_to_give_up(tmp_path: pathlib.Path) -> None:
    """Who was killed from outside says nothing about whether the next one comes up."""
    flag = tmp_path / "stop"
    flag.touch()
    (tmp_path / "sitecustomize.py").write_text(WAITS_TO_BE_KILLED.format(flag=str(flag)))
    env = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    with Server(env=env, workers=3, wait=False) as server:
        for _ in range(GIVE_UP_AFTER + 1):

            def waiting() -> list[int]:
                found = children(server.process.pid)
                return [pid for pid in found if state(pid) == "T"]

            os.kill(wait_until(waiting, "one waits to be killed")[0], signal.SIGKILL)
        flag.unlink()
        for pid in children(server.process.pid):
            os.kill(pid, signal.SIGCONT)
        server.wait_ready()
        assert server.log().count("was killed by signal 9") == GIVE_UP_AFTER + 1


def test_a_worker_whose_supervisor_died_before_it_said_anything_leaves_without_a_word() -> None:
    command = [sys.executable, "-m", "workers.worker", "nobody"]
    done = subprocess.run(command, input=b"", capture_output=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_workers_that_an_earlier_supervisor_had_started_do_not_come_on_top(
    tmp_path: pathlib.Path,
) -> None:
    flag = tmp_path / "stop"
    flag.touch()
    (tmp_path / "sitecustomize.py").write_text(WAITS_TO_BE_KILLED.format(flag=str(flag)))
    env = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    with Server(env=env, wait=False) as first:
        starting = children(first.process.pid)

        def both_wait() -> bool:
            starting.update(children(first.process.pid))
            return [state(pid) for pid in starting] == ["T", "T"]

        wait_until(both_wait, "both have not joined yet")
        first.process.kill()
        first.process.wait()
        flag.unlink()
        with Server(name=first.name) as second:
            ours = second.worker_pids()
            for pid in starting:
                os.kill(pid, signal.SIGCONT)
            wait_until(lambda: all(state(pid) in "Z" for pid in starting), "they leave again")
            assert second.worker_pids() == ours
            with second.client() as client:
                assert client.call("PING") == "PONG"


@pytest.mark.slow
def test_a_new_supervisor_waits_for_a_late_process_that_has_the_listener() -> None:
    """The last one that has a duplicate is stopped: until it goes on the address is in use."""
    with Server(workers=1) as first, Peer(first.name) as keeper:
        keeper.run("import socket; pair = socket.socketpair(); sid = rt.create_socket(pair[0])")
        with first.attach() as runtime:
            (listener,) = (
                int(row["id"]) for row in runtime.sockets() if runtime.is_listener(int(row["id"]))
            )
        wait_until(
            lambda: keeper.ask(f"rt._descriptors.peek({listener}) is not None"), "it is spread"
        )
        with stopped(keeper.pid):
            first.process.kill()
            first.process.wait()
            for pid in first.pids():
                os.kill(pid, signal.SIGKILL)
            with first.connect() as early:  # in the backlog that only the stopped one keeps
                early.sendall(b"PING\r\n")
                second = Server(name=first.name, bind=first.addresses, wait=False)
                with second:
                    wait_until(lambda: "waiting for who may have" in second.log(), "it waits")
                    os.kill(keeper.pid, signal.SIGCONT)
                    second.wait_ready()
                    assert second.addresses == first.addresses
                    assert early.recv(100) == b"+PONG\r\n"
                    keeper.run("rt.close()")
