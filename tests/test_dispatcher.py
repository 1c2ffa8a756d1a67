"""The dispatcher: consumers, readers, nesting, hand-over of accepted sockets, and survival."""

from __future__ import annotations

import asyncio
import collections.abc
import errno
import logging
import os
import select
import signal
import socket
import threading
import time

import pytest

import shmsock

from .helpers import WATCHDOG_S, Peer, connected, holders_of, read_to_end, wait_until

Pair = tuple[int, socket.socket]


@pytest.fixture
def dispatcher(runtime: shmsock.Runtime) -> collections.abc.Iterator[shmsock.Dispatcher]:
    made = shmsock.Dispatcher(runtime)
    yield made
    made.close()


@pytest.fixture
def client(runtime: shmsock.Runtime) -> collections.abc.Iterator[Pair]:
    ours, peers = connected()
    with peers:
        yield runtime.create_socket(ours), peers


def run_until(
    dispatcher: shmsock.Dispatcher, condition: collections.abc.Callable[[], object]
) -> None:
    """Run the loop until a condition holds, under a watchdog."""
    deadline = time.monotonic() + WATCHDOG_S

    def look() -> None:
        if condition() or time.monotonic() > deadline:
            dispatcher.stop()
        else:
            dispatcher.call_later(0.001, look)

    dispatcher.call_soon(look)
    dispatcher.run()
    assert condition()


# -- consumers -----------------------------------------------------------------------------------


def test_a_consumer_is_called_for_what_arrives_and_not_after_its_removal(
    runtime: shmsock.Runtime, dispatcher: shmsock.Dispatcher, client: Pair
) -> None:
    sid, peers = client
    heard: list[bytes] = []
    assert dispatcher.add_consumer(sid, lambda ref: heard.append(ref.recv(100)))
    assert dispatcher.consumers() == [sid]
    assert len(dispatcher) == 1
    with pytest.raises(ValueError, match="consumer already"):
        dispatcher.add_consumer(sid, lambda ref: None)
    peers.send(b"one")
    run_until(dispatcher, lambda: heard)
    assert runtime.attached(sid) == [], "a consumer is no reference"
    assert dispatcher.remove_consumer(sid)
    assert not dispatcher.remove_consumer(sid)
    peers.send(b"two")
    done: list[int] = []
    dispatcher.call_later(0.01, lambda: done.append(1))
    run_until(dispatcher, lambda: done)
    assert heard == [b"one"]
    again: list[bytes] = []
    assert dispatcher.add_consumer(sid, lambda ref: again.append(ref.recv(100)))
    run_until(dispatcher, lambda: again)
    assert again == [b"two"], "what came meanwhile is reported at once"


def test_a_callback_that_has_not_read_everything_is_called_again(
    dispatcher: shmsock.Dispatcher, client: Pair
) -> None:
    sid, peers = client
    received = bytearray()
    calls: list[int] = []

    def read_a_little(ref: shmsock.SocketRef) -> bool:
        calls.append(1)
        try:
            received.extend(ref.recv(10))
        except BlockingIOError:
            return False
        return True

    peers.sendall(bytes(range(200)))
    dispatcher.add_consumer(sid, read_a_little)
    run_until(dispatcher, lambda: len(received) == 200)
    assert received == bytes(range(200))
    assert len(calls) >= 20
    calls.clear()
    done: list[int] = []
    dispatcher.call_later(0.01, lambda: done.append(1))
    run_until(dispatcher, lambda: done)
    assert len(calls) <= 1, "edge-triggered: nothing new, no call"


def test_a_failed_or_made_up_id_gets_no_consumer(
    runtime: shmsock.Runtime, dispatcher: shmsock.Dispatcher, client: Pair
) -> None:
    sid, _ = client
    runtime.set_failed(sid, 1, "x")
    assert not dispatcher.add_consumer(sid, lambda ref: None)
    assert not dispatcher.add_consumer(12345, lambda ref: None)
    assert dispatcher.consumers() == []


@pytest.mark.parametrize("held", [False, True], ids=["recycled at once", "held elsewhere"])
def test_a_failure_by_another_process_is_told_once_with_code_and_text(
    runtime: shmsock.Runtime, dispatcher: shmsock.Dispatcher, client: Pair, held: bool
) -> None:
    sid, peers = client
    inode = int(runtime.sockets()["inode"][0])
    told: list[tuple[int, int, str]] = []
    dispatcher.add_consumer(sid, lambda ref: None, lambda *what: told.append(what))
    with Peer(runtime.name) as other:
        if held:
            other.run(f"ref = rt.address({sid})")
        assert other.ask(f"rt.set_failed({sid}, {errno.EPERM}, 'kicked by an operator')")
        run_until(dispatcher, lambda: told)
        done: list[int] = []
        dispatcher.call_later(0.01, lambda: done.append(1))
        run_until(dispatcher, lambda: done)
        assert told == [(sid, errno.EPERM, "kicked by an operator")]
        assert dispatcher.consumers() == []
        assert read_to_end(peers) == b""
        wait_until(lambda: holders_of(inode, [os.getpid(), other.pid]) == [])
        if held:
            other.run("ref.close()")


def test_a_graceful_end_tells_the_consumer_too(
    runtime: shmsock.Runtime, dispatcher: shmsock.Dispatcher, client: Pair
) -> None:
    sid, peers = client
    told: list[int] = []

    def answer_and_close(ref: shmsock.SocketRef) -> None:
        ref.recv(100)
        ref.write(b"bye")
        ref.release_additional_reference()

    dispatcher.add_consumer(sid, answer_and_close, lambda ended, *_: told.append(ended))
    peers.send(b"QUIT")
    run_until(dispatcher, lambda: told)
    assert told == [sid]
    assert read_to_end(peers) == b"bye"
    assert runtime.in_use() == 0


def test_an_exception_of_a_consumer_fails_its_socket_and_the_loop_goes_on(
    runtime: shmsock.Runtime,
    dispatcher: shmsock.Dispatcher,
    client: Pair,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sid, peers = client
    ours, good_peers = connected()
    good = runtime.create_socket(ours)
    told: list[tuple[int, int, str]] = []
    heard: list[bytes] = []

    def fail(ref: shmsock.SocketRef) -> None:
        raise LookupError("on purpose")

    with good_peers, caplog.at_level(logging.ERROR, "shmsock"):
        dispatcher.add_consumer(sid, fail, lambda *what: told.append(what))
        dispatcher.add_consumer(good, lambda ref: heard.append(ref.recv(10)))
        peers.send(b"x")
        run_until(dispatcher, lambda: told)
        good_peers.send(b"alive")
        run_until(dispatcher, lambda: heard)
    assert told == [(sid, errno.EIO, "a consumer raised LookupError")]
    assert "on purpose" in caplog.text
    assert read_to_end(peers) == b""


def test_an_exception_of_on_failed_or_of_a_reader_is_logged_and_survived(
    runtime: shmsock.Runtime,
    dispatcher: shmsock.Dispatcher,
    client: Pair,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sid, _ = client
    read, write = os.pipe()

    def fail(*_: object) -> None:
        raise LookupError("on purpose")

    def fail_once() -> None:
        os.read(read, 1)
        fail()

    with caplog.at_level(logging.ERROR, "shmsock"):
        dispatcher.add_consumer(sid, lambda ref: None, fail)
        dispatcher.add_reader(read, fail_once)
        dispatcher.call_soon(fail)
        dispatcher.call_later(0, fail)
        os.write(write, b"x")
        runtime.set_failed(sid, 1, "x")
        run_until(dispatcher, lambda: len(caplog.records) == 4)
    dispatcher.remove_reader(read)
    os.close(read)
    os.close(write)


def test_a_number_reused_inside_a_batch_misleads_nobody(
    runtime: shmsock.Runtime, dispatcher: shmsock.Dispatcher
) -> None:
    """Two sockets in one batch; whoever comes first fails the other and reuses its number."""
    heard: list[tuple[str, bytes]] = []
    ids: list[int] = []
    others: list[socket.socket] = []

    def consume(ref: shmsock.SocketRef) -> None:
        heard.append(("old", ref.recv(100)))
        victim = next(sid for sid in ids if sid != ref.id)
        with runtime.address(victim) as reference:  # type: ignore[union-attr]
            number = reference.fileno()
        runtime.set_failed(victim, 1, "replaced")
        ours, peers = connected("unix")
        while ours.fileno() != number:  # until the kernel gives out the very number
            others.append(ours)
            ours = ours.dup()
        others.append(peers)
        fresh = runtime.create_socket(ours)
        dispatcher.add_consumer(fresh, lambda new: heard.append(("new", new.recv(100))))

    clients = []
    for _ in range(2):
        ours, peers = connected("unix")
        ids.append(runtime.create_socket(ours))
        dispatcher.add_consumer(ids[-1], consume)
        clients.append(peers)
        peers.send(b"for the old one")
    wait_until(lambda: select.select([dispatcher.fileno()], [], [], 0)[0])
    dispatcher.run_once(1.0)
    assert heard == [("old", b"for the old one")]
    others[-1].send(b"for the new one")
    run_until(dispatcher, lambda: len(heard) == 2)
    assert heard[1] == ("new", b"for the new one")
    for sock in clients + others:
        sock.close()


def test_a_reader_removed_inside_a_batch_is_not_called(dispatcher: shmsock.Dispatcher) -> None:
    pipes = [os.pipe() for _ in range(2)]
    called: list[int] = []

    def remove_the_other(mine: int) -> None:
        called.append(mine)
        dispatcher.remove_reader(pipes[1 - mine][0])

    for index, (read, write) in enumerate(pipes):
        dispatcher.add_reader(read, lambda index=index: remove_the_other(index))  # type: ignore[misc]
        os.write(write, b"x")
    dispatcher.run_once(1.0)
    assert len(called) == 1
    for read, write in pipes:
        dispatcher.remove_reader(read)
        os.close(read)
        os.close(write)


def test_a_consumer_may_remove_or_fail_itself_and_others(
    runtime: shmsock.Runtime, dispatcher: shmsock.Dispatcher
) -> None:
    ids: list[int] = []
    clients: list[socket.socket] = []
    calls: list[int] = []

    def end_everything(ref: shmsock.SocketRef) -> bool:
        calls.append(ref.id)
        for sid in ids:
            dispatcher.remove_consumer(sid)
            runtime.set_failed(sid, 1, "x")
        return True

    for _ in range(5):
        ours, peers = connected("unix")
        ids.append(runtime.create_socket(ours))
        dispatcher.add_consumer(ids[-1], end_everything)
        clients.append(peers)
        peers.send(b"x")
    dispatcher.run_once(1.0)
    dispatcher.run_once(0)
    assert len(calls) == 1
    assert runtime.in_use() == 0
    for peers in clients:
        peers.close()


# -- the loop ------------------------------------------------------------------------------------


def test_stop_from_another_thread_and_from_a_signal_handler(dispatcher: shmsock.Dispatcher) -> None:
    thread = threading.Thread(target=dispatcher.stop)
    dispatcher.call_soon(thread.start)
    dispatcher.run()
    thread.join()
    before = signal.signal(signal.SIGUSR1, lambda *_: dispatcher.stop())
    try:
        dispatcher.call_soon(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        dispatcher.run()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_stop_that_comes_just_before_run_is_not_lost(dispatcher: shmsock.Dispatcher) -> None:
    dispatcher.stop()
    dispatcher.run()
    called: list[int] = []
    dispatcher.call_later(0.001, lambda: called.append(1))
    run_until(dispatcher, lambda: called)  # and the next run goes on


def test_call_soon_from_a_signal_handler_wakes_the_loop(dispatcher: shmsock.Dispatcher) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: dispatcher.call_soon(dispatcher.stop))
    main = threading.get_ident()
    thread = threading.Thread(target=lambda: signal.pthread_kill(main, signal.SIGUSR1))
    try:
        dispatcher.call_soon(thread.start)
        dispatcher.run()
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def test_call_later_is_made_in_the_loops_thread_unless_cancelled(
    dispatcher: shmsock.Dispatcher,
) -> None:
    made: list[tuple[str, int]] = []

    def note(what: str) -> collections.abc.Callable[[], None]:
        return lambda: made.append((what, threading.get_ident()))

    dispatcher.call_later(0.02, note("second"))
    dispatcher.call_later(0.001, note("first"))
    dispatcher.call_later(0.005, note("never")).cancel()
    run_until(dispatcher, lambda: len(made) == 2)
    assert made == [("first", threading.get_ident()), ("second", threading.get_ident())]


def test_readers_are_level_triggered(dispatcher: shmsock.Dispatcher) -> None:
    read, write = os.pipe()
    calls: list[int] = []
    dispatcher.add_reader(read, lambda: calls.append(1))
    os.write(write, b"x")
    run_until(dispatcher, lambda: len(calls) >= 3)
    dispatcher.remove_reader(read)
    os.close(read)
    os.close(write)


def test_the_service_threads_work_is_done_inside_run_and_by_a_thread_after_it(
    runtime: shmsock.Runtime, dispatcher: shmsock.Dispatcher
) -> None:
    threads: list[set[str]] = []
    runners: list[int] = []

    def look() -> None:
        threads.append({thread.name for thread in threading.enumerate()})
        runtime._service.call_soon(lambda: runners.append(threading.get_ident()))

    dispatcher.call_soon(look)
    run_until(dispatcher, lambda: runners)
    assert f"shmsock-{runtime.name}" not in threads[0]
    assert runners == [threading.get_ident()]
    runtime._service.call_soon(lambda: runners.append(threading.get_ident()))
    wait_until(lambda: len(runners) == 2)
    assert runners[1] != threading.get_ident()


def test_unfinished_writes_go_on_inside_run(
    runtime: shmsock.Runtime, dispatcher: shmsock.Dispatcher
) -> None:
    ours, peers = connected("tcp", 8192)
    sid = runtime.create_socket(ours)
    message = os.urandom(1 << 20)
    received: list[bytes] = []
    with peers:
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            dispatcher.call_soon(lambda: reference.write(message))
            run_until(dispatcher, lambda: reference.unwritten_bytes() > 0)
            reference.release_additional_reference()
        thread = threading.Thread(target=lambda: received.append(read_to_end(peers)))
        thread.start()
        run_until(dispatcher, lambda: received)
        thread.join()
    assert received == [message]


def test_there_is_one_dispatcher_a_runtime(
    runtime: shmsock.Runtime, dispatcher: shmsock.Dispatcher
) -> None:
    with pytest.raises(ValueError, match="one a process"):
        shmsock.Dispatcher(runtime)
    dispatcher.close()
    another = shmsock.Dispatcher(runtime)
    another.close()


def test_closing_the_runtime_closes_its_dispatcher(name: str) -> None:
    with shmsock.Runtime.create(name, slots=16, stripes=2) as runtime:
        dispatcher = shmsock.Dispatcher(runtime)
        ours, peers = connected()
        dispatcher.add_consumer(runtime.create_socket(ours), lambda ref: None)
        dispatcher.call_soon(runtime.close)
        dispatcher.run()
    with peers:
        assert read_to_end(peers) == b""
    with pytest.raises(ValueError, match="closed"):
        dispatcher.fileno()


# -- nested --------------------------------------------------------------------------------------


def test_it_nests_in_a_select_loop(
    runtime: shmsock.Runtime, dispatcher: shmsock.Dispatcher, client: Pair
) -> None:
    sid, peers = client
    events: list[tuple[str, int]] = []

    def note(what: str) -> None:
        events.append((what, threading.get_ident()))

    def consume(ref: shmsock.SocketRef) -> bool:
        note(ref.recv(1).decode())
        return select.select([ref.fileno()], [], [], 0)[0] != []

    dispatcher.add_consumer(sid, consume, lambda *_: note("failed"))
    dispatcher.call_later(0.001, lambda: note("later"))
    dispatcher.call_soon(lambda: note("soon"))
    peers.send(b"abc")

    def dispatch_until(count: int) -> None:
        deadline = time.monotonic() + WATCHDOG_S
        while len(events) < count:
            assert select.select([dispatcher.fileno()], [], [], WATCHDOG_S)[0]
            assert time.monotonic() < deadline
            dispatcher.run_once(0)

    dispatch_until(5)
    assert sorted(what for what, _ in events) == ["a", "b", "c", "later", "soon"]
    with Peer(runtime.name) as other:
        other.run(f"rt.set_failed({sid}, 1, 'x')")
    dispatch_until(6)
    assert events[-1][0] == "failed"
    assert {thread for _, thread in events} == {threading.get_ident()}
    assert select.select([dispatcher.fileno()], [], [], 0)[0] == [], "nothing left to do"


def test_it_nests_in_asyncio(
    runtime: shmsock.Runtime, dispatcher: shmsock.Dispatcher, client: Pair
) -> None:
    sid, peers = client

    async def serve() -> bytes:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[bytes] = loop.create_future()

        def consume(ref: shmsock.SocketRef) -> None:
            data = ref.recv(100)
            ref.write(data.upper())
            dispatcher.call_later(0, lambda: answered.set_result(data))

        dispatcher.add_consumer(sid, consume)
        loop.add_reader(dispatcher.fileno(), dispatcher.run_once, 0)
        try:
            await loop.run_in_executor(None, peers.send, b"hello")
            return await asyncio.wait_for(answered, WATCHDOG_S)
        finally:
            loop.remove_reader(dispatcher.fileno())

    assert asyncio.run(serve()) == b"hello"
    assert peers.recv(10) == b"HELLO"


# -- hand-over from the host ----------------------------------------------------------------------

WORKER = """
    import threading, errno
    from tests.helpers import out_of_descriptors
    dispatcher = shmsock.Dispatcher(rt)
    arrived = []
    def echo(ref):
        data = ref.recv(100)
        if data: ref.write(data.upper())
        else: ref.release_additional_reference()
    def take(ids):
        for sid in ids:
            if dispatcher.add_consumer(sid, echo): arrived.append(sid)
    dispatcher.on_arrival(take)
    thread = threading.Thread(target=dispatcher.run)
    thread.start()
"""
END = "dispatcher.stop(); thread.join()"


def test_accepted_sockets_are_passed_to_a_worker(runtime: shmsock.Runtime) -> None:
    joined: list[int] = []
    runtime.on_join(joined.append)
    with Peer(runtime.name, role="worker") as worker:
        index = worker.ask("rt.index")
        worker.run(WORKER)
        wait_until(lambda: joined == [index])
        pairs = [connected() for _ in range(5)]
        ids = [runtime.create_socket(ours, owner=index) for ours, _ in pairs]
        assert list(runtime.sockets()["owner"]) == [index] * 5
        assert runtime.pass_to(index, ids) == ids
        for _, peers in pairs:
            peers.send(b"hello")
            assert peers.recv(100) == b"HELLO"
        assert sorted(worker.ask("arrived")) == sorted(ids)
        for _, peers in pairs:
            peers.shutdown(socket.SHUT_WR)
            assert read_to_end(peers) == b""
            peers.close()
        wait_until(lambda: runtime.in_use() == 0)
        worker.run(END)


def test_what_cannot_be_passed_is_failed(runtime: shmsock.Runtime) -> None:
    with Peer(runtime.name, role="worker") as worker:
        index = worker.ask("rt.index")
        ours, peers = connected()
        sid = runtime.create_socket(ours, owner=index)
        assert runtime.pass_to(index, [sid]) == [], "it has no channel yet"
        assert runtime.status(sid) is shmsock.Status.GONE
        with peers:
            assert read_to_end(peers) == b""
    wait_until(lambda: len(runtime.processes()) == 1)
    with socket.socket() as mine, pytest.raises(ValueError, match="not alive"):
        runtime.create_socket(mine, owner=index)


def test_what_was_passed_to_a_worker_that_dies_fails_with_eownerdead(
    runtime: shmsock.Runtime,
) -> None:
    joined: list[int] = []
    runtime.on_join(joined.append)
    with Peer(runtime.name, role="worker") as worker:
        worker.run(WORKER)
        wait_until(lambda: joined)
        os.kill(worker.pid, signal.SIGSTOP)  # it is there, but reads nothing
        ours, peers = connected()
        sid = runtime.create_socket(ours, owner=joined[0])
        reference = runtime.address(sid)
        assert reference is not None
        assert runtime.pass_to(joined[0], [sid]) == [sid]
        worker.kill()
        with peers, reference:
            assert read_to_end(peers) == b""
            assert reference.error[0] == errno.EOWNERDEAD
    wait_until(lambda: runtime.in_use() == 0)
    assert runtime.audit() == []


def test_a_worker_out_of_descriptors_refuses_and_the_client_is_told(
    runtime: shmsock.Runtime,
) -> None:
    joined: list[int] = []
    runtime.on_join(joined.append)
    with Peer(runtime.name, role="worker") as worker:
        worker.run(WORKER)
        wait_until(lambda: joined)
        worker.run("full = out_of_descriptors(); full.__enter__()")
        pairs = [connected() for _ in range(3)]
        ids = [runtime.create_socket(ours, owner=joined[0]) for ours, _ in pairs]
        runtime.pass_to(joined[0], ids)
        for _, peers in pairs:
            assert read_to_end(peers) == b""
            peers.close()
        assert {runtime._io.error_of(sid)[0] for sid in ids} == {errno.EMFILE}
        worker.run("full.__exit__(None, None, None)")
        ours, peers = connected()
        sid = runtime.create_socket(ours, owner=joined[0])
        runtime.pass_to(joined[0], [sid])
        with peers:
            peers.send(b"again")
            assert peers.recv(100) == b"AGAIN"
        worker.run(END)
