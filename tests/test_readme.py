"""The README, run as printed: every console line, every program, and its two commands."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import tomllib

import pytest

from .helpers import REPOSITORY, free_port

with open(os.path.join(REPOSITORY, "README.md"), encoding="utf-8") as _file:
    README = _file.read()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)


def blocks(kind: str) -> list[str]:
    return [text for found, text in BLOCKS if found == kind]


def normal(text: str) -> list[str]:
    """What must be the same in every run: without ids, numbers and the width of columns."""
    text = re.sub(r"; fewer than .*", "", text)  # only where the open-files limit is low
    text = re.sub(r"sk-[0-9a-f]+-\d+", "ID", text)
    text = re.sub(r"\d+(\.\d+)*[a-z%]*\b", "N", text)
    text = re.sub(r"N( N)+", "N", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_every_block_of_the_readme_is_of_a_kind_that_is_run() -> None:
    assert {kind for kind, _ in BLOCKS} == {"sh", "console", "python", "text"}
    assert len(blocks("python")) == len(blocks("text"))


def test_the_two_commands_name_extras_that_exist() -> None:
    (commands,) = blocks("sh")
    with open(os.path.join(REPOSITORY, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    extras = set(re.findall(r"\w+", " ".join(re.findall(r"\[(.*?)\]", commands))))
    assert extras == {"server", "test"}
    assert extras <= set(project["optional-dependencies"])
    assert "shmsock serve" in commands
    assert "python -m pytest" in commands
    assert project["scripts"]["shmsock"] == "workers.cli:main"


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_program_prints_what_the_readme_says(
    number: int, name: str, tmp_path: pathlib.Path
) -> None:
    source = re.sub(r'"(shop|echo)"', f'"{name}"', blocks("python")[number])
    script = tmp_path / "program.py"
    script.write_text(source)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (done.stdout, done.stderr) == (blocks("text")[number], "")


class Terminal:
    """A console block: its commands run in one bash, in turn; their output is compared."""

    def __init__(self, text: str, port: int, environment: dict[str, str]) -> None:
        self.expected = text
        lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
        script = "\n".join(lines).replace("7379", str(port))
        script = script.replace("shmsock serve", f"exec shmsock serve --bind 127.0.0.1:{port}")
        self.process = subprocess.Popen(
            ["bash", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def read(self, count: int) -> None:
        """Read until ``count`` lines that are not blank have come."""
        assert self.process.stdout is not None
        while sum(1 for line in self.lines if line.strip()) < count:
            line = self.process.stdout.readline()
            assert line, f"ended after {self.lines}"
            if " INFO " not in line:  # the log goes to standard error, which is this terminal too
                self.lines.append(line)

    def check(self, name: str) -> None:
        expected = "\n".join(x for x in self.expected.splitlines() if not x.startswith("$ "))
        got = "".join(self.lines).replace(f" --name {name}", "").replace(name, "hub")
        assert normal(got) == normal(expected)

    def end(self, number: int = 0) -> None:
        """Wait for its last command, which a signal may hurry."""
        if number and self.process.poll() is None:
            os.killpg(self.process.pid, number)
        rest = self.process.communicate(timeout=60)[0]
        self.lines += [line for line in rest.splitlines(True) if " INFO " not in line]


def test_the_tour_works_as_printed(name: str) -> None:
    port = free_port()
    environment = {
        **os.environ,
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
        "SHMSOCK_NAME": name,
        "PYTHONPATH": REPOSITORY,
        "PYTHONUNBUFFERED": "1",
    }
    server, subscriber, *others = blocks("console")
    first = Terminal(server, port, environment)
    second: Terminal | None = None
    try:
        first.read(len(normal(server)) - 1)
        second = Terminal(subscriber, port, environment)
        second.read(3)
        for text in others:
            terminal = Terminal(text, port, environment)
            terminal.end()
            terminal.check(name)
        assert second is not None
        second.end()
        second.lines = [x for x in second.lines if "closed the connection" not in x]
        second.check(name)
    finally:
        if second is not None:
            second.end(signal.SIGKILL)
        first.end(signal.SIGINT)
    first.check(name)
    assert first.process.returncode == 0
