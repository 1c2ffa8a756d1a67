"""The killer: a process of its own that kills and stops a runtime's processes at random.

Each step draws the same numbers from the seed, whatever it finds: how long to wait, what kind of
victim, which of them by rank, what to do. It says what it does in lines of JSON *before* it does
it, so that a death is known to whoever looks for its reason.

It is no participant: it reads the table and asks the kernel who holds the arbiter's byte.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import random
import signal
import sys
import time

from shmsock.layout import FREE, LIVE, ROLES
from shmsock.processes import ARBITER, HOST, LockFile
from shmsock.segment import Segment

GAP_S = (0.05, 0.5)
# A repairer needs a death: a victim is killed, and then whoever holds the arbiter's byte.
ACTS = {
    "kill worker": 20,
    "kill supervisor": 4,
    "kill pool": 34,
    "kill repairer": 22,
    "stop worker": 8,
    "stop supervisor": 4,
    "stop pool": 4,
    "stop repairer": 4,
}
RELOADS = 4
WATCH_S = 0.3  # how long for a repairer to appear
BOLD = 0.15  # the share of acts that may take the last worker, or a supervisor that just starts
LONG_STOP = 0.1  # the share of stops that take seconds


class Killer:
    """One campaign's killer."""

    def __init__(self, name: str, seed: int, zygote: int, spare: set[int], reload: bool) -> None:
        self._rng = random.Random(seed)
        self._name = name
        self._zygote = zygote
        self._spare = {os.getpid(), *spare}
        self._segment = Segment.attach(name)
        self._lock_file = LockFile.open(name, create=False)
        self._bold = False
        self._to_continue: list[tuple[float, int, int]] = []  # when, pidfd, pid
        self._acts = dict(ACTS, **({"reload supervisor": RELOADS} if reload else {}))

    def run(self, seconds: float) -> None:
        """Act until the time is over, then let everybody go on."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            gap_s = self._rng.uniform(*GAP_S)
            act = self._rng.choices(list(self._acts), list(self._acts.values()))[0]
            rank, second = self._rng.random(), self._rng.random()
            self._bold = self._rng.random() < BOLD
            long = self._rng.random() < LONG_STOP
            stop_s = self._rng.uniform(1.0, 3.0) if long else self._rng.uniform(*GAP_S)
            self._wait(time.monotonic() + gap_s)
            self._act(act, rank, second, stop_s)
        self._wait(float("inf"))
        self._say(act="end")

    def _wait(self, until: float) -> None:
        """Sleep, and continue whoever was stopped for long enough; at the end, everybody."""
        while self._to_continue and (until == float("inf") or self._to_continue[0][0] <= until):
            due, pidfd, _ = heapq.heappop(self._to_continue)
            time.sleep(max(0.0, due - time.monotonic()))
            _signal(pidfd, signal.SIGCONT)
            os.close(pidfd)
        if until != float("inf"):
            time.sleep(max(0.0, until - time.monotonic()))

    def _act(self, act: str, rank: float, second: float, stop_s: float) -> None:
        what, kind = act.split()
        if kind == "repairer":
            # Somebody's death makes somebody repair: kill, then look who is at it.
            prey = self._victims("pool" if second < 0.6 else "worker")
            if not prey or not self._kill(prey[int(rank * len(prey))], "prey of a repairer"):
                self._say(act="idle", kind=kind)
                return
            victims = self._repairers()
        else:
            victims = self._victims(kind)
        if not victims:
            self._say(act="idle", kind=kind)
            return
        pid = victims[int(rank * len(victims))]
        if what == "kill":
            self._kill(pid, kind)
        elif what == "reload":
            self._say(act=what, kind=kind, pid=pid)
            os.kill(pid, signal.SIGHUP)
        else:
            self._stop(pid, kind, stop_s)

    def _kill(self, pid: int, kind: str) -> bool:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            self._say(act="kill", kind=kind, pid=pid, words=self._words(pid))
            _signal(pidfd, signal.SIGKILL)
            # It may have joined between the two looks.
            self._say(act="killed", kind=kind, pid=pid, words=self._words(pid))
            os.close(pidfd)
            return True
        return False

    def _stop(self, pid: int, kind: str, stop_s: float) -> None:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            self._say(act="stop", kind=kind, pid=pid, seconds=round(stop_s, 3))
            _signal(pidfd, signal.SIGSTOP)
            heapq.heappush(self._to_continue, (time.monotonic() + stop_s, pidfd, pid))

    def _words(self, pid: int) -> list[int]:
        """What ``owner`` and ``writer`` hold for a process: its rows' words."""
        cells = self._segment.cells
        return [
            word >> 8 << 16 | index
            for index, word in enumerate(cells.row_state)
            if word & 0xFF != FREE and cells.row_pid[index] == pid
        ]

    def _victims(self, kind: str) -> list[int]:
        if kind == "pool":
            return sorted(set(_children(self._zygote)) - self._spare)
        if not self._bold and not self._has_enough(kind):
            return []
        mark = {"worker": "workers.worker", "supervisor": "serve"}[kind]
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) not in self._spare:
                with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
                    words = file.read().decode().split("\0")
                    if mark in words and self._name in words:
                        found.append(int(entry))
        return sorted(found)

    def _has_enough(self, kind: str) -> bool:
        """Whether the server is up to losing one: a server that is always down is no target."""
        if kind == "supervisor":
            return self._lock_file.holder(HOST) != 0
        cells = self._segment.cells
        wanted = ROLES.index("worker")
        joined = sum(
            word & 0xFF == LIVE and cells.row_role[index] == wanted
            for index, word in enumerate(cells.row_state)
        )
        return joined > 1

    def _repairers(self) -> list[int]:
        """Whoever holds the arbiter's byte now, or in a moment."""
        deadline = time.monotonic() + WATCH_S
        while time.monotonic() < deadline:
            pid = self._lock_file.holder(ARBITER)
            if pid > 0 and pid not in self._spare:
                return [pid]
        return []

    def _say(self, **what: object) -> None:
        print(json.dumps({"t": time.monotonic(), **what}), flush=True)


def _signal(pidfd: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return list(map(int, file.read().split()))
    except OSError:
        return []


def main() -> None:
    """Run: NAME SEED SECONDS ZYGOTE RELOAD SPARED...; ends early when asked by SIGTERM."""
    name, seed, seconds, zygote, reload, *spare = sys.argv[1:]
    killer = Killer(name, int(seed), int(zygote), set(map(int, spare)), reload == "1")
    killer.run(float(seconds))


if __name__ == "__main__":
    main()
