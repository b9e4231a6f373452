"""What a load pushes out: prices, victims, and the barrier that keeps a cold load from starving behind a busy victim."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import RouterConfig
from core.displacement import UNLOAD_US, Displacement
from core.events import Ending, Failure, Forward, Refuse, Wait
from core.heat import MODELS_MAX, Heat
from core.learning import Speeds
from core.names import normalise
from core.units import GIB, AgentId, Instant
from tests.core.routing import World, answer, node_of, one, registration, row

HOT, COLD, NEW = "hot", "cold", "new"


def rows(*names: str) -> list[dict[str, object]]:
    return [{**row(name, size=5 * GIB), "size_vram": 6 * GIB} for name in names]


class Fleet(World):
    """Nodes whose agents tell their memory: 16 GiB hold two of the models, which take 6 GiB each, not three."""

    def node(self, name: str, *loaded: str, memory_gib: int = 16, slots: int = 1) -> AgentId:
        devices = [{"model": "RTX", "count": 1, "memory": memory_gib * GIB}]
        given = registration(name, instance_id=f"instance of {name}", slots=slots)
        self.register(given, agent_id=name)
        self.beat(
            name, installed_models=rows(HOT, COLD, NEW), loaded_models=rows(*loaded), gpu_memory_total_mb=memory_gib * 1024.0, sequence=1
        )
        assert devices
        return AgentId(name)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_the_colder_model_is_the_victim(fleet: Fleet) -> None:
    fleet.node("a", HOT, COLD)
    for n in range(20):
        fleet.ask(f"h{n}", HOT)
        fleet.serve(f"h{n}", 0.2)
    forward = one(fleet.ask("r", NEW), Forward)
    assert forward.unload == (f"{COLD}:latest",)
    assert fleet.router.inventories()[0].loaded  # rows stay the node's own until it reports


def test_nothing_is_unloaded_where_it_fits(fleet: Fleet) -> None:
    fleet.node("a", HOT, COLD, memory_gib=48)
    assert one(fleet.ask("r", NEW), Forward).unload == ()


def test_a_node_with_room_is_better_than_one_that_loses_a_hot_model(fleet: Fleet) -> None:
    fleet.node("full", HOT, COLD)
    fleet.node("empty")
    for n in range(20):
        fleet.ask(f"h{n}", HOT)
        fleet.serve(f"h{n}", 0.2)
    assert node_of(fleet.ask("r", NEW), "r") == "empty"


def test_a_cold_load_waits_behind_a_barrier_and_no_longer_than_what_was_in_flight(fleet: Fleet) -> None:
    fleet.node("a", HOT, slots=4, memory_gib=8)
    fleet.ask("h1", HOT)
    fleet.ask("h2", HOT)
    fleet.first("h1")
    fleet.first("h2")
    waits = one(fleet.ask("r", NEW), Wait)
    assert "hot:latest may be unloaded" in waits.why
    assert isinstance(answer(fleet.ask("h3", HOT), "h3"), Wait), "a request for the victim is kept away"
    fleet.settle("h1")
    effects = fleet.settle("h2")
    forward = answer(effects, "r")
    assert isinstance(forward, Forward)
    assert forward.unload == (f"{HOT}:latest",)
    assert fleet.router.waiting()[0].request_id == "h3"
    fleet.serve("r", 2.0)
    assert fleet.router.statistics().waiting == 0, "the victim's own requests are served again after the load"


def test_the_barrier_falls_with_the_request_that_wanted_it(fleet: Fleet) -> None:
    fleet.node("a", HOT, slots=4, memory_gib=8)
    fleet.ask("h1", HOT)
    fleet.first("h1")
    fleet.ask("r", NEW)
    fleet.ask("h2", HOT)
    effects = fleet.settle("r", Ending.CANCELLED)
    assert node_of(effects, "h2") == "a"


def test_the_barrier_falls_with_the_last_one_who_waited(fleet: Fleet) -> None:
    fleet.node("a", HOT, slots=4, memory_gib=8)
    fleet.ask("h1", HOT)
    fleet.first("h1")
    fleet.ask("r", NEW)
    fleet.settle("r", Ending.CANCELLED)
    assert node_of(fleet.ask("h2", HOT), "h2") == "a"
    fleet.settle("h1")
    fleet.settle("h2")
    assert node_of(fleet.ask("r2", NEW), "r2") == "a"


def test_a_second_cold_request_waits_for_the_first(fleet: Fleet) -> None:
    fleet.node("a", HOT, slots=4, memory_gib=8)
    fleet.ask("h1", HOT)
    fleet.first("h1")
    fleet.ask("r1", NEW)
    waits = one(fleet.ask("r2", NEW), Wait)
    assert "makes room" in waits.why
    assert isinstance(answer(fleet.ask("r3", COLD), "r3"), Wait)
    effects = fleet.settle("h1")
    assert (node_of(effects, "r1"), node_of(effects, "r2")) == ("a", "a"), "both are served by one load"


@given(st.lists(st.tuples(st.sampled_from([HOT, COLD, NEW]), st.integers(0, 3)), min_size=1, max_size=40), st.integers(1, 3))
def test_nobody_waits_for_ever_whatever_is_asked(asked: list[tuple[str, int]], slots: int) -> None:
    """Two nodes that hold one model at a time; between two arrivals some answers end."""
    fleet = Fleet()
    for name in ("a", "b"):
        fleet.node(name, slots=slots, memory_gib=8)
    running: list[str] = []
    fleet.watch = lambda effects: running.extend(effect.request_id for effect in effects if isinstance(effect, Forward))

    def end_one() -> None:
        fleet.now += 0.5
        fleet.serve(running.pop(0), 0.5)

    for number, (model, ends) in enumerate(asked):
        fleet.ask(f"r{number}", model)
        for _ in range(min(ends, len(running))):
            end_one()
    while running:
        end_one()
    assert fleet.router.statistics().waiting == 0


def test_a_busy_node_is_passed_over_for_one_that_needs_no_barrier(fleet: Fleet) -> None:
    fleet.node("busy", HOT, memory_gib=8)
    fleet.node("idle", COLD, memory_gib=8)
    fleet.ask("h1", HOT)
    fleet.first("h1")
    assert node_of(fleet.ask("r", NEW), "r") == "idle"


def test_other_strategies_leave_room_to_the_node() -> None:
    fleet = Fleet(strategy="least-busy")
    fleet.node("a", HOT, memory_gib=8)
    fleet.ask("h1", HOT)
    assert one(fleet.ask("r", NEW), Forward).unload == ()


def test_a_failed_load_leaves_no_barrier(fleet: Fleet) -> None:
    fleet.node("a", HOT, memory_gib=8)
    fleet.ask("h1", HOT)
    fleet.first("h1")
    fleet.ask("r", NEW)
    fleet.settle("h1")
    effects = fleet.fail("r", Failure.ANSWERED, 500, "llama-server process has terminated: exit status 1")
    assert isinstance(answer(effects, "r"), Refuse) or answer(effects, "r") is not None
    fleet.settle("r", Ending.ERROR)
    assert node_of(fleet.ask("h2", HOT), "h2") == "a"


def test_replicas_share_the_price() -> None:
    alone, shared = Fleet(), Fleet()
    for world in (alone, shared):
        world.node("a", HOT, memory_gib=8)
    shared.node("b", HOT, memory_gib=8)
    prices = []
    for world in (alone, shared):
        for n in range(30):
            world.ask(f"h{n}", HOT)
            world.serve(f"h{n}", 0.1)
        agents = world.router._registry.ready()
        price, victims = world.router._displacement.of(agents[0], normalise(NEW), now=Instant(world.now))
        assert victims == (normalise(HOT),)
        prices.append(price - UNLOAD_US)
    assert prices[1] == pytest.approx(prices[0] / 2, rel=0.05)


def test_a_node_with_nothing_in_memory_loses_nothing() -> None:
    world = Fleet()
    world.node("a")
    made = Displacement(Speeds(RouterConfig()), Heat(), ready=world.router._registry.ready, in_flight=lambda key: {})
    assert made.of(world.router._registry.ready()[0], normalise(NEW), now=Instant(world.now)) == (0, ())


def test_a_runner_is_worth_what_its_own_options_are_asked_for() -> None:
    world = World()
    a, b = world.backend("a", "m"), world.backend("b", "m")
    displacement, key = world.router._displacement, normalise("m")
    agent = world.router._registry.get(a)
    assert agent is not None

    def worth(options: str) -> int:
        return displacement.of_runner(agent, key, options, now=Instant(world.now))

    never = worth("num_ctx=1")
    for number in range(20):
        world.ask(f"r{number}", runner_options="num_ctx=1")
        world.serve(f"r{number}", 0.2)
    hot = worth("num_ctx=1")
    assert hot > never
    assert worth("num_ctx=2") < hot, "nobody asks for it"
    assert worth("") > worth("num_ctx=2"), "requests without options were not told apart before: the model's own heat counts"
    agent.inventory.saw_loaded(key, "num_ctx=1", now=Instant(world.now))
    other = world.router._registry.get(b)
    assert other is not None
    other.inventory.saw_loaded(key, "num_ctx=1", now=Instant(world.now))
    world.now += 0.001
    assert worth("num_ctx=1") < hot, "another node has it too"


def test_a_bounded_number_of_models_is_told_apart_by_options() -> None:
    displacement = Displacement(Speeds(RouterConfig()), Heat(), ready=tuple, in_flight=lambda _: {})
    for number in range(MODELS_MAX + 5):
        displacement.came(normalise(f"m{number}"), "num_ctx=1", now=Instant(1.0))
    displacement.came(normalise("m"), "", now=Instant(1.0))
    assert len(displacement.mixed) == MODELS_MAX


def test_a_report_of_another_context_lets_those_go_who_fit_it() -> None:
    world = World()
    node = world.backend("one", "m", slots=2)
    world.ask("r1", runner_options="num_ctx=2048")
    world.first("r1")
    world.poll(node, loaded=[{**row("m"), "context_length": 2048}])
    assert isinstance(answer(world.ask("r2"), "r2"), Wait), "the runner has other options"
    assert node_of(world.poll(node, loaded=[{**row("m"), "context_length": 4096}]), "r2") == node


@pytest.mark.parametrize(("many", "seen"), [(0, [1, 1, 2]), (64, [1, 2, 2])])
def test_in_a_large_fleet_it_is_counted_now_and_then_who_has_a_model(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, many: int, seen: list[int]
) -> None:
    monkeypatch.setattr("core.displacement.MANY", many)
    one_has, other = (fleet.router._registry.get(fleet.node(name, *loaded)) for name, loaded in (("a", (HOT,)), ("b", ())))
    assert one_has is not None
    assert other is not None
    prices = Displacement(Speeds(RouterConfig()), Heat(), ready=lambda: (one_has, other), in_flight=lambda _: {})
    found = [prices._elsewhere(normalise(HOT), Instant(100.0))]
    other.inventory.saw_loaded(normalise(HOT), "", now=Instant(100.0))
    found += [prices._elsewhere(normalise(HOT), Instant(at)) for at in (100.5, 101.5)]
    assert found == seen
