"""What loading a model pushes out of a node's memory, and what that costs the fleet.

Decides prices and victims; never whether the load is worth it (`core.scoring`) or how it is carried out (`core.dispatch`).

A victim costs what loading it again would take, as often as it is likely to be asked for within a horizon, shared by the other nodes
that have it in memory (routing.md 1.4: D), plus the time to unload it, plus what is in flight on it, which must end first (E).
Victims are the cheapest ones by that price, not those that Ollama would take (by keep-alive, then by file name).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from core.agents import Agent
from core.heat import Heat
from core.learning import Speeds
from core.units import MICROS_PER_S, AgentId, Instant, ModelKey

HORIZON_S: Final = 30.0
"""A model that is asked for again within this time, and its own load, is missed. Three times the 10 s of routing.md: with 30 s a study of
the mixed fleet at 0.35 of the bound loads 9 models per 1,000 requests instead of 14, at the same tail."""
MISSED_MAX: Final = 3.0
"""A hot model counts as missed so often, at most."""
UNLOAD_US: Final = 1_000_000
"""From the unload to the memory being free again (typically 0.5 to 1.5 s)."""


class Displacement:
    """Of all nodes. The mappings behind the callables are their owners' own."""

    def __init__(
        self,
        speeds: Speeds,
        heat: Heat,
        *,
        ready: Callable[[], Sequence[Agent]],
        in_flight: Callable[[ModelKey], Mapping[AgentId, int]],
    ) -> None:
        self._speeds = speeds
        self._heat = heat
        self._ready = ready
        self._in_flight = in_flight
        self._asked_at: Instant | None = None
        self._replicas: dict[ModelKey, int] = {}

    def of(self, node: Agent, key: ModelKey, *, now: Instant) -> tuple[int, tuple[ModelKey, ...]]:
        """(µs, victims) of loading `key` on `node`."""
        inventory = node.inventory
        if not inventory.resident:
            return 0, ()
        resident = {other: inventory.installed[other].size_bytes for other in inventory.resident}
        prices: dict[ModelKey, int] = {}

        def price(other: ModelKey) -> int:
            found = prices[other] = self._price(node, other, now)
            return found

        victims = node.room.victims(key, resident, size_bytes=inventory.installed[key].size_bytes, price=price)
        return sum(prices[other] for other in victims), victims

    def _price(self, node: Agent, key: ModelKey, now: Instant) -> int:
        rates = self._speeds.rates(node.id, key, size_bytes=node.inventory.installed[key].size_bytes, slots=node.slots)
        load_s = rates.load_us / MICROS_PER_S
        missed = min(MISSED_MAX, self._heat.per_s(key, now=now) * (HORIZON_S + load_s))
        price = int(rates.load_us * missed / max(self._elsewhere(key, now), 1)) + UNLOAD_US
        busy = self._in_flight(key).get(node.id, 0)
        if busy:
            price += busy * (rates.overhead_us + self._speeds.output_tokens(key) * rates.decode_ns // 1000)
        return price

    def _elsewhere(self, key: ModelKey, now: Instant) -> int:
        """How many nodes have the model in memory; counted once per instant."""
        if now != self._asked_at:
            self._asked_at = now
            self._replicas = {}
        known = self._replicas.get(key)
        if known is None:
            known = self._replicas[key] = sum(key in node.inventory.resident for node in self._ready())
        return known
