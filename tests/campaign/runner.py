"""Runs one campaign: starts everything, follows killed supervisors, makes it quiet, checks."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing

import shmsock

from ..helpers import REPOSITORY
from ..servers import Client, Server, environment
from . import promises
from .checker import Checker, nothing_left
from .clients import Asker, Load, Publisher, SlowAsker, Stream, Subscriber
from .clients import Sink as SinkStream
from .figures import Figures
from .programs import Programs

_START_S = 60.0  # until a supervisor that nobody kills is ready
_FOLLOW_S = (0.0, 0.4)  # from a supervisor's death to the start of the next
_QUIET_S = 40.0
_LOG_TAIL = 12_000

# Nothing of these may be in a log: an exception nobody expected, or a process taken for dead.
_UNEXPECTED = re.compile(
    r"Traceback|service call failed|a callback raised|a consumer raised|taken for dead|"
    r"exited with code|CRITICAL|stays closed"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a campaign is asked for."""

    seconds: float = 300.0
    seed: int = 1
    workers: int = 4
    pool: int = 3
    reload: bool = False
    counts: dict[type[typing.Any], int] = dataclasses.field(
        default_factory=lambda: {Asker: 16, SlowAsker: 4, Publisher: 4, Subscriber: 12}
    )


class Abandoned(Exception):
    """There is nothing left to go on with."""


class Campaign:
    """One campaign."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.figures = Figures(minutes=options.seconds / 60)
        self.acts: list[dict[str, typing.Any]] = []
        self._servers: list[Server] = []
        self._rng = random.Random(options.seed)
        self._name = f"campaign{os.getpid()}-{options.seed}"
        self._port = _free_port()
        self._ready = True
        self._started_s = 0.0
        self._without_host: list[promises.Window] = []
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by run

    def run(self) -> Figures:
        """Run it all; what is wrong is in the figures' complaints."""
        try:
            self._run()
        except Abandoned as end:
            self.figures.complain(f"abandoned: {end}")
        return self.figures

    def _run(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._errors.close)
            stack.callback(self._end_servers)
            self._follow()
            self._servers[-1].wait_ready()
            self._became_ready()
            runtime = stack.enter_context(shmsock.Runtime.attach(self._name))
            load = Load(
                runtime,
                self._port,
                random.Random(self._rng.random()),
                self.figures,
                self.options.counts,
            )
            stack.callback(load.stop)
            programs = Programs(self._port, self.figures)
            with self._pool(load) as zygote:
                load.start()
                programs.start()
                try:
                    self._killing(zygote)
                finally:
                    programs.stop()
            self._make_quiet(runtime, load)
            self._check(runtime, load)
            load.stop()
            checker = Checker(runtime, load, self.figures)
            checker.empty()
            checker.books()
            runtime.close()
            self._stop_server()

    # -- while it rages -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _pool(self, load: Load) -> typing.Iterator[int]:
        arguments = [self._name, self._rng.randrange(1 << 30), load.sink_port, self.options.pool]
        with self._module("pool", arguments, stdin=subprocess.PIPE, stderr=self._errors) as pool:
            try:
                yield pool.pid
            finally:
                assert pool.stdin is not None
                pool.stdin.close()
                pool.wait()

    def _module(
        self, module: str, arguments: list[typing.Any], **pipes: typing.Any
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"tests.campaign.{module}", *map(str, arguments)]
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment(), **pipes)

    def _killing(self, zygote: int) -> None:
        arguments = [
            self._name, self.options.seed, self.options.seconds, zygote,
            int(self.options.reload), os.getpid(), zygote,
        ]  # fmt: skip
        with self._module("killer", arguments, stdout=subprocess.PIPE) as killer:
            reader = threading.Thread(target=self._listen, args=(killer,), name="killer")
            reader.start()
            try:
                while reader.is_alive():
                    self._look_after()
                    time.sleep(0.02)
            finally:
                killer.kill()
                reader.join()
        if not self.acts or self.acts[-1]["act"] != "end":
            self.figures.complain("the killer ended before its time")

    def _listen(self, killer: subprocess.Popen[bytes]) -> None:
        assert killer.stdout is not None
        for line in killer.stdout:
            act = json.loads(line)
            self.acts.append(act)
            if act["act"] == "kill":
                self.figures.deaths[act["kind"]] += 1
                if self._servers[-1].process.pid == act["pid"] or act["kind"] == "supervisor":
                    self._without_host.append((act["t"], float("inf")))
            elif act["act"] == "stop":
                self.figures.stops[act["kind"]] += 1
            elif act["act"] == "idle":
                self.figures.idle_acts += 1

    def killed_words(self) -> set[int]:
        """What ``owner`` held for those who were killed."""
        kills = [act for act in self.acts if act["act"] in ("kill", "killed")]
        return {word for act in kills for word in act["words"]}

    def _look_after(self) -> None:
        """Start a supervisor after each that was killed, as a user's service manager does."""
        server = self._servers[-1]
        code = server.process.poll()
        if code is not None:
            if code != -9:
                raise Abandoned(f"the supervisor ended by itself with code {code}")
            time.sleep(self._rng.uniform(*_FOLLOW_S))
            self._follow()
        elif not self._ready:
            waited_s = time.monotonic() - self._started_s
            if "Ctrl-C stops it." in server.output():
                self._became_ready()
            elif waited_s > _START_S and not self._complained_of(server):
                self.figures.complain(f"supervisor {server.process.pid} is not ready after 60 s")

    def _complained_of(self, server: Server) -> bool:
        return any(f"supervisor {server.process.pid} " in text for text in self.figures.complaints)

    def _follow(self) -> None:
        self._ready = False
        self._started_s = time.monotonic()
        self._servers.append(
            Server(
                *("--slots", "2048", "--max-unwritten-bytes", "2000000"),
                name=self._name,
                bind=[f"127.0.0.1:{self._port}"],
                workers=self.options.workers,
                wait=False,
            )
        )

    def _became_ready(self) -> None:
        self._ready = True
        now = time.monotonic()
        self._without_host = [(begin, min(end, now)) for begin, end in self._without_host]
        gaps = (end - begin for begin, end in self._without_host)
        self.figures.longest_gap_s = max(gaps, default=0.0)
        stopped = any(
            act["act"] == "stop" and act["pid"] == self._servers[-1].process.pid
            for act in list(self.acts)
        )
        if not stopped:
            self.figures.worst_start_s = max(self.figures.worst_start_s, now - self._started_s)

    # -- when it is over ------------------------------------------------------------------------

    def _settled(
        self, what: str, condition: typing.Callable[[], object], pause_s: float = 0.02
    ) -> None:
        deadline = time.monotonic() + _QUIET_S
        while not condition():
            if time.monotonic() > deadline:
                self.figures.complain(f"in the end: {what}: not so in {_QUIET_S:.0f} s")
                return
            time.sleep(pause_s)

    def _make_quiet(self, runtime: shmsock.Runtime, load: Load) -> None:
        """A supervisor with all its workers, no pool, and every question answered."""

        def is_up() -> bool:
            self._look_after()
            return self._ready

        self._settled("a supervisor is up", is_up)

        def complete() -> bool:
            workers = [row for row in runtime.processes() if row.role == "worker" and row.alive]
            return len(workers) == self.options.workers

        self._settled("every worker is up", complete)
        wanted = sum(self.options.counts.values())

        def back() -> bool:
            placed = [s for s in load.living() if s.sid and not isinstance(s, SinkStream)]
            return len(placed) >= wanted

        self._settled("every client is back", back)
        load.quiet = True
        for sink in load.of(SinkStream):
            if not sink.sid:  # its creator died before it said the id
                load.end_soon(sink)
        self._settled("every question is answered", lambda: not self._unanswered(load))
        for stream in self._unanswered(load):
            stream.complain("its last question was not answered")
        killed = self.killed_words()
        self._settled(
            "every promised message has come",
            lambda: not promises.unfinished(load.sent, load.of(Subscriber), killed),
            pause_s=0.5,
        )

    def _unanswered(self, load: Load) -> list[Stream]:
        return [
            stream
            for stream in load.living()
            if (isinstance(stream, Asker | Publisher) and not stream.satisfied)
            or (isinstance(stream, Subscriber) and not stream.confirmed_s)
        ]

    def _check(self, runtime: shmsock.Runtime, load: Load) -> None:
        checker = Checker(runtime, load, self.figures)
        checker.ids()
        checker.owners()
        self._everybody_is_served(load)
        checker.books()
        checker.groups()
        checker.descriptors()
        promises.check(
            load.sent, load.of(Subscriber), self.killed_words(), self._without_host, self.figures
        )
        done = self._servers[-1].run("doctor")
        if done.returncode != 0:
            self.figures.complain(f"doctor: {done.stdout}{done.stderr}")

    def _everybody_is_served(self, load: Load) -> None:
        """Whoever lives is answered once more, and hears a message that says how many hear it."""
        for asker in load.of(Asker):
            if asker.alive:
                load.call_soon(asker.ask_last)
        self._settled("every survivor is answered", lambda: not self._unanswered(load))
        with Client(socket.create_connection(("127.0.0.1", self._port), 20.0)) as publisher:
            for channel in ("c0", "c1"):
                listeners = [
                    subscriber
                    for subscriber in load.of(Subscriber)
                    if subscriber.alive and channel in subscriber.channels
                ]
                count = publisher.call("PUBLISH", channel, f"last:{channel}")
                if count != len(listeners):
                    self.figures.complain(
                        f"{len(listeners)} listen to {channel}, and PUBLISH said {count!r}"
                    )
                self._settled(
                    f"all hear {channel}", functools.partial(_all_heard, listeners, channel)
                )
        self.figures.survivors = len(load.living())

    def _stop_server(self) -> None:
        server = self._servers[-1]
        server.process.terminate()
        try:
            code = server.process.wait(30.0)
        except subprocess.TimeoutExpired:
            self.figures.complain("the server did not stop in 30 s")
        else:
            if code != 0:
                self.figures.complain(f"the server stopped with code {code}")
        nothing_left(self._name, self.figures)
        self._read_logs()

    def _read_logs(self) -> None:
        for line in self.log().splitlines():
            if "took over" in line:
                self.figures.take_overs += 1
            if _UNEXPECTED.search(line):
                self.figures.complain(f"in the log: {line}")
        self._errors.seek(0)
        if (errors := self._errors.read()) != "":
            self.figures.complain(f"pool processes said:\n{errors[-4000:]}")

    def log(self) -> str:
        """What all supervisors and workers said."""
        lines = "".join(
            server.log() for server in self._servers if not server._err.closed
        ).splitlines(keepends=True)
        return "".join(line for line in lines if "shmsock.access" not in line)

    def report(self) -> str:
        """What is needed to look for the reason of a complaint."""
        kills = [json.dumps(act) for act in self.acts[-30:]]
        seen = collections.Counter(self.figures.complaints)
        complaints = [f"{text}{f' ({n} times)' if n > 1 else ''}" for text, n in seen.items()]
        return "\n".join(
            (
                f"campaign with seed {self.options.seed}: {len(complaints)} promises broken",
                *complaints[:40],
                "-- the last acts",
                *kills,
                "-- the log's end",
                self.tail,
            )
        )

    tail = ""

    def _end_servers(self) -> None:
        self.tail = self.log()[-_LOG_TAIL:]
        if directory := os.environ.get("CAMPAIGN_LOG"):
            with open(directory, "w") as file:
                file.write(self.log() + "\n".join(map(json.dumps, self.acts)))
        for server in self._servers:
            server.kill()
            server._out.close()
            server._err.close()
        with contextlib.suppress(shmsock.ShmsockError):
            shmsock.clean(self._name)


def _all_heard(listeners: list[Subscriber], channel: str) -> bool:
    return all(channel.encode() in each.last_words for each in listeners)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
