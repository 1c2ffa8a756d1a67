"""The supervisor: host of the runtime. Binds, accepts, places, respawns, drains.

It stays off the path of established connections: it accepts one, makes it a Socket owned by the
least-loaded live worker, passes (SocketId, descriptor) on, and keeps a duplicate in the store.

Signal handlers only queue; the dispatcher's loop acts.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import time

from shmsock import (
    Dispatcher,
    HostLostError,
    PoisonedError,
    Runtime,
    ShmsockError,
    TableFullError,
)

from . import starting_over
from .accepting import NOT_NOW, PAUSE_S, RAISE_LIMIT
from .application import BUILT_IN, Settings, fresh_python
from .listeners import Listener
from .refusing import Refusing
from .rolling import Rolling

log = logging.getLogger("shmsock")

ACCEPT_BATCH = 128
RESERVED_FILES = 64, 4  # what the host needs besides clients: in all, and more for each worker
COUNT_FOR_S = 0.02  # how long a count of owned sockets is good for
BACK_OFF_S = (0.1, 5.0)
HEALTHY_AFTER_S = 5.0  # a worker that lived this long starts its back-off anew
COLLECT_FOR_S = 3.0  # how long a new supervisor waits for the workers to come back
COLLECT_AT_MOST_S = 30.0  # and for who has the address it is to listen at
COLLECT_EVERY_S = 0.02
LOST_AFTER_S = 5.0  # an orphan whose descriptor nobody has given us by then has none any more
REPAIR_AGAIN_S = 0.002, 0.3  # how soon and how late a repair that another had is looked at again
GIVE_UP_AFTER = 5  # deaths in a row before anything was ready


@dataclasses.dataclass(frozen=True)
class Config:
    """What ``shmsock serve`` was asked for."""

    name: str
    bind: tuple[str, ...]
    workers: int
    slots: int
    max_connections: int
    backlog: int
    graceful_timeout_s: float
    max_unwritten_bytes: int
    log_level: str
    password: str | None = None
    pages_remote: bool = False
    on_owner_death: str = "rehome"
    application: str = BUILT_IN
    pool: int = 0
    accept: str = "supervisor"


@dataclasses.dataclass
class Child:
    """One worker process and its place in the count of workers.

    Attributes:
        process: None for one that an earlier supervisor started: it is not our child, so the pidfd
            tells of its death but nobody tells us its exit code.
        index: Its process row, once it has joined.
    """

    pid: int
    pidfd: int
    started_s: float
    process: subprocess.Popen[bytes] | None = None
    index: int = -1

    def send_signal(self, number: int) -> None:
        """Signal it, and never a later process of its pid."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> str:
        """After its end: how it ended, for the log."""
        os.close(self.pidfd)
        if self.process is None:
            return "ended"
        code = self.process.wait()
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"

    @property
    def was_killed(self) -> bool:
        """After ``reap``: whether somebody else ended it: the program may be as good as ever."""
        return self.process is not None and self.process.returncode == -signal.SIGKILL


class Supervisor:
    """One running server."""

    def __init__(self, config: Config) -> None:
        """Create the runtime and bind, or take over one whose supervisor has died.

        Nothing is accepted yet. From here on SIGTERM and SIGINT are ours: dying of one would leave
        names behind.

        Raises:
            AlreadyRunningError: The name is taken by a live runtime that has its supervisor.
            OSError: An address cannot be bound, or /dev/shm is too small.
            ValueError: An address is none.
        """
        self.config = config
        self.listeners: list[Listener] = []
        early: list[int] = []
        for number in starting_over.STOP_SIGNALS:
            signal.signal(number, lambda number, _: early.append(number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.took_over = False
        self.names_are_ours = True  # not between an old segment and a new one
        self._listening: list[int] = []  # the listeners' SocketIds
        starting_over.wait_for_poisoned(config.name)
        try:
            self.runtime = Runtime.create(
                config.name, slots=config.slots, max_unwritten_bytes=config.max_unwritten_bytes
            )
        except HostLostError:
            self.runtime = Runtime.take_over(config.name)
            self.took_over = True
        try:
            if not self.took_over:
                self._bind()
        except BaseException:
            self._tear_down()
            raise
        self.dispatcher = Dispatcher(self.runtime)
        self.refusing = Refusing(self.dispatcher)
        for number in starting_over.STOP_SIGNALS:
            signal.signal(number, lambda *_: self.dispatcher.call_soon(self._stop_asked))
        if early:
            self.dispatcher.call_soon(self._stop_asked)
        self.children: list[Child] = []
        self.exit_code = 0
        self._accepting = False
        self.draining = False
        self._failures = 0  # deaths in a row of workers that never joined
        self._back_off_s = BACK_OFF_S[0]
        self._loads: list[int] = []
        self._in_use = 0
        self._counted_s = 0.0
        self._collects_until_s = 0.0
        self._told: set[str] = set()
        self._missing: dict[int, float] = {}  # orphans without a descriptor, and since when
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # create has raised it
        self._keeps = max(1, files - RESERVED_FILES[0] - RESERVED_FILES[1] * config.workers)
        self._on_ready: collections.abc.Callable[[], object] | None = None
        self.rolling = Rolling(self)
        signal.signal(signal.SIGHUP, lambda *_: self.dispatcher.call_soon(self.rolling.reload))
        self.runtime.on_join(self._joined)

    # -- the life of the server -----------------------------------------------------------------

    def run(self, on_ready: collections.abc.Callable[[], object] | None = None) -> int:
        """Serve until SIGTERM or SIGINT, then drain.

        Args:
            on_ready: Called once, when every worker has joined.

        Returns:
            An exit code: 0, or 1 when workers never came up.
        """
        self._on_ready = on_ready
        try:
            if self.took_over:
                self._collects_until_s = time.monotonic() + COLLECT_AT_MOST_S
                self._collect(time.monotonic() + COLLECT_FOR_S)
            else:
                self._fill_up()
                self.rolling.start()
            self._rehome_again()
            starting_over.dispatch(self)
        finally:
            for child in self.children:
                child.send_signal(signal.SIGKILL)
                child.reap()
            self.refusing.close()
            self._tear_down()
        return self.exit_code

    def _bind(self) -> None:
        """Listen; each listener is a Socket too, which outlives us in the workers' hands."""
        for address in self.config.bind:
            self.listeners.append(Listener(address, self.config.backlog))
        self._register_listeners()

    def _register_listeners(self) -> None:
        for listener in self.listeners:
            copy = listener.sock.dup()
            try:
                sid = self.runtime.create_socket(copy, on_owner_death="rehome")
            except BaseException:
                copy.close()
                raise
            self._listening.append(sid)
        self.runtime.spread(self._listening)

    def _unbind(self) -> None:
        """Undo a ``_bind`` that failed at its second address."""
        for sid in self._listening:
            self.runtime.set_failed(sid, errno.EADDRINUSE, "the server could not listen")
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()
        self._listening.clear()

    def _collect(self, deadline: float) -> None:
        """After taking over: workers join and give back what they have; then go on as before."""
        # ORDER: first, so that what raises (a stripe that cannot be had) is only tried again.
        again = functools.partial(self._collect, deadline)
        timer = self.dispatcher.call_later(COLLECT_EVERY_S, again)
        if self._has_collected(deadline):
            timer.cancel()

    def _has_collected(self, deadline: float) -> bool:
        """Look once; true when there is nothing to wait for any more."""
        if self.draining:
            return True
        self.runtime.repair()  # a worker may be at it: what it reaps is no orphan before that
        for sid in self.runtime.orphans():
            if self.runtime.is_listener(sid) and self.runtime.rehome(sid):
                self._adopt_listener(sid)
        rows = self.runtime.processes()
        waiting = not self.listeners or not all(row.alive for row in rows)
        waiting |= any(map(self.runtime.is_listener, self.runtime.orphans()))
        expected = {row.pid for row in rows if row.role == "worker" and row.alive}
        missing = expected - {child.pid for child in self.children if child.index >= 0}
        if (waiting or missing) and time.monotonic() < deadline:
            return False
        try:
            if self.listeners:
                self.runtime.spread(self._listening)
            else:
                self._bind()
        except OSError as error:
            self._unbind()
            if error.errno == errno.EADDRINUSE and self._collects_until_s > time.monotonic():
                # Whoever has the listener is late: stopped, or a client that is slow to start.
                self._tell_once(f"{error.strerror}: waiting for who may have the listener")
                return False
            log.critical("the listeners were lost with the supervisor, and %s", error.strerror)
            self.exit_code = 1
            self._stop_asked()
            return True
        connections = self.runtime.connections()
        log.info("took over %d workers and %d connections", len(self.children), connections)
        self.rolling.start()
        self._fill_up()
        self.rehome()
        if self._ready():
            self._start_accepting()
            self._tell_ready()
        return True

    def _adopt_listener(self, sid: int) -> None:
        reference = self.runtime.address(sid)
        if reference is not None:
            with reference:
                sock = socket.socket(fileno=os.dup(reference.fileno()))
            self.listeners.append(Listener.adopt(sock))
            self._listening.append(sid)

    def _fill_up(self) -> None:
        """Start as many workers as are missing."""
        while len(self.children) < self._wanted():
            self.spawn()

    def rehome(self) -> None:
        """Give idle sockets of dead owners to the least-loaded live workers."""
        if self.draining or not self._ready():
            return
        self._counted_s = 0.0
        self._count()
        for sid in self.runtime.orphans():
            if self.runtime.is_listener(sid):
                continue
            index = self._least_loaded(self._ready())
            try:
                if self.runtime.rehome(sid, index):
                    self._loads[index] += 1
            except (
                ShmsockError
            ) as error:  # a stripe is not to be had: whoever called has more to do
                log.error("what a dead worker left is rehomed later: %s", error)
                return

    def _rehome_again(self) -> None:
        """What could not be rehomed at once, once a second; what nobody can be given, fails.

        A creator may have died before its put, or with a host that had the only duplicate. Whoever
        else has one gives it within half a second, unless it is stopped.
        """
        self.dispatcher.call_later(1.0, self._rehome_again)
        self.rehome()
        now = time.monotonic()
        missing = [sid for sid in self.runtime.orphans() if not self.runtime.has_descriptor(sid)]
        self._missing = {sid: self._missing.get(sid, now) for sid in missing}
        for sid, since in self._missing.items():
            if now - since >= LOST_AFTER_S:
                self.runtime.set_failed(sid, errno.EOWNERDEAD, "its descriptor died with its owner")

    def _tear_down(self) -> None:
        for listener in self.listeners:
            listener.close()
        self.runtime.close(unlink=self.names_are_ours)

    def _stop_asked(self) -> None:
        if self.draining:
            log.warning("asked to stop again: killing the workers")
            self._kill()
            return
        self.draining = True
        log.info("draining; ask again to stop at once")
        self._stop_accepting()
        for sid in self._listening:  # the workers hold duplicates
            self.runtime.set_failed(sid, errno.ESHUTDOWN, "the server stops")
        for listener in self.listeners:
            listener.close()
        for child in self.children:
            # Who has not joined has nothing yet, and no handler.
            child.send_signal(signal.SIGTERM if child.index >= 0 else signal.SIGKILL)
        self.dispatcher.call_later(self.config.graceful_timeout_s, self._kill)
        self._stop_if_alone()

    def _kill(self) -> None:
        for child in self.children:
            log.warning("worker %d did not stop in time: killed", child.pid)
            child.send_signal(signal.SIGKILL)

    def _stop_if_alone(self) -> None:
        if self.draining and not self.children:
            self.dispatcher.stop()

    # -- workers --------------------------------------------------------------------------------

    def spawn(self) -> None:
        """Start a worker: a fresh interpreter, so that nothing of ours is carried over."""
        config = self.config
        settings: Settings = {
            "application": config.application,
            "pool": config.pool,
            "log_level": config.log_level,
            "password": config.password,
            "pages_remote": config.pages_remote,
            "max_connections": config.max_connections,
            "accept": config.accept,
            "keeps": self._keeps,
            "on_owner_death": config.on_owner_death,
        }
        # A terminal's Ctrl-C reaches workers too: blocked until they ignore it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process = subprocess.Popen(
                fresh_python("workers.worker", config.name), stdin=subprocess.PIPE
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert process.stdin is not None
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            process.kill()
            process.communicate()
            raise
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(json.dumps(settings).encode())
        child = Child(process.pid, pidfd, time.monotonic(), process)
        self.children.append(child)
        self.dispatcher.add_reader(child.pidfd, lambda: self._died(child))

    def _joined(self, index: int) -> None:
        row = {row.index: row for row in self.runtime.processes()}.get(index)
        if row is None or row.role != "worker":
            return
        child = next((child for child in self.children if child.pid == row.pid), None)
        if child is None:
            child = self._adopt(row.pid)
            if child is None:
                return
            if len(self.children) > self.config.workers and not row.sockets:
                # An earlier supervisor started it, and we have started another in its place.
                child.index = index
                child.send_signal(signal.SIGTERM)
                return
        child.index = index
        self._failures = 0
        log.info("worker %d is process %d", child.pid, index)
        if not self.draining and self.listeners:
            self._start_accepting()
            self.rehome()
            self._tell_ready()
        self.rolling.step()

    def _adopt(self, pid: int) -> Child | None:
        """Take a worker of an earlier supervisor for ours."""
        try:
            child = Child(pid, os.pidfd_open(pid), time.monotonic())
        except OSError:
            return None
        self.children.append(child)
        self.dispatcher.add_reader(child.pidfd, functools.partial(self._died, child))
        return child

    def _tell_ready(self) -> None:
        if self._on_ready is not None and all(child.index >= 0 for child in self.children):
            on_ready, self._on_ready = self._on_ready, None
            on_ready()

    def _died(self, child: Child) -> None:
        self.dispatcher.remove_reader(child.pidfd)
        self.children.remove(child)
        why = child.reap()
        self._counted_s = 0.0
        self._repair_after(child)
        if self.draining:
            self._stop_if_alone()
            return
        if self.rolling.left(child, why):
            self.dispatcher.call_later(0, self._respawn)  # if others died as well
            self.rolling.step()
            return
        lived_s = time.monotonic() - child.started_s
        log.error("worker %d %s after %.1f s", child.pid, why, lived_s)
        if child.index < 0 and not child.was_killed:
            self._failures += 1
        if child.index < 0:
            self.rolling.refuse(f"a new worker {why} before it was ready")
        if self._failures >= GIVE_UP_AFTER and not any(c.index >= 0 for c in self.children):
            log.critical(
                "%d workers in a row died before they were ready: giving up; the last one %s. "
                "Its own messages are above",
                self._failures,
                why,
            )
            self.exit_code = 1
            self._stop_asked()
            return
        healthy = child.index >= 0 and lived_s >= HEALTHY_AFTER_S
        self._back_off_s = BACK_OFF_S[0] if healthy else min(2 * self._back_off_s, BACK_OFF_S[1])
        if not self._ready():
            self._stop_accepting()  # the backlog holds them until a worker is there
        self.dispatcher.call_later(0 if healthy else self._back_off_s, self._respawn)

    def _repair_after(self, child: Child, delay_s: float = REPAIR_AGAIN_S[0]) -> None:
        """Give back what a dead worker held, and rehome; again soon if another is at the repair."""
        try:
            self.runtime.repair()
        except PoisonedError:
            raise  # starts over, this worker included
        except (OSError, ShmsockError):
            log.exception("what a worker held is given back later")
        self.rehome()
        rows = self.runtime.processes()
        if delay_s <= REPAIR_AGAIN_S[1] and any(row.pid == child.pid for row in rows):
            again = functools.partial(self._repair_after, child, 2 * delay_s)
            self.dispatcher.call_later(delay_s, again)

    def _respawn(self) -> None:
        if self.draining or len(self.children) >= self._wanted():
            return
        try:
            self.spawn()
        except OSError as error:  # no descriptor, process or memory left: perhaps later
            self._tell_once(f"cannot start a worker ({error.strerror}): tried again and again")
            self._back_off_s = min(2 * self._back_off_s, BACK_OFF_S[1])
            self.dispatcher.call_later(self._back_off_s, self._respawn)

    def _wanted(self) -> int:
        return self.config.workers + self.rolling.extra()

    def _ready(self) -> list[int]:
        """Who can be given connections."""
        return [
            child.index
            for child in self.children
            if child.index >= 0 and not self.rolling.is_leaving(child)
        ]

    # -- accepting ------------------------------------------------------------------------------

    def _start_accepting(self) -> None:
        if self.config.accept == "supervisor" and not self._accepting and not self.draining:
            self._accepting = True
            for listener in self.listeners:
                if not listener.shut:
                    self.dispatcher.add_reader(
                        listener.sock.fileno(), functools.partial(self._accept, listener.sock)
                    )

    def _stop_accepting(self) -> None:
        if self._accepting:
            self._accepting = False
            for listener in self.listeners:
                self.dispatcher.remove_reader(listener.sock.fileno())

    def _pause(self, why: str) -> None:
        """Look away from the listeners for a moment instead of spinning; the backlog holds."""
        self._tell_once(why)
        self._stop_accepting()
        self.dispatcher.call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        if self._ready():
            self._start_accepting()

    def _tell_once(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.error("%s", what)

    def _shut(self, sock: socket.socket) -> None:
        """Somebody has failed a listener's Socket: without us it would report itself for ever."""
        for listener in self.listeners:
            if listener.sock is sock:
                listener.shut = True
                self.dispatcher.remove_reader(sock.fileno())
                log.error("nobody listens at %s any more: its socket was failed", listener.address)

    def _accept(self, listener: socket.socket) -> None:
        """Accept a batch, each for the least-loaded worker; pass them on together."""
        ready = self._ready()
        self._count()
        room = self.config.max_connections - self._in_use
        if room > 0 and self._in_use >= self._keeps:
            # Before the kernel says so: the workers' channels need some as well.
            self._pause(f"no more than {self._keeps} connections: {RAISE_LIMIT}")
            return
        placed: dict[int, list[int]] = {}
        try:
            for _ in range(min(ACCEPT_BATCH, max(1, self._keeps - self._in_use))):
                if self._in_use >= self.config.max_connections:
                    self._in_use = self.runtime.connections()  # some may have left since
                if self._in_use >= self.config.max_connections:
                    self._turn_away(
                        listener.accept()[0], f"--max-connections {self.config.max_connections}"
                    )
                    continue
                index = self._least_loaded(ready)
                if index < 0:
                    self._stop_accepting()  # who waits is accepted when a worker has joined
                    break
                try:
                    sid = self.runtime.accept(
                        listener, owner=index, on_owner_death=self.config.on_owner_death
                    )
                except ValueError:  # reaped by another before we were told: whoever comes next
                    ready.remove(index)
                    continue
                self._loads[index] += 1
                self._in_use += 1
                placed.setdefault(index, []).append(sid)
        except TableFullError as error:
            if error.sock is not None:
                self._turn_away(error.sock, f"--slots {self.runtime.slots}")
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            pass
        except OSError as error:
            if error.errno == errno.EINVAL:  # it does not listen any more
                self._shut(listener)
            elif error.errno in NOT_NOW:
                self._pause(f"cannot accept ({error.strerror}): {RAISE_LIMIT}")
            else:
                raise
        finally:
            for index, sids in placed.items():
                self.runtime.pass_to(index, sids)

    def _count(self) -> None:
        """Now and then, or when there seems to be no room, count who owns how many."""
        now = time.monotonic()
        most = min(self.config.max_connections, self._keeps)
        if now - self._counted_s > COUNT_FOR_S or self._in_use >= most:
            self._counted_s = now
            self._loads = self.runtime.owned_counts().tolist()
            self._in_use = self.runtime.connections()

    def _least_loaded(self, ready: list[int]) -> int:
        """The worker that owns the fewest sockets, of those that are ready; -1 if none is."""
        return min(ready, key=self._loads.__getitem__, default=-1)

    def _turn_away(self, sock: socket.socket, limit: str) -> None:
        self._tell_once(f"full: connections are turned away at {limit}")
        self.refusing.turn_away(sock)
