"""`X-Explain: 1` on an inference request: why that node, in a header of the answer (contract 1).

Decides who is told, and how short. Invariants: only who may manage is told; the value is one line of `LINE_MAX` characters at most.
"""

from typing import Final

from core.units import RequestId
from core.views import Candidate, Decision, Explanation
from edge.wire import ClientConnection
from edge.wire_heads import RequestHead
from servers.access import Access, Area
from servers.driver import Driver

LINE_MAX: Final = 1000
CANDIDATES_SHOWN: Final = 4


class Explainer:
    """Of one coordinator. Implements `edge.desk.Explainer`."""

    def __init__(self, driver: Driver, access: Access) -> None:
        self._driver = driver
        self._access = access

    async def is_for(self, conn: ClientConnection, head: RequestHead) -> bool:
        """Whether this client may be told."""
        caller = self._access.caller(conn.peer_host, conn.peer_port, head.fields)
        return await self._access.allows(Area.MANAGEMENT, caller)

    def line(self, request_id: RequestId) -> str:
        """Why the request went where it went, as far as is known now."""
        found = self._driver.router.why(request_id)
        return "" if found is None else line(found)


def line(why: Explanation) -> str:
    """The last decision: the chosen node first, each with its score and the parts of it."""
    if not why.decisions:
        return why.strategy
    last = why.decisions[-1]
    shown = sorted(last.candidates, key=lambda candidate: not candidate.chosen)[:CANDIDATES_SHOWN]
    told = [f"{why.strategy}, {last.outcome} after {last.after_ms:.0f} ms", *map(_candidate, shown), *_out(last)]
    return "; ".join(told)[:LINE_MAX]


def _candidate(candidate: Candidate) -> str:
    parts = ", ".join(f"{name} {value}" for name, value in candidate.parts.items())
    return f"{candidate.name}{' (chosen)' if candidate.chosen else ''}: {candidate.score}" + (f" = {parts}" if parts else "")


def _out(decision: Decision) -> list[str]:
    return [f"not {name}: {why}" for name, why in decision.out.items()]
