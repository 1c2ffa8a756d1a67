"""Where a server listens: ``HOST:PORT``, ``[IPv6]:PORT`` or ``unix:PATH``."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import typing

_MAX_PATH_BYTES = 107  # sockaddr_un, with a NUL at the end


class Listener:
    """One bound address.

    Attributes:
        shut: Whether its Socket was failed by somebody: it does not listen any more.
    """

    shut = False

    def __init__(self, address: str, backlog: int) -> None:
        """Bind and listen.

        Raises:
            ValueError: ``address`` is none.
            OSError: It cannot be bound; the message names it.
        """
        self.address = address
        self.path: str | None = None
        if address.startswith("unix:"):
            self.sock = self._bind_unix(address.removeprefix("unix:"))
        else:
            self.sock = self._bind_tcp(address)
        self.sock.setblocking(False)
        self.sock.listen(backlog)

    def _bind_unix(self, path: str) -> socket.socket:
        check_path(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if _is_stale(path):
                os.unlink(path)
            sock.bind(path)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot listen at unix:{path}: {error.strerror}") from None
        self.path = os.path.abspath(path)
        return sock

    def _bind_tcp(self, address: str) -> socket.socket:
        host, port = split_address(address)
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except socket.gaierror as error:
            raise ValueError(f"--bind {address}: {error.strerror}") from None
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Inherited by every accepted connection: answers are whole messages already.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.bind(where)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from None
        self.address = _text(sock.getsockname())
        return sock

    @classmethod
    def adopt(cls, sock: socket.socket) -> Listener:
        """Go on with a socket that listens already: an earlier supervisor's."""
        self = cls.__new__(cls)
        self.sock, self.path = sock, None
        bound = sock.getsockname()
        if isinstance(bound, tuple):
            self.address = _text(bound)
        else:
            self.address = f"unix:{bound}"
            self.path = os.path.abspath(bound)
        sock.setblocking(False)
        return self

    def close(self) -> None:
        """Stop listening; a socket file is taken away."""
        self.sock.close()
        path, self.path = self.path, None  # once: another server may have the path by now
        if path is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _text(bound: tuple[typing.Any, ...]) -> str:
    host, port = bound[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_path(path: str) -> None:
    """Check the path of ``unix:PATH``.

    Raises:
        ValueError: It cannot be a socket's.
    """
    if not path:
        raise ValueError("unix: needs a path, as in unix:/run/hub.sock")
    if "\0" in path or len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise ValueError(f"unix:{path}: a socket's path has at most {_MAX_PATH_BYTES} bytes")


def split_address(address: str) -> tuple[str | None, int]:
    """Host and port of ``HOST:PORT``; no host means every interface.

    Raises:
        ValueError: It is no such thing.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"{address!r} is no address: use HOST:PORT, [IPv6]:PORT or unix:PATH")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError(f"{address!r}: write an IPv6 address as [::1]:7379")
    return host.strip("[]") or None, int(port)


def _is_stale(path: str) -> bool:
    """Whether a socket file is there at which nobody listens."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog is somebody, too
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno == errno.ECONNREFUSED
    return False
