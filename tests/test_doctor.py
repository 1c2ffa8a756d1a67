"""``doctor`` as an operator meets it: failed sockets that linger, dead runtimes, real damage."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest

import shmsock
from shmsock import Runtime

from .helpers import Forked, Peer, connected, stop
from .servers import Server, new_name, shmsock_command


def doctor(name: str, *flags: str) -> tuple[int, str]:
    done = shmsock_command("doctor", "--name", name, *flags)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("stopped", [False, True])
def test_doctor_names_who_keeps_a_failed_socket_from_being_recycled(
    runtime: Runtime, stopped: bool
) -> None:
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)
    with peers, Peer(runtime.name, role="worker") as peer:
        peer.run(f"reference = rt.address({sid})")
        assert runtime.set_failed(sid)
        if stopped:
            stop(peer.pid)
        code, out = doctor(runtime.name)
        os.kill(peer.pid, signal.SIGCONT)
        assert code == 1
        state = "stopped" if stopped else "alive"
        text = shmsock.format_socket_id(sid)
        assert re.search(
            rf"BROKEN  failed sockets: slot {sid & 0xFFFFFFFF} \({text}\) failed 2 s ago or more "
            rf"and is still held by process 1 \(pid {peer.pid}, worker, \d+ s old, {state}\)",
            out,
        )
        peer.run("reference.close()")
    code, out = doctor(runtime.name)
    assert (code, "BROKEN" in out) == (0, False)


def kill_inside(runtime: Runtime) -> None:
    """Die in the middle of create, in a stripe, with its token."""

    def die(slot: int, argument: object) -> int:
        runtime._segment.cells.owner[slot] = runtime._engine.word
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    runtime.check()
    runtime._engine.run(3, die, 3 * 32)


def test_doctor_of_a_dead_runtime_only_looks_and_repair_mends_what_the_dead_left(
    name: str,
) -> None:
    with Peer() as host:
        host.run(f"import shmsock; rt = shmsock.Runtime.create({name!r}, slots=256, stripes=8)")
        host.run("""
            import socket
            pairs = [socket.socketpair() for _ in range(20)]
            ids = [rt.create_socket(pair[0]) for pair in pairs]
            held = [rt.address(sid) for sid in ids]
            rt._engine.lock.acquire()
        """)
        with Runtime.attach(name) as guest:
            with Forked(kill_inside, guest) as child:
                assert os.WIFSIGNALED(child.wait())
            semaphore = guest._semaphores.get(3, guest._segment.cells.ctl[3] >> 2)
            assert semaphore is not None
            assert semaphore.value == 0  # not yet retired: who was killed has its token
            host.kill()
            guest._lock_file.drop(64 + guest.index)  # as if it had been killed, too
            guest._engine.closed = True
            with open(f"/dev/shm/shmsock.{name}", "rb") as file:
                before = file.read()
                code, out = doctor(name)
                file.seek(0)
                assert file.read() == before
            assert code == 3
            assert "BROKEN  host: no process is alive, only names are left" in out
            assert f"`shmsock clean --name {name}` removes them" in out
            assert out.count("died and was not reaped") >= 2
            code, out = doctor(name, "--repair", "--json")
            report = json.loads(out)
            assert code == 0, report
            assert any("dead processes were reaped" in line for line in report["repairs"])
            tables = [check for check in report["checks"] if check["check"] == "table"]
            assert [check["ok"] for check in tables] == [True]
            assert "0 in use" in tables[0]["detail"]
    assert shmsock_command("clean", "--name", name).returncode == 0


def test_doctor_repairs_a_live_server_under_its_clients() -> None:
    with Server() as server, server.client() as client:
        slot = client.id() & 0xFFFFFFFF
        with Peer(server.name) as peer:
            peer.run(f"rt._segment.cells.versioned_ref[{slot}] += 5")
            peer.run("rt._semaphores.get(5, rt._segment.cells.ctl[5] >> 2).acquire(0)")
        code, out = doctor(server.name)
        assert code == 1
        assert f"slot {slot} has nref" in out
        assert "stripe 5 is stuck" in out
        code, out = doctor(server.name, "--repair")
        assert code == 0, out
        by_itself = "audit: stripe 5 is stuck" in server.log()  # half a minute after its start
        assert by_itself or "repair  found: stripe 5 is stuck" in out
        assert client.call("PING") == "PONG"
        assert doctor(server.name)[0] == 0


def test_doctor_of_a_poisoned_runtime_tells_why_and_what_to_do() -> None:
    name = new_name()
    with Runtime.create(name, slots=8, stripes=2) as runtime:
        runtime.poison("by the test")
        for flags in ((), ("--repair",)):
            code, out = doctor(name, *flags)
            assert code == 1
            assert "BROKEN  table: the segment is marked poisoned: by the test" in out
            assert "every operation raises PoisonedError" in out


def test_doctor_says_that_there_is_nothing(name: str) -> None:
    for flags in ((), ("--repair",), ("--json",)):
        done = shmsock_command("doctor", "--name", name, *flags)
        assert (done.returncode, done.stdout) == (3, "")
        assert f"no runtime named '{name}'" in done.stderr
