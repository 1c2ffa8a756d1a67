"""The pages: the runtime over HTTP, right whichever worker answers, for its data is shared.

    GET  /                    what there is
    GET  /health              200 ok, or 503 and why
    GET  /status              the runtime as a whole, its processes
    GET  /connections         one row a connection      both: the first 1024, all with ?givemeall
    GET  /sockets             the pool, one row a socket
    GET  /sockets/<id>        everything about one; id as number or sk- text
    POST /sockets/<id>/fail   end it: 200, 409 it had failed already, 404 it is gone; ?reason=
    GET  /metrics             Prometheus text

A browser (Accept has text/html) gets HTML, everything else plain text; ``?format=text|html|json``
chooses. Whoever may see a page may end every connection, so ``refusal`` stands before all of them.
What clients say of themselves is in these pages: HTML escapes every cell, text is made printable.
"""

from __future__ import annotations

import base64
import collections.abc
import errno
import functools
import hashlib
import html
import ipaddress
import json
import logging
import typing
import urllib.parse

import prometheus_client
import prometheus_client.core
import prometheus_client.registry

import shmsock

from . import report
from .http import Request, Response
from .report import Row

if typing.TYPE_CHECKING:
    from shmsock import Runtime, SocketRef

log = logging.getLogger("shmsock")

SHOWN_ROWS = 1024
_FORMATS = ("text", "html", "json")
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:1.5em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}"
    "th,td{text-align:left;padding:.2em .8em;border-bottom:1px solid #ddd;white-space:nowrap}"
    "td{font-family:ui-monospace,monospace}td.r,th.r{text-align:right}nav a{margin-right:1em}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HTML_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    # Not no-referrer: browsers would then send our own form with "Origin: null".
    "Referrer-Policy": "same-origin",
}
_ADDRESS_LENGTH = 64  # no IP address is longer, brackets and scope included
_LINKS = ("/status", "/connections", "/sockets", "/health", "/metrics")


class _WrongRequestError(Exception):
    """Answer with this status and sentence; the connection goes on."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(status, text)
        self.status, self.text, self.headers = status, text, headers


class Pages:
    """The handler of the HTTP protocol in the built-in server."""

    def __init__(
        self,
        rt: Runtime,
        *,
        allow_remote: bool = False,
        health: collections.abc.Callable[[], str | None] | None = None,
        name_of: report.NameOf | None = None,
    ) -> None:
        """Serve the pages of a runtime.

        Args:
            rt: The runtime.
            allow_remote: Answer peers of other machines too (``--pages-remote``).
            health: Why this worker should get no new work, or None; asked by /health. By default
                it is whether the runtime has a host.
            name_of: Tells a client's name from its ``user_data``.
        """
        self._rt = rt
        self._allow_remote = allow_remote
        self._health = health or self._host_health
        self._name_of = name_of
        self._registry = prometheus_client.CollectorRegistry(auto_describe=False)
        self._registry.register(RuntimeCollector(rt))
        self._pages: dict[str, collections.abc.Callable[[Request], Response]] = {
            "/": self._index,
            "/health": self._health_page,
            "/status": self._status,
            "/connections": self._connections,
            "/sockets": self._sockets,
            "/metrics": self._metrics,
        }

    def __call__(self, request: Request, ref: SocketRef) -> Response:
        """Answer one request."""
        try:
            why = refusal(request, ref.peer, self._allow_remote)
            if why:
                raise _WrongRequestError(403, why)
            return self._route(request)
        except _WrongRequestError as error:
            return _plain(error.status, error.text, error.headers)
        except shmsock.ShmsockError as error:
            # A stuck stripe, a poisoned segment: not a bug of the page, and perhaps over soon.
            log.warning("%s %s: %s", request.method, ascii(request.path), error)
            return _plain(503, str(error))

    def _route(self, request: Request) -> Response:
        page = self._pages.get(request.path)
        if page:
            _check_method(request, "GET", "HEAD")
            return page(request)
        parts = request.path.split("/")
        if parts[:2] == ["", "sockets"] and len(parts) == 3:
            _check_method(request, "GET", "HEAD")
            return self._socket(request, _socket_id(parts[2]))
        if parts[:2] == ["", "sockets"] and parts[3:] == ["fail"]:
            _check_method(request, "POST")
            return self._fail(request, _socket_id(parts[2]))
        raise _WrongRequestError(404, f"no such page; there are {', '.join(_LINKS)}")

    # -- pages ----------------------------------------------------------------------------------

    def _index(self, request: Request) -> Response:
        text = "".join(f"{link}\n" for link in (*_LINKS, "/sockets/<id>"))
        rows = "".join(f'<p><a href="{link}">{link}</a></p>' for link in _LINKS)
        return self._answer(request, {"pages": list(_LINKS)}, lambda: text, lambda: rows)

    def _health_page(self, request: Request) -> Response:
        why = self._health()
        data = {"healthy": not why, "reason": why}
        text = report.printable(why or "ok")
        return self._answer(
            request,
            data,
            lambda: f"{text}\n",
            lambda: f"<p>{html.escape(text)}</p>",
            status=503 if why else 200,
        )

    def _host_health(self) -> str | None:
        alive = self._rt.host_alive()
        return None if alive else "the host process, which keeps the descriptors, is dead"

    def _status(self, request: Request) -> Response:
        found = report.status(self._rt)
        return self._answer(
            request,
            found,
            lambda: report.status_text(found),
            lambda: (
                _html_pairs(report.status_pairs(found))
                + _html_table(report.PROCESS_COLUMNS, found["processes"])
            ),
        )

    def _connections(self, request: Request) -> Response:
        table = report.connections_of(self._rt.sockets())
        rows, more = self._shown(request, table)
        total = f"{_number(len(table), 'connection')}{more}"
        return self._answer(
            request,
            rows,
            lambda: f"{report.connections_text(rows)}{total}\n",
            lambda: f"<p>{html.escape(total)}</p>{_html_table(report.CONNECTION_COLUMNS, rows)}",
            headers={"X-Total-Count": str(len(table))},
        )

    def _sockets(self, request: Request) -> Response:
        table = self._rt.sockets()
        found = report.counts(table)
        pairs = report.counts_pairs(found, self._rt.slots)
        rows, more = self._shown(request, table)
        total = f"{_number(len(table), 'socket')}{more}"
        return self._answer(
            request,
            {"slots": self._rt.slots, "counts": found, "sockets": rows},
            lambda: (
                f"{report.list_text(pairs)}\n"
                f"{report.table_text(report.SOCKET_COLUMNS, rows)}{total}\n"
            ),
            lambda: (
                _html_pairs(pairs)
                + f"<p>{html.escape(total)}</p>{_html_table(report.SOCKET_COLUMNS, rows)}"
            ),
            headers={"X-Total-Count": str(len(table))},
        )

    def _shown(self, request: Request, table: report.Table) -> tuple[list[Row], str]:
        """Describe the rows to show, and say whether there are more."""
        shown = table if "givemeall" in request.query else table[:SHOWN_ROWS]
        rows = report.describe(self._rt, shown, name_of=self._name_of)
        more = len(table) - len(rows)
        return rows, f", the first {len(rows)} shown: ?givemeall shows all" if more else ""

    def _socket(self, request: Request, sid: int) -> Response:
        row = report.socket(self._rt, sid, name_of=self._name_of)
        if row is None:
            raise _WrongRequestError(404, f"{shmsock.format_socket_id(sid)} is gone")
        pairs = report.socket_pairs(row)
        form = (
            f'<form method="post" action="/sockets/{row["text"]}/fail">'
            '<input name="reason" placeholder="reason"> <button>fail</button></form>'
        )
        return self._answer(
            request,
            row,
            lambda: report.list_text(pairs),
            lambda: _html_pairs(pairs) + (form if row["state"] == "live" else ""),
        )

    def _fail(self, request: Request, sid: int) -> Response:
        _format_of(request)  # a bad request must not have failed anything
        reason = _reason(request)
        won = self._rt.set_failed(sid, errno.ECONNABORTED, reason)
        text = shmsock.format_socket_id(sid)
        if won:
            status, says = 200, f"{text} failed: {reason}"
        elif self._rt.status(sid) is shmsock.Status.FAILED:
            status, says = 409, f"{text} had failed already"
        else:
            status, says = 404, f"{text} is gone"
        says = report.printable(says)
        return self._answer(
            request,
            {"id": sid, "text": text, "winner": won, "result": says},
            lambda: f"{says}\n",
            lambda: f"<p>{html.escape(says)}</p>",
            status=status,
        )

    def _metrics(self, request: Request) -> Response:
        body = prometheus_client.generate_latest(self._registry)
        return Response(200, body, _METRICS_TYPE)

    # -- forms of an answer ---------------------------------------------------------------------

    def _answer(
        self,
        request: Request,
        data: object,
        text: collections.abc.Callable[[], str],
        body: collections.abc.Callable[[], str],
        *,
        status: int = 200,
        headers: collections.abc.Mapping[str, str] | None = None,
    ) -> Response:
        """Answer in the form that was asked for."""
        form = _format_of(request)
        fields = {"Vary": "Accept", **(headers or {})}
        if form == "json":
            return Response(status, json.dumps(data).encode() + b"\n", "application/json", fields)
        if form == "text":
            return Response(status, text().encode("utf-8", "backslashreplace"), headers=fields)
        title = html.escape(f"{self._rt.name}: {request.path}")
        links = "".join(f'<a href="{link}">{link[1:]}</a>' for link in _LINKS)
        page = (
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style></head><body><nav>{links}</nav><h1>{title}</h1>{body()}"
            "</body></html>\n"
        )
        return Response(
            status,
            page.encode("utf-8", "backslashreplace"),
            "text/html; charset=utf-8",
            {**_HTML_HEADERS, **fields},
        )


def _number(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _plain(
    status: int, text: str, headers: collections.abc.Mapping[str, str] | None = None
) -> Response:
    body = f"{status} {report.printable(text)}\n".encode("utf-8", "backslashreplace")
    return Response(status, body, headers=headers or {})


def _html_table(
    columns: collections.abc.Sequence[report.Column], rows: collections.abc.Sequence[Row]
) -> str:
    classes = ['<{} class="r">' if column.align == ">" else "<{}>" for column in columns]
    head = "".join(
        f"{start.format('th')}{html.escape(column.title)}</th>"
        for start, column in zip(classes, columns, strict=True)
    )
    lines = []
    for row, texts in zip(rows, report.cells(columns, rows), strict=True):
        line = ""
        for start, column, text in zip(classes, columns, texts, strict=True):
            cell = html.escape(text)
            if column.title == "SOCKET":
                cell = f'<a href="/sockets/{html.escape(row["text"])}">{cell}</a>'
            line += f"{start.format('td')}{cell}</td>"
        lines.append(f"<tr>{line}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _html_pairs(pairs: collections.abc.Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(report.printable(value))}</td></tr>"
        for name, value in pairs.items()
    )
    return f"<table>{rows}</table>"


# -- requests -----------------------------------------------------------------------------------


def _check_method(request: Request, *allowed: str) -> None:
    if request.method not in allowed:
        raise _WrongRequestError(
            405, f"{request.method} does nothing here", Allow=", ".join(allowed)
        )


def _socket_id(text: str) -> int:
    try:
        return shmsock.parse_socket_id(text)
    except ValueError as error:
        raise _WrongRequestError(400, str(error)) from None


def _format_of(request: Request) -> str:
    for value in request.query.get("format", []):
        if value not in _FORMATS:
            raise _WrongRequestError(400, f"format is one of {', '.join(_FORMATS)}")
        return value
    for item in request.headers.get(b"accept", b"").lower().split(b","):
        media, *parameters = (part.strip() for part in item.split(b";"))
        if media == b"text/html" and b"q=0" not in parameters:
            return "html"
    return "text"


def _reason(request: Request) -> str:
    """The reason for a failure, from the query or a form's body."""
    values = request.query.get("reason")
    media = request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if not values and media == b"application/x-www-form-urlencoded":
        try:
            form = urllib.parse.parse_qs(request.body.decode("latin-1"), max_num_fields=100)
        except ValueError:
            raise _WrongRequestError(400, "bad form") from None
        values = form.get("reason")
    return (values or [""])[0].strip() or "failed by an operator, over HTTP"


# -- who may ask --------------------------------------------------------------------------------


def refusal(request: Request, peer: str, allow_remote: bool) -> str:
    """Why this request is not answered; empty when it is.

    Three ways in are closed:

    * Another machine connects: refused by its address, unless the pages were opened.
    * A web page in a browser on this machine makes it connect to 127.0.0.1 under a name of its own
      (DNS rebinding): the connection is local, and to the browser it is one site, so only the Host
      header tells. From a loopback peer it must be localhost or a loopback address. (A proxy in
      front has to set it so.) A browser cannot reach a UNIX socket. With the pages opened, peers of
      other machines may use any name: we cannot know ours, so rebinding is theirs to prevent.
    * A web page makes the browser send a POST across sites, which needs nobody's permission:
      the browser says so in Origin and Sec-Fetch-Site. curl sends neither.
    """
    where = _place_of(peer)
    if where == "remote" and not allow_remote:
        return "these pages answer local clients only; --pages-remote opens them"
    host = request.headers.get(b"host", b"").decode("latin-1")
    if where == "loopback" and host and not _is_loopback_host(host):
        return f"the Host header {host!r} is not localhost or a loopback address"
    if request.method not in ("GET", "HEAD"):
        site = request.headers.get(b"sec-fetch-site")
        origin = request.headers.get(b"origin")
        own = f"http://{host}".lower().encode("latin-1")
        if (site is not None and site != b"same-origin") or (
            origin is not None and origin.lower() != own
        ):
            return "this came from a web page of another site"
    return ""


def _place_of(peer: str) -> typing.Literal["unix", "loopback", "remote"]:
    """Where a peer is, by its text in the table. Whatever cannot be read is far away."""
    if peer.startswith("unix:"):
        return "unix"
    return "loopback" if _is_loopback(peer.rpartition(":")[0]) else "remote"


def _is_loopback_host(host: str) -> bool:
    """Whether a Host header names this machine to itself, with or without a port."""
    if host.startswith("["):
        name, closing, port = host.partition("]")
        name, port = name + closing, port.removeprefix(":")
    else:
        name, _, port = host.partition(":")
    if port and not (port.isascii() and port.isdigit()):
        return False
    return name.lower() == "localhost" or _is_loopback(name)


def _is_loopback(text: str) -> bool:
    # What a client claims to be may be long, and is forgotten.
    return _is_loopback_address(text) if len(text) <= _ADDRESS_LENGTH else False


@functools.lru_cache(256)
def _is_loopback_address(text: str) -> bool:
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


# -- metrics ------------------------------------------------------------------------------------


class RuntimeCollector(prometheus_client.registry.Collector):
    """Reads the shared table when it is scraped, so any worker answers for the whole runtime.

    WHY NOT counters: the sums are over the sockets in the table now and fall when one is recycled,
    which ``rate()`` would take for a restart of the server.
    """

    def __init__(self, rt: Runtime) -> None:
        """Collect from this runtime."""
        self._rt = rt

    def collect(self) -> collections.abc.Iterator[prometheus_client.core.Metric]:
        """Yield everything, from one look at the table."""
        found = report.status(self._rt)
        counts = found["counts"]
        for name, help_text, value in (
            ("slots", "Sockets that the table can hold.", found["limits"]["slots"]),
            ("connections", "Sockets in the table that do not listen.", counts["connections"]),
            ("references", "Sum of nref over the sockets in the table.", counts["references"]),
            ("busy_sockets", "Sockets in the middle of a message.", counts["busy"]),
            ("writing_sockets", "Sockets whose write turn is taken.", counts["writing"]),
            ("in_bytes", "Read from the sockets now in the table.", counts["bytes_in"]),
            ("out_bytes", "Written to the sockets now in the table.", counts["bytes_out"]),
            ("in_messages", "Read from the sockets now in the table.", counts["messages_in"]),
            ("out_messages", "Written to the sockets now in the table.", counts["messages_out"]),
            ("uptime_seconds", "Age of the supervisor.", found["uptime_s"]),
            ("host_alive", "1 while a process serves the descriptors.", found["host_alive"]),
        ):
            yield prometheus_client.core.GaugeMetricFamily(f"shmsock_{name}", help_text, value)
        info = prometheus_client.core.InfoMetricFamily("shmsock", "What is running.")
        info.add_metric([], {"name": found["name"], "version": found["version"]})
        yield info
        yield _labelled(
            "sockets",
            "Sockets by state.",
            ("state",),
            [((state,), counts[state]) for state in ("live", "failed")],
        )
        yield _labelled(
            "sockets_of_kind",
            "Sockets by kind.",
            ("kind",),
            [((kind,), count) for kind, count in counts["kinds"].items()],
        )
        for name, help_text, key in (
            ("process_sockets", "Sockets that a process owns.", "sockets"),
            ("process_attached", "Slots that a process has references on.", "attached"),
            ("process_alive", "1 while the kernel says so.", "alive"),
        ):
            yield _labelled(
                name,
                help_text,
                ("process", "role"),
                [((str(row["index"]), row["role"]), row[key]) for row in found["processes"]],
            )


def _labelled(
    name: str,
    help_text: str,
    labels: tuple[str, ...],
    samples: list[tuple[tuple[str, ...], float]],
) -> prometheus_client.core.GaugeMetricFamily:
    family = prometheus_client.core.GaugeMetricFamily(f"shmsock_{name}", help_text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
