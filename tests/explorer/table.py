"""Every scenario and how far it is explored."""

from __future__ import annotations

import collections.abc
import functools
import typing

from shmsock.layout import CLOSED, OPEN, OPENING

from .participants import Bounds
from .programs import (
    adopt,
    drop,
    drop_inside,
    fail,
    forget_handles,
    give,
    give_and_tick,
    hold,
    hold_either,
    hold_failed_too,
    hold_two,
    inherit,
    leave,
    offer,
    offer_and_look,
    place,
    read,
    release,
    renew,
    repair,
    serve,
    suspect,
    suspect_and_hold,
    take_over,
    ticking,
    turn,
    visit,
)
from .scenarios import (
    Check,
    Scenario,
    Three,
    contention_2,
    contention_3,
    descriptors,
    fenced_tenant,
    left_behind,
    lost_file,
    plain,
    registration,
)
from .world import World

Row = tuple[str, collections.abc.Callable[[World], Check], Three, dict[str, typing.Any]]


def bounds(*three: tuple[int, ...]) -> tuple[Bounds, Bounds, Bounds]:
    """Switches, kills, exceptions and fences: quick, usual and deep."""
    quick, usual, deep = (Bounds(*each) for each in three)
    return quick, usual, deep


PLAIN = bounds((1, 1), (2, 1), (4, 1))
LEFT = bounds((1, 1), (2, 1), (3, 2))
TWICE = bounds((0, 0, 2), (0, 1, 2), (1, 0, 2))

LEFT_RAISE = bounds((1, 0, 1), (2, 0, 1), (2, 1, 1))
FENCED = bounds((1, 0, 0, 1), (2, 0, 0, 1), (3, 1, 0, 1))
TENANT = bounds((0, 0, 0, 1), (1, 0, 0, 1), (2, 0, 0, 1))
THREE_LEFT = bounds((0, 1), (1, 1), (2, 2))

LATE = bounds((0, 1), (2, 1), (3, 2))
LOST = bounds((0, 0, 0, 1), (2, 0, 0, 1), (3, 0, 0, 1))
GIVE = bounds((1, 1), (2, 1), (4, 1))
THREE_GIVE = bounds((0, 1), (1, 1), (2, 2))
ONE_HEIR = {"mortal": (1,)}

NEAR = bounds((0, 0, 1), (1, 0, 1), (2, 1, 1))
PAIR = {"slots": 2, "interruptible": (0,)}

given = functools.partial(plain, given=True)

_TABLE: list[Row] = [
    ("take-give-2", contention_2, bounds((2, 1), (4, 1), (9, 1)), {}),
    ("take-give-3", contention_3, bounds((0, 1), (1, 1), (2, 2)), {}),
    ("fail-hold", plain([fail], [hold]), bounds((1, 1), (2, 1), (4, 1)), {}),
    (
        "fail-fail-hold",
        plain([fail], [fail], [hold_failed_too]),
        bounds((0, 1), (1, 1), (2, 2)),
        {},
    ),
    ("release-hold", plain([release], [hold]), PLAIN, {}),
    ("release-fail", plain([release], [fail]), PLAIN, {}),
    ("renew-hold", plain([renew], [hold_either]), bounds((1, 1), (1, 1), (3, 1)), {}),
    ("turns", plain([turn], [turn]), PLAIN, {}),
    ("hand-over", plain([fail], [take_over], [take_over]), bounds((0, 1), (1, 1), (2, 2)), {}),
    ("threads", plain([hold, hold], [fail]), bounds((1,), (1, 1), (2, 1)), {}),
    ("threads-alone", plain([hold, hold], []), bounds((2,), (2, 1), (4, 1)), {}),
    ("threads-drop", plain([drop, drop], [fail]), bounds((1,), (2,), (2, 1)), {}),
    ("raise-drop", plain([drop, drop], []), bounds((0, 0, 1), (1, 0, 1), (2, 0, 1)), {}),
    ("raise-hold", plain([hold], [fail]), bounds((1, 0, 1), (2, 0, 1), (2, 1, 1)), {}),
    ("raise-fail", plain([fail], [hold]), bounds((1, 0, 1), (2, 0, 1), (2, 1, 1)), {}),
    ("raise-kill", plain([hold], [fail]), bounds((0, 1, 1), (0, 1, 1), (1, 1, 1)), {}),
    ("raise-twice", plain([ticking(hold)], [fail]), TWICE, {"interruptible": (0,)}),
    ("raise-renew", plain([ticking(renew)], [fail]), TWICE, {"interruptible": (0,)}),
    ("raise-release", plain([ticking(release)], [hold]), TWICE, {"interruptible": (0,)}),
    (
        "raise-threads",
        plain([hold, hold], [fail]),
        bounds((0, 0, 1), (1, 0, 1), (2, 1, 1)),
        {"interruptible": (0,)},
    ),
    ("raise-repair", left_behind((1, OPEN), 0, repair, hold), LEFT_RAISE, {}),
    ("died-inside", left_behind((1, OPEN), 0, repair, hold), LEFT, {}),
    ("died-closed", left_behind((2, CLOSED), 0, repair, repair), LEFT, {}),
    ("died-opening", left_behind((2, OPENING), 0, repair, repair), LEFT, {}),
    ("died-opened", left_behind((2, OPENING), 1, repair, repair), LEFT, {}),
    ("died-opened-taken", left_behind((2, OPENING), 1, repair, hold_failed_too), LATE, {}),
    ("died-tokened", left_behind((2, CLOSED), 1, repair, repair), LATE, {}),
    ("died-and-three", left_behind((2, CLOSED), 0, repair, repair, hold), THREE_LEFT, {}),
    ("suspicion", plain([hold], [suspect_and_hold]), bounds((1, 1), (2, 1), (4, 1)), {}),
    ("suspicion-stranger", plain([], [visit], [suspect]), bounds((1, 1), (2, 1), (3, 2)), {}),
    ("suspicion-own", plain([suspect, hold], [fail]), bounds((0, 1), (1, 1), (2, 1)), {}),
    ("leaving", plain([leave], [hold], []), bounds((0, 1), (1, 1), (3, 1)), {"mortal": (0, 1)}),
    ("leaving-2", plain([leave], [leave], []), bounds((0, 1), (1, 1), (2, 2)), {"mortal": (0, 1)}),
    ("rehome", plain([serve], [adopt], [adopt], rehomed=True), bounds((1, 1), (1, 1), (2, 2)), {}),
    ("give-take", given([give], [inherit]), GIVE, {}),
    ("give-take-reap", given([give_and_tick], [inherit], [inherit]), THREE_GIVE, {}),
    ("give-place", given([give], [inherit], [place]), bounds((0, 1), (1, 1), (2, 2)), ONE_HEIR),
    ("give-wait", given([offer_and_look], [inherit]), GIVE, {}),
    ("give-busy", given([read, offer], []), bounds((1, 1), (2, 1), (4, 1)), {}),
    ("give-fail", given([give], [inherit], [fail]), THREE_GIVE, {}),
    ("raise-give", given([give], [inherit]), bounds((0, 0, 1), (1, 0, 1), (2, 1, 1)), {}),
    ("handles", plain([suspect, forget_handles], [hold]), bounds((1,), (2,), (2, 1)), {}),
    ("neighbours", plain([hold_two], [fail], ready=2), bounds((1, 1), (2, 1), (4, 1)), PAIR),
    ("raise-neighbours", plain([hold_two], [fail], ready=2), NEAR, PAIR),
    ("drop-inside", plain([drop_inside], [fail]), bounds((1, 1), (2, 1), (4, 1)), {}),
    ("raise-drop-inside", plain([drop_inside], [fail]), NEAR, {}),
    (
        "fenced",
        plain([hold], [hold]),
        FENCED,
        {"mortal": (0,)},
    ),
    ("lost-file", lost_file, LOST, {"mortal": (0,)}),
    ("fenced-tenant", fenced_tenant, TENANT, {"mortal": (1,), "processes": 3}),
    ("registration", registration, bounds((0, 1), (1, 1), (2, 2)), {}),
    ("descriptors", descriptors, bounds((2,), (3,), (5,)), {}),
]

SCENARIOS = [Scenario(name, build, three, **more) for name, build, three, more in _TABLE]
