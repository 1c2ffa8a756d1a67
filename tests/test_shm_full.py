"""A full /dev/shm, and what other runs and other users left there: errors that say what to do,
never a SIGBUS, and nothing lost."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap

import posix_ipc
import pytest

import shmsock
from shmsock.layout import BROKEN, CLOSED, OPEN, OPENING
from shmsock.segment import Segment
from shmsock.semaphores import Semaphores

from .helpers import REPOSITORY, WATCHDOG_S, Forked, Member, wait_until

_ENTER = ["unshare", "--mount"] + ([] if os.geteuid() == 0 else ["--user", "--map-root-user"])


def _may_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    mount = "mount -t tmpfs -o size=64k none /dev/shm"
    return subprocess.run([*_ENTER, "sh", "-c", mount], check=False).returncode == 0


small_shm = pytest.mark.skipif(not _may_mount(), reason="no mount namespaces here")

# What every script begins with: a way to fill /dev/shm to the last page, and to empty it again.
_PRELUDE = """
    import contextlib, errno, os, socket, signal, sys, threading, time
    import shmsock
    from shmsock.layout import OPEN, OWN, WANT
    from tests.helpers import Forked, Member, wait_until

    @contextlib.contextmanager
    def full():
        with open("/dev/shm/filler", "wb", 0) as file:
            for size in (1 << 16, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        try:
            yield
        finally:
            os.unlink("/dev/shm/filler")

    def left():
        return sorted(os.listdir("/dev/shm"))

    def refused(call):
        try:
            call()
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            return str(error)
        raise AssertionError("it was not refused")
"""


def run_in_small_shm(size: str, script: str) -> None:
    """Run a script whose /dev/shm has ``size``; it must exit by itself, with 0."""
    mount = f'mount -t tmpfs -o size={size},mode=1777 none /dev/shm && exec "$@"'
    source = textwrap.dedent(_PRELUDE) + textwrap.dedent(script)
    done = subprocess.run(
        [*_ENTER, "sh", "-c", mount, "sh", sys.executable, "-W", "ignore", "-c", source],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": REPOSITORY},
        capture_output=True,
        text=True,
        check=False,
        timeout=WATCHDOG_S,
    )
    assert done.returncode == 0, done.stderr  # -7 would be SIGBUS


# -- full at create -------------------------------------------------------------------------------


@small_shm
def test_a_segment_that_does_not_fit_is_refused_with_sizes_and_leaves_no_name() -> None:
    run_in_small_shm(
        "1m",
        """
        said = refused(lambda: shmsock.Runtime.create("shop", slots=65536))
        assert "the segment needs" in said and "--shm-size" in said and "MiB" in said, said
        assert left() == [], left()
        with shmsock.Runtime.create("shop", slots=64, stripes=4, processes=4) as runtime:
            assert runtime.audit() == []
        assert left() == [], left()
        """,
    )


@small_shm
def test_semaphores_that_do_not_fit_are_refused_with_sizes_and_leave_no_name() -> None:
    """At whichever semaphore the last page goes: sizes that leave room for 0, 1, ... of them."""
    run_in_small_shm(
        "4m",
        """
        layout = shmsock.layout.Layout.fit(64, 4, 8)
        segment_pages = layout.columns()[1] // 4096
        refusals = 0
        for extra in range(0, 26, 5):
            open("/dev/shm/filler", "wb", 0).close()
            free = os.statvfs("/dev/shm")
            fill = free.f_bfree - segment_pages - extra
            with open("/dev/shm/filler", "wb", 0) as file:
                os.posix_fallocate(file.fileno(), 0, fill * 4096)
            try:
                runtime = shmsock.Runtime.create("shop", slots=64, stripes=8, processes=4)
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                assert "24 semaphores" in str(error) and "--shm-size" in str(error), error
                refusals += 1
            else:
                runtime.close(); runtime.unlink()
            assert left() == ["filler"], left()
            os.unlink("/dev/shm/filler")
        assert refusals == 5, refusals
        """,
    )


# -- full while it runs ---------------------------------------------------------------------------


@small_shm
def test_everything_but_retirement_goes_on_when_shm_is_full() -> None:
    run_in_small_shm(
        "8m",
        """
        with shmsock.Runtime.create("shop", slots=64, stripes=4, processes=8) as runtime:
            with full():
                pairs = [socket.socketpair() for _ in range(64)]
                ids = [runtime.create_socket(ours) for ours, _ in pairs]
                def child():
                    for sid in ids:
                        with runtime.address(sid) as reference:
                            reference.write(b"still")
                    return runtime.audit()
                assert Forked(child).result() == []
                assert [theirs.recv(9) for _, theirs in pairs] == [b"still"] * 64
                for sid in ids:
                    assert runtime.set_failed(sid)
                assert runtime.in_use() == 0
                # An owner without a claim dies: its stripes are taken in the ordinary way.
                read, write = os.pipe()
                def own():
                    for _ in range(8):
                        runtime.create_socket(socket.socketpair()[0])
                    os.write(write, b"!"); signal.pause()
                with Forked(own) as owner:
                    os.read(read, 1)
                    assert runtime.in_use() == 8
                    retired = runtime.repair()["retired"]
                    owner.kill()
                    wait_until(lambda: len(runtime.processes()) == 1)
                wait_until(lambda: runtime.in_use() == 0)
                assert runtime.repair()["retired"] == retired
                assert runtime.audit() == []
        assert left() == [], left()
        """,
    )


@small_shm
def test_a_dead_claim_without_a_spare_says_enospc_and_is_repaired_when_there_is_room() -> None:
    """Two stripes with a dead process inside: the one without spares hinders not the other."""
    run_in_small_shm(
        "8m",
        """
        from shmsock.layout import OWN
        table = Member.create("shop", slots=8, stripes=2)

        def die_inside_both():
            member = Member.attach("shop")
            for stripe in (0, 1):
                generation = member.cells.ctl[stripe] >> 2
                member.semaphores.get(stripe, generation).acquire(0)
                member.cells.claims[member.index * 2 + stripe] = generation << 2 | OWN
            os.kill(os.getpid(), signal.SIGKILL)

        for stripe in (0, 0):                       # its spares are used up, without room for more
            assert table.engine.run(stripe, lambda *_: 1, -1) == 1   # now its page is in use
            with full(), table.recovery.arbitrated(1.0):
                assert table.recovery.retire(stripe)
        with full():
            Forked(die_inside_both).wait()
            said = refused(table.recovery.look)
            assert "stripe 0 has no spare" in said and "/dev/shm is full" in said, said
            assert table.cells.ctl[0] == 3 << 2 | OPEN        # untouched: nobody is shut out of it
            assert table.cells.ctl[1] == 2 << 2 | OPEN        # this one had a spare
            assert table.cells.claims[table.layout.stripes + 1] == 0
            assert len(table.processes.dead()) == 1           # its row stays until all is repaired
            said = refused(lambda: table.engine.run(0, lambda *_: 1, -1))   # who needs it is told
            assert "has no spare" in said
            assert table.engine.run(1, lambda *_: 1, -1) == 1
            joined = Member.attach("shop")
            joined.close()
        table.recovery.look()
        assert table.processes.dead() == []
        assert table.recovery.audit() == []
        assert table.engine.run(0, lambda *_: 1, -1) == 1
        table.leave(); table.unlink()
        assert left() == [], left()
        """,
    )


@small_shm
def test_who_attaches_while_a_repair_is_impossible_takes_part_all_the_same() -> None:
    run_in_small_shm(
        "8m",
        """
        with shmsock.Runtime.create("shop", slots=64, stripes=4, processes=8) as runtime:
            segment = runtime._segment
            for stripe in range(4):                # somebody else used the spare ones up
                for ahead in (1, 2):
                    runtime._semaphores.unlink(stripe, (segment.cells.ctl[stripe] >> 2) + ahead)
            runtime._service.close()               # the test repairs, not the timer
            def die_inside():
                mine = shmsock.Runtime.attach("shop")
                engine = mine._engine
                engine.run(0, lambda *_: os.kill(os.getpid(), signal.SIGKILL), -1)
            with full():
                Forked(die_inside).wait()
                def attach():
                    mine = shmsock.Runtime.attach("shop")
                    sid = mine.create_socket(socket.socketpair()[0])   # in another stripe
                    mine.set_failed(sid)
                    return len(mine.processes())
                assert Forked(attach).result() == 3    # the dead one is listed still
                assert "no spare" in refused(runtime.repair)
            runtime.repair()
            wait_until(lambda: len(runtime.processes()) == 1)
            assert runtime.audit() == []
        """,
    )


# -- semaphores that others left ------------------------------------------------------------------


def plant(name: str, stripe: int, generation: int, value: int, uid: int, mode: int) -> None:
    """A semaphore of this name that no repairer of the runtime made."""
    path = f"/shmsock.{name}.{stripe}.{generation}"
    stray = posix_ipc.Semaphore(path, posix_ipc.O_CREX, 0o600, value)
    stray.close()
    os.chown(f"/dev/shm/sem.{path[1:]}", uid, -1)
    os.chmod(f"/dev/shm/sem.{path[1:]}", mode)


STRAYS = {
    "a token": (1, -1, 0o600),
    "many tokens": (9, -1, 0o600),
    "open to others": (0, -1, 0o666),
    "another user's": (0, 65534, 0o600),
}


@pytest.mark.parametrize("stray", STRAYS)
@pytest.mark.parametrize("phase", ["open", "closed", "opening"])
def test_a_stray_spare_is_passed_over_and_never_lets_anybody_in(
    table: Member, other: Member, stray: str, phase: str
) -> None:
    value, uid, mode = STRAYS[stray]
    if uid >= 0 and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    for ahead in (2, 3):
        table.semaphores.unlink(0, ahead)
    if phase == "closed":  # a repairer died between 2 and 7, and its semaphore is not what it was
        table.cells.ctl[0] = 2 << 2 | CLOSED
    elif phase == "opening":
        table.cells.ctl[0] = 1 << 2 | OPENING
    plant(table.name, 0, 2, value, uid, mode)
    recount = table.recovery.recount

    def look_in(stripe: int, dead: list[int]) -> None:
        """While one recounts nobody else may be inside, whatever the stray's value."""
        with pytest.raises(shmsock.StripeTimeoutError):
            other.engine.run(stripe, lambda *_: 1, -1, patience_s=0.0)
        recount(stripe, dead)

    table.recovery.recount = look_in  # type: ignore[method-assign, assignment]
    with table.recovery.arbitrated(1.0):
        assert table.recovery.retire(0)
    assert table.cells.ctl[0] == 3 << 2 | OPEN, "the stray's generation was skipped"
    assert not os.path.exists(f"/dev/shm/sem.shmsock.{table.name}.0.1")
    for member in (table, other):
        assert member.engine.run(0, lambda *_: 1, -1) == 1
    table.cells.claims[other.index * table.layout.stripes] = 3 << 2 | BROKEN
    table.recovery.recount = recount  # type: ignore[method-assign]
    table.recovery.look()
    assert other.engine.run(0, lambda *_: 1, -1) == 1
    assert table.recovery.audit() == []


def test_a_repairer_that_lost_the_arbiter_does_not_open_what_another_opened(
    table: Member, other: Member
) -> None:
    """Foreign code closed its lock file in the middle: another repaired meanwhile."""
    recount = table.recovery.recount

    def another_repairs_meanwhile(stripe: int, dead: list[int]) -> None:
        recount(stripe, dead)
        assert other.recovery.retire(stripe)

    table.recovery.recount = another_repairs_meanwhile  # type: ignore[method-assign, assignment]
    assert not table.recovery.retire(0)
    generation = table.cells.ctl[0] >> 2
    semaphore = Semaphores(table.name, 2)
    handle = semaphore.get(0, generation)
    assert handle is not None
    assert handle.value == 1, "one token, as if nobody had been late"
    semaphore.close()
    assert table.cells.ctl[0] & 3 == OPEN
    for member in (table, other):
        assert member.engine.run(0, lambda *_: 1, -1) == 1


def test_names_of_an_earlier_run_are_replaced_whatever_they_are(name: str) -> None:
    """Killed at any moment, it left any of these; the next create of the name wants its own."""
    for stripe, generation, value, mode in ((0, 1, 7, 0o600), (1, 2, 1, 0o666), (0, 3, 0, 0o000)):
        plant(name, stripe, generation, value, -1, mode)
    with shmsock.Runtime.create(name, slots=16, stripes=2) as runtime:
        names = {entry for entry in os.listdir("/dev/shm") if f"sem.shmsock.{name}." in entry}
        assert len(names) == 2 * 3
        assert not names & {f"sem.shmsock.{name}.0.1", f"sem.shmsock.{name}.1.2"}
        for entry in names:
            semaphore = posix_ipc.Semaphore("/" + entry.removeprefix("sem."))
            first = runtime._segment.cells.ctl[0] >> 2
            assert semaphore.value == int(entry.endswith(f".{first}"))
            semaphore.close()
        assert runtime.audit() == []


def test_a_late_repairer_of_an_earlier_runtime_touches_nothing_of_the_next(name: str) -> None:
    """It was stopped in the middle of a retirement, its runtime ended, and it goes on now."""
    earlier = shmsock.Runtime.create(name, slots=16, stripes=2)
    earlier._service.close()
    late, recount = earlier._recovery, earlier._recovery.recount
    following: list[shmsock.Runtime] = []

    def end_and_begin_anew(stripe: int, dead: list[int]) -> None:
        recount(stripe, dead)
        for entry in os.listdir("/dev/shm"):
            if entry.startswith(f"sem.shmsock.{name}."):
                os.unlink(f"/dev/shm/{entry}")
        os.unlink(f"/dev/shm/shmsock.{name}")
        os.rename(earlier.run_directory, earlier.run_directory + "-away")
        following.append(shmsock.Runtime.create(name, slots=16, stripes=2))

    late.recount = end_and_begin_anew  # type: ignore[method-assign, assignment]
    try:
        with late.arbitrated(1.0):
            late.retire(0)  # goes on in the new one's names: unlinks, makes
        runtime = following[0]
        with runtime:
            pairs = [socket.socketpair() for _ in range(16)]
            ids = [runtime.create_socket(ours) for ours, _ in pairs]

            def use() -> list[str]:
                for sid in ids:
                    assert runtime.address(sid) is not None
                return runtime.audit()

            assert Forked(use).result() == []
            wait_until(lambda: len(runtime.processes()) == 1)
            assert runtime.repair()["retired"] == 0
            for sid, (_, theirs) in zip(ids, pairs, strict=True):
                assert runtime.set_failed(sid)
                theirs.close()
    finally:
        earlier.close()
        shutil.rmtree(earlier.run_directory + "-away")
    left = [entry for entry in os.listdir("/dev/shm") if f"shmsock.{name}" in entry]
    for entry in left:  # spares of the late one; the next create of the name would remove them
        assert entry.startswith("sem.")
        os.unlink(f"/dev/shm/{entry}")


def test_generations_of_two_runtimes_of_a_name_do_not_meet(name: str) -> None:
    starts = set()
    for _ in range(5):
        with shmsock.Runtime.create(name, slots=16, stripes=2) as runtime:
            (start,) = set(runtime._segment.cells.ctl)
            starts.add(start >> 2)
            assert 0 < start < 1 << 63
            segment = Segment.attach(name)
            assert segment.cells.ctl[0] == start
            segment.close()
    assert len(starts) == 5
