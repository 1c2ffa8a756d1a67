"""Applications: what ``serve MODULE:NAME`` takes and calls, and the protocol of lines."""

from __future__ import annotations

import collections.abc
import pathlib
import socket
import subprocess
import sys
import textwrap
import typing

import pytest

import shmsock
from shmsock.layout import KIND_NAMES
from workers import application, framing
from workers.application import Application, ApplicationError, load
from workers.framing import Lines
from workers.messenger import Messenger

from .helpers import WATCHDOG_S, connected, read_to_end, wait_until
from .servers import Server, environment, shmsock_command

RECORDER = '''
import os
from workers.application import Application

class Recorder(Application):
    """Writes down which hook ran in which process, and counts a client's lines in its user data."""

    def note(self, *words):
        with open("notes", "a") as file:
            print(os.getpid(), *words, file=file)

    def on_startup(self, context):
        settings, index = context.settings, context.runtime.index
        self.note("startup", settings["application"], index, context.health())

    def on_connect(self, ref):
        self.note("connect", ref.id, ref.user_data.decode())

    def on_message(self, ref, message):
        count = int(ref.user_data or 0) + 1
        ref.user_data = b"%d" % count
        ref.write(b"%d %s\\n" % (count, message))
        return message != b"quit"

    def on_failed(self, sid, code, text):
        self.note("failed", sid, code, text)

    def on_shutdown(self):
        self.note("shutdown")

class Holder:
    app = Recorder()

def make():
    return Recorder()

number = 7
'''


@pytest.fixture
def directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    (tmp_path / "recorder.py").write_text(RECORDER)
    (tmp_path / "broken.py").write_text("import recorder\n1 / 0\n")
    (tmp_path / "needy.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.fixture(autouse=True)
def forgotten() -> collections.abc.Iterator[None]:
    """Another test's directory has modules of the same names."""
    before = set(sys.modules)
    yield
    for name in {"recorder", "broken", "needy"} & (set(sys.modules) - before):
        del sys.modules[name]


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Recorder", "Holder.app", "make"])
def test_an_application_is_an_instance_a_class_or_what_makes_one(
    directory: pathlib.Path, name: str
) -> None:
    assert type(load(f"recorder:{name}")).__name__ == "Recorder"


def test_the_name_is_app_unless_one_is_given() -> None:
    assert type(load("workers.echo")) is type(load("workers.echo:app"))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "is not MODULE:NAME, as in myservice.chat:app"),
        ("no-module:app", "is not MODULE:NAME"),
        ("nowhere:app", "there is no module 'nowhere': start in its directory"),
        ("recorder.nowhere:app", "there is no module 'recorder.nowhere'"),
        ("recorder:nothing", "module 'recorder' has no 'nothing'"),
        ("recorder:number", "recorder:number is a int, not an Application"),
        ("recorder:os", "is a module, not an Application"),
    ],
)
def test_what_names_no_application_is_said(directory: pathlib.Path, spec: str, says: str) -> None:
    with pytest.raises(ApplicationError, match=says):
        load(spec)


def test_a_module_that_lacks_one_of_its_own_imports_is_not_said_to_be_missing(
    directory: pathlib.Path,
) -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        load("needy:app")


@pytest.mark.parametrize(
    ("spec", "says"),
    [("nowhere:app", "there is no module 'nowhere'"), ("broken:app", "ZeroDivisionError")],
)
def test_serve_says_why_an_application_cannot_be_loaded_before_it_makes_anything(
    directory: pathlib.Path, spec: str, says: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workers.cli", "serve", spec, "--name", "never"],
        capture_output=True, text=True, timeout=WATCHDOG_S, env=environment(),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("shmsock: ")
    assert says in done.stderr
    assert done.stdout == ""
    with pytest.raises(shmsock.RuntimeNotFoundError):
        shmsock.Runtime.attach("never")


# -- hooks ----------------------------------------------------------------------------------------


def notes(directory: pathlib.Path, hook: str) -> list[list[str]]:
    """The words of every call of a hook, its process first."""
    path = directory / "notes"
    lines = path.read_text().splitlines() if path.exists() else []
    return [words for words in map(str.split, lines) if words[1] == hook]


def ask(client: socket.socket, line: bytes) -> bytes:
    client.sendall(line + b"\n")
    heard = b""
    while not heard.endswith(b"\n"):
        chunk = client.recv(100)
        assert chunk, "it was closed"
        heard += chunk
    return heard


def test_hooks_are_called_where_the_connection_is_read_and_its_data_moves_with_it(
    directory: pathlib.Path,
) -> None:
    with Server("recorder:make", workers=1, cwd=str(directory)) as server:
        (before,) = notes(directory, "startup")
        assert before[2:] == ["recorder:make", str(*server.worker_pids()), "None"]
        client, other = server.connect(), server.connect()
        with client, other:
            assert ask(client, b"one") == b"1 one\n"
            assert ask(client, b"two") == b"2 two\n"
            assert ask(other, b"x") == b"1 x\n"
            (sid, _), (other_sid, _) = ((w[2], w[3:]) for w in notes(directory, "connect"))
            done = shmsock_command("reload", "--name", server.name)
            assert done.returncode == 0, done.stderr
            assert ask(client, b"three") == b"3 three\n"
            connects = [words for words in notes(directory, "connect") if words[2] == sid]
            assert [words[3:] for words in connects] == [[], ["2"]]
            assert connects[0][0] == before[0] != connects[1][0]
            assert notes(directory, "failed") == []  # it moved; it did not end
            assert [words[0] for words in notes(directory, "shutdown")] == [before[0]]
            other.close()
            assert ask(client, b"four") == b"4 four\n"
            client.sendall(b"quit\nnever\n")
            assert read_to_end(client) == b"5 quit\n"
            wait_until(lambda: len(notes(directory, "failed")) == 2, "both ends are told")
            ends = {words[2]: words for words in notes(directory, "failed")}
            assert set(ends) == {sid, other_sid}
            assert ends[sid][0] == connects[1][0]
    assert len(notes(directory, "startup")) == len(notes(directory, "shutdown")) == 2


def test_echo_answers_lines_of_many_clients_and_any_process_may_join_in() -> None:
    with Server("workers.echo:app") as server:
        assert "serves     workers.echo:app" in server.output()
        assert "redis-cli" not in server.output()
        clients = [server.connect() for _ in range(10)]
        try:
            for number, client in enumerate(clients):
                client.sendall(b"line %d\r\nhalf" % number)
            for number, client in enumerate(clients):
                assert client.recv(100) == b"line %d\r\n" % number
            with shmsock.Runtime.attach(server.name) as runtime:
                rows = runtime.sockets()
                for sid in rows["id"][rows["kind"] == KIND_NAMES.index("tcp")]:
                    with runtime.address(int(sid)) as ref:  # type: ignore[union-attr]
                        ref.write(b"from elsewhere\r\n")
                        assert ref.flush(WATCHDOG_S)
            for client in clients:
                assert client.recv(100) == b"from elsewhere\r\n"
                client.sendall(b" and half\nquit\n")
                assert read_to_end(client) == b"half and half\r\nquit\r\n"
        finally:
            for client in clients:
                client.close()


# -- lines ----------------------------------------------------------------------------------------


class Heard:
    """A messenger of the line protocol alone, driven by hand."""

    def __init__(self, runtime: shmsock.Runtime, limit_bytes: int) -> None:
        self.lines: list[bytes] = []
        self.dispatcher = shmsock.Dispatcher(runtime)
        lines = Lines(self._on_message, limit_bytes)
        self.messenger = Messenger(runtime, self.dispatcher, (lines,))
        ours, self.peer = connected("tcp")
        self.sid = runtime.create_socket(ours)
        self.messenger.take([self.sid])

    def _on_message(self, ref: shmsock.SocketRef, line: bytes) -> bool | None:
        self.lines.append(line)
        return None

    def run(self) -> bool:
        """One round of the loop."""
        self.dispatcher.run_once(0)
        return False

    def say(self, data: bytes, until: collections.abc.Callable[[], object]) -> None:
        self.peer.sendall(data)
        wait_until(lambda: self.run() or until())


@pytest.fixture
def heard(runtime: shmsock.Runtime) -> collections.abc.Iterator[Heard]:
    made = Heard(runtime, 10)
    with made.peer:
        yield made
    made.dispatcher.close()


def test_lines_are_cut_alike_however_the_stream_was(heard: Heard) -> None:
    for byte in b"a\r\n\nbc\n\r\n\r\r\n":
        heard.peer.sendall(bytes([byte]))
        heard.run()
    heard.say(b"a\r\n\nbc\n\r\n\r\r\nend\n", lambda: heard.lines[-1:] == [b"end"])
    once = [b"a", b"", b"bc", b"", b"\r"]
    assert heard.lines == [*once, *once, b"end"]


@pytest.mark.parametrize("data", [b"0123456789A", b"ok\n0123456789A\nnever\n"])
def test_a_line_that_is_too_long_fails_its_connection(
    heard: Heard, runtime: shmsock.Runtime, data: bytes
) -> None:
    heard.say(b"0123456789\n", lambda: heard.lines == [b"0123456789"])
    heard.say(data, lambda: runtime.address(heard.sid) is None)
    assert heard.lines == [b"0123456789", *([b"ok"] if b"\n" in data else [])]
    assert read_to_end(heard.peer) == b""
    wait_until(lambda: heard.run() or len(heard.messenger) == 0)


def test_an_application_without_on_message_fails_its_connections_and_says_so(
    runtime: shmsock.Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = shmsock.Dispatcher(runtime)
    app: typing.Any = Application()
    (lines,) = app.protocols(None)
    assert isinstance(lines, framing.Lines)
    messenger = Messenger(runtime, dispatcher, (lines,), app)
    ours, peer = connected("tcp")
    with peer:
        messenger.take([runtime.create_socket(ours)])
        peer.sendall(b"x\n")
        while len(messenger):
            dispatcher.run_once(WATCHDOG_S)
    assert "Application has no on_message" in caplog.text
    dispatcher.close()


def test_documentation_of_the_module_is_an_application_as_printed(directory: pathlib.Path) -> None:
    text = textwrap.dedent(
        (application.__doc__ or "").split("A whole one:")[1].split("The name")[0]
    )
    (directory / "shout.py").write_text(text)
    with Server("shout:app", workers=1, cwd=str(directory)) as server, server.connect() as client:
        assert ask(client, b"louder") == b"LOUDER\r\n"
