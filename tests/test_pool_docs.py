"""docs/pools.md, run as printed, against the real packages: multiprocessing, joblib, Celery."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

import shmsock

from .helpers import REPOSITORY, wait_until

with open(os.path.join(REPOSITORY, "docs", "pools.md"), encoding="utf-8") as _file:
    BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", _file.read(), re.M | re.S)
MODULES = {
    found[1]: text for _, text in BLOCKS if (found := re.match(r"# (\w+\.py)\n", text)) is not None
}
PROGRAMS = [text for kind, text in BLOCKS if kind == "python" and text not in MODULES.values()]
OUTPUTS = [text for kind, text in BLOCKS if kind == "text"]
NAMES = ["executor", "owning", "multiprocessing", "joblib", "celery"]


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert {kind for kind, _ in BLOCKS} == {"python", "text"}
    assert len(PROGRAMS) == len(OUTPUTS) == len(NAMES)
    assert set(MODULES) == {"tasks.py"}


@pytest.mark.parametrize("what", NAMES)
def test_a_program_prints_what_the_document_says(
    what: str, name: str, tmp_path: pathlib.Path
) -> None:
    number = NAMES.index(what)
    program = tmp_path / "program.py"
    for path, source in [*MODULES.items(), (program.name, PROGRAMS[number])]:
        (tmp_path / path).write_text(source.replace('"shop"', f'"{name}"'))
    done = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": REPOSITORY},
    )
    assert done.stdout == OUTPUTS[number], done.stderr
    if what != "celery":  # which has to say something about root
        assert done.stderr == ""
    assert "Traceback" not in done.stderr
    wait_until(lambda: not any(name in entry for entry in os.listdir("/dev/shm")))


def test_an_id_keeps_its_value_in_celerys_messages_and_in_pickles() -> None:
    import pickle

    import kombu.serialization

    for sid in (1 << 32, 1 << 53 | 1, (1 << 62) + (1 << 32) + 5):
        assert pickle.loads(pickle.dumps(sid)) == sid
        text = shmsock.format_socket_id(sid)
        kind, encoding, body = kombu.serialization.dumps({"client": text}, serializer="json")
        back = kombu.serialization.loads(body, kind, encoding)["client"]
        assert shmsock.parse_socket_id(back) == sid
