"""Limits of the machine: descriptors, descriptors in flight, processes stopped and killed."""

from __future__ import annotations

import array
import collections.abc
import contextlib
import errno
import os
import pathlib
import random
import resource
import signal
import socket
import threading
import typing

import posix_ipc
import pytest

import shmsock
from shmsock import names
from shmsock.layout import SLOT_MASK

from .helpers import (
    REPOSITORY,
    WATCHDOG_S,
    Forked,
    Peer,
    connected,
    out_of_descriptors,
    read_to_end,
    wait_until,
)

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def stripe_of(runtime: shmsock.Runtime, sid: int) -> int:
    return (sid & SLOT_MASK) // runtime._segment.layout.block


# -- descriptors ----------------------------------------------------------------------------------


def test_a_process_at_its_limit_repairs_what_another_left_and_loses_nothing(
    runtime: shmsock.Runtime,
) -> None:
    """The dead one sat in a stripe: a new semaphore is needed, and there is no descriptor."""
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)
    with runtime.address(sid) as reference, peers:  # type: ignore[union-attr]
        reference.write(b"before")
        generation = runtime._segment.cells.ctl[stripe_of(runtime, sid)] >> 2
        for _ in range(3):  # more often than there were spares at first
            with Peer(runtime.name) as victim:
                victim.start(
                    f"""
                    import os, signal
                    rt._engine.run({stripe_of(runtime, sid)},
                                   lambda *_: os.kill(os.getpid(), signal.SIGKILL), -1)
                    """
                )
                victim.process.wait(WATCHDOG_S)
                with out_of_descriptors():
                    for call in (lambda: os.open("/dev/null", os.O_RDONLY), socket.socket):
                        with pytest.raises(OSError, match="Too many open files"):
                            call()
                    wait_until(lambda: len(runtime.processes()) == 1 or runtime.repair() is None)
                    reference.user_data = b"inside the stripe"
                    reference.write(b"limit")
        assert runtime._segment.cells.ctl[stripe_of(runtime, sid)] >> 2 >= generation + 3
        assert runtime.audit() == []
        assert peers.recv(100) == b"before" + 3 * b"limit"
        reference.user_data = b""
    runtime.set_failed(sid)


def too_many_in_flight(name: str) -> list[object]:
    """As a user that is no root: in one process the host, in another a worker."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    with shmsock.Runtime.create(name, slots=16, stripes=2, processes=4) as host:
        ours, peers = socket.socketpair()
        hosts = host.create_socket(ours)

        def work() -> list[object]:
            one, other = socket.socketpair()
            mine, client = socket.socketpair()
            first = host.create_socket(mine)  # attaches; its channel exists after this
            wait_until(lambda: host._descriptors.peek(first).put)  # type: ignore[union-attr]
            rights = array.array("i", [one.fileno()] * 100)
            refused = 0
            for _ in range(4):
                try:
                    one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                except OSError as error:
                    refused = error.errno or 0
            late, late_client = socket.socketpair()
            second = host.create_socket(late)  # its put cannot be sent
            written = threading.Event()

            def push() -> None:  # nor can the host send what this fetches
                with host.address(hosts) as reference:  # type: ignore[union-attr]
                    reference.write(b"fetched")
                    written.set()

            thread = threading.Thread(target=push)
            thread.start()
            entry = host._descriptors.peek(second)
            link = host._descriptors._link
            assert entry is not None
            assert link is not None
            wait_until(lambda: len(link._queue))
            waited = [not entry.put, not written.is_set()]
            other.close()  # WHY NOT receive them: the fetch might meet EMFILE at that moment
            wait_until(lambda: entry.put, "the put arrived")
            thread.join()
            for sid in (first, second):
                host.set_failed(sid)
            ended = [read_to_end(client) == b"", read_to_end(late_client) == b""]
            host.close()
            return [refused, waited, ended]

        result: list[object] = typing.cast("list[object]", Forked(work).result())
        received = peers.recv(100).decode()
        wait_until(lambda: len(host.processes()) == 1)
        return [*result, received, host.audit()]


@as_root
def test_too_many_descriptors_in_flight_only_delay(name: str) -> None:
    """ETOOMANYREFS is for users without privileges: counted for a user, over all processes."""
    with Forked(too_many_in_flight, name) as child:
        assert child.result() == [
            errno.ETOOMANYREFS,
            [True, True],
            [True, True],
            "fetched",
            [],
        ]


# -- stopped and killed ---------------------------------------------------------------------------


def stop(peer: Peer) -> None:
    os.kill(peer.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, peer.pid, os.WSTOPPED | os.WNOWAIT)


def test_a_process_stopped_inside_a_stripe_is_named_passed_over_and_goes_on(
    runtime: shmsock.Runtime,
) -> None:
    pairs = [socket.socketpair() for _ in range(16)]
    ids = [runtime.create_socket(ours) for ours, _ in pairs]
    blocked = ids[0]
    stripe = stripe_of(runtime, blocked)
    with Peer(runtime.name) as stopped, Peer(runtime.name) as another:
        stopped.run("import os, signal")
        stopped.start(
            f"rt._engine.run({stripe}, lambda *_: os.kill(os.getpid(), signal.SIGSTOP) or 1, -1)"
        )
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
        named = rf"stripe {stripe} .*process \d+ \(pid {stopped.pid}\) claims OWN"
        with pytest.raises(shmsock.StripeTimeoutError, match=named):
            runtime._engine.run(stripe, lambda *_: 1, -1, patience_s=0.2)
        with pytest.raises(AssertionError, match=named):
            another.run(f"rt._engine.run({stripe}, lambda *_: 1, -1, patience_s=0.2)")
        # Everything that is elsewhere goes on, and what is created goes elsewhere.
        for sid in ids:
            if stripe_of(runtime, sid) != stripe:
                with runtime.address(sid) as reference:  # type: ignore[union-attr]
                    reference.write(b"x")
        for _ in range(3 * runtime._segment.layout.stripes):
            ours, peers = socket.socketpair()
            new = runtime.create_socket(ours)
            assert stripe_of(runtime, new) != stripe
            assert runtime.set_failed(new)
            peers.close()
        assert len(runtime.processes()) == 3, "it is alive: nobody reaps it"
        os.kill(stopped.pid, signal.SIGCONT)
        stopped.finish()
        with runtime.address(blocked) as reference:  # type: ignore[union-attr]
            reference.write(b"at last")
        assert pairs[0][1].recv(20) == b"at last"
        assert runtime.audit() == []
        stopped.run(f"rt.address({blocked}).write(b'me too')")
        assert pairs[0][1].recv(20) == b"me too"
    for sid, (_, peers) in zip(ids, pairs, strict=True):
        runtime.set_failed(sid)
        peers.close()


def test_a_process_stopped_outside_every_stripe_hinders_nobody(runtime: shmsock.Runtime) -> None:
    with Peer(runtime.name, "worker") as stopped:
        stopped.run(
            "import socket; mine, theirs = socket.socketpair(); sid = rt.create_socket(mine)"
        )
        sid = stopped.ask("sid")
        ours, peers = connected("unix")
        shared = runtime.create_socket(ours)
        stopped.run(f"ref = rt.address({shared}); ref.write(b'1')")
        wait_until(lambda: runtime.has_descriptor(sid))
        stop(stopped)
        with runtime.address(sid) as reference:  # type: ignore[union-attr]
            reference.write(b"to its own client")
        with runtime.address(shared) as reference:  # type: ignore[union-attr]
            reference.write(b"2")
        with runtime._recovery.arbitrated(WATCHDOG_S) as arbiter:
            assert arbiter
            for stripe in range(runtime._segment.layout.stripes):
                assert runtime._recovery.retire(stripe), "its semaphores are all replaced meanwhile"
        assert runtime.set_failed(sid, errno.EPERM, "out")
        assert len(runtime.processes()) == 2
        assert runtime.attached(shared) == [stopped_index(runtime, stopped)]
        os.kill(stopped.pid, signal.SIGCONT)
        assert stopped.ask("theirs.recv(100).decode()") == "to its own client"
        assert stopped.ask("theirs.recv(100).decode()") == "", "it has ended"
        assert stopped.ask("rt.address(sid) is None")
        stopped.run("ref.write(b'3'); ref.close()")
        stopped.run("again = rt.create_socket(socket.socketpair()[0]); rt.set_failed(again)")
        assert peers.recv(10) == b"123"
        assert runtime.attached(shared) == []
        assert runtime.audit() == []
        peers.close()
        runtime.set_failed(shared)


def stopped_index(runtime: shmsock.Runtime, peer: Peer) -> int:
    (index,) = [row.index for row in runtime.processes() if row.pid == peer.pid]
    return index


def test_a_killed_process_of_many_threads_gives_everything_back(runtime: shmsock.Runtime) -> None:
    """As the OOM killer does: no thread runs another instruction, wherever each of them was."""
    rng = random.Random(7)
    pairs = [socket.socketpair() for _ in range(8)]
    ids = [runtime.create_socket(ours) for ours, _ in pairs]

    def hammer(write: int) -> None:
        mine = shmsock.Runtime.attach(runtime.name)

        def work(seed: int) -> None:
            random_ = random.Random(seed)
            held: list[typing.Any] = []
            while True:
                held.append(mine.address(random_.choice(ids)))
                if len(held) > 5:
                    held.pop(random_.randrange(6)).close()
                new = mine.create_socket(socket.socketpair()[0])
                if random_.random() < 0.8:
                    mine.set_failed(new)
                with contextlib.suppress(OSError):
                    os.write(write, b".")

        for seed in range(4):
            threading.Thread(target=work, args=(seed,), daemon=True).start()
        signal.pause()

    for _ in range(6):
        read, write = os.pipe()
        os.set_blocking(write, False)
        with Forked(hammer, write) as child:
            for _ in range(rng.randrange(5, 60)):
                os.read(read, 1)
            child.kill()
        os.close(read)
        os.close(write)
        wait_until(lambda: (runtime.repair(), len(runtime.processes()) == 1)[1])
        assert [runtime.attached(sid) for sid in ids] == [[]] * 8
        assert runtime.in_use() == 8
        assert runtime.audit() == []
    for sid, (_, peers) in zip(ids, pairs, strict=True):
        assert runtime.set_failed(sid)
        peers.close()


# -- users ----------------------------------------------------------------------------------------


def names_and_modes(name: str) -> list[tuple[str, int, int]]:
    found = []
    for entry in sorted(os.listdir("/dev/shm")):
        if name in entry:
            status = os.lstat(f"/dev/shm/{entry}")
            found.append((entry, status.st_mode, status.st_uid))
    return found


@as_root
def test_another_user_is_refused_at_every_door_and_changes_nothing(
    runtime: shmsock.Runtime,
) -> None:
    name, address = runtime.name, runtime._segment.control_address()
    generation = runtime._segment.cells.ctl[0] >> 2
    runtime.groups.names()

    def connect() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(address)

    doors: dict[str, collections.abc.Callable[[], object]] = {
        "attach": lambda: shmsock.Runtime.attach(name),
        "create": lambda: shmsock.Runtime.create(name, slots=16, stripes=2),
        "take over": lambda: shmsock.Runtime.take_over(name),
        "clean": lambda: names.clean(name),
        "segment": lambda: os.open(f"/dev/shm/shmsock.{name}", os.O_RDONLY),
        "semaphore": lambda: posix_ipc.Semaphore(f"/shmsock.{name}.0.{generation}"),
        "remove a semaphore": lambda: posix_ipc.unlink_semaphore(f"/shmsock.{name}.0.{generation}"),
        "lock file": lambda: os.open(f"{runtime.run_directory}/lock", os.O_RDONLY),
        "run directory": lambda: os.listdir(runtime.run_directory),
        "groups": lambda: os.open(f"{runtime.run_directory}/groups/groups.mdb", os.O_RDONLY),
        "channel": connect,
    }

    def try_doors() -> list[str]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        opened = []
        for door, knock in doors.items():
            try:
                knock()
            except (PermissionError, posix_ipc.PermissionsError) as error:
                if door in ("create", "attach") and name not in str(error):
                    opened.append(f"{door} does not name it: {error}")
            except BaseException as error:
                opened.append(f"{door}: {error!r}")
            else:
                opened.append(door)
        return opened

    before = names_and_modes(name)
    with open(f"/dev/shm/shmsock.{name}", "rb") as file:
        whole = file.read()
        rows = len(runtime.processes())
        assert Forked(try_doors).result() == []
        assert names_and_modes(name) == before
        file.seek(0)
        after = file.read()
    beats = runtime._segment.columns.row_heartbeat_ns
    start = beats.ctypes.data - runtime._segment.columns.row_state.ctypes.data + 4096
    assert whole[:start] == after[:start]
    assert whole[start + beats.nbytes :] == after[start + beats.nbytes :]
    assert len(runtime.processes()) == rows
    assert all(not mode & 0o077 for _, mode, _ in before)


@as_root
def test_a_name_that_another_user_has_taken_is_a_permission_error(name: str) -> None:
    """Without the run directory, which would already say so: the segment alone is another's."""
    with open(f"/dev/shm/shmsock.{name}", "wb") as file:
        file.write(b"x" * 100)
        os.fchmod(file.fileno(), 0o600)

    def create() -> str:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            shmsock.Runtime.create(name, slots=16, stripes=2)
        except PermissionError as error:
            return str(error)
        return "created"

    try:
        assert f"another user: '/shmsock.{name}'" in Forked(create).result()
    finally:
        os.unlink(f"/dev/shm/shmsock.{name}")
        with contextlib.suppress(FileNotFoundError):
            names.remove(name)


# -- clocks ---------------------------------------------------------------------------------------


def test_nothing_waits_or_decides_by_a_clock_that_can_be_set() -> None:
    """CLOCK_REALTIME is stepped by NTP and people; posix_ipc's timeouts are of it: none is used."""
    for path in pathlib.Path(REPOSITORY, "shmsock").glob("*.py"):
        source = path.read_text()
        for word in ("time.time(", "time_ns(", "CLOCK_REALTIME", "datetime", "SEM_TIMEOUT"):
            source = source.replace("monotonic_ns(", "")
            assert word not in source, f"{path.name} uses {word}"
        for line in source.splitlines():
            if ".acquire(" in line and "semaphore" in line:
                assert ".acquire(0)" in line, line
