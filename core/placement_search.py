"""Which models are warm where so that the fleet carries the most: search over `core.placement_flow`.

Decides sets of models per node; knows no names, no time, and nothing of what is loaded now. Nodes and models are numbered.

* First a packing: which models can be warm at all, the most costly to leave cold first; then more nodes for what is scarce (`fill`). This
  greedy solution is where the search starts from, and what it falls back on.
* Then depth-first branch and bound. Without memory limits the flow is a linear program, and an upper bound. Where a node is given more
  than fits, one of those models must be absent from it: a branch for each, in which the ones before it are present for good, so that
  branches do not overlap. The first way down is a greedy choice (drop what is used least); to the end, it is exact.
* Where the budget ends the search early, pairs of nodes are chosen anew with the others kept: local improvement.

Invariants: what is chosen fits; same input and budget, same answer; `rate <= bound`; `exact` only if the search came to its end.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from core.placement_flow import Budget, Flow, best_flow

GAP: Final = 1e-3
"""A branch that promises less than this share more is not worth its time."""

PACKING_STEPS: Final = 20_000
IMPROVED_SHARE: Final = 0.5
"""Part of the budget that is left for local improvement."""

PAIR_STEPS: Final = 40
"""Programs solved at most for one pair of nodes."""

Fits = Callable[[int, Sequence[int]], bool]
"""Whether this node can hold these models at once."""

Sets = list[frozenset[int]]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A placement. `held`: per node; `bound`: no placement carries more than this; `exact`: none carries more by `GAP`."""

    held: Sets
    flow: Flow
    bound: float
    exact: bool


def pack(work: Sequence[Mapping[int, float]], worth: Sequence[float], fits: Fits) -> Sets:
    """Put each model on one node, those of most `worth` first; models that find no place even by moving others are left out."""
    place: dict[int, int] = {}
    steps = PACKING_STEPS
    for model in sorted(range(len(worth)), key=lambda model: (-worth[model], model)):
        wanted = sorted([*place, model], key=lambda each: (sum(each in of_node for of_node in work), each))
        found, steps = _packed(work, wanted, fits, steps)
        if found is not None:
            place = found
    return _sets(place, len(work))


def fill(work: Sequence[Mapping[int, float]], mix: Sequence[float], fits: Fits, start: Sets) -> Sets:
    """Greedy: give what is scarcest, by a node's time shared evenly among its models, one more node while any fits."""
    held = [set(models) for models in start]
    open_models = {model for models in held for model in models}
    while open_models:
        rates = dict.fromkeys(sorted(open_models), 0.0)
        for node, models in enumerate(held):
            for model in models & open_models:
                rates[model] += 1 / (len(models) * work[node][model])
        scarcest = min(rates, key=lambda model: (rates[model] / mix[model], model))
        room = [
            node
            for node, of_node in enumerate(work)
            if scarcest in of_node and scarcest not in held[node] and fits(node, [*sorted(held[node]), scarcest])
        ]
        if room:
            held[min(room, key=lambda node: (work[node][scarcest] * (len(held[node]) + 1), node))].add(scarcest)
        else:
            open_models.discard(scarcest)
    return [frozenset(models) for models in held]


def _sets(place: Mapping[int, int], nodes: int) -> Sets:
    held: list[list[int]] = [[] for _ in range(nodes)]
    for model, node in place.items():
        held[node].append(model)
    return [frozenset(models) for models in held]


def _packed(work: Sequence[Mapping[int, float]], wanted: Sequence[int], fits: Fits, steps: int) -> tuple[dict[int, int] | None, int]:
    """A place for each of `wanted`, by backtracking; None when there is none, or the steps ended."""
    place: dict[int, int] = {}
    on: list[list[int]] = [[] for _ in work]
    tries: list[list[int]] = []
    while len(place) < len(wanted):
        depth = len(place)
        if len(tries) == depth:
            model = wanted[depth]
            possible = [node for node, of_node in enumerate(work) if model in of_node and fits(node, [*on[node], model])]
            tries.append(sorted(possible, key=lambda node: (len(on[node]), work[node][model], node), reverse=True))
        steps -= 1
        if tries[-1] and steps > 0:
            node = tries[-1].pop()
            place[wanted[depth]] = node
            on[node].append(wanted[depth])
            continue
        tries.pop()
        if not place or steps <= 0:
            return None, max(steps, PACKING_STEPS // 20)
        last = wanted[depth - 1]
        on[place.pop(last)].remove(last)
    return place, steps


class _Branch(msgspec.Struct, frozen=True):
    """Part of the search: what may run where, what is there for good, and the most it can promise."""

    work: list[Mapping[int, float]]
    present: Sets
    promise: float


def search(work: Sequence[Mapping[int, float]], mix: Sequence[float], fits: Fits, start: Sets, budget: Budget) -> Found:
    """The best placement within the budget. `start`: one that fits and holds every model of the mix somewhere."""
    best = carried(work, start, mix, budget)
    reserve = int(budget.left * IMPROVED_SHARE)
    budget.left -= reserve
    held, flow, bound = _descend(work, mix, fits, (start, best), budget, programs=None)
    budget.left += reserve
    exact = bound <= flow.rate * (1 + GAP) and flow.optimal
    if not exact:
        held, flow = _improved(work, mix, fits, (held, flow), budget)
    return Found(held=held, flow=flow, bound=max(bound, flow.rate), exact=exact)


def carried(work: Sequence[Mapping[int, float]], held: Sets, mix: Sequence[float], budget: Budget) -> Flow:
    """What a placement can carry."""
    return best_flow([{model: of_node[model] for model in sorted(models)} for of_node, models in zip(work, held, strict=True)], mix, budget)


def _descend(
    work: Sequence[Mapping[int, float]], mix: Sequence[float], fits: Fits, best: tuple[Sets, Flow], budget: Budget, *, programs: int | None
) -> tuple[Sets, Flow, float]:
    """Depth first, until nothing promises more, the budget is spent, or so many programs were solved. Also: the most that is possible."""
    held, flow = best
    nothing: Sets = [frozenset()] * len(work)
    stack = [_Branch(list(work), nothing, float("inf"))]
    solved = 0
    while stack and not budget.spent and (programs is None or solved < programs):
        branch = stack.pop()
        if branch.promise <= flow.rate * (1 + GAP):
            continue
        found = best_flow(branch.work, mix, budget)
        solved += 1
        if not found.optimal:
            stack.append(branch)
            break
        if found.rate <= flow.rate * (1 + GAP):
            continue
        crowded = _most_crowded(found, fits)
        if crowded is None:
            held, flow = [frozenset(times) for times in found.time], found
            continue
        stack += _branches(branch, found, crowded, fits)
    return held, flow, max([flow.rate, *(branch.promise for branch in stack)])


def _most_crowded(flow: Flow, fits: Fits) -> int | None:
    """The node that is given most models of those that are given more than fit."""
    crowded = [node for node, times in enumerate(flow.time) if not fits(node, sorted(times))]
    return max(crowded, key=lambda node: (len(flow.time[node]), -node)) if crowded else None


def _branches(branch: _Branch, flow: Flow, node: int, fits: Fits) -> list[_Branch]:
    """One for each model that may be the absent one, the least used last (it is looked at first)."""
    times = flow.time[node]
    branches = []
    before: list[int] = []
    for model in sorted(times, key=lambda each: (times[each], each)):
        if model in branch.present[node]:
            before.append(model)
            continue
        present = branch.present[node] | frozenset(before)
        if not fits(node, sorted(present)):
            break
        left = {
            other: work
            for other, work in branch.work[node].items()
            if other != model and (other in present or fits(node, [*sorted(present), other]))
        }
        before.append(model)
        branches.append(
            _Branch(
                [left if index == node else of_node for index, of_node in enumerate(branch.work)],
                [present if index == node else there for index, there in enumerate(branch.present)],
                flow.rate,
            )
        )
    return branches[::-1]


def _improved(
    work: Sequence[Mapping[int, float]], mix: Sequence[float], fits: Fits, best: tuple[Sets, Flow], budget: Budget
) -> tuple[Sets, Flow]:
    """Choose the models of two nodes anew, the others' kept, over all pairs, until no pair gains or the budget is spent."""
    held, flow = best
    gained = True
    while gained and not budget.spent:
        gained = False
        for one in range(len(work)):
            for two in range(one):
                if budget.spent:
                    return held, flow
                kept = [
                    of_node if node in (one, two) else {model: of_node[model] for model in sorted(held[node])}
                    for node, of_node in enumerate(work)
                ]
                before = flow.rate
                held, flow, _ = _descend(kept, mix, fits, (held, flow), budget, programs=PAIR_STEPS)
                gained = gained or flow.rate > before
    return held, flow
