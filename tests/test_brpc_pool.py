"""brpc's resource pool is our slot table: its tests, continued from ``test_brpc``."""

from __future__ import annotations

import random

import pytest

import shmsock
from shmsock.errors import TableFullError
from shmsock.layout import FREE

from .helpers import Member, connected

SLOT = 0xFFFFFFFF


def test_verify_get_values_are_kept_and_slots_are_exactly_those_there_are(table: Member) -> None:
    count = table.layout.slots
    sids = [table.new(user_data=b"%d" % number) for number in range(count)]
    assert sorted(sid & SLOT for sid in sids) == list(range(count))
    for number, sid in enumerate(sids):
        selector = table.cells.selector[sid & SLOT] & 1
        assert bytes(table.columns.user_data[sid & SLOT, selector]) == b"%d" % number
    with pytest.raises(TableFullError):
        table.new()


def test_what_cannot_be_created_takes_no_slot(name: str) -> None:
    """brpc's D4: a creation that failed went on, and failed the slot's next tenant."""
    with shmsock.Runtime.create(name, slots=1, stripes=1, processes=4) as runtime:
        bad, bad_peer = connected("unix")
        with bad, bad_peer:
            for wrong in ({"user_data": b"x" * 65}, {"owner": 3}, {"on_owner_death": "revive"}):
                with pytest.raises(ValueError):  # noqa: PT011
                    runtime.create_socket(bad, **wrong)
            ours, peers = connected("unix")
            with peers:
                sid = runtime.create_socket(ours)
                with pytest.raises(TableFullError):
                    runtime.create_socket(bad)
                assert bad.fileno() >= 0, "what was refused is still the caller's"
                assert runtime.status(sid) is shmsock.Status.LIVE
                reference = runtime.address(sid)
                assert reference is not None
                with reference:
                    reference.write(b"!")
                assert peers.recv(1) == b"!"


def test_get_and_return_shuffled_many_times_leaves_everything_free(table: Member) -> None:
    shuffled = random.Random(1)
    seen: set[int] = set()
    for _ in range(5):
        sids = [table.new() for _ in range(table.layout.slots)]
        assert not seen & set(sids)
        seen |= set(sids)
        shuffled.shuffle(sids)
        for sid in sids:
            assert table.engine.release_additional_reference(sid)
        assert bytes(table.cells.state) == bytes([FREE]) * table.layout.slots
    assert table.recovery.audit() == []
