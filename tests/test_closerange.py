"""Foreign code closes our descriptors (``closerange``, a daemoniser): who lost them is fenced, says
so, and neither writes to nor closes what its numbers have become."""

from __future__ import annotations

import errno
import os
import signal

import pytest

import shmsock
from shmsock.layout import LIVE
from shmsock.processes import FIRST_ROW

from .helpers import Forked, Member, Peer, connected, read_to_end, wait_until

# In the participant: a way to sweep, to reuse every number that was swept, and to look afterwards.
SWEEP = """
    import errno, fcntl, os, select, socket, tempfile, time
    import shmsock
    from tests.helpers import descriptors, wait_until

    def sweep(*ranges):
        before = set(descriptors())
        for begin, end in ranges:
            os.closerange(begin, end)
        gone = sorted(before - set(descriptors()))
        global used, ends
        used, ends = {}, []
        above = max(gone) + 1
        for position, fd in enumerate(gone):     # the user's own files and sockets from here on
            if position % 2:
                source = os.memfd_create("users")
            else:
                mine, theirs = socket.socketpair()
                ends.append(socket.socket(fileno=fcntl.fcntl(theirs, fcntl.F_DUPFD, above)))
                ends[-1].setblocking(False)
                theirs.close()
                source = mine.detach()
            if source != fd:
                os.dup2(source, fd, False)
                if source not in gone or source in used:
                    os.close(source)
            used[fd] = os.fstat(fd).st_ino

    def unharmed():
        for fd, inode in used.items():
            if os.fstat(fd).st_ino != inode:
                return f"{fd} is another file"
            if os.path.exists(f"/proc/self/fd/{fd}") and os.fstat(fd).st_size:
                return f"{fd} was written to"
        for end in ends:
            try:
                found = end.recv(100)
            except BlockingIOError:
                continue
            return f"a socket received {found!r}, or its end was closed"
        return ""

    def told():
        try:
            rt.in_use()
        except shmsock.ClosedError:
            return True
        return False
"""

RANGES = {
    "low": "(3, 512)",
    "all": "(3, 65536)",
    "the lock file": "(512, 65536)",
    "the epoll": "(rt._service.epoll.fileno(), rt._service.epoll.fileno() + 1)",
    "the eventfd": "(rt._service._wake_fd, rt._service._wake_fd + 1)",
}


@pytest.mark.parametrize("what", RANGES)
def test_who_lost_its_descriptors_is_reaped_says_so_and_harms_no_other_file(
    runtime: shmsock.Runtime, what: str
) -> None:
    ours, peers = connected("unix")
    shared = runtime.create_socket(ours)
    with peers, Peer(runtime.name, "worker") as swept, Peer(runtime.name) as witness:
        swept.run(SWEEP)
        swept.run(
            f"""
            mine, theirs = socket.socketpair()
            sid = rt.create_socket(mine)
            ref = rt.address({shared}); ref.write(b"before")
            rt.groups.add("news", {shared})
            wait_until(lambda: rt._descriptors.peek(sid).put)
            """
        )
        assert peers.recv(10) == b"before"
        index, sid = swept.ask("rt.index"), swept.ask("sid")
        rows = bytes(witness.ask("list(rt._segment.columns.row_state.tobytes())"))
        # The user goes on at once, before anybody can have noticed.
        swept.run(f"sweep({RANGES[what]})")
        wait_until(lambda: swept.ask("told()"), "it is told")
        assert swept.ask("unharmed()") == ""
        for call in ("rt.audit()", "ref.write(b'x')", f"rt.set_failed({shared})"):
            with pytest.raises(AssertionError, match="ClosedError"):
                swept.run(call)
        wait_until(lambda: len(runtime.processes()) == 2, "it is reaped")
        assert runtime.status(sid) is shmsock.Status.GONE
        assert runtime._io.error_of(sid)[0] == errno.EOWNERDEAD
        assert runtime.attached(shared) == []
        # Nobody else was taken for dead by it, whatever its numbers answered.
        now = bytes(witness.ask("list(rt._segment.columns.row_state.tobytes())"))
        assert [i for i in range(0, len(rows), 8) if now[i : i + 8] != rows[i : i + 8]] == [
            8 * index
        ]
        swept.run("ref.close(); del ref; rt.close()")
        assert swept.ask("unharmed()") == ""
        swept.run("import gc; del rt; gc.collect()")
        assert swept.ask("unharmed()") == ""
        swept.run(f"rt = shmsock.Runtime.attach({runtime.name!r})")
        swept.run(f"rt.address({shared}).write(b'after')")
        assert peers.recv(10) == b"after"
        witness.run(f"rt.address({shared}).write(b'too')")
        assert peers.recv(10) == b"too"
        assert runtime.audit() == []
        assert swept.ask("unharmed()") == ""
    runtime.set_failed(shared)


def test_a_dispatcher_whose_descriptors_were_closed_ends_with_closed_error(
    runtime: shmsock.Runtime,
) -> None:
    with Peer(runtime.name, "worker") as swept:
        swept.run(SWEEP)
        swept.run(
            """
            dispatcher = shmsock.Dispatcher(rt)
            sid = rt.create_socket(socket.socketpair()[0])
            dispatcher.add_consumer(sid, lambda ref: None)
            dispatcher.call_soon(lambda: sweep((3, 65536)))
            try: dispatcher.run()
            except shmsock.ClosedError as error: ended = str(error)
            """
        )
        assert swept.ask("ended")
        assert swept.ask("unharmed()") == ""
        swept.run("dispatcher.close(); rt.close()")
        assert swept.ask("unharmed()") == ""
        wait_until(lambda: len(runtime.processes()) == 1)
        assert runtime.in_use() == 0
        assert runtime.audit() == []


def test_a_host_whose_descriptors_were_closed_can_be_followed(name: str) -> None:
    with Peer() as host:
        host.run(SWEEP)
        host.run(f"rt = shmsock.Runtime.create({name!r}, slots=64, stripes=4, processes=8)")
        with shmsock.Runtime.attach(name, role="worker") as runtime:
            ours, peers = connected("unix")
            sid = runtime.create_socket(ours)
            wait_until(lambda: host.ask("len(rt._store)") == 1)
            host.run(f"sid = {sid}; sweep((3, 65536))")
            wait_until(lambda: host.ask("told()"), "it is told")

            def follow() -> shmsock.Runtime | None:
                try:
                    return shmsock.Runtime.take_over(name)
                except shmsock.AlreadyRunningError:
                    return None

            followed = wait_until(follow)
            assert followed is not None
            with followed as following:
                wait_until(lambda: following.has_descriptor(sid))
                address = following._segment.control_address()
                host.run("rt.__exit__(None, None, None)")
                assert host.ask("unharmed()") == ""
                assert following._segment.control_address() == address, "not its own any more"
                assert os.path.exists(f"/dev/shm/shmsock.{name}")
                with runtime.address(sid) as reference:  # type: ignore[union-attr]
                    reference.write(b"still here")
                assert peers.recv(20) == b"still here"
                assert following.audit() == []
                runtime.set_failed(sid)
                assert read_to_end(peers) == b""
                peers.close()
                runtime.close()


def test_groups_never_write_into_a_file_that_took_their_numbers(runtime: shmsock.Runtime) -> None:
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)
    runtime.groups.add("news", sid)
    with peers, Peer(runtime.name) as swept:
        swept.run(SWEEP)
        swept.run("rt.groups.names()")
        swept.run("rt._tick = lambda: None")  # nothing may be noticed before the write
        swept.run("sweep((3, 65536))")
        with pytest.raises(AssertionError, match="ClosedError"):
            swept.run(f"rt._groups.add('weather', {sid})")
        assert swept.ask("unharmed()") == ""
        swept.run("rt._groups.close()")
        assert swept.ask("unharmed()") == ""
        assert runtime.groups.names() == [b"news"]
        assert runtime.groups.add("weather", sid)
        swept.run("rt.close()")
        assert swept.ask("unharmed()") == ""
    runtime.set_failed(sid)


def test_a_process_that_was_reaped_does_not_reap_the_next_tenant_of_its_row(
    runtime: shmsock.Runtime,
) -> None:
    """Taken for dead while alive; its row has another tenant when it closes."""
    with Peer(runtime.name) as late:
        index = late.ask("rt.index")
        late.run("rt._service.close()")  # no timer: it does not notice by itself
        late.run(f"import os; os.close(os.open({runtime.run_directory!r} + '/lock', os.O_RDONLY))")
        wait_until(lambda: len(runtime.processes()) == 1)
        with Peer(runtime.name) as tenant:
            assert tenant.ask("rt.index") == index
            with pytest.raises(AssertionError, match="ClosedError"):
                late.run("import socket; rt.create_socket(socket.socketpair()[0])")
            late.run("rt.close()")
            assert runtime._segment.cells.row_state[index] & 0xFF == LIVE
            tenant.run("import socket; a, b = socket.socketpair(); sid = rt.create_socket(a)")
            assert tenant.ask("rt.set_failed(sid)")
    wait_until(lambda: len(runtime.processes()) == 1)


def test_a_reaped_process_does_not_take_its_byte_back(runtime: shmsock.Runtime) -> None:
    """Or its row, which is free by now, could never be had by anybody else."""
    with Peer(runtime.name) as late:
        index = late.ask("rt.index")
        late.run(
            f"""
            import os
            rt._lock_file.reassert = lambda: True    # it is late with looking after its locks
            os.close(os.open({runtime.run_directory!r} + '/lock', os.O_RDONLY))
            """
        )
        wait_until(lambda: runtime.repair()["reaped"])
        late.run("del rt._lock_file.reassert; rt._service.ensure()")
        wait_until(lambda: late.ask("rt._engine.closed"))
        assert runtime._lock_file.holder(FIRST_ROW + index) == 0
        with Peer(runtime.name) as tenant:
            assert tenant.ask("rt.index") == index


def test_another_files_number_never_makes_everybody_look_dead(table: Member) -> None:
    """Of any other file every byte is free: it would fence and reap the whole runtime."""
    before = table.bytes()

    def swept() -> list[str]:
        member = Member.attach(table.name)
        fd = member.lock_file._fd
        with open("/dev/null", "r+b", 0) as null:
            os.dup2(null.fileno(), fd, False)
        raised = []
        for call in (
            member.processes.dead,
            member.recovery.look,
            lambda: member.lock_file.holder(FIRST_ROW + table.index),
            lambda: member.lock_file.try_hold(0),
            lambda: member.recovery.arbitrated(0).__enter__(),
        ):
            try:
                call()
            except shmsock.ClosedError:
                raised.append("closed")
        os.kill(os.getpid(), signal.SIGKILL)
        return raised

    with Forked(swept) as child:
        child.wait()
    table.recovery.look()
    assert table.processes.taken() == [table.index]
    row = table.index * 8
    start = table.columns.row_state.ctypes.data - table.columns.versioned_ref.ctypes.data
    assert start < 0
    assert table.bytes()[:row] == before[:row]
    assert table.recovery.audit() == []
