"""When a node is gone, and what brings it back."""

from hypothesis import given
from hypothesis import strategies as st

from core.events import (
    Command,
    NodeSilent,
    Note,
    Probe,
)
from core.lifecycle import AgentState
from core.names import normalise
from core.units import Instant
from tests.core.office import TIMEOUT_S, UNIX, Office
from tests.core.routing import one, row

M = normalise("m")


@given(st.lists(st.integers(1, 500), max_size=8))
def test_offline_exactly_at_the_deadline(eighths: list[int]) -> None:
    office = Office()
    agent = office.ready()
    last = office.now
    for step in eighths:
        gap = step / 8
        office.now += gap
        due = last + TIMEOUT_S <= office.now
        office.registry.expire(now=office.at())
        assert (agent.state is AgentState.OFFLINE) == due
        office.beat(agent.id)
        assert agent.state is AgentState.READY
        last = office.now
    assert office.registry.next_deadline() == last + TIMEOUT_S
    office.now = last + TIMEOUT_S - 1 / 8
    assert office.registry.expire(now=office.at()) == []
    note = one(office.pass_time(1 / 8), Note)
    assert (note.level, note.fields["why"]) == ("warning", "was not heard for 60 s")
    assert office.registry.take_changes().lost[-1] == (agent.id, "box was not heard for 60 s")


def test_bytes_of_an_answer_count_as_heard_unless_the_node_is_offline() -> None:
    office = Office()
    agent = office.ready()
    office.now += 50
    office.registry.heard(agent.id, now=office.at())
    assert agent.last_seen == UNIX + 50_000
    office.pass_time(59)
    assert agent.state is AgentState.READY
    office.pass_time(1)
    office.registry.heard(agent.id, now=office.at())
    assert agent.state is AgentState.OFFLINE


def test_an_agentless_node_is_offline_at_once_when_refused_and_back_at_its_first_answer() -> None:
    office = Office()
    node = office.backend()
    assert office.registry.silent(NodeSilent(agent_id=node.id, refused=False)) == []
    assert node.state is AgentState.READY
    assert one(office.registry.silent(NodeSilent(agent_id=node.id, refused=True)), Probe).agent_id == node.id
    assert (node.state, node.detail(0)) == (AgentState.OFFLINE, "refuses connections")
    assert office.registry.silent(NodeSilent(agent_id=node.id, refused=True)) == []
    office.poll("plain", loaded=[row("m")], alive=False)
    assert node.state is AgentState.OFFLINE, "what is loaded is no sign of life"
    office.poll("plain", version="1.0")
    assert node.state is AgentState.READY


def test_a_held_node_that_refuses_connections_is_not_ready_when_it_is_connected() -> None:
    office = Office()
    node = office.backend()
    office.order(node, Command.DRAIN)
    office.registry.silent(NodeSilent(agent_id=node.id, refused=True))
    assert (node.state, node.detail(0)) == (AgentState.HELD, "drained for maintenance")
    office.order(node, Command.CONNECT)
    assert node.state is AgentState.OFFLINE
    office.poll("plain", version="1.0")
    assert node.state is AgentState.READY


def test_polls_of_what_is_loaded_do_not_keep_a_node_alive() -> None:
    office = Office()
    node = office.backend()
    office.now += 59
    office.poll("plain", loaded=[row("m")], alive=False, asked_at=Instant(office.now))
    assert list(node.inventory.resident) == [M]
    office.pass_time(1)
    assert node.state is AgentState.OFFLINE


def test_a_refusal_says_nothing_of_an_agent_that_is_heard() -> None:
    office = Office()
    agent = office.ready()
    assert office.registry.refused(agent) == []
    assert agent.state is AgentState.READY


def test_an_agentless_node_before_its_first_answer() -> None:
    office = Office()
    node = office.backend(poll=False, slots=3)
    assert (node.state, node.slots, office.registry.awaited()) == (AgentState.OFFLINE, 3, True)
    assert office.poll("plain", version="1.0") != []
    assert node.state is AgentState.INITIALIZING
    assert office.registry.awaited()


def test_a_deadline_is_told_as_long_as_there_is_one() -> None:
    office = Office()
    agent = office.ready()
    assert office.registry.deadlines.until(agent.id) == office.registry.heard_until(agent.id) == office.now + TIMEOUT_S
    office.pass_time(TIMEOUT_S)
    assert (len(office.registry.deadlines), office.registry.heard_until(agent.id)) == (0, None)
