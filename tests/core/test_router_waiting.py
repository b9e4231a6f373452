"""When those who wait are looked at again, and what they bring about."""

from core.events import (
    Ending,
    Failure,
    Forward,
    Refuse,
    Wait,
)
from core.units import RequestId
from tests.core.routing import World, answer, node_of, of


def test_every_wait_is_answered_in_the_end() -> None:
    world = World(queue_timeout_s=50)
    world.backend("one", "m", loaded=("m",))
    kinds = [type(answer(world.ask(f"r{number}"), f"r{number}")) for number in range(5)]
    assert kinds == [Forward, Wait, Wait, Wait, Wait]
    effects = world.settle("r0") + world.wait(100)
    assert [(forward.request_id, forward.lease.attempt) for forward in of(effects, Forward)] == [("r1", 1), ("r2", 1)], "r1 was lost"
    assert [refuse.request_id for refuse in of(effects, Refuse)] == ["r3", "r4"]


def test_a_busy_node_is_waited_for_and_its_first_byte_lets_the_others_go() -> None:
    world = World(busy_pause_s=4)
    node = world.backend("one", "m", loaded=("m",), slots=3)
    world.ask("r1")
    world.ask("r2")
    assert isinstance(answer(world.busy("r2"), "r2"), Wait)
    (view,) = world.router.waiting()
    assert (view.request_id, view.expected_start_ms, view.waited_ms) == ("r2", None, 0)
    assert node_of(world.first("r1"), "r2") == node
    assert isinstance(answer(world.busy("r2"), "r2"), Wait)
    assert node_of(world.wait(4), "r2") == node
    assert world.router.why(RequestId("r2")) is not None
    assert world.router.why(RequestId("nobody")) is None


def test_a_load_that_is_through_lets_others_load_whoever_began_it() -> None:
    world = World()
    node = world.backend("one", "m", "other", slots=2)
    world.ask("began", "other")
    world.ask("joined", "other")
    assert isinstance(answer(world.ask("r"), "r"), Wait), "the node loads one model at a time"
    world.settle("began", Ending.CANCELLED)
    assert node_of(world.first("joined"), "r") == node


def test_a_request_whose_busy_node_went_away_holds_up_nobody() -> None:
    world = World(eject_after=1)
    busy, sick = world.backend("busy", "m", loaded=("m",)), world.backend("sick", "m", loaded=("m",))
    world.ask("r1")
    world.ask("r2")
    assert isinstance(answer(world.busy("r1"), "r1"), Wait)
    world.ask("r3")
    world.silent(busy)
    assert node_of(world.fail("r2", Failure.DIED), "r1") == sick, "the least bad one is used, since nobody else is left"
    assert node_of(world.serve("r1"), "r3") == sick
