"""Each target of ``tests.fuzz`` for a moment, with a seed of its own in each run.

A failure says how to find it again. ``python -m tests.fuzz --seconds 600`` goes deeper.
"""

from __future__ import annotations

import contextlib
import random

import pytest

from workers.hub_client import ClientInfo

from . import fuzz


@pytest.mark.slow
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_nothing_is_found_in_a_moment(target: str) -> None:
    assert fuzz.run(target, seconds=2.5, first_seed=random.SystemRandom().randrange(1 << 32)) > 0


def test_a_command_line_finds_a_failure_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = fuzz.TARGETS["socket_id"]
    seen: list[object] = []

    def fails(value: object) -> None:
        seen.append(value)
        assert len(seen) < 50

    @contextlib.contextmanager
    def failing():  # type: ignore[no-untyped-def]
        with target() as (strategy, _):
            yield strategy, fails

    monkeypatch.setitem(fuzz.TARGETS, "socket_id", failing)
    with pytest.raises(AssertionError) as caught:
        fuzz.main(["--seconds", "0", "--seed", "7", "--target", "socket_id"])
    assert "--seed 7 --target socket_id" in str(caught.value.__notes__)
    first = seen[:49]
    seen.clear()
    with pytest.raises(AssertionError):
        fuzz.main(["--seconds", "0", "--seed", "7", "--target", "socket_id"])
    assert seen[:49] == first
    assert capsys.readouterr().out.startswith("seed 7, 0 s for socket_id\n")


# -- what it found ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "user_data",
    [
        b"R" + b"x" * 63,
        b"R\x02\0\0\0\0\0" + b"n" * 57,
        b"R\x02\0\0\0\0\0bob\nid=1 addr=\0lib\x001.0",
        b"R\x02\0\0\0\0\0\x80",
    ],
    ids=["no words at all", "a name without an end", "a line of its own", "no text"],
)
def test_user_data_that_is_not_a_clients_is_nobodys(user_data: bytes) -> None:
    assert ClientInfo.unpack(user_data) is None
