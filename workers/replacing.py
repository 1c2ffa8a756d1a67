"""``shmsock drain`` and ``shmsock reload``: wish workers replaced, wait for what comes of it."""

from __future__ import annotations

import time

from shmsock import Runtime, Wish

_LOOK_EVERY_S = 0.02


def worker_named(runtime: Runtime, number: int) -> int:
    """The process index of a worker, given that or its pid.

    Raises:
        ValueError: There is no such worker.
    """
    workers = [row for row in runtime.processes() if row.role == "worker" and row.alive]
    for row in workers:
        if number == row.index:
            return row.index
    for row in workers:
        if number == row.pid:
            return row.index
    known = ", ".join(f"{row.index} (pid {row.pid})" for row in workers)
    raise ValueError(f"{number} is no worker's index or pid; there are: {known or 'none'}")


def replace(runtime: Runtime, indexes: list[int] | None, timeout_s: float) -> str:
    """Have workers replaced one by one, and wait.

    Args:
        runtime: Any participant's.
        indexes: Of the workers; None for all there are.
        timeout_s: How long to wait.

    Returns:
        An empty string once others have taken their place and they have gone; else why not.

    If killed: the wishes stand, and are carried out.
    """
    if not runtime.host_alive():
        return "the supervisor is gone: nobody can start a worker; run `shmsock serve` again"
    rows = [row for row in runtime.processes() if row.role == "worker" and row.alive]
    waiting = {row.index: row for row in rows if indexes is None or row.index in indexes}
    for index in waiting:
        if runtime.wishes.of(index) is not Wish.LEAVE:
            runtime.wishes.store(index, Wish.REPLACE)
    deadline = time.monotonic() + timeout_s
    while True:
        alive = {(row.index, row.epoch) for row in runtime.processes() if row.alive}
        waiting = {i: row for i, row in waiting.items() if (i, row.epoch) in alive}
        pids = ", ".join(str(row.pid) for row in waiting.values())
        if not waiting:
            others = [row for row in runtime.processes() if row.role == "worker" and row.alive]
            return "" if others else "the server has stopped"
        if any(runtime.wishes.of(index) is Wish.STAY for index in waiting):
            return f"no new worker came up; kept: {pids}. The server's log says why"
        if not runtime.host_alive():
            return f"the supervisor has gone; the next one goes on with it. Still here: {pids}"
        if time.monotonic() >= deadline:
            return f"not done after {timeout_s:g} s, and goes on. Still here: {pids}"
        time.sleep(_LOOK_EVERY_S)
