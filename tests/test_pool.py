"""Pools of processes that answer clients themselves, and what the death of one of them costs.

``concurrent.futures.ProcessPoolExecutor`` breaks for good when a child is killed: every future that
is pending raises BrokenProcessPool, and so does every later submit:

    >>> pool.submit(os.kill, child, signal.SIGKILL); pool.submit(abs, -1)
    concurrent.futures.process.BrokenProcessPool: A process in the process pool was terminated ...
"""

from __future__ import annotations

import collections.abc
import concurrent.futures
import contextlib
import errno
import json
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.pool
import os
import pickle
import signal
import socket
import threading
import time
import typing
import warnings

import pytest

import shmsock
import shmsock.pool
from shmsock.pool import ProcessPoolExecutor

from .helpers import WATCHDOG_S, Forked, Peer, connected, descriptors, read_to_end, wait_until

METHODS = ["fork", "spawn", "forkserver"]


@pytest.fixture(autouse=True)
def no_forkserver() -> collections.abc.Iterator[None]:
    """The one that multiprocessing leaves running is not ours."""
    yield
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


def fork() -> typing.Any:
    return multiprocessing.get_context("fork")


@pytest.fixture
def pool(runtime: shmsock.Runtime) -> collections.abc.Iterator[ProcessPoolExecutor]:
    """Two children, and the death of one is told to its client by ``apologise``."""
    with ProcessPoolExecutor(runtime.name, 2, mp_context=fork(), fallback=apologise) as made:
        yield made


def result(future: concurrent.futures.Future[typing.Any]) -> typing.Any:
    return future.result(WATCHDOG_S)


def error_of(future: concurrent.futures.Future[typing.Any]) -> BaseException:
    error = future.exception(WATCHDOG_S)
    assert error is not None
    return error


def alone(runtime: shmsock.Runtime) -> bool:
    """Whether nobody else takes part, nothing is held and the books balance."""
    return len(runtime.processes()) == 1 and runtime.audit() == []


# -- jobs -----------------------------------------------------------------------------------------


def answer(sid: int, data: bytes) -> int:
    with shmsock.current().address(sid) as reference:  # type: ignore[union-attr]
        reference.write(data)
        reference.flush()
    return os.getpid()


def apologise(sid: int, error: Exception) -> None:
    answer(sid, f"sorry: {error}; by {os.getpid()}".encode())


def where() -> tuple[int, str]:
    return os.getpid(), shmsock.current().name


def sleep(path: str) -> None:
    """Say where it runs, and wait to be ended."""
    with open(path + "~", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + "~", path)
    while True:
        time.sleep(WATCHDOG_S)


def stream(sid: int, path: str) -> None:
    """Write to a client that does not read, for ever."""
    with open(path + "~", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + "~", path)
    with shmsock.current().address(sid) as reference:  # type: ignore[union-attr]
        while True:
            reference.write(b"x" * 100_000)
            reference.flush()


def wait_for(path: str) -> str:
    while not os.path.exists(path):
        time.sleep(0.002)
    return path


def write_after(sid: int, path: str) -> str:
    """Hold a reference, let the client fail, and write then."""
    with shmsock.current().address(sid) as reference:  # type: ignore[union-attr]
        with open(path + ".held", "w"):
            pass
        wait_for(path)
        try:
            reference.write(b"to the next user of the number?")
        except shmsock.SocketFailedError as error:
            return f"failed {error.code}"
    return "sent"


def answer_when(sid: int, path: str) -> None:
    wait_for(path)
    answer(sid, b"at last")


def raise_value_error(text: str) -> None:
    raise ValueError(text)


def exit_with(status: int) -> None:
    os._exit(status)


def unpicklable() -> object:
    return threading.Lock()


def started(path: str) -> int:
    """The pid of the child that runs a job which says so."""
    wait_until(lambda: os.path.exists(path), "the job runs")
    with open(path) as file:
        return int(file.read())


# -- initializer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_initializer_makes_current_work_in_both_pools_of_the_library(
    runtime: shmsock.Runtime, method: str
) -> None:
    context: typing.Any = multiprocessing.get_context(method)
    initargs = (runtime.name,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with concurrent.futures.ProcessPoolExecutor(
            1, context, shmsock.pool.initializer, initargs
        ) as executor:
            pid, name = executor.submit(where).result(WATCHDOG_S)
            assert pid != os.getpid()
            assert name == runtime.name
            assert len(runtime.processes()) == 2
        with context.Pool(1, shmsock.pool.initializer, initargs) as pool:
            assert pool.apply(where)[1] == runtime.name
            pool.close()
            pool.join()
    wait_until(lambda: alone(runtime))


def test_initializer_is_idempotent_and_a_forked_child_attaches_anew(
    runtime: shmsock.Runtime,
) -> None:
    def twice() -> list[object]:
        shmsock.pool.initializer(runtime.name)
        first = shmsock.current()
        shmsock.pool.initializer(runtime.name)
        same = shmsock.current() is first
        return [same, first.index, len(first.processes()), first.audit()]

    shmsock.pool.initializer(runtime.name)
    assert shmsock.current() is runtime
    same, index, processes, audit = Forked(twice).result()
    assert same
    assert index != runtime.index
    assert processes == 2
    assert audit == []
    wait_until(lambda: alone(runtime))


def test_initializer_of_a_name_that_nobody_has_says_so(name: str) -> None:
    with pytest.raises(shmsock.RuntimeNotFoundError):
        shmsock.pool.initializer(name)


# -- executor -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_children_of_every_start_method_answer_clients(
    runtime: shmsock.Runtime, method: str
) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    context = multiprocessing.get_context(method)
    with peers, ProcessPoolExecutor(runtime.name, 2, mp_context=context) as pool:
        pid = result(pool.submit(answer, sid, b"from the pool", client=sid))
        assert pid in pool.pids()
        assert pid != os.getpid()
        assert peers.recv(100) == b"from the pool"
        assert list(pool.map(abs, [-1, -2, -3])) == [1, 2, 3]
    wait_until(lambda: alone(runtime))


def test_a_job_that_raises_raises_in_its_future_and_the_child_lives(
    pool: ProcessPoolExecutor,
) -> None:
    error = error_of(pool.submit(raise_value_error, "no such tile"))
    assert type(error) is ValueError
    assert str(error) == "no such tile"
    assert "raise_value_error" in "".join(error.__notes__)
    pids = pool.pids()
    assert isinstance(error_of(pool.submit(unpicklable)), TypeError)
    assert isinstance(error_of(pool.submit(abs, threading.Lock())), TypeError)
    assert result(pool.submit(abs, -1)) == 1
    assert set(pids) <= set(pool.pids())


def test_a_killed_child_fails_its_own_job_alone_and_another_tells_the_client(
    runtime: shmsock.Runtime, pool: ProcessPoolExecutor, tmp_path: typing.Any
) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    path = str(tmp_path / "running")
    victim = pool.submit(sleep, path, client=sid)
    pid = started(path)
    others = [pool.submit(abs, -n) for n in range(20)]
    os.kill(pid, signal.SIGKILL)
    error = error_of(victim)
    assert isinstance(error, shmsock.PoolProcessDiedError)
    assert (error.pid, error.signal, error.exit_status) == (pid, signal.SIGKILL, 0)
    assert str(pid) in str(error)
    assert "Killed" in str(error)
    assert [result(other) for other in others] == list(range(20))
    with peers:
        peers.settimeout(WATCHDOG_S)
        text = peers.recv(1000).decode()
        assert text.startswith(f"sorry: pool process {pid} was killed by signal 9")
        assert str(pid) not in text.rpartition("by")[2]
    wait_until(lambda: len(pool.pids()) == 2)
    assert pid not in pool.pids()
    assert result(pool.submit(abs, -7)) == 7


def test_a_child_killed_while_idle_costs_no_job(pool: ProcessPoolExecutor) -> None:
    pid, _ = result(pool.submit(where))
    for _ in range(5):
        os.kill(pid, signal.SIGKILL)
        pid, _ = result(pool.submit(where))
    wait_until(lambda: pid in pool.pids())


def test_a_child_killed_while_writing_fails_its_client_and_the_pool_goes_on(
    runtime: shmsock.Runtime, pool: ProcessPoolExecutor, tmp_path: typing.Any
) -> None:
    ours, peers = connected(buffer_bytes=10_000)
    sid = runtime.create_socket(ours)
    path = str(tmp_path / "running")
    victim = pool.submit(stream, sid, path)
    pid = started(path)
    with peers:
        wait_until(lambda: runtime._segment.cells.writer[sid & 0xFFFFFFFF] != 0, "in mid-message")
        os.kill(pid, signal.SIGKILL)
        assert isinstance(error_of(victim), shmsock.PoolProcessDiedError)
        wait_until(lambda: runtime.status(sid) is not shmsock.Status.LIVE, "half a message")
        read_to_end(peers)
    assert result(pool.submit(abs, -7)) == 7


def test_a_child_that_exits_is_told_from_one_that_is_killed(pool: ProcessPoolExecutor) -> None:
    error = error_of(pool.submit(exit_with, 7))
    assert isinstance(error, shmsock.PoolProcessDiedError)
    assert (error.signal, error.exit_status) == (0, 7)
    assert pickle.loads(pickle.dumps(error)).args == error.args


def test_a_client_that_goes_while_queued_drops_the_job_without_waiting_its_turn(
    runtime: shmsock.Runtime, tmp_path: typing.Any
) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    go, mark = str(tmp_path / "go"), str(tmp_path / "mark")
    with peers, ProcessPoolExecutor(runtime.name, 1, mp_context=fork()) as pool:
        blocker = pool.submit(wait_for, go)
        wait_until(blocker.running)
        queued = pool.submit(sleep, mark, client=sid)
        runtime.set_failed(sid, errno.ECONNRESET, "closed the tab")
        error = error_of(queued)
        assert isinstance(error, shmsock.SocketFailedError)
        assert not blocker.done()
        open(go, "w").close()
        result(blocker)
    assert not os.path.exists(mark)
    wait_until(lambda: alone(runtime))


def test_a_client_that_goes_while_its_job_runs_or_writes_frees_the_child(
    runtime: shmsock.Runtime, pool: ProcessPoolExecutor, tmp_path: typing.Any
) -> None:
    for job in ("sleep", "stream"):
        ours, peers = connected(buffer_bytes=10_000)
        sid = runtime.create_socket(ours)
        path = str(tmp_path / job)
        if job == "sleep":
            future = pool.submit(sleep, path, client=sid)
        else:
            future = pool.submit(stream, sid, path, client=sid)
        pid = started(path)
        with peers:
            runtime.set_failed(sid, errno.ECONNRESET, "closed the tab")
            error = error_of(future)
            assert isinstance(error, shmsock.SocketFailedError), repr(error)
            assert (error.code, error.text) == (errno.ECONNRESET, "closed the tab")
            assert pid in pool.pids()
        wait_until(lambda sid=sid: runtime.status(sid) is shmsock.Status.GONE)  # type: ignore[misc]


def test_a_write_after_failure_reaches_nobody(
    runtime: shmsock.Runtime, pool: ProcessPoolExecutor, tmp_path: typing.Any
) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    path = str(tmp_path / "go")
    future = pool.submit(write_after, sid, path)
    wait_until(lambda: os.path.exists(path + ".held"))
    runtime.set_failed(sid, errno.ECONNRESET, "gone")
    others = [connected() for _ in range(20)]  # among them the next users of its number
    sids = [runtime.create_socket(ours) for ours, _ in others]
    open(path, "w").close()
    assert result(future) == f"failed {errno.ECONNRESET}"
    for other, (_, theirs) in zip(sids, others, strict=True):
        runtime.set_failed(other)
        with theirs:
            assert read_to_end(theirs) == b""
    with peers:
        assert read_to_end(peers) == b""


def test_three_megabytes_from_a_process_without_a_loop_arrive_whole(
    runtime: shmsock.Runtime, pool: ProcessPoolExecutor
) -> None:
    ours, peers = connected(buffer_bytes=20_000)
    sid = runtime.create_socket(ours)
    data = os.urandom(3_000_000)
    future = pool.submit(answer, sid, data, client=sid)
    got = bytearray()
    with peers:
        peers.settimeout(WATCHDOG_S)
        while len(got) < len(data):
            got += peers.recv(65536)
        result(future)
    assert bytes(got) == data


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_jobs_leave_no_reference_descriptor_or_slot_behind(
    runtime: shmsock.Runtime, pool: ProcessPoolExecutor, count: int
) -> None:
    def census() -> dict[int, int]:
        return {pid: len(descriptors(pid)) for pid in pool.pids()}

    def run(jobs: int) -> None:
        """Eight clients, who are gone afterwards."""
        with contextlib.ExitStack() as stack:
            pairs = [connected("unix") for _ in range(8)]
            sids = [runtime.create_socket(ours) for ours, _ in pairs]
            for sid, (_, theirs) in zip(sids, pairs, strict=True):
                stack.enter_context(theirs)
                stack.callback(runtime.set_failed, sid)
            got = [0] * 8
            futures = [
                pool.submit(answer, sids[n % 8], b"%07d\n" % n, client=sids[n % 8])
                for n in range(jobs)
            ]
            for n, future in enumerate(futures):
                result(future)
                got[n % 8] += len(pairs[n % 8][1].recv(8, socket.MSG_WAITALL))
            assert sum(got) == jobs * 8
            wait_until(lambda: sum(map(len, runtime.attached_many(runtime.sockets()["id"]))) == 0)
        # Idle children, which run no loop, let go of what failed.
        wait_until(lambda: runtime.in_use() == 0)

    for _ in range(20):  # until both have answered somebody: they keep a channel from then on
        run(8)
    before, threads = quiet(census), threading.active_count()
    run(count)
    wait_until(lambda: census() == before, f"{before}")
    assert threading.active_count() == threads
    assert runtime.audit() == []


def quiet(census: collections.abc.Callable[[], dict[int, int]]) -> dict[int, int]:
    """What a census says twice in a row, half a second apart: watchers end by themselves."""
    seen: list[tuple[float, dict[int, int]]] = []

    def still() -> bool:
        now = time.monotonic(), census()
        if not seen or seen[0][1] != now[1]:
            seen[:] = [now]
        return now[0] - seen[0][0] > 0.5

    wait_until(still)
    return seen[0][1]


# -- beginnings and ends --------------------------------------------------------------------------


def test_a_pool_made_before_the_runtime_serves_it_and_the_next_one_of_its_name(name: str) -> None:
    with ProcessPoolExecutor(name, 1, mp_context=fork()) as pool:
        assert result(pool.submit(abs, -1)) == 1
        assert isinstance(error_of(pool.submit(answer, 1, b"", client=1)), Exception)
        for _ in range(2):
            with shmsock.Runtime.create(name, slots=64, processes=8, stripes=4) as runtime:
                ours, peers = connected()
                sid = runtime.create_socket(ours)
                with peers:
                    result(pool.submit(answer, sid, b"hello", client=sid))
                    assert peers.recv(10) == b"hello"
        assert result(pool.submit(abs, -1)) == 1


def test_two_runtimes_in_one_process_have_a_pool_each(name: str) -> None:
    with (
        shmsock.Runtime.create(name + "a", slots=64, processes=8, stripes=4) as one,
        shmsock.Runtime.create(name + "b", slots=64, processes=8, stripes=4) as two,
        ProcessPoolExecutor(one.name, 1, mp_context=fork()) as first,
        ProcessPoolExecutor(two.name, 1, mp_context=fork()) as second,
    ):
        for runtime, pool in ((one, first), (two, second)):
            ours, peers = connected()
            sid = runtime.create_socket(ours)
            assert result(pool.submit(where))[1] == runtime.name
            result(pool.submit(answer, sid, runtime.name.encode(), client=sid))
            with peers:
                assert peers.recv(100) == runtime.name.encode()


def test_shutdown_leaves_nothing_and_refuses_more(runtime: shmsock.Runtime) -> None:
    pool = ProcessPoolExecutor(runtime.name, 2, mp_context=fork())
    futures = [pool.submit(abs, -n) for n in range(50)]
    pool.shutdown()
    assert [future.result(0) for future in futures] == list(range(50))
    assert pool.pids() == []
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(abs, 1)
    pool.shutdown()
    wait_until(lambda: alone(runtime))


def test_shutdown_may_cancel_what_is_queued(runtime: shmsock.Runtime, tmp_path: typing.Any) -> None:
    pool = ProcessPoolExecutor(runtime.name, 1, mp_context=fork())
    go = str(tmp_path / "go")
    running = pool.submit(wait_for, go)
    wait_until(running.running)
    queued = [pool.submit(abs, -n) for n in range(5)]
    assert queued[4].cancel()
    pool.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in queued)
    open(go, "w").close()
    assert result(running) == go
    pool.shutdown()


def test_a_pool_that_is_forgotten_or_never_used_ends_by_itself(runtime: shmsock.Runtime) -> None:
    ProcessPoolExecutor(runtime.name).shutdown()
    pool = ProcessPoolExecutor(runtime.name, 1, mp_context=fork())
    assert result(pool.submit(abs, -1)) == 1
    del pool  # the leak guard looks for thread and child


def test_a_pool_is_refused_in_a_forked_child_which_may_make_its_own(
    runtime: shmsock.Runtime, pool: ProcessPoolExecutor
) -> None:
    result(pool.submit(where))

    def use() -> str:
        with pytest.raises(RuntimeError, match="belongs to the process"):
            pool.submit(abs, 1)
        pool.shutdown()
        return str(len(pool.pids()) > 0)

    assert Forked(use).result() == "True"
    assert result(pool.submit(abs, -1)) == 1


@pytest.mark.parametrize("method", METHODS)
def test_children_end_when_the_parent_is_killed(runtime: shmsock.Runtime, method: str) -> None:
    with Peer() as parent:
        parent.run(f"""
            import multiprocessing, os, threading
            import shmsock.pool
            pool = shmsock.pool.ProcessPoolExecutor(
                {runtime.name!r}, 2, mp_context=multiprocessing.get_context({method!r}))
        """)
        parent.run("[f.result() for f in [pool.submit(os.getpid) for _ in range(50)]]")
        pids = parent.ask("pool.pids()")
        assert pids
        parent.kill()
    wait_until(lambda: not any(is_running(pid) for pid in pids))
    wait_until(lambda: alone(runtime))


def test_jobs_of_a_killed_parent_end_with_its_clients_or_answer_those_of_others(
    runtime: shmsock.Runtime, tmp_path: typing.Any
) -> None:
    ours, peers = connected()
    others = runtime.create_socket(ours)  # its owner lives on
    go, running = str(tmp_path / "go"), str(tmp_path / "running")
    with Peer(runtime.name) as parent, peers:
        parent.run("""
            import multiprocessing, shmsock.pool, socket
            from tests import test_pool
            pool = shmsock.pool.ProcessPoolExecutor(
                rt.name, 2, mp_context=multiprocessing.get_context("spawn"))
            mine, theirs = socket.socketpair()
            sid = rt.create_socket(mine)
        """)
        parent.run(f"""
            queued = pool.submit(test_pool.answer_when, {others}, {go!r}, client={others})
            running = pool.submit(test_pool.sleep, {running!r}, client=sid)
            late = [pool.submit(test_pool.answer, {others}, b"late") for _ in range(3)]
        """)
        started(running)
        pids = parent.ask("pool.pids()")
        parent.kill()
        wait_until(lambda: sum(map(is_running, pids)) == 1, "one job had a client of the parent's")
        open(go, "w").close()
        peers.settimeout(WATCHDOG_S)
        assert peers.recv(100) == b"at last"
        wait_until(lambda: not any(map(is_running, pids)))
        # What was queued in the parent has died with it.
        wait_until(lambda: alone(runtime))
        peers.setblocking(False)
        with pytest.raises(BlockingIOError):
            peers.recv(100)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_pool_whose_children_cannot_start_says_so(runtime: shmsock.Runtime) -> None:
    context: typing.Any = type("Context", (), {})()
    context.Pipe, context.get_start_method = fork().Pipe, lambda: "fork"

    def refuse(**_: object) -> None:
        raise OSError(errno.EAGAIN, "no more processes")

    context.Process = refuse
    with ProcessPoolExecutor(runtime.name, 1, mp_context=context) as pool:
        assert isinstance(error_of(pool.submit(abs, -1)), OSError)
        with pytest.raises(RuntimeError, match="cannot start"):
            pool.submit(abs, -1)


# -- ids ------------------------------------------------------------------------------------------


def test_ids_travel_as_ints_and_as_text(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    sid = runtime.create_socket(ours)
    assert type(sid) is int
    assert pickle.loads(pickle.dumps(sid)) == sid
    for value in (sid, 1 << 53 | 1, (1 << 62) + (1 << 32) + 5):
        text = json.loads(json.dumps({"client": shmsock.format_socket_id(value)}))["client"]
        assert text.isascii()
        assert shmsock.parse_socket_id(text) == value
    peers.close()
