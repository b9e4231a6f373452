"""What only an admin asks: join tokens, who waits, and why a request went where it went."""

from quart import Response
from quart_trio import QuartTrio

from core.errors import RemoteError
from core.units import RequestId
from servers import clock
from servers.access import Area
from servers.api.web import Web, guarded, reply


def add_routes(app: QuartTrio, web: Web) -> None:
    """`/api/admin/...`, `/api/queue`, `/api/requests/...`."""

    @app.post("/api/admin/join-tokens")
    @guarded(web, Area.MANAGEMENT)
    async def mint_join_token() -> Response:
        token, until = web.tokens.mint_join_token(now=clock.unix_ms())
        return reply({"token": token, "expires_at": clock.rfc3339(until)}, 201)

    @app.get("/api/queue")
    @guarded(web, Area.MANAGEMENT)
    async def queue() -> Response:
        waiting = web.driver.router.waiting()
        return reply({"waiting": waiting, "total": len(waiting)})

    @app.get("/api/requests/<request_id>/why")
    @guarded(web, Area.MANAGEMENT)
    async def why(request_id: str) -> Response:
        explanation = web.driver.router.why(RequestId(request_id))
        if explanation is None:
            raise RemoteError("no recent request has this id", status=404)
        return reply(explanation)
