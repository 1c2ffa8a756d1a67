"""Who may make a runtime of a name, and how all its names are taken away again.

The lock file decides: its host byte and its participants' byte say whether anybody lives there. It
goes last, so that who is killed while removing is simply run again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time

from .errors import AlreadyRunningError, HostLostError, RuntimeNotFoundError
from .processes import ATTACHED, HOST, REGISTRATION, LockFile
from .segment import (
    check_name,
    is_poisoned,
    make_run_directory,
    names_on_machine,
    run_directory,
    unlink_names,
)

_REMOVING_S = 0.5  # far more than taking all names away takes


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
