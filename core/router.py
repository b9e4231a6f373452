"""The composition of everything that is decided. Work in progress: the public API, without decisions yet."""

from typing import Any

import msgspec

from core.config import RouterConfig
from core.events import Effect, Event, Refuse, RequestCame
from core.fleet import NodeInventory
from core.registry import AgentView
from core.units import AgentId, Instant, RequestId

__all__ = ["AgentView", "Explanation", "Router", "Statistics", "WaitingView"]


class WaitingView(msgspec.Struct, frozen=True, kw_only=True):
    """One waiting request."""

    request_id: RequestId
    position: int
    """From 1, over all clients."""
    route: str
    model: str | None
    client: str
    waited_ms: float
    expected_start_ms: float | None
    """From now; None when nobody can tell."""
    why: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request went where it went: one entry per decision about it."""

    request_id: RequestId
    model: str | None
    strategy: str
    decisions: list[Any]


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """The router in numbers."""

    in_flight: int
    waiting: int
    agents: int
    agents_ready: int
    in_flight_by_agent: dict[AgentId, int]
    requests_total: int


class Router:
    """Driven by what happens and by time; returns what must be done about it. `now` never goes back."""

    def __init__(self, config: RouterConfig, *, now: Instant) -> None:
        self._config = config
        self._now = now

    def handle(self, event: Event, *, now: Instant) -> list[Effect]:
        """`event` happened."""
        if isinstance(event, RequestCame):
            return [Refuse(request_id=event.request_id, status=503, text="no node is ready")]
        return []

    def tick(self, *, now: Instant) -> list[Effect]:
        """Time passed."""
        return []

    def next_deadline(self) -> Instant | None:
        """When `tick` wants to be called, at the latest."""
        return None

    def agents(self) -> list[AgentView]:
        """All agents, the first registered first."""
        return []

    def agent(self, agent_id: AgentId) -> AgentView | None:
        """One agent."""
        return None

    def inventories(self) -> list[NodeInventory]:
        """What the approved nodes hold, for merged lists."""
        return []

    def waiting(self) -> list[WaitingView]:
        """Who waits, the next to be served first."""
        return []

    def why(self, request_id: RequestId) -> Explanation | None:
        """Why a recent request went where it went."""
        return None

    def statistics(self) -> Statistics:
        """A snapshot."""
        return Statistics(in_flight=0, waiting=0, agents=0, agents_ready=0, in_flight_by_agent={}, requests_total=0)
