"""Leases, pulses and cuts: whose requests end although nobody said so."""

import pytest

from core.events import (
    Command,
    Cut,
    Ending,
    Failure,
    Record,
)
from core.names import normalise
from tests.core.routing import World, node_of, of, one

M = normalise("m")


def test_pulses_keep_leases_and_what_is_not_reported_ends_unknown() -> None:
    world = World(lease_ttl_s=30, agent_timeout_s=1000)
    world.backend("one", "m", slots=2)
    world.ask("kept")
    world.ask("lost")
    world.wait(20)
    world.pulse("kept", "nobody")
    effects = world.wait(10)
    assert one(effects, Cut).request_id == "lost"
    record = one(effects, Record)
    assert (record.request_id, record.ending, [attempt.outcome for attempt in record.attempts]) == ("lost", Ending.UNKNOWN, ["unknown"])
    assert of(world.wait(19.9), Record) == []
    assert one(world.wait(0.1), Record).request_id == "kept"


def test_a_lease_that_expires_frees_its_place_for_who_waits() -> None:
    world = World(agent_timeout_s=1000)
    node = world.backend("one", "m")
    world.ask("lost")
    world.ask("waits")
    assert node_of(world.wait(30), "waits") == node
    assert world.inventory(node).loading.keys() == {M}


def test_answers_that_nobody_reports_are_forgotten_in_time() -> None:
    world = World()
    world.ask("r1", "nosuch")
    world.ask("r2", "nosuch")
    world.wait(20)
    world.pulse("r1")
    assert [record.request_id for record in of(world.wait(10), Record)] == ["r2"]
    assert [record.request_id for record in of(world.wait(20), Record)] == ["r1"]
    assert world.router._requests == {}


def test_a_node_that_falls_silent_has_its_requests_cut() -> None:
    world = World(agent_timeout_s=60)
    world.agent_with("one", "m", slots=2)
    world.ask("r1")
    world.ask("r2")
    for _ in range(5):
        world.wait(10)
        world.pulse("r1", "r2")
    effects = world.wait(10)
    assert [(cut.request_id, cut.reason) for cut in of(effects, Cut)] == [
        ("r1", "one was not heard for 60 s"),
        ("r2", "one was not heard for 60 s"),
    ]
    two = world.backend("two", "m", slots=2)
    assert node_of(world.fail("r1", Failure.VANISHED), "r1") == two


def test_bytes_keep_a_node_alive() -> None:
    world = World(agent_timeout_s=60)
    node = world.agent_with("one", "m")
    world.ask("r")
    for _ in range(20):
        world.wait(10)
        world.pulse("r", heard=(node,))
    assert world.state(node) == "ready"


@pytest.mark.parametrize("command", [Command.DISCONNECT_NOW, Command.DELETE])
def test_ordered_away_at_once_cuts(command: Command) -> None:
    world = World()
    node = world.backend("one", "m")
    world.ask("r")
    assert one(world.order(node, command), Cut).request_id == "r"
    world.fail("r", Failure.VANISHED)
    assert world.router.statistics().in_flight == 0


def test_a_drain_cuts_nothing() -> None:
    world = World()
    node = world.backend("one", "m")
    world.ask("r")
    assert of(world.order(node, Command.DRAIN), Cut) == []
    world.first("r")
    world.settle("r")
    assert world.state(node) == "held"
