"""The public surface: frozen, documented, and reachable by the names the design gives."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
import typing

import pytest

import shmsock
from shmsock import errors

from .helpers import REPOSITORY

PUBLIC = [
    "ENGINE",
    "INVALID_SOCKET_ID",
    "KIND_NAMES",
    "SOCKET_DTYPE",
    "AlreadyRunningError",
    "ClosedError",
    "DescriptorError",
    "Dispatcher",
    "FormatError",
    "HostLostError",
    "Inspector",
    "Mended",
    "OverCrowdedError",
    "OwnershipError",
    "PoisonedError",
    "PoolProcessDiedError",
    "ProcessInfo",
    "Runtime",
    "RuntimeNotFoundError",
    "ShmsockError",
    "SocketFailedError",
    "SocketRef",
    "Status",
    "StripeTimeoutError",
    "TableFullError",
    "Wish",
    "check_name",
    "clean",
    "current",
    "format_socket_id",
    "names_on_machine",
    "parse_socket_id",
]

METHODS = {
    "Runtime": {
        "create", "attach", "create_socket", "address", "address_failed_as_well", "set_failed",
        "status", "sockets", "attached", "processes", "audit", "repair", "mend", "poison", "close",
        "unlink", "groups",
    },
    "SocketRef": {
        "fileno", "peer", "failed", "error", "user_data", "write", "flush", "wait_writable",
        "recv", "add_reference", "set_failed", "release_additional_reference", "close",
        "hand_over",
    },
    "Inspector": {"sockets", "processes", "audit", "mend", "poisoned", "close"},
    "Dispatcher": {"add_consumer", "remove_consumer", "run", "stop", "fileno"},
}  # fmt: skip


def public_classes() -> list[tuple[str, type]]:
    return [(n, v) for n in PUBLIC if isinstance(v := getattr(shmsock, n), type)]


def test_public_names_are_these_and_sorted() -> None:
    assert shmsock.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(shmsock, name) is not None


def test_star_import_gives_exactly_the_public_names() -> None:
    space: dict[str, object] = {}
    exec("from shmsock import *", space)
    assert set(space) - {"__builtins__"} == set(PUBLIC)


@pytest.mark.parametrize(("owner", "names"), METHODS.items())
def test_designs_methods_exist(owner: str, names: set[str]) -> None:
    assert names <= set(dir(getattr(shmsock, owner)))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_thing_is_documented(name: str) -> None:
    thing = getattr(shmsock, name)
    if callable(thing):
        assert inspect.getdoc(thing), name


@pytest.mark.parametrize(("name", "owner"), public_classes())
def test_every_public_method_is_documented_and_annotated(name: str, owner: type) -> None:
    for attribute, value in inspect.getmembers(owner):
        if attribute.startswith("_") or value.__class__ is types.GetSetDescriptorType:
            continue
        if not getattr(value, "__module__", "").startswith("shmsock") and not isinstance(
            value, property
        ):
            continue
        assert inspect.getdoc(value), f"{name}.{attribute}"
        function = value.fget if isinstance(value, property) else value
        if inspect.isroutine(function):
            hints = typing.get_type_hints(function, None, {"Dispatcher": object, "Runtime": object})
            assert "return" in hints, f"{name}.{attribute}"


def test_errors_are_the_designs_tree() -> None:
    for name in PUBLIC:
        if name.endswith("Error"):
            assert issubclass(getattr(shmsock, name), shmsock.ShmsockError)
            assert getattr(shmsock, name) is getattr(errors, name)
    assert issubclass(shmsock.StripeTimeoutError, TimeoutError)
    assert not issubclass(shmsock.ShmsockError, OSError)
    error = shmsock.SocketFailedError(104, "reset")
    assert (error.code, error.text) == (104, "reset")
    assert "reset" in str(error)
    assert "104" in str(error)


def test_engine_is_named_and_a_missing_one_fails_loudly() -> None:
    assert shmsock.ENGINE in ("py", "c")
    code = "import os; os.environ['SHMSOCK_ENGINE'] = 'none'; import shmsock"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "SHMSOCK_ENGINE='none'" in done.stderr


def test_importing_needs_no_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('lmdb', 'hiredis', 'httptools', 'redis', 'prometheus_client'):\n"
        "    sys.modules[name] = None\n"
        "import shmsock\n"
        "print(len(shmsock.__all__))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(PUBLIC)


def test_version_is_a_version() -> None:
    assert [part.isdigit() for part in shmsock.__version__.split(".")[:2]] == [True, True]
