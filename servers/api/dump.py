"""The dump over HTTP: the router's tape as a file, for the simulator to play.

Decides only how fast it is written. Invariants: one dump is written at a time; the loop is given back after each piece.
"""

from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version

import trio
from quart import Response
from quart_trio import QuartTrio

from servers import clock
from servers.access import Area
from servers.api.web import Web, guarded

CONTENT_TYPE = "application/octet-stream"


def add_routes(app: QuartTrio, web: Web) -> None:
    """`/api/admin/dump`."""
    lock = trio.Lock()

    @app.get("/api/admin/dump")
    @guarded(web, Area.MANAGEMENT)
    async def dump() -> Response:
        written = web.driver.tape.written(version=_version(), made_at=clock.rfc3339(clock.unix_ms()))

        async def pieces() -> AsyncIterator[bytes]:
            async with lock:
                for piece in written:
                    yield piece
                    await trio.lowlevel.checkpoint()

        return Response(pieces(), content_type=CONTENT_TYPE)


def _version() -> str:
    try:
        return version("ollama-router")
    except PackageNotFoundError:
        return "unknown"
