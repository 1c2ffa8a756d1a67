"""A whole server for tests: ``shmsock serve`` as a process of its own, and clients for it.

A ``Server`` waits until it is ready, keeps its log, is stopped by SIGTERM, and then nothing may be
left: no process, no name in shared memory, no socket file, and no traceback in the log.
"""

from __future__ import annotations

import collections.abc
import contextlib
import itertools
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import typing

import redis
import redis.backoff
import redis.retry

import shmsock

from .helpers import REPOSITORY, WATCHDOG_S, wait_until

_numbers = itertools.count()

Row = dict[str, typing.Any]


def new_name() -> str:
    """A runtime name that no other test and no parallel run uses."""
    return f"srv{os.getpid()}-{next(_numbers)}"


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with the repository's packages and none of our settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SHMSOCK_N")}
    return {**kept, "PYTHONPATH": REPOSITORY, "PYTHONUNBUFFERED": "1", **more}


class Server:
    """One running ``shmsock serve``; its own context manager.

    Attributes:
        name: Of the runtime.
        addresses: Where it listens, as its banner says.
        process: The supervisor.
    """

    def __init__(
        self,
        *flags: str,
        bind: collections.abc.Sequence[str] = ("127.0.0.1:0",),
        workers: int = 2,
        name: str | None = None,
        open_files: int = 0,
        env: dict[str, str] | None = None,
        command: collections.abc.Sequence[str] = ("-m", "workers.cli"),
        cwd: str = REPOSITORY,
        wait: bool = True,
    ) -> None:
        """Start it and wait until every worker has joined.

        Args:
            flags: More arguments of ``serve``.
            bind: Its addresses; port 0 takes any.
            workers: How many.
            name: Of the runtime; a new one by default.
            open_files: RLIMIT_NOFILE, soft and hard, of the whole tree.
            env: More environment.
            command: What Python runs.
            cwd: Where it is started.
            wait: Whether to wait until it is ready.
        """
        self.name = name or new_name()
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        self._err = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        arguments = [sys.executable, *command, "serve", "--name", self.name]
        for address in bind:
            arguments += ["--bind", address]

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

        self.process = subprocess.Popen(
            [*arguments, "--workers", str(workers), *flags],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            cwd=cwd,
            env=environment(**(env or {})),
            start_new_session=True,
            preexec_fn=limit if open_files else None,
        )
        self.addresses: list[str] = []
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.kill()
                raise

    # -- what it says ---------------------------------------------------------------------------

    def output(self) -> str:
        """Its standard output so far."""
        return _all_of(self._out)

    def log(self) -> str:
        """Its standard error so far, and its workers'."""
        return _all_of(self._err)

    def wait_ready(self) -> None:
        """Wait for the banner."""
        wait_until(
            lambda: "Ctrl-C stops it." in self.output() or self.process.poll() is not None,
            "the banner",
        )
        found = re.search(r"^  listens +(.+)$", self.output(), re.M)
        assert found, f"the server did not come up:\n{self.output()}\n{self.log()}"
        self.addresses = found[1].split(", ")

    # -- reaching it ----------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The port of its first TCP address."""
        tcp = [address for address in self.addresses if not address.startswith("unix:")]
        return int(tcp[0].rpartition(":")[2])

    @property
    def url(self) -> str:
        """The pages."""
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout_s: float = WATCHDOG_S, receive_bytes: int = 0) -> socket.socket:
        """A raw connection; with a small receive buffer if asked for."""
        sock = socket.socket()
        sock.settimeout(timeout_s)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            sock.connect(("127.0.0.1", self.port))
        except BaseException:
            sock.close()
            raise
        return sock

    def client(self) -> Client:
        """A connection that speaks RESP."""
        return Client(self.connect())

    def redis(self, protocol: int = 2, **options: typing.Any) -> redis.Redis:
        """A redis-py client that never tries again: what goes wrong must be seen."""
        once = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        options = {"socket_timeout": WATCHDOG_S, "protocol": protocol, "retry": once, **options}
        return redis.Redis("127.0.0.1", self.port, **options)

    def on_each_worker(self, make: collections.abc.Callable[[], T]) -> dict[int, T]:
        """One client of every worker, by the process index of its owner.

        Args:
            make: Connects; what it makes has ``id()`` or ``client_id()``.
        """
        found: dict[int, T] = {}
        extra: list[typing.Any] = []
        with self.attach() as runtime:
            wanted = {row.index for row in runtime.processes() if row.role == "worker"}
            while set(found) != wanted:
                made: typing.Any = make()
                sid = made.client_id() if hasattr(made, "client_id") else made.id()
                rows = runtime.sockets()
                owner = int(rows["owner"][rows["id"] == sid][0])
                if owner in found:
                    extra.append(made)
                else:
                    found[owner] = made
        for made in extra:
            made.close()
        return found

    # -- looking into it ------------------------------------------------------------------------

    def attach(self) -> shmsock.Runtime:
        """Take part, in this process."""
        return shmsock.Runtime.attach(self.name)

    def run(self, *arguments: str, **options: typing.Any) -> subprocess.CompletedProcess[str]:
        """Run a ``shmsock`` command on it."""
        command, *rest = arguments
        return shmsock_command(command, "--name", self.name, *rest, **options)

    def json(self, command: str) -> typing.Any:
        """What a reader says with ``--json``, when it ends with 0."""
        done = self.run(command, "--json")
        assert done.returncode == 0, (done.stdout, done.stderr)
        return json.loads(done.stdout)

    def worker_pids(self) -> dict[int, int]:
        """Live workers: process index to pid."""
        with self.attach() as runtime:
            rows = runtime.processes()
        return {row.index: row.pid for row in rows if row.role == "worker" and row.alive}

    def pids(self) -> list[int]:
        """Every process of the tree that lives, found by its command line or its session."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    if os.getsid(int(entry)) == self.process.pid and not _has_ended(int(entry)):
                        found.append(int(entry))
        return found

    def in_use(self) -> int:
        """Slots that are taken."""
        with self.attach() as runtime:
            return runtime.connections()

    def settle(self) -> None:
        """Wait until every connection has gone and its slot came back."""
        with self.attach() as runtime:
            wait_until(lambda: runtime.connections() == 0, "every slot comes back")

    # -- ending it ------------------------------------------------------------------------------

    def stop(self, number: int = signal.SIGTERM, *, code: int = 0) -> None:
        """Signal the supervisor, wait, and check that nothing is left."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        assert self.process.wait(WATCHDOG_S) == code, self.log()
        self.check_nothing_is_left()
        assert "Traceback" not in self.log(), self.log()

    def check_nothing_is_left(self) -> None:
        """No process, no name, no socket file."""
        wait_until(lambda: not self.pids(), f"processes are left: {self.pids()}", 10)
        left = [entry for entry in os.listdir("/dev/shm") if f"shmsock.{self.name}" in entry]
        assert not left
        for address in self.addresses:
            if address.startswith("unix:"):
                assert not os.path.exists(address.removeprefix("unix:"))

    def kill(self) -> None:
        """SIGKILL the whole tree; what that leaves in shared memory stays."""
        for _ in range(100):
            pids = self.pids()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not pids:
                break
        self.process.wait(WATCHDOG_S)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self.process.returncode is None:
                self.stop()
        finally:
            if self.process.returncode is None or self.pids():
                self.kill()
            if kind is not None:
                sys.stderr.write(f"--- log of {self.name}\n{self.log()[-20000:]}\n---\n")
                with contextlib.suppress(shmsock.ShmsockError):
                    shmsock.clean(self.name)
            self._out.close()
            self._err.close()


T = typing.TypeVar("T")


def _all_of(file: typing.IO[str]) -> str:
    fd = file.fileno()
    return os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace")


def _has_ended(pid: int) -> bool:
    """Whether every thread has: until then its locks and descriptors are held."""
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] not in "ZX":
                return False
    return True


def shmsock_command(
    *arguments: str, timeout: float = WATCHDOG_S, **options: typing.Any
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    options = {"text": True, "capture_output": True, "cwd": REPOSITORY, **options}
    env = environment(**options.pop("env", {}))
    command = [sys.executable, "-m", "workers.cli", *arguments]
    return subprocess.run(command, timeout=timeout, env=env, check=False, **options)


def cpu_ticks(pid: int) -> int:
    """CPU time a process has used, in clock ticks (10 ms)."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def resident_bytes(pid: int) -> int:
    """Memory of a process's own, without what is shared."""
    with open(f"/proc/{pid}/status") as file:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", file.read(), re.M)
    assert found
    return int(found[1]) << 10


# -- a client that believes nothing -------------------------------------------------------------


class Push(list[typing.Any]):
    """A RESP3 push."""


class ReplyError(str):
    """An error reply, with its minus sign."""


class Client:
    """A raw RESP client that checks every byte: what it cannot parse it raises."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray()
        self._at = 0

    def send(self, *words: bytes | str) -> None:
        """Send one command."""
        self.sock.sendall(encode(*words))

    def raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def call(self, *words: bytes | str) -> typing.Any:
        """Send one command and read one value."""
        self.send(*words)
        return self.read()

    def id(self) -> int:
        """Its SocketId."""
        return int(self.call("CLIENT", "ID"))

    def read(self) -> typing.Any:
        """Read one whole value."""
        value = self._value()
        del self._buffer[: self._at]
        self._at = 0
        return value

    def _more(self) -> None:
        data = self.sock.recv(1 << 16)
        if not data:
            raise EOFError(f"end of stream after {bytes(self._buffer[:200])!r}")
        self._buffer += data

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n", self._at)) < 0:
            self._more()
        line = bytes(self._buffer[self._at : end])
        self._at = end + 2
        return line

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < self._at + size + 2:
            self._more()
        data = bytes(self._buffer[self._at : self._at + size])
        assert self._buffer[self._at + size : self._at + size + 2] == b"\r\n"
        self._at += size + 2
        return data

    def _value(self) -> typing.Any:
        line = self._line()
        mark, rest = line[:1], line[1:]
        if mark == b"+":
            return rest.decode()
        if mark == b"-":
            return ReplyError(line.decode())
        if mark == b":":
            return int(rest)
        if mark == b"_":
            return None
        if mark == b"$":
            return None if rest == b"-1" else self._exactly(int(rest))
        if mark == b"=":
            return self._exactly(int(rest))[4:]
        if mark in (b"*", b"~"):
            return [self._value() for _ in range(int(rest))]
        if mark == b">":
            return Push(self._value() for _ in range(int(rest)))
        if mark == b"%":
            return {self._value(): self._value() for _ in range(int(rest))}
        raise AssertionError(f"no RESP: {line!r}")

    def ended(self) -> bytes:
        """Read until the connection ends, and return what came before."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                self._more()
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def silent(self) -> bool:
        """Whether nothing unread is here."""
        return not self._buffer and not select.select([self.sock], [], [], 0)[0]

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encode(*words: bytes | str) -> bytes:
    """One command as RESP."""
    raw = [word.encode() if isinstance(word, str) else word for word in words]
    parts = [b"*%d\r\n" % len(raw)] + [b"$%d\r\n%s\r\n" % (len(word), word) for word in raw]
    return b"".join(parts)
