"""API keys over HTTP (contract 8): make, list, remove.

Decides their form in JSON, nothing about them (`core.keys` does). Invariant: a key's secret leaves once, in the answer to its making.
"""

from datetime import datetime
from typing import Any

import msgspec
from quart import Response
from quart_trio import QuartTrio

from core.errors import RemoteError
from core.keys import INFERENCE, Key, Use, make_key
from core.names import display
from core.units import UnixMs
from servers import clock
from servers.access import Area
from servers.api.web import Web, empty, guarded, read, reply


class _Wanted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    scopes: tuple[str, ...] = (INFERENCE,)
    models: tuple[str, ...] = ()
    expires_at: str | None = None
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None


def add_routes(app: QuartTrio, web: Web) -> None:
    """`/api/keys`."""
    keys = web.access.keys

    @app.post("/api/keys")
    @guarded(web, Area.MANAGEMENT)
    async def make() -> Response:
        wanted = await read(_Wanted)
        made = make_key(
            key_id=clock.new_request_id(),
            name=wanted.name,
            now=clock.unix_ms(),
            scopes=wanted.scopes,
            models=wanted.models,
            expires_at=_moment(wanted.expires_at),
            requests_per_minute=wanted.requests_per_minute,
            tokens_per_day=wanted.tokens_per_day,
        )
        keys.add(made)
        secret = web.tokens.mint_key(made.key_id)
        web.memory.save_key(made, Use())
        return reply({**_shown(made, Use()), "key": secret}, 201)

    @app.get("/api/keys")
    @guarded(web, Area.MANAGEMENT)
    async def listed() -> Response:
        return reply([_shown(key, use) for key, use in keys.listed()])

    @app.delete("/api/keys/<key_id>")
    @guarded(web, Area.MANAGEMENT)
    async def remove(key_id: str) -> Response:
        keys.remove(key_id)
        web.tokens.forget_key(key_id)
        web.memory.forget_key(key_id)
        return empty()


def _moment(text: str | None) -> UnixMs | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise RemoteError("expires_at must be a moment in RFC 3339 with its zone, such as 2027-01-31T00:00:00Z")
    return UnixMs(round(moment.timestamp() * 1000))


def _shown(key: Key, use: Use) -> dict[str, Any]:
    return {
        "id": key.key_id,
        "name": key.name,
        "scopes": key.scopes,
        "models": [display(model) for model in key.models],
        "created_at": clock.rfc3339(key.created_at),
        "expires_at": None if key.expires_at is None else clock.rfc3339(key.expires_at),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_day": key.tokens_per_day,
        "used": {
            "requests": use.requests,
            "refused": use.refused,
            "prompt_tokens": use.prompt_tokens,
            "output_tokens": use.output_tokens,
            "tokens_today": use.tokens_today,
            "last_used_at": None if use.last_used_at is None else clock.rfc3339(use.last_used_at),
        },
    }
