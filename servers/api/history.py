"""History over HTTP (contract 6): pages, one record, export, deletion, sums.

Decides the form of filters. Invariants: a bad filter is a 400 that names it; an export is read and formed by a process of its own, and
passes through here piece by piece, so memory does not grow with it; one that cannot begin is an error, one that breaks off has no end.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from datetime import datetime
from typing import Any, Final

import msgspec
import trio
from quart import Response, request
from quart_trio import QuartTrio
from sqlalchemy import Connection

from core.errors import RemoteError
from core.history import STATUSES
from core.units import UnixMs
from servers import clock
from servers.access import Area
from servers.api.web import Web, guarded, reply
from servers.aside import aside
from servers.store import queries
from servers.store.export import Wanted, shown
from servers.store.filters import Filters

PER_PAGE: Final = 100
PER_PAGE_MAX: Final = 500
TEXT_MAX: Final = 200
"""Characters of a filter."""
FLOOR_S: Final = 15.0
"""How long it is believed that there are more records than are counted."""
FLOORS_MAX: Final = 100
MINUTES: Final = 60
"""Points of the request history."""
FILTERS: Final = ("model", "agent_id", "status", "start_time", "end_time", "client", "q")
PAGING: Final = ("page", "per_page", "sort")

_ROOT: Final = "/api/dashboard/request-responses"


def add_routes(app: QuartTrio, web: Web) -> None:
    """`/api/dashboard/request-responses...` and `/api/dashboard/request-history`."""
    store, floors = web.memory.store, _Floors()

    @app.get(_ROOT)
    @guarded(web, Area.MANAGEMENT)
    async def history_page() -> Response:
        _only(*FILTERS, *PAGING)
        filters, number, per_page, sort = _filters(), _whole("page", 1, 1, 10**6), _whole("per_page", PER_PAGE, 1, PER_PAGE_MAX), _sort()
        many = floors.has(filters)
        found = await store.read(lambda c: _page(c, filters, number=number, per_page=per_page, sort=sort, many=many))
        if found["total_is_floor"] and not many:
            floors.add(filters)
        return reply(found)

    @app.delete(_ROOT)
    @guarded(web, Area.MANAGEMENT)
    async def delete_history() -> Response:
        _only(*FILTERS)
        filters = _filters()
        if filters.is_empty():
            raise RemoteError("name at least one filter, such as status=error; nothing was deleted")
        return reply({"deleted": await store.delete(filters)})

    @app.get(f"{_ROOT}/<request_id>")
    @guarded(web, Area.MANAGEMENT)
    async def history_record(request_id: str) -> Response:
        found = await store.read(lambda c: queries.one(c, request_id))
        if found is None:
            raise RemoteError("no record has this id", status=404)
        agent_id = found["agent_id"]
        agent = None if agent_id is None else web.driver.router.known(agent_id)
        return reply({**shown(found), "agent_address": None if agent is None else agent.upstream.host})

    @app.get(f"{_ROOT}/export")
    @guarded(web, Area.MANAGEMENT)
    async def export_history() -> Response:
        _only(*FILTERS, "format")
        form = request.args.get("format", "json")
        if form not in ("json", "csv"):
            raise RemoteError("format must be json or csv")
        filters = _filters()
        wanted = msgspec.msgpack.encode(Wanted(store.url, filters, form))
        response = Response(await _begun(aside("servers.store.export", wanted)))
        response.headers["Content-Type"] = "application/json" if form == "json" else "text/csv; charset=utf-8"
        day = clock.rfc3339(clock.unix_ms())[:10]
        response.headers["Content-Disposition"] = f'attachment; filename="history-{day}.{form}"'
        return response

    _add_sums(app, web)


def _add_sums(app: QuartTrio, web: Web) -> None:
    @app.get("/api/dashboard/request-history")
    @guarded(web, Area.MANAGEMENT)
    async def per_minute() -> Response:
        last = clock.unix_ms() // 60_000
        first = last - MINUTES + 1
        counted = await web.memory.store.read(lambda c: queries.minutes(c, UnixMs(first * 60_000)))
        points = {minute: {"minute": clock.rfc3339(UnixMs(minute * 60_000)), "success": 0, "error": 0} for minute in range(first, last + 1)}
        for minute, status, count in counted:
            if minute in points:
                points[minute]["success" if status == "success" else "error"] += count  # type: ignore[operator]
        return reply(list(points.values()))

    @app.get("/api/dashboard/request-sums")
    @guarded(web, Area.MANAGEMENT)
    async def history_sums() -> Response:
        _only("by", "hours")
        by = request.args.get("by", "model")
        if by not in queries.GROUPS:
            raise RemoteError(f"by must be one of {', '.join(queries.GROUPS)}")
        since = UnixMs(clock.unix_ms() - _whole("hours", 24, 1, 24 * 366) * 3600_000)
        groups = await web.memory.store.read(lambda c: queries.sums(c, since, by))
        times = await web.memory.store.read(
            lambda c: {name: queries.percentiles(c, since, name) for name in ("duration_ms", "ttft_ms", "queue_ms")}
        )
        return reply({"since": clock.rfc3339(since), "by": by, "groups": groups, "percentiles": times})


# ---------------------------------------------------------------- what is asked


def _only(*names: str) -> None:
    unknown = [name for name in request.args if name not in names]
    if unknown:
        raise RemoteError(f"{unknown[0][:TEXT_MAX]} is no parameter of this: it takes {', '.join(names)}")


def _filters() -> Filters:
    status = request.args.get("status")
    if status is not None and status not in STATUSES:
        raise RemoteError(f"status must be one of {', '.join(STATUSES)}")
    start, end = _moment("start_time"), _moment("end_time")
    if start is not None and end is not None and end < start:
        raise RemoteError("end_time lies before start_time")
    return Filters(
        model=_text("model"), agent_id=_text("agent_id"), status=status, start=start, end=end, client=_text("client"), q=_text("q")
    )  # fmt: skip


def _text(name: str) -> str | None:
    value = request.args.get(name)
    if value is not None and not 0 < len(value) <= TEXT_MAX:
        raise RemoteError(f"{name} must have 1 to {TEXT_MAX} characters")
    if value is not None and "\0" in value:
        raise RemoteError(f"{name} must be text")
    return value


def _moment(name: str) -> UnixMs | None:
    text = request.args.get(name)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError
        return UnixMs(max(0, round(moment.timestamp() * 1000)))
    except (ValueError, OverflowError):
        raise RemoteError(f"{name} must be a moment in RFC 3339 with its zone, such as 2026-01-31T12:00:00Z") from None


def _whole(name: str, default: int, low: int, high: int) -> int:
    text = request.args.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise RemoteError(f"{name} must be a whole number from {low} to {high}")
    return int(text)


def _sort() -> str:
    sort = request.args.get("sort", "-timestamp")
    if sort.removeprefix("-") not in queries.SORTS:
        raise RemoteError(f"sort must be one of {', '.join(queries.SORTS)}, with a minus in front for the greatest first")
    return sort


# ---------------------------------------------------------------- what is answered


class _Floors:
    """Filters of which there were lately more records than are counted: who turns pages need not have them counted again and again."""

    def __init__(self) -> None:
        self._until: dict[Filters, float] = {}

    def has(self, filters: Filters) -> bool:
        """Whether it is known of them."""
        return self._until.get(filters, 0.0) > trio.current_time()

    def add(self, filters: Filters) -> None:
        """They were counted."""
        if filters.q is not None:  # these are never counted
            return
        if len(self._until) >= FLOORS_MAX:
            self._until.clear()
        self._until[filters] = trio.current_time() + FLOOR_S


def _page(connection: Connection, filters: Filters, *, number: int, per_page: int, sort: str, many: bool) -> dict[str, Any]:
    found = queries.page(connection, filters, offset=(number - 1) * per_page, limit=per_page, sort=sort, many=many)
    return {
        "records": [shown(record) for record in found.records], "total_count": found.total_count, "total_is_floor": found.is_floor,
        "page": number, "per_page": per_page,
    }  # fmt: skip


async def _begun(pieces: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """The same once its first piece is there, so that what cannot begin is an error and no half answer. Raises RemoteError."""
    first = await anext(pieces)

    async def all_of() -> AsyncIterator[bytes]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return all_of()
