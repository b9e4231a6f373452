"""A router in name only, for the tests of the nginx edge's parts: it answers from a list, and remembers what it was told."""

from collections.abc import Callable

from core.events import AttemptEnded, Effect, Event, Forward, Freed, Lease, RequestCame, RequestEffect, Settled, Upstream
from core.units import AgentId, LeaseId, RequestId
from edge.desk import Desk

Reply = Callable[[RequestId], list[RequestEffect]]


class ScriptedRouter:
    """A `Decides` whose time is turned by hand."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.desks: dict[RequestId, Desk] = {}
        self.script: list[Reply] = []
        self.live: dict[RequestId, None] = {}
        self.now = 100.0

    def apply(self, event: Event) -> list[Effect]:
        self.events.append(event)
        if isinstance(event, RequestCame):
            self.live[event.request_id] = None
        if isinstance(event, Settled):
            self.live.pop(event.request_id, None)
        if isinstance(event, RequestCame | AttemptEnded) and self.script:
            for effect in self.script.pop(0)(event.request_id):
                self.desks[effect.request_id].put(effect)
        return []

    def open_desk(self, request_id: RequestId) -> Desk:
        self.desks[request_id] = Desk(request_id)
        return self.desks[request_id]

    def keep_desk(self, desk: Desk) -> None:
        self.desks[desk.request_id] = desk

    def close_desk(self, request_id: RequestId) -> None:
        del self.desks[request_id]

    def lives(self, request_id: RequestId) -> bool:
        return request_id in self.live

    def settled(self) -> list[Settled]:
        return [event for event in self.events if isinstance(event, Settled)]

    def freed(self) -> list[Freed]:
        return [event for event in self.events if isinstance(event, Freed)]


def forward_to(*, gateway: bool = True, host: str = "127.0.0.1", name: str = "box", base_path: str = "", **more: object) -> Reply:
    """To a node of that kind."""

    def reply(request_id: RequestId) -> list[RequestEffect]:
        upstream = Upstream(host=host, port=11435, gateway=gateway, base_path=base_path)
        lease = Lease(
            id=LeaseId(f"{request_id}/1"), request_id=request_id, agent_id=AgentId("a1"), agent_name=name, upstream=upstream, attempt=1
        )
        return [Forward(request_id=request_id, lease=lease, **more)]  # type: ignore[arg-type]

    return reply
