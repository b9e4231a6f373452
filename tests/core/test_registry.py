"""Who the nodes are: identity and trust, what a message may change, and when a node is gone."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.events import (
    Accepted,
    AgentCommanded,
    BackendAdded,
    Command,
    Declined,
    NodeSilent,
    Note,
    Probe,
    Registered,
    SettingsChanged,
    Upstream,
)
from core.lifecycle import AgentState
from core.messages import AgentSettings, GpuDevice
from core.names import normalise
from core.registry import PENDING_SHARE, gpu_fault
from core.units import AgentId, Instant
from tests.core.office import TIMEOUT_S, UNIX, Office
from tests.core.routing import of, one, registration, row

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


# ---------------------------------------------------------------- strangers


def test_a_stranger_waits_and_gets_nothing_until_it_is_approved() -> None:
    office = Office()
    pending = one(office.register(trusted=False), Registered)
    assert (pending.status, pending.code) == ("pending", "CODE1")
    agent = office.agent(pending.agent_id)
    assert one(office.beat(agent.id, installed_models=[row("m")]), Accepted).status == "pending"
    assert one(office.metrics(agent.id), Accepted).status == "pending"
    assert office.poll(agent.id, installed=[row("m")]) == []
    assert office.registry.ready() == ()
    assert office.registry.listed_by(M) == []
    again = one(office.register(trusted=False), Registered)
    assert (again.agent_id, again.code) == (agent.id, "CODE1"), "it asks again and keeps its code"
    office.pass_time(10 * TIMEOUT_S)
    assert agent.state is AgentState.PENDING
    assert one(office.order(agent, Command.APPROVE), Accepted)
    assert (agent.state, agent.code) == (AgentState.INITIALIZING, None)
    office.beat(agent.id, installed_models=[row("m")])
    assert office.registry.holders(M) == (agent,)
    assert office.order(agent, Command.APPROVE) == [Accepted(agent_id=agent.id)], "done already"


def test_a_stranger_that_proves_itself_is_let_in() -> None:
    office = Office()
    office.register(trusted=False)
    assert one(office.register(trusted=True), Registered) == Registered(agent_id=AgentId("id1"), status="updated")
    assert office.agent("id1").state is AgentState.INITIALIZING


@pytest.mark.parametrize("identity", [{}, {"instance_id": "secret"}])
@given(boot=st.integers(0, 10), known_as=st.sampled_from((None, "nobody", "id2")))
def test_an_untrusted_registration_never_changes_an_approved_agent(identity: dict[str, str], boot: int, known_as: str | None) -> None:
    office = Office()
    agent = office.ready(boot=3, **identity)
    before = agent.view(in_flight=0, ejections=[])
    evil = Upstream(host="6.6.6.6", port=6)
    given_as = None if known_as is None else AgentId(known_as)
    answer = one(office.register(registration(boot=boot, slots=9, **identity), trusted=False, upstream=evil, known_as=given_as), Registered)
    assert (answer.status, answer.agent_id != agent.id) == ("pending", True)
    assert agent.view(in_flight=0, ejections=[]) == before
    assert office.registry.ready() == (agent,)


def test_an_agent_with_its_own_token_is_known_without_other_trust() -> None:
    office = Office()
    agent = office.ready(boot=1)
    moved = Upstream(host="10.0.0.9", port=9)
    answer = one(office.register(registration(boot=2), trusted=False, known_as=agent.id, upstream=moved), Registered)
    assert (answer.agent_id, answer.status, agent.upstream) == (agent.id, "updated", moved)


def test_an_approved_stranger_replaces_an_agent_of_its_identity_that_is_away_and_not_one_that_is_there() -> None:
    office = Office()
    former = office.ready()
    former.take_settings(AgentSettings(custom_name="mine"))
    office.register(trusted=False)
    stranger = office.agent("id2")
    declined = one(office.order(stranger, Command.APPROVE), Declined)
    assert (declined.status, "mine" in declined.text or "box" in declined.text) == (409, True)
    assert one(office.register(trusted=True), Registered).agent_id == former.id, "the identity is still the former's"
    office.pass_time(TIMEOUT_S)
    assert one(office.order(stranger, Command.APPROVE), Accepted)
    assert office.registry.get(former.id) is None
    assert (stranger.custom_name, stranger.state) == ("mine", AgentState.INITIALIZING)
    assert one(office.register(trusted=True), Registered).agent_id == stranger.id


def test_a_trusted_registration_of_a_stranger_whose_identity_is_taken_goes_to_the_owner() -> None:
    office = Office()
    office.register(registration(instance_id="i"), trusted=False)
    office.register(registration(instance_id="i"), trusted=True, upstream=Upstream(host="10.0.0.3", port=3))
    office.beat("id2", installed_models=[])
    assert one(office.register(registration(instance_id="i"), trusted=True), Registered).agent_id == "id2"
    assert office.agent("id1").state is AgentState.PENDING


def test_strangers_are_few_and_make_room() -> None:
    office = Office(agents_max=8)
    for number in range(8 // PENDING_SHARE):
        office.register(registration(f"s{number}"), trusted=False)
    declined = one(office.register(registration("one more"), trusted=False), Declined)
    assert declined.status == 503
    office.now += TIMEOUT_S + 1
    assert one(office.register(registration("later"), trusted=False), Registered).status == "pending"
    assert [agent.machine_name for agent in office.registry.all()] == ["s1", "later"], "the one that was silent longest went"
    for number in range(6):
        office.register(registration(f"t{number}"))
    assert len(office.registry.all()) == 8
    assert one(office.register(registration("trusted")), Registered).status == "registered"
    assert len(office.registry.all()) == 8
    office.register(registration("trusted too"))
    assert one(office.register(registration("too many")), Declined).status == 503
    event = BackendAdded(agent_id=AgentId("b"), name="b", upstream=Upstream(host="h", port=1), now_unix=UNIX)
    assert isinstance(office.registry.backend_added(event, now=office.at())[0], Declined)


# ---------------------------------------------------------------- reports


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


# ---------------------------------------------------------------- silence


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


def test_one_address_is_one_agentless_node() -> None:
    office = Office()
    node = office.backend("plain", port=1)
    event = BackendAdded(agent_id=AgentId("twin"), name="twin", upstream=node.upstream, now_unix=UNIX)
    declined = one(office.registry.backend_added(event, now=office.at()), Declined)
    assert (declined.status, "plain" in declined.text) == (409, True)
    office.backend("plain", port=2)
    assert (node.upstream.port, len(office.registry.all())) == (2, 1)
    assert not office.registry.out(None)


# ---------------------------------------------------------------- orders


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
