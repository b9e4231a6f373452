"""A registry and its time, for the tests of who the nodes are: short ways to say what is reported and ordered."""

from typing import Any

from core.config import RouterConfig
from core.events import (
    AgentCommanded,
    AgentRegistered,
    BackendAdded,
    Command,
    Effect,
    HeartbeatCame,
    MetricsCame,
    NodePolled,
    Registered,
    Upstream,
)
from core.messages import Heartbeat, Metrics, Registration
from core.registry import Agent, Registry
from core.units import AgentId, Instant, UnixMs
from tests.core.routing import one, registration, row

TIMEOUT_S = 60.0
UNIX = UnixMs(1_700_000_000_000)


class Office:
    """A registry and the time; in flight is what the test says."""

    def __init__(self, **config: Any) -> None:
        self.busy: dict[AgentId, int] = {}
        self.registry = Registry(RouterConfig(**config), in_flight=lambda agent_id: self.busy.get(agent_id, 0))
        self.now = 100.0
        self.count = 0

    def at(self) -> Instant:
        """Now."""
        return Instant(self.now)

    def register(self, given: Registration | None = None, **fields: Any) -> list[Effect]:
        """An agent introduces itself."""
        self.count += 1
        event: dict[str, Any] = {
            "registration": given or registration(), "new_id": AgentId(f"id{self.count}"), "code": f"CODE{self.count}", "trusted": True,
            "gpu_exempt": False, "upstream": Upstream(host="10.0.0.1", port=11435, gateway=True), "now_unix": UNIX,
        }  # fmt: skip
        return self.registry.registered(AgentRegistered(**{**event, **fields}), now=self.at())

    def beat(self, agent_id: str, beyond: int = 0, **fields: Any) -> list[Effect]:
        """An agent reports."""
        beat: dict[str, Any] = {"agent_id": agent_id, "cpu_usage": 1.0, "memory_usage": 2.0, **fields}
        return self.registry.heartbeat(HeartbeatCame(heartbeat=Heartbeat(**beat), now_unix=UNIX), beyond=beyond, now=self.at())

    def metrics(self, agent_id: str, **fields: Any) -> list[Effect]:
        """The seed's numbers come."""
        told: dict[str, Any] = {"cpu_usage": 1.0, "memory_usage": 2.0, **fields}
        event = MetricsCame(agent_id=AgentId(agent_id), metrics=Metrics(**told), now_unix=UNIX)
        return self.registry.metrics(event, now=self.at())

    def ready(self, name: str = "box", **fields: Any) -> Agent:
        """An agent that is ready and holds `m`."""
        agent_id = one(self.register(registration(name, **fields)), Registered).agent_id
        self.beat(agent_id, installed_models=[row("m")], boot=fields.get("boot", 0), sequence=1)
        return self.agent(agent_id)

    def backend(self, name: str = "plain", port: int = 1, *, poll: bool = True, slots: int | None = None) -> Agent:
        """A node without an agent, heard unless `poll` is False."""
        upstream = Upstream(host="10.0.0.2", port=port)
        event = BackendAdded(agent_id=AgentId(name), name=name, upstream=upstream, slots=slots, now_unix=UNIX)
        self.registry.backend_added(event, now=self.at())
        if poll:
            self.poll(name, installed=[row("m")])
        return self.agent(name)

    def poll(self, agent_id: str, **fields: Any) -> list[Effect]:
        """The node answers a poll."""
        return self.registry.polled(NodePolled(agent_id=AgentId(agent_id), now_unix=UNIX, **fields), now=self.at())

    def order(self, agent: Agent, command: Command) -> list[Effect]:
        """An admin orders something."""
        return self.registry.command(AgentCommanded(agent_id=agent.id, command=command), now=self.at())

    def agent(self, agent_id: str) -> Agent:
        """The agent of that id."""
        found = self.registry.get(AgentId(agent_id))
        assert found is not None
        return found

    def pass_time(self, seconds: float) -> list[Effect]:
        """Time passes, and the timer rings."""
        self.now += seconds
        return self.registry.expire(now=self.at())
