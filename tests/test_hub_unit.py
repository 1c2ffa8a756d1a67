"""The hub, one connection at a time: its answers against those of redis-server 7.0."""

from __future__ import annotations

import collections.abc
import json
import shutil
import socket
import subprocess

import pytest

import shmsock
from workers.hub import Hub
from workers.hub_client import MAX_NAME_BYTES, ClientInfo, Reply

from . import redis_cases


class Client:
    """A connection of a hub, without the messenger between: what is said is handled at once."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        inside, self._outside = socket.socketpair()
        self._outside.setblocking(False)
        self.sid = hub.runtime.create_socket(inside)
        with self.ref() as ref:
            self.session = hub.open(ref)

    def ref(self) -> shmsock.SocketRef:
        ref = self._hub.runtime.address(self.sid)
        assert ref is not None
        return ref

    def say(self, *chunks: bytes) -> bool:
        """Whether the hub keeps the connection open."""
        with self.ref() as ref:
            return all([self.session.receive(ref, chunk) for chunk in chunks])

    def hear(self) -> bytes:
        """Everything written to it so far."""
        with self.ref() as ref:
            heard = b""
            while True:
                try:
                    heard += self._outside.recv(1 << 20)
                except BlockingIOError:
                    if not ref.unwritten_bytes():
                        return heard

    def ask(self, line: bytes) -> bytes:
        assert self.say(line + b"\r\n")
        return self.hear()

    def close(self) -> None:
        self._outside.close()
        self._hub.runtime.set_failed(self.sid)
        self.session.end(self.sid)


Connect = collections.abc.Callable[[], Client]


@pytest.fixture
def hub(runtime: shmsock.Runtime) -> Hub:
    return Hub(runtime)


@pytest.fixture
def connect(hub: Hub) -> collections.abc.Iterator[Connect]:
    made: list[Client] = []

    def one() -> Client:
        made.append(Client(hub))
        return made[-1]

    yield one
    for client in made:
        client.close()


# ------------------------------------------------------------------------------------ redis-server


def _answers(hub: Hub, said: bytes, size: int) -> tuple[bytes, bool]:
    client = Client(hub)
    try:
        chunks = [said[at : at + size] for at in range(0, len(said), size)]
        stays = client.say(*chunks[:1])
        for chunk in chunks[1:]:
            stays = stays and client.say(chunk)
        heard = client.hear()
        if stays and client.session.idle():
            stays = client.say(redis_cases.RESET) and client.hear() == b"+RESET\r\n"
        else:
            stays = False
        return redis_cases.normal(heard), stays
    finally:
        client.close()


@pytest.mark.parametrize("size", [1 << 20, 7, 1], ids=["whole", "in sevens", "byte by byte"])
@pytest.mark.parametrize("kind", ["open", "protected"])
def test_the_hub_answers_as_redis_server_does(
    runtime: shmsock.Runtime, kind: str, size: int
) -> None:
    recorded = json.loads(redis_cases.RECORDING.read_text())[kind]
    cases = {
        "open": redis_cases.OPEN_CASES + redis_cases.OPEN_CASES_WHOLE,
        "protected": redis_cases.PROTECTED_CASES,
    }[kind]
    assert len(recorded) == len(cases)
    hub = Hub(runtime, password=redis_cases.PASSWORD if kind == "protected" else None)
    differ = []
    for said, (answer, stays) in zip(cases, recorded, strict=True):
        if said in redis_cases.OPEN_CASES_WHOLE and size < len(said):
            continue
        ours = _answers(hub, said, size)
        if ours != (answer.encode("latin-1"), stays):
            differ.append((said[:200], ours, (answer, stays)))
    assert differ == []


def _has_redis_7_0() -> bool:
    program = shutil.which("redis-server")
    return program is not None and b"v=7.0." in subprocess.check_output([program, "--version"])


if _has_redis_7_0():

    def test_the_recording_is_what_redis_server_says() -> None:
        recorded = json.loads(redis_cases.RECORDING.read_text())
        assert json.loads(json.dumps(redis_cases.record())) == recorded
