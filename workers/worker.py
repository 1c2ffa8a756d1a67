"""A worker: one process, one dispatcher, the connections that the supervisor places here.

Started as ``python -m workers.worker NAME`` with its settings as JSON on standard input, which
keeps a password out of ``ps``. SIGTERM drains: connections are closed as each falls idle, and the
process ends with the last one. A wish to leave (leaving.py) hands them over instead. SIGINT is
the supervisor's to handle: a terminal sends it to the whole foreground group.
"""

from __future__ import annotations

import json
import logging
import signal
import sys

from shmsock import Dispatcher, PoisonedError, Runtime

from .application import Application, ApplicationError, Context, Settings, load
from .leaving import Leaving
from .messenger import Messenger

log = logging.getLogger("shmsock")

_DRAIN_LOOK_S = 0.05


class Worker:
    """One worker process: an application, its connections, and how both end."""

    def __init__(self, name: str, settings: Settings, application: Application) -> None:
        """Attach and start the application; connections come once ``run`` dispatches."""
        self.application = application
        self.runtime = Runtime.attach(name, role="worker")
        self.dispatcher = Dispatcher(self.runtime)
        self._draining = False
        context = Context(
            runtime=self.runtime,
            dispatcher=self.dispatcher,
            settings=settings,
            draining=lambda: self._draining,
            health=self._health,
        )
        application.on_startup(context)
        protocols = application.protocols(context)
        self.messenger = Messenger(self.runtime, self.dispatcher, protocols, application)
        self.leaving = Leaving(self.runtime, self.dispatcher, self.messenger)

    def _health(self) -> str | None:
        if self._draining:
            return "this worker is draining"
        return None if self.runtime.host_alive() else "the supervisor is gone"

    def run(self) -> int:
        """Serve until drained; returns the exit code: 1 when the runtime is poisoned."""
        signal.signal(signal.SIGTERM, lambda *_: self.dispatcher.call_soon(self.drain))
        # A terminal that closes sends it too: it only makes us look.
        signal.signal(signal.SIGHUP, lambda *_: self.dispatcher.call_soon(self.leaving.look))
        code = 0
        try:
            self.dispatcher.run()
        except PoisonedError as error:
            log.critical("process %d ends: %s", self.runtime.index, error)
            code = 1
        try:
            self.application.on_shutdown()
        except Exception:
            log.exception("the application could not shut down")
            code = 1
        self.dispatcher.close()
        self.runtime.close()
        return code

    def drain(self) -> None:
        """Close connections as they fall idle, then stop."""
        if not self._draining:
            self._draining = True
            log.info("process %d drains %d connections", self.runtime.index, len(self.messenger))
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
