"""A writer killed in each state of a write, while others wait to write and its owner may die too.

The victim stops itself at the line (SIGSTOP), the others take their places, and SIGKILL finds it
there. Each test is a line of DESIGN section 10's table.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import socket
import typing

import pytest

from shmsock import ENGINE, Runtime, Status

from .helpers import WATCHDOG_S, Forked, connected, read_to_end, wait_until
from .test_kill_points_channel import assert_nobody_has, inode_of, state_of
from .test_rehome import ask, echo_worker, owner_of

LARGE = 1 << 20  # more than the kernel takes of a peer that does not read
BEFORE, WITH, MIDDLE, QUEUED, SENT, AFTER = (
    "before the turn",
    "with the turn",
    "in mid-message",
    "with only queued messages",
    "after the send, before it is counted",
    "after the send, before giving the turn",
)


def stop(*_: object) -> int:
    """Be found here."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return 0


# Where the C engine's own write stops; what is in the way of it is Python's write in either engine.
C_POINTS = {BEFORE: "before_want", WITH: "given", SENT: "message_sent", AFTER: "message_counted"}


class Stops:
    """An engine that stops its process at one call."""

    def __init__(self, engine: typing.Any, at: str) -> None:
        self._engine, self._at = engine, at

    def __getattr__(self, name: str) -> typing.Any:
        return stop if name == self._at else getattr(self._engine, name)


def write_and_stop(runtime: Runtime, sid: int, state: str) -> None:
    runtime._check()
    reference = runtime.address(sid)
    assert reference is not None
    reference.fileno()
    writers: typing.Any = runtime._writers
    if ENGINE == "c" and state in C_POINTS:
        module: typing.Any = importlib.import_module("shmsock._engine")
        module.arm(C_POINTS[state], signal.SIGSTOP)
    elif state == BEFORE:
        writers._engine = Stops(writers._engine, "take_turn")
    elif state == WITH:
        writers._send = stop
    elif state == SENT:
        writers._count = stop
    elif state == AFTER:
        writers._engine = Stops(writers._engine, "give_turn")
    reference.write(b"v" * LARGE if state == MIDDLE else b"victim")
    stop()


def read_exactly(sock: socket.socket, size: int) -> bytes:
    sock.settimeout(WATCHDOG_S)
    chunks = bytearray()
    while len(chunks) < size:
        chunk = sock.recv(size - len(chunks))
        assert chunk, f"it ended after {len(chunks)} of {size} bytes"
        chunks += chunk
    return bytes(chunks)


@pytest.mark.parametrize("owner_dies", [False, True], ids=["owner lives", "owner dies"])
@pytest.mark.parametrize("state", [BEFORE, WITH, MIDDLE, QUEUED, SENT, AFTER])
def test_writer_killed(state: str, owner_dies: bool, runtime: Runtime) -> None:
    with echo_worker(runtime) as (owner, index), echo_worker(runtime) as (other, other_index):
        ours, client = connected("tcp", 8192)
        with client:
            sid = runtime.create_socket(ours, owner=index, on_owner_death="rehome")
            inode = inode_of(runtime, sid)
            assert runtime.pass_to(index, [sid]) == [sid]
            wait_until(lambda: owner.ask(f"{sid} in dispatcher.consumers()"), "it is read")
            before = b"o" * LARGE if state == QUEUED else b""
            other.run(f"ref = rt.address({sid}); ref.write(b'o' * {len(before)})")
            with Forked(write_and_stop, runtime, sid, state) as victim:
                wait_until(lambda: state_of(victim.pid) == "T", "it is at the line")
                (row,) = runtime.sockets()
                pids = {info.index: info.pid for info in runtime.processes()}
                writer = {BEFORE: None, QUEUED: other.pid}.get(state, victim.pid)
                assert pids.get(int(row["writer"])) == writer
                other.run("ref.write(b'other')")
                if owner_dies:
                    owner.kill()
                victim.kill()
            if state in (BEFORE, QUEUED):  # nothing shared is left of it
                expected = before + b"other"
                assert read_exactly(client, len(expected)) == expected
                assert other.ask("ref.flush(60)")
                other.run("ref.close()")
                if owner_dies:
                    wait_until(lambda: runtime.rehome(sid, other_index), "it has a new owner")
                    assert owner_of(runtime, sid) == other_index
                assert ask(client, b"and on") == b"and on"
                runtime.set_failed(sid)
                assert read_to_end(client) == b""
            else:  # half a frame may be on the wire: the peer sees the end, and nothing after it
                received = read_to_end(client)
                if state == MIDDLE:
                    assert 0 < len(received) < LARGE
                    assert set(received) == set(b"v")
                else:
                    assert received == {WITH: b"", SENT: b"victim", AFTER: b"victim"}[state]
                assert other.ask("ref.failed and ref.error[0]") == errno.EPIPE
                with pytest.raises(AssertionError, match="a writer died in mid-message"):
                    other.run("ref.write(b'no more')")
                wait_until(lambda: other.ask("ref.unwritten_bytes()") == 0, "its queue is dropped")
                other.run("ref.close()")
            wait_until(lambda: runtime.status(sid) is Status.GONE, "its slot comes back")
            assert_nobody_has(inode, owner.pid, other.pid)
            wait_until(lambda: runtime.processes()[-1].alive, "the dead are reaped")
            assert runtime.audit() == []


def test_winner_that_dies_with_the_writer_of_a_half_sent_message_leaves_one_failure(
    runtime: Runtime,
) -> None:
    """Two processes die on one socket at one moment: it fails once, and is given back once."""
    ours, client = connected("tcp", 8192)
    sid = runtime.create_socket(ours)
    inode = inode_of(runtime, sid)

    def fail_and_stop() -> None:
        runtime._check()
        runtime._descriptors.shut_down = stop  # type: ignore[method-assign,assignment]
        runtime.set_failed(sid, errno.ECONNABORTED, "the winner")

    with client, Forked(write_and_stop, runtime, sid, MIDDLE) as writer:
        wait_until(lambda: state_of(writer.pid) == "T", "it is in mid-message")
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            with Forked(fail_and_stop) as winner:
                wait_until(lambda: state_of(winner.pid) == "T", "it has won")
                for victim in (writer, winner):
                    victim.send_signal(signal.SIGKILL)
            assert set(read_to_end(client)) <= set(b"v")
            wait_until(lambda: len(runtime.processes()) == 1, "both are reaped")
            assert reference.error == (errno.ECONNABORTED, "the winner")
        assert runtime.status(sid) is Status.GONE
        assert_nobody_has(inode)
        assert runtime.audit() == []


def test_process_killed_inside_a_group_transaction_changes_nothing_for_the_others(
    runtime: Runtime,
) -> None:
    pairs = [connected() for _ in range(2)]
    ids = [runtime.create_socket(ours) for ours, _ in pairs]
    runtime.groups.add("news", ids[0])

    def add(killed_at: int) -> None:
        runtime._check()
        groups: typing.Any = runtime.groups
        looks = []

        def is_live(sid: int) -> bool:
            looks.append(sid)
            if len(looks) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return True

        groups._is_live = is_live
        groups.add("news", ids[1])

    for killed_at in range(1, 10):
        status = Forked(add, killed_at).wait()
        if os.WIFEXITED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert runtime.groups.members("news") == [ids[0]]
        assert runtime.groups.add("news", ids[1])  # nobody waits for the dead
        assert runtime.groups.broadcast("news", b"all") == 2
        assert runtime.groups.discard("news", ids[1])
    assert killed_at > 1
    assert sorted(runtime.groups.members("news")) == sorted(ids)
    for sid, (_, client) in zip(ids, pairs, strict=True):
        runtime.set_failed(sid)
        assert set(read_to_end(client)) <= set(b"all")
        client.close()
