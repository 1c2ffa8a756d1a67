"""The hub over a real server: what one worker's client says is true for another worker's.

What a single worker answers is compared with redis-server elsewhere (test_hub_unit); here every
pair of clients is on different workers.
"""

from __future__ import annotations

import collections.abc
import contextlib
import re
import socket
import typing

import pytest
import redis

import shmsock

from .helpers import WATCHDOG_S, wait_until
from .servers import Client, Push, ReplyError, Server, encode

PASSWORD = "sesame"


@pytest.fixture(scope="module")
def server() -> collections.abc.Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def guarded() -> collections.abc.Iterator[Server]:
    """With a password that the environment gives, and the option would show in ``ps``."""
    with Server(env={"SHMSOCK_PASSWORD": PASSWORD}) as running:
        yield running


@pytest.fixture
def pair(server: Server) -> collections.abc.Iterator[tuple[Client, Client]]:
    """Two clients that different workers own, and nobody else."""
    server.settle()
    clients = server.on_each_worker(server.client)
    with server.attach() as runtime:
        wait_until(lambda: runtime.connections() == len(clients), "the extra ones have gone")
    first, second = clients.values()
    yield first, second
    for client in clients.values():
        client.close()


def lines_of(answer: bytes) -> list[dict[str, str]]:
    """CLIENT LIST as dicts."""
    return [
        dict(word.split("=", 1) for word in line.split(" "))
        for line in answer.decode().splitlines()
    ]


# -- who is there -------------------------------------------------------------------------------


def test_client_id_is_the_socket_id(server: Server, pair: tuple[Client, Client]) -> None:
    ids = [client.id() for client in pair]
    rows = server.json("conns")
    assert sorted(ids) == sorted(row["id"] for row in rows)
    for client, sid in zip(pair, ids, strict=True):
        (row,) = [row for row in rows if row["id"] == sid]
        assert row["peer"] == "{}:{}".format(*client.sock.getsockname())
        hello = dict(zip(*[iter(client.call("HELLO"))] * 2, strict=True))
        assert hello[b"id"] == sid


def test_client_list_shows_the_clients_of_all_workers(
    server: Server, pair: tuple[Client, Client]
) -> None:
    first, second = pair
    assert first.call("CLIENT", "SETNAME", "one") == "OK"
    assert second.call("HELLO", "3", "SETNAME", "two")[b"proto"] == 3
    second.call("SUBSCRIBE", "a", "b")
    second.read()
    second.call("PSUBSCRIBE", "x*")
    owners = {row["id"]: row["owner"] for row in server.json("conns")}
    for asker in pair:
        found = {line["name"]: line for line in lines_of(asker.call("CLIENT", "LIST"))}
        assert set(found) == {"one", "two"}
        assert found["two"]["resp"] == "3"
        assert (found["two"]["sub"], found["two"]["psub"]) == ("2", "1")
        assert "P" in found["two"]["flags"]
        assert found["one"]["flags"] == "N"
        for line in found.values():
            assert owners[int(line["id"])] == int(line["owner"])
        kinds = lines_of(asker.call("CLIENT", "LIST", "TYPE", "pubsub"))
        assert [line["name"] for line in kinds] == ["two"]
        chosen = lines_of(asker.call("CLIENT", "LIST", "ID", found["one"]["id"], "12345"))
        assert [line["name"] for line in chosen] == ["one"]
        own = lines_of(asker.call("CLIENT", "INFO"))
        assert [int(line["id"]) for line in own] == [asker.id()]


@pytest.mark.parametrize("by", ["id", "addr", "old form", "name of nobody"])
def test_client_kill_ends_a_client_of_another_worker(
    server: Server, pair: tuple[Client, Client], by: str
) -> None:
    killer, victim = pair
    sid = victim.id()
    address = "{}:{}".format(*victim.sock.getsockname())
    if by == "name of nobody":
        assert killer.call("CLIENT", "KILL", "ID", str(sid + (1 << 40))) == 0
        assert killer.call("CLIENT", "KILL", "ADDR", "127.0.0.1:1") == 0
        assert "No such client" in killer.call("CLIENT", "KILL", "127.0.0.1:1")
        assert victim.call("PING") == "PONG"
        return
    with server.attach() as runtime:
        held = runtime.address(sid)
        assert held is not None
        with held:
            if by == "id":
                assert killer.call("CLIENT", "KILL", "ID", str(sid)) == 1
            elif by == "addr":
                assert killer.call("CLIENT", "KILL", "ADDR", address) == 1
            else:
                assert killer.call("CLIENT", "KILL", address) == "OK"
            assert held.failed
            assert shmsock.format_socket_id(killer.id()) in held.error[1]
    assert victim.ended() == b""
    assert killer.call("CLIENT", "KILL", "ID", str(sid)) == 0
    assert [int(line["id"]) for line in lines_of(killer.call("CLIENT", "LIST"))] == [killer.id()]


def test_client_kill_may_mean_oneself(pair: tuple[Client, Client]) -> None:
    first, second = pair
    assert first.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no") == 2
    assert first.ended() == b""
    assert second.ended() == b""


def test_client_reply_mutes_answers_but_no_messages(pair: tuple[Client, Client]) -> None:
    first, second = pair
    first.send("CLIENT", "REPLY", "OFF")
    first.send("PING")
    first.send("ECHO", "lost")
    assert first.call("CLIENT", "REPLY", "ON") == "OK"
    first.send("CLIENT", "REPLY", "SKIP")
    first.send("ECHO", "skipped")
    assert first.call("ECHO", "kept") == b"kept"
    first.send("CLIENT", "REPLY", "OFF")
    assert first.call("SUBSCRIBE", "c") == [b"subscribe", b"c", 1]
    assert second.call("PUBLISH", "c", "x") == 1
    assert first.read() == [b"message", b"c", b"x"]


# -- subscriptions ------------------------------------------------------------------------------


def test_pubsub_counts_subscribers_of_all_workers_and_drops_the_dead(
    server: Server, pair: tuple[Client, Client]
) -> None:
    first, second = pair
    extra = server.client()
    doomed = first.id()
    assert first.call("SUBSCRIBE", "news") == [b"subscribe", b"news", 1]
    assert second.call("HELLO", "3")[b"proto"] == 3
    assert second.call("SUBSCRIBE", "news") == [b"subscribe", b"news", 1]
    assert second.call("PSUBSCRIBE", "n*") == [b"psubscribe", b"n*", 2]
    assert extra.call("PSUBSCRIBE", "n*") == [b"psubscribe", b"n*", 1]
    assert extra.call("PSUBSCRIBE", "m*") == [b"psubscribe", b"m*", 2]
    for asker in server.on_each_worker(server.client).values():
        with asker:
            assert asker.call("PUBSUB", "CHANNELS") == [b"news"]
            assert asker.call("PUBSUB", "CHANNELS", "x*") == []
            assert asker.call("PUBSUB", "NUMSUB", "news", "old") == [b"news", 2, b"old", 0]
            assert asker.call("PUBSUB", "NUMPAT") == 2
    # second takes it twice, extra once, first once.
    with server.client() as publisher:
        assert publisher.call("PUBLISH", "news", "x") == 4
        extra.close()
        assert publisher.call("CLIENT", "KILL", "ID", str(doomed)) == 1
        assert first.ended() == b"*3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$1\r\nx\r\n"
        wait_until(lambda: publisher.call("PUBSUB", "NUMPAT") == 1, "the dead are dropped")
        assert publisher.call("PUBSUB", "NUMSUB", "news") == [b"news", 1]
        assert publisher.call("PUBLISH", "news", "y") == 2
    got = [second.read() for _ in range(4)]
    assert all(isinstance(push, Push) for push in got)
    assert [push[-1] for push in got] == [b"x", b"x", b"y", b"y"]


def test_hello_changes_the_form_of_messages_that_are_subscribed_to_already(
    pair: tuple[Client, Client],
) -> None:
    listener, publisher = pair
    assert listener.call("SUBSCRIBE", "c") == [b"subscribe", b"c", 1]
    assert listener.call("PSUBSCRIBE", "c*") == [b"psubscribe", b"c*", 2]
    assert publisher.call("PUBLISH", "c", "1") == 2
    assert listener.read() == [b"message", b"c", b"1"]
    assert listener.read() == [b"pmessage", b"c*", b"c", b"1"]
    # A RESP2 listener may say only a few things, and HELLO is none of them.
    assert "Can't execute 'hello'" in listener.call("HELLO", "3")
    assert listener.call("RESET") == "RESET"
    assert publisher.call("PUBLISH", "c", "nobody") == 0
    assert listener.call("HELLO", "3")[b"proto"] == 3
    assert isinstance(listener.call("SUBSCRIBE", "c"), Push)
    assert isinstance(listener.call("PSUBSCRIBE", "c*"), Push)
    assert publisher.call("PUBLISH", "c", "3") == 2
    assert [listener.read(), listener.read()] == [
        Push([b"message", b"c", b"3"]),
        Push([b"pmessage", b"c*", b"c", b"3"]),
    ]
    assert dict(zip(*[iter(listener.call("HELLO", "2"))] * 2, strict=True))[b"proto"] == 2
    assert publisher.call("PUBLISH", "c", "2") == 2
    last = [listener.read(), listener.read()]
    assert last == [[b"message", b"c", b"2"], [b"pmessage", b"c*", b"c", b"2"]]
    assert not any(isinstance(message, Push) for message in last)
    listener.send("UNSUBSCRIBE")
    listener.send("PUNSUBSCRIBE")
    assert listener.read() == [b"unsubscribe", b"c", 1]
    assert listener.read() == [b"punsubscribe", b"c*", 0]
    assert publisher.call("PUBLISH", "c", "nobody") == 0
    assert listener.call("PING") == "PONG"


def test_a_publisher_that_listens_gets_its_own_message_in_its_place(
    pair: tuple[Client, Client],
) -> None:
    client, _ = pair
    client.call("HELLO", "3")
    client.call("SUBSCRIBE", "c")
    client.raw(encode("PING") + encode("PUBLISH", "c", "x") + encode("PING"))
    got = [client.read() for _ in range(4)]
    assert [value for value in got if not isinstance(value, Push)] == ["PONG", 1, "PONG"]
    assert [value for value in got if isinstance(value, Push)] == [[b"message", b"c", b"x"]]


def test_channels_and_messages_are_any_bytes(pair: tuple[Client, Client]) -> None:
    listener, publisher = pair
    names = [b"", b"\0", b"\xff\r\n*3\r\n", b"n" * 600, b"n" * 599 + b"m", "ü".encode()]
    for number, name in enumerate(names):
        assert listener.call("SUBSCRIBE", name) == [b"subscribe", name, number + 1]
    for name in names:
        message = name[::-1] + bytes(range(256))
        assert publisher.call("PUBLISH", name, message) == 1
        assert listener.read() == [b"message", name, message]
    assert publisher.call("PUBSUB", "CHANNELS") == sorted(names)


def test_subscribing_to_the_same_twice_delivers_once(pair: tuple[Client, Client]) -> None:
    listener, publisher = pair
    listener.raw(encode("SUBSCRIBE", "c", "c"))
    assert [listener.read(), listener.read()] == [[b"subscribe", b"c", 1]] * 2
    assert publisher.call("PUBLISH", "c", "x") == 1
    assert listener.read() == [b"message", b"c", b"x"]
    assert listener.call("PING") == [b"pong", b""]


def test_redis_py_delivers_between_workers_by_patterns(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        old, new = (
            stack.enter_context(stack.enter_context(server.redis(protocol)).pubsub())
            for protocol in (2, 3)
        )
        old.psubscribe("n[ae]ws", "o?d")
        new.psubscribe("n[ae]ws")
        new.subscribe("news")
        for pubsub, count in ((old, 2), (new, 2)):
            for _ in range(count):
                assert "subscribe" in pubsub.get_message(timeout=WATCHDOG_S)["type"]
        for publisher in server.on_each_worker(server.client).values():
            with publisher:
                assert publisher.call("PUBLISH", "news", "x") == 3
                assert publisher.call("PUBLISH", "old", "y") == 1
                assert publisher.call("PUBLISH", "nows", "z") == 0
        got = [old.get_message(timeout=WATCHDOG_S) for _ in range(4)]
        assert [(m["pattern"], m["data"]) for m in got] == [
            (b"n[ae]ws", b"x"),
            (b"o?d", b"y"),
        ] * 2
        kinds = [new.get_message(timeout=WATCHDOG_S)["type"] for _ in range(4)]
        assert sorted(kinds) == ["message", "message", "pmessage", "pmessage"]
        assert old.get_message() is None


# -- passwords ----------------------------------------------------------------------------------


def test_without_the_password_nothing_is_done(guarded: Server) -> None:
    for command in (["PING"], ["PUBLISH", "a", "b"], ["CLIENT", "LIST"], ["SUBSCRIBE", "a"]):
        with guarded.client() as client:
            assert client.call(*command).startswith("-NOAUTH")
            assert client.call("AUTH", "wrong").startswith("-WRONGPASS")
            assert client.call("HELLO", "3").startswith("-NOAUTH")
            assert client.call("AUTH", PASSWORD) == "OK"
            assert client.call("PING") == "PONG"
            assert client.call("RESET") == "RESET"
            assert client.call("PING").startswith("-NOAUTH")
            assert client.call("QUIT") == "OK"
            assert client.ended() == b""


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py_authenticates(guarded: Server, protocol: int) -> None:
    with guarded.redis(protocol, password=PASSWORD) as client:
        assert client.ping()
        assert client.echo("x") == b"x"
    with (
        guarded.redis(protocol, password="other") as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()
    with guarded.redis(protocol) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_the_password_is_in_no_command_line(guarded: Server) -> None:
    for pid in guarded.pids():
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            assert PASSWORD.encode() not in file.read()


def test_the_option_sets_the_password_too() -> None:
    with Server("--password", PASSWORD, workers=1) as server, server.client() as client:
        assert client.call("PING").startswith("-NOAUTH")
        assert client.call("AUTH", "default", PASSWORD) == "OK"
        assert client.call("PING") == "PONG"
        for pid in server.worker_pids().values():
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                assert PASSWORD.encode() not in file.read()


def test_auth_without_a_password_is_refused_as_in_redis(pair: tuple[Client, Client]) -> None:
    client, _ = pair
    assert "without any password configured" in client.call("AUTH", "x")
    assert client.call("PING") == "PONG"


# -- leaving ------------------------------------------------------------------------------------


def test_quit_answers_and_then_ends(server: Server, pair: tuple[Client, Client]) -> None:
    client, other = pair
    client.raw(encode("ECHO", "x" * 100_000) + encode("QUIT") + encode("PING"))
    assert client.read() == b"x" * 100_000
    assert client.read() == "OK"
    assert client.ended() == b""
    with server.attach() as runtime:
        wait_until(lambda: runtime.connections() == 1, "its slot comes back")
    assert other.call("PING") == "PONG"


def test_reset_makes_a_client_as_new(pair: tuple[Client, Client]) -> None:
    client, other = pair
    client.call("HELLO", "3", "SETNAME", "me")
    client.call("SUBSCRIBE", "c")
    client.call("SELECT", "3")
    assert client.call("RESET") == "RESET"
    assert other.call("PUBLISH", "c", "x") == 0
    (line,) = lines_of(client.call("CLIENT", "INFO"))
    assert (line["resp"], line["name"], line["db"], line["sub"]) == ("2", "", "0", "0")


def test_a_client_that_shuts_down_its_side_still_gets_its_answers(
    pair: tuple[Client, Client],
) -> None:
    client, _ = pair
    client.raw(b"".join(encode("ECHO", str(number)) for number in range(1000)))
    client.sock.shutdown(socket.SHUT_WR)
    expected = b"".join(b"$%d\r\n%d\r\n" % (len(str(n)), n) for n in range(1000))
    assert client.ended() == expected


def test_info_and_config_tell_of_the_whole_runtime(
    server: Server, pair: tuple[Client, Client]
) -> None:
    for client in pair:
        text = client.call("INFO").decode()
        fields = dict(re.findall(r"^(\w+):(.*)\r$", text, re.M))
        assert fields["connected_clients"] == "2"
        assert fields["worker_clients"] == "1"
        assert fields["shmsock_name"] == server.name
        assert int(fields["process_id"]) in server.worker_pids().values()
        config = client.call("CONFIG", "GET", "max*")
        assert config == [b"maxclients", b"65536"]


def test_an_error_of_one_client_says_nothing_to_another(pair: tuple[Client, Client]) -> None:
    first, second = pair
    error: typing.Any = first.call("SET", "a", "b")
    assert isinstance(error, ReplyError)
    assert error.startswith("-ERR unknown command 'SET', with args beginning with: 'a' 'b'")
    assert second.call("PING") == "PONG"
    assert second.silent()
    assert first.silent()
