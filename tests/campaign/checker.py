"""What must be true of the machine when the killing is over and all is quiet again."""

from __future__ import annotations

import collections.abc
import contextlib
import os
import time

import lmdb
import numpy as np

import shmsock
from shmsock.layout import LIVE, SLOT_BITS

from ..helpers import descriptors, wait_until
from .clients import Load
from .figures import Figures

_SETTLE_S = 30.0
_SEQPACKET = "0005"


class Checker:
    """The checks, each complaining of what it finds."""

    def __init__(self, runtime: shmsock.Runtime, load: Load, figures: Figures) -> None:
        self._runtime, self._load, self._figures = runtime, load, figures

    def _settled(
        self, what: str, problems: collections.abc.Callable[[], collections.abc.Iterable[str]]
    ) -> None:
        """Wait until there are no problems, or complain of them."""
        found: list[str] = []

        def clean() -> bool:
            found[:] = problems()
            return not found

        try:
            wait_until(clean, what, _SETTLE_S)
        except AssertionError:
            self._figures.complain(f"{what}: not so after {_SETTLE_S:.0f} s: " + "; ".join(found))

    # -- the books ------------------------------------------------------------------------------

    def books(self) -> None:
        """The audit is clean, the dead are gone, no stripe is stuck."""
        self._settled("all books balance", self._runtime.audit)
        self._settled(
            "the dead are reaped",
            lambda: [f"{row}" for row in self._runtime.processes() if not row.alive],
        )
        engine = self._runtime._engine
        for stripe in range(self._runtime._segment.layout.stripes):
            try:
                engine.run(stripe, lambda *_: 1, -1, patience_s=5.0)
            except shmsock.StripeTimeoutError as error:
                self._figures.complain(str(error))

    def groups(self) -> None:
        """No reader row of a dead process, no group that cannot be written."""
        with contextlib.suppress(lmdb.Error):
            self._runtime.groups.reap_readers()
        sid = next((stream.sid for stream in self._load.living() if stream.sid), 0)
        if sid and not (
            self._runtime.groups.add("campaign", sid)
            and self._runtime.groups.discard("campaign", sid)
        ):
            self._figures.complain("a group could not be written at the end")

    # -- connections ----------------------------------------------------------------------------

    def ids(self) -> None:
        """A client has seen no end exactly when its id is live."""

        def problems() -> list[str]:
            live = set(map(int, self._live_ids()))
            found = []
            for stream in self._load.living():
                if stream.sid and stream.sid not in live:
                    found.append(f"{stream.kind} {stream.port}: {stream.sid:#x} is gone, no end")
                elif not stream.sid:
                    found.append(f"{stream.kind} {stream.port} has no id")
            living = {stream.sid for stream in self._load.living()}
            found += [
                f"{sid:#x} is live and its client has seen the end"
                for sid in live - living
                if not self._runtime.is_listener(sid)
            ]
            return found

        self._settled("who has seen no end has a live id, and the other way round", problems)

    def _live_ids(self) -> list[int]:
        rows = self._runtime.sockets()
        return [int(row["id"]) for row in rows if row["state"] == 1]

    def owners(self) -> None:
        """Every live socket has a live owner."""
        self._settled(
            "no orphan is left",
            lambda: [f"{sid:#x} has no owner" for sid in self._runtime.orphans()],
        )

    # -- descriptors ----------------------------------------------------------------------------

    def descriptors(self) -> None:
        """No process has a socket that is not in the table, and the host has all that are."""
        self._settled("descriptors are those of live slots", self._strangers)

    def _strangers(self) -> list[str]:
        columns = self._runtime._segment.columns
        even = ((columns.versioned_ref >> np.uint64(SLOT_BITS)) & np.uint64(1)) == 0
        known = set(columns.inode[(columns.state == LIVE) & even].tolist())
        control = _seqpackets()
        found = []
        for row in self._runtime.processes():
            if row.index == self._runtime.index or not row.alive:
                continue
            held = set()
            for fd, what in descriptors(row.pid).items():
                if what.startswith("socket:["):
                    inode = int(what[8:-1])
                    held.add(inode)
                    if inode not in known and inode not in control:
                        found.append(f"{row.role} {row.pid} has {fd} -> {what} ({_name(inode)})")
            if row.role == "supervisor":
                found += [f"the host lacks inode {inode}" for inode in known - held]
        return found

    # -- after all have left --------------------------------------------------------------------

    def empty(self) -> None:
        """Every client has left: every slot but the listeners' comes back."""
        self._settled(
            "every slot comes back",
            lambda: [
                f"{row['id']:#x} of {bytes(row['peer'])!r}"
                for row in self._runtime.sockets()
                if not self._runtime.is_listener(int(row["id"]))
            ],
        )


def _seqpackets() -> set[int]:
    """The inodes of control connections: UNIX sockets of type SEQPACKET, and nothing else is."""
    found = set()
    with open("/proc/net/unix") as file:
        for line in file:
            fields = line.split()
            if len(fields) >= 7 and fields[4] == _SEQPACKET:
                found.add(int(fields[6]))
    return found


def _name(inode: int) -> str:
    """What the kernel says of a socket, for a complaint."""
    for table in ("tcp", "unix"):
        with open(f"/proc/net/{table}") as file:
            for line in file:
                if str(inode) in line.split():
                    return " ".join(line.split()[:8])
    return "no such socket listens or is connected"


def names_left(name: str) -> list[str]:
    """Names in shared memory."""
    return [entry for entry in os.listdir("/dev/shm") if f"shmsock.{name}" in entry]


def processes_left(name: str) -> list[str]:
    """Processes that have the runtime's name on their command line."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
                words = file.read().decode(errors="replace").split("\0")
                if name in words:
                    found.append(f"{entry}: {' '.join(words)}")
    return found


def nothing_left(name: str, figures: Figures) -> None:
    """No process and no name."""
    deadline = time.monotonic() + 10.0
    while (left := names_left(name) + processes_left(name)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for what in left:
        figures.complain(f"left behind: {what}")
