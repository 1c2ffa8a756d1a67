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
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import traceback
import typing
import warnings

import shmsock.engine
import shmsock.layout
import shmsock.names
import shmsock.processes
import shmsock.recovery
import shmsock.segment
import shmsock.semaphores

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


def after_a_round(
    dispatcher: shmsock.Dispatcher, condition: collections.abc.Callable[[], T]
) -> collections.abc.Callable[[], T]:
    """A condition for ``wait_until`` that lets a dispatcher work before each look."""

    def look() -> T:
        dispatcher.run_once(0)
        return condition()

    return look


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


def stop(pid: int) -> None:
    """Stop a process, and wait until the last of its threads has stopped.

    One thread takes the signal, and under load the others run on until that one has its turn.
    """
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _states(pid) == {"T"}, "all of its threads have stopped")


def _states(pid: int) -> set[str]:
    found = set()
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/stat") as file:
            found.add(file.read().rpartition(")")[2].split()[0])
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
    """Everything of ours in /dev/shm: the names of our tests carry our pid."""
    mine = re.compile(rf"shmsock\.[a-z]+{os.getpid()}-")
    return {name for name in os.listdir("/dev/shm") if mine.search(name)}


# -- the table alone ----------------------------------------------------------------------------


class Member:
    """A participant with the table and nothing else: no service thread, host or descriptors.

    Nothing happens unless the test does it, so a test may plant what it likes and look at it.
    """

    def __init__(
        self,
        segment: shmsock.segment.Segment,
        lock_file: shmsock.processes.LockFile,
        engine_module: typing.Any,
        role: str,
    ) -> None:
        """Use ``create`` or ``attach``."""
        self.name = segment.name
        self.module = engine_module
        self.segment, self.cells, self.columns = segment, segment.cells, segment.columns
        self.layout = segment.layout
        self.lock_file = lock_file
        if not lock_file.share():
            raise AssertionError("somebody holds the participants' byte")
        self.processes = shmsock.processes.Processes(segment, lock_file)
        try:
            self.index, self.epoch = self.processes.register(role)
        except BaseException:
            lock_file.unshare()
            raise
        self.semaphores = shmsock.semaphores.Semaphores(self.name, self.layout.stripes)
        self.engine = engine_module.Engine(
            segment, self.semaphores, self.index, self.epoch, engine_module.Reference
        )
        self.recovery = shmsock.recovery.Recovery(
            segment, self.processes, self.semaphores, self.engine
        )
        self.engine.repair = self.recovery.look

    @classmethod
    def create(
        cls,
        name: str,
        engine_module: typing.Any = shmsock.engine,
        *,
        slots: int = 8,
        processes: int = 4,
        stripes: int = 2,
    ) -> Member:
        """Make a table and take its first row."""
        shmsock.names.make_run_directory(name)
        lock_file = shmsock.processes.LockFile.open(name, create=True)
        layout = shmsock.layout.Layout.fit(slots, processes, stripes)
        segment = shmsock.segment.Segment.create(name, layout, 1 << 20)
        semaphores = shmsock.semaphores.Semaphores(name, layout.stripes)
        for stripe in range(layout.stripes):
            for generation in range(1, 4):
                semaphores.make(stripe, generation, int(generation == 1))
        semaphores.close()
        segment.set("init_done", 1)
        return cls(segment, lock_file, engine_module, "supervisor")

    @classmethod
    def attach(
        cls, name: str, engine_module: typing.Any = shmsock.engine, role: str = "worker"
    ) -> Member:
        """Take one more row."""
        segment = shmsock.segment.Segment.attach(name)
        lock_file = shmsock.processes.LockFile.open(name, create=False)
        try:
            return cls(segment, lock_file, engine_module, role)
        except BaseException:
            segment.close()
            raise

    def new(self, **fields: typing.Any) -> int:
        """Create a socket that this member owns."""
        return int(self.engine.create(**{"owner": self.word, **fields}))

    @property
    def word(self) -> int:
        """This member in ``owner`` and ``writer``."""
        return int(self.engine.word)

    def nref(self, sid: int) -> int:
        """The count in a slot's word."""
        return int(self.cells.versioned_ref[sid & 0xFFFFFFFF]) & 0xFFFFFFFF

    def version(self, slot: int) -> int:
        """The version in a slot's word."""
        return int(self.cells.versioned_ref[slot]) >> 32

    def bytes(self) -> bytes:
        """The whole segment."""
        with open(f"/dev/shm/shmsock.{self.name}", "rb") as file:
            return file.read()

    def leave(self) -> None:
        """Be reaped by oneself, as Runtime.close does."""
        self.engine.detach_all()
        with self.engine.lock:
            self.engine.closed = True
        with self.recovery.arbitrated(timeout_s=WATCHDOG_S):
            self.recovery.reap(self.index)
        self.close()

    def close(self) -> None:
        """Vanish without a word: to the others this member has died."""
        self.engine.closed = True
        self.lock_file.drop(shmsock.processes.FIRST_ROW + self.index)
        self.lock_file.unshare()
        self.semaphores.close()
        self.segment.close()

    def unlink(self) -> None:
        """Take every name away."""
        shmsock.names.unlink_names(self.name)
        shutil.rmtree(shmsock.segment.run_directory(self.name), ignore_errors=True)


class Column:
    """A column that calls ``step`` before each of its stores; reads pass through."""

    def __init__(self, column: typing.Any, step: collections.abc.Callable[[], None]) -> None:
        self._column, self._step = column, step

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self._column, name)

    def __len__(self) -> int:
        return len(self._column)

    def __iter__(self) -> collections.abc.Iterator[typing.Any]:
        return iter(self._column)

    def __getitem__(self, key: typing.Any) -> typing.Any:
        return self._column[key]

    def __setitem__(self, key: typing.Any, value: typing.Any) -> None:
        self._step()
        self._column[key] = value


class Token:
    """A semaphore that calls ``step`` before and after taking and posting."""

    def __init__(self, semaphore: typing.Any, step: collections.abc.Callable[[], None]) -> None:
        self._semaphore, self._step = semaphore, step

    def acquire(self, timeout: float | None = None) -> None:
        self._step()
        self._semaphore.acquire(timeout)
        self._step()

    def release(self) -> None:
        self._step()
        self._semaphore.release()
        self._step()

    def close(self) -> None:
        self._semaphore.close()


class Steps:
    """Acts at the k-th (or each of several) accesses of a member to shared state.

    Every store is one access; taking and posting a token are two each, before and after.

    A store and the one before it enclose all that can be told apart from outside, so an act before
    each access, for every k until the operation completes, is an act at every instruction.
    """

    _NUMPY = ("error_text", "peer", "user_data", "held")

    def __init__(
        self, member: Member, at: int | set[int], act: collections.abc.Callable[[], object]
    ) -> None:
        self.count, self._act = 0, act
        self._at = at if isinstance(at, set) else {at}
        self._member = member

    def _step(self) -> None:
        self.count += 1
        if self.count in self._at:
            self._act()

    def __enter__(self) -> Steps:
        member = self._member
        self._cells, self._columns = dict(vars(member.cells)), dict(vars(member.columns))
        for name, view in self._cells.items():
            setattr(member.cells, name, Column(view, self._step))
        for name in self._NUMPY:
            setattr(member.columns, name, Column(self._columns[name], self._step))
        semaphores: typing.Any = member.semaphores
        self._get, self._make = semaphores.get, semaphores.make
        semaphores.get = lambda *place: self._token(self._get(*place))
        semaphores.make = lambda *place: self._token(self._make(*place))
        return self

    def _token(self, semaphore: typing.Any) -> typing.Any:
        return semaphore and Token(semaphore, self._step)

    def __exit__(self, *_: object) -> None:
        vars(self._member.cells).update(self._cells)
        vars(self._member.columns).update(self._columns)
        semaphores: typing.Any = self._member.semaphores
        del semaphores.get, semaphores.make


def die() -> None:
    """SIGKILL oneself: nothing of Python runs after this line."""
    os.kill(os.getpid(), signal.SIGKILL)


# -- sockets ------------------------------------------------------------------------------------


def connected(kind: str = "tcp", buffer_bytes: int = 0) -> tuple[socket.socket, socket.socket]:
    """Two connected stream sockets, the server's end first; with small buffers if asked for."""
    if kind == "unix":
        ours, peers = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        if buffer_bytes:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        return ours, peers
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        if buffer_bytes:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        peers = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if buffer_bytes:
            peers.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        peers.connect(listener.getsockname())
        ours = listener.accept()[0]
    return ours, peers


def read_to_end(sock: socket.socket) -> bytes:
    """Everything until the connection ends, in whichever way."""
    sock.settimeout(WATCHDOG_S)
    chunks = []
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            chunks.append(chunk)
    return b"".join(chunks)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def out_of_descriptors() -> collections.abc.Iterator[None]:
    """As long as it lasts, this process can open nothing more: EMFILE."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = [fd for fd in descriptors() if fd < 500]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(low) + 4, before[1]))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
