"""Which engine this process runs: the seam between the two.

``_engine_py`` is the reference. A C engine will export the same names (``NAME``, ``Engine``,
``Reference``, ``NewSocket`` and the result bits) over the same layout and protocol, so that
processes of both kinds may share a segment. ``SHMSOCK_ENGINE=c|py`` forces one.
"""

from __future__ import annotations

import os

_wanted = os.environ.get("SHMSOCK_ENGINE", "py")
if _wanted != "py":
    raise ImportError(
        f"SHMSOCK_ENGINE={_wanted!r} asks for an engine that this build does not have: use 'py'"
    )
if os.uname().machine != "x86_64":
    raise ImportError(
        "the Python engine relies on x86-64's store ordering; this machine is "
        f"{os.uname().machine}, which needs the C engine"
    )

from ._engine_py import NAME, Engine, NewSocket, Reference, recycle, settle  # noqa: E402
from ._stripes_py import DONE, NOTHING, RECYCLED, STRIPE_TIMEOUT_S  # noqa: E402

__all__ = [
    "DONE",
    "NAME",
    "NOTHING",
    "RECYCLED",
    "STRIPE_TIMEOUT_S",
    "Engine",
    "NewSocket",
    "Reference",
    "recycle",
    "settle",
]
