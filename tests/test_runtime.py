"""Coming and going: create, attach, clean, close, and what a crash of anybody leaves."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

import shmsock
from shmsock import processes
from shmsock.segment import SHM_DIRECTORY, run_directory

from .helpers import (
    REPOSITORY,
    WATCHDOG_S,
    Forked,
    Peer,
    connected,
    descriptors,
    holders_of,
    out_of_descriptors,
    read_to_end,
    shared_names,
    wait_until,
)


def names_of(name: str) -> set[str]:
    return {entry for entry in shared_names() if f"shmsock.{name}." in f"{entry}."}


def run_script(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": REPOSITORY},
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
        check=False,
    )


# -- create ---------------------------------------------------------------------------------------


def test_a_second_create_of_a_living_name_is_refused_and_harms_nothing(
    runtime: shmsock.Runtime,
) -> None:
    before = names_of(runtime.name)
    with pytest.raises(shmsock.AlreadyRunningError, match=str(os.getpid())):
        shmsock.Runtime.create(runtime.name)
    with Peer() as other:
        other.run("import shmsock")
        with pytest.raises(AssertionError, match=rf"AlreadyRunningError.*{os.getpid()}"):
            other.run(f"shmsock.Runtime.create({runtime.name!r})")
    assert names_of(runtime.name) == before
    assert runtime.audit() == []
    assert shmsock.current() is runtime


def test_a_name_without_its_host_is_not_created_anew_while_somebody_takes_part(name: str) -> None:
    with Peer() as host, Peer() as client:
        host.run(f"import shmsock; rt = shmsock.Runtime.create({name!r}, slots=16, stripes=2)")
        client.run(f"import shmsock; rt = shmsock.Runtime.attach({name!r})")
        host.kill()
        for refuse in (shmsock.Runtime.create, shmsock.clean):
            with pytest.raises(shmsock.AlreadyRunningError, match=str(client.pid)):
                refuse(name)
        client.kill()
        shmsock.Runtime.create(name, slots=16, stripes=2).__exit__(None, None, None)
    assert names_of(name) == set()


def test_what_a_killed_tree_left_is_removed_by_the_next_create(name: str) -> None:
    with Peer() as host, Peer() as client:
        host.run(
            f"""
            import shmsock, socket
            rt = shmsock.Runtime.create({name!r}, slots=16, stripes=2)
            a, b = socket.socketpair(); sid = rt.create_socket(a)
            """
        )
        client.run(f"import shmsock; rt = shmsock.Runtime.attach({name!r})")
        old = host.ask("sid")
        client.run(f"ref = rt.address({old})")
        left = names_of(name)
        host.kill()
        client.kill()
    with open(f"{run_directory(name)}/leftover", "w") as file:
        file.write("of something")
    assert left <= names_of(name)
    with shmsock.Runtime.create(name, slots=16, stripes=2) as runtime:
        assert sorted(os.listdir(runtime.run_directory))[0].startswith("control-")
        assert len(os.listdir(runtime.run_directory)) == 2
        assert runtime.in_use() == 0
        assert runtime.address(old) is None, "an id of an earlier runtime matches nothing"
        assert runtime.audit() == []
    assert names_of(name) == set()


@pytest.mark.parametrize("moment", ["_serve", "_join"])
def test_a_creation_that_fails_leaves_nothing(
    name: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(shmsock.Runtime, moment, fail)
        with pytest.raises(OSError, match="on purpose"):
            shmsock.Runtime.create(name, slots=16, stripes=2)
    assert names_of(name) == set()
    shmsock.Runtime.create(name, slots=16, stripes=2).__exit__(None, None, None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("", {}),
        ("a/b", {}),
        ("-x", {}),
        ("x" * 65, {}),
        ("fine", {"slots": 0}),
        ("fine", {"processes": 0}),
        ("fine", {"max_unwritten_bytes": 0}),
    ],
)
def test_names_and_sizes_that_cannot_be_are_refused(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"."):
        shmsock.Runtime.create(name, **options)  # type: ignore[arg-type]


def test_a_segment_too_large_for_the_machine_says_what_is_needed_and_leaves_nothing(
    name: str,
) -> None:
    free = os.statvfs(SHM_DIRECTORY)
    if free.f_blocks * free.f_frsize > 400 << 30:
        pytest.skip("this machine may well have that much")
    with pytest.raises(OSError, match="--shm-size") as caught:
        shmsock.Runtime.create(name, slots=1 << 24, processes=1 << 15)
    assert caught.value.errno == errno.ENOSPC
    assert names_of(name) == set()


# -- attach ---------------------------------------------------------------------------------------


def test_attaching_what_does_not_exist_says_how_to_start_it(name: str) -> None:
    with pytest.raises(shmsock.RuntimeNotFoundError, match=f"shmsock serve --name {name}"):
        shmsock.Runtime.attach(name)
    with pytest.raises(ValueError, match="role"):
        shmsock.Runtime.attach(name, role="king")
    with pytest.raises(ValueError, match="letters"):
        shmsock.Runtime.attach("../x")


def test_attaching_a_foreign_segment_names_the_field_and_touches_nothing(
    runtime: shmsock.Runtime,
) -> None:
    said = {word: word for word in ("magic", "layout", "uid", "total_bytes")}
    for word, names in {**said, "slots": "slots|total_bytes"}.items():
        before = runtime._segment.get(word)
        runtime._segment.set(word, 12345)
        try:
            with pytest.raises(shmsock.FormatError, match=names):
                shmsock.Runtime.attach(runtime.name)
        finally:
            runtime._segment.set(word, before)
    with shmsock.Runtime.attach(runtime.name) as again:
        assert again.audit() == []


def test_a_full_process_table_names_its_option_and_a_leaver_makes_room(name: str) -> None:
    with shmsock.Runtime.create(name, slots=16, stripes=2, processes=3) as runtime:
        first, second = shmsock.Runtime.attach(name), shmsock.Runtime.attach(name)
        before = len(descriptors())
        with pytest.raises(shmsock.TableFullError, match="processes"):
            shmsock.Runtime.attach(name)
        assert len(descriptors()) == before
        first.close()
        with shmsock.Runtime.attach(name) as third:
            assert third.index == 1
        second.close()
        assert [info.index for info in runtime.processes()] == [0]


def test_attaching_without_descriptors_takes_no_row(runtime: shmsock.Runtime) -> None:
    with Peer() as other:
        other.run(
            f"""
            import shmsock
            from tests.helpers import out_of_descriptors
            with out_of_descriptors():
                try: shmsock.Runtime.attach({runtime.name!r})
                except OSError as error: refused = str(error)
            """
        )
        assert "open" in other.ask("refused")
        assert [info.index for info in runtime.processes()] == [runtime.index]
        other.run(f"rt = shmsock.Runtime.attach({runtime.name!r})")
        assert other.ask("rt.index") == 1
        other.run("rt.close()")
        assert runtime.audit() == []


def test_a_table_full_of_sockets_says_so_and_leaves_the_socket_to_its_maker(name: str) -> None:
    with shmsock.Runtime.create(name, slots=4, stripes=2) as runtime:
        clients = []
        for _ in range(4):
            ours, peers = connected("unix")
            clients.append(peers)
            last = runtime.create_socket(ours)
        ours, peers = connected("unix")
        with ours, peers:
            with pytest.raises(shmsock.TableFullError, match="slots"):
                runtime.create_socket(ours)
            ours.send(b"still mine")
            assert peers.recv(100) == b"still mine"
            assert runtime.set_failed(last, 1, "x")
            sid = runtime.create_socket(ours)
            assert sid & 0xFFFFFFFF == last & 0xFFFFFFFF
            assert sid != last
        assert runtime.in_use() == 4
        for peers in clients:
            peers.close()


# -- leaving --------------------------------------------------------------------------------------


def test_after_close_everything_raises_closed_and_closing_again_does_nothing(name: str) -> None:
    runtime = shmsock.Runtime.create(name, slots=16, stripes=2)
    assert shmsock.current() is runtime
    runtime.close()
    runtime.close()
    ours, peers = connected("unix")
    with ours, peers:
        for use in (
            lambda: runtime.address(1),
            lambda: runtime.address_failed_as_well(1),
            lambda: runtime.set_failed(1, 1, "x"),
            lambda: runtime.status(1),
            lambda: runtime.create_socket(ours),
            lambda: runtime.attached(1),
            runtime.sockets,
            runtime.processes,
            runtime.audit,
            runtime.repair,
            runtime.in_use,
            runtime.owned_counts,
            runtime.host_alive,
            runtime.__enter__,
            lambda: runtime.groups,
            lambda: runtime.pass_to(1, [1]),
            lambda: runtime.on_join(print),
            lambda: shmsock.Dispatcher(runtime),
        ):
            with pytest.raises(shmsock.ClosedError):
                use()
        ours.send(b"x")  # what could not be created is still its maker's
    with pytest.raises(shmsock.RuntimeNotFoundError):
        shmsock.current()
    assert "closed" in repr(runtime)
    runtime.unlink()
    assert names_of(name) == set()


def test_leaving_gives_back_what_was_held_and_fails_what_was_owned(
    runtime: shmsock.Runtime,
) -> None:
    with Peer(runtime.name, role="worker") as other:
        other.run("import socket; a, b = socket.socketpair(); mine = rt.create_socket(a)")
        ours, peers = connected()
        sid = runtime.create_socket(ours)
        other.run(f"ref = rt.address({sid})")
        info = runtime.processes()[1]
        assert (info.index, info.pid, info.role, info.alive) == (1, other.pid, "worker", True)
        assert (info.sockets, info.attached) == (1, 1)
        assert info.age_s >= 0
        assert runtime.owned_counts()[:3].tolist() == [1, 1, 0]
        with runtime.address(other.ask("mine")) as reference:  # type: ignore[union-attr]
            other.run("rt.close()")
            assert reference.error[0] == errno.EOWNERDEAD
        assert other.ask("b.recv(10).decode()") == ""
        assert len(runtime.processes()) == 1
        assert runtime.attached(sid) == []
        assert runtime.status(sid) is shmsock.Status.LIVE
        assert runtime.audit() == []
        peers.close()


def test_a_killed_participant_gives_everything_back(runtime: shmsock.Runtime) -> None:
    pairs = [connected() for _ in range(3)]
    ids = [runtime.create_socket(ours) for ours, _ in pairs]
    with Peer() as client_side, Peer(runtime.name, role="worker") as victim:
        victim.run(
            """
            import socket
            listener = socket.create_server(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            """
        )
        port = victim.ask("port")
        client_side.run(f"import socket; c = socket.create_connection(('127.0.0.1', {port}))")
        victim.run("mine = rt.create_socket(listener.accept()[0])")
        mine = victim.ask("mine")
        victim.run(f"refs = [rt.address(sid) for sid in {ids}]; [ref.fileno() for ref in refs]")
        wait_until(lambda: runtime._store is not None and len(runtime._store) == 4)
        inode = int(runtime.sockets()["inode"][runtime.sockets()["id"] == mine][0])
        with runtime.address(mine) as reference:  # type: ignore[union-attr]
            reference.fileno()
            victim.kill()
            assert client_side.ask("c.recv(10).decode()") == "", "its peer sees the end"
            assert reference.error[0] == errno.EOWNERDEAD
        wait_until(lambda: len(runtime.processes()) == 1)
        assert [runtime.attached(sid) for sid in ids] == [[], [], []]
        assert [int(nref) for nref in runtime.sockets()["nref"]] == [1, 1, 1]
        for sid, (_, peers) in zip(ids, pairs, strict=True):
            with runtime.address(sid) as reference:  # type: ignore[union-attr]
                reference.write(b"goes on")
            assert peers.recv(10) == b"goes on"
            peers.close()
        wait_until(lambda: holders_of(inode, [os.getpid()]) == [])
        assert runtime.audit() == []


def test_a_script_that_closes_nothing_leaves_nothing(name: str) -> None:
    ran = run_script(
        f"""
        import socket, shmsock
        host = shmsock.Runtime.create({name!r}, slots=64)
        guest = shmsock.Runtime.attach({name!r})
        a, b = socket.socketpair()
        sid = host.create_socket(a)
        reference = guest.address(sid)
        reference.write(b"x")
        dispatcher = shmsock.Dispatcher(host)
        dispatcher.add_consumer(sid, lambda ref: None)
        b.close()
        print("done")
        """
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "done\n", "")
    assert names_of(name) == set()


@pytest.mark.parametrize("ending", ["raise SystemExit(3)", "1 / 0", "os.kill(os.getpid(), 2)"])
def test_a_script_that_ends_badly_leaves_nothing(name: str, ending: str) -> None:
    ran = run_script(f"import os, shmsock; rt = shmsock.Runtime.create({name!r}); {ending}")
    assert ran.returncode != 0
    assert names_of(name) == set()


def test_a_guest_that_exits_leaves_the_runtime_to_its_host(runtime: shmsock.Runtime) -> None:
    ran = run_script(f"import shmsock; rt = shmsock.Runtime.attach({runtime.name!r}); rt.audit()")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(runtime.processes()) == 1
    assert shmsock.names_on_machine().count(runtime.name) == 1


def test_the_host_takes_the_names_away_and_guests_are_told(name: str) -> None:
    with Peer() as guest:
        with shmsock.Runtime.create(name, slots=16, stripes=2) as runtime:
            guest.run(f"import shmsock; rt = shmsock.Runtime.attach({name!r})")
            assert guest.ask("rt.host_alive()")
            assert runtime.host_alive()
        assert names_of(name) == set()
        assert not guest.ask("rt.host_alive()")
        assert guest.ask("rt.audit()") == []
        with shmsock.Runtime.create(name, slots=16, stripes=2) as fresh:  # beside the old guest
            assert [info.pid for info in fresh.processes()] == [os.getpid()]
            guest.run("rt.close()")
            assert fresh.host_alive()


def test_a_guest_of_a_removed_runtime_lives_on_and_spares_the_next_one_of_its_name(
    name: str,
) -> None:
    with Peer() as guest, Peer() as other:
        with shmsock.Runtime.create(name, slots=16, stripes=4):
            for each in (guest, other):
                each.run(f"import shmsock, socket; rt = shmsock.Runtime.attach({name!r})")
        assert names_of(name) == set()
        with shmsock.Runtime.create(name, slots=16, stripes=4) as fresh:
            before = names_of(name)
            guest.run(
                """
                pairs = [socket.socketpair() for _ in range(4)]     # one in every stripe
                ids = [rt.create_socket(a) for a, b in pairs]
                refs = [rt.address(sid) for sid in ids]
                for ref in refs: ref.write(b"on")
                assert all(b.recv(10) == b"on" for a, b in pairs)
                """
            )
            other.run(f"refs = [rt.address(sid) for sid in {guest.ask('ids')}]")
            assert fresh.in_use() == 0
            other.kill()  # with references, and nobody to retire its stripes
            guest.run("rt.repair(); rt.close()")
            assert names_of(name) == before
            assert fresh.repair() == {"retired": 0, "recounted": 0, "reaped": 0}
            assert fresh.audit() == []


def test_a_child_forked_in_a_removed_runtime_does_not_join_the_next_one_of_its_name(
    name: str,
) -> None:
    with Peer() as guest:
        with shmsock.Runtime.create(name, slots=16, stripes=2):
            guest.run(f"import shmsock; rt = shmsock.Runtime.attach({name!r})")
        with shmsock.Runtime.create(name, slots=16, stripes=2) as fresh:
            guest.run("from tests.helpers import Forked")
            with pytest.raises(AssertionError, match="removed or replaced"):
                guest.run("Forked(rt.audit).result()")
            assert len(fresh.processes()) == 1


# -- clean ----------------------------------------------------------------------------------------


def test_clean_removes_what_is_left_once_and_refuses_the_living(name: str) -> None:
    assert shmsock.clean(name) is False
    with Peer() as host:
        host.run(f"import shmsock; rt = shmsock.Runtime.create({name!r}, slots=16, stripes=2)")
        with pytest.raises(shmsock.AlreadyRunningError, match=str(host.pid)):
            shmsock.clean(name)
        assert name in shmsock.names_on_machine()
        host.kill()
    assert names_of(name) != set()
    assert shmsock.clean(name) is True
    assert names_of(name) == set()
    assert name not in shmsock.names_on_machine()
    assert shmsock.clean(name) is False
    with pytest.raises(ValueError, match="letters"):
        shmsock.clean("../etc")


def test_clean_removes_what_lost_its_directory(name: str) -> None:
    with Peer() as host:
        host.run(f"import shmsock; rt = shmsock.Runtime.create({name!r}, slots=16, stripes=2)")
        host.kill()
    for entry in os.listdir(run_directory(name)):
        os.unlink(f"{run_directory(name)}/{entry}")
    os.rmdir(run_directory(name))
    assert shmsock.clean(name) is True
    assert names_of(name) == set()


# -- looking --------------------------------------------------------------------------------------


def test_sockets_has_a_row_with_every_field_for_each_socket(runtime: shmsock.Runtime) -> None:
    started = time.monotonic_ns()
    ours, peers = connected()
    port = peers.getsockname()[1]
    sid = runtime.create_socket(ours, b"data")
    with peers, Peer(runtime.name) as other:
        other.run(f"ref = rt.address({sid}); ref.write(b'12345')")
        (row,) = runtime.sockets()
        assert row["id"] == sid
        assert (row["state"], row["nref"], row["attached"]) == (1, 2, 1)
        assert (row["owner"], row["writer"], row["busy"]) == (runtime.index, -1, 0)
        assert shmsock.KIND_NAMES[row["kind"]] == "tcp"
        assert row["peer"] == f"127.0.0.1:{port}".encode()
        assert (row["error_code"], row["error_text"], row["user_data"]) == (0, b"", b"data")
        assert (row["bytes_out"], row["messages_out"]) == (5, 1)
        assert (row["bytes_in"], row["messages_in"], row["read_ns"]) == (0, 0, 0)
        assert started <= row["created_ns"] <= row["written_ns"] <= time.monotonic_ns()
        assert runtime.attached(sid) == [other.ask("rt.index")]
        assert other.ask(f"rt.sockets()['id'].tolist() == [{sid}]")
        runtime.set_failed(sid, 5, "why")
        (row,) = runtime.sockets()
        assert (row["id"], row["state"], row["nref"]) == (sid, 2, 1)
        assert (row["error_code"], row["error_text"]) == (5, b"why")
        other.run("ref.close()")
        assert len(runtime.sockets()) == 0
        assert runtime.attached(sid) == []


def test_a_row_is_of_one_life_while_the_table_changes(name: str) -> None:
    with shmsock.Runtime.create(name, slots=4, stripes=1) as runtime:

        def churn() -> int:
            for number in range(150):
                ours, peers = connected("unix")
                sid = runtime.create_socket(ours, b"%d" % number)
                runtime.set_failed(sid, number, f"{number}")
                peers.close()
            return 1

        with Forked(churn) as child:
            seen = 0
            while len(runtime.processes()) < 2 and not seen:
                pass
            for _ in range(2000):
                for row in runtime.sockets():
                    seen += 1
                    if row["state"] == 2:
                        assert row["error_text"] == row["user_data"]
                    assert runtime.status(int(row["id"])) in shmsock.Status
            assert child.result() == 1
        wait_until(lambda: runtime.audit() == [])


def test_the_host_alone_passes_sockets_on_and_is_joined(runtime: shmsock.Runtime) -> None:
    with shmsock.Runtime.attach(runtime.name) as guest:
        for use in (lambda: guest.pass_to(0, []), lambda: guest.on_join(print)):
            with pytest.raises(ValueError, match="only the host"):
                use()
        assert not guest.is_host
        assert runtime.is_host


def test_the_hosts_timer_goes_on_when_one_of_its_tasks_fails(
    runtime: shmsock.Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "on purpose")

    with peers, Peer(runtime.name) as other, monkeypatch.context() as patch:
        patch.setattr(runtime._recovery, "look", fail)
        assert other.ask(f"rt._engine.set_failed({sid}, 1, 'x')")  # the sweep must find it
        assert read_to_end(peers) == b""
        assert "on purpose" in caplog.text


def test_a_process_taken_for_dead_is_told_and_may_attach_again(runtime: shmsock.Runtime) -> None:
    with Peer(runtime.name) as other:
        other.run("import socket; a, b = socket.socketpair(); sid = rt.create_socket(a)")
        other.run("ref = rt.address(sid)")
        other.run("open(rt.run_directory + '/lock').close()")  # drops every lock of its process
        runtime.repair()
        wait_until(lambda: len(runtime.processes()) == 1 or (runtime.repair() and False))
        with pytest.raises(AssertionError, match="ClosedError"):
            other.run("ref.write(b'x')")
        other.run("rt.close(); rt = shmsock.Runtime.attach(rt.name)")
        assert other.ask("rt.audit()") == []
        other.run("rt.close()")
    assert runtime.audit() == []


def test_signals_end_a_host_in_a_dispatcher_without_leftovers(name: str) -> None:
    with Peer() as host:
        host.run(
            f"""
            import shmsock, signal
            rt = shmsock.Runtime.create({name!r}, slots=16, stripes=2)
            dispatcher = shmsock.Dispatcher(rt)
            signal.signal(signal.SIGTERM, lambda *_: dispatcher.call_soon(dispatcher.stop))
            """
        )
        host.start("dispatcher.run()")
        os.kill(host.pid, signal.SIGTERM)
        host.finish()
        host.run("import os; dispatcher.call_soon(lambda: os.kill(os.getpid(), signal.SIGINT))")
        with pytest.raises(AssertionError, match="KeyboardInterrupt"):
            host.run("dispatcher.run()")
        host.run("rt.__exit__(None, None, None)")
        assert names_of(name) == set()


def test_sockets_of_every_kind_of_object_are_refused_or_taken_whole(
    runtime: shmsock.Runtime,
) -> None:
    closed = socket.socket()
    closed.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        runtime.create_socket(closed)
    assert runtime.in_use() == 0
    blocking, peers = connected()
    blocking.settimeout(3)
    sid = runtime.create_socket(blocking)
    assert blocking.fileno() == -1, "taken over"
    with (
        peers,
        runtime.address(sid) as reference,  # type: ignore[union-attr]
        pytest.raises(BlockingIOError),
    ):
        reference.recv(1)
    with out_of_descriptors():
        assert runtime.address(sid) is not None, "addressing needs no descriptor"


def test_who_attaches_reaps_the_dead_that_hold_every_row(name: str) -> None:
    with Peer() as host:
        host.run(f"import shmsock; rt = shmsock.Runtime.create({name!r}, slots=64, processes=2)")
        with Peer(name) as guest:
            with pytest.raises(shmsock.TableFullError):
                shmsock.Runtime.attach(name)
            guest.kill()
        host.kill()
    with shmsock.Runtime.attach(name) as runtime:
        assert [row.pid for row in runtime.processes()] == [os.getpid()]
        assert runtime.audit() == []
        runtime.unlink()


def test_the_names_of_a_host_that_leaves_are_gone_before_another_can_be_host(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would take away what the next runtime of that name has just made."""
    host = shmsock.Runtime.create(name, slots=16, stripes=2)
    drop, seen = host._lock_file.drop, []

    def watched(byte: int) -> None:
        if byte == processes.HOST:
            seen.append(os.path.exists(f"{SHM_DIRECTORY}/shmsock.{name}"))
        drop(byte)

    monkeypatch.setattr(host._lock_file, "drop", watched)
    with host:
        pass
    assert seen == [False]
    with shmsock.Runtime.create(name, slots=16, stripes=2) as following:
        assert following.audit() == []
