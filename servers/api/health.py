"""Whether the coordinator lives, is ready, and its numbers. `/livez` and `/readyz` are open, they tell nothing else."""

import trio
from quart import Response
from quart_trio import QuartTrio

from servers.access import Area
from servers.api.web import Web, guarded, reply


def add_routes(app: QuartTrio, web: Web) -> None:
    """`/livez`, `/readyz`, `/metrics`."""

    @app.get("/livez")
    async def alive() -> Response:
        return reply({"status": "ok"})

    @app.get("/readyz")
    async def ready() -> Response:
        if not web.listening():
            return _not_ready("the router is starting or stopping")
        agents = [agent for agent in web.driver.router.agents() if agent.status != "pending"]
        if agents and not any(agent.state == "ready" for agent in agents):
            return _not_ready(f"none of {len(agents)} known nodes is ready")
        return reply({"status": "ready"})

    @app.get("/metrics")
    @guarded(web, Area.MANAGEMENT)
    async def metrics() -> Response:
        router, store = web.driver.router, web.memory.store
        snapshot = web.metrics.snapshot(router.statistics(), router.agents(), store.written, deleted_bytes=store.deleted_bytes)
        return Response(await trio.to_thread.run_sync(snapshot.exposition), content_type="text/plain; version=0.0.4; charset=utf-8")


def _not_ready(why: str) -> Response:
    response = reply({"status": "not ready", "error": why}, 503)
    response.headers["Retry-After"] = "1"
    return response
