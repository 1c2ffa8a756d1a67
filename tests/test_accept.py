"""``Runtime.accept`` and ``deposit``: connections become Sockets in batches, whoever is killed."""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import os
import signal
import socket
import typing

import pytest

import shmsock
from shmsock import Dispatcher, Runtime, Status, TableFullError

from .helpers import Forked, Peer, connected, read_to_end, wait_until

FAMILIES: dict[str, typing.Any] = {"tcp": ("127.0.0.1", 0), "tcp6": ("::1", 0), "unix": ""}


@contextlib.contextmanager
def listening(family: str = "tcp") -> collections.abc.Iterator[socket.socket]:
    kind = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6, "unix": socket.AF_UNIX}[family]
    with socket.socket(kind) as listener:
        listener.bind(FAMILIES[family])
        listener.listen(500)
        listener.setblocking(False)
        yield listener


def connect(listener: socket.socket, name: str = "") -> socket.socket:
    sock = socket.socket(listener.family)
    sock.settimeout(60)
    if name:
        sock.bind(name)
    sock.connect(listener.getsockname())
    return sock


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_accepted_is_told_apart_in_nothing_from_what_create_socket_makes(
    runtime: Runtime, family: str
) -> None:
    with listening(family) as listener, connect(listener) as one, connect(listener) as two:
        sids = [runtime.accept(listener), runtime.create_socket(listener.accept()[0])]
        rows = runtime.sockets()
        assert rows["id"].tolist() == sids
        assert len({(row["kind"], row["owner"], row["state"]) for row in rows}) == 1
        for sid, client in zip(sids, (one, two), strict=True):
            ref = runtime.address(sid)
            assert ref is not None
            with ref:
                bound = client.getsockname()
                host = f"[{bound[0]}]" if family == "tcp6" else bound and bound[0]
                assert ref.peer == ("unix:-" if family == "unix" else f"{host}:{bound[1]}")
                assert os.get_inheritable(ref.fileno()) is False
                ref.write(b"hello")
            assert client.recv(100) == b"hello"
            assert runtime.set_failed(sid)
            assert read_to_end(client) == b""
        assert runtime.in_use() == 0
        assert runtime.audit() == []


def test_a_unix_client_that_has_a_name_is_known_by_it(runtime: Runtime) -> None:
    name = "\0" + runtime.name
    with listening("unix") as listener, connect(listener, name):
        ref = runtime.address(runtime.accept(listener))
        assert ref is not None
        assert ref.peer == f"unix:{runtime.name}"
        ref.set_failed()
        ref.close()


def test_accept_without_anybody_who_waits_changes_nothing(runtime: Runtime) -> None:
    with listening() as listener:
        with pytest.raises(BlockingIOError):
            runtime.accept(listener)
        listener.shutdown(socket.SHUT_RDWR)
        with pytest.raises(OSError, match="Invalid argument") as caught:
            runtime.accept(listener)
        assert caught.value.errno == errno.EINVAL
    assert runtime.in_use() == 0


def test_a_connection_for_nobody_stays_in_the_backlog(runtime: Runtime) -> None:
    with listening() as listener, connect(listener) as client:
        with pytest.raises(ValueError, match="process 7 is not alive"):
            runtime.accept(listener, owner=7)
        assert runtime.in_use() == 0
        sid = runtime.accept(listener)
        assert runtime.set_failed(sid)
        assert read_to_end(client) == b""


def test_a_full_table_gives_the_connection_back_to_be_turned_away(name: str) -> None:
    with (
        Runtime.create(name, slots=2, stripes=1, processes=4) as runtime,
        listening() as listener,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(connect(listener)) for _ in range(4)]
        sids = [runtime.accept(listener) for _ in range(2)]
        for client in clients[2:]:
            with pytest.raises(TableFullError) as caught:
                runtime.accept(listener)
            sock = caught.value.sock
            assert sock is not None
            with sock:
                sock.sendall(b"full")
            assert read_to_end(client) == b"full"
        assert runtime.sockets()["id"].tolist() == sorted(sids)
        assert runtime.audit() == []


# -- deposits ------------------------------------------------------------------------------------

ACCEPTS = """
import os, signal, socket
from shmsock import channel
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen(500)
listener.setblocking(False)
rt._descriptors.connect()
sent, send = [], channel.send
def counted(sock, kind, ids, *rest, **more):
    if kind == channel.PUT:
        sent.append(len(ids))
    send(sock, kind, ids, *rest, **more)
channel.send = counted
def accept(count, **options):
    return [rt.accept(listener, deposit=False, **options) for _ in range(count)]
"""


@contextlib.contextmanager
def acceptor(name: str, *more: str) -> collections.abc.Iterator[tuple[Peer, int]]:
    """A process that accepts, without the timer that would make up for a missing deposit."""
    with Peer(name, role="worker") as peer:
        peer.run(ACCEPTS)
        for source in more or ("rt._descriptors.tick = lambda: None",):
            peer.run(source)
        yield peer, peer.ask("listener.getsockname()[1]")


def dial(port: int, count: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port), 60) for _ in range(count)]


@contextlib.contextmanager
def clients_of(port: int, count: int) -> collections.abc.Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(client) for client in dial(port, count)]


def test_a_batch_is_deposited_in_as_few_messages_as_there_can_be(name: str) -> None:
    with (
        Runtime.create(name, slots=512, processes=8, stripes=8) as runtime,
        acceptor(name) as (peer, port),
        clients_of(port, 300) as clients,
    ):
        sids = peer.ask("(sids := accept(300))")
        assert not any(map(runtime.has_descriptor, sids))
        for sid in sids[:10]:
            assert runtime.set_failed(sid)
        peer.run("rt.deposit(sids); rt.deposit(sids)")
        for client in clients[:10]:  # the failure is felt by whoever had the only descriptor
            assert read_to_end(client) == b""
        wait_until(lambda: all(map(runtime.has_descriptor, sids[10:])), "the host has the rest")
        assert not any(map(runtime.has_descriptor, sids[:10]))
        assert peer.ask("sent")[:2] == [253, 37]
        for sid, client in zip(sids[10:], clients[10:], strict=True):
            with typing.cast(shmsock.SocketRef, runtime.address(sid)) as ref:
                ref.write(b"%d" % sid)
            assert client.recv(100) == b"%d" % sid
        assert runtime.audit() == []


def test_what_ends_before_its_deposit_is_never_given_to_the_host(runtime: Runtime) -> None:
    with acceptor(runtime.name) as (peer, port), clients_of(port, 3) as clients:
        sids = peer.ask("(sids := accept(3))")
        peer.run(
            """
            for sid in sids:
                with rt.address(sid) as ref:
                    ref.write(b"bye")
                    ref.release_additional_reference()
            """
        )
        for client in clients:
            assert read_to_end(client) == b"bye"
        peer.run("rt.deposit(sids)")
        assert peer.ask("sent") == []
        assert [runtime.status(sid) for sid in sids] == 3 * [Status.GONE]
        assert runtime.in_use() == 0


def test_a_deposit_that_was_forgotten_is_made_by_the_timer(runtime: Runtime) -> None:
    with acceptor(runtime.name, "pass") as (peer, port), clients_of(port, 3):
        sids = peer.ask("accept(3)")
        wait_until(lambda: all(map(runtime.has_descriptor, sids)), "the host has them")


def test_two_who_wait_for_each_others_new_sockets_both_go_on(name: str) -> None:
    with (
        Peer() as host,
        contextlib.ExitStack() as stack,
    ):
        host.run(f"import shmsock; rt = shmsock.Runtime.create({name!r}, slots=64, processes=8)")
        peers = [stack.enter_context(acceptor(name)) for _ in range(2)]
        clients = [stack.enter_context(clients_of(port, 1))[0] for _, port in peers]
        sids = [peer.ask("accept(1)")[0] for peer, _ in peers]
        for (peer, _), sid in zip(peers, reversed(sids), strict=True):
            peer.start(f"with rt.address({sid}) as ref: ref.write(b'across')")
        for peer, _ in peers:
            peer.finish()
        for client in clients:
            assert client.recv(100) == b"across"
        host.run("rt.close(unlink=True)")


@pytest.mark.parametrize("policy", ["rehome", "fail"])
def test_killed_in_the_middle_of_a_batch_each_connection_ends_or_lives_by_its_own_deposit(
    runtime: Runtime, policy: str
) -> None:
    with acceptor(runtime.name) as (peer, port), clients_of(port, 6) as clients:
        sids = peer.ask(f"(sids := accept(6, on_owner_death={policy!r}))")
        peer.start("rt.deposit(sids[:3]); os.kill(os.getpid(), signal.SIGKILL)")
        peer.process.wait(60)
        for client in clients[3:]:
            assert read_to_end(client) == b""  # their only descriptor died with it
        if policy == "fail":
            for client in clients[:3]:
                assert read_to_end(client) == b""
            wait_until(lambda: runtime.in_use() == 0, "every slot comes back")
            return
        wait_until(lambda: len(runtime.orphans()) == 6, "its sockets wait for an owner")
        wait_until(lambda: all(map(runtime.has_descriptor, sids[:3])), "what was sent arrives")
        assert [runtime.rehome(sid) for sid in sids] == 3 * [True] + 3 * [False]
        for sid, client in zip(sids[:3], clients, strict=False):
            client.sendall(b"still here")
            with typing.cast(shmsock.SocketRef, runtime.address(sid)) as ref:
                assert ref.recv(100) == b"still here"
        for sid in sids:
            assert runtime.set_failed(sid)
        wait_until(lambda: runtime.in_use() == 0, "every slot comes back")
        assert runtime.audit() == []


@pytest.mark.skipif(shmsock.ENGINE != "c", reason="of the C engine's own path")
@pytest.mark.parametrize("point", ["create_meta", "create_vref", "create_live"])
def test_killed_within_accept_the_connection_ends_and_the_slot_comes_back(
    runtime: Runtime, point: str
) -> None:
    with acceptor(runtime.name) as (peer, port), clients_of(port, 1) as (client,):
        peer.run("from shmsock import _engine")
        peer.start(f"_engine.arm({point!r}, signal.SIGKILL); accept(1)")
        assert peer.process.wait(60) == -signal.SIGKILL
        assert read_to_end(client) == b""
        wait_until(lambda: len(runtime.processes()) == 1, "it is reaped")
        assert runtime.in_use() == 0
        assert runtime.audit() == []


def test_a_socket_of_which_its_creator_kept_a_duplicate_ends_all_the_same(
    runtime: Runtime,
) -> None:
    ours, client = connected("tcp")
    with client, ours.dup() as kept:
        sid = runtime.create_socket(ours, deposit=False)
        assert runtime.set_failed(sid)
        assert read_to_end(client) == b""
        assert read_to_end(kept) == b""


# -- the loop ------------------------------------------------------------------------------------


class Interrupts:
    """A part of a runtime whose call of one name works, and ends in an interrupt all the same."""

    def __init__(self, part: typing.Any, at: str) -> None:
        self._part, self._at = part, at

    def __getattr__(self, name: str) -> typing.Any:
        if name != self._at:
            return getattr(self._part, name)

        def interrupted(*arguments: typing.Any, **named: typing.Any) -> None:
            getattr(self._part, name)(*arguments, **named)
            raise KeyboardInterrupt

        return interrupted


@pytest.mark.parametrize(
    ("part", "at"), [("_engine", "accept"), ("_descriptors", "keep"), ("_descriptors", "put")]
)
def test_an_interrupt_within_accept_ends_the_connection_and_leaves_nothing(
    runtime: Runtime, part: str, at: str
) -> None:
    whole = getattr(runtime, part)
    with listening() as listener, connect(listener) as client:
        setattr(runtime, part, Interrupts(whole, at))
        with pytest.raises(KeyboardInterrupt):
            runtime.accept(listener)
        setattr(runtime, part, whole)
        assert read_to_end(client) == b""
        wait_until(lambda: runtime.in_use() == 0, "its slot comes back")
        assert runtime.audit() == []


def test_an_interrupt_after_a_full_table_leaves_no_number(name: str) -> None:
    with (
        Runtime.create(name, slots=2, stripes=1) as runtime,
        listening() as listener,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(2):
            stack.enter_context(connect(listener))
            runtime.accept(listener)
        whole = typing.cast(typing.Any, runtime)._engine
        client = stack.enter_context(connect(listener))
        typing.cast(typing.Any, runtime)._engine = Interrupts(whole, "accept")
        with pytest.raises(KeyboardInterrupt):
            runtime.accept(listener)
        typing.cast(typing.Any, runtime)._engine = whole
        assert read_to_end(client) == b""


@pytest.mark.parametrize("whose", ["dispatcher", "service"])
def test_a_call_from_a_signal_handler_right_before_the_wait_ends_it(
    runtime: Runtime, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop does not wake itself for calls it makes: only until it has looked for the last time.

    The timer is taken away: it would end the wait too.
    """
    dispatcher = Dispatcher(runtime)
    runtime._service._timers.clear()
    real, looks = dispatcher._poll, 0

    def poll(timeout_s: float) -> list[tuple[int, int]]:
        nonlocal looks
        looks += 1
        if looks == 2:
            assert timeout_s == -1.0
            call = dispatcher.call_soon if whose == "dispatcher" else runtime._service.call_soon
            call(dispatcher.stop)
        return real(timeout_s if looks < 3 else 60.0)

    monkeypatch.setattr(dispatcher, "_poll", poll)
    dispatcher.call_soon(lambda: None)
    dispatcher.run()
    assert looks >= 2
    dispatcher.close()


def test_calls_that_the_loop_makes_itself_cost_no_wake_up(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = Dispatcher(runtime)
    woken: list[int] = []
    real = os.eventfd_write

    def write(fd: int, value: int) -> None:
        woken.append(fd)
        real(fd, value)

    order: list[str] = []

    def first() -> None:
        woken.clear()
        monkeypatch.setattr(os, "eventfd_write", write)
        runtime._service.call_soon(lambda: order.append("service"))
        dispatcher.call_soon(second)

    def second() -> None:
        order.append("dispatcher")
        dispatcher.call_later(0.0, last)

    def last() -> None:
        order.append("later")
        monkeypatch.setattr(os, "eventfd_write", real)
        dispatcher.stop()

    dispatcher.call_soon(first)
    dispatcher.run()
    assert sorted(order) == ["dispatcher", "later", "service"]
    assert woken == []
    dispatcher.close()


def test_a_forked_child_accepts_as_a_process_of_its_own(runtime: Runtime) -> None:
    with listening() as listener, connect(listener) as client:

        def accepts() -> tuple[int, int, int]:
            sid = runtime.accept(listener)
            ref = runtime.address(sid)
            assert ref is not None
            with ref:
                ref.write(b"from the child")
            row = runtime.sockets()[runtime.sockets()["id"] == sid][0]
            return runtime.index, int(row["owner"]), len(runtime.audit())

        with Forked(accepts) as child:
            index, owner, problems = child.result()
        assert (index, problems) == (owner, 0)
        assert index != runtime.index
        assert read_to_end(client) == b"from the child"
    wait_until(lambda: runtime.in_use() == 0, "its slot comes back")
