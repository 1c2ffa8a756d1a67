"""References that end at strange moments, exceptions out of signal handlers, threads."""

from __future__ import annotations

import fcntl
import gc
import signal
import socket
import sys
import threading
import typing
import weakref

import pytest

import shmsock
from shmsock.layout import SLOT_MASK

from .helpers import WATCHDOG_S, Member, connected, wait_until


class Knot:
    """A cycle that holds a reference: only the garbage collector ends it."""

    def __init__(self, reference: object) -> None:
        self.reference, self.myself = reference, self


def knots(table: Member, sid: int, count: int) -> None:
    for _ in range(count):
        Knot(table.engine.address(sid))


def is_given_back(table: Member, sid: int) -> bool:
    table.engine.drain()
    return bool(table.engine.count(sid & SLOT_MASK) == 0)


@pytest.mark.parametrize("same_stripe", [True, False])
def test_cycles_collected_inside_a_stripe_are_given_back_after_it(
    table: Member, same_stripe: bool
) -> None:
    sids = [table.new() for _ in range(8)]
    block = table.layout.block
    sid = sids[0]
    other = next(s for s in sids if ((s ^ sid) & SLOT_MASK) >= block)
    stripe = (sid & SLOT_MASK) // block
    gc.disable()
    try:
        knots(table, sid if same_stripe else other, 5)

        def collect(_: int, __: object) -> int:
            assert gc.collect() >= 5
            assert table.engine.lock.locked()
            return 1

        assert table.engine.run(stripe, collect, -1) == 1
    finally:
        gc.enable()
    assert wait_until(lambda: is_given_back(table, sid) and is_given_back(table, other))
    assert table.nref(sid) == table.nref(other) == 1
    assert table.recovery.audit() == []


def test_collections_at_every_allocation_lose_and_double_nothing(table: Member) -> None:
    """With a threshold of 1 the collector runs inside transitions, the local lock and drain."""
    sid = table.new()
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(300):
            knots(table, sid, 1)
            with table.engine.address(sid) as reference:
                assert not reference.failed
            new = table.new()
            knots(table, new, 1)
            assert table.engine.set_failed(new, 1, "")
    finally:
        gc.set_threshold(*before)
    gc.collect()
    wait_until(lambda: is_given_back(table, sid))
    assert table.nref(sid) == 1
    assert table.recovery.audit() == []
    assert sum(table.cells.state) == 1


def test_a_reference_dropped_in_a_signal_handler_inside_a_stripe_is_given_back(
    table: Member,
) -> None:
    sid = table.new()
    stripe = (sid & SLOT_MASK) // table.layout.block
    held: list[object] = []

    before = signal.signal(signal.SIGUSR1, lambda *_: held.pop())
    try:
        for _ in range(20):
            held.append(table.engine.address(sid))

            def interrupted(_: int, __: object) -> int:
                signal.raise_signal(signal.SIGUSR1)
                return 1

            assert table.engine.run(stripe, interrupted, -1) == 1
            assert held == []
            wait_until(lambda: is_given_back(table, sid))
            assert table.nref(sid) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert table.recovery.audit() == []


def test_weakref_callbacks_may_use_the_table(runtime: shmsock.Runtime) -> None:
    """A callback runs wherever the last reference goes; it may address, fail and create."""
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)
    made: list[int] = []

    def gone(_: object) -> None:
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(b".")
        mine, theirs = socket.socketpair()
        made.append(runtime.create_socket(mine))
        runtime.set_failed(made[-1])
        theirs.close()

    for _ in range(20):
        reference = runtime.address(sid)
        watcher = weakref.ref(reference, gone)
        del reference
        gc.collect()
        assert watcher() is None
    with peers:
        assert peers.recv(100) == b"." * 20
        assert len(set(made)) == 20
        assert runtime.audit() == []
        assert runtime.attached(sid) == []
        runtime.set_failed(sid)


# -- exceptions out of signal handlers ------------------------------------------------------------


class Reload(BaseException):
    """What a user's signal handler raises, as KeyboardInterrupt; an Exception would be logged."""


def test_exceptions_of_signal_handlers_leave_run_and_lose_no_event(
    runtime: shmsock.Runtime,
) -> None:
    """Edge-triggered events that were taken from the kernel would never come again."""
    dispatcher = shmsock.Dispatcher(runtime)
    clients: dict[int, socket.socket] = {}
    received: dict[int, bytearray] = {}
    total, interruptions = 50_000, 0

    def consume(reference: shmsock.SocketRef) -> None:
        # Between recv and += the handler would take what was received: that is the user's to mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        try:
            read(reference)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])

    def read(reference: shmsock.SocketRef) -> None:
        while True:
            try:
                data = reference.recv(100)
            except BlockingIOError:
                return
            received[reference.id] += data

    def all_read() -> bool:
        """What recv returned may be lost to the exception; what was not asked for may not."""
        if sender.is_alive():
            return False
        numbers = [runtime._descriptors.get(sid).fd for sid in clients]
        waiting = [fcntl.ioctl(number, 0x541B, bytes(4)) for number in numbers]  # FIONREAD
        return not any(map(any, waiting))

    for _ in range(4):
        ours, peers = connected("unix")
        sid = runtime.create_socket(ours)
        clients[sid], received[sid] = peers, bytearray()
        dispatcher.add_consumer(sid, consume)

    def send() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # or it is taken here, for main
        for number in range(0, total, 10):
            for peers in clients.values():
                peers.sendall(bytes((number + i) & 0xFF for i in range(10)))

    def interrupt(*_: object) -> None:
        raise Reload

    before = signal.signal(signal.SIGALRM, interrupt)
    sender = threading.Thread(target=send)
    sender.start()
    finished = False
    try:
        while not finished and interruptions < 500:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.002 * (1 + interruptions / 10))
                dispatcher.run()
            except Reload:
                interruptions += 1
                finished = all_read()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sender.join(WATCHDOG_S)
    assert finished, {sid: len(got) for sid, got in received.items()}
    assert interruptions > 2
    assert all(runtime.status(sid) is shmsock.Status.LIVE for sid in clients)
    assert runtime.audit() == []
    dispatcher.close()
    for sid, peers in clients.items():
        runtime.set_failed(sid)
        peers.close()


# -- threads --------------------------------------------------------------------------------------


def test_threads_that_address_and_close_one_slot_never_lose_count(table: Member) -> None:
    """The count goes 0, 1, 0, ... under eight threads that switch as often as Python lets them."""
    sid = table.new()
    failures: list[BaseException] = []
    interval = sys.getswitchinterval()

    def work(seed: int) -> None:
        try:
            for turn in range(2000):
                reference: typing.Any = table.engine.address(sid)
                assert not reference.failed
                if (turn + seed) % 3 == 0:
                    more = reference.add_reference()
                    reference.close()
                    reference = more
                if (turn + seed) % 4 == 0:
                    del reference  # by its finaliser
                else:
                    reference.close()
                    reference.close()
        except BaseException as error:
            failures.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WATCHDOG_S)
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    wait_until(lambda: is_given_back(table, sid))
    assert table.nref(sid) == 1
    assert table.cells.held[(sid & SLOT_MASK) * table.layout.processes + table.index] == 0
    assert table.recovery.audit() == []
    assert table.engine.set_failed(sid, 1, "")
    assert not any(table.cells.state)
