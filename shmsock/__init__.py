"""shmsock: a connection is an integer that every process of an application can use."""

from __future__ import annotations

from ._version import VERSION
from .dispatcher import Dispatcher
from .engine import NAME as ENGINE
from .errors import (
    AlreadyRunningError,
    ClosedError,
    DescriptorError,
    FormatError,
    HostLostError,
    OverCrowdedError,
    OwnershipError,
    PoisonedError,
    PoolProcessDiedError,
    RuntimeNotFoundError,
    ShmsockError,
    SocketFailedError,
    StripeTimeoutError,
    TableFullError,
)
from .inspection import Inspector
from .layout import (
    INVALID_SOCKET_ID,
    KIND_NAMES,
    SOCKET_DTYPE,
    Status,
    format_socket_id,
    parse_socket_id,
)
from .mending import Mended
from .names import clean, names_on_machine
from .runtime import Runtime, current
from .segment import check_name
from .socket import SocketRef
from .view import ProcessInfo
from .wishes import Wish

__version__ = VERSION

__all__ = [
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
