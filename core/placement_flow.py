"""How much traffic a fleet can carry when it is settled which node may run which model: a small linear program.

Decides shares only; knows neither memory nor names: nodes and models are numbered. The program: node `n` spends a part `t[n, m]` of its
time on model `m`, at most all of it; model `m` gets `sum(t[n, m] / work[n][m])` requests per second, which must be its share of the
total; the total is as large as it can be. Solved by the primal simplex method on a condensed tableau (Dantzig's rule, Bland's once it
takes long), with right sides moved apart a little so that it does not stall.

Invariants: same input, same answer; a basic solution uses at most nodes + models - 1 pairs, which is why few of them break a memory
limit; a solution that ran out of pivots is feasible, and says so.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

NEGLIGIBLE: Final = 1e-6
"""Part of a node's time below which a pair counts as unused."""

_APART: Final = 1e-8
_ZERO: Final = 1e-11


CELLS_PER_STEP: Final = 1000


class Budget:
    """Work that may still be done, over many programs. A step is a pivot of `CELLS_PER_STEP` cells: some 40 µs."""

    __slots__ = ("left",)

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self.left <= 0


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """What the fleet can carry. `rate`: requests per second in all; `time`: part of each node's time per model, unused pairs left out, but
    each model somewhere."""

    rate: float
    time: list[dict[int, float]]
    optimal: bool


def best_flow(work: Sequence[Mapping[int, float]], mix: Sequence[float], budget: Budget) -> Flow:
    """The largest rate at which requests of this mix can be served.

    `work[n][m]`: seconds of node `n` per request of model `m`, absent where it may not run. `mix[m]`: parts of the traffic, above 0.
    """
    nodes = len(work)
    hosts: list[list[int]] = [[] for _ in mix]
    pairs: list[tuple[int, int]] = []
    for node, of_node in enumerate(work):
        for model in of_node:
            hosts[model].append(node)
            pairs.append((node, model))
    if not all(hosts):
        return Flow(rate=0.0, time=[{} for _ in work], optimal=True)
    # Columns: the pairs, then the rate (in units of `1 / scale`). Rows: nodes, then models, then the objective.
    scale = sum(part * min(work[node][model] for node in hosts[model]) for model, part in enumerate(mix)) / sum(mix)
    width = len(pairs) + 1
    table = [[0.0] * (width + 1) for _ in range(nodes + len(mix) + 1)]
    for column, (node, model) in enumerate(pairs):
        table[node][column] = 1.0
        table[nodes + model][column] = -scale / work[node][model]
    for node in range(nodes):
        table[node][width] = 1.0
    total = sum(mix)
    for model, part in enumerate(mix):
        table[nodes + model][width - 1] = part / total
        table[nodes + model][width] = _APART * (model + 1)
    table[-1][width - 1] = -1.0
    basis = [width + row for row in range(len(table) - 1)]
    names = list(range(width))
    optimal = _solve(table, basis, names, budget)
    value = {name: table[row][width] for row, name in enumerate(basis)}
    time: list[dict[int, float]] = [{} for _ in work]
    most = [0.0] * len(mix)
    for column, (_, model) in enumerate(pairs):
        most[model] = max(most[model], value.get(column, 0.0))
    for column, (node, model) in enumerate(pairs):
        part = max(value.get(column, 0.0), 0.0)
        if part > NEGLIGIBLE or (part == most[model] <= NEGLIGIBLE):
            time[node][model] = part
            most[model] = max(part, 2 * NEGLIGIBLE)
    return Flow(rate=max(value.get(width - 1, 0.0), 0.0) / scale, time=time, optimal=optimal)


def _solve(table: list[list[float]], basis: list[int], names: list[int], budget: Budget) -> bool:
    """Pivot until no column can raise the objective. Returns False when the budget ended before."""
    patience = 4 * (len(basis) + len(names))
    while True:
        entering = _entering(table[-1], names, bland=patience < 0)
        if entering is None:
            return True
        if budget.spent:
            return False
        leaving = _leaving(table, basis, entering)
        assert leaving is not None, "no node has endless time"
        _pivot(table, leaving, entering)
        basis[leaving], names[entering] = names[entering], basis[leaving]
        budget.left -= 1 + len(basis) * len(names) // CELLS_PER_STEP
        patience -= 1


def _entering(objective: list[float], names: list[int], *, bland: bool) -> int | None:
    last = len(names)
    if bland:
        rising = [column for column in range(last) if objective[column] < -_ZERO]
        return min(rising, key=lambda column: names[column]) if rising else None
    best = min(range(last), key=objective.__getitem__)
    return best if objective[best] < -_ZERO else None


def _leaving(table: list[list[float]], basis: list[int], entering: int) -> int | None:
    found: int | None = None
    least = 0.0
    for row in range(len(basis)):
        factor = table[row][entering]
        if factor > _ZERO:
            ratio = table[row][-1] / factor
            if found is None or ratio < least or (ratio == least and basis[row] < basis[found]):
                found, least = row, ratio
    return found


def _pivot(table: list[list[float]], leaving: int, entering: int) -> None:
    pivot = table[leaving][entering]
    chosen = [value / pivot for value in table[leaving]]
    chosen[entering] = 1.0 / pivot
    for index, row in enumerate(table):
        if index != leaving and (factor := row[entering]) != 0.0:
            changed = [value - factor * other for value, other in zip(row, chosen, strict=True)]
            changed[entering] = -factor / pivot
            table[index] = changed
    table[leaving] = chosen
