"""The applications of the accept bench: they answer any request with three bytes, and no more.

``shmsock serve bench.bare_app:Bare`` is ours, ``uvicorn bench.bare_app:app`` the same for ASGI, and
``NODE`` for Node's cluster.
"""

from __future__ import annotations

import collections.abc
import typing

from workers.application import Application, Context
from workers.http import HttpProtocol, Request, Response

if typing.TYPE_CHECKING:
    from shmsock import SocketRef
    from workers.protocol import Protocol

Event = dict[str, typing.Any]

NODE = """
const cluster = require("cluster"), http = require("http");
const [port, workers] = process.argv.slice(-2).map(Number);
if (cluster.isPrimary) {
  let up = 0;
  cluster.on("listening", () => { if (++up === workers) console.log("ready"); });
  process.on("SIGTERM", () => { for (const id in cluster.workers) cluster.workers[id].kill();
                                process.exit(0); });
  for (let i = 0; i < workers; i++) cluster.fork();
} else {
  const server = http.createServer((request, response) => {
    response.writeHead(200, {"Content-Type": "text/plain; charset=utf-8", "Content-Length": 3});
    response.end("ok\\n");
  });
  server.keepAliveTimeout = 60000;
  server.listen(port, "127.0.0.1", 4096);
}
"""

_HEADERS = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"3")]


class Bare(Application):
    """HTTP and nothing else."""

    def protocols(self, context: Context) -> collections.abc.Sequence[Protocol]:
        """Any request gets the same."""
        return (HttpProtocol(self.answer, closing=context.draining),)

    def answer(self, request: Request, ref: SocketRef) -> Response:
        """Three bytes."""
        return Response(200, b"ok\n")


async def app(
    scope: Event,
    receive: collections.abc.Callable[[], collections.abc.Awaitable[Event]],
    send: collections.abc.Callable[[Event], collections.abc.Awaitable[None]],
) -> None:
    """A bare ASGI application."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": b"ok\n"})
