"""Who the nodes are: identity, new runs, names, and what may be one."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.events import (
    Accepted,
    BackendAdded,
    Command,
    Declined,
    Note,
    Registered,
    SettingsChanged,
    Upstream,
)
from core.lifecycle import AgentState
from core.messages import AgentSettings, GpuDevice
from core.names import normalise
from core.registry import Agent, gpu_fault
from core.restoring import agent_of, known_of
from core.units import AgentId
from tests.core.office import TIMEOUT_S, UNIX, Office
from tests.core.routing import one, registration, row

M = normalise("m")


# ---------------------------------------------------------------- introductions


def test_a_trusted_agent_is_registered_and_ready_with_its_first_heartbeat() -> None:
    office = Office()
    effects = office.register()
    assert one(effects, Registered) == Registered(agent_id=AgentId("id1"), status="registered")
    agent = office.agent("id1")
    assert agent.state is AgentState.INITIALIZING
    assert office.registry.awaited()
    assert one(office.beat("id1"), Accepted).send_inventory
    assert agent.state is AgentState.INITIALIZING
    effects = office.beat("id1", installed_models=[row("m")])
    assert one(effects, Accepted) == Accepted(agent_id=agent.id)
    assert one(effects, Note).fields["state"] == "ready"
    assert office.registry.holders(M) == (agent,)
    assert not office.registry.awaited()


def test_registering_again_keeps_id_date_and_settings() -> None:
    office = Office()
    agent = office.ready()
    agent.take_settings(AgentSettings(custom_name="mine", tags=["t"], notes="n", weight=2.0))
    before = (agent.id, agent.registered_at)
    moved = Upstream(host="10.0.0.7", port=5)
    assert one(office.register(registration(ollama_version="9.9"), upstream=moved), Registered).status == "updated"
    assert (agent.id, agent.registered_at) == before
    assert (agent.custom_name, agent.tags, agent.notes, agent.weight) == ("mine", ["t"], "n", 2.0)
    assert (agent.ollama_version, agent.upstream, agent.state) == ("9.9", moved, AgentState.READY)


def test_identity_is_the_instance_else_name_and_port() -> None:
    office = Office()
    statuses = [
        one(office.register(given), Registered).status
        for given in (
            registration("box", instance_id="i1"), registration("box", instance_id="i2"), registration("renamed", instance_id="i1"),
            registration("box"), registration("box", ollama_port=2), registration("box"),
        )
    ]  # fmt: skip
    assert statuses == ["registered", "registered", "updated", "registered", "registered", "updated"]
    assert [agent.name for agent in office.registry.all()] == ["renamed", "box", "box-2", "box-3"]


def test_a_new_run_starts_over_and_an_old_one_changes_nothing() -> None:
    office = Office()
    agent = office.ready(boot=5)
    assert one(office.register(registration(boot=4, ollama_version="old")), Registered).status == "updated"
    assert (agent.ollama_version, agent.state) == ("0.20.0", AgentState.READY)
    office.registry.take_changes()
    office.register(registration(boot=6))
    assert agent.state is AgentState.INITIALIZING
    assert office.registry.changes.reborn == [agent.id]
    assert one(office.beat(agent.id, boot=5, sequence=99), Accepted)
    assert agent.state is AgentState.INITIALIZING, "a heartbeat of the former run"
    office.beat(agent.id, boot=6, sequence=0)
    assert agent.state is AgentState.READY


def test_a_new_run_of_a_gateway_cuts_what_ran_through_the_former_one() -> None:
    office = Office()
    agent = office.ready(boot=5)
    office.registry.take_changes()
    office.register(registration(boot=5))
    assert office.registry.take_changes().lost == [], "the same run introduced itself again"
    office.register(registration(boot=6))
    assert office.registry.take_changes().lost == [(agent.id, "the agent of box started anew")]


def test_a_new_run_beside_a_bare_ollama_cuts_nothing() -> None:
    office = Office()
    bare = Upstream(host="10.0.0.1", port=11434)
    office.register(registration(boot=5), upstream=bare)
    office.registry.take_changes()
    office.register(registration(boot=6), upstream=bare)
    assert office.registry.take_changes().lost == []


def test_a_new_run_is_not_ready_by_the_word_of_the_former_one() -> None:
    office = Office()
    agent = office.ready(boot=1)
    office.register(registration(boot=2))
    office.order(agent, Command.CONNECT)
    assert agent.state is AgentState.INITIALIZING
    office.beat(agent.id, boot=2, sequence=1)
    assert agent.state is AgentState.READY


def test_a_stranger_that_boots_anew_is_known_by_its_newest_run() -> None:
    office = Office()
    office.register(registration(boot=5), trusted=False)
    agent = office.agent("id1")
    office.register(registration(boot=7), trusted=False)
    assert (agent.boot, agent.last_report) == (7, (7, -1))
    heard = agent.last_heard
    office.now += 1
    office.register(registration(boot=6, ollama_version="0.0.1"), trusted=False)
    assert (agent.boot, agent.last_report, agent.last_heard) == (7, (7, -1), heard)
    assert agent.ollama_version != "0.0.1"
    office.beat(agent.id, boot=6, sequence=9)
    assert agent.last_heard == heard
    office.beat(agent.id, boot=7, sequence=1)
    assert agent.last_heard == office.at()


def test_the_same_run_registering_again_brings_an_offline_agent_back_to_initializing() -> None:
    office = Office()
    agent = office.ready()
    office.pass_time(TIMEOUT_S)
    assert agent.state is AgentState.OFFLINE
    office.register()
    assert agent.state is AgentState.INITIALIZING


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"gpu_available": False}, "gpu_available is false"),
        ({"gpu_devices": []}, "gpu_devices is empty"),
        ({"gpu_devices": [GpuDevice(model=" ")]}, "blank model"),
        ({"gpu_devices": [GpuDevice(model="A"), GpuDevice(model="B", count=0)]}, "B has a count of 0"),
    ],
)
def test_the_gpu_rule(fields: dict[str, Any], reason: str) -> None:
    office = Office()
    declined = one(office.register(registration(**fields)), Declined)
    assert declined.status == 403
    assert declined.text.startswith("GPU hardware is required for agent registration: ")
    assert reason in declined.text
    assert "ROUTER_REQUIRE_GPU" in declined.text
    assert office.registry.all() == []
    assert one(office.register(registration(**fields), gpu_exempt=True), Registered)


def test_a_good_gpu_is_no_fault() -> None:
    assert gpu_fault(registration()) is None


# ---------------------------------------------------------------- names and addresses


def test_one_address_is_one_agentless_node() -> None:
    office = Office()
    node = office.backend("plain", port=1)
    event = BackendAdded(agent_id=AgentId("twin"), name="twin", upstream=node.upstream, now_unix=UNIX)
    declined = one(office.registry.backend_added(event, now=office.at()), Declined)
    assert (declined.status, "plain" in declined.text) == (409, True)
    office.backend("plain", port=2)
    assert (node.upstream.port, len(office.registry.all())) == (2, 1)
    assert not office.registry.out(None)


def test_settings_rename_and_names_stay_unique() -> None:
    office = Office()
    one_agent, other = office.ready("a"), office.ready("b")
    settings = SettingsChanged(agent_id=other.id, settings=AgentSettings(custom_name="a"))
    assert one(office.registry.settings(settings), Accepted)
    assert (one_agent.name, other.name) == ("a", "a-2")


@given(st.lists(st.sampled_from(("a", "a-2", "b")), min_size=1, max_size=8))
def test_names_are_unique_whatever_machines_are_called(names: list[str]) -> None:
    office = Office()
    for number, name in enumerate(names):
        office.register(registration(name, ollama_port=number + 1))
    shown = [agent.name for agent in office.registry.all()]
    assert len(set(shown)) == len(names)
    assert shown[0] == names[0]


# ---------------------------------------------------------------- what is asked for often


def test_what_was_asked_before_is_told_anew_when_somebody_is_eligible_no_more() -> None:
    office = Office()
    leaves, stays = office.ready("leaves"), office.ready("stays")
    for _ in range(2):
        assert office.registry.ready() == (leaves, stays)
        assert office.registry.holders(M) == (leaves, stays)
        assert office.registry.out(M) == {}
    office.order(leaves, Command.DISCONNECT)
    for _ in range(2):
        assert office.registry.ready() == (stays,)
        assert office.registry.holders(M) == (stays,)
        assert office.registry.out(M) == {"leaves": "is held: disconnected by an admin"}
    office.beat(stays.id, installed_models=[])
    assert office.registry.holders(M) == ()


def test_names_that_nobody_holds_fill_no_table() -> None:
    office = Office()
    office.ready()
    for number in range(100):
        key = normalise(f"m{number}")
        assert (office.registry.holders(key), office.registry.out(key)) == ((), {})
    assert (office.registry.known_holders, office.registry._out) == ({}, {})


# ---------------------------------------------------------------- agents from before the start


def kept(name: str, number: int, **fields: Any) -> Agent:
    """An agent as a restart gives it back, offline."""
    office = Office()
    office.count = 100 + number - 1
    agent = office.ready(name, **fields)
    known = known_of(agent)
    assert known is not None
    return agent_of(known, slots_default=1, raises=False)


def test_an_agent_from_before_the_start_is_the_owner_of_its_identity() -> None:
    office = Office()
    former = kept("box", 1)
    assert office.registry.restored(former) == []
    assert (office.registry.all(), former.state, former.name) == ([former], AgentState.OFFLINE, "box")
    changes = office.registry.take_changes()
    assert (changes.refreshed, changes.touched) == ([former.id], True)
    assert office.registry.awaited()
    assert one(office.register(), Registered) == Registered(agent_id=former.id, status="updated")
    assert former.state is AgentState.INITIALIZING


def test_an_agent_from_before_the_start_that_was_heard_already_stays_as_it_is_now() -> None:
    office = Office()
    office.count = 100
    present = office.ready("box")
    office.registry.restored(kept("box of old", 1))
    assert office.agent("id101") is present
    assert [agent.name for agent in office.registry.all()] == ["box"]


def test_a_node_without_an_agent_comes_back_and_owns_nobodys_identity() -> None:
    office, before = Office(), Office()
    known = known_of(before.backend("box", port=11434))
    assert known is not None
    office.registry.restored(agent_of(known, slots_default=1, raises=False))
    assert one(office.register(), Registered).status == "registered", "another one, although of the same name"
    assert [agent.name for agent in office.registry.all()] == ["box", "box-2"]


def test_no_more_agents_come_back_than_there_may_be() -> None:
    office = Office(agents_max=1)
    for number in (1, 2):
        office.registry.restored(kept(f"box{number}", number))
    assert [agent.name for agent in office.registry.all()] == ["box1"]
