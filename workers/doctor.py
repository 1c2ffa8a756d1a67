"""``shmsock doctor``: the table's invariants, the processes, and this machine's limits."""

from __future__ import annotations

import os
import resource
import typing

from shmsock import Runtime


class Finding(typing.TypedDict):
    """One check and what it found."""

    check: str
    ok: bool
    detail: str


def examine(runtime: Runtime) -> list[Finding]:
    """Check everything; what is broken has ``ok`` false, and a detail that says what to do."""
    complaints = runtime.audit()
    findings = [Finding(check="table", ok=False, detail=line) for line in complaints]
    if not findings:
        detail = f"all invariants hold over {runtime.slots} slots, {runtime.in_use()} in use"
        findings.append(Finding(check="table", ok=True, detail=detail))
    findings.append(_host(runtime))
    findings.append(_open_files(runtime))
    findings.append(_shared_memory())
    findings.append(_backlog())
    return findings


def _host(runtime: Runtime) -> Finding:
    alive = runtime.host_alive()
    workers = [row for row in runtime.processes() if row.role == "worker" and row.alive]
    if not alive:
        detail = "nobody serves descriptors: restart `shmsock serve`"
    else:
        detail = f"the host is alive, with {len(workers)} workers"
    return Finding(check="host", ok=alive, detail=detail)


def _open_files(runtime: Runtime) -> Finding:
    """Of the host, which keeps a descriptor of every socket: its limit, not ours."""
    hosts = [row for row in runtime.processes() if row.role == "supervisor" and row.alive]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hosts:
        try:
            soft, hard = resource.prlimit(hosts[0].pid, resource.RLIMIT_NOFILE)
        except (PermissionError, ProcessLookupError):
            pass
    used = runtime.in_use()
    ok = soft > used + 64
    detail = f"RLIMIT_NOFILE of the host is {soft} (hard {hard}), {used} sockets are kept"
    if soft < runtime.slots:
        detail += f"; fewer than the {runtime.slots} slots: raise `ulimit -n` to use them all"
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
