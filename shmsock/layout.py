"""The map of the segment: which column lies where, and how words are packed.

Pure arithmetic; nothing here touches shared memory. A segment is one header page and then columns,
each 64-byte aligned, each a numpy array of native words. Every process computes the same map from
four numbers in the header, so an offset is never stored and cannot disagree.

    SocketId     version << 32 | slot          version even, 2 .. 2^31 - 2; never 0
    vref         version << 32 | nref          version even: free or live; odd: failed
    ctl          generation << 2 | phase       OPEN, CLOSED, OPENING
    claim        generation << 2 | kind        0 none; WANT, OWN, BROKEN
    row state    epoch << 8 | state            FREE, LIVE, REAPING
    owner        epoch << 16 | index           0 nobody; a row's next tenant does not match
    heir         likewise                      to whom the owner has offered the socket
    row wish     epoch << 8 | wish             what somebody wishes of that process
"""

from __future__ import annotations

import dataclasses
import enum
import operator
import typing

import numpy as np

MAGIC = 0x6B636F736D6873  # "shmsock"
LAYOUT = 3
PAGE_BYTES = 4096
ALIGN_BYTES = 64

INVALID_SOCKET_ID = 0
_HEX = frozenset("0123456789abcdefABCDEF")
SLOT_BITS = 32
SLOT_MASK = (1 << SLOT_BITS) - 1
VERSION_LIMIT = 1 << 31

# The life of a slot.
FREE, LIVE, RECYCLING = 0, 1, 2
# Of a process row; FREE and LIVE as above.
REAPING = 2
# Phases of a stripe's control word.
OPEN, CLOSED, OPENING = 0, 1, 2
# What becomes of an idle socket when its owner dies.
ON_OWNER_DEATH = ("fail", "rehome")
# Claims of a process on a stripe.
WANT, OWN, BROKEN = 1, 2, 3

ROLES = ("client", "worker", "supervisor")
KIND_NAMES = ("other", "tcp", "unix", "udp", "listener")

ERROR_TEXT_BYTES = 96
PEER_BYTES = 64
USER_DATA_BYTES = 64
ADDRESS_BYTES = 104


class Status(enum.Enum):
    """What an id names right now, without taking a reference."""

    LIVE = "live"
    FAILED = "failed"
    GONE = "gone"


def make_socket_id(version: int, slot: int) -> int:
    """Pack an id."""
    return version << SLOT_BITS | slot


def recycled_version(version: int) -> int:
    """The even version that follows a failed (odd) one: 31 bits, never 0."""
    following = (version + 1) & (VERSION_LIMIT - 1)
    return following or 2


def format_socket_id(sid: int) -> str:
    """Write an id as ``sk-<version hex>-<slot>``: for people, and for JSON.

    JSON numbers lose bits above 2^53 in browsers; this form does not.
    """
    sid = operator.index(sid)
    return f"sk-{sid >> SLOT_BITS:x}-{sid & SLOT_MASK}"


def parse_socket_id(text: str) -> int:
    """Read an id from its text or from a decimal number.

    Raises:
        ValueError: Neither form, or not below 2^63.
    """
    word = text.strip()
    version, dash, slot = word.removeprefix("sk-").partition("-")
    if word.startswith("sk-"):
        # WHY NOT int(version, 16) alone: it would take "0x1f", "1_f" and digits of any script.
        well_formed = dash and slot.isascii() and slot.isdigit() and set(version) <= _HEX
        if well_formed and 1 <= len(version) <= 8 and len(slot) <= 10:
            number = int(version, 16)
            if number < VERSION_LIMIT and int(slot) <= SLOT_MASK:
                return make_socket_id(number, int(slot))
    elif word.isascii() and word.isdigit() and len(word) <= 19 and int(word) < 1 << 63:
        return int(word)
    raise ValueError(f"not a SocketId: {text!r} (expected a number below 2^63 or sk-<hex>-<slot>)")


# One row of Runtime.sockets().
SOCKET_DTYPE = np.dtype(
    [
        ("id", "u8"),
        ("state", "u1"),  # 1 live, 2 failed
        ("nref", "u4"),
        ("attached", "u4"),
        ("owner", "i4"),
        ("writer", "i4"),
        ("busy", "u1"),
        ("kind", "u1"),
        ("error_code", "i4"),
        ("error_text", f"S{ERROR_TEXT_BYTES}"),
        ("peer", f"S{PEER_BYTES}"),
        ("inode", "u8"),
        ("created_ns", "u8"),
        ("read_ns", "u8"),
        ("written_ns", "u8"),
        ("bytes_in", "u8"),
        ("messages_in", "u8"),
        ("bytes_out", "u8"),
        ("messages_out", "u8"),
        ("user_data", f"S{USER_DATA_BYTES}"),
    ]
)

# Words of the header page, in order, then two texts at fixed offsets.
HEADER_WORDS = (
    "magic",
    "layout",
    "total_bytes",
    "slots",
    "processes",
    "stripes",
    "max_unwritten_bytes",
    "first_version",
    "uid",
    "created_ns",
    "poisoned",
    "address_length",  # stored last when the host publishes its control address
    "init_done",  # stored last of all
)
HEADER_INDEX = {name: i for i, name in enumerate(HEADER_WORDS)}
ADDRESS_OFFSET = 512
# Why the segment was poisoned, as text, stored before the word is.
REASON_OFFSET, REASON_BYTES = 1024, 256

# Columns: name, item type, and how many items: by slot, process row, stripe or a product.
_COLUMNS = (
    # process rows
    ("row_state", "u8", "p"),
    ("row_pid", "u8", "p"),
    ("row_started_ns", "u8", "p"),
    ("row_role", "u8", "p"),
    ("row_heartbeat_ns", "u8", "p"),
    ("row_wish", "u8", "p"),
    # stripes
    ("ctl", "u8", "t"),
    ("hint", "u8", "t"),
    ("claims", "u8", "pt"),  # process-major: a process's claims are its own cache lines
    # slots
    ("versioned_ref", "u8", "s"),
    ("owner", "u8", "s"),
    ("heir", "u8", "s"),
    ("writer", "u8", "s"),
    ("state", "u1", "s"),
    ("retired", "u1", "s"),
    ("busy", "u1", "s"),
    ("kind", "u1", "s"),
    ("on_owner_death", "u1", "s"),
    ("selector", "u1", "s"),
    ("error_code", "i4", "s"),
    ("inode", "u8", "s"),
    ("created_ns", "u8", "s"),
    ("read_ns", "u8", "s"),
    ("written_ns", "u8", "s"),
    ("bytes_in", "u8", "s"),
    ("messages_in", "u8", "s"),
    ("bytes_out", "u8", "s"),
    ("messages_out", "u8", "s"),
    ("error_text", f"S{ERROR_TEXT_BYTES}", "s"),
    ("peer", f"S{PEER_BYTES}", "s"),
    ("user_data", f"S{USER_DATA_BYTES}", "s2"),
    ("held", "u1", "sp"),  # slot-major: a stripe's block is contiguous
)


class Column(typing.NamedTuple):
    """Where one column lies."""

    name: str
    dtype: str
    offset: int
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The map for one set of sizes.

    Attributes:
        slots: Sockets the table can hold; a multiple of ``stripes``.
        processes: Participants it can hold.
        stripes: Semaphores; stripe ``i`` guards slots ``i * block`` up to the next block.
    """

    slots: int
    processes: int
    stripes: int

    def __post_init__(self) -> None:
        """Refuse sizes that no segment can have."""
        for name, low, high in (
            ("slots", 1, 1 << 24),
            ("processes", 1, 1 << 15),
            ("stripes", 1, 1 << 12),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be between {low} and {high}, not {value}")
        if self.slots % self.stripes:
            raise ValueError("slots must be a multiple of stripes")

    @classmethod
    def fit(cls, slots: int, processes: int, stripes: int) -> Layout:
        """Round ``slots`` up to whole blocks, with no more stripes than slots."""
        stripes = max(1, min(stripes, slots))
        return cls(-(-slots // stripes) * stripes, processes, stripes)

    @property
    def block(self) -> int:
        """Slots a stripe guards."""
        return self.slots // self.stripes

    def columns(self) -> tuple[list[Column], int]:
        """Every column and the segment's size in bytes."""
        count = {
            "p": (self.processes,),
            "t": (self.stripes,),
            "s": (self.slots,),
            "s2": (self.slots, 2),
            "sp": (self.slots, self.processes),
            "pt": (self.processes, self.stripes),
        }
        offset = PAGE_BYTES
        out = []
        for name, dtype, shape in _COLUMNS:
            out.append(Column(name, dtype, offset, count[shape]))
            length = int(np.prod(count[shape])) * np.dtype(dtype).itemsize
            offset += -(-length // ALIGN_BYTES) * ALIGN_BYTES
        return out, -(-offset // PAGE_BYTES) * PAGE_BYTES
