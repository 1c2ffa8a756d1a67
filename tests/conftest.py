"""Fixtures: a small runtime, and a guard that every test leaves nothing behind."""

from __future__ import annotations

import collections.abc
import contextlib
import gc
import importlib
import itertools
import multiprocessing.resource_tracker
import os
import signal
import threading
import types
import typing

import hypothesis
import pytest

import shmsock

from . import helpers

_numbers = itertools.count()

# For a night, not for CI: pytest --hypothesis-profile=deep
hypothesis.settings.register_profile("deep", max_examples=5000, deadline=None)

# A shell's background job ignores SIGINT, and so would every program the tests start from here.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes that tests start run the engine that this one runs, also where nobody has forced any.
os.environ.setdefault("SHMSOCK_ENGINE", shmsock.ENGINE)


def pytest_report_header() -> str:
    return f"shmsock engine: {shmsock.ENGINE}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: where several run at once, the last one to end decides."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every collection: the guard collects after each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def name() -> str:
    """A runtime name that no parallel run uses."""
    return f"t{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def runtime(name: str) -> collections.abc.Iterator[shmsock.Runtime]:
    """A small runtime whose host is the test."""
    with shmsock.Runtime.create(name, slots=256, processes=16, stripes=8) as made:
        yield made


@pytest.fixture(autouse=True)
def leak_guard() -> collections.abc.Iterator[None]:
    """Same descriptors, children, threads and names in shared memory, before and after."""

    def census() -> tuple[dict[int, str], set[int], set[str], set[threading.Thread]]:
        return (
            helpers.descriptors(),
            helpers.children(),
            helpers.shared_names(),
            set(threading.enumerate()),
        )

    before = census()
    yield
    gc.collect()
    stop = getattr(multiprocessing.resource_tracker._resource_tracker, "_stop", None)
    if stop is not None:
        stop()

    def left() -> list[str]:
        fds, processes, names, threads = census()
        problems = [f"descriptor {fd}: {what}" for fd, what in fds.items() if fd not in before[0]]
        problems += [f"child process {pid}" for pid in processes - before[1]]
        problems += [f"/dev/shm/{entry}" for entry in names - before[2]]
        problems += [f"thread {thread.name}" for thread in threads - before[3]]
        return [p for p in problems if "/proc/" not in p]

    try:
        helpers.wait_until(lambda: not left(), timeout_s=5.0)
    except AssertionError:
        pytest.fail("the test left behind: " + "; ".join(left()))


def _engines() -> list[types.ModuleType]:
    """Those that this build has; with SHMSOCK_ENGINE only the one it names."""
    wanted = os.environ.get("SHMSOCK_ENGINE") or "c py"
    found = []
    for name in wanted.split():
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(f"shmsock._engine_{name}"))
    return found


@pytest.fixture(params=_engines(), ids=lambda module: str(module.NAME))
def engine_module(request: pytest.FixtureRequest) -> types.ModuleType:
    """Each engine that this build has: one behaviour, one suite."""
    return typing.cast(types.ModuleType, request.param)


@pytest.fixture
def table(name: str, engine_module: types.ModuleType) -> collections.abc.Iterator[helpers.Member]:
    """A small table, seen by its creator; nothing runs beside the test."""
    made = helpers.Member.create(name, engine_module)
    yield made
    if not made.engine.closed:
        made.leave()
    made.unlink()


@pytest.fixture
def other(table: helpers.Member) -> collections.abc.Iterator[helpers.Member]:
    """A second participant of ``table``, in this same process."""
    made = helpers.Member.attach(table.name, table.module)
    yield made
    if not made.engine.closed:
        made.leave()
