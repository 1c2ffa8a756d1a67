"""Instruction counts of the hot calls under callgrind, against a committed baseline.

Wall time on a shared machine cannot tell a tenth; a count of instructions hardly moves. So a change
that makes a hot call dearer is found here, by ``python -m bench.instructions`` or by the test that
calls ``compare``, and a dearer one that was meant is committed with ``--save``.

The calls run in one process under valgrind. Before and after each row of calls it asks for its
parent's pid, at which callgrind writes what it has counted since the last time
(``--dump-before=getppid``). A row contains the loop, and where there is a peer, the peer's calls.
The system's instructions are not counted, so a system call more weighs almost nothing here:
``strace -c`` counts those.
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import gc
import json
import os
import pathlib
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile

import shmsock
import shmsock.participant
from shmsock.engine import NAME as ENGINE
from workers.hub_protocol import Hub
from workers.messenger import Messenger

from .environment import REPOSITORY
from .measure import BrokenError, UnavailableError

BASELINE = pathlib.Path(__file__).with_name("instructions.json")
TOLERANCE = 0.10
CALLS = (
    "address + close, attached",
    "attach + detach",
    "write 64 bytes, read by the peer",
    "dispatch of one PING, asked and read by the peer",
)
_ROWS, _COUNT, _WARM_UP = 3, 200, 50
_PING, _PONG = b"*1\r\n$4\r\nPING\r\n", b"+PONG\r\n"
_TIMEOUT_S = 300.0


def key() -> str:
    """What a baseline holds for: this engine and this Python, to the last digit."""
    return f"{ENGINE}, CPython {platform.python_version()}, {platform.machine()}"


def measure() -> dict[str, int]:
    """Instructions of each call: the least of three rows, as the service thread may wake in one.

    Raises:
        UnavailableError: There is no valgrind.
        BrokenError: It did not count what it should.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise UnavailableError("valgrind is not installed")
    with tempfile.TemporaryDirectory(prefix="shmsock-bench-") as directory:
        command = [valgrind, "--tool=callgrind", "--dump-before=getppid", "--quiet"]
        command += [f"--callgrind-out-file={directory}/out", sys.executable]
        command += ["-m", "bench.instructions", "--calls"]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        counts = [_total(pathlib.Path(directory, f"out.{n + 1}")) for n in range(_dumps())]
    if done.returncode != 0 or None in counts:
        raise BrokenError(f"callgrind: {done.stderr.strip()[-500:]}")
    found = {}
    for number, name in enumerate(CALLS):
        begin = number * (_ROWS + 1)  # the first dump of each is what came before it
        rows = [count for count in counts[begin + 1 : begin + 1 + _ROWS] if count is not None]
        found[name] = round(min(rows) / _COUNT)
    return found


def _dumps() -> int:
    return len(CALLS) * (_ROWS + 1)


def _total(path: pathlib.Path) -> int | None:
    with contextlib.suppress(OSError):
        match = re.search(r"^(?:totals|summary): (\d+)", path.read_text(), re.MULTILINE)
        return int(match[1]) if match else None
    return None


def baseline() -> dict[str, int] | None:
    """The committed counts for this engine and Python, if there are any."""
    return _saved().get(key())


def _saved() -> dict[str, dict[str, int]]:
    saved: dict[str, dict[str, int]] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    return saved


def compare(counts: dict[str, int], before: dict[str, int]) -> list[str]:
    """A line for each call that costs over a tenth more than the baseline."""
    return [
        f"{name}: {counts[name]} instructions, {counts[name] / before[name] - 1:+.1%} of the "
        f"baseline's {before[name]}"
        for name in before
        if counts[name] > before[name] * (1 + TOLERANCE)
    ]


# -- under valgrind -----------------------------------------------------------------------------


def _calls() -> None:
    # On a loaded machine every row would have a turn of the timer in it.
    shmsock.participant._TICK_S = 3600.0
    name = f"bench-{os.getpid()}-instructions"
    with shmsock.Runtime.create(name, slots=256) as runtime:
        dispatcher = shmsock.Dispatcher(runtime)
        messenger = Messenger(runtime, dispatcher, (Hub(runtime),))
        ours, peer = _pair()
        sid = runtime.create_socket(ours)
        gc.disable()
        with peer:

            def address() -> None:
                reference = runtime.address(sid)
                assert reference is not None
                reference.close()

            message = b"x" * 64

            def write(reference: shmsock.SocketRef) -> None:
                reference.write(message)
                peer.recv(64)

            def ping() -> None:
                peer.send(_PING)
                dispatcher.run_once(0)
                if peer.recv(64) != _PONG:
                    raise BrokenError("no PONG")

            reference = runtime.address(sid)
            assert reference is not None
            with reference:
                _row(address)
            _row(address)
            reference = runtime.address(sid)
            assert reference is not None
            with reference:
                _row(functools.partial(write, reference))
            messenger.take([sid])
            _row(ping)
        dispatcher.close()


def _row(call: collections.abc.Callable[[], object]) -> None:
    for _ in range(_WARM_UP):
        call()
    for _ in range(_ROWS):
        os.getppid()
        for _ in range(_COUNT):
            call()
    os.getppid()


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        return listener.accept()[0], peer


def main(arguments: list[str]) -> int:
    """Compare, or with ``--save`` make what was counted the baseline; 1 if a call got dearer."""
    if arguments == ["--calls"]:
        _calls()
        return 0
    counts, before = measure(), baseline()
    print(key())
    for name, count in counts.items():
        was = f" (baseline {before[name]})" if before and name in before else ""
        print(f"{count:8} {name}{was}")
    if arguments == ["--save"]:
        saved = _saved() | {key(): counts}
        BASELINE.write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")
        return 0
    dearer = compare(counts, before) if before else []
    print("\n".join(dearer) if before else "no baseline for these: --save makes one")
    return 1 if dearer else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
