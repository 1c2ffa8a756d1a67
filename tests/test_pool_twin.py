"""``shmsock.pool.Pool``: what ``multiprocessing.Pool`` does, and what it does not survive."""

from __future__ import annotations

import collections.abc
import concurrent.futures
import errno
import itertools
import multiprocessing
import os
import signal
import typing

import pytest

import shmsock
from shmsock.pool import Pool, ProcessPoolExecutor

from .helpers import WATCHDOG_S, connected, wait_until
from .test_pool import METHODS, alone, answer, apologise, fork, no_forkserver, sleep, started

__all__ = ["no_forkserver"]


@pytest.fixture
def pool(runtime: shmsock.Runtime) -> collections.abc.Iterator[Pool]:
    with Pool(runtime.name, 2, context=fork(), fallback=apologise) as made:
        yield made


def square(n: int) -> int:
    return n * n


def add(a: int, b: int) -> int:
    return a + b


def kill_at(n: int) -> int:
    if n == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def remember(text: str) -> None:
    os.environ["SHMSOCK_TEST_SAID"] = text


def remembered(_: object = None) -> tuple[str, int]:
    return os.environ["SHMSOCK_TEST_SAID"], os.getpid()


def refuse() -> None:
    raise ValueError("no licence for this machine")


@pytest.mark.parametrize("method", METHODS)
def test_it_computes_what_the_original_computes(runtime: shmsock.Runtime, method: str) -> None:
    context = multiprocessing.get_context(method)
    with Pool(runtime.name, 2, context=context) as pool:
        assert pool.apply(add, (1,), {"b": 2}) == 3
        assert pool.map(square, range(100)) == [n * n for n in range(100)]
        assert pool.map(square, []) == []
        assert pool.starmap(add, zip(range(9), range(9), strict=True)) == list(range(0, 18, 2))
        assert list(itertools.islice(pool.imap(square, itertools.count()), 50)) == [
            n * n for n in range(50)
        ]
        assert sorted(pool.imap_unordered(square, range(50))) == [n * n for n in range(50)]
        heard: list[typing.Any] = []
        errors: list[BaseException] = []
        done = pool.apply_async(add, (1, 2), callback=heard.append)
        failed = pool.apply_async(add, (1, "2"), error_callback=errors.append)
        assert done.get(WATCHDOG_S) == 3
        with pytest.raises(TypeError):
            failed.get(WATCHDOG_S)
        assert done.successful()
        assert not failed.successful()
        wait_until(lambda: heard and errors)  # of two children: in either order
        assert heard == [3]
        assert [type(error) for error in errors] == [TypeError]
        pool.close()
        pool.join()
    wait_until(lambda: alone(runtime))


def test_a_killed_child_fails_its_own_jobs_and_the_pool_goes_on(
    runtime: shmsock.Runtime, pool: Pool, tmp_path: typing.Any
) -> None:
    with pytest.raises(shmsock.PoolProcessDiedError):
        pool.map(kill_at, range(20))
    outcomes = []
    results = pool.imap(kill_at, range(10))
    for _ in range(10):
        try:
            outcomes.append(results.next(WATCHDOG_S))
        except shmsock.PoolProcessDiedError:
            outcomes.append(-1)
    assert outcomes == [0, 1, 2, 3, 4, -1, 6, 7, 8, 9]
    with pytest.raises(StopIteration):
        results.next()
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    path = str(tmp_path / "running")
    job = pool.apply_async(sleep, (path,), client=sid)
    with pytest.raises(multiprocessing.TimeoutError):
        job.get(0.01)
    with pytest.raises(ValueError, match="not done"):
        job.successful()
    os.kill(started(path), signal.SIGKILL)
    with pytest.raises(shmsock.PoolProcessDiedError):
        job.get(WATCHDOG_S)
    with peers:
        peers.settimeout(WATCHDOG_S)
        assert peers.recv(1000).startswith(b"sorry: pool process")
    assert pool.apply(square, (3,)) == 9


def test_a_job_ends_with_its_client(
    runtime: shmsock.Runtime, pool: Pool, tmp_path: typing.Any
) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    path = str(tmp_path / "running")
    with peers:
        pool.apply(answer, (sid, b"hello"), client=sid)
        assert peers.recv(10) == b"hello"
        job = pool.apply_async(sleep, (path,), client=sid)
        started(path)
        runtime.set_failed(sid, errno.ECONNRESET, "closed the tab")
        with pytest.raises(shmsock.SocketFailedError, match="closed the tab"):
            job.get(WATCHDOG_S)


def test_terminate_ends_what_runs_and_what_waits(
    runtime: shmsock.Runtime, tmp_path: typing.Any
) -> None:
    pool = Pool(runtime.name, 1, context=fork())
    path = str(tmp_path / "running")
    jobs = [pool.apply_async(sleep, (path,)) for _ in range(3)]
    started(path)
    with pytest.raises(ValueError, match="not closed"):
        pool.join()
    pool.terminate()
    for job in jobs:
        with pytest.raises(concurrent.futures.CancelledError):
            job.get(WATCHDOG_S)
    assert pool.pids() == []
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.apply(square, (2,))
    wait_until(lambda: alone(runtime))


def test_children_are_initialised_and_replaced_after_so_many_jobs(
    runtime: shmsock.Runtime,
) -> None:
    with Pool(runtime.name, 1, remember, ("hello",), 2, fork()) as pool:
        said = [pool.apply(remembered) for _ in range(6)]
        assert {text for text, _ in said} == {"hello"}
        assert len({pid for _, pid in said}) == 3
    with ProcessPoolExecutor(
        runtime.name, 1, mp_context=fork(), initializer=remember, initargs=("again",)
    ) as executor:
        assert executor.submit(remembered).result(WATCHDOG_S)[0] == "again"
        assert list(executor.map(add, range(10), range(10), chunksize=3)) == list(range(0, 20, 2))
    wait_until(lambda: alone(runtime))


def test_an_initializer_that_raises_fails_the_jobs_with_what_it_raised(
    runtime: shmsock.Runtime,
) -> None:
    with ProcessPoolExecutor(runtime.name, 1, mp_context=fork(), initializer=refuse) as executor:
        with pytest.raises(ValueError, match="no licence"):
            executor.submit(square, 2).result(WATCHDOG_S)
        with pytest.raises(RuntimeError, match="no licence"):
            executor.submit(square, 2)
    wait_until(lambda: alone(runtime))


def test_sizes_that_cannot_be_are_refused(name: str) -> None:
    for wrong in ({"processes": 0}, {"maxtasksperchild": 0}):
        with pytest.raises(ValueError, match="at least one"):
            Pool(name, **wrong)  # type: ignore[arg-type]
