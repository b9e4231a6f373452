"""The search for a placement against trying everything, on fleets small enough for that."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.placement_flow import Budget
from core.placement_search import GAP, Fits, Sets, carried, fill, pack, search

PLENTY = 200_000
GREEDY_FACTOR = 4.0
"""On fleets whose nodes differ by up to four times per model, greedy carries at least the optimum divided by this."""


class World:
    """A small fleet: node seconds per request, sizes of models, memory and number of models of nodes."""

    def __init__(self, work: list[dict[int, float]], mix: list[float], sizes: list[int], memory: list[int], most: int) -> None:
        self.work, self.mix, self.sizes, self.memory, self.most = work, mix, sizes, memory, most

    def __repr__(self) -> str:
        return f"World({self.work}, {self.mix}, {self.sizes}, {self.memory}, {self.most})"

    def fits(self, node: int, models: Sequence[int]) -> bool:
        return len(models) <= self.most and sum(self.sizes[model] for model in models) <= self.memory[node]

    def all_sets(self, node: int) -> list[frozenset[int]]:
        possible = sorted(self.work[node])
        choices = [frozenset(some) for count in range(len(possible) + 1) for some in itertools.combinations(possible, count)]
        fitting = [some for some in choices if self.fits(node, sorted(some))]
        return [some for some in fitting if not any(some < other for other in fitting)]

    def best(self) -> float:
        return max(
            carried(self.work, list(sets), self.mix, Budget(PLENTY)).rate
            for sets in itertools.product(*(self.all_sets(node) for node in range(len(self.work))))
        )


@st.composite
def worlds(draw: st.DrawFn, *, nodes_max: int = 3, models_max: int = 4) -> World:
    models, nodes = draw(st.integers(1, models_max)), draw(st.integers(1, nodes_max))
    base = [draw(st.floats(0.1, 5.0)) for _ in range(models)]
    work = [{model: base[model] * draw(st.floats(0.5, 2.0)) for model in range(models) if draw(st.integers(0, 4))} for _ in range(nodes)]
    sizes = [draw(st.integers(1, 6)) for _ in range(models)]
    memory = [draw(st.integers(2, 12)) for _ in range(nodes)]
    work = [{model: s for model, s in of_node.items() if sizes[model] <= memory[node]} for node, of_node in enumerate(work)]
    return World(work, [draw(st.floats(0.05, 1.0)) for _ in range(models)], sizes, memory, draw(st.integers(1, 3)))


def held_somewhere(held: Sets) -> set[int]:
    return {model for there in held for model in there}


def without_unheld(world: World) -> World:
    """The world of those models that can be warm all at once."""
    held = sorted(held_somewhere(pack(world.work, [1.0] * len(world.mix), world.fits)))
    work = [{held.index(model): seconds for model, seconds in of_node.items() if model in held} for of_node in world.work]
    return World(work, [world.mix[model] for model in held], [world.sizes[model] for model in held], world.memory, world.most)


@given(worlds())
def test_a_packing_fits_and_holds_all_that_can_be_held(world: World) -> None:
    worth = [float(model + 1) for model in range(len(world.mix))]
    packed = pack(world.work, worth, world.fits)
    assert all(world.fits(node, sorted(there)) for node, there in enumerate(packed))
    assert sum(len(there) for there in packed) == len(held_somewhere(packed))
    choices = [held_somewhere(list(sets)) for sets in itertools.product(*(world.all_sets(node) for node in range(len(world.work))))]
    most_valuable = max(choices, key=lambda choice: [model in choice for model in reversed(range(len(world.mix)))])
    assert held_somewhere(packed) == most_valuable


@given(worlds())
@settings(deadline=None)
def test_the_search_finds_the_best_of_all_placements(world: World) -> None:
    world = without_unheld(world)
    if not world.mix:
        return
    start = pack(world.work, [1.0] * len(world.mix), world.fits)
    found = search(world.work, world.mix, world.fits, start, Budget(PLENTY))
    best = world.best()
    assert found.exact
    assert found.flow.rate == pytest.approx(best, rel=2 * GAP)
    assert found.bound >= best * (1 - 1e-5)
    assert all(world.fits(node, sorted(there)) for node, there in enumerate(found.held))
    assert held_somewhere(found.held) == set(range(len(world.mix)))


@given(worlds(nodes_max=4, models_max=5))
@settings(deadline=None)
def test_greedy_is_within_its_factor_of_the_best(world: World) -> None:
    world = without_unheld(world)
    if not world.mix:
        return
    start = pack(world.work, [1.0] * len(world.mix), world.fits)
    greedy = fill(world.work, world.mix, world.fits, start)
    assert all(world.fits(node, sorted(there)) for node, there in enumerate(greedy))
    assert all(before <= after for before, after in zip(start, greedy, strict=True))
    rate = carried(world.work, greedy, world.mix, Budget(PLENTY)).rate
    found = search(world.work, world.mix, world.fits, start, Budget(PLENTY))
    assert found.flow.rate / GREEDY_FACTOR <= rate <= found.flow.rate * (1 + 2 * GAP)


@given(worlds(nodes_max=4, models_max=6), st.integers(1, 60))
@settings(deadline=None)
def test_a_search_that_ran_out_of_steps_still_fits_and_owns_up(world: World, steps: int) -> None:
    world = without_unheld(world)
    if not world.mix:
        return
    start = fill(world.work, world.mix, world.fits, pack(world.work, [1.0] * len(world.mix), world.fits))
    found = search(world.work, world.mix, world.fits, start, Budget(steps))
    assert all(world.fits(node, sorted(there)) for node, there in enumerate(found.held))
    assert held_somewhere(found.held) == set(range(len(world.mix)))
    assert found.flow.rate <= found.bound
    full = search(world.work, world.mix, world.fits, start, Budget(PLENTY))
    assert found.flow.rate <= full.bound * (1 + 1e-6)
    assert not found.exact or found.flow.rate >= full.flow.rate * (1 - 2 * GAP)


def large() -> tuple[list[dict[int, float]], list[float], Fits]:
    """Ten models of odd sizes on fourteen nodes: too much for a few thousand steps."""
    work = [{model: (1 + model % 5) * (1 + (node * 7 + model * 6) % 5) / 10 for model in range(10)} for node in range(14)]
    return work, [1.0 / (1 + model) for model in range(10)], lambda node, models: sum(3 + (model * 7 + 3) % 9 for model in models) <= 16


def test_local_improvement_gains_where_the_budget_ends_the_search() -> None:
    work, mix, fits = large()
    start = fill(work, mix, fits, pack(work, [1.0] * 10, fits))
    before = carried(work, start, mix, Budget(PLENTY)).rate
    some, more, all_of_it = (search(work, mix, fits, start, Budget(steps)) for steps in (2_000, 8_000, 30_000))
    assert (some.exact, more.exact, all_of_it.exact) == (False, False, True)
    assert before < some.flow.rate < more.flow.rate <= all_of_it.flow.rate
    assert more.flow.rate == pytest.approx(all_of_it.flow.rate, rel=0.01)
    assert more.bound >= all_of_it.bound


def test_a_packing_moves_models_to_make_room() -> None:
    """The first model goes to either node, the second only to the node with more memory."""
    world = World([{0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0}], [1.0, 1.0], [2, 4], [4, 2], 1)
    assert pack(world.work, [2.0, 1.0], world.fits) == [frozenset({1}), frozenset({0})]


def test_a_packing_gives_up_within_its_steps() -> None:
    """Forty models that fit nowhere together: found out by counting, not by trying all."""
    work = [dict.fromkeys(range(40), 1.0) for _ in range(10)]
    packed = pack(work, [1.0] * 40, lambda node, models: sum(3 + model % 4 for model in models) <= 11)
    assert 20 <= len(held_somewhere(packed)) < 40
