"""How long a server is without its supervisor: ``python -m tests.takeover_times --runs 20``.

Each run kills a supervisor that holds idle subscribers, starts the next one at once, as a service
manager does, and measures from SIGKILL: until a worker's first push to another worker's client went
through with no host, until the next supervisor holds the host's byte, until it has adopted workers,
listeners and connections (its banner), and until a connection made meanwhile is answered.
``interpreter`` is what starting a Python that imports the same modules costs on this machine at
this moment; the last three contain it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time

from .helpers import REPOSITORY, wait_until
from .servers import Server, environment

KINDS = ("first push", "has a host", "adopted", "answered", "interpreter")


def one_run(clients: int) -> dict[str, float]:
    """Kill one supervisor; what took how long, in seconds."""
    with Server() as server, contextlib.ExitStack() as stack:
        publishers = server.on_each_worker(lambda: stack.enter_context(server.client()))
        for _ in range(clients):
            stack.enter_context(server.client()).call("SUBSCRIBE", "news")
        publisher = next(iter(publishers.values()))
        looker = stack.enter_context(server.attach())
        started = time.monotonic()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        new = stack.enter_context(Server(name=server.name, wait=False))
        assert publisher.call("PUBLISH", "news", "x") == clients
        took = {"first push": time.monotonic() - started}
        waiting = stack.enter_context(server.connect())
        waiting.sendall(b"PING\r\n")
        wait_until(looker.host_alive, "somebody holds the host's byte")
        took["has a host"] = time.monotonic() - started
        wait_until(lambda: "was taken over" in new.output(), "it takes over")
        took["adopted"] = time.monotonic() - started
        assert waiting.recv(100) == b"+PONG\r\n"
        took["answered"] = time.monotonic() - started
        new.wait_ready()
        started = time.monotonic()
        command = [sys.executable, "-c", "import workers.cli, workers.supervisor"]
        subprocess.run(command, cwd=REPOSITORY, env=environment(), check=True)
        took["interpreter"] = time.monotonic() - started
        return took


def main() -> None:
    """Print the median and the worst of each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--clients", type=int, default=100, help="idle subscribers")
    options = parser.parse_args()
    runs = [one_run(options.clients) for _ in range(options.runs)]
    print(f"SIGKILL of the supervisor, {options.clients} connections, {options.runs} runs; ms")
    for kind in KINDS:
        values = [1000 * run[kind] for run in runs]
        print(f"  {kind:12} median {statistics.median(values):7.0f}  worst {max(values):7.0f}")


if __name__ == "__main__":
    main()
