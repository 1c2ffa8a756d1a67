"""Hand-over between live processes: each ends well, whoever dies and whatever message is lost."""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import os
import signal
import socket

import pytest

import shmsock
from shmsock import Runtime, Status, Wish

from .helpers import Peer, wait_until
from .test_rehome import ECHO, ask, echo_worker, held, owner_of, place

# A giver: its dispatcher's thread does what is asked through `give`; `told` is what on_done said.
GIVE = """
told = []
def give(sid, index):
    said, done = [], threading.Event()
    def offer():
        try:
            with rt.address(sid) as ref:
                said.append(ref.hand_over(index, lambda *what: told.append(what)))
        except Exception as error:
            said.append(repr(error))
        done.set()
    dispatcher.call_soon(offer)
    done.wait()
    return said[0]
"""
# Withdrawn by nobody in the time of a test, where who dies is what matters.
PATIENT = "import shmsock.handover; shmsock.handover.OFFER_FOR_S = 1e9"


@contextlib.contextmanager
def giver(runtime: Runtime) -> collections.abc.Iterator[tuple[Peer, int]]:
    with echo_worker(runtime) as (peer, index):
        peer.run(GIVE)
        yield peer, index


@contextlib.contextmanager
def deaf(runtime: Runtime) -> collections.abc.Iterator[tuple[Peer, int]]:
    """A live process that takes nothing: it has no dispatcher."""
    with Peer(runtime.name, role="worker") as peer:
        yield peer, peer.ask("rt.index")


def stop_in_its_loop(peer: Peer) -> None:
    """Stop a worker where it holds nothing: not as the arbiter, for whom everybody would wait."""
    peer.start(
        "import os, signal; dispatcher.call_soon(lambda: os.kill(os.getpid(), signal.SIGSTOP))"
    )
    os.waitid(os.P_PID, peer.pid, os.WSTOPPED | os.WNOWAIT)


def heir_of(runtime: Runtime, sid: int) -> int:
    return int(runtime._segment.cells.heir[sid & 0xFFFFFFFF])


def moved(runtime: Runtime, sid: int, index: int) -> None:
    wait_until(lambda: owner_of(runtime, sid) == index, "it has moved")


def check(runtime: Runtime) -> None:
    runtime.repair()
    assert runtime.audit() == []


def test_an_idle_socket_is_handed_over_and_its_peer_notices_nothing(runtime: Runtime) -> None:
    with giver(runtime) as (first, index), echo_worker(runtime) as (second, other):
        sid, client = place(runtime, index)
        with client:
            assert first.ask(f"give({sid}, {other})") is True
            moved(runtime, sid, other)
            assert heir_of(runtime, sid) == 0
            assert ask(client, b"second") == b"second"
            wait_until(lambda: first.ask("told") == [[sid, True]], "the giver is told")
            assert first.ask("dispatcher.consumers()") == []
            assert second.ask("dispatcher.consumers()") == [sid]
            first.run(f"ref = rt.address({sid}); ref.write(b'from outside'); ref.close()")
            assert client.recv(100) == b"from outside"
            assert first.ask(f"rt._service.unwatch in rt._descriptors.peek({sid}).pollers")
            runtime.set_failed(sid)
            wait_until(lambda: first.ask(f"rt._descriptors.peek({sid}) is None"), "it hears it")
            check(runtime)


def test_what_comes_while_it_is_offered_is_read_by_whoever_has_it_then(runtime: Runtime) -> None:
    with giver(runtime) as (first, index), echo_worker(runtime) as (second, other):
        sid, client = place(runtime, index)
        with client:
            second.process.send_signal(signal.SIGSTOP)
            assert first.ask(f"give({sid}, {other})") is True
            client.sendall(b"in between")
            second.process.send_signal(signal.SIGCONT)
            assert client.recv(100) == b"in between"
            assert owner_of(runtime, sid) == other
            check(runtime)


def test_it_goes_round_and_comes_back(runtime: Runtime) -> None:
    with giver(runtime) as (first, a), giver(runtime) as (second, b):
        for peer in (first, second):  # it is the messages that bring it, not the timers
            peer.run(f"{PATIENT}; rt._hand_over.tick = lambda: None")
        sid, client = place(runtime, a)
        with client:
            for turn in range(10):
                peer, target = ((first, b), (second, a))[turn % 2]
                wait_until(lambda p=peer, t=target: p.ask(f"give({sid}, {t})") is True)  # type: ignore[misc]
                moved(runtime, sid, target)
                assert ask(client, b"%d" % turn) == b"%d" % turn
            check(runtime)


def test_the_host_gives_and_takes_as_well(runtime: Runtime) -> None:
    with giver(runtime) as (first, index):
        space: dict[str, object] = {"rt": runtime, "shmsock": shmsock}
        exec(ECHO + GIVE, space)  # the same program, in the host
        give, dispatcher = space["give"], space["dispatcher"]
        assert callable(give)
        assert isinstance(dispatcher, shmsock.Dispatcher)
        sid, client = place(runtime, index)
        with client:
            assert first.ask(f"give({sid}, {runtime.index})") is True
            moved(runtime, sid, runtime.index)
            assert ask(client, b"host") == b"host"
            wait_until(lambda: give(sid, index), "it is idle again")
            moved(runtime, sid, index)
            assert ask(client, b"back") == b"back"
            runtime.set_failed(sid)
        dispatcher.stop()
        wait_until(lambda: dispatcher._thread == 0, "it stops")
        dispatcher.close()


def test_only_an_idle_unreleased_socket_of_its_own_is_offered_and_else_nothing_changes(
    runtime: Runtime,
) -> None:
    with giver(runtime) as (first, index), echo_worker(runtime) as (_, other):
        sid, client = place(runtime, index)
        with client, held(runtime, sid) as reference:
            for wrong in (index, 15, -1, 1 << 20):
                assert "ValueError" in first.ask(f"give({sid}, {wrong})")
            with pytest.raises(ValueError, match="not alive"):
                reference.hand_over(15)
            assert reference.hand_over(other) is False  # not its owner
            assert heir_of(runtime, sid) == 0
            reference.busy = True
            assert first.ask(f"give({sid}, {other})") is False
            reference.busy = False
            assert first.ask("told") == []
            assert ask(client, b"still watched") == b"still watched"
            first.run(f"keep = rt.address({sid})")
            reference.release_additional_reference()
            assert first.ask(f"give({sid}, {other})") is False
            assert owner_of(runtime, sid) == index
            assert heir_of(runtime, sid) == 0
            first.run("keep.close()")
        check(runtime)


def test_an_offer_that_nobody_takes_is_withdrawn_and_the_giver_reads_again(
    runtime: Runtime,
) -> None:
    with giver(runtime) as (first, index), deaf(runtime) as (second, other):
        first.run("import shmsock.handover; shmsock.handover.OFFER_FOR_S = 0.05")
        sid, client = place(runtime, index)
        with client:
            assert first.ask(f"give({sid}, {other})") is True
            assert ask(client, b"meanwhile") == b"meanwhile"
            wait_until(lambda: first.ask("told") == [[sid, False]], "the giver is told")
            assert heir_of(runtime, sid) == 0
            # It listens now: the message that came is stale, and its look finds nothing.
            second.run(ECHO)
            second.run(f"rt._hand_over.tick(); rt._hand_over._claim([{sid}])")
            assert second.ask(f"rt._engine.inherit({sid})") == 0
            assert ask(client, b"still here") == b"still here"
            assert owner_of(runtime, sid) == index
            check(runtime)


def test_an_heir_that_was_never_told_finds_what_is_offered_to_it(runtime: Runtime) -> None:
    with giver(runtime) as (first, index), echo_worker(runtime) as (_, other):
        first.run(f"{PATIENT}; rt._hand_over._hint = lambda *_: None")
        sid, client = place(runtime, index)
        with client:
            assert first.ask(f"give({sid}, {other})") is True
            moved(runtime, sid, other)
            assert ask(client, b"found") == b"found"
            check(runtime)


def test_a_giver_killed_with_an_offer_out_leaves_it_to_the_heir_or_to_the_host(
    runtime: Runtime,
) -> None:
    for host_chooses in (False, True):
        with (
            giver(runtime) as (first, index),
            echo_worker(runtime) as (second, heir),
            echo_worker(runtime) as (_, third),
        ):
            sid, client = place(runtime, index)
            with client:
                first.run(PATIENT)
                stop_in_its_loop(second)
                assert first.ask(f"give({sid}, {heir})") is True
                client.sendall(b"while nobody reads")
                first.kill()
                wait_until(lambda s=sid: runtime.orphans() == [s], "its owner is dead")  # type: ignore[misc]
                if host_chooses:
                    assert runtime.rehome(sid, third)
                    assert heir_of(runtime, sid) == 0
                second.process.send_signal(signal.SIGCONT)
                second.finish()
                assert client.recv(100) == b"while nobody reads"
                assert owner_of(runtime, sid) == (third if host_chooses else heir)
                check(runtime)
                runtime.set_failed(sid)


def test_an_heir_killed_before_it_took_leaves_the_socket_to_the_giver(runtime: Runtime) -> None:
    with giver(runtime) as (first, index), deaf(runtime) as (second, other):
        first.run(PATIENT)
        sid, client = place(runtime, index)
        with client:
            assert first.ask(f"give({sid}, {other})") is True
            client.sendall(b"still served")
            second.kill()
            assert client.recv(100) == b"still served"
            assert owner_of(runtime, sid) == index
            wait_until(lambda: first.ask("len(told)") == 1, "the giver is told once")
            check(runtime)
            assert heir_of(runtime, sid) == 0


def test_an_heir_killed_after_it_took_leaves_an_orphan(runtime: Runtime) -> None:
    with giver(runtime) as (first, index), echo_worker(runtime) as (second, other):
        sid, client = place(runtime, index)
        with client:
            assert first.ask(f"give({sid}, {other})") is True
            moved(runtime, sid, other)
            second.kill()
            wait_until(lambda: runtime.orphans() == [sid], "its owner is dead")
            wait_until(lambda: first.ask("told") == [[sid, True]], "the giver is told")
            assert runtime.rehome(sid, index)
            assert ask(client, b"home again") == b"home again"
            check(runtime)


def test_what_comes_back_before_the_giver_looked_comes_as_something_new(runtime: Runtime) -> None:
    """Its heir may have gone on with it: what the giver remembers is old."""
    with giver(runtime) as (first, index), echo_worker(runtime) as (second, other):
        first.run("look = rt._hand_over._look; rt._hand_over._look = lambda: None")
        sid, client = place(runtime, index)
        with client:
            assert first.ask(f"give({sid}, {other})") is True
            moved(runtime, sid, other)
            assert ask(client, b"elsewhere") == b"elsewhere"
            wait_until(lambda: not runtime.sockets()["busy"].any(), "it is idle")
            second.kill()
            wait_until(lambda: runtime.orphans() == [sid], "its owner is dead")
            assert runtime.rehome(sid, index)
            first.run("rt._hand_over._look = look; dispatcher.call_soon(look)")
            wait_until(lambda: first.ask("told") == [[sid, True]], "it was gone")
            assert ask(client, b"home again") == b"home again"
            assert first.ask("dispatcher.consumers()") == [sid]
            check(runtime)


def test_a_socket_that_fails_while_it_is_offered_tells_its_consumer(runtime: Runtime) -> None:
    with giver(runtime) as (first, index), deaf(runtime) as (_, other):
        first.run(
            f"""
            {PATIENT}
            ended = []
            def watch(sid):
                dispatcher.remove_consumer(sid)
                dispatcher.add_consumer(sid, echo, lambda *what: ended.append(what))
            """
        )
        sid, client = place(runtime, index)
        with client:
            first.run(f"dispatcher.call_soon(lambda: watch({sid}))")
            assert first.ask(f"give({sid}, {other})") is True
            assert runtime.set_failed(sid, errno.ECONNABORTED, "kicked")
            wait_until(lambda: first.ask("ended") == [[sid, errno.ECONNABORTED, "kicked"]])
            assert first.ask("told") == []
            assert client.recv(100) == b""
            assert first.ask("rt._hand_over._offers == {}")
            wait_until(lambda: runtime.status(sid) is Status.GONE, "it is recycled")
            assert heir_of(runtime, sid) == 0
            check(runtime)


def test_an_exception_in_the_offer_leaves_one_owner_that_reads(runtime: Runtime) -> None:
    """Interrupted before or after its store: the next look knows, and nobody reads twice."""
    with giver(runtime) as (first, index), echo_worker(runtime) as (_, other):
        first.run(
            """
            offer = rt._engine.offer
            def before(*arguments):
                raise KeyboardInterrupt
            def after(*arguments):
                offer(*arguments)
                raise KeyboardInterrupt
            def interrupted(sid, index, how):
                def call():
                    rt._engine.offer = how
                    try:
                        with rt.address(sid) as ref:
                            ref.hand_over(index)
                    except KeyboardInterrupt:
                        pass
                    rt._engine.offer = offer
                    done.set()
                done = threading.Event()
                dispatcher.call_soon(call)
                done.wait()
            """
        )
        sid, client = place(runtime, index)
        with client:
            for how in ("before", "after"):
                first.run(f"interrupted({sid}, {other}, {how})")
                assert ask(client, how.encode()) == how.encode()
                wait_until(lambda: first.ask("rt._hand_over._offers == {}"))
                assert heir_of(runtime, sid) == 0
                check(runtime)


def test_a_hand_over_outlives_the_host(name: str) -> None:
    """Its message dies with the host: the heir asks the next one."""
    with Peer() as host:
        host.run(
            f"""
            import shmsock, socket
            rt = shmsock.Runtime.create({name!r}, slots=64, processes=16, stripes=8)
            ours, theirs = socket.socketpair()
            """
        )
        with Peer(name, role="worker") as first, Peer(name, role="worker") as second:
            for peer in (first, second):
                peer.run(ECHO)
            first.run(GIVE + PATIENT)
            first.run("import socket; ours, theirs = socket.socketpair(); theirs.settimeout(60)")
            first.run("sid = rt.create_socket(ours, on_owner_death='rehome')")
            first.run("dispatcher.call_soon(lambda: dispatcher.add_consumer(sid, echo))")
            sid, other = first.ask("sid"), second.ask("rt.index")
            wait_until(lambda: host.ask(f"rt.has_descriptor({sid})"), "it is put")
            host.process.send_signal(signal.SIGSTOP)
            assert first.ask(f"give(sid, {other})") is True
            first.run("theirs.sendall(b'without a host')")
            host.kill()
            with Runtime.take_over(name) as runtime:
                assert first.ask("theirs.recv(100).decode()") == "without a host"
                moved(runtime, sid, other)
                check(runtime)
                runtime.set_failed(sid)


# -- wishes -------------------------------------------------------------------------------------


def test_a_wish_is_for_one_life_of_a_row(runtime: Runtime) -> None:
    with Peer(runtime.name) as peer:
        index = peer.ask("rt.index")
        assert runtime.wishes.of(index) is Wish.NONE
        assert runtime.wishes.store(index, Wish.REPLACE)
        assert peer.ask("rt.wishes.of(rt.index).name") == "REPLACE"
        assert runtime.wishes.all() == {index: Wish.REPLACE}
        peer.kill()
        runtime.repair()
        assert runtime.wishes.all() == {}
        assert not runtime.wishes.store(index, Wish.LEAVE)
    with Peer(runtime.name) as peer:
        assert peer.ask("rt.index") == index
        assert runtime.wishes.of(index) is Wish.NONE
    assert not runtime.wishes.store(-1, Wish.LEAVE)
    assert not runtime.wishes.store(1 << 20, Wish.LEAVE)


def test_unwritten_bytes_counts_what_waits_for_all_peers(runtime: Runtime) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    for ours, _ in pairs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with held(runtime, runtime.create_socket(ours)) as reference:
            reference.write(bytes(1 << 20))
            assert reference.unwritten_bytes() > 0
    assert runtime.unwritten_bytes() > 1 << 20
    for _, theirs in pairs:
        theirs.close()
    wait_until(lambda: runtime.unwritten_bytes() == 0, "they are given up")
