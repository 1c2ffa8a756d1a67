"""What only the C engine has: kill points, its lock, its build; both engines on one segment.

Everything that the two engines have in common is tested by the suite itself, which runs on both.
"""

from __future__ import annotations

import collections.abc
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import typing
import weakref

import pytest

import shmsock
from shmsock.layout import BROKEN, OPEN, OWN, WANT

from .helpers import REPOSITORY, Forked, Member, Peer, wait_until

engine_c = pytest.importorskip("shmsock._engine_c", reason="the C engine was not built")

SLOT = 0xFFFFFFFF


@pytest.fixture
def engine_module() -> typing.Any:
    """The tables of this file are seen through the C engine."""
    return engine_c


def stopped_at(table: Member, point: str, operation: str, *arguments: object) -> Forked:
    """A child that has stopped itself at a kill point of an engine call."""

    def child() -> object:
        member = Member.attach(table.name, engine_c)
        engine_c.arm(point, signal.SIGSTOP)
        result = getattr(member.engine, operation)(*arguments)
        member.leave()
        return int(result)

    victim = Forked(child)
    _, status = os.waitpid(victim.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return victim


def goes_on(victim: Forked) -> object:
    victim.send_signal(signal.SIGCONT)
    return victim.result()


# -- stopped at a kill point ----------------------------------------------------------------------


@pytest.mark.parametrize("point", ["want_stored", "token_taken"])
def test_token_of_a_semaphore_that_was_retired_on_the_way_is_worthless(
    point: str, table: Member
) -> None:
    sid = table.new()
    stripe = (sid & SLOT) // table.layout.block
    old = table.semaphores.get(stripe, 1)
    assert old is not None
    with stopped_at(table, point, "set_failed", sid, 5, "late") as victim:
        assert table.cells.claims[1 * table.layout.stripes + stripe] == 1 << 2 | WANT
        with table.recovery.arbitrated(1.0):
            assert table.recovery.retire(stripe)
        assert goes_on(victim) == 3  # done and recycled, with the next generation's token
    assert old.value == 0  # taken, and never posted again
    assert table.cells.ctl[stripe] == 2 << 2 | OPEN
    assert table.recovery.audit() == []


def test_repairer_waits_for_who_is_inside_and_leaves_the_stripe_closed(table: Member) -> None:
    sid = table.new()
    stripe = (sid & SLOT) // table.layout.block
    with stopped_at(table, "inside", "set_failed", sid, 5, "late") as victim:
        assert table.cells.claims[1 * table.layout.stripes + stripe] == 1 << 2 | OWN
        with table.recovery.arbitrated(1.0):
            assert not table.recovery.retire(stripe)
        with pytest.raises(shmsock.StripeTimeoutError, match=rf"pid {victim.pid}\) claims OWN"):
            table.engine.run(stripe, lambda *_: 1, -1, patience_s=0.1)
        assert goes_on(victim) == 3
    assert table.engine.run(stripe, lambda *_: 1, -1) == 1
    assert table.recovery.audit() == []


def test_fenced_between_taking_and_looking_posts_the_token(table: Member) -> None:
    sid = table.new()
    stripe = (sid & SLOT) // table.layout.block
    semaphore = table.semaphores.get(stripe, 1)
    assert semaphore is not None

    def child() -> str:
        member = Member.attach(table.name, engine_c)
        engine_c.arm("token_taken", signal.SIGSTOP)
        with pytest.raises(shmsock.ClosedError):
            member.engine.take_turn(sid)
        return "left"

    with Forked(child) as victim:
        os.waitpid(victim.pid, os.WUNTRACED)
        assert semaphore.value == 0
        table.processes.fence(1)
        assert goes_on(victim) == "left"
    assert semaphore.value == 1
    assert not table.columns.claims[1].any()
    table.recovery.look()
    assert table.recovery.audit() == []


def test_creating_passes_over_a_stripe_in_which_a_process_was_stopped(table: Member) -> None:
    sid = table.new()
    stripe = (sid & SLOT) // table.layout.block
    with stopped_at(table, "before_post", "take_turn", sid) as victim:
        others = [table.new() for _ in range(table.layout.block)]
        assert {(each & SLOT) // table.layout.block for each in others} == {1 - stripe}
        assert goes_on(victim) == 1
    assert table.recovery.audit() == []


def test_withdrawing_is_survived_too(table: Member) -> None:
    """The kill point that needs another process in the way."""
    sid = table.new()
    stripe = (sid & SLOT) // table.layout.block
    semaphore = table.semaphores.get(stripe, 1)
    assert semaphore is not None
    semaphore.acquire(0)

    def child() -> None:
        member = Member.attach(table.name, engine_c)
        engine_c.arm("withdrawn", signal.SIGKILL)
        member.engine.take_turn(sid)

    assert Forked(child).wait() == signal.SIGKILL
    semaphore.release()
    table.recovery.look()
    assert table.recovery.audit() == []
    assert table.engine.take_turn(sid) == 1


def test_arming_an_unknown_kill_point_is_an_error_that_lists_nothing_armed() -> None:
    with pytest.raises(ValueError, match="no kill point is named nonsense"):
        engine_c.arm("nonsense", signal.SIGKILL)
    assert len(set(engine_c.kill_points())) == len(engine_c.kill_points()) > 20


# -- Python inside a stripe -----------------------------------------------------------------------


def test_body_that_raises_inside_leaves_the_stripe_broken_and_others_mend_it(
    table: Member, other: Member
) -> None:
    def body(slot: int, argument: object) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.engine.run(0, body, -1)
    assert table.cells.claims[other.index * table.layout.stripes] & 3 == BROKEN
    assert not other.engine.lock.locked()
    assert table.engine.run(0, lambda *_: 1, -1) == 1  # waits, looks, retires
    assert other.engine.run(0, lambda *_: 1, -1) == 1
    assert table.recovery.audit() == []


def test_leftover_claim_is_owned_up_to_before_the_stripe_is_taken(table: Member) -> None:
    table.cells.claims[0] = 1 << 2 | OWN
    assert table.engine.run(0, lambda *_: 1, -1) == 1
    assert table.cells.ctl[0] >> 2 == 2  # retired: WANT was not stored over it
    table.cells.claims[1] = 1 << 2 | WANT
    table.engine.own_up()
    assert table.cells.claims[1] & 3 == BROKEN
    table.recovery.look()
    assert table.recovery.audit() == []


# -- the local lock -------------------------------------------------------------------------------


def test_who_has_the_local_lock_excludes_the_hot_path_of_other_threads(table: Member) -> None:
    sid = table.new()
    hold = table.engine.address(sid)
    made: list[object] = []
    with table.engine.lock:
        thread = threading.Thread(target=lambda: made.append(table.engine.address(sid)))
        thread.start()
        # No wait proves absence: the thread runs at the latest when we wait for it below.
        for _ in range(1000):
            assert table.engine.count(sid & SLOT) == 1
    thread.join()
    assert table.engine.count(sid & SLOT) == 2
    assert made
    assert hold is not None


def test_lock_is_released_once_and_refuses_the_second_time(table: Member) -> None:
    lock = table.engine.lock
    assert lock.acquire(blocking=False)
    assert not lock.acquire(blocking=False)
    lock.release()
    with pytest.raises(RuntimeError, match="nobody holds"):
        lock.release()
    assert not lock.locked()


# -- references -----------------------------------------------------------------------------------


def test_references_cannot_be_made_by_hand() -> None:
    with pytest.raises(TypeError):
        engine_c.Reference()


def test_reference_that_outlives_its_engine_is_inert(table: Member) -> None:
    sid = table.new()
    reference = table.engine.address(sid)
    table.leave()
    assert reference.failed
    reference.close()
    assert reference.closed
    with pytest.raises(shmsock.ClosedError):
        reference.add_reference()


def test_weak_references_to_recycled_objects_are_cleared(table: Member) -> None:
    """Freed references are used again: a weak one must never see its successor."""
    sid = table.new()
    for _ in range(200):
        reference = table.engine.address(sid)
        weak = weakref.ref(reference)
        del reference
        successor = table.engine.address(sid)
        assert weak() is None
        assert successor is not None
        del successor
    assert table.nref(sid) == 1


def test_interrupted_close_leaves_the_reference_open(table: Member, other: Member) -> None:
    sid = table.new()
    stripe = (sid & SLOT) // table.layout.block
    reference = table.engine.address(sid)
    semaphore = other.semaphores.get(stripe, 1)
    assert semaphore is not None
    semaphore.acquire(0)
    other.cells.claims[other.index * table.layout.stripes + stripe] = 1 << 2 | OWN
    table.engine.repair = lambda stripe: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        reference.close()
    assert not reference.closed
    assert table.engine.count(sid & SLOT) == 1
    table.engine.repair = table.recovery.look
    semaphore.release()
    other.cells.claims[other.index * table.layout.stripes + stripe] = 0
    reference.close()
    assert table.nref(sid) == 1


def test_threads_that_close_one_reference_give_it_back_once(table: Member) -> None:
    sid = table.new()
    for _ in range(200):
        reference, kept = table.engine.address(sid), table.engine.address(sid)
        threads = [threading.Thread(target=reference.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert table.engine.count(sid & SLOT) == 1
        kept.close()
    assert table.nref(sid) == 1


def test_dropping_a_runtime_with_its_references_leaves_nothing(runtime: shmsock.Runtime) -> None:
    ours, theirs = socket.socketpair()
    sid = runtime.create_socket(ours)
    kept = [runtime.address(sid) for _ in range(100)]
    runtime.close()
    runtime.unlink()
    kept.clear()
    gc.collect()
    theirs.close()


# -- both engines, and the build ------------------------------------------------------------------


@pytest.mark.parametrize("ours", ["c", "py"])
def test_processes_of_both_engines_share_a_segment(
    ours: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sockets are created, held, failed and let go of by both kinds; the books balance."""
    churn = """
        import random
        def churn(ids, seed):
            random.seed(seed)
            kept = []
            for _ in range(3000):
                sid = random.choice(ids)
                ref = rt.address(sid)
                if ref is not None:
                    kept.append(ref)
                if random.random() < 0.01:
                    rt.set_failed(sid, 7, "x")
                if len(kept) > 20 or random.random() < 0.1:
                    kept.clear()
            return shmsock.ENGINE
    """
    monkeypatch.setenv("SHMSOCK_ENGINE", ours)
    host = Peer()
    host.run(f"""
        import shmsock, socket
        rt = shmsock.Runtime.create({name!r}, slots=64, processes=8, stripes=2)
        pairs = [socket.socketpair() for _ in range(40)]
        ids = [rt.create_socket(a) for a, _ in pairs]
    """)
    peers = []
    for engine in ("c", "py", "c", "py"):
        monkeypatch.setenv("SHMSOCK_ENGINE", engine)
        peers.append(Peer(name))
        peers[-1].run(churn)
    ids = host.ask("ids")
    for seed, peer in enumerate(peers):
        peer.start(f"churn({ids}, {seed})", kind="ask")
    assert [peer.finish() for peer in peers] == ["c", "py", "c", "py"]
    assert host.ask("shmsock.ENGINE") == ours
    assert host.ask("rt.audit()") == []
    for peer in peers[:2]:
        peer.kill()  # in the middle of nothing, but attached perhaps
    for peer in peers[2:]:
        peer.run("rt.close()")
        peer.close()
    wait_until(lambda: host.ask("rt.repair() and len(rt.processes())") == 1)
    host.run("for sid in ids: rt.set_failed(sid, 1, '')")
    assert host.ask("rt.audit()") == []
    assert host.ask("rt.in_use()") == 0
    host.run("rt.close(); rt.unlink(); [b.close() for _, b in pairs]")
    host.close()


# An editable install finds the extension beside the sources, wherever the package itself is.
_SAY_WHICH = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import shmsock
print(shmsock.ENGINE, shmsock.__file__)
"""


def without_the_extension(directory: str) -> str:
    """A copy of the package as it is installed where there is no compiler."""
    shutil.copytree(
        os.path.join(REPOSITORY, "shmsock"),
        os.path.join(directory, "shmsock"),
        ignore=lambda _, entries: [e for e in entries if not e.endswith((".py", ".typed"))],
    )
    return directory


@pytest.fixture
def run_without(
    tmp_path: typing.Any,
) -> collections.abc.Callable[[str], subprocess.CompletedProcess[str]]:
    directory = without_the_extension(str(tmp_path))

    def run(engine: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": directory, "SHMSOCK_ENGINE": engine}
        return subprocess.run(
            [sys.executable, "-c", _SAY_WHICH],
            env=environment, cwd=directory, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def test_without_a_compiler_everything_works_on_python(
    run_without: collections.abc.Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    assert run_without("").stdout.startswith("py ")
    assert run_without("py").stdout.startswith("py ")


def test_forcing_an_engine_that_is_missing_fails_and_says_what_to_do(
    run_without: collections.abc.Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    done = run_without("c")
    assert done.returncode != 0
    assert "install again with a C compiler" in done.stderr
    assert "names no engine" in run_without("rust").stderr
