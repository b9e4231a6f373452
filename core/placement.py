"""Placement advice: from what is asked for, which model should be warm where, so that the fleet carries the most and moves the least.

Decides a plan; carries out nothing, and knows neither requests nor the state of nodes beyond what it is given.

* What can be warm at all is chosen by what it would cost to leave it cold: requests per second times seconds to load.
* Where: so that the rate at which requests of this mix can be served is largest (`core.placement_search`; exact for small fleets, else as
  far as the steps reach). Fleets of more than `SHARD_NODES` are dealt into shards that are planned by themselves.
* What is loaded now is worth staying: a change must be needed for `HEADROOM` times the present traffic, or raise what the fleet can carry
  by more than `STAY`.
* Shares follow the present traffic: each part of it goes where one more request makes all others wait least.

Invariants: no node is planned beyond its memory or number of models, by Ollama's own rule for loading one model beside others; same input
and steps, same plan; time is bounded by the steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from core.placement_flow import Budget
from core.placement_search import Sets, carried, fill, pack, search

STEPS: Final = 50_000
"""Default budget: about two seconds at most."""

MODELS_MAX: Final = 32
"""Models that are planned for, the most costly ones to leave cold."""

SHARD_NODES: Final = 24
STAY: Final = 0.10
HEADROOM: Final = 2.0
ROOM_SHARE: Final = 0.8
"""Ollama loads a model beside others only if it fits into this share of the free memory."""

STAY_STEPS: Final = 5_000
"""For one attempt to leave a node as it is."""

PARTS: Final = 100
"""Into so many parts a model's traffic is divided among its nodes."""

FULL: Final = 0.95
"""Utilisation above which waiting is not computed, but grows as fast as it does here."""


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one node. `work_s`: node time per request with all slots taken; `load_s`: from disk until ready."""

    size_bytes: int
    work_s: float
    load_s: float


class Supply(msgspec.Struct, frozen=True, kw_only=True):
    """One node. `offers`: the models that it has on disk; `loaded`: those in memory."""

    name: str
    memory_bytes: int
    max_loaded: int
    offers: dict[str, Offer]
    loaded: tuple[str, ...] = ()
    room_share: float = ROOM_SHARE
    """Of the free memory: what a model may take that is loaded beside others."""

    def fits(self, models: Iterable[str]) -> bool:
        """Whether these models can be loaded here one after the other, none making another go; the largest first, which is easiest."""
        sizes = sorted((self.offers[model].size_bytes for model in models), reverse=True)
        if len(sizes) > self.max_loaded:
            return False
        free: float = self.memory_bytes
        for index, size in enumerate(sizes):
            if size > (free if index == 0 else free * self.room_share):
                return False
            free -= size
        return True


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """One model that should be warm on one node. `share`: of the model's traffic; `time_share`: of the node's time."""

    node: str
    model: str
    share: float
    time_share: float
    loaded: bool
    """Whether it is in memory already."""
    why: str


class Unheld(msgspec.Struct, frozen=True, kw_only=True):
    """One model that is asked for and should not be kept warm anywhere."""

    model: str
    rate_per_s: float
    why: str


class Unload(msgspec.Struct, frozen=True, kw_only=True):
    """One model that must go to make room."""

    node: str
    model: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What should be warm where."""

    placed: list[Placed]
    unheld: list[Unheld]
    unloads: list[Unload]
    utilisation: dict[str, float]
    """Of each node, predicted; 1: all of its time, with all slots taken."""
    rate_per_s: float
    """Present traffic of the models that are placed."""
    capacity_per_s: float
    """Traffic of this mix that the placement carries with everything warm."""
    bound_per_s: float
    """No placement of these models carries more; of a fleet in shards, the shards' own."""
    exact: bool
    """Whether the search came to its end: the bound is reached but for 0.1 % and what staying is worth."""


class _Task:
    """Nodes, and models with their rates, by number. Pairs are absent where the model does not fit."""

    def __init__(self, nodes: Sequence[Supply], models: Sequence[str], rates: Sequence[float]) -> None:
        self.nodes = nodes
        self.models = models
        self.rates = rates
        usable = [{m: node.offers[name] for m, name in enumerate(models) if name in node.offers and node.fits([name])} for node in nodes]
        self.work: list[Mapping[int, float]] = [{m: offer.work_s for m, offer in of_node.items()} for of_node in usable]
        self.load: list[Mapping[int, float]] = [{m: offer.load_s for m, offer in of_node.items()} for of_node in usable]

    def fits(self, node: int, models: Sequence[int]) -> bool:
        return self.nodes[node].fits([self.models[model] for model in models])


def plan(nodes: Sequence[Supply], rates_per_s: Mapping[str, float], *, steps: int = STEPS) -> Plan:
    """What should be warm where for this traffic. `rates_per_s`: requests per second of each model."""
    worth = {
        model: rate * min([node.offers[model].load_s for node in nodes if model in node.offers and node.fits([model])], default=0.0)
        for model, rate in rates_per_s.items()
        if rate > 0
    }
    models = sorted([model for model, seconds in worth.items() if seconds > 0], key=lambda model: (-worth[model], model))[:MODELS_MAX]
    whole = _Task(nodes, models, [rates_per_s[model] for model in models])
    shards = _shards(whole)
    held: Sets = [frozenset()] * len(nodes)
    times = times_at_most = float("inf")
    exact = len(shards) == 1
    for shard, rates in zip(shards, _dealt(whole, shards), strict=True):
        part = [model for model, rate in enumerate(rates) if rate > 0]
        task = _Task([nodes[node] for node in shard], [models[model] for model in part], [rates[model] for model in part])
        chosen = _plan_shard(task, Budget(max(steps // len(shards), 1)))
        for node, there in zip(shard, chosen.held, strict=True):
            held[node] = frozenset(part[model] for model in there)
        times, times_at_most = min(times, chosen.times), min(times_at_most, chosen.times_at_most)
        exact = exact and chosen.exact
    rate = sum(rate for model, rate in enumerate(whole.rates) if any(model in there for there in held))
    shares = _shares(whole, held)
    return Plan(
        placed=_placed(whole, held, shares),
        unheld=_unheld(whole, held, rates_per_s, worth),
        unloads=_unloads(whole, held),
        utilisation={node.name: sum(of_node.values()) for node, of_node in zip(nodes, _time(whole, shares), strict=True)},
        rate_per_s=rate,
        capacity_per_s=rate * times if rate else 0.0,
        bound_per_s=rate * times_at_most if rate else 0.0,
        exact=exact,
    )


# ---------------------------------------------------------------- shards


def _shards(whole: _Task) -> list[list[int]]:
    """Nodes dealt out by memory, so that each shard gets some of every kind."""
    count = max(1, -(-len(whole.nodes) // SHARD_NODES))
    order = sorted(
        range(len(whole.nodes)), key=lambda node: (-whole.nodes[node].memory_bytes, min(whole.work[node].values(), default=0.0), node)
    )
    return [sorted(order[first::count]) for first in range(count)]


def _dealt(whole: _Task, shards: Sequence[Sequence[int]]) -> list[list[float]]:
    """The traffic of each model that each shard is planned for: by what its nodes could do for it."""
    able = [
        [sum(1 / whole.work[node][model] for node in shard if model in whole.work[node]) for model in range(len(whole.models))]
        for shard in shards
    ]
    totals = [sum(of_shard[model] for of_shard in able) for model in range(len(whole.models))]
    return [[whole.rates[model] * part / totals[model] for model, part in enumerate(of_shard)] for of_shard in able]


class _Chosen(msgspec.Struct, frozen=True):
    """A shard's placement. `times`: how many times its traffic it carries; `times_at_most`: the bound on that."""

    held: Sets
    times: float
    times_at_most: float
    exact: bool


def _plan_shard(task: _Task, budget: Budget) -> _Chosen:
    """Choose what is warm, then where, then what may stay as it is."""
    worth = [rate * min(of_node[model] for of_node in task.load if model in of_node) for model, rate in enumerate(task.rates)]
    packed = pack(task.work, worth, task.fits)
    warm = sorted({model for there in packed for model in there})
    if not warm:
        return _Chosen(packed, float("inf"), float("inf"), True)
    kept = _Task(task.nodes, [task.models[model] for model in warm], [task.rates[model] for model in warm])
    start = [frozenset(warm.index(model) for model in there) for there in packed]
    found = search(kept.work, kept.rates, kept.fits, fill(kept.work, kept.rates, kept.fits, start), budget)
    held, rate = _stay(kept, found.held, found.flow.rate)
    traffic = sum(kept.rates)
    return _Chosen([frozenset(warm[model] for model in there) for there in held], rate / traffic, found.bound / traffic, found.exact)


def _stay(task: _Task, target: Sets, best: float) -> tuple[Sets, float]:
    """Keep what is loaded now where that is worth it: all of it, else node by node, those first whose change would load longest.

    Also says what that carries.
    """
    loaded = [
        frozenset(model for model in of_node if task.models[model] in node.loaded)
        for node, of_node in zip(task.nodes, task.work, strict=True)
    ]
    enough = min(best * (1 - STAY), sum(task.rates) * HEADROOM)
    if all(task.fits(node, sorted(there)) for node, there in enumerate(loaded)):
        rate = carried(task.work, loaded, task.rates, Budget(STAY_STEPS)).rate
        if rate >= enough:
            return loaded, rate
    held, rate = list(target), best
    moved = [sum(task.load[node][model] for model in target[node] - loaded[node]) for node in range(len(target))]
    for node in sorted(range(len(target)), key=lambda node: (-moved[node], node)):
        for wish in (loaded[node], loaded[node] | target[node]):
            if not loaded[node] or wish == held[node] or not task.fits(node, sorted(wish)):
                continue
            tried = [wish if index == node else there for index, there in enumerate(held)]
            carries = carried(task.work, tried, task.rates, Budget(STAY_STEPS)).rate
            if carries >= enough:
                held, rate = tried, carries
                break
    return held, rate


# ---------------------------------------------------------------- shares


def _shares(whole: _Task, held: Sets) -> list[dict[int, float]]:
    """The part of each model's present traffic that each node gets, in steps of 1 / `PARTS`, all models in turns."""
    shares: list[dict[int, float]] = [dict.fromkeys(sorted(there), 0.0) for there in held]
    hosts = [[node for node, there in enumerate(held) if model in there] for model in range(len(whole.models))]
    busy = [0.0] * len(held)
    for _ in range(PARTS):
        for model, nodes in enumerate(hosts):
            if nodes:
                part_s = {node: whole.rates[model] / PARTS * whole.work[node][model] for node in nodes}
                node = min(nodes, key=lambda node: (part_s[node] / max(1 - busy[node] - part_s[node] / 2, 1 - FULL) ** 2, busy[node], node))
                busy[node] += part_s[node]
                shares[node][model] += 1 / PARTS
    return shares


def _time(whole: _Task, shares: Sequence[Mapping[int, float]]) -> list[dict[int, float]]:
    return [
        {model: share * whole.rates[model] * whole.work[node][model] for model, share in of_node.items()}
        for node, of_node in enumerate(shares)
    ]


# ---------------------------------------------------------------- shown


def _placed(whole: _Task, held: Sets, shares: Sequence[Mapping[int, float]]) -> list[Placed]:
    time = _time(whole, shares)
    out = []
    for index, node in enumerate(whole.nodes):
        for model in sorted(held[index], key=lambda model: (-time[index][model], model)):
            name = whole.models[model]
            out.append(
                Placed(
                    node=node.name,
                    model=name,
                    share=round(shares[index][model], 6),
                    time_share=time[index][model],
                    loaded=name in node.loaded,
                    why=_why(whole, held, index, model) + ("" if shares[index][model] else "; a spare at the present rate"),
                )
            )
    return out


def _why(whole: _Task, held: Sets, index: int, model: int) -> str:
    """One sentence: what it costs there, and why not elsewhere."""
    name, here_s = whole.models[model], whole.work[index][model]
    faster = [node for node, of_node in enumerate(whole.work) if of_node.get(model, here_s) < here_s]
    missed = [node for node in faster if model not in held[node]]
    text = f"{here_s:.2f} s of node time per request"
    if not faster:
        text += ", the fastest of all that have it"
    elif missed:
        best = min(missed, key=lambda node: (whole.work[node][model], node))
        others = ", ".join(whole.models[other] for other in sorted(held[best])) or "nothing"
        text += f"; {whole.nodes[best].name} would take {whole.work[best][model]:.2f} s, but is better used for {others}"
    else:
        text += ", beside faster nodes that do not suffice"
    if name in whole.nodes[index].loaded:
        return text + "; loaded already"
    return text + f"; loads in {whole.load[index][model]:.1f} s"


def _unheld(whole: _Task, held: Sets, rates_per_s: Mapping[str, float], worth: Mapping[str, float]) -> list[Unheld]:
    warm = {whole.models[model] for there in held for model in there}
    out = []
    for model in sorted(worth, key=lambda model: (-rates_per_s[model], model)):
        if model not in warm:
            why = "the memory is needed for models whose absence would cost more loading time"
            if not any(model in node.offers for node in whole.nodes):
                why = "no node has it on disk"
            elif not worth[model]:
                why = "no node that has it has the memory for it"
            out.append(Unheld(model=model, rate_per_s=rates_per_s[model], why=why))
    return out


def _unloads(whole: _Task, held: Sets) -> list[Unload]:
    """What is loaded, not planned there, and has no room beside what is."""
    out = []
    for node, there in zip(whole.nodes, held, strict=True):
        names = [whole.models[model] for model in sorted(there)]
        for model in node.loaded:
            if model in names:
                continue
            if model in node.offers and node.fits([*names, model]):
                names.append(model)
            else:
                out.append(Unload(node=node.name, model=model))
    return out
