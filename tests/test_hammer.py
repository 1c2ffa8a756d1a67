"""Many processes, random operations, random SIGKILL: afterwards the books must balance."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import time

import pytest

import shmsock
from shmsock import Runtime, Status

from .helpers import Forked, wait_until

PROCESSES = 4


def churn(runtime: Runtime, seed: int, operations: int) -> dict[str, int]:
    """Random operations on whatever ids are in the table, own ones among them."""
    rng = random.Random(seed)
    done = {"created": 0, "addressed": 0, "failed": 0, "released": 0, "written": 0}
    peers: dict[int, socket.socket] = {}
    held: list[shmsock.SocketRef] = []
    ids: list[int] = []
    for _ in range(operations):
        if rng.random() < 0.05 or not ids:
            ids = runtime.sockets()["id"].tolist()
        choice = rng.random()
        sid = rng.choice(ids) if ids else 1 << 40
        if choice < 0.1 and len(peers) < 20:
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            with contextlib.suppress(shmsock.TableFullError):
                new = runtime.create_socket(ours)
                peers[new] = theirs
                ids.append(new)
                done["created"] += 1
        elif choice < 0.5:
            reference = runtime.address(sid)
            if reference is not None:
                held.append(reference)
                done["addressed"] += 1
        elif choice < 0.8 and held:
            held.pop(rng.randrange(len(held))).close()
        elif choice < 0.86:
            done["failed"] += runtime.set_failed(sid, errno.EIO, f"by {seed}")
        elif choice < 0.9 and held:
            done["released"] += held[-1].release_additional_reference()
        elif held:
            with contextlib.suppress(
                shmsock.SocketFailedError, shmsock.OverCrowdedError, shmsock.DescriptorError
            ):
                held[-1].write(b"x" * rng.randrange(1, 200))
                done["written"] += 1
        for sid in [sid for sid in peers if runtime.status(sid) is Status.GONE]:
            peers.pop(sid).close()
    while held:
        held.pop().close()
    for sid, peer in peers.items():
        runtime.set_failed(sid)
        peer.close()
    return done


def assert_books_balance(runtime: Runtime) -> None:
    def problems() -> list[str]:
        runtime.repair()
        found = runtime.audit()
        found += [f"{row.pid} still listed" for row in runtime.processes()[1:]]
        found += [f"{row['id']} still there" for row in runtime.sockets()]
        return found

    try:
        wait_until(lambda: not problems())
    except AssertionError:
        raise AssertionError(problems()) from None


def test_books_balance_after_processes_hammered_one_table(runtime: Runtime) -> None:
    children = [Forked(in_child, runtime, seed, 3000) for seed in range(PROCESSES)]
    for child in children:
        done = child.result()
        assert all(done.values()), done
    assert_books_balance(runtime)


def in_child(runtime: Runtime, seed: int, operations: int) -> dict[str, int]:
    try:
        return churn(runtime, seed, operations)
    finally:
        runtime.close()


def test_a_thread_of_the_host_hammers_beside_other_processes(runtime: Runtime) -> None:
    with Forked(in_child, runtime, 1, 1500) as child:
        churn(runtime, 2, 1500)
        child.result()
    assert_books_balance(runtime)


def test_who_looks_at_a_table_that_others_change_never_stumbles(runtime: Runtime) -> None:
    """numpy reads a column more than once: what looks must look at a copy."""
    with Forked(in_child, runtime, 1, 10**9), Forked(in_child, runtime, 2, 10**9):
        wait_until(lambda: len(runtime.processes()) == 3, "both churn")
        for _ in range(1500):
            assert runtime.orphans() == []
            runtime.sockets()
            runtime.owned_counts()
            list(runtime._recovery.auditor.look())
    assert_books_balance(runtime)


@pytest.mark.slow
def test_books_balance_after_processes_were_killed_at_random(runtime: Runtime) -> None:
    """SIGKILL after a random while, forty times; the others go on and never hang."""
    seed = int(os.environ.get("SHMSOCK_SEED", random.SystemRandom().randrange(1 << 30)))
    print(f"SHMSOCK_SEED={seed}")
    rng = random.Random(seed)
    children: list[Forked] = []
    kills = 0
    try:
        while kills < 40:
            while len(children) < PROCESSES:
                children.append(Forked(in_child, runtime, rng.randrange(1 << 30), 10**9))
            deadline = time.monotonic() + rng.uniform(0.01, 0.15)
            while time.monotonic() < deadline:
                churn(runtime, rng.randrange(1 << 30), 20)
            children.pop(rng.randrange(len(children))).kill()
            kills += 1
    finally:
        for child in children:
            child.kill()
    assert_books_balance(runtime)
    churn(runtime, seed, 500)
    assert_books_balance(runtime)
