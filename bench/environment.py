"""Where a run was made: nothing that names the machine, everything that explains the figures."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess

import shmsock

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

_PACKAGES = ("numpy", "posix_ipc", "hiredis", "redis", "lmdb")


def describe() -> dict[str, object]:
    """The environment, as it goes into the JSON."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "virtual_machine": "hypervisor" in _cpu_field("flags").split(),
        "kernel": platform.release().partition("-")[0],
        "libc": " ".join(platform.libc_ver()),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "redis_server": _redis_version(),
        "shmsock": shmsock.__version__,
        "engine": shmsock.ENGINE,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": _uncommitted(),
    }


def short_commit() -> str:
    """The commit for a file name."""
    return _git("rev-parse", "--short=8", "HEAD") or "nocommit"


def _cpu_field(name: str) -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpu_field("model name") or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _redis_version() -> str | None:
    if shutil.which("redis-server") is None:
        return None
    words = _output("redis-server", "--version") or ""
    return next((word[2:] for word in words.split() if word.startswith("v=")), None)


def _uncommitted() -> bool | None:
    """Whether what was measured differs from the commit; None without git."""
    status = _git("status", "--porcelain", "--", "shmsock", "workers", "bench")
    return None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", REPOSITORY, *arguments)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
