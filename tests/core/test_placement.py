"""Plans: what fits, what is kept, what is said, and that more time never makes them worse."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.placement import HEADROOM, SHARD_NODES, Offer, Plan, Supply, plan

GB = 1_000_000_000


def node(
    name: str, memory_gb: float, work: dict[str, float], *, loaded: tuple[str, ...] = (), max_loaded: int = 3, gb: float = 5
) -> Supply:
    offers = {model: Offer(size_bytes=round(gb * GB), work_s=seconds, load_s=4.0) for model, seconds in work.items()}
    return Supply(name=name, memory_bytes=round(memory_gb * GB), max_loaded=max_loaded, offers=offers, loaded=loaded)


def where(found: Plan) -> set[tuple[str, str]]:
    return {(placed.node, placed.model) for placed in found.placed}


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Supply], dict[str, float]]:
    models = [f"model-{n}" for n in range(draw(st.integers(1, 5)))]
    sizes = {model: draw(st.integers(1, 20)) * GB for model in models}
    nodes = []
    for index in range(draw(st.integers(1, 4))):
        speed = draw(st.floats(0.5, 2.0))
        offers = {
            model: Offer(size_bytes=sizes[model], work_s=speed * sizes[model] / GB / 5, load_s=1 + sizes[model] / GB)
            for model in models
            if draw(st.integers(0, 4))
        }
        memory, most = draw(st.integers(4, 40)) * GB, draw(st.integers(1, 3))
        loaded: list[str] = []
        supply = Supply(name=f"node-{index}", memory_bytes=memory, max_loaded=most, offers=offers)
        for model in offers:
            if draw(st.booleans()) and supply.fits([*loaded, model]):
                loaded.append(model)
        nodes.append(Supply(name=supply.name, memory_bytes=memory, max_loaded=most, offers=offers, loaded=tuple(loaded)))
    return nodes, {model: draw(st.floats(0.0, 2.0)) for model in models}


def test_what_ollama_would_load_beside_others_and_what_not() -> None:
    one = node("a", 16, {"x": 1.0, "y": 1.0, "z": 1.0}, gb=6)
    assert one.fits(["x", "y"])
    assert not one.fits(["x", "y", "z"])
    assert not node("a", 13, {"x": 1.0, "y": 1.0}, gb=6).fits(["x", "y"])  # 6 of 7 free is more than 80 %
    assert one.fits(["x", "y"]) != node("a", 16, {"x": 1.0, "y": 1.0}, gb=6, max_loaded=1).fits(["x", "y"])
    assert node("a", 5, {"x": 1.0}).fits(["x"])


def test_each_model_goes_where_it_runs_best() -> None:
    found = plan([node("a", 6, {"x": 1.0, "y": 4.0}), node("b", 6, {"x": 4.0, "y": 1.0})], {"x": 0.5, "y": 0.5})
    assert where(found) == {("a", "x"), ("b", "y")}
    assert found.capacity_per_s == pytest.approx(2.0, rel=1e-3)
    assert found.bound_per_s == pytest.approx(2.0, rel=1e-3)
    assert found.exact
    assert found.utilisation == {"a": pytest.approx(0.5), "b": pytest.approx(0.5)}
    assert all(placed.share == pytest.approx(1.0) and not placed.loaded for placed in found.placed)
    assert found.placed[0].why == "1.00 s of node time per request, the fastest of all that have it; loads in 4.0 s"


def test_a_fast_node_is_kept_for_what_only_it_can_do() -> None:
    big, small = node("big", 6, {"x": 1.0, "y": 1.0}), node("small", 6, {"x": 2.0})
    found = plan([big, small], {"x": 0.2, "y": 0.2})
    assert where(found) == {("big", "y"), ("small", "x")}
    (why,) = [placed.why for placed in found.placed if placed.model == "x"]
    assert why == "2.00 s of node time per request; big would take 1.00 s, but is better used for y; loads in 4.0 s"


def test_what_cannot_be_warm_is_named_with_the_reason() -> None:
    nodes = [node("a", 6, {"x": 1.0, "y": 1.0}), node("b", 4, {"z": 1.0})]
    found = plan(nodes, {"x": 2.0, "y": 1.0, "z": 1.0, "w": 0.5, "idle": 0.0})
    assert where(found) == {("a", "x")}
    assert [(unheld.model, unheld.why) for unheld in found.unheld] == [
        ("y", "the memory is needed for models whose absence would cost more loading time"),
        ("z", "no node that has it has the memory for it"),
        ("w", "no node has it on disk"),
    ]
    assert found.rate_per_s == 2.0


@pytest.mark.parametrize("nodes", [[], [node("a", 4, {"x": 1.0})]])
def test_a_fleet_that_can_hold_nothing_has_an_empty_plan(nodes: list[Supply]) -> None:
    found = plan(nodes, {"x": 1.0})
    assert (found.placed, found.capacity_per_s, found.bound_per_s) == ([], 0.0, 0.0)
    assert [unheld.model for unheld in found.unheld] == ["x"]


def test_what_is_loaded_stays_while_it_carries_enough() -> None:
    """Each has the other's model: at a low rate that is no reason to load anything, at a high one it is."""
    nodes = [node("a", 6, {"x": 1.0, "y": 4.0}, loaded=("y",)), node("b", 6, {"x": 4.0, "y": 1.0}, loaded=("x",))]
    low = plan(nodes, {"x": 0.05, "y": 0.05})
    assert where(low) == {("a", "y"), ("b", "x")}
    assert all(placed.loaded and placed.why.endswith("loaded already") for placed in low.placed)
    assert (low.unloads, low.capacity_per_s) == ([], pytest.approx(0.5, rel=1e-3))
    assert low.capacity_per_s >= HEADROOM * low.rate_per_s
    high = plan(nodes, {"x": 0.4, "y": 0.4})
    assert where(high) == {("a", "x"), ("b", "y")}
    assert {(unload.node, unload.model) for unload in high.unloads} == {("a", "y"), ("b", "x")}


def test_what_is_loaded_and_not_asked_for_goes_only_to_make_room() -> None:
    roomy = node("a", 16, {"x": 1.0, "y": 1.0}, loaded=("y",))
    assert plan([roomy], {"x": 1.0}).unloads == []
    assert [unload.model for unload in plan([node("a", 6, {"x": 1.0, "y": 1.0}, loaded=("y",))], {"x": 1.0}).unloads] == ["y"]
    assert [unload.model for unload in plan([node("a", 6, {"x": 1.0}, loaded=("gone",))], {"x": 1.0}).unloads] == ["gone"]


def test_traffic_prefers_fast_nodes_and_spills_to_slow_ones() -> None:
    nodes = [node("fast", 6, {"x": 1.0}, loaded=("x",)), node("slow", 6, {"x": 3.0}, loaded=("x",))]

    def share(rate: float) -> float:
        return next(placed.share for placed in plan(nodes, {"x": rate}).placed if placed.node == "fast")

    assert share(0.1) == pytest.approx(1.0)
    assert 0.7 < share(1.0) < 1.0
    assert any("a spare at the present rate" in placed.why for placed in plan(nodes, {"x": 0.1}).placed)
    assert any("beside faster nodes" in placed.why for placed in plan(nodes, {"x": 1.0}).placed)


def test_a_large_fleet_is_planned_in_shards() -> None:
    kinds = [{"x": 1.0, "y": 2.0}, {"x": 2.0, "y": 1.0}, {"x": 1.5}]
    nodes = [node(f"node-{n}", 6, kinds[n % 3]) for n in range(SHARD_NODES * 2 + 6)]
    found = plan(nodes, {"x": 3.0, "y": 3.0})
    assert not found.exact
    assert {placed.model for placed in found.placed} == {"x", "y"}
    assert found.capacity_per_s >= 0.8 * plan(nodes[: SHARD_NODES // 3 * 3], {"x": 3.0, "y": 3.0}).capacity_per_s * len(nodes) / SHARD_NODES
    assert max(found.utilisation.values()) < 1.0
    assert not found.unheld


@given(fleets(), st.sampled_from([1, 500, 20_000]))
@settings(deadline=None)
def test_every_plan_fits_and_accounts_for_all_traffic(fleet: tuple[list[Supply], dict[str, float]], steps: int) -> None:
    nodes, rates = fleet
    found = plan(nodes, rates, steps=steps)
    assert found == plan(nodes, rates, steps=steps)
    by_name = {supply.name: supply for supply in nodes}
    for supply in nodes:
        assert supply.fits([placed.model for placed in found.placed if placed.node == supply.name])
        stays = set(supply.loaded) - {unload.model for unload in found.unloads if unload.node == supply.name}
        assert supply.fits(stays | {placed.model for placed in found.placed if placed.node == supply.name})
    for model, rate in rates.items():
        shares = [placed.share for placed in found.placed if placed.model == model]
        assert (not shares) == (rate <= 0 or model in {unheld.model for unheld in found.unheld})
        assert not shares or sum(shares) == pytest.approx(1.0)
    for name, used in found.utilisation.items():
        assert used == pytest.approx(sum(placed.time_share for placed in found.placed if placed.node == name))
    for placed in found.placed:
        assert placed.loaded == (placed.model in by_name[placed.node].loaded)
        assert placed.why
    assert found.capacity_per_s <= found.bound_per_s * (1 + 1e-6)


@given(fleets())
@settings(deadline=None)
def test_a_plan_that_was_carried_out_asks_for_nothing_more(fleet: tuple[list[Supply], dict[str, float]]) -> None:
    nodes, rates = fleet
    found = plan(nodes, rates)
    done = []
    for supply in nodes:
        gone = {unload.model for unload in found.unloads if unload.node == supply.name}
        there = [placed.model for placed in found.placed if placed.node == supply.name]
        loaded = tuple(dict.fromkeys([*(model for model in supply.loaded if model not in gone), *there]))
        done.append(
            Supply(name=supply.name, memory_bytes=supply.memory_bytes, max_loaded=supply.max_loaded, offers=supply.offers, loaded=loaded)
        )
    again = plan(done, rates)
    assert all(placed.loaded for placed in again.placed)
    assert again.unloads == []
