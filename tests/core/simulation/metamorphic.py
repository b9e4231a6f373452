"""What must come out the same when the same thing happens otherwise: other names of agents (M1), another origin of time (M5).

M2, that a router which was taken and put back goes on as before, is `tests/core/test_snapshot.py`'s.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from core.config import RouterConfig
from core.events import Effect, Event, NodePolled
from core.router import Router
from core.simulation.actors_shell import MakeRouter, Shell
from core.simulation.options import swarm
from core.simulation.prng import Prng
from core.simulation.world import Verdict, World
from core.units import AgentId, Instant
from tests.core.routing import instead

GRID_S = 2.0**-20
"""Instants on this grid stay exact when they are shifted by `SHIFT_S`."""
SHIFT_S = 2.0**24

_ENCODER = msgspec.json.Encoder(enc_hook=str)


class Recorded(World):
    """A world whose instants lie on the grid, and that keeps all that passed between shell and router."""

    def __init__(self, seed: int, **given: Any) -> None:
        self.calls: list[tuple[Event | None, Instant, list[Effect]]] = []
        self.routers: list[int] = []
        """How many calls were made before each start of a coordinator."""
        super().__init__(seed, swarm(Prng(seed).split("options")), **given)

    def at(self, when: float, deed: Any, *given: Any) -> None:
        super().at(-(-when // GRID_S) * GRID_S, deed, *given)

    def started(self, router: Router, *, now: Instant) -> None:
        self.routers.append(len(self.calls))
        super().started(router, now=now)

    def after(self, event: Event | None, effects: Sequence[Effect], *, now: Instant) -> None:
        self.calls.append((event, now, list(effects)))
        super().after(event, effects, now=now)


def shifted_differs(seed: int, steps: int, *, make_router: MakeRouter = Router) -> str:
    """M5: where a router that is told the same, all of it `SHIFT_S` later, answers otherwise; "" when it never does."""
    world = Recorded(seed, make_router=make_router)
    world.run(steps)
    router: Any = None
    for number, (event, now, effects) in enumerate(world.calls):
        later = Instant(now + SHIFT_S)
        if number in world.routers:
            router = make_router(world.options.config, now=later)
        if isinstance(event, NodePolled) and event.asked_at is not None:
            event = msgspec.structs.replace(event, asked_at=Instant(event.asked_at + SHIFT_S))
        answer = router.tick(now=later) if event is None else router.handle(event, now=later)
        if answer != effects:
            return f"call {number} at {now}: {event} brings {answer}, not {effects}"
    return ""


def renamed_differs(seed: int, steps: int, *, make_router: MakeRouter = Router) -> str:
    """M1: where other names of the agents, in the opposite order, change more than names; "" when nowhere."""

    class Renaming(Shell):
        def new_agent_id(self) -> AgentId:
            return AgentId(re.sub(r"\d+", lambda found: str(10**6 - int(found[0])), super().new_agent_id()))

    logs = []
    for shell in (Shell, Renaming):
        world = Recorded(seed, make_router=make_router, make_shell=shell)
        verdict = world.run(steps)
        logs.append([_ENCODER.encode(call).decode() for call in world.calls])
        assert isinstance(verdict, Verdict)
    plain, renamed = logs
    back = [re.sub(r"agent-(\d+)", lambda found: f"agent-{10**6 - int(found[1])}", line) for line in renamed]
    for number, (one, other) in enumerate(zip(plain, back, strict=False)):
        if one != other:
            return f"call {number}: {other} instead of {one}"
    return "" if len(plain) == len(back) else f"{len(back)} calls instead of {len(plain)}"


def counts_from_the_birth_of_time(config: RouterConfig, *, now: Instant) -> Router:
    """A known-bad router (M5): its grace after a start ends at an instant, not after a while."""
    router = Router(config, now=now)
    router._dispatcher.grace_until = Instant(config.startup_grace_s)
    return router


def prefers_names(config: RouterConfig, *, now: Instant) -> Router:
    """A known-bad router (M1): its lists of agents are sorted by their ids."""
    router = Router(config, now=now)
    registry: Any = router._registry
    holders, ready = registry.holders, registry.ready
    instead(registry, "holders", lambda key: tuple(sorted(holders(key), key=lambda agent: agent.id)))
    instead(registry, "ready", lambda: tuple(sorted(ready(), key=lambda agent: agent.id)))
    return router
