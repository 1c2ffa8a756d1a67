"""Versions over the wrap, and ids that are nobody's: never an exception, never a wrong socket."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
import typing

import hypothesis
import pytest
from hypothesis import strategies

import shmsock
from shmsock.layout import (
    FREE,
    LIVE,
    RECYCLING,
    SLOT_MASK,
    VERSION_LIMIT,
    Status,
    make_socket_id,
    recycled_version,
)

from .helpers import Forked, Member, Steps, connected, die, wait_until

LAST = VERSION_LIMIT - 2


def before_the_wrap(table: Member, lives: int = 0) -> None:
    """Put every free slot ``lives`` lives before its last version."""
    table.columns.versioned_ref[:] = LAST - 2 * lives << 32


def addresses_nothing(member: Member, sid: int) -> bool:
    """An id that is no live socket's does nothing at all, whatever is tried."""
    before = member.bytes()
    assert member.engine.address(sid) is None
    assert not member.engine.set_failed(sid, 1, "stale")
    assert not member.engine.release_additional_reference(sid)
    return member.bytes() == before


def test_ids_of_two_lives_back_address_nothing_over_the_wrap(table: Member) -> None:
    """Every id of the last eight lives of a slot, at every life, also beside a held reference."""
    before_the_wrap(table, lives=4)
    ids: dict[int, list[int]] = {slot: [] for slot in range(8)}
    for life in range(12):
        for sid in [table.new() for _ in range(8)]:
            slot = sid & SLOT_MASK
            with table.engine.address(sid) as reference:
                assert not reference.failed
                for stale in ids[slot]:
                    assert stale != sid
                    assert addresses_nothing(table, stale)
                    assert table.engine.address(stale, True) is None
                    assert table.engine.status(stale) is Status.GONE
                end = table.engine.set_failed if life % 2 else None
                assert end(sid, 1, "") if end else table.engine.release_additional_reference(sid)
            ids[slot].append(sid)
    for slot, seen in ids.items():
        versions = [sid >> 32 for sid in seen]
        assert versions == [LAST - 8 + 2 * n for n in range(5)] + [2 * n for n in range(1, 8)]
        assert table.version(slot) == 16
    assert table.recovery.audit() == []


@pytest.mark.parametrize("end", ["failed", "released", "released, then failed"])
def test_references_held_over_the_wrap_keep_the_last_version(
    table: Member, other: Member, end: str
) -> None:
    before_the_wrap(table)
    sid = table.new()
    slot = sid & SLOT_MASK
    references = [table.engine.address(sid), other.engine.address(sid), other.engine.address(sid)]
    if "released" in end:
        assert table.engine.release_additional_reference(sid)
        assert table.version(slot) == LAST
        assert table.engine.status(sid) is Status.LIVE
    if "failed" in end:
        assert other.engine.set_failed(sid, 5, "x")
        assert table.version(slot) == VERSION_LIMIT - 1
        assert table.engine.status(sid) is Status.FAILED
        with table.engine.address(sid, True) as again:
            assert again.failed
    # An id of the life to come is nobody's yet, and one that would be "version 0" never is.
    for version in (0, 1, 2, VERSION_LIMIT, VERSION_LIMIT + 2):
        assert addresses_nothing(table, make_socket_id(version, slot))
    assert table.nref(sid) == 2
    for reference in references:
        assert table.version(slot) in (LAST, VERSION_LIMIT - 1)
        reference.close()
    assert table.version(slot) == 2
    assert table.cells.state[slot] == FREE
    assert addresses_nothing(table, sid)
    assert table.recovery.audit() == []


@pytest.mark.parametrize("end", ["failed", "released"])
def test_crash_at_every_access_of_recycling_at_the_wrap_skips_no_life(
    table: Member, end: str
) -> None:
    """RECYCLING is killed at each store: whoever mends it comes to version 2, not 0 and not 4."""
    finished, recycling, least = 0, 0, 5
    places: list[typing.Any] = list(range(1, 60))
    if table.module.NAME == "c":  # at its kill points, and then at none
        places, least = [*table.module.kill_points(), "none"], 3
    for at in places:
        before_the_wrap(table)
        sid = table.new()

        def recycle(at: typing.Any = at, sid: int = sid) -> None:
            member = Member.attach(table.name, table.module)
            if table.module.NAME == "c":
                table.module.arm(at, signal.SIGKILL)
            with Steps(member, at, die) if isinstance(at, int) else contextlib.nullcontext():
                if end == "failed":
                    member.engine.set_failed(sid, 5, "x")
                else:
                    member.engine.release_additional_reference(sid)

        with Forked(recycle) as child:
            finished = os.WIFEXITED(child.wait())
        slot = sid & SLOT_MASK
        recycling += table.cells.state[slot] == RECYCLING
        table.recovery.look()
        if table.engine.status(sid) is Status.LIVE:  # killed before anything was true
            assert table.version(slot) == LAST
            assert table.engine.set_failed(sid, 5, "x")
        assert (table.version(slot), table.cells.state[slot]) == (2, FREE)
        assert table.nref(sid) == 0
        assert addresses_nothing(table, sid)
        assert table.recovery.audit() == []
        if finished and isinstance(at, int):
            break
    assert finished
    assert recycling > least


def test_the_next_version_is_even_never_0_and_below_2_31() -> None:
    for version in (1, 3, VERSION_LIMIT - 3, VERSION_LIMIT - 1, 0x55555555):
        following = recycled_version(version)
        assert following % 2 == 0
        assert 0 < following < VERSION_LIMIT
    assert recycled_version(VERSION_LIMIT - 1) == 2


def test_cached_descriptors_are_of_one_life_over_the_wrap(runtime: shmsock.Runtime) -> None:
    """The cache is keyed by id: at no life does a slot's next socket meet the last one's number."""
    runtime._segment.columns.versioned_ref[:] = LAST - 2 << 32
    for life in range(4 * 2):
        sids = []
        for _ in range(2):
            ours, peers = connected("unix")
            sid = runtime.create_socket(ours)
            sids.append((sid, peers))
        for sid, peers in sids:
            with runtime.address(sid) as reference:  # type: ignore[union-attr]
                reference.write(b"%d" % life)
            assert peers.recv(10) == b"%d" % life
            assert runtime.set_failed(sid)
            assert peers.recv(10) == b""
            assert runtime.address(sid) is None
            wait_until(lambda sid=sid: runtime._descriptors.peek(sid) is None)  # type: ignore[misc]
            peers.close()
    assert runtime.audit() == []


# -- ids that are nobody's ------------------------------------------------------------------------

IDS = strategies.one_of(
    strategies.integers(-(1 << 70), 1 << 70),
    strategies.builds(
        make_socket_id, strategies.integers(0, 1 << 32), strategies.integers(0, 1 << 32)
    ),
    strategies.builds(make_socket_id, strategies.integers(0, 20), strategies.integers(0, 10)),
)


@hypothesis.settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(sid=IDS)
def test_any_integer_is_an_id_that_addresses_its_socket_or_nothing(table: Member, sid: int) -> None:
    if not table.columns.state.any():
        before_the_wrap(table, lives=1)
        for _ in range(4):
            table.new()
    live = {
        make_socket_id(table.version(slot), slot)
        for slot in range(8)
        if table.cells.state[slot] == LIVE
    }
    if sid not in live:
        assert addresses_nothing(table, sid)
        assert table.engine.address(sid, True) is None
        assert table.engine.status(sid) is Status.GONE
    else:
        with table.engine.address(sid) as reference:
            assert reference.id == sid
    assert table.recovery.audit() == []


def churn(runtime: shmsock.Runtime, seed: int, until: int) -> int:
    """Create and end sockets; each greets with its own id, so whoever writes can be told."""
    rng = random.Random(seed)
    mine: list[tuple[int, socket.socket]] = []
    wrong = 0
    while os.stat(f"/proc/self/fd/{until}").st_size == 0 or mine:
        if len(mine) < 12 and os.fstat(until).st_size == 0:
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            with contextlib.suppress(shmsock.TableFullError):
                mine.append((runtime.create_socket(ours), theirs))
                continue
            theirs.close()
        sid, theirs = mine.pop(rng.randrange(len(mine)))
        runtime.set_failed(sid)
        received = b""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while chunk := theirs.recv(65536):
                received += chunk
        wrong += sum(received[at : at + 8] != sid.to_bytes(8) for at in range(0, len(received), 8))
        theirs.close()
    return wrong


def test_random_ids_against_a_churning_table_never_raise_nor_meet_another_socket(
    name: str,
) -> None:
    """Versions near the wrap, few slots, so that guesses often meet: what is addressed by an id
    gets that id as a message, and its peer receives no other."""
    end = os.memfd_create("end")
    with shmsock.Runtime.create(name, slots=24, stripes=3, processes=8) as runtime:
        runtime._segment.columns.versioned_ref[:] = LAST - 200 << 32
        rng = random.Random(3)
        met = tried = 0
        with Forked(churn, runtime, 1, end) as one, Forked(churn, runtime, 2, end) as two:
            wait_until(lambda: len(runtime.sockets()))
            deadline = time.monotonic() + 60
            seen: list[int] = []
            # Until enough was met: by chance alone, or near what the table shows.
            while (met < 150 or tried < 3000) and time.monotonic() < deadline:
                tried += 1
                if tried % 50 == 1:
                    seen = [*runtime.sockets()["id"].tolist(), *seen][:200]
                version = rng.choice([rng.randrange(1 << 31), *[sid >> 32 for sid in seen]])
                sid = make_socket_id(version + rng.choice((-2, 0, 0, 2)), rng.randrange(26))
                with contextlib.suppress(shmsock.SocketFailedError, shmsock.DescriptorError):
                    reference: typing.Any = runtime.address(sid)
                    if reference is not None:
                        with reference:
                            assert reference.id == sid
                            reference.write(sid.to_bytes(8))
                            met += 1
                runtime.status(sid)
                runtime.attached(max(sid, 0))
            os.write(end, b"!")
            assert one.result() == two.result() == 0
        assert met >= 150
        wait_until(lambda: len(runtime.processes()) == 1)
        assert runtime.in_use() == 0
        assert runtime.audit() == []
    os.close(end)
