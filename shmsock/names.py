"""Who may make a runtime of a name, and how all its names are taken away again.

The lock file decides: its host byte and its participants' byte say whether anybody lives there. It
goes last, so that who is killed while removing is simply run again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import time

import posix_ipc

from .errors import (
    AlreadyRunningError,
    FormatError,
    HostLostError,
    InTransitionError,
    RuntimeNotFoundError,
)
from .processes import ATTACHED, HOST, REGISTRATION, LockFile
from .segment import NAME_PATTERN, SHM_DIRECTORY, Segment, check_name, run_directory

_REMOVING_S = 0.5  # far more than taking all names away takes


def names_on_machine() -> list[str]:
    """The runtimes that left anything in shared memory, alive or not."""
    found = set()
    for entry in os.listdir(SHM_DIRECTORY):
        pattern = rf"(?:sem\.)?shmsock\.({NAME_PATTERN})(?:\.run|\.\d+\.\d+)?"
        if match := re.fullmatch(pattern, entry):
            found.add(match[1])
    return sorted(found)


def own_name(name: str) -> LockFile:
    """Be the only one who may make a runtime of this name; remove what an earlier one left."""
    while True:
        make_run_directory(name)
        try:
            lock_file = LockFile.open(name, create=True)
        except FileNotFoundError:
            continue  # a janitor took the directory away between the two lines
        with lock_file.exclusive(REGISTRATION, timeout_s=5.0) as registering:
            if not registering:
                raise AlreadyRunningError(f"somebody else has been creating {name!r} for 5 s")
            if not lock_file.is_current():
                continue
            if (pid := lock_file.holder(HOST)) != 0:
                raise AlreadyRunningError(
                    f"runtime {name!r} is served by process {pid}: attach to it, stop it, or take "
                    "another --name"
                )
            pid = lock_file.holder(ATTACHED)
            if pid != 0 and is_poisoned(name) is not False:
                # Poisoned, or its host was killed while it removed the names: whoever still takes
                # part keeps what it has, lock file included, and can only leave.
                time.sleep(_REMOVING_S)  # or its host lives, and is at it: then it ends that first
                if lock_file.is_current():
                    remove(name)
                continue
            if pid != 0:
                raise HostLostError(
                    f"runtime {name!r} has lost its host but process {pid} still takes part: "
                    f"take it over, or run `shmsock clean --name {name} --kill`"
                )
            if not lock_file.try_hold(HOST):
                raise AlreadyRunningError(f"runtime {name!r} is just being created")
            remove_contents(name)
            return lock_file


def make_run_directory(name: str) -> str:
    """Make the private directory, or check that what is there is private and ours.

    Raises:
        PermissionError: Somebody else made it first: /dev/shm is open to everybody.
    """
    path = run_directory(name)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    if not private or status.st_uid != os.geteuid():
        raise PermissionError(errno.EACCES, "not a private directory of this user", path)
    return path


def is_poisoned(name: str) -> bool | None:
    """Whether the segment of a name is marked poisoned; None when there is none."""
    try:
        segment = Segment.attach(name, writable=False)
    except (RuntimeNotFoundError, InTransitionError):
        return None
    except (FormatError, PermissionError):
        return False
    poisoned = bool(segment.get("poisoned"))
    segment.close()
    return poisoned


def remove_contents(name: str) -> None:
    """Everything but the lock file and its directory."""
    unlink_names(name)
    directory = run_directory(name)
    for entry in os.listdir(directory):
        path = f"{directory}/{entry}"
        if entry == "lock":
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def unlink_names(name: str) -> None:
    """Take away every name of a runtime but its lock file and run directory.

    Raises:
        PermissionError: The segment is another user's. A semaphore that is, is left: its
            generation is none of ours.
    """
    for entry in os.listdir(SHM_DIRECTORY):
        if re.fullmatch(rf"sem\.shmsock\.{re.escape(name)}\.\d+\.\d+", entry):
            with contextlib.suppress(posix_ipc.ExistentialError, posix_ipc.PermissionsError):
                posix_ipc.unlink_semaphore("/" + entry.removeprefix("sem."))
    try:
        posix_ipc.unlink_shared_memory(f"/shmsock.{name}")
    except posix_ipc.ExistentialError:
        pass
    except posix_ipc.PermissionsError:
        raise PermissionError(
            errno.EACCES, "the runtime belongs to another user", f"/shmsock.{name}"
        ) from None


def remove(name: str) -> None:
    """Take all names away, the lock file last: who is killed here is simply run again."""
    directory = run_directory(name)
    if not os.path.isdir(directory):
        unlink_names(name)
        return
    with contextlib.suppress(FileNotFoundError):
        remove_contents(name)
        os.unlink(f"{directory}/lock")
    with contextlib.suppress(OSError):
        os.rmdir(directory)


def clean(name: str) -> bool:
    """Remove what is left of a runtime that nobody takes part in.

    Returns:
        False if there was nothing.

    Raises:
        AlreadyRunningError: Somebody is alive there; the message names a process.
    """
    check_name(name)
    directory = run_directory(name)
    try:
        lock_file = LockFile.open(name, create=False)
    except RuntimeNotFoundError:
        if not os.path.isdir(directory):
            left = name in names_on_machine()
            unlink_names(name)
            return left
        remove(name)
        return True
    with lock_file.exclusive(REGISTRATION, timeout_s=5.0) as registering:
        if registering and lock_file.is_current():
            for byte in (HOST, ATTACHED):
                if (pid := lock_file.holder(byte)) != 0:
                    raise AlreadyRunningError(f"runtime {name!r} is alive: process {pid}")
            remove(name)
            return True
    return False
