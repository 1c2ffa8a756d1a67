"""abort_when_failed: out of what it interrupts, and at no moment after its block."""

from __future__ import annotations

import collections.abc
import errno
import os
import pickle
import queue
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import typing

import numpy as np
import pytest

import shmsock
from shmsock import abort
from shmsock.pool import abort_when_failed

from .helpers import WATCHDOG_S, Forked, connected, wait_until


@pytest.fixture
def client(runtime: shmsock.Runtime) -> collections.abc.Iterator[int]:
    """A connected client's id."""
    ours, peers = connected("unix")
    with peers:
        yield runtime.create_socket(ours)


@pytest.fixture(autouse=True)
def nothing_is_left(runtime: shmsock.Runtime) -> collections.abc.Iterator[None]:
    """No thread, no handler, no mask, no reference."""
    handler = signal.getsignal(abort.ABORT_SIGNAL)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    threads = set(threading.enumerate())
    yield
    assert signal.getsignal(abort.ABORT_SIGNAL) == handler
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert abort._local.thread.blocks == []
    wait_until(lambda: set(threading.enumerate()) <= threads, "the watcher ends by itself")
    assert abort._watcher is None
    wait_until(lambda: not any(runtime.attached_many(runtime.sockets()["id"])))


def fail_when(
    runtime: shmsock.Runtime, sid: int, condition: collections.abc.Callable[[], object]
) -> threading.Thread:
    """Fail the socket from another thread as soon as the condition holds."""

    def run() -> None:
        wait_until(condition)
        runtime.set_failed(sid, errno.ECONNRESET, "closed the tab")

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def is_waiting() -> bool:
    """Whether the main thread sleeps in the kernel."""
    with open(f"/proc/self/task/{os.getpid()}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


def read_a_pipe() -> None:
    read, write = os.pipe()
    try:
        os.read(read, 1)
    finally:
        os.close(read)
        os.close(write)


def run_a_program() -> None:
    with subprocess.Popen(["sleep", "600"]) as program:
        try:
            program.wait()
        finally:
            program.kill()


def take_a_lock() -> None:
    lock = threading.Lock()
    with lock:
        lock.acquire()


BLOCKING: dict[str, collections.abc.Callable[[], object]] = {
    "sleep": lambda: time.sleep(600),
    "read": read_a_pipe,
    "poll": lambda: select.poll().poll(),
    "lock": take_a_lock,
    "queue": lambda: queue.Queue().get(),
    "event": lambda: threading.Event().wait(),
    "program": run_a_program,
}


@pytest.mark.parametrize("what", BLOCKING)
def test_the_main_thread_is_taken_out_of_a_blocking_call(
    runtime: shmsock.Runtime, client: int, what: str
) -> None:
    failer = fail_when(runtime, client, is_waiting)
    with pytest.raises(shmsock.SocketFailedError) as caught, abort_when_failed(client):
        BLOCKING[what]()
    failer.join()
    assert (caught.value.code, caught.value.text) == (errno.ECONNRESET, "closed the tab")
    assert type(caught.value) is shmsock.SocketFailedError


def test_the_main_thread_is_taken_out_between_two_numpy_calls(
    runtime: shmsock.Runtime, client: int
) -> None:
    rounds: list[bool] = []
    a = np.ones((50, 50))
    failer = fail_when(runtime, client, lambda: len(rounds) > 10)

    def compute(reference: shmsock.SocketRef) -> None:
        nonlocal a
        while True:
            a = a @ a / 50
            rounds.append(reference.failed)

    with pytest.raises(shmsock.SocketFailedError), abort_when_failed(client) as reference:
        compute(reference)
    failer.join()
    assert len(rounds) > 10


def test_the_main_thread_is_taken_out_of_waiting_for_another_slow_client(
    runtime: shmsock.Runtime, client: int
) -> None:
    ours, peers = connected("unix", 10_000)
    slow = runtime.create_socket(ours)
    with peers:
        with runtime.address(slow) as reference:  # type: ignore[union-attr]
            reference.write(b"x" * 1_000_000)
            failer = fail_when(runtime, client, is_waiting)
            with pytest.raises(shmsock.SocketFailedError) as caught, abort_when_failed(client):
                reference.flush()
            failer.join()
            assert caught.value.text == "closed the tab"
            assert not reference.failed
        runtime.set_failed(slow)


def test_a_reset_connection_ends_the_block_when_its_owner_has_failed_it(
    runtime: shmsock.Runtime,
) -> None:
    ours, peers = connected("tcp")
    sid = runtime.create_socket(ours)
    looks: list[int] = []

    def owner() -> bool:
        looks.append(1)
        return len(looks) > 20

    def reset() -> None:
        linger = b"\1\0\0\0\0\0\0\0"
        peers.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        peers.close()
        failers.append(fail_when(runtime, sid, owner))
        time.sleep(600)

    failers: list[threading.Thread] = []
    with pytest.raises(shmsock.SocketFailedError), abort_when_failed(sid):
        reset()
    failers[0].join()


def test_other_threads_are_taken_out_at_their_next_bytecode(
    runtime: shmsock.Runtime, client: int
) -> None:
    inside = threading.Event()
    caught: list[BaseException] = []

    def work() -> None:
        try:
            with abort_when_failed(client):
                inside.set()
                while True:
                    pass
        except BaseException as error:
            caught.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    inside.wait(WATCHDOG_S)
    wait_until(lambda: abort._watcher is not None and len(abort._watcher.pairs) == 3)
    runtime.set_failed(client, errno.ECONNRESET, "closed the tab")
    for thread in threads:
        thread.join()
    for error in caught:
        assert isinstance(error, shmsock.SocketFailedError)
        assert (error.code, error.text) == (errno.ECONNRESET, "closed the tab")
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is shmsock.SocketFailedError
        assert copy.args == (errno.ECONNRESET, "closed the tab")
    assert len(caught) == 3


def test_a_socket_that_failed_before_raises_on_entry(runtime: shmsock.Runtime, client: int) -> None:
    entered = []
    with runtime.address(client):  # type: ignore[union-attr]
        runtime.set_failed(client, errno.ECONNRESET, "closed the tab")
        with pytest.raises(shmsock.SocketFailedError) as caught, abort_when_failed(client):
            entered.append(1)
        assert caught.value.code == errno.ECONNRESET
    with pytest.raises(shmsock.SocketFailedError), abort_when_failed(client):
        entered.append(1)
    for made_up in (0, 12345 << 32, (1 << 64) - 1):
        with pytest.raises(shmsock.SocketFailedError), abort_when_failed(made_up):
            entered.append(1)
    assert entered == []


def test_the_jobs_own_exception_is_not_replaced(runtime: shmsock.Runtime, client: int) -> None:
    with pytest.raises(ZeroDivisionError), abort_when_failed(client):
        1 / 0  # noqa: B018


def test_it_is_raised_once_and_a_block_that_catches_it_goes_on(
    runtime: shmsock.Runtime, client: int
) -> None:
    ours, peers = connected("unix")
    second = runtime.create_socket(ours)
    with peers, abort_when_failed(client):
        for sid in (client, second):  # the second shows that the watcher was there all the time
            failer = fail_when(runtime, sid, is_waiting)
            with pytest.raises(shmsock.SocketFailedError), abort_when_failed(second):
                time.sleep(600)
            failer.join()


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("which", ["outer", "inner"])
def test_blocks_nest(runtime: shmsock.Runtime, which: str, in_thread: bool) -> None:
    pairs = [connected("unix") for _ in range(2)]
    outer, inner = (runtime.create_socket(ours) for ours, _ in pairs)
    failed = outer if which == "outer" else inner
    seen: list[str] = []

    def work() -> None:
        try:
            with abort_when_failed(outer):
                try:
                    with abort_when_failed(inner):
                        runtime.set_failed(failed, errno.ECONNRESET, which)
                        while True:
                            time.sleep(0.001)
                except shmsock.SocketFailedError as error:
                    seen.append(f"inner block: {error.text}")
                    if which == "outer":
                        raise
        except shmsock.SocketFailedError as error:
            seen.append(f"outer block: {error.text}")

    if in_thread:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(WATCHDOG_S)
    else:
        work()
    if which == "outer":
        assert seen == ["inner block: outer", "outer block: outer"]
    else:
        assert seen == ["inner block: inner"]
    for sid, (_, theirs) in zip((outer, inner), pairs, strict=True):
        runtime.set_failed(sid)
        theirs.close()


def after_the_block() -> int:
    """Something long enough that a late abort would hit it."""
    return sum(n & 1 for n in range(300))


def race(runtime: shmsock.Runtime, rounds: int, *, own_error: bool) -> dict[str, int]:
    """Fail sockets at all moments around the ends of blocks; what came out of each."""
    counts = {"aborted": 0, "finished": 0, "own error": 0}
    go: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()

    def fail() -> None:
        while (order := go.get()) is not None:
            sid, delay = order
            for _ in range(delay):
                pass
            runtime.set_failed(sid, errno.ECONNRESET, "closed the tab")

    failer = threading.Thread(target=fail)
    failer.start()
    try:
        for n in range(rounds):
            ours, theirs = connected("unix")
            sid = runtime.create_socket(ours)
            step = ""
            try:
                with abort_when_failed(sid):
                    step = "inside"
                    go.put((sid, n * 37 % 3000))
                    for _ in range(n * 61 % 50_000):
                        pass
                    step = "done"
                    if own_error:
                        raise KeyError(n)
                outcome = "finished"
            except shmsock.SocketFailedError:
                outcome = "aborted"
            except KeyError:
                outcome = "own error"
            counts[outcome] += 1
            theirs.close()
            assert after_the_block() == 150
            assert step or outcome == "aborted"
    finally:
        go.put(None)
        failer.join()
    return counts


@pytest.fixture
def quick_switches() -> collections.abc.Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("own_error", [False, True])
def test_nothing_is_raised_after_the_block_at_whatever_moment_the_client_goes(
    runtime: shmsock.Runtime, in_thread: bool, own_error: bool
) -> None:
    results: list[typing.Any] = []

    def work() -> None:
        try:
            results.append(race(runtime, 1_000, own_error=own_error))
        except BaseException as error:
            results.append(error)

    if in_thread:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    (counts,) = results
    assert isinstance(counts, dict), repr(counts)
    # Both must have happened, or the moments were not around the end.
    assert counts["aborted"] > 20
    assert counts["own error" if own_error else "finished"] > 20
    wait_until(lambda: runtime.in_use() == 0)


def nested_race(runtime: shmsock.Runtime, seed: int, rounds: int) -> dict[str, int]:
    """Two blocks in each other, clients that go at any moment of either; what came out."""
    choose = random.Random(seed)
    counts = {"inner": 0, "outer": 0, "finished": 0}
    for _ in range(rounds):
        pairs = [connected("unix") for _ in range(2)]
        outer, inner = (runtime.create_socket(ours) for ours, _ in pairs)
        plan = choose.choice([[outer], [inner], [outer, inner], [inner, outer], []])
        delays = [choose.randrange(most) for most in (3000, 2000, 5000, 1000)]

        def fail(plan: list[int] = plan, delay: int = delays[0]) -> None:
            spin(delay)
            for sid in plan:
                runtime.set_failed(sid, errno.ECONNRESET, "closed the tab")

        failer = threading.Thread(target=fail)
        failer.start()
        step = "before"
        try:
            with abort_when_failed(outer):
                step = "in"
                spin(delays[1])
                try:
                    with abort_when_failed(inner):
                        spin(delays[2])
                except shmsock.SocketFailedError:
                    counts["inner"] += 1
                spin(delays[3])
            step = "after"
            counts["finished"] += 1
        except shmsock.SocketFailedError:
            assert step != "after"
            counts["outer"] += 1
        assert after_the_block() == 150
        failer.join()
        for sid, (_, theirs) in zip((outer, inner), pairs, strict=True):
            theirs.close()
            runtime.set_failed(sid)
    return counts


def spin(count: int) -> None:
    for _ in range(count):
        pass


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("rounds", [150, pytest.param(2_000, marks=pytest.mark.slow)])
def test_blocks_of_several_threads_and_in_each_other_end_well_at_whatever_moment(
    runtime: shmsock.Runtime, rounds: int
) -> None:
    results: list[typing.Any] = []

    def work(seed: int) -> None:
        try:
            results.append(nested_race(runtime, seed, rounds))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    work(3)
    for thread in threads:
        thread.join()
    assert all(isinstance(counts, dict) for counts in results), results
    assert all(sum(counts[key] for counts in results) > 20 for key in results[0]), results
    wait_until(lambda: runtime.in_use() == 0, "no block keeps a reference")
    assert runtime.audit() == []


def test_the_handler_that_was_there_is_called_for_foreign_signals_and_restored(
    runtime: shmsock.Runtime, client: int
) -> None:
    heard: list[int] = []
    before = signal.signal(abort.ABORT_SIGNAL, lambda number, _: heard.append(number))
    try:
        with abort_when_failed(client):
            os.kill(os.getpid(), abort.ABORT_SIGNAL)
            wait_until(lambda: heard)
        os.kill(os.getpid(), abort.ABORT_SIGNAL)
        wait_until(lambda: len(heard) == 2)
    finally:
        signal.signal(abort.ABORT_SIGNAL, before)


def test_a_blocked_signal_is_let_through_for_the_block_and_blocked_again(
    runtime: shmsock.Runtime, client: int
) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {abort.ABORT_SIGNAL})
    try:
        failer = fail_when(runtime, client, is_waiting)
        with pytest.raises(shmsock.SocketFailedError), abort_when_failed(client):
            time.sleep(600)
        failer.join()
        assert abort.ABORT_SIGNAL in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {abort.ABORT_SIGNAL})


def test_a_block_that_was_open_at_a_fork_is_not_the_childs(
    runtime: shmsock.Runtime, client: int
) -> None:
    def look() -> list[object]:
        return [
            signal.getsignal(abort.ABORT_SIGNAL) == signal.SIG_DFL,
            abort._local.thread.blocks == [],
            inner(),
        ]

    def inner() -> bool:
        with abort_when_failed(client, runtime) as reference:
            return not reference.failed

    with abort_when_failed(client):
        assert Forked(look).result() == [True, True, True]
    wait_until(lambda: len(runtime.processes()) == 1)
