"""The fleet as one Ollama: `/`, versions, lists of models (`ollama-wire.md` 1 and 3.1).

Decides nothing about rows (`core.fleet` does); keeps the last merge as long as no node's lists changed. Invariant: a list is answered
from what nodes said last, so a dead node cannot delay it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import trio
from quart import Response
from quart_trio import QuartTrio

from core import fleet
from core.fleet import NodeInventory
from edge.headers import go_json
from servers.access import Area
from servers.api.web import Web, guarded, ollama_json

MERGE_INLINE_ROWS: Final = 500
"""Longer lists are merged in a worker thread, so that the loop never stands still for 2 ms."""

FIRST_VERSION: Final = "0.0.0"
"""Before any node told its version."""


def add_routes(app: QuartTrio, web: Web) -> None:
    """Ollama's routes that no single node answers."""
    tags = _Merged(lambda nodes: {"models": fleet.merged_tags(nodes)})
    loaded = _Merged(lambda nodes: {"models": fleet.merged_ps(nodes)})
    v1_models = _Merged(lambda nodes: {"object": "list", "data": fleet.merged_v1_models(nodes)})
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
        return Response(await tags.of(web.driver.router.inventories()), content_type="application/json; charset=utf-8")

    @app.get("/api/ps")
    @guarded(web, Area.INFERENCE)
    async def list_loaded() -> Response:
        return Response(await loaded.of(web.driver.router.inventories()), content_type="application/json; charset=utf-8")

    @app.get("/v1/models")
    @guarded(web, Area.INFERENCE)
    async def list_v1_models() -> Response:
        return Response(await v1_models.of(web.driver.router.inventories()) + b"\n", content_type="application/json")


class _Merged:
    """One merged list, as bytes, made anew only when a node's lists changed."""

    def __init__(self, merge: Callable[[Sequence[NodeInventory]], dict[str, Any]]) -> None:
        self._merge = merge
        self._nodes: list[NodeInventory] | None = None
        self._bytes = b""

    async def of(self, nodes: list[NodeInventory]) -> bytes:
        """The list that `nodes` make."""
        if self._nodes is None or not _same(nodes, self._nodes):
            rows = sum(len(node.installed) + len(node.loaded) for node in nodes)
            if rows > MERGE_INLINE_ROWS:
                data = await trio.to_thread.run_sync(self._encoded, nodes)
            else:
                data = self._encoded(nodes)
            self._nodes, self._bytes = nodes, data
            return data
        return self._bytes

    def _encoded(self, nodes: list[NodeInventory]) -> bytes:
        return go_json(self._merge(nodes))


def _same(these: list[NodeInventory], those: list[NodeInventory]) -> bool:
    """Whether two snapshots hold the very same lists (the core replaces lists, it never changes one)."""
    return len(these) == len(those) and all(
        this.agent_id == that.agent_id and this.ready == that.ready and this.installed is that.installed and this.loaded is that.loaded
        for this, that in zip(these, those, strict=True)
    )
