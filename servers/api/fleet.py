"""The fleet as one Ollama: `/`, versions, lists of models (`ollama-wire.md` 1 and 3.1).

Decides nothing about rows (`core.fleet` does); keeps what was merged, and merges anew only what changed. Invariants: a list is answered
from what nodes said last, so a dead node cannot delay it; no step of merging or writing takes 2 ms.
"""

from collections.abc import Callable
from typing import Any, Final

import msgspec
import trio
from quart import Response
from quart_trio import QuartTrio

from core import fleet
from core.aliases import ALIAS_FIELD, Aliases
from core.fleet import NodeInventory, Row
from core.lifecycle import AgentState
from core.units import AgentId, Instant, ModelKey
from edge.headers import go_json
from servers.access import Area
from servers.api.web import Web, guarded, ollama_json

MERGE_INLINE_ROWS: Final = 300
"""More rows of loaded models are merged in a worker thread, so that the loop never stands still for 2 ms."""
GRACE_S: Final = 60.0
"""How long the models of a node that went offline stay in the lists after it was seen ready; what was taken out on purpose goes at once."""
WRITE_ROWS: Final = 50
"""Rows that are written in one step."""

FIRST_VERSION: Final = "0.0.0"
"""Before any node told its version."""


def add_routes(app: QuartTrio, web: Web) -> None:
    """Ollama's routes that no single node answers."""
    known = Aliases(web.settings.aliases)
    lists = _Lists(web.driver.router.inventories, known, now=web.driver.now, is_offline=lambda agent_id: _is_offline(web, agent_id))
    version = [FIRST_VERSION]

    @app.get("/")
    async def root() -> Response:
        return Response(b"Ollama is running", content_type="text/plain; charset=utf-8")

    @app.get("/api/version")
    @guarded(web, Area.INFERENCE)
    async def lowest_version() -> Response:
        version[0] = fleet.lowest_version(web.driver.router.inventories(), version[0])
        return ollama_json({"version": version[0]})

    @app.get("/api/status")
    @guarded(web, Area.INFERENCE)
    async def status() -> Response:
        return ollama_json({"cloud": {"disabled": True, "source": "config"}})

    @app.get("/api/tags")
    @guarded(web, Area.INFERENCE)
    async def list_tags() -> Response:
        return Response(await lists.tags(), content_type="application/json; charset=utf-8")

    @app.get("/api/ps")
    @guarded(web, Area.INFERENCE)
    async def list_loaded() -> Response:
        return Response(await lists.loaded(), content_type="application/json; charset=utf-8")

    @app.get("/v1/models")
    @guarded(web, Area.INFERENCE)
    async def list_v1_models() -> Response:
        return Response(await lists.v1_models(), content_type="application/json")


def _is_offline(web: Web, agent_id: AgentId) -> bool:
    agent = web.driver.router.agent(agent_id)
    return agent is not None and agent.state == AgentState.OFFLINE.value


class _Lists:
    """The fleet's lists as bytes. What changed is merged and written anew, a step at a time, by the first who asks; nothing else is."""

    def __init__(
        self,
        nodes: Callable[[], list[NodeInventory]],
        aliases: Aliases,
        *,
        now: Callable[[], Instant] = lambda: Instant(0.0),
        is_offline: Callable[[AgentId], bool] = lambda _: False,
    ) -> None:
        self._nodes = nodes
        self._now = now
        self._is_offline = is_offline
        self._ready_at: dict[AgentId, Instant] = {}
        self._aliases = aliases
        self._index = fleet.TagsIndex()
        self._lock = trio.Lock()
        self._written: dict[ModelKey, tuple[Row, bytes, bytes]] = {}
        self._tags = b'{"models":[]}'
        self._v1_models = _NO_V1_MODELS
        self._loaded_of: list[Any] = []
        self._loaded = b'{"models":[]}'

    async def tags(self) -> bytes:
        """`/api/tags`."""
        await self._refresh()
        return self._tags

    async def v1_models(self) -> bytes:
        """`/v1/models`."""
        await self._refresh()
        return self._v1_models

    async def loaded(self) -> bytes:
        """`/api/ps`."""
        nodes = await self._refresh()
        lists = [node.loaded for node in nodes if node.ready and node.loaded]
        if len(lists) != len(self._loaded_of) or any(one is not other for one, other in zip(lists, self._loaded_of, strict=True)):
            canonical = self._index.canonical
            if sum(map(len, lists)) > MERGE_INLINE_ROWS:
                rows = await trio.to_thread.run_sync(fleet.merged_ps, nodes, canonical.copy())
            else:
                rows = fleet.merged_ps(nodes, canonical)
            self._loaded_of, self._loaded = lists, go_json({"models": rows})
        return self._loaded

    async def _refresh(self) -> list[NodeInventory]:
        """Merge what changed. Whoever comes meanwhile waits for it: some milliseconds, however many nodes hang."""
        nodes = self._nodes()
        if self._index.differs(self._listed(nodes)):
            async with self._lock:
                nodes = self._nodes()
                for _ in self._index.update(self._listed(nodes)):
                    await trio.lowlevel.checkpoint()
                await self._write()
        return nodes

    def _listed(self, nodes: list[NodeInventory]) -> list[NodeInventory]:
        """`nodes`, those that went offline a moment ago counted as ready: models that come and go confuse people (`ollama-wire.md` 3.3)."""
        now, listed = self._now(), []
        for node in nodes:
            if node.ready:
                self._ready_at[node.agent_id] = now
            elif (ready_at := self._ready_at.get(node.agent_id)) is not None:
                if now - ready_at < GRACE_S and self._is_offline(node.agent_id):
                    node = msgspec.structs.replace(node, ready=True)
                else:
                    del self._ready_at[node.agent_id]
            listed.append(node)
        return listed

    async def _write(self) -> None:
        rows = self._aliases.listed(self._index.rows) if self._aliases else self._index.rows
        written = {}
        for number, (key, row) in enumerate(rows, 1):
            known = self._written.get(key)
            written[key] = known if known is not None and known[0] is row else (row, go_json(row), go_json(_v1_row(row)))
            if number % WRITE_ROWS == 0:
                await trio.lowlevel.checkpoint()
        self._written = written
        self._tags = b'{"models":[%b]}' % b",".join([tags for _, tags, _ in written.values()])
        data = b",".join([v1 for _, _, v1 in written.values()])
        self._v1_models = b'{"object":"list","data":[%b]}\n' % data if rows else _NO_V1_MODELS


def _v1_row(row: Row) -> Row:
    told = {ALIAS_FIELD: row[ALIAS_FIELD]} if ALIAS_FIELD in row else {}
    return {**fleet.v1_model(row), **told}


_NO_V1_MODELS: Final = b'{"object":"list","data":null}\n'
