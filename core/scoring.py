"""Which of the eligible nodes gets a request: strategies behind one seam, chosen by name.

Decides by what it is given: who is eligible is `core.registry`'s and `core.health`'s business, and what happens to a request whose best
node is full is the router's. A strategy sees nodes in the order of their registration; ties go to the least recently chosen, then to the
first. Scores are integers with named parts. Nothing here is kept between two calls but the round robin's place.

* `auto`: expected node time, `(requests on the node + 1) * work + cold cost` in µs (routing.md 1.4, candidate A). What a node knows of
  the prompt is no work for it: that lowers its score, but never below what its load makes of the rest. A model that is not in
  memory costs its load, one that is being loaded what is left of that. Requests that wait for a node count as if they were on it. A
  node whose slots for the model are taken is a choice like any other: then the request waits for it.
* `metrics`: the seed's `cpu + memory + active * 10`; round robin when every CPU is above 80 % or nobody has fresh numbers.
* `least-busy`: fewest active requests. `round-robin`: in turns.
Only `auto` holds requests back for a free slot; the others forward at once, as the seed does, and leave waiting to the nodes.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, ClassVar, Final

from core.config import RouterConfig
from core.learning import Rates, Speeds
from core.parts import Part
from core.structs import mypyc_attr
from core.units import MICROS_PER_S, AgentId, Instant, LeaseId, ModelKey
from core.warm import Board, Glance, Row

if TYPE_CHECKING:
    from core.displacement import Displacement
    from core.inventory import Inventory
    from core.leases import Held
    from core.registry import Agent

CPU_BUSY_PERCENT: Final = 80.0
FAR: Final = (1 << 62) - 1
"""Above every score."""
ROWS_MAX: Final = 8
"""Candidates that are kept for an explanation."""
ROWS_KEPT_MAX: Final = 2 * ROWS_MAX
MANY: Final = 64
"""Among more nodes than that not every one is looked at for every request."""
WARM_MAX: Final = 4096
"""Models."""
BOARDS_MAX: Final = 4096
"""Models, each with each set of runner options that is asked for."""
PRICED_MAX: Final = 64
"""Nodes whose loads are compared with what they push out, the cheapest loads first: 20 µs each. In fleets of up to so many the choice is
exact."""

METRIC_SCALE: Final = 1000
"""`metrics` scores in thousandths, so that they are integers."""

_NOTHING_KNOWN: Final[Mapping[AgentId, Rates]] = {}
_NOBODY: Final[Mapping[AgentId, int]] = {}
_NO_ROWS: Final[list[Row]] = []

_score_of_row = itemgetter(1)


@mypyc_attr(acyclic=True)
class Ask:
    """What a strategy needs to know of a request. `key` None: any node, no model is run. `capped`: whether an admin's cap on a node holds
    for it: all that may run a model (a body whose model cannot be read may), not what only asks or unloads. Never changed."""

    __slots__ = ("capped", "input_tokens", "key", "needs_slot", "options", "output_tokens")

    def __init__(
        self, key: ModelKey | None, options: str, input_tokens: int, output_tokens: int, needs_slot: bool, capped: bool = True
    ) -> None:
        self.key: Final = key
        self.options: Final = options
        self.input_tokens: Final = input_tokens
        self.output_tokens: Final = output_tokens
        self.needs_slot: Final = needs_slot
        self.capped: Final = capped

    def of(self, key: ModelKey | None) -> "Ask":
        """The same, of another model."""
        return Ask(key, self.options, self.input_tokens, self.output_tokens, self.needs_slot, self.capped)


@mypyc_attr(acyclic=True)
class Load:
    """What is in flight where. The mappings are their owners' own: leases per node; number of leases of the request's model per node;
    number of requests per node that wait for it and come before this one; nodes that know a part of its prompt, and how many tokens of it
    (`core.affinity`). `news`: number that rises whenever a model comes into some node's memory (`core.inventory.News`); None: nobody
    counts."""

    __slots__ = ("ahead", "cached", "news", "of_model", "on")

    def __init__(
        self,
        on: Mapping[AgentId, Mapping[LeaseId, "Held"]],
        of_model: Mapping[AgentId, int],
        ahead: Mapping[AgentId, int],
        cached: Mapping[AgentId, int] = _NOBODY,
        news: int | None = None,
    ) -> None:
        self.on: Final = on
        self.of_model: Final = of_model
        self.ahead: Final = ahead
        self.cached: Final = cached
        self.news: Final = news


@mypyc_attr(acyclic=True)
class Choice:
    """What a strategy chose. Never changed.

    * `room`: whether the request may go there now; `start_us`: expected time until the node begins to answer.
    * `patience`, with no room: how many more of the same kind would rather wait for this node than take the best one that has room; None:
      all, for there is no such node.
    * `spared`: whether some node that has the model loaded with other options would have been as good, were a reload free.
    * `warm`, set by `at_once`: the model is known to be in memory there, with room and with these options, so that nothing stands in the
      way. It has the rows, when somebody asks for them.
    """

    __slots__ = ("agent", "patience", "room", "rows", "spared", "start_us", "warm", "work_us")

    def __init__(
        self,
        agent: "Agent",
        room: bool,
        rows: list[Row],
        start_us: int = 0,
        work_us: int = 0,
        patience: int | None = None,
        spared: bool = False,
        warm: Glance | None = None,
    ) -> None:
        self.agent: Final = agent
        self.room: Final = room
        self.rows: Final = rows
        self.start_us: Final = start_us
        self.work_us: Final = work_us
        self.patience: Final = patience
        self.spared: Final = spared
        self.warm: Final = warm


_Warm = tuple[int, Sequence["Agent"], Sequence["Agent"], Rates]
"""The news when it was made; the nodes in question; those that have a model in memory, or are loading it; and half of what the others
cost at least (they may turn out to be faster)."""


class Strategy(Part, abc.ABC):
    """One way to choose. Keeps nothing between two calls."""

    __slots__ = ()

    part_names: ClassVar[tuple[str, ...]] = ()
    makes_room: ClassVar[bool] = False
    """Whether it prices what a load pushes out, so that the router may name the victims."""

    @abc.abstractmethod
    def choose(self, ask: Ask, nodes: Sequence["Agent"], load: Load, *, now: Instant) -> Choice:
        """The best of `nodes`, which is not empty."""

    def at_once(
        self, ask: Ask, nodes: Sequence["Agent"], of_model: dict[AgentId, int], ahead: Mapping[AgentId, int],
        cached: Mapping[AgentId, int], changes: int,
    ) -> Choice | None:  # fmt: skip
        """What `choose` would choose, where that can be told without looking at each node; None: it cannot. As in `Load`; the nodes' own
        `in_flight` is what `Load.on` would say, `changes` the number of `core.inventory.News`."""
        return None


class _Forwarding(Strategy):
    """What the strategies that forward at once have in common."""

    __slots__ = ()

    def choose(self, ask: Ask, nodes: Sequence["Agent"], load: Load, *, now: Instant) -> Choice:
        """The best of those below their cap; of all when every one is at it."""
        open_nodes = _below_cap(nodes, load)
        rows = self._rows(open_nodes or nodes, load, now)
        return Choice(_least(rows), room=bool(open_nodes) or not ask.capped, rows=rows)

    @abc.abstractmethod
    def _rows(self, nodes: Sequence["Agent"], load: Load, now: Instant) -> list[Row]:
        """What each node scores."""


class LeastBusy(_Forwarding):
    """Fewest active requests."""

    __slots__ = ()

    def _rows(self, nodes: Sequence["Agent"], load: Load, now: Instant) -> list[Row]:
        return [(node, active, active, 0, 0, 0) for node in nodes for active in (_active(node, load),)]


class RoundRobin(_Forwarding):
    """In turns: the least recently chosen."""

    __slots__ = ()

    def _rows(self, nodes: Sequence["Agent"], load: Load, now: Instant) -> list[Row]:
        return [(node, 0, 0, 0, 0, 0) for node in nodes]


class SeedMetrics(_Forwarding):
    """The seed's formula. Nodes without an agent count with the mean of the others' numbers."""

    __slots__ = ("_fresh_s",)

    part_names: ClassVar[tuple[str, ...]] = ("cpu", "memory", "active")

    def __init__(self, fresh_s: float) -> None:
        self._fresh_s = fresh_s

    def _rows(self, nodes: Sequence["Agent"], load: Load, now: Instant) -> list[Row]:
        fresh = [node for node in nodes if node.metrics_at is not None and now - node.metrics_at <= self._fresh_s]
        scored = [node for node in nodes if node.agentless or node in fresh] if fresh else []
        if not fresh or all(node.cpu_usage > CPU_BUSY_PERCENT for node in fresh):
            return [(node, 0, 0, 0, 0, 0) for node in nodes]
        mean_cpu = sum(node.cpu_usage for node in fresh) / len(fresh)
        mean_memory = sum(node.memory_usage for node in fresh) / len(fresh)
        rows: list[Row] = []
        for node in scored:
            cpu = round((mean_cpu if node.agentless else node.cpu_usage) * METRIC_SCALE)
            memory = round((mean_memory if node.agentless else node.memory_usage) * METRIC_SCALE)
            active = _active(node, load) * 10 * METRIC_SCALE
            rows.append((node, cpu + memory + active, cpu, memory, active, 0))
        return rows


class Auto(Strategy):
    """Expected node time: see the module."""

    __slots__ = ("_boards", "_displacement", "_speeds", "_warm")

    part_names: ClassVar[tuple[str, ...]] = ("work", "ahead", "cold", "displaced")
    makes_room: ClassVar[bool] = True

    def __init__(self, speeds: Speeds, displacement: "Displacement | None" = None) -> None:
        self._speeds = speeds
        self._displacement = displacement
        self._warm: dict[ModelKey, _Warm] = {}
        """Kept only for speed, as long as nothing came."""
        self._boards: dict[tuple[ModelKey, str], Board] = {}
        """Kept only for speed."""

    def at_once(
        self, ask: Ask, nodes: Sequence["Agent"], of_model: dict[AgentId, int], ahead: Mapping[AgentId, int],
        cached: Mapping[AgentId, int], changes: int,
    ) -> Choice | None:  # fmt: skip
        key, options = ask.key, ask.options
        if key is None or not ask.needs_slot:
            return None
        board = self._boards.get((key, options))
        if board is None or not board.holds(nodes, changes):
            if len(self._boards) >= BOARDS_MAX:
                self._boards.clear()
            board = self._boards[key, options] = Board(key, options, nodes, changes=changes, speeds=self._speeds)
        glance = board.best(ask.input_tokens, ask.output_tokens, of_model, ahead, cached)
        if glance is None:
            return None
        chosen = glance.chosen
        return Choice(chosen[0], True, _NO_ROWS, 0, chosen[2], None, False, glance)

    def check(self, nodes_of: Callable[[ModelKey], Sequence["Agent"]], changes: int) -> None:
        """Recompute what is kept for speed. `nodes_of`: a model's nodes, as they are given to `at_once`.

        Raises:
            AssertionError: it differs.
        """
        for (key, _), board in self._boards.items():
            board.check(nodes_of(key), changes=changes)

    def choose(self, ask: Ask, nodes: Sequence["Agent"], load: Load, *, now: Instant) -> Choice:
        """Among many nodes first those that have the model in memory: one of them that has room and costs less than any load is the best
        of all."""
        key = ask.key
        if key is None or not ask.needs_slot:
            return self._light(ask, nodes, load)
        if len(nodes) > MANY and load.news is not None:
            warm = self._warm.get(key)
            if warm is None or warm[0] != load.news or warm[1] is not nodes:
                warm = self._warm[key] = self._find_warm(key, nodes, load.news)
                if len(self._warm) > WARM_MAX:
                    del self._warm[next(iter(self._warm))]
            if 0 < len(warm[2]) < len(nodes):
                choice = self._among(key, ask, warm[2], load, now)
                least = warm[3].load_us + (ask.input_tokens * warm[3].prefill_ns + ask.output_tokens * warm[3].decode_ns) // 1000
                if choice.room and min(map(_score_of_row, choice.rows)) < least:
                    return choice
        return self._among(key, ask, nodes, load, now)

    def _find_warm(self, key: ModelKey, nodes: Sequence["Agent"], news: int) -> _Warm:
        warm = tuple(node for node in nodes if key in node.inventory.resident or key in node.inventory.loading)
        left = set(warm)
        cold = [
            self._speeds.rates(node.id, key, size_bytes=node.inventory.installed[key].size_bytes, slots=node.slots_for(key))
            for node in nodes
            if node not in left
        ]
        least = Rates(
            prefill_ns=min((rates.prefill_ns for rates in cold), default=0) // 2,
            decode_ns=min((rates.decode_ns for rates in cold), default=0) // 2,
            overhead_us=0,
            load_us=min((rates.load_us for rates in cold), default=0) // 2,
        )
        return news, nodes, warm, least

    def _among(self, key: ModelKey, ask: Ask, nodes: Sequence["Agent"], load: Load, now: Instant) -> Choice:
        """One pass over the nodes, on integers: this runs for every request."""
        options, on, of_model, ahead = ask.options, load.on, load.of_model, load.ahead
        known, input_tokens, output_tokens = self._speeds.known.get(key, _NOTHING_KNOWN), ask.input_tokens, ask.output_tokens
        cached = load.cached
        rows: list[Row] = []
        later: list[tuple[Row, str | None]] = []
        """Where a load would push others out: what that costs is not asked unless it can matter."""
        best: Row | None = None
        best_open: Row | None = None
        least = blind = FAR
        """Score of `best_open`, which is never below that of `best`; and of the best runner with other options, were options free."""
        for node in nodes:
            node_id = node.id
            rates = known.get(node_id)
            if rates is None:
                size = node.inventory.installed[key].size_bytes
                rates = self._speeds.rates(node_id, key, size_bytes=size, slots=node.slots_for(key))
            work = rates.overhead_us + (input_tokens * rates.prefill_ns + output_tokens * rates.decode_ns) // 1000 + 1
            if cached and node_id in cached:
                work -= cached[node_id] * rates.prefill_ns // 1000
            if node.weight is not None:
                work = int(work / node.weight) + 1
            held = on.get(node_id)
            here = len(held) if held else 0
            count = here + node.beyond + (ahead.get(node_id, 0) if ahead else 0)
            score = (count + 1) * work
            if score > least and len(rows) >= ROWS_MAX:
                continue  # what else it costs only adds to that, and enough others can be shown
            inventory, cold = node.inventory, 0
            if work + rates.load_us > least and key not in inventory.resident and len(rows) >= ROWS_MAX and not inventory.loading:
                continue  # even idle it could not win
            if inventory.loading or key not in inventory.resident or inventory.options.get(key, "") != options:
                cold, replaces = _cold_us(inventory, key, options, rates.load_us, now)
                if replaces is not None:
                    blind = min(blind, score)
                score += cold
                if self._displacement is not None:
                    later.append(((node, score, work, count, cold, 0), replaces))
                    continue
            row = (node, score, work, count, cold, 0)
            rows.append(row)
            if score > least or (score == least and best_open is not None and node.last_chosen >= best_open[0].last_chosen):
                continue
            if best is None or score < best[1] or (score == best[1] and node.last_chosen < best[0].last_chosen):
                best = row
            most = node.limits.get(key, node.slots) + (key in node.probes)
            if of_model.get(node_id, 0) < most and (node.max_concurrent is None or here < node.max_concurrent):
                best_open, least = row, score
        if later:
            best, best_open = self._among_cold(key, later, rows, best, best_open, load, now)
        assert best is not None, "a choice among no nodes"
        # A tie between waiting and going is no reason to wait.
        if best_open is not None and best_open[1] == best[1]:
            return Choice(best_open[0], True, rows, best_open[4], best_open[2], spared=blind <= best_open[1])
        return self._wait_for(key, best, best_open, rows, load, spared=blind <= best[1])

    def _among_cold(
        self, key: ModelKey, later: list[tuple[Row, str | None]], rows: list[Row], best: Row | None, best_open: Row | None,
        load: Load, now: Instant,
    ) -> tuple[Row | None, Row | None]:  # fmt: skip
        """The best and the best open one, when those that would have to load are compared too; adds their rows.

        What a load pushes out only adds to a score, so a node whose score is above the best open one's without it is out; its row is shown
        without that part, as long as there is room to show it.
        """
        least = FAR if best_open is None else best_open[1]
        near = [one for one in later if one[0][1] <= least]
        if len(rows) < ROWS_MAX:
            rows += [row for row, _ in later if row[1] > least]
        near.sort(key=_score_of)
        for row, replaces in near[:PRICED_MAX]:
            node = row[0]
            if row[1] > least:
                rows.append(row)
                continue
            displaced = self._displaced_us(node, key, replaces, now)
            row = (node, row[1] + displaced, *row[2:5], displaced)
            rows.append(row)
            score = row[1]
            if score > least or (score == least and best_open is not None and node.last_chosen >= best_open[0].last_chosen):
                continue
            if best is None or score < best[1] or (score == best[1] and node.last_chosen < best[0].last_chosen):
                best = row
            if load.of_model.get(node.id, 0) < node.limits.get(key, node.slots) + (key in node.probes) and (
                node.max_concurrent is None or len(load.on.get(node.id, ())) < node.max_concurrent
            ):
                best_open, least = row, score
        return best, best_open

    def _displaced_us(self, node: "Agent", key: ModelKey, replaces: str | None, now: Instant) -> int:
        """What a load there pushes out: other models, or the runner of the same model with the options `replaces`."""
        displacement, inventory = self._displacement, node.inventory
        assert displacement is not None, "asked only where there is one"
        if replaces is not None:
            return displacement.of_runner(node, key, replaces, now=now)
        if key in inventory.resident or key in inventory.loading:
            return 0
        return displacement.of(node, key, now=now)[0]

    def _wait_for(self, key: ModelKey, best: Row, best_open: Row | None, rows: list[Row], load: Load, *, spared: bool) -> Choice:
        """The best one is full."""
        node, score, work, _, cold, _ = best
        queued = max(load.of_model.get(node.id, 0) + load.ahead.get(node.id, 0) + 1 - node.slots_for(key), 1)
        patience = None if best_open is None else (best_open[1] - score - 1) // work
        return Choice(node, False, rows, queued * work + cold, work, patience, spared)

    def _light(self, ask: Ask, nodes: Sequence["Agent"], load: Load) -> Choice:
        """A request that costs a node next to nothing: fewest active requests; one that only loads goes where that is cheapest."""
        key = ask.key
        rows: list[Row] = []
        open_nodes = _below_cap(nodes, load) if ask.capped else nodes
        for node in open_nodes or nodes:
            active = _active(node, load)
            cold = 0
            if key is not None and key not in node.inventory.resident:
                cold = self._speeds.rates(
                    node.id, key, size_bytes=node.inventory.installed[key].size_bytes, slots=node.slots_for(key)
                ).load_us
            rows.append((node, active + cold, 0, active, cold, 0))
        return Choice(_least(rows), room=bool(open_nodes), rows=rows)


def strategy(config: RouterConfig, speeds: Speeds, displacement: "Displacement | None" = None) -> Strategy:
    """The strategy that `config` names. Without `displacement`, `auto` takes every load to fit."""
    makers: dict[str, Callable[[], Strategy]] = {
        "auto": lambda: Auto(speeds, displacement),
        "metrics": lambda: SeedMetrics(config.metrics_fresh_s),
        "least-busy": LeastBusy,
        "round-robin": RoundRobin,
    }
    return makers[config.strategy]()


def best_first(rows: list[Row]) -> list[Row]:
    """The best `ROWS_MAX`, best first."""
    return sorted(rows, key=lambda row: (row[1], row[0].last_chosen))[:ROWS_MAX]


def some_best(rows: list[Row], chosen: AgentId | None) -> list[Row]:
    """`ROWS_MAX` of the best, the chosen one among them, in any order of equals; a few more are kept as they are: `best_first`, which
    sees to what is shown, costs more than the choice among ten nodes."""
    if len(rows) <= ROWS_KEPT_MAX:
        return rows
    by_score = sorted(rows, key=_score_of_row)
    kept = by_score[:ROWS_MAX]
    if chosen is not None and kept[-1][1] == kept[0][1] and all(row[0].id != chosen for row in kept):
        kept[-1:] = [row for row in by_score if row[0].id == chosen]
    return kept


def _score_of(one: tuple[Row, str | None]) -> tuple[int, int]:
    return one[0][1], one[0][0].last_chosen


def _below_cap(nodes: Sequence["Agent"], load: Load) -> Sequence["Agent"]:
    """Those that an admin's cap leaves room on."""
    return [node for node in nodes if node.max_concurrent is None or len(load.on.get(node.id, ())) < node.max_concurrent]


def _least(rows: list[Row]) -> "Agent":
    return min(rows, key=lambda row: (row[1], row[0].last_chosen))[0]


def _active(node: "Agent", load: Load) -> int:
    return len(load.on.get(node.id, ())) + node.beyond


def _cold_us(inventory: "Inventory", key: ModelKey, options: str, load_us: int, now: Instant) -> tuple[int, str | None]:
    """What must pass before the model can answer: its load, after those that the node is already at (it loads one at a time). And the
    options of the runner that must go for it; None when none must."""
    replaces = None
    loading = inventory.loading.get(key)
    if loading is not None:
        if inventory.joins(key, options):
            load_us = 0
        else:
            replaces = loading.options
    elif key in inventory.resident:
        if not inventory.needs_reload(key, options):
            return 0, None
        replaces = inventory.options.get(key, "")
    for other in inventory.loading.values():
        left_s = max(other.expected_s - (now - other.since), other.expected_s / 8)
        load_us += int(left_s * MICROS_PER_S)
    return load_us, replaces
