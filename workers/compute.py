"""Pictures and numbers, computed by the pool for as long as somebody waits for them.

    shmsock serve workers.compute:app --pool 2

    GET    /             a page that draws the picture as its tiles arrive
    POST   /jobs         ?kind=mandelbrot&width=&height=&iterations=&x=&y=&scale=&tile=
                         ?kind=power&size=&exponent=&seed=
                         progress as server-sent events, then the PNG, or the numbers;
                         &format=result: those alone
    GET    /jobs         every job of the runtime, queued or running
    DELETE /jobs/<id>    end one, whichever worker reads its client

A job is its client's connection: its id is the SocketId, its state is in the user data, and it ends
when the client leaves. So no table of jobs is kept, and any process sees and ends any job.
"""

from __future__ import annotations

import base64
import collections.abc
import concurrent.futures
import errno
import functools
import hashlib
import importlib.resources
import json
import logging
import re
import typing

import shmsock

from . import compute_jobs
from .application import Application, Context
from .http import Elsewhere, HttpProtocol, Request, Response
from .pages import refusal

if typing.TYPE_CHECKING:
    from shmsock import SocketRef

    from .protocol import Protocol

log = logging.getLogger("shmsock")

PAGE = importlib.resources.files(__package__).joinpath("compute_page.html").read_text("utf-8")
_JSON = "application/json"
_USAGE = "POST /jobs, GET /jobs, DELETE /jobs/<id>, GET /\n"


class Compute(Application):
    """Reads requests in the workers, answers them from the pool."""

    def protocols(self, context: Context) -> collections.abc.Sequence[Protocol]:
        """HTTP alone."""
        self.context = context
        return (HttpProtocol(self.answer, closing=context.draining),)

    def answer(self, request: Request, ref: SocketRef) -> Response | Elsewhere:
        """Route one request."""
        if why := refusal(request, ref.peer, self.context.settings["pages_remote"]):
            return _text(403, why)
        match request.method, request.path.split("/"):
            case "GET" | "HEAD", ["", ""]:
                return Response(200, PAGE.encode(), "text/html; charset=utf-8", _page_headers())
            case "GET" | "HEAD", ["", "jobs"]:
                return Response(200, json.dumps(self.jobs()).encode(), _JSON)
            case "POST", ["", "jobs"]:
                return self.start(request, ref)
            case "DELETE", ["", "jobs", text]:
                return self.cancel(text)
        return _text(404, _USAGE)

    def start(self, request: Request, ref: SocketRef) -> Response | Elsewhere:
        """Have the pool answer."""
        pool = self.context.pool
        if pool is None:
            return _text(503, "nobody computes here: start the server with --pool 2")
        if self.context.draining():
            return _text(503, "this worker is draining: try again")
        try:
            job = compute_jobs.parse(request.query)
        except ValueError as error:
            return _text(400, str(error))

        def begin() -> None:
            ref.user_data = f"queued {job.kind}".encode()
            future = pool.submit(compute_jobs.run, ref.id, job, client=ref.id)
            future.add_done_callback(functools.partial(self.done, ref.id))

        return Elsewhere(begin)

    def done(self, sid: int, future: concurrent.futures.Future[None]) -> None:
        """In a thread of the pool's: if the job ended badly, so does its client."""
        error = None if future.cancelled() else future.exception()
        if error is None or isinstance(error, shmsock.SocketFailedError):
            return  # it was answered, or has left
        log.error("job %s failed: %r", shmsock.format_socket_id(sid), error)
        self.context.runtime.set_failed(sid, errno.EIO, f"its job failed: {type(error).__name__}")

    def jobs(self) -> list[dict[str, object]]:
        """What the table of sockets says of the jobs in it."""
        runtime = self.context.runtime
        found: list[dict[str, object]] = []
        for row in runtime.sockets():
            state = re.fullmatch(rb"(queued|running) (\w+)(?: (\d+)/(\d+))?", row["user_data"])
            # One that has failed is listed until the last process lets go of it.
            if state is not None and runtime.status(int(row["id"])) is shmsock.Status.LIVE:
                found.append(
                    {
                        "id": shmsock.format_socket_id(int(row["id"])),
                        "peer": row["peer"].decode("utf-8", "replace"),
                        "state": state[1].decode(),
                        "kind": state[2].decode(),
                        "done": int(state[3] or 0),
                        "of": int(state[4] or 0),
                    }
                )
        return found

    def cancel(self, text: str) -> Response:
        """End a job, whichever worker reads its client."""
        if text not in {job["id"] for job in self.jobs()}:
            return _text(404, "there is no such job")
        sid = shmsock.parse_socket_id(text)
        if not self.context.runtime.set_failed(sid, errno.ECANCELED, "its job was cancelled"):
            return _text(409, "it has just ended")
        return _text(200, "cancelled")


def _text(status: int, text: str) -> Response:
    return Response(status, text.rstrip("\n").encode() + b"\n")


@functools.cache
def _page_headers() -> dict[str, str]:
    """What the page may do: run its own script, wear its own style, talk to us, show its tiles."""

    def hashed(tag: str) -> str:
        (source,) = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.S)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        return f"{tag}-src 'sha256-{digest}'"

    return {
        "Content-Security-Policy": f"default-src 'none'; {hashed('script')}; {hashed('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
        "Referrer-Policy": "same-origin",
    }


app = Compute
