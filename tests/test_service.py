"""The service loop: timers, wake-ups, exceptions, and who runs it."""

from __future__ import annotations

import collections.abc
import logging
import os
import select
import signal
import threading

import pytest

from shmsock.service import Service

from .helpers import wait_until


@pytest.fixture
def service() -> collections.abc.Iterator[Service]:
    made = Service("test")
    yield made
    made.close()


def test_timers_fire_in_the_order_of_their_time_and_then_of_their_making(service: Service) -> None:
    fired: list[str] = []
    service.call_later(0.02, lambda: fired.append("third"))
    service.call_later(0.0, lambda: fired.append("first"))
    service.call_later(0.0, lambda: fired.append("second"))
    service.call_later(0.03, lambda: fired.append("last"))
    service.ensure()
    wait_until(lambda: len(fired) == 4)
    assert fired == ["first", "second", "third", "last"]


def test_a_cancelled_timer_does_not_fire(service: Service) -> None:
    fired: list[str] = []
    timer = service.call_later(0.005, lambda: fired.append("cancelled"))
    service.call_later(0.01, lambda: fired.append("kept"))
    timer.cancel()
    service.ensure()
    wait_until(lambda: fired)
    assert fired == ["kept"]


def test_a_timer_made_by_another_thread_shortens_a_wait_in_progress(service: Service) -> None:
    fired = threading.Event()
    service.call_later(3600.0, lambda: None)
    service.ensure()
    service.call_later(0.0, fired.set)
    assert fired.wait(30)


def test_calls_from_many_threads_are_all_made_once_in_each_threads_order(service: Service) -> None:
    made: list[tuple[int, int]] = []
    service.ensure()

    def call(caller: int) -> None:
        for number in range(500):
            service.call_soon(lambda number=number: made.append((caller, number)))  # type: ignore[misc]

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: len(made) == 2000)
    for caller in range(4):
        assert [n for who, n in made if who == caller] == list(range(500))


def test_a_call_may_come_from_a_signal_handler(service: Service) -> None:
    called = threading.Event()
    service.ensure()
    before = signal.signal(signal.SIGUSR1, lambda *_: service.call_soon(called.set))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert called.wait(30)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_exceptions_are_logged_and_survived(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    read, write = os.pipe()
    later = threading.Event()

    def fail(*_: int) -> None:
        raise RuntimeError("on purpose")

    def fail_once(_: int) -> None:
        os.read(read, 1)
        fail()

    with caplog.at_level(logging.ERROR, "shmsock"):
        service.watch(read, select.EPOLLIN, fail_once)
        service.ensure()
        os.write(write, b"x")
        service.call_soon(fail)
        service.call_later(0.0, fail)
        wait_until(lambda: len(caplog.records) == 3)
        service.call_soon(later.set)
        assert later.wait(30)
    assert all(record.exc_info for record in caplog.records)
    service.unwatch(read)
    os.close(read)
    os.close(write)


def test_a_handler_may_close_and_reuse_a_number_whose_event_is_in_the_same_batch(
    service: Service,
) -> None:
    pipes = [os.pipe() for _ in range(2)]
    heard: list[int] = []
    fresh: list[int] = []

    def replace_the_other(mine: int) -> None:
        os.read(pipes[mine][0], 1)
        heard.append(mine)
        other = pipes[1 - mine][0]
        service.unwatch(other)
        os.close(other)
        number, end = os.pipe()
        assert number == other
        fresh.append(end)
        service.watch(number, select.EPOLLIN, lambda _: heard.append(99))

    def handle(index: int) -> None:
        if not heard:
            replace_the_other(index)

    for index in range(2):
        service.watch(pipes[index][0], select.EPOLLIN, lambda _, index=index: handle(index))  # type: ignore[misc]
        os.write(pipes[index][1], b"x")
    service.run_once(1.0)
    assert 99 not in heard, "the new owner of the number was told of the old one's event"
    for fd in [fd for pipe in pipes for fd in pipe] + fresh:
        service.unwatch(fd)
        os.close(fd)


def test_who_adopts_the_loop_runs_it_and_gives_it_back(service: Service) -> None:
    runners: list[int] = []
    service.ensure()
    service.call_soon(lambda: runners.append(threading.get_ident()))
    wait_until(lambda: runners)
    service.adopt()
    service.ensure()
    assert not any(thread.name == "shmsock-test" for thread in threading.enumerate())
    assert service.is_current_thread()
    service.call_soon(lambda: runners.append(threading.get_ident()))
    service.run_once(1.0)
    assert runners[1] == threading.get_ident() != runners[0]
    service.release()
    assert not service.is_current_thread()
    service.call_soon(lambda: runners.append(threading.get_ident()))
    wait_until(lambda: len(runners) == 3)
    assert runners[2] != threading.get_ident()


def test_two_threads_may_watch_and_unwatch_the_same_number(service: Service) -> None:
    read, write = os.pipe()
    failures: list[BaseException] = []

    def flap() -> None:
        try:
            for _ in range(2000):
                service.watch(read, select.EPOLLIN, lambda _: None)
                service.unwatch(read)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=flap) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    service.unwatch(read)
    os.close(read)
    os.close(write)


def test_closing_twice_and_using_a_closed_loop_does_nothing_bad() -> None:
    service = Service("closed")
    service.ensure()
    service.close()
    service.close()
    service.call_soon(lambda: None)
    service.wake()
    service.ensure()
    assert not any(thread.name == "shmsock-closed" for thread in threading.enumerate())
