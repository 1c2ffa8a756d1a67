"""Replacing workers one by one: a new one comes up, the old one hands over and leaves.

What is to be done stands in the workers' process rows as wishes (``shmsock.Wish``), whoever stored
them: ``shmsock drain``, ``shmsock reload``, or a SIGHUP here. So a supervisor that is killed in the
middle is followed by one that goes on, and each step is derived from what there is:

    REPLACE, and no worker too many     start one; if it does not come up: STAY, for all
    REPLACE, and enough without it      LEAVE
    LEAVE                               wait until it has gone; kill it after the graceful timeout
    LEAVE, and no other is left         STAY: it goes on with what it has

Meanwhile there is one worker more than usual, and one that leaves is given nothing new.
"""

from __future__ import annotations

import logging
import signal
import time
import typing

from shmsock import Wish

if typing.TYPE_CHECKING:
    from .supervisor import Child, Supervisor

log = logging.getLogger("shmsock")

_LOOK_EVERY_S = 0.2
READY_WITHIN_S = 30.0


class Rolling:
    """The supervisor's half of replacing workers."""

    def __init__(self, supervisor: Supervisor) -> None:
        """Nothing happens before ``start``."""
        self._supervisor = supervisor
        self._wishes = supervisor.runtime.wishes
        self._leaving: Child | None = None
        self._since_s = 0.0
        self._started = False

    def start(self) -> None:
        """Look five times a second from here on: the workers there are have joined."""
        if not self._started:
            self._started = True
            self._again()

    def _again(self) -> None:
        self._supervisor.dispatcher.call_later(_LOOK_EVERY_S, self._again)
        self.step()

    def reload(self) -> None:
        """Wish every worker replaced."""
        log.info("reloading: every worker is replaced, one by one")
        for child in self._supervisor.children:
            if child.index >= 0 and self._wishes.of(child.index) is not Wish.LEAVE:
                self._wishes.store(child.index, Wish.REPLACE)
        self.step()

    # -- what there is --------------------------------------------------------------------------

    def is_leaving(self, child: Child) -> bool:
        """Whether it must be given nothing new."""
        return child is self._leaving or (
            child.index >= 0 and self._wishes.of(child.index) is Wish.LEAVE
        )

    def extra(self) -> int:
        """How many workers there should be beyond the usual."""
        return int(self._started and bool(self._targets()))

    def _targets(self) -> list[Child]:
        """Who is to be replaced, who leaves already first."""
        wishes = self._wishes.all()
        wanted = [
            child
            for child in self._supervisor.children
            if wishes.get(child.index) in (Wish.REPLACE, Wish.LEAVE)
        ]
        return sorted(wanted, key=lambda child: wishes[child.index] is not Wish.LEAVE)

    # -- one step -------------------------------------------------------------------------------

    def step(self) -> None:
        """Do what the wishes and the workers there are ask for; often, and from any state."""
        supervisor = self._supervisor
        targets = self._targets()
        if not self._started or supervisor.draining or not targets:
            return
        child = targets[0]
        others = [other for other in supervisor.children if other.index >= 0 and other is not child]
        starting = [other for other in supervisor.children if other.index < 0]
        if self._wishes.of(child.index) is Wish.LEAVE:
            self._watch(child, bool(others))
        elif len(others) >= supervisor.config.workers:
            self._let_go(child)
        elif starting:
            late_s = time.monotonic() - READY_WITHIN_S
            for other in starting:
                if other.started_s < late_s:
                    log.error("worker %d was not ready in %.0f s", other.pid, READY_WITHIN_S)
                    other.send_signal(signal.SIGKILL)  # and then we refuse
        elif len(supervisor.children) < supervisor.config.workers + 1:
            try:
                supervisor.spawn()
            except OSError as error:
                self.refuse(f"cannot start a worker ({error.strerror})")

    def _let_go(self, child: Child) -> None:
        log.info("worker %d is replaced: it hands over its connections", child.pid)
        # ORDER: LEAVE before anything else is placed: from here on it is given nothing.
        self._wishes.store(child.index, Wish.LEAVE)
        self._watch(child, others=True)
        child.send_signal(signal.SIGHUP)

    def _watch(self, child: Child, others: bool) -> None:
        """See to one that leaves."""
        now = time.monotonic()
        if self._leaving is not child:
            self._leaving, self._since_s = child, now
        if not others:
            log.error("no other worker is left: worker %d stays", child.pid)
            self._stay(child)
        elif now - self._since_s > self._supervisor.config.graceful_timeout_s:
            log.warning("worker %d did not leave in time: killed", child.pid)
            self._since_s = float("inf")
            child.send_signal(signal.SIGKILL)

    def _stay(self, child: Child) -> None:
        self._wishes.store(child.index, Wish.STAY)
        self._leaving = None
        child.send_signal(signal.SIGHUP)
        self._supervisor.rehome()

    def refuse(self, why: str) -> None:
        """No new worker came up: the old ones stay."""
        stay = [child for child in self._targets() if self._wishes.of(child.index) is Wish.REPLACE]
        if stay:
            pids = ", ".join(str(child.pid) for child in stay)
            log.error("%s: nothing is replaced, the old workers stay: %s", why, pids)
        for child in stay:
            self._wishes.store(child.index, Wish.STAY)

    def left(self, child: Child, why: str) -> bool:
        """A worker has died: whether that was to be, so that it is nobody's failure."""
        if child is not self._leaving:
            return False
        self._leaving = None
        log.info("worker %d has left (%s)", child.pid, why)
        return True
