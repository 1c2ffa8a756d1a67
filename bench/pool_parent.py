"""The server of the pool bench: it reads requests, and has a pool answer them, in several ways.

Run as ``python -m bench.pool_parent`` by ``bench.pool``: a JSON line in, a JSON line out, until the
input ends. The jobs are here too, because pools of forkserver import them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
import typing

import numpy as np

import shmsock
import shmsock.pool

OURS, PLAIN, CANCELLING = "straight", "parent", "parent, cancelling"
PROCESSES = 2
_ANSWER = bytes(range(256)) * 4096


# -- jobs ---------------------------------------------------------------------------------------


def answer_oneself(sid: int, size: int) -> None:
    """The pool process answers the client."""
    reference = shmsock.current().address(sid)
    assert reference is not None
    with reference:
        reference.write(_ANSWER[:size])
        reference.flush()


def answer_by_result(size: int) -> bytes:
    """The parent is to answer the client."""
    return _ANSWER[:size]


def compute(path: str, number: int, cpu_s: float) -> int:
    """Use so much CPU; note how much of it was used after the client had left."""
    book = _books.get(path)
    if book is None:
        _books.clear()
        book = _books[path] = np.memmap(path, "f8", "r+").reshape(2, -1)
    left, wasted = book
    started = now = time.process_time()
    gone_at = 0.0
    try:
        while now - started < cpu_s:
            if not gone_at and left[number]:
                gone_at = now
            _piece()
            now = time.process_time()
    finally:
        if gone_at:
            wasted[number] = time.process_time() - gone_at
    return number


def compute_and_answer(path: str, number: int, cpu_s: float, sid: int) -> None:
    """The same, and tell the client."""
    compute(path, number, cpu_s)
    answer_oneself(sid, 16)


def _piece() -> None:
    """Some tens of microseconds."""
    sum(range(1000))


_books: dict[str, typing.Any] = {}


# -- the parent ---------------------------------------------------------------------------------


class Parent:
    """Does what it is asked; every method is a request."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        """What is opened is closed with the stack."""
        self._stack = stack
        self._sent = 0

    def begin(self, name: str, clients: int) -> None:
        """Create the runtime and both pools, and have them start their processes."""
        enter = self._stack.enter_context
        self.runtime = enter(
            shmsock.Runtime.create(name, slots=clients + 64, processes=16, stripes=16)
        )
        context = multiprocessing.get_context("forkserver")
        self.ours = enter(shmsock.pool.ProcessPoolExecutor(name, PROCESSES, mp_context=context))
        self.plain = enter(concurrent.futures.ProcessPoolExecutor(PROCESSES, context))
        for pool in (self.ours, self.plain):
            list(pool.map(time.sleep, [0.2] * PROCESSES))

    def connect(self, port: int) -> None:
        """A connection for each way, in this order; ours first."""
        socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        for sock in socks:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._stack.callback(sock.close)
        self.sock = socks[1]
        self.requests = {OURS: socket.socket(fileno=os.dup(socks[0].fileno())), PLAIN: socks[1]}
        self._stack.callback(self.requests[OURS].close)
        self.sid = self.runtime.create_socket(socks[0])

    def serve(self, way: str, size: int, count: int) -> dict[str, float]:
        """Answer so many requests of one byte each; what an answer cost this process.

        Returns:
            CPU time of all its threads, and bytes that it read and wrote, by pipe or socket.
        """
        requests = self.requests[way]
        cpu, moved = time.process_time_ns(), self._moved()
        for _ in range(count):
            requests.recv(1)
            if way == OURS:
                self.ours.submit(answer_oneself, self.sid, size, client=self.sid).result()
            else:
                answer = self.plain.submit(answer_by_result, size).result()
                self.sock.sendall(answer)
                self._sent += len(answer)
        cpu, moved = time.process_time_ns() - cpu, self._moved() - moved
        return {"cpu_ns": cpu / count, "bytes": moved / count}

    def _moved(self) -> int:
        """Bytes of read and write, which pipes use, and of the answers sent to the socket."""
        with open("/proc/self/io") as file:
            fields = dict(line.split(": ") for line in file)
        return int(fields["rchar"]) + int(fields["wchar"]) + self._sent

    def crowd(self, way: str, clients: int, cpu_s: float, seed: int) -> dict[str, float]:
        """So many clients want so much computed each; every second one leaves before its answer.

        Returns:
            CPU-seconds spent on clients after they had left, and the time until all was done.
        """
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="shmsock-bench-"))
            path = os.path.join(folder, "book")
            np.zeros((2, clients)).tofile(path)
            left, wasted = np.memmap(path, "f8", "r+").reshape(2, -1)
            crowd = _Crowd(self, stack, way, clients)
            expected_s = clients * cpu_s / PROCESSES
            moments = np.random.default_rng(seed).uniform(0, expected_s, clients)
            # The pool serves in order: who leaves does so before its turn is over, mostly.
            turn = np.arange(1, clients + 1) * expected_s / clients
            leaving = sorted((min(moments[n], turn[n]), n) for n in range(1, clients, 2))
            started = time.monotonic()
            jobs = [crowd.submit(path, n, cpu_s) for n in range(clients)]
            for moment, number in leaving:
                time.sleep(max(0.0, started + moment - time.monotonic()))
                left[number] = 1
                crowd.leave(number)
            concurrent.futures.wait(jobs)
            took_s = time.monotonic() - started
            for number, job in enumerate(jobs):
                if number % 2 == 0:
                    job.result()  # who stayed was served
            return {"gone_s": float(wasted.sum()), "took_s": took_s}


class _Crowd:
    """Clients of one way, in this process."""

    def __init__(self, parent: Parent, stack: contextlib.ExitStack, way: str, clients: int) -> None:
        self._parent, self._way = parent, way
        self._pairs = [socket.socketpair() for _ in range(clients)]
        stack.callback(self._close)
        self._jobs: dict[int, concurrent.futures.Future[typing.Any]] = {}
        self._numbers: dict[int, int] = {}
        self._stop = stack.enter_context(contextlib.ExitStack())
        if way == OURS:
            self._sids = [parent.runtime.create_socket(ours) for ours, _ in self._pairs]
            self._run(shmsock.Dispatcher(parent.runtime))
        else:
            self._watch()

    def _run(self, dispatcher: shmsock.Dispatcher) -> None:
        for sid in self._sids:
            dispatcher.add_consumer(sid, _read)
        loop = threading.Thread(target=dispatcher.run)
        loop.start()
        self._stop.callback(dispatcher.close)
        self._stop.callback(loop.join)
        self._stop.callback(dispatcher.stop)

    def _watch(self) -> None:
        """Hear of who leaves; what is queued for them is cancelled, if that is the way."""
        selector = selectors.DefaultSelector()
        for number, (ours, _) in enumerate(self._pairs):
            selector.register(ours, selectors.EVENT_READ, number)
        done = threading.Event()

        def loop() -> None:
            while not done.is_set():
                for key, _ in selector.select(0.02):
                    selector.unregister(key.fileobj)
                    if self._way == CANCELLING and key.data in self._jobs:
                        self._jobs[key.data].cancel()

        thread = threading.Thread(target=loop)
        thread.start()
        self._stop.callback(selector.close)
        self._stop.callback(thread.join)
        self._stop.callback(done.set)

    def submit(self, path: str, number: int, cpu_s: float) -> concurrent.futures.Future[typing.Any]:
        parent = self._parent
        if self._way == OURS:
            sid = self._sids[number]
            return parent.ours.submit(compute_and_answer, path, number, cpu_s, sid, client=sid)
        job = parent.plain.submit(compute, path, number, cpu_s)
        self._jobs[number] = job
        job.add_done_callback(self._answer)
        return job

    def _answer(self, job: concurrent.futures.Future[typing.Any]) -> None:
        if not job.cancelled():
            with contextlib.suppress(OSError):  # it has left
                self._pairs[job.result()][0].send(_ANSWER[:16])

    def leave(self, number: int) -> None:
        self._pairs[number][1].close()

    def _close(self) -> None:
        self._stop.close()
        for ours, theirs in self._pairs:
            theirs.close()
            if self._way != OURS:
                ours.close()
        if self._way == OURS:
            for sid in self._sids:
                self._parent.runtime.set_failed(sid)


def _read(reference: shmsock.SocketRef) -> None:
    try:
        while reference.recv(100):
            pass
    except BlockingIOError:
        return
    except ConnectionResetError:  # a client that left with an answer unread
        pass
    reference.set_failed(text="the client has left")


def main() -> None:
    """Serve requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.ExitStack() as stack:
        parent = Parent(stack)
        for line in sys.stdin:
            arguments = json.loads(line)
            answer = getattr(parent, arguments.pop("do"))(**arguments)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    # The jobs are pickled by name: of the module, not of ``__main__``.
    from bench import pool_parent

    pool_parent.main()
