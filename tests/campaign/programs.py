"""Clients that others wrote, beside our own: redis-py, redis-benchmark, HTTP.

They see ends as errors and begin anew; wrong answers are complaints.
"""

from __future__ import annotations

import collections.abc
import contextlib
import http.client
import subprocess
import threading

import redis
import redis.backoff
import redis.retry

from ..helpers import descriptors
from .figures import Figures

_TIMEOUT_S = 40.0


class Programs:
    """One thread for each program."""

    def __init__(self, port: int, figures: Figures) -> None:
        self._port, self._figures = port, figures
        self._done = threading.Event()
        self._benchmark: subprocess.Popen[bytes] | None = None
        jobs = (self._pings, self._pipelines, self._pages, self._benchmarks)
        self._threads = [
            threading.Thread(target=self._repeat, args=(job,), name=job.__name__) for job in jobs
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let each finish what it is at."""
        self._done.set()
        benchmark = self._benchmark
        if benchmark is not None:
            benchmark.kill()
        for thread in self._threads:
            thread.join()

    def _repeat(self, job: collections.abc.Callable[[], object]) -> None:
        while not self._done.wait(0.05):
            try:
                job()
            except (OSError, redis.ConnectionError, http.client.HTTPException) as error:
                if isinstance(error, TimeoutError):
                    self._figures.complain(f"{job.__name__}: no answer in {_TIMEOUT_S:.0f} s")
                self._figures.programs["ended"] += 1
            except Exception as error:
                self._figures.complain(f"{job.__name__}: {error!r}")

    def _redis(self) -> redis.Redis:
        once = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        return redis.Redis(
            "127.0.0.1", self._port, socket_timeout=_TIMEOUT_S, retry=once, protocol=3
        )

    def _pings(self) -> None:
        with self._redis() as client:
            for _ in range(200):
                if self._done.wait(0.01):
                    return
                if client.ping() is not True:
                    self._figures.complain("redis-py: PING was not answered PONG")
                self._figures.programs["redis-py pings"] += 1

    def _pipelines(self) -> None:
        with self._redis() as client:
            for number in range(40):
                if self._done.wait(0.03):
                    return
                with client.pipeline(transaction=False) as pipe:
                    for each in range(20):
                        pipe.echo(f"{number}:{each}")
                    wanted = [f"{number}:{each}".encode() for each in range(20)]
                    if pipe.execute() != wanted:
                        self._figures.complain("redis-py: a pipeline's answers are mixed up")
                self._figures.programs["redis-py pipelines"] += 1

    def _pages(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_TIMEOUT_S)
        with contextlib.closing(connection):
            for path in ("/health", "/connections", "/sockets?format=json", "/metrics"):
                if self._done.wait(0.1):
                    return
                connection.request("GET", path)
                answer = connection.getresponse()
                answer.read()
                if answer.status not in (200, 503):
                    self._figures.complain(f"HTTP: {path} was answered {answer.status}")
                self._figures.programs["pages"] += 1

    def _benchmarks(self) -> None:
        if self._done.wait(0.5):
            return
        command = ["redis-benchmark", "-p", str(self._port), "-t", "ping", "-n", "1000"]
        self._benchmark = subprocess.Popen(
            [*command, "-c", "8", "-q"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            code = self._benchmark.wait(_TIMEOUT_S)
            self._figures.programs[f"redis-benchmark {'done' if code == 0 else 'cut off'}"] += 1
        except subprocess.TimeoutExpired:
            # It never finishes after an EPIPE: it drops that client and goes on counting its
            # request as under way. But then no connection of it is left.
            if waiting := self._established(self._benchmark.pid):
                self._figures.complain(f"redis-benchmark has waited {_TIMEOUT_S} s: {waiting}")
            self._figures.programs["redis-benchmark gave up counting"] += 1
            self._benchmark.kill()
            self._benchmark.wait()
        self._benchmark = None

    def _established(self, pid: int) -> list[str]:
        """A process's connections that are established at both ends, as the kernel shows them."""
        inodes = {what[8:-1] for what in descriptors(pid).values() if what.startswith("socket:[")}
        with open("/proc/net/tcp") as file:
            rows = [line.split() for line in file][1:]
        far = {(row[1], row[2]): row for row in rows}
        found = []
        for row in rows:
            other = far.get((row[2], row[1]))
            if row[9] in inodes and row[3] == "01" and other is not None and other[3] == "01":
                found.append(f"port {int(row[1][9:], 16)}: queues {row[4]}, far end {other[4]}")
        return found
