"""Asks nodes that do not report themselves: what they are, what they hold, what is loaded.

Decides when to ask, never what an answer means. Asked are nodes without an agent, and agents that registered without a gateway (the
seed's): those report their load but not their models, so their lists are asked for; whether they live is left to their heartbeats, which
the router sees to.
Invariants: each node has tasks of its own, so a slow one delays no other; `/api/ps` is never a sign of life or death; answers are
bounded in size and time; what one question costs does not grow with the number of nodes, and many nodes are not asked in one instant.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import trio

from core.events import Event, NodePolled, NodeSilent, Upstream
from core.units import MIB, AgentId, Instant
from edge.headers import own_request
from edge.pool import DialFailed, Pool
from edge.wire_client import UpstreamConnection, UpstreamCut
from edge.wire_watch import Watch
from servers import clock

LOADED_EVERY_S: Final = 2.0
"""How often `/api/ps` is asked, and how often everything while a node is away."""

CONNECT_LIMIT_S: Final = 3.0
"""No connection within this time counts as refused (contract 2)."""

CHECK_GAP_S: Final = 0.25
"""Between two full checks of a node, however often it is probed."""

ANSWER_LIMIT_S: Final = 30.0
"""A node that is slow to answer is busy, not dead: 20 s were seen."""

ANSWER_MAX_BYTES: Final = 32 * MIB
PARSE_INLINE_BYTES: Final = 256 * 1024
"""Longer lists are parsed in a worker thread."""

NODES_MAX: Final = 4096

STARTS_APART_S: Final = 0.001
"""Between the first checks of nodes that are known at the start; what is asked later keeps these distances."""


class _Models(msgspec.Struct, frozen=True):
    models: list[Any] | None = None


class _Version(msgspec.Struct, frozen=True):
    version: str


class _BadAnswer(Exception):
    """The node answered, but not what was asked."""


@dataclass(slots=True)
class _Node:
    agent_id: AgentId
    upstream: Upstream
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    wake: trio.Event = field(default_factory=trio.Event)
    answers: bool = False


class Poller:
    """All polled nodes of one coordinator. `apply` tells the router; `now` is its time; `known` whether it still knows a node."""

    def __init__(
        self, apply: Callable[[Event], object], *, now: Callable[[], Instant], known: Callable[[AgentId], bool], check_every_s: float
    ) -> None:
        self._apply = apply
        self._known = known
        self._now = now
        self._check_every_s = check_every_s
        self._nodes: dict[AgentId, _Node] = {}
        self._nursery: trio.Nursery | None = None
        self._pool: Pool | None = None

    async def run(self) -> None:
        """Poll until cancelled."""
        watch = Watch()
        self._pool = Pool(watch, dial_limit_s=CONNECT_LIMIT_S)
        try:
            async with trio.open_nursery() as self._nursery:
                await self._nursery.start(watch.run)
                for number, node in enumerate(self._nodes.values()):
                    self._start(node, after_s=number * STARTS_APART_S)
                await trio.sleep_forever()
        finally:
            self._nursery = None
            self._pool.close_idle()

    def watch(self, agent_id: AgentId, upstream: Upstream) -> None:
        """Poll this node from now on."""
        watched = self._nodes.get(agent_id)
        if watched is not None and watched.upstream == upstream:
            watched.wake.set()
            return
        self.forget(agent_id)
        if len(self._nodes) >= NODES_MAX:
            return
        node = self._nodes[agent_id] = _Node(agent_id, upstream)
        if self._nursery is not None:
            self._start(node)

    def forget(self, agent_id: AgentId) -> None:
        """Poll this node no more."""
        if (node := self._nodes.pop(agent_id, None)) is not None:
            node.scope.cancel()

    def probe(self, agent_id: AgentId) -> None:
        """Ask this node everything, now."""
        if (node := self._nodes.get(agent_id)) is not None:
            node.wake.set()

    # ------------------------------------------------------------ one node

    def _start(self, node: _Node, *, after_s: float = 0.0) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._poll, node, after_s)

    async def _poll(self, node: _Node, after_s: float) -> None:
        with node.scope:
            await trio.sleep(after_s)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_checked, node)
                nursery.start_soon(self._keep_loaded_known, node)

    async def _keep_checked(self, node: _Node) -> None:
        """Full checks; at once when probed. Ends when the router does not know the node any more."""
        while self._known(node.agent_id):
            await self._check(node)
            await trio.sleep(CHECK_GAP_S)
            with trio.move_on_after(self._check_every_s if node.answers else min(LOADED_EVERY_S, self._check_every_s)):
                await node.wake.wait()
            node.wake = trio.Event()
        self.forget(node.agent_id)

    async def _check(self, node: _Node) -> None:
        asked_at = self._now()
        try:
            version = (await self._get(node, "/api/version", _Version)).version
            installed = await self._installed(node)
        except DialFailed:
            self._silent(node, refused=True)
        except (UpstreamCut, _BadAnswer):
            self._silent(node, refused=False)
        else:
            first, node.answers = not node.answers, True
            self._polled(node, asked_at, version=version, installed=installed, alive=True)
            if first:
                await self._ask_loaded(node)

    async def _installed(self, node: _Node) -> list[Any] | None:
        """None when the node lives but cannot tell."""
        try:
            return (await self._get(node, "/api/tags", _Models)).models or []
        except _BadAnswer:
            return None

    async def _keep_loaded_known(self, node: _Node) -> None:
        while True:
            await trio.sleep(LOADED_EVERY_S)
            if node.answers:
                await self._ask_loaded(node)

    async def _ask_loaded(self, node: _Node) -> None:
        asked_at = self._now()
        try:
            loaded = (await self._get(node, "/api/ps", _Models)).models or []
        except DialFailed:
            node.wake.set()
        except (UpstreamCut, _BadAnswer):
            pass
        else:
            self._polled(node, asked_at, loaded=loaded, alive=False)

    def _polled(self, node: _Node, asked_at: Instant, **parts: Any) -> None:
        self._apply(NodePolled(agent_id=node.agent_id, now_unix=clock.unix_ms(), asked_at=asked_at, **parts))

    def _silent(self, node: _Node, *, refused: bool) -> None:
        node.answers = False
        self._apply(NodeSilent(agent_id=node.agent_id, refused=refused))

    async def _get(self, node: _Node, path: str, kind: type[Any]) -> Any:
        """The answer as a `kind`. Raises DialFailed, UpstreamCut, _BadAnswer."""
        data: bytearray | None = None
        with trio.move_on_after(ANSWER_LIMIT_S + CONNECT_LIMIT_S):
            data = await self._ask(node, path)
        if data is None:
            raise _BadAnswer  # it took too long
        try:
            if len(data) <= PARSE_INLINE_BYTES:
                return msgspec.json.decode(data, type=kind)
            return await trio.to_thread.run_sync(lambda: msgspec.json.decode(data, type=kind))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise _BadAnswer from None

    async def _ask(self, node: _Node, path: str) -> bytearray:
        """The body of a good answer, over a kept connection when there is one. Raises DialFailed, UpstreamCut, _BadAnswer."""
        assert self._pool is not None
        kept = self._pool.take(node.upstream)
        if kept is not None:
            try:
                return await self._ask_over(kept, path)
            except UpstreamCut:
                if kept.bytes_received:
                    raise
        return await self._ask_over(await self._pool.dial(node.upstream), path)

    async def _ask_over(self, conn: UpstreamConnection, path: str) -> bytearray:
        """The body of a good answer; the connection is kept or closed. Raises UpstreamCut, _BadAnswer."""
        assert self._pool is not None
        data = bytearray()
        try:
            await conn.send(own_request(conn.upstream, path.encode("ascii"), method=b"GET"))
            if (await conn.read_head()).status != 200:
                raise _BadAnswer
            while part := await conn.read_some():
                data += part
                if len(data) > ANSWER_MAX_BYTES:
                    raise _BadAnswer
        finally:
            self._pool.give_back(conn)  # closes it unless its answer was read to the end
        return data
