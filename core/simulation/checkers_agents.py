"""What anyone could know about the agents who saw only what was delivered to the router, and what it answered.

Decides which agents may be given requests by that knowledge alone; the router's own opinion is never asked. Where the contract leaves the
router a choice, this book is on its side: it says "certainly not" and "certainly" only where nobody could disagree.
"""

from collections.abc import Sequence
from typing import Any, Final

from core.events import (
    Accepted,
    AgentCommanded,
    AgentRegistered,
    BackendAdded,
    Command,
    Effect,
    HeartbeatCame,
    MetricsCame,
    NodePolled,
    NodeSilent,
    Pulse,
    Registered,
    SettingsChanged,
)  # fmt: skip
from core.names import key_or_none
from core.units import AgentId, Instant, ModelKey

SETTLING_S: Final = 5.0
"""How long an agent that comes, comes back or is ordered about may be passed over for it."""
GRACE_S: Final = 0.005
"""How late a shell's timer may be."""


class Agent:
    """One agent as the messages show it."""

    __slots__ = (
        "agentless", "boot", "cap", "excused_until", "heard_at", "id", "installed", "leases", "leaving", "out", "pending", "reported",
        "sequence", "well",
    )  # fmt: skip

    def __init__(self, agent_id: AgentId, *, agentless: bool, now: Instant) -> None:
        self.id = agent_id
        self.agentless = agentless
        self.boot = self.sequence = 0
        self.heard_at = now
        self.well = False
        """Its last word was that it can serve."""
        self.out = False
        """Drained or disconnected: nothing new."""
        self.leaving = False
        """It said itself that it wants nothing new."""
        self.pending = False
        self.installed: dict[ModelKey, None] | None = None
        self.cap: int | None = None
        self.reported = 0
        """Requests that it works on by its own count."""
        self.leases = 0
        self.excused_until = now + SETTLING_S
        """Until then it may be passed over, for what went wrong there or because it came (back)."""


class AgentBook:
    """All agents of one coordinator."""

    def __init__(self, *, timeout_s: float, calm_s: float) -> None:
        """`calm_s`: how long after a failure an agent may still be passed over."""
        self._timeout_s = timeout_s
        self._calm_s = calm_s
        self.agents: dict[AgentId, Agent] = {}

    def stale(self, event: object) -> AgentId | None:
        """The agent that `event` names, when it is older than what the router took from it already (R6, M3)."""
        if isinstance(event, HeartbeatCame):
            beat = event.heartbeat
            agent = self.agents.get(AgentId(beat.agent_id))
            if agent is not None and not agent.agentless and (beat.boot, beat.sequence) <= (agent.boot, agent.sequence):
                return agent.id
        return None

    def forbids(self, agent_id: AgentId, key: ModelKey | None, *, capped: bool = True, now: Instant) -> str:
        """Why nobody may be sent there now (R5, R15); "" when one may. `capped`: the agent's cap counts (not for who only asks)."""
        agent = self.agents.get(agent_id)
        if agent is None:
            return "is not known"
        if agent.pending:
            return "waits for approval"
        if agent.out or agent.leaving:
            return "was ordered to take nothing new"
        if not agent.well:
            return "cannot serve by its last word"
        if now - agent.heard_at > self._timeout_s + GRACE_S:
            return f"was not heard for {now - agent.heard_at:.3f} s"
        if agent.installed is None or (key is not None and key not in agent.installed):
            return "does not hold the model"
        if capped and agent.cap is not None and agent.leases >= agent.cap:
            return f"may have {agent.cap} in flight at most and has them"
        return ""

    def certain(self, agent: Agent, key: ModelKey | None, *, now: Instant) -> bool:
        """Whether it may be used, and nothing was ever wrong with it that could excuse passing it over."""
        calm = now > agent.excused_until and now - agent.heard_at < self._timeout_s / 2
        return calm and not self.forbids(agent.id, key, now=now)

    def holders(self, key: ModelKey | None) -> list[Agent]:
        """The agents that hold the model by their own word."""
        return [agent for agent in self.agents.values() if agent.installed is not None and key in agent.installed]

    def take(self, event: object, effects: Sequence[Effect], *, now: Instant) -> None:
        """Learn from what the router was told and what it answered."""
        match event:
            case HeartbeatCame():
                if self._accepted(effects):
                    self._beat(event, now)
            case Pulse(heard=heard):
                for agent_id in heard:
                    self.heard(agent_id, now=now)
            case NodePolled():
                self._polled(event, now)
            case NodeSilent(agent_id=agent_id, refused=refused):
                if (agent := self.agents.get(agent_id)) is not None:
                    self._unsettled(agent, now)
                    agent.well = agent.well and not refused
            case AgentRegistered():
                self._registered(event, effects, now)
            case BackendAdded(agent_id=agent_id):
                self.agents.setdefault(agent_id, Agent(agent_id, agentless=True, now=now))
            case MetricsCame(agent_id=agent_id):
                self.heard(agent_id, now=now)
            case SettingsChanged(agent_id=agent_id, settings=settings):
                if self._accepted(effects) and (agent := self.agents.get(agent_id)) is not None:
                    agent.cap = settings.max_concurrent if isinstance(settings.max_concurrent, int | None) else agent.cap
                    self._unsettled(agent, now)
            case AgentCommanded():
                if self._accepted(effects):
                    self._commanded(event, now)
            case _:
                pass

    def heard(self, agent_id: AgentId, *, now: Instant) -> None:
        """A sign of life, perhaps."""
        if (agent := self.agents.get(agent_id)) is not None:
            agent.heard_at = now

    def trouble(self, agent_id: AgentId, *, now: Instant) -> None:
        """An attempt there came to nothing."""
        if (agent := self.agents.get(agent_id)) is not None:
            agent.excused_until = now + self._calm_s

    def _unsettled(self, agent: Agent, now: Instant) -> None:
        agent.excused_until = max(agent.excused_until, now + SETTLING_S)

    def _accepted(self, effects: Sequence[Effect]) -> bool:
        return any(isinstance(effect, Accepted) for effect in effects)

    def _beat(self, event: HeartbeatCame, now: Instant) -> None:
        beat = event.heartbeat
        agent = self.agents.get(AgentId(beat.agent_id))
        if agent is None or agent.pending or (beat.boot, beat.sequence) <= (agent.boot, agent.sequence):
            return
        if now - agent.heard_at > self._timeout_s / 2:
            self._unsettled(agent, now)
        agent.heard_at = now
        agent.boot, agent.sequence = beat.boot, beat.sequence
        if beat.installed_models is not None:
            agent.installed = _keys(beat.installed_models)
        agent.reported = beat.active_requests
        agent.leaving = beat.draining
        well = beat.ollama_ok and agent.installed is not None
        if well is not agent.well:
            self._unsettled(agent, now)
        agent.well = well

    def _polled(self, event: NodePolled, now: Instant) -> None:
        agent = self.agents.get(event.agent_id)
        if agent is None:
            return
        if event.alive:
            agent.heard_at = now
        if event.installed is not None:
            agent.installed = _keys(event.installed)
            if not agent.well:
                self._unsettled(agent, now)
            agent.well = True

    def _registered(self, event: AgentRegistered, effects: Sequence[Effect], now: Instant) -> None:
        answer = next((effect for effect in effects if isinstance(effect, Registered)), None)
        if answer is None:
            return
        boot = event.registration.boot
        agent = self.agents.get(answer.agent_id)
        if agent is None:
            agent = self.agents[answer.agent_id] = Agent(answer.agent_id, agentless=False, now=now)
            agent.boot = boot
        elif boot > agent.boot:
            agent.boot, agent.sequence = boot, 0
            agent.well = agent.out = agent.leaving = False
        agent.pending = answer.status == "pending"
        agent.heard_at = now
        self._unsettled(agent, now)

    def _commanded(self, event: AgentCommanded, now: Instant) -> None:
        agent = self.agents.get(event.agent_id)
        if agent is None:
            return
        self._unsettled(agent, now)
        match event.command:
            case Command.DRAIN | Command.DISCONNECT | Command.DISCONNECT_NOW:
                agent.out = True
            case Command.CONNECT:
                agent.out = agent.leaving = False
            case Command.APPROVE:
                agent.pending = False
            case Command.DELETE:
                del self.agents[event.agent_id]


def _keys(rows: list[Any]) -> dict[ModelKey, None]:
    names = (row.get("name") if isinstance(row, dict) else row for row in rows)
    return {key: None for name in names if isinstance(name, str) and (key := key_or_none(name)) is not None}
