"""Placement advice over HTTP: which model should be warm where, computed by a process of its own from what the router saw.

Decides only when to compute anew. Invariant: one plan is computed at a time, and none more often than every `KEPT_S` seconds, however many
ask.
"""

from typing import Any, Final

import msgspec
import trio
from quart import Response
from quart_trio import QuartTrio

from core.advice import Question
from servers.access import Area
from servers.api.web import Web, guarded, reply
from servers.aside import answered

KEPT_S: Final = 10.0
"""A plan is shown again until it is so old."""


def add_routes(app: QuartTrio, web: Web) -> None:
    """`/api/placement`."""
    lock = trio.Lock()
    kept: tuple[float, dict[str, Any]] | None = None

    @app.get("/api/placement")
    @guarded(web, Area.MANAGEMENT)
    async def placement() -> Response:
        nonlocal kept
        async with lock:
            now = web.driver.now()
            if kept is None or now - kept[0] >= KEPT_S:
                question = web.driver.placement()
                kept = (now, await _answered(question))
        return reply(kept[1])


async def _answered(question: Question) -> dict[str, Any]:
    """The plan as it is shown, and what it rests on."""
    answer: dict[str, Any] = msgspec.json.decode(await answered("servers.plan", msgspec.msgpack.encode(question)))
    return answer
