"""docs/applications.md as printed: each module is served, and its dialogue takes place."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import socket

import pytest

from .helpers import REPOSITORY
from .servers import Server

with open(os.path.join(REPOSITORY, "docs", "applications.md"), encoding="utf-8") as _file:
    PAGE = _file.read()
# A module says its file's name first; a dialogue follows it.
EXAMPLES = re.findall(
    r"^```python\n# (\w+)\.py\n(.*?)^```.*?^```text\n(.*?)^```", PAGE, re.M | re.S
)


def test_every_block_of_the_page_is_part_of_an_example() -> None:
    assert len(re.findall(r"^```\w+$", PAGE, re.M)) == 2 * len(EXAMPLES) > 0


class Client:
    """One of the dialogue's people, by lines."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.file = sock, sock.makefile("rwb")

    def say(self, line: str) -> None:
        self.file.write(line.encode() + b"\r\n")
        self.file.flush()

    def hear(self) -> str:
        line = self.file.readline()
        return line.decode().strip() if line else "(closed)"

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@pytest.mark.parametrize(("module", "source", "dialogue"), EXAMPLES)
def test_an_example_says_what_the_page_says(
    module: str, source: str, dialogue: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / f"{module}.py").write_text(source)
    with (
        Server(f"{module}:app", cwd=str(tmp_path)) as server,
        contextlib.ExitStack() as stack,
    ):
        people: dict[str, Client] = {}
        skipping = False
        for who, direction, text in re.findall(r"^(\w)([<>]) ?(.*)$", dialogue, re.M):
            if who not in people:  # they come when they first speak
                people[who] = stack.enter_context(contextlib.closing(Client(server.connect())))
            if direction == ">":
                people[who].say(text)
            elif text == "...":
                skipping = True
            else:
                heard = people[who].hear()
                while skipping and heard != text:
                    heard = people[who].hear()
                skipping = False
                assert heard == text
