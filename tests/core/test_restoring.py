"""What is kept of an agent, the agent made of it, and a router that was given it after a restart."""

import msgspec
import pytest

from core.events import AgentRestored, Command, Forward, Refuse, SettingsChanged, Wait
from core.messages import AgentSettings
from core.restoring import NOT_HEARD, agent_of, known_of
from core.units import AgentId
from tests.core.routing import World, answer, one, registration


def kept(world: World, agent_id: AgentId) -> AgentRestored:
    """What the router keeps of an agent, after a way through a database."""
    known = world.router.known(agent_id)
    assert known is not None
    return msgspec.json.decode(msgspec.json.encode(known), type=AgentRestored)


def settled(world: World, name: str = "box") -> AgentId:
    """An agent with a model, and all that an admin may set."""
    agent_id = world.agent_with(name, "m", slots=4)
    settings = AgentSettings(custom_name="Tower", tags=["fast"], notes="under the desk", weight=2.0, max_concurrent=3)
    world.do(SettingsChanged(agent_id=agent_id, settings=settings))
    return agent_id


SAME = (
    "id", "name", "custom_name", "tags", "notes", "weight", "max_concurrent", "registered_at", "machine_name", "slots", "gpu_devices",
    "installed", "ip_address", "ollama_port",
)  # fmt: skip


def test_ids_names_settings_and_models_survive() -> None:
    before, after = World(), World()
    agent_id = settled(before)
    after.do(kept(before, agent_id))
    old, new = before.router.agent(agent_id), after.router.agent(agent_id)
    assert old is not None
    assert new is not None
    assert {name: getattr(old, name) for name in SAME} == {name: getattr(new, name) for name in SAME}
    assert (new.state, new.detail) == ("offline", NOT_HEARD)


def test_a_model_that_only_a_sleeper_holds_is_awaited_and_then_503_with_its_name() -> None:
    before, after = World(), World()
    agent_id = settled(before)
    after.do(kept(before, agent_id))
    assert isinstance(answer(after.ask("r"), "r"), Wait)
    refusal = one(after.wait(20.0), Refuse)
    assert refusal.status == 503
    assert "Tower" in refusal.text


def test_an_agent_that_is_heard_again_is_the_same_and_serves() -> None:
    before, after = World(), World()
    agent_id = settled(before)
    after.do(kept(before, agent_id))
    assert after.agent_with("box", "m", slots=4) == agent_id
    assert after.state(agent_id) == "ready"
    assert isinstance(answer(after.ask("r"), "r"), Forward)


def test_who_was_heard_before_its_memory_came_back_knows_better() -> None:
    before, after = World(), World()
    agent_id = settled(before)
    known = kept(before, agent_id)
    after.do(known)
    after.agent_with("box", "m", slots=2)
    after.do(known)
    agent = after.router.agent(agent_id)
    assert agent is not None
    assert (agent.state, agent.slots) == ("ready", 2)


@pytest.mark.parametrize("command", [Command.DISCONNECT_NOW, Command.DRAIN])
def test_what_an_admin_took_out_stays_out(command: Command) -> None:
    before, after = World(), World()
    agent_id = settled(before)
    before.order(agent_id, command)
    after.do(kept(before, agent_id))
    assert after.state(agent_id) == "held"


def test_a_node_without_an_agent() -> None:
    before, after = World(), World()
    agent_id = before.backend("plain", "m", slots=1)
    known = kept(before, agent_id)
    assert known.agentless
    after.do(known)
    assert after.state(agent_id) == "offline"
    after.poll(agent_id, installed=[{"name": "m", "digest": "d", "size": 1}], loaded=[])
    assert after.state(agent_id) == "ready"


def test_nothing_is_kept_of_strangers_and_of_nobody() -> None:
    world = World()
    world.register(registration("stranger"), agent_id="pending", trusted=False)
    assert world.router.known(AgentId("pending")) is None
    assert world.router.known(AgentId("nobody")) is None


def test_slots_that_were_never_told_are_the_defaults_again() -> None:
    world = World()
    agent_id = world.agent_with("box", "m", slots=None)
    known = kept(world, agent_id)
    assert known.slots is None
    assert agent_of(known, slots_default=7, raises=True).slots == 7
    assert known_of(agent_of(known, slots_default=7, raises=False)) == msgspec.structs.replace(known, installed=known.installed)
