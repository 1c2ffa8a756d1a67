"""The hub, one connection at a time: its answers against those of redis-server 7.0."""

from __future__ import annotations

import collections.abc
import json
import re
import shutil
import socket
import subprocess

import pytest

import shmsock
from workers.hub_client import MAX_NAME_BYTES, ClientInfo, Reply
from workers.hub_protocol import Hub

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
        size = max(size, len(said) // 1000)  # enough pieces
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


# ------------------------------------------------------------------------------ several connections


def _message(*items: bytes, push: bool = False) -> bytes:
    body = b"".join(b"$%d\r\n%s\r\n" % (len(item), item) for item in items)
    return b"%s%d\r\n%s" % (b">" if push else b"*", len(items), body)


def test_a_message_reaches_subscribers_of_both_versions_and_their_patterns(
    connect: Connect,
) -> None:
    old, new, publisher = connect(), connect(), connect()
    new.ask(b"HELLO 3")
    old.ask(b"SUBSCRIBE news")
    new.ask(b"SUBSCRIBE news")
    new.ask(b"PSUBSCRIBE n*s other*")
    assert publisher.ask(b"PUBLISH news hi") == b":3\r\n"
    assert old.hear() == _message(b"message", b"news", b"hi")
    assert new.hear() == _message(b"message", b"news", b"hi", push=True) + _message(
        b"pmessage", b"n*s", b"news", b"hi", push=True
    )
    assert publisher.ask(b"PUBSUB NUMSUB news") == b"*2\r\n$4\r\nnews\r\n:2\r\n"
    assert publisher.ask(b"PUBSUB NUMPAT") == b":2\r\n"


def test_a_client_that_changes_its_version_gets_each_message_once_in_the_new_one(
    connect: Connect,
) -> None:
    client, publisher = connect(), connect()
    client.ask(b"HELLO 3")
    client.ask(b"SUBSCRIBE a")
    client.ask(b"PSUBSCRIBE a")
    client.ask(b"HELLO 2")
    assert publisher.ask(b"PUBLISH a x") == b":2\r\n"
    assert client.hear() == _message(b"message", b"a", b"x") + _message(
        b"pmessage", b"a", b"a", b"x"
    )


def test_what_ended_is_in_no_group(connect: Connect, runtime: shmsock.Runtime) -> None:
    client, publisher = connect(), connect()
    client.ask(b"SUBSCRIBE a b")
    client.ask(b"PSUBSCRIBE c*")
    client.close()
    assert publisher.ask(b"PUBLISH a x") == b":0\r\n"
    assert publisher.ask(b"PUBSUB CHANNELS") == b"*0\r\n"
    assert publisher.ask(b"PUBSUB NUMPAT") == b":0\r\n"
    assert runtime.groups.names() == []


def test_the_answers_to_a_pipeline_leave_in_one_write(
    connect: Connect, runtime: shmsock.Runtime
) -> None:
    client = connect()
    client.say(b"PING\r\nECHO a\r\nFOO\r\n*1\r\n$4\r\nPING\r\n")
    (row,) = [row for row in runtime.sockets() if row["id"] == client.sid]
    assert row["messages_out"] == 1
    assert client.hear().startswith(b"+PONG\r\n$1\r\na\r\n-ERR unknown")
    assert client.session.messages() == 4


def test_own_messages_come_behind_earlier_answers(connect: Connect) -> None:
    client = connect()
    client.ask(b"HELLO 3")
    client.say(b"PING a\r\nSUBSCRIBE x\r\nPING b\r\nPUBLISH x 1\r\nPING c\r\n")
    heard = client.hear()
    order = [
        heard.index(word)
        for word in (b"\na\r", b"subscribe", b"\nb\r", b"message", b":1\r\n$1\r\nc")
    ]
    assert order == sorted(order)


# ----------------------------------------------------------------------------------------- CLIENT


def _listed(answer: bytes) -> dict[int, dict[str, str]]:
    lines = re.findall(r"\bid=\d+ .*", answer.decode())
    listed = [dict(pair.split("=", 1) for pair in line.split(" ")) for line in lines]
    return {int(fields["id"]): fields for fields in listed}


def test_client_list_shows_clients_of_every_worker_and_nothing_else(
    connect: Connect, runtime: shmsock.Runtime
) -> None:
    other = Hub(runtime)  # another worker's, as far as user data goes
    here, there = connect(), Client(other)
    stranger, _keep = socket.socketpair()
    stranger_sid = runtime.create_socket(stranger, user_data=b"HTTP")
    there.ask(b"HELLO 3 SETNAME bob")
    there.ask(b"CLIENT SETINFO lib-name redis-py")
    there.ask(b"CLIENT SETINFO lib-ver 8.1")
    there.ask(b"SUBSCRIBE a b")
    there.ask(b"PSUBSCRIBE c")
    there.ask(b"SELECT 7")
    listed = _listed(here.ask(b"CLIENT LIST"))
    assert list(listed) == [here.sid, there.sid]
    assert stranger_sid not in listed
    bob = listed[there.sid]
    names = ("name", "resp", "lib-name", "lib-ver", "sub", "psub", "db", "cmd")
    assert [bob[name] for name in names] == ["bob", "3", "redis-py", "8.1", "2", "1", "7", "NULL"]
    assert "P" in bob["flags"]
    assert bob["owner"] == str(runtime.index)
    assert listed[here.sid]["cmd"] == "client|list"
    assert set(_listed(here.ask(b"CLIENT LIST TYPE pubsub"))) == {there.sid}
    assert set(_listed(here.ask(b"CLIENT LIST ID %d" % there.sid))) == {there.sid}
    assert set(_listed(there.ask(b"CLIENT INFO"))) == {there.sid}
    runtime.set_failed(stranger_sid)
    _keep.close()
    there.close()
    assert set(_listed(here.ask(b"CLIENT LIST"))) == {here.sid}


def test_client_id_is_the_socket_id(connect: Connect) -> None:
    client = connect()
    assert client.ask(b"CLIENT ID") == b":%d\r\n" % client.sid


def test_client_kill_fails_the_other_and_says_how_many(
    connect: Connect, runtime: shmsock.Runtime
) -> None:
    killer, victim = connect(), connect()
    assert killer.ask(b"CLIENT KILL ID %d" % victim.sid) == b":1\r\n"
    assert runtime.status(victim.sid) is not shmsock.Status.LIVE
    assert killer.ask(b"CLIENT KILL ID %d" % victim.sid) == b":0\r\n"
    assert set(_listed(killer.ask(b"CLIENT LIST"))) == {killer.sid}


def test_client_kill_of_oneself_is_answered_before_the_end(
    connect: Connect, runtime: shmsock.Runtime
) -> None:
    client = connect()
    assert not client.say(b"CLIENT KILL ID %d SKIPME no\r\nPING\r\n" % client.sid)
    assert client.hear() == b":1\r\n"
    assert runtime.status(client.sid) is shmsock.Status.LIVE


def test_client_kill_passes_over_the_caller(connect: Connect) -> None:
    killer, one, two = connect(), connect(), connect()
    two.ask(b"SUBSCRIBE a")
    assert killer.ask(b"CLIENT KILL TYPE pubsub") == b":1\r\n"
    assert set(_listed(killer.ask(b"CLIENT LIST"))) == {killer.sid, one.sid}
    assert killer.ask(b"CLIENT KILL TYPE normal") == b":1\r\n"
    assert killer.ask(b"CLIENT KILL TYPE normal MAXAGE 1000") == b":0\r\n"


def test_client_kill_by_address(connect: Connect, runtime: shmsock.Runtime) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    outside = socket.create_connection(listener.getsockname())
    inside, _ = listener.accept()
    listener.close()
    sid = runtime.create_socket(inside, user_data=ClientInfo().pack())
    host, port = outside.getsockname()
    killer = connect()
    assert killer.ask(b"CLIENT KILL %s:%d" % (host.encode(), port)) == b"+OK\r\n"
    assert runtime.status(sid) is not shmsock.Status.LIVE
    outside.close()


@pytest.mark.parametrize("line", [b"CLIENT SETINFO lib-foo x", b"CLIENT SETINFO lib-name 'a b'"])
def test_client_setinfo_refuses_what_redis_7_2_refuses(connect: Connect, line: bytes) -> None:
    assert connect().ask(line) in (
        b"-ERR Unrecognized option 'lib-foo'\r\n",
        b"-ERR lib-name cannot contain spaces, newlines or special characters.\r\n",
    )


def test_a_name_too_long_to_share_is_refused(connect: Connect) -> None:
    client = connect()
    assert client.ask(b"CLIENT SETNAME " + b"x" * MAX_NAME_BYTES) == b"+OK\r\n"
    assert client.ask(b"CLIENT SETNAME " + b"y" * (MAX_NAME_BYTES + 1)).startswith(b"-ERR ")
    assert client.ask(b"CLIENT GETNAME").endswith(b"x" * MAX_NAME_BYTES + b"\r\n")


def test_another_worker_goes_on_with_what_a_client_was(
    connect: Connect, runtime: shmsock.Runtime
) -> None:
    client, publisher = connect(), connect()
    client.ask(b"HELLO 3 SETNAME bob")
    client.ask(b"SUBSCRIBE a")
    client.ask(b"PSUBSCRIBE b*")
    with client.ref() as ref:
        client.session = Hub(runtime).open(ref)
    assert client.ask(b"CLIENT GETNAME") == b"$3\r\nbob\r\n"
    assert client.ask(b"UNSUBSCRIBE") == b">3\r\n$11\r\nunsubscribe\r\n$1\r\na\r\n:1\r\n"
    assert publisher.ask(b"PUBLISH bc x") == b":1\r\n"
    assert client.hear() == _message(b"pmessage", b"b*", b"bc", b"x", push=True)


def test_the_shared_part_of_a_client_survives_packing() -> None:
    info = ClientInfo(3, False, True, True, Reply.OFF, 15, 7, 8, b"name", b"lib", b"1.0")
    assert ClientInfo.unpack(info.pack()) == info
    assert ClientInfo.unpack(info.pack().rstrip(b"\0")) == info
    assert ClientInfo.unpack(ClientInfo().pack().rstrip(b"\0")) == ClientInfo()
    assert ClientInfo.unpack(b"") is None
    assert ClientInfo.unpack(b"HTTP/1.1") is None


def test_what_does_not_fit_is_left_out_and_the_name_never() -> None:
    name = b"n" * MAX_NAME_BYTES
    packed = ClientInfo(name=name, lib_name=b"lib", lib_ver=b"1").pack()
    assert len(packed) <= 64
    assert ClientInfo.unpack(packed) == ClientInfo(name=name)
    some = ClientInfo(name=b"n" * 40, lib_name=b"l" * 16, lib_ver=b"1")
    assert ClientInfo.unpack(some.pack()) == ClientInfo(name=b"n" * 40, lib_ver=b"1")
    assert ClientInfo.unpack(ClientInfo(sub=70_000).pack()) == ClientInfo(sub=65_535)


# ------------------------------------------------------------------------------------------ others


def test_info_has_the_sections_asked_for(connect: Connect) -> None:
    client = connect()
    client.ask(b"SUBSCRIBE a")
    asker = connect()
    text = asker.ask(b"INFO clients stats").decode()
    assert "# Clients\r\nconnected_clients:2\r\n" in text
    assert "pubsub_channels:1\r\n" in text
    assert "# Server" not in text
    assert "redis_version:7.0.0\r\n" in asker.ask(b"INFO").decode()


def test_command_docs_knows_every_command(connect: Connect) -> None:
    client = connect()
    client.ask(b"HELLO 3")
    count = int(client.ask(b"COMMAND COUNT")[1:])
    assert client.ask(b"COMMAND DOCS").startswith(b"%%%d\r\n" % count)
    assert client.ask(b"COMMAND").startswith(b"*%d\r\n" % count)
    assert client.ask(b"COMMAND LIST").startswith(b"*%d\r\n" % count)


@pytest.mark.parametrize("container", [b"CLIENT", b"COMMAND", b"CONFIG", b"PUBSUB"])
def test_help_lists_the_subcommands(connect: Connect, container: bytes) -> None:
    answer = connect().ask(container + b" HELP")
    assert b"+HELP\r\n" in answer
    assert answer.count(b"\r\n+") == int(answer[1 : answer.index(b"\r")])


def test_config_tells_the_limits_it_was_given(runtime: shmsock.Runtime) -> None:
    client = Client(Hub(runtime, max_connections=77))
    assert client.ask(b"CONFIG GET maxcl*") == b"*2\r\n$10\r\nmaxclients\r\n$2\r\n77\r\n"
    client.close()


def test_every_command_answers_arguments_of_any_kind(connect: Connect, hub: Hub) -> None:
    odd = [b"", b"\0", b"\xff\r\n", b"-1", b"9" * 30, b"*", b"[", b"\\", b"%s", b"x" * 300]
    client = connect()
    for name, spec in hub.commands.items():
        words = [[name], *[[name, sub] for sub in spec.subcommands]]
        for word in words:
            for count in range(5):
                for arg in odd:
                    parts = [*word, *[arg] * count]
                    data = b"*%d\r\n" % len(parts) + b"".join(
                        b"$%d\r\n%s\r\n" % (len(part), part) for part in parts
                    )
                    if not client.say(data):
                        client.hear()
                        client = connect()
                        continue
                    answer = client.hear()
                    assert answer or parts[:2] == [b"CLIENT", b"reply"]
                    client.say(redis_cases.RESET)
                    client.hear()


def test_a_pattern_too_long_to_look_at_is_refused_and_publish_goes_on(connect: Connect) -> None:
    client = connect()
    pattern = b"a" * 5000
    assert client.ask(b"PSUBSCRIBE " + pattern).startswith(b"-ERR a pattern has at most 4000 bytes")
    assert connect().ask(b"PUBLISH news hello") == b":0\r\n"
