"""The peers that are C (``peers.c``), compiled on the spot where there is a compiler."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import shutil
import subprocess
import tempfile
import typing

from .measure import BrokenError

_SOURCE = pathlib.Path(__file__).with_name("peers.c")


def compiler() -> str | None:
    """The C compiler of this machine, if it has one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc"))), None)


@contextlib.contextmanager
def library() -> typing.Iterator[ctypes.CDLL | None]:
    """``peers.c``, loaded; None without a compiler: then its contestants do not take part."""
    program = compiler()
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="shmsock-bench-") as directory:
        path = os.path.join(directory, "peers.so")
        command = [program, "-std=c11", "-O2", "-shared", "-fPIC", "-pthread", "-o", path]
        done = subprocess.run([*command, str(_SOURCE)], capture_output=True, text=True)
        if done.returncode != 0:
            raise BrokenError(f"peers.c did not compile: {done.stderr.strip()[-500:]}")
        loaded = ctypes.CDLL(path)
    loaded.semaphore_pairs.argtypes = [ctypes.c_uint64]
    loaded.shared_counts.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    for function in (loaded.semaphore_pairs, loaded.shared_counts):
        function.restype = ctypes.c_uint64
    yield loaded
