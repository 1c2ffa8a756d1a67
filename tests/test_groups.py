"""Groups: membership, LMDB across forks and deaths, and Redis's globs."""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import logging
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from re import _constants as re_constants  # type: ignore[attr-defined]
from re import _parser as re_parser  # type: ignore[attr-defined]

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmsock import group_store as groups_module
from shmsock.errors import (
    ClosedError,
    DescriptorError,
    OverCrowdedError,
    ShmsockError,
    SocketFailedError,
)
from shmsock.groups import Groups, GroupsFullError, compile_glob, escape_glob

LONG = b"x" * 600


class Table:
    """The runtime of these tests: ids that live until they are failed, and what was written."""

    def __init__(self, *live: int) -> None:
        self.live = set(live)
        self.written: list[tuple[int, bytes]] = []
        self.raises: dict[int, Exception] = {}
        self.open_references = 0

    def is_live(self, sid: int) -> bool:
        return sid in self.live

    def address(self, sid: int) -> TableReference | None:
        return TableReference(self, sid) if sid in self.live else None


class TableReference:
    def __init__(self, table: Table, sid: int) -> None:
        self.table, self.sid = table, sid
        table.open_references += 1

    def write(self, *buffers: bytes | bytearray | memoryview) -> None:
        if self.sid in self.table.raises:
            raise self.table.raises[self.sid]
        self.table.written.append((self.sid, b"".join(bytes(buffer) for buffer in buffers)))

    def close(self) -> None:
        self.table.open_references -= 1


def below_1000(sid: int) -> bool:
    return 0 < sid < 1000


def in_every_process(directory: str, map_size_bytes: int = 1 << 30) -> Groups:
    """Groups whose ids live, in any process, while they are below 1,000."""
    return Groups(directory, lambda sid: None, below_1000, map_size_bytes=map_size_bytes)


@pytest.fixture(params=["disk", "shm"])
def directory(request: pytest.FixtureRequest) -> collections.abc.Iterator[str]:
    path = tempfile.mkdtemp(dir="/dev/shm" if request.param == "shm" else None)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def shm() -> collections.abc.Iterator[str]:
    path = tempfile.mkdtemp(dir="/dev/shm")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def table() -> Table:
    return Table(*range(1, 1000))


@pytest.fixture
def groups(shm: str, table: Table) -> collections.abc.Iterator[Groups]:
    with contextlib.closing(Groups(shm, table.address, table.is_live)) as made:
        yield made
    assert table.open_references == 0


def in_fork(work: collections.abc.Callable[[], object]) -> int:
    """Run it in a fork child; returns the wait status, 0 if it returned."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def add_or_fail(groups: Groups, sid: int) -> None:
    assert groups.add("news", sid)


def in_spawn(target: collections.abc.Callable[..., None], *arguments: object) -> int | None:
    """Run a function of this module in a spawned process; returns its exit code."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    process.join()
    code = process.exitcode
    process.close()
    return code


def open_files(directory: str) -> list[str]:
    links = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
    return [link for link in links if link.startswith(directory)]


def stored_rows(directory: str) -> dict[str, int]:
    """How many entries each database holds, read past the library."""
    path = os.path.join(directory, "groups.mdb")
    with lmdb.open(path, subdir=False, max_dbs=3, map_size=1 << 30) as env:
        names = ("members", "groups_of", "long_names")
        databases = {name: env.open_db(name.encode(), create=False) for name in names}
        with env.begin() as txn:
            return {name: txn.stat(database)["entries"] for name, database in databases.items()}


# ---------------------------------------------------------------------------------- membership


def test_what_was_added_is_listed_until_it_is_discarded(directory: str) -> None:
    with contextlib.closing(in_every_process(directory)) as groups:
        assert groups.add("news", 7)
        assert groups.add(b"news", 3)
        assert not groups.add("news", 7)
        assert groups.members("news") == [3, 7]
        assert groups.count("news") == 2
        assert groups.discard("news", 7)
        assert not groups.discard("news", 7)
        assert groups.members("news") == [3]
        assert groups.members("other") == []


def test_an_id_that_is_not_live_is_refused_and_nothing_is_stored(shm: str) -> None:
    with contextlib.closing(Groups(shm, lambda sid: None, lambda sid: False)) as groups:
        for sid in (0, -1, 5, 1 << 63, 1 << 64, 1 << 80):
            assert not groups.add("news", sid)
            assert not groups.discard("news", sid)
            assert groups.discard_everywhere(sid) == 0
        groups.members("news")
    assert set(stored_rows(shm).values()) == {0}


def test_an_id_that_fails_while_it_is_added_is_not_stored(shm: str) -> None:
    answers = iter([True, False])  # before the transaction, inside it
    groups = Groups(shm, lambda sid: None, lambda sid: next(answers))
    assert not groups.add("news", 1)
    groups.close()
    assert set(stored_rows(shm).values()) == {0}


def test_the_largest_ids_keep_their_order(shm: str) -> None:
    groups = Groups(shm, lambda sid: None, lambda sid: True)
    ids = [1, 255, 256, 1 << 32, (1 << 62) + 17, (1 << 63) - 1]
    for sid in reversed(ids):
        assert groups.add("news", sid)
    assert groups.members("news") == ids
    groups.close()


@pytest.mark.parametrize("length", [0, 1, 477, 478, 479, 480, 510, 511, 512, 5_000, 100_000])
def test_names_of_any_length_work(groups: Groups, length: int) -> None:
    name = b"x" * length
    assert groups.add(name, 1)
    assert groups.members(name) == [1]
    assert groups.names() == [name]
    assert groups.names_of(1) == [name]
    assert groups.names_of(2) == groups.names_of(0) == groups.names_of(1 << 70) == []
    assert groups.names(escape_glob(name[:4000]) + b"*") == [name]
    assert groups.discard(name, 1)
    assert groups.names() == groups.names_of(1) == []


def test_long_names_that_begin_alike_are_different_groups(groups: Groups) -> None:
    names = [LONG + b"b", LONG, LONG + b"a", LONG[:478], LONG[:479], b"x", b"y" + LONG]
    for sid, name in enumerate(names, 1):
        assert groups.add(name, sid)
    assert [groups.members(name) for name in names] == [[sid] for sid in range(1, 8)]
    assert groups.names(b"x*") == sorted(name for name in names if name[:1] == b"x")
    assert groups.names(LONG + b"*") == [LONG, LONG + b"a", LONG + b"b"]
    assert groups.names(LONG + b"?") == [LONG + b"a", LONG + b"b"]


def test_the_full_name_of_a_long_group_goes_with_its_last_member(shm: str) -> None:
    groups = in_every_process(shm)
    groups.add(LONG, 1)
    groups.add(LONG, 2)
    groups.discard(LONG, 1)
    assert groups.names() == [LONG]
    groups.discard(LONG, 2)
    groups.close()
    assert stored_rows(shm) == {"members": 0, "groups_of": 0, "long_names": 0}


def test_binary_and_unicode_names_are_kept(groups: Groups) -> None:
    for name in (b"\x00", b"\xff\xfe", b"a\x00b", "café"):
        assert groups.add(name, 1)
    assert groups.names() == sorted([b"\x00", b"\xff\xfe", b"a\x00b", "café".encode()])
    assert groups.names("caf?*") == ["café".encode()]


def test_names_lists_what_matches_and_has_a_live_member(groups: Groups, table: Table) -> None:
    for sid, name in enumerate((b"user:1", b"user:2", b"user:30", b"use", b"v", b""), 1):
        groups.add(name, sid)
    assert groups.names() == [b"", b"use", b"user:1", b"user:2", b"user:30", b"v"]
    assert groups.names(b"user:?") == [b"user:1", b"user:2"]
    assert groups.names(b"user:1") == [b"user:1"]
    assert groups.names(rb"u\se[r]:*0") == [b"user:30"]
    assert groups.names(b"") == [b""]
    assert groups.names(b"w*") == []
    table.live.discard(2)
    assert groups.names(b"user:?") == [b"user:1"]
    table.live -= {1, 4}
    assert groups.names(b"u*") == [b"user:30"]


def test_a_pattern_with_a_literal_prefix_looks_at_that_range_only(shm: str, table: Table) -> None:
    asked: list[int] = []

    def is_live(sid: int) -> bool:
        asked.append(sid)
        return True

    groups = Groups(shm, table.address, is_live)
    for sid, name in enumerate((b"a1", b"b1", b"b2", b"c1"), 1):
        groups.add(name, sid)
    asked.clear()
    assert groups.names(b"b*") == [b"b1", b"b2"]
    assert asked == [2, 3]
    groups.close()


def test_discard_everywhere_takes_one_id_out_of_all_groups(groups: Groups) -> None:
    for number in range(600):  # more than one batch
        groups.add(f"room {number}", 1)
    groups.add(LONG, 1)
    groups.add("room 7", 2)
    assert groups.discard_everywhere(1) == 601
    assert groups.discard_everywhere(1) == 0
    assert groups.names() == [b"room 7"]
    assert groups.members("room 7") == [2]


# ---------------------------------------------------------------------------------- stale ids


def test_stale_ids_are_dropped_when_members_meets_them(shm: str, table: Table) -> None:
    groups = Groups(shm, table.address, table.is_live)
    for sid in (1, 2, 3):
        groups.add("news", sid)
        groups.add(LONG, sid)
    table.live -= {1, 3}
    assert groups.members("news") == [2]
    table.live -= {2}
    assert groups.members(LONG) == []
    groups.close()
    assert stored_rows(shm) == {"members": 1, "groups_of": 1, "long_names": 0}


def test_stale_ids_are_dropped_when_names_and_broadcast_meet_them(shm: str, table: Table) -> None:
    groups = Groups(shm, table.address, table.is_live)
    for sid in (1, 2, 3):
        groups.add("a", sid)
        groups.add("b", sid)
        groups.add("c", sid)
    table.live -= {1, 2, 3}
    assert groups.names(b"a") == []
    assert groups.broadcast("b", b"x") == 0
    groups.close()
    assert stored_rows(shm)["members"] == 3


def test_an_id_is_looked_at_again_before_it_is_dropped(shm: str, table: Table) -> None:
    groups = Groups(shm, lambda sid: None, table.is_live)  # address refuses what is live
    groups.add("news", 1)
    assert groups.broadcast("news", b"x") == 0
    assert groups.members("news") == [1]
    groups.close()


def test_a_reader_answers_although_it_cannot_drop_what_is_stale(
    groups: Groups, table: Table, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    groups.add("news", 1)
    groups.add("news", 2)
    table.live.discard(1)

    def refuse(operation: object) -> int:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(groups, "_write", refuse)
    assert groups.members("news") == [2]
    assert "1 stale members stay" in caplog.text


# ---------------------------------------------------------------------------------- broadcast


def test_broadcast_writes_one_message_to_every_live_member(groups: Groups, table: Table) -> None:
    for sid in (1, 2, 3):
        groups.add("news", sid)
    groups.add("other", 4)
    table.live.discard(2)
    assert groups.broadcast("news", b"head", memoryview(b"body")) == 2
    assert table.written == [(1, b"headbody"), (3, b"headbody")]
    assert groups.broadcast("nobody", b"x") == 0


def test_what_one_member_raises_never_hurts_the_others(
    groups: Groups, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    for sid in range(1, 9):
        groups.add("news", sid)
    table.raises = {
        1: OverCrowdedError("full"),
        2: SocketFailedError(errno.EPIPE, "gone"),
        3: OSError(errno.EMFILE, "no descriptor"),
        4: DescriptorError("too late"),
        5: OverCrowdedError("full"),
    }
    with caplog.at_level(logging.WARNING, "shmsock"):
        assert groups.broadcast("news", b"x") == 3
    assert [sid for sid, _ in table.written] == [6, 7, 8]
    crowded = [record for record in caplog.records if "too slowly" in record.getMessage()]
    assert len(crowded) == 1
    assert crowded[0].levelno == logging.WARNING
    assert "2 members" in crowded[0].getMessage()
    assert groups.members("news") == list(range(1, 9))


def test_what_is_nobodys_failure_is_not_swallowed(groups: Groups, table: Table) -> None:
    groups.add("news", 1)
    table.raises = {1: ClosedError("left the runtime")}
    with pytest.raises(ClosedError):
        groups.broadcast("news", b"x")


def test_descriptors_are_fetched_in_one_go_before_the_first_write(shm: str, table: Table) -> None:
    fetched: list[tuple[list[int], int]] = []

    def fetch(sids: collections.abc.Sequence[int]) -> None:
        fetched.append((list(sids), len(table.written)))
        raise OSError(errno.EMFILE, "some other time")

    groups = Groups(shm, table.address, table.is_live, fetch)
    groups.broadcast("news", b"x")
    groups.add("news", 1)
    groups.add("news", 2)
    assert groups.broadcast("news", b"x") == 2
    assert fetched == [([1, 2], 0)]
    groups.close()


# ---------------------------------------------------------------------------------- the environment


def test_the_files_are_private_and_inside_the_directory(shm: str) -> None:
    with contextlib.closing(in_every_process(shm)) as groups:
        groups.add("news", 1)
        for name in ("groups.mdb", "groups.mdb-lock"):
            assert stat.S_IMODE(os.stat(os.path.join(shm, name)).st_mode) == 0o600
        assert sorted(os.listdir(shm)) == ["groups.mdb", "groups.mdb-lock"]


def test_the_whole_lock_file_is_allocated(shm: str) -> None:
    """LMDB maps it writable: a hole on a full /dev/shm would be SIGBUS."""
    with contextlib.closing(in_every_process(shm)) as groups:
        groups.add("news", 1)
        status = os.stat(os.path.join(shm, "groups.mdb-lock"))
        assert status.st_blocks * 512 >= status.st_size >= 64 * 512


def test_nothing_is_opened_before_the_first_use(shm: str) -> None:
    groups = in_every_process(shm)
    assert os.listdir(shm) == []
    groups.close()
    groups.close()
    for operation in (groups.names, groups.reap_readers):
        with pytest.raises(ClosedError):
            operation()


def test_groups_of_one_directory_share_one_environment(shm: str) -> None:
    link = shm + ".link"
    os.symlink(shm, link)
    first, second = in_every_process(shm), in_every_process(link)
    os.unlink(link)
    first.add("news", 1)
    assert second.members("news") == [1]
    first.close()
    assert second.members("news") == [1]
    assert open_files(shm)
    second.close()
    assert open_files(shm) == []
    third = in_every_process(shm)
    assert third.members("news") == [1]
    third.close()


def test_the_directory_is_made_private_and_its_parent_is_not(shm: str) -> None:
    groups = in_every_process(os.path.join(shm, "groups"))
    assert groups.names() == []
    assert stat.S_IMODE(os.stat(os.path.join(shm, "groups")).st_mode) == 0o700
    groups.close()
    orphan = in_every_process(os.path.join(shm, "gone", "groups"))
    with pytest.raises(FileNotFoundError):
        orphan.names()
    orphan.close()


def test_groups_that_were_dropped_unclosed_hold_nothing_open(shm: str) -> None:
    dropped = in_every_process(shm)
    dropped.add("news", 1)
    del dropped
    groups = in_every_process(shm)
    assert groups.members("news") == [1]
    groups.close()
    assert open_files(shm) == []


def test_a_directory_made_again_is_another_one(shm: str) -> None:
    place = os.path.join(shm, "run")
    os.mkdir(place)
    old = in_every_process(place)
    old.add("news", 1)
    shutil.rmtree(place)
    os.mkdir(place)
    new = in_every_process(place)
    assert new.members("news") == []
    old.close()
    new.close()


def test_a_creation_that_was_cut_short_is_made_again(shm: str) -> None:
    with open(os.path.join(shm, "groups.mdb"), "wb") as file:
        file.write(bytes(4096))
    groups = in_every_process(shm)
    assert groups.add("news", 1)
    groups.close()


def test_without_lmdb_the_error_says_what_to_install(
    shm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    groups = in_every_process(shm)
    with pytest.raises(ImportError, match=r"pip install 'shmsock\[server\]'"):
        groups.names()
    groups.close()


def test_a_full_map_is_an_error_that_says_what_to_raise(shm: str) -> None:
    groups = in_every_process(shm, map_size_bytes=256 << 10)
    added = 0
    with pytest.raises(GroupsFullError, match="map_size_bytes") as caught:  # noqa: PT012
        for number in range(100_000):
            groups.add(f"room {number}", 1)
            added += 1
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.ENOSPC
    assert added
    assert len(groups.names()) == added
    groups.close()
    larger = in_every_process(shm, map_size_bytes=1 << 20)
    assert larger.add("one more", 1)
    assert len(larger.names()) == added + 1
    larger.close()


def grow(directory: str) -> None:
    groups = in_every_process(directory, map_size_bytes=16 << 20)
    for number in range(2000):
        groups.add(f"room {number}", 1)
    groups.close()


def test_a_map_that_another_process_outgrew_is_mapped_again(shm: str) -> None:
    groups = in_every_process(shm, map_size_bytes=64 << 10)
    groups.add("first", 1)
    assert in_spawn(grow, shm) == 0
    assert len(groups.names()) == 2001
    groups.close()


FULL_DISK = """
    import errno, os, sys
    from shmsock.groups import Groups

    directory = sys.argv[1]
    full = os.path.join(directory, "filler")

    def fill():
        with open(full, "wb", 0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def add_all(groups):
        count = 0
        try:
            while True:
                count += groups.add("room %d" % count, 1)
        except OSError as error:
            assert error.errno == errno.ENOSPC and "--shm-size" in str(error), error
        return count

    groups = Groups(directory, lambda sid: None, lambda sid: True)
    fill()
    for operation in (groups.names, lambda: groups.add("news", 1)):  # cannot even be created
        try:
            operation()
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
        else:
            raise AssertionError("no error on a full disk")
    os.unlink(full)
    assert groups.add("news", 1)
    fill()
    count = add_all(groups)
    assert len(groups.names()) == count + 1
    groups.close()
    os.unlink(full)
    groups = Groups(directory, lambda sid: None, lambda sid: True)
    assert len(groups.names()) == count + 1
    assert groups.add("after", 1)
"""


def test_a_full_shm_is_enospc_and_never_sigbus(tmp_path: os.PathLike[str]) -> None:
    enter = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*enter, "true"], check=False).returncode:
        pytest.skip("no user namespaces here to mount a small tmpfs in")
    mount = 'mount -t tmpfs -o size=400k,mode=700 none "$1" && exec "$2" -c "$3" "$1"'
    root = os.path.dirname(os.path.dirname(os.path.abspath(groups_module.__file__)))
    script = textwrap.dedent(FULL_DISK)
    done = subprocess.run(
        [*enter, "sh", "-c", mount, "sh", str(tmp_path), sys.executable, script],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------- many processes


def add_many(directory: str, first: int) -> None:
    groups = in_every_process(directory)
    for sid in range(first, first + 50):
        assert groups.add("news", sid)
        assert groups.add(f"own {first}", sid)
        assert groups.discard(f"own {first}", sid)
    groups.close()


def test_spawned_processes_write_at_once_and_nothing_is_lost(directory: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=add_many, args=(directory, n)) for n in (1, 101, 201)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
        writer.close()
    with contextlib.closing(in_every_process(directory)) as groups:
        assert groups.members("news") == [*range(1, 51), *range(101, 151), *range(201, 251)]
        assert groups.names() == [b"news"]


def test_threads_share_the_groups_of_a_process(groups: Groups) -> None:
    def work(first: int) -> None:
        for sid in range(first, first + 50):
            groups.add("news", sid)
            groups.members("news")

    threads = [threading.Thread(target=work, args=(first,)) for first in (1, 101, 201)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert groups.count("news") == 150


def die_in_a_write(directory: str) -> None:
    """Be killed inside the transaction that drops the second of two stale ids."""
    calls = 0

    def is_live(sid: int) -> bool:
        nonlocal calls
        calls += 1
        if calls == 4:  # two while reading, then again inside the write transaction
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    Groups(directory, lambda sid: None, is_live).members("news")


def die_in_a_read(directory: str) -> None:
    def is_live(sid: int) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return False

    Groups(directory, lambda sid: None, is_live).names()


@pytest.mark.parametrize("open_before", [True, False])
def test_crash_inside_a_write_leaves_nothing_and_blocks_nobody(
    directory: str, open_before: bool
) -> None:
    groups = in_every_process(directory)
    groups.add("news", 1)
    groups.add("news", 2)
    if not open_before:
        groups.close()
    assert in_spawn(die_in_a_write, directory) == -signal.SIGKILL
    if not open_before:
        groups = in_every_process(directory)
    assert groups.members("news") == [1, 2]
    assert groups.add("news", 3)
    assert groups.members("news") == [1, 2, 3]
    groups.close()
    assert stored_rows(directory)["groups_of"] == 3


def test_crash_while_reading_leaves_a_reader_that_is_reaped(shm: str) -> None:
    groups = in_every_process(shm)
    groups.add("news", 1)
    assert in_spawn(die_in_a_read, shm) == -signal.SIGKILL
    assert groups.reap_readers() == 1
    assert groups.reap_readers() == 0
    groups.close()


def fork_reader(groups: Groups) -> int:
    """A process that has the groups open, with a row in the reader table, until it is killed."""
    ready, opened = os.pipe()
    pid = os.fork()
    if pid == 0:
        groups.names()
        os.write(opened, b"1")
        signal.pause()
    assert os.read(ready, 1) == b"1"
    os.close(ready)
    os.close(opened)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def reader_rows(directory: str) -> int:
    with lmdb.open(os.path.join(directory, "groups.mdb"), subdir=False) as env:
        return env.max_readers()


def test_deaths_never_fill_the_reader_table_for_who_comes_later(
    shm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups_module, "_MAX_READERS", 4)
    groups = in_every_process(shm)
    groups.add("news", 1)
    groups.close()
    rows = reader_rows(shm)
    groups = in_every_process(shm)
    # Somebody has it open all the time: who opens alone starts with an empty table.
    holder = fork_reader(groups)
    for _ in range(2 * rows):
        assert in_fork(lambda: die_in_a_read(shm)) == signal.SIGKILL
    assert groups.members("news") == [1]
    groups.close()
    kill(holder)


def test_a_reader_table_full_of_the_dead_is_reaped_by_who_needs_a_row(
    shm: str, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups_module, "_MAX_READERS", 4)
    groups = Groups(shm, table.address, lambda sid: second.members("news") == [1])
    second = in_every_process(shm)
    second.add("news", 1)
    second.close()
    rows = reader_rows(shm)
    second = in_every_process(shm)
    others = [fork_reader(second) for _ in range(rows - 1)]
    second.members("news")  # opens, and takes the last row
    for pid in others:
        kill(pid)
    assert groups.names() == [b"news"]  # a read within a read: one row more
    groups.close()
    second.close()


# ---------------------------------------------------------------------------------- fork


def test_py_lmdb_refuses_a_second_open_in_a_child_that_inherited_an_environment(shm: str) -> None:
    """Why ours is closed before the fork: if this fails one day, that may be reconsidered."""
    path = os.path.join(shm, "other.mdb")
    env = lmdb.open(path, subdir=False)

    def child() -> None:
        with pytest.raises(lmdb.Error, match="already open"):
            lmdb.open(path, subdir=False)

    assert in_fork(child) == 0
    env.close()


def test_no_environment_crosses_a_fork(shm: str) -> None:
    groups = in_every_process(shm)
    groups.add("news", 1)
    assert open_files(shm)

    def child() -> None:
        assert open_files(shm) == []
        with open("/proc/self/maps") as maps:
            assert shm not in maps.read()
        assert groups.add("news", 2)
        assert groups.members("news") == [1, 2]
        assert open_files(shm)

    assert in_fork(child) == 0
    assert groups.members("news") == [1, 2]
    assert groups.add("news", 3)
    groups.close()


def test_a_child_that_closes_or_dies_leaves_the_parent_unharmed(shm: str) -> None:
    groups = in_every_process(shm)
    groups.add("news", 1)

    def closes() -> None:
        groups.members("news")
        groups.close()

    def grandchild() -> None:
        groups.add("news", 5)
        assert in_fork(lambda: add_or_fail(groups, 6)) == 0

    assert in_fork(closes) == 0
    assert in_fork(grandchild) == 0
    assert in_fork(lambda: die_in_a_read(shm)) == signal.SIGKILL
    assert groups.add("news", 2)
    assert groups.members("news") == [1, 2, 5, 6]
    groups.close()


def test_a_fork_waits_for_the_transactions_of_other_threads(shm: str) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def is_live(sid: int) -> bool:
        if threading.current_thread() is reader:
            inside.set()
            assert go_on.wait(60)
        return True

    groups = Groups(shm, lambda sid: None, is_live)
    reader = threading.Thread(target=groups.names)
    groups.add("news", 1)
    reader.start()
    assert inside.wait(60)
    # The reader goes on once the fork waits for it: not before the hook runs, which is ours alone.
    os.register_at_fork(before=go_on.set)  # runs first: hooks before a fork run last to first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a threaded process
        assert in_fork(lambda: add_or_fail(groups, 2)) == 0
    reader.join()
    assert groups.members("news") == [1, 2]
    groups.close()


def test_a_fork_inside_a_transaction_leaves_a_child_without_groups(
    shm: str, caplog: pytest.LogCaptureFixture
) -> None:
    forked: list[int] = []

    def child() -> None:
        with pytest.raises(ShmsockError):
            groups.names()

    def is_live(sid: int) -> bool:
        if inside and not forked:
            forked.append(in_fork(child))
        return True

    inside = False
    groups = Groups(shm, lambda sid: None, is_live)
    groups.add("news", 1)
    inside = True
    assert groups.names() == [b"news"]
    assert forked == [0]
    assert "no groups in the child" in caplog.text
    assert groups.add("news", 2)
    assert groups.members("news") == [1, 2]
    groups.close()


# ---------------------------------------------------------------------------------- globs


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def in_class(pattern: bytes, byte: int) -> tuple[bool, bytes]:
    """Does the class behind a bracket have this byte, and what follows the class."""
    if negated := pattern[:1] == b"^":
        pattern = pattern[1:]
    found = False
    while pattern:
        if pattern[:1] == b"\\" and len(pattern) > 1:
            found |= pattern[1] == byte
            pattern = pattern[2:]
        elif pattern[:1] == b"]":
            return found != negated, pattern[1:]
        elif len(pattern) > 2 and pattern[1:2] == b"-":
            low, high = sorted([signed(pattern[0]), signed(pattern[2])])
            found |= low <= signed(byte) <= high
            pattern = pattern[3:]
        else:
            found |= pattern[0] == byte
            pattern = pattern[1:]
    return found != negated, b""


def glob_oracle(pattern: bytes, name: bytes) -> bool:
    """Redis's matcher, told recursively: slow and obvious."""
    if not name:
        return not pattern
    if not pattern:
        return False
    head, rest = pattern[:1], pattern[1:]
    if head == b"*":
        rest = rest.lstrip(b"*")
        return not rest or any(glob_oracle(rest, name[n:]) for n in range(len(name)))
    if head == b"?":
        found = True
    elif head == b"[":
        found, rest = in_class(rest, name[0])
    else:
        if head == b"\\" and rest:
            head, rest = rest[:1], rest[1:]
        found = head == name[:1]
    if found and len(name) == 1:
        rest = rest.lstrip(b"*")
    return found and glob_oracle(rest, name[1:])


GLOB_BYTES = st.sampled_from(list(b"aabc-^*?[]\\\xff\x80\n\x00")).map(lambda byte: bytes([byte]))
PATTERNS = st.lists(GLOB_BYTES, max_size=12).map(b"".join)
NAMES = st.lists(
    st.sampled_from([b"a", b"b", b"c", b"-", b"]", b"\\", b"^", b"\xff", b"\n", b"*"]), max_size=8
).map(b"".join)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(PATTERNS, NAMES)
def test_a_compiled_glob_matches_what_the_oracle_matches(pattern: bytes, name: bytes) -> None:
    assert bool(compile_glob(pattern).fullmatch(name)) == glob_oracle(pattern, name)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=12), st.binary(max_size=12))
def test_an_escaped_name_matches_itself_and_nothing_else(name: bytes, other: bytes) -> None:
    glob = compile_glob(escape_glob(name))
    assert glob.fullmatch(name)
    assert bool(glob.fullmatch(other)) == (name == other)


TRICKY_NAMES = [
    b"", b"a", b"b", b"z", b"ab", b"abc", b"abcabc", b"aXbXc", b"-", b"]", b"[", b"^", b"\\", b"*",
    b"?", b"a]", b"a-", b"a\\", b"a\n", b"\x00", b"a\x00b", b"\x7f", b"\x80", b"\xff", b"\xffa",
    b"a\xff", b"[a]", b"news.tech", b"news.", b"a*b", "é".encode(),
]  # fmt: skip
TRICKY_PATTERNS = [
    b"", b"*", b"**", b"***a", b"a*", b"*a", b"a**", b"?", b"??", b"?*", b"*?", b"*?*?*", b"a?c",
    b"[abc]", b"[^abc]", b"[a-c]", b"[c-a]", b"[^c-a]", b"[]", b"[^]", b"[]]", b"[^]]", b"[]a]",
    b"[", b"[^", b"[a", b"[^a", b"[a-", b"[a-]", b"[a-]]", b"[\\", b"[\\]", b"[\\]]", b"[a\\-z]",
    b"[\\a-z]", b"[a-\\]]", b"[a-\\]*", b"[-a]", b"[a-]-]", b"[--a]", b"[a-z-9]", b"[*?]", b"[^^]",
    b"a[", b"a[^", b"*[", b"*[^", b"a[]", b"\\", b"a\\", b"\\*", b"\\?", b"\\[a]", b"\\\\", b"\\a",
    b"*\\*", b"*\\", b"\\**", b"[[]", b"[[]a]", b"news.*", b"*.tech", b"n*.*h", b"*a*b*c*", b"*abc",
    b"*abc*", b"a*b*c", b"*X*X*", b"[a-\xff]", b"[\xff-a]", b"[\x80-\xff]", b"[^\x80-\xff]",
    b"[\x00-\x7f]", b"[\x00-\xff]", b"\xff*", b"a\x00*", b"a\n", b"a?", b"[\n]", b"\xc3?", b"**b",
]  # fmt: skip


@pytest.fixture(scope="module")
def redis_socket() -> collections.abc.Iterator[str]:
    if not shutil.which("redis-server"):
        pytest.skip("no redis-server here to compare with")
    with tempfile.TemporaryDirectory() as place:
        path = os.path.join(place, "redis")
        server = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--dir", place],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        with server.stdout:
            for line in server.stdout:
                if "ready to accept connections" in line.lower() or path in line:
                    break
            yield path
            server.kill()
        server.wait()


def test_globs_match_what_a_real_redis_matches(redis_socket: str) -> None:
    redis = pytest.importorskip("redis")
    with redis.Redis(unix_socket_path=redis_socket) as client:
        client.mset(dict.fromkeys(TRICKY_NAMES, b"1"))
        for pattern in TRICKY_PATTERNS:
            ours = {name for name in TRICKY_NAMES if compile_glob(pattern).fullmatch(name)}
            if pattern == b"*":  # KEYS does not ask its matcher about this one
                ours.add(b"")
            assert ours == set(client.keys(pattern)), pattern
            assert ours == {name for name in TRICKY_NAMES if glob_oracle(pattern, name)} | (
                {b""} if pattern == b"*" else set()
            ), pattern


def test_names_answers_every_pattern_as_redis_answers_keys(
    groups: Groups, redis_socket: str
) -> None:
    redis = pytest.importorskip("redis")
    for name in TRICKY_NAMES:
        groups.add(name, 1)
    with redis.Redis(unix_socket_path=redis_socket) as client:
        client.mset(dict.fromkeys(TRICKY_NAMES, b"1"))
        for pattern in TRICKY_PATTERNS:
            assert groups.names(pattern) == sorted(client.keys(pattern)), pattern


def backtracking_stars(node: object, atomic: bool = False) -> int:
    """How many repeats of a parsed expression stand outside every atomic group."""
    if isinstance(node, tuple) and node and node[0] is re_constants.ATOMIC_GROUP:
        atomic = True
    repeats = (re_constants.MIN_REPEAT, re_constants.MAX_REPEAT)
    count = int(isinstance(node, tuple) and bool(node) and node[0] in repeats and not atomic)
    if isinstance(node, tuple | list | re_parser.SubPattern):
        count += sum(backtracking_stars(inner, atomic) for inner in node)
    return count


@pytest.mark.parametrize(
    "pattern", [b"*a" * 1000, b"*a" * 1000 + b"*", b"a*" * 999 + b"b", b"*?" * 1000, b"*[ab]" * 500]
)
def test_a_hostile_pattern_costs_at_most_name_times_pattern(pattern: bytes) -> None:
    """Steps, not seconds: only the last star can go back, and it goes back once over the name.

    An atomic star tries its run, of fixed length, at each place at most once, and never again
    after it; a failure behind it ends the match. So the steps are at most
    len(name) * len(longest run) for each star, and once more for the last.
    """
    glob = compile_glob(pattern)
    assert backtracking_stars(re_parser.parse(glob.pattern, glob.flags)) <= 1
    assert not glob.fullmatch(b"a" * 400 + b"c")  # 2 ** 400 steps if they went back


def test_more_stars_than_redis_allows_match_nothing(redis_socket: str) -> None:
    redis = pytest.importorskip("redis")
    name = b"a" * 3000
    with redis.Redis(unix_socket_path=redis_socket) as client:
        client.set(name, b"1")
        for pattern in (b"*a" * 1000, b"*a" * 1000 + b"*", b"*a" * 1001, b"*a" * 1001 + b"*"):
            assert bool(compile_glob(pattern).fullmatch(name)) == bool(client.keys(pattern))
        client.delete(name)


def test_a_pattern_too_long_to_compile_is_refused(groups: Groups) -> None:
    for refuses in (compile_glob, groups.names):
        with pytest.raises(ValueError, match="4096"):
            refuses(b"?" * 4097)
    assert compile_glob(b"?" * 4096).fullmatch(b"a" * 4096)


def test_stars_in_a_row_are_one() -> None:
    assert compile_glob(b"*" * 4000 + b"b").pattern == compile_glob(b"*b").pattern
    assert isinstance(compile_glob(b"a"), re.Pattern)
    assert compile_glob(b"a") is compile_glob(b"a")
