"""What the tests share: other processes, waiting for conditions, and a census of what is left.

No test sleeps for a length of time: it waits for a condition, under a watchdog that only a hang can
meet. Assert *at least* a timeout, never *at most*.
"""

from __future__ import annotations

import collections.abc
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import typing
import warnings

WATCHDOG_S = 60.0
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

T = typing.TypeVar("T")


def wait_until(
    condition: collections.abc.Callable[[], T], what: str = "", timeout_s: float = WATCHDOG_S
) -> T:
    """Wait until ``condition()`` is true and return what it returned; fail with ``what``."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen in {timeout_s:.0f} s: {what or condition}")
        time.sleep(0.002)
    return result


class Forked:
    """A forked child that runs one function; its result, or its traceback, comes by a pipe.

    The child leaves by ``os._exit``: no atexit, no pytest. It inherits the parent's Runtime, as a
    user's fork does.
    """

    def __init__(self, function: collections.abc.Callable[..., object], *arguments: object) -> None:
        """Fork and run ``function(*arguments)`` in the child; its result must fit JSON."""
        self._read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: a fork beside threads
            self.pid = os.fork()
        if self.pid == 0:
            os.close(self._read)
            code = 1
            try:
                answer: object = {"result": function(*arguments)}
                code = 0
            except BaseException:
                answer = {"error": traceback.format_exc()}
            with contextlib.suppress(BaseException), os.fdopen(write, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(code)
        os.close(write)
        self._status: int | None = None

    def result(self) -> typing.Any:
        """Wait for the child and return what its function did; raise if it raised or was killed."""
        chunks = []
        deadline = time.monotonic() + WATCHDOG_S
        while True:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._read], [], [], left)[0]:
                self.kill()
                raise AssertionError(f"child {self.pid} did not finish")
            chunk = os.read(self._read, 65536)
            if not chunk:
                break
            chunks.append(chunk)
        self.wait()
        if not chunks:
            raise AssertionError(f"child {self.pid} ended without a word: status {self._status}")
        answer = json.loads(b"".join(chunks))
        if "error" in answer:
            raise AssertionError("in the child:\n" + answer["error"])
        return answer["result"]

    def send_signal(self, number: int) -> None:
        """Signal the child."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL and reap."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Reap; returns the wait status."""
        if self._status is None:
            self._status = os.waitpid(self.pid, 0)[1]
        with contextlib.suppress(OSError):
            os.close(self._read)
            self._read = -1
        return self._status

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Peer:
    """A fresh interpreter that runs the source it is sent; it keeps its variables in between.

    ``peer.run("...")`` executes statements; ``peer.ask("...")`` evaluates an expression and returns
    its value through JSON. Errors there are raised here with their traceback.
    """

    _LOOP = """
        import json, sys, traceback
        space = {"__name__": "__peer__"}
        out = sys.stdout
        for line in sys.stdin:
            kind, source = json.loads(line)
            try:
                if kind == "run":
                    exec(source, space); answer = {"result": None}
                else:
                    answer = {"result": eval(source, space)}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            out.write(json.dumps(answer) + "\\n"); out.flush()
    """

    def __init__(self, name: str | None = None, role: str = "client") -> None:
        """Start it; with ``name`` it attaches that runtime as ``rt``."""
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", textwrap.dedent(self._LOOP)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": REPOSITORY},
        )
        self.pid = self.process.pid
        if name is not None:
            self.run(f"import shmsock; rt = shmsock.Runtime.attach({name!r}, role={role!r})")

    def _send(self, kind: str, source: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([kind, textwrap.dedent(source).strip()]) + "\n")
        self.process.stdin.flush()

    def _answer(self) -> typing.Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"peer ended: {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise AssertionError("in the peer:\n" + answer["error"])
        return answer["result"]

    def run(self, source: str) -> None:
        """Execute statements and wait for them."""
        self._send("run", source)
        self._answer()

    def ask(self, source: str) -> typing.Any:
        """Evaluate an expression."""
        self._send("ask", source)
        return self._answer()

    def start(self, source: str, kind: str = "run") -> None:
        """Execute without waiting; ``finish`` waits."""
        self._send(kind, source)

    def finish(self) -> typing.Any:
        """Wait for what ``start`` began."""
        return self._answer()

    def kill(self) -> None:
        """SIGKILL and reap."""
        self.process.kill()
        self.close()

    def close(self) -> None:
        """End it in order."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(WATCHDOG_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- census -------------------------------------------------------------------------------------


def descriptors(pid: int | str = "self") -> dict[int, str]:
    """The open descriptors of a process and what they are."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found


def holders_of(inode: int, pids: collections.abc.Iterable[int]) -> list[int]:
    """Which of these processes have the socket with this inode open."""
    wanted = f"socket:[{inode}]"
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if wanted in descriptors(pid).values():
                found.append(pid)
    return found


def children(pid: int | str = "self") -> set[int]:
    """The child processes, zombies included."""
    found: set[int] = set()
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
            found.update(map(int, file.read().split()))
    return found


def shared_names() -> set[str]:
    """Everything of ours in /dev/shm; what another test run works with is not ours."""
    found = set()
    for name in os.listdir("/dev/shm"):
        other = re.search(r"shmsock\.[a-z]+(\d+)-", name)
        foreign = other and int(other[1]) != os.getpid() and os.path.exists(f"/proc/{other[1]}")
        if "shmsock." in name and not foreign:
            found.add(name)
    return found
