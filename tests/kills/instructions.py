"""SIGKILL between two machine instructions, by ptrace: no debugger needed, ctypes does.

The child stops itself (SIGSTOP) before and after what is looked at; between, this process lets it
execute one instruction at a time and kills it after the k-th. A bytecode is hundreds of them, and
in one posix_ipc call lies the whole window between having the token and saying so.
"""

from __future__ import annotations

import collections.abc
import contextlib
import ctypes
import errno
import os
import signal

from shmsock.layout import OWN, WANT

from ..helpers import Forked, Member
from ..test_recovery import Operation
from .stage import DYING, Plan, Prepare, Stage, Tally, impatient

_TRACEME, _SINGLESTEP, _DETACH = 0, 9, 17
_ACQUIRE_EVERY, _RANDOM_A_KIND = 12, 6
# Two of each: who changes held, version, state, a word; without and with recycling.
WHOLE = ("create", "attach", "detach", "set_failed", "let_go_of_released", "take_turn")
_LONGEST = 40_000  # instructions, about; whoever has finished by then is no kill

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Stepped:
    """A child that stands before the first instruction of what it is to do."""

    def __init__(self, prepare: collections.abc.Callable[[], Operation]) -> None:
        def child() -> int:
            operation = prepare()
            _ptrace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            operation()
            os.kill(os.getpid(), signal.SIGSTOP)
            return 0

        self.child = Forked(child)
        status = os.waitpid(self.child.pid, 0)[1]
        if not os.WIFSTOPPED(status):
            self.child._status = status
            self.child.result()

    def step(self, count: int) -> int:
        """Execute instructions; returns how many it were until the end, at most ``count``."""
        pid, ptrace, wait = self.child.pid, _libc.ptrace, os.waitpid
        trapped = signal.SIGTRAP << 8 | 0x7F
        for done in range(count):
            ptrace(_SINGLESTEP, pid, None, None)
            status = wait(pid, 0)[1]
            if status != trapped:
                assert os.WIFSTOPPED(status), f"it ended by itself: {status}"
                assert os.WSTOPSIG(status) == signal.SIGSTOP, os.WSTOPSIG(status)
                return done
        return count

    def kill(self) -> None:
        self.child.kill()


def refused() -> str:
    """Why ptrace cannot be had here; empty if it can."""
    try:
        stepped = Stepped(lambda: lambda: None)
    except AssertionError as error:
        if "PermissionError" in str(error) or "OSError" in str(error):
            return "ptrace is not allowed here (seccomp, or kernel.yama.ptrace_scope)"
        raise
    try:
        if not stepped.step(5):
            return "ptrace cannot step here"
    except OSError as error:
        return f"ptrace cannot step here: {errno.errorcode.get(error.errno or 0)}"
    finally:
        stepped.kill()
    return ""


# -- what is stepped through --------------------------------------------------------------------


def _acquire(table: Member, sid: int) -> Operation:
    """WANT, acquire, OWN, as ``_attempt`` does it."""
    member = Member.attach(table.name, table.module)
    semaphore = member.semaphores.get(0, member.cells.ctl[0] >> 2)
    assert semaphore is not None
    claims, mine = member.cells.claims, member.index * member.layout.stripes
    generation = member.cells.ctl[0] >> 2
    claims[mine] = generation << 2 | WANT

    def acquire() -> None:
        semaphore.acquire(0)
        claims[mine] = generation << 2 | OWN

    return acquire


def _release(table: Member, sid: int) -> Operation:
    """Post, then clear, as ``_attempt`` does it."""
    member = Member.attach(table.name, table.module)
    semaphore = member.semaphores.get(0, member.cells.ctl[0] >> 2)
    assert semaphore is not None
    claims, mine = member.cells.claims, member.index * member.layout.stripes
    claims[mine] = member.cells.ctl[0] >> 2 << 2 | WANT
    semaphore.acquire(0)
    claims[mine] = member.cells.ctl[0] >> 2 << 2 | OWN

    def release() -> None:
        semaphore.release()
        claims[mine] = 0

    return release


def _count(stage: Stage, prepare: Prepare) -> int:
    """How many instructions there are from one mark to the other."""
    scene = stage.scene()
    stepped = Stepped(lambda: prepare(stage.table, scene.sid))
    count = stepped.step(10_000_000)
    stepped.kill()
    stage.table.recovery.look()
    scene.check("counted")
    return count


def _kill_after(stage: Stage, tally: Tally, what: str, prepare: Prepare, count: int) -> bool:
    """Returns whether it was in the middle."""
    done = -1
    with stage.trial(tally, f"{what} after {count} instructions"):
        scene = stage.scene()
        stepped = Stepped(lambda: prepare(stage.table, scene.sid))
        with contextlib.ExitStack() as stack:
            stack.callback(stepped.kill)
            done = stepped.step(count)
        stage.count_lost(tally)
        stage.table.recovery.look()
        scene.check(what)
    return done == count


def run(stage: Stage, plan: Plan) -> collections.abc.Iterator[Tally]:
    """Both semaphore calls by stride, whole transitions at random."""
    reason = refused()
    for what, prepare, must in (
        ("acquire", _acquire, ("tokens_lost", "ownerless", "retired", "reaped")),
        ("release", _release, ("tokens_lost", "retired", "reaped")),
    ):
        tally = Tally(f"instructions of {what}", must, skipped=reason)
        with tally.timed(), impatient():
            stride = _ACQUIRE_EVERY * plan.stride
            for at in () if reason else plan.positions(_count(stage, prepare), what, stride):
                _kill_after(stage, tally, what, prepare, at)
        yield tally
    tally = Tally("instructions of transitions", ("retired", "recounted", "reaped"), skipped=reason)
    random = plan.random(tally.kind)
    with tally.timed(), impatient():
        for what in () if reason else WHOLE:
            missing = max(1, _RANDOM_A_KIND // plan.stride)
            while missing and not tally.failures:
                at = random.randrange(_LONGEST)
                missing -= _kill_after(stage, tally, what, DYING[what], at)
    yield tally
