"""Messages whose descriptors do not arrive (EMFILE), or cannot be sent (ETOOMANYREFS).

Each that may arrive without its descriptors is answered, or asked for by who misses them.
"""

from __future__ import annotations

import array
import errno
import os
import resource
import select
import socket

from shmsock import Runtime, channel

from .helpers import Forked, Peer, connected, holders_of, out_of_descriptors, wait_until
from .test_full_channel import link_to
from .test_kill_points_channel import assert_nobody_has, inode_of
from .test_rehome import ask, echo_worker

# -- without their descriptors --------------------------------------------------------------------


def limit_files(peer: Peer) -> None:
    """From here on this process can open nothing more."""
    peer.run(
        """
        import os, resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        low = max(int(fd) for fd in os.listdir("/proc/self/fd") if int(fd) < 500)
        resource.setrlimit(resource.RLIMIT_NOFILE, (low + 1, hard))
        filler = []
        try:
            while True:
                filler.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        """
    )


def free_files(peer: Peer) -> None:
    peer.run(
        """
        while filler:
            os.close(filler.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        """
    )


def test_pass_to_a_worker_out_of_descriptors_fails_the_socket_and_nothing_else(
    runtime: Runtime,
) -> None:
    with echo_worker(runtime) as (worker, index):
        limit_files(worker)
        ours, client = connected()
        with client:
            sid = runtime.create_socket(ours, owner=index)
            inode = inode_of(runtime, sid)
            assert runtime.pass_to(index, [sid]) == [sid]
            assert client.recv(100) == b""
            assert_nobody_has(inode, worker.pid)
        free_files(worker)
        ours, client = connected()
        with client:
            client.settimeout(60)
            sid = runtime.create_socket(ours, owner=index)
            assert runtime.pass_to(index, [sid]) == [sid]
            assert ask(client, b"room again") == b"room again"
            runtime.set_failed(sid)


def test_a_listener_that_came_without_its_descriptor_is_asked_for(runtime: Runtime) -> None:
    with echo_worker(runtime) as (worker, _):
        limit_files(worker)
        listener = socket.create_server(("127.0.0.1", 0))
        sid = runtime.create_socket(listener, on_owner_death="rehome")
        runtime.spread([sid])
        inode = inode_of(runtime, sid)
        ours, client = connected("unix")
        with client:  # what comes after it is heard: so was the listener
            assert runtime.pass_to(
                worker.ask("rt.index"), [runtime.create_socket(ours, owner=worker.ask("rt.index"))]
            )
            assert client.recv(100) == b""
        assert holders_of(inode, [worker.pid]) == []
        free_files(worker)
        wait_until(lambda: holders_of(inode, [worker.pid]), "it holds a duplicate")
        runtime.set_failed(sid)
        assert_nobody_has(inode, worker.pid)


def test_put_to_a_host_out_of_descriptors_is_refused_and_made_again(runtime: Runtime) -> None:
    with Peer(runtime.name) as creator:
        creator.run("assert rt._descriptors.connect()")
        wait_until(lambda: link_to(runtime, creator.ask("rt.index")), "it is connected")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            creator.run(
                f"sock = __import__('socket').create_connection({listener.getsockname()!r})"
            )
            client = listener.accept()[0]
        with client:
            with out_of_descriptors():
                sid = creator.ask("rt.create_socket(sock)")
                creator.run("rt._descriptors.tick()")
                assert not runtime.has_descriptor(sid)
            wait_until(lambda: runtime.has_descriptor(sid), "it is put again")
            runtime.set_failed(sid)
            assert client.recv(100) == b""


# -- too many in flight ---------------------------------------------------------------------------


def too_many_in_flight() -> str:
    """As somebody without privileges: the kernel bounds what a user has in flight."""
    if os.getuid() == 0:
        os.setresuid(61234, 61234, 61234)
    limit = 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit + 60, limit + 60))
    read, write = os.pipe()
    blocker, drain = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    rights = array.array("i", [read] * 101)
    blocker.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    ended: list[channel.Link] = []
    events: list[int] = []
    link = channel.Link(
        ours,
        lambda fd, wanted, handler: events.append(wanted),
        lambda fd: None,
        lambda sid: write,
        lambda link, message: None,
        ended.append,
    )
    try:
        channel.send(ours, channel.PUT, [7], [write])
    except BlockingIOError as error:
        said = errno.errorcode[error.errno or 0]
    else:
        said = "nothing"
    assert link.tell(channel.PUT, [7])
    assert link.unsent == 1
    assert not ended
    assert all(not wanted & select.EPOLLOUT for wanted in events)  # it would spin
    drain.recv(1)  # the in-flight descriptors are closed by who does not ask for them
    link.flush()
    message = channel.receive(theirs)
    assert message is not None
    assert message.ids == (7,)
    assert len(message.descriptors) == 1
    assert os.fstat(message.descriptors[0]).st_ino == os.fstat(write).st_ino
    assert link.unsent == 0
    return said


def test_too_many_descriptors_in_flight_wait_and_hang_up_on_nobody() -> None:
    assert Forked(too_many_in_flight).result() == "ETOOMANYREFS"
