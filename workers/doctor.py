"""``shmsock doctor``: the table's invariants, the processes, and this machine's limits."""

from __future__ import annotations

import os
import resource
import time
import typing

from shmsock import Inspector, ProcessInfo, format_socket_id

PATIENCE_S = 3.0  # a death is noticed by somebody's timer, once a second
LINGERING_S = 2.0  # an ordinary failed socket is let go of at once, or when a callback returns

_FAILED = 2  # the state of a failed socket in Inspector.sockets()


class Finding(typing.TypedDict):
    """One check and what it found."""

    check: str
    ok: bool
    detail: str


def examine(inspector: Inspector) -> list[Finding]:
    """Check everything; what is broken has ``ok`` false, and a detail that says what to do."""
    complaints = inspector.audit(PATIENCE_S)
    findings = [Finding(check="table", ok=False, detail=line) for line in complaints]
    if inspector.poisoned:
        findings.append(Finding(check="table", ok=False, detail=_what_to_do(inspector)))
    if not findings:
        detail = f"all invariants hold over {inspector.slots} slots, {inspector.in_use()} in use"
        findings.append(Finding(check="table", ok=True, detail=detail))
    findings += _lingering(inspector)
    findings.append(_host(inspector))
    findings.append(_open_files(inspector))
    findings.append(_shared_memory())
    findings.append(_backlog())
    return findings


def repair(inspector: Inspector) -> list[str]:
    """Put right what can be; returns what was done."""
    mended = inspector.mend()
    done = [f"found: {line}" for line in mended.found]
    done.append(
        f"{mended.reaped} dead processes were reaped, {mended.retired} stripes got a new "
        f"semaphore, {mended.recounted} were recounted"
    )
    if mended.poisoned:
        done.append(f"beyond repair, so the runtime is marked poisoned: {mended.poisoned}")
    return done


def _what_to_do(inspector: Inspector) -> str:
    name = inspector.name
    if inspector.host_alive():
        return "every operation raises PoisonedError; the supervisor is about to start a new one"
    return f"its supervisor is gone: restart `shmsock serve --name {name}`"


def _failed(inspector: Inspector) -> dict[int, list[int]]:
    """The failed sockets that are not recycled, and the process rows attached to each."""
    table = inspector.sockets()
    ids = table["id"][table["state"] == _FAILED]
    return dict(zip(ids.tolist(), inspector.attached_many(ids), strict=True))


def _lingering(inspector: Inspector) -> list[Finding]:
    """Sockets that failed and are still held after a while: by whom.

    When a socket failed is not stored anywhere: it is looked at again until it is gone.
    """
    failed = _failed(inspector)
    deadline = time.monotonic() + LINGERING_S
    while failed and time.monotonic() < deadline:
        time.sleep(0.02)
        now = _failed(inspector)
        failed = {sid: holders for sid, holders in now.items() if sid in failed}
    rows = {row.index: row for row in inspector.processes()}
    findings = []
    for sid, holders in failed.items():
        who = ", ".join(_describe(rows[index]) for index in holders if index in rows)
        detail = (
            f"slot {sid & 0xFFFFFFFF} ({format_socket_id(sid)}) failed {LINGERING_S:.0f} s ago or "
            f"more and is still held by {who or 'nobody'}"
        )
        findings.append(Finding(check="failed sockets", ok=False, detail=detail))
    return findings


def _describe(row: ProcessInfo) -> str:
    return f"process {row.index} (pid {row.pid}, {row.role}, {row.age_s:.0f} s old, {_state(row)})"


def _state(row: ProcessInfo) -> str:
    """What the kernel says of a process, if it is of our pid namespace."""
    if not row.alive:
        return "dead"
    try:
        with open(f"/proc/{row.pid}/stat", encoding="ascii", errors="replace") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "alive"
    return {"T": "stopped", "t": "traced", "Z": "ending", "X": "ending"}.get(letter, "alive")


def _host(inspector: Inspector) -> Finding:
    alive = inspector.host_alive()
    rows = [row for row in inspector.processes() if row.alive]
    workers = [row for row in rows if row.role == "worker"]
    name = inspector.name
    if alive:
        detail = f"the host is alive, with {len(workers)} workers"
    elif rows:
        detail = "nobody serves descriptors: restart `shmsock serve`"
    else:
        detail = (
            f"no process is alive, only names are left: `shmsock serve --name {name}` starts "
            f"anew, `shmsock clean --name {name}` removes them"
        )
    return Finding(check="host", ok=alive, detail=detail)


def _open_files(inspector: Inspector) -> Finding:
    """Of the host, which keeps a descriptor of every socket: its limit, not ours."""
    hosts = [row for row in inspector.processes() if row.role == "supervisor" and row.alive]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hosts:
        try:
            soft, hard = resource.prlimit(hosts[0].pid, resource.RLIMIT_NOFILE)
        except (PermissionError, ProcessLookupError):
            pass
    used = inspector.in_use()
    ok = soft > used + 64
    detail = f"RLIMIT_NOFILE of the host is {soft} (hard {hard}), {used} sockets are kept"
    if soft < inspector.slots:
        detail += f"; fewer than the {inspector.slots} slots: raise `ulimit -n` to use them all"
    return Finding(check="open files", ok=ok, detail=detail)


def _shared_memory() -> Finding:
    """The segment is allocated whole; spare semaphores and groups still need room."""
    found = os.statvfs("/dev/shm")
    free = found.f_bavail * found.f_frsize
    ok = free >= 1 << 20
    detail = f"/dev/shm has {free >> 20} MiB free"
    if not ok:
        detail += ": groups and spare semaphores need some; enlarge it (Docker: --shm-size)"
    return Finding(check="shared memory", ok=ok, detail=detail)


def _backlog() -> Finding:
    with open("/proc/sys/net/core/somaxconn", encoding="ascii") as file:
        limit = int(file.read())
    detail = f"net.core.somaxconn is {limit}: a larger --backlog is cut to that"
    return Finding(check="backlog", ok=limit >= 128, detail=detail)
