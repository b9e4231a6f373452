"""Why the node that a request would rather have cannot take it yet, and what it is to get rid of first.

Decides whether the chosen node may begin now, and which models it gets no new requests for meanwhile (eviction barriers); never which node
is chosen. Ollama alone would take everything at once: it waits for a busy victim or a busy runner with other options, holds up every
other load meanwhile, and lets new requests keep that one busy (ollama-wire.md 2.5).

Invariants: barriers are raised anew in each look, in the queue's order, one per node: none outlives the request that needs it; a node
is never told to load two models at once, nor to unload what works for us.
"""

from typing import NamedTuple

from core.agents import Agent
from core.displacement import Displacement
from core.learning import Speeds
from core.leases import Ledger
from core.names import display
from core.parts import Part
from core.requests import Request
from core.scoring import Choice
from core.turns import Alarm, kept_until
from core.units import MICROS_PER_S, AgentId, Instant, ModelKey


class Barrier(NamedTuple):
    """What a node is to get rid of, once idle, for somebody who waits; it gets no new request for that."""

    victims: frozenset[ModelKey]
    key: ModelKey
    options: str
    """Runner options that `key` will be loaded with: where it is its own victim, only those with others are kept away."""


class Obstacles(Part):
    """Of all nodes. `makes_room`: whether the strategy prices what a load pushes out; otherwise all is left to the nodes."""

    __slots__ = ("_displacement", "_ledger", "_makes_room", "_speeds", "alarm", "barriers")

    def __init__(self, ledger: Ledger, displacement: Displacement, speeds: Speeds, *, makes_room: bool) -> None:
        self._ledger = ledger
        self._displacement = displacement
        self._speeds = speeds
        self._makes_room = makes_room
        self.barriers: dict[AgentId, Barrier] = {}
        self.alarm = Alarm()
        """When a runner's turn is over that somebody waits for."""

    def clear(self) -> None:
        """Everybody who waits is looked at anew."""
        self.barriers.clear()
        self.alarm.clear()

    def keeps_away(self, request: Request, node: Agent) -> bool:
        """Whether the node is getting rid of what this request wants there."""
        barrier = self.barriers.get(node.id)
        if barrier is None or request.key not in barrier.victims:
            return False
        why = "makes room for another model"
        if request.key == barrier.key:
            if request.ask.options == barrier.options:
                return False
            why = "makes room for other runner options"
        request.barred = {**request.barred, node.name: why}
        return True

    def of(self, request: Request, choice: Choice, *, now: Instant) -> str | None:
        """Why the chosen node cannot have the request yet; None: it can. Raises the eviction barrier where that is what it takes."""
        agent, key = choice.agent, request.key
        request.victims = ()
        if not choice.room:
            return f"waits for {agent.name}, whose slots are taken"
        if key is None or not self._makes_room or not request.ask.needs_slot:
            return None
        inventory, options = agent.inventory, request.ask.options
        reload = key in inventory.resident
        if reload and not inventory.needs_reload(key, options):
            return None
        if agent.id in self.barriers:
            return f"waits for {agent.name}, which makes room for another request"
        if key in inventory.loading:
            return None if inventory.joins(key, options) else f"waits for {agent.name}, which is loading the model with other options"
        if inventory.loading:
            return f"waits for {agent.name}, which is loading another model"
        return self._of_runner(request, agent, key, now=now) if reload else self._of_room(request, agent, key, now=now)

    def _of_runner(self, request: Request, agent: Agent, key: ModelKey, *, now: Instant) -> str | None:
        """Its runner has other options: whether those who fit it have had their turn, and are through."""
        busy = bool(self._ledger.of_model(key).get(agent.id))
        size_bytes = agent.inventory.installed[key].size_bytes
        load_us = self._speeds.rates(agent.id, key, size_bytes=size_bytes, slots=agent.slots_for(key)).load_us
        until = kept_until(agent.inventory, key, load_s=load_us / MICROS_PER_S, busy=busy)
        if until > now:
            request.held = True
            self.alarm.set(until)
            return f"waits for {agent.name}, where it is the turn of requests with other runner options"
        if not busy:
            return None
        self.barriers[agent.id] = Barrier(frozenset((key,)), key, request.ask.options)
        return f"waits for {agent.name} until requests with other runner options have ended"

    def _of_room(self, request: Request, agent: Agent, key: ModelKey, *, now: Instant) -> str | None:
        """The model is not in memory: whether what must go for it is idle."""
        _, victims = self._displacement.of(agent, key, now=now)
        busy = [victim for victim in victims if self._ledger.of_model(victim).get(agent.id)]
        if not busy:
            request.victims = victims
            return None
        self.barriers[agent.id] = Barrier(frozenset(victims), key, request.ask.options)
        return f"waits for {agent.name} until {', '.join(display(victim) for victim in busy)} may be unloaded"
