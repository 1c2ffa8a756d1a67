r"""What ``shmsock serve MODULE:NAME`` runs: an application, its hooks, and what a worker gives it.

A whole one:

    from workers.application import Application

    class Shout(Application):
        def on_message(self, ref, message):
            ref.write(message.upper(), b"\r\n")

    app = Shout()

The name may be of an instance, of a class, or of a function that returns an instance. Every worker
imports the module for itself: what it keeps in variables is that process's, what all must see goes
into ``ref.user_data`` (64 bytes a connection), ``runtime.groups``, or a store of your own.

Hooks run in the worker's loop, one at a time. One that waits keeps all of that worker's connections
waiting: leave computing to the pool (``--pool``).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import os
import sys
import traceback
import typing

from .framing import Lines
from .protocol import Protocol

if typing.TYPE_CHECKING:
    from shmsock import Dispatcher, Runtime, SocketRef
    from shmsock.pool import ProcessPoolExecutor

BUILT_IN = "workers.hub:app"
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Settings(typing.TypedDict):
    """What the command line said that a worker must know."""

    application: str
    pool: int
    log_level: str
    password: str | None
    pages_remote: bool
    max_connections: int
    accept: str
    keeps: int
    on_owner_death: str


@dataclasses.dataclass(frozen=True)
class Context:
    """What a worker gives its application.

    Attributes:
        runtime: The segment that all processes share: ``address``, ``set_failed``, ``sockets()``,
            ``groups``.
        dispatcher: The worker's loop: ``call_later``, ``call_soon``, ``add_reader``.
        settings: What the command line said.
        pool: Processes that compute (``--pool``); ``pool.submit(job, ..., client=ref.id)``. None
            without the flag. The worker shuts it down after ``on_shutdown``.
        draining: Whether this worker is to end: new work is better refused.
        health: Why this worker should get no new work, or None.
    """

    runtime: Runtime
    dispatcher: Dispatcher
    settings: Settings
    pool: ProcessPoolExecutor | None
    draining: collections.abc.Callable[[], bool]
    health: collections.abc.Callable[[], str | None]


class Application:
    """Override what you need; a hook that is not overridden does nothing.

    What a hook raises is logged. Out of ``on_startup`` and ``protocols`` it ends the worker; out of
    ``on_connect`` and ``on_message`` it fails that connection alone.
    """

    def protocols(self, context: Context) -> collections.abc.Sequence[Protocol]:
        """What is spoken; tried in turn on a connection's first bytes. Called once a worker.

        By default lines that end with LF or CR LF, each of which is a message.
        """
        return (Lines(self.on_message),)

    def on_startup(self, context: Context) -> None:
        """The worker has joined the runtime, and serves nobody yet."""

    def on_connect(self, ref: SocketRef) -> None:
        """This worker reads the connection from here on.

        That is so after it was accepted, and again in another worker when it moves there: it finds
        in ``ref.user_data`` what the earlier one has left.
        """

    def on_message(self, ref: SocketRef, message: bytes) -> bool | None:
        """A whole message has come.

        Args:
            ref: The connection; closed when this returns. Keep ``ref.id``, not ``ref``.
            message: Without its frame.

        Returns:
            False to close once everything written is out; anything else goes on.
        """
        raise NotImplementedError(f"{type(self).__name__} has no on_message")

    def on_failed(self, sid: int, code: int, text: str) -> None:
        """A connection that this worker read has ended, for whatever reason; it addresses no more.

        Not called for one that moved to another worker; the worker that has it then is told. If a
        worker dies, nobody is told of those that ended with it.
        """

    def on_shutdown(self) -> None:
        """The last connection is gone, and the worker leaves the runtime after this.

        Not called in a worker that is killed.
        """


class ApplicationError(ValueError):
    """``MODULE:NAME`` names no application; the text says what is wrong and what to do."""


def load(spec: str) -> Application:
    """Import ``MODULE:NAME`` and make an application of what is there; NAME is by default ``app``.

    The directory the process was started in is looked at first.

    Raises:
        ApplicationError: There is none.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not all(part.isidentifier() for part in module_name.split(".")):
        raise ApplicationError(f"{spec!r} is not MODULE:NAME, as in myservice.chat:app")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: typing.Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # it is there; what it imports is not
        raise ApplicationError(
            f"there is no module {error.name!r}: start in its directory, or name that in PYTHONPATH"
        ) from None
    for part in (name or "app").split("."):
        if not hasattr(found, part):
            there = [key for key, value in vars(found).items() if isinstance(value, Application)]
            hint = f"; it has {', '.join(there)}" if there else ""
            raise ApplicationError(f"module {module_name!r} has no {part!r}{hint}")
        found = getattr(found, part)
    if not isinstance(found, Application) and callable(found):
        found = found()
    if not isinstance(found, Application):
        raise ApplicationError(
            f"{spec} is a {type(found).__name__}, not an Application: derive its class from "
            "workers.application.Application"
        )
    return found


def fresh_python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours in a fresh interpreter."""
    # -P: not to import a directory named "workers" that happens to be where we were started.
    safe = [] if os.getcwd() == _ROOT else ["-P"]
    return [sys.executable, *safe, "-m", module, *arguments]


def main(arguments: list[str]) -> int:
    """Say on standard error why a worker could not load an application; 0 if it can.

    The supervisor asks so in a process of its own, and imports no application itself: what that
    starts and opens is the workers' affair, and ``reload`` gets the module's new text.
    """
    try:
        load(arguments[0])
    except ApplicationError as error:
        print(error, file=sys.stderr)
        return 1
    except Exception:
        print(f"{arguments[0]} cannot be imported:\n{traceback.format_exc()}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Under its real name: the application's base class must be the one that `load` looks for.
    from workers import application

    raise SystemExit(application.main(sys.argv[1:]))
