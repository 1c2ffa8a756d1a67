"""The last resort: a poisoned runtime is given up, and the supervisor serves a new one.

A table that failed its audit beyond repair cannot be trusted with anybody's connection. So the
workers are killed, the connections ended, the names removed, and a new segment of the same name and
sizes takes their place. The listeners stay open all the while: who connects meanwhile waits in the
backlog and is served by the new workers.

    If killed: the workers are dead before the first name goes, and the names go before the new ones
    come. What is left is a poisoned runtime without host, or part of its names: the next ``serve``
    removes them (names.own_name).
"""

from __future__ import annotations

import functools
import logging
import select
import signal
import time
import typing

import shmsock
from shmsock import Dispatcher, PoisonedError, Runtime, ShmsockError

from .refusing import Refusing
from .rolling import Rolling

if typing.TYPE_CHECKING:
    from .supervisor import Child, Supervisor

log = logging.getLogger("shmsock")

AUDIT_EVERY_S = 30.0  # one look costs tens of milliseconds at 65 536 slots
LOOK_AGAIN_S = 3.0
WAIT_FOR_WORKERS_S = 10.0
STOP_SIGNALS = signal.SIGTERM, signal.SIGINT


def dispatch(supervisor: Supervisor) -> None:
    """Run the dispatcher until it is stopped, over as many segments as it takes."""
    audit_later(supervisor)
    while True:
        try:
            supervisor.dispatcher.run()
            return
        except PoisonedError as error:
            log.critical("%s", error)
            if supervisor.draining:
                return
        try:
            start_over(supervisor)
        except (OSError, ShmsockError) as error:
            log.critical("cannot start over: %s", error)
            supervisor.exit_code = 1
            return


def audit_later(supervisor: Supervisor) -> None:
    """Audit once the time has come."""
    supervisor.dispatcher.call_later(AUDIT_EVERY_S, lambda: audit_again(supervisor))


def audit_again(supervisor: Supervisor, before: frozenset[str] = frozenset()) -> None:
    """Look at the whole table now and then; mend, or poison, what is found twice.

    In between, somebody's timer has reaped the dead and retired what was broken.
    """
    runtime = supervisor.runtime
    found = frozenset(runtime.audit())
    if found and not found & before:
        again = functools.partial(audit_again, supervisor, found)
        supervisor.dispatcher.call_later(LOOK_AGAIN_S, again)
        return
    audit_later(supervisor)
    if not found:
        return
    for line in sorted(found & before):
        log.error("audit: %s", line)
    try:
        mended = runtime.mend()
    except PoisonedError:
        raise
    except (OSError, ShmsockError) as error:
        log.error("audit: repaired later: %s", error)
        return
    log.error(
        "audit: %d breaches are left after %d processes were reaped and %d stripes retired",
        len(mended.left),
        mended.reaped,
        mended.retired,
    )
    runtime.check()


def start_over(supervisor: Supervisor) -> None:
    """Give the poisoned runtime up and serve a new one of the same name and sizes."""
    old = supervisor.runtime
    name, sizes = old.name, old.sizes
    for child in supervisor.children:
        _kill(child)
    supervisor.children.clear()
    supervisor.refusing.close()
    supervisor._accepting = False
    # A signal is for the new dispatcher: the old one would never act on it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # ORDER: the names go while the host's byte is ours: without it another server might have
        # made its own by now.
        old.unlink()
        supervisor.names_are_ours = False
        old.close()  # ends every connection, listeners excepted
        supervisor.runtime = Runtime.create(name, **sizes)
        supervisor.names_are_ours = True
        supervisor.dispatcher = Dispatcher(supervisor.runtime)
        supervisor.refusing = Refusing(supervisor.dispatcher)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    supervisor.runtime.on_join(supervisor._joined)
    supervisor._listening.clear()
    supervisor._register_listeners()
    supervisor._counted_s = 0.0
    supervisor._failures = 0
    supervisor.rolling = Rolling(supervisor)  # what was wished of the old workers went with them
    supervisor._fill_up()
    supervisor.rolling.start()
    supervisor._rehome_again()
    audit_later(supervisor)
    log.critical("runtime %r starts over on a new segment", name)


def _kill(child: Child) -> None:
    child.send_signal(signal.SIGKILL)
    poller = select.poll()
    poller.register(child.pidfd, select.POLLIN)
    poller.poll()  # an adopted one is not our child: only this tells that it has ended
    child.reap()


def wait_for_poisoned(name: str) -> None:
    """Before a start: let the workers of a poisoned runtime end, which still hold its listeners."""
    deadline = time.monotonic() + WAIT_FOR_WORKERS_S
    while time.monotonic() < deadline:
        try:
            inspector = shmsock.Inspector(name)
        except (ShmsockError, OSError):
            return
        with inspector:
            rows = inspector.processes()
            if inspector.host_alive() or not inspector.poisoned:
                return
        if not any(row.alive and row.role == "worker" for row in rows):
            return
        time.sleep(0.02)
