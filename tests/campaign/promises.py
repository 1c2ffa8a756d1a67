"""What may be promised of messages, asserted on what the clients noted.

A worker writes a PUBLISH to each subscriber's socket before it answers n. Of what it wrote, the
kernel has it, or it waits in that worker's queue for that socket, behind what is there already. So,
for a worker that was answered n for a message:

1. n subscribers got it whole; unless their connections ended, or
2. the worker was killed, and they got nothing later from it either: what it had queued died with
   it, and a queue keeps its order.
3. A subscriber that listened all the while and is not among the n was out of the worker's reach:
   it needed a descriptor while there was no host. At no other time is anybody left out.
4. Nobody gets a message twice, or out of its publisher's order (asserted as it is heard).
5. What was sent and not answered may have reached anybody.
"""

from __future__ import annotations

import collections

from .clients import Sent, Subscriber
from .figures import Figures

Window = tuple[float, float]

# The channel is up again at most half a second after the host, and a fetch may take five.
_AFTER_S = 6.0


def unfinished(sent: list[Sent], subscribers: list[Subscriber], killed: set[int]) -> bool:
    """Whether a message is still to come, by the first promise."""
    figures = Figures()
    check(sent, subscribers, killed, [(0.0, float("inf"))], figures)
    return bool(figures.lost)


def check(
    sent: list[Sent],
    subscribers: list[Subscriber],
    killed: set[int],
    without_host: list[Window],
    figures: Figures,
) -> None:
    """Hold every message against the promises; what is broken is complained of.

    Args:
        sent: What was published and answered.
        subscribers: Every one there ever was.
        killed: The words of the killed processes.
        without_host: When there was no host.
        figures: Where it is counted.
    """
    heard = {
        id(subscriber): {source: set(numbers) for source, numbers in subscriber.received.items()}
        for subscriber in subscribers
    }
    later = _last_heard(sent, subscribers)
    by_channel = collections.defaultdict(list)
    for subscriber in subscribers:
        for channel in subscriber.channels:
            by_channel[channel].append(subscriber)
    for message in sent:
        if message.count < 0:
            continue
        got, ended, missing = 0, 0, []
        for subscriber in by_channel[message.channel]:
            if message.number in heard[id(subscriber)].get(message.source, ()):
                got += 1
            elif subscriber.ended_s and subscriber.ended_s < message.sent_s:
                pass
            elif not subscriber.alive:
                ended += 1
            elif subscriber.confirmed_s and subscriber.confirmed_s < message.sent_s:
                missing.append(subscriber)
            elif subscriber.began_s < message.answered_s:
                ended += 1  # it joined meanwhile: perhaps it was one of them
        _judge(message, got, ended, missing, later, killed, without_host, figures)


def _judge(
    message: Sent,
    got: int,
    ended: int,
    missing: list[Subscriber],
    later: dict[tuple[int, str, frozenset[int]], int],
    killed: set[int],
    without_host: list[Window],
    figures: Figures,
) -> None:
    if got > message.count:
        figures.complain(f"{message} was answered {message.count}, and {got} got it")
    promised = max(0, message.count - got - ended)
    died = 0
    if message.words & killed:
        for subscriber in missing:
            last = later.get((id(subscriber), message.source, message.words), -1)
            died += last < message.number
    excused = min(promised, died)
    figures.died_with_writer += excused
    if promised > excused:
        figures.lost += promised - excused
        who = ", ".join(f"{s.port}" for s in missing)
        figures.complain(
            f"lost: {message} reached {got} of {message.count}; {ended} have ended, "
            f"these live and did not get it: {who}"
        )
    # Whether one that has ended was among the n is not known. If it was not, one more of these was
    # promised the message; if it was, one more was left out. Either needs its reason.
    perhaps = max(0, min(len(missing), message.count - got) - promised)
    figures.died_with_writer += (perhaps_died := min(perhaps, died - excused))
    left_out = len(missing) - promised - perhaps_died
    if left_out > 0:
        figures.out_of_reach += left_out
        if not _overlaps(message, without_host):
            who = ", ".join(f"{s.port} since {s.confirmed_s:.3f}" for s in missing)
            figures.complain(f"left out while there was a host: {message}; not heard by {who}")


def _overlaps(message: Sent, windows: list[Window]) -> bool:
    return any(
        begin <= message.answered_s and message.sent_s <= end + _AFTER_S for begin, end in windows
    )


def _last_heard(
    sent: list[Sent], subscribers: list[Subscriber]
) -> dict[tuple[int, str, frozenset[int]], int]:
    """The last number of each publisher's each worker that each subscriber heard."""
    words = {(message.source, message.number): message.words for message in sent}
    last: dict[tuple[int, str, frozenset[int]], int] = {}
    for subscriber in subscribers:
        for source, numbers in subscriber.received.items():
            for number in numbers:
                found = words.get((source, number))
                if found is not None:
                    key = (id(subscriber), source, found)
                    last[key] = max(number, last.get(key, -1))
    return last
