"""The hub: publish and subscribe, spoken in RESP2 and RESP3.

A PUBLISH is written by the worker that got it straight to the subscribers' sockets, whichever
worker owns them: who subscribes to what is in the runtime's groups. A message looks different in
the two versions of RESP, so each channel and each pattern has a group a version: ``2c:news``,
``3c:news``, ``2p:n*``, ``3p:n*``. A subscriber is in exactly one of the two.

What is promised is what Redis promises, at most once, and an order per publisher. One thing is
weaker: a message published elsewhere while SUBSCRIBE is under way may overtake its confirmation.
The other way round, joining after the confirmation is out, would lose what is published right
after it.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import hashlib
import hmac
import time
import typing

from shmsock import (
    OverCrowdedError,
    Runtime,
    ShmsockError,
    SocketFailedError,
    SocketRef,
)
from shmsock.groups import compile_glob

from . import hub_client, hub_commands, hub_handlers, resp
from .hub_client import ClientInfo, Reply
from .hub_handlers import DATABASES, VERSIONS, group_of

Handler = collections.abc.Callable[["RespSession", resp.Command], None]

_LARGE_REPLY_BYTES = 16 << 10
_PING = [b"PING"]


class Hub:
    """The protocol, and what all its connections in one worker share.

    Attributes:
        sessions: This worker's clients by SocketId.
        config: What CONFIG GET tells.
    """

    name = "resp"

    def __init__(
        self,
        runtime: Runtime,
        password: str | None = None,
        max_connections: int | None = None,
        max_message_bytes: int = 64 << 20,
    ) -> None:
        """Serve ``runtime``'s clients; with a password, only those who give it."""
        self.runtime = runtime
        self.max_message_bytes = max_message_bytes
        self.sessions: dict[int, RespSession] = {}
        self.commands = COMMANDS
        self.commands_processed = 0
        self.connections_received = 0
        self.started_s = time.monotonic()
        self._password_hash = None if password is None else _hash(password.encode())
        limit = runtime.slots if max_connections is None else max_connections
        self.config = {
            b"appendonly": b"no",
            b"databases": b"%d" % DATABASES,
            b"maxclients": b"%d" % limit,
            b"proto-max-bulk-len": b"%d" % max_message_bytes,
            b"save": b"",
            b"timeout": b"0",
        }

    def match(self, head: bytes) -> bool | None:
        """Everything: HTTP is asked before, and what is not RESP gets Redis's own errors."""
        return True if head else None

    def resumes(self, user_data: bytes) -> bool:
        """Whether another worker's hub has left this."""
        return ClientInfo.unpack(user_data) is not None

    def open(self, ref: SocketRef) -> RespSession:
        """Start with a new client, or go on with one that another worker had."""
        session = RespSession(self, ref)
        self.sessions[ref.id] = session
        self.connections_received += 1
        return session

    @property
    def protected(self) -> bool:
        """Whether there is a password."""
        return self._password_hash is not None

    def admits(self, user: bytes, password: bytes) -> bool:
        """Whether these are right. There is one user; without a password it takes any."""
        right = self._password_hash is None or hmac.compare_digest(
            _hash(password), self._password_hash
        )
        return right and user == b"default"

    def publish(self, channel: bytes, message: bytes) -> int:
        """Write a message to whoever subscribes; returns how many took it."""
        groups = self.runtime.groups
        body = b"$7\r\nmessage\r\n" + resp.bulk(channel) + resp.bulk(message)
        taken = groups.broadcast(b"2c:" + channel, b"*3\r\n" + body)
        taken += groups.broadcast(b"3c:" + channel, b">3\r\n" + body)
        for version in VERSIONS:
            for name in groups.names(group_of(version, b"p", b"*")):
                pattern = name[3:]
                if not compile_glob(pattern).fullmatch(channel):
                    continue
                items = (b"$8\r\npmessage\r\n", *map(resp.bulk, (pattern, channel, message)))
                taken += groups.broadcast(name, resp.push(items, version))
        return taken

    def channels(self, pattern: bytes) -> list[bytes]:
        """The channels somebody in the runtime subscribes to, sorted."""
        names = self.runtime.groups.names
        found = {n[3:] for version in VERSIONS for n in names(group_of(version, b"c", pattern))}
        return sorted(found)

    def patterns(self) -> list[bytes]:
        """The patterns somebody in the runtime subscribes to, sorted."""
        names = self.runtime.groups.names
        return sorted({n[3:] for version in VERSIONS for n in names(group_of(version, b"p", b"*"))})

    def subscribers(self, channel: bytes) -> int:
        """How many subscribe to a channel itself."""
        count = self.runtime.groups.count
        return sum(count(group_of(version, b"c", channel)) for version in VERSIONS)


def _hash(password: bytes) -> bytes:
    # Compared by hash: the time tells nothing, not even a length.
    return hashlib.sha256(password).digest()


class RespSession:
    """One client, in the worker that owns it.

    Attributes:
        info: What others may know of it; what changed goes into the user data once a batch.
        channels: Subscribed to, in order; the values mean nothing.
        patterns: Likewise.
    """

    __slots__ = (
        "_closing",
        "_last",
        "_messages",
        "_muted",
        "_out",
        "_parser",
        "_plain",
        "_published",
        "_ref",
        "_stored",
        "channels",
        "hub",
        "info",
        "patterns",
        "sid",
    )

    def __init__(self, hub: Hub, ref: SocketRef) -> None:
        self.hub = hub
        self.sid = ref.id
        self.channels: dict[bytes, None] = {}
        self.patterns: dict[bytes, None] = {}
        self._ref: SocketRef | None = None
        self._out: list[bytes] = []
        self._last: resp.Command = []
        self._messages = 0
        self._muted = False
        self._closing = False
        self._published = False
        self._stored = ClientInfo.unpack(ref.user_data)
        self.info = self._stored or ClientInfo(authenticated=not hub.protected)
        if self.info.sub or self.info.psub:
            self._find_subscriptions()
        self._parser = resp.CommandParser(hub.max_message_bytes, not self.info.authenticated)
        self._plain = self._is_plain()
        self._store(ref)

    # -- the Session shape ----------------------------------------------------------------------

    def receive(self, ref: SocketRef, data: bytes) -> bool:
        """Handle every whole command in the stream so far."""
        self._ref = ref
        try:
            try:
                self._handle(data)
            except resp.ProtocolError as problem:
                self._muted = self.info.reply is not Reply.ON
                self.reply(problem.reply)
                self._closing = True
            if self.info is not self._stored:
                self._store(ref)
            if self._out:
                self._flush()
        finally:
            self._ref = None  # it is held for the length of this call only
        return not self._closing

    def idle(self) -> bool:
        """Whether no part of a command is kept."""
        return self._parser.idle()

    def messages(self) -> int:
        """How many commands were handled."""
        return self._messages

    def end(self, sid: int) -> None:
        """Leave every group now, rather than when somebody meets the stale id."""
        self.hub.sessions.pop(sid, None)
        if self.channels or self.patterns:
            self.hub.runtime.groups.discard_everywhere(sid)

    def movable(self) -> bool:
        """Everything is in the user data and the groups.

        What this worker still has to send of a publisher's messages must be out: another worker
        would be ahead of it with the next one.
        """
        if self._published and self.hub.runtime.unwritten_bytes():
            return False
        return not self._closing and self._parser.idle()

    def moved(self, sid: int) -> None:
        """Leave it to its new owner; its groups are its own."""
        self.hub.sessions.pop(sid, None)

    # -- what handlers use ----------------------------------------------------------------------

    def reply(self, encoded: bytes) -> None:
        """Answer the command under way, unless the client wants no answer."""
        if not self._muted:
            self._out.append(encoded)

    def reply_large(self, encoded: bytes) -> None:
        """The same for what may be long: a pipeline of these must not pile up before it is out."""
        self.reply(encoded)
        if len(encoded) > _LARGE_REPLY_BYTES:
            self._flush()

    def push(self, encoded: bytes) -> None:
        """Say something that is no answer, and so is not muted."""
        self._out.append(encoded)

    def before_publish(self) -> None:
        """Let earlier answers go first: what is published may be written to this client too."""
        self._published = True
        if self.channels or self.patterns:
            self._flush()

    def change(self, **fields: typing.Any) -> None:
        """Change what is known of the client."""
        self.info = dataclasses.replace(self.info, **fields)
        self._parser.restricted = not self.info.authenticated
        self._plain = self._is_plain()

    def mute(self, mode: Reply) -> None:
        """Answer no more, or not the next command; nor this one."""
        self._muted = True
        self.change(reply=mode)

    def unmute(self) -> None:
        """Answer again, this command included."""
        self._muted = False
        self.change(reply=Reply.ON)

    def close(self) -> None:
        """Handle nothing more; close once the answers are out."""
        self._closing = True

    def last_command(self) -> bytes:
        """Full name of the command under way, or the last one."""
        spec = COMMANDS.get(self._last[0].lower()) if self._last else None
        if spec is None:
            return b"NULL"
        if len(self._last) > 1:
            spec = spec.subcommands.get(self._last[1].lower(), spec)
        return spec.name.encode()

    def groups_of(self, version: int) -> list[bytes]:
        """The groups this client is in, when it speaks that version."""
        return [group_of(version, b"c", name) for name in self.channels] + [
            group_of(version, b"p", name) for name in self.patterns
        ]

    # -- inside ---------------------------------------------------------------------------------

    def _handle(self, data: bytes) -> None:
        out, parser = self._out, self._parser
        parser.feed(data)
        while not self._closing and (batch := parser.batch()):
            handled = len(batch)
            if self._plain and batch.count(_PING) == handled:
                out.append(resp.PONG * handled)
                self._last = _PING
            else:
                handled = 0
                for args in batch:
                    handled += 1
                    self._execute(args)
                    if self._closing:
                        break
            self._messages += handled
            self.hub.commands_processed += handled

    def _is_plain(self) -> bool:
        """Whether a PING simply gets a PONG."""
        info = self.info
        listens = info.resp == 2 and bool(self.channels or self.patterns)
        return info.authenticated and info.reply is Reply.ON and not listens

    def _execute(self, args: resp.Command) -> None:
        mode = self.info.reply
        self._muted = mode is not Reply.ON
        if mode is Reply.SKIP:
            self.change(reply=Reply.ON)  # used up by this command, even by a blank line
        if not args:
            return
        self._last = args
        try:
            self._run(args)
        except resp.CommandError as refusal:
            self.reply(refusal.reply)
        except (SocketFailedError, OverCrowdedError):
            raise  # this client's own end
        except (OSError, ShmsockError) as problem:  # the groups are full, a stripe not to be had
            self.reply(resp.error(f"ERR {getattr(problem, 'strerror', None) or problem}"))

    def _run(self, args: resp.Command) -> None:
        spec = COMMANDS.get(args[0]) or COMMANDS.get(args[0].lower())
        if spec is None:
            if args[0].lower() in (b"host:", b"post"):
                # A browser is being used to talk to us behind its user's back; say nothing.
                self._out.clear()
                self.close()
                return
            raise resp.CommandError(_unknown(args))
        if spec.subcommands and len(args) > 1:
            container, spec = spec, spec.subcommands.get(args[1].lower())
            if spec is None:
                word, name = resp.c_string(args[1], 128), container.name.upper().encode()
                raise resp.CommandError(b"ERR unknown subcommand '%s'. Try %s HELP." % (word, name))
        arity = spec.arity
        if spec.handler is None or (len(args) != arity if arity > 0 else len(args) < -arity):
            raise resp.CommandError(f"ERR wrong number of arguments for '{spec.name}' command")
        if not (self.info.authenticated or spec.no_auth):
            raise resp.CommandError("NOAUTH Authentication required.")
        if self.info.resp == 2 and (self.channels or self.patterns) and not spec.while_subscribed:
            raise resp.CommandError(
                f"ERR Can't execute '{spec.name}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING"
                " / QUIT / RESET are allowed in this context"
            )
        spec.handler(self, args)

    def _flush(self) -> None:
        if self._out and self._ref is not None:
            data = b"".join(self._out)
            self._out.clear()
            self._ref.write(data)

    def _store(self, ref: SocketRef) -> None:
        if self.info is not self._stored:
            if self.info != self._stored:
                ref.user_data = self.info.pack()
            self._stored = self.info

    def _find_subscriptions(self) -> None:
        """Another worker had this client: what it subscribes to is in the groups."""
        for name in self.hub.runtime.groups.names_of(self.sid):
            for kind, held in ((b"c", self.channels), (b"p", self.patterns)):
                if name.startswith(group_of(self.info.resp, kind, b"")):
                    held[name[3:]] = None


def _unknown(args: resp.Command) -> bytes:
    shown = b""
    for arg in args[1:]:
        if len(shown) >= 128:
            break
        shown += b"'%s' " % resp.c_string(arg, 128 - len(shown))
    name = resp.c_string(args[0], 128)
    return b"ERR unknown command '%s', with args beginning with: %s" % (name, shown)


COMMANDS = hub_commands.build(
    {**hub_handlers.HANDLERS, **hub_client.HANDLERS, **hub_commands.HANDLERS}
)
