"""What `tests.bench.counted` counts: the router's parts, put together in this process as a coordinator puts them together.

Decides what belongs to which side; knows nothing of counting. Hardly anything here happens by the clock.
"""

import gc
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from core.aliases import Aliases
from core.config import RouterConfig
from core.events import BackendAdded, Effect, Event, Forward, Lease, NodePolled, Record, RequestCame, Upstream
from core.router import Router
from core.units import AgentId, LeaseId, RequestId, UnixMs
from edge.body import BodyBudget
from edge.desk import Desk
from edge.listener import Listener, quick_routes
from edge.live import ProxyOptions
from edge.pool import Pool
from edge.proxy import Proxy
from edge.quick import Quick
from edge.wire import ClientConnection, RequestHead, Watch
from servers import clock
from servers.access import Access
from servers.driver import Driver
from servers.memory import Memory
from servers.metrics import Metrics
from servers.nginx_edge import NginxEdge, Sockets
from servers.settings import Settings
from servers.sinks import RecordRing, Sinks
from servers.tokens import Tokens
from tests.bench.programs import SMALL

MODEL_ROW = {"name": SMALL, "model": SMALL, "size": 1_000_000_000, "digest": "1" * 64}
LOADED_ROW = {**MODEL_ROW, "size_vram": 1_000_000_000, "expires_at": "2318-01-01T00:00:00Z", "context_length": 4096}

EMBEDDED_SIDES = ("edge", "bare", "coordinator", "history")
SELECTION_SIDES = ("selection", "selection-bare")


class NoSinks:
    """Takes the router's effects, for nothing."""

    def note(self, level: str, event: str, fields: dict[str, Any]) -> None: ...
    def count(self, name: str, labels: dict[str, str], by: int) -> None: ...
    def record(self, record: Record) -> None: ...
    def probe(self, agent_id: AgentId) -> None: ...


class Bare:
    """Decides the same each time, and makes no records: in place of a driver with its router."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._desks: dict[RequestId, Desk] = {}

    def apply(self, event: Event) -> list[Effect]:
        """Have a request forwarded; anything else is of no consequence."""
        if type(event) is RequestCame:
            request_id = event.request_id
            lease_id = LeaseId(f"{request_id}/1")
            lease = Lease(
                id=lease_id, request_id=request_id, agent_id=AgentId("node"), agent_name="node", upstream=self._upstream, attempt=1
            )
            self._desks[request_id].put(Forward(request_id=request_id, lease=lease))
        return []

    def open_desk(self, request_id: RequestId) -> Desk:
        """As `Driver.open_desk`."""
        desk = self._desks[request_id] = Desk(request_id)
        return desk

    def keep_desk(self, desk: Desk) -> None:
        """As `Driver.keep_desk`."""
        self._desks[desk.request_id] = desk

    def close_desk(self, request_id: RequestId) -> None:
        """As `Driver.close_desk`."""
        del self._desks[request_id]


def add_node(driver: Driver, name: str, port: int) -> None:
    """A node that has the small model in memory."""
    agent_id = AgentId(name)
    driver.apply(BackendAdded(agent_id=agent_id, name=name, upstream=Upstream(host="127.0.0.1", port=port), slots=1024, now_unix=UnixMs(0)))
    driver.apply(NodePolled(agent_id=agent_id, version="0.33.0", installed=[MODEL_ROW], loaded=[LOADED_ROW], now_unix=UnixMs(0)))


class _NoWeb:
    async def serve(self, conn: ClientConnection, head: RequestHead, /, *, prefix: bytes = b"") -> None:
        raise AssertionError("nothing but small chats is asked here")


def _report(error: Exception) -> None:
    raise error


def _tick() -> Callable[[], float]:
    return trio.lowlevel.current_clock().current_time


def _access(settings: Settings) -> tuple[Access, Tokens]:
    tokens = Tokens(admin_token="administrator", join_token=None, fleet_secret="fleet-secret")
    return Access(settings, tokens, our_ports=()), tokens


async def serve(side: str, listening: socket.socket, node_port: int, tally: socket.socket | None) -> None:
    """One side, on a listening socket, until it is killed."""
    listening.setblocking(False)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 25, 50)  # as the coordinator's own
    with TemporaryDirectory() as place:
        if tally is not None:
            tally.setblocking(False)
            await _serve_selection(side, Sockets(listening, tally), node_port, Path(place))
        else:
            await _serve_embedded(side, listening, node_port, Path(place))


async def _serve_embedded(side: str, listening: socket.socket, node_port: int, place: Path) -> None:
    watch = Watch()
    plain, records = side in ("edge", "bare"), RecordRing()
    sinks = NoSinks() if plain else Sinks(Metrics(), records)
    driver = Driver(Router(RouterConfig(), now=clock.now()), sinks, clock=_tick())
    add_node(driver, "node", node_port)
    settings = Settings(data_dir=place, auth="auto")
    access, tokens = _access(settings)
    memory: Memory | None = None
    records.of_keys.append(access.spent)
    if side == "history":
        memory = Memory(settings, place)
        memory.restore(access, tokens)
        records.listeners.append(memory.history.record)
    proxy = Proxy(
        Bare(Upstream(host="127.0.0.1", port=node_port)) if side == "bare" else driver,
        Pool(watch),
        budget=BodyBudget(),
        options=ProxyOptions(answer_hold_bytes=1 << 20),
        new_id=clock.new_request_id,
        credential_of=tokens.credential_of,
        recorder=None if memory is None else memory.recorder,
        aliases=Aliases(()),
        clock=_tick(),
        **({} if plain else {"client_of": access.client_of, "judge_model": access.judge_model}),
    )
    gate: Any = (lambda *_: None) if plain else access.gate
    known: Any = {} if plain else {"lasting_client": access.lasting_client}
    quick = Quick(proxy, gate=gate, routes=quick_routes(None), new_id=clock.new_request_id, report=_report, **known)
    listener = Listener(
        gate=gate,
        proxy=proxy,
        web=_NoWeb(),
        watch=watch,
        new_id=clock.new_request_id,
        report=_report,
        quick=quick.lane,
    )
    async with trio.open_nursery() as nursery:
        if memory is not None:
            memory.start()
            nursery.start_soon(memory.run)
            while memory.store._feed.pid is None:  # noqa: ASYNC110  # nobody else waits for that
                await trio.sleep(0.05)
        await nursery.start(watch.run)
        await listener.serve([listening])


async def _serve_selection(side: str, sockets: Sockets, node_port: int, place: Path) -> None:
    driver = Driver(Router(RouterConfig(), now=clock.now()), NoSinks(), clock=_tick())
    add_node(driver, "node", node_port)
    settings = Settings(nginx_direct=True, data_dir=place, auth="auto")
    access, tokens = _access(settings)
    decides: Any = driver
    if side == "selection-bare":
        decides = Bare(Upstream(host="127.0.0.1", port=node_port))
        decides.router = driver.router
    edge = NginxEdge(
        settings, decides, access=access, credential_of=tokens.credential_of, port=1,
        aliases=Aliases(()), records=None, tick=_tick(), report=_report, count=lambda *_: None,
    )  # fmt: skip
    edge.tally.together_s = 3600.0  # where all takes fifty times as long, 2 ms are over with every line
    await edge.run(sockets)
