"""What a runtime looks like right now: plain data, and text tables of it.

The command line and the pages show the same things because both take them from here. Everything is
read from the shared table, so it is the same whichever process asks. Nothing here takes a reference
or a stripe.

Peers, names and error texts come from clients. They are passed on as they are in the data, and made
printable in the tables: a terminal obeys what it is shown.
"""

from __future__ import annotations

import collections.abc
import errno
import time
import typing

import numpy as np

import shmsock

if typing.TYPE_CHECKING:
    from shmsock import Runtime

Row = dict[str, typing.Any]
Table = np.ndarray[typing.Any, np.dtype[np.void]]
# How an application's user_data names a client, if it does.
NameOf = collections.abc.Callable[[bytes], str]

_STATES = {1: "live", 2: "failed"}
_LISTENER = shmsock.KIND_NAMES.index("listener")


# -- data ---------------------------------------------------------------------------------------


def connections(
    rt: Runtime, *, limit: int | None = None, name_of: NameOf | None = None
) -> list[Row]:
    """Describe every connection: every socket that does not listen.

    Args:
        rt: Any participant's.
        limit: At most so many; all by default.
        name_of: Tells a client's name from its ``user_data``.

    Returns:
        One dict a connection: id, text, state, owner, pid, peer, kind, nref, attached (pids),
        age_s, idle_s, bytes_in, bytes_out, and then some more.
    """
    return describe(rt, connections_of(rt.sockets())[:limit], name_of=name_of)


def connections_of(table: Table) -> Table:
    """The rows of ``Runtime.sockets()`` that are connections."""
    return typing.cast(Table, table[table["kind"] != _LISTENER])


def describe(rt: Runtime, table: Table, *, name_of: NameOf | None = None) -> list[Row]:
    """Describe some rows of ``Runtime.sockets()``, in their order."""
    now_ns = time.monotonic_ns()
    pids = {process.index: process.pid for process in rt.processes()}
    columns = {name: table[name].tolist() for name in table.dtype.names or ()}
    attached = rt.attached_many(table["id"])
    rows = []
    for i, sid in enumerate(columns["id"]):
        owner, writer = columns["owner"][i], columns["writer"][i]
        created_ns = columns["created_ns"][i]
        used_ns = max(created_ns, columns["read_ns"][i], columns["written_ns"][i])
        rows.append(
            {
                "id": sid,
                "text": shmsock.format_socket_id(sid),
                "state": _STATES[columns["state"][i]],
                "owner": owner if owner >= 0 else None,
                "pid": pids.get(owner),
                "peer": _text(columns["peer"][i]),
                "kind": shmsock.KIND_NAMES[columns["kind"][i]],
                "nref": columns["nref"][i],
                "attached": [pids[index] for index in attached[i] if index in pids],
                "age_s": _seconds(now_ns - created_ns),
                "idle_s": _seconds(now_ns - used_ns),
                "bytes_in": columns["bytes_in"][i],
                "bytes_out": columns["bytes_out"][i],
                "messages_in": columns["messages_in"][i],
                "messages_out": columns["messages_out"][i],
                "busy": bool(columns["busy"][i]),
                "writer": writer if writer >= 0 else None,
                "error_code": columns["error_code"][i],
                "error_text": _text(columns["error_text"][i]),
                "name": name_of(columns["user_data"][i]) if name_of else "",
            }
        )
    return rows


def socket(rt: Runtime, sid: int, *, name_of: NameOf | None = None) -> Row | None:
    """Describe one socket with everything the table knows of it; None when it is gone."""
    if rt.status(sid) is shmsock.Status.GONE:
        return None
    table = rt.sockets()
    table = table[table["id"] == sid]
    if not len(table):
        return None
    row = describe(rt, table, name_of=name_of)[0]
    now_ns = time.monotonic_ns()
    for key in ("read", "written"):
        stamp_ns = int(table[f"{key}_ns"][0])
        row[f"{key}_ago_s"] = _seconds(now_ns - stamp_ns) if stamp_ns else None
    row["created"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - row["age_s"]))
    row["inode"] = int(table["inode"][0])
    row["user_data"] = repr(bytes(table["user_data"][0]))
    holders = set(rt.attached(sid))
    row["attached_processes"] = [
        {"index": process.index, "pid": process.pid, "role": process.role}
        for process in rt.processes()
        if process.index in holders
    ]
    return row


def processes(rt: Runtime) -> list[Row]:
    """Describe every participant: index, pid, role, sockets (owned), attached, alive, age_s."""
    return [
        {
            "index": process.index,
            "pid": process.pid,
            "role": process.role,
            "sockets": process.sockets,
            "attached": process.attached,
            "alive": process.alive,
            "age_s": round(process.age_s, 3),
        }
        for process in rt.processes()
    ]


def counts(table: Table) -> Row:
    """Count the rows of ``Runtime.sockets()`` in a few ways.

    Bytes and messages are those of the sockets that are in the table now: what a recycled slot had
    counted is gone.
    """
    kinds = np.bincount(table["kind"], minlength=len(shmsock.KIND_NAMES)).tolist()
    return {
        "live": int(np.count_nonzero(table["state"] == 1)),
        "failed": int(np.count_nonzero(table["state"] == 2)),
        "connections": len(connections_of(table)),
        "busy": int(np.count_nonzero(table["busy"])),
        "writing": int(np.count_nonzero(table["writer"] >= 0)),
        "references": int(table["nref"].sum(dtype="u8")),
        "kinds": dict(zip(shmsock.KIND_NAMES, kinds, strict=True)),
        **{
            key: int(table[key].sum(dtype="u8"))
            for key in ("bytes_in", "messages_in", "bytes_out", "messages_out")
        },
    }


def status(rt: Runtime) -> Row:
    """Describe the runtime as a whole."""
    participants = processes(rt)
    return {
        "name": rt.name,
        "version": shmsock.__version__,
        "uptime_s": _uptime_s(participants),
        "host_alive": rt.host_alive(),
        "answered_by": rt.index,
        "counts": counts(rt.sockets()),
        "limits": {"slots": rt.slots, "max_unwritten_bytes": rt.max_unwritten_bytes},
        "processes": participants,
    }


def _uptime_s(participants: list[Row]) -> float:
    """How long the supervisor is there, or else the oldest participant."""
    supervisors = [row["age_s"] for row in participants if row["role"] == "supervisor"]
    return max(supervisors or [row["age_s"] for row in participants], default=0.0)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _seconds(span_ns: int) -> float:
    return round(max(0, span_ns) / 1e9, 3)


# -- text ---------------------------------------------------------------------------------------


class Column(typing.NamedTuple):
    """A column of a table for people: its title, ``<`` or ``>``, and a row's text in it."""

    title: str
    align: str
    cell: collections.abc.Callable[[Row], str]


def printable(text: str) -> str:
    """Escape what a terminal would obey and a reader not see."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: float | None) -> str:
    """Write a time span with its two largest units: 0.4s, 12s, 3m05s, 2h10m, 5d04h."""
    if seconds is None:
        return "never"
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    for unit_s, unit, rest_s, rest in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= unit_s:
            return f"{whole // unit_s}{unit}{whole % unit_s // rest_s:02}{rest}"
    return f"{whole}s"


def size(count_bytes: int) -> str:
    """Write a number of bytes: 0, 512, 1.5K, 20K, 3.2M (powers of 1024)."""
    if count_bytes < 1024:
        return str(count_bytes)
    value, unit = count_bytes / 1024, "K"
    for larger in "MGTPE":
        if value < 1023.5:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"


def cells(
    columns: collections.abc.Sequence[Column], rows: collections.abc.Iterable[Row]
) -> list[list[str]]:
    """The texts of a table, made printable."""
    return [[printable(column.cell(row)) for column in columns] for row in rows]


def table_text(
    columns: collections.abc.Sequence[Column], rows: collections.abc.Iterable[Row]
) -> str:
    """Align a table under its titles; every line ends in a newline, none in blanks."""
    lines = [[column.title for column in columns], *cells(columns, rows)]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            f"{text:{column.align}{width}}"
            for text, column, width in zip(line, columns, widths, strict=True)
        ).rstrip()
        + "\n"
        for line in lines
    )


def list_text(pairs: collections.abc.Mapping[str, str]) -> str:
    """Align names and values, one pair a line."""
    width = max(map(len, pairs), default=0)
    return "".join(
        f"{name:<{width}}  {printable(value)}".rstrip() + "\n" for name, value in pairs.items()
    )


def _owner(row: Row) -> str:
    if row["owner"] is None:
        return "-"
    return f"{row['owner']}:{row['pid'] or '?'}"


def error_of(row: Row) -> str:
    """The failure of a described socket, for people; empty while it lives."""
    if row["state"] != "failed":
        return ""
    name = errno.errorcode.get(row["error_code"], str(row["error_code"]))
    return f"{name} {row['error_text']}".rstrip()


_ID = Column("SOCKET", "<", lambda row: row["text"])
_STATE = Column("STATE", "<", lambda row: row["state"])
_PEER = Column("REMOTE", "<", lambda row: row["peer"] or "-")
_KIND = Column("KIND", "<", lambda row: row["kind"])
_OWNER = Column("OWNER", "<", _owner)
_ERROR = Column("ERROR", "<", error_of)

CONNECTION_COLUMNS = (
    Column("CREATED", ">", lambda row: duration(row["age_s"])),
    _PEER,
    _KIND,
    _STATE,
    Column("IN", ">", lambda row: size(row["bytes_in"])),
    Column("MSGS", ">", lambda row: str(row["messages_in"])),
    Column("OUT", ">", lambda row: size(row["bytes_out"])),
    Column("MSGS", ">", lambda row: str(row["messages_out"])),
    Column("IDLE", ">", lambda row: duration(row["idle_s"])),
    _OWNER,
    Column("NAME", "<", lambda row: row["name"] or "-"),
    _ID,
)

SOCKET_COLUMNS = (
    _ID,
    _STATE,
    _KIND,
    Column("NREF", ">", lambda row: str(row["nref"])),
    Column("ATTACHED", "<", lambda row: ",".join(map(str, row["attached"])) or "-"),
    _OWNER,
    Column("WRITER", ">", lambda row: "-" if row["writer"] is None else str(row["writer"])),
    Column("BUSY", "<", lambda row: "yes" if row["busy"] else "-"),
    _PEER,
    _ERROR,
)

PROCESS_COLUMNS = (
    Column("INDEX", ">", lambda row: str(row["index"])),
    Column("PID", ">", lambda row: str(row["pid"])),
    Column("ROLE", "<", lambda row: row["role"]),
    Column("SOCKETS", ">", lambda row: str(row["sockets"])),
    Column("ATTACHED", ">", lambda row: str(row["attached"])),
    Column("ALIVE", "<", lambda row: "yes" if row["alive"] else "no"),
    Column("AGE", ">", lambda row: duration(row["age_s"])),
)


def connections_text(rows: collections.abc.Iterable[Row]) -> str:
    """The table of ``connections``."""
    return table_text(CONNECTION_COLUMNS, rows)


def processes_text(rows: collections.abc.Iterable[Row]) -> str:
    """The table of ``processes``."""
    return table_text(PROCESS_COLUMNS, rows)


def socket_pairs(row: Row) -> dict[str, str]:
    """What ``socket`` says, for people."""
    return {
        "id": f"{row['id']} ({row['text']})",
        "state": row["state"],
        "error": error_of(row) or "-",
        "kind": row["kind"],
        "peer": row["peer"] or "-",
        "name": row["name"] or "-",
        "owner": _owner(row),
        "writer": "-" if row["writer"] is None else str(row["writer"]),
        "busy": "yes" if row["busy"] else "no",
        "nref": str(row["nref"]),
        "attached": ", ".join(
            f"{process['index']}:{process['pid']} ({process['role']})"
            for process in row["attached_processes"]
        )
        or "-",
        "created": f"{row['created']} ({duration(row['age_s'])} ago)",
        "last read": _ago(row["read_ago_s"]),
        "last written": _ago(row["written_ago_s"]),
        "in": f"{row['bytes_in']} bytes, {row['messages_in']} messages",
        "out": f"{row['bytes_out']} bytes, {row['messages_out']} messages",
        "inode": str(row["inode"]),
        "user_data": row["user_data"],
    }


def _ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{duration(seconds)} ago"


def counts_pairs(found: Row, slots: int) -> dict[str, str]:
    """What ``counts`` says, for people."""
    used = found["live"] + found["failed"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items() if count)
    return {
        "slots": f"{used} of {slots} used, {slots - used} free",
        "sockets": f"{found['live']} live, {found['failed']} failed",
        "kinds": kinds or "-",
        "references": str(found["references"]),
        "busy": str(found["busy"]),
        "writing": str(found["writing"]),
        "in": f"{size(found['bytes_in'])}, {found['messages_in']} messages",
        "out": f"{size(found['bytes_out'])}, {found['messages_out']} messages",
    }


def status_pairs(found: Row) -> dict[str, str]:
    """What ``status`` says, for people, without the processes."""
    limits = found["limits"]
    return {
        "name": found["name"],
        "version": found["version"],
        "uptime": duration(found["uptime_s"]),
        "host": "alive" if found["host_alive"] else "DEAD",
        "connections": str(found["counts"]["connections"]),
        **counts_pairs(found["counts"], limits["slots"]),
        "max unwritten": f"{size(limits['max_unwritten_bytes'])} a process and socket",
    }


def status_text(found: Row) -> str:
    """``status`` as one screen of text."""
    return f"{list_text(status_pairs(found))}\n{processes_text(found['processes'])}"
