"""Rounds and statistics: contestants are measured in turn, and compared within each round.

Nothing here claims a bare time. A machine is faster or slower from one second to the next, so a
figure of ours only means something beside a peer's of the same second: every round measures every
contestant, the order turns around from round to round, a ratio is taken within a round, and what
is reported is the median of the rounds' ratios, with the lowest and the highest.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import statistics
import timeit

Report = collections.abc.Callable[[str], None]


class UnavailableError(Exception):
    """A bench cannot run here: a program or a package that it needs is missing."""


class BrokenError(Exception):
    """A bench ran into something that makes its figures worthless."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        seconds: About how long each contestant of a bench is measured, all rounds together.
        rounds: In how many rounds.
        report: Takes a line on what is going on.
    """

    seconds: float = 3.0
    rounds: int = 5
    report: Report = lambda _: None

    @property
    def slice_s(self) -> float:
        """How long one contestant is measured in one round."""
        return self.seconds / self.rounds


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The subject's figure over a peer's, of the same round: median, lowest, highest."""

    peer: str
    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Measure:
    """One figure of several contestants, a sample a round; the first contestant is the subject.

    Attributes:
        name: What was measured.
        unit: Of the samples.
        better: "lower" or "higher".
        samples: By contestant; equally many of each, in the order of the rounds.
        curves: By contestant: ``quantiles`` of everything that was timed, where that is kept.
    """

    name: str
    unit: str
    better: str
    samples: dict[str, list[float]]
    curves: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what could not be compared."""
        counts = {len(values) for values in self.samples.values()}
        if len(self.samples) < 2 or len(counts) != 1 or not min(counts):
            raise BrokenError(f"{self.name}: contestants were not measured equally often")
        if min(min(values) for values in self.samples.values()) <= 0:
            raise BrokenError(f"{self.name}: too short to be measured: use a larger --seconds")

    @property
    def subject(self) -> str:
        """Whose figure it is about."""
        return next(iter(self.samples))

    def median(self, contestant: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.samples[contestant])

    def ratios(self) -> list[Ratio]:
        """The subject over each peer."""
        subject = self.samples[self.subject]
        found = []
        for peer, values in self.samples.items():
            if peer == self.subject:
                continue
            each = [ours / theirs for ours, theirs in zip(subject, values, strict=True)]
            found.append(Ratio(peer, statistics.median(each), min(each), max(each)))
        return found

    def as_json(self) -> dict[str, object]:
        """With every sample, so that nobody has to believe our medians."""
        return {
            "name": self.name,
            "unit": self.unit,
            "better": self.better,
            "subject": self.subject,
            "samples": self.samples,
            "medians": {name: self.median(name) for name in self.samples},
            "ratios": [dataclasses.asdict(ratio) for ratio in self.ratios()],
            **({"curves": self.curves} if self.curves else {}),
        }


def quantiles(values: collections.abc.Sequence[float]) -> list[float]:
    """The 0.5 %, 1 %, ... 99.5 % of them: a distribution in 199 numbers, for a plot."""
    cuts = statistics.quantiles(values, n=200, method="inclusive")
    return [float(f"{cut:.5g}") for cut in cuts]


@dataclasses.dataclass(frozen=True)
class Bench:
    """One thing that can be measured.

    Attributes:
        includes: What the subject's figure contains, and what the peers are.
        run: Measures.
    """

    name: str
    title: str
    includes: str
    run: collections.abc.Callable[[Plan], list[Measure]]


# Takes one sample of each of a contestant's figures, by the figure's name.
Sampler = collections.abc.Callable[[], dict[str, float]]


def interleave(
    plan: Plan, contestants: collections.abc.Mapping[str, Sampler]
) -> dict[str, dict[str, list[float]]]:
    """Measure every contestant once a round.

    Args:
        plan: How many rounds.
        contestants: By name, subject first.

    Returns:
        Samples by figure, then by contestant, in the contestants' order.
    """
    taken: dict[str, dict[str, list[float]]] = {}
    for number in range(plan.rounds):
        # A B C, C B A, ...: nobody always comes after the same neighbour, and what drifts
        # during a round drifts for both sides.
        order = list(contestants)
        for name in order if number % 2 == 0 else reversed(order):
            for figure, value in contestants[name]().items():
                by_name = taken.setdefault(figure, {each: [] for each in contestants})
                by_name[name].append(value)
    return taken


@dataclasses.dataclass(frozen=True)
class Statement:
    """A Python statement to time, in ``timeit``'s loop; what is timed is what is written here."""

    name: str
    code: str
    names: dict[str, object]


# Makes so many calls; how long they took, in seconds.
Timed = collections.abc.Callable[[int], float]


def time_statements(
    plan: Plan,
    statements: collections.abc.Sequence[Statement],
    others: collections.abc.Mapping[str, Timed] | None = None,
) -> dict[str, list[float]]:
    """Nanoseconds a call of each statement, by its name; the garbage collector is off meanwhile.

    The cost of the loop itself is in every figure: it is not subtracted from anybody's.

    Args:
        plan: How long.
        statements: What is timed by ``timeit``.
        others: What times itself: loops in C, rows with something in between that is not timed.
    """
    timed = {each.name: timeit.Timer(each.code, globals=each.names).timeit for each in statements}
    return time_calls(plan, {**timed, **(others or {})})


def time_calls(
    plan: Plan, contestants: collections.abc.Mapping[str, Timed]
) -> dict[str, list[float]]:
    """Nanoseconds a call of each contestant, by its name."""
    counts = {name: _count_for(timed, plan.slice_s) for name, timed in contestants.items()}
    samplers = {name: _timing(timed, counts[name]) for name, timed in contestants.items()}
    return interleave(plan, samplers)["ns"]


def _timing(timed: Timed, count: int) -> Sampler:
    return lambda: {"ns": timed(count) / count * 1e9}


def _count_for(timed: Timed, slice_s: float) -> int:
    """How many calls fill a slice: by trying, which is the warm-up too."""
    count = 1
    while (took_s := timed(count)) < min(0.02, slice_s / 2):
        count *= 2
    return max(1, round(count * slice_s / took_s))
