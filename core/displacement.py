"""What loading a model pushes out of a node's memory, and what that costs the fleet.

Decides prices and victims; never whether the load is worth it (`core.scoring`) or how it is carried out (`core.dispatch`).

A victim costs what loading it again would take, as often as it is likely to be asked for within a horizon, shared by the other nodes
that have it in memory (routing.md 1.4: D), plus the time to unload it, plus what is in flight on it, which must end first (E).
Victims are the cheapest ones by that price, not those that Ollama would take (by keep-alive, then by file name).
A runner that must go because other runner options are wanted is priced the same way, by the requests that want its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from core.agents import Agent
from core.heat import MODELS_MAX, Heat
from core.learning import Speeds
from core.parts import Part
from core.units import MICROS_PER_S, AgentId, Instant, ModelKey

HORIZON_S: Final = 90.0
"""A model that is asked for again within this time, and its own load, is missed."""
MISSED_MAX: Final = 100.0
"""A hot model counts as missed so often, at most. Both are far above the 10 s and 3 of routing.md. Tried on the whole Azure traces at 0.35
of the bound, mean of three seeds, p95 and loads per 1,000: 30 s and 30 times 6.6 s and 11, 60 s and 30 times 6.6 s and 7.5, 90 s and 100
times 6.3 s and 5.0, 120 s and 30 times 7.3 s and 6.6."""
MANY: Final = 64
COUNTED_S: Final = 1.0
"""Among more nodes than `MANY` it is counted so often which models they have in memory, among fewer at each instant."""
UNLOAD_US: Final = 1_000_000
"""From the unload to the memory being free again (typically 0.5 to 1.5 s)."""


class Displacement(Part):
    """Of all nodes. The mappings behind the callables are their owners' own."""

    __slots__ = ("_asked_at", "_heat", "_in_flight", "_options_heat", "_ready", "_replicas", "_runners", "_speeds", "mixed")

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
        self._options_heat = Heat()
        self.mixed: dict[ModelKey, None] = {}
        """Models that were asked for with runner options, the first one first."""
        self._runners: dict[tuple[ModelKey, str], int] = {}

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

    def of_runner(self, node: Agent, key: ModelKey, options: str, *, now: Instant) -> int:
        """µs that it costs the fleet to give up the runner of `key` on `node`, whose options are `options`, for one with others."""
        return self._cost(node, key, self._heat_of(key, options, now), self._like(key, options, now))

    def came(self, key: ModelKey, options: str, *, now: Instant) -> None:
        """A request with these runner options came. Kept only of models that are asked for with several: a request without options for
        one that is not `mixed` need not be told."""
        if options or key in self.mixed:
            self.mixed[key] = None
            if len(self.mixed) > MODELS_MAX:
                del self.mixed[next(iter(self.mixed))]
            self._options_heat.came(_class(key, options), now=now)

    def _heat_of(self, key: ModelKey, options: str, now: Instant) -> float:
        """Requests per second for the model with these options."""
        rate = self._options_heat.per_s(_class(key, options), now=now)
        return rate if rate or options else self._heat.per_s(key, now=now)

    def _like(self, key: ModelKey, options: str, now: Instant) -> int:
        """How many nodes have the model in memory with these options; counted once per instant."""
        self._start_counting(now)
        found = self._runners.get((key, options))
        if found is None:
            has = sum(key in node.inventory.resident and node.inventory.options.get(key, "") == options for node in self._ready())
            found = self._runners[key, options] = has
        return found

    def _price(self, node: Agent, key: ModelKey, now: Instant) -> int:
        return self._cost(node, key, self._heat.per_s(key, now=now), self._elsewhere(key, now))

    def _cost(self, node: Agent, key: ModelKey, per_s: float, replicas: int) -> int:
        rates = self._speeds.rates(node.id, key, size_bytes=node.inventory.installed[key].size_bytes, slots=node.slots_for(key))
        load_s = rates.load_us / MICROS_PER_S
        missed = min(MISSED_MAX, per_s * (HORIZON_S + load_s))
        price = int(rates.load_us * missed / max(replicas, 1)) + UNLOAD_US
        busy = self._in_flight(key).get(node.id, 0)
        if busy:
            price += busy * (rates.overhead_us + self._speeds.output_tokens(key) * rates.decode_ns // 1000)
        return price

    def _elsewhere(self, key: ModelKey, now: Instant) -> int:
        """How many nodes have the model in memory; counted once per instant, or now and then."""
        self._start_counting(now)
        known = self._replicas.get(key)
        if known is None:
            known = self._replicas[key] = sum(key in node.inventory.resident for node in self._ready())
        return known

    def _start_counting(self, now: Instant) -> None:
        since = self._asked_at
        if since is None or (now != since and (now - since > COUNTED_S or len(self._ready()) <= MANY)):
            self._asked_at = now
            self._replicas = {}
            self._runners = {}


def _class(key: ModelKey, options: str) -> ModelKey:
    """Requests for one model with the same options, as something that heat can be kept of."""
    return ModelKey(f"{key} {options}")
