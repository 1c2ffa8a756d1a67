"""The compute service, over the wire: what is streamed, who hears it, what ends with a client."""

from __future__ import annotations

import base64
import collections.abc
import http.client
import io
import json
import os
import select
import signal
import socket
import typing

import numpy as np
import PIL.Image
import pytest

import shmsock
from workers import compute_jobs

from .helpers import read_to_end, wait_until
from .servers import Server

LONG = "kind=power&size=100&exponent=100000"  # minutes
Event = tuple[str, dict[str, typing.Any]]


@pytest.fixture(scope="module")
def server() -> collections.abc.Iterator[Server]:
    with Server("workers.compute:app", "--pool", "1") as made:
        yield made


def request(server: Server, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def jobs(server: Server) -> list[dict[str, typing.Any]]:
    status, body = request(server, "GET", "/jobs")
    assert status == 200
    found: list[dict[str, typing.Any]] = json.loads(body)
    return found


def start(server: Server, query: str) -> socket.socket:
    client = server.connect()
    client.sendall(f"POST /jobs?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return client


def running(server: Server, kind: str = "power") -> dict[str, typing.Any]:
    """Wait until a job has got somewhere."""
    found: list[dict[str, typing.Any]] = []

    def look() -> bool:
        found[:] = [job for job in jobs(server) if job["kind"] == kind and job["done"]]
        return bool(found)

    wait_until(look, "a job runs")
    return found[0]


def events(text: bytes) -> list[Event]:
    head, _, body = text.partition(b"\r\n\r\n")
    assert b"content-type: text/event-stream" in head.lower()
    assert b"content-length" not in head.lower()
    found = []
    for block in body.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def pixels(png: bytes) -> np.ndarray[typing.Any, typing.Any]:
    return np.asarray(PIL.Image.open(io.BytesIO(png)))


# -- what is answered -----------------------------------------------------------------------------


def test_tiles_that_are_streamed_make_the_picture_that_ends_the_stream(server: Server) -> None:
    with start(server, "width=100&height=70&iterations=50&tile=32") as client:
        (first, *pieces, last) = events(read_to_end(client))
    assert first[0] == "start"
    assert first[1]["pieces"] == len(pieces) == 12
    whole = np.zeros((70, 100, 3), "u1")
    for number, (name, piece) in enumerate(pieces, 1):
        assert (name, piece["number"]) == ("piece", number)
        tile = pixels(base64.b64decode(piece["png"]))
        assert tile.shape == (piece["height"], piece["width"], 3)
        whole[piece["y"] :, piece["x"] :][: piece["height"], : piece["width"]] = tile
    assert last[0] == "done"
    picture = pixels(base64.b64decode(last[1]["png"]))
    assert np.array_equal(picture, whole)
    # The origin is in the set, and (-2.2, 0) is not.
    assert picture[35, 69].tolist() == [0, 0, 0]
    assert picture[35, 0].tolist() != [0, 0, 0]
    status, png = request(server, "POST", "/jobs?width=100&height=70&iterations=50&format=result")
    assert status == 200
    assert np.array_equal(pixels(png), whole)


def test_numbers_are_those_of_numpy(server: Server) -> None:
    status, body = request(server, "POST", "/jobs?kind=power&size=20&exponent=3&format=result")
    matrix = np.random.default_rng(1).random((20, 20))
    matrix /= matrix.sum(axis=1, keepdims=True)
    expected = matrix @ matrix @ matrix
    assert status == 200
    found = json.loads(body)
    assert found["trace"] == pytest.approx(np.trace(expected))
    assert found["row"] == pytest.approx(expected[0, :10])
    with start(server, "kind=power&size=20&exponent=3") as client:
        steps = [data.get("step") for name, data in events(read_to_end(client)) if name == "piece"]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("kind=nothing", "kind is one of mandelbrot, power"),
        ("width=wide", "width is a number, not 'wide'"),
        ("width=0", "width is between 1 and 4096"),
        ("height=100000", "height is between 1 and 4096"),
        ("size=3", "mandelbrot has no 'size'; it has "),
        ("scale=nan", "scale is between"),
        ("stream=1", "mandelbrot has no 'stream'"),
        ("format=gif", "format is events or result"),
    ],
)
def test_a_job_that_cannot_be_is_refused_and_says_why(
    server: Server, query: str, says: str
) -> None:
    status, body = request(server, "POST", f"/jobs?{query}")
    assert status == 400
    assert body.decode().startswith(says)
    assert jobs(server) == []


def test_other_requests_are_answered_plainly_and_other_sites_refused(server: Server) -> None:
    assert request(server, "GET", "/nowhere")[0] == 404
    assert request(server, "DELETE", "/jobs/nonsense")[0] == 404
    assert request(server, "DELETE", "/jobs/sk-2-1")[0] == 404
    status, body = request(server, "POST", "/jobs", Origin="http://evil.example")
    assert (status, body) == (403, b"this came from a web page of another site\n")
    assert jobs(server) == []
    status, page = request(server, "GET", "/")
    assert status == 200
    assert page.startswith(b"<!doctype html>")


def test_without_a_pool_jobs_are_refused_and_say_how_to_have_one() -> None:
    with Server("workers.compute:app", workers=1) as server:
        assert request(server, "POST", "/jobs") == (
            503,
            b"nobody computes here: start the server with --pool 2\n",
        )


# -- what ends ------------------------------------------------------------------------------------


def test_every_worker_lists_a_job_and_any_of_them_ends_it(server: Server) -> None:
    with start(server, LONG) as client:
        job = running(server)
        assert job["of"] == 100_000
        host, port = client.getsockname()
        assert job["peer"] == f"{host}:{port}"
        # More requests than there are workers: each on a connection of its own.
        assert {tuple(j["id"] for j in jobs(server)) for _ in range(4)} == {(job["id"],)}
        assert request(server, "DELETE", f"/jobs/{job['id']}") == (200, b"cancelled\n")
        text = read_to_end(client)
        assert b"event: start" in text
        assert b"event: done" not in text
    assert request(server, "DELETE", f"/jobs/{job['id']}")[0] == 404
    assert jobs(server) == []


@pytest.mark.parametrize("leaves", ["closes", "half-closes", "resets"])
def test_a_client_that_leaves_frees_the_processor_for_the_next(server: Server, leaves: str) -> None:
    with start(server, LONG) as client:
        running(server)
        with start(server, "kind=power&size=20&exponent=2&format=result") as queued:
            # Perhaps by the other worker, whose pool is idle: then it is answered. WHY NOT recv:
            # who waits in it before the request was seen, and is queued then, waits for ever.
            wait_until(lambda: len(jobs(server)) == 2 or answered(queued), "it is queued")
            if leaves == "half-closes":
                client.shutdown(socket.SHUT_WR)
            else:
                if leaves == "resets":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
            # A worker has one pool process: if it is the same worker's, it had to let go of the
            # first.
            assert b"trace" in read_to_end(queued)
        wait_until(lambda: jobs(server) == [], "nothing is computed")
    with server.attach() as runtime:
        pool = [row.pid for row in runtime.processes() if row.role not in ("supervisor", "worker")]
        pool.remove(os.getpid())
    assert pool
    wait_until(lambda: all(state(pid) == "S" for pid in pool for _ in range(50)), "the pool rests")


def answered(client: socket.socket) -> bool:
    return bool(select.select([client], [], [], 0)[0])


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_pool_process_that_is_killed_ends_its_client_and_nobody_else(server: Server) -> None:
    with start(server, LONG) as client:
        job = running(server)
        with server.attach() as runtime:
            attached = runtime.attached(shmsock.parse_socket_id(job["id"]))
            rows = [row for row in runtime.processes() if row.index in attached]
        (pid,) = [row.pid for row in rows if row.role not in ("supervisor", "worker")]
        os.kill(pid, signal.SIGKILL)
        assert b"event: done" not in read_to_end(client)
    assert job["id"] not in {j["id"] for j in jobs(server)}
    status, _ = request(server, "POST", "/jobs?kind=power&size=5&exponent=2&format=result")
    assert status == 200


def test_a_slow_reader_holds_its_job_back_and_costs_no_memory(server: Server) -> None:
    client = server.connect(receive_bytes=4096)
    query = "width=4096&height=4096&iterations=2&tile=64"
    client.sendall(f"POST /jobs?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    before = running(server, "mandelbrot")

    def stands() -> bool:
        nonlocal before
        last, before = before, running(server, "mandelbrot")
        return bool(last["done"] == before["done"])

    # It has stopped where the kernel's buffers are full, far from the last of 4,096 tiles.
    for _ in range(5):
        wait_until(stands, "it waits for its reader")
    assert before["done"] < before["of"]
    client.close()
    wait_until(lambda: jobs(server) == [], "it ends with its reader")


def test_stopping_the_server_ends_its_pool() -> None:
    with Server("workers.compute:app", "--pool", "1", "--graceful-timeout", "0.2") as server:
        client = start(server, LONG)
        running(server)
        server.stop()
        client.close()


# -- parsing --------------------------------------------------------------------------------------


def test_a_repeated_field_counts_by_its_last_value() -> None:
    job: typing.Any = compute_jobs.parse({"width": ["5", "6"], "x": ["-1.5"], "format": ["result"]})
    assert (job.kind, job.width, job.x, job.stream) == ("mandelbrot", 6, -1.5, False)
