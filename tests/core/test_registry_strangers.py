"""Trust: what a stranger may do, who lets it in, and how many there may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.events import (
    Accepted,
    BackendAdded,
    Command,
    Declined,
    Registered,
    Upstream,
)
from core.lifecycle import AgentState
from core.messages import AgentSettings
from core.names import normalise
from core.registry import PENDING_SHARE
from core.units import AgentId
from tests.core.office import TIMEOUT_S, UNIX, Office
from tests.core.routing import one, registration, row

M = normalise("m")


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
