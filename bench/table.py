"""A run as text: one Markdown table, which a terminal shows just as well."""

from __future__ import annotations

import typing

_UNITS = {
    "ns": ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns")),
    "1/s": ((1e6, "M/s"), (1e3, "k/s"), (1.0, "/s")),
    "B": ((1 << 20, "MiB"), (1 << 10, "KiB"), (1.0, "B")),
    "x": ((1.0, "x"),),
    "%": (),
}
_HEAD = ("measure", "peer", "shmsock", "peer's", "shmsock / peer", "lowest to highest")

Json = dict[str, typing.Any]


def render(run: Json) -> str:
    """What a JSON file holds, for people."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for bench in run["benches"]:
        for measure in bench["measures"]:
            rows += _rows(measure)
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, _line(tuple("-" * width for width in widths), widths))
    return "\n".join([setting(run), "", *lines])


def _rows(measure: Json) -> list[tuple[str, ...]]:
    ours = _figure(measure["medians"][measure["subject"]], measure["unit"])
    return [
        (
            f"{measure['name']} ({measure['better']} is better)",
            ratio["peer"],
            ours,
            _figure(measure["medians"][ratio["peer"]], measure["unit"]),
            _number(ratio["median"]),
            f"{_number(ratio['low'])} to {_number(ratio['high'])}",
        )
        for ratio in measure["ratios"]
    ]


def setting(run: Json) -> str:
    """Machine, load, versions, engine, commit and how long: one line."""
    environment, settings = run["environment"], run["settings"]
    commit = (environment["commit"] or "no commit")[:8]
    dirty = " with changes" if environment["uncommitted_changes"] else ""
    return (
        f"{environment['cpu']}, {environment['cores_usable']} cores"
        f"{' of a virtual machine' if environment['virtual_machine'] else ''}, "
        f"load {environment['load_average_before'][0]:.1f} before, "
        f"{environment['load_average_after'][0]:.1f} after; "
        f"Linux {environment['kernel']}, {environment['python']}, "
        f"numpy {environment['packages']['numpy']}, redis {environment['redis_server']}; "
        f"engine {environment['engine']}, commit {commit}{dirty}; "
        f"{settings['rounds']} rounds, {settings['seconds']:g} s for each"
    )


def _figure(value: float, unit: str) -> str:
    for size, name in _UNITS.get(unit, ()):
        if value >= size:
            return f"{_number(value / size)} {name}"
    return f"{value:.3g} {unit}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"
