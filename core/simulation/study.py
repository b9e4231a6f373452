"""A fleet under a workload, without faults: how long requests wait under one way of choosing, and what it costs in loads.

Decides nothing itself: a `Dispatcher` does, either a simple rule or the real `Router`. Virtual time from an event heap; ties by the order
of scheduling. Invariant: every arrival ends exactly once, served or refused; same workload, fleet and seed, same figures.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

import msgspec

from core.simulation.baselines import Rule, Seen
from core.simulation.node import (
    Came,
    Change,
    Finished,
    LoadFailed,
    ModelTiming,
    NodeTiming,
    Produced,
    Refused,
    RunnerChanged,
    SimulatedNode,
    Timing,
    UnloadAsked,
)
from core.simulation.prng import Prng
from core.simulation.workload import Arrival
from core.units import Instant

PRELOAD: Final = "preload"
"""How the ids begin of requests that only load a model, before the study begins."""

POLL_S: Final = 2.0
"""How often a dispatcher is told what each node has loaded."""


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One machine of the fleet: its Ollama, and the models it holds."""

    name: str
    timing: NodeTiming
    models: dict[str, ModelTiming]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one request fared; seconds from its arrival at the router. `ttft_s` infinite: refused."""

    model: str
    client: str
    ttft_s: float
    total_s: float
    output_tokens: int
    node: int
    cold: bool
    at_s: float = 0.0
    """When it came."""

    def is_good(self, *, ttft_s: float = 5.0, per_token_s: float = 0.1) -> bool:
        """Whether first token and pace were within these limits."""
        return self.ttft_s <= ttft_s and (self.total_s - self.ttft_s) <= per_token_s * max(1, self.output_tokens - 1)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to."""

    outcomes: list[Outcome]
    loads: int
    busy_s: list[float]
    """Of each node: time with at least one request in flight."""
    span_s: float
    busy_spans: list[list[tuple[float, float]]] = []
    """Of each node: from when to when."""
    cut: bool = False
    """Whether it was ended because too many waited: they count with what they had waited by then."""

    def loads_per_1000(self) -> float:
        """Model loads per 1,000 requests."""
        return 1000 * self.loads / max(1, len(self.outcomes))

    def ttft_s(self, percent: float) -> float:
        """A percentile of the time to the first token, nearest rank."""
        ordered = sorted(outcome.ttft_s for outcome in self.outcomes)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0

    def goodput(self, *, ttft_s: float = 5.0, per_token_s: float = 0.1) -> float:
        """Share of requests whose first token and pace were within these limits."""
        good = sum(outcome.is_good(ttft_s=ttft_s, per_token_s=per_token_s) for outcome in self.outcomes)
        return good / max(1, len(self.outcomes))


class Dispatcher(Protocol):
    """Who chooses. Returned pairs are (request, node index) to send now; a negative index means refused."""

    def came(self, request: int, arrival: Arrival, *, now: Instant) -> Sequence[tuple[int, int]]: ...

    def first_token(self, request: int, *, now: Instant) -> Sequence[tuple[int, int]]: ...

    def finished(self, request: int, timing: Timing, *, now: Instant) -> Sequence[tuple[int, int]]: ...

    def refused(self, request: int, node: int, *, now: Instant) -> Sequence[tuple[int, int]]: ...

    def polled(self, node: int, loaded: Sequence[str], in_flight: int, *, now: Instant) -> Sequence[tuple[int, int]]: ...

    def tick(self, *, now: Instant) -> Sequence[tuple[int, int]]: ...

    def unload_before(self, request: int) -> Sequence[str]:
        """Models that the node is to unload before it gets this request, which is about to be sent."""
        ...

    def next_deadline(self) -> Instant | None: ...


class RuleDispatcher:
    """A rule of `baselines` as a dispatcher."""

    def __init__(self, rule: Rule, fleet: Sequence[NodeSpec], prng: Prng) -> None:
        self._rule = rule
        self._prng = prng
        self._nodes = [Seen(index, 1.0) for index in range(len(fleet))]
        self._holders: dict[str, list[Seen]] = {}
        for index, node in enumerate(fleet):
            for model in node.models:
                self._holders.setdefault(model, []).append(self._nodes[index])
        self._where: dict[int, tuple[Seen, str]] = {}

    def came(self, request: int, arrival: Arrival, *, now: Instant) -> Sequence[tuple[int, int]]:
        node = self._rule(arrival, self._holders[arrival.model], self._prng)
        node.in_flight += 1
        self._where[request] = (node, arrival.model)
        node.loaded |= {arrival.model}
        return [(request, node.index)]

    def first_token(self, request: int, *, now: Instant) -> Sequence[tuple[int, int]]:
        return ()

    def finished(self, request: int, timing: Timing, *, now: Instant) -> Sequence[tuple[int, int]]:
        self._where.pop(request)[0].in_flight -= 1
        return ()

    def refused(self, request: int, node: int, *, now: Instant) -> Sequence[tuple[int, int]]:
        self._where.pop(request)[0].in_flight -= 1
        return [(request, -1)]

    def polled(self, node: int, loaded: Sequence[str], in_flight: int, *, now: Instant) -> Sequence[tuple[int, int]]:
        self._nodes[node].loaded = frozenset(loaded)
        return ()

    def tick(self, *, now: Instant) -> Sequence[tuple[int, int]]:
        return ()

    def unload_before(self, request: int) -> Sequence[str]:
        return ()

    def next_deadline(self) -> Instant | None:
        return None


class Study:
    """One run."""

    def __init__(
        self,
        fleet: Sequence[NodeSpec],
        arrivals: Sequence[Arrival],
        make: Callable[[], Dispatcher],
        *,
        preloaded: Mapping[int, Sequence[str]] = MappingProxyType({}),
        unanswered_max: int | None = None,
    ) -> None:
        """`preloaded`: models that are loaded on a node, by its number, before the first request, to stay as long as there is room.
        `unanswered_max`: the run is cut when more requests than that have come and not ended."""
        self._unanswered_max = len(arrivals) if unanswered_max is None else unanswered_max
        self._came = 0
        self._fleet = fleet
        self._preloaded = preloaded
        self._arrivals = arrivals
        self._nodes = [SimulatedNode(node.timing, node.models, now=Instant(0.0)) for node in fleet]
        self._dispatcher = make()
        self._heap: list[tuple[float, int, int, int]] = []  # at, order, kind, which
        self._order = 0
        self._armed: list[float] = [float("inf")] * len(fleet)
        self._dispatcher_armed = float("inf")
        self._first: dict[int, float] = {}
        self._cold: set[int] = set()
        self._outcomes: dict[int, Outcome] = {}
        self._where: dict[int, int] = {}
        self._loads = 0
        self._busy: list[list[tuple[float, float]]] = [[] for _ in fleet]
        self._busy_since: list[float | None] = [None] * len(fleet)
        self._now = 0.0

    def run(self, progress: Callable[[int, int], bool] | None = None) -> Figures:
        """Until every arrival ended. `progress(done, all)` is called now and then; returning False ends the run early."""
        for index, models in self._preloaded.items():
            for model in models:
                load = Came(request_id=f"{PRELOAD} {model}", model=model, prompt_tokens=0, output_tokens=0, keep_alive_s=-1.0)
                self._effects(index, Instant(0.0), self._nodes[index].handle(load, now=Instant(0.0)))
        for index, arrival in enumerate(self._arrivals):
            self._push(arrival.at_s, _ARRIVAL, index)
        for index in range(len(self._nodes)):
            self._push(POLL_S * (index + 1) / len(self._nodes), _POLL, index)
        steps = 0
        cut = False
        while len(self._outcomes) < len(self._arrivals) and not cut:
            at, _, kind, which = heapq.heappop(self._heap)
            self._now = at
            self._turn(kind, which, Instant(at))
            steps += 1
            cut = self._came - len(self._outcomes) > self._unanswered_max
            if progress is not None and steps % 4096 == 0 and not progress(len(self._outcomes), len(self._arrivals)):
                break
        if cut:
            self._end_all()
        for index, since in enumerate(self._busy_since):
            if since is not None:
                self._busy[index].append((since, self._now))
        ordered = [self._outcomes[index] for index in sorted(self._outcomes)]
        busy_s = [sum(until - since for since, until in spans) for spans in self._busy]
        return Figures(outcomes=ordered, loads=self._loads, busy_s=busy_s, span_s=self._now, busy_spans=self._busy, cut=cut)

    def _end_all(self) -> None:
        """All that came end now."""
        for index, arrival in enumerate(self._arrivals[: self._came]):
            if index not in self._outcomes:
                waited_s = self._now - arrival.at_s
                self._end(index, self._first.get(index, self._now) - arrival.at_s, waited_s, self._where.get(index, -1))

    def _turn(self, kind: int, which: int, now: Instant) -> None:
        if kind == _ARRIVAL:
            self._came += 1
            self._send(self._dispatcher.came(which, self._arrivals[which], now=now), now)
        elif kind == _NODE:
            if self._armed[which] <= now:
                self._armed[which] = float("inf")
                self._effects(which, now, self._nodes[which].tick(now=now))
        elif kind == _POLL:
            node = self._nodes[which]
            self._effects(which, now, node.tick(now=now))
            loaded = [row.model for row in node.loaded(now=now)]
            self._send(self._dispatcher.polled(which, loaded, node.in_flight, now=now), now)
            self._push(now + POLL_S, _POLL, which)
        elif self._dispatcher_armed <= now:
            self._dispatcher_armed = float("inf")
            self._send(self._dispatcher.tick(now=now), now)
        self._arm_dispatcher()

    def _push(self, at: float, kind: int, which: int) -> None:
        self._order += 1
        heapq.heappush(self._heap, (at, self._order, kind, which))

    def _arm_dispatcher(self) -> None:
        deadline = self._dispatcher.next_deadline()
        if deadline is not None and deadline < self._dispatcher_armed:
            self._dispatcher_armed = deadline
            self._push(max(deadline, self._now), _DISPATCHER, 0)

    def _send(self, sent: Sequence[tuple[int, int]], now: Instant) -> None:
        for request, node in sent:
            arrival = self._arrivals[request]
            if node < 0:
                self._end(request, float("inf"), float("inf"), -1)
                continue
            self._where[request] = node
            for model in self._dispatcher.unload_before(request):
                self._effects(node, now, self._nodes[node].handle(UnloadAsked(model), now=now))
            came = Came(
                request_id=str(request),
                model=arrival.model,
                prompt_tokens=arrival.input_tokens,
                output_tokens=arrival.output_tokens,
                conversation=arrival.conversation,
                shared_tokens=arrival.shared_tokens,
            )
            self._effects(node, now, self._nodes[node].handle(came, now=now))

    def _effects(self, node: int, now: Instant, effects: Sequence[object]) -> None:
        machine = self._nodes[node]
        for effect in effects:
            match effect:
                case Produced(request_id=request_id):
                    request = int(request_id)
                    self._first.setdefault(request, now)
                    self._send(self._dispatcher.first_token(request, now=now), now)
                case Finished(request_id=request_id) | RunnerChanged(change=Change.LOADING, why=request_id) if request_id.startswith(
                    PRELOAD
                ):
                    pass
                case Finished(request_id=request_id, timing=timing):
                    request = int(request_id)
                    arrival = self._arrivals[request]
                    first = self._first.pop(request, now)
                    self._end(request, first - arrival.at_s, now - arrival.at_s, node)
                    self._send(self._dispatcher.finished(request, timing, now=now), now)
                case Refused(request_id=request_id) | LoadFailed(request_id=request_id):
                    self._send(self._dispatcher.refused(int(request_id), node, now=now), now)
                case RunnerChanged(change=Change.LOADING, why=why):
                    self._loads += 1
                    self._cold.add(int(why))
                case _:
                    pass
        if machine.in_flight and self._busy_since[node] is None:
            self._busy_since[node] = now
        elif not machine.in_flight and (since := self._busy_since[node]) is not None:
            self._busy[node].append((since, now))
            self._busy_since[node] = None
        deadline = machine.next_deadline()
        if deadline is not None and deadline < self._armed[node]:
            self._armed[node] = deadline
            self._push(max(deadline, now), _NODE, node)
        elif deadline is not None and deadline > self._armed[node]:
            self._armed[node] = deadline
            self._push(deadline, _NODE, node)

    def _end(self, request: int, ttft_s: float, total_s: float, node: int) -> None:
        assert request not in self._outcomes, "a request ended twice"
        arrival = self._arrivals[request]
        self._outcomes[request] = Outcome(
            model=arrival.model,
            client=arrival.client,
            ttft_s=ttft_s,
            total_s=total_s,
            output_tokens=arrival.output_tokens,
            node=node,
            cold=request in self._cold,
            at_s=arrival.at_s,
        )


_ARRIVAL, _NODE, _POLL, _DISPATCHER = range(4)


def mixed_fleet(
    names: Sequence[str], hold: Callable[[str], Mapping[str, ModelTiming]], timing: Callable[[str], NodeTiming]
) -> list[NodeSpec]:
    """A fleet of the named GPUs: what each holds and how it is set up is up to the caller."""
    return [NodeSpec(name=f"{name}-{index}", timing=timing(name), models=dict(hold(name))) for index, name in enumerate(names)]
