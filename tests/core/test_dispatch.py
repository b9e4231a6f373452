"""Where requests go: warm before cold, waiting as a choice, and what loads, unloads and drains leave behind."""

import pytest

from core.events import Count, Ending, Forward, Route, Wait
from core.names import normalise
from core.units import AgentId
from tests.core import test_displacement as barriers
from tests.core.routing import Fleet, World, answer, node_of, of, registration, row, usage

M = normalise("m")

# The stories of the eviction barrier are this module's too.
fleet = barriers.fleet
test_a_cold_load_waits = barriers.test_a_cold_load_waits_behind_a_barrier_and_no_longer_than_what_was_in_flight
test_a_second_cold_request_waits = barriers.test_a_second_cold_request_waits_for_the_first


# ---------------------------------------------------------------- waiting as a choice


@pytest.mark.parametrize("size", [0, 500_000_000, 4_900_000_000, 40_000_000_000])
def test_two_at_once_wait_for_the_warm_node_and_forty_load_the_other_once(size: int) -> None:
    fleet = Fleet()
    warm, cold = fleet.warm("warm", size=size), fleet.backend("cold", "m", size=size)
    for number in range(2):
        fleet.ask(f"two{number}")
    fleet.run()
    assert [agent_id for _, agent_id, _ in fleet.started] == [warm, warm]
    for number in range(40):
        fleet.ask(f"forty{number}")
    fleet.run()
    assert fleet.loads == [cold]
    served = [agent_id for _, agent_id, _ in fleet.started[2:]]
    assert min(served.count(warm), served.count(cold)) >= 12
    assert fleet.router.statistics().requests_total == 42


def test_forty_at_once_before_anything_was_learned() -> None:
    fleet = Fleet()
    warm, cold = fleet.warm("warm"), fleet.backend("cold", "m")
    for number in range(40):
        fleet.ask(f"r{number}")
    fleet.run()
    assert fleet.loads == [cold]
    assert len({agent_id for _, agent_id, _ in fleet.started}) == 2
    assert fleet.started[0][1] == warm


def test_a_few_keep_waiting_for_the_warm_node_although_another_is_idle() -> None:
    fleet = Fleet()
    warm = fleet.warm("warm")
    fleet.backend("cold", "m")
    fleet.ask("teaches")
    fleet.run()
    for number in range(4):
        fleet.ask(f"r{number}")
    assert len(fleet.router.waiting()) == 3
    fleet.run()
    assert (fleet.loads, {agent_id for _, agent_id, _ in fleet.started}) == ([], {warm})


def test_what_the_first_answer_teaches_changes_the_mind_of_those_who_wait() -> None:
    fleet = Fleet(service_s=20.0, load_s=1.0, agent_timeout_s=1000)
    fleet.warm("warm", size=100_000_000)
    cold = fleet.backend("cold", "m", size=100_000_000)
    for number in range(8):
        fleet.ask(f"r{number}")
    assert (len(fleet.router.waiting()), fleet.loads) == (7, []), "a small model should answer at once"
    fleet.run()
    assert fleet.loads == [cold]
    assert [agent_id for _, agent_id, _ in fleet.started].count(cold) >= 3


def test_other_runner_options_are_another_kind() -> None:
    world, counted = World(), []
    world.backend("one", "m", loaded=("m",))
    for number, options in enumerate(("num_ctx=1", "num_ctx=2", "num_ctx=1", "num_ctx=2")):
        counted.append([count.name for count in of(world.ask(f"r{number}", runner_options=options), Count)])
        world.serve(f"r{number}", ending=Ending.CANCELLED if number == 2 else Ending.SUCCESS, usage=usage())
        if number == 1:
            world.backend("two", "m")
    assert counted == [[], ["reloads_total", "loads_total"], ["loads_total"], ["reloads_avoided_total"]]


@pytest.mark.parametrize("strategy", ["metrics", "least-busy", "round-robin"])
def test_strategies_that_forward_at_once_do_not_wait_for_slots(strategy: str) -> None:
    world = World(strategy=strategy)
    world.backend("one", "m", loaded=("m",))
    for number in range(5):
        assert isinstance(answer(world.ask(f"r{number}"), f"r{number}"), Forward)


@pytest.mark.parametrize("strategy", ["auto", "metrics", "least-busy", "round-robin"])
def test_a_cap_on_a_node_makes_requests_wait_in_every_strategy(strategy: str) -> None:
    world = World(strategy=strategy)
    agent_id = world.agent_with("one", "m", slots=8)
    world.cap(agent_id, 1)
    world.ask("r1")
    assert isinstance(answer(world.ask("r2"), "r2"), Wait)
    assert isinstance(answer(world.ask("show", route=Route.SHOW), "show"), Forward), "this needs no slot"
    assert node_of(world.settle("r1"), "r2") is None, "the other one counts too"
    assert node_of(world.settle("show"), "r2") == agent_id


# ---------------------------------------------------------------- loads, unloads and drains


def test_a_load_whose_first_request_leaves_starts_again_for_the_next_one() -> None:
    world = World()
    node = world.backend("one", "m", slots=2)
    world.ask("r1")
    world.ask("r2")
    loading = world.inventory(node).loading
    since = loading[M].since
    world.wait(2)
    world.settle("r1", Ending.CANCELLED)
    assert loading[M].since == since + 2
    world.settle("r2", Ending.CANCELLED)
    assert loading == {}


def test_an_unload_goes_where_the_model_is_and_makes_it_cold() -> None:
    world = World()
    world.backend("cold", "m")
    warm = world.backend("warm", "m", loaded=("m",))
    world.ask("busy")
    assert node_of(world.ask("unload", load_only=True, unload=True), "unload") == warm, "it waits for nobody"
    world.first("unload")
    world.settle("unload")
    inventory = world.inventory(warm)
    assert M not in inventory.resident
    nowhere = World()
    node = nowhere.backend("cold", "m")
    assert node_of(nowhere.ask("unload", load_only=True, unload=True), "unload") == node


def test_an_agent_that_drains_is_out_when_its_last_request_ends() -> None:
    world = World()
    world.register(registration("box"), agent_id="box")
    world.beat("box", installed_models=[row("m")])
    world.ask("r")
    world.beat("box", draining=True)
    assert world.state(AgentId("box")) == "draining"
    world.settle("r")
    assert world.state(AgentId("box")) == "held"
