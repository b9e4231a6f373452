"""What a name stands for, which of its models is asked for, and how names are listed."""

from typing import Any

import pytest

from core.aliases import ALIAS_FIELD, Aliases, turn
from core.events import Failure, Forward, Refuse, Route
from core.names import normalise
from core.units import ModelKey
from tests.core.routing import World, one

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


def test_a_request_turns_once_and_forgets_who_was_tried_for_the_other_model() -> None:
    world = World()
    world.backend("one", "small:7b")
    effects = world.ask("r1", "big:30b", others=("none:1b", "small:7b"))
    assert one(effects, Forward).model == "small:7b"
    assert one(world.fail("r1", Failure.DIED), Refuse).status == 502
    assert one(world.ask("r2", "big:30b", others=("none:1b",)), Refuse).text == "model 'big:30b' not found"
    one(world.ask("r3", "small:7b", others=("none:1b",), route=Route.SHOW), Forward)
    world.backend("two", "none:1b")
    assert one(world.ask("r4", "big:30b", others=("none:1b",), route=Route.SHOW), Forward).lease.agent_name == "two"
    assert one(world.fail("r3", Failure.DIED), Refuse).status == 502
