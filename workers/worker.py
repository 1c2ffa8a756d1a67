"""A worker: one process, one dispatcher, the connections that the supervisor places here.

Started as ``python -m workers.worker NAME`` with its settings as JSON on standard input, which
keeps a password out of ``ps``. SIGTERM drains: connections are closed as each falls idle, and the
process ends with the last one. A wish to leave (leaving.py) hands them over instead. SIGINT is
the supervisor's to handle: a terminal sends it to the whole foreground group.
"""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
import time

from shmsock import Dispatcher, PoisonedError, Runtime
from shmsock.pool import ProcessPoolExecutor

from .accepting import Accepting
from .application import Application, ApplicationError, Context, Settings, load
from .leaving import Leaving
from .messenger import Messenger

log = logging.getLogger("shmsock")

_DRAIN_LOOK_S = 0.05
_HEALTH_FOR_S = 0.05  # how long an answer of the kernel is good for


class Worker:
    """One worker process: an application, its connections, and how both end."""

    def __init__(self, name: str, settings: Settings, application: Application) -> None:
        """Attach and start the application; connections come once ``run`` dispatches."""
        self.application = application
        self.runtime = Runtime.attach(name, role="worker")
        self.dispatcher = Dispatcher(self.runtime)
        self._draining = False
        count = settings["pool"]
        self.pool = ProcessPoolExecutor(name, count) if count else None
        self._asked_s, self._host_alive = 0.0, False
        context = Context(
            runtime=self.runtime,
            dispatcher=self.dispatcher,
            settings=settings,
            pool=self.pool,
            draining=lambda: self._draining,
            health=self._health,
        )
        application.on_startup(context)
        protocols = application.protocols(context)
        self.messenger = Messenger(self.runtime, self.dispatcher, protocols, application)
        self.leaving = Leaving(self.runtime, self.dispatcher, self.messenger)
        self.accepting: Accepting | None = None
        if settings["accept"] == "workers":
            self.accepting = Accepting(
                self.runtime,
                self.dispatcher,
                self.messenger,
                max_connections=settings["max_connections"],
                keeps=settings["keeps"],
                on_owner_death=settings["on_owner_death"],
            )

    def _health(self) -> str | None:
        if self._draining:
            return "this worker is draining"
        now = time.monotonic()
        if now - self._asked_s > _HEALTH_FOR_S:
            self._asked_s, self._host_alive = now, self.runtime.host_alive()
        return None if self._host_alive else "the supervisor is gone"

    def run(self) -> int:
        """Serve until drained; returns the exit code: 1 when the runtime is poisoned."""
        signal.signal(signal.SIGTERM, lambda *_: self.dispatcher.call_soon(self.drain))
        # A terminal that closes sends it too: it only makes us look.
        signal.signal(signal.SIGHUP, lambda *_: self.dispatcher.call_soon(self.leaving.look))
        code = 0
        gc.collect()
        gc.freeze()  # what was imported stays, and need not be looked at again and again
        try:
            self.dispatcher.run()
        except PoisonedError as error:
            log.critical("process %d ends: %s", self.runtime.index, error)
            code = 1
        if self.accepting is not None:
            self.accepting.close()
        try:
            self.application.on_shutdown()
        except Exception:
            log.exception("the application could not shut down")
            code = 1
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        self.dispatcher.close()
        self.runtime.close()
        return code

    def drain(self) -> None:
        """Close connections as they fall idle, then stop."""
        if not self._draining:
            self._draining = True
            log.info("process %d drains %d connections", self.runtime.index, len(self.messenger))
            if self.accepting is not None:
                self.accepting.close()
            self.messenger.drain()
            self._stop_when_drained()

    def _stop_when_drained(self) -> None:
        if len(self.messenger):
            self.dispatcher.call_later(_DRAIN_LOOK_S, self._stop_when_drained)
        else:
            self.dispatcher.stop()


def main() -> int:
    """Run one worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to look at
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked by who started us
    name = sys.argv[1]
    told = sys.stdin.read()
    if not told:  # CRASH(spawn): the supervisor died first; its follower starts workers of its own
        return 1
    settings: Settings = json.loads(told)
    logging.basicConfig(
        level=settings["log_level"],
        format="%(asctime)s %(levelname)s worker[%(process)d] %(name)s: %(message)s",
    )
    try:
        application = load(settings["application"])
    except Exception as error:
        log.critical("no application: %s", error, exc_info=not isinstance(error, ApplicationError))
        return 1
    try:
        return Worker(name, settings, application).run()
    except PoisonedError as error:  # before there was a loop
        log.critical("cannot take part: %s", error)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
