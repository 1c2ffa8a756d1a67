"""Replacing workers one by one: a new one comes up, the old one hands over and leaves.

What is to be done stands in the workers' process rows as wishes (``shmsock.Wish``), whoever stored
them: ``shmsock drain``, ``shmsock reload``, or a SIGHUP here. So a supervisor that is killed in the
middle is followed by one that goes on, and each step is derived from what there is:

    REPLACE, and no worker too many     start one
    REPLACE, and enough without it      LEAVE
    LEAVE                               wait until it has gone; kill it after the graceful timeout
    a new one does not come up          STAY, for all; also who leaves, if no other is left

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
        child = self._leaving or (targets[0] if targets else None)
        if not self._started or supervisor.draining or child is None:
            return
        others = self._others(child)
        starting = [other for other in supervisor.children if other.index < 0]
        for other in starting:
            if time.monotonic() - other.started_s > READY_WITHIN_S:
                log.error("worker %d was not ready in %.0f s", other.pid, READY_WITHIN_S)
                other.send_signal(signal.SIGKILL)  # and then we refuse
        if child is self._leaving or self._wishes.of(child.index) is Wish.LEAVE:
            self._watch(child)
        elif len(others) >= supervisor.config.workers:
            self._let_go(child)
        elif not starting and len(supervisor.children) <= supervisor.config.workers:
            try:
                supervisor.spawn()
            except OSError as error:
                self.refuse(f"cannot start a worker ({error.strerror})")

    def _others(self, child: Child) -> list[Child]:
        """The workers that have joined, without one."""
        return [c for c in self._supervisor.children if c.index >= 0 and c is not child]

    def _let_go(self, child: Child) -> None:
        log.info("worker %d is replaced: it hands over its connections", child.pid)
        # ORDER: LEAVE before anything else is placed: from here on it is given nothing.
        self._wishes.store(child.index, Wish.LEAVE)
        self._watch(child)
        child.send_signal(signal.SIGHUP)

    def _watch(self, child: Child) -> None:
        """See to one that leaves; the next one's turn comes when the kernel says it has ended."""
        now = time.monotonic()
        if self._leaving is not child:
            self._leaving, self._since_s = child, now
        if self._is_in_its_row(child) and self._wishes.of(child.index) is Wish.REPLACE:
            self._wishes.store(child.index, Wish.LEAVE)  # somebody wished it once more
        if now - self._since_s > self._supervisor.config.graceful_timeout_s:
            log.warning("worker %d did not leave in time: killed", child.pid)
            self._since_s = float("inf")
            child.send_signal(signal.SIGKILL)

    def _is_in_its_row(self, child: Child) -> bool:
        """Whether its row is still its own: who leaves gives it back before it ends."""
        rows = self._supervisor.runtime.processes()
        return any((row.index, row.pid) == (child.index, child.pid) for row in rows)

    def refuse(self, why: str) -> None:
        """No new worker came up: the old ones stay, and one that leaves, if no other is left."""
        leaving = self._leaving
        stay = [child for child in self._targets() if child is not leaving]
        if leaving is not None and not self._others(leaving) and self._is_in_its_row(leaving):
            stay.append(leaving)
            self._leaving = None
        if stay:
            pids = ", ".join(str(child.pid) for child in stay)
            log.error("%s: nothing is replaced, the old workers stay: %s", why, pids)
        for child in stay:
            self._wishes.store(child.index, Wish.STAY)
            child.send_signal(signal.SIGHUP)
        if leaving in stay:
            self._supervisor.rehome()

    def left(self, child: Child, why: str) -> bool:
        """A worker has died: whether that was to be, so that it is nobody's failure."""
        if child is not self._leaving:
            return False
        self._leaving = None
        log.info("worker %d has left (%s)", child.pid, why)
        return True
