"""A simulated Ollama on a real socket.

    sim = SimulatedOllama(name="fast", models=["llama3.2:3b"], speed=2.0)
    async with sim.serve():
        ... sim.url ...

Decides who listens and for how long; what is said is `routes` and `inference`, when is `core.simulation.node`. It always says that
it is simulated: in the header `X-Simulated-Ollama`, unless the knob `banner` is off.

Invariants: everything that a connection started ends with it; a stopped server can be started again, with nothing loaded.
"""

import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from agent.simulated.engine import LOG_LIMIT, Engine, RequestLog
from agent.simulated.faults import INFERENCE, Faults
from agent.simulated.inference import Inference, say_cancelled
from agent.simulated.library import Library
from agent.simulated.managing import Managing
from agent.simulated.models import Knobs, NodeSpec, SimulatedModel, guessed_model
from agent.simulated.registry import Registry
from agent.simulated.routes import Routes
from agent.simulated.transfer import Transfers
from agent.simulated.wire import Connection, ConnectionOver, Reply, Request
from core.simulation.node import Change, RunnerChanged

BACKLOG = 1024
LISTS = ("/api/tags", "/v1/models")
"""What is not answered before the models have been read."""


class SimulatedOllama:
    """One simulated node. Settings beyond name and models are the fields of `Knobs`."""

    def __init__(
        self,
        *,
        name: str = "simulated",
        models: Iterable[SimulatedModel | str] = ("llama3.2:3b",),
        knobs: Knobs | None = None,
        registry: Registry | None = None,
        **settings: Any,
    ) -> None:
        self.name = name
        self.knobs = msgspec.structs.replace(knobs, **settings) if knobs is not None else Knobs(**settings)
        known = [guessed_model(model) if isinstance(model, str) else model for model in models]
        self.library = Library(known, self.knobs, time.time_ns)
        self.transfers = Transfers(self.library, registry or Registry())
        self.engine = Engine(self.knobs.node_timing(), self.library.timings)
        self.faults = Faults(self.knobs.seed)
        self.log: deque[RequestLog] = deque(maxlen=LOG_LIMIT)
        self.connections_accepted = 0
        self.host = ""
        self.port = 0
        self._managing = Managing(self.library, self.transfers)
        self._routes = Routes(self.library, self._managing, self.engine, self.knobs, time.time_ns)
        self._inference = Inference(self.engine, self.faults, self.knobs, self.library, time.time_ns)
        self._banner = name.encode("ascii", "replace") if self.knobs.banner else b""
        self._connections: set[Connection] = set()
        self._listening: trio.socket.SocketType | None = None
        self._scope: trio.CancelScope | None = None
        self._answers_from = 0.0
        self._stopped = trio.Event()
        self._opened = trio.Event()
        self.faults.on_change = self._mind_port

    @classmethod
    def from_spec(cls, spec: NodeSpec) -> "SimulatedOllama":
        """The node that `spec` describes."""
        return cls(name=spec.name, models=spec.models, knobs=spec.knobs)

    # -- what tests look at

    @property
    def url(self) -> str:
        """Where it listens, or listened last."""
        return f"http://{self.host}:{self.port}"

    @property
    def in_flight(self) -> int:
        """Requests that the machine works on or keeps waiting."""
        return self.engine.node.in_flight

    @property
    def models(self) -> dict[tuple[str, ...], SimulatedModel]:
        """The models that it has, under their normalised names; a test may take some away or put others in their place."""
        return self.library.models

    @property
    def registry(self) -> Registry:
        """What it pulls from."""
        return self.transfers.registry

    @property
    def max_in_flight(self) -> int:
        """The most there ever were at once."""
        return self.engine.max_in_flight

    @property
    def loads(self) -> list[RunnerChanged]:
        """The loads that were begun, in order."""
        return [change for change in self.engine.changes if change.change is Change.LOADING]

    @property
    def evictions(self) -> list[RunnerChanged]:
        """The models that had to make room, in order."""
        return [change for change in self.engine.changes if change.change is Change.UNLOADED and change.why in ("evicted", "reload")]

    # -- life

    def bind(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Take the port, without serving yet; `run` does so too. Returns the port; raises OSError when it is taken."""
        self.host, self.port = host, port
        self._listen()
        return self.port

    async def run(self, host: str = "127.0.0.1", port: int = 0, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled, stopped or killed; reports its port. May be called again afterwards."""
        self.engine.restart()
        self.library.restarted()
        self._answers_from = trio.current_time() + self.knobs.startup_s
        self._stopped = trio.Event()
        try:
            if self._listening is None:
                self.bind(host, port)
            with trio.CancelScope() as self._scope:
                self._mind_port()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.engine.run)
                    nursery.start_soon(self._accept, nursery)
                    task_status.started(self.port)
        finally:
            self._hang_up()
            self._scope = None
            self._stopped.set()

    @asynccontextmanager
    async def serve(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator["SimulatedOllama"]:
        """Serve as long as the block runs. Raises OSError when the port is taken."""
        self.bind(host, port)
        async with trio.open_nursery() as nursery:
            await nursery.start(self.run, host, port)
            try:
                yield self
            finally:
                nursery.cancel_scope.cancel()

    async def stop(self) -> None:
        """As SIGTERM does it: every connection is closed at once, nothing is drained. Returns when all is over."""
        self.kill()
        await self._stopped.wait()

    def kill(self) -> None:
        """As `stop`, without waiting."""
        self._hang_up()
        if self._scope is not None:
            self._scope.cancel()

    def _hang_up(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        for connection in list(self._connections):
            connection.close()

    def _listen(self) -> None:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((self.host, self.port))
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
        self.port = sock.getsockname()[1]
        self._listening = trio.socket.from_stdlib_socket(sock)

    def _mind_port(self) -> None:
        """Close or open the port as the faults say."""
        if self.faults.refusing:
            if self._listening is not None:
                self._listening.close()
                self._listening = None
        elif self._listening is None and self._scope is not None:
            self._listen()
            self._opened.set()

    async def _accept(self, nursery: trio.Nursery) -> None:
        while True:
            if self._listening is None:
                self._opened = trio.Event()
                await self._opened.wait()
                continue
            try:
                sock, _ = await self._listening.accept()
            except (OSError, trio.ClosedResourceError):
                await trio.lowlevel.checkpoint()
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections_accepted += 1
            nursery.start_soon(self._converse, Connection(sock, self._managing.unread))

    # -- a connection

    async def _converse(self, connection: Connection) -> None:
        self._connections.add(connection)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.read)
                while (request := await connection.next_request()) is not None:
                    if not await self._answer(connection, request):
                        break
                if connection.lingers:
                    await connection.linger()
                nursery.cancel_scope.cancel()
        finally:
            self._connections.discard(connection)
            connection.close()

    async def _answer(self, connection: Connection, request: Request) -> bool:
        """Answer one request. False: the connection is over."""
        reply = Reply(connection, request, time.time_ns, banner=self._banner)
        log = RequestLog(
            request_id=f"{self.name}/{len(self.log)}/{id(request)}",
            method=request.method,
            route=request.path,
            headers=request.headers,
            arrival=trio.current_time(),
        )
        self.log.append(log)
        try:
            with connection.begin() as scope:
                await trio.sleep_until(self._answers_from)
                if await self._routes.gate(request, reply):
                    await self._served(request, reply, log)
            if scope.cancelled_caught:
                log.cancelled_at = connection.gone_at
                with trio.move_on_after(1):
                    await say_cancelled(reply, log)
                return False
        except ConnectionOver:
            if log.fault is None:  # nobody but the client can have ended it
                log.cancelled_at = log.cancelled_at or connection.gone_at or trio.current_time()
            return False
        finally:
            log.status, log.first_byte, log.last_byte = reply.status, reply.first_byte, reply.last_byte
        return reply.keep_alive and not reply.hang_up

    async def _served(self, request: Request, reply: Reply, log: RequestLog) -> None:
        if request.path in INFERENCE:
            await self._inference.serve(request, reply, log)
            return
        fault = self.faults.pick(request.path, None)
        log.fault = fault.kind if fault else None
        if fault is not None and await self._inference.at_once(fault, reply):
            return
        if fault is not None and fault.kind == "stall":
            await trio.sleep(min(fault.seconds, 1e9))
        if request.path in LISTS:
            await trio.sleep_until(self._answers_from + self.knobs.tags_s)
        await self._routes.answer(request, reply)
