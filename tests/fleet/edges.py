"""The edges that a fleet may stand behind: the coordinator's own, or a real nginx before it, by each of the ways that lead through it.

Decides which one a test gets; knows nothing of what the test asks. Invariant: whatever runs here has ended before its fleet's
coordinator does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from agent.config import AgentConfig, Identity
from agent.daemon import Daemon
from edge.nginx import Options
from edge.nginx_run import Runner
from tests.edge.nginx_stage import connects, free_port, installed

if TYPE_CHECKING:
    from tests.fleet.fleet import Fleet


class Edge(Enum):
    """Who takes the clients' connections, and who speaks with the nodes."""

    EMBEDDED = "embedded"
    HANDED_OVER = "handed over"
    """nginx, in front of nodes that it may not reach: every request is handed to the coordinator."""
    DIRECT = "direct"
    """nginx, which reaches bare nodes itself (`ROUTER_NGINX_DIRECT`)."""
    GATEWAYS = "gateways"
    """nginx, which reaches the gateways of the nodes' agents."""

    @property
    def nginx(self) -> bool:
        return self is not Edge.EMBEDDED


_current = Edge.EMBEDDED


def current() -> Edge:
    """The edge of fleets that are opened now."""
    return _current


@contextmanager
def behind(edge: Edge) -> Iterator[Edge]:
    """Fleets that are opened inside stand behind this edge."""
    global _current
    before, _current = _current, edge
    try:
        yield edge
    finally:
        _current = before


class RunningNginx:
    """nginx in front of a fleet's coordinator."""

    def __init__(self, selection: Path, directory: Path) -> None:
        self.port = free_port()
        self.lines: list[str] = []
        self.ended = trio.Event()
        options = Options(selection=selection, listen=(f"127.0.0.1:{self.port}",), directory=directory, workers=2)
        self.runner = Runner(options, installed(), say=self.lines.append)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until `stop`."""
        try:
            await self.runner.run(task_status=task_status)
        finally:
            self.ended.set()

    async def wait_up(self) -> None:
        with trio.fail_after(600):  # of a clock that may run twenty times as fast
            while not await connects(self.port):
                pass

    async def stop(self) -> None:
        """At once."""
        self.runner.stop()
        self.runner.stop()
        await self.ended.wait()


async def behind_nginx(fleet: "Fleet", nursery: trio.Nursery) -> RunningNginx:
    """Start nginx before the coordinator of `fleet`."""
    nginx = RunningNginx(fleet.data_dir / "selection.sock", fleet.data_dir / "nginx")
    await nursery.start(nginx.run)
    await nginx.wait_up()
    return nginx


class Agent:
    """An agent in this process. `die` is what a kill of its process is: nobody is told."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        with self._scope:
            await self.daemon.run()

    def die(self) -> None:
        self._scope.cancel()


async def with_gateways(fleet: "Fleet", nursery: trio.Nursery, nodes: Sequence[tuple[str, int | None, int]]) -> dict[str, Agent]:
    """An agent, in this process, beside each node of `nodes` (name, slots, port); the nodes get their names."""
    agents = {name: start_agent(fleet.own_port, fleet.data_dir, nursery, name, slots, port) for name, slots, port in nodes}
    await fleet.wait_ready(len(nodes))
    for name, _, port in nodes:
        agent = next(agent for agent in fleet.agents() if agent.ollama_port == port)
        answer = await fleet.ask("PUT", f"/api/agents/{agent.id}/settings", {"custom_name": name})
        assert answer.status == 200, answer.body
    return agents


def start_agent(router_port: int, data_dir: Path, nursery: trio.Nursery, name: str, slots: int | None, port: int) -> Agent:
    """An agent beside the Ollama on `port`; it ends with `nursery`."""
    config = AgentConfig(
        router_url=f"http://127.0.0.1:{router_port}", ollama_port=port, ollama_url=f"http://127.0.0.1:{port}", api_port=0,
        advertise_address="127.0.0.1", heartbeat_interval_s=1.0, slots=slots, data_dir=data_dir / f"agent-{name}", stop_timeout_s=1.0,
        log_level="error",
    )  # fmt: skip
    agent = Agent(Daemon(config, Identity(instance_id=f"00000000-0000-4000-8000-{port:012d}", boot=1), dice=lambda bound: bound // 2))
    agent.daemon.listen()
    nursery.start_soon(agent.run)
    return agent
