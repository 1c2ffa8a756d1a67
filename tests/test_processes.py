"""Process rows and the kernel's proof of life."""

from __future__ import annotations

import collections.abc
import contextlib
import gc
import os
import resource
import signal
import threading

import pytest

import shmsock
from shmsock.errors import AlreadyRunningError, ClosedError, RuntimeNotFoundError, TableFullError
from shmsock.layout import FREE, LIVE, REAPING
from shmsock.processes import (
    ARBITER,
    ATTACHED,
    FIRST_ROW,
    REGISTRATION,
    LockFile,
    Processes,
    barrier,
    register_barrier,
)
from shmsock.segment import run_directory

from . import helpers
from .helpers import Forked, Member, Peer, Steps, die, wait_until


def live_until_killed(name: str) -> None:
    Member.attach(name)
    signal.pause()


@contextlib.contextmanager
def living(table: Member) -> collections.abc.Iterator[tuple[Forked, int]]:
    """A child that takes part, and its row."""
    before = set(table.processes.taken())
    with Forked(live_until_killed, table.name) as child:
        (index,) = wait_until(lambda: set(table.processes.taken()) - before)
        yield child, index


def holder_seen_from_outside(name: str, byte: int) -> int:
    def ask() -> int:
        return LockFile.open(name, create=False).holder(byte)

    return int(Forked(ask).result())


def lock_descriptors() -> list[int]:
    return [fd for fd, what in helpers.descriptors().items() if what.endswith(".run/lock")]


# -- proof of life ------------------------------------------------------------------------------


def test_process_is_alive_while_it_lives_and_dead_while_still_a_zombie(table: Member) -> None:
    with living(table) as (child, index):
        assert table.processes.is_alive(index)
        assert table.processes.dead() == []
        assert table.cells.row_pid[index] == child.pid
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with open(f"/proc/{child.pid}/stat") as stat:
            assert stat.read().rpartition(")")[2].split()[0] == "Z"
        assert not table.processes.is_alive(index)
        assert table.processes.dead() == [index]
    table.recovery.look()
    assert table.processes.taken() == [table.index]


def test_stopped_process_is_alive(table: Member) -> None:
    with living(table) as (child, index):
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert table.processes.is_alive(index)
        assert table.processes.dead() == []
    table.recovery.look()


def test_proof_of_life_is_not_inherited_by_fork(table: Member) -> None:
    read, write = os.pipe()

    def fork_and_wait() -> None:
        Member.attach(table.name)
        grandchild = os.fork()
        if grandchild == 0:
            os.write(write, b"%d" % os.getpid())
            signal.pause()
        signal.pause()

    with Forked(fork_and_wait) as child:
        grandchild = int(os.read(read, 20))
        try:
            (index,) = set(table.processes.taken()) - {table.index}
            assert table.processes.is_alive(index)
            child.kill()
            os.kill(grandchild, 0)
            assert table.processes.dead() == [index]
        finally:
            os.kill(grandchild, signal.SIGKILL)
            os.close(read)
            os.close(write)
    table.recovery.look()


def test_second_open_of_the_lock_file_keeps_the_first_ones_locks(table: Member) -> None:
    byte = FIRST_ROW + table.index
    second = LockFile.open(table.name, create=False)
    assert second is table.lock_file
    del second
    gc.collect()
    assert len(lock_descriptors()) == 1
    assert holder_seen_from_outside(table.name, byte) == os.getpid()


def test_lock_lost_to_foreign_code_is_taken_back(table: Member) -> None:
    """The kernel's any-close rule is real: this test fails if it ever goes away."""
    byte = FIRST_ROW + table.index
    os.close(os.open(f"{run_directory(table.name)}/lock", os.O_RDONLY))
    assert holder_seen_from_outside(table.name, byte) == 0
    assert table.lock_file.reassert()
    assert holder_seen_from_outside(table.name, byte) == os.getpid()
    assert holder_seen_from_outside(table.name, ATTACHED) == os.getpid()


def test_lock_that_somebody_else_took_meanwhile_is_not_taken_back(table: Member) -> None:
    os.close(os.open(f"{run_directory(table.name)}/lock", os.O_RDONLY))
    read, write = os.pipe()

    def usurp() -> None:
        lock_file = LockFile.open(table.name, create=False)
        os.write(write, b"%d" % lock_file.try_hold(FIRST_ROW + table.index))
        signal.pause()

    with Forked(usurp):
        assert os.read(read, 1) == b"1"
        assert not table.lock_file.reassert()
    os.close(read)
    os.close(write)
    assert table.lock_file.reassert()


def test_lock_file_descriptor_is_high(table: Member) -> None:
    (fd,) = lock_descriptors()
    assert fd >= 512
    assert not os.get_inheritable(fd)


def test_process_survives_a_sweep_over_low_descriptors(table: Member) -> None:
    def sweep() -> None:
        member = Member.attach(table.name)
        os.closerange(3, 256)
        if not member.lock_file.reassert() or table.lock_file is member.lock_file:
            os._exit(2)
        pid = os.fork()
        if pid == 0:
            held = LockFile.open(table.name, create=False).holder(FIRST_ROW + member.index)
            os._exit(0 if held == os.getppid() else 3)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    assert os.waitstatus_to_exitcode(Forked(sweep).wait()) == 0
    table.recovery.look()


def test_sweep_over_every_descriptor_is_noticed_and_the_process_is_fenced(table: Member) -> None:
    read, write = os.pipe()  # the child's own descriptors are gone: it speaks by its exit code
    go_read, go_write = os.pipe()

    def sweep() -> None:
        os.dup2(write, 1)
        os.dup2(go_read, 0)
        member = Member.attach(table.name)
        os.closerange(3, 4096)
        noticed = not member.lock_file.reassert()
        os.write(1, b"!")
        os.read(0, 1)
        try:
            member.new()
        except ClosedError:
            os._exit(0 if noticed else 2)
        os._exit(3)

    child = Forked(sweep)
    assert os.read(read, 1) == b"!"
    assert len(table.processes.dead()) == 1
    table.recovery.look()
    assert table.processes.taken() == [table.index]
    os.write(go_write, b"!")
    assert os.waitstatus_to_exitcode(child.wait()) == 0
    assert table.recovery.audit() == []
    for fd in (read, write, go_read, go_write):
        os.close(fd)


def test_number_reused_by_another_file_is_not_taken_for_the_lock_file(table: Member) -> None:
    def reuse() -> list[object]:
        member = Member.attach(table.name)
        (fd,) = lock_descriptors()
        other = os.open("/dev/null", os.O_RDWR)
        os.dup2(other, fd)
        result = [member.lock_file.reassert(), member.lock_file.is_current()]
        member.lock_file.unshare()
        return [*result, os.readlink(f"/proc/self/fd/{fd}")]

    assert Forked(reuse).result() == [False, False, "/dev/null"]
    table.recovery.look()


def test_low_limit_of_open_files_is_no_obstacle(table: Member) -> None:
    def attach() -> list[int]:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        Member.attach(table.name)
        return lock_descriptors()

    (fd,) = Forked(attach).result()
    assert fd < 256
    table.recovery.look()


def test_lock_file_that_was_unlinked_is_not_current(table: Member) -> None:
    path = f"{run_directory(table.name)}/lock"
    assert table.lock_file.is_current()
    os.rename(path, path + "-away")
    assert not table.lock_file.is_current()
    fresh = LockFile.open(table.name, create=True)
    assert fresh is not table.lock_file
    assert fresh.is_current()
    os.rename(path + "-away", path)
    assert table.lock_file.is_current()
    assert LockFile.open(table.name, create=False) is table.lock_file


def test_no_lock_file_means_no_runtime(name: str) -> None:
    with pytest.raises(RuntimeNotFoundError, match=name):
        LockFile.open(name, create=False)


def test_own_locks_are_known_although_the_kernel_never_reports_them(table: Member) -> None:
    assert table.lock_file.holder(FIRST_ROW + table.index) == os.getpid()
    assert table.lock_file.holder(ATTACHED) == os.getpid()
    assert table.lock_file.holder(ARBITER) == 0
    with table.recovery.arbitrated(1.0):
        assert table.lock_file.holder(ARBITER) == os.getpid()


def test_forked_child_holds_no_lock_and_does_not_drop_its_parents(table: Member) -> None:
    def look() -> list[int]:
        fresh = LockFile.open(table.name, create=False)
        return [len(lock_descriptors()), fresh.holder(FIRST_ROW + table.index)]

    assert Forked(look).result() == [1, os.getpid()]
    assert holder_seen_from_outside(table.name, FIRST_ROW + table.index) == os.getpid()


# -- bytes that exclude -------------------------------------------------------------------------


def test_arbiter_excludes_other_processes_until_its_holder_dies(table: Member) -> None:
    read, write = os.pipe()

    def arbitrate() -> None:
        with LockFile.open(table.name, create=False).exclusive(ARBITER, 1.0) as arbiter:
            os.write(write, b"%d" % arbiter)
            signal.pause()

    with Forked(arbitrate) as child:
        assert os.read(read, 1) == b"1"
        with table.recovery.arbitrated(0.01) as arbiter:
            assert not arbiter
        assert table.lock_file.holder(ARBITER) == child.pid
        child.kill()
        with table.recovery.arbitrated(0) as arbiter:
            assert arbiter
    os.close(read)
    os.close(write)


def test_arbiter_excludes_threads_of_one_process(table: Member) -> None:
    inside, most, lock = [0], [0], threading.Lock()

    def work() -> None:
        for _ in range(20):
            with table.lock_file.exclusive(ARBITER, helpers.WATCHDOG_S) as arbiter:
                assert arbiter
                with lock:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                table.lock_file.holder(ATTACHED)
                with lock:
                    inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_exception_while_waiting_for_a_byte_does_not_keep_it(
    table: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = LockFile._hold

    def hold_then_be_interrupted(self: LockFile, byte: int) -> bool:
        hold(self, byte)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LockFile, "_hold", hold_then_be_interrupted)
        with pytest.raises(KeyboardInterrupt), table.recovery.arbitrated(0):
            pass
    assert holder_seen_from_outside(table.name, ARBITER) == 0
    with table.recovery.arbitrated(0) as arbiter:
        assert arbiter


def test_exception_inside_lets_the_byte_go(table: Member) -> None:
    with pytest.raises(KeyError), table.recovery.arbitrated(0):
        raise KeyError
    assert holder_seen_from_outside(table.name, ARBITER) == 0


def test_somebody_who_registers_for_ever_is_named(
    table: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def impatient(byte: int, timeout_s: float) -> collections.abc.Iterator[bool]:
        assert (byte, timeout_s) == (REGISTRATION, 5.0)
        yield False

    monkeypatch.setattr(table.lock_file, "exclusive", impatient)
    with pytest.raises(AlreadyRunningError, match="registering"):
        table.processes.register("client")


def test_barriers_are_granted_here() -> None:
    register_barrier()
    barrier()


# -- rows ---------------------------------------------------------------------------------------


def test_row_is_reused_with_a_new_epoch(table: Member) -> None:
    words = []
    for _ in range(3):
        with living(table) as (_, index):
            word = table.cells.row_state[index]
            assert word & 0xFF == LIVE
            words.append((index, word >> 8))
        table.recovery.look()
        assert table.cells.row_state[index] & 0xFF == FREE
    first, second, third = words
    assert first[0] == second[0] == third[0]
    assert (second[1], third[1]) == (first[1] + 1, first[1] + 2)


def test_next_tenant_of_a_row_owns_nothing_of_the_last(table: Member) -> None:
    first = Member.attach(table.name)
    sid = first.new()
    first.close()
    table.recovery.look()
    second = Member.attach(table.name)
    assert (second.index, second.epoch) == (first.index, first.epoch + 1)
    assert second.word != first.word
    assert table.engine.status(sid) is shmsock.Status.GONE
    second.leave()


def test_full_table_of_processes_names_the_option(table: Member) -> None:
    members = [Member.attach(table.name) for _ in range(3)]
    before = table.bytes()
    with pytest.raises(TableFullError, match="`processes`"):
        Member.attach(table.name)
    assert table.bytes() == before
    members[1].leave()
    again = Member.attach(table.name)
    assert again.index == members[1].index
    for member in (members[0], members[2], again):
        member.leave()


def test_row_in_which_something_is_left_is_not_given_out(table: Member) -> None:
    table.cells.held[0 * table.layout.processes + 1] = 1
    table.cells.claims[2 * table.layout.stripes] = 1
    member = Member.attach(table.name)
    assert member.index == 3
    member.leave()
    table.cells.held[1] = 0
    table.cells.claims[2 * table.layout.stripes] = 0


def test_killed_while_registering_leaves_a_row_that_can_be_taken(table: Member) -> None:
    def register(at: int) -> int:
        member = Member.attach(table.name)
        member.leave()
        segment = shmsock.segment.Segment.attach(table.name)
        lock_file = LockFile.open(table.name, create=False)
        lock_file.share()
        member.cells, member.columns = segment.cells, segment.columns
        with Steps(member, at, die) as steps:
            Processes(segment, lock_file).register("worker")
        return steps.count

    at, completed = 0, 0
    while not completed:
        at += 1
        child = Forked(register, at)
        if os.WIFEXITED(child.wait()):
            completed = at
        table.recovery.look()
        assert table.processes.taken() == [table.index]
        assert table.recovery.audit() == []
        members = [Member.attach(table.name) for _ in range(3)]
        for member in members:
            member.leave()
    assert completed > 4


def test_exception_while_registering_leaves_no_row_behind(table: Member) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    for at in range(1, 20):
        with Steps(table, at, interrupt) as steps, contextlib.suppress(KeyboardInterrupt):
            index, _ = table.processes.register("client")
            break
        table.recovery.look()
        assert table.processes.taken() == [table.index]
    assert steps.count == at - 1 > 3
    table.lock_file.drop(FIRST_ROW + index)
    table.recovery.look()
    assert table.recovery.audit() == []


def test_fenced_process_finds_out_when_it_next_takes_a_stripe(table: Member, other: Member) -> None:
    sid = table.new()
    table.processes.fence(other.index)
    assert table.cells.row_state[other.index] & 0xFF == REAPING
    for call in (other.new, lambda: other.engine.address(sid)):
        with pytest.raises(ClosedError, match="attach again"):
            call()
    assert table.engine.address(sid) is not None
    with table.recovery.arbitrated(1.0):
        assert table.recovery.reap(other.index)
    with pytest.raises(ClosedError):
        other.new()
    assert table.recovery.audit() == []
    other.close()


def test_fencing_twice_or_a_free_row_changes_nothing(table: Member, other: Member) -> None:
    word = table.cells.row_state[other.index]
    table.processes.fence(other.index)
    fenced = table.cells.row_state[other.index]
    table.processes.fence(other.index)
    table.processes.fence(3)
    assert table.cells.row_state[other.index] == fenced == word & ~0xFF | REAPING
    assert table.cells.row_state[3] == 0
    table.cells.row_state[other.index] = word


def test_fenced_between_taking_and_looking_posts_the_token(table: Member, other: Member) -> None:
    if table.module.NAME != "py":
        pytest.skip("tests/test_engine_c.py has its twin")
    sid = table.new()
    stripe = (sid & 0xFFFFFFFF) // table.layout.block

    class FencedOnTheWay:
        """Fences its user at the moment it has the token."""

        def __init__(self) -> None:
            self.semaphore = table.semaphores.get(stripe, 1)

        def acquire(self, timeout: float) -> None:
            assert self.semaphore is not None
            self.semaphore.acquire(timeout)
            table.processes.fence(other.index)

        def release(self) -> None:
            assert self.semaphore is not None
            self.semaphore.release()

    other.semaphores._handles[stripe][1] = FencedOnTheWay()
    with pytest.raises(ClosedError):
        other.engine.address(sid)
    other.semaphores._handles[stripe].clear()
    assert not table.columns.claims[other.index].any()
    assert table.engine.address(sid) is not None
    other.close()
    table.recovery.look()


def test_epoch_never_becomes_zero(table: Member) -> None:
    table.cells.row_state[3] = ((1 << 47) - 1) << 8 | REAPING
    table.processes.free(3)
    assert table.cells.row_state[3] == 1 << 8 | FREE


# -- the whole runtime --------------------------------------------------------------------------


def test_two_runtimes_of_one_name_in_one_process(runtime: shmsock.Runtime) -> None:
    first = shmsock.Runtime.attach(runtime.name)
    with shmsock.Runtime.attach(runtime.name) as second:
        assert len({runtime.index, first.index, second.index}) == 3
        assert len(lock_descriptors()) == 1
        first.close()
        assert [info.index for info in second.processes()] == [runtime.index, second.index]
        assert all(info.alive for info in runtime.processes())
        for byte in (FIRST_ROW + runtime.index, FIRST_ROW + second.index):
            assert holder_seen_from_outside(runtime.name, byte) == os.getpid()
        assert holder_seen_from_outside(runtime.name, FIRST_ROW + first.index) == 0
    assert runtime.audit() == []


def test_creating_a_name_in_which_one_still_takes_part_is_refused(name: str) -> None:
    """F_GETLK never reports one's own locks: this process itself was the overlooked participant."""
    with Peer() as host:
        host.run(f"import shmsock; rt = shmsock.Runtime.create({name!r}, slots=8, processes=4)")
        member = shmsock.Runtime.attach(name)
        host.kill()
        with pytest.raises(AlreadyRunningError, match=str(os.getpid())):
            shmsock.Runtime.create(name)
        with pytest.raises(AlreadyRunningError, match=str(os.getpid())):
            shmsock.clean(name)
        assert member.audit() is not None
        member.close()
        assert shmsock.clean(name)
