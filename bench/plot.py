"""Pictures of a run: one idea each, everybody in one colour throughout.

matplotlib draws them, from the JSON alone; nothing is measured here.
"""

from __future__ import annotations

import collections.abc
import os
import statistics
import typing

from .measure import BrokenError, UnavailableError
from .table import Json, setting

PICTURES = os.path.join("docs", "pictures")
OURS = "shmsock"

# By how a contestant's name begins; ours is the only red.
_COLOURS = {
    "shmsock, attach": "#e58a8f",
    "shmsock": "#c1121f",
    "redis-server": "#1d3557",
    "Redis pub/sub, to": "#7ba3cc",
    "Redis pub/sub, forwarded to": "#1d3557",
    "Redis pub/sub, forwarded by": "#457b9d",
    "asyncio": "#2a9d8f",
    "uvloop": "#83c5be",
    "plain send": "#8d99ae",
    "C, ": "#8d99ae",
    "numpy word under posix_ipc": "#e09f3e",
    "multiprocessing.Value": "#6a4c93",
    "numpy word under fcntl": "#5a7d2a",
    "Manager proxy": "#3d3d3d",
}
_MARKS = "oosDv^Px"
_DPI = 150

Axes = typing.Any  # of matplotlib, which has no types here


def draw(run: Json, directory: str) -> list[str]:
    """Draw what the run has; the paths of what was written.

    Raises:
        UnavailableError: There is no matplotlib.
        BrokenError: The run has nothing that there is a picture of.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UnavailableError(f"the bench extra is not installed: {error}") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = {
        bench["name"]: {measure["name"]: measure for measure in bench["measures"]}
        for bench in run["benches"]
    }
    os.makedirs(directory, exist_ok=True)
    drawn = []
    for name, (picture, size, grid) in _PICTURES.items():
        if name not in measures:
            continue
        figure, axes = plt.subplots(*grid, figsize=size, layout="constrained")
        picture(axes, measures[name])
        figure.supxlabel(setting(run), fontsize=6, color="#666666")
        path = os.path.join(directory, f"{name}.png")
        figure.savefig(path, dpi=_DPI)
        plt.close(figure)
        drawn.append(path)
    if not drawn:
        raise BrokenError(f"there is no picture of this run: run one of {', '.join(_PICTURES)}")
    return drawn


def _colour(name: str) -> str:
    return next((colour for start, colour in _COLOURS.items() if name.startswith(start)), "#b0b0b0")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def _sharing(axes: Axes, measures: dict[str, Json]) -> None:
    """Cost of a call against the number of processes on one socket."""
    points: dict[str, list[tuple[int, list[float]]]] = {}
    for name, measure in measures.items():
        words = name.rpartition("CPU per call, ")[2].split()
        if len(words) == 2 and words[0].isdigit():  # "8 processes", not "8 processes over 1"
            for contestant, samples in measure["samples"].items():
                points.setdefault(contestant, []).append((int(words[0]), samples))
    for mark, (contestant, found) in zip(_MARKS, points.items(), strict=False):
        counts = [count for count, _ in found]
        middle = [statistics.median(samples) for _, samples in found]
        axes.fill_between(
            counts,
            [min(samples) for _, samples in found],
            [max(samples) for _, samples in found],
            color=_colour(contestant),
            alpha=0.12,
            linewidth=0,
        )
        axes.plot(
            counts,
            middle,
            marker=mark,
            markersize=5,
            color=_colour(contestant),
            linewidth=2.5 if contestant == OURS else 1.3,
            label=contestant,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({count for found in points.values() for count, _ in found}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("processes that use one socket at once")
    axes.set_ylabel("processor time of each per call, ns")
    axes.set_title("address + release, and what else processes count in together", fontsize=10)
    _plain(axes)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _push(axes: Axes, measures: dict[str, Json]) -> None:
    """How many of the pushes had arrived after how long."""
    (curves,) = [measure["curves"] for measure in measures.values() if "curves" in measure]
    # Ours comes last: drawn over the others where they meet.
    for contestant, cuts in sorted(curves.items(), key=lambda item: item[0] == OURS):
        percent = [100 * (rank + 1) / (len(cuts) + 1) for rank in range(len(cuts))]
        axes.plot(
            [cut / 1e3 for cut in cuts],
            percent,
            color=_colour(contestant),
            linewidth=2.5 if contestant == OURS else 1.3,
            linestyle="--" if contestant == "plain send" else "-",
            zorder=2 if contestant == "plain send" else 1,
            label=f"{contestant} ({cuts[len(cuts) // 2] / 1e3:.3g} µs)",
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(0, 100)
    axes.set_xlabel("from the call until the client has all 64 bytes, µs")
    axes.set_ylabel("of the messages, %")
    axes.set_title("A push to the client of another process (median)", fontsize=10)
    _plain(axes)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _requests(axes: Axes, measures: dict[str, Json]) -> None:
    """Throughput, and what a request costs the server: a row each, a column for each -P."""
    figures = (
        ("rate", "requests a second, thousands"),
        ("server CPU per request", "server's processor time\nper request, µs"),
    )
    for row, (figure, label) in zip(axes, figures, strict=True):
        for each, pipeline in zip(row, ("-P 1", "-P 16"), strict=True):
            kinds = [
                name.rpartition(", ")[0]
                for name in measures
                if name.endswith(f"{pipeline}, {figure}")
            ]
            _bars(each, [measures[f"{kind}, {figure}"]["samples"] for kind in kinds])
            middle = 0.4 - 0.4 / len(measures[f"{kinds[0]}, {figure}"]["samples"])
            names = [kind.partition(",")[0] for kind in kinds]
            each.set_xticks([at + middle for at in range(len(kinds))], names)
            better = "higher is better" if figure == "rate" else "lower is better"
            each.set_title(f"redis-benchmark -c 50 {pipeline}: {better}", fontsize=9)
            _plain(each)
        row[0].set_ylabel(label)
    axes[0][1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bars(axes: Axes, groups: list[dict[str, list[float]]]) -> None:
    """Medians of each contestant, side by side, with the lowest and the highest round."""
    width = 0.8 / len(groups[0])
    for number, contestant in enumerate(groups[0]):
        samples = [[value / 1e3 for value in group[contestant]] for group in groups]
        middle = [statistics.median(values) for values in samples]
        below = [m - min(values) for m, values in zip(middle, samples, strict=True)]
        above = [max(values) - m for m, values in zip(middle, samples, strict=True)]
        axes.bar(
            [at + number * width for at in range(len(groups))],
            middle,
            width,
            yerr=[below, above],
            error_kw={"linewidth": 0.8, "ecolor": "#444444"},
            color=_colour(contestant),
            label=contestant,
        )


# By bench: what draws it, its size in inches, rows and columns.
_PICTURES: dict[
    str, tuple[collections.abc.Callable[..., None], tuple[float, float], tuple[int, int]]
] = {
    "sharing": (_sharing, (9.0, 4.5), (1, 1)),
    "push": (_push, (9.0, 4.5), (1, 1)),
    "requests": (_requests, (10.0, 6.0), (2, 2)),
}
