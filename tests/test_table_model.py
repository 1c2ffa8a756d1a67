"""The table against a plain dictionary: hypothesis plays two participants, and others who die.

Those who die are real processes: each attaches, does what it was told, and is killed with SIGKILL
while it holds, owns and writes. The model says what that leaves until it is reaped, and afterwards.

``pytest --hypothesis-profile=deep tests/test_table_model.py`` plays longer.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import errno
import importlib
import itertools
import json
import os
import re
import types
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

from .helpers import Forked, Member, die

SLOTS, STRIPES, ROWS = 5, 2, 4
SLOT = 0xFFFFFFFF
_numbers = itertools.count()

who = st.integers(0, 1)


@dataclasses.dataclass
class Socket:
    """What the model knows of one socket.

    Attributes:
        owner: A process's word, as in the table; likewise ``writer``.
        counts: References of the two that stay.
        mourned: Rows of the dead that were attached and were not recounted yet.
    """

    owner: int
    rehome: bool = False
    busy: bool = False
    failed: bool = False
    released: bool = False
    writer: int = 0
    error: int = 0
    data: bytes = b""
    counts: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    mourned: set[int] = dataclasses.field(default_factory=set)

    @property
    def gone(self) -> bool:
        return (self.failed or self.released) and not any(self.counts) and not self.mourned

    @property
    def nref(self) -> int:
        additional = not self.failed and not self.released
        return additional + sum(map(bool, self.counts)) + len(self.mourned)


class Held(typing.NamedTuple):
    """A reference and whose it is."""

    member: int
    sid: int
    reference: typing.Any


class Deed(typing.NamedTuple):
    """What somebody does before he dies: to a new socket, or to one of those there are."""

    what: str
    which: int
    rehome: bool
    busy: bool


DEEDS = st.builds(
    Deed,
    st.sampled_from(("create", "hold", "turn", "own", "fail", "release")),
    st.integers(0, 1 << 10),
    st.booleans(),
    st.booleans(),
)


def live_and_die(
    name: str, module: types.ModuleType, told: list[tuple[Deed, int, int]], report: int
) -> None:
    """In a child: take a row, do it all, say what came of it, and be killed with it in hand."""
    member = Member.attach(name, module)
    engine, word, kept = member.engine, member.word, []
    results: list[object] = []
    for deed, sid, owner in told:
        done: object = None
        if deed.what == "create":
            with contextlib.suppress(TableFullError):
                done = member.new(user_data=b"new", on_owner_death=int(deed.rehome))
        elif deed.what == "hold":
            kept.append(engine.address(sid, deed.busy))
            done = kept[-1] is not None
        elif deed.what == "turn":
            done = bool(engine.take_turn(sid))
        elif deed.what == "own":
            done = bool(engine.change_owner(sid, owner, word))
        elif deed.what == "fail":
            done = bool(engine.set_failed(sid, errno.ECONNABORTED, "by the late"))
        else:
            done = bool(engine.release_additional_reference(sid))
        if done and deed.busy and deed.what in ("create", "own"):
            slot = (int(typing.cast(int, done)) if deed.what == "create" else sid) & SLOT
            member.cells.busy[slot] = 1
        results.append(done)
    os.write(report, json.dumps([member.index, word, results]).encode())
    die()


class Table(RuleBasedStateMachine):
    """Every transition, in any order, by either participant, and by those who die."""

    modules: typing.ClassVar[tuple[types.ModuleType, types.ModuleType]]

    sids = Bundle("sids")
    open = Bundle("open")
    closed = Bundle("closed")

    def __init__(self) -> None:
        super().__init__()
        name = f"m{os.getpid()}-{next(_numbers)}"
        first = Member.create(name, self.modules[0], slots=SLOTS, processes=ROWS, stripes=STRIPES)
        self.slots, self.block = first.layout.slots, first.layout.block
        self.members = (first, Member.attach(name, self.modules[1]))
        self.words = [member.word for member in self.members]
        self.dead: dict[int, int] = {}  # row, word
        self.fenced: set[int] = set()
        self.sockets: dict[int, Socket] = {}
        self.slot_versions: dict[int, int] = {}

    def engine(self, member: int) -> shmsock.engine.Engine:
        return typing.cast(shmsock.engine.Engine, self.members[member].engine)

    def teardown(self) -> None:
        self.members[0].recovery.look()
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

    def sid_made(self, sid: int, socket: Socket) -> None:
        slot, version = sid & SLOT, sid >> 32
        assert sid not in self.sockets or self.sockets[sid].gone
        assert version == self.slot_versions[slot]
        self.slot_versions[slot] = (version + 2) % (1 << 31) or 2
        self.sockets[sid] = socket

    @rule(target=sids, member=who, rehome=st.booleans())
    def create(self, member: int, rehome: bool) -> typing.Any:
        if self.in_use() == self.slots:
            try:
                self.members[member].new()
            except TableFullError:
                return multiple()
            raise AssertionError("more sockets than slots")
        sid = self.members[member].new(user_data=b"new", on_owner_death=int(rehome))
        self.sid_made(sid, Socket(self.words[member], rehome, data=b"new"))
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
        assert bool(taken) is (socket is not None and not socket.writer)
        if socket is not None and taken:
            socket.writer = self.words[member]

    @rule(member=who, sid=sids)
    def give_turn(self, member: int, sid: int) -> None:
        socket = self.live(sid)
        given = self.engine(member).give_turn(sid)
        assert bool(given) is (socket is not None and socket.writer == self.words[member])
        if socket is not None and given:
            socket.writer = 0

    @rule(giver=who, taker=who, sid=sids, busy=st.booleans())
    def change_owner(self, giver: int, taker: int, sid: int, busy: bool) -> None:
        socket = self.live(sid)
        words = self.words[giver], self.words[taker]
        if socket is not None and socket.owner == words[0]:  # its owner's to say
            self.members[giver].cells.busy[sid & SLOT] = socket.busy = busy
        changed = self.engine(taker).change_owner(sid, *words)
        right = socket is not None and socket.owner == words[0] and not socket.busy
        assert bool(changed) is right
        if socket is not None and changed:
            socket.owner = words[1]

    @rule(taker=who, sid=sids)
    def take_from_whoever_owns_it(self, taker: int, sid: int) -> None:
        """Also from the dead: how an idle socket goes on elsewhere."""
        socket = self.live(sid)
        expected = self.sockets[sid].owner
        changed = self.engine(taker).change_owner(sid, expected, self.words[taker])
        assert bool(changed) is (socket is not None and not socket.busy)
        if socket is not None and changed:
            socket.owner = self.words[taker]

    # -- death ------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.dead) < ROWS - 2)
    @rule(target=sids, deeds=st.lists(DEEDS, min_size=1, max_size=6))
    def somebody_lives_and_is_killed(self, deeds: list[Deed]) -> typing.Any:
        known = list(self.sockets)
        told = []
        for deed in deeds if known else [deed for deed in deeds if deed.what == "create"]:
            sid = known[deed.which % len(known)] if known else 0
            told.append((deed, sid, self.sockets[sid].owner if known else 0))
        read, write = os.pipe()
        with Forked(live_and_die, self.members[0].name, self.modules[1], told, write) as child:
            os.close(write)
            with os.fdopen(read) as report:
                said = report.read()
            assert os.WIFSIGNALED(child.wait()), said
        index, word, results = json.loads(said)
        self.dead[index] = word
        return multiple(*self._believe(told, index, word, results))

    def _believe(
        self, told: list[tuple[Deed, int, int]], index: int, word: int, results: list[typing.Any]
    ) -> collections.abc.Iterator[int]:
        """Check what the late said against the model, and enter it; gives the new ids."""
        for (deed, sid, owner), done in zip(told, results, strict=True):
            if deed.what == "create":
                assert (done is None) is (self.in_use() == self.slots)
                if done is not None:
                    self.sid_made(done, Socket(word, deed.rehome, deed.busy, data=b"new"))
                    yield done
                continue
            socket, live = self.sockets[sid], self.live(sid)
            if deed.what == "hold":
                assert done is (not socket.gone and (deed.busy or not socket.failed))
                socket.mourned |= {index} if done else set()
                continue
            right = (
                live is not None
                and {
                    "turn": not socket.writer,
                    "own": socket.owner == owner and not socket.busy,
                    "fail": True,
                    "release": not socket.released,
                }[deed.what]
            )
            assert done is right, deed
            if done and deed.what == "turn":
                socket.writer = word
            elif done and deed.what == "own":
                socket.owner, socket.busy = word, deed.busy
            elif done and deed.what == "fail":
                socket.failed, socket.error = True, errno.ECONNABORTED
            elif done:
                socket.released = True

    def recounted(self, stripes: collections.abc.Collection[int]) -> None:
        """What a recount of these stripes makes of what the fenced left."""
        gone = {self.dead[index] for index in self.fenced}
        for sid, socket in self.sockets.items():
            if socket.gone or (sid & SLOT) // self.block not in stripes:
                continue
            socket.mourned -= self.fenced
            if not socket.failed and socket.writer in gone:
                socket.failed, socket.error = True, errno.EPIPE
            elif not socket.failed and socket.owner in gone and (socket.busy or not socket.rehome):
                socket.failed, socket.error = True, errno.EOWNERDEAD

    @precondition(lambda self: self.dead)
    @rule(member=who)
    def look_for_the_dead(self, member: int) -> None:
        assert self.members[member].recovery.look()
        for index, word in sorted(self.dead.items()):
            touched = {
                (sid & SLOT) // self.block
                for sid, socket in self.sockets.items()
                if not socket.gone
                and (index in socket.mourned or word in (socket.owner, socket.writer))
            }
            self.fenced.add(index)
            self.recounted(touched)
        self.dead.clear()
        self.fenced.clear()

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
        """A suspicion that is wrong changes nothing; a right one, what the dead left there."""
        with self.members[member].recovery.arbitrated(1.0) as arbiter:
            assert arbiter
            assert self.members[member].recovery.retire(stripe)
        self.fenced |= set(self.dead)
        self.recounted({stripe})

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
            held = {i: bool(n) for i, n in enumerate(socket.counts)}
            held |= {row: row in socket.mourned for row in range(2, ROWS)}
            assert dict(enumerate(first.columns.held[slot].tolist())) == held
            assert [self.engine(m).count(slot) for m in (0, 1)] == socket.counts
            assert first.cells.owner[slot] == socket.owner
            assert first.cells.writer[slot] == socket.writer or socket.failed
            assert first.columns.user_data[slot, first.cells.selector[slot] & 1] == socket.data
            if socket.failed:
                assert first.cells.error_code[slot] == socket.error

    @invariant()
    def slots_are_free_that_should_be(self) -> None:
        states = bytes(self.members[0].cells.state)
        assert states.count(FREE) == self.slots - self.in_use()

    @invariant()
    def audit_is_clean(self) -> None:
        found = self.members[0].recovery.audit() if not self.dead else self.audit_once()
        assert found == []

    def audit_once(self) -> list[str]:
        """The complaints, without those about the dead that nobody has looked for yet."""
        mourning = re.compile(r"died and was not reaped|process \d+, which has left")
        found = self.members[0].recovery.auditor.look()
        return [breach.text for breach in found if not mourning.search(breach.text)]


def _pairs() -> list[tuple[types.ModuleType, types.ModuleType]]:
    """Each engine with itself, and both on one segment where there are two.

    With SHMSOCK_ENGINE, as CI runs it for each: those of which this one is the first.
    """
    modules = [importlib.import_module("shmsock._engine_py")]
    with contextlib.suppress(ImportError):
        modules.insert(0, importlib.import_module("shmsock._engine_c"))
    pairs = itertools.combinations_with_replacement(modules, 2)
    wanted = os.environ.get("SHMSOCK_ENGINE") or "c py"
    return [pair for pair in pairs if pair[0].NAME in wanted.split()]


DEEP = settings.default is not None and settings.default.max_examples >= 1000

for _pair in _pairs():
    _named = "".join(module.NAME.title() for module in _pair)
    _machine: typing.Any = type(f"Table{_named}", (Table,), {"modules": _pair})
    _case = _machine.TestCase
    _case.settings = settings(
        max_examples=5000 if DEEP else 100,
        stateful_step_count=100 if DEEP else 40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    globals()[f"TestTable{_named}"] = _case
    del _case
