"""Peers of the requests bench that read, answer and do nothing else: the floor for a Python server.

``python -m bench.answerers asyncio|uvloop``: binds a free port of the loopback and prints it. Bytes
are not parsed: the answer is repeated as often as a mark occurs in what was read, so that a
pipelined batch gets all of its answers in one write.
"""

from __future__ import annotations

import asyncio
import sys
import typing

LOOPS = ("asyncio", "uvloop")

_REFUSAL = b"-ERR this answers PING and ECHO hello\r\n"  # redis-benchmark asks for the CONFIG first


class Answerer(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where answers go."""
        self._transport = typing.cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Answer as often as there are requests in it."""
        answers = b"+PONG\r\n" * data.count(b"PING") or b"$5\r\nhello\r\n" * data.count(b"hello")
        self._transport.write(answers or _REFUSAL * data.count(b"CONFIG"))


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answerer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main(name: str) -> None:
    """Serve until SIGTERM."""
    if name == "uvloop":
        import uvloop

        uvloop.run(_serve())
    else:
        asyncio.run(_serve())


if __name__ == "__main__":
    main(sys.argv[1])
