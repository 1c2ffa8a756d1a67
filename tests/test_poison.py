"""An audit that names every damage, a repair that mends what can be, and the poison for the rest.

The damage is planted by hand, by another process, over the mapping of a live runtime.
"""

from __future__ import annotations

import collections.abc
import os
import random
import re
import signal
import socket

import posix_ipc
import pytest

import shmsock
from shmsock import Inspector, PoisonedError, Runtime, Status
from shmsock.layout import BROKEN, HEADER_INDEX, LIVE, OPEN, RECYCLING, WANT
from shmsock.segment import Segment
from shmsock.semaphores import Semaphores

from .helpers import Forked, Peer, connected, wait_until
from .test_hammer import in_child

SLOT = 0xFFFFFFFF


def plant(name: str, source: str) -> None:
    """Run statements in another process, with ``cells``, ``columns`` and ``header``."""

    def in_another() -> None:
        segment = Segment.attach(name)
        space = {"cells": segment.cells, "columns": segment.columns, "header": segment.header}
        exec(source, {**space, "Semaphores": Semaphores})

    Forked(in_another).result()


@pytest.fixture
def live(runtime: Runtime) -> collections.abc.Iterator[tuple[Runtime, int, socket.socket]]:
    """A runtime with one held connection in some slot."""
    ours, peers = connected()
    with peers:
        sid = runtime.create_socket(ours)
        reference = runtime.address(sid)
        assert reference is not None
        with reference:
            yield runtime, sid, peers


# What another process stores, what the audit says of it, and what a repair leaves of slot {s}.
MENDABLE = {
    "nref": ("cells.versioned_ref[{s}] += 5", r"slot {s} has nref 7"),
    "held by a row that is free": ("cells.held[{s} * 16 + 9] = 1", r"row 9 is FREE but still"),
    "held by no number of processes": ("cells.held[{s} * 16] = 7", r"slot {s} is held by some"),
    "owner": ("cells.owner[{s}] = 77 << 16 | 3", r"slot {s} is owned by process 3, which"),
    "writer": ("cells.writer[{s}] = 77 << 16 | 3", r"slot {s} is written by process 3, which"),
    "state": ("cells.state[{s}] = 9", r"slot {s} has state 9"),
    "kind": ("cells.kind[{s}] = 99", r"slot {s} has a kind, policy"),
    "policy": ("cells.on_owner_death[{s}] = 2", r"slot {s} has a kind, policy"),
    "retired": ("cells.retired[{s}] = 4", r"slot {s} has a kind, policy, retired"),
    "free with nref": ("cells.versioned_ref[{f}] += 1", r"slot {f} is FREE with .* nref 1"),
    "free and odd": ("cells.versioned_ref[{f}] += 1 << 32", r"slot {f} is FREE with version"),
    "free and held": ("cells.held[{f} * 16] = 1", r"slot {f} is FREE .* 1 attached"),
    "free with owner": ("cells.owner[{f}] = 1 << 16", r"slot {f} is FREE with owner"),
    "free with writer": ("cells.writer[{f}] = 1 << 16", r"slot {f} is FREE with owner"),
    "free and retired": ("cells.retired[{f}] = 1", r"slot {f} is FREE with owner"),
    "recycling": (f"cells.state[{{f}}] = {RECYCLING}", r"slot {f} is in the middle of recycling"),
    "role": ("cells.row_role[0] = 9", r"process row 0 has role 9"),
    "claim of nobody": (f"cells.claims[9 * 8 + 1] = 1 << 2 | {WANT}", r"row 9 is FREE but still"),
    "broken claim": (f"cells.claims[1] = 1 << 2 | {BROKEN}", r"stripe 1 was broken by process 0"),
    "nonsense claim": ("cells.claims[1] = 99 << 2", r"process 0 claims stripe 1 with 0x18c"),
    "token lost": (
        "Semaphores({name!r}, 8).get(3, {g}).acquire(0)",
        r"stripe 3 is stuck: its semaphore is taken",
    ),
    "token doubled": ("Semaphores({name!r}, 8).get(3, {g}).release()", r"stripe 3 is 2"),
    "spare with a token": (
        "Semaphores({name!r}, 8).get(3, {g} + 1).release()",
        r"the spare semaphore {spare} of stripe 3 is not 0",
    ),
    "semaphore's name gone": (
        "Semaphores({name!r}, 8).unlink(3, {g})",
        r"stripe 3 has no semaphore of its generation {g}",
    ),
}

BEYOND = {
    "version 0": ("cells.versioned_ref[{f}] = 0", r"slot {f} has version 0, which cannot be"),
    "version too high": ("cells.versioned_ref[{s}] |= 1 << 63", r"slot {s} has version \d{{10}},"),
    "generation 0": (f"cells.ctl[2] = {OPEN}", r"stripe 2 has the word 0x0"),
    "unknown phase": ("cells.ctl[2] |= 3", r"stripe 2 has the word 0x.*, which cannot be"),
    "row state": ("cells.row_state[5] = 1 << 8 | 7", r"process row 5 has the word 0x107"),
    "row without epoch": (f"cells.row_state[5] = {LIVE}", r"process row 5 has the word 0x1,"),
    "header slots": (f"header[{HEADER_INDEX['slots']}] = 128", r"header word slots is 0x80"),
    "header magic": (f"header[{HEADER_INDEX['magic']}] = 5", r"header word magic is 0x5"),
    "address": (
        f"header[{HEADER_INDEX['address_length']}] = 9",
        r"the host's address is nonsense: '/dev/shm/'",
    ),
    "stripe set back": (
        "import posix_ipc as p; p.Semaphore('/shmsock.{name}.4.{later}', p.O_CREX).close()",
        r"stripe 4 is at generation {g} but was at {was} already",
    ),
}


def planted(runtime: Runtime, sid: int, source: str, complaint: str) -> str:
    free = next(slot for slot in range(255, 0, -1) if not runtime._segment.cells.state[slot])
    first = runtime._segment.cells.ctl[3] >> 2  # of every stripe: nothing was retired yet
    names = {
        **{"s": sid & SLOT, "f": free, "name": runtime.name},
        **{"g": first, "spare": first + 1, "later": first + 8, "was": first + 6},
    }
    plant(runtime.name, source.format(**names))
    return complaint.format(**names)


@pytest.mark.parametrize("damage", MENDABLE)
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_damage_is_named_and_mended(
    live: tuple[Runtime, int, socket.socket], damage: str, outside: bool
) -> None:
    runtime, sid, _ = live
    complaint = planted(runtime, sid, *MENDABLE[damage])
    with Inspector(runtime.name) as inspector:
        if damage not in ("broken claim", "nonsense claim"):  # those our own timer mends too
            assert any(re.search(complaint, line) for line in inspector.audit())
        mended = inspector.mend() if outside else runtime.mend()
        assert mended.poisoned == ""
        if damage == "nonsense claim":  # its process lives, and owns up in a second
            runtime._engine.own_up()
            runtime.repair()
        assert inspector.audit() == runtime.audit() == []
    # The runtime goes on: in every stripe, and with the socket unless that was what made no sense.
    for _ in range(16):
        ours, peers = connected("unix")
        with peers:
            other = runtime.create_socket(ours)
            assert runtime.set_failed(other)
    lost = damage in ("owner", "writer", "state", "kind", "policy", "retired")
    assert runtime.status(sid) in ((Status.FAILED, Status.GONE) if lost else (Status.LIVE,))


@pytest.mark.parametrize("damage", BEYOND)
def test_what_nobody_can_say_any_more_poisons(
    live: tuple[Runtime, int, socket.socket], damage: str
) -> None:
    runtime, sid, _ = live
    complaint = planted(runtime, sid, *BEYOND[damage])
    before = runtime._segment.map[4096:]
    found = runtime.audit()
    assert any(re.search(complaint, line) for line in found), found
    assert runtime._segment.map[4096:] == before  # it only looks
    mended = runtime.mend()
    assert re.search(complaint, mended.poisoned)
    assert runtime._segment.map[4096:] == before  # nothing is made up
    with pytest.raises(PoisonedError, match=complaint):
        runtime.address(sid)
    if damage == "stripe set back":
        later = (runtime._segment.cells.ctl[4] >> 2) + 8
        posix_ipc.unlink_semaphore(f"/shmsock.{runtime.name}.4.{later}")


# -- no false alarms ----------------------------------------------------------------------------


def test_audit_of_a_hammered_table_raises_no_false_alarm(runtime: Runtime) -> None:
    """Processes churn and are killed all the time; what is reported waits, or is nothing."""
    seed = int(os.environ.get("SHMSOCK_SEED", random.SystemRandom().randrange(1 << 30)))
    print(f"SHMSOCK_SEED={seed}")
    rng = random.Random(seed)
    children = [Forked(in_child, runtime, rng.randrange(1 << 30), 10**9) for _ in range(3)]
    try:
        wait_until(lambda: len(runtime.processes()) == 4, "all churn")
        with Inspector(runtime.name) as inspector:
            for _ in range(12):
                children.pop(0).kill()
                children.append(Forked(in_child, runtime, rng.randrange(1 << 30), 10**9))
                wrong = [b for b in inspector._audit.breaches() if b.cure.value != "waits"]
                assert wrong == []
            assert inspector.audit(patience_s=30.0) == []
            mended = inspector.mend()  # on a live table, with everybody in the middle of something
            assert mended.poisoned == ""
            assert mended.retired == 8
    finally:
        for child in children:
            child.kill()
    wait_until(lambda: runtime.repair() and runtime.audit() == [], "the books balance")


def test_a_stripe_with_a_stopped_process_in_it_waits_and_never_poisons(runtime: Runtime) -> None:
    with Peer(runtime.name) as peer:
        peer.run("""
            import os, signal
            def stop(slot, argument):
                os.kill(os.getpid(), signal.SIGSTOP)
                return 1
        """)
        peer.start("rt._engine.run(3, stop, -1)")
        os.waitid(os.P_PID, peer.pid, os.WSTOPPED | os.WNOWAIT)
        try:
            mended = runtime.mend()
            assert mended.poisoned == ""
            assert "stripe 3 is being retired" in mended.left
        finally:
            os.kill(peer.pid, signal.SIGCONT)
        peer.finish()
        wait_until(lambda: runtime.repair() and runtime.audit() == [], "it left the stripe")


def test_who_mends_is_killed_anywhere_and_the_next_one_mends(runtime: Runtime) -> None:
    """SIGKILL at a random moment of a repair; every prefix is finished by the next one."""
    rng = random.Random(7)
    ours, peers = connected("unix")
    sid = runtime.create_socket(ours)
    slot = sid & SLOT
    killed = 0
    for _ in range(10):
        plant(runtime.name, f"cells.versioned_ref[{slot}] += 5; cells.held[9] = 1")
        before = runtime._segment.cells.ctl[0]
        with Forked(mend_from_outside, runtime.name) as mender:
            # It is in the middle when the first stripe has moved on.
            wait_until(lambda: runtime._segment.cells.ctl[0] != before, "it repairs")  # noqa: B023
            for _ in range(rng.randrange(20000)):
                pass
            mender.kill()
            killed += 1
        mended = runtime.mend()
        assert mended.poisoned == ""
        assert runtime.audit() == []
        assert runtime.status(sid) is Status.LIVE
    assert killed == 10
    runtime.set_failed(sid)
    peers.close()


def mend_from_outside(name: str) -> None:
    with Inspector(name) as inspector:
        while True:
            inspector.mend()


# -- poisoned -----------------------------------------------------------------------------------


def operations(
    runtime: Runtime, sid: int, held: shmsock.SocketRef, groups: shmsock.groups.Groups
) -> dict[str, collections.abc.Callable[[], object]]:
    return {
        "address": lambda: runtime.address(sid),
        "address_failed_as_well": lambda: runtime.address_failed_as_well(sid),
        "set_failed": lambda: runtime.set_failed(sid),
        "status": lambda: runtime.status(sid),
        "attached": lambda: runtime.attached(sid),
        "sockets": runtime.sockets,
        "processes": runtime.processes,
        "pass_to": lambda: runtime.pass_to(0, [sid]),
        "rehome": lambda: runtime.rehome(sid),
        "spread": lambda: runtime.spread([sid]),
        "mend": runtime.mend,
        "repair": runtime.repair,
        "groups": lambda: runtime.groups,
        "groups.add": lambda: groups.add("g", sid),
        "groups.members": lambda: groups.members("g"),
        "groups.broadcast": lambda: groups.broadcast("g", b"x"),
        "groups.discard": lambda: groups.discard("g", sid),
        "write": lambda: held.write(b"x"),
        "flush": lambda: held.flush(0),
        "ref.set_failed": held.set_failed,
        "release": held.release_additional_reference,
        "user_data": lambda: setattr(held, "user_data", b"x"),
        "attach": lambda: Runtime.attach(runtime.name),
        "take_over": lambda: Runtime.take_over(runtime.name),
        "Dispatcher": lambda: shmsock.Dispatcher(runtime),
    }


def test_every_operation_of_a_poisoned_runtime_says_so_and_changes_nothing(
    live: tuple[Runtime, int, socket.socket],
) -> None:
    runtime, sid, _ = live
    held = runtime.address(sid)
    groups = runtime.groups
    assert held is not None
    groups.add("g", sid)
    calls = operations(runtime, sid, held, groups)
    assert runtime.poison("the test says so")
    assert not runtime.poison("again")
    before = runtime._segment.map[4096:]
    for name, call in calls.items():
        if name == "take_over":  # it has a host: that comes first
            continue
        with pytest.raises(PoisonedError, match=r"the test says so.*restart"):
            call()
    ours, peers = connected("unix")
    with peers, ours, pytest.raises(PoisonedError):
        runtime.create_socket(ours)
    assert any("the test says so" in line for line in runtime.audit())
    assert runtime._segment.map[4096:] == before
    held.close()  # neither raises nor waits


def test_take_over_of_a_poisoned_runtime_says_so(name: str) -> None:
    with Peer() as host:
        host.run(f"import shmsock; rt = shmsock.Runtime.create({name!r}, slots=8, stripes=2)")
        with Peer(name) as guest:
            host.run("rt.poison('broken')")
            host.kill()
            with pytest.raises(PoisonedError, match="broken"):
                Runtime.take_over(name)
            # Its guest can only leave: a new runtime of this name need not wait for that.
            with Runtime.create(name, slots=8, stripes=2) as made:
                assert made.audit() == []
                guest.run("""
                    try:
                        rt.address(1 << 33)
                    except shmsock.PoisonedError:
                        pass
                    else:
                        raise AssertionError("a poisoned runtime addresses")
                    rt.close()
                    rt = shmsock.Runtime.attach(rt.name)
                """)
                assert len(made.processes()) == 2


def test_a_dispatcher_ends_with_poisoned_error_though_nothing_happens(name: str) -> None:
    with Runtime.create(name, slots=8, stripes=2) as runtime, Peer(name) as peer:
        peer.run("dispatcher = shmsock.Dispatcher(rt)")
        peer.start("""
            try:
                dispatcher.run()
            except shmsock.PoisonedError as error:
                text = str(error)
        """)
        runtime.poison("nobody asked")
        peer.finish()
        assert "nobody asked" in peer.ask("text")
        peer.run("dispatcher.close(); rt.close()")


def test_a_poisoned_host_ends_its_connections_for_everybody(name: str) -> None:
    ours, peers = connected()
    listener = socket.create_server(("127.0.0.1", 0))
    with peers, listener, Runtime.create(name, slots=8, stripes=2) as runtime:
        sid = runtime.create_socket(ours)
        runtime.create_socket(listener.dup())
        with Peer(name) as peer:
            peer.run(f"reference = rt.address({sid}); number = reference.fileno()")
            runtime.poison("broken")
            runtime.close()
            peers.settimeout(30)
            assert peers.recv(1) == b""  # though the other process has the descriptor still
            peer.run("rt.close()")
        with socket.create_connection(listener.getsockname()):  # a shutdown would have ended it
            pass


def test_inspector_maps_read_only_and_is_no_participant(runtime: Runtime) -> None:
    before = runtime.processes()
    with Inspector(runtime.name) as inspector:
        assert len(inspector.processes()) == len(before)
        with pytest.raises((TypeError, ValueError)):
            inspector._segment.cells.state[0] = 1
        assert inspector.audit() == []
        assert inspector.in_use() == 0
        assert inspector.poisoned == ""
    with pytest.raises(ValueError, match="closed"):
        inspector.audit()
    with pytest.raises(shmsock.RuntimeNotFoundError):
        Inspector(runtime.name + "x")
    assert len(runtime.processes()) == len(before)
