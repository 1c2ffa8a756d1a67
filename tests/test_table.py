"""The slot table: brpc's versioned reference, shared by processes; its defects left behind."""

from __future__ import annotations

import collections.abc
import errno
import gc
import os
import random
import socket
import threading
import typing

import numpy as np
import pytest

import shmsock
from shmsock.errors import ClosedError, PoisonedError, StripeTimeoutError, TableFullError
from shmsock.layout import FREE, LIVE, VERSION_LIMIT, format_socket_id

from .helpers import Forked, Member, die, wait_until

SLOT = 0xFFFFFFFF
GONE, FAILED, ALIVE = shmsock.Status.GONE, shmsock.Status.FAILED, shmsock.Status.LIVE


def at_once(count: int, work: collections.abc.Callable[[int], object]) -> list[typing.Any]:
    """Results of ``work(i)`` in ``count`` forked processes that all start at the same moment."""
    gate, opener = os.pipe()

    def start(number: int) -> object:
        os.close(opener)
        os.read(gate, 1)
        return work(number)

    children = [Forked(start, number) for number in range(count)]
    os.close(opener)  # end of file for all of them
    results = [child.result() for child in children]
    os.close(gate)
    return results


def hold(runtime: shmsock.Runtime, sid: int) -> shmsock.SocketRef:
    reference = runtime.address(sid)
    assert reference is not None
    return reference


# -- the life of a socket -----------------------------------------------------------------------


def test_not_recycled_until_nref_is_zero(table: Member, other: Member) -> None:
    sid = table.new(peer=b"10.0.0.1:99")
    slot = sid & SLOT
    reference = other.engine.address(sid)
    assert reference is not None
    assert reference.id == sid
    assert not reference.failed
    assert table.engine.set_failed(sid, errno.ECONNRESET, "reset by peer")
    assert table.cells.state[slot] == LIVE
    assert reference.failed
    assert bytes(table.columns.peer[slot]) == b"10.0.0.1:99"
    reference.close()
    assert table.cells.state[slot] == FREE
    assert table.version(slot) == (sid >> 32) + 2
    assert table.engine.address(sid) is None
    assert other.engine.address(sid) is None


def test_nref_is_the_additional_reference_plus_the_attached_processes(
    table: Member, other: Member
) -> None:
    sid = table.new()
    assert table.nref(sid) == 1
    references = [table.engine.address(sid) for _ in range(5)]
    assert table.nref(sid) == 2
    references += [other.engine.address(sid) for _ in range(5)]
    assert table.nref(sid) == 3
    assert table.engine.set_failed(sid, 1, "")
    assert table.nref(sid) == 2
    random.shuffle(references)
    while references:
        references.pop().close()
    assert table.engine.status(sid) is GONE


def test_versioned_ref_with_id(table: Member) -> None:
    sid = table.new()
    taken = [0] * 8

    def work(number: int) -> None:
        for _ in range(300):
            with table.engine.address(sid) as reference:
                assert reference.id == sid
                taken[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 8 * 300
    assert table.nref(sid) == 1
    assert table.engine.held_slots() == []
    assert table.recovery.audit() == []
    assert table.engine.set_failed(sid, 1, "")
    assert table.engine.status(sid) is GONE


def test_processes_address_and_release_one_socket_and_the_count_balances(table: Member) -> None:
    sid = table.new()

    def work(_: int) -> int:
        member = Member.attach(table.name, table.module)
        taken = 0
        for _ in range(300):
            with member.engine.address(sid) as reference:
                assert not reference.failed
                taken += 1
        member.leave()
        return taken

    assert at_once(3, work) == [300] * 3
    assert table.nref(sid) == 1
    assert table.recovery.audit() == []


def test_references_cost_no_shared_store_while_one_is_held(table: Member) -> None:
    with table.engine.address(table.new()) as first:
        before = table.bytes()
        more = [table.engine.address(first.id), first.add_reference()]
        assert table.bytes() == before
        for reference in more:
            reference.close()
        assert table.bytes() == before


def test_exactly_one_of_many_processes_fails_a_socket(table: Member) -> None:
    sids = [table.new() for _ in range(8)]
    holds = [table.engine.address(sid) for sid in sids]

    def race(number: int) -> list[int]:
        member = Member.attach(table.name, table.module)
        won = [sid for sid in sids if member.engine.set_failed(sid, number + 1, f"by {number}")]
        member.leave()
        return won

    winners = at_once(3, race)
    assert sorted(sid for won in winners for sid in won) == sorted(sids)
    for hold, sid in zip(holds, sids, strict=True):
        (number,) = (n for n, won in enumerate(winners) if sid in won)
        assert table.cells.error_code[sid & SLOT] == number + 1
        assert bytes(table.columns.error_text[sid & SLOT]) == b"by %d" % number
        assert table.version(sid & SLOT) == (sid >> 32) + 1
        hold.close()
    assert not any(table.cells.state)


def test_exactly_one_of_many_threads_fails_a_socket(table: Member) -> None:
    for _ in range(20):
        sid = table.new()
        won: list[bool] = []

        def fail(sid: int = sid, won: list[bool] = won) -> None:
            won.append(bool(table.engine.set_failed(sid, 1, "")))

        threads = [threading.Thread(target=fail) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [False, False, False, True]


def test_address_after_failure_is_none_for_everybody(table: Member, other: Member) -> None:
    sid = table.new()
    with table.engine.address(sid), other.engine.address(sid):
        assert table.engine.set_failed(sid, 1, "")
        assert table.engine.address(sid) is None
        assert other.engine.address(sid) is None
        assert not other.engine.set_failed(sid, 2, "")
    assert table.engine.address(sid) is None


def test_address_failed_as_well_tells_live_failed_and_gone_apart(
    table: Member, other: Member
) -> None:
    sid = table.new()
    for member in (table, other):
        with member.engine.address(sid, True) as reference:
            assert not reference.failed
    hold = table.engine.address(sid)
    assert table.engine.status(sid) is ALIVE
    table.engine.set_failed(sid, 1, "")
    assert other.engine.status(sid) is FAILED
    with other.engine.address(sid, True) as reference:
        assert reference.failed
        assert table.nref(sid) == 2
    with table.engine.address(sid, True) as reference:
        assert reference.failed
    hold.close()
    assert table.engine.status(sid) is GONE
    assert table.engine.address(sid, True) is None


def test_graceful_release_keeps_it_addressable_until_the_last_one_lets_go(
    table: Member, other: Member
) -> None:
    sid = table.new()
    mine = table.engine.address(sid)
    assert table.engine.release_additional_reference(sid)
    assert not table.engine.release_additional_reference(sid)
    assert not other.engine.release_additional_reference(sid)
    assert table.engine.status(sid) is ALIVE
    theirs = other.engine.address(sid)
    mine.close()
    assert not theirs.failed
    assert table.nref(sid) == 1
    theirs.close()
    assert table.engine.status(sid) is GONE
    assert table.version(sid & SLOT) == (sid >> 32) + 2


def test_releasing_what_nobody_holds_recycles_at_once(table: Member) -> None:
    sid = table.new()
    assert table.engine.release_additional_reference(sid)
    assert table.engine.status(sid) is GONE
    assert table.recovery.audit() == []


def test_failing_after_release_and_releasing_after_failing(table: Member) -> None:
    first, second = table.new(), table.new()
    holds = [table.engine.address(first), table.engine.address(second)]
    assert table.engine.release_additional_reference(first)
    assert table.engine.set_failed(first, 1, "")
    assert table.engine.set_failed(second, 1, "")
    assert not table.engine.release_additional_reference(second)
    assert table.nref(first) == table.nref(second) == 1
    for hold in holds:
        hold.close()
    assert not any(table.cells.state)


def test_released_socket_is_recycled_although_a_stale_id_is_addressed_meanwhile(
    table: Member,
) -> None:
    """brpc's D1: a stale +1 made the release see 2 -> 1, and nobody recycled the slot."""
    stale = table.new()
    slot = stale & SLOT
    table.engine.set_failed(stale, 1, "")

    def address_stale() -> None:
        member = Member.attach(table.name, table.module)
        while True:
            assert member.engine.address(stale) is None
            assert member.engine.address(stale, True) is None

    with Forked(address_stale):
        wait_until(lambda: len(table.processes.taken()) == 2)
        for _ in range(300):
            table.cells.hint[slot // table.layout.block] = slot % table.layout.block
            table.engine._next_stripe = slot // table.layout.block - 1
            sid = table.new()
            reference = table.engine.address(sid)
            assert table.engine.release_additional_reference(sid)
            reference.close()
            assert table.engine.status(sid) is GONE
            assert table.cells.state[sid & SLOT] == FREE
    table.recovery.look()
    assert table.recovery.audit() == []


def test_error_fields_stay_while_the_socket_is_held(runtime: shmsock.Runtime) -> None:
    left, right = socket.socketpair()
    sid = runtime.create_socket(left, b"some data")
    with hold(runtime, sid) as reference:
        assert reference.error == (0, "")
        assert reference.peer.startswith("unix:")
        assert runtime.set_failed(sid, errno.ETIMEDOUT, "too slow: ü")
        assert reference.error == (errno.ETIMEDOUT, "too slow: ü")
        assert reference.user_data == b"some data"
        again = runtime.address_failed_as_well(sid)
        assert again is not None
        assert again.error == (errno.ETIMEDOUT, "too slow: ü")
        again.close()
        assert right.recv(1) == b""
    assert runtime.status(sid) is GONE
    assert runtime.address_failed_as_well(sid) is None
    right.close()


def test_next_life_starts_clean(table: Member) -> None:
    for _ in range(2):
        sid = table.new(user_data=b"first", peer=b"p" * 64, kind=2, inode=7)
        slot = sid & SLOT
        assert table.engine.set_user_data(sid, b"second")
        table.engine.take_turn(sid)
        table.cells.busy[slot] = 1
        table.cells.bytes_in[slot] = table.cells.messages_out[slot] = 9
        table.engine.set_failed(sid, 5, "text")
        table.cells.hint[slot // 4] = slot % 4
        table.engine._next_stripe = slot // 4 - 1
        again = table.new()
        assert again == sid + (2 << 32)
        for column in ("writer", "busy", "error_code", "bytes_in", "messages_out", "retired"):
            assert getattr(table.cells, column)[slot] == 0, column
        selected = table.cells.selector[slot] & 1
        assert table.columns.user_data[slot, selected] == b""
        assert table.columns.peer[slot] == table.columns.error_text[slot] == b""
        table.engine.set_failed(again, 1, "")


# -- ids that name nothing ----------------------------------------------------------------------


def strange_ids(table: Member) -> list[typing.Any]:
    live = table.new()
    gone = table.new()
    table.engine.set_failed(gone, 1, "")
    chance = random.Random(7)
    slots = table.layout.slots
    ids: list[typing.Any] = [
        0, -1, 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64,
        1 << 100, -(1 << 63), gone, gone + (2 << 32), live + (1 << 32), live + (2 << 32),
        live - (2 << 32), live + (1 << 63), live + (1 << 64), live & SLOT,
        live & ~SLOT | slots, live & ~SLOT | SLOT, VERSION_LIMIT << 32 | live & SLOT, -live,
    ]  # fmt: skip
    ids += [chance.getrandbits(64) for _ in range(200)]
    ids += [chance.getrandbits(31) << 32 | chance.randrange(slots) for _ in range(200)]
    return ids


def test_strange_ids_are_none_and_touch_nothing(table: Member, other: Member) -> None:
    ids = strange_ids(table)
    before = table.bytes()
    for sid in ids:
        for member in (table, other):
            assert member.engine.address(sid) is None, sid
            assert member.engine.address(sid, True) is None, sid
            assert member.engine.status(sid) is GONE, sid
            assert not member.engine.set_failed(sid, 1, "never"), sid
            assert not member.engine.release_additional_reference(sid), sid
    assert table.bytes() == before
    assert table.engine.held_slots() == []


def test_strange_ids_are_none_in_a_whole_runtime(runtime: shmsock.Runtime) -> None:
    left, right = socket.socketpair()
    sid = runtime.create_socket(left)
    chance = random.Random(7)
    for strange in [chance.getrandbits(64) for _ in range(500)] + [sid + (2 << 32), sid + 9, -sid]:
        assert runtime.address(strange) is None
        assert runtime.address_failed_as_well(strange) is None
        assert runtime.status(strange) is GONE
        assert not runtime.set_failed(strange, 1, "")
    assert runtime.audit() == []
    assert runtime.set_failed(sid)
    right.close()


@pytest.mark.parametrize("kind", [np.uint64, np.int64, np.array])
def test_ids_may_be_numpys(table: Member, kind: collections.abc.Callable[[int], object]) -> None:
    sid = table.new()
    for number, there in ((sid, True), (sid + (2 << 32), False)):
        strange = typing.cast(int, kind(number))
        assert (table.engine.address(strange) is not None) is there
        assert (table.engine.status(strange) is ALIVE) is there
    with table.engine.address(typing.cast(int, kind(sid))) as reference:
        assert type(reference.id) is int


def test_what_is_no_integer_is_a_type_error(table: Member) -> None:
    for wrong in (None, "1", 1.0, b"1", object()):
        with pytest.raises(TypeError):
            table.engine.address(typing.cast(int, wrong))


def test_every_id_of_a_reused_slot_is_its_own(table: Member) -> None:
    ids: list[int] = []
    for _ in range(60):
        sid = table.new()
        assert all(table.engine.address(stale) is None for stale in ids)
        assert all(table.engine.status(stale) is GONE for stale in ids)
        ids.append(sid)
        table.engine.set_failed(sid, 1, "")
    assert len(set(ids)) == 60
    for slot in range(8):
        versions = [sid >> 32 for sid in ids if sid & SLOT == slot]
        assert versions == list(range(versions[0], versions[0] + 2 * len(versions), 2))


# -- slots --------------------------------------------------------------------------------------


def test_reuse_goes_round(name: str, engine_module: typing.Any) -> None:
    table = Member.create(name, engine_module, slots=6, stripes=1)
    used = []
    for _ in range(12):
        sid = table.new()
        used.append(sid & SLOT)
        table.engine.set_failed(sid, 1, "")
    assert used == [0, 1, 2, 3, 4, 5] * 2
    table.leave()
    table.unlink()


def test_stripes_are_used_in_turn(table: Member) -> None:
    stripes = [(table.new() & SLOT) // table.layout.block for _ in range(8)]
    assert stripes in ([0, 1] * 4, [1, 0] * 4)


def test_full_table_names_the_option_and_recovers(table: Member, other: Member) -> None:
    sids = [table.new() for _ in range(8)]
    before = table.bytes()
    for member in (table, other):
        with pytest.raises(TableFullError, match=r"`slots`.*--slots"):
            member.new()
    assert table.bytes() == before
    table.engine.set_failed(sids[3], 1, "")
    assert other.new() == sids[3] + (2 << 32)


def test_failed_socket_that_is_held_keeps_its_slot(table: Member) -> None:
    sids = [table.new() for _ in range(8)]
    hold = table.engine.address(sids[0])
    table.engine.set_failed(sids[0], 1, "")
    with pytest.raises(TableFullError):
        table.new()
    hold.close()
    assert table.new() & SLOT == sids[0] & SLOT


def test_version_wraps_without_ever_being_zero_or_out_of_range(table: Member) -> None:
    table.columns.versioned_ref[:] = VERSION_LIMIT - 4 << 32
    seen: dict[int, list[int]] = {slot: [] for slot in range(8)}
    for _ in range(32):
        sid = table.new()
        assert 0 < sid < 1 << 63
        seen[sid & SLOT].append(sid >> 32)
        with table.engine.address(sid) as reference:
            assert table.engine.set_failed(sid, 1, "")
            assert reference.failed
            assert table.engine.status(sid) is FAILED
            with table.engine.address(sid, True) as again:
                assert again.id == sid
        assert table.engine.status(sid) is GONE
        assert table.engine.address(sid, True) is None
    last = VERSION_LIMIT - 2
    assert all(versions == [last - 2, last, 2, 4] for versions in seen.values())
    assert table.recovery.audit() == []


def test_released_socket_of_the_last_version_wraps_too(table: Member) -> None:
    table.columns.versioned_ref[:] = VERSION_LIMIT - 2 << 32
    sid = table.new()
    assert table.engine.release_additional_reference(sid)
    assert table.version(sid & SLOT) == 2
    assert table.recovery.audit() == []


def test_id_is_the_one_created_although_the_socket_fails_at_once(
    table: Member, other: Member
) -> None:
    """The version was once read again after the stripe: a kick in between gave a later life's."""
    if table.module.NAME != "py":
        pytest.skip("nothing can come between in the C engine")
    run = table.engine.run

    def run_then_somebody_fails_it(*args: typing.Any, **options: typing.Any) -> int:
        result = int(run(*args, **options))
        slot = args[3].slot
        assert other.engine.set_failed(table.version(slot) << 32 | slot, 1, "")
        return result

    table.engine.run = run_then_somebody_fails_it
    sid = table.new()
    del table.engine.run
    assert sid >> 32 == table.segment.get("first_version")
    assert table.engine.status(sid) is GONE


# -- references ---------------------------------------------------------------------------------


def test_references_end_by_gc_exception_del_with_and_close(table: Member) -> None:
    sid = table.new()

    def raise_while_holding() -> None:
        reference = table.engine.address(sid)
        assert reference is not None
        raise KeyError(reference.id)

    with pytest.raises(KeyError):
        raise_while_holding()
    gc.collect()
    assert table.nref(sid) == 1

    reference = table.engine.address(sid)
    assert table.nref(sid) == 2
    del reference
    assert table.nref(sid) == 1

    cycle: list[typing.Any] = [table.engine.address(sid)]
    cycle.append(cycle)
    assert table.nref(sid) == 2
    del cycle
    gc.collect()
    assert table.nref(sid) == 1

    with pytest.raises(KeyError), table.engine.address(sid):
        raise KeyError
    assert table.nref(sid) == 1

    table.engine.address(sid)
    assert table.nref(sid) == 1
    assert table.recovery.audit() == []


def test_closing_twice_gives_back_once(table: Member) -> None:
    sid = table.new()
    first, second = table.engine.address(sid), table.engine.address(sid)
    first.close()
    first.close()
    with first:
        pass
    del first
    assert table.nref(sid) == 2
    assert not second.closed
    assert not second.failed
    second.close()
    assert second.closed
    assert table.nref(sid) == 1


def test_closing_one_reference_from_many_threads_gives_back_once(table: Member) -> None:
    sid = table.new()
    for _ in range(20):
        keeper, shared = table.engine.address(sid), table.engine.address(sid)
        threads = [threading.Thread(target=shared.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert table.nref(sid) == 2
        keeper.close()
        assert table.nref(sid) == 1


def test_reference_may_be_added_while_one_is_open_also_after_failure(table: Member) -> None:
    sid = table.new()
    first = table.engine.address(sid)
    second = first.add_reference()
    table.engine.set_failed(sid, 1, "")
    first.close()
    third = second.add_reference()
    assert third.failed
    assert third.id == sid
    second.close()
    assert table.engine.status(sid) is FAILED
    third.close()
    assert table.engine.status(sid) is GONE


def test_reference_cannot_be_added_to_a_closed_one(table: Member) -> None:
    sid = table.new()
    closed, other_open = table.engine.address(sid), table.engine.address(sid)
    closed.close()
    before = table.bytes()
    with pytest.raises(ClosedError, match="address the socket again"):
        closed.add_reference()
    assert table.bytes() == before
    other_open.close()
    assert table.nref(sid) == 1


def test_reference_dropped_inside_a_stripe_is_given_back_after_it(table: Member) -> None:
    """A finaliser may run while its thread is inside: it must neither wait nor be forgotten."""
    sid = table.new()
    held = [table.engine.address(sid)]

    def drop(slot: int, _: object) -> int:
        held.clear()
        assert table.nref(sid) == 2
        return 1

    assert table.engine.run((sid & SLOT) // table.layout.block, drop, 0) == 1
    assert table.nref(sid) == 1
    assert table.engine.held_slots() == []


def test_reference_dropped_while_another_thread_is_inside_is_given_back(table: Member) -> None:
    sid = table.new()
    held = [table.engine.address(sid)]
    inside, leave = threading.Event(), threading.Event()

    def linger(slot: int, _: object) -> int:
        inside.set()
        leave.wait()
        return 1

    thread = threading.Thread(target=lambda: table.engine.run(0, linger, -1))
    thread.start()
    inside.wait()
    held.clear()
    assert table.nref(sid) == 2
    leave.set()
    thread.join()
    assert table.nref(sid) == 1


def test_reference_dropped_while_the_local_lock_is_had_for_a_moment_is_given_back(
    table: Member,
) -> None:
    """Or a failed socket would keep its slot until the next transition."""
    sid, fast = table.new(), table.new()
    kept = [table.engine.address(fast)]
    for use in (
        lambda: kept.append(table.engine.address(fast)),
        lambda: kept.append(kept[0].add_reference()),
        lambda: kept[2].close(),
        table.engine.drain,
    ):
        held = [table.engine.address(sid)]
        with table.engine.lock:
            held.clear()
        assert table.nref(sid) == 2
        use()
        assert table.nref(sid) == 1


def test_draining_never_waits_for_a_stripe(table: Member, other: Member) -> None:
    sid = table.new()
    stripe = (sid & SLOT) // table.layout.block
    held = [table.engine.address(sid)]
    semaphore = other.semaphores.get(stripe, 1)
    assert semaphore is not None
    semaphore.acquire(0)
    held.clear()
    table.engine.drain()
    assert table.engine.run(1 - stripe, lambda *_: 1, -1) == 1
    assert table.nref(sid) == 2
    semaphore.release()
    table.engine.drain()
    assert table.nref(sid) == 1


def test_forked_childs_inherited_references_are_inert(table: Member) -> None:
    sid = table.new()
    reference = table.engine.address(sid)
    before = table.bytes()

    def use() -> list[str]:
        table.engine.foreign = True  # what Runtime's fork handler stores
        errors = []
        for call in (
            reference.add_reference,
            lambda: table.engine.set_failed(sid, 1, ""),
            lambda: table.engine.take_turn(sid),
            lambda: table.engine.release_additional_reference(sid),
            lambda: table.engine.set_user_data(sid, b"x"),
            table.new,
        ):
            try:
                call()
            except ClosedError as error:
                errors.append(str(error))
        reference.close()
        return errors

    assert len(Forked(use).result()) == 6
    assert table.bytes() == before
    assert not reference.closed
    reference.close()
    assert table.nref(sid) == 1


def test_forked_child_may_not_act_in_its_parents_name(runtime: shmsock.Runtime) -> None:
    left, right = socket.socketpair()
    sid = runtime.create_socket(left)
    reference = hold(runtime, sid)

    def use() -> list[object]:
        refused = []
        for call in (
            lambda: reference.set_failed(1, "by a child"),
            reference.release_additional_reference,
            reference.add_reference,
        ):
            try:
                call()
            except ClosedError:
                refused.append(1)
        reference.close()
        # The child attaches on its own.
        with hold(runtime, sid) as mine:
            return [*refused, runtime.index, mine.failed, runtime.attached(sid)]

    assert Forked(use).result() == [1, 1, 1, 1, False, [0, 1]]
    runtime.repair()
    assert runtime.attached(sid) == [0]
    assert runtime.audit() == []
    reference.close()
    assert runtime.set_failed(sid)
    right.close()


# -- writer, owner, application data ------------------------------------------------------------


def test_write_turn_is_had_by_one_process_at_a_time(table: Member, other: Member) -> None:
    sid = table.new()
    assert table.engine.take_turn(sid)
    assert not other.engine.take_turn(sid)
    assert not table.engine.take_turn(sid)
    assert not other.engine.give_turn(sid)
    assert table.engine.give_turn(sid)
    assert not table.engine.give_turn(sid)
    assert other.engine.take_turn(sid)
    assert table.cells.writer[sid & SLOT] == other.word
    other.engine.give_turn(sid)


def test_failed_socket_has_no_turn_to_take_or_give(table: Member, other: Member) -> None:
    sid = table.new()
    assert table.engine.take_turn(sid)
    with table.engine.address(sid):
        table.engine.set_failed(sid, 1, "")
        assert not table.engine.give_turn(sid)
        assert not other.engine.take_turn(sid)
    again = table.new()
    assert not other.engine.take_turn(sid)
    assert table.cells.writer[again & SLOT] == 0


def test_owner_changes_only_from_the_expected_one_and_not_while_busy(
    table: Member, other: Member
) -> None:
    sid = table.new()
    slot = sid & SLOT
    assert not table.engine.change_owner(sid, other.word, table.word)
    table.cells.busy[slot] = 1
    assert not table.engine.change_owner(sid, table.word, other.word)
    assert table.cells.owner[slot] == table.word
    table.cells.busy[slot] = 0
    assert table.engine.change_owner(sid, table.word, other.word)
    assert table.cells.owner[slot] == other.word
    assert not table.engine.change_owner(sid, table.word, table.word)
    with table.engine.address(sid):
        table.engine.set_failed(sid, 1, "")
        assert not table.engine.change_owner(sid, other.word, table.word)
    assert not table.engine.change_owner(sid, 0, table.word)


def test_turns_of_racing_processes_never_overlap(table: Member) -> None:
    sid = table.new()
    slot = sid & SLOT

    def race(number: int) -> int:
        member, clashes = Member.attach(table.name, table.module), 0
        for _ in range(200):
            while not member.engine.take_turn(sid):
                pass
            member.cells.bytes_out[slot] = number + 1
            clashes += member.cells.bytes_out[slot] != number + 1
            member.cells.messages_out[slot] += 1
            member.engine.give_turn(sid)
        member.leave()
        return clashes

    assert at_once(3, race) == [0, 0, 0]
    assert table.cells.messages_out[slot] == 600


def test_user_data_is_never_seen_half_stored(runtime: shmsock.Runtime) -> None:
    """With one selector bit, a reader who copies while two stores pass finds it as it was."""
    left, right = socket.socketpair()
    sid = runtime.create_socket(left, b"a" * 64)

    def write() -> None:
        with hold(runtime, sid) as reference:
            for count in range(1 << 30):
                reference.user_data = b"%c" % (97 + count % 26) * (64 - count % 5)

    with Forked(write), hold(runtime, sid) as reference:
        seen = set()
        wait_until(lambda: reference.user_data != b"a" * 64)
        for _ in range(20_000):
            data = reference.user_data
            assert data == data[:1] * len(data)
            seen.add(data)
        assert len(seen) > 2
    runtime.repair()
    assert runtime.set_failed(sid)
    right.close()


def test_copy_that_two_stores_overtook_is_copied_again(runtime: shmsock.Runtime) -> None:
    left, right = socket.socketpair()
    sid = runtime.create_socket(left, b"old")
    slot = sid & SLOT
    columns = runtime._segment.columns
    with hold(runtime, sid) as reference:

        class Overtaken:
            """Lets two stores pass while the first copy is under way."""

            column: typing.Any = columns.user_data

            def __getitem__(self, place: tuple[int, int]) -> bytes:
                columns.user_data, Overtaken.column = Overtaken.column, None
                copied = bytes(columns.user_data[place])
                reference.user_data = b"newer"
                reference.user_data = b"newest"
                assert copied == b"old"
                return copied

        columns.user_data = typing.cast(typing.Any, Overtaken())
        assert reference.user_data == b"newest"
        assert Overtaken.column is None
        assert runtime._segment.cells.selector[slot] & 1 == 0
        runtime.set_failed(sid)
    right.close()


def test_user_data_of_a_failed_socket_cannot_be_stored(table: Member) -> None:
    sid = table.new(user_data=b"before")
    with table.engine.address(sid):
        table.engine.set_failed(sid, 1, "")
        assert not table.engine.set_user_data(sid, b"after")
        selected = table.cells.selector[sid & SLOT] & 1
        assert table.columns.user_data[sid & SLOT, selected] == b"before"


# -- participation ------------------------------------------------------------------------------


def test_poisoned_segment_says_so(table: Member) -> None:
    sid = table.new()
    table.segment.set("poisoned", 1)
    for call in (lambda: table.engine.address(sid), table.new):
        with pytest.raises(PoisonedError, match="restart"):
            call()
    table.segment.set("poisoned", 0)


def test_stripe_that_cannot_be_had_names_who_claims_it(table: Member, other: Member) -> None:
    semaphore = table.semaphores.get(1, 1)
    assert semaphore is not None
    semaphore.acquire(0)
    table.cells.claims[other.index * 2 + 1] = 1 << 2 | 2
    with pytest.raises(StripeTimeoutError, match=rf"stripe 1 .*pid {os.getpid()}\) claims OWN"):
        table.engine.run(1, lambda *_: 1, -1, patience_s=0.06)
    table.cells.claims[other.index * 2 + 1] = 0
    assert isinstance(StripeTimeoutError(), TimeoutError)
    semaphore.release()
    assert table.recovery.audit() == []


def test_dead_processes_references_come_back_once(table: Member) -> None:
    sid = table.new()

    def hold_and_die() -> None:
        member = Member.attach(table.name, table.module)
        references = [member.engine.address(sid) for _ in range(10)]
        assert references
        die()

    for _ in range(3):
        Forked(hold_and_die).wait()
        assert table.nref(sid) == 2
        table.recovery.look()
        assert table.nref(sid) == 1
    assert table.recovery.audit() == []


def test_reference_says_what_it_is(table: Member) -> None:
    sid = table.new()
    reference = table.engine.address(sid)
    text, kind = format_socket_id(sid), table.module.Reference.__name__
    assert repr(reference) == f"<{kind} {text} live>"
    table.engine.set_failed(sid, 1, "")
    assert repr(reference) == f"<{kind} {text} failed>"
    reference.close()
    assert repr(reference) == f"<{kind} {text} closed>"
