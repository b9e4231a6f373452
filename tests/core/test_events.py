"""The vocabulary: what routes are, and that events are facts nobody can change."""

import typing

import msgspec
import pytest

from core import events
from core.events import Effect, Event, Protocol, Route


@pytest.mark.parametrize("route", Route)
def test_every_route_has_the_manners_of_its_path(route: Route) -> None:
    expected = {Route.V1_RESPONSES: Protocol.RESPONSES, Route.V1_MESSAGES: Protocol.ANTHROPIC}
    assert route.protocol is expected.get(route, Protocol.OPENAI if route.value.startswith("v1_") else Protocol.NATIVE)


def test_only_two_routes_stream_unless_told_not_to() -> None:
    assert [route for route in Route if route.streams_by_default] == [Route.CHAT, Route.GENERATE]


def test_only_descriptions_need_no_model_in_memory() -> None:
    assert [route for route in Route if not route.runs_model] == [Route.SHOW, Route.V1_MODEL]


@pytest.mark.parametrize("kind", [*typing.get_args(Event), *typing.get_args(Effect)])
def test_events_and_effects_are_frozen_and_named(kind: type[msgspec.Struct]) -> None:
    assert kind.__struct_config__.frozen
    assert all(field.name.isidentifier() for field in msgspec.structs.fields(kind))
    with pytest.raises(TypeError):
        kind("positional")


def test_no_event_is_an_effect() -> None:
    assert not {*typing.get_args(Event)} & {*typing.get_args(Effect)}
    assert {*typing.get_args(events.RequestEffect)} < {*typing.get_args(Effect)}
