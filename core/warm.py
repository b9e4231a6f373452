"""The nodes that have a model in memory, kept from request to request, so that the next one need not look at each of them anew.

Decides nothing that `core.scoring.Auto.choose` would decide otherwise: where `Board.best` names a node, that is the one which `choose`
would choose, with room and the same work. Where it cannot be sure of that it names none, and all are looked at as if there were no board.
What makes a node dearer than its work is not looked at here: a board is of use only where every other node would have to load the model,
and as long as no load can be the better choice.

A board is made for one model and one set of runner options, and holds as long as `holds` says: the nodes in question are the same (their
owner makes a new tuple for every change of theirs), nothing came into or left a node's memory (`core.inventory.News`), and the log of
dropped rates (`core.learning.Speeds.drops`) is the same one; what was added to it since is read first. What changes with every
request is read from the nodes themselves: those of one kind are equally fast, so their `rank` alone says which of them is the best.
Invariant: a board that holds is the one that would be made anew (`check`).
"""

from bisect import insort
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from core.agents import CHOSEN_BITS
from core.learning import Speeds
from core.structs import mypyc_attr
from core.units import AgentId, ModelKey

if TYPE_CHECKING:
    from core.agents import Agent
    from core.learning import Rates

FEW: Final = 5
"""Nodes of one kind: fewer than so many are compared one by one, which is quicker then."""
SHOWN_MAX: Final = 16
"""Nodes of a board that a choice remembers, to explain it; of more than so many the first half of that, and the chosen one."""
KINDS_SPARE: Final = 4
"""A board that comes to know twice as many kinds as in the beginning, and so many more, is made anew: most are nobody's any more."""
_MOST: Final = (1 << 62) - 1
"""No score; the most that compiled code compares in one step."""
_CHOSEN: Final = (1 << CHOSEN_BITS) - 1
_NOTHING: Final[Mapping[AgentId, int]] = {}

Row = tuple["Agent", int, int, int, int, int]
"""Node, score, and up to four parts in the order of the strategy's `part_names`. Flat, for one is made per node and request."""

_Kind = tuple[int, int, int, float | None]
"""What the work of a request is computed from: overhead_us, prefill_ns, decode_ns, and an admin's weight."""


_Group = tuple[int, int, int, float | None, list["Agent"]]
"""A kind, and the nodes that are of it."""


@mypyc_attr(acyclic=True)
class Glance:
    """A choice from a board, as far as an explanation needs it. Made readable only when somebody asks.

    `shown`: nodes, each with the number of its kind, and what a load of the model takes there; what is left of other loads is not in it,
    nor what it would push out. `ranks`: of each of `shown`. `own`: work on nodes that know a part of the prompt.
    """

    __slots__ = ("chosen", "own", "ranks", "shown", "works")

    def __init__(
        self, chosen: Row, shown: tuple[tuple["Agent", int, int], ...], ranks: list[int], works: list[int], own: Mapping[AgentId, int]
    ) -> None:
        self.chosen: Final = chosen
        self.shown: Final = shown
        self.ranks: Final = ranks
        self.works: Final = works
        self.own: Final = own

    def rows(self) -> list[Row]:
        """As `Auto.choose` has them, the chosen one first."""
        rows: list[Row] = [self.chosen]
        for (node, kind, load_us), rank in zip(self.shown, self.ranks, strict=True):
            if node is not self.chosen[0]:
                work, busy = self.own.get(node.id, self.works[kind]), rank >> CHOSEN_BITS
                rows.append((node, busy * work + load_us, work, busy - 1, load_us, 0))
        return rows


class Board:
    """Of one model and one set of runner options."""

    __slots__ = (
        "_changes", "_cold", "_cold_us", "_groups", "_index", "_key", "_kinds", "_kinds_max", "_log", "_nodes", "_options", "_pairs",
        "_read", "_shown", "_shown_nodes", "_speeds", "_whole",
    )  # fmt: skip

    def __init__(self, key: ModelKey, options: str, nodes: Sequence["Agent"], *, changes: int, speeds: Speeds) -> None:
        self._key, self._options, self._nodes, self._changes, self._speeds = key, options, nodes, changes, speeds
        self._pairs: list[tuple[Agent, int]] = []
        """The nodes that have it in memory with these options, in order, and the number of their kind. Empty: the board is of no use."""
        self._kinds: dict[_Kind, int] = {}
        self._index: dict[AgentId, int] = {}
        self._whole = -1
        """How many nodes there are, if all of them are shown; else -1."""
        self._groups: list[_Group] = []
        """Of each kind, those that have it in memory, in order."""
        self._cold: dict[AgentId, Agent] = {}
        self._cold_us = _MOST
        """The others would have to load it, and that takes at least so long."""
        self._log = speeds.log_of(key)
        self._read = len(self._log)
        self._look_at(nodes)
        self._show()
        self._kinds_max = 2 * len(self._kinds) + KINDS_SPARE

    def _look_at(self, nodes: Sequence["Agent"]) -> None:
        if any(self._is_warm(node) is None for node in nodes):
            return
        for node in nodes:
            if self._is_warm(node):
                self._index[node.id] = len(self._pairs)
                kind = self._kind_of(node)
                self._pairs.append((node, kind))
                self._groups[kind][-1].append(node)
            else:
                self._cold[node.id] = node
                self._cold_us = min(self._cold_us, self._rates_of(node).load_us)

    def _is_warm(self, node: "Agent") -> bool | None:
        """Whether it has the model in memory with these options; False: nothing of it; None: it is loading it, or has other options."""
        key, inventory = self._key, node.inventory
        if key in inventory.loading:
            return None
        if key not in inventory.resident:
            return False
        return True if inventory.options.get(key, "") == self._options else None

    def _show(self) -> None:
        most = SHOWN_MAX if len(self._nodes) <= SHOWN_MAX else SHOWN_MAX // 2
        warm = [(node, kind, 0) for node, kind in self._pairs[:most]]
        cold = [(node, self._kind_of(node), self._rates_of(node).load_us) for node in list(self._cold.values())[: most - len(warm)]]
        self._shown = (*warm, *cold)
        self._whole = len(self._nodes) if len(self._shown) == len(self._nodes) else -1
        self._shown_nodes = tuple(node for node, _, _ in self._shown)

    def holds(self, nodes: Sequence["Agent"], changes: int) -> bool:
        """Whether it is still right for `nodes`, after what it has to read."""
        if nodes is not self._nodes or changes != self._changes or self._speeds.drops.get(self._key) is not self._log:
            return False
        if len(self._log) != self._read:
            self._read_log()
            return len(self._kinds) <= self._kinds_max
        return True

    def best(
        self, input_tokens: int, output_tokens: int, of_model: dict[AgentId, int], ahead: Mapping[AgentId, int],
        cached: Mapping[AgentId, int],
    ) -> Glance | None:  # fmt: skip
        """The node that `Auto.choose` would choose, if it has room; None: only `choose` can tell. As in `core.scoring.Load`."""
        if ahead and not self._index.keys().isdisjoint(ahead):
            return None
        if not self._pairs:
            return None
        works: list[int] = []
        ranks: list[int] | None = None
        best = self._pairs[0][0]
        least = _MOST
        first = busy = best_work = 0
        for overhead_us, prefill_ns, decode_ns, weight, group in self._groups:
            work = overhead_us + (input_tokens * prefill_ns + output_tokens * decode_ns) // 1000 + 1
            if weight is not None:
                work = _weighed(work, weight)
            works.append(work)
            if not group:
                continue
            if len(group) < FEW:
                node = group[0]
                rank = node.rank
                for other in group:
                    if other.rank < rank:
                        node, rank = other, other.rank
            else:
                ranks = [node.rank for node in group]
                rank = min(ranks)
                node = group[ranks.index(rank)]
            here = rank >> CHOSEN_BITS
            score = here * work
            if score < least or (score == least and (rank & _CHOSEN, self._index[node.id]) < (first & _CHOSEN, self._index[best.id])):
                best, least, first = node, score, rank
                busy, best_work = here, work
        own = _NOTHING
        if cached:
            own = self._own_work(input_tokens, output_tokens, cached)
            best, least = self._best_of(own, best, least)
            busy = best.rank >> CHOSEN_BITS
            best_work = least // busy
        key = self._key
        if (
            least > self._cold_us
            or of_model.get(best.id, 0) >= (best.limits.get(key, best.slots) if best.limits else best.slots) + (key in best.probes)
            or (best.max_concurrent is not None and best.in_flight >= best.max_concurrent)
        ):
            return None
        if ranks is None or len(ranks) != self._whole:  # else one group is all nodes
            ranks = [node.rank for node in self._shown_nodes]
        return Glance((best, least, best_work, busy - 1, 0, 0), self._shown, ranks, works, own)

    def check(self, nodes: Sequence["Agent"], *, changes: int) -> None:
        """If it holds, it is the one that would be made now.

        Raises:
            AssertionError: it is not.
        """
        if len(self._log) != self._read or not self.holds(nodes, changes=changes):  # to read the log would have rates computed
            return
        what = f"R19: the board of {self._key} {self._options}"
        found = {node.id: self._is_warm(node) for node in nodes}
        if None in found.values():
            assert not self._pairs, f"{what} is of use, though a node is loading the model or has other options"
            return
        assert [node.id for node, _ in self._pairs] == [node_id for node_id, warm in found.items() if warm], f"{what} has other nodes"
        kinds = list(self._kinds)
        for node, kind in self._pairs:
            rates = self._rates_of(node)
            now = (rates.overhead_us, rates.prefill_ns, rates.decode_ns, node.weight)
            assert kinds[kind] == now, f"{what} takes {node.name} for {kinds[kind]}, not {now}"
        groups = [(*speeds, [node for node, other in self._pairs if other == kind]) for kind, speeds in enumerate(kinds)]
        assert groups == self._groups, f"{what} has lost nodes of a kind"
        cold_us = min((self._rates_of(node).load_us for node in self._cold.values()), default=_MOST)
        assert self._cold_us <= cold_us, f"{what} takes a load for dearer than it is"

    def _own_work(self, input_tokens: int, output_tokens: int, cached: Mapping[AgentId, int]) -> dict[AgentId, int]:
        """The work on nodes that know a part of the prompt already."""
        own: dict[AgentId, int] = {}
        kinds = list(self._kinds)
        for node_id, tokens in cached.items():
            at = self._index.get(node_id)
            if at is not None:
                overhead_us, prefill_ns, decode_ns, weight = kinds[self._pairs[at][1]]
                work = overhead_us + (input_tokens * prefill_ns + output_tokens * decode_ns) // 1000 + 1
                own[node_id] = _weighed(work - tokens * prefill_ns // 1000, weight)
        return own

    def _best_of(self, own: Mapping[AgentId, int], best: "Agent", least: int) -> tuple["Agent", int]:
        """The best of all, where `best` is that without what nodes know of the prompt."""
        first = (least, best.last_chosen, self._index[best.id])
        for node_id, work in own.items():
            at = self._index[node_id]
            node = self._pairs[at][0]
            first = min(first, ((node.rank >> CHOSEN_BITS) * work, node.last_chosen, at))
        return self._pairs[first[2]][0], first[0]

    def _read_log(self) -> None:
        """Rates of some nodes were dropped: take the new ones."""
        for agent_id in self._log[self._read :]:
            at, cold = self._index.get(agent_id), self._cold.get(agent_id)
            if at is not None:
                node, before = self._pairs[at]
                kind = self._kind_of(node)
                if kind != before:
                    self._pairs[at] = (node, kind)
                    self._groups[before][-1].remove(node)
                    insort(self._groups[kind][-1], node, key=self._place)
            elif cold is not None:
                self._cold_us = min(self._cold_us, self._rates_of(cold).load_us)
        self._read = len(self._log)
        self._show()

    def _kind_of(self, node: "Agent") -> int:
        rates = self._rates_of(node)
        speeds = (rates.overhead_us, rates.prefill_ns, rates.decode_ns, node.weight)
        kind = self._kinds.setdefault(speeds, len(self._kinds))
        if kind == len(self._groups):
            self._groups.append((*speeds, []))
        return kind

    def _place(self, node: "Agent") -> int:
        return self._index[node.id]

    def _rates_of(self, node: "Agent") -> "Rates":
        key = self._key
        return self._speeds.rates(node.id, key, size_bytes=node.inventory.installed[key].size_bytes, slots=node.slots_for(key))


def _weighed(work: int, weight: float | None) -> int:
    """As an admin weighs the node."""
    return work if weight is None else int(work / weight) + 1
