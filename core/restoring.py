"""What is known of a node that should outlive the coordinator, as one value: taken from an agent, and made into one again.

Decides what of an agent is lasting: who it is, what an admin set, what it last held. What it does at the moment is not. Invariants: an
agent made of what was kept is offline until it is heard, or held when it was; its models count as those of a sleeping node and are asked
for anew.
"""

from typing import Final

from core.agents import Agent
from core.events import AgentRestored
from core.lifecycle import AgentInput, AgentState

NOT_HEARD: Final = "was not heard since the coordinator started"


_SAME: Final = tuple(name for name in AgentRestored.__struct_fields__ if name not in ("agent_id", "upstream", "held", "slots", "installed"))


def known_of(agent: Agent) -> AgentRestored | None:
    """What is kept of `agent`; None: nothing, it waits for approval."""
    if agent.state is AgentState.PENDING:
        return None
    return AgentRestored(
        agent_id=agent.id,
        upstream=agent.upstream,
        held=agent.state in (AgentState.HELD, AgentState.DRAINING) and not agent.drained_by_itself,
        slots=agent.slots if agent.slots_told else None,
        installed=agent.inventory.installed_rows,
        **{name: getattr(agent, name) for name in _SAME},
    )


def agent_of(known: AgentRestored, *, slots_default: int, raises: bool) -> Agent:
    """The agent that `known` was taken of, not heard yet. `slots_default`, `raises`: as the configuration says."""
    agent = Agent(known.agent_id, known.upstream, state=AgentState.OFFLINE, now_unix=known.registered_at)
    for name in _SAME:
        setattr(agent, name, getattr(known, name))
    agent.slots = slots_default
    if known.slots is not None:
        agent.told_slots(known.slots)
    agent.last_report = (known.boot, -1)
    agent.inventory.raises = raises
    agent.inventory.report_installed(known.installed)
    agent.inventory.known = False
    agent.wants_inventory = True
    agent.measure_room()
    agent.why = NOT_HEARD
    if known.held:
        agent.step(AgentInput.HOLD)
        agent.why = "was taken out by an admin"
    return agent
