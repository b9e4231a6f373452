"""A whole fleet for a test: a coordinator in this process, nodes, and agents as processes of their own.

Everything listens on loopback ports that the system picks. The coordinator is the real one, listener and web app included, with its
data in a directory that goes away. Invariant: whatever a test started has ended when `open_fleet` is left.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from core.units import RequestId
from core.views import AgentView, Statistics
from servers.coordinator import Coordinator
from servers.settings import load
from tests.fleet.edges import Agent, Edge, RunningNginx, behind_nginx, current, with_gateways
from tests.fleet.rawhttp import Answer, Caller, Handler, Hangup, RawServer, Talk, ask, talk, wait_until
from tests.servers.store.migrated import put_database

ROOT = Path(__file__).parents[2]
Body = bytes | Mapping[str, Any]


def chat(model: str = "m", *, stream: bool = True, content: str = "Hello", **more: Any) -> dict[str, Any]:
    """A body for `/api/chat`."""
    return {"model": model, "messages": [{"role": "user", "content": content}], "stream": stream, **more}


def line(content: str, *, model: str = "m", **more: Any) -> bytes:
    """One NDJSON line of a chat answer; without `done` it is not the last."""
    made = {"model": model, "created_at": "2026-01-01T00:00:00Z", "message": {"role": "assistant", "content": content}}
    return json.dumps({**made, **({"done": False} | more)}).encode() + b"\n"


def last_line(*, content: str = "", model: str = "m") -> bytes:
    return line(content, model=model, done=True, done_reason="stop", total_duration=1000, eval_count=3)


def sse(value: Any) -> bytes:
    """One event of an OpenAI stream."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def openai_chunk(content: str) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"role": "assistant", "content": content}, "finish_reason": None}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


class ScriptedNode(RawServer):
    """A node without an agent that lists `models`, all of them loaded, and answers everything else with `script`."""

    def __init__(self, script: Handler, *, models: Sequence[str] = ("m:latest",), version: str = "0.33.0") -> None:
        super().__init__(self._answer)
        self.script = script
        self.seen: list[Caller] = []
        """Requests for inference, and whatever else no list answers."""
        self.unplugged = False
        """True: takes connections and requests, and never says anything again."""
        details = {"format": "gguf", "family": "llama", "families": ["llama"], "parameter_size": "1B", "quantization_level": "Q4_K_M"}
        rows = [{"name": name, "model": name, "size": 10**9, "digest": "a" * 64, "details": details} for name in models]
        self._lists: dict[str, Any] = {
            "/api/version": {"version": version},
            "/api/tags": {"models": [{**row, "modified_at": "2026-01-01T00:00:00Z"} for row in rows]},
            "/api/ps": {
                "models": [{**row, "size_vram": 10**9, "expires_at": "2318-01-01T00:00:00Z", "context_length": 4096} for row in rows]
            },
        }

    async def _answer(self, caller: Caller) -> None:
        if self.unplugged:
            await trio.sleep_forever()
        if caller.method == "GET" and caller.target in self._lists:
            await caller.answer(json.dumps(self._lists[caller.target]).encode())
            return
        self.seen.append(caller)
        await self.script(caller)


async def answer_well(caller: Caller) -> None:
    """A good answer to any chat, streamed or whole as asked."""
    if json.loads(caller.body).get("stream", True):
        await caller.begin_chunks()
        await caller.chunk(line("one"))
        await caller.chunk(last_line())
        await caller.end_chunks()
    else:
        await caller.answer(last_line(content="one").rstrip())


class Fleet:
    """What a test may do with the coordinator that runs."""

    def __init__(self, coordinator: Coordinator, port: int, data_dir: Path, nursery: trio.Nursery) -> None:
        self.coordinator = coordinator
        self.port = port
        """Where clients ask."""
        self.own_port = port
        """The coordinator's own."""
        self.nginx: RunningNginx | None = None
        self.local_agents: dict[str, Agent] = {}
        """Agents in this process, by their nodes' names."""
        self.data_dir = data_dir
        self._nursery = nursery

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def agents(self) -> list[AgentView]:
        return self.coordinator.web.driver.router.agents()

    def agent(self, name: str) -> AgentView:
        return next(agent for agent in self.agents() if agent.name == name)

    def statistics(self) -> Statistics:
        return self.coordinator.web.driver.router.statistics()

    def explain(self, request_id: str) -> Any:
        return self.coordinator.web.driver.router.why(RequestId(request_id))

    async def wait_ready(self, count: int, *, within_s: float = 20.0) -> None:
        """Until so many nodes are ready."""
        await wait_until(
            lambda: sum(agent.state == "ready" for agent in self.agents()) >= count, within_s=within_s, what=f"{count} nodes ready"
        )

    async def wait_settled(self, *, within_s: float = 5.0) -> None:
        """Until the ledger and the queue are empty."""
        await wait_until(
            lambda: self.statistics().in_flight == 0 and self.statistics().waiting == 0, within_s=within_s, what="an empty ledger"
        )

    async def ask(self, method: str, path: str, body: Body | None = None, **more: Any) -> Answer:
        return await ask(self.port, method, path, body, **more)

    async def chat(self, model: str = "m", *, stream: bool = True, **more: Any) -> Answer:
        return await self.ask("POST", "/api/chat", chat(model, stream=stream, **more))

    @asynccontextmanager
    async def talk(self, path: str, body: Body) -> AsyncIterator[Talk]:
        async with talk(self.port, "POST", path, body) as found:
            yield found

    async def start_agent(self, ollama_port: int, name: str, **environ: str) -> "AgentProcess":
        """An agent process beside the Ollama on `ollama_port`; ends with the fleet. Its node's name is the machine's."""
        settings = {
            "ROUTER_URL": f"http://127.0.0.1:{self.own_port}",
            "OLLAMA_API_BASE": f"http://127.0.0.1:{ollama_port}",
            "OLLAMA_PORT": str(ollama_port),
            "AGENT_API_PORT": "0",
            "AGENT_ADVERTISE_ADDRESS": "127.0.0.1",
            "AGENT_HEARTBEAT_INTERVAL_SECS": "1",
            "AGENT_STOP_TIMEOUT_SECS": "1",
            "AGENT_DATA_DIR": str(self.data_dir / f"agent-{name}"),
            "ROUTER_LOG_LEVEL": "warning",
            **environ,
        }
        agent = AgentProcess(name, {**os.environ, **settings}, self.data_dir / f"agent-{name}.log")
        await self._nursery.start(agent.run)
        return agent


class AgentProcess:
    """`python -m agent`, and what may happen to it."""

    def __init__(self, name: str, environ: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._environ = environ
        self._log = log
        self._process: trio.Process | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "agent"]
            self._process = await trio.lowlevel.open_process(command, stdin=None, stdout=log, stderr=log, env=self._environ, cwd=ROOT)
            task_status.started()
            try:
                await self._process.wait()
            finally:
                self.kill()
                with trio.CancelScope(shield=True):
                    await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")


@asynccontextmanager
async def open_fleet(nodes: Iterable[int] | Mapping[str, int] = (), **settings: str) -> AsyncIterator[Fleet]:
    """A coordinator with nodes without agents on these ports, once all of them are ready.

    A mapping gives names, and `;slots=N` may follow a name there: `{"a;slots=4": port}`. `settings` are environment variables.
    """
    named = nodes if isinstance(nodes, Mapping) else {f"node-{number}": port for number, port in enumerate(nodes, 1)}
    entries = [(name.partition(";"), port) for name, port in named.items()]
    backends = ",".join(f"{name}=http://127.0.0.1:{port}{semicolon}{options}" for (name, semicolon, options), port in entries)
    with tempfile.TemporaryDirectory() as place:
        environ = {
            "ROUTER_HOST": "127.0.0.1", "ROUTER_PORT": "0", "ROUTER_DATA_DIR": place, "OLLAMA_BACKENDS": backends,
            "ROUTER_LOG_LEVEL": "error", "ROUTER_STOP_TIMEOUT": "500ms",
        }  # fmt: skip
        edge = current()
        if edge is Edge.GATEWAYS:
            environ["OLLAMA_BACKENDS"] = ""
        if edge is Edge.DIRECT:
            environ["ROUTER_NGINX_DIRECT"] = "true"
        async with trio.open_nursery() as nursery:
            put_database(Path(place))
            coordinator = Coordinator(load({**environ, **settings}))
            await nursery.start(coordinator.run)
            fleet = Fleet(coordinator, coordinator.ports[0], Path(place), nursery)
            if edge is Edge.GATEWAYS:
                nodes = [(name, int(options[6:]) if options else None, port) for (name, _, options), port in entries]
                fleet.local_agents = await with_gateways(fleet, nursery, nodes)
            await fleet.wait_ready(len(entries))
            if edge.nginx:
                fleet.nginx = await behind_nginx(fleet, nursery)
                fleet.port = fleet.nginx.port
            yield fleet
            if fleet.nginx is not None:
                await fleet.nginx.stop()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def serving(*servers: RawServer) -> AsyncIterator[list[int]]:
    """The ports of `servers`, which serve until the block is left."""
    async with trio.open_nursery() as nursery:
        yield [await nursery.start(server.run) for server in servers]
        nursery.cancel_scope.cancel()


async def many(count: int, at_once: int, job: Callable[[int], Awaitable[None]]) -> None:
    """`job(0)` ... `job(count - 1)`, so many at a time."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await job(number)

    async with trio.open_nursery() as nursery:
        for _ in range(min(count, at_once)):
            nursery.start_soon(worker)


class Tap(RawServer):
    """Stands in front of a node and keeps the exact bodies of what goes in, without touching a byte."""

    def __init__(self, node_port: int) -> None:
        super().__init__(self._pass_on)
        self._node_port = node_port
        self.bodies: list[tuple[str, bytes]] = []
        """(target, body) of every POST."""

    async def _pass_on(self, caller: Caller) -> None:
        if caller.method == "POST":
            self.bodies.append((caller.target, caller.body))
        async with await trio.open_tcp_stream("127.0.0.1", self._node_port) as node:
            await node.send_all(caller.head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) + b"\r\n\r\n" + caller.body)
            while data := await node.receive_some():
                await caller.send(data)
        raise Hangup
