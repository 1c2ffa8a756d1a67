"""Killed, stopped or interrupted at every access to shared state: afterwards the books balance."""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import logging
import os
import re
import signal
import typing

import pytest

import shmsock
from shmsock import recovery as recovery_module
from shmsock.errors import ClosedError, StripeTimeoutError, TableFullError
from shmsock.layout import BROKEN, CLOSED, FREE, LIVE, OPEN, OPENING, OWN, REAPING, RECYCLING, WANT

from .helpers import Column, Forked, Member, Steps, die, wait_until

Operation = collections.abc.Callable[[], object]
SLOT = 0xFFFFFFFF
GONE, FAILED, ALIVE = shmsock.Status.GONE, shmsock.Status.FAILED, shmsock.Status.LIVE


# -- what is done while dying -------------------------------------------------------------------


def create(member: Member, sid: int) -> Operation:
    return lambda: member.new(peer=b"somebody", user_data=b"something")


def attach(member: Member, sid: int) -> Operation:
    return lambda: kept.append(member.engine.address(sid))


def detach(member: Member, sid: int) -> Operation:
    reference = member.engine.address(sid)
    assert reference is not None
    kept.append(reference)
    return typing.cast(Operation, reference.close)


def set_failed(member: Member, sid: int) -> Operation:
    return lambda: member.engine.set_failed(sid, 5, "killed here")


def set_failed_while_held(member: Member, sid: int) -> Operation:
    detach(member, sid)
    return set_failed(member, sid)


def release(member: Member, sid: int) -> Operation:
    return lambda: member.engine.release_additional_reference(sid)


def release_while_held(member: Member, sid: int) -> Operation:
    detach(member, sid)
    return release(member, sid)


def let_go_of_failed(member: Member, sid: int) -> Operation:
    let_go = detach(member, sid)
    member.engine.set_failed(sid, 5, "before")
    return let_go


def let_go_of_released(member: Member, sid: int) -> Operation:
    let_go = detach(member, sid)
    member.engine.release_additional_reference(sid)
    return let_go


def take_turn(member: Member, sid: int) -> Operation:
    return lambda: member.engine.take_turn(sid)


def give_turn(member: Member, sid: int) -> Operation:
    member.engine.take_turn(sid)
    return lambda: member.engine.give_turn(sid)


def change_owner(member: Member, sid: int) -> Operation:
    return lambda: member.engine.change_owner(sid, member.cells.owner[sid & SLOT], member.word)


def give_away(member: Member, sid: int) -> Operation:
    owner = member.cells.owner[sid & SLOT]
    member.engine.change_owner(sid, owner, member.word)
    return lambda: member.engine.change_owner(sid, member.word, owner)


def offer(member: Member, sid: int) -> Operation:
    owner = member.cells.owner[sid & SLOT]
    member.engine.change_owner(sid, owner, member.word)
    return lambda: member.engine.offer(sid, owner)


def withdraw(member: Member, sid: int) -> Operation:
    owner = member.cells.owner[sid & SLOT]
    member.engine.change_owner(sid, owner, member.word)
    member.engine.offer(sid, owner)
    return lambda: member.engine.withdraw(sid, owner)


def inherit(member: Member, sid: int) -> Operation:
    member.cells.heir[sid & SLOT] = member.word
    return lambda: member.engine.inherit(sid)


def set_user_data(member: Member, sid: int) -> Operation:
    return lambda: member.engine.set_user_data(sid, b"new")


def attach_and_die(table: Member, sid: int) -> None:
    attach(Member.attach(table.name, table.module), sid)()
    die()


kept: list[typing.Any] = []  # references that must outlive the operation

OPERATIONS = {
    operation.__name__: operation
    for operation in (
        create, attach, detach, set_failed, set_failed_while_held, release, release_while_held,
        let_go_of_failed, let_go_of_released, take_turn, give_turn, change_owner, give_away,
        set_user_data, offer, withdraw, inherit,
    )
}  # fmt: skip

# What the socket may be after its user was killed in an operation, and all was repaired.
OUTCOMES = {
    "create": {ALIVE},
    "attach": {ALIVE},
    "detach": {ALIVE},
    "take_turn": {ALIVE, FAILED, GONE},
    "give_turn": {ALIVE, FAILED, GONE},
    "change_owner": {ALIVE, FAILED, GONE},
    "give_away": {ALIVE, FAILED, GONE},
    "set_user_data": {ALIVE},
    "let_go_of_failed": {FAILED, GONE},
}


@pytest.fixture(autouse=True)
def nothing_kept() -> collections.abc.Iterator[None]:
    yield
    kept.clear()


def assert_sound(table: Member) -> None:
    """The books balance, each stripe has one token and can be taken, each slot can be used."""
    assert table.recovery.audit() == []
    for stripe, control in enumerate(table.cells.ctl):
        assert control & 3 == OPEN
        semaphore = table.semaphores.get(stripe, control >> 2)
        assert semaphore is not None
        assert semaphore.value == 1
        assert table.engine.run(stripe, lambda *_: 1, -1) == 1
    free = bytes(table.cells.state).count(FREE)
    fresh = [table.new() for _ in range(free)]
    with pytest.raises(TableFullError):
        table.new()
    for sid in fresh:
        with table.engine.address(sid) as reference:
            assert reference.id == sid
        assert table.engine.set_failed(sid, 1, "")
    assert bytes(table.cells.state).count(FREE) == free
    assert table.recovery.audit() == []


def live_sockets(member: Member) -> list[int]:
    """The ids of the sockets that a member owns."""
    return [
        member.version(slot) << 32 | slot
        for slot, word in enumerate(member.cells.owner)
        if word == member.word and member.cells.state[slot] == LIVE
    ]


def only_where_python_is_inside(table: Member) -> None:
    """Skip a test that interrupts or watches single stores; tests/test_engine_c.py has its twin."""
    if table.module.NAME != "py":
        pytest.skip("no Python runs inside a stripe of the C engine")


class Scene:
    """Two sockets of one stripe: one that is acted on, and one that must not notice."""

    def __init__(self, table: Member, *, held: bool) -> None:
        self.table = table
        self._free = bytes(table.cells.state).count(FREE)
        table.cells.hint[0] = table.cells.hint[1] = 0
        table.engine._next_stripe = -1
        self.sid = table.new(user_data=b"old")
        table.engine._next_stripe = -1
        self.bystander = table.new(peer=b"bystander")
        block = table.layout.block
        assert (self.sid & SLOT) // block == (self.bystander & SLOT) // block == 0
        self._references = [table.engine.address(self.bystander)]
        if held:
            self._references.append(table.engine.address(self.sid))

    def take_back(self, other: Member) -> None:
        """From a member that lives: its turn, and its being the owner."""
        other.engine.give_turn(self.sid)
        other.engine.change_owner(self.sid, other.word, self.table.word)

    def check(self, what: str) -> None:
        """After recovery."""
        table, engine = self.table, self.table.engine
        assert table.processes.dead() == []
        assert engine.status(self.bystander) is ALIVE
        assert table.nref(self.bystander) == 2
        status = engine.status(self.sid)
        if status is GONE:  # no life is skipped, and none comes again
            assert table.version(self.sid & SLOT) == (self.sid >> 32) + 2
        assert status in OUTCOMES.get(what, {ALIVE, FAILED, GONE})
        if what in ("take_turn", "give_turn") and status is FAILED:
            assert table.cells.error_code[self.sid & SLOT] == errno.EPIPE
        if status is not GONE:
            assert table.cells.heir[self.sid & SLOT] in [0, *table.processes.live_words()]
        if what in ("change_owner", "give_away", "offer", "inherit") and status is FAILED:
            assert table.cells.error_code[self.sid & SLOT] == errno.EOWNERDEAD
        if what == "set_user_data":
            selected = table.cells.selector[self.sid & SLOT] & 1
            assert table.columns.user_data[self.sid & SLOT, selected] in (b"old", b"new")
        assert_sound(table)
        while self._references:
            self._references.pop().close()
        engine.set_failed(self.sid, 1, "")
        assert engine.set_failed(self.bystander, 1, "")
        assert bytes(table.cells.state).count(FREE) == self._free
        assert_sound(table)


def at_every_step(
    table: Member, prepare: collections.abc.Callable[[Member], Operation], *, repairs: bool = False
) -> collections.abc.Iterator[int]:
    """Let a child die at its first access, then, anew, at its second, until it completes.

    In the C engine no access is Python's: there it dies at each kill point that it comes to.
    Repair is Python with either engine.
    """

    def child(at: int) -> None:
        member = Member.attach(table.name, table.module)
        operation = prepare(member)
        with Steps(member, at, die):
            operation()

    if table.module.NAME == "c" and not repairs:
        yield from at_every_kill_point(table, prepare)
        return

    for at in range(1, 500):
        with Forked(child, at) as victim:
            status = victim.wait()
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            yield 0
            assert at > 4
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield at
    raise AssertionError("the operation never completed")


def at_every_kill_point(
    table: Member, prepare: collections.abc.Callable[[Member], Operation]
) -> collections.abc.Iterator[int]:
    """Let a child die at each named kill point of the C engine, each time that it comes to it."""

    def child(point: str, times: int) -> None:
        operation = prepare(Member.attach(table.name, table.module))
        table.module.arm(point, signal.SIGKILL, times)
        operation()
        table.module.arm("none", 0)

    tried = 0
    for point in table.module.kill_points():
        for times in range(1, 100):
            with Forked(child, point, times) as victim:
                status = victim.wait()
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                yield 0
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            reached.add(point)
            tried += 1
            yield tried
    assert tried > 4


reached: set[str] = set()  # kill points of the C engine at which somebody died


# -- killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True], ids=["unheld", "held"])
@pytest.mark.parametrize("what", OPERATIONS)
def test_crash_anywhere_in(what: str, held: bool, table: Member) -> None:
    scene = Scene(table, held=held)

    def prepare(member: Member) -> Operation:
        return OPERATIONS[what](member, scene.sid)

    for _ in at_every_step(table, prepare):
        table.recovery.look()
        scene.check(what)
        scene = Scene(table, held=held)


@pytest.mark.parametrize("what", ["offer", "withdraw", "inherit"])
def test_killed_in_a_hand_over_an_idle_socket_is_an_orphan_or_still_owned(
    what: str, table: Member
) -> None:
    sid = table.new(on_owner_death=1)

    def prepare(member: Member) -> Operation:
        return OPERATIONS[what](member, sid)

    for _ in at_every_step(table, prepare):
        table.recovery.look()
        assert table.engine.status(sid) is ALIVE
        owner, heir = table.cells.owner[sid & SLOT], table.cells.heir[sid & SLOT]
        assert heir in (0, table.word)
        if heir:
            assert table.engine.inherit(sid)
        elif owner != table.word:
            assert owner not in table.processes.live_words()
            assert table.engine.change_owner(sid, owner, table.word)
        assert table.cells.owner[sid & SLOT] == table.word
        assert table.cells.heir[sid & SLOT] == 0
        assert table.engine.inherit(sid) == 0  # once
        assert_sound(table)


def test_an_offer_to_the_dead_is_cleared_by_whoever_reaps(table: Member) -> None:
    sid = table.new()

    def attach_and_be_offered() -> None:
        member = Member.attach(table.name, table.module)
        member.cells.heir[sid & SLOT] = member.word
        die()

    Forked(attach_and_be_offered).wait()
    assert table.cells.heir[sid & SLOT] != 0
    table.recovery.look()
    assert table.cells.heir[sid & SLOT] == 0
    assert table.cells.owner[sid & SLOT] == table.word
    assert_sound(table)


def test_every_kill_point_of_the_c_engine_was_reached(table: Member) -> None:
    if table.module.NAME != "c" or len(reached) < 2:
        pytest.skip("the tests above did not run with the C engine")
    # `withdrawn` needs another process in the way: tests/test_engine_c.py. Those of a write need a
    # runtime: tests/test_kill_points_writing.py.
    elsewhere = {"withdrawn", "message_sent", "message_counted"}
    assert set(table.module.kill_points()) - reached == elsewhere


@pytest.mark.parametrize("what", ["create", "detach", "set_failed", "release"])
def test_waiter_repairs_what_was_killed_inside_by_itself(what: str, table: Member) -> None:
    scene = Scene(table, held=True)

    def prepare(member: Member) -> Operation:
        return OPERATIONS[what](member, scene.sid)

    for _ in at_every_step(table, prepare):
        for stripe in range(table.layout.stripes):
            assert table.engine.run(stripe, lambda *_: 1, -1) == 1
        table.recovery.look()
        scene.check(what)
        scene = Scene(table, held=True)


def test_creating_passes_over_a_stripe_that_a_live_process_sits_in(
    table: Member, other: Member
) -> None:
    semaphore = table.semaphores.get(0, 1)
    assert semaphore is not None
    semaphore.acquire(0)
    other.cells.claims[other.index * 2] = 1 << 2 | OWN
    ids = [table.new() for _ in range(table.layout.block)]
    assert {(sid & SLOT) // table.layout.block for sid in ids} == {1}
    semaphore.release()
    other.cells.claims[other.index * 2] = 0
    assert_sound(table)


def test_killed_owner_fails_its_sockets_and_gives_everything_back(table: Member) -> None:
    mine = table.new()

    def own_hold_and_write() -> None:
        member = Member.attach(table.name, table.module)
        for _ in range(3):
            kept.append(member.engine.address(member.new()))
        kept.append(member.engine.address(mine))
        die()

    Forked(own_hold_and_write).wait()
    owned = [slot for slot in range(8) if table.cells.state[slot] == LIVE and slot != mine & SLOT]
    held = [table.engine.address(table.version(slot) << 32 | slot) for slot in owned]
    assert len(owned) == 3
    assert table.nref(mine) == 2
    table.recovery.look()
    assert table.nref(mine) == 1
    for slot, reference in zip(owned, held, strict=True):
        assert reference.failed
        assert table.cells.error_code[slot] == errno.EOWNERDEAD
        assert bytes(table.columns.error_text[slot]) == b"the owner process died"
        reference.close()
        assert table.cells.state[slot] == FREE
    assert_sound(table)


def test_dead_writer_fails_the_socket_it_was_writing_to(table: Member) -> None:
    sid, untouched = table.new(), table.new()

    def write() -> None:
        member = Member.attach(table.name, table.module)
        assert member.engine.take_turn(sid)
        die()

    Forked(write).wait()
    with table.engine.address(sid) as reference:
        table.recovery.look()
        assert reference.failed
        assert table.cells.error_code[sid & SLOT] == errno.EPIPE
    assert table.engine.status(untouched) is ALIVE
    assert_sound(table)


def test_reaping_twice_or_by_two_gives_nothing_back_twice(table: Member, other: Member) -> None:
    sid = table.new()
    reference = table.engine.address(sid)
    Forked(attach_and_die, table, sid).wait()
    (index,) = table.processes.dead()
    with table.recovery.arbitrated(1.0):
        assert table.recovery.reap(index)
        epoch = table.cells.row_state[index] >> 8
        assert other.processes.dead() == []
    other.recovery.look()
    assert table.cells.row_state[index] == epoch << 8 | FREE
    assert table.nref(sid) == 2
    reference.close()
    assert_sound(table)


def test_leaving_is_dying_with_less_to_do(table: Member, other: Member) -> None:
    sid, owned = table.new(), other.new()
    kept.append(other.engine.address(sid))
    assert table.nref(sid) == 2
    other.leave()
    assert table.nref(sid) == 1
    assert table.engine.status(owned) is GONE
    assert table.processes.taken() == [table.index]
    assert_sound(table)


# -- interrupted --------------------------------------------------------------------------------


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted_at_every_step(
    other: Member, gap: int, prepare: collections.abc.Callable[[], Operation]
) -> collections.abc.Iterator[bool]:
    """Raise at each access in turn, and with a gap once more so much later: in the handling."""
    for at in range(1, 500):
        operation = prepare()
        interrupted = False
        with Steps(other, {at, at + gap} if gap else at, interrupt) as steps:
            try:
                operation()
            except KeyboardInterrupt:
                interrupted = True
        del operation  # and with it the reference that it may have left open
        yield interrupted
        if not interrupted:
            assert steps.count < at
            return
    raise AssertionError("the operation never completed")


@pytest.mark.parametrize("gap", [0, 1, 2, 3], ids=["once", "again-1", "again-2", "again-3"])
@pytest.mark.parametrize("what", OPERATIONS)
def test_exception_anywhere_in(what: str, gap: int, table: Member, other: Member) -> None:
    """The one who raised lives: what it held, owned or wrote before stays its own."""
    owned = other.new()
    assert other.engine.take_turn(owned)
    hold = other.engine.address(owned)
    scene = Scene(table, held=True)

    def prepare() -> Operation:
        return OPERATIONS[what](other, scene.sid)

    for mended_by_itself in (True, False):
        for interrupted in interrupted_at_every_step(other, gap, prepare):
            kept.clear()
            if mended_by_itself:
                other.engine.run(0, lambda *_: 1, -1)
            other.recovery.look()  # what the timer does
            table.recovery.look()
            assert not other.columns.claims.any()
            scene.take_back(other)
            created = [sid for sid in live_sockets(other) if sid != owned]
            assert len(created) <= (what == "create" and (gap > 0 or not interrupted))
            for sid in created:
                other.engine.set_failed(sid, 1, "")
            assert other.engine.status(owned) is ALIVE
            assert other.cells.writer[owned & SLOT] == other.word
            assert other.nref(owned) == 2
            assert other.engine.held_slots() == [owned & SLOT]
            scene.check("interrupted")
            scene = Scene(table, held=True)
    scene.check("interrupted")
    hold.close()
    other.engine.set_failed(owned, 1, "")


def test_broken_claim_says_so_and_others_mend_it(table: Member, other: Member) -> None:
    only_where_python_is_inside(table)
    scene = Scene(table, held=False)
    with Steps(other, 4, interrupt), pytest.raises(KeyboardInterrupt):
        other.engine.set_failed(scene.sid, 1, "")
    claim = table.cells.claims[other.index * 2]
    assert claim & 3 == BROKEN
    assert claim >> 2 == table.cells.ctl[0] >> 2
    assert table.recovery.audit() == [f"stripe 0 was broken by process {other.index}"]
    assert table.engine.run(0, lambda *_: 1, -1) == 1  # waits, looks, retires
    assert table.cells.ctl[0] >> 2 == 2
    scene.check("interrupted")


def test_broken_process_keeps_what_it_holds_owns_and_writes(table: Member, other: Member) -> None:
    scene = Scene(table, held=False)
    assert table.engine.change_owner(scene.sid, table.word, other.word)
    assert other.engine.take_turn(scene.sid)
    reference = other.engine.address(scene.sid)
    table.cells.claims[other.index * 2] = 1 << 2 | BROKEN
    table.recovery.look()
    assert table.cells.claims[other.index * 2] == 0
    assert not reference.failed
    assert other.cells.held[(scene.sid & SLOT) * 4 + other.index] == 1
    assert table.nref(scene.sid) == 2
    assert other.engine.give_turn(scene.sid)
    assert other.engine.change_owner(scene.sid, other.word, table.word)
    reference.close()
    scene.check("interrupted")


def test_want_is_never_stored_over_a_leftover_claim(table: Member) -> None:
    """A stray OWN of ours would be hidden by WANT: it becomes BROKEN, and the stripe is retired."""
    only_where_python_is_inside(table)
    table.cells.claims[0] = 1 << 2 | OWN
    written = []

    class Watched(Column):
        def __setitem__(self, key: int, value: int) -> None:
            written.append((key, value & 3))
            self._column[key] = value

    table.cells.claims = typing.cast(typing.Any, Watched(table.cells.claims, lambda: None))
    assert table.engine.run(0, lambda *_: 1, -1) == 1
    table.cells.claims = typing.cast(Watched, table.cells.claims)._column
    assert written[:3] == [(0, BROKEN), (0, 0), (0, WANT)]
    assert table.cells.ctl[0] >> 2 == 2
    assert_sound(table)


def test_fenced_process_does_not_speak_for_the_next_tenant_of_its_row(
    table: Member, other: Member
) -> None:
    """It was inside take when it was fenced, reaped, and its row given to somebody else."""
    only_where_python_is_inside(table)
    sid = table.new()
    mine = other.index * table.layout.stripes + (sid & SLOT) // table.layout.block
    claims, row = table.cells.claims, other.cells.row_state[other.index]
    held = (sid & SLOT) * table.layout.processes + other.index

    class Watched(Column):
        def __setitem__(self, key: int, value: int) -> None:
            claims[key] = value
            if value & 3 == OWN:
                table.processes.fence(other.index)
            elif value == 0:  # the last store of the old tenant; the new one is inside
                table.cells.row_state[other.index] = row + (1 << 8)
                table.cells.held[held] = 1
                claims[key] = 1 << 2 | OWN

    before = other.cells.claims
    other.cells.claims = typing.cast(typing.Any, Watched(claims, lambda: None))
    with pytest.raises(ClosedError):
        other.engine.address(sid)
    other.cells.claims = before
    assert claims[mine] == 1 << 2 | OWN
    assert table.cells.held[held] == 1
    claims[mine] = table.cells.held[held] = 0
    table.cells.row_state[other.index] = row
    assert_sound(table)


def test_leftover_claim_of_an_idle_process_is_owned_up_to_by_its_timer(table: Member) -> None:
    for kind in (WANT, OWN):
        table.cells.claims[1] = table.cells.ctl[1] >> 2 << 2 | kind
        table.recovery.look()
        assert not table.columns.claims.any()
    assert table.cells.ctl[1] >> 2 == 3
    assert_sound(table)


def test_bad_arguments_do_not_break_a_stripe(table: Member) -> None:
    sid = table.new()
    before = table.bytes()
    for code in (1 << 31, -(1 << 31) - 1, 1 << 70):
        with pytest.raises(ValueError, match="32 bits"):
            table.engine.set_failed(sid, code, "")
    with pytest.raises(TypeError):
        table.engine.set_failed(sid, typing.cast(int, "5"), "")
    with pytest.raises((AttributeError, TypeError)):
        table.engine.set_failed(sid, 5, typing.cast(str, 5))
    assert table.bytes() == before
    assert table.engine.set_failed(sid, -1, "\ud800" + "ü" * 200)
    assert_sound(table)


# -- the repairer dies --------------------------------------------------------------------------


def make_a_mess(table: Member) -> None:
    """Half-done work of all kinds in stripe 0, and a claim that says so."""
    cells, processes = table.cells, table.layout.processes
    cells.state[0], cells.versioned_ref[0] = RECYCLING, cells.versioned_ref[0] | 1 << 32
    cells.state[1], cells.versioned_ref[1] = LIVE, cells.versioned_ref[1] & ~SLOT | 7
    cells.owner[1] = table.word
    cells.versioned_ref[2] = cells.versioned_ref[2] & ~SLOT | 1
    cells.state[3], cells.retired[3], cells.held[3 * processes] = LIVE, 1, 0
    cells.claims[table.index * table.layout.stripes] = cells.ctl[0] & ~3 | BROKEN


def tidy(table: Member) -> None:
    table.engine.set_failed(table.version(1) << 32 | 1, 1, "")


def test_crash_of_the_repairer_anywhere_in_retiring(table: Member) -> None:
    table.cells.claims[0] = 1 << 2 | BROKEN

    def repair(member: Member) -> Operation:
        return lambda: member.recovery.look()

    make_a_mess(table)
    for at in at_every_step(table, repair, repairs=True):
        if at:
            assert table.recovery.audit() != []
        table.recovery.look()
        assert table.cells.state[1] == LIVE
        tidy(table)
        assert not any(table.cells.state)
        assert_sound(table)
        make_a_mess(table)
    table.recovery.look()
    tidy(table)


def test_crash_of_the_reaper_anywhere_in_reaping(table: Member) -> None:
    scene = Scene(table, held=True)

    def reap(member: Member) -> Operation:
        def victim() -> None:
            dying = Member.attach(table.name, table.module)
            kept.extend([dying.engine.address(dying.new()), dying.engine.address(scene.sid)])
            assert dying.engine.take_turn(dying.new())
            if dying.module.NAME == "c":
                dying.module.arm("data_filled", signal.SIGKILL)
            with Steps(dying, 8, die):
                dying.engine.set_user_data(scene.sid, b"x")

        assert Forked(victim).wait() == signal.SIGKILL
        return lambda: member.recovery.look()

    for _ in at_every_step(table, reap, repairs=True):
        table.recovery.look()
        assert table.processes.taken() == [table.index]
        scene.check("attach")
        scene = Scene(table, held=True)


def test_crash_between_barrier_and_drain_leaves_the_stripe_closed_and_resumable(
    table: Member,
) -> None:
    table.semaphores.make(0, 2)
    table.cells.ctl[0] = 2 << 2 | CLOSED
    assert "stripe 0 is being retired" in table.recovery.audit()
    assert table.recovery.look()
    assert table.cells.ctl[0] == 2 << 2 | OPEN  # the same generation
    assert not os.path.exists(f"/dev/shm/sem.shmsock.{table.name}.0.1")
    assert_sound(table)


def test_crash_while_opening_is_retired_again(table: Member) -> None:
    """The token may have been posted or not: nobody can know, so nobody asks."""
    for posted in (False, True):
        generation = (table.cells.ctl[1] >> 2) + 1
        semaphore = table.semaphores.make(1, generation)
        assert semaphore is not None
        if posted:
            semaphore.release()
        table.cells.ctl[1] = generation << 2 | OPENING
        assert table.recovery.look()
        assert table.cells.ctl[1] == generation + 1 << 2 | OPEN
        assert_sound(table)


@pytest.mark.parametrize("when", ["before", "after"])
def test_token_of_a_retired_semaphore_is_worthless(when: str, table: Member, other: Member) -> None:
    """Two could be inside: whoever has a token looks again whether it still is the stripe's."""
    only_where_python_is_inside(table)
    old: typing.Any = other.semaphores.get(0, 1)
    claims = []

    class RetiredOnTheWay:
        def acquire(self, timeout: float) -> None:
            if when == "after":
                old.acquire(timeout)
            with table.recovery.arbitrated(1.0):
                assert table.recovery.retire(0)
            if when == "before":
                old.acquire(timeout)

    def inside(slot: int, _: object) -> int:
        claims.append(other.cells.claims[other.index * 2])
        return 1

    other.semaphores._handles[0][1] = RetiredOnTheWay()
    assert other.engine.run(0, inside, -1) == 1
    other.semaphores._handles[0].pop(1)
    assert claims == [2 << 2 | OWN]
    assert old.value == 0  # and it is never posted
    old.close()
    assert_sound(table)


@pytest.mark.parametrize("what", OPERATIONS)
def test_retiring_in_the_middle_of_an_operation_changes_nothing(
    what: str, table: Member, other: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every access of one process another takes it for stuck: a false alarm is harmless."""
    monkeypatch.setattr(recovery_module, "DRAIN_TIMEOUT_S", 0)

    def retire_all() -> None:
        with table.recovery.arbitrated(1.0) as arbiter:
            for stripe in range(table.layout.stripes) if arbiter else ():
                table.recovery.retire(stripe)

    for at in range(1, 500):
        scene = Scene(table, held=True)
        operation = OPERATIONS[what](other, scene.sid)
        with Steps(other, at, retire_all) as steps:
            operation()
        del operation
        kept.clear()
        scene.take_back(other)
        for sid in live_sockets(other):
            other.engine.set_failed(sid, 1, "")
        wait_until(lambda: table.recovery.look() and not any(c & 3 for c in table.cells.ctl))
        scene.check(what)
        if steps.count < at:
            return
    raise AssertionError("the operation never completed")


def test_closed_stripe_is_resumed_by_whoever_waits_for_it(table: Member) -> None:
    table.cells.ctl[0] = 2 << 2 | CLOSED
    assert table.engine.run(0, lambda *_: 1, -1) == 1
    assert_sound(table)


def test_false_alarm_costs_one_semaphore(table: Member, other: Member) -> None:
    scene = Scene(table, held=True)
    mine = other.engine.address(scene.sid)
    columns = ("versioned_ref", "state", "owner", "held", "writer")
    before = {name: getattr(table.columns, name).tolist() for name in columns}
    for _ in range(3):
        with table.recovery.arbitrated(1.0):
            assert table.recovery.retire(0)
    assert {name: getattr(table.columns, name).tolist() for name in columns} == before
    assert table.cells.ctl[0] >> 2 == 4
    mine.close()
    scene.check("attach")


def test_spare_semaphores_are_made_ahead_and_old_names_go(table: Member) -> None:
    with table.recovery.arbitrated(1.0):
        for _ in range(5):
            table.recovery.retire(0)
    pattern = re.compile(rf"sem\.shmsock\.{table.name}\.0\.(\d+)")
    found = {int(m[1]) for entry in os.listdir("/dev/shm") if (m := pattern.fullmatch(entry))}
    assert found == {6, 7, 8}


def test_reader_without_an_engine_can_repair(table: Member) -> None:
    scene = Scene(table, held=True)
    Forked(attach_and_die, table, scene.sid).wait()
    reader = recovery_module.Recovery(table.segment, table.processes, table.semaphores)
    assert reader.look()
    assert reader.counters["reaped"] == 1
    scene.check("attach")


# -- stopped ------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopped_inside(table: Member, stripe: int) -> collections.abc.Iterator[Forked]:
    """A live process that is stopped inside a stripe; on SIGCONT it finishes and waits."""

    def stop(member: Member) -> int:
        member.cells.bytes_in[0] = 1
        os.kill(os.getpid(), signal.SIGSTOP)
        member.cells.bytes_in[0] = 2
        return 1

    def child() -> None:
        member = Member.attach(table.name, table.module)
        member.engine.run(stripe, lambda *_: stop(member), -1)
        signal.pause()

    with Forked(child) as inside:
        os.waitid(os.P_PID, inside.pid, os.WSTOPPED)
        yield inside
    table.recovery.look()


def test_stopped_process_keeps_its_stripe_closed_and_is_named(
    table: Member, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_module, "DRAIN_TIMEOUT_S", 0.05)
    with stopped_inside(table, 0) as inside:
        table.cells.claims[0] = 1 << 2 | BROKEN  # a reason to retire
        with caplog.at_level(logging.ERROR, "shmsock"):
            table.recovery.look()
            table.recovery.look()
        assert table.cells.ctl[0] == 2 << 2 | CLOSED
        (message,) = [r.getMessage() for r in caplog.records if "stays closed" in r.getMessage()]
        assert f"pid {inside.pid}" in message
        assert "stripe 0" in message
        assert table.processes.dead() == []
        assert table.engine.run(1, lambda *_: 1, -1) == 1  # the others go on
        with pytest.raises(StripeTimeoutError, match=rf"stripe 0 .*pid {inside.pid}\) claims OWN"):
            table.engine.run(0, lambda *_: 1, -1, patience_s=0.1)
        inside.send_signal(signal.SIGCONT)
        wait_until(lambda: table.cells.bytes_in[0] == 2)
        wait_until(lambda: table.recovery.look() and table.cells.ctl[0] == 2 << 2 | OPEN)
    table.cells.bytes_in[0] = 0
    assert_sound(table)


def test_death_elsewhere_is_repaired_although_one_stripe_is_blocked(
    table: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_module, "DRAIN_TIMEOUT_S", 0.05)
    sids = [table.new() for _ in range(8)]
    by_stripe = {(sid & SLOT) // 4: sid for sid in sids}

    def hold_both() -> None:
        member = Member.attach(table.name, table.module)
        kept.extend(member.engine.address(sid) for sid in by_stripe.values())
        signal.pause()

    with contextlib.ExitStack() as stack:
        victim = stack.enter_context(Forked(hold_both))
        wait_until(lambda: all(table.nref(sid) == 2 for sid in by_stripe.values()))
        inside = stack.enter_context(stopped_inside(table, 0))
        victim.kill()
        table.recovery.look()
        assert table.nref(by_stripe[1]) == 1
        assert table.nref(by_stripe[0]) == 2
        assert table.cells.ctl[0] & 3 == CLOSED
        assert table.engine.set_failed(by_stripe[1], 1, "")
        inside.send_signal(signal.SIGCONT)
        wait_until(lambda: table.recovery.look() and table.cells.ctl[0] & 3 == OPEN)
        table.recovery.look()
        assert table.nref(by_stripe[0]) == 1
    for sid in sids:
        table.engine.set_failed(sid, 1, "")
    assert_sound(table)


def test_blocker_that_is_killed_no_longer_blocks(
    table: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_module, "DRAIN_TIMEOUT_S", 0.05)
    with stopped_inside(table, 1) as inside:
        table.cells.claims[1] = 1 << 2 | BROKEN
        table.recovery.look()
        assert table.cells.ctl[1] & 3 == CLOSED
        inside.kill()
        table.recovery.look()
        assert table.cells.ctl[1] & 3 == OPEN
    assert table.processes.taken() == [table.index]
    assert_sound(table)


def test_only_one_repairs_at_a_time(table: Member, other: Member) -> None:
    table.cells.claims[0] = 1 << 2 | BROKEN
    with other.recovery.arbitrated(1.0) as arbiter:
        assert arbiter
        assert not table.recovery.look()
        assert table.cells.ctl[0] == 1 << 2 | OPEN
    assert table.recovery.look()
    assert table.cells.ctl[0] == 2 << 2 | OPEN


# -- audit --------------------------------------------------------------------------------------


def _set(column: str, index: int, value: int) -> collections.abc.Callable[[Member], None]:
    def plant(table: Member) -> None:
        getattr(table.cells, column)[index] = value

    return plant


def _nref(slot: int, nref: int) -> collections.abc.Callable[[Member], None]:
    def plant(table: Member) -> None:
        table.cells.versioned_ref[slot] = table.cells.versioned_ref[slot] & ~SLOT | nref

    return plant


def _both(
    *plants: collections.abc.Callable[[Member], None],
) -> collections.abc.Callable[[Member], None]:
    def plant(table: Member) -> None:
        for each in plants:
            each(table)

    return plant


def _odd_and_free(table: Member) -> None:
    table.cells.versioned_ref[5] += 1 << 32


DEAD_ROW = _set("row_state", 2, 1 << 8 | LIVE)

# In these slot 0 is live and held once; slots 1 to 7 are free; only row 0 is taken.
PLANTS: dict[str, tuple[collections.abc.Callable[[Member], None], str]] = {
    "free-with-nref": (_nref(5, 1), r"slot 5 is FREE .* nref 1"),
    "free-and-odd": (_odd_and_free, r"slot 5 is FREE with version \d+[13579],"),
    "free-and-held": (_set("held", 5 * 4, 1), r"slot 5 is FREE .* 1 attached"),
    "nref-too-high": (_nref(0, 3), r"slot 0 has nref 3, its formula gives 2"),
    "nref-too-low": (_nref(0, 1), r"slot 0 has nref 1, its formula gives 2"),
    "nref-zero": (_nref(0, 0), r"slot 0 has nref 0"),
    "retired-not-counted": (_set("retired", 0, 1), r"slot 0 has nref 2, its formula gives 1"),
    "held-not-counted": (_set("held", 1, 1), r"slot 0 has nref 2, its formula gives 3"),
    "not-recycled": (
        _both(_set("retired", 0, 1), _set("held", 0, 0), _nref(0, 0)),
        r"slot 0 is held by nobody",
    ),
    "recycling": (_set("state", 0, RECYCLING), r"slot 0 is in the middle of recycling"),
    "unknown-state": (_set("state", 0, 9), r"slot 0 has state 9, which cannot be"),
    "owner-gone": (_set("owner", 0, 5 << 16 | 3), r"slot 0 is owned by process 3, which has left"),
    "owner-of-another-epoch": (_set("owner", 0, 9 << 16), r"slot 0 is owned by process 0"),
    "heir-gone": (_set("heir", 0, 5 << 16 | 2), r"slot 0 is to be inherited by process 2"),
    "heir-of-a-free-slot": (
        _set("heir", 1, 9 << 16),
        r"slot 1 is FREE with owner 0x0, writer 0x0, heir 0x90000",
    ),
    "writer-gone": (_set("writer", 0, 5 << 16 | 2), r"slot 0 is written by process 2"),
    "closed": (_set("ctl", 1, 1 << 2 | CLOSED), r"stripe 1 is being retired"),
    "opening": (_set("ctl", 1, 1 << 2 | OPENING), r"stripe 1 is being retired"),
    "broken": (_set("claims", 1, 1 << 2 | BROKEN), r"stripe 1 was broken by process 0"),
    "dead": (DEAD_ROW, r"process 2 \(pid \d+, \w+\) died and was not reaped"),
    "half-reaped": (_set("row_state", 2, 1 << 8 | REAPING), r"process 2 .* was not reaped"),
    "dead-inside": (
        _both(DEAD_ROW, _set("claims", 5, 1 << 2 | OWN)),
        r"stripe 1 is claimed by process 2, which died",
    ),
    "free-row-claims": (_set("claims", 7, 1 << 2 | WANT), r"process row 3 is FREE but still"),
    "free-row-holds": (
        _both(_set("held", 3, 1), _nref(0, 3)),
        r"process row 3 is FREE but still",
    ),
    "poisoned": (lambda table: table.segment.set("poisoned", 1), r"marked poisoned"),
}


@pytest.mark.parametrize("planted", PLANTS)
def test_audit_finds(planted: str, table: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    table.cells.hint[0] = 0
    table.engine._next_stripe = -1
    kept.append(table.engine.address(table.new()))
    assert kept[0].id & SLOT == 0
    assert table.recovery.audit() == []
    good = table.segment.map[:]
    plant, complaint = PLANTS[planted]
    plant(table)
    bad = table.segment.map[:]
    found = table.recovery.audit()
    assert table.segment.map[:] == bad  # it only looks
    assert any(re.search(complaint, line) for line in found), found
    table.segment.map[:] = good
    assert table.recovery.audit() == []


def test_recount_clears_a_living_heir_of_a_free_slot(table: Member) -> None:
    table.cells.heir[1] = table.engine.word
    assert any("slot 1 is FREE with" in line for line in table.recovery.audit())
    table.recovery.recount_in_turn(0)
    assert table.cells.heir[1] == 0
    assert table.recovery.audit() == []


def test_audit_of_a_moving_table_complains_of_nothing(table: Member) -> None:
    def churn() -> None:
        member = Member.attach(table.name, table.module)
        while True:
            sid = member.new()
            with member.engine.address(sid):
                member.engine.set_failed(sid, 1, "")

    with Forked(churn):
        wait_until(lambda: len(table.processes.taken()) == 2)
        for _ in range(50):
            assert table.recovery.audit() == []
    table.recovery.look()
    assert_sound(table)
