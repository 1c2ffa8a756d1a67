"""Children of every start method: they attach anew, and never touch their parent's books."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import typing
import warnings

import pytest

import shmsock

from .helpers import (
    REPOSITORY,
    WATCHDOG_S,
    Forked,
    connected,
    descriptors,
    holders_of,
    read_to_end,
    wait_until,
)


def books(runtime: shmsock.Runtime) -> dict[str, object]:
    """All that this process's row stands for, and what it counts privately."""
    columns = runtime._segment.columns
    return {
        "held": columns.held[:, runtime.index].tolist(),
        "claims": columns.claims[runtime.index].tolist(),
        "row": int(columns.row_state[runtime.index]),
        "counts": {slot: runtime._engine.count(slot) for slot in range(runtime.slots)},
    }


def is_quiet(runtime: shmsock.Runtime) -> bool:
    return len(runtime.processes()) == 1 and runtime.audit() == []


# -- start methods --------------------------------------------------------------------------------


def serve_one(name: str, sid: int, answers: multiprocessing.Queue[object]) -> None:
    """In a child of any start method: attach by name, and use a socket."""
    runtime = shmsock.Runtime.attach(name)
    with runtime.address(sid) as reference:  # type: ignore[union-attr]
        reference.write(b"from the child")
    answers.put((runtime.index, runtime.audit()))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_every_start_method_attach(runtime: shmsock.Runtime, method: str) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    context: typing.Any = multiprocessing.get_context(method)
    before = books(runtime)
    answers = context.Queue()
    child = context.Process(target=serve_one, args=(runtime.name, sid, answers))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        index, audit = answers.get(timeout=WATCHDOG_S)
        assert index != runtime.index
        assert audit == []
        with peers:
            assert peers.recv(100) == b"from the child"
        child.join(WATCHDOG_S)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()
        child.close()
        answers.close()
        answers.join_thread()
        if method == "forkserver":
            multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    assert books(runtime) == before
    wait_until(lambda: is_quiet(runtime))


def test_a_forked_child_attaches_at_its_first_use_of_the_parents_runtime(
    runtime: shmsock.Runtime,
) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    before = books(runtime)

    def use() -> list[object]:
        early = shmsock.current() is runtime
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(b"hello")
            attached = runtime.attached(sid)
        return [early, runtime.index, attached, runtime.is_host, runtime.audit()]

    with peers:
        early, index, attached, is_host, audit = Forked(use).result()
        assert peers.recv(10) == b"hello"
    assert early
    assert index != runtime.index
    assert attached == [index]
    assert not is_host
    assert audit == []
    assert books(runtime) == before
    assert runtime.is_host
    wait_until(lambda: is_quiet(runtime))


def test_a_child_that_never_uses_the_runtime_takes_no_row(runtime: shmsock.Runtime) -> None:
    def look() -> int:
        return int((runtime._segment.columns.row_state & 0xFF != 0).sum())

    assert Forked(look).result() == 1


def test_a_grandchild_attaches_too(runtime: shmsock.Runtime) -> None:
    def fork_again() -> list[int]:
        runtime.audit()
        return [runtime.index, Forked(lambda: (runtime.audit(), runtime.index)[1]).result()]

    child, grandchild = Forked(fork_again).result()
    assert len({runtime.index, child, grandchild}) == 3
    wait_until(lambda: is_quiet(runtime))


def test_a_child_may_create_fail_and_close(runtime: shmsock.Runtime) -> None:
    before = books(runtime)

    def live_a_little() -> list[object]:
        ours, peers = connected("unix")
        mine = runtime.create_socket(ours)
        with runtime.address(mine) as reference:  # type: ignore[union-attr]
            reference.write(b"x")
        echoed = peers.recv(10).decode()
        runtime.set_failed(mine, 5, "x")
        ended = read_to_end(peers) == b""
        runtime.close()
        try:
            runtime.audit()
        except shmsock.ClosedError:
            return [echoed, ended, "closed"]
        return [echoed, ended, "open"]

    assert Forked(live_a_little).result() == ["x", True, "closed"]
    assert books(runtime) == before
    assert runtime.in_use() == 0
    assert is_quiet(runtime), "it left in order, so nothing waits for a reaper"


def test_a_child_of_a_closed_runtime_is_told_so(name: str) -> None:
    with shmsock.Runtime.create(name, slots=16, stripes=2) as runtime:
        pass

    def use() -> str:
        with pytest.raises(shmsock.ClosedError):
            runtime.audit()
        return "told"

    assert Forked(use).result() == "told"


def test_a_child_that_finds_no_free_row_never_acts_in_its_parents_name(name: str) -> None:
    with shmsock.Runtime.create(name, slots=16, stripes=2, processes=1) as runtime:
        ours, peers = connected()
        sid = runtime.create_socket(ours)
        before = books(runtime)

        def use() -> list[str]:
            found = []
            for _ in range(2):  # the second try must not find itself attached
                for call in (lambda: runtime.address(sid), lambda: runtime.set_failed(sid, 1, "x")):
                    try:
                        call()
                    except shmsock.ShmsockError as error:
                        found.append(type(error).__name__)
            return found

        assert Forked(use).result() == ["TableFullError"] * 4
        assert books(runtime) == before
        assert runtime.status(sid) is shmsock.Status.LIVE
        peers.close()


# -- what is inherited ----------------------------------------------------------------------------


def test_inherited_references_are_inert(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours, b"mine")
    with peers, runtime.address(sid) as reference:  # type: ignore[union-attr]
        reference.fileno()
        before = books(runtime)

        def use(attach_first: bool) -> list[str]:
            if attach_first:
                runtime.audit()
            raised = []
            for call in (
                lambda: reference.write(b"no"),
                lambda: reference.write(b"no" * 1000, b"no"),
                reference.fileno,
                lambda: reference.recv(1),
                reference.flush,
                lambda: setattr(reference, "user_data", b"no"),
                lambda: setattr(reference, "busy", True),
                lambda: reference.count_messages(1),
                lambda: reference.set_failed(1, "no"),
                reference.release_additional_reference,
                reference.add_reference,
            ):
                try:
                    call()
                except shmsock.ClosedError:
                    raised.append("closed")
                except BaseException as error:
                    raised.append(repr(error))
                else:
                    raised.append("did it")
            reference.close()
            return raised

        for attach_first in (False, True):
            assert Forked(use, attach_first).result() == ["closed"] * 11
            assert books(runtime) == before
        reference.write(b"parent")
        assert peers.recv(10) == b"parent"
        assert reference.user_data == b"mine"
        assert runtime.sockets()["messages_in"][0] == 0
    wait_until(lambda: is_quiet(runtime))


def test_a_child_has_none_of_the_parents_descriptors_and_peers_see_the_end(
    runtime: shmsock.Runtime,
) -> None:
    dispatcher = shmsock.Dispatcher(runtime)
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    dispatcher.add_consumer(sid, lambda ref: None)
    inode = int(runtime.sockets()["inode"][0])
    lock_inode = os.stat(f"{runtime.run_directory}/lock").st_ino
    gate_read, gate_write = os.pipe()

    def live() -> list[str]:
        os.close(gate_write)
        os.read(gate_read, 1)
        return []

    with peers, Forked(live) as child:
        os.close(gate_read)
        wait_until(lambda: holders_of(inode, [child.pid]) == [])
        inherited = descriptors(child.pid).values()
        assert not any("eventpoll" in what or "eventfd" in what for what in inherited)
        assert not any(what.endswith("/lock") for what in inherited), lock_inode
        runtime.set_failed(sid, 1, "x")
        assert read_to_end(peers) == b""
        os.close(gate_write)
        child.result()
    dispatcher.close()


def test_the_parents_dispatcher_is_unharmed_by_children(runtime: shmsock.Runtime) -> None:
    dispatcher = shmsock.Dispatcher(runtime)
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    heard: list[bytes] = []

    def consume(ref: shmsock.SocketRef) -> None:
        heard.append(ref.recv(100))
        dispatcher.stop()

    dispatcher.add_consumer(sid, consume)

    def use() -> int:
        with pytest.raises(ValueError, match="closed"):
            dispatcher.fileno()
        mine = shmsock.Dispatcher(runtime)
        mine.add_consumer(sid, lambda ref: None)
        mine.run_once(0)
        mine.close()
        runtime.close()
        return len(dispatcher)

    with peers:
        for number in range(3):
            assert Forked(use).result() == 0
            peers.send(b"%d" % number)
            dispatcher.run()
        with Forked(signal.pause) as child:
            child.kill()
        peers.send(b"3")
        dispatcher.run()
        assert heard == [b"0", b"1", b"2", b"3"]
    dispatcher.close()


def test_a_fork_inside_a_callback_leaves_the_parents_loop_running(
    runtime: shmsock.Runtime,
) -> None:
    dispatcher = shmsock.Dispatcher(runtime)
    results: list[object] = []

    def fork() -> None:
        results.append(Forked(lambda: runtime.index == 0 or runtime.audit()).result())
        dispatcher.call_soon(dispatcher.stop)

    dispatcher.call_soon(fork)
    dispatcher.run()
    assert results == [True]
    dispatcher.close()


# -- bad moments ----------------------------------------------------------------------------------


def test_a_fork_while_another_thread_sits_inside_a_stripe(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    stripe = (sid & 0xFFFFFFFF) // runtime._segment.layout.block
    inside, leave = threading.Event(), threading.Event()

    def sit(slot: int, argument: object) -> int:
        inside.set()
        leave.wait(WATCHDOG_S)
        return 1

    thread = threading.Thread(target=lambda: runtime._engine.run(stripe, sit, 0))
    thread.start()
    assert inside.wait(WATCHDOG_S)
    assert runtime._engine.lock.locked()

    def use() -> bytes | None:
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(b"at last")
        return None

    with peers, Forked(use) as child:
        wait_until(lambda: len(runtime.processes()) == 2)  # it attached, and waits for the stripe
        leave.set()
        thread.join()
        child.result()
        assert peers.recv(100) == b"at last"
    wait_until(lambda: is_quiet(runtime))


def test_a_fork_while_other_threads_write_and_address(runtime: shmsock.Runtime) -> None:
    ours, peers = connected("unix", 8192)
    sid = runtime.create_socket(ours)
    stop = threading.Event()
    failures: list[BaseException] = []

    def churn() -> None:
        try:
            while not stop.is_set():
                with runtime.address(sid) as reference:  # type: ignore[union-attr]
                    reference.write(b"p" * 100)
                    reference.flush(WATCHDOG_S)
        except BaseException as error:
            failures.append(error)

    def use() -> int:
        for _ in range(20):
            with runtime.address(sid) as reference:  # type: ignore[union-attr]
                reference.write(b"c" * 100)
                reference.flush(WATCHDOG_S)
        return 20

    received = bytearray()

    def drain() -> None:
        while chunk := peers.recv(65536):
            received.extend(chunk)

    with peers:
        reader = threading.Thread(target=drain)
        reader.start()
        threads = [threading.Thread(target=churn) for _ in range(2)]
        for thread in threads:
            thread.start()
        children = [Forked(use) for _ in range(8)]
        assert [child.result() for child in children] == [20] * 8
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        runtime.set_failed(sid, 1, "done")
        reader.join()
    assert len(received) % 100 == 0
    for at in range(0, len(received), 100):
        assert len(set(received[at : at + 100])) == 1
    assert received.count(b"c") == 8 * 20 * 100
    wait_until(lambda: is_quiet(runtime))
    assert runtime.in_use() == 0


def test_the_holds_of_a_killed_child_come_back(runtime: shmsock.Runtime) -> None:
    ids = []
    clients = []
    for _ in range(20):
        ours, peers = connected("unix")
        ids.append(runtime.create_socket(ours))
        clients.append(peers)
    before = books(runtime)
    read, write = os.pipe()

    def hold() -> None:
        references = [runtime.address(sid) for sid in ids]
        mine = runtime.create_socket(socket.socketpair()[0])
        os.write(write, b"%d" % mine)
        signal.pause()
        del references

    with Forked(hold) as child:
        owned = int(os.read(read, 100))
        assert [len(runtime.attached(sid)) for sid in ids] == [1] * 20
        child.kill()
        wait_until(lambda: is_quiet(runtime))
    assert [runtime.attached(sid) for sid in ids] == [[]] * 20
    assert [int(nref) for nref in runtime.sockets()["nref"]] == [1] * 20
    assert runtime.status(owned) is shmsock.Status.GONE
    assert runtime._io.error_of(owned)[0] == errno.EOWNERDEAD
    assert books(runtime) == before
    for peers in clients:
        peers.close()
    os.close(read)
    os.close(write)


def test_a_forked_child_that_exits_through_atexit_takes_nothing_of_its_parents_away(
    name: str,
) -> None:
    script = f"""
        import os, sys, socket, shmsock
        rt = shmsock.Runtime.create({name!r}, slots=16, stripes=2)
        a, b = socket.socketpair()
        sid = rt.create_socket(a)
        for use in (False, True):
            if os.fork() == 0:
                if use: rt.address(sid).write(b"child")
                sys.exit(7)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
        assert b.recv(10) == b"child"
        rt.address(sid).write(b"parent")
        assert b.recv(10) == b"parent"
        assert rt.audit() == []
        assert [p.index for p in rt.processes()] == [rt.index]
        assert os.path.exists(rt.run_directory + "/lock")
    """
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": REPOSITORY},
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
