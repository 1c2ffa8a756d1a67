"""The pages and the report under them: what they show, how it is written, who may see it."""

from __future__ import annotations

import base64
import errno
import hashlib
import html.parser
import json
import os
import re
import socket
import time
import typing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import shmsock
from workers import report
from workers.http import HttpProtocol, Request, Response
from workers.pages import SHOWN_ROWS, Pages

if typing.TYPE_CHECKING:
    from shmsock import Runtime, SocketRef

CONTRACT_KEYS = ["id", "text", "state", "owner", "pid", "peer", "kind", "nref", "attached"]
CONTRACT_KEYS += ["age_s", "idle_s", "bytes_in", "bytes_out"]
HOSTILE = "<script>alert('&\"')</script>\x1b[31m\u202e"
BROWSER = {b"accept": b"text/html,application/xhtml+xml,*/*;q=0.8"}


class FakeRuntime:
    """A table that was filled by hand, for what real sockets cannot show on demand."""

    name = "shop"
    index = 1
    slots = 64
    max_unwritten_bytes = 1 << 20

    def __init__(self) -> None:
        self.table = np.zeros(0, shmsock.SOCKET_DTYPE)
        self.held: dict[int, list[int]] = {}
        self.failures: list[tuple[int, int, str]] = []
        self.host = True
        self.error: Exception | None = None

    def add(self, sid: int, attached: typing.Sequence[int] = (), **fields: typing.Any) -> int:
        now_ns = time.monotonic_ns()
        row = np.zeros(1, shmsock.SOCKET_DTYPE)
        defaults = {"state": 1, "nref": 1 + len(attached), "owner": 1, "writer": -1, "kind": 1}
        values = {**defaults, "created_ns": now_ns - 90 * 10**9, **fields}
        for name, value in {"id": sid, "attached": len(attached), **values}.items():
            row[name] = value
        self.table = np.concatenate([self.table, row])
        self.held[sid] = list(attached)
        return sid

    def sockets(self) -> typing.Any:
        return self.table.copy()

    def attached(self, sid: int) -> list[int]:
        return self.held.get(sid, [])

    def attached_many(self, ids: typing.Any) -> list[list[int]]:
        return [self.attached(sid) for sid in ids.tolist()]

    def processes(self) -> list[shmsock.ProcessInfo]:
        rows = ((0, 100, "supervisor"), (1, 101, "worker"), (2, 102, "worker"))
        return [
            shmsock.ProcessInfo(index, 1, pid, role, index < 2, 60.0 + index, 0, 0)
            for index, pid, role in rows
        ]

    def status(self, sid: int) -> shmsock.Status:
        states = dict(zip(self.table["id"].tolist(), self.table["state"].tolist(), strict=True))
        return {1: shmsock.Status.LIVE, 2: shmsock.Status.FAILED, 0: shmsock.Status.GONE}[
            states.get(sid, 0)
        ]

    def set_failed(self, sid: int, code: int, text: str) -> bool:
        if self.error:
            raise self.error
        if self.status(sid) is not shmsock.Status.LIVE:
            return False
        self.table["state"][self.table["id"] == sid] = 2
        self.failures.append((sid, code, text))
        return True

    def host_alive(self) -> bool:
        return self.host


@pytest.fixture
def fake() -> FakeRuntime:
    return FakeRuntime()


def runtime(fake: FakeRuntime) -> Runtime:
    return typing.cast("Runtime", fake)


class Peer:
    """Stands for the SocketRef of a connection."""

    id = 1

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.sent = b""

    def write(self, *buffers: bytes) -> None:
        self.sent += b"".join(buffers)


def ask(
    fake: FakeRuntime,
    path: str,
    *,
    method: str = "GET",
    peer: str = "127.0.0.1:4000",
    headers: dict[bytes, bytes] | None = None,
    body: bytes = b"",
    **options: typing.Any,
) -> Response:
    path, _, query = path.partition("?")
    pairs: dict[str, list[str]] = {}
    for item in filter(None, query.split("&")):
        name, _, value = item.partition("=")
        pairs.setdefault(name, []).append(value)
    fields = {b"host": b"127.0.0.1:7379", **(headers or {})}
    request = Request(method, path, pairs, fields, body, keep_alive=True)
    ref = typing.cast("SocketRef", Peer(peer))
    return Pages(runtime(fake), **options)(request, ref)


# -- the report ----------------------------------------------------------------------------------


def test_a_connection_is_described_with_the_agreed_keys_first(fake: FakeRuntime) -> None:
    sid = fake.add(
        shmsock.parse_socket_id("sk-5f3a2c10-17"),
        attached=[1, 2],
        peer=b"10.0.0.1:80",
        read_ns=time.monotonic_ns() - 30 * 10**9,
        bytes_in=5,
        bytes_out=7,
        user_data=b"name=bob",
    )
    (row,) = report.connections(runtime(fake), name_of=lambda data: data.decode()[5:])
    assert list(row)[: len(CONTRACT_KEYS)] == CONTRACT_KEYS
    assert row["id"] == sid
    assert row["text"] == "sk-5f3a2c10-17"
    assert (row["state"], row["kind"], row["peer"]) == ("live", "tcp", "10.0.0.1:80")
    assert (row["owner"], row["pid"], row["attached"], row["nref"]) == (1, 101, [101, 102], 3)
    assert row["age_s"] >= 90
    assert 30 <= row["idle_s"] <= row["age_s"]
    assert (row["bytes_in"], row["bytes_out"], row["name"]) == (5, 7, "bob")
    assert json.loads(json.dumps(row)) == row


def test_a_connection_without_owner_has_neither_owner_nor_pid(fake: FakeRuntime) -> None:
    fake.add(17, owner=-1, state=2, error_code=errno.EPIPE, error_text=b"gone")
    (row,) = report.connections(runtime(fake))
    assert (row["owner"], row["pid"], row["state"]) == (None, None, "failed")
    assert report.error_of(row) == "EPIPE gone"


def test_listeners_are_sockets_but_no_connections(fake: FakeRuntime) -> None:
    fake.add(16, kind=shmsock.KIND_NAMES.index("listener"))
    fake.add(17)
    assert [row["id"] for row in report.connections(runtime(fake))] == [17]
    assert len(json.loads(ask(fake, "/sockets?format=json").body)["sockets"]) == 2


def test_only_as_many_connections_as_asked_for_are_described(fake: FakeRuntime) -> None:
    for sid in range(1, 6):
        fake.add(sid)
    assert [row["id"] for row in report.connections(runtime(fake), limit=2)] == [1, 2]


def test_an_empty_table_has_a_report(fake: FakeRuntime) -> None:
    assert report.connections(runtime(fake)) == []
    found = report.status(runtime(fake))
    assert found["counts"]["live"] == found["counts"]["bytes_in"] == 0
    assert report.connections_text([]).count("\n") == 1
    assert report.list_text({}) == ""


def test_the_status_counts_what_is_in_the_table(fake: FakeRuntime) -> None:
    fake.add(1, bytes_in=2**63, busy=1)
    fake.add(2, state=2, writer=2, bytes_in=5)
    found = report.status(runtime(fake))
    assert (found["name"], found["version"]) == ("shop", shmsock.__version__)
    assert found["uptime_s"] == 60.0
    assert found["limits"] == {"slots": 64, "max_unwritten_bytes": 1 << 20}
    wanted = {"live": 1, "failed": 1, "busy": 1, "writing": 1, "bytes_in": 2**63 + 5}
    assert wanted.items() <= found["counts"].items()
    assert [row["pid"] for row in found["processes"]] == [100, 101, 102]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "never"),
        (0, "0.0s"),
        (9.94, "9.9s"),
        (10, "10s"),
        (59.9, "59s"),
        (185, "3m05s"),
        (7_800, "2h10m"),
        (5 * 86_400 + 4 * 3_600, "5d04h"),
    ],
)
def test_durations_are_written_for_people(seconds: float | None, text: str) -> None:
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [
        (0, "0"),
        (1023, "1023"),
        (1024, "1.0K"),
        (10_188, "9.9K"),
        (10_189, "10K"),
        (1_048_063, "1023K"),
        (1_048_064, "1.0M"),
        (3 << 40, "3.0T"),
        ((1 << 64) - 1, "16E"),
    ],
)
def test_sizes_are_written_for_people(count_bytes: int, text: str) -> None:
    assert report.size(count_bytes) == text


@given(st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=6))
def test_text_tables_have_one_printable_line_a_row_and_no_trailing_blanks(
    rows: list[tuple[str, str]],
) -> None:
    columns = (
        report.Column("LEFT", "<", lambda row: row["a"]),
        report.Column("RIGHT", ">", lambda row: row["b"]),
    )
    text = report.table_text(columns, ({"a": a, "b": b} for a, b in rows))
    lines = text.split("\n")
    assert len(lines) == len(rows) + 2
    assert all(line == line.rstrip() and line.isprintable() for line in lines)


def test_columns_are_aligned() -> None:
    columns = (
        report.Column("PID", ">", lambda row: str(row["pid"])),
        report.Column("ROLE", "<", lambda row: row["role"]),
    )
    rows = [{"pid": 7, "role": "worker"}, {"pid": 1234, "role": "client"}]
    assert report.table_text(columns, rows) == " PID  ROLE\n   7  worker\n1234  client\n"


# -- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/status", "/connections", "/sockets", "/sockets/sk-2-1"])
def test_each_page_is_text_for_curl_html_for_browsers_and_json_on_request(
    fake: FakeRuntime, path: str
) -> None:
    fake.add(shmsock.parse_socket_id("sk-2-1"), attached=[2], peer=b"10.9.8.7:1")
    text = ask(fake, path, headers={b"accept": b"*/*"})
    page = ask(fake, path, headers=BROWSER)
    data = ask(fake, f"{path}?format=json", headers=BROWSER)
    assert [answer.status for answer in (text, page, data)] == [200, 200, 200]
    assert text.content_type == "text/plain; charset=utf-8"
    assert text.body.endswith(b"\n")
    assert b"<" not in text.body.replace(b"<id>", b"")
    assert page.content_type == "text/html; charset=utf-8"
    assert page.body.startswith(b"<!DOCTYPE html>")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert data.content_type == "application/json"
    assert json.loads(data.body)
    if path.startswith(("/connections", "/sockets")):
        assert all(b"10.9.8.7:1" in answer.body for answer in (text, page, data))


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (b"text/html", "html"),
        (b"application/json, Text/HTML;q=0.5", "html"),
        (b"text/html;q=0, text/plain", "plain"),
        (b"text/*", "plain"),
        (b"", "plain"),
        (b";;,,", "plain"),
    ],
)
def test_the_accept_header_chooses_html(fake: FakeRuntime, accept: bytes, form: str) -> None:
    assert form in ask(fake, "/status", headers={b"accept": accept}).content_type


def test_format_overrides_the_accept_header_and_must_be_known(fake: FakeRuntime) -> None:
    assert "plain" in ask(fake, "/status?format=text", headers=BROWSER).content_type
    assert "html" in ask(fake, "/status?format=html").content_type
    assert ask(fake, "/status?format=xml").status == 400


def test_the_style_of_a_page_is_the_one_its_policy_allows(fake: FakeRuntime) -> None:
    page = ask(fake, "/", headers=BROWSER)
    style = re.search(rb"<style>(.*)</style>", page.body)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1]).digest()).decode()
    assert f"'sha256-{digest}'" in page.headers["Content-Security-Policy"]
    assert b"style=" not in page.body


class _Elements(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("path", ["/connections", "/sockets", "/sockets/17"])
def test_what_clients_say_of_themselves_is_never_markup_nor_terminal_control(
    fake: FakeRuntime, path: str
) -> None:
    raw = HOSTILE.encode()
    fake.add(17, peer=raw, error_text=raw, user_data=raw, state=2)
    options: dict[str, typing.Any] = {"name_of": lambda data: data.decode()}
    page = ask(fake, path, headers=BROWSER, **options)
    elements = _Elements()
    elements.feed(page.body.decode())
    assert "script" not in elements.tags
    assert any("<script>alert('&\"')</script>" in text for text in elements.texts)
    text = ask(fake, path, **options).body.decode()
    assert all(line.isprintable() for line in text.split("\n"))
    assert "\\x1b[31m\\u202e" in text
    found = json.loads(ask(fake, f"{path}?format=json", **options).body)
    (row,) = (
        found["sockets"] if path == "/sockets" else found if path == "/connections" else [found]
    )
    assert row["peer"] == row["error_text"] == row["name"] == HOSTILE


def test_bytes_that_are_no_utf8_are_shown_all_the_same(fake: FakeRuntime) -> None:
    fake.add(17, peer=b"unix:/tmp/\xff", error_text=b"caf\xc3")
    for query in ("", "?format=html", "?format=json"):
        answer = ask(fake, f"/sockets/17{query}")
        assert answer.status == 200
        assert b"xff" in answer.body


# -- pages ---------------------------------------------------------------------------------------


def test_connections_has_one_row_a_connection_and_their_number(fake: FakeRuntime) -> None:
    fake.add(shmsock.parse_socket_id("sk-2-1"), peer=b"10.0.0.1:80", bytes_in=2048)
    fake.add(shmsock.parse_socket_id("sk-2-2"), state=2)
    lines = ask(fake, "/connections").body.decode().splitlines()
    assert lines[0].split()[:4] == ["CREATED", "REMOTE", "KIND", "STATE"]
    assert lines[1].split()[1:5] == ["10.0.0.1:80", "tcp", "live", "2.0K"]
    assert lines[1].endswith(" sk-2-1")
    assert lines[-1] == "2 connections"
    page = ask(fake, "/connections", headers=BROWSER).body
    assert b'<a href="/sockets/sk-2-1">sk-2-1</a>' in page


def test_connections_shows_1024_rows_unless_asked_for_all(fake: FakeRuntime) -> None:
    fake.table = np.zeros(SHOWN_ROWS + 1, shmsock.SOCKET_DTYPE)
    fake.table["id"] = np.arange(1, SHOWN_ROWS + 2)
    fake.table["state"] = 1
    some = ask(fake, "/connections?format=json")
    assert len(json.loads(some.body)) == SHOWN_ROWS
    assert some.headers["X-Total-Count"] == str(SHOWN_ROWS + 1)
    assert len(json.loads(ask(fake, "/connections?format=json&givemeall").body)) == SHOWN_ROWS + 1
    text = ask(fake, "/connections").body
    assert text.endswith(b"1025 connections, the first 1024 shown: ?givemeall shows all\n")
    assert b"givemeall" not in ask(fake, "/connections?givemeall").body


def test_sockets_tells_how_full_the_pool_is(fake: FakeRuntime) -> None:
    fake.add(1, attached=[1])
    fake.add(2, state=2)
    assert b"2 of 64 used, 62 free" in ask(fake, "/sockets").body
    found = json.loads(ask(fake, "/sockets?format=json").body)
    assert found["slots"] == 64
    assert found["counts"]["failed"] == 1
    assert found["sockets"][0]["attached"] == [101]


def test_a_socket_is_found_by_number_and_by_text(fake: FakeRuntime) -> None:
    text = "sk-2-17"
    sid = fake.add(shmsock.parse_socket_id(text), attached=[0, 2], user_data=b"\x01bob", inode=99)
    by_number = json.loads(ask(fake, f"/sockets/{sid}?format=json").body)
    by_text = json.loads(ask(fake, f"/sockets/{text}?format=json").body)
    assert by_number["id"] == by_text["id"] == sid
    assert by_text["user_data"] == r"b'\x01bob'"
    assert by_text["inode"] == 99
    assert by_text["read_ago_s"] is None
    assert by_text["attached_processes"] == [
        {"index": 0, "pid": 100, "role": "supervisor"},
        {"index": 2, "pid": 102, "role": "worker"},
    ]
    plain = ask(fake, f"/sockets/{text}").body.decode()
    assert "0:100 (supervisor), 2:102 (worker)" in plain
    assert "last read     never" in plain


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/sockets/17", 404),
        ("/sockets/sk-2-1", 404),
        ("/sockets/", 400),
        ("/sockets/0x11", 400),
        ("/sockets/-1", 400),
        ("/sockets/sk-zz-1", 400),
        ("/sockets/99999999999999999999", 400),
        ("/sockets/<b>", 400),
        ("/sockets/17/fail/x", 404),
        ("/sockets/17/x", 404),
        ("/connection", 404),
        ("/../status", 404),
        ("//status", 404),
        ("*", 404),
    ],
)
def test_what_does_not_exist_and_what_is_no_id_is_said(
    fake: FakeRuntime, path: str, status: int
) -> None:
    answer = ask(fake, path, headers=BROWSER)
    assert answer.status == status
    assert answer.content_type.startswith("text/plain")
    assert answer.body.startswith(b"%d " % status)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/status", "GET, HEAD"),
        ("DELETE", "/sockets/17", "GET, HEAD"),
        ("GET", "/sockets/17/fail", "POST"),
        ("HEAD", "/sockets/17/fail", "POST"),
    ],
)
def test_a_method_that_does_nothing_is_told_which_do(
    fake: FakeRuntime, method: str, path: str, allow: str
) -> None:
    fake.add(17)
    answer = ask(fake, path, method=method)
    assert (answer.status, answer.headers["Allow"]) == (405, allow)
    assert fake.failures == []


def test_health_is_ok_until_there_is_a_reason(fake: FakeRuntime) -> None:
    assert (ask(fake, "/health").status, ask(fake, "/health").body) == (200, b"ok\n")
    draining = ask(fake, "/health", health=lambda: "draining")
    assert (draining.status, draining.body) == (503, b"draining\n")
    found = ask(fake, "/health?format=json", health=lambda: "draining")
    assert json.loads(found.body) == {"healthy": False, "reason": "draining"}
    fake.host = False
    assert ask(fake, "/health").status == 503
    assert b"host" in ask(fake, "/health").body


# -- failing a socket ----------------------------------------------------------------------------


def test_failing_a_socket_has_one_winner(fake: FakeRuntime) -> None:
    sid = fake.add(shmsock.parse_socket_id("sk-2-17"))
    first = ask(fake, "/sockets/sk-2-17/fail?reason=too+slow&format=json", method="POST")
    assert (first.status, json.loads(first.body)["winner"]) == (200, True)
    second = ask(fake, f"/sockets/{sid}/fail?format=json", method="POST")
    assert (second.status, json.loads(second.body)["winner"]) == (409, False)
    assert len(fake.failures) == 1
    assert fake.failures[0][:2] == (sid, errno.ECONNABORTED)
    assert ask(fake, "/sockets/18/fail", method="POST").status == 404


@pytest.mark.parametrize(
    ("query", "kind", "body", "reason"),
    [
        ("?reason=mine", b"", b"", "mine"),
        ("", b"application/x-www-form-urlencoded; charset=utf-8", b"reason=a+b%C3%A9", "a bé"),
        ("", b"text/plain", b"reason=x", "failed by an operator, over HTTP"),
        ("?reason=", b"", b"", "failed by an operator, over HTTP"),
    ],
)
def test_the_reason_is_kept_as_the_error_text(
    fake: FakeRuntime, query: str, kind: bytes, body: bytes, reason: str
) -> None:
    fake.add(17)
    path = f"/sockets/17/fail{query}"
    ask(fake, path, method="POST", headers={b"content-type": kind}, body=body)
    assert fake.failures == [(17, errno.ECONNABORTED, reason)]


def test_a_bad_request_fails_nothing(fake: FakeRuntime) -> None:
    fake.add(17)
    assert ask(fake, "/sockets/17/fail?format=xml", method="POST").status == 400
    assert ask(fake, "/sockets/x17/fail", method="POST").status == 400
    assert fake.failures == []


def test_a_runtime_that_cannot_just_now_is_unavailable_not_broken(fake: FakeRuntime) -> None:
    fake.add(17)
    fake.error = shmsock.StripeTimeoutError("stripe 3 is held")
    answer = ask(fake, "/sockets/17/fail", method="POST")
    assert (answer.status, answer.body) == (503, b"503 stripe 3 is held\n")


def test_the_form_to_fail_a_socket_is_shown_while_it_lives(fake: FakeRuntime) -> None:
    fake.add(17)
    assert b'action="/sockets/sk-0-17/fail"' in ask(fake, "/sockets/17", headers=BROWSER).body
    fake.table["state"] = 2
    assert b"<form" not in ask(fake, "/sockets/17", headers=BROWSER).body


# -- who may ask ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "status"),
    [
        ("127.0.0.1:1", 200),
        ("127.9.9.9:1", 200),
        ("[::1]:1", 200),
        ("[::ffff:127.0.0.1]:1", 200),
        ("unix:-", 200),
        ("unix:/run/x:1", 200),
        ("10.0.0.1:1", 403),
        ("[2001:db8::1]:1", 403),
        ("[::ffff:10.0.0.1]:1", 403),
        ("[fe80::1%eth0]:1", 403),
        ("128.0.0.1:1", 403),
        ("", 403),
        ("localhost:1", 403),
        ("127.0.0.1", 403),
    ],
)
def test_only_local_peers_are_answered_unless_the_pages_are_opened(
    fake: FakeRuntime, peer: str, status: int
) -> None:
    for path in ("/health", "/metrics", "/nothing", "/sockets/x"):
        answer = ask(fake, path, peer=peer)
        assert (answer.status == 403) == (status == 403)
    assert status == 200 or b"--pages-remote" in ask(fake, "/health", peer=peer).body
    fake.add(17)
    failed = ask(fake, "/sockets/17/fail", method="POST", peer=peer).status
    assert (failed, len(fake.failures)) == (status, status == 200)
    assert ask(fake, "/health", peer=peer, allow_remote=True).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"localhost", 200),
        (b"LocalHost:7379", 200),
        (b"127.0.0.1:7379", 200),
        (b"127.1.2.3", 200),
        (b"[::1]:7379", 200),
        (b"[::1]", 200),
        (b"evil.example:7379", 403),
        (b"localhost.evil.example", 403),
        (b"127.0.0.1.evil.example", 403),
        (b"evil@127.0.0.1", 403),
        (b"127.0.0.1:80:x", 403),
        (b"[::1].evil", 403),
        (b"[::1", 403),
        (b"0.0.0.0", 403),
        (b"10.0.0.1", 403),
        (b"\xff", 403),
    ],
)
@pytest.mark.parametrize("allow_remote", [False, True])
def test_a_name_that_was_rebound_to_loopback_is_refused(
    fake: FakeRuntime, host: bytes, status: int, allow_remote: bool
) -> None:
    answer = ask(fake, "/status", headers={b"host": host}, allow_remote=allow_remote)
    assert answer.status == status


def test_the_host_is_not_looked_at_where_no_browser_or_no_own_name_is(fake: FakeRuntime) -> None:
    anything = {b"host": b"shop.example"}
    assert ask(fake, "/status", headers=anything, peer="unix:-").status == 200
    opened = ask(fake, "/status", headers=anything, peer="10.0.0.1:1", allow_remote=True)
    assert opened.status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({b"origin": b"http://127.0.0.1:7379"}, 200),
        ({b"origin": b"http://127.0.0.1:7379", b"sec-fetch-site": b"same-origin"}, 200),
        ({b"origin": b"http://127.0.0.1:8000"}, 403),
        ({b"origin": b"http://localhost:7379"}, 403),
        ({b"origin": b"https://127.0.0.1:7379"}, 403),
        ({b"origin": b"http://evil.example"}, 403),
        ({b"origin": b"null"}, 403),
        ({b"origin": b""}, 403),
        ({b"origin": b"http://127.0.0.1:7379, http://evil.example"}, 403),
        ({b"sec-fetch-site": b"cross-site"}, 403),
        ({b"sec-fetch-site": b"same-site"}, 403),
        ({b"sec-fetch-site": b"none"}, 403),
        ({b"origin": b"http://127.0.0.1:7379", b"sec-fetch-site": b"cross-site"}, 403),
    ],
)
@pytest.mark.parametrize("peer", ["127.0.0.1:4000", "unix:-"])
def test_a_post_that_another_site_made_a_browser_send_fails_nothing(
    fake: FakeRuntime, headers: dict[bytes, bytes], status: int, peer: str
) -> None:
    fake.add(17)
    answer = ask(fake, "/sockets/17/fail", method="POST", headers=headers, peer=peer)
    assert answer.status == status
    assert len(fake.failures) == (status == 200)


def test_a_link_from_another_site_may_be_followed(fake: FakeRuntime) -> None:
    headers = {**BROWSER, b"sec-fetch-site": b"cross-site"}
    assert ask(fake, "/status", headers=headers).status == 200


# -- metrics -------------------------------------------------------------------------------------


def samples(answer: Response) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_metrics_are_prometheus_text_of_the_table_at_the_time_of_the_scrape(
    fake: FakeRuntime,
) -> None:
    pages = Pages(runtime(fake))
    request = Request("GET", "/metrics", {}, {b"host": b"localhost", **BROWSER}, b"", True)
    ref = typing.cast("SocketRef", Peer("unix:-"))
    empty = samples(pages(request, ref))
    assert empty["shmsock_sockets{state=live}"] == 0
    fake.add(17, bytes_in=11, bytes_out=13, messages_in=2, busy=1)
    fake.add(18, state=2, bytes_in=1)
    answer = pages(request, ref)
    assert answer.content_type == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(answer)
    assert found["shmsock_sockets{state=live}"] == found["shmsock_sockets{state=failed}"] == 1
    assert found["shmsock_in_bytes{}"] == 12
    assert found["shmsock_out_bytes{}"] == 13
    assert found["shmsock_in_messages{}"] == 2
    assert found["shmsock_busy_sockets{}"] == 1
    assert found["shmsock_slots{}"] == 64
    assert found["shmsock_sockets_of_kind{kind=tcp}"] == 2
    assert found["shmsock_process_alive{process=1,role=worker}"] == 1
    assert found["shmsock_process_alive{process=2,role=worker}"] == 0
    assert found[f"shmsock_info{{name=shop,version={shmsock.__version__}}}"] == 1


def test_two_runtimes_in_one_process_have_their_own_metrics() -> None:
    one, two = FakeRuntime(), FakeRuntime()
    one.add(17)
    assert samples(ask(one, "/metrics"))["shmsock_sockets{state=live}"] == 1
    assert samples(ask(two, "/metrics"))["shmsock_sockets{state=live}"] == 0


# -- together, over a real table -----------------------------------------------------------------


@pytest.fixture
def real() -> typing.Iterator[Runtime]:
    with shmsock.Runtime.create(
        f"test-pages-{os.getpid()}", slots=64, processes=4, stripes=4
    ) as rt:
        yield rt


def curl(rt: Runtime, head: str) -> tuple[int, str]:
    """Ask the way the messenger does; only the network is missing."""
    peer = Peer("127.0.0.1:4000")
    ref = typing.cast("SocketRef", peer)
    session = HttpProtocol(Pages(rt)).open(ref)
    assert session.receive(ref, f"{head} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    start, _, body = peer.sent.decode().partition("\r\n\r\n")
    return int(start.split()[1]), body


def test_a_real_socket_is_shown_failed_and_gone(real: Runtime) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        sid = real.create_socket(ours, user_data=b"hello")
        text = shmsock.format_socket_id(sid)
        status, body = curl(real, f"GET /sockets/{text}?format=json")
        assert status == 200
        row = json.loads(body)
        assert (row["id"], row["state"], row["kind"]) == (sid, "live", "unix")
        assert (row["owner"], row["user_data"]) == (real.index, "b'hello'")
        assert f"{text}\n" in curl(real, "GET /connections")[1]

        held = real.address(sid)
        assert held is not None
        with held:
            assert curl(real, f"POST /sockets/{text}/fail?reason=enough")[0] == 200
            assert theirs.recv(1) == b""
            assert curl(real, f"POST /sockets/{text}/fail")[0] == 409
            status, body = curl(real, f"GET /sockets/{text}")
            assert status == 200
            assert re.search(r"^error +ECONNABORTED enough$", body, re.M)
            assert re.search(rf"^attached +{real.index}:", body, re.M)
        assert curl(real, f"GET /sockets/{text}")[0] == 404
        assert curl(real, f"POST /sockets/{text}/fail")[0] == 404


def test_pages_of_a_real_runtime_hold_no_reference(real: Runtime) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        sid = real.create_socket(ours)
        for path in ("/", "/status", "/connections", "/sockets", f"/sockets/{sid}", "/metrics"):
            assert curl(real, f"GET {path}")[0] == 200
        assert real.attached(sid) == []
        assert real.audit() == []
