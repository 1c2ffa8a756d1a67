"""Other processes of a bench: servers and actors, started apart and always stopped.

Each is the leader of a session of its own, so that a Ctrl-C reaches the bench alone, which then
stops them in order; whatever is left of a session after that is killed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing

import shmsock

from .environment import REPOSITORY
from .measure import BrokenError, Plan, UnavailableError

START_S, STOP_S, ANSWER_S = 30.0, 15.0, 120.0
_numbers = itertools.count()
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def which(program: str) -> str:
    """Where a program is.

    Raises:
        UnavailableError: Nowhere.
    """
    path = shutil.which(program)
    if path is None:
        raise UnavailableError(f"{program} is not installed")
    return path


@contextlib.contextmanager
def _started(
    command: list[str], *, errors: typing.IO[bytes] | None = None, **options: typing.Any
) -> typing.Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, start_new_session=True, cwd=REPOSITORY, stderr=errors, **options
    )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, by the end of its input or by SIGTERM; then kill what is left of it."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    elif process.returncode is None:
        # WHY NOT process.send_signal: it reaps who has died already.
        os.kill(process.pid, signal.SIGTERM)
    if process.returncode is None:
        # ORDER: killed before it is reaped: only until then the group's number is surely its own.
        _wait_unreaped(process.pid, STOP_S)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _wait_unreaped(pid: int, timeout_s: float) -> None:
    """Wait for the end of a child and leave it a zombie."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.01)


# -- servers ------------------------------------------------------------------------------------


class Server(typing.NamedTuple):
    """A running server: its port, the process at the root of its tree, and its runtime's name."""

    port: int
    pid: int
    name: str = ""

    def processes(self) -> set[int]:
        """The whole tree's processes."""
        return tree(self.pid)

    def cpu_s(self) -> float:
        """User and system time of the whole tree until now, once it has nothing left to do.

        The kernel counts in ticks, of 10 ms mostly. Idle is: no further tick in three.
        """
        deadline = time.monotonic() + 5.0
        before, now = -1, self._ticks()
        while before != now and time.monotonic() < deadline:
            time.sleep(3 * TICK_S)
            before, now = now, self._ticks()
        return now * TICK_S

    def _ticks(self) -> int:
        return sum(sum(map(int, _stat(pid)[11:13])) for pid in self.processes())


def cpu_ns(pids: typing.Iterable[int]) -> int:
    """User and system time of these processes until now, to the nanosecond.

    A process's processor clock has a number made of its pid: clock_getcpuclockid(3).
    """
    return sum(time.clock_gettime_ns(~pid << 3 | 2) for pid in pids)


def under_load(
    server: Server, plan: Plan, run: typing.Callable[[int], float], at_least: int
) -> typing.Callable[[], dict[str, float]]:
    """A sampler of the rate that ``run(count)`` measures, and of the server's CPU for each.

    Raises:
        BrokenError: A process of the server died.
    """
    # Twice: the first also warms up, and is too short to know the rate by.
    count = max(at_least, round(run(at_least) * plan.slice_s / 4))
    count = max(at_least, round(run(count) * plan.slice_s))

    def sample() -> dict[str, float]:
        processes, before_s = server.processes(), server.cpu_s()
        rate = run(count)
        spent_s = server.cpu_s() - before_s
        if server.processes() != processes:
            raise BrokenError("a server's process died under load")
        return {"rate": rate, "cpu": max(spent_s, TICK_S) / count * 1e9}

    return sample


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third on: state, ppid, ...; utime is [11]."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


def tree(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry)] = int(_stat(int(entry))[1])
    found, before = {root}, 0
    while len(found) != before:
        before = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found


@contextlib.contextmanager
def shmsock_server(workers: int, *flags: str) -> typing.Iterator[Server]:
    """``shmsock serve`` on a free port, under a name of its own."""
    name = f"bench-{os.getpid()}-serve{next(_numbers)}"
    command = [sys.executable, "-m", "workers.cli", "serve", "--name", name]
    command += ["--bind", "127.0.0.1:0", "--workers", str(workers), "--log-level", "warning"]
    command += ["--graceful-timeout", "2", *flags]
    try:
        with (
            tempfile.TemporaryFile() as errors,
            _started(command, errors=errors, stdout=subprocess.PIPE) as process,
        ):
            yield Server(_port_of_banner(process, errors), process.pid, name)
    finally:
        _clean(name)  # finds nothing, unless it had to be killed


def _clean(name: str) -> None:
    """Remove what is left once the last of those that were killed has ended."""
    deadline = time.monotonic() + STOP_S
    while True:
        try:
            shmsock.clean(name)
            return
        except shmsock.AlreadyRunningError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.01)


@contextlib.contextmanager
def shmsock_follower(name: str) -> typing.Iterator[Server]:
    """``shmsock serve`` that takes over a runtime whose supervisor has died."""
    command = [sys.executable, "-m", "workers.cli", "serve", "--name", name, "--workers", "2"]
    command += ["--bind", "127.0.0.1:0", "--log-level", "warning", "--graceful-timeout", "2"]
    with (
        tempfile.TemporaryFile() as errors,
        _started(command, errors=errors, stdout=subprocess.PIPE) as process,
    ):
        yield Server(_port_of_banner(process, errors), process.pid, name)


def _port_of_banner(process: subprocess.Popen[bytes], errors: typing.IO[bytes]) -> int:
    """Read the banner, which comes when every worker has joined, for the port that was free."""
    assert process.stdout is not None
    deadline = time.monotonic() + START_S
    text = b""
    while select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(process.stdout.fileno(), 65536)
        text += chunk
        for line in text.split(b"\n")[:-1]:
            if line.split()[:1] == [b"listens"]:
                return int(line.rpartition(b":")[2])
        if not chunk:
            break
    errors.seek(0)
    raise BrokenError("shmsock serve did not start: " + errors.read().decode().strip()[-500:])


@contextlib.contextmanager
def redis_server() -> typing.Iterator[Server]:
    """redis-server on a free port, with nothing to save and one thread, as it comes."""
    program = which("redis-server")
    with tempfile.TemporaryDirectory(prefix="shmsock-bench-") as directory:
        port = _free_port()
        command = [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", directory]
        command += ["--save", "", "--appendonly", "no", "--daemonize", "no"]
        with _started(command, stdout=subprocess.DEVNULL) as process:
            _wait_for_redis(process, port)
            yield Server(port, process.pid)


@contextlib.contextmanager
def answerer(loop: str) -> typing.Iterator[Server]:
    """``bench.answerers`` under one of its event loops."""
    command = [sys.executable, "-m", "bench.answerers", loop]
    with _started(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()  # empty if it ended
        if not line:
            raise BrokenError(f"bench.answerers {loop} did not start; what it said is above")
        yield Server(int(line), process.pid)


@contextlib.contextmanager
def uvicorn(workers: int, *flags: str) -> typing.Iterator[Server]:
    """``uvicorn --workers`` with a bare ASGI application, and nothing logged."""
    port = _free_port()
    command = [sys.executable, "-m", "uvicorn", "bench.bare_app:app", "--port", str(port)]
    command += ["--workers", str(workers), "--backlog", "4096", "--timeout-keep-alive", "60"]
    command += ["--no-access-log", "--log-level", "warning", *flags]
    with _started(command) as process:
        _wait_for_http(process, port)
        yield Server(port, process.pid)


@contextlib.contextmanager
def node_cluster(workers: int) -> typing.Iterator[Server]:
    """Node's cluster as it comes: the primary accepts and passes handles in turn."""
    from .bare_app import NODE

    port = _free_port()
    with tempfile.NamedTemporaryFile("w", suffix=".js") as program:
        program.write(NODE)
        program.flush()
        command = [which("node"), program.name, str(port), str(workers)]
        with _started(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise BrokenError("Node's cluster did not start; what it said is above")
            yield Server(port, process.pid)


def _wait_for_http(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            if sock.recv(65536).startswith(b"HTTP/1.1 200 "):
                return
        time.sleep(0.02)
    raise BrokenError(f"nobody answers at port {port}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_redis(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until it answers, and that it is this one: another may have taken the port."""
    wanted = f"process_id:{process.pid}\r".encode()
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
            sock.sendall(b"INFO server\r\n")
            if wanted in sock.recv(65536):
                return
        time.sleep(0.02)
    raise BrokenError(f"redis-server did not start on port {port}")


# -- actors -------------------------------------------------------------------------------------


class Actor:
    """A process that ``obey``s: takes one JSON line, answers with one. Ends with its input."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Made by ``actor``."""
        self.process = process

    def tell(self, do: str, **arguments: object) -> None:
        """Send a request without waiting for its answer."""
        assert self.process.stdin is not None
        line = json.dumps({"do": do, **arguments}).encode() + b"\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise BrokenError("an actor has ended; what it said is above") from None

    def answer(self) -> typing.Any:
        """Wait for an answer."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], ANSWER_S)[0]:
            raise BrokenError(f"an actor did not answer in {ANSWER_S:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise BrokenError("an actor has ended; what it said is above")
        return json.loads(line)

    def ask(self, do: str, **arguments: object) -> typing.Any:
        """Send a request and wait for its answer."""
        self.tell(do, **arguments)
        return self.answer()


@contextlib.contextmanager
def actor(*pass_fds: int, engine: str = "", module: str = "bench.actors") -> typing.Iterator[Actor]:
    """Start one, with these descriptors under the same numbers, and, if named, that engine."""
    environment = {"SHMSOCK_ENGINE": engine} if engine else {}
    with _started(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=pass_fds,
        env={**os.environ, **environment},
    ) as process:
        yield Actor(process)


def obey(actor: object) -> None:
    """What an actor's process does: calls the methods it is asked for, until its input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(actor, request.pop("do"))(**request)
        print(json.dumps(answer), flush=True)
