"""A begun answer whose rest is asked of another node: once, of a node that was not tried, and never in doubt."""

from typing import Any

import pytest

from core.errors import LocalError
from core.events import Count, Ending, Failure, Note, Record, Refuse
from tests.core.routing import World, node_of, of, one, row, usage


def broken(world: World, **more: Any) -> list[Any]:
    """The answer to r1 breaks off in mid-stream, and its rest is asked for."""
    world.first("r1")
    return world.fail("r1", Failure.DIED, text="cut", resume=True, **more)


def test_the_rest_is_asked_of_another_node_once() -> None:
    world = World()
    nodes = {world.backend(name, "m", loaded=("m",)) for name in ("one", "two", "three")}
    first = node_of(world.ask("r1"), "r1")
    effects = broken(world)
    second = node_of(effects, "r1")
    assert second in nodes - {first}
    assert [note.event for note in of(effects, Note)] == ["attempt failed", "the rest of an answer is asked of another node"]
    assert "resumes_total" in [count.name for count in of(effects, Count)]
    world.first("r1")
    with pytest.raises(LocalError, match="no attempt of it can have failed"):
        world.fail("r1", Failure.DIED, resume=True)
    record = one(world.settle("r1", usage=usage()), Record)
    assert (record.ending, [attempt.outcome for attempt in record.attempts]) == (Ending.SUCCESS, ["died", "success"])
    assert record.agent_id == second


def test_a_second_node_that_cannot_begin_is_followed_by_a_third() -> None:
    world = World()
    for name in ("one", "two", "three"):
        world.backend(name, "m", loaded=("m",))
    world.ask("r1")
    broken(world)
    assert node_of(world.fail("r1", Failure.REFUSED), "r1") is not None


def test_without_another_node_there_is_no_rest() -> None:
    world = World()
    world.backend("one", "m", loaded=("m",))
    world.ask("r1")
    assert one(broken(world), Refuse).status == 502
    world.settle("r1", Ending.ERROR, message="cut")


def test_a_model_that_may_have_thought_is_in_doubt() -> None:
    world = World()
    for name in ("one", "two"):
        agent_id = world.backend(name, "m", loaded=("m",))
        world.poll(agent_id, installed=[{**row("m"), "capabilities": ["completion", "thinking"]}])
    world.ask("r1")
    assert of(broken(world, thinks_unasked=True), Refuse)
    world.settle("r1", Ending.ERROR)
    world.ask("r1")
    assert node_of(broken(world, thinks_unasked=False), "r1") is not None
