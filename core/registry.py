"""Who the nodes are: identity, state, what they reported, what an admin set.

Decides which agent a message is about, whether it may change anything, and in which state that leaves the agent. Never knows requests:
how many are in flight is told from outside. All steps between states go through `core.lifecycle.advance`.

Identity: `instance_id` when given, else (machine_name, ollama_port). A registration is trusted (loopback, join token), or it proves by
the agent's own token which agent it is; any other is a stranger's, whatever it says: it becomes an agent of its own, PENDING, and
never changes one that is approved. An admin's approval makes it that identity's agent, unless the present one is there itself.

Invariants: R6 a message with an older boot, or with a (boot, sequence) that was there before, changes nothing; an agent is OFFLINE at its
deadline, `agent_timeout_s` after it was heard last; display names are unique; at most `agents_max` agents.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from core.agents import Agent
from core.changes import Changes
from core.config import RouterConfig
from core.errors import IllegalTransition
from core.events import (
    Accepted,
    AgentCommanded,
    AgentRegistered,
    BackendAdded,
    Command,
    Declined,
    Effect,
    HeartbeatCame,
    MetricsCame,
    NodePolled,
    NodeSilent,
    Note,
    Probe,
    Registered,
    SettingsChanged,
)
from core.inventory import News
from core.leases import Expiry
from core.lifecycle import AgentInput, AgentState
from core.messages import Registration
from core.parts import Part
from core.units import AgentId, Instant, ModelKey, UnixMs
from core.views import AgentView, EjectionView

__all__ = ["Agent", "AgentView", "EjectionView", "Registry"]

FULL: Final = Declined(status=503, text="the coordinator holds as many agents as it may; delete one that is not needed and try again")

PENDING_SHARE: Final = 4
"""At most one in so many agents may be a stranger that waits for approval."""

_Identity = tuple[str, str | int]


class Registry(Part):
    """All nodes."""

    __slots__ = (
        "_agents", "_approved", "_clock", "_config", "_expiry", "_in_flight", "_out", "_ready", "_strangers",
        "_trained", "changes", "known_holders", "news",
    )  # fmt: skip

    def __init__(self, config: RouterConfig, *, in_flight: Callable[[AgentId], int]) -> None:
        self._config = config
        self._in_flight = in_flight
        self._agents: dict[AgentId, Agent] = {}
        self._approved: dict[_Identity, AgentId] = {}
        self._strangers: dict[tuple[_Identity, str, int], AgentId] = {}
        self._expiry: Expiry[AgentId] = Expiry(config.agent_timeout_s)
        self._clock: tuple[Instant, UnixMs] | None = None
        self._ready: tuple[Agent, ...] | None = None
        self.known_holders: dict[ModelKey, tuple[Agent, ...]] = {}
        """What `holders` has said and would say again. Read it only."""
        self._out: dict[ModelKey, Mapping[str, str]] = {}
        self._trained: dict[ModelKey, int] = {}
        self.changes, self.news = Changes(), News()

    # ------------------------------------------------------------ asking

    def get(self, agent_id: AgentId) -> Agent | None:
        """One agent."""
        return self._agents.get(agent_id)

    def all(self) -> list[Agent]:
        """All agents, the first registered first."""
        return sorted(self._agents.values(), key=lambda agent: agent.registered_at)

    def ready(self) -> tuple[Agent, ...]:
        """Those that may be given requests, in a stable order."""
        if self._ready is None:
            self._ready = tuple(agent for agent in self._agents.values() if agent.state is AgentState.READY)
            for agent in self._ready:
                agent.inventory.news = self.news
        return self._ready

    def holders(self, key: ModelKey) -> tuple[Agent, ...]:
        """Those of `ready()` that hold the model."""
        holders = self.known_holders.get(key)
        if holders is None:
            holders = self._find_holders(key)
            if holders:  # names that nobody holds come from clients, and would fill the table
                self.known_holders[key] = holders
        return holders

    def _find_holders(self, key: ModelKey) -> tuple[Agent, ...]:
        return tuple(agent for agent in self.ready() if agent.holds(key))

    def trained_context(self, key: ModelKey) -> int:
        """Tokens of context that the model was trained with; 0 when no node says so."""
        known = self._trained.get(key)
        if known is not None:
            return known
        models = (agent.inventory.installed.get(key) for agent in self._agents.values())
        found = max((model.trained_context for model in models if model is not None), default=0)
        if key in self.known_holders:
            self._trained[key] = found
        return found

    def out(self, key: ModelKey | None) -> Mapping[str, str]:
        """Approved agents that hold the model and are not in `holders`, by name, and why."""
        if key is None:
            return {}
        out = self._out.get(key)
        if out is None:
            out = self._find_out(key)
            if key in self.known_holders:
                self._out[key] = out
        return out

    def _find_out(self, key: ModelKey) -> Mapping[str, str]:
        away = [agent for agent in self.listed_by(key) if agent.state is not AgentState.READY]
        return {agent.name: f"is {agent.state.value}: {agent.detail(self._in_flight(agent.id))}" for agent in away}

    def listed_by(self, key: ModelKey) -> list[Agent]:
        """All approved agents that listed the model last, whatever their state."""
        return [agent for agent in self._agents.values() if agent.state is not AgentState.PENDING and agent.holds(key)]

    def awaited(self) -> bool:
        """Whether the models of a node that may come (back) are not known since the coordinator started."""
        return any(
            (agent.last_heard is None or not agent.inventory.known) and agent.state in (AgentState.OFFLINE, AgentState.INITIALIZING)
            for agent in self._agents.values()
        )

    def take_changes(self) -> Changes:
        """What happened since the last call."""
        changes, self.changes = self.changes, Changes()
        return changes

    @property
    def deadlines(self) -> Expiry[AgentId]:
        """By which agents must be heard. The registry's own: read it."""
        return self._expiry

    def next_deadline(self) -> Instant | None:
        """When the next agent will have been silent for too long."""
        return self._expiry.next_deadline()

    def heard_until(self, agent_id: AgentId) -> Instant | None:
        """The instant at which the agent is offline unless it is heard before; None when it cannot be heard."""
        return self._expiry.until(agent_id)

    # ------------------------------------------------------------ introductions

    def registered(self, event: AgentRegistered, *, now: Instant) -> list[Effect]:
        """An agent introduced itself."""
        self._clock = (now, event.now_unix)
        registration = event.registration
        if not event.gpu_exempt and (reason := gpu_fault(registration)):
            text = f"GPU hardware is required for agent registration: {reason} (ROUTER_REQUIRE_GPU=false admits nodes without one)"
            return [Declined(status=403, text=text)]
        identity = _identity(registration)
        agent = self._agents.get(self._approved.get(identity, AgentId("")))
        if agent is not None and (event.trusted or event.known_as == agent.id):
            return self._registered_again(agent, event, now=now)
        stranger = (identity, event.upstream.host, event.upstream.port)
        pending = self._agents.get(self._strangers.get(stranger, AgentId("")))
        if pending is not None:
            if registration.boot >= pending.boot:
                pending.introduce(registration, event.upstream)
                self._heard(pending, now=now)
            if registration.boot > pending.boot:
                pending.boot, pending.last_report = registration.boot, (registration.boot, -1)
            if event.trusted:
                declined = self._approve(pending, now=now)
                return declined or [Registered(agent_id=pending.id, status="updated")]
            return [Registered(agent_id=pending.id, status="pending", code=pending.code)]
        if not self._make_room(trusted=event.trusted, now=now):
            return [FULL]
        return self._registered_new(event, identity, stranger, now=now)

    def _registered_new(
        self, event: AgentRegistered, identity: _Identity, stranger: tuple[_Identity, str, int], *, now: Instant
    ) -> list[Effect]:
        state = AgentState.OFFLINE if event.trusted else AgentState.PENDING
        agent = Agent(event.new_id, event.upstream, state=state, now_unix=event.now_unix)
        agent.slots = self._config.slots_default
        agent.inventory.raises = self._config.raise_context
        agent.introduce(event.registration, event.upstream)
        agent.boot = event.registration.boot
        agent.last_report = (agent.boot, -1)
        self._agents[agent.id] = agent
        fields = {"agent_id": agent.id, "address": agent.ip_address}
        if event.trusted:
            self._approved[identity] = agent.id
            agent.step(AgentInput.HEARD_ILL)
            effect, note = Registered(agent_id=agent.id, status="registered"), "agent registered"
        else:
            self._strangers[stranger] = agent.id
            agent.code = event.code
            fields["code"] = event.code
            effect, note = Registered(agent_id=agent.id, status="pending", code=event.code), "agent waits for approval"
        self._rename()
        self._heard(agent, now=now)
        self._touch()
        return [effect, Note(level="info", event=note, fields={**fields, "agent": agent.name})]

    def _registered_again(self, agent: Agent, event: AgentRegistered, *, now: Instant) -> list[Effect]:
        registration = event.registration
        effects: list[Effect] = [Registered(agent_id=agent.id, status="updated")]
        if registration.boot < agent.boot:
            return effects
        gateway = agent.upstream.gateway
        agent.introduce(registration, event.upstream)
        self.changes.add(self.changes.refreshed, agent.id)
        if registration.boot > agent.boot:
            agent.ollama_ok = False  # until this run says otherwise: what the former one said is over
            agent.boot = registration.boot
            agent.last_report = (registration.boot, -1)
            agent.drained_by_itself = False
            self.changes.add(self.changes.reborn, agent.id)
            if gateway:  # what ran through the former run ended with it, and its connections may hang for long
                self.changes.add(self.changes.lost, (agent.id, f"the agent of {agent.name} started anew"))
            effects += self._step(agent, AgentInput.REBOOTED, "registered again")
        elif agent.state is AgentState.OFFLINE:
            effects += self._step(agent, AgentInput.HEARD_ILL, "registered again")
        self._heard(agent, now=now)
        self._rename()
        self._touch()
        return effects

    def _make_room(self, *, trusted: bool, now: Instant) -> bool:
        """Whether one more may come. For that a stranger that waits for approval may have to go: for another one it must be silent."""
        strangers = [agent for agent in self._agents.values() if agent.state is AgentState.PENDING]
        if len(self._agents) < self._config.agents_max and (trusted or len(strangers) * PENDING_SHARE < self._config.agents_max):
            return True
        oldest = min(strangers, key=lambda agent: agent.last_heard or 0.0, default=None)
        if oldest is None or not (trusted or now - (oldest.last_heard or 0.0) > self._config.agent_timeout_s):
            return False
        self._forget(oldest)
        return True

    def _approve(self, agent: Agent, *, now: Instant) -> list[Effect]:
        """Let a stranger in; it becomes its identity's agent.

        The present agent of that identity, if it is away, is replaced, and what an admin set for it carried over.
        """
        identity = _identity_of(agent)
        former = self._agents.get(self._approved.get(identity, AgentId("")))
        if former is not None:
            if former.state not in (AgentState.OFFLINE, AgentState.HELD):
                text = f"{former.name} has the same identity and is online; disconnect or delete it first"
                return [Declined(status=409, text=text)]
            agent.inherit(former)
            self._forget(former)
        self._step(agent, AgentInput.APPROVE, "approved")
        self._strangers.pop((identity, agent.upstream.host, agent.upstream.port), None)
        self._approved[identity] = agent.id
        agent.code = None
        self._heard(agent, now=now)
        self._rename()
        return []

    # ------------------------------------------------------------ reports

    def heartbeat(self, event: HeartbeatCame, *, beyond: int, now: Instant) -> list[Effect]:
        """An agent reported. `beyond`: requests on the node that are not ours."""
        heartbeat = event.heartbeat
        agent = self._agents.get(AgentId(heartbeat.agent_id))
        if agent is None:
            return [_unknown(AgentId(heartbeat.agent_id))]
        self._clock = (now, event.now_unix)
        if agent.state is AgentState.PENDING:
            if heartbeat.boot >= agent.boot:
                self._heard(agent, now=now)
            return [Accepted(agent_id=agent.id, status="pending")]
        report = (heartbeat.boot, heartbeat.sequence)
        if report != (0, 0) and (report <= agent.last_report or heartbeat.boot < agent.boot):
            return [Accepted(agent_id=agent.id)]
        agent.last_report = max(report, agent.last_report)
        agent.take_numbers(heartbeat, now=now)
        agent.beyond = beyond
        self._set_slots(agent, heartbeat.slots)
        self._take_models(agent, heartbeat.installed_models, heartbeat.loaded_models, asked_at=None, now=now)
        effects = self._take_draining(agent, heartbeat.draining)
        effects += self._hear(agent, now=now)
        ask = agent.wants_inventory or not agent.inventory.known
        if ask and heartbeat.ollama_ok and heartbeat.installed_models is None and not agent.upstream.gateway:
            effects.append(Probe(agent_id=agent.id))  # an older agent never tells: its Ollama is asked
        return [Accepted(agent_id=agent.id, send_inventory=ask), *effects]

    def metrics(self, event: MetricsCame, *, now: Instant) -> list[Effect]:
        """An agent sent the seed's numbers."""
        agent = self._agents.get(event.agent_id)
        if agent is None:
            return [_unknown(event.agent_id)]
        self._clock = (now, event.now_unix)
        if agent.state is AgentState.PENDING:
            self._heard(agent, now=now)
            return [Accepted(agent_id=agent.id, status="pending")]
        metrics = event.metrics
        agent.cpu_usage, agent.memory_usage, agent.metrics_at = metrics.cpu_usage, metrics.memory_usage, now
        agent.beyond = max(0, metrics.active_requests - self._in_flight(agent.id))
        if metrics.avg_response_time_ms is not None:
            agent.average_response_time_ms = metrics.avg_response_time_ms
        return [Accepted(agent_id=agent.id), *self._hear(agent, now=now)]

    def backend_added(self, event: BackendAdded, *, now: Instant) -> list[Effect]:
        """A node without an agent."""
        self._clock = (now, event.now_unix)
        for other in self._agents.values():
            if other.upstream == event.upstream and other.agentless and other.id != event.agent_id:
                return [Declined(status=409, text=f"this address is in the list already, as {other.name}")]
        agent = self._agents.get(event.agent_id)
        if agent is None:
            if not self._make_room(trusted=True, now=now):
                return [FULL]
            agent = Agent(event.agent_id, event.upstream, state=AgentState.OFFLINE, now_unix=event.now_unix)
            agent.agentless = True
            agent.inventory.raises = self._config.raise_context
            agent.why = "was not heard since the coordinator started"
            self._agents[agent.id] = agent
        agent.machine_name = event.name
        agent.upstream = event.upstream
        if event.slots:
            agent.told_slots(event.slots)
        elif not agent.slots_told:
            agent.slots = self._config.slots_default
        agent.simulated = event.simulated
        self.changes.add(self.changes.refreshed, agent.id)
        self._rename()
        self._touch()
        return [Accepted(agent_id=agent.id), Probe(agent_id=agent.id)]

    def restored(self, agent: Agent) -> list[Effect]:
        """An agent from before the start; one that was heard already knows better."""
        if agent.id not in self._agents and len(self._agents) < self._config.agents_max:
            self._agents[agent.id] = agent
            if not agent.agentless:
                self._approved[_identity_of(agent)] = agent.id
            self.changes.add(self.changes.refreshed, agent.id)
            self._rename()
            self._touch()
        return []

    def polled(self, event: NodePolled, *, now: Instant) -> list[Effect]:
        """A node answered a poll. One that was deleted meanwhile is not known any more: nothing happens."""
        agent = self._agents.get(event.agent_id)
        if agent is None or agent.state is AgentState.PENDING:
            return []
        self._clock = (now, event.now_unix)
        if event.version is not None:
            agent.ollama_version = event.version
        self._take_models(agent, event.installed, event.loaded, asked_at=event.asked_at, now=now)
        if not event.alive:
            return []
        if agent.agentless:
            return self._hear(agent, now=now)
        # The node answers, which says nothing about its agent: only an agent that is heard can become ready by it.
        return self._hear_state(agent) if agent.id in self._expiry else []

    def silent(self, event: NodeSilent) -> list[Effect]:
        """A check of an agentless node failed. Only a refusal decides anything at once; otherwise its deadline will."""
        agent = self._agents.get(event.agent_id)
        if agent is None or not event.refused:
            return []
        return self.refused(agent)

    def refused(self, agent: Agent) -> list[Effect]:
        """No connection to the node can be made: an agentless one is offline at once."""
        if not agent.agentless or agent.id not in self._expiry:
            return []
        return [*self._lose(agent, "refuses connections"), Probe(agent_id=agent.id)]

    def heard(self, agent_id: AgentId, *, now: Instant) -> None:
        """Bytes of an answer came from the node. What is offline stays so: they may be older than that."""
        agent = self._agents.get(agent_id)
        if agent is not None and agent.id in self._expiry:
            self._heard(agent, now=now)

    def expire(self, *, now: Instant) -> list[Effect]:
        """Agents whose deadline has come are offline."""
        effects: list[Effect] = []
        for agent_id in self._expiry.due(now=now):
            effects += self._lose(self._agents[agent_id], f"was not heard for {self._config.agent_timeout_s:g} s")
        return effects

    def lacks(self, agent: Agent) -> list[Effect]:
        """The node says that it does not hold a model that it listed: ask for its lists anew."""
        agent.wants_inventory = True
        return [Probe(agent_id=agent.id)] if not agent.upstream.gateway else []

    # ------------------------------------------------------------ orders

    def settings(self, event: SettingsChanged) -> list[Effect]:
        """An admin changed what is set for an agent."""
        agent = self._agents.get(event.agent_id)
        if agent is None:
            return [_unknown(event.agent_id)]
        agent.take_settings(event.settings)
        self._rename()
        self._touch()
        return [Accepted(agent_id=agent.id)]

    def command(self, event: AgentCommanded, *, now: Instant) -> list[Effect]:
        """An admin, or an agent that stops, ordered something."""
        agent = self._agents.get(event.agent_id)
        if agent is None:
            return [_unknown(event.agent_id)]
        accepted: list[Effect] = [Accepted(agent_id=agent.id)]
        try:
            match event.command:
                case Command.DELETE:
                    self._forget(agent)
                    return [*accepted, Note(level="info", event="agent deleted", fields={"agent_id": agent.id, "agent": agent.name})]
                case Command.APPROVE:
                    if agent.state is not AgentState.PENDING:
                        return accepted  # it was done already
                    return self._approve(agent, now=now) or accepted
                case Command.DRAIN:
                    return accepted + self._drain(agent, "drained for maintenance")
                case Command.DISCONNECT:
                    return accepted + self._drain(agent, "disconnected by an admin")
                case Command.DISCONNECT_NOW:
                    return accepted + self._lose(agent, "disconnected by an admin", AgentInput.HOLD)
                case Command.CONNECT:
                    agent.drained_by_itself = False
                    return accepted + self._connect(agent)
        except IllegalTransition:
            return [Declined(status=409, text=f"{agent.name} waits for approval; approve or delete it first")]

    def emptied(self, agent: Agent) -> list[Effect]:
        """Nothing is in flight on it any more; it was draining."""
        return self._step(agent, AgentInput.EMPTIED, agent.why)

    # ------------------------------------------------------------ inside

    def _drain(self, agent: Agent, why: str) -> list[Effect]:
        effects = self._step(agent, AgentInput.DRAIN, why)
        if agent.state is AgentState.DRAINING and not self._in_flight(agent.id):
            effects += self.emptied(agent)
        return effects

    def _connect(self, agent: Agent) -> list[Effect]:
        """May serve again: at once, if it was heard well in time."""
        effects = self._step(agent, AgentInput.CONNECT, "connected")
        if agent.state is AgentState.INITIALIZING:
            if agent.id in self._expiry:
                effects += self._hear_state(agent)
            else:
                effects += self._step(agent, AgentInput.SILENT, "was not heard yet")
        return effects

    def _take_draining(self, agent: Agent, draining: bool) -> list[Effect]:
        if draining and agent.state not in (AgentState.DRAINING, AgentState.HELD):
            agent.drained_by_itself = True
            return self._drain(agent, "its agent is stopping")
        if not draining and agent.drained_by_itself:
            agent.drained_by_itself = False
            return self._connect(agent)
        return []

    def _take_models(
        self, agent: Agent, installed: list[Any] | None, loaded: list[Any] | None, *, asked_at: Instant | None, now: Instant
    ) -> None:
        if installed is not None:
            agent.wants_inventory = False
            if agent.inventory.report_installed(installed):
                self.changes.add(self.changes.refreshed, agent.id)
                self._touch()
        if loaded is not None:
            before, loading, contexts = agent.inventory.resident, len(agent.inventory.loading), dict(agent.inventory.contexts)
            rows = agent.inventory.report_loaded(loaded, asked_at=asked_at, now=now)
            agent.room.saw_rows(rows)
            _learn_room(agent, before)
            inventory = agent.inventory
            if len(inventory.loading) != loading or inventory.contexts != contexts or inventory.resident.keys() != before.keys():
                self.changes.touch()

    def _set_slots(self, agent: Agent, slots: int | None) -> None:
        if slots is not None and slots > 0 and (slots != agent.slots or not agent.slots_told):
            agent.told_slots(slots)
            self.changes.add(self.changes.refreshed, agent.id)
            self._touch()

    def _heard(self, agent: Agent, *, now: Instant) -> None:
        """Note the sign of life. A held agent's deadline runs too, so that `/connect` knows whether it is there."""
        agent.last_heard = now
        if self._clock is not None:
            at, unix = self._clock
            agent.last_seen = UnixMs(unix + round((now - at) * 1000))
        if agent.state is not AgentState.PENDING:
            self._expiry.set(agent.id, now=now)

    def _hear(self, agent: Agent, *, now: Instant) -> list[Effect]:
        self._heard(agent, now=now)
        return self._hear_state(agent)

    def _hear_state(self, agent: Agent) -> list[Effect]:
        return self._step(agent, AgentInput.HEARD_WELL if agent.well else AgentInput.HEARD_ILL, "")

    def _lose(self, agent: Agent, why: str, given: AgentInput = AgentInput.SILENT) -> list[Effect]:
        """The agent is gone, or was ordered away: its requests must be cut."""
        shown = agent.why if agent.state is AgentState.DRAINING and given is AgentInput.SILENT else why
        effects = self._step(agent, given, shown)
        if given is AgentInput.SILENT:
            self._expiry.discard(agent.id)
            agent.beyond = 0
        self.changes.add(self.changes.lost, (agent.id, f"{agent.name} {why}"))
        return effects

    def _step(self, agent: Agent, given: AgentInput, why: str) -> list[Effect]:
        if not agent.step(given):
            return []
        if why:
            agent.why = why
        self._touch()
        level = "warning" if agent.state is AgentState.OFFLINE else "info"
        fields = {"agent_id": agent.id, "agent": agent.name, "state": agent.state.value, "why": agent.detail(self._in_flight(agent.id))}
        return [Note(level=level, event="agent state", fields=fields)]

    def _touch(self) -> None:
        self.changes.touch()
        self._ready = None
        self.known_holders.clear()
        self._out.clear()
        self._trained.clear()

    def _forget(self, agent: Agent) -> None:
        del self._agents[agent.id]
        identity = _identity_of(agent)
        if self._approved.get(identity) == agent.id:
            del self._approved[identity]
        if agent.state is AgentState.PENDING:
            self._strangers.pop((identity, agent.upstream.host, agent.upstream.port), None)
        self._expiry.discard(agent.id)
        self.changes.add(self.changes.lost, (agent.id, f"{agent.name} was deleted"))
        self.changes.add(self.changes.forgotten, agent.id)
        self._rename()
        self._touch()

    def _rename(self) -> None:
        """Give everybody a name of its own; who registered first keeps the plain one."""
        taken: dict[str, None] = {}
        for agent in self.all():
            base = agent.custom_name or agent.machine_name
            name, number = base, 2
            while name in taken:
                name, number = f"{base}-{number}", number + 1
            taken[name] = None
            agent.name = name


def gpu_fault(registration: Registration) -> str | None:
    """What is wrong with the GPUs that an agent claims; None when nothing is."""
    if not registration.gpu_available:
        return "gpu_available is false"
    if not registration.gpu_devices:
        return "gpu_devices is empty"
    for device in registration.gpu_devices:
        if not device.model.strip():
            return "a GPU device has a blank model"
        if device.count < 1:
            return f"the GPU device {device.model} has a count of {device.count}"
    return None


def _identity(registration: Registration) -> _Identity:
    if registration.instance_id:
        return (registration.instance_id, "")
    return (registration.machine_name, registration.ollama_port)


def _identity_of(agent: Agent) -> _Identity:
    return (agent.instance_id, "") if agent.instance_id else (agent.machine_name, agent.ollama_port)


def _unknown(agent_id: AgentId) -> Declined:
    return Declined(status=404, text=f"agent {agent_id} is not registered; register it again")


def _learn_room(agent: Agent, before: Mapping[ModelKey, None]) -> None:
    """Where one model came and another went, both did not fit."""
    inventory = agent.inventory
    went = [key for key in before if key not in inventory.resident and key in inventory.installed]
    if went and any(key not in before for key in inventory.resident):
        sizes = [agent.room.running_bytes(key, inventory.installed[key].size_bytes) for key in (*inventory.resident, *went)]
        agent.room.saw_eviction(sum(sizes))
