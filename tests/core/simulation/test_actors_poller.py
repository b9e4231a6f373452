"""Polled nodes: added at the start, asked in time, silent when they are."""

import msgspec
import pytest

from core.events import BackendAdded, NodePolled, NodeSilent
from core.simulation import script
from core.simulation.script import Heal
from tests.core.simulation.test_actors_shell import of, watched
from tests.core.simulation.worlds import CALM, asks, drawn, played

BARE = msgspec.structs.replace(CALM, agentless=2, check_s=10.0)


def test_a_node_without_an_agent_serves() -> None:
    world = played(asks(6), BARE)
    seen = watched(world)
    assert world.run(10_000).passed
    polled = of(NodePolled, seen)
    assert {node.alive for node in polled} == {True, False}
    assert world.checkers.settled == 6
    assert all(record.status == 200 for record in world.checkers.records)


@pytest.mark.parametrize("silent", [True, False])
def test_a_node_that_died_is_found_out_and_found_again(silent: bool) -> None:
    world = played([(5.0, script.Crash(node=0, for_s=20.0, silent=silent)), *asks(3, start_s=40.0)], BARE)
    seen = watched(world)
    assert world.run(10_000).passed
    assert any(event.refused for event in of(NodeSilent, seen))
    assert [record.status for record in world.checkers.records] == [200] * 3


def test_one_that_stands_still_does_not_answer_in_time() -> None:
    world = played([(5.0, script.Pause(node=0, for_s=50.0))], BARE)
    seen = watched(world)
    assert world.run(10_000).passed
    assert [event.refused for event in of(NodeSilent, seen)] == [False]


def test_a_new_coordinator_polls_anew_and_old_answers_reach_nobody() -> None:
    slow = msgspec.structs.replace(BARE, delay_s=0.5)
    world = played([(5.0, script.Restart(for_s=0.1)), *asks(2, start_s=20.0), (40.0, Heal(survivors=(0, 1)))], slow)
    assert world.run(20_000).passed
    assert world.shell.generation == 2


def test_a_refusal_that_comes_after_a_restart_reaches_nobody() -> None:
    cut = script.Partition(nodes=(0, 1), for_s=60.0)
    world = played([(5.0, cut), (12.0, script.Restart(for_s=0.1)), (14.0, script.Restart(for_s=9.0))], BARE)
    assert world.run(20_000).passed


def test_deleted_ones_are_added_again_when_the_world_is_healed() -> None:
    world = played([(5.0, script.Order(node=0, command="delete")), (10.0, Heal(survivors=(0, 1)))], BARE)
    assert world.poller._by_id
    world.shell.probe(next(iter(world.shell.ids.values())))
    world.shell.probe(type(next(iter(world.shell.ids.values())))("nobody"))
    assert world.run(20_000).passed
    assert len(world.checkers.book.agents) == 2


def test_backends_are_added_once_per_coordinator() -> None:
    world = played([], msgspec.structs.replace(CALM, agentless=1))
    seen = watched(world)
    world.poller.stop()
    world.shell.crash()
    world._restart()
    assert len(of(BackendAdded, seen)) == 1


@pytest.mark.parametrize("seed", range(30))
def test_in_all_weathers(seed: int) -> None:
    world = drawn(seed)
    if world.options.agentless:
        verdict = world.run(400)
        assert verdict.passed, verdict
