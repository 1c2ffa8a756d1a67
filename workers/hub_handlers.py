"""What clients say: the connection's own commands, publishing and subscribing."""

from __future__ import annotations

import typing

from . import hub_client, hub_commands, resp

if typing.TYPE_CHECKING:
    from .hub_protocol import Handler, RespSession

DATABASES = 16
VERSIONS = (2, 3)


def group_of(version: int, kind: bytes, name: bytes) -> bytes:
    """The group of a channel (kind ``c``) or pattern (``p``); of a glob, the glob of groups."""
    return b"%d%s:%s" % (version, kind, name)


# ------------------------------------------------------------------------------------- connection


def _ping(session: RespSession, args: resp.Command) -> None:
    if len(args) > 2:
        raise resp.CommandError("ERR wrong number of arguments for 'ping' command")
    if session.info.resp == 2 and (session.channels or session.patterns):
        session.reply(resp.array((resp.bulk(b"pong"), resp.bulk(b"".join(args[1:])))))
    else:
        session.reply(resp.bulk(args[1]) if len(args) > 1 else resp.PONG)


def _echo(session: RespSession, args: resp.Command) -> None:
    session.reply(resp.bulk(args[1]))


def _select(session: RespSession, args: resp.Command) -> None:
    number = resp.strict_integer(args[1])
    if number is None:
        raise resp.CommandError("ERR value is not an integer or out of range")
    if not -(1 << 31) <= number < 1 << 31:
        raise resp.CommandError(
            "ERR value is out of range, value must between -2147483648 and 2147483647"
        )
    if not 0 <= number < DATABASES:
        raise resp.CommandError("ERR DB index is out of range")
    session.change(db=number)
    session.reply(resp.OK)


def _quit(session: RespSession, args: resp.Command) -> None:
    session.reply(resp.OK)
    session.close()


def _authenticate(session: RespSession, user: bytes, password: bytes) -> None:
    if not session.hub.admits(user, password):
        raise resp.CommandError("WRONGPASS invalid username-password pair or user is disabled.")
    session.change(authenticated=True)


def _auth(session: RespSession, args: resp.Command) -> None:
    if len(args) > 3:
        raise resp.CommandError("ERR syntax error")
    if len(args) == 2 and not session.hub.protected:
        raise resp.CommandError(
            "ERR AUTH <password> called without any password configured for the default user."
            " Are you sure your configuration is correct?"
        )
    _authenticate(session, args[1] if len(args) == 3 else b"default", args[-1])
    session.reply(resp.OK)


def _hello(session: RespSession, args: resp.Command) -> None:
    version = session.info.resp
    if len(args) > 1:
        wanted = resp.strict_integer(args[1])
        if wanted is None:
            raise resp.CommandError("ERR Protocol version is not an integer or out of range")
        if wanted not in VERSIONS:
            raise resp.CommandError("NOPROTO unsupported protocol version")
        version = wanted
    _hello_options(session, args[2:])
    if not session.info.authenticated:
        raise resp.CommandError(
            "NOAUTH HELLO must be called with the client already authenticated, otherwise the"
            " HELLO AUTH <user> <pass> option can be used to authenticate the client and select"
            " the RESP protocol version at the same time"
        )
    _speak(session, version)
    fields = {
        b"server": resp.bulk(b"redis"),
        b"version": resp.bulk(hub_commands.REDIS_VERSION.encode()),
        b"proto": resp.integer(version),
        b"id": resp.integer(session.sid),
        b"mode": resp.bulk(b"standalone"),
        b"role": resp.bulk(b"master"),
        b"modules": resp.EMPTY_ARRAY,
    }
    pairs = [item for name, value in fields.items() for item in (resp.bulk(name), value)]
    session.reply(resp.mapping(pairs, version))


def _hello_options(session: RespSession, options: resp.Command) -> None:
    at = 0
    while at < len(options):
        left = len(options) - at - 1
        option = options[at].lower()
        if option == b"auth" and left >= 2:
            _authenticate(session, options[at + 1], options[at + 2])
            at += 3
        elif option == b"setname" and left >= 1:
            hub_client.set_name(session, options[at + 1])
            at += 2
        else:
            word = resp.c_string(options[at])
            raise resp.CommandError(b"ERR Syntax error in HELLO option '%s'" % word)


def _speak(session: RespSession, version: int) -> None:
    """Change the version; with it the groups that the client is in."""
    if version == session.info.resp:
        return
    groups = session.hub.runtime.groups
    # Out first: at most once, so a message between the two is rather lost than doubled.
    for name in session.groups_of(session.info.resp):
        groups.discard(name, session.sid)
    for name in session.groups_of(version):
        groups.add(name, session.sid)
    session.change(resp=version)


def _reset(session: RespSession, args: resp.Command) -> None:
    groups = session.hub.runtime.groups
    for name in session.groups_of(session.info.resp):
        groups.discard(name, session.sid)
    session.channels.clear()
    session.patterns.clear()
    session.unmute()
    session.change(
        resp=2,
        authenticated=not session.hub.protected,
        no_evict=False,
        no_touch=False,
        db=0,
        sub=0,
        psub=0,
        name=b"",
    )
    session.reply(b"+RESET\r\n")


# ---------------------------------------------------------------------------- publish, subscribe


def _subscription(verb: bytes, kind: bytes, joins: bool) -> Handler:
    """The four commands that change subscriptions: each name is confirmed, even if nothing changed.

    They are confirmed with pushes, which no CLIENT REPLY mutes.
    """

    def handle(session: RespSession, args: resp.Command) -> None:
        version, groups = session.info.resp, session.hub.runtime.groups
        held = session.channels if kind == b"c" else session.patterns
        word = resp.bulk(verb)
        names: list[bytes | None] = list(args[1:] if len(args) > 1 else held) or [None]
        try:
            for name in names:
                if name is not None and joins and name not in held:
                    if kind == b"p":
                        resp.checked_pattern(name)
                    groups.add(group_of(version, kind, name), session.sid)
                    held[name] = None
                elif name in held and not joins:
                    groups.discard(group_of(version, kind, name), session.sid)
                    del held[name]
                shown = resp.null(version) if name is None else resp.bulk(name)
                count = resp.integer(len(session.channels) + len(session.patterns))
                session.push(resp.push((word, shown, count), version))
        finally:
            session.change(sub=len(session.channels), psub=len(session.patterns))

    return handle


def _publish(session: RespSession, args: resp.Command) -> None:
    session.before_publish()
    session.reply(resp.integer(session.hub.publish(args[1], args[2])))


def _pubsub_channels(session: RespSession, args: resp.Command) -> None:
    if len(args) > 3:
        raise resp.CommandError(
            b"ERR unknown subcommand or wrong number of arguments for '%s'. Try PUBSUB HELP."
            % resp.c_string(args[1], 128)
        )
    channels = session.hub.channels(resp.checked_pattern(args[2]) if len(args) == 3 else b"*")
    session.reply_large(resp.array(list(map(resp.bulk, channels))))


def _pubsub_numsub(session: RespSession, args: resp.Command) -> None:
    pairs: list[bytes] = []
    for channel in args[2:]:
        pairs += resp.bulk(channel), resp.integer(session.hub.subscribers(channel))
    session.reply_large(resp.array(pairs))


def _pubsub_numpat(session: RespSession, args: resp.Command) -> None:
    session.reply(resp.integer(len(session.hub.patterns())))


HANDLERS: dict[str, Handler] = {
    "auth": _auth,
    "echo": _echo,
    "hello": _hello,
    "ping": _ping,
    "psubscribe": _subscription(b"psubscribe", b"p", joins=True),
    "publish": _publish,
    "pubsub|channels": _pubsub_channels,
    "pubsub|numpat": _pubsub_numpat,
    "pubsub|numsub": _pubsub_numsub,
    "punsubscribe": _subscription(b"punsubscribe", b"p", joins=False),
    "quit": _quit,
    "reset": _reset,
    "select": _select,
    "subscribe": _subscription(b"subscribe", b"c", joins=True),
    "unsubscribe": _subscription(b"unsubscribe", b"c", joins=False),
}
