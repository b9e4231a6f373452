"""What a name stands for, which of its models is asked for, and how names are listed; in the router too."""

from typing import Any

import pytest

from core.aliases import ALIAS_FIELD, Aliases, turn
from core.events import Effect, Failure, Forward, Record, Refuse, Wait
from core.names import normalise
from core.units import ModelKey
from tests.core.routing import World, answer, node_of, one, row

TABLE = (("claude-sonnet", ("big:30b", "small:7b")), ("GPT 4", ("small:7b",)), ("small:7b", ("big:30b",)))


def listed(*names: str) -> list[tuple[ModelKey, dict[str, Any]]]:
    return [(normalise(name), {"name": name, "model": name, "size": number}) for number, name in enumerate(names)]


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("claude-sonnet", ("big:30b", "small:7b")),
        ("Claude-Sonnet:latest", ("big:30b", "small:7b")),
        ("library/claude-sonnet", ("big:30b", "small:7b")),
        ("claude-sonnet:v2", ()),
        ("GPT 4", ("small:7b",)),
        ("gpt 4", ()),
        ("small:7b", ("big:30b",)),
        (None, ()),
        ("", ()),
    ],
)
def test_a_name_is_compared_as_a_models_is(name: str | None, models: tuple[str, ...]) -> None:
    assert Aliases(TABLE).models(name) == models


def test_none_are_nothing() -> None:
    assert not Aliases()
    assert Aliases(TABLE)
    assert Aliases().listed(listed("a")) == listed("a")


def test_an_alias_is_listed_behind_the_model_it_stands_for_now() -> None:
    rows = Aliases(TABLE).listed(listed("other:1b", "small:7b"))
    assert [(row["name"], row.get(ALIAS_FIELD), row["size"]) for _, row in rows] == [
        ("other:1b", None, 0),
        ("claude-sonnet", ["big:30b", "small:7b"], 1),
        ("GPT 4", ["small:7b"], 1),
    ]


def test_no_list_has_a_name_twice() -> None:
    rows = Aliases(TABLE).listed(listed("big:30b", "small:7b"))
    assert [(row["name"], row["size"]) for _, row in rows] == [("big:30b", 0), ("claude-sonnet", 0), ("small:7b", 0), ("GPT 4", 1)]
    assert len({key for key, _ in rows}) == len(rows)


@pytest.mark.parametrize(
    ("held", "known", "at"),
    [
        (["b", "c"], ["a", "b", "c"], 0),
        (["c"], ["a", "b", "c"], 1),
        ([], ["a", "b", "c"], None),
        ([], ["c"], 1),
        ([], [], None),
        (["x:cloud"], [], None),
    ],
)
def test_the_next_is_the_first_that_a_ready_node_holds(held: list[str], known: list[str], at: int | None) -> None:
    holding, listing = {normalise(name) for name in held}, {normalise(name) for name in known}
    others = ("b", "c", "x:cloud", "not a name")
    assert turn(normalise("a"), others, held=holding.__contains__, listed=listing.__contains__) == at


def test_a_name_that_is_none_turns_to_what_somebody_lists() -> None:
    assert turn(None, ("b",), held=lambda key: False, listed=lambda key: True) == 0


# ---------------------------------------------------------------- in the router


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
