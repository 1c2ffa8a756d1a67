"""The command line: ``shmsock serve`` and the commands that look at or touch a running server.

Exit codes, the same for every command:

    0  done; for doctor: everything is in order
    1  not done: no such connection, an address in use, something is broken
    2  the command line itself is wrong
    3  no runtime of that name is running
"""

from __future__ import annotations

import argparse
import collections.abc
import contextlib
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import typing

import shmsock
from shmsock import AlreadyRunningError, Runtime, RuntimeNotFoundError, ShmsockError

from . import report
from .listeners import check_path, split_address

OK, FAILED, USAGE, NOT_RUNNING = 0, 1, 2, 3

_DEFAULT_BIND = "127.0.0.1:7379"
_PUSH_TIMEOUT_S = 10.0

Command = collections.abc.Callable[[argparse.Namespace], int]


def main(arguments: collections.abc.Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    run: Command = options.run
    try:
        code = run(options)
        sys.stdout.flush()
        return code
    except RuntimeNotFoundError as error:
        return _complain(NOT_RUNNING, error)
    except (ShmsockError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):  # `shmsock conns | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
        return _complain(FAILED, error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _complain(code: int, error: BaseException) -> int:
    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, ShmsockError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    print(f"shmsock: {text}", file=sys.stderr)
    return code


# -- the parser ---------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shmsock",
        description="A multi-process server whose connections are integers.",
        epilog="Exit codes: 0 done, 1 not done or something is broken, 2 usage, 3 not running.",
    )
    parser.add_argument("--version", action="version", version=f"shmsock {shmsock.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _serve_parser(commands)
    for name, run, text in (
        ("conns", _conns, "list every connection of the runtime"),
        ("ps", _ps, "list its processes"),
        ("doctor", _doctor, "check every invariant, and this machine's limits"),
    ):
        command = _command(commands, name, run, text)
        command.add_argument("--json", action="store_true", help="print JSON")
        if name == "doctor":
            command.add_argument(
                "--repair",
                action="store_true",
                help="reap the dead, give every stripe a new semaphore, recount, and check again; "
                "what stays wrong poisons the runtime, and its supervisor starts a new one",
            )
    kick = _command(commands, "kick", _kick, "end a connection, whichever worker owns it")
    kick.add_argument("id", type=_socket_id, help="a number, or sk-... text")
    kick.add_argument("--reason", default="kicked", help="what its error text will say")
    push = _command(commands, "push", _push, "write to a client, whichever worker owns it")
    push.add_argument("id", type=_socket_id, help="a number, or sk-... text")
    push.add_argument("text", help="what to write, as it is; - reads standard input")
    for name, run, text in (
        ("drain", _drain, "replace one worker: it hands over its connections and leaves"),
        ("reload", _reload, "replace every worker, one by one; as SIGHUP to the supervisor does"),
    ):
        command = _command(commands, name, run, text)
        command.add_argument(
            "--timeout", type=_seconds, default=300.0, metavar="S", help="how long to wait for it"
        )
        if run is _drain:
            command.add_argument("worker", type=_positive_or_zero, help="process index or pid")
    clean = _command(commands, "clean", _clean, "remove what a crash of everything left behind")
    clean.add_argument("--all", action="store_true", help="of every runtime on this machine")
    clean.add_argument(
        "--kill", action="store_true", help="first kill the processes that still take part"
    )
    return parser


def _command(commands: typing.Any, name: str, run: Command, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument(
        "--name",
        type=_name,
        default=os.environ.get("SHMSOCK_NAME", "hub"),
        help="which runtime (default: $SHMSOCK_NAME, else hub)",
    )
    command.set_defaults(run=run)
    return command


def _serve_parser(commands: typing.Any) -> None:
    serve = _command(commands, "serve", _serve, "run an application on several processes")
    cores = max(2, os.cpu_count() or 2)
    add = serve.add_argument
    add(
        "application",
        nargs="?",
        metavar="MODULE:NAME",
        help="what to run: an Application, see docs/applications.md (default: the built-in "
        "publish/subscribe server)",
    )
    add(
        "--bind",
        type=_address,
        action="append",
        metavar="ADDRESS",
        help=f"HOST:PORT, [IPv6]:PORT or unix:PATH; may be given again (default {_DEFAULT_BIND})",
    )
    add("--workers", type=_positive, default=cores, help=f"processes (default {cores})")
    add(
        "--pool",
        type=_positive_or_zero,
        default=0,
        metavar="N",
        help="processes of each worker that compute, for applications that use them (default 0)",
    )
    add("--slots", type=_positive, default=65_536, help="room in the table (default 65536)")
    add("--max-connections", type=_positive, help="over all workers (default: --slots)")
    add("--backlog", type=_positive, default=4096, help="unaccepted connections (default 4096)")
    add(
        "--graceful-timeout",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="how long a stop waits for busy connections before it kills (default 10)",
    )
    add(
        "--max-unwritten-bytes",
        type=_positive,
        default=64 << 20,
        help="what may wait for one slow client in one process (default 64 MiB)",
    )
    add("--password", help="what AUTH must give; better in the environment: SHMSOCK_PASSWORD")
    add("--pages-remote", action="store_true", help="serve the HTTP pages beyond loopback too")
    add(
        "--on-owner-death",
        choices=["rehome", "fail"],
        default="rehome",
        help="idle connections of a killed worker: move to another (default), or fail",
    )
    add(
        "--accept",
        type=_accept,
        default="supervisor",
        metavar="{supervisor,workers}",
        help="who accepts: the supervisor, which places each connection with the worker that has "
        "the fewest (default); or the workers themselves, from the listeners they share, which "
        "costs less for a connection and goes on without a supervisor; reuseport is taken for "
        "workers",
    )
    add(
        "--log-level",
        default="info",
        type=str.lower,
        choices=["debug", "info", "warning", "error", "critical"],
    )


def _positive(text: str) -> int:
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least} or more")
    return value


def _positive_or_zero(text: str) -> int:
    return _at_least(0, text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _address(text: str) -> str:
    try:
        if text.startswith("unix:"):
            check_path(text.removeprefix("unix:"))
        else:
            split_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _accept(text: str) -> str:
    text = "workers" if text == "reuseport" else text  # what other servers call it
    if text not in ("supervisor", "workers"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither supervisor nor workers")
    return text


def _name(text: str) -> str:
    try:
        return shmsock.check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _socket_id(text: str) -> int:
    try:
        return shmsock.parse_socket_id(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# -- serve --------------------------------------------------------------------------------------


def _serve(options: argparse.Namespace) -> int:
    try:
        from .application import BUILT_IN
        from .supervisor import Config, Supervisor
    except ImportError as error:
        print(
            f"shmsock: {error}: the server needs its extra: python -m pip install "
            "'shmsock[server]'",
            file=sys.stderr,
        )
        return FAILED
    if options.application is not None and not _can_load(options.application):
        return FAILED
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s supervisor[%(process)d] %(name)s: %(message)s",
    )
    supervisor = Supervisor(
        Config(
            name=options.name,
            bind=tuple(options.bind or [_DEFAULT_BIND]),
            workers=options.workers,
            slots=options.slots,
            max_connections=min(options.max_connections or options.slots, options.slots),
            backlog=options.backlog,
            graceful_timeout_s=options.graceful_timeout,
            max_unwritten_bytes=options.max_unwritten_bytes,
            log_level=options.log_level.upper(),
            password=options.password or os.environ.get("SHMSOCK_PASSWORD") or None,
            pages_remote=options.pages_remote,
            on_owner_death=options.on_owner_death,
            application=options.application or BUILT_IN,
            pool=options.pool,
            accept=options.accept,
        )
    )
    return supervisor.run(lambda: print(_banner(supervisor), flush=True))


def _can_load(application: str) -> bool:
    """Have a process of its own import it and say what is wrong: before anything is bound."""
    from .application import fresh_python

    command = fresh_python("workers.application", application)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"shmsock: {done.stderr.strip()}", file=sys.stderr)
    return done.returncode == 0


def _banner(supervisor: typing.Any) -> str:
    """One screen: where it listens, the name, the workers, and what to try next."""
    config = supervisor.config
    pids = [str(child.pid) for child in supervisor.children]
    addresses = [listener.address for listener in supervisor.listeners]
    lines = [
        f"shmsock {shmsock.__version__}: runtime {config.name!r} "
        + ("was taken over" if supervisor.took_over else "is up"),
        f"  listens    {', '.join(addresses)}",
        f"  serves     {config.application}",
        f"  workers    {len(pids)} (pids {' '.join(pids)}), supervisor {os.getpid()}",
        f"  table      {supervisor.runtime.slots} slots, at most "
        f"{config.max_connections} connections",
        "",
        "try in another terminal:",
        *_suggestions(addresses[0], config.name, config.application),
        "",
        "Ctrl-C stops it.",
    ]
    return "\n".join(lines)


def _suggestions(address: str, name: str, application: str) -> list[str]:
    from .application import BUILT_IN

    own = "" if name == os.environ.get("SHMSOCK_NAME", "hub") else f" --name {name}"
    look = f"  shmsock conns{own}; shmsock ps{own}; shmsock doctor{own}"
    if application != BUILT_IN:  # what its clients are, we do not know
        return [look]
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        client, curl = f"redis-cli -s {path}", f"curl --unix-socket {path} http://localhost"
    else:
        host, _, port = address.rpartition(":")
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
        client = f"redis-cli -h {host.strip('[]')} -p {port}"
        curl = f"curl http://{host}:{port}"
    return [
        f"  {client} subscribe news",
        f"  {client} publish news hello",
        f"  {curl}/connections",
        look,
    ]


@contextlib.contextmanager
def _attach(name: str) -> collections.abc.Iterator[Runtime]:
    """Attach for one command, to a runtime in which somebody else lives."""
    with Runtime.attach(name) as runtime:
        others = [row for row in runtime.processes() if row.alive and row.index != runtime.index]
        if not others:
            raise RuntimeNotFoundError(
                f"runtime {name!r} has no living process: only its names are left. The next "
                f"`shmsock serve --name {name}` removes them, or `shmsock clean --name {name}`"
            )
        yield runtime


# -- looking ------------------------------------------------------------------------------------


def _conns(options: argparse.Namespace) -> int:
    with _attach(options.name) as runtime:
        rows = report.connections(runtime, name_of=_client_name())
    if options.json:
        print(json.dumps(rows))
    else:
        print(report.connections_text(rows), end="")
    return OK


def _client_name() -> collections.abc.Callable[[bytes], str] | None:
    """How the hub names its clients, where its extra is installed."""
    try:
        from .hub_client import client_name
    except ImportError:
        return None
    return client_name


def _ps(options: argparse.Namespace) -> int:
    with _attach(options.name) as runtime:
        rows = [row for row in report.processes(runtime) if row["index"] != runtime.index]
    if options.json:
        print(json.dumps(rows))
    else:
        print(report.processes_text(rows), end="")
    return OK


def _doctor(options: argparse.Namespace) -> int:
    """Look without taking part, so also at what is dead or poisoned."""
    from . import doctor

    done: list[str] = []
    with shmsock.Inspector(options.name) as inspector:
        if options.repair and not inspector.poisoned:
            done = doctor.repair(inspector)
        findings = doctor.examine(inspector)
        alive = any(row.alive for row in inspector.processes())
    broken = [finding for finding in findings if not finding["ok"]]
    if options.json:
        report = {"ok": not broken, "checks": findings}
        print(json.dumps({**report, "repairs": done} if options.repair else report))
    else:
        for line in done:
            print(f"repair  {line}")
        for finding in findings:
            mark = "ok    " if finding["ok"] else "BROKEN"
            print(f"{mark}  {finding['check']}: {finding['detail']}")
    if options.repair and not alive:  # nobody serves: that is no reason to call the repair failed
        broken = [finding for finding in broken if finding["check"] != "host"]
    if not alive and not options.repair:
        return NOT_RUNNING
    return FAILED if broken else OK


# -- touching -----------------------------------------------------------------------------------


def _kick(options: argparse.Namespace) -> int:
    with _attach(options.name) as runtime:
        won = runtime.set_failed(options.id, errno.ECONNABORTED, options.reason)
    text = shmsock.format_socket_id(options.id)
    if won:
        print(f"{text} kicked")
        return OK
    print(f"shmsock: {text} names no live connection", file=sys.stderr)
    return FAILED


def _push(options: argparse.Namespace) -> int:
    data = sys.stdin.buffer.read() if options.text == "-" else os.fsencode(options.text)
    with _attach(options.name) as runtime:
        text = shmsock.format_socket_id(options.id)
        reference = runtime.address(options.id)
        if reference is None:
            print(f"shmsock: {text} names no live connection", file=sys.stderr)
            return FAILED
        with reference:
            reference.write(data)
            if not reference.flush(_PUSH_TIMEOUT_S):
                print(f"shmsock: {text} does not read: not all was sent", file=sys.stderr)
                return FAILED
    return OK


def _drain(options: argparse.Namespace) -> int:
    from . import replacing

    with _attach(options.name) as runtime:
        return _replace(runtime, [replacing.worker_named(runtime, options.worker)], options.timeout)


def _reload(options: argparse.Namespace) -> int:
    with _attach(options.name) as runtime:
        return _replace(runtime, None, options.timeout)


def _replace(runtime: Runtime, indexes: list[int] | None, timeout_s: float) -> int:
    from . import replacing

    problem = replacing.replace(runtime, indexes, timeout_s)
    if problem:
        print(f"shmsock: {problem}", file=sys.stderr)
    return FAILED if problem else OK


def _clean(options: argparse.Namespace) -> int:
    names = shmsock.names_on_machine() if options.all else [options.name]
    code = OK
    for name in names:
        try:
            if options.kill:
                _kill_participants(name)
            removed = shmsock.clean(name)
        except AlreadyRunningError as error:
            print(f"shmsock: {error}: nothing was removed", file=sys.stderr)
            code = FAILED
        else:
            print(f"{name}: {'removed' if removed else 'nothing to remove'}")
    return code


def _kill_participants(name: str) -> None:
    """SIGKILL whoever takes part, by pidfd, and wait until the kernel says that it has died."""
    import select

    try:
        inspector = shmsock.Inspector(name)
    except ShmsockError:
        return
    with inspector:  # a poisoned one cannot be attached
        pids = [row.pid for row in inspector.processes() if row.alive]
    poller, waiting = select.poll(), {}
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        poller.register(fd, select.POLLIN)
        waiting[fd] = pid
    while waiting:
        for fd, _ in poller.poll():
            poller.unregister(fd)
            os.close(fd)
            del waiting[fd]


if __name__ == "__main__":
    raise SystemExit(main())
