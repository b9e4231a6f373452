"""What a report may change, and what it means for those who wait."""

import pytest

from core.events import (
    Accepted,
    AgentCommanded,
    Command,
    Declined,
    NodeSilent,
    Probe,
    SettingsChanged,
    Upstream,
)
from core.lifecycle import AgentState
from core.messages import AgentSettings
from core.names import normalise
from core.registry import Agent
from core.units import AgentId, ModelKey
from tests.core.office import TIMEOUT_S, Office
from tests.core.routing import of, one, row

M = normalise("m")


@pytest.mark.parametrize("report", [(1, 5), (1, 4), (0, 9)])
def test_an_old_or_repeated_report_changes_nothing(report: tuple[int, int]) -> None:
    office = Office()
    agent = office.ready(boot=1)
    office.beat(agent.id, boot=1, sequence=5)
    before = (agent.view(in_flight=0, ejections=[]), office.registry.heard_until(agent.id))
    office.now += 1
    office.beat(agent.id, boot=report[0], sequence=report[1], ollama_ok=False, cpu_usage=99.0, slots=7, draining=True)
    assert (agent.view(in_flight=0, ejections=[]), office.registry.heard_until(agent.id)) == before


def test_reports_without_numbers_of_their_own_always_count() -> None:
    office = Office()
    agent = office.ready()
    for cpu in (5.0, 6.0):
        office.beat(agent.id, cpu_usage=cpu)
        assert agent.cpu_usage == cpu


def test_a_node_whose_ollama_does_not_answer_is_not_ready() -> None:
    office = Office()
    agent = office.ready()
    office.beat(agent.id, ollama_ok=False)
    assert agent.state is AgentState.INITIALIZING
    assert "does not answer" in agent.detail(0)
    assert office.registry.holders(M) == ()
    assert office.registry.out(M) == {"box": "is initializing: its Ollama does not answer"}
    office.beat(agent.id)
    assert office.registry.holders(M) == (agent,)


def test_unknown_agents_are_told_to_register() -> None:
    office = Office()
    stray = AgentId("stray")
    office.registry.heard(stray, now=office.at())
    for effects in (
        office.beat("stray"),
        office.metrics("stray"),
        office.registry.settings(SettingsChanged(agent_id=stray, settings=AgentSettings())),
        office.registry.command(AgentCommanded(agent_id=stray, command=Command.DRAIN), now=office.at()),
    ):
        assert one(effects, Declined).status == 404
    assert office.poll("stray") == []
    assert office.registry.silent(NodeSilent(agent_id=stray, refused=True)) == []


def test_the_seeds_metrics_are_used() -> None:
    office = Office()
    agent = office.ready()
    office.busy[agent.id] = 2
    office.metrics(agent.id, cpu_usage=50.0, memory_usage=60.0, active_requests=5, avg_response_time_ms=70.0)
    assert (agent.cpu_usage, agent.memory_usage, agent.beyond, agent.average_response_time_ms) == (50, 60, 3, 70)
    office.metrics(agent.id, active_requests=1)
    assert (agent.beyond, agent.average_response_time_ms) == (0, 70)


def test_slots_and_models_that_change_are_passed_on() -> None:
    office = Office()
    agent = office.ready()
    office.registry.take_changes()
    office.beat(agent.id, slots=agent.slots, installed_models=[row("m")], loaded_models=[row("m")])
    assert office.registry.take_changes().touched, "who waits for the model may go"
    assert list(agent.inventory.resident) == [M]
    office.beat(agent.id, slots=agent.slots, installed_models=[row("m")], loaded_models=[row("m")])
    assert not office.registry.changes.any
    office.beat(agent.id, slots=4)
    assert (agent.slots, office.registry.take_changes().refreshed) == (4, [agent.id])
    office.beat(agent.id, installed_models=[])
    changes = office.registry.take_changes()
    assert (changes.refreshed, changes.touched, changes.any) == ([agent.id], True, True)
    assert office.registry.holders(M) == ()


def test_an_older_agent_without_lists_has_its_ollama_asked() -> None:
    office = Office()
    office.register(upstream=Upstream(host="10.0.0.1", port=11434))
    assert one(office.beat("id1"), Probe).agent_id == "id1"
    assert office.poll("id1", installed=[row("m")], version="1.0") != []
    agent = office.agent("id1")
    assert (agent.state, agent.ollama_version) == (AgentState.READY, "1.0")
    assert of(office.beat("id1"), Probe) == []
    office.pass_time(TIMEOUT_S)
    office.poll("id1", installed=[row("m")])
    assert agent.state is AgentState.OFFLINE, "its agent is silent: that its Ollama answers is not enough"


def test_a_wrong_inventory_is_asked_for_anew() -> None:
    office = Office()
    agent, plain = office.ready(), office.backend()
    assert office.registry.lacks(agent) == []
    assert one(office.beat(agent.id), Accepted).send_inventory
    assert not one(office.beat(agent.id, installed_models=[row("m")]), Accepted).send_inventory
    assert office.registry.lacks(plain) == [Probe(agent_id=plain.id)]


def test_slots_that_were_told_and_a_context_that_was_trained_are_known() -> None:
    office = Office()
    agent = office.ready()
    assert (agent.slots, agent.slots_told) == (1, False)
    office.beat(agent.id, slots=1, installed_models=[{**row("m"), "details": {"context_length": 4096}}])
    assert (agent.slots, agent.slots_told) == (1, True)
    assert office.registry.trained_context(normalise("m")) == 4096
    assert office.registry.trained_context(normalise("other")) == 0
    assert office.backend("bare", slots=3).slots == 3
    assert office.backend("bare").slots_told, "added again without a word about them"


def victims_of_n(agent: Agent) -> tuple[ModelKey, ...]:
    """What a load of `n` is believed to push out, where `m` is loaded."""
    size = agent.inventory.installed[M].size_bytes
    return agent.room.victims(normalise("n"), {M: size}, size_bytes=size, price=lambda key: 1)


@pytest.mark.parametrize(
    ("then", "pushed_out"),
    [(["n"], (M,)), (["m", "n"], ()), ([], ())],
    ids=["one came and the other went", "both are there", "it went by itself"],
)
def test_where_a_model_came_and_another_one_went_both_do_not_fit(then: list[str], pushed_out: tuple[ModelKey, ...]) -> None:
    office = Office()
    agent = office.ready()
    both = [row("m"), row("n")]
    office.beat(agent.id, installed_models=both, loaded_models=[row("m")])
    office.now += 60
    office.beat(agent.id, installed_models=both, loaded_models=[row(name) for name in then])
    assert victims_of_n(agent) == pushed_out
