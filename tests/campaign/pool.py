"""Pool processes: they attach, address, write, create and fail at random until they are killed.

A zygote that takes part in nothing forks them, and forks a new one for each that died. What a pool
process writes to one socket is numbered from 0 without a gap, and it only counts what ``write``
took: whatever arrives there, from any process, must be 0, 1, 2 and so on up to its death.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import sys
import traceback

import shmsock

MARK = b"sink"  # user data of the sockets that pool processes create
CHANNELS = (b"c0", b"c1")
_HELD = 8
_OWN = 6
_LONG = 0.2
_MALICE = 0.03  # of the times that it might fail somebody else's socket

Expected = (
    shmsock.SocketFailedError,
    shmsock.DescriptorError,
    shmsock.OverCrowdedError,
    shmsock.TableFullError,
)


class Member:
    """One pool process."""

    def __init__(self, name: str, source: str, seed: int, sink: int) -> None:
        self._rng = random.Random(seed)
        self._source = source.encode()
        self._sink = sink
        self._runtime = shmsock.Runtime.attach(name)
        self._written: dict[int, int] = {}
        self._held: list[shmsock.SocketRef] = []
        self._own: list[int] = []
        self._acts = {
            self._address: 24,
            self._let_go: 24,
            self._create: 3,
            self._release: 2,
            self._fail_own: 2,
            self._fail_any: 1,
            self._write_sink: 20,
            self._write_subscriber: 12,
            self._join_group: 6,
            self._look: 3,
        }

    def run(self) -> None:
        """Until killed."""
        acts, weights = list(self._acts), list(self._acts.values())
        while True:
            with contextlib.suppress(*Expected):
                self._rng.choices(acts, weights)[0]()
            if self._rng.random() < 0.2:
                signal.sigtimedwait([], self._rng.uniform(0, 0.02))

    def _any(self, *, sinks: bool = False) -> int:
        rows = self._runtime.sockets()
        if sinks:
            rows = rows[rows["user_data"] == MARK]
        return int(self._rng.choice(rows["id"])) if len(rows) else 0

    def _address(self) -> None:
        reference = self._runtime.address(self._any())
        if reference is not None:
            self._held.append(reference)
        if len(self._held) > _HELD:
            self._let_go()

    def _let_go(self) -> None:
        if self._held:
            self._held.pop(self._rng.randrange(len(self._held))).close()

    def _create(self) -> None:
        self._own = [sid for sid in self._own if self._runtime.status(sid) is shmsock.Status.LIVE]
        if len(self._own) >= _OWN:
            self._fail_own()
            return
        policy = "rehome" if self._rng.random() < 0.2 else "fail"
        sock = socket.create_connection(("127.0.0.1", self._sink))
        try:
            sid = self._runtime.create_socket(sock, MARK, on_owner_death=policy)
        except BaseException:
            sock.close()
            raise
        self._own.append(sid)
        self._write(sid, b"sid %d\n" % sid)

    def _release(self) -> None:
        if self._own:
            reference = self._runtime.address(self._rng.choice(self._own))
            if reference is not None:
                with reference:
                    reference.release_additional_reference()

    def _fail_own(self) -> None:
        if self._own:
            self._runtime.set_failed(self._own.pop(0), errno.ECANCELED, "by its creator")

    def _fail_any(self) -> None:
        if self._rng.random() > _MALICE:
            return
        sid = self._any()
        if sid and not self._runtime.is_listener(sid):
            self._runtime.set_failed(sid, errno.ECANCELED, "by a pool process")

    def _write(self, sid: int, message: bytes) -> bool:
        reference = self._runtime.address(sid)
        if reference is None:
            return False
        with reference:
            reference.write(message)
        return True

    def _write_numbered(self, sid: int, form: str) -> None:
        number = self._written.get(sid, 0)
        text = b"%s:%d" % (self._source, number)
        if form == "line":
            message = b"%s\n" % text
        else:
            if self._rng.random() < _LONG:  # more than a slow one's kernel takes at once
                text += b":" + b"x" * 50_000
            message = b"%s\r\n$7\r\nmessage\r\n$4\r\npool\r\n$%d\r\n%s\r\n" % (
                b">3" if form == "3" else b"*3",
                len(text),
                text,
            )
        if self._write(sid, message):
            self._written[sid] = number + 1

    def _write_sink(self) -> None:
        self._write_numbered(self._any(sinks=True), "line")

    def _write_subscriber(self) -> None:
        version = self._rng.choice("23")
        group = version.encode() + b"c:" + self._rng.choice(CHANNELS)
        members = self._runtime.groups.members(group)
        if members:
            self._write_numbered(self._rng.choice(members), version)

    def _join_group(self) -> None:
        group = b"pool:%d" % self._rng.randrange(8)
        if self._rng.random() < 0.6:
            self._runtime.groups.add(group, self._any(sinks=True))
        else:
            for sid in self._runtime.groups.members(group)[:2]:
                self._runtime.groups.discard(group, sid)

    def _look(self) -> None:
        self._runtime.repair()
        self._runtime.processes()
        self._runtime.owned_counts()


def _fork(name: str, source: str, seed: int, sink: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            Member(name, source, seed, sink).run()
        except BaseException:
            sys.stderr.write(f"pool process {source}:\n{traceback.format_exc()}")
            sys.stderr.flush()
        os._exit(1)
    return pid


def main() -> None:
    """Run: NAME SEED SINK COUNT; keeps COUNT of them alive until its standard input ends."""
    name, seed, sink, count = sys.argv[1:]
    rng = random.Random(int(seed))
    alive: set[int] = set()
    number = 0
    os.set_blocking(0, False)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    while True:
        with contextlib.suppress(BlockingIOError):
            if not os.read(0, 1):
                break
        while len(alive) < int(count):
            number += 1
            alive.add(_fork(name, f"p{number}", rng.randrange(1 << 30), int(sink)))
        signal.sigtimedwait([signal.SIGCHLD], 0.05)
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                alive.discard(pid)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


if __name__ == "__main__":
    main()
