"""What is said, or waited for, when no node may have a request."""

from core.events import Forward, Refuse, Route, Wait
from tests.core.routing import World, answer, node_of, of, row, three


def test_a_model_that_nobody_ever_listed_is_unknown() -> None:
    world, _ = three()
    refuse = answer(world.ask("r", "nosuch"), "r")
    assert isinstance(refuse, Refuse)
    assert (refuse.status, refuse.text) == (404, "model 'nosuch' not found")


def test_sleeping_holders_are_named() -> None:
    world = World()
    for number in range(7):
        world.silent(world.backend(f"n{number}", "m"))
    world.backend("awake", "other")
    refuse = answer(world.ask("r"), "r")
    assert isinstance(refuse, Refuse)
    assert (refuse.status, refuse.retry_after_s) == (503, 8)
    assert "n0, n1, n2, n3, n4 and 2 more" in refuse.text


def test_a_holder_that_starts_is_waited_for() -> None:
    world = World()
    world.agent_with("one", "m")
    world.beat("one", ollama_ok=False, sequence=2)
    effects = world.ask("r")
    waits = answer(effects, "r")
    assert isinstance(waits, Wait)
    assert waits.why == "waits for one, which is starting"
    assert node_of(world.beat("one", sequence=3), "r") == "one"


def test_those_who_wait_for_a_node_that_vanishes_move_on() -> None:
    world = World()
    node = world.backend("one", "m")
    world.ask("r1")
    world.ask("r2")
    refuse = answer(world.silent(node), "r2")
    assert isinstance(refuse, Refuse)
    assert "one" in refuse.text


def test_after_a_start_known_nodes_are_waited_for() -> None:
    world = World(startup_grace_s=15)
    late = world.late_backend("late")
    assert isinstance(answer(world.ask("r1"), "r1"), Wait)
    assert isinstance(answer(world.ask("r2", None), "r2"), Wait)
    forwards: list[Forward] = []
    world.watch = lambda effects: forwards.extend(of(effects, Forward))
    world.poll(late, installed=[row("m")], loaded=[])
    assert sorted(forward.request_id for forward in forwards) == ["r1", "r2"]
    refuse = answer(world.ask("r3", "nosuch"), "r3")
    assert isinstance(refuse, Refuse), "everybody was heard"


def test_but_not_for_ever() -> None:
    world = World(startup_grace_s=15)
    world.late_backend("late")
    world.ask("r1")
    world.ask("r2", None)
    effects = world.wait(14.9)
    assert of(effects, Refuse) == []
    effects = world.wait(0.1)
    assert [(refuse.request_id, refuse.status) for refuse in of(effects, Refuse)] == [("r1", 404), ("r2", 400)]


def test_a_body_whose_model_cannot_be_read_goes_to_any_ready_node() -> None:
    world, nodes = three()
    for number, model in enumerate((None, "", "not a name!")):
        assert node_of(world.ask(f"r{number}", model), f"r{number}") in nodes
    empty = World()
    refuse = answer(empty.ask("r", None, route=Route.GENERATE), "r")
    assert isinstance(refuse, Refuse)
    assert (refuse.status, refuse.text) == (404, "model '' not found")


def test_nodes_that_an_edge_tried_already_are_left_out() -> None:
    world, nodes = three()
    assert node_of(world.ask("r", excluded=tuple(nodes[:2])), "r") == nodes[2]
    refuse = answer(world.ask("none", excluded=tuple(nodes)), "none")
    assert isinstance(refuse, Refuse)
    assert refuse.status == 502


def test_those_who_wait_for_a_model_that_vanishes_turn_to_the_next_one_together() -> None:
    world = World()
    big, small = world.backend("big", "m", loaded=("m",)), world.backend("small", "n", loaded=("n",))
    world.ask("on big")
    world.ask("on small", "n")
    for number in range(3):
        assert isinstance(answer(world.ask(f"r{number}", others=("n",)), f"r{number}"), Wait)
    world.ask("stays")
    refused = of(world.silent(big), Refuse)
    assert [refuse.request_id for refuse in refused] == ["stays"], "it named no other model"
    assert [(view.request_id, view.model) for view in world.router.waiting()] == [("r0", "n"), ("r1", "n"), ("r2", "n")]
    assert node_of(world.settle("on small"), "r0") == small
