"""What the pool computes, in pieces, each written to the client as soon as it is there.

``run`` is all that a pool process does for a client: it never asks whether the client is still
there, because ``client=sid`` ends it in the middle of anything when it is not.
"""

from __future__ import annotations

import base64
import collections.abc
import dataclasses
import io
import json
import time
import typing

import numpy as np
import PIL.Image

import shmsock

from .http import Response, stream_head, whole_answer

if typing.TYPE_CHECKING:
    from numpy.typing import NDArray

    from shmsock import SocketRef

Query = collections.abc.Mapping[str, list[str]]
Piece = collections.abc.Mapping[str, object]


@dataclasses.dataclass
class Job:
    """What was asked for; a subclass computes it.

    Attributes:
        stream: Whether the client wants to see progress, not the result alone.
    """

    kind: typing.ClassVar[str]
    stream: bool

    def pieces(self) -> int:
        """How many pieces there will be."""
        raise NotImplementedError

    def compute(self) -> collections.abc.Iterator[Piece]:
        """Each piece, as what the client is told of it."""
        raise NotImplementedError

    def result(self) -> Response:
        """After the last piece: all of it."""
        raise NotImplementedError


# -- a picture ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Mandelbrot(Job):
    """The Mandelbrot set around (x, y), ``scale`` wide, in tiles."""

    kind: typing.ClassVar[str] = "mandelbrot"
    width: int = 640
    height: int = 480
    iterations: int = 300
    x: float = -0.6
    y: float = 0.0
    scale: float = 3.2
    tile: int = 80

    def _tiles(self) -> list[tuple[int, int]]:
        return [
            (left, top)
            for top in range(0, self.height, self.tile)
            for left in range(0, self.width, self.tile)
        ]

    def pieces(self) -> int:
        """One a tile."""
        return len(self._tiles())

    def compute(self) -> collections.abc.Iterator[Piece]:
        """Tile by tile, from the upper left on."""
        self.pixels = np.zeros((self.height, self.width, 3), np.uint8)
        for left, top in self._tiles():
            right, bottom = min(left + self.tile, self.width), min(top + self.tile, self.height)
            part = self.pixels[top:bottom, left:right]
            part[:] = _coloured(self._escape_times(left, top, right, bottom), self.iterations)
            yield {
                "x": left,
                "y": top,
                "width": right - left,
                "height": bottom - top,
                "png": base64.b64encode(_png(part)).decode("ascii"),
            }

    def _escape_times(self, left: int, top: int, right: int, bottom: int) -> NDArray[np.int64]:
        """After how many steps each point has left the circle of radius 2."""
        pixel = self.scale / self.width
        real = self.x + (np.arange(left, right) - self.width / 2) * pixel
        imaginary = self.y - (np.arange(top, bottom) - self.height / 2) * pixel
        c = real[None, :] + 1j * imaginary[:, None]
        z = np.zeros_like(c)
        times = np.full(c.shape, self.iterations)
        inside = np.ones(c.shape, bool)
        for step in range(self.iterations):
            z[inside] = z[inside] ** 2 + c[inside]
            escaped = inside & (z.real**2 + z.imag**2 > 4)
            times[escaped] = step
            inside &= ~escaped
            if not inside.any():
                break
        return times

    def result(self) -> Response:
        """The whole picture."""
        return Response(200, _png(self.pixels), "image/png")


def _coloured(times: NDArray[np.int64], most: int) -> NDArray[np.uint8]:
    """Slow waves of red, green and blue; what never escapes is black."""
    phase = np.sqrt(times)[..., None] * 0.35 + np.array([0.0, 0.6, 1.2])
    colours: NDArray[np.uint8] = (127.5 + 127.5 * np.sin(phase)).astype(np.uint8)
    colours[times == most] = 0
    return colours


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=1)
    return file.getvalue()


# -- numbers --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Power(Job):
    """A random stochastic matrix times itself: where its Markov chain ends up."""

    kind: typing.ClassVar[str] = "power"
    size: int = 400
    exponent: int = 50
    seed: int = 1

    def pieces(self) -> int:
        """One a multiplication."""
        return self.exponent

    def compute(self) -> collections.abc.Iterator[Piece]:
        """One multiplication each."""
        matrix = np.random.default_rng(self.seed).random((self.size, self.size))
        matrix /= matrix.sum(axis=1, keepdims=True)
        power = np.eye(self.size)
        for step in range(1, self.exponent + 1):
            power = power @ matrix
            yield {"step": step, "trace": float(np.trace(power))}
        self.found = {"trace": float(np.trace(power)), "row": power[0, :10].tolist()}

    def result(self) -> Response:
        """Trace, and the first ten entries of the first row."""
        return Response(200, json.dumps(self.found).encode() + b"\n", "application/json")


# -- asking ---------------------------------------------------------------------------------------

KINDS: dict[str, type[Job]] = {kind.kind: kind for kind in (Mandelbrot, Power)}
LIMITS: dict[str, tuple[float, float]] = {
    "width": (1, 4096),
    "height": (1, 4096),
    "iterations": (1, 100_000),
    "tile": (8, 512),
    "x": (-4, 4),
    "y": (-4, 4),
    "scale": (1e-12, 16),
    "size": (1, 4000),
    "exponent": (1, 100_000),
    "seed": (0, 1 << 31),
}


def parse(query: Query) -> Job:
    """What a query asks for.

    Raises:
        ValueError: Nothing that there is; the text says what there is.
    """
    values = {name: texts[-1] for name, texts in query.items()}
    kind = KINDS.get(values.pop("kind", "mandelbrot"))
    if kind is None:
        raise ValueError(f"kind is one of {', '.join(KINDS)}")
    form = values.pop("format", "events")
    if form not in ("events", "result"):
        raise ValueError("format is events or result")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name in LIMITS}
    numbers: dict[str, typing.Any] = {}
    for name, text in values.items():
        if name not in fields:
            raise ValueError(f"{kind.kind} has no {name!r}; it has {', '.join(fields)}")
        low, high = LIMITS[name]
        try:
            numbers[name] = float(text) if name in ("x", "y", "scale") else int(text)
        except ValueError:
            raise ValueError(f"{name} is a number, not {text[:40]!r}") from None
        if not low <= numbers[name] <= high:
            raise ValueError(f"{name} is between {low:g} and {high:g}")
    return kind(stream=form == "events", **numbers)


# -- answering ------------------------------------------------------------------------------------


def run(sid: int, job: Job) -> None:
    """Compute a job and answer its client, piece by piece; in a pool process."""
    begun_s = time.monotonic()
    client = shmsock.current().address(sid)
    if client is None:
        return
    with client:
        count = job.pieces()
        if job.stream:
            head = stream_head("text/event-stream; charset=utf-8")
            about = {"id": shmsock.format_socket_id(sid), "kind": job.kind, "pieces": count}
            client.write(head, _event("start", about))
        for number, piece in enumerate(job.compute(), 1):
            client.user_data = f"running {job.kind} {number}/{count}".encode()
            if job.stream:
                client.wait_writable()  # as fast as the client reads, and no faster
                client.write(_event("piece", {"number": number, **piece}))
        answer = job.result()
        if job.stream:
            done: dict[str, object] = {"seconds": round(time.monotonic() - begun_s, 3)}
            if answer.content_type == "image/png":
                done["png"] = base64.b64encode(answer.body).decode("ascii")
            else:
                done["result"] = json.loads(answer.body)
            client.write(_event("done", done))
        else:
            client.write(whole_answer(answer))
        _end(client)


def _event(name: str, data: Piece) -> bytes:
    """One server-sent event (WHATWG HTML, 9.2)."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _end(client: SocketRef) -> None:
    """Close once everything is out, and be no job any more."""
    client.user_data = b""
    client.release_additional_reference()
