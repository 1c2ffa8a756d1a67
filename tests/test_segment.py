"""The mapping, its header, the semaphores' names: created, attached, refused."""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import mmap
import os
import resource
import stat

import numpy as np
import posix_ipc
import pytest

import shmsock
from shmsock.errors import FormatError, InTransitionError, RuntimeNotFoundError
from shmsock.layout import HEADER_WORDS, PAGE_BYTES, Layout
from shmsock.names import make_run_directory, names_on_machine, unlink_names
from shmsock.segment import Segment, check_name, run_directory
from shmsock.semaphores import Semaphores

from . import helpers
from .helpers import Forked, Member

SMALL = Layout.fit(8, 4, 2)


@contextlib.contextmanager
def foreign(name: str, content: bytes) -> collections.abc.Iterator[str]:
    """A shared-memory object of our name with somebody else's content."""
    path = f"/dev/shm/shmsock.{name}"
    with open(path, "wb") as file:
        file.write(content)
    try:
        yield path
    finally:
        os.unlink(path)


def test_attached_segment_is_the_same_memory(table: Member, other: Member) -> None:
    assert other.segment.total_bytes == table.segment.total_bytes
    for column, _, _, shape in SMALL.columns()[0]:
        assert getattr(other.columns, column).shape == shape
    table.cells.bytes_in[3] = 77
    assert other.columns.bytes_in[3] == 77
    assert table.segment.map is not other.segment.map


def test_columns_and_cells_are_the_same_memory(table: Member) -> None:
    for column, dtype, _, _ in SMALL.columns()[0]:
        if dtype.startswith("S"):
            continue
        cells = getattr(table.cells, column)
        cells[len(cells) - 1] = 1
        assert getattr(table.columns, column).reshape(-1)[-1] == 1, column
        cells[len(cells) - 1] = 0


def test_whole_segment_is_allocated_at_create(table: Member) -> None:
    status = os.stat(f"/dev/shm/shmsock.{table.name}")
    assert status.st_size == table.segment.total_bytes
    assert status.st_blocks * 512 >= status.st_size
    assert stat.S_IMODE(status.st_mode) == 0o600


def test_too_small_shared_memory_is_an_error_with_the_size_and_no_name_is_left(name: str) -> None:
    before = helpers.shared_names()
    with pytest.raises(OSError, match=r"--shm-size") as caught:
        Segment.create(name, Layout.fit(1 << 24, 1 << 15, 64), 1)
    assert caught.value.errno == errno.ENOSPC
    needed_mib = Layout.fit(1 << 24, 1 << 15, 64).columns()[1] >> 20
    assert f"{needed_mib} MiB" in str(caught.value)
    assert helpers.shared_names() == before


def test_runtime_that_does_not_fit_leaves_no_name(name: str) -> None:
    before = helpers.shared_names()
    with pytest.raises(OSError, match=r"--shm-size"):
        shmsock.Runtime.create(name, slots=1 << 24, processes=1 << 15)
    assert helpers.shared_names() == before
    with shmsock.Runtime.create(name, slots=8, processes=2, stripes=1) as made:
        assert made.audit() == []


def test_taken_name_is_refused_and_left_alone(table: Member) -> None:
    before = table.bytes()
    with pytest.raises(FileExistsError, match=table.name):
        Segment.create(table.name, SMALL, 1)
    assert table.bytes() == before


def test_absent_runtime_is_named_with_what_to_do(name: str) -> None:
    with pytest.raises(RuntimeNotFoundError, match=f"shmsock serve --name {name}"):
        Segment.attach(name)


@pytest.mark.parametrize(
    ("word", "value", "named"),
    [
        ("magic", 0x1234, "magic"),
        ("layout", 99, "layout"),
        ("total_bytes", 1 << 20, "total_bytes"),
        ("slots", 0, "slots"),
        ("slots", 100, "total_bytes"),
        ("slots", 9, "slots"),
        ("slots", 1 << 60, "slots"),
        ("processes", 0, "processes"),
        ("processes", 100, "total_bytes"),
        ("stripes", 0, "stripes"),
        ("stripes", 3, "stripes"),
        ("max_unwritten_bytes", 0, "max_unwritten_bytes"),
        ("first_version", 7, "first_version"),
        ("first_version", 0, "first_version"),
        ("first_version", 1 << 40, "first_version"),
        ("uid", 4_000_000, "uid"),
        ("poisoned", 2, "poisoned"),
        ("address_length", 1 << 32, "address_length"),
        ("init_done", 7, "init_done"),
    ],
)
def test_corrupted_header_is_refused_by_field_and_not_touched(
    table: Member, word: str, value: int, named: str
) -> None:
    good = table.segment.get(word)
    table.segment.set(word, value)
    before = table.bytes()
    with pytest.raises(FormatError, match=named):
        Segment.attach(table.name)
    assert table.bytes() == before
    table.segment.set(word, good)
    Segment.attach(table.name).close()


def test_segment_is_still_being_created_until_init_done(table: Member) -> None:
    table.segment.set("init_done", 0)
    with pytest.raises(InTransitionError):
        Segment.attach(table.name)
    table.segment.set("init_done", 1)


def test_no_prefix_of_creation_is_taken_for_another_format(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attacher that looks between any two header stores tries again instead of giving up."""
    seen = []
    store = Segment.set

    def look_then_store(self: Segment, word: str, value: int) -> None:
        seen.append(word)
        with pytest.raises(InTransitionError):
            Segment.attach(name)
        store(self, word, value)

    monkeypatch.setattr(Segment, "set", look_then_store)
    Segment.create(name, SMALL, 1).close()
    with pytest.raises(InTransitionError):
        Segment.attach(name)
    unlink_names(name)
    assert set(seen) == set(HEADER_WORDS) - {"poisoned", "address_length", "init_done"}


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (b"", InTransitionError, "still being created"),
        (bytes(PAGE_BYTES), InTransitionError, "still being created"),
        (b"short", FormatError, "5 bytes"),
        (bytes(PAGE_BYTES - 1), FormatError, "too short"),
        (b"a foreign file of another program, " * 200, FormatError, "magic"),
        (b"\xff" * (2 * PAGE_BYTES), FormatError, "magic"),
    ],
)
def test_foreign_object_is_refused_and_not_touched(
    name: str, content: bytes, error: type[Exception], said: str
) -> None:
    with foreign(name, content) as path:
        with pytest.raises(error, match=said):
            Segment.attach(name)
        with open(path, "rb") as file:
            assert file.read() == content


def test_truncated_segment_is_refused(table: Member) -> None:
    whole = table.bytes()
    for name, content in (("cut", whole[:-PAGE_BYTES]), ("long", whole + bytes(PAGE_BYTES))):
        name = f"{table.name}-{name}"
        with foreign(name, content), pytest.raises(FormatError, match="size"):
            Segment.attach(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_segment_of_another_user_is_refused(table: Member) -> None:
    path = f"/dev/shm/shmsock.{table.name}"
    os.chown(path, 12345, -1)
    before = table.bytes()
    with pytest.raises(PermissionError, match="12345"):
        Segment.attach(table.name)
    assert table.bytes() == before
    os.chown(path, os.geteuid(), -1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_cannot_attach(table: Member) -> None:
    def attach_as_nobody() -> str:
        os.setresuid(65534, 65534, 65534)
        try:
            Segment.attach(table.name)
        except PermissionError as error:
            return str(error)
        return "attached"

    assert "belongs to another user" in Forked(attach_as_nobody).result()


def test_ids_of_an_earlier_runtime_of_the_name_never_match(name: str) -> None:
    earlier: list[int] = []
    for _ in range(10):
        table = Member.create(name)
        ids = [table.new() for _ in range(table.layout.slots)]
        assert len(set(ids)) == table.layout.slots
        for sid in earlier:
            assert table.engine.address(sid) is None
            assert table.engine.address(sid, True) is None
            assert table.engine.status(sid) is shmsock.Status.GONE
            assert not table.engine.set_failed(sid, 1, "stale")
        earlier += ids
        table.leave()
        table.unlink()


def test_first_version_is_even_and_below_2_30(table: Member) -> None:
    first = table.segment.get("first_version")
    assert 2 <= first < 1 << 30
    assert first % 2 == 0
    assert set(np.unique(table.columns.versioned_ref).tolist()) == {first << 32}


def fill_descriptors() -> None:
    """Use up every descriptor this process may have."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    null = os.open("/dev/null", os.O_RDONLY)
    with contextlib.suppress(OSError):
        while True:
            os.dup(null)


def test_stripes_can_be_taken_and_retired_without_a_free_descriptor(table: Member) -> None:
    def work() -> list[object]:
        member = Member.attach(table.name, table.module)
        fill_descriptors()
        refused = False
        try:
            os.open("/dev/null", os.O_RDONLY)
        except OSError as error:
            refused = error.errno == errno.EMFILE
        ids = [member.new() for _ in range(member.layout.slots)]  # every stripe's semaphore
        with member.recovery.arbitrated(1.0) as arbiter:
            retired = [member.recovery.retire(stripe) for stripe in (0, 1, 0, 1, 0, 1)]
        member.engine.set_failed(ids[0], 1, "")
        return [refused, len(ids), arbiter, retired]

    assert Forked(work).result() == [True, table.layout.slots, True, [True] * 6]
    table.recovery.look()
    assert table.recovery.audit() == []
    assert table.new()


def test_retired_semaphore_is_gone_by_name_and_usable_by_those_who_have_it(table: Member) -> None:
    old = table.semaphores.get(0, 1)
    assert old is not None
    table.semaphores.unlink(0, 1)
    table.semaphores.unlink(0, 1)
    fresh = Semaphores(table.name, 2)
    assert fresh.get(0, 1) is None
    old.acquire(0)
    with pytest.raises(posix_ipc.BusyError):
        old.acquire(0)
    old.release()
    fresh.close()
    table.semaphores.forget_retired(0, 2)
    made = table.semaphores.make(0, 1, 1)
    assert made is not None
    made.acquire(0)
    made.release()


def test_making_an_existing_semaphore_opens_it_unless_it_has_another_value(table: Member) -> None:
    made = table.semaphores.make(0, 9, 0)
    assert made is not None
    again = Semaphores(table.name, 2)
    opened = again.make(0, 9, 0)
    assert opened is not None
    opened.release()
    assert made.value == 1, "one and the same"
    assert again.make(0, 9, 0) is None
    assert table.semaphores.make(0, 9, 0) is None
    again.close()
    table.semaphores.unlink(0, 9)


def test_control_address_is_published_whole(table: Member, other: Member) -> None:
    assert other.segment.control_address() == ""
    table.segment.publish_control_address("/a/longer/address")
    assert other.segment.control_address() == "/a/longer/address"
    table.segment.publish_control_address("/short")
    assert other.segment.control_address() == "/short"
    with pytest.raises(ValueError, match="longer than"):
        table.segment.publish_control_address("x" * 105)
    assert other.segment.control_address() == "/short"


def test_closed_segment_lets_its_mapping_go(table: Member) -> None:
    segment = Segment.attach(table.name)
    segment.close()
    with pytest.raises(ValueError, match=r"closed|invalid"):
        segment.map[0]
    assert isinstance(segment.map, mmap.mmap)


@pytest.mark.parametrize("wrong", ["", "a/b", ".", "a.b", "-a", "a" * 65, "a b", "ä", "a\n"])
def test_name_that_cannot_be_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="cannot name a runtime"):
        check_name(wrong)


def test_names_left_on_the_machine_are_found_and_removed(name: str) -> None:
    Segment.create(name, SMALL, 1).close()
    semaphores = Semaphores(name, 2)
    semaphores.make(1, 5, 0)
    semaphores.close()
    assert name in names_on_machine()
    unlink_names(name)
    assert name not in names_on_machine()
    unlink_names(name)


def test_removing_one_runtime_leaves_those_with_longer_names(name: str) -> None:
    Segment.create(f"{name}-b", SMALL, 1).close()
    unlink_names(name)
    assert f"{name}-b" in names_on_machine()
    unlink_names(f"{name}-b")


def test_run_directory_must_be_private_and_ours(name: str) -> None:
    path = run_directory(name)
    assert make_run_directory(name) == path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    os.chmod(path, 0o755)
    with pytest.raises(PermissionError, match="private"):
        make_run_directory(name)
    os.rmdir(path)
    os.symlink("/tmp", path)
    with pytest.raises(PermissionError, match="private"):
        make_run_directory(name)
    os.unlink(path)
