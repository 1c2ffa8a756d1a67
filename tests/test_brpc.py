"""The behaviours that the tests of apache/brpc's Socket show, each as a test of its name.

Some were here under a name of our own; the rest follow below. What brpc tests, and where we do:

    brpc_socket_unittest
      not_recycle_until_zero_nref        below, with real sockets; test_table: not_recycled_until...
      authentication                     one winner of many: test_table: exactly_one_of_many...;
                                         authentication itself is the protocol's here
      single_threaded_write              below
      single_threaded_connect_and_write  below, with accepted sockets: connecting is the caller's
      fail_to_connect                    below: writing to who has gone
      health_check (3 tests)             no revival here: a failed id stays failed; below
      multi_threaded_write               test_writing: four_processes_write..., threads_of_one...
      keepalive, tcp_user_timeout,       below: a socket's options are its creator's, in every
      socket_buffer_options (6 tests)    process; there are no options of our own
      packed_ptr                         test_layout: ids are packed and read back
    brpc_event_dispatcher_unittest
      has_epollrdhup                     prints only
      versioned_ref                      below: brpc's carries into the version, ours cannot
      versioned_ref_with_id              test_table: versioned_ref_with_id, and its neighbours
      customize_dispatch_task            below
    brpc_socket_map_unittest
      disable_health_check               below: found as failed while somebody holds it
      idle_timeout, max_pool_size        no client pools here
    resource_pool_unittest               (in test_brpc_pool)
      change_config                      test_layout: sizes are fitted, or refused
      sanity, get_int, verify_get        below
      validator                          below: what cannot be created takes no slot
      get_and_return, single and multi   below
      atomic_array_init, get_perf        about the compiler; a bench
    brpc_input_messenger_unittest
      dispatch_tasks                     below
    brpc_server_unittest
      close_idle_connections             no idle limit here
      logoff_and_multiple_start          test_supervisor: a_busy_client_is_waited_for...

What brpc does not test, and we do: wrap of the version, stale ids against a reused slot, its lost
recycle D1 (test_table), EMFILE at accept (test_bad_input), fork (test_fork), order of each writer
(test_writing); its D4 and D5 below; D2, D3 need a revival; D8, test_socket: it ends at once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import threading

import pytest

import shmsock

from .helpers import Member, Peer, after_a_round, connected, read_to_end, wait_until

SLOT = 0xFFFFFFFF
GONE, FAILED, ALIVE = shmsock.Status.GONE, shmsock.Status.FAILED, shmsock.Status.LIVE


def hold(runtime: shmsock.Runtime, sid: int) -> shmsock.SocketRef:
    reference = runtime.address(sid)
    assert reference is not None
    return reference


def exactly(sock: socket.socket, size: int) -> bytes:
    sock.settimeout(60)
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        assert chunk, f"ended after {data!r}"
        data += chunk
    return data


# -- brpc_socket_unittest -----------------------------------------------------------------------


def test_not_recycle_until_zero_nref_with_a_real_descriptor(runtime: shmsock.Runtime) -> None:
    ours, peers = connected()
    inode, peer = os.fstat(ours.fileno()).st_ino, ours.getpeername()
    with peers:
        sid = runtime.create_socket(ours, b"kept")
        reference = hold(runtime, sid)
        assert reference.id == sid
        assert os.fstat(reference.fileno()).st_ino == inode
        assert runtime.set_failed(sid, errno.ECONNRESET, "over")
        assert runtime.address(sid) is None
        assert runtime.status(sid) is FAILED
        assert reference.failed
        assert reference.error == (errno.ECONNRESET, "over")
        assert reference.peer == f"{peer[0]}:{peer[1]}"
        assert reference.user_data == b"kept"
        reference.close()
        assert runtime.status(sid) is GONE
        assert runtime.address_failed_as_well(sid) is None
        assert read_to_end(peers) == b""


def test_single_threaded_write_of_every_kind_of_message_in_rounds(
    runtime: shmsock.Runtime,
) -> None:
    ours, peers = connected("unix")
    with peers:
        sid = runtime.create_socket(ours)
        with hold(runtime, sid) as reference:
            for number in range(20):
                text = b"hello %04d" % number
                if number % 4 == 0:
                    reference.write(text)
                elif number % 4 == 1:  # one that cannot be written leaves nothing on the wire
                    with pytest.raises(TypeError):
                        reference.write(text, "no bytes")  # type: ignore[arg-type]
                    continue
                elif number % 4 == 2:  # a batch, empty ones among it
                    reference.write(b"", text[:3], bytearray(text[3:5]), b"", text[5:])
                else:
                    reference.write(memoryview(text))
                assert exactly(peers, len(text)) == text
            assert runtime.set_failed(sid)
        assert runtime.status(sid) is GONE
        assert read_to_end(peers) == b""


def test_accept_and_write_then_stop_and_a_new_life_of_the_slot_starts_clean(name: str) -> None:
    with shmsock.Runtime.create(name, slots=1, stripes=1, processes=4) as runtime:
        ids = set()
        for _ in range(3):
            ours, peers = connected()
            with peers:
                sid = runtime.create_socket(ours)
                assert sid & SLOT == 0
                ids.add(sid)
                with hold(runtime, sid) as reference:
                    assert reference.error == (0, "")
                    assert (reference.user_data, reference.busy) == (b"", False)
                    assert runtime.sockets()[0]["bytes_in"] == 0
                    for number in range(20):
                        peers.sendall(b"%02d" % number)
                        assert reference.recv(2) == b"%02d" % number
                        reference.write(b"%02d" % number)
                        assert exactly(peers, 2) == b"%02d" % number
                    reference.user_data, reference.busy = b"left over", True
                    fd = reference.fileno()
                    assert reference.set_failed(errno.EIO, "left over")
                assert runtime.address(sid) is None
                assert read_to_end(peers) == b""
                wait_until(functools.partial(_is_closed, fd), "its descriptor is closed")
        assert len(ids) == 3


def _is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError as error:
        return error.errno == errno.EBADF
    return False


def test_fail_to_write_is_told_to_every_writer_and_the_socket_fails_once(
    runtime: shmsock.Runtime,
) -> None:
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)
    peers.close()
    told: list[int] = []

    def write() -> None:
        with contextlib.ExitStack() as stack:
            reference = runtime.address_failed_as_well(sid)
            if reference is None:
                told.extend([errno.EPIPE] * 10)  # the last holder of the failed one let go
                return
            stack.enter_context(reference)
            for _ in range(10):
                try:
                    reference.write(b"anybody there?")
                except shmsock.SocketFailedError as error:
                    told.append(error.code)

    with hold(runtime, sid):
        threads = [threading.Thread(target=write) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(told) == 80
        assert set(told) <= {errno.EPIPE, errno.ECONNRESET}
        assert not runtime.set_failed(sid)
    assert runtime.status(sid) is GONE


def test_failed_socket_is_never_revived(table: Member, other: Member) -> None:
    sid = table.new()
    with table.engine.address(sid):
        assert table.engine.set_failed(sid, 1, "")
        for _ in range(3):
            other.recovery.look()
            assert not other.engine.change_owner(sid, table.word, other.word)
            assert other.engine.address(sid) is None
    created = [table.new() for _ in range(table.layout.slots)]
    assert sid not in created
    assert table.engine.status(sid) is GONE


OPTIONS = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 11),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 12),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 3000),
    (socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16),
]


def test_keepalive_timeouts_and_buffers_are_what_the_creator_set_in_every_process(
    runtime: shmsock.Runtime,
) -> None:
    plain, its_peer = connected()
    ours, peers = connected()
    with its_peer, peers, Peer(runtime.name) as process:
        defaults = [plain.getsockopt(level, option) for level, option, _ in OPTIONS]
        for level, option, value in OPTIONS:
            ours.setsockopt(level, option, value)
        chosen = [ours.getsockopt(level, option) for level, option, _ in OPTIONS]
        assert chosen != defaults
        numbers = [(level, option) for level, option, _ in OPTIONS]
        process.run("import socket, os")
        for sock, expected in ((plain, defaults), (ours, chosen)):
            sid = runtime.create_socket(sock)
            process.run(f"ref = rt.address({sid}); s = socket.socket(fileno=os.dup(ref.fileno()))")
            assert process.ask(f"[s.getsockopt(*each) for each in {numbers}]") == expected
            process.run("s.close(); ref.close()")


# -- brpc_event_dispatcher_unittest -------------------------------------------------------------


def test_versioned_ref_never_carries_a_count_into_the_version(table: Member) -> None:
    """brpc adds -1 to the low half, and 2 + (0, -1) is (1, 1). Ours is stored whole."""
    sid = table.new()
    slot, version = sid & SLOT, sid >> 32
    for nonsense in (0, 2, SLOT):
        table.cells.versioned_ref[slot] = version << 32 | nonsense
        reference = table.engine.address(sid)
        assert table.cells.versioned_ref[slot] == version << 32 | 2
        table.cells.versioned_ref[slot] = version << 32 | nonsense
        reference.close()
        assert table.cells.versioned_ref[slot] == version << 32 | 1


def test_customized_dispatch_of_ten_thousand_notifications_loses_none(
    runtime: shmsock.Runtime,
) -> None:
    dispatcher = shmsock.Dispatcher(runtime)
    ours, peers = connected("unix")
    got = bytearray()

    def read(reference: shmsock.SocketRef) -> bool:
        with contextlib.suppress(BlockingIOError):
            while chunk := reference.recv(7):
                got.extend(chunk)
        return False

    sid = runtime.create_socket(ours)
    ended: list[int] = []
    assert dispatcher.add_consumer(sid, read, lambda sid, code, text: ended.append(sid))

    def notify() -> None:
        for _ in range(10_000):
            peers.send(b"x")

    with peers:
        notifier = threading.Thread(target=notify)
        notifier.start()
        wait_until(after_a_round(dispatcher, lambda: len(got) == 10_000))
        notifier.join()
        dispatcher.run_once(0)
        assert got == b"x" * 10_000
        assert runtime.set_failed(sid)
        wait_until(after_a_round(dispatcher, lambda: ended == [sid]))
        assert runtime.address(sid) is None
    dispatcher.close()


# -- brpc_socket_map_unittest -------------------------------------------------------------------


def test_disabled_health_check_leaves_it_failed_until_the_map_lets_go(
    table: Member, other: Member
) -> None:
    sid = table.new()
    kept_in_a_map = {"peer": table.engine.address(sid)}
    assert other.engine.set_failed(sid, 1, "")
    with other.engine.address(sid, True) as reference:
        assert reference.failed
        assert table.nref(sid) == 2
    assert table.nref(sid) == 1
    kept_in_a_map.pop("peer").close()
    assert other.engine.address(sid, True) is None


# -- brpc_input_messenger_unittest, and D5 ------------------------------------------------------


def test_dispatch_tasks_of_six_clients_arrive_whole_and_in_order(runtime: shmsock.Runtime) -> None:
    dispatcher = shmsock.Dispatcher(runtime)
    got: dict[int, bytearray] = {}

    def read(reference: shmsock.SocketRef) -> bool:
        with contextlib.suppress(BlockingIOError):
            got[reference.id].extend(reference.recv(1000))
            return True  # there may be more; others first
        return False

    def said(client: int) -> bytes:
        return b"".join(b"client %d says %016d\n" % (client, number) for number in range(1024))

    with contextlib.ExitStack() as stack:
        stack.callback(dispatcher.close)
        sids, threads = [], []
        for client in range(6):
            ours, peers = connected("unix")
            stack.enter_context(peers)
            sids.append(runtime.create_socket(ours))
            got[sids[-1]] = bytearray()
            assert dispatcher.add_consumer(sids[-1], read)
            threads.append(threading.Thread(target=peers.sendall, args=(said(client),)))
        for thread in threads:
            thread.start()
        total = 6 * len(said(0))
        wait_until(after_a_round(dispatcher, lambda: sum(map(len, got.values())) == total))
        for thread in threads:
            thread.join()
        for client, sid in enumerate(sids):
            assert got[sid] == said(client)


def test_callback_of_a_failure_may_do_anything_to_the_runtime(runtime: shmsock.Runtime) -> None:
    """brpc's D5: BeforeRecycle ran under the acceptor's mutex, and took it again."""
    dispatcher = shmsock.Dispatcher(runtime)
    made: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.callback(dispatcher.close)

        def one() -> int:
            ours, peers = connected("unix")
            stack.enter_context(peers)
            return runtime.create_socket(ours)

        first, second = one(), one()

        def ended(sid: int, code: int, text: str) -> None:
            assert runtime.address(sid) is None
            made.append(one())
            assert dispatcher.add_consumer(made[-1], lambda ref: False)
            assert runtime.set_failed(second)
            assert runtime.audit() == []

        assert dispatcher.add_consumer(first, lambda ref: False, ended)
        assert runtime.set_failed(first)
        wait_until(after_a_round(dispatcher, lambda: made))
        assert runtime.status(made[0]) is ALIVE
        assert runtime.status(second) is GONE
