"""The table against a plain dictionary: hypothesis plays two participants at random."""

from __future__ import annotations

import dataclasses
import itertools
import os
import typing

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

import shmsock
from shmsock.errors import ClosedError, TableFullError
from shmsock.layout import FREE

from .helpers import Member

SLOTS, STRIPES = 5, 2
SLOT = 0xFFFFFFFF
_numbers = itertools.count()

who = st.integers(0, 1)


@dataclasses.dataclass
class Socket:
    """What the model knows of one socket."""

    owner: int
    failed: bool = False
    released: bool = False
    writer: int | None = None
    error: int = 0
    data: bytes = b""
    counts: list[int] = dataclasses.field(default_factory=lambda: [0, 0])

    @property
    def gone(self) -> bool:
        return (self.failed or self.released) and not any(self.counts)

    @property
    def nref(self) -> int:
        return (not self.failed and not self.released) + sum(map(bool, self.counts))


class Held(typing.NamedTuple):
    """A reference and whose it is."""

    member: int
    sid: int
    reference: typing.Any


class Table(RuleBasedStateMachine):
    """Every transition, in any order, by either participant."""

    sids = Bundle("sids")
    open = Bundle("open")
    closed = Bundle("closed")

    def __init__(self) -> None:
        super().__init__()
        name = f"m{os.getpid()}-{next(_numbers)}"
        first = Member.create(name, slots=SLOTS, stripes=STRIPES)
        self.slots = first.layout.slots
        self.members = (first, Member.attach(name))
        self.sockets: dict[int, Socket] = {}
        self.slot_versions: dict[int, int] = {}

    def engine(self, member: int) -> shmsock.engine.Engine:
        return typing.cast(shmsock.engine.Engine, self.members[member].engine)

    def teardown(self) -> None:
        for member in reversed(self.members):
            member.leave()
        self.members[0].unlink()

    @initialize(target=sids, halves=st.integers(1, (1 << 30) - 1), near_end=st.booleans())
    def start(self, halves: int, near_end: bool) -> typing.Any:
        """Begin anywhere, often next to where versions wrap."""
        version = (1 << 31) - 2 if near_end else 2 * halves
        self.members[0].columns.versioned_ref[:] = version << 32
        self.slot_versions = dict.fromkeys(range(self.slots), version)
        return multiple()

    def live(self, sid: int) -> Socket | None:
        socket = self.sockets.get(sid)
        return None if socket is None or socket.failed or socket.gone else socket

    def in_use(self) -> int:
        return sum(not socket.gone for socket in self.sockets.values())

    @rule(target=sids, member=who)
    def create(self, member: int) -> typing.Any:
        if self.in_use() == self.slots:
            try:
                self.members[member].new()
            except TableFullError:
                return multiple()
            raise AssertionError("more sockets than slots")
        sid = self.members[member].new(user_data=b"new")
        slot, version = sid & SLOT, sid >> 32
        assert sid not in self.sockets or self.sockets[sid].gone
        assert version == self.slot_versions[slot]
        self.slot_versions[slot] = (version + 2) % (1 << 31) or 2
        self.sockets[sid] = Socket(member, data=b"new")
        return sid

    @rule(target=open, member=who, sid=sids, failed_too=st.booleans())
    def address(self, member: int, sid: int, failed_too: bool) -> typing.Any:
        socket = self.sockets[sid]
        there = not socket.gone and (failed_too or not socket.failed)
        reference = self.engine(member).address(sid, failed_too)
        assert (reference is not None) is there
        if reference is None:
            return multiple()
        assert reference.id == sid
        socket.counts[member] += 1
        return Held(member, sid, reference)

    @rule(target=open, held=open)
    def add_reference(self, held: Held) -> Held:
        another = held.reference.add_reference()
        self.sockets[held.sid].counts[held.member] += 1
        return held._replace(reference=another)

    @rule(target=closed, held=consumes(open))
    def close(self, held: Held) -> Held:
        held.reference.close()
        self.sockets[held.sid].counts[held.member] -= 1
        return held

    @rule(held=closed)
    def close_again(self, held: Held) -> None:
        held.reference.close()
        try:
            held.reference.add_reference()
        except ClosedError:
            return
        raise AssertionError("a closed reference was multiplied")

    @rule(member=who, sid=sids, code=st.integers(1, 200))
    def set_failed(self, member: int, sid: int, code: int) -> None:
        socket = self.live(sid)
        won = self.engine(member).set_failed(sid, code, str(code))
        assert bool(won) is (socket is not None)
        if socket is not None:
            socket.failed, socket.error = True, code
            assert bool(won & shmsock.engine.RECYCLED) is socket.gone

    @rule(member=who, sid=sids)
    def release(self, member: int, sid: int) -> None:
        socket = self.live(sid)
        done = self.engine(member).release_additional_reference(sid)
        assert bool(done) is (socket is not None and not socket.released)
        if socket is not None:
            socket.released = True

    @rule(member=who, sid=sids)
    def take_turn(self, member: int, sid: int) -> None:
        socket = self.live(sid)
        taken = self.engine(member).take_turn(sid)
        assert bool(taken) is (socket is not None and socket.writer is None)
        if socket is not None and taken:
            socket.writer = member

    @rule(member=who, sid=sids)
    def give_turn(self, member: int, sid: int) -> None:
        socket = self.live(sid)
        given = self.engine(member).give_turn(sid)
        assert bool(given) is (socket is not None and socket.writer == member)
        if socket is not None and given:
            socket.writer = None

    @rule(giver=who, taker=who, sid=sids, busy=st.booleans())
    def change_owner(self, giver: int, taker: int, sid: int, busy: bool) -> None:
        socket = self.live(sid)
        if socket is not None:
            self.members[giver].cells.busy[sid & SLOT] = busy
        words = self.members[giver].word, self.members[taker].word
        changed = self.engine(taker).change_owner(sid, *words)
        assert bool(changed) is (socket is not None and socket.owner == giver and not busy)
        if socket is not None and changed:
            socket.owner = taker

    @rule(member=who, sid=sids, data=st.binary(max_size=64).map(lambda data: data.rstrip(b"\0")))
    def set_user_data(self, member: int, sid: int, data: bytes) -> None:
        socket = self.live(sid)
        assert bool(self.engine(member).set_user_data(sid, data)) is (socket is not None)
        if socket is not None:
            socket.data = data

    @rule(member=who, sid=sids, near=st.sampled_from((1 << 32, -2 << 32, 1 << 63, 100, -1 << 70)))
    def address_what_is_nothing(self, member: int, sid: int, near: int) -> None:
        strange = sid + near
        if strange not in self.sockets:
            assert self.engine(member).address(strange, True) is None
            assert not self.engine(member).set_failed(strange, 1, "")

    @precondition(lambda self: self.sockets)
    @rule(stripe=st.integers(0, STRIPES - 1), member=who)
    def retire(self, stripe: int, member: int) -> None:
        """A suspicion that is wrong changes nothing."""
        with self.members[member].recovery.arbitrated(1.0) as arbiter:
            assert arbiter
            assert self.members[member].recovery.retire(stripe)

    @invariant()
    def agrees_with_the_model(self) -> None:
        for sid, socket in self.sockets.items():
            status = self.engine(0).status(sid)
            if socket.gone:
                assert status is shmsock.Status.GONE
                continue
            assert status is (shmsock.Status.FAILED if socket.failed else shmsock.Status.LIVE)
            slot, first = sid & SLOT, self.members[0]
            assert first.nref(sid) == socket.nref
            assert first.columns.held[slot].tolist()[:2] == [bool(n) for n in socket.counts]
            assert [self.engine(m).count(slot) for m in (0, 1)] == socket.counts
            assert first.cells.owner[slot] == self.members[socket.owner].word
            assert first.columns.user_data[slot, first.cells.selector[slot] & 1] == socket.data
            if socket.failed:
                assert first.cells.error_code[slot] == socket.error

    @invariant()
    def slots_are_free_that_should_be(self) -> None:
        states = bytes(self.members[0].cells.state)
        assert states.count(FREE) == self.slots - self.in_use()

    @invariant()
    def audit_is_clean(self) -> None:
        assert self.members[0].recovery.audit() == []


TestTable = Table.TestCase
TestTable.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
