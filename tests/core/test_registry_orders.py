"""An admin's orders and settings, and an agent that stops by itself."""

import pytest

from core.events import (
    Accepted,
    Command,
    Declined,
    Registered,
)
from core.lifecycle import AgentState
from core.units import AgentId
from tests.core.office import TIMEOUT_S, Office
from tests.core.routing import one, registration


def test_maintenance_lets_requests_end_and_comes_back_by_connect() -> None:
    office = Office()
    agent = office.ready()
    office.busy[agent.id] = 1
    office.order(agent, Command.DRAIN)
    assert (agent.state, office.registry.ready()) == (AgentState.DRAINING, ())
    office.beat(agent.id)
    assert agent.state is AgentState.DRAINING, "a heartbeat does not end it"
    office.busy[agent.id] = 0
    office.registry.emptied(agent)
    assert (agent.state, agent.detail(0)) == (AgentState.HELD, "drained for maintenance")
    office.beat(agent.id)
    assert agent.state is AgentState.HELD
    office.order(agent, Command.CONNECT)
    assert agent.state is AgentState.READY, "it was heard well in time"


def test_an_idle_agent_is_out_at_once_and_a_higher_boot_brings_it_back() -> None:
    office = Office()
    agent = office.ready(boot=1)
    office.order(agent, Command.DISCONNECT)
    assert (agent.state, agent.detail(0)) == (AgentState.HELD, "disconnected by an admin")
    office.register(registration(boot=1))
    assert agent.state is AgentState.HELD
    office.register(registration(boot=2))
    office.beat(agent.id, boot=2, sequence=1)
    assert agent.state is AgentState.READY


def test_disconnect_now_cuts() -> None:
    office = Office()
    agent = office.ready()
    office.busy[agent.id] = 3
    office.registry.take_changes()
    office.order(agent, Command.DISCONNECT_NOW)
    assert (agent.state, office.registry.take_changes().lost) == (AgentState.HELD, [(agent.id, "box disconnected by an admin")])
    office.pass_time(TIMEOUT_S)
    assert agent.detail(0) == "disconnected by an admin", "silence is no news then"
    office.order(agent, Command.CONNECT)
    assert agent.state is AgentState.OFFLINE
    office.beat(agent.id)
    assert agent.state is AgentState.READY


def test_a_draining_node_that_falls_silent_stays_out_for_its_reason() -> None:
    office = Office()
    agent = office.ready()
    office.busy[agent.id] = 1
    office.order(agent, Command.DRAIN)
    office.pass_time(TIMEOUT_S)
    assert (agent.state, agent.detail(0)) == (AgentState.HELD, "drained for maintenance")
    assert office.registry.changes.lost[-1][1] == "box was not heard for 60 s"


def test_an_agent_that_stops_drains_itself_and_may_change_its_mind() -> None:
    office = Office()
    agent = office.ready()
    office.busy[agent.id] = 1
    office.beat(agent.id, draining=True)
    office.beat(agent.id, draining=True)
    assert (agent.state, agent.detail(1)) == (AgentState.DRAINING, "its agent is stopping; 1 of its requests is still running")
    office.beat(agent.id)
    assert agent.state is AgentState.READY
    office.busy[agent.id] = 0
    office.beat(agent.id, draining=True)
    assert agent.state is AgentState.HELD


def test_connect_changes_nothing_for_those_that_are_not_out() -> None:
    office = Office()
    agent, node = office.ready(), office.backend(poll=False)
    for each in (agent, node):
        before = each.state
        assert office.order(each, Command.CONNECT) == [Accepted(agent_id=each.id)]
        assert each.state is before


@pytest.mark.parametrize("command", [Command.DRAIN, Command.DISCONNECT, Command.DISCONNECT_NOW, Command.CONNECT])
def test_nothing_but_approval_and_deletion_can_be_ordered_of_a_stranger(command: Command) -> None:
    office = Office()
    office.register(trusted=False)
    assert one(office.order(office.agent("id1"), command), Declined).status == 409
    assert one(office.order(office.agent("id1"), Command.DELETE), Accepted)
    assert office.registry.get(AgentId("id1")) is None
    assert one(office.register(trusted=False), Registered).agent_id == "id2"


def test_a_deleted_agent_is_gone_and_may_register_again() -> None:
    office = Office()
    agent = office.ready()
    office.registry.take_changes()
    office.order(agent, Command.DELETE)
    changes = office.registry.take_changes()
    assert (changes.forgotten, changes.lost) == ([agent.id], [(agent.id, "box was deleted")])
    assert (office.registry.all(), office.registry.next_deadline()) == ([], None)
    assert one(office.beat(agent.id), Declined).status == 404
    assert one(office.register(), Registered).status == "registered"
