"""CLIENT: who is connected, to any worker, and what is known of each.

What other processes must know of a client travels in the 64 bytes of user data of its socket,
written by the owner before it is idle again (``ClientInfo``). The last command is not among it: a
store takes a stripe, too dear for every batch. So ``cmd`` is true for clients of the worker that
answers and NULL for others.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import errno
import itertools
import struct
import time
import typing

from shmsock import KIND_NAMES, format_socket_id

from . import resp

if typing.TYPE_CHECKING:
    from .hub_protocol import Handler, Hub, RespSession

_TAG = ord("R")
_HEAD = struct.Struct("<BBBHH")
_USER_DATA_BYTES = 64
MAX_NAME_BYTES = _USER_DATA_BYTES - _HEAD.size - 2
_LIVE = 1
_PRINTABLE = frozenset(range(ord("!"), ord("~") + 1))  # of names and libraries


class Reply(enum.IntEnum):
    """What CLIENT REPLY was told."""

    ON = 0
    OFF = 1
    SKIP = 2  # the next command's answer only


@dataclasses.dataclass(frozen=True, slots=True)
class ClientInfo:
    """What everybody may know of a client, and what a new owner needs to go on with it.

    Attributes:
        sub: Channels subscribed to; more than 65,535 are packed as that.
        psub: Patterns, likewise.
    """

    resp: int = 2
    authenticated: bool = True
    no_evict: bool = False
    no_touch: bool = False
    reply: Reply = Reply.ON
    db: int = 0
    sub: int = 0
    psub: int = 0
    name: bytes = b""
    lib_name: bytes = b""
    lib_ver: bytes = b""

    def pack(self) -> bytes:
        """At most 64 bytes. The name always fits; of the library, whole words that still do."""
        flags = (
            (self.resp == 3)
            | self.authenticated << 1
            | self.no_evict << 2
            | self.no_touch << 3
            | self.reply << 4
        )
        counts = min(self.sub, 0xFFFF), min(self.psub, 0xFFFF)
        words, room = [self.name], MAX_NAME_BYTES - len(self.name)
        for word in (self.lib_name, self.lib_ver):
            words.append(word if len(word) <= room else b"")
            room -= len(words[-1])
        return _HEAD.pack(_TAG, flags, self.db, *counts) + b"\0".join(words)

    @classmethod
    def unpack(cls, data: bytes) -> ClientInfo | None:
        """The reverse; trailing NULs may be missing. None: not a RESP client's.

        Any process of the application may store there what it likes: what ``pack`` cannot have
        written is somebody else's.
        """
        if not data or data[0] != _TAG:
            return None
        data = data.ljust(_USER_DATA_BYTES, b"\0")
        _, flags, db, sub, psub = _HEAD.unpack_from(data)
        words = data[_HEAD.size :].split(b"\0")[:3]
        if len(words) < 3 or not _PRINTABLE.issuperset(b"".join(words)):
            return None
        name, lib_name, lib_ver = words
        return cls(
            resp=3 if flags & 1 else 2,
            authenticated=bool(flags & 2),
            no_evict=bool(flags & 4),
            no_touch=bool(flags & 8),
            reply=Reply(min(flags >> 4, Reply.SKIP)),
            db=db,
            sub=sub,
            psub=psub,
            name=name,
            lib_name=lib_name,
            lib_ver=lib_ver,
        )


def client_name(user_data: bytes) -> str:
    """What a client calls itself, for people; empty if it does not, or speaks no RESP."""
    info = ClientInfo.unpack(user_data)
    return info.name.decode("utf-8", "backslashreplace") if info is not None else ""


@dataclasses.dataclass(frozen=True, slots=True)
class Client:
    """One line of CLIENT LIST."""

    id: int
    peer: str
    kind: str
    owner: int
    age_s: int
    idle_s: int
    bytes_in: int
    bytes_out: int
    commands: int
    info: ClientInfo
    last: bytes

    def type(self) -> str:
        """As the TYPE filter has it."""
        return "pubsub" if self.info.sub or self.info.psub else "normal"

    def line(self) -> bytes:
        """As CLIENT LIST shows it: Redis's fields as far as they mean something here, and ours."""
        info = self.info
        flags = "".join(
            letter
            for letter, shown in (
                ("P", info.sub or info.psub),
                ("U", self.kind == "unix"),
                ("e", info.no_evict),
                ("T", info.no_touch),
            )
            if shown
        )
        return (
            f"id={self.id} addr={self.peer} laddr= fd=-1 name={_text(info.name)} age={self.age_s} "
            f"idle={self.idle_s} flags={flags or 'N'} db={info.db} sub={info.sub} "
            f"psub={info.psub} ssub=0 multi=-1 events=r cmd={_text(self.last)} user=default "
            f"redir=-1 resp={info.resp} lib-name={_text(info.lib_name)} "
            f"lib-ver={_text(info.lib_ver)} tot-net-in={self.bytes_in} "
            f"tot-net-out={self.bytes_out} tot-cmds={self.commands} owner={self.owner}\n"
        ).encode("utf-8", "surrogateescape")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def clients(hub: Hub, only: int | None = None) -> list[Client]:
    """Every live RESP client of the runtime, the oldest first; or the one with this id."""
    now_ns = time.monotonic_ns()
    rows = hub.runtime.sockets()
    rows = rows[rows["state"] == _LIVE] if only is None else rows[rows["id"] == only]
    rows.sort(order="created_ns")
    found = []
    for row in rows:
        sid = int(row["id"])
        session = hub.sessions.get(sid)
        # What this worker's own clients did in this very batch is not in their user data yet.
        info = session.info if session is not None else ClientInfo.unpack(bytes(row["user_data"]))
        if info is None:
            continue
        created_ns = int(row["created_ns"])
        last_ns = max(created_ns, int(row["read_ns"]), int(row["written_ns"]))
        found.append(
            Client(
                id=sid,
                peer=_text(bytes(row["peer"])),
                kind=KIND_NAMES[row["kind"]],
                owner=int(row["owner"]),
                age_s=max(0, now_ns - created_ns) // 1_000_000_000,
                idle_s=max(0, now_ns - last_ns) // 1_000_000_000,
                bytes_in=int(row["bytes_in"]),
                bytes_out=int(row["bytes_out"]),
                commands=int(row["messages_in"]),
                info=info,
                last=session.last_command() if session is not None else b"NULL",
            )
        )
    return found


# ------------------------------------------------------------------------------- names, libraries


def set_name(session: RespSession, name: bytes) -> None:
    """Name a client; an empty name takes it away.

    Raises:
        CommandError: Redis allows no blanks and no special characters, we no long ones.
    """
    if not _PRINTABLE.issuperset(name):
        raise resp.CommandError(
            "ERR Client names cannot contain spaces, newlines or special characters."
        )
    if len(name) > MAX_NAME_BYTES:
        raise resp.CommandError(f"ERR Client names are at most {MAX_NAME_BYTES} bytes long here.")
    session.change(name=name)


def _setname(session: RespSession, args: resp.Command) -> None:
    set_name(session, args[2])
    session.reply(resp.OK)


def _getname(session: RespSession, args: resp.Command) -> None:
    name = session.info.name
    session.reply(resp.bulk(name) if name else resp.null(session.info.resp))


def _setinfo(session: RespSession, args: resp.Command) -> None:
    option, value = args[2], args[3]
    field = {b"lib-name": "lib_name", b"lib-ver": "lib_ver"}.get(option.lower())
    if field is None:
        raise resp.CommandError(b"ERR Unrecognized option '%s'" % resp.c_string(option))
    if not _PRINTABLE.issuperset(value):
        raise resp.CommandError(
            b"ERR %s cannot contain spaces, newlines or special characters." % option
        )
    session.change(**{field: value})
    session.reply(resp.OK)


# ---------------------------------------------------------------------------------------- looking


def _id(session: RespSession, args: resp.Command) -> None:
    session.reply(resp.integer(session.sid))


def _info(session: RespSession, args: resp.Command) -> None:
    lines = b"".join(client.line() for client in clients(session.hub, session.sid))
    session.reply_large(resp.verbatim(lines, session.info.resp))


_TYPES = {
    b"normal": "normal",
    b"pubsub": "pubsub",
    b"replica": "replica",
    b"slave": "replica",
    b"master": "master",
}


def _type_named(raw: bytes) -> str:
    if (kind := _TYPES.get(raw.lower())) is None:
        raise resp.CommandError(b"ERR Unknown client type '%s'" % resp.c_string(raw))
    return kind


def _list(session: RespSession, args: resp.Command) -> None:
    option = args[2].lower() if len(args) > 2 else b""
    if len(args) == 2:
        chosen = clients(session.hub)
    elif option == b"type" and len(args) == 4:
        kind = _type_named(args[3])
        chosen = [client for client in clients(session.hub) if client.type() == kind]
    elif option == b"id" and len(args) > 3:
        wanted = [resp.strict_integer(raw) for raw in args[3:]]
        if None in wanted:
            raise resp.CommandError("ERR Invalid client ID")
        by_id = {client.id: client for client in clients(session.hub)}
        chosen = [by_id[sid] for sid in wanted if sid in by_id]
    else:
        raise resp.CommandError("ERR syntax error")
    lines = b"".join(client.line() for client in chosen)
    session.reply_large(resp.verbatim(lines, session.info.resp))


# --------------------------------------------------------------------------------------- killing

_Filter = collections.abc.Callable[[Client], bool]


def _positive(raw: bytes, what: str) -> int:
    value = resp.strict_integer(raw)
    if value is None or value <= 0:
        raise resp.CommandError(f"ERR {what} should be greater than 0")
    return value


def _filter(option: bytes, value: bytes) -> _Filter:
    """One option of CLIENT KILL as a test."""
    if option == b"id":
        sid = _positive(value, "client-id")
        return lambda client: client.id == sid
    if option == b"addr":
        return lambda client: client.peer.encode("utf-8", "surrogateescape") == value
    if option == b"laddr":
        return lambda client: False  # not kept
    if option == b"type":
        kind = _type_named(value)
        return lambda client: client.type() == kind
    if option == b"user":
        if value != b"default":
            raise resp.CommandError(b"ERR No such user '%s'" % resp.c_string(value))
        return lambda client: True
    if option == b"maxage":
        if resp.strict_integer(value) is None:
            raise resp.CommandError("ERR maxage is not an integer or out of range")
        age_s = _positive(value, "maxage")
        return lambda client: client.age_s >= age_s
    raise resp.CommandError("ERR syntax error")


def _kill(session: RespSession, args: resp.Command) -> None:
    if len(args) == 3:
        victims = [c for c in clients(session.hub) if _filter(b"addr", args[2])(c)]
        if not victims:
            raise resp.CommandError("ERR No such client")
        session.reply(resp.OK)
        _kill_all(session, victims[:1])
        return
    tests: list[_Filter] = []
    skip_me = True
    for option, value in itertools.zip_longest(args[2::2], args[3::2], fillvalue=None):
        if option is None or value is None:
            raise resp.CommandError("ERR syntax error")
        if option.lower() != b"skipme":
            tests.append(_filter(option.lower(), value))
        elif value.lower() in (b"yes", b"no"):
            skip_me = value.lower() == b"yes"
        else:
            raise resp.CommandError("ERR syntax error")
    victims = [
        client
        for client in clients(session.hub)
        if not (skip_me and client.id == session.sid) and all(test(client) for test in tests)
    ]
    session.reply(resp.integer(_kill_all(session, victims)))


def _kill_all(session: RespSession, victims: list[Client]) -> int:
    """Fail them; the caller itself is closed once its answer is out. Returns how many."""
    killed = 0
    for client in victims:
        if client.id == session.sid:
            session.close()
            killed += 1
        else:
            text = f"CLIENT KILL by {format_socket_id(session.sid)}"
            killed += session.hub.runtime.set_failed(client.id, errno.ECONNABORTED, text)
    return killed


# ---------------------------------------------------------------------------------------- switches


def _switch(raw: bytes) -> bool:
    if raw.lower() not in (b"on", b"off"):
        raise resp.CommandError("ERR syntax error")
    return raw.lower() == b"on"


def _no_evict(session: RespSession, args: resp.Command) -> None:
    session.change(no_evict=_switch(args[2]))
    session.reply(resp.OK)


def _no_touch(session: RespSession, args: resp.Command) -> None:
    session.change(no_touch=_switch(args[2]))
    session.reply(resp.OK)


def _reply(session: RespSession, args: resp.Command) -> None:
    mode = args[2].lower()
    if mode == b"on":
        session.unmute()
        session.reply(resp.OK)
    elif mode == b"off":
        session.mute(Reply.OFF)
    elif mode == b"skip":
        if session.info.reply is not Reply.OFF:
            session.mute(Reply.SKIP)
    else:
        raise resp.CommandError("ERR syntax error")


HANDLERS: dict[str, Handler] = {
    "client|getname": _getname,
    "client|id": _id,
    "client|info": _info,
    "client|kill": _kill,
    "client|list": _list,
    "client|no-evict": _no_evict,
    "client|no-touch": _no_touch,
    "client|reply": _reply,
    "client|setinfo": _setinfo,
    "client|setname": _setname,
}
