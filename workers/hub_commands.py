"""What the hub says about itself: the table of its commands, COMMAND, CONFIG GET, INFO, HELP.

The table is what redis-server 7.0 says of the same commands, so that clients that ask before they
speak find what they know; CLIENT SETINFO and NO-TOUCH are of 7.2.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import os
import time
import typing

from shmsock import __version__
from shmsock.groups import compile_glob

from . import resp
from .hub_client import clients

if typing.TYPE_CHECKING:
    from .hub_protocol import Handler, Hub, RespSession

REDIS_VERSION = "7.0.0"

# Name, arity (with the name; negative: at least), flags, categories, group, since, summary. The
# arity of a subcommand counts its container.
_TABLE = """
auth           -2 noscript,loading,stale,fast,no_auth,allow_busy fast,connection connection 1.0.0 Give the password
client         -2 - slow connection 2.4.0 About connections
client|getname  2 noscript,loading,stale slow,connection connection 2.6.9 The name of this connection
client|help     2 loading,stale slow,connection connection 5.0.0 List the subcommands
client|id       2 noscript,loading,stale slow,connection connection 5.0.0 The SocketId of this connection
client|info     2 noscript,loading,stale slow,connection connection 6.2.0 All about this connection
client|kill    -3 admin,noscript,loading,stale admin,slow,dangerous,connection connection 2.4.0 End connections, of any worker
client|list    -2 admin,noscript,loading,stale admin,slow,dangerous,connection connection 2.4.0 The connections of all workers
client|no-evict 3 admin,noscript,loading,stale admin,slow,dangerous,connection connection 7.0.0 Note a wish not to be evicted
client|no-touch 3 noscript,loading,stale slow,connection connection 7.2.0 Note a wish not to touch keys
client|reply    3 noscript,loading,stale slow,connection connection 3.2.0 Switch replies on or off
client|setinfo  4 noscript,loading,stale slow,connection connection 7.2.0 Tell the client library's name or version
client|setname  3 noscript,loading,stale slow,connection connection 2.6.9 Name this connection
command        -1 loading,stale slow,connection server 2.8.13 About commands
command|count   2 loading,stale slow,connection server 2.8.13 How many commands there are
command|docs   -2 loading,stale slow,connection server 7.0.0 Documentation of commands
command|help    2 loading,stale slow,connection server 5.0.0 List the subcommands
command|info   -2 loading,stale slow,connection server 2.8.13 Arity, flags and categories of commands
command|list   -2 loading,stale slow,connection server 7.0.0 The names of the commands
config         -2 - slow server 2.0.0 About settings
config|get     -3 admin,noscript,loading,stale admin,slow,dangerous server 2.0.0 Settings by name or pattern
config|help     2 loading,stale slow server 5.0.0 List the subcommands
echo            2 loading,stale,fast fast,connection connection 1.0.0 Say it back
hello          -1 noscript,loading,stale,fast,no_auth,allow_busy fast,connection connection 6.0.0 Choose RESP2 or RESP3
info           -1 loading,stale slow,dangerous server 1.0.0 About this worker and its runtime
ping           -1 fast fast,connection connection 1.0.0 Say PONG
psubscribe     -2 pubsub,noscript,loading,stale pubsub,slow pubsub 2.0.0 Listen to channels that match patterns
publish         3 pubsub,loading,stale,fast pubsub,fast pubsub 2.0.0 Write a message to a channel's subscribers
pubsub         -2 - slow pubsub 2.8.0 About subscriptions
pubsub|channels -2 pubsub,loading,stale pubsub,slow pubsub 2.8.0 Channels with subscribers
pubsub|help     2 loading,stale slow pubsub 6.2.0 List the subcommands
pubsub|numpat   2 pubsub,loading,stale pubsub,slow pubsub 2.8.0 How many patterns are subscribed to
pubsub|numsub  -2 pubsub,loading,stale pubsub,slow pubsub 2.8.0 How many subscribers channels have
punsubscribe   -1 pubsub,noscript,loading,stale pubsub,slow pubsub 2.0.0 Listen no more to patterns
quit           -1 noscript,loading,stale,fast,no_auth,allow_busy fast,connection connection 1.0.0 End this connection
reset           1 noscript,loading,stale,fast,no_auth,allow_busy fast,connection connection 6.2.0 As if newly connected
select          2 loading,stale,fast fast,connection connection 1.0.0 Note a database number
subscribe      -2 pubsub,noscript,loading,stale pubsub,slow pubsub 2.0.0 Listen to channels
unsubscribe    -1 pubsub,noscript,loading,stale pubsub,slow pubsub 2.0.0 Listen no more to channels
"""  # noqa: E501

_TIPS = {
    "client|info": ("nondeterministic_output",),
    "client|list": ("nondeterministic_output",),
    "command": ("nondeterministic_output_order",),
    "command|docs": ("nondeterministic_output_order",),
    "command|info": ("nondeterministic_output_order",),
    "command|list": ("nondeterministic_output_order",),
    "info": ("nondeterministic_output", "request_policy:all_shards", "response_policy:special"),
    "ping": ("request_policy:all_shards", "response_policy:all_succeeded"),
}

# What a RESP2 client that listens may still say.
_WHILE_SUBSCRIBED = frozenset(
    ("ping", "subscribe", "unsubscribe", "psubscribe", "punsubscribe", "quit", "reset")
)


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """One command, or a container of subcommands, and what does it.

    Attributes:
        name: In lower case; of a subcommand with its container: ``client|id``.
        arity: Words with the name; negative: at least so many.
        subcommands: By their last word, in lower case.
    """

    name: str
    arity: int
    flags: tuple[str, ...]
    categories: tuple[str, ...]
    group: str
    since: str
    summary: str
    handler: Handler | None
    no_auth: bool
    while_subscribed: bool
    subcommands: dict[bytes, Spec]


def build(handlers: collections.abc.Mapping[str, Handler]) -> dict[bytes, Spec]:
    """The commands by name, in lower and in upper case, with their handlers.

    Raises:
        KeyError: The table and the handlers are not of the same commands.
    """
    missing = dict(handlers)
    commands: dict[bytes, Spec] = {}
    lines = [line.split(None, 6) for line in _TABLE.strip().splitlines()]
    containers = {name.partition("|")[0] for name, *_ in lines if "|" in name}
    for name, arity, flags, categories, group, since, summary in lines:
        # A container needs none, unless it also means something alone, as COMMAND does.
        handler = missing.pop(name, None) if name in containers else missing.pop(name)
        spec = Spec(
            name=name,
            arity=int(arity),
            flags=tuple(flags.split(",")) if flags != "-" else (),
            categories=tuple(categories.split(",")),
            group=group,
            since=since,
            summary=summary,
            handler=handler,
            no_auth="no_auth" in flags,
            while_subscribed=name in _WHILE_SUBSCRIBED,
            subcommands={},
        )
        container, _, word = name.partition("|")
        if word:
            commands[container.encode()].subcommands[word.encode()] = spec
        else:
            commands[name.encode()] = commands[name.upper().encode()] = spec
    if missing:
        raise KeyError(f"not in the table of commands: {sorted(missing)}")
    return commands


def _all(session: RespSession) -> list[Spec]:
    """Every command once, without subcommands."""
    return [spec for name, spec in session.hub.commands.items() if name.islower()]


def _find(session: RespSession, name: bytes) -> Spec | None:
    """A command by name, or by ``container|word``."""
    container, _, word = name.lower().partition(b"|")
    spec = session.hub.commands.get(container)
    return spec.subcommands.get(word) if spec is not None and word else spec


# ---------------------------------------------------------------------------------------- COMMAND


def _described(spec: Spec, version: int) -> bytes:
    flags = [resp.simple(flag) for flag in spec.flags]
    categories = [resp.simple("@" + category) for category in spec.categories]
    tips = [resp.bulk(tip.encode()) for tip in _TIPS.get(spec.name, ())]
    subcommands = [_described(sub, version) for sub in spec.subcommands.values()]
    return resp.array(
        (
            resp.bulk(spec.name.encode()),
            resp.integer(spec.arity),
            resp.unordered(flags, version),
            *[resp.integer(0)] * 3,  # no keys
            resp.unordered(categories, version),
            resp.unordered(tips, version),
            resp.unordered((), version),
            resp.unordered(subcommands, version),
        )
    )


def _documented(spec: Spec, version: int) -> bytes:
    pairs = [
        resp.bulk(word.encode())
        for word in ("summary", spec.summary, "since", spec.since, "group", spec.group)
    ]
    if spec.subcommands:
        pairs += resp.bulk(b"subcommands"), _documentation(spec.subcommands.values(), version)
    return resp.mapping(pairs, version)


def _documentation(specs: collections.abc.Iterable[Spec], version: int) -> bytes:
    pairs: list[bytes] = []
    for spec in specs:
        pairs += resp.bulk(spec.name.encode()), _documented(spec, version)
    return resp.mapping(pairs, version)


def _command(session: RespSession, args: resp.Command) -> None:
    version = session.info.resp
    session.reply_large(resp.array([_described(spec, version) for spec in _all(session)]))


def _command_info(session: RespSession, args: resp.Command) -> None:
    if len(args) == 2:
        _command(session, args)
        return
    version = session.info.resp
    found = [_find(session, name) for name in args[2:]]
    missing = resp.null(version)
    session.reply_large(
        resp.array([_described(spec, version) if spec else missing for spec in found])
    )


def _command_docs(session: RespSession, args: resp.Command) -> None:
    specs: collections.abc.Iterable[Spec | None] = _all(session)
    if len(args) > 2:
        specs = [_find(session, name) for name in args[2:]]
    known = [spec for spec in specs if spec is not None]
    session.reply_large(_documentation(known, session.info.resp))


def _command_count(session: RespSession, args: resp.Command) -> None:
    session.reply(resp.integer(len(_all(session))))


def _command_list(session: RespSession, args: resp.Command) -> None:
    specs = _all(session)
    if len(args) > 2:
        if len(args) != 5 or args[2].lower() != b"filterby":
            raise resp.CommandError("ERR syntax error")
        kind, value = args[3].lower(), args[4]
        if kind == b"pattern":
            matches = compile_glob(resp.checked_pattern(value).lower()).fullmatch
            every = [sub for spec in specs for sub in (spec, *spec.subcommands.values())]
            specs = [spec for spec in every if matches(spec.name.encode())]
        elif kind == b"aclcat":
            category = value.lower().decode("utf-8", "replace")
            every = [sub for spec in specs for sub in (spec, *spec.subcommands.values())]
            specs = [spec for spec in every if category in spec.categories]
        elif kind == b"module":
            specs = []
        else:
            raise resp.CommandError("ERR syntax error")
    session.reply_large(resp.array([resp.bulk(spec.name.encode()) for spec in specs]))


# ----------------------------------------------------------------------------------- CONFIG, HELP


def _config_get(session: RespSession, args: resp.Command) -> None:
    config, found = session.hub.config, {}
    for pattern in args[2:]:
        if pattern.lower() in config:
            found[pattern] = config[pattern.lower()]  # spelled as it was asked for
        else:
            matches = compile_glob(resp.checked_pattern(pattern).lower()).fullmatch
            found.update((name, value) for name, value in config.items() if matches(name))
    pairs = [resp.bulk(word) for pair in found.items() for word in pair]
    session.reply(resp.mapping(pairs, session.info.resp))


def _help(session: RespSession, args: resp.Command) -> None:
    container = session.hub.commands[args[0].lower()]
    lines = [f"{args[0].decode().upper()} <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"]
    for word, spec in container.subcommands.items():
        lines += word.decode().upper(), f"    {spec.summary}."
    session.reply(resp.array([resp.simple(line) for line in lines]))


# ------------------------------------------------------------------------------------------- INFO

_Section = dict[str, object]


def _server(hub: Hub) -> _Section:
    return {
        "redis_version": REDIS_VERSION,
        "redis_mode": "standalone",
        "shmsock_version": __version__,
        "shmsock_name": hub.runtime.name,
        "shmsock_process": hub.runtime.index,
        "process_id": os.getpid(),
        "uptime_in_seconds": int(time.monotonic() - hub.started_s),
        "uptime_in_days": int(time.monotonic() - hub.started_s) // 86400,
    }


def _clients(hub: Hub) -> _Section:
    everyone = clients(hub)
    return {
        "connected_clients": len(everyone),
        "maxclients": hub.config[b"maxclients"].decode(),
        "pubsub_clients": sum(client.type() == "pubsub" for client in everyone),
        "worker_clients": len(hub.sessions),
    }


def _stats(hub: Hub) -> _Section:
    return {
        "total_connections_received": hub.connections_received,
        "total_commands_processed": hub.commands_processed,
        "pubsub_channels": len(hub.channels(b"*")),
        "pubsub_patterns": len(hub.patterns()),
    }


def _replication(hub: Hub) -> _Section:
    return {"role": "master", "connected_slaves": 0}


_SECTIONS: dict[str, collections.abc.Callable[[Hub], _Section]] = {
    "Server": _server,
    "Clients": _clients,
    "Stats": _stats,
    "Replication": _replication,
}


def _info(session: RespSession, args: resp.Command) -> None:
    wanted = {word.decode("utf-8", "replace").lower() for word in args[1:]} or {"default"}
    everything = bool(wanted & {"default", "all", "everything"})
    parts = []
    for title, section in _SECTIONS.items():
        if everything or title.lower() in wanted:
            fields = section(session.hub).items()
            lines = [f"# {title}\r\n", *(f"{name}:{value}\r\n" for name, value in fields)]
            parts.append("".join(lines))
    session.reply_large(resp.verbatim("\r\n".join(parts).encode(), session.info.resp))


HANDLERS: dict[str, Handler] = {
    "client|help": _help,
    "command": _command,
    "command|count": _command_count,
    "command|docs": _command_docs,
    "command|help": _help,
    "command|info": _command_info,
    "command|list": _command_list,
    "config|get": _config_get,
    "config|help": _help,
    "info": _info,
    "pubsub|help": _help,
}
