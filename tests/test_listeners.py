"""Where a server listens: the forms of an address, and what is in the way."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import socket

import pytest

from workers.listeners import Listener, check_path, split_address

from .helpers import WATCHDOG_S, read_to_end, wait_until
from .servers import Client, Server, new_name, shmsock_command


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def healthy(sock: socket.socket) -> bool:
    """Whether the pages are served at the other end."""
    sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = read_to_end(sock)
    return answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\nok\n")


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:7379", ("127.0.0.1", 7379)),
        ("localhost:0", ("localhost", 0)),
        (":65535", (None, 65535)),
        ("[::1]:1", ("::1", 1)),
        ("[::]:80", ("::", 80)),
    ],
)
def test_host_and_port_are_split(text: str, expected: tuple[str | None, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "localhost", "7379", "localhost:", "localhost:x", "localhost:65536", "localhost:-1"),
        *("::1:7379", "[::1:7379", "::1]:7379", "[::1]", "localhost: 80", "localhost:\uff18"),
    ],
)
def test_what_is_no_address_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"address|IPv6"):
        split_address(text)


@pytest.mark.parametrize("path", ["", "x" * 108, "a\0b", "ü" * 54])
def test_what_cannot_be_the_path_of_a_socket_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        check_path(path)


def test_port_0_is_told(tmp_path: pathlib.Path) -> None:
    listener = Listener("127.0.0.1:0", 5)
    try:
        host, port = split_address(listener.address)
        assert (host, port) == listener.sock.getsockname()
        assert port
    finally:
        listener.close()


def test_a_socket_file_is_taken_away_and_only_once(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    listener = Listener(f"unix:{path}", 5)
    assert path.is_socket()
    listener.close()
    assert not path.exists()
    other = Listener(f"unix:{path}", 5)
    listener.close()
    assert path.exists()
    other.close()


def test_a_socket_file_that_nobody_listens_at_is_replaced(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    Listener(f"unix:{path}", 5).close()


@pytest.mark.parametrize("full", [False, True])
def test_a_socket_file_in_use_is_left_alone(tmp_path: pathlib.Path, full: bool) -> None:
    path = tmp_path / "s"
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.bind(str(path))
        sock.listen(0)
        if full:
            for _ in range(2):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    client.connect(str(path))
        with pytest.raises(OSError, match=str(path)) as caught:
            Listener(f"unix:{path}", 5)
        assert caught.value.errno == errno.EADDRINUSE
        assert path.is_socket()


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_is_no_socket_is_left_alone(tmp_path: pathlib.Path, what: str) -> None:
    path = tmp_path / "s"
    if what == "file":
        path.write_text("precious")
    else:
        path.mkdir()
    with pytest.raises(OSError, match=str(path)):
        Listener(f"unix:{path}", 5)
    assert path.exists()
    if what == "file":
        assert path.read_text() == "precious"


def test_a_directory_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Listener(f"unix:{tmp_path}/nowhere/s", 5)


def test_an_address_that_is_taken_or_not_ours_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=address):
            Listener(address, 5)
    with pytest.raises(OSError, match=r"192\.0\.2\.77:80"):
        Listener("192.0.2.77:80", 5)


@pytest.mark.parametrize("mode", ["supervisor", "workers"])
def test_a_listener_that_somebody_fails_ends_and_everything_else_goes_on(mode: str) -> None:
    bind = ["127.0.0.1:0", "127.0.0.1:0"]
    with Server("--accept", mode, bind=bind) as server, server.client() as before:
        first, second = (int(address.rpartition(":")[2]) for address in server.addresses)
        with server.attach() as runtime:
            rows = runtime.sockets()
            (sid,) = rows["id"][rows["inode"] == inode_of_listener(first)]
            assert runtime.set_failed(int(sid))
        with Client(socket.create_connection(("127.0.0.1", second))) as client:
            assert client.call("PING") == before.call("PING") == "PONG"
        wait_until(lambda: refuses(first), "nobody listens there")
        if mode == "supervisor":
            told = f"nobody listens at {server.addresses[0]} any more"
            wait_until(lambda: server.log().count(told) == 1, "it says so, once")


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), WATCHDOG_S).close()
    except ConnectionRefusedError:
        return True
    return False


def inode_of_listener(port: int) -> int:
    """Of the socket that listens at a port of 127.0.0.1, as the kernel lists it."""
    with open("/proc/net/tcp") as file:
        rows = [line.split() for line in file]
    (inode,) = [row[9] for row in rows if row[1:4:2] == [f"0100007F:{port:04X}", "0A"]]
    return int(inode)


def test_a_server_listens_at_many_addresses_at_once(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "hub.sock"
    bind = ["127.0.0.1:0", f"unix:{path}", "127.0.0.1:0"]
    if has_ipv6():
        bind.append("[::1]:0")
    with Server(bind=bind, workers=1) as server, contextlib.ExitStack() as stack:
        assert len(server.addresses) == len(bind)
        clients = []
        for address in server.addresses:
            if address.startswith("unix:"):
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(str(path))
            else:
                host, port = split_address(address)
                sock = socket.create_connection((host or "", port))
            sock.settimeout(WATCHDOG_S)
            clients.append(stack.enter_context(Client(sock)))
        for client in clients:
            assert client.call("SUBSCRIBE", "c") == [b"subscribe", b"c", 1]
        publisher = stack.enter_context(server.client())
        assert publisher.call("PUBLISH", "c", "x") == len(clients)
        for client in clients:
            assert client.read() == [b"message", b"c", b"x"]
        rows = server.json("conns")
        kinds = {row["kind"] for row in rows}
        assert kinds == {"tcp", "unix"}
        peers = [row["peer"] for row in rows]
        assert sum(peer.startswith("unix:") for peer in peers) == 1
        assert sum(peer.startswith("[::1]:") for peer in peers) == has_ipv6()
        for client in clients:
            client.call("RESET")
            client.close()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            assert healthy(sock)


@ipv6
def test_a_server_on_ipv6_serves_pages_to_loopback() -> None:
    with Server(bind=["[::1]:0"], workers=1) as server:
        host, port = split_address(server.addresses[0])
        with socket.create_connection((host or "", port)) as sock:
            assert healthy(sock)


@pytest.mark.parametrize(
    "address", ["nonsense", "127.0.0.1", "127.0.0.1:99999", "::1:80", "unix:", "unix:" + "x" * 200]
)
def test_serve_refuses_a_bad_address_as_usage(address: str) -> None:
    done = shmsock_command("serve", "--bind", address)
    assert done.returncode == 2
    assert "usage: shmsock serve" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_says_that_a_host_is_unknown() -> None:
    name = new_name()
    done = shmsock_command("serve", "--name", name, "--bind", "no.such.host.:1")
    assert done.returncode == 1
    assert "no.such.host.:1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [entry for entry in os.listdir("/dev/shm") if name in entry]
