"""What a campaign counts, what it complains of, and the table it prints."""

from __future__ import annotations

import collections
import dataclasses


@dataclasses.dataclass
class Figures:
    """Everything that is counted, in one place.

    Attributes:
        deaths: Kills by kind of victim.
        stops: SIGSTOPs by kind of victim.
        idle_acts: Acts that found no victim of their kind.
        ended: Connections whose peer ended them, by what the table said of the failure.
        worst_wait_s: The longest an established connection that lived on waited for an answer.
        worst_entry_s: The longest from connect to the first answer.
        longest_gap_s: The longest from the death of a ready supervisor to the next ready one.
        worst_start_s: The longest a supervisor that was not killed took until it was ready.
        complaints: What broke a promise. None, if all is well.
    """

    minutes: float = 0.0
    deaths: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    stops: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    idle_acts: int = 0
    connections: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    ended: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    answers: int = 0
    published: int = 0
    delivered: int = 0
    pool_lines: int = 0
    lost: int = 0
    died_with_writer: int = 0
    out_of_reach: int = 0
    rehomed: int = 0
    take_overs: int = 0
    programs: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    worst_wait_s: float = 0.0
    worst_entry_s: float = 0.0
    longest_gap_s: float = 0.0
    worst_start_s: float = 0.0
    survivors: int = 0
    complaints: list[str] = dataclasses.field(default_factory=list)

    def complain(self, text: str) -> None:
        """Note a broken promise."""
        self.complaints.append(text)

    def table(self) -> str:
        """The figures, one a line."""
        rows = [
            ("minutes", f"{self.minutes:.1f}"),
            ("kills", f"{self.deaths.total()}: {_each(self.deaths)}"),
            ("stopped and continued", f"{self.stops.total()}: {_each(self.stops)}"),
            ("connections", f"{self.connections.total()}: {_each(self.connections)}"),
            ("answers, strictly in order", f"{self.answers}"),
            ("messages published, delivered", f"{self.published}, {self.delivered}"),
            ("messages of pool processes delivered", f"{self.pool_lines}"),
            ("other programs", _each(self.programs)),
            ("lost", f"{self.lost}"),
            ("died with the worker that had queued them", f"{self.died_with_writer}"),
            ("left out while there was no host", f"{self.out_of_reach}"),
            ("rehomed", f"{self.rehomed}"),
            ("ended", f"{self.ended.total()}: {_each(self.ended)}"),
            ("take-overs", f"{self.take_overs}"),
            ("clients alive and served at the end", f"{self.survivors}"),
            ("worst wait for an answer", f"{self.worst_wait_s:.2f} s"),
            ("worst wait of a new connection", f"{self.worst_entry_s:.2f} s"),
            ("longest without a ready supervisor", f"{self.longest_gap_s:.2f} s"),
            ("worst start of a supervisor", f"{self.worst_start_s:.2f} s"),
            ("promises broken", f"{len(self.complaints)}"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:{width}}  {value}" for name, value in rows)


def _each(counter: collections.Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items())) or "none"
