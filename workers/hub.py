"""The built-in application: publish/subscribe over RESP, and the pages over HTTP, on one port.

``shmsock serve`` without a name runs it. The protocols are in ``hub_protocol`` and ``http``, the
pages in ``pages``; this is all there is to make an application of them.
"""

from __future__ import annotations

import collections.abc
import errno
import typing

from .application import Application, Context
from .http import HttpProtocol
from .hub_client import client_name
from .hub_protocol import Hub
from .pages import Pages

if typing.TYPE_CHECKING:
    from .protocol import Protocol


class HubApplication(Application):
    """A small Redis of many processes."""

    def on_startup(self, context: Context) -> None:
        """End subscribers who read too slowly: who missed a message would not know it. As Redis."""
        runtime = context.runtime

        def end_crowded(sid: int) -> None:
            runtime.set_failed(sid, errno.ENOBUFS, "reads too slowly: over max_unwritten_bytes")

        runtime.groups.on_crowded = end_crowded

    def protocols(self, context: Context) -> collections.abc.Sequence[Protocol]:
        """HTTP first: it knows its requests by their first line, and RESP takes anything."""
        settings = context.settings
        pages = Pages(
            context.runtime,
            allow_remote=settings["pages_remote"],
            health=context.health,
            name_of=client_name,
        )
        hub = Hub(
            context.runtime,
            password=settings["password"],
            max_connections=settings["max_connections"],
        )
        return (HttpProtocol(pages, closing=context.draining), hub)


app = HubApplication
