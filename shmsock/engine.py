"""Which engine this process runs: the seam between the two.

``_engine_py`` is the reference. ``_engine_c`` exports the same names (``NAME``, ``Engine``,
``Reference``) over the same layout and protocol, so that processes of both kinds may share a
segment. The C engine is used where it was built; ``SHMSOCK_ENGINE=c|py`` forces one.
"""

from __future__ import annotations

import os
import typing

from ._engine_common import DONE, NOTHING, RECYCLED, STRIPE_TIMEOUT_S
from ._table_py import recycle, settle

_wanted = os.environ.get("SHMSOCK_ENGINE", "")
if _wanted not in ("", "c", "py"):
    raise ImportError(f"SHMSOCK_ENGINE={_wanted!r} names no engine: use 'c' or 'py'")

if typing.TYPE_CHECKING or _wanted == "py":
    from ._engine_py import NAME, Engine, Reference, reference_class
else:
    try:
        from ._engine_c import NAME, Engine, Reference, reference_class
    except ImportError as error:
        if _wanted == "c":
            raise ImportError(
                "SHMSOCK_ENGINE='c' asks for the C engine, which was not built: install again "
                f"with a C compiler and Python's headers, or use 'py' ({error})"
            ) from error
        from ._engine_py import NAME, Engine, Reference, reference_class

if NAME == "py" and os.uname().machine != "x86_64":
    raise ImportError(
        "the Python engine relies on x86-64's store ordering; this machine is "
        f"{os.uname().machine}, which needs the C engine: install with a C compiler"
    )

__all__ = [
    "DONE",
    "NAME",
    "NOTHING",
    "RECYCLED",
    "STRIPE_TIMEOUT_S",
    "Engine",
    "Reference",
    "recycle",
    "reference_class",
    "settle",
]
