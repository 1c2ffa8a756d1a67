"""The whole server with clients that nobody here wrote: redis-py, redis-cli, redis-benchmark, curl.

DESIGN's promises as a user meets them: connections are spread, every worker answers for all, a
killed worker takes its own connections with it and nothing else.
"""

from __future__ import annotations

import collections.abc
import concurrent.futures
import contextlib
import errno
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import typing

import pytest
import redis

import shmsock

from .helpers import WATCHDOG_S, Peer, wait_until
from .servers import Client, Push, Server, encode


@pytest.fixture(scope="module")
def server() -> collections.abc.Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(autouse=True)
def many_files() -> collections.abc.Iterator[None]:
    """A thousand clients in this process need a thousand descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program}")


def peer_name(sock: socket.socket) -> str:
    """How the server calls the other end of our connection."""
    host, port = sock.getsockname()
    return f"{host}:{port}"


def rows_by_peer(server: Server) -> dict[str, dict[str, typing.Any]]:
    return {row["peer"]: row for row in server.json("conns")}


# -- placement ----------------------------------------------------------------------------------


def test_connections_are_spread_evenly_over_the_workers(server: Server) -> None:
    server.settle()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(60)]
        ids = {client.id() for client in clients}
        with server.attach() as runtime:
            rows = runtime.sockets()
            owners = [int(row["owner"]) for row in rows if int(row["id"]) in ids]
        counts = {owner: owners.count(owner) for owner in owners}
    assert len(ids) == 60
    assert sorted(counts) == sorted(server.worker_pids())
    assert max(counts.values()) - min(counts.values()) <= 2


def test_a_worker_that_has_more_gets_no_new_ones(server: Server) -> None:
    server.settle()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(20)]
        owners = {row["id"]: row["owner"] for row in server.json("conns")}
        one = min(owners.values())
        for client in clients:
            if owners[client.id()] == one:
                client.close()
        left = [sid for sid, owner in owners.items() if owner != one]
        with server.attach() as runtime:
            wait_until(lambda: runtime.connections() == len(left), "the others are gone")
        # The count is a hundredth of a second old at most; these come one by one.
        fresh = []
        for _ in left:
            fresh.append(stack.enter_context(server.client()))
            fresh[-1].id()
        owners = {row["id"]: row["owner"] for row in server.json("conns")}
        assert sum(owners[client.id()] == one for client in fresh) >= len(left) - 2


# -- the pages ----------------------------------------------------------------------------------


class Http:
    """A kept-alive HTTP connection, so it stays with one worker."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._file = sock.makefile("rb")

    def ask(self, method: str, path: str, *headers: str) -> tuple[int, bytes]:
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
        self.sock.sendall("\r\n".join(lines).encode())
        status = int(self._file.readline().split()[1])
        length = 0
        while (line := self._file.readline()) != b"\r\n":
            assert line, "the head was cut"
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return status, self._file.read(length)

    def json(self, path: str) -> typing.Any:
        status, body = self.ask("GET", f"{path}?format=json")
        assert status == 200
        return json.loads(body)

    def worker(self) -> int:
        return int(self.json("/status")["answered_by"])

    def close(self) -> None:
        self._file.close()
        self.sock.close()


@contextlib.contextmanager
def pages_of_each_worker(server: Server) -> collections.abc.Iterator[dict[int, Http]]:
    found: dict[int, Http] = {}
    try:
        wanted = set(server.worker_pids())
        extra = []
        while set(found) != wanted:
            http = Http(server.connect())
            if (index := http.worker()) in found:
                extra.append(http)
            else:
                found[index] = http
        for http in extra:
            http.close()
        yield found
    finally:
        for http in found.values():
            http.close()


def test_the_pages_are_the_same_whichever_worker_answers(server: Server) -> None:
    server.settle()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(10)]
        for number, client in enumerate(clients):
            assert client.call("CLIENT", "SETNAME", f"c{number}") == "OK"
        ids = {client.id() for client in clients}
        seen = []
        with pages_of_each_worker(server) as pages:
            stack.callback(lambda: None)
            with server.attach() as runtime:
                wait_until(lambda: runtime.connections() == len(ids) + len(pages), "extra ones end")
            for http in pages.values():
                keys = ("id", "text", "state", "owner", "pid", "peer", "kind", "name")
                rows = http.json("/connections")
                seen.append([tuple(row[key] for key in keys) for row in rows])
                sockets = http.json("/sockets")["sockets"]
                connected = [row["id"] for row in sockets if row["kind"] != "listener"]
                assert connected == [row["id"] for row in rows]
                one = http.json(f"/sockets/{clients[0].id()}")
                assert one["name"] == "c0"
                assert http.ask("GET", "/health") == (200, b"ok\n")
                counts = http.json("/status")["counts"]
                assert counts["connections"] == len(rows) == len(ids) + len(pages)
                status, metrics = http.ask("GET", "/metrics")
                assert status == 200
                assert b"shmsock_connections %d.0\n" % len(rows) in metrics
        assert seen[0] == seen[1]
        assert ids < {row[0] for row in seen[0]}


def test_a_page_ends_a_connection_of_another_worker(server: Server) -> None:
    with pages_of_each_worker(server) as pages:
        clients = server.on_each_worker(server.client)
        try:
            for index, client in clients.items():
                sid = client.id()
                other = next(http for worker, http in pages.items() if worker != index)
                status, body = other.ask("POST", f"/sockets/{sid}/fail?reason=enough")
                assert (status, b"enough" in body) == (200, True)
                assert client.ended() == b""
                assert other.ask("POST", f"/sockets/{sid}/fail")[0] in (404, 409)
        finally:
            for client in clients.values():
                client.close()


def own_address() -> str | None:
    """An address of this machine that is not loopback; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address = str(sock.getsockname()[0])
    return None if address.startswith("127.") else address


@pytest.mark.skipif(own_address() is None, reason="needs an address that is not loopback")
@pytest.mark.parametrize(("flags", "expected"), [((), 403), (("--pages-remote",), 200)])
def test_pages_are_for_loopback_alone_unless_told_otherwise(
    flags: tuple[str, ...], expected: int
) -> None:
    address = own_address()
    assert address is not None
    with Server(*flags, bind=["0.0.0.0:0"]) as server:
        for page in ("/", "/status", "/sockets", "/connections", "/metrics", "/health", "/nothing"):
            wanted = 404 if expected == 200 and page == "/nothing" else expected
            with contextlib.closing(Http(socket.create_connection((address, server.port)))) as http:
                assert http.ask("GET", page)[0] == wanted, page
        with contextlib.closing(Http(server.connect())) as http:
            assert http.ask("GET", "/status")[0] == 200
        with Client(socket.create_connection((address, server.port))) as client:
            client.sock.settimeout(WATCHDOG_S)
            sid = client.id()
            with contextlib.closing(Http(socket.create_connection((address, server.port)))) as http:
                assert http.ask("POST", f"/sockets/{sid}/fail")[0] == expected
            if expected == 403:
                assert client.call("PING") == "PONG"
            else:
                assert client.ended() == b""


# -- a worker is killed -------------------------------------------------------------------------


def test_a_killed_worker_takes_only_its_own_connections_with_it() -> None:
    flags = ("--on-owner-death", "fail")
    with Server(*flags, workers=3) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(45)]
        owner = {row["id"]: row["owner"] for row in server.json("conns")}
        ids = [client.id() for client in clients]
        before = server.worker_pids()
        victim = owner[ids[0]]
        dying = [client for client, sid in zip(clients, ids, strict=True) if owner[sid] == victim]
        living = [client for client, sid in zip(clients, ids, strict=True) if owner[sid] != victim]
        assert dying
        assert living
        for client in living:
            assert client.call("SUBSCRIBE", "news") == [b"subscribe", b"news", 1]

        holder = stack.enter_context(Peer(server.name))
        holder.run(f"refs = [rt.address(sid) for sid in {ids}]")
        os.kill(before[victim], signal.SIGKILL)

        for client in dying:
            assert client.ended() == b""
        holder.run("import select")
        for number, sid in enumerate(ids):
            if owner[sid] == victim:
                failed = f"refs[{number}].failed"
                wait_until(functools.partial(holder.ask, failed), "failed everywhere")
                code, text = holder.ask(f"refs[{number}].error")
                assert code == errno.EOWNERDEAD
                assert "owner" in text
            else:
                assert not holder.ask(f"refs[{number}].failed")
        wait_until(
            lambda: (
                len(server.worker_pids()) == 3
                and before[victim] not in server.worker_pids().values()
            ),
            "a new worker takes its place",
        )
        with server.client() as publisher:
            assert publisher.call("PUBLISH", "news", "x") == len(living)
        for client in living:
            assert client.read() == [b"message", b"news", b"x"]

        holder.run("[ref.close() for ref in refs]; refs.clear()")
        with server.attach() as runtime:
            wait_until(lambda: runtime.connections() == len(living), "every reference comes back")
            assert runtime.audit() == []
        done = server.run("doctor")
        assert done.returncode == 0, done.stdout
        # The newcomer owns the fewest, so what comes next is its own.
        with server.client() as fresh:
            row = next(row for row in server.json("conns") if row["id"] == fresh.id())
            assert row["pid"] not in before.values()


def test_half_a_message_of_a_killed_worker_ends_that_connection_alone() -> None:
    """The writer dies in mid-message: the peer cannot be told where the next one begins."""
    with Server("--on-owner-death", "fail") as server, contextlib.ExitStack() as stack:
        workers = server.on_each_worker(server.client)
        for client in workers.values():
            stack.enter_context(client)
        (victim, publisher), (_, witness) = workers.items()
        # Of the other worker, and so slow that the rest of a message waits in the victim.
        while True:
            slow = stack.enter_context(Client(server.connect(receive_bytes=4096)))
            sid = slow.id()
            if next(row["owner"] for row in server.json("conns") if row["id"] == sid) != victim:
                break
        assert slow.call("SUBSCRIBE", "big") == [b"subscribe", b"big", 1]
        assert publisher.call("PUBLISH", "big", b"x" * (8 << 20)) == 1
        with server.attach() as runtime:
            held = runtime.address(sid)
            assert held is not None
            with held:
                assert victim in runtime.attached(sid)
                os.kill(server.worker_pids()[victim], signal.SIGKILL)
                wait_until(lambda: held.failed, "the half message fails its socket")
                assert held.error[0] == errno.EPIPE
        data = slow.ended()
        assert len(data) < 8 << 20
        assert witness.call("PING") == "PONG"
        assert publisher.ended() == b""
        wait_until(lambda: len(server.worker_pids()) == 2, "a new worker")
        assert server.run("doctor").returncode == 0


_DIE_INSIDE = """
    import os, signal
    if shmsock.ENGINE == "c":
        import shmsock._engine_c
        shmsock._engine_c.arm("token_taken", signal.SIGKILL)
    semaphores = rt._engine.semaphores
    class Token:
        def __init__(self, inner): self.inner = inner
        def acquire(self, timeout=None):
            self.inner.acquire(timeout)
            os.kill(os.getpid(), signal.SIGKILL)
    get = semaphores.get
    semaphores.get = lambda *place: Token(get(*place))
"""


def test_a_process_killed_inside_a_stripe_does_not_block_the_server() -> None:
    with Server() as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(20)]
        ids = [client.id() for client in clients]
        for sid in ids[:3]:
            with Peer(server.name) as doomed:
                doomed.run(_DIE_INSIDE)
                doomed.start(f"rt.address({sid})")
                assert doomed.process.wait(WATCHDOG_S) == -signal.SIGKILL
        # Each stripe is needed: to attach for PING, to end the old ones, to create new ones.
        for client in clients:
            assert client.call("PING") == "PONG"
            assert client.call("SUBSCRIBE", "c")[2] == 1
        for _ in range(200):
            with server.client() as fresh:
                assert fresh.call("PING") == "PONG"
        with server.client() as killer:
            for sid in ids:
                assert killer.call("CLIENT", "KILL", "ID", str(sid)) == 1
        for client in clients:
            assert client.ended() == b""
        server.settle()
        done = server.run("doctor")
        assert done.returncode == 0, done.stdout
        assert "ERROR" not in server.log()


# -- redis-py -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_subscribers_get_every_message_in_order(server: Server) -> None:
    """RESP2 and RESP3 in turn, channels and patterns, published from every worker."""
    count, rounds = 1000, 10
    with contextlib.ExitStack() as stack:
        clients = {p: stack.enter_context(server.redis(p, max_connections=count)) for p in (2, 3)}
        listeners = []
        for number in range(count):
            pubsub = stack.enter_context(clients[2 + number % 2].pubsub())
            if number % 4 < 2:
                pubsub.subscribe("news")
            else:
                pubsub.psubscribe("n?w*")
            listeners.append(pubsub)
        for pubsub in listeners:
            assert pubsub.get_message(timeout=WATCHDOG_S)["type"] in ("subscribe", "psubscribe")
        publishers = server.on_each_worker(server.client)
        for client in publishers.values():
            stack.enter_context(client)
        owners = {row["owner"] for row in server.json("conns") if row["name"] == ""}
        assert owners == set(publishers)
        sent = []
        for number in range(rounds):
            for index, client in publishers.items():
                text = f"{index}:{number}"
                assert client.call("PUBLISH", "news", text) == count
                sent.append(text.encode())
        for number, pubsub in enumerate(listeners):
            got = [pubsub.get_message(timeout=WATCHDOG_S) for _ in sent]
            assert [message["data"] for message in got] == sent
            kind = "message" if number % 4 < 2 else "pmessage"
            assert {message["type"] for message in got} == {kind}
            assert {message["channel"] for message in got} == {b"news"}
        numsub = clients[2].pubsub_numsub("news")
        assert (numsub, clients[3].pubsub_numpat()) == ([(b"news", count // 2)], 1)
    with server.redis() as after:
        wait_until(lambda: after.pubsub_channels() == [], "they have left every channel")
        assert after.pubsub_numpat() == 0


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py_pipelines_and_knows_its_id(server: Server, protocol: int) -> None:
    with server.redis(protocol, client_name="me", decode_responses=True) as client:
        assert client.ping()
        assert client.echo("ü\r\n") == "ü\r\n"
        with client.pipeline(transaction=False) as pipeline:
            for number in range(500):
                pipeline.echo(f"{number}" * 20)
            assert pipeline.execute() == [f"{number}" * 20 for number in range(500)]
        assert client.client_getname() == "me"
        sid = client.client_id()
        row = next(row for row in server.json("conns") if row["id"] == sid)
        assert row["name"] == "me"
        assert client.client_info()["resp"] == str(protocol)
        with pytest.raises(redis.ResponseError, match="unknown command"):
            client.get("key")


# -- redis-cli ----------------------------------------------------------------------------------


def cli(server: Server, *words: str, feed: str | None = None) -> str:
    """What redis-cli prints."""
    done = subprocess.run(
        ["redis-cli", "-p", str(server.port), *words],
        input=feed,
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@needs("redis-cli")
def test_redis_cli_subscribes_publishes_lists_and_kills(server: Server) -> None:
    server.settle()
    subscriber = subprocess.Popen(
        ["redis-cli", "-p", str(server.port), "--no-raw", "subscribe", "news", "more"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert subscriber.stdout is not None
        read = [subscriber.stdout.readline() for _ in range(7)]
        assert '2) "more"\n' in read
        assert cli(server, "publish", "news", "hello") == "1\n"
        assert [subscriber.stdout.readline() for _ in range(3)] == [
            '1) "message"\n',
            '2) "news"\n',
            '3) "hello"\n',
        ]
        (line,) = [x for x in cli(server, "client", "list").splitlines() if " sub=2 " in x]
        sid = dict(word.split("=", 1) for word in line.split())["id"]
        assert int(sid) in {row["id"] for row in server.json("conns")}
        assert cli(server, "client", "kill", "id", sid) == "1\n"
        assert subscriber.wait(WATCHDOG_S) is not None
    finally:
        subscriber.kill()
        subscriber.communicate()


@needs("redis-cli")
def test_redis_cli_speaks_resp3_and_reads_commands_from_a_pipe(server: Server) -> None:
    answer = cli(server, "-3", "--no-raw", "hello", "3")
    assert re.search(r'^\d# "proto" => \(integer\) 3$', answer, re.M), answer
    assert cli(server, "-3", "ping") == "PONG\n"
    lines = cli(server, feed="ping\necho hello\nselect 1\nnonsense\n").split("\n")
    assert lines[:2] == ["PONG", "hello"]
    assert "OK" in lines
    assert any("unknown command 'nonsense'" in line for line in lines)
    assert "redis_version" in cli(server, "info", "server")
    assert cli(server, "--pipe", feed="PING\r\n" * 1000).endswith("errors: 0, replies: 1000\n")


def test_inline_commands_are_for_people_with_netcat(server: Server) -> None:
    with server.client() as client:
        client.raw(b"PING\r\nping\n\r\n\nECHO 'a b'\r\nQUIT\r\nPING\r\n")
        assert client.ended() == b"+PONG\r\n+PONG\r\n$3\r\na b\r\n+OK\r\n"


# -- under load ---------------------------------------------------------------------------------

BENCHMARK = ("-t", "ping_inline,ping_mbulk", "-c", "200", "-P", "16", "-n", "1000000")


@pytest.mark.slow
@needs("redis-benchmark")
@needs("curl")
def test_redis_benchmark_and_curl_at_once_see_no_error(server: Server) -> None:
    benchmark = subprocess.Popen(
        ["redis-benchmark", "-p", str(server.port), "--csv", *BENCHMARK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pages = ("/status", "/connections", "/sockets?format=json", "/metrics", "/health")
    fetched = 0
    try:
        while benchmark.poll() is None or fetched < 10:
            done = subprocess.run(
                ["curl", "-sS", "--fail", *[server.url + page for page in pages]],
                capture_output=True,
                timeout=WATCHDOG_S,
            )
            assert (done.returncode, done.stderr) == (0, b"")
            assert done.stdout.endswith(b"ok\n")
            fetched += 1
        out, err = benchmark.communicate(timeout=WATCHDOG_S)
    finally:
        benchmark.kill()
        benchmark.communicate()
    assert benchmark.returncode == 0, err
    tests = [line.split(",")[0] for line in out.splitlines()[1:]]
    assert tests == ['"PING_INLINE"', '"PING_MBULK"']
    assert "rror" not in out + err, err
    assert "rror" not in server.log().replace("--log-level error", "")
    server.settle()


@needs("ab")
@pytest.mark.parametrize("keep", [["-k"], []])
def test_apachebench_sees_no_failed_request(server: Server, keep: list[str]) -> None:
    done = subprocess.run(
        ["ab", "-q", *keep, "-n", "2000", "-c", "20", server.url + "/health"],
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Complete requests: +2000$", done.stdout, re.M)
    assert re.search(r"^Failed requests: +0$", done.stdout, re.M)
    assert "Non-2xx" not in done.stdout


class Checker:
    """Pipelines ECHO of random sizes on a subscribed RESP3 connection, and compares every byte."""

    def __init__(self, client: Client, seed: int, batches: int) -> None:
        self._client = client
        self._random = random.Random(seed)
        self._batches = batches
        assert client.call("HELLO", "3")[b"proto"] == 3
        assert client.call("SUBSCRIBE", "storm") == [b"subscribe", b"storm", 1]
        self.pushed: list[bytes] = []

    def _payload(self) -> bytes:
        size = self._random.choice((0, 1, 10, 1000, 20_000))
        return self._random.randbytes(self._random.randint(0, size))

    def run(self) -> None:
        for _ in range(self._batches):
            payloads = [self._payload() for _ in range(self._random.randint(1, 40))]
            data = b"".join(encode("ECHO", payload) for payload in payloads)
            sender = threading.Thread(target=self._send, args=(data,))
            sender.start()
            try:
                for payload in payloads:
                    assert self._reply() == payload
            finally:
                sender.join()

    def _send(self, data: bytes) -> None:
        """In pieces that have nothing to do with the commands."""
        at = 0
        cut = random.Random(len(data))
        while at < len(data):
            size = cut.choice((1, 100, 5000, 100_000))
            self._client.raw(data[at : at + size])
            at += size

    def _reply(self) -> typing.Any:
        while isinstance(value := self._client.read(), Push):
            self._note(value)
        return value

    def _note(self, push: Push) -> None:
        assert push[:2] == [b"message", b"storm"]
        self.pushed.append(push[2])

    def finish(self, count: int) -> None:
        """Read the pushes that are still to come; there is nothing else."""
        while len(self.pushed) < count:
            value = self._client.read()
            assert isinstance(value, Push)
            self._note(value)
        assert self._client.call("PING") == "PONG"


@pytest.mark.slow
def test_no_reply_is_missing_wrong_or_interleaved_with_what_others_publish(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        checkers = [Checker(stack.enter_context(server.client()), seed, 150) for seed in range(6)]
        publishers = server.on_each_worker(server.client)
        for client in publishers.values():
            stack.enter_context(client)
        done = threading.Event()
        sent: dict[int, int] = dict.fromkeys(publishers, 0)

        def publish(index: int) -> None:
            chance = random.Random(index)
            client = publishers[index]
            # Not without end: who has checked all reads no more, and would be crowded out.
            while not done.is_set() and sent[index] < 4000:
                batch = []
                for _ in range(chance.randint(1, 20)):
                    body = b"%d:%d:" % (index, sent[index]) + b"p" * chance.randint(0, 3000)
                    batch.append(encode("PUBLISH", "storm", body))
                    sent[index] += 1
                client.raw(b"".join(batch))
                assert [client.read() for _ in batch] == [len(checkers)] * len(batch)

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            pushing = [pool.submit(publish, index) for index in publishers]
            checking = [pool.submit(checker.run) for checker in checkers]
            try:
                for each in checking:
                    each.result()
            finally:
                done.set()
            for each in pushing:
                each.result()
        total = sum(sent.values())
        assert total
        for checker in checkers:
            checker.finish(total)
            for index in publishers:
                own = [p for p in checker.pushed if p.startswith(b"%d:" % index)]
                assert [int(p.split(b":")[1]) for p in own] == list(range(sent[index]))


# -- a third process ----------------------------------------------------------------------------


def test_a_third_process_pushes_to_a_client_of_any_worker(server: Server) -> None:
    clients = server.on_each_worker(server.client)
    try:
        ids = [client.id() for client in clients.values()]
        with Peer(server.name) as peer:
            for sid in ids:
                peer.run(f"with rt.address({sid}) as ref: ref.write(b'+from', b' outside\\r\\n')")
        for client in clients.values():
            assert client.read() == "from outside"
            assert client.call("PING") == "PONG"
    finally:
        for client in clients.values():
            client.close()


def test_stale_ids_of_an_earlier_server_of_the_name_address_nothing() -> None:
    with Server() as server:
        with server.client() as client:
            old = client.id()
        name = server.name
    with Server(name=name) as server, server.client() as client:
        fresh = client.id()
        assert fresh != old
        with server.attach() as runtime:
            assert runtime.address(old) is None
            assert runtime.status(old) is shmsock.Status.GONE
            assert not runtime.set_failed(old, errno.EIO, "")
        assert client.call("CLIENT", "KILL", "ID", str(old)) == 0
        assert client.call("PING") == "PONG"
