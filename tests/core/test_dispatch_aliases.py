"""A request that several models may answer: which of them it goes to, also when nodes come and go."""

from core.events import Effect, Failure, Forward, Record, Refuse, Wait
from tests.core.routing import World, answer, node_of, one, row


def named(effects: list[Effect]) -> tuple[str | None, str]:
    """What the node is to be told, and which node."""
    forward = one(effects, Forward)
    return forward.model, forward.lease.agent_name


def test_a_request_goes_to_the_first_model_that_is_held() -> None:
    world = World()
    world.backend("one", "small:7b")
    assert named(world.ask("r1", "big:30b", others=("none:1b", "small:7b"))) == ("small:7b", "one")
    record = one(world.serve("r1"), Record)
    assert record.model == "small:7b"
    world.backend("two", "big:30b")
    assert named(world.ask("r2", "big:30b", others=("small:7b",))) == (None, "two")


def test_a_node_that_lost_the_model_may_serve_the_next() -> None:
    world = World()
    two = world.backend("two", "big:30b", "small:7b")
    world.ask("r1", "big:30b", others=("small:7b",))
    world.poll(two, installed=[row("small:7b")])
    assert named(world.fail("r1", Failure.DIED)) == ("small:7b", "two")


def test_refused_everywhere_it_turns_to_the_next_model() -> None:
    world = World()
    world.backend("big", "big:30b")
    world.backend("small", "small:7b")
    world.ask("r1", "big:30b", others=("small:7b",))
    assert named(world.fail("r1", Failure.REFUSED)) == ("small:7b", "small")


def test_who_waits_for_the_first_when_it_vanishes_waits_for_the_next() -> None:
    world = World()
    big = world.backend("big", "big:30b", loaded=("big:30b",))
    small = world.backend("small", "small:7b", loaded=("small:7b",))
    world.ask("r1", "big:30b")
    world.ask("r2", "small:7b")
    assert isinstance(answer(world.ask("r3", "big:30b", others=("small:7b",)), "r3"), Wait)
    world.silent(big)
    assert world.router.waiting()[0].model == "small:7b"
    assert node_of(world.serve("r2"), "r3") == small


def test_when_none_is_held_the_answer_is_about_the_first() -> None:
    world = World()
    world.backend("one", "other:1b")
    refused = one(world.ask("r1", "big:30b", others=("small:7b",)), Refuse)
    assert (refused.status, refused.text) == (404, "model 'big:30b' not found")
    asleep = world.backend("asleep", "small:7b")
    world.silent(asleep)
    refused = one(world.ask("r2", "big:30b", others=("small:7b",)), Refuse)
    assert refused.status == 503
    assert "model 'small:7b' is only on nodes" in refused.text
